//! One run of a task: its handler beside what keeps its lease, and how it is ended.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use ::metrics::{Gauge, gauge};
use futures::FutureExt;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::{Outcome, Runner};
use crate::jobs::after;
use crate::store::work::{Hold, Task};

impl Runner {
    /// Returns the word of its metric.
    pub(super) async fn attempt(&self, task: &Task, owner: &str, mut until: Instant) -> &'static str {
        let Some(handler) = self.handlers.get(&task.kind) else { return "lost" };
        // Dropped when it is lost, before anything else is done.
        let done = {
            let work = AssertUnwindSafe(handler.run(task)).catch_unwind();
            tokio::select! {
                done = work => Ok(done),
                hold = self.keep(task, owner, &mut until) => Err(hold),
            }
        };
        let (end, word) = match done {
            Ok(Ok(Ok(Outcome::Done))) => (End::Finish, "done"),
            Ok(Ok(Ok(Outcome::Again(delay)))) => (End::Postpone(delay), "again"),
            Ok(Ok(Err(error))) => {
                let pause = self.pause(task.attempts);
                tracing::warn!(task = %task.id, attempts = task.attempts, %error, ?pause, "a task failed; it is tried again");
                (End::Postpone(pause), "failed")
            }
            Ok(Err(_)) => {
                tracing::error!(task = %task.id, attempts = task.attempts, "a task panicked; it is tried again");
                (End::Postpone(self.pause(task.attempts)), "panicked")
            }
            Err(Hold::Cancelled) => (End::Finish, "cancelled"),
            Err(Hold::Lost | Hold::Held) => {
                tracing::info!(task = %task.id, "the lease of a task is lost: another server may have it");
                return "lost";
            }
        };
        match self.end(task, owner, end, until).await {
            Hold::Held => word,
            Hold::Lost => "lost",
            Hold::Cancelled => {
                if AssertUnwindSafe(handler.cancelled(task)).catch_unwind().await.is_err() {
                    tracing::error!(task = %task.id, "cleaning up behind a cancelled task panicked");
                }
                "cancelled"
            }
        }
    }

    /// Ends or postpones it, again until the store answers or the lease must be over.
    async fn end(&self, task: &Task, owner: &str, end: End, until: Instant) -> Hold {
        let mut attempts = 0;
        loop {
            let done = match end {
                End::Finish => self.tasks.work.finish(&task.id, owner).await,
                End::Postpone(delay) => self.tasks.work.postpone(&task.id, owner, after(delay)).await,
            };
            match done {
                Ok(hold) => return hold,
                Err(error) if Instant::now() >= until => {
                    // Whoever takes it next finds what it has written.
                    tracing::warn!(task = %task.id, %error, "the end of a task cannot be written; it will be run again");
                    return Hold::Lost;
                }
                Err(_) => {
                    attempts += 1;
                    sleep(self.pause(attempts) / 4).await;
                }
            }
        }
    }

    /// The pause after so many attempts.
    fn pause(&self, attempts: u32) -> Duration {
        let (first, longest) = self.options.backoff;
        first.saturating_mul(1 << attempts.saturating_sub(1).min(10)).min(longest)
    }

    /// Completes when the task is not this process's any more, or may not be: the store has not answered until the lease
    /// was over. Moves `until` on.
    async fn keep(&self, task: &Task, owner: &str, until: &mut Instant) -> Hold {
        let interval = self.options.lease / 3;
        let mut next = Instant::now() + interval;
        loop {
            sleep_until(next.min(*until)).await;
            let asked = Instant::now();
            let renewal = self.tasks.work.renew(&task.id, owner, after(self.options.lease));
            // A process that was halted for longer than the lease asks once whether anybody has taken it.
            match timeout_at((*until).max(asked + interval), renewal).await {
                Ok(Ok(Hold::Held)) => {
                    *until = asked + self.options.certain_lease();
                    next = asked + interval;
                }
                Ok(Ok(hold)) => return hold,
                Ok(Err(_)) if Instant::now() < *until => next = Instant::now() + interval / 10,
                Ok(Err(_)) | Err(_) => return Hold::Lost,
            }
        }
    }
}

/// One of the tasks that run, for as long as it is held: also one that is dropped in the middle.
pub(super) struct Running(Gauge);

impl Running {
    pub(super) fn new() -> Self {
        let running = gauge!("eremois_jobs_running");
        running.increment(1.0);
        Self(running)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

#[derive(Clone, Copy)]
enum End {
    Finish,
    Postpone(Duration),
}
