//! The cache of results: by item and not by request, bit for bit.

use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

/// Names a result: BLAKE3 over everything that decides its bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheKey(pub [u8; 32]);

/// Hashes keys for tables: eight bytes of a key are hash enough, for it is one itself and nobody can choose it.
#[derive(Debug, Clone, Copy, Default)]
pub struct KeyState;

/// See [`KeyState`].
#[derive(Debug, Default)]
pub struct KeyHasher(u64);

impl BuildHasher for KeyState {
    type Hasher = KeyHasher;

    fn build_hasher(&self) -> KeyHasher {
        KeyHasher::default()
    }
}

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk() {
            self.0 = u64::from_le_bytes(*first);
        }
    }

    /// The length before an array, the same for all keys.
    fn write_usize(&mut self, _: usize) {}
}

/// A result as it is cached: a row of an embedding, or another task's item as JSON bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct CachedItem {
    pub value: CachedValue,
    /// Tokens of the item, special tokens included: a hit reports the same usage as its miss.
    pub num_tokens: u32,
}

/// The value of a [`CachedItem`]. Shared, because the level in this process hands out the same one many times.
#[derive(Debug, Clone, PartialEq)]
pub enum CachedValue {
    Row(Arc<[f32]>),
    Json(Arc<[u8]>),
}

/// The cache as it is used. Nothing here fails: a level that is slow, full or away is a miss.
#[async_trait]
pub trait Cache: Send + Sync + 'static {
    /// What this process has at hand. Never waits: a microsecond at most.
    fn peek(&self, key: &CacheKey) -> Option<CachedItem>;

    /// One answer a key, in their order.
    async fn get(&self, keys: &[CacheKey]) -> Vec<Option<CachedItem>>;

    /// Keeps items for `ttl` from now, if it can. Returns without waiting for a level that is away.
    async fn put(&self, items: &[(CacheKey, CachedItem)], ttl: Duration);

    /// Forgets items: those of an erased user. Waits until they are gone, or says that it cannot be known: `false`.
    async fn remove(&self, keys: &[CacheKey]) -> bool;

    /// Drops what has expired and brings the gauges up to date. Call it every few seconds.
    ///
    /// Blocks: milliseconds.
    fn upkeep(&self);
}

/// A level that other processes share. As [`Cache`], it never fails.
#[async_trait]
pub trait SharedLevel: Send + Sync + 'static {
    /// One answer a key, in their order, each with the time it may still be used for.
    async fn get(&self, keys: &[CacheKey]) -> Vec<Option<(CachedItem, Duration)>>;

    /// See [`Cache::put`].
    fn put(&self, items: &[(CacheKey, CachedItem)], ttl: Duration);

    /// See [`Cache::remove`].
    async fn remove(&self, keys: &[CacheKey]) -> bool;
}
