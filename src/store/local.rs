//! The level of the cache in this process: bounded by bytes, each entry with a time of its own.
//!
//! Eviction is TinyLFU: what is asked for often stays when much comes by once (moka's default policy).

use std::time::{Duration, Instant};

use moka::Expiry;
use moka::sync::Cache as Moka;

use super::cache::{CacheKey, CachedItem, CachedValue, KeyState};
use super::cache_metrics::LocalMetrics;

/// What an entry is reckoned to cost beside its value: key, entry, and its places in moka's table, queues and timer wheel.
/// Added up from the fields of moka 0.12 and not measured; with rows of 384 values an error of a quarter is 5 % of all.
const OVERHEAD_BYTES: u32 = 384;

/// Results in this process's memory.
pub struct LocalCache {
    entries: Moka<CacheKey, Entry, KeyState>,
    metrics: LocalMetrics,
}

#[derive(Clone)]
struct Entry {
    item: CachedItem,
    ttl: Duration,
}

impl LocalCache {
    /// An empty one that holds at most so many bytes, [`OVERHEAD_BYTES`] an entry included.
    pub fn new(max_bytes: usize) -> Self {
        let entries = Moka::builder()
            .max_capacity(max_bytes as u64)
            .weigher(|_, entry: &Entry| entry.item.num_bytes().saturating_add(OVERHEAD_BYTES))
            .expire_after(OwnTtl)
            .build_with_hasher(KeyState);
        Self { entries, metrics: LocalMetrics::default() }
    }

    /// What is there, counted as a hit or not at all: whoever finds nothing asks on with [`LocalCache::get`].
    pub fn peek(&self, key: &CacheKey) -> Option<CachedItem> {
        let entry = self.entries.get(key)?;
        self.metrics.hits.increment(1);
        Some(entry.item)
    }

    /// What is there, counted as a hit or a miss.
    pub fn get(&self, key: &CacheKey) -> Option<CachedItem> {
        let found = self.peek(key);
        if found.is_none() {
            self.metrics.misses.increment(1);
        }
        found
    }

    /// Keeps an item for `ttl`, if it is small enough and asked for often enough.
    pub fn put(&self, key: CacheKey, item: CachedItem, ttl: Duration) {
        self.entries.insert(key, Entry { item, ttl });
    }

    /// Forgets an item at once.
    pub fn remove(&self, key: &CacheKey) {
        self.entries.invalidate(key);
    }

    /// See [`super::cache::Cache::upkeep`].
    pub fn upkeep(&self) {
        self.entries.run_pending_tasks();
        self.metrics.entries.set(self.entries.entry_count() as f64);
        self.metrics.bytes.set(self.entries.weighted_size() as f64);
    }
}

impl CachedItem {
    /// Bytes of the value, without what holding it costs.
    fn num_bytes(&self) -> u32 {
        let num_bytes = match &self.value {
            CachedValue::Row(row) => size_of_val::<[f32]>(row),
            CachedValue::Json(json) => json.len(),
        };
        u32::try_from(num_bytes).unwrap_or(u32::MAX)
    }
}

/// Every entry says itself how long it lives; one that is written again begins anew.
struct OwnTtl;

impl Expiry<CacheKey, Entry> for OwnTtl {
    fn expire_after_create(&self, _: &CacheKey, entry: &Entry, _: Instant) -> Option<Duration> {
        Some(entry.ttl)
    }

    fn expire_after_update(&self, _: &CacheKey, entry: &Entry, _: Instant, _: Option<Duration>) -> Option<Duration> {
        Some(entry.ttl)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    fn key(n: u64) -> CacheKey {
        CacheKey(*blake3::hash(&n.to_le_bytes()).as_bytes())
    }

    fn item(num_values: usize) -> CachedItem {
        CachedItem { value: CachedValue::Row(vec![0.5; num_values].into()), num_tokens: 3 }
    }

    #[test]
    fn a_hit_is_the_same_memory() {
        let cache = LocalCache::new(1 << 20);
        let put = item(8);
        cache.put(key(1), put.clone(), LONG);
        let (CachedValue::Row(a), Some(CachedItem { value: CachedValue::Row(b), num_tokens: 3 })) =
            (put.value, cache.get(&key(1)))
        else {
            panic!("a row comes back")
        };
        assert!(Arc::ptr_eq(&a, &b));
        assert_eq!(cache.get(&key(2)), None);
        cache.remove(&key(1));
        assert_eq!(cache.get(&key(1)), None);
    }

    #[test]
    fn entries_live_as_long_as_each_says() {
        let cache = LocalCache::new(1 << 20);
        cache.put(key(1), item(1), Duration::from_millis(20));
        cache.put(key(2), item(1), LONG);
        cache.put(key(3), item(1), LONG);
        cache.put(key(3), item(1), Duration::from_millis(20));
        std::thread::sleep(Duration::from_millis(40));
        assert_eq!(cache.get(&key(1)), None);
        assert!(cache.get(&key(2)).is_some());
        assert_eq!(cache.get(&key(3)), None, "a new time replaces the old one");
    }

    #[test]
    fn bytes_are_bounded_and_the_popular_stays() {
        const NUM_FIT: u64 = 64;
        let cache = LocalCache::new(NUM_FIT as usize * (384 * 4 + OVERHEAD_BYTES as usize));
        cache.put(key(0), item(384), LONG);
        for n in 1..20 * NUM_FIT {
            assert!(cache.get(&key(0)).is_some(), "asked for all the time, and gone after {n}");
            cache.put(key(n), item(384), LONG);
            cache.upkeep();
        }
        assert!(cache.entries.entry_count() <= NUM_FIT, "{}", cache.entries.entry_count());
        assert!(cache.entries.entry_count() > NUM_FIT / 2, "{}", cache.entries.entry_count());
        cache.put(key(u64::MAX), item(384 * NUM_FIT as usize * 2), LONG);
        cache.upkeep();
        assert_eq!(cache.get(&key(u64::MAX)), None, "larger than the whole cache");
    }
}
