//! The store as the rest of the server sees it: a store, and for one over a network the journal that stands in for it.
//!
//! An acknowledged write is in the store or in the journal. `docs/storage.md`, section Durability, says what that
//! survives; [`phase`] says where a write goes, `reads` how both are read as one, `replay` how the journal empties.

pub mod fold;
pub mod phase;
mod reads;
mod replay;
mod writes;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::journal::Journal;
use super::numbers::{Numbers, QualityQuery, QualityRow, UsageQuery, UsageRow};
use super::query::{Page, Query};
use super::record::{Feedback, InferenceId, Record};
use super::{Inserted, Records};
use crate::{Error, Result};
use phase::{Event, Gate, Phase};

/// Told of records that a replay erased from the store, so that what was computed for them can leave the cache as well.
/// Called on the replay's task: it should hand them on and return.
pub type OnErased = Arc<dyn Fn(Vec<Record>) + Send + Sync>;

/// How long the store is waited for.
#[derive(Clone)]
pub struct Options {
    /// For a read, or a write of one small record. Five milliseconds are added for each further one, a second for each
    /// MiB.
    pub timeout: Duration,
    /// Between two tries of a replay: at first, and at most. It doubles.
    pub backoff: (Duration, Duration),
    /// How long an entry may be refused for good, or be unreadable, before it is set aside and the ones behind it go on.
    pub patience: Duration,
    pub on_erased: OnErased,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            // A majority of a healthy replica set answers in milliseconds; an election takes longer, and is the journal's.
            timeout: Duration::from_secs(2),
            // Soon enough that a restarted database is noticed within seconds, rare enough to leave it alone.
            backoff: (Duration::from_millis(100), Duration::from_secs(5)),
            // Somebody who watches can mend a store within it; records wait safely meanwhile.
            patience: Duration::from_secs(600),
            on_erased: Arc::new(|_| {}),
        }
    }
}

/// How results are being kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// By the store.
    Healthy,
    /// By the journal, since the store failed; it holds this many entries.
    Journalling { since: Timestamp, entries: usize },
    /// Not at all: the store is away, and the journal is full or cannot be written. What is in it is safe.
    Full { since: Timestamp, entries: usize, cause: String },
}

/// A store that keeps what it acknowledges. Every write of the server goes through the same one.
pub struct Durable {
    store: Arc<dyn Records>,
    journalled: Option<Arc<Journalled>>,
    replay: Mutex<Option<JoinHandle<()>>>,
}

/// A store with a journal.
struct Journalled {
    store: Arc<dyn Records>,
    journal: Arc<Journal>,
    options: Options,
    /// Never held over I/O or an await.
    gate: Mutex<Gate>,
    /// Counts up with every change of the phase: wakes the replay, and the writes that wait.
    phases: watch::Sender<u64>,
    /// Whether the store answered the replay's last try. While it did not and writes are journalled, only the replay asks
    /// it: everyone else would wait in vain.
    answers: AtomicBool,
}

/// A write on its way into the journal: see [`Gate::queued`].
struct Admitted<'a>(&'a Journalled);

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        self.0.gate.lock().queued();
    }
}

impl Durable {
    /// A store that is durable by itself: one in this process, on the local disk.
    pub fn local(store: Arc<dyn Records>) -> Self {
        Self { store, journalled: None, replay: Mutex::new(None) }
    }

    /// A store over a network, and the journal that stands in for it. What the journal holds is replayed first. Call it
    /// within a runtime: a task replays.
    pub fn journalled(store: Arc<dyn Records>, journal: Journal, options: Options) -> Self {
        let is_empty = journal.is_empty();
        let phase = if is_empty { Phase::Direct } else { Phase::Journalling { since: Timestamp::now() } };
        let journalled = Arc::new(Journalled {
            store: store.clone(),
            journal: Arc::new(journal),
            options,
            gate: Mutex::new(Gate::new(phase)),
            phases: watch::Sender::new(0),
            // Nobody knows before it is tried, and what the journal holds says that it did not answer last.
            answers: AtomicBool::new(is_empty),
        });
        let task = tokio::spawn(replay::run(journalled.clone()));
        Self { store, journalled: Some(journalled), replay: Mutex::new(Some(task)) }
    }

    /// How results are being kept at this moment.
    pub fn state(&self) -> State {
        let Some(journalled) = &self.journalled else { return State::Healthy };
        let Some(since) = journalled.gate.lock().phase.since() else { return State::Healthy };
        let entries = journalled.journal.outstanding();
        match journalled.journal.refusal() {
            Some(cause) => State::Full { since, entries, cause },
            None => State::Journalling { since, entries },
        }
    }

