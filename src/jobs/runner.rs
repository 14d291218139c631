//! Claims tasks, has them done, keeps their leases, and gives back what it cannot finish.

mod attempt;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ::metrics::{Unit, counter, describe_counter, describe_gauge, gauge};
use async_trait::async_trait;
use futures::future::join_all;
use jiff::{SignedDuration, Timestamp};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use self::attempt::Running;
use super::Tasks;
use crate::Result;
use crate::store::record;
use crate::store::work::dispatch::Offer;
use crate::store::work::{Claim, Hold, Task, TaskKind};

/// How often waiting tasks are counted for their gauge.
const COUNT_INTERVAL: Duration = Duration::from_secs(5);

/// How far clocks of servers may differ: what another one offered as due is due, whatever the clock says here.
const CLOCK_DIFFERENCE: Duration = Duration::from_secs(1);

/// What giving back may take at the end: a store that is away then keeps a server from ending no longer.
const GIVE_BACK_LIMIT: Duration = Duration::from_secs(1);

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

impl Options {
    /// For how long a task is this process's for certain: others' clocks may run faster, and letting it go takes time.
    fn certain_lease(&self) -> Duration {
        self.lease - self.lease / 10
    }
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
    /// Names this process until it ends. With a number it names a claim, so that a task which this process lost and claimed
    /// again is not taken for the one it lost.
    process: String,
    num_claims: AtomicU64,
    /// What was claimed and has not ended: id and owner, with its offers. Held for a move, never over an await.
    held: Mutex<BTreeMap<(String, String), Vec<Offer>>>,
}

/// A task that was claimed.
struct Claimed {
    task: Task,
    owner: String,
    /// When the lease may be over: another process may have the task soon after.
    until: Instant,
    offers: Vec<Offer>,
}

/// When there is something to do.
struct Schedule {
    next_look: Instant,
    /// Nothing is claimed before: a store that is away is not helped by being asked all the time.
    not_before: Instant,
}

impl Runner {
    /// Takes tasks of the kinds that have a handler.
    pub fn new(tasks: Tasks, handlers: Vec<(TaskKind, Arc<dyn Handler>)>, options: Options) -> Self {
        Self {
            tasks,
            handlers: handlers.into_iter().collect(),
            options,
            process: uuid::Uuid::now_v7().simple().to_string(),
            num_claims: AtomicU64::new(0),
            held: Mutex::default(),
        }
    }

    /// Runs tasks until `shutdown` brings a time, or is dropped; what runs then may go on for this time, and is given back
    /// when it has not ended.
    pub async fn run(self, mut shutdown: oneshot::Receiver<Duration>) {
        if self.handlers.is_empty() {
            // Offers are others', and there is nothing to wait for but the end.
            let _ = shutdown.await;
            return;
        }
        let this = Arc::new(self);
        let room = Arc::new(Semaphore::new(this.options.max_concurrency.max(1)));
        let mut running = JoinSet::new();
        let mut schedule = Schedule { next_look: Instant::now(), not_before: Instant::now() };
        let counting = this.count();
        tokio::pin!(counting);
        let end = loop {
            let (mut permits, offers) = tokio::select! {
                biased;
                drain = &mut shutdown => break Instant::now() + drain.unwrap_or_default(),
                never = &mut counting => match never {},
                came = this.wait(&room, &schedule) => came,
            };
            while running.try_join_next().is_some() {}
            // A claim is not cut off at once, as waiting is: nobody would have what it gets until the lease is over.
            let mut claims = Box::pin(this.claim_all(permits.len(), offers, &mut schedule));
            let claimed = tokio::select! {
                claimed = &mut claims => claimed,
                drain = &mut shutdown => {
                    let end = Instant::now() + drain.unwrap_or_default();
                    let _ = timeout_at(end, claims).await;
                    break end;
                }
            };
            drop(claims);
            for one in claimed {
                let permit = permits.pop().expect("no more are claimed than there are permits");
                running.spawn(this.clone().run_one(one, permit));
            }
        };
        let all = async { while running.join_next().await.is_some() {} };
        if timeout_at(end, all).await.is_err() {
            running.shutdown().await;
        }
        // One that cannot be given back waits for its lease.
        let _ = timeout(GIVE_BACK_LIMIT, this.give_back()).await;
    }

    /// Waits for room, and then for offers or until it is time to look.
    async fn wait(&self, room: &Arc<Semaphore>, schedule: &Schedule) -> (Vec<OwnedSemaphorePermit>, Vec<Offer>) {
        sleep_until(schedule.not_before).await;
        let first = room.clone().acquire_owned().await.expect("the semaphore is never closed");
        let mut permits = vec![first];
        while let Ok(permit) = room.clone().try_acquire_owned() {
            permits.push(permit);
        }
        let wait = schedule.next_look.saturating_duration_since(Instant::now());
        let offers = self.tasks.dispatch.offers(permits.len(), wait).await;
        (permits, offers)
    }

