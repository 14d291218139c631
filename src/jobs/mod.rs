//! Background work: what was accepted and is done later, by any server of the same store.
//!
//! ```text
//! api ─▶ Work::push, Dispatch::offer            runner ─▶ Work::claim ─▶ Handler::run ─▶ Work::finish
//!        (durable)   (whoever is free)             │                        │
//!                                                  └── looks for what is overdue, keeps leases
//! ```
//!
//! A task may be run more than once: its process may die, or be slow to keep its lease. What comes of it is written
//! once, by an id that was made when it was accepted.

pub mod callback;
pub mod inference;
pub mod runner;

use std::sync::Arc;

use jiff::Timestamp;

use crate::Result;
use crate::store::record;
use crate::store::work::dispatch::Dispatch;
use crate::store::work::{Task, Work};

/// Registers help and unit of every metric of this room. Call it once, after the recorder is installed.
pub fn describe_metrics() {
    runner::describe_metrics();
    callback::describe_metrics();
}

/// Where tasks are, and who is told of them.
#[derive(Clone)]
pub struct Tasks {
    pub work: Arc<dyn Work>,
    pub dispatch: Arc<dyn Dispatch>,
}

impl Tasks {
    /// Adds tasks and offers those that are due. When this returns without an error they are durable.
    ///
    /// Errors: the store's.
    pub async fn push(&self, tasks: &[Task]) -> Result<()> {
        self.work.push(tasks).await?;
        let now = record::now();
        let due: Vec<String> = tasks.iter().filter(|task| task.due_at <= now).map(|task| task.id.clone()).collect();
        self.dispatch.offer(&due).await;
        Ok(())
    }
}

/// `delay` from now.
pub(crate) fn after(delay: std::time::Duration) -> Timestamp {
    let delay = jiff::SignedDuration::try_from(delay).unwrap_or(jiff::SignedDuration::MAX);
    record::now().checked_add(delay).unwrap_or(Timestamp::MAX)
}
