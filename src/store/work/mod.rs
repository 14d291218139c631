//! Background work as stores keep it: tasks with leases, documents with revisions, files in parts.
//!
//! What the work is, [`crate::jobs`] knows; a store knows only these three plain things, so that it stays small. One suite
//! of tests in `tests/work.rs` holds each implementation to the same words.
//!
//! ```text
//! push ──▶ waiting ──claim──▶ leased ──finish──▶ gone
//!             ▲                 │ postpone, or the lease is over: its process died
//!             └─────────────────┘
//! ```

pub mod dispatch;
pub mod memory;

use std::time::Duration;

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Most bytes of a part of a file: a document of MongoDB holds 16 MiB.
pub const MAX_PART_BYTES: usize = 4 << 20;

/// Most documents of one call of [`Work::documents`].
pub const MAX_DOCUMENTS: usize = 1000;

/// Longest id of a task, a document or a file, in bytes of ASCII.
pub const MAX_ID_LEN: usize = 128;

/// A store of background work. Errors of every method: as those of [`super::Records`].
///
/// Every write is durable when its future completes without an error. Times are those of the callers' clocks: a lease
/// should be much longer than clocks of several servers differ. A lease that is taken over early costs work done twice,
/// never a result: whoever writes a result does so by an id, once ([`Work::create`]).
#[async_trait]
pub trait Work: Send + Sync + 'static {
    // ---- tasks ------------------------------------------------------------------------------------

    /// Adds tasks. One whose id is there already is left as it is. All or some are added where it fails.
    async fn push(&self, tasks: &[Task]) -> Result<()>;

    /// Takes tasks that are due and that nobody holds, those due the longest first, and counts an attempt of each. No
    /// other caller gets them until the lease is over, however many ask at once. A task whose payload cannot be read is
    /// passed over, with an error in the log.
    async fn claim(&self, claim: &Claim) -> Result<Vec<Task>>;

    /// Holds a task longer. Returns what became of it, `Held` where it is still the owner's.
    async fn renew(&self, id: &str, owner: &str, until: Timestamp) -> Result<Hold>;

    /// Ends a task, if the owner still holds it. Returns what it was until then; unless `Lost`, it is gone now.
    async fn finish(&self, id: &str, owner: &str) -> Result<Hold>;

    /// Gives a task back, to be due at `due_at`, if the owner still holds it. A cancelled one is gone then.
    async fn postpone(&self, id: &str, owner: &str, due_at: Timestamp) -> Result<Hold>;

    /// Ends a task that waits, or marks one that is held, so that its owner learns of it; where the owner does not live to,
    /// nobody gets it once the lease is over, and it is gone. Returns whether it was there.
    async fn cancel(&self, id: &str) -> Result<bool>;

    /// Number of tasks, held or waiting, of each kind.
    async fn num_tasks(&self) -> Result<Vec<(TaskKind, u64)>>;

    // ---- documents --------------------------------------------------------------------------------

    /// Writes a document that is not there yet, as its revision 1. Returns whether it was written: of many callers with
    /// one id, one.
    async fn create(&self, document: &Document) -> Result<bool>;

    /// One document.
    async fn document(&self, kind: DocumentKind, id: &str) -> Result<Option<Document>>;

    /// Writes a document that was read, if its revision is still the one it was read with; it is then one more. Returns
    /// whether it was written. Kind, id and parent do not change.
    async fn replace(&self, document: &Document) -> Result<bool>;

    /// Removes a document. Returns whether it was there.
    async fn remove(&self, kind: DocumentKind, id: &str) -> Result<bool>;

    /// Documents in falling order of their ids.
    async fn documents(&self, query: &DocumentQuery) -> Result<Vec<Document>>;

    /// At most `limit` documents whose time is over, the earliest first.
    async fn expired(&self, now: Timestamp, limit: usize) -> Result<Vec<Document>>;

    // ---- parts of files ---------------------------------------------------------------------------

    /// Writes a part of a file, at most [`MAX_PART_BYTES`]; one that is there is replaced.
    ///
    /// Errors: also [`Error::TooLarge`] naming `part`.
    async fn put_part(&self, file: &str, index: u32, bytes: &[u8]) -> Result<()>;

    /// A part of a file.
    async fn part(&self, file: &str, index: u32) -> Result<Option<Vec<u8>>>;

    /// Removes all parts of a file.
    async fn remove_parts(&self, file: &str) -> Result<()>;
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskKind {
    /// One asynchronous inference.
    Inference,
    /// Telling a client's URL of a result.
    Callback,
    /// Reading a batch's input file and cutting it into chunks.
    Batch,
    /// Some lines of a batch.
    Chunk,
}