    /// Claims what was offered, and what is overdue where it is time to look, at most `limit`.
    async fn claim_all(&self, limit: usize, offers: Vec<Offer>, schedule: &mut Schedule) -> Vec<Claimed> {
        let mut claimed = Vec::new();
        if !offers.is_empty() {
            let mut by_task: BTreeMap<String, Vec<Offer>> = BTreeMap::new();
            for offer in offers {
                by_task.entry(offer.task_id.clone()).or_default().push(offer);
            }
            let now = record::now();
            let due_by = now.saturating_add(signed(CLOCK_DIFFERENCE)).unwrap_or(now);
            claimed = self.claim(limit, due_by, Some(&mut by_task), schedule).await;
            // Another one's, gone, or not due any more: then it is looked for in time.
            let not_ours: Vec<Offer> = by_task.into_values().flatten().collect();
            self.tasks.dispatch.settle(&not_ours).await;
        }
        let room = limit - claimed.len();
        if Instant::now() >= schedule.next_look && room > 0 {
            let now = record::now();
            let due_by = now.saturating_sub(signed(self.tasks.dispatch.patience())).unwrap_or(now);
            let found = self.claim(room, due_by, None, schedule).await;
            // Where there was more than fits, the next look is due at once.
            if found.len() < room {
                schedule.next_look = Instant::now() + self.options.look_interval;
            }
            claimed.extend(found);
        }
        claimed
    }

    /// Claims tasks due by a time: any, or of those that were offered, whose offers go with them.
    async fn claim(
        &self,
        limit: usize,
        due_by: Timestamp,
        mut offered: Option<&mut BTreeMap<String, Vec<Offer>>>,
        schedule: &mut Schedule,
    ) -> Vec<Claimed> {
        let number = self.num_claims.fetch_add(1, Ordering::Relaxed);
        let owner = format!("{}.{number}", self.process);
        let until = Instant::now() + self.options.certain_lease();
        let claim = Claim {
            owner: owner.clone(),
            now: record::now(),
            due_by,
            lease: self.options.lease,
            limit,
            kinds: self.handlers.keys().copied().collect(),
            ids: offered.as_ref().map(|offered| offered.keys().cloned().collect()),
        };
        let tasks = match self.tasks.work.claim(&claim).await {
            Ok(tasks) => tasks,
            Err(error) => {
                tracing::warn!(%error, "tasks cannot be claimed now; it is tried again");
                schedule.not_before = Instant::now() + self.options.look_interval;
                return Vec::new();
            }
        };
        let mut held = self.held.lock();
        let claimed = tasks.into_iter().map(|task| {
            let offers = offered.as_mut().and_then(|offered| offered.remove(&task.id)).unwrap_or_default();
            held.insert((task.id.clone(), owner.clone()), offers.clone());
            Claimed { task, owner: owner.clone(), until, offers }
        });
        claimed.collect()
    }

    /// Runs a task to its end, or until it is another's.
    async fn run_one(self: Arc<Self>, claimed: Claimed, _permit: OwnedSemaphorePermit) {
        let Claimed { task, owner, until, offers } = claimed;
        let outcome = {
            let _running = Running::new();
            self.attempt(&task, &owner, until).await
        };
        self.held.lock().remove(&(task.id.clone(), owner));
        counter!("eremois_jobs_total", "kind" => task.kind.as_str(), "outcome" => outcome).increment(1);
        if !offers.is_empty() {
            self.tasks.dispatch.settle(&offers).await;
        }
    }

    /// Gives back what has not ended, for another process at once, and not when the lease is over.
    async fn give_back(&self) {
        let left = std::mem::take(&mut *self.held.lock());
        let now = record::now();
        let postponed = left.keys().map(|(id, owner)| self.tasks.work.postpone(id, owner, now));
        let holds = join_all(postponed).await;
        let free = left.keys().zip(holds).filter(|(_, hold)| *hold == Ok(Hold::Held));
        let free: Vec<String> = free.map(|((id, _), _)| id.clone()).collect();
        self.tasks.dispatch.offer(&free).await;
        let settled: Vec<Offer> = left.into_values().flatten().collect();
        self.tasks.dispatch.settle(&settled).await;
    }

    /// Counts what is in the store, now and then, for its gauge.
    async fn count(&self) -> Infallible {
        loop {
            // A store that is away leaves the gauge as it was.
            if let Ok(counts) = self.tasks.work.num_tasks().await {
                for kind in TaskKind::ALL {
                    let count = counts.iter().find(|(of, _)| of == kind).map_or(0, |(_, count)| *count);
                    gauge!("eremois_jobs_waiting", "kind" => kind.as_str()).set(count as f64);
                }
            }
            sleep(COUNT_INTERVAL).await;
        }
    }
}

fn signed(time: Duration) -> SignedDuration {
    SignedDuration::try_from(time).unwrap_or(SignedDuration::MAX)
}
