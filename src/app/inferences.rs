//! The cache of the settings, and what computes through it.

use std::sync::Arc;

use crate::Result;
use crate::config::Cache as Settings;
use crate::config::words::CacheUrl;
use crate::inference::Inferences;
use crate::serve::Engine;
use crate::store::cache::{Cache, SharedLevel};
use crate::store::layers::Layers;
use crate::store::local::LocalCache;
use crate::store::redis::RedisCache;

/// Joins the engine with the cache of these settings, or with none. Redis may be away: it is connected to in the
/// background.
///
/// Errors: [`crate::Error::Config`] for a file of certificates that cannot be read.
pub fn build(engine: &Arc<Engine>, settings: &Settings) -> Result<Inferences> {
    if settings.ttl.is_zero() {
        return Ok(Inferences::new(engine.clone(), None));
    }
    let shared: Option<Arc<dyn SharedLevel>> = match &settings.url {
        CacheUrl::Memory => None,
        CacheUrl::Redis(address) => Some(Arc::new(RedisCache::start(address.clone(), settings.timeout, settings.ttl)?)),
    };
    let cache: Arc<dyn Cache> = Arc::new(Layers::new(LocalCache::new(settings.max_bytes.0), shared));
    Ok(Inferences::new(engine.clone(), Some((cache, settings.ttl))))
}
