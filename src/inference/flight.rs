//! Equal items in flight are computed once in the whole process.
//!
//! ```text
//! join ─▶ Lead: nobody computes it         ─▶ complete(item): all who wait get it
//!    │                                     ─▶ dropped (it failed, or its client has gone): the first who waits leads
//!    └──▶ Wait: somebody computes it       ─▶ Event::Done(item) or Event::Lead
//! ```
//!
//! Who waits keeps its own deadline, and tries itself when it is given the lead: a failure is never passed on, because
//! it may be the other request's own (its deadline, a place in the queue).

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::store::cache::{CacheKey, CachedItem, KeyState};

/// Locks are held for moments, and this many are enough that two cores seldom meet at one.
const NUM_SHARDS: usize = 32;

/// All items in flight. Clones are the same.
#[derive(Clone, Default)]
pub struct Flights {
    shards: Arc<[Shard; NUM_SHARDS]>,
}

/// Items in flight with those who wait for them, in the order they came. The other ends are with [`Wait`]s; a closed one
/// has gone.
type Shard = Mutex<HashMap<CacheKey, VecDeque<oneshot::Sender<Event>>, KeyState>>;

/// What becomes of someone who joins.
pub enum Joined {
    Lead(Lead),
    Wait(Wait),
}

/// What comes to someone who waits.
pub enum Event {
    Done(CachedItem),
    /// The one who computed it has failed or gone: it is this one's turn.
    Lead(Lead),
}

/// The other end of a place among those who wait. Dropping it leaves the place.
pub type Wait = oneshot::Receiver<Event>;

/// The duty to compute an item. Dropping it hands it over.
pub struct Lead {
    key: CacheKey,
    /// `None` once it is fulfilled or handed over.
    flights: Option<Flights>,
}

impl Flights {
    /// Joins those who want this item.
    pub fn join(&self, key: CacheKey) -> Joined {
        let mut shard = self.shard(&key).lock();
        match shard.get_mut(&key) {
            Some(waiting) => {
                let (place, wait) = oneshot::channel();
                waiting.push_back(place);
                Joined::Wait(wait)
            }
            None => {
                shard.insert(key, VecDeque::new());
                Joined::Lead(Lead { key, flights: Some(self.clone()) })
            }
        }
    }

    /// Items in flight now.
    pub fn num_in_flight(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }

    fn shard(&self, key: &CacheKey) -> &Shard {
        // Not the bytes that the maps take for their hash: all keys of a shard would begin alike.
        &self.shards[usize::from(key.0[31]) % NUM_SHARDS]
    }
}

impl Lead {
    /// Ends the flight with a result. Put the item into the cache first: whoever joins from here on finds it there.
    pub fn complete(mut self, item: &CachedItem) {
        let Some(flights) = self.flights.take() else { return };
        let waiting = flights.shard(&self.key).lock().remove(&self.key);
        for place in waiting.into_iter().flatten() {
            // Fails where the one who waited has gone.
            let _ = place.send(Event::Done(item.clone()));
        }
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        let Some(flights) = self.flights.take() else { return };
        loop {
            let next = {
                let mut shard = flights.shard(&self.key).lock();
                let next = shard.get_mut(&self.key).and_then(VecDeque::pop_front);
                if next.is_none() {
                    shard.remove(&self.key);
                }
                next
            };
            let Some(place) = next else { return };
            // Out of the lock: a place whose owner has gone gives the lead back here, and the next one gets it.
            match place.send(Event::Lead(Lead { key: self.key, flights: Some(flights.clone()) })) {
                Ok(()) => return,
                Err(Event::Lead(mut back)) => back.flights = None,
                Err(Event::Done(_)) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::cache::CachedValue;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const KEY: CacheKey = CacheKey([7; 32]);

    fn item() -> CachedItem {
        CachedItem { value: CachedValue::Row(vec![1.0].into()), num_tokens: 1 }
    }

    fn lead(flights: &Flights) -> Lead {
        match flights.join(KEY) {
            Joined::Lead(lead) => lead,
            Joined::Wait(_) => panic!("somebody leads already"),
        }
    }

    fn wait(flights: &Flights) -> Wait {
        match flights.join(KEY) {
            Joined::Wait(wait) => wait,
            Joined::Lead(_) => panic!("nobody leads"),
        }
    }

    #[tokio::test]
    async fn one_computes_and_all_get_it() {
        let flights = Flights::default();
        let first = lead(&flights);
        let waits: Vec<Wait> = (0..3).map(|_| wait(&flights)).collect();
        assert!(matches!(flights.join(CacheKey([8; 32])), Joined::Lead(_)), "another item is another flight");
        first.complete(&item());
        for wait in waits {
            assert!(matches!(wait.await, Ok(Event::Done(got)) if got == item()));
        }
        assert_eq!(flights.num_in_flight(), 0);
        lead(&flights);
    }

    #[tokio::test]
    async fn who_fails_hands_over_to_the_first_who_still_waits() {
        let flights = Flights::default();
        let first = lead(&flights);
        let (gone, second, third) = (wait(&flights), wait(&flights), wait(&flights));
        drop(gone);
        drop(first);
        let Ok(Event::Lead(second)) = second.await else { panic!("the lead is handed over") };
        second.complete(&item());
        assert!(matches!(third.await, Ok(Event::Done(_))));
        assert_eq!(flights.num_in_flight(), 0);
    }

    #[tokio::test]
    async fn a_lead_on_its_way_to_one_who_goes_is_handed_on() {
        let flights = Flights::default();
        let first = lead(&flights);
        let (second, third) = (wait(&flights), wait(&flights));
        drop(first);
        // The lead lies in this one's channel, unread.
        drop(second);
        assert!(matches!(third.await, Ok(Event::Lead(_))));
        assert_eq!(flights.num_in_flight(), 0, "and after the last one nothing is left");
    }

    #[tokio::test]
    async fn in_a_crowd_with_failures_everybody_gets_it_and_nobody_computes_at_once() {
        let flights = Flights::default();
        let (computing, num_computed) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let tasks: Vec<_> = (0..100)
            .map(|i| {
                let (flights, computing, num_computed) = (flights.clone(), computing.clone(), num_computed.clone());
                tokio::spawn(async move {
                    let lead = match flights.join(KEY) {
                        Joined::Lead(lead) => lead,
                        Joined::Wait(wait) => match wait.await.expect("a place is never forgotten") {
                            Event::Done(_) => return true,
                            Event::Lead(lead) => lead,
                        },
                    };
                    assert_eq!(computing.fetch_add(1, Ordering::SeqCst), 0, "two compute the same");
                    // Long enough that everybody has had a turn meanwhile.
                    tokio::task::yield_now().await;
                    tokio::task::yield_now().await;
                    computing.fetch_sub(1, Ordering::SeqCst);
                    if i < 10 {
                        drop(lead);
                        return false;
                    }
                    num_computed.fetch_add(1, Ordering::SeqCst);
                    lead.complete(&item());
                    true
                })
            })
            .collect();
        let mut num_served = 0;
        for task in tasks {
            num_served += usize::from(task.await.unwrap());
        }
        assert_eq!((num_served, num_computed.load(Ordering::SeqCst), flights.num_in_flight()), (90, 1, 0));
    }
}
