//! Admission: the door of the engine, and the way from it to the worker.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crossbeam::channel::{Receiver, Sender, unbounded};
use tokio::sync::Notify;

use super::loss::Loss;
use super::room::Places;
use super::ticket::{Client, Ticket};

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
