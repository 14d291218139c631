//! Admission: who may wait, and the way to the worker. The one place where work is refused for want of room.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use ::metrics::Gauge;
use crossbeam::channel::{Receiver, Sender, unbounded};
use tokio::sync::Notify;

use super::loss::Loss;
use super::ticket::{Client, Ticket};

/// A bound on the entries waiting. Places are reserved for a whole request or not at all.
///
/// The bound lives here and not in the channel because its limit changes while the server runs, and because
/// a request holds its places from before it is tokenised: the encoders' backlog is bounded by the same limit.
pub struct Room {
    num_taken: AtomicUsize,
    /// Requests that hold places; the parts of one on several devices count one by one.
    num_requests: AtomicUsize,
    /// Shows `num_taken`. Moved by differences, so that it ends at the truth in whatever order threads move it.
    depth: Gauge,
}

/// A room nobody watches.
impl Default for Room {
    fn default() -> Self {
        Self::new(Gauge::noop())
    }
}

impl Room {
    pub fn new(depth: Gauge) -> Self {
        Self { num_taken: AtomicUsize::new(0), num_requests: AtomicUsize::new(0), depth }
    }

    pub fn num_taken(&self) -> usize {
        self.num_taken.load(Ordering::Relaxed)
    }

    /// Requests that hold places now. One whose entries wait for several devices counts once for each, as it takes
    /// its turns there.
    pub fn num_requests(&self) -> usize {
        self.num_requests.load(Ordering::Relaxed)
    }

    /// Takes `count` places if the limit leaves them free; else the number taken now.
    pub fn reserve(self: &Arc<Self>, count: usize, limit: usize) -> Result<Places, usize> {
        let fits = |taken: usize| taken.checked_add(count).filter(|&sum| sum <= limit);
        self.num_taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)?;
        self.num_requests.fetch_add(1, Ordering::Relaxed);
        self.depth.increment(count as f64);
        Ok(Places { room: self.clone(), count })
    }
}

/// Places taken in a [`Room`]. Dropping gives back what was not given back before.
pub struct Places {
    room: Arc<Room>,
    count: usize,
}

impl Places {
    /// Gives back some of the places. `count` is capped at those held.
    pub fn give_back(&mut self, count: usize) {
        let count = count.min(self.count);
        self.count -= count;
        if count > 0 {
            self.room.num_taken.fetch_sub(count, Ordering::Relaxed);
            self.room.depth.decrement(count as f64);
        }
    }

