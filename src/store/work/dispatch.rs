//! Who is told of tasks: what lets processes share them without asking the store all the time.
//!
//! The tasks themselves are in [`super::Work`], which says who holds one. What is told here may be lost or told twice:
//! lost offers are found by looking for overdue tasks, repeated ones find theirs held or gone.

use std::collections::VecDeque;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// Offers that may wait in this process; more are found by looking.
const MAX_OFFERS: usize = 10_000;

/// Tells processes of tasks.
#[async_trait]
pub trait Dispatch: Send + Sync + 'static {
    /// Offers tasks that are due. It never fails: what is not told is found by looking.
    async fn offer(&self, ids: &[String]);

    /// Offers for this process, at most `limit`; it waits at most `wait` for the first.
    async fn offers(&self, limit: usize, wait: Duration) -> Vec<Offer>;

    /// The tasks of these offers are done, gone or given back: nobody shall be offered them once more for these.
    async fn settle(&self, offers: &[Offer]);

    /// How long a task may be due before this process looks for it by itself: zero where it alone is told of tasks.
    fn patience(&self) -> Duration;
}

/// A task that was offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    pub task_id: String,
    /// Names the offer where it was made.
    pub token: String,
}

/// Tells this process alone.
#[derive(Debug, Default)]
pub struct LocalDispatch {
    /// Held for a few moves, never over an await.
    waiting: Mutex<VecDeque<String>>,
    came: Notify,
}

impl LocalDispatch {
    fn take(&self, limit: usize) -> Vec<Offer> {
        let mut waiting = self.waiting.lock();
        let count = limit.min(waiting.len());
        if waiting.len() > count {
            // For whoever else waits.
            self.came.notify_one();
        }
        waiting.drain(..count).map(|task_id| Offer { task_id, token: String::new() }).collect()
    }
}

#[async_trait]
impl Dispatch for LocalDispatch {
    async fn offer(&self, ids: &[String]) {
        {
            let mut waiting = self.waiting.lock();
            let room = MAX_OFFERS.saturating_sub(waiting.len());
            waiting.extend(ids.iter().take(room).cloned());
        }
        self.came.notify_one();
    }

    async fn offers(&self, limit: usize, wait: Duration) -> Vec<Offer> {
        let deadline = Instant::now() + wait;
        loop {
            let offers = self.take(limit);
            if !offers.is_empty() || limit == 0 {
                return offers;
            }
            // One permit is kept where the notice comes before the wait, so none is missed. It may be of offers that are
            // taken by now.
            if timeout_at(deadline, self.came.notified()).await.is_err() {
                return self.take(limit);
            }
        }
    }

    async fn settle(&self, _offers: &[Offer]) {}

    fn patience(&self) -> Duration {
        Duration::ZERO
    }
}
