//! The levels of the cache, one behind the other: this process's memory, then what processes share.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::cache::{Cache, CacheKey, CachedItem, SharedLevel};
use super::local::LocalCache;

/// The level in this process, with a shared one behind it or without. What the shared one finds fills the local one for
/// the time that is left to it.
///
/// ```text
/// peek ──▶ local
/// get  ──▶ local ──▶ shared, for the keys not found ──▶ local is filled
/// put  ──▶ local, and shared without waiting
/// ```
pub struct Layers {
    local: LocalCache,
    shared: Option<Arc<dyn SharedLevel>>,
}

impl Layers {
    pub fn new(local: LocalCache, shared: Option<Arc<dyn SharedLevel>>) -> Self {
        Self { local, shared }
    }
}

#[async_trait]
impl Cache for Layers {
    fn peek(&self, key: &CacheKey) -> Option<CachedItem> {
        self.local.peek(key)
    }

    async fn get(&self, keys: &[CacheKey]) -> Vec<Option<CachedItem>> {
        let mut items: Vec<Option<CachedItem>> = keys.iter().map(|key| self.local.get(key)).collect();
        let Some(shared) = &self.shared else { return items };
        let missing: Vec<usize> = (0..keys.len()).filter(|&i| items[i].is_none()).collect();
        if missing.is_empty() {
            return items;
        }
        let missing_keys: Vec<CacheKey> = missing.iter().map(|&i| keys[i]).collect();
        for (&i, found) in missing.iter().zip(shared.get(&missing_keys).await) {
            if let Some((item, left)) = found {
                self.local.put(keys[i], item.clone(), left);
                items[i] = Some(item);
            }
        }
        items
    }

    async fn put(&self, items: &[(CacheKey, CachedItem)], ttl: Duration) {
        for (key, item) in items {
            self.local.put(*key, item.clone(), ttl);
        }
        if let Some(shared) = &self.shared {
            shared.put(items, ttl);
        }
    }

    async fn remove(&self, keys: &[CacheKey]) -> bool {
        let is_gone = match &self.shared {
            Some(shared) => shared.remove(keys).await,
            None => true,
        };
        // After the shared level: a look-up meanwhile may have brought an item back from there.
        keys.iter().for_each(|key| self.local.remove(key));
        is_gone
    }

    fn upkeep(&self) {
        self.local.upkeep();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use parking_lot::Mutex;

    use super::super::cache::CachedValue;
    use super::*;

    const TTL: Duration = Duration::from_secs(60);

    /// A shared level in memory: counts what it is asked, may be away.
    #[derive(Default)]
    struct Fake {
        items: Mutex<HashMap<CacheKey, (CachedItem, Duration)>>,
        asked: Mutex<Vec<Vec<CacheKey>>>,
        is_away: bool,
    }

    #[async_trait]
    impl SharedLevel for Fake {
        async fn get(&self, keys: &[CacheKey]) -> Vec<Option<(CachedItem, Duration)>> {
            self.asked.lock().push(keys.to_vec());
            keys.iter().map(|key| self.items.lock().get(key).filter(|_| !self.is_away).cloned()).collect()
        }

        fn put(&self, items: &[(CacheKey, CachedItem)], ttl: Duration) {
            self.items.lock().extend(items.iter().map(|(key, item)| (*key, (item.clone(), ttl))));
        }

        async fn remove(&self, keys: &[CacheKey]) -> bool {
            keys.iter().for_each(|key| drop(self.items.lock().remove(key)));
            !self.is_away
        }
    }

    fn key(n: u8) -> CacheKey {
        CacheKey([n; 32])
    }

    fn item(n: u8) -> CachedItem {
        CachedItem { value: CachedValue::Row(vec![f32::from(n)].into()), num_tokens: u32::from(n) }
    }

    fn layers(shared: &Arc<Fake>) -> Layers {
        Layers::new(LocalCache::new(1 << 20), Some(shared.clone()))
    }

    #[tokio::test]
    async fn only_what_is_missing_is_asked_for_and_once() {
        let shared = Arc::new(Fake::default());
        let (ours, theirs) = (layers(&shared), layers(&shared));
        theirs.put(&[(key(1), item(1)), (key(3), item(3))], TTL).await;
        ours.put(&[(key(2), item(2))], TTL).await;
        let found = ours.get(&[key(1), key(2), key(4), key(3)]).await;
        assert_eq!(found, [Some(item(1)), Some(item(2)), None, Some(item(3))]);
        assert_eq!(*shared.asked.lock(), [vec![key(1), key(4), key(3)]]);
        // From here on it is at hand.
        assert_eq!(ours.peek(&key(1)), Some(item(1)));
        assert_eq!(ours.get(&[key(1), key(3)]).await, [Some(item(1)), Some(item(3))]);
        assert_eq!(shared.asked.lock().len(), 1);
    }

    #[tokio::test]
    async fn what_is_filled_keeps_the_time_that_is_left() {
        let shared = Arc::new(Fake::default());
        shared.items.lock().insert(key(1), (item(1), Duration::from_millis(20)));
        let layers = layers(&shared);
        assert_eq!(layers.get(&[key(1)]).await, [Some(item(1))]);
        std::thread::sleep(Duration::from_millis(40));
        assert_eq!(layers.peek(&key(1)), None);
    }

    #[tokio::test]
    async fn away_is_a_miss_and_removal_says_that_it_is_not_known() {
        let shared = Arc::new(Fake { is_away: true, ..Fake::default() });
        let layers = layers(&shared);
        assert_eq!(layers.get(&[key(1)]).await, [None]);
        layers.put(&[(key(1), item(1))], TTL).await;
        assert_eq!(layers.get(&[key(1)]).await, [Some(item(1))], "the local level goes on");
        assert!(!layers.remove(&[key(1)]).await);
        assert_eq!(layers.peek(&key(1)), None);
        let alone = Layers::new(LocalCache::new(1 << 20), None);
        alone.put(&[(key(1), item(1))], TTL).await;
        assert!(alone.remove(&[key(1)]).await);
        assert_eq!(alone.get(&[key(1)]).await, [None]);
    }
}
