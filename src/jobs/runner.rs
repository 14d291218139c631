//! Claims tasks, has them done, keeps their leases, and gives back what it cannot finish.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use ::metrics::{Unit, counter, describe_counter, describe_gauge, gauge};
use async_trait::async_trait;
use futures::FutureExt;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Tasks, after};
use crate::Result;
use crate::store::record;
use crate::store::work::dispatch::Offer;
use crate::store::work::{Claim, Hold, Task, TaskKind};

/// How often waiting tasks are counted for their gauge.
const COUNT_INTERVAL: Duration = Duration::from_secs(5);

/// Registers help and unit of this file's metrics.
pub fn describe_metrics() {
    describe_counter!("eremois_jobs_total", Unit::Count, "Runs of background tasks by kind and outcome");
    describe_gauge!("eremois_jobs_running", Unit::Count, "Background tasks this process runs now");
    describe_gauge!(
        "eremois_jobs_waiting",
        Unit::Count,
        "Background tasks in the store, by kind, running ones included"
    );
}

/// Does tasks of one kind. Its future may be dropped at any await, when the lease is lost or the server ends: whatever it
/// has written by then must bear being written again.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Errors: those that may pass; the task is tried again, later and later.
    async fn run(&self, task: &Task) -> Result<Outcome>;

    /// The task was cancelled while it ran, and has ended: what it left behind can go.
    async fn cancelled(&self, _task: &Task) {}
}

/// What came of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// To be run again after this time.
    Again(Duration),
}

/// How tasks are run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Tasks that run at once in this process. At least 1.
    pub max_concurrency: usize,
    /// How long a task is held without a sign of life: what a dead process's tasks wait before another one takes them.
    pub lease: Duration,
    /// Between two looks for tasks that nobody was told of.
    pub look_interval: Duration,
    /// The first pause after a failure, and the longest: it doubles with every attempt.
    pub backoff: (Duration, Duration),
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_concurrency: 4,
            lease: Duration::from_secs(30),
            look_interval: Duration::from_secs(1),
            backoff: (Duration::from_secs(1), Duration::from_secs(60)),
        }
    }
}

/// Runs tasks.
pub struct Runner {
    tasks: Tasks,
    handlers: BTreeMap<TaskKind, Arc<dyn Handler>>,
    options: Options,
    /// Of this process, until it ends.
    owner: String,
    /// What it runs now. Held for a move, never over an await.
    held: Mutex<BTreeSet<String>>,
}

impl Runner {
    /// Takes tasks of the kinds that have a handler.
    pub fn new(tasks: Tasks, handlers: Vec<(TaskKind, Arc<dyn Handler>)>, options: Options) -> Self {
        let owner = uuid::Uuid::now_v7().simple().to_string();
        Self { tasks, handlers: handlers.into_iter().collect(), options, owner, held: Mutex::default() }
    }

    /// Runs tasks until `shutdown` brings a time, or is dropped; what runs then may go on for this time, and is given back
    /// when it has not ended.
    pub async fn run(self, mut shutdown: oneshot::Receiver<Duration>) {
        let this = Arc::new(self);
        let room = Arc::new(Semaphore::new(this.options.max_concurrency.max(1)));
        let mut running = JoinSet::new();
        let mut next_look = Instant::now();
        let mut next_count = Instant::now();
        let drain = loop {
            let found = tokio::select! {
                biased;
                drain = &mut shutdown => break drain.unwrap_or_default(),
                found = this.next(&room, &mut next_look) => found,
            };
            while running.try_join_next().is_some() {}
            if Instant::now() >= next_count {
                next_count = Instant::now() + COUNT_INTERVAL;
                this.count().await;
            }
            for (task, offer, permit) in found {
                running.spawn(this.clone().run_one(task, offer, permit));
            }
        };
        let all = async { while running.join_next().await.is_some() {} };
        if tokio::time::timeout(drain, all).await.is_err() {
            running.shutdown().await;
        }
        // For another process at once, and not when the lease is over.
        let left = std::mem::take(&mut *this.held.lock());
        for id in &left {
            // One that cannot be given back waits for its lease.
            let _ = this.tasks.work.postpone(id, &this.owner, record::now()).await;
        }
        this.tasks.dispatch.offer(&left.into_iter().collect::<Vec<_>>()).await;
    }

    /// Tasks of this process, each with its offer and its place; it waits for them.
    async fn next(
        &self,
        room: &Arc<Semaphore>,
        next_look: &mut Instant,
    ) -> Vec<(Task, Option<Offer>, OwnedSemaphorePermit)> {
        let Ok(first) = room.clone().acquire_owned().await else { return std::future::pending().await };
        let mut permits = vec![first];
        while let Ok(permit) = room.clone().try_acquire_owned() {
            permits.push(permit);
        }
        let wait = next_look.saturating_duration_since(Instant::now());
        let offers = self.tasks.dispatch.offers(permits.len(), wait).await;
        let ids: Vec<String> = offers.iter().map(|offer| offer.task_id.clone()).collect();
        let mut found = Vec::new();
        if !ids.is_empty() {
            let tasks = self.claim(permits.len(), Some(ids), Duration::ZERO).await;
            let (mine, not_mine): (Vec<Offer>, Vec<Offer>) =
                offers.into_iter().partition(|offer| tasks.iter().any(|task| task.id == offer.task_id));
            // Another one's, gone, or not due any more: then it is looked for in time.
            self.tasks.dispatch.settle(&not_mine).await;
            for task in tasks {
                let offer = mine.iter().find(|offer| offer.task_id == task.id).cloned();
                found.extend(permits.pop().map(|permit| (task, offer, permit)));
            }
        }
        if Instant::now() >= *next_look && !permits.is_empty() {
            let tasks = self.claim(permits.len(), None, self.tasks.dispatch.patience()).await;
            // Where there was more than fits, the next look is due at once.
            if tasks.len() < permits.len() {
                *next_look = Instant::now() + self.options.look_interval;
            }
            for task in tasks {
                found.extend(permits.pop().map(|permit| (task, None, permit)));
            }
        }
        found
    }

