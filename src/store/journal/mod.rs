//! A journal on the local disk: takes changes of the store while the store is away, and gives them back in order.
//!
//! ```text
//! append ─▶ queue ─▶ writer thread: write, fdatasync, index, tell the callers      <database.path>/journal/
//!                                                                                    00000000000000000001.segment
//! oldest, read ◀── index (in memory) ── segments                                     00000000000000004711.segment
//!      └──▶ the store ──▶ acknowledge ─▶ writer thread: remove segments, position    position
//! ```
//!
//! - An entry is durable when its [`Receipt`] says so: written and synced, together with all that waited beside it.
//! - After a write or sync that failed the segment is not written any more; the entries of that write were not kept.
//! - [`Options::max_bytes`] bounds all files. What does not fit is refused at once: [`Error::JournalFull`].
//! - A segment is removed when the store has all its entries; `position` remembers how far the store has come within the
//!   oldest. So a crash makes the store see an entry twice at most, and never an old one after a newer one was removed.
//! - At start the torn end of a segment is cut off (a copy is kept as `.torn`). Damage before whole entries is reported
//!   and costs what it covers, no more; the file is kept as `.damaged`. Nothing is deleted unread.

pub mod change;
pub mod disk;
pub mod entry;
pub mod index;
pub mod look;
mod metrics;
mod recover;
mod writer;

use std::collections::{HashSet, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};
use tokio::sync::{oneshot, watch};

use super::record::InferenceId;
use crate::{Error, Result};
pub use change::{Change, Entry};
use disk::Disk;
use entry::{HEADER_LEN, Header};
use index::{Changes, Index, Located};
pub use metrics::describe;
pub use recover::{Damage, DamageKind, Recovery};
use writer::{Group, Queued, Work, Writer};

/// The smallest an entry counts for: about what the index keeps of it in memory.
const MIN_CHARGE: u64 = 256;

/// What an entry of this length counts for in the bound.
fn charge(entry_len: u64) -> u64 {
    entry_len.max(MIN_CHARGE)
}

/// How large a journal may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// All its files. An entry counts for at least 256 bytes.
    pub max_bytes: u64,
    /// A segment's, but for one that holds a single larger entry. Space comes back in these portions.
    pub segment_bytes: u64,
}

impl Options {
    /// A bound with segments of a sixteenth of it, at most 64 MiB: replayed space is free again soon.
    pub fn of(max_bytes: u64) -> Self {
        Self { max_bytes, segment_bytes: (max_bytes / 16).clamp(64 << 10, 64 << 20) }
    }
}

/// A journal that is open. Dropping it writes what was accepted and ends its thread.
pub struct Journal {
    shared: Arc<Shared>,
    /// Taken by [`Journal::close`].
    writer: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    options: Options,
    /// A std-like lock, never held over I/O or an await.
    state: Mutex<State>,
    /// Wakes the writer.
    work: Condvar,
    /// Counts up whenever entries became durable, failed or left.
    commits: watch::Sender<u64>,
    metrics: metrics::Metrics,
}

struct State {
    queue: VecDeque<Work>,
    /// Entries in the queue or being written.
    num_queued: usize,
    /// What counts in the bound: segments, what is queued, what is kept aside.
    charged: u64,
    next_seq: u64,
    index: Index,
    claimed_ids: HashSet<InferenceId>,
    claimed_keys: HashSet<Arc<str>>,
    /// Why the last that was to be kept was not.
    refusal: Option<String>,
    is_closed: bool,
}

impl Shared {
    /// Tells everyone who watches, and the metrics.
    fn publish(&self) {
        let (charged, len, oldest_ms) = {
            let state = self.state.lock();
            (state.charged, state.index.num_entries(), state.index.oldest_ms())
        };
        self.metrics.bytes.set(charged as f64);
        self.metrics.entries.set(len as f64);
        self.metrics.oldest_age.set(oldest_ms.map_or(0.0, |at| (now_ms() - at).max(0) as f64 / 1000.0));
        self.commits.send_modify(|count| *count += 1);
    }
}

fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

/// Completes when the entries are durable. Dropped, they are written all the same.
///
/// Errors: [`Error::JournalFull`] with the disk's cause; the entries may have been written or not.
pub struct Receipt(oneshot::Receiver<Result<()>>);

impl Future for Receipt {
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|done| done.unwrap_or_else(|_| Err(closed())))
    }
}

fn closed() -> Error {
    Error::JournalFull { cause: "the journal is closed".to_string() }
}

