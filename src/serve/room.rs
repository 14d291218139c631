//! Room for what waits: the one place where work is refused for want of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ::metrics::Gauge;

use super::class::PerClass;
use crate::request::Priority;

/// A bound on the entries waiting, of each class. Places are reserved for a whole request or not at all.
///
/// Interactive requests find the same room whatever background work waits: its places are others. It gets some only while
/// less than half as many are taken by both, so that all that waits is bounded too: by the limit for interactive entries,
/// and by half of it and one request for background ones. A stricter bound would keep a long background request out for
/// ever.
///
/// The bound lives here and not in the channel because its limit changes while the server runs, and because
/// a request holds its places from before it is tokenised: the encoders' backlog is bounded by the same limit.
#[derive(Default)]
pub struct Room {
    held: PerClass<Held>,
}

/// The places that one class holds.
struct Held {
    num_taken: AtomicUsize,
    /// Requests that hold places; the parts of one on several devices count one by one.
    num_requests: AtomicUsize,
    /// Shows `num_taken`. Moved by differences, so that it ends at the truth in whatever order threads move it.
    depth: Gauge,
}

/// Places that nobody watches.
impl Default for Held {
    fn default() -> Self {
        Self { num_taken: AtomicUsize::new(0), num_requests: AtomicUsize::new(0), depth: Gauge::noop() }
    }
}

impl Room {
    pub fn new(depths: PerClass<Gauge>) -> Self {
        let held = |depth| Held { depth, ..Held::default() };
        let PerClass { interactive, background } = depths;
        Self { held: PerClass { interactive: held(interactive), background: held(background) } }
    }

    /// Entries that a request of this class has beside it or before it: all of them for background work.
    pub fn num_taken(&self, class: Priority) -> usize {
        let taken = |class| self.held[class].num_taken.load(Ordering::Relaxed);
        match class {
            Priority::Interactive => taken(class),
            Priority::Background => taken(class).saturating_add(taken(Priority::Interactive)),
        }
    }

    /// Most of these that go before the last of a new request's `num_inputs` entries. Requests of a class take turns, so
    /// that before its n-th entry go at most n of every other's.
    pub fn num_ahead(&self, class: Priority, num_inputs: usize) -> usize {
        let held = &self.held[class];
        let num_taken = held.num_taken.load(Ordering::Relaxed);
        let in_turn = num_taken.min(held.num_requests.load(Ordering::Relaxed).saturating_mul(num_inputs));
        in_turn + self.num_taken(class).saturating_sub(num_taken)
    }

    /// Takes `count` places if the limit, which is that of interactive entries, leaves this class any; else the number
    /// of those that are taken now and count for it.
    pub fn reserve(self: &Arc<Self>, class: Priority, count: usize, limit: usize) -> Result<Places, usize> {
        let held = &self.held[class];
        let others = self.num_taken(Priority::Interactive);
        let fits = |taken: usize| {
            let sum = taken.checked_add(count)?;
            let is_room = match class {
                Priority::Interactive => sum <= limit,
                Priority::Background => taken.saturating_add(others) < background_limit(limit),
            };
            is_room.then_some(sum)
        };
        let reserved = held.num_taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits);
        reserved.map_err(|_| self.num_taken(class))?;
        held.num_requests.fetch_add(1, Ordering::Relaxed);
        held.depth.increment(count as f64);
        Ok(Places { room: self.clone(), class, count })
    }
}

/// Entries of both classes at which no more background work is let in. At least 1 where the limit is.
pub fn background_limit(limit: usize) -> usize {
    limit.div_ceil(2)
}

/// Places taken in a [`Room`]. Dropping gives back what was not given back before.
pub struct Places {
    room: Arc<Room>,
    class: Priority,
    count: usize,
}

impl Places {
    /// Gives back some of the places. `count` is capped at those held.
    pub fn give_back(&mut self, count: usize) {
        let count = count.min(self.count);
        self.count -= count;
        if count > 0 {
            self.held().num_taken.fetch_sub(count, Ordering::Relaxed);
            self.held().depth.decrement(count as f64);
        }
    }

