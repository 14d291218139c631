//! The cache filled from recorded history: at the start of a server, and by a command for the Redis that servers share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use parking_lot::Mutex;

use super::models;
use crate::config::Settings;
use crate::config::words::CacheUrl;
use crate::inference::Inferences;
use crate::inference::keep::Keeper;
use crate::inference::warm::{History, Known, Range, Sink, Warmed, warm};
use crate::model::load::describe;
use crate::ops::device;
use crate::store::cache::{CacheKey, CachedItem, SharedLevel};
use crate::store::embedded::beside::Beside;
use crate::store::mongo::MongoStore;
use crate::store::place::Place;
use crate::store::query::{Page, Query};
use crate::store::redis::RedisCache;
use crate::{Error, Result};

/// How often it is looked whether the models are there, and the store if it was away.
const POLL: Duration = Duration::from_millis(50);
const RETRY: Duration = Duration::from_secs(5);

/// How long a command waits for Redis.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Fills the cache of this process from the newest `limit` records, once the models are loaded. Nothing waits for it.
pub async fn at_start(inferences: Arc<Inferences>, keeper: Arc<Keeper>, starting: Arc<AtomicBool>, limit: usize) {
    if limit == 0 {
        return;
    }
    while starting.load(Ordering::Relaxed) {
        tokio::time::sleep(POLL).await;
    }
    let known = inferences.known();
    let (history, range) = (keeper.store().clone(), Range { limit, from: None });
    loop {
        let start = Instant::now();
        match warm(&known, history.as_ref(), inferences.as_ref(), range, &|_| {}).await {
            Ok(warmed) => {
                let seconds = start.elapsed().as_secs_f64();
                return tracing::info!(?warmed, seconds, "the cache is filled from recorded history");
            }
            Err(cause @ Error::StoreUnavailable { .. }) => {
                tracing::warn!(%cause, "the cache cannot be filled from recorded history now; it is tried again");
                tokio::time::sleep(RETRY).await;
            }
            Err(cause) => return tracing::error!(%cause, "the cache is not filled from recorded history"),
        }
    }
}

/// Fills the Redis of the settings from the newest records, beside servers. Call it on a runtime of several threads.
///
/// Blocks, for as long as the models' tokenizers and the store take, on the calling thread as well.
/// Errors: those of the models and the store; [`Error::Config`] where the settings name no Redis, or no cache at all;
/// [`Error::StoreUnavailable`] where Redis is away.
pub async fn once(
    settings: &Settings,
    place: &Place,
    range: Range,
    progress: &(dyn Fn(&Warmed) + Send + Sync),
) -> Result<Warmed> {
    let CacheUrl::Redis(address) = &settings.cache.url else {
        let fault =
            "cache.url: `memory` is the cache of a server's own process; `cache.warm` fills that when it starts";
        return Err(Error::Config { faults: vec![fault.to_string()] });
    };
    if settings.cache.ttl.is_zero() {
        return Err(Error::Config { faults: vec!["cache.ttl: with 0s there is no cache to fill".to_string()] });
    }
    let known = known(settings)?;
    let history: Box<dyn History> = match place {
        Place::Embedded(folder) => Box::new(Beside::open(folder).map(|store| Shared(Mutex::new(store)))?),
        Place::Mongo { settings, .. } => Box::new(MongoStore::new(settings.clone())?),
    };
    let redis = RedisCache::start(address.clone(), settings.cache.timeout, settings.cache.ttl)?;
    let start = Instant::now();
    while !redis.is_up() {
        if start.elapsed() > CONNECT_TIMEOUT {
            let cause = format!("cache.url: Redis did not answer within {CONNECT_TIMEOUT:?}");
            return Err(Error::StoreUnavailable { cause });
        }
        tokio::time::sleep(POLL).await;
    }
    warm(&known, history.as_ref(), &ToRedis { redis, ttl: settings.cache.ttl }, range, progress).await
}

/// The models that a server of these settings would serve, without their weights in memory.
fn known(settings: &Settings) -> Result<Vec<Known>> {
    let devices = device::select(&settings.ai.device)?;
    let chosen = models::choose(&settings.ai)?;
    let known = chosen.iter().map(|chosen| {
        let (info, encoder) = describe(&chosen.spec(), &devices)?;
        Ok(Known { info, encoder })
    });
    known.collect()
}

/// An embedded store that a server may be working on.
struct Shared(Mutex<Beside>);

#[async_trait]
impl History for Shared {
    async fn page(&self, query: &Query) -> Result<Page> {
        tokio::task::block_in_place(|| self.0.lock().list(query))
    }
}

struct ToRedis {
    redis: RedisCache,
    ttl: Duration,
}

#[async_trait]
impl Sink for ToRedis {
    async fn put(&self, items: &[(CacheKey, CachedItem)]) -> Result<()> {
        self.redis.write(items, self.ttl).await
    }

    async fn remove(&self, keys: &[CacheKey]) {
        if !self.redis.remove(keys).await {
            tracing::warn!(
                num_keys = keys.len(),
                "results of deleted records may stay in Redis until cache.ttl is over"
            );
        }
    }
}