/// An id and a key that nobody else can claim until this is dropped: by its holder, or, when it was handed to
/// [`Journal::append`], by the writer once the index has the record.
pub struct Claim {
    shared: Arc<Shared>,
    id: InferenceId,
    key: Option<Arc<str>>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.claimed_ids.remove(&self.id);
        if let Some(key) = &self.key {
            state.claimed_keys.remove(key);
        }
        self.shared.commits.send_modify(|count| *count += 1);
    }
}

/// What came of [`Journal::claim`].
pub enum Claimed {
    Yours(Claim),
    /// A record here has the id or the key.
    Taken(InferenceId),
    /// Somebody has claimed the id or the key: ask again after the next change of [`Journal::watch`].
    Busy,
}

/// See [`Journal::read`].
fn read(located: &Located) -> Result<Change> {
    let Some(bytes) = located.bytes() else {
        located.segment.mark_damaged();
        return Err(Error::Internal {
            cause: format!("journal: {}: the entry at {} is damaged", located.segment.name, located.offset),
        });
    };
    let mut change = change::change_of(located.kind, &bytes[HEADER_LEN..])?;
    if let Change::Put(record) = &mut change
        && located.is_keyless
    {
        record.facts.idempotency_key = None;
    }
    Ok(change)
}

impl Journal {
    /// Opens the journal in this folder and reads what is in it. Blocks: for the reading of all segments.
    ///
    /// Errors: those of the folder, and of a segment of a newer version. Damage is none: it is logged and returned.
    pub fn open(disk: Box<dyn Disk>, options: Options) -> Result<(Self, Recovery)> {
        let found = recover::recover(disk.as_ref())?;
        found.report.log();
        let state = State {
            queue: VecDeque::new(),
            num_queued: 0,
            charged: found.aside_bytes + found.segments.iter().map(|held| held.charge).sum::<u64>(),
            next_seq: found.next_seq,
            index: found.index,
            claimed_ids: HashSet::new(),
            claimed_keys: HashSet::new(),
            refusal: None,
            is_closed: false,
        };
        let shared = Arc::new(Shared {
            options,
            state: Mutex::new(state),
            work: Condvar::new(),
            commits: watch::Sender::new(0),
            metrics: metrics::Metrics::new(),
        });
        shared.publish();
        let writer = Writer::new(shared.clone(), disk, found.segments);
        let thread = std::thread::Builder::new().name("journal".to_string()).spawn(move || writer.run());
        let thread = thread.map_err(|e| Error::Internal { cause: format!("no thread for the journal: {e}") })?;
        Ok((Self { shared, writer: Mutex::new(Some(thread)) }, found.report))
    }

    /// Claims the id and the key of a record that is to be new: looked up and taken in one step.
    pub fn claim(&self, id: InferenceId, key: Option<&str>) -> Claimed {
        let mut state = self.shared.state.lock();
        if state.claimed_ids.contains(&id) || key.is_some_and(|key| state.claimed_keys.contains(key)) {
            return Claimed::Busy;
        }
        let owner = key.and_then(|key| state.index.with_key(key));
        if let Some(owner) = owner.or(Some(id).filter(|id| state.index.has(id))) {
            return Claimed::Taken(owner);
        }
        let key: Option<Arc<str>> = key.map(Arc::from);
        state.claimed_ids.insert(id);
        state.claimed_keys.extend(key.clone());
        Claimed::Yours(Claim { shared: self.shared.clone(), id, key })
    }

    /// Queues entries to be written in this order, one behind the other; a claim lasts until they are. Blocks: no.
    ///
    /// Errors: [`Error::JournalFull`] at once where they do not all fit.
    pub fn append(&self, entries: Vec<Entry>, claim: Option<Claim>) -> Result<Receipt> {
        let mut guard = self.shared.state.lock();
        let state = &mut *guard;
        if state.is_closed {
            drop(guard);
            return Err(closed());
        }
        let charged: u64 = entries.iter().map(|entry| charge((HEADER_LEN + entry.body.len()) as u64)).sum();
        let max_bytes = self.shared.options.max_bytes;
        if state.charged.saturating_add(charged) > max_bytes {
            let cause = format!(
                "the journal holds {} of database.journal_max_bytes = {max_bytes} bytes, and {charged} more do not fit",
                state.charged
            );
            state.refusal = Some(cause.clone());
            // A claim takes the lock to end.
            drop(guard);
            return Err(Error::JournalFull { cause });
        }
        let at_ms = now_ms();
        let number = |entry: Entry| {
            let seq = state.next_seq;
            state.next_seq += 1;
            let Entry { meta, body, body_len, body_crc } = entry;
            let header = Header { seq, at_ms, kind: meta.kind, body_len, body_crc };
            Queued { header, meta, body }
        };
        let entries: VecDeque<Queued> = entries.into_iter().map(number).collect();
        state.num_queued += entries.len();
        state.charged += charged;
        let (done, receipt) = oneshot::channel();
        state.queue.push_back(Work::Append(Group { entries, claim, done }));
        self.shared.work.notify_one();
        Ok(Receipt(receipt))
    }