    /// Takes `count` of the places out, for a part of the request that waits elsewhere. Capped at those held.
    pub fn split(&mut self, count: usize) -> Self {
        let count = count.min(self.count);
        self.count -= count;
        self.held().num_requests.fetch_add(1, Ordering::Relaxed);
        Self { room: self.room.clone(), class: self.class, count }
    }

    fn held(&self) -> &Held {
        &self.room.held[self.class]
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        self.give_back(self.count);
        self.held().num_requests.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Priority::{Background, Interactive};

    /// Entries and requests of a class that hold places.
    fn held(room: &Room, class: Priority) -> (usize, usize) {
        let held = &room.held[class];
        (held.num_taken.load(Ordering::Relaxed), held.num_requests.load(Ordering::Relaxed))
    }

    #[test]
    fn places_are_taken_whole_or_not_at_all() {
        let room = Arc::new(Room::default());
        let mut first = room.reserve(Interactive, 3, 4).unwrap();
        assert_eq!(room.reserve(Interactive, 2, 4).err(), Some(3));
        let second = room.reserve(Interactive, 1, 4).unwrap();
        assert_eq!(room.num_taken(Interactive), 4);
        first.give_back(2);
        assert_eq!(room.num_taken(Interactive), 2);
        first.give_back(9); // never more than it holds
        assert_eq!(held(&room, Interactive), (1, 2));
        drop((first, second));
        assert_eq!(held(&room, Interactive), (0, 0));
        assert!(room.reserve(Interactive, usize::MAX, 4).is_err(), "no overflow");
    }

    #[test]
    fn places_that_are_split_are_neither_more_nor_fewer() {
        let room = Arc::new(Room::default());
        let mut places = room.reserve(Interactive, 5, 5).unwrap();
        let parts = [places.split(2), places.split(9)];
        assert_eq!(held(&room, Interactive), (5, 3));
        drop(places);
        assert_eq!(held(&room, Interactive), (5, 2));
        drop(parts);
        assert_eq!(held(&room, Interactive), (0, 0));
    }

    #[test]
    fn background_work_takes_other_places_and_only_while_half_of_the_room_is_free() {
        let room = Arc::new(Room::default());
        let background = room.reserve(Background, 4, 10).unwrap();
        assert_eq!((held(&room, Background), held(&room, Interactive)), ((4, 1), (0, 0)));
        let long = room.reserve(Background, 10, 10).unwrap();
        assert_eq!(room.reserve(Background, 1, 10).err(), Some(14), "half are taken");
        let all = room.reserve(Interactive, 10, 10).expect("what background work holds is no matter");
        assert_eq!((room.num_taken(Interactive), room.num_taken(Background)), (10, 24));
        drop((background, long));
        assert_eq!(room.reserve(Background, 1, 10).err(), Some(10), "half are taken by interactive entries");
        drop(all);
        drop(room.reserve(Background, 1, 1).expect("the smallest room has one for it"));
        assert!(room.reserve(Background, usize::MAX, usize::MAX).is_ok());
        assert_eq!((held(&room, Background), held(&room, Interactive)), ((0, 0), (0, 0)));
    }

    #[test]
    fn before_background_work_goes_everything_interactive() {
        let room = Arc::new(Room::default());
        let _held = [(Interactive, 30), (Interactive, 5), (Background, 20), (Background, 1)]
            .map(|(class, count)| room.reserve(class, count, 1000).unwrap());
        assert_eq!([1, 10, 100].map(|n| room.num_ahead(Interactive, n)), [2, 20, 35]);
        assert_eq!([1, 10, 100].map(|n| room.num_ahead(Background, n)), [37, 55, 56]);
    }

    #[test]
    fn the_depth_shown_is_the_number_taken() {
        let shown = Arc::new(std::sync::atomic::AtomicU64::new(0)); // the bits of an f64
        let depth = || f64::from_bits(shown.load(Ordering::Relaxed));
        let room =
            Arc::new(Room::new(PerClass { interactive: Gauge::from_arc(shown.clone()), background: Gauge::noop() }));
        let mut places = room.reserve(Interactive, 3, 4).unwrap();
        assert!(room.reserve(Interactive, 2, 4).is_err());
        assert_eq!(depth(), 3.0);
        places.give_back(1);
        assert_eq!(depth(), 2.0);
        drop(places);
        assert_eq!(depth(), 0.0);
    }
}
