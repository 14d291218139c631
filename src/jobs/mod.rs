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

pub mod batch;
pub mod callback;
pub mod files;
pub mod ids;
pub mod inference;
pub mod parts;
pub mod runner;
pub mod sweep;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use crate::Result;
use crate::store::record;
use crate::store::work::dispatch::Dispatch;
use crate::store::work::{Task, Work};

/// Registers help and unit of every metric of this room. Call it once, after the recorder is installed.
pub fn describe_metrics() {
    runner::describe_metrics();
    callback::describe_metrics();
    files::describe_metrics();
    batch::describe_metrics();
    sweep::describe_metrics();
}

/// What files and batches may be, and how long they are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobSettings {
    pub max_file_bytes: usize,
    /// Most requests of a batch.
    pub max_batch_requests: usize,
    /// Longest line of a batch's input.
    pub max_line_bytes: usize,
    /// How long files and batches are kept. Zero: for good.
    pub retention: Duration,
    /// Whether the store keeps anything at all beyond the process's end.
    pub is_durable: bool,
}

impl Default for JobSettings {
    /// As OpenAI's API has it; a line may be as long as the body of a request.
    fn default() -> Self {
        Self {
            max_file_bytes: 200 << 20,
            max_batch_requests: 50_000,
            max_line_bytes: 8 << 20,
            retention: Duration::from_secs(30 * 24 * 3600),
            is_durable: true,
        }
    }
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
pub(crate) fn after(delay: Duration) -> Timestamp {
    let delay = jiff::SignedDuration::try_from(delay).unwrap_or(jiff::SignedDuration::MAX);
    record::now().checked_add(delay).unwrap_or(Timestamp::MAX)
}