impl TaskKind {
    /// Every kind.
    pub const ALL: &'static [Self] = &[Self::Inference, Self::Callback, Self::Batch, Self::Chunk];

    /// The word of every store, log and metric.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inference => "inference",
            Self::Callback => "callback",
            Self::Batch => "batch",
            Self::Chunk => "chunk",
        }
    }

    /// The way back from [`TaskKind::as_str`].
    pub fn of(word: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.as_str() == word)
    }
}

/// Something to be done once, by whoever claims it.
#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    /// Made from what it is for, so that pushing it again adds nothing.
    pub id: String,
    pub kind: TaskKind,
    /// What whoever does it must know; at most a few MiB.
    pub payload: serde_json::Value,
    /// Not before this time. Millisecond precision.
    pub due_at: Timestamp,
    /// How often it was claimed, this time included.
    pub attempts: u32,
}

/// Which tasks are wanted, and for how long.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    /// Names who holds what this claim gets: another one in every process, and after a restart.
    pub owner: String,
    pub now: Timestamp,
    /// Only tasks due at this time or before.
    pub due_by: Timestamp,
    pub lease: Duration,
    pub limit: usize,
    /// Only of these kinds.
    pub kinds: Vec<TaskKind>,
    /// Only these; `None`: any.
    pub ids: Option<Vec<String>>,
}

/// How a task stands with who claimed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    Held,
    /// It was cancelled while it was held.
    Cancelled,
    /// The lease was over and another one has it, or has ended it.
    Lost,
}

/// What a document is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DocumentKind {
    File,
    Batch,
    /// What came of a chunk of a batch.
    Chunk,
    /// Parts that are being written, and that no other document refers to yet.
    Draft,
    /// What was made for an idempotency key.
    Key,
}

impl DocumentKind {
    /// Every one there is.
    pub const ALL: &'static [Self] = &[Self::File, Self::Batch, Self::Chunk, Self::Draft, Self::Key];

    /// The word of every store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Batch => "batch",
            Self::Chunk => "chunk",
            Self::Draft => "draft",
            Self::Key => "key",
        }
    }

    /// The way back from [`DocumentKind::as_str`].
    pub fn of(word: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.as_str() == word)
    }
}

/// A small JSON value that is found again.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    pub kind: DocumentKind,
    /// Unique within its kind; lists are in the order of its bytes.
    pub id: String,
    /// The document it is a part of.
    pub parent: Option<String>,
    /// When [`Work::expired`] begins to return it. Millisecond precision.
    pub expires_at: Option<Timestamp>,
    /// As it was read; of no meaning for [`Work::create`].
    pub revision: u64,
    pub body: serde_json::Value,
}

/// Which documents are wanted: all conditions hold.
#[derive(Debug, Clone, PartialEq)]
pub struct DocumentQuery {
    pub kind: DocumentKind,
    pub parent: Option<String>,
    /// Only ids before this one in the order of their bytes: the last of the page before.
    pub after: Option<String>,
    /// 1 to [`MAX_DOCUMENTS`].
    pub limit: usize,
}

/// Whether a part is one that every store takes.
pub(super) fn check_part(bytes: &[u8]) -> Result<()> {
    if bytes.len() > MAX_PART_BYTES {
        let (got, limit) = (bytes.len(), MAX_PART_BYTES);
        return Err(Error::TooLarge { field: "part".to_string(), got, limit, unit: "bytes" });
    }
    Ok(())
}

/// `time` after `now`, or the end of time.
pub(super) fn after(now: Timestamp, time: Duration) -> Timestamp {
    let time = SignedDuration::try_from(time).unwrap_or(SignedDuration::MAX);
    now.checked_add(time).unwrap_or(Timestamp::MAX)
}