    async fn claim(&self, limit: usize, ids: Option<Vec<String>>, patience: Duration) -> Vec<Task> {
        let now = record::now();
        let patience = jiff::SignedDuration::try_from(patience).unwrap_or_default();
        let claim = Claim {
            owner: self.owner.clone(),
            now,
            due_by: now.checked_sub(patience).unwrap_or(now),
            lease: self.options.lease,
            limit,
            kinds: self.handlers.keys().copied().collect(),
            ids,
        };
        match self.tasks.work.claim(&claim).await {
            Ok(tasks) => tasks,
            Err(error) => {
                tracing::warn!(%error, "tasks cannot be claimed now; it is tried again");
                // Not at once: a store that is away is not helped by being asked all the time.
                tokio::time::sleep(self.options.look_interval).await;
                Vec::new()
            }
        }
    }

    /// Runs a task to its end, or until it is another's.
    async fn run_one(self: Arc<Self>, task: Task, offer: Option<Offer>, permit: OwnedSemaphorePermit) {
        let running = gauge!("eremois_jobs_running");
        running.increment(1.0);
        self.held.lock().insert(task.id.clone());
        let outcome = self.attempt(&task).await;
        self.held.lock().remove(&task.id);
        running.decrement(1.0);
        counter!("eremois_jobs_total", "kind" => task.kind.as_str(), "outcome" => outcome).increment(1);
        if let Some(offer) = offer {
            self.tasks.dispatch.settle(&[offer]).await;
        }
        drop(permit);
    }

    /// Returns the word of its metric.
    async fn attempt(&self, task: &Task) -> &'static str {
        let Some(handler) = self.handlers.get(&task.kind) else { return "lost" };
        let done = {
            let work = std::panic::AssertUnwindSafe(handler.run(task)).catch_unwind();
            tokio::select! {
                done = work => Some(done),
                hold = self.keep(task) => {
                    tracing::info!(task = %task.id, ?hold, "a task is not this process's any more");
                    None
                }
            }
        };
        let (end, word) = match done {
            Some(Ok(Ok(Outcome::Done))) => (End::Finish, "done"),
            Some(Ok(Ok(Outcome::Again(delay)))) => (End::Postpone(delay), "again"),
            Some(Ok(Err(error))) => {
                let pause = self.pause(task.attempts);
                tracing::warn!(task = %task.id, attempts = task.attempts, %error, ?pause, "a task failed; it is tried again");
                (End::Postpone(pause), "failed")
            }
            Some(Err(_)) => {
                tracing::error!(task = %task.id, attempts = task.attempts, "a task panicked; it is tried again");
                (End::Postpone(self.pause(task.attempts)), "panicked")
            }
            None => (End::Finish, "lost"),
        };
        match self.end(task, end).await {
            Hold::Held => word,
            Hold::Lost => "lost",
            Hold::Cancelled => {
                handler.cancelled(task).await;
                "cancelled"
            }
        }
    }

    /// Ends or postpones it, again until the store answers or the lease must be over.
    async fn end(&self, task: &Task, end: End) -> Hold {
        let give_up = Instant::now() + self.options.lease;
        let mut attempts = 0;
        loop {
            let done = match end {
                End::Finish => self.tasks.work.finish(&task.id, &self.owner).await,
                End::Postpone(delay) => self.tasks.work.postpone(&task.id, &self.owner, after(delay)).await,
            };
            match done {
                Ok(hold) => return hold,
                Err(error) if Instant::now() >= give_up => {
                    // Whoever takes it next finds what it has written.
                    tracing::warn!(task = %task.id, %error, "the end of a task cannot be written; it will be run again");
                    return Hold::Lost;
                }
                Err(_) => {
                    attempts += 1;
                    tokio::time::sleep(self.pause(attempts) / 4).await;
                }
            }
        }
    }

    /// Completes when the task is not this process's any more.
    async fn keep(&self, task: &Task) -> Hold {
        let interval = self.options.lease / 3;
        let mut held_until = Instant::now() + self.options.lease;
        loop {
            tokio::time::sleep(interval).await;
            let asked = Instant::now();
            match self.tasks.work.renew(&task.id, &self.owner, after(self.options.lease)).await {
                Ok(Hold::Held) => held_until = asked + self.options.lease,
                Ok(hold) => return hold,
                // A store that is away gives it to nobody else either; when it is back, the first to claim has it.
                Err(_) if Instant::now() < held_until => {}
                Err(_) => return Hold::Lost,
            }
        }
    }

    /// The pause after so many attempts.
    fn pause(&self, attempts: u32) -> Duration {
        let (first, longest) = self.options.backoff;
        first.saturating_mul(1 << attempts.saturating_sub(1).min(10)).min(longest)
    }

    async fn count(&self) {
        // A store that is away leaves the gauge as it was.
        let Ok(counts) = self.tasks.work.num_tasks().await else { return };
        for kind in TaskKind::ALL {
            let count = counts.iter().find(|(of, _)| of == kind).map_or(0, |(_, count)| *count);
            gauge!("eremois_jobs_waiting", "kind" => kind.as_str()).set(count as f64);
        }
    }
}

#[derive(Clone, Copy)]
enum End {
    Finish,
    Postpone(Duration),
}