    /// Forgets all entries up to this number, which the store has.
    ///
    /// Errors: [`Error::JournalFull`] where that cannot be remembered; then they stay.
    pub async fn acknowledge(&self, seq: u64) -> Result<()> {
        self.ask(|done| Work::Acknowledge(seq, done)).await
    }

    /// Copies an entry that the store will not have into a file of its own, in the form of a segment, where it stays
    /// until a person removes it. Acknowledge it afterwards.
    pub async fn set_aside(&self, located: &Located) -> Result<()> {
        // One that cannot be read is in its segment, which is kept for that.
        if let Some(bytes) = located.bytes() {
            let file = [&entry::segment_header()[..], &bytes].concat();
            let name = format!("{:020}{}", located.seq, recover::REFUSED);
            self.ask(|done| Work::Keep(name, file, done)).await?;
        }
        self.shared.metrics.set_aside.increment(1);
        Ok(())
    }

    async fn ask(&self, work: impl FnOnce(oneshot::Sender<Result<()>>) -> Work) -> Result<()> {
        let (done, answer) = oneshot::channel();
        {
            let mut state = self.shared.state.lock();
            if state.is_closed {
                return Err(closed());
            }
            state.queue.push_back(work(done));
            self.shared.work.notify_one();
        }
        answer.await.unwrap_or_else(|_| Err(closed()))
    }

    /// Reads an entry. Blocks: for the disk, though most are in memory.
    ///
    /// Errors: [`Error::Internal`] where it is not as it was written.
    pub fn read(&self, located: &Located) -> Result<Change> {
        read(located)
    }

    /// Changes whenever entries became durable, failed or left.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.shared.commits.subscribe()
    }

    /// Entries that the store has not, those being written included.
    pub fn outstanding(&self) -> usize {
        let state = self.shared.state.lock();
        state.index.num_entries() + state.num_queued
    }

    /// Durable entries that the store has not.
    pub fn len(&self) -> usize {
        self.shared.state.lock().index.num_entries()
    }

    /// Whether the store has all durable entries.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What counts in [`Options::max_bytes`].
    pub fn bytes(&self) -> u64 {
        self.shared.state.lock().charged
    }

    /// Why the last that was to be kept was not; `None` if it was, or if there is room again.
    pub fn refusal(&self) -> Option<String> {
        self.shared.state.lock().refusal.clone()
    }

    /// Brings the metrics that change by themselves, an age, up to now.
    pub fn observe(&self) {
        self.shared.publish();
    }

    /// The oldest entries, at most this many and, but for the first, of at most so many bytes.
    pub fn oldest(&self, max_entries: usize, max_bytes: u64) -> Vec<Located> {
        self.shared.state.lock().index.oldest(max_entries, max_bytes)
    }

    /// What happened to an id, oldest first, and the users whose erasure waits: both at one moment.
    pub fn changes(&self, id: &InferenceId) -> (Changes, Vec<Arc<str>>) {
        let state = self.shared.state.lock();
        (state.index.changes(id), state.index.erased_users())
    }

    /// The newest ids below `after`, newest first, with what happened to each, and the users whose erasure waits.
    pub fn below(&self, after: Option<InferenceId>, limit: usize) -> (Vec<(InferenceId, Changes)>, Vec<Arc<str>>) {
        let state = self.shared.state.lock();
        (state.index.below(after, limit), state.index.erased_users())
    }

    /// The record that was written with this key.
    pub fn with_key(&self, key: &str) -> Option<InferenceId> {
        self.shared.state.lock().index.with_key(key)
    }

    /// Ids of this user's records, newest first.
    pub fn of_user(&self, user: &str) -> Vec<InferenceId> {
        self.shared.state.lock().index.of_user(user)
    }

    /// Records that the store may not have. Blocks: some milliseconds for 100,000 of them.
    pub fn num_new(&self) -> usize {
        self.shared.state.lock().index.num_new()
    }

    /// Whether a put of this number is undone by a later entry.
    pub fn is_undone(&self, id: &InferenceId, seq: u64) -> bool {
        self.shared.state.lock().index.is_undone(id, seq)
    }

    /// Writes what was accepted, refuses what comes, and ends the thread. Blocks: until that is done.
    pub fn close(&self) {
        self.shared.state.lock().is_closed = true;
        self.shared.work.notify_one();
        if let Some(thread) = self.writer.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the journal's thread panicked: what it had not acknowledged is lost");
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.close();
    }
}