    /// Ends it: replays what can be replayed within `limit`, then closes the journal. Returns the number of entries left
    /// in it, which the next start replays. Writes that come later, and find the store away, are refused.
    pub async fn drain(&self, limit: Duration) -> usize {
        let Some(journalled) = &self.journalled else { return 0 };
        let mut phases = journalled.phases.subscribe();
        let direct = phases.wait_for(|_| journalled.gate.lock().phase == Phase::Direct);
        let is_drained = tokio::time::timeout(limit, direct).await.is_ok();
        if let Some(task) = self.replay.lock().take() {
            task.abort();
        }
        let journal = journalled.journal.clone();
        let closed = tokio::task::spawn_blocking(move || {
            journal.close();
            journal.len()
        });
        let left = closed.await.unwrap_or_else(|_| journalled.journal.len());
        if !is_drained || left > 0 {
            tracing::warn!(left, "the journal keeps what the store has not: the next start replays it");
        }
        left
    }
}

impl Drop for Durable {
    fn drop(&mut self) {
        if let Some(task) = self.replay.lock().take() {
            task.abort();
        }
    }
}

/// Whether a store could not be reached.
fn is_away(error: &Error) -> bool {
    matches!(error, Error::StoreUnavailable { .. })
}

async fn within<T>(limit: Duration, call: impl Future<Output = Result<T>>) -> Result<T> {
    let late = |_| Err(Error::StoreUnavailable { cause: format!("no answer within {limit:?}") });
    tokio::time::timeout(limit, call).await.unwrap_or_else(late)
}

impl Journalled {
    /// Changes the phase and wakes whom it concerns.
    fn on(&self, event: Event) {
        if self.gate.lock().on(event, Timestamp::now()) {
            self.phases.send_modify(|count| *count += 1);
        }
    }

    /// Waits for the store, but not for long.
    async fn bounded<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        within(self.options.timeout, call).await
    }
}

#[async_trait]
impl Records for Durable {
    fn name(&self) -> &'static str {
        self.store.name()
    }

    async fn ping(&self) -> Result<()> {
        self.store.ping().await
    }

    async fn put(&self, records: &[Record]) -> Result<()> {
        match &self.journalled {
            Some(journalled) => journalled.put(records).await,
            None => self.store.put(records).await,
        }
    }

    async fn insert(&self, record: &Record) -> Result<Inserted> {
        match &self.journalled {
            Some(journalled) => journalled.insert(record).await,
            None => self.store.insert(record).await,
        }
    }

    async fn get(&self, id: &InferenceId) -> Result<Option<Record>> {
        match &self.journalled {
            Some(journalled) => journalled.get(id).await,
            None => self.store.get(id).await,
        }
    }

    async fn find_by_key(&self, key: &str) -> Result<Option<Record>> {
        match &self.journalled {
            Some(journalled) => journalled.find_by_key(key).await,
            None => self.store.find_by_key(key).await,
        }
    }

    async fn list(&self, query: &Query) -> Result<Page> {
        match &self.journalled {
            Some(journalled) => journalled.list(query).await,
            None => self.store.list(query).await,
        }
    }

    async fn delete(&self, id: &InferenceId) -> Result<bool> {
        match &self.journalled {
            Some(journalled) => journalled.delete(id).await,
            None => self.store.delete(id).await,
        }
    }

    async fn erase_user(&self, user: &str, limit: usize) -> Result<Vec<Record>> {
        match &self.journalled {
            Some(journalled) => journalled.erase_user(user, limit).await,
            None => self.store.erase_user(user, limit).await,
        }
    }

    async fn add_feedback(&self, id: &InferenceId, feedback: &Feedback) -> Result<bool> {
        match &self.journalled {
            Some(journalled) => journalled.add_feedback(id, feedback).await,
            None => self.store.add_feedback(id, feedback).await,
        }
    }

    async fn expire(&self, before: Timestamp, limit: usize) -> Result<usize> {
        self.store.expire(before, limit).await
    }

    /// While the journal is in use, about: a record whose earlier state the store has, and whose later one is still in the
    /// journal, is counted twice; one that is being erased, still once.
    async fn count(&self) -> Result<u64> {
        match &self.journalled {
            Some(journalled) => journalled.count().await,
            None => self.store.count().await,
        }
    }

    async fn usage(&self, query: &UsageQuery) -> Result<Numbers<UsageRow>> {
        match &self.journalled {
            Some(journalled) => journalled.usage(query).await,
            None => self.store.usage(query).await,
        }
    }

    async fn quality(&self, query: &QualityQuery) -> Result<Numbers<QualityRow>> {
        match &self.journalled {
            Some(journalled) => journalled.quality(query).await,
            None => self.store.quality(query).await,
        }
    }
}
