//! What outlives a request: records of inferences, the result cache, and what keeps both safe.
//!
//! The traits here are the whole contract with a database. [`Records`] has three implementations (embedded, MongoDB and,
//! for tests, memory), and so has [`work::Work`], which the same stores implement; [`cache::Cache`] one with two levels ([in this process](local) and [Redis](redis)); one suite of tests in `tests/store.rs` holds
//! each to the same words. No other room names a database's client.
//!
//! ```text
//! inference ──▶ Durable ──▶ Records: embedded | mongo          Layers ──▶ local ──▶ Redis
//!                  │ away                                         (cache of results, by item)
//!                  └──▶ Journal ── replayed in order once it is back
//! ```

pub mod backup;
pub mod cache;
pub mod cache_metrics;
pub mod durable;
pub mod embedded;
pub mod encode;
pub mod journal;
pub mod layers;
pub mod local;
pub mod memory;
pub mod mongo;
pub mod numbers;
pub mod open;
pub mod place;
pub mod query;
pub mod record;
pub mod redis;
pub mod work;

use async_trait::async_trait;

use crate::Result;
use numbers::{Numbers, QualityQuery, QualityRow, UsageQuery, UsageRow};
use query::{Page, Query};
use record::{Feedback, InferenceId, Record};

/// Registers help and unit of every metric of this room. Call it once, after the recorder is installed.
pub fn describe_metrics() {
    cache_metrics::describe();
    journal::describe();
    redis::stream::describe_metrics();
}

/// A store of inference records.
///
/// Every write is durable when its future completes without an error: committed with fsync by the embedded store,
/// acknowledged by a majority with its journal by MongoDB. A future that is dropped may have written or not.
///
/// Errors of every method: [`crate::Error::StoreUnavailable`] where the store cannot be reached or does not answer in
/// time, after which the write may have happened or not: writes are made to be repeated. [`crate::Error::Internal`] for
/// everything that a repetition would not mend.
#[async_trait]
pub trait Records: Send + Sync + 'static {
    /// "embedded", "mongodb", "memory".
    fn name(&self) -> &'static str;

    /// Whether the store answers.
    async fn ping(&self) -> Result<()>;

    /// Writes records by id. One that is there is replaced, unless it is [final](record::Status::is_final) and the new one
    /// is not: then the old one stays, so that a replay of an older state undoes nothing. Feedback that is there stays
    /// too, and the new record's is added to it once. A record whose idempotency key is another's is written without
    /// it: the key stays with the first, and no result is lost. All or some are written where it fails; repeating the
    /// call ends in the same state.
    async fn put(&self, records: &[Record]) -> Result<()>;

    /// Writes a record whose id or idempotency key may be taken: the answer says by which record.
    async fn insert(&self, record: &Record) -> Result<Inserted>;

    /// One record.
    async fn get(&self, id: &InferenceId) -> Result<Option<Record>>;

    /// The record that was written with this idempotency key.
    async fn find_by_key(&self, key: &str) -> Result<Option<Record>>;

    /// A page of records, newest first, stable while others are written: see [`Query`].
    async fn list(&self, query: &Query) -> Result<Page>;

    /// Deletes a record. Returns whether it was there.
    async fn delete(&self, id: &InferenceId) -> Result<bool>;

    /// Deletes all records of a user and returns them one last time, so that what was computed for them can leave the
    /// cache as well. At most `limit` a call; call again until fewer come.
    async fn erase_user(&self, user: &str, limit: usize) -> Result<Vec<Record>>;

    /// Adds what somebody said of a result; what is there already, word for word and to the time, is not added again.
    /// Returns whether the record was there.
    async fn add_feedback(&self, id: &InferenceId, feedback: &Feedback) -> Result<bool>;

    /// Deletes at most `limit` records created before this time, oldest first, and returns their number. MongoDB does so
    /// by itself (a TTL index) and returns 0.
    async fn expire(&self, before: jiff::Timestamp, limit: usize) -> Result<usize>;

    /// Number of records.
    async fn count(&self) -> Result<u64>;

    /// What was used, by group, in the order of the groups' values: see [`UsageQuery`]. Reads every record of the time
    /// asked for, and keeps nobody's reads waiting meanwhile.
    ///
    /// Errors: also [`crate::Error::Deadline`] when the query's timeout is over.
    async fn usage(&self, query: &UsageQuery) -> Result<Numbers<UsageRow>>;

    /// How well each version of a model did, by model and then in the order of their first use: see [`QualityQuery`].
    /// Reads and errors as [`Records::usage`].
    async fn quality(&self, query: &QualityQuery) -> Result<Numbers<QualityRow>>;
}

/// What was changed, or must be, to bring a store to the present schema.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Migrated {
    /// The version of the schema before; 0 for an empty store.
    pub from: i32,
    pub to: i32,
    /// Each change in words. Empty: everything was as it must be.
    pub changes: Vec<String>,
}

/// What came of [`Records::insert`].
#[derive(Debug, Clone, PartialEq)]
pub enum Inserted {
    New,
    /// A record with this id or idempotency key was there before; nothing was written.
    Exists(Box<Record>),
}