    /// Takes `count` of the places out, for a part of the request that waits elsewhere. Capped at those held.
    pub fn split(&mut self, count: usize) -> Self {
        let count = count.min(self.count);
        self.count -= count;
        self.room.num_requests.fetch_add(1, Ordering::Relaxed);
        Self { room: self.room.clone(), count }
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        self.give_back(self.count);
        self.room.num_requests.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The door of the whole engine: open, or closed for a drain; counts what was let in and not yet answered.
#[derive(Debug, Default)]
pub struct Gate {
    num_accepted: AtomicUsize,
    draining: AtomicBool,
    /// Set when the drain's time is up: the workers answer instead of computing.
    aborted: AtomicBool,
    /// Told when the last accepted entry of a draining engine is gone.
    emptied: Notify,
    /// Of any device: the process ends then, and the gate with it.
    pub loss: Loss,
}

impl Gate {
    /// Lets `count` entries in; `None` while draining.
    pub fn enter(self: &Arc<Self>, count: usize) -> Option<Accepted> {
        // Counted first, then asked: a drain that begins in between sees the count and waits for the answer
        // to the question. Both sides are sequentially consistent, or each could miss the other.
        self.num_accepted.fetch_add(count, Ordering::SeqCst);
        let accepted = Accepted { gate: self.clone(), count };
        (!self.draining.load(Ordering::SeqCst)).then_some(accepted)
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    pub fn is_aborted(&self) -> bool {
        self.aborted.load(Ordering::Relaxed)
    }

    pub fn close(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    pub fn abort(&self) {
        self.aborted.store(true, Ordering::SeqCst);
    }

    pub fn num_accepted(&self) -> usize {
        self.num_accepted.load(Ordering::SeqCst)
    }

    /// Returns when nothing accepted is left. Only a closed gate is sure to stay empty.
    pub async fn emptied(&self) {
        loop {
            // Made before the look at the count, so that no notice falls between the two.
            let notice = self.emptied.notified();
            if self.num_accepted() == 0 {
                return;
            }
            notice.await;
        }
    }
}

/// Entries let in. Dropping counts them out.
#[derive(Debug)]
pub struct Accepted {
    gate: Arc<Gate>,
    count: usize,
}

impl Drop for Accepted {
    fn drop(&mut self) {
        let before = self.gate.num_accepted.fetch_sub(self.count, Ordering::SeqCst);
        if before == self.count && self.gate.is_draining() {
            self.gate.emptied.notify_one();
        }
    }
}

/// A request as a worker receives it: all its entries at once, or, of a long one, those that are this device's part.
pub struct Push {
    pub client: Arc<Client>,
    /// Not empty; all of `client`.
    pub tickets: Vec<Ticket>,
    /// One place an entry, given back as they leave the queue.
    pub places: Places,
}

/// What the worker is sent.
pub enum Message {
    Push(Push),
    /// Look at the gate, the limits and your state again.
    Wake,
}

/// The way to one worker. Unbounded as a channel, bounded by the [`Places`] that ride in each message.
pub fn channel() -> (Sender<Message>, Receiver<Message>) {
    unbounded()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_taken_whole_or_not_at_all() {
        let room = Arc::new(Room::default());
        let mut first = room.reserve(3, 4).unwrap();
        assert_eq!(room.reserve(2, 4).err(), Some(3));
        let second = room.reserve(1, 4).unwrap();
        assert_eq!(room.num_taken(), 4);
        first.give_back(2);
        assert_eq!(room.num_taken(), 2);
        first.give_back(9); // never more than it holds
        assert_eq!((room.num_taken(), room.num_requests()), (1, 2));
        drop((first, second));
        assert_eq!((room.num_taken(), room.num_requests()), (0, 0));
        assert!(room.reserve(usize::MAX, 4).is_err(), "no overflow");
    }

    #[test]
    fn places_that_are_split_are_neither_more_nor_fewer() {
        let room = Arc::new(Room::default());
        let mut places = room.reserve(5, 5).unwrap();
        let parts = [places.split(2), places.split(9)];
        assert_eq!((room.num_taken(), room.num_requests()), (5, 3));
        drop(places);
        assert_eq!((room.num_taken(), room.num_requests()), (5, 2));
        drop(parts);
        assert_eq!((room.num_taken(), room.num_requests()), (0, 0));
    }

    #[test]
    fn the_depth_shown_is_the_number_taken() {
        let shown = Arc::new(std::sync::atomic::AtomicU64::new(0)); // the bits of an f64
        let depth = || f64::from_bits(shown.load(Ordering::Relaxed));
        let room = Arc::new(Room::new(Gauge::from_arc(shown.clone())));
        let mut places = room.reserve(3, 4).unwrap();
        assert!(room.reserve(2, 4).is_err());
        assert_eq!(depth(), 3.0);
        places.give_back(1);
        assert_eq!(depth(), 2.0);
        drop(places);
        assert_eq!(depth(), 0.0);
    }

    #[tokio::test]
    async fn a_closed_gate_lets_nobody_in_and_tells_when_it_is_empty() {
        let gate = Arc::new(Gate::default());
        let inside = gate.enter(2).unwrap();
        gate.close();
        assert!(gate.enter(1).is_none());
        assert_eq!(gate.num_accepted(), 2);
        let waiter = tokio::spawn({
            let gate = gate.clone();
            async move { gate.emptied().await }
        });
        tokio::task::yield_now().await;
        drop(inside);
        waiter.await.unwrap();
        assert_eq!(gate.num_accepted(), 0);
    }
}
