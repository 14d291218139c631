//! Records and background work in MongoDB.
//!
//! ```text
//! put ──▶ Coalescer ──▶ upsert: command `update`, w: majority, j: true ──▶ inferences
//!   large ──▶ spill: chunks first ─────────────────────────────────────▶ outputs
//! ```
//!
//! The connection is made by the first call, not by [`MongoStore::new`], so that a server starts while MongoDB is away.
//! That call also [compares and mends](migrate) the database; all calls that come meanwhile share its outcome. No call
//! takes longer than its deadline: then it is [`Error::StoreUnavailable`], whatever the driver still waits for.

mod coalescer;
mod connection;
mod document;
mod fault;
mod migrate;
mod numbers;
mod query;
mod schema;
pub mod snapshot;
mod spill;
mod upsert;
mod work;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::TryStreamExt;
use mongodb::bson::{Bson, doc};

use super::numbers::{Limit, Numbers, QualityQuery, QualityRow, UsageQuery, UsageRow};
use super::query::{MAX_LIMIT, Page, Query};
use super::record::{Feedback, InferenceId, Record};
use super::{Inserted, Migrated, Records};
use crate::{Error, Result};
use coalescer::Coalescer;
use connection::{Connection, Connector};
use document::{FeedbackDocument, Stored, uuid};
use fault::{fault, is_duplicate, unreadable};
use upsert::Upsert;

pub use connection::MongoSettings;

/// How long the server may wait for a majority before it says so.
const WRITE_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a call may take, with one repetition of what failed, or one step of a call that takes several: those that
/// read a page, or write more than a command holds. More for each MiB that is sent: see [`deadline_of`].
const DEADLINE: Duration = Duration::from_secs(4);

/// What a MiB adds to a deadline: the slowest connection that is still one.
const PER_MIB: Duration = Duration::from_millis(500);

/// What a record adds to the deadline of a command that writes many: a server that flushes each to its disk.
const PER_RECORD: Duration = Duration::from_millis(10);

/// How long a count of all records may take.
const COUNT_DEADLINE: Duration = Duration::from_secs(30);

/// Bytes of a record's document above which its output goes into chunks. An upsert of one fits a command.
const MAX_DOCUMENT_BYTES: usize = 12 << 20;

/// How often an insertion is tried whose place was taken a moment ago and is free now.
const NUM_INSERTS: usize = 5;

/// Records and background work in a MongoDB database.
pub struct MongoStore {
    connector: Connector,
}

impl MongoStore {
    /// A store that connects when it is first used. Needs a tokio runtime from then on.
    ///
    /// Errors: [`Error::Config`] for a connection string that cannot be one. It is not repeated in the message.
    pub fn new(settings: MongoSettings) -> Result<Self> {
        Ok(Self { connector: Connector::new(settings)? })
    }

    /// Connects if need be, and says what was changed in the database when it was prepared.
    ///
    /// Errors: as [`Records`]; [`Error::Internal`] names an index that has been made otherwise.
    pub async fn migrate(&self) -> Result<Migrated> {
        Ok(self.connector.connection().await?.migrated.clone())
    }

    /// What [`MongoStore::migrate`] would change. Changes nothing.
    ///
    /// Errors: as there.
    pub async fn pending(&self) -> Result<Migrated> {
        migrate::pending(&self.connector.database().await?, self.connector.retention()).await
    }

    /// The connection, waited for no longer than a call may take.
    async fn connection(&self) -> Result<Arc<Connection>> {
        let waited = tokio::time::timeout(DEADLINE, self.connector.connection()).await;
        waited.unwrap_or_else(|_| Err(late(DEADLINE)))
    }
}

#[async_trait]
impl Records for MongoStore {
    fn name(&self) -> &'static str {
        "mongodb"
    }

    async fn ping(&self) -> Result<()> {
        let connection = self.connection().await?;
        step(0, connection.database.run_command(doc! { "ping": 1 })).await.map(|_| ())
    }

    async fn put(&self, records: &[Record]) -> Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        let mut upserts = Vec::with_capacity(records.len());
        let connection = self.connection().await?;
        for record in records {
            let (stored, chunks) = spill::cut(Stored::new(record), MAX_DOCUMENT_BYTES)?;
            spill::write(&connection.outputs, &chunks).await?;
            upserts.push(Upsert::new(&stored)?);
        }
        if Coalescer::takes(&upserts) {
            let put = tokio::time::timeout(DEADLINE, connection.coalescer.put(upserts)).await;
            return put.unwrap_or_else(|_| Err(late(DEADLINE)));
        }
        for group in upsert::groups(upserts) {
            upsert::write(&connection.database, group).await.into_iter().collect::<Result<()>>()?;
        }
        Ok(())
    }

    async fn insert(&self, record: &Record) -> Result<Inserted> {
        let connection = self.connection().await?;
        let (stored, chunks) = spill::cut(Stored::new(record), MAX_DOCUMENT_BYTES)?;
        let mut taken = vec![doc! { "_id": stored.id }];
        taken.extend(stored.idempotency_key.as_ref().map(|key| doc! { "idempotency_key": key }));
        if !chunks.is_empty() {
            // Asked before the chunks are written, which nobody would need.
            if let Some(there) = connection.find(doc! { "$or": taken.clone() }).await? {
                return Ok(Inserted::Exists(Box::new(there)));
            }
            spill::write(&connection.outputs, &chunks).await?;
        }
        let deadline = deadline_of(MAX_DOCUMENT_BYTES);
        for _ in 0..NUM_INSERTS {
            match tokio::time::timeout(deadline, connection.inferences.insert_one(&stored)).await {
                Ok(Ok(_)) => return Ok(Inserted::New),
                Ok(Err(error)) if is_duplicate(&error) => {}
                Ok(Err(error)) => return Err(fault(error)),
                Err(_) => return Err(late(deadline)),
            }
            // Nothing is there where it has been deleted since: the place may be free now.
            if let Some(there) = connection.find(doc! { "$or": taken.clone() }).await? {
                return Ok(Inserted::Exists(Box::new(there)));
            }
        }
        Err(Error::StoreUnavailable { cause: "the id or key is taken and freed again and again".into() })
    }

    async fn get(&self, id: &InferenceId) -> Result<Option<Record>> {
        self.connection().await?.find(doc! { "_id": uuid(id) }).await
    }

    async fn find_by_key(&self, key: &str) -> Result<Option<Record>> {
        self.connection().await?.find(doc! { "idempotency_key": key }).await
    }

    async fn list(&self, query: &Query) -> Result<Page> {
        let connection = self.connection().await?;
        let limit = query.limit.clamp(1, MAX_LIMIT);
        // One more tells whether there is a next page.
        let find = connection.inferences.find(query::filter(query)).sort(doc! { "_id": -1 }).limit(limit as i64 + 1);
        let find = if query.with_output { find } else { find.projection(doc! { "output": 0 }) };
        let mut cursor = step(0, find.max_time(DEADLINE)).await?;
        let mut page = Page::default();
        let mut last = None;
        for _ in 0..limit {
            let Some(stored) = step(0, cursor.try_next()).await? else { return Ok(page) };
            last = Some(stored.inference_id());
            page.records.extend(connection.record(stored, query.with_output).await?);
        }
        if step(0, cursor.try_next()).await?.is_some() {
            page.next = last;
        }
        Ok(page)
    }

    async fn delete(&self, id: &InferenceId) -> Result<bool> {
        let connection = self.connection().await?;
        // The chunks first: what is left by a crash between the two is found, and deleted by the next call.
        step(0, connection.outputs.delete_many(spill::all_of(&uuid(id)))).await?;
        let deleted = step(0, connection.inferences.delete_one(doc! { "_id": uuid(id) })).await?;
        Ok(deleted.deleted_count > 0)
    }

    async fn erase_user(&self, user: &str, limit: usize) -> Result<Vec<Record>> {
        let connection = self.connection().await?;
        let limit = limit.max(1);
        let find = connection.inferences.find(doc! { "user": user }).sort(doc! { "_id": -1 }).limit(limit as i64);
        let mut cursor = step(0, find).await?;
        let (mut erased, mut ids) = (Vec::new(), Vec::new());
        while let Some(stored) = step(0, cursor.try_next()).await? {
            let id = stored.id;
            ids.push(Bson::from(id));
            let bare = stored.spilled.is_some().then(|| Stored { spilled: None, ..stored.clone() });
            let whole = spill::join(&connection.outputs, stored).await?;
            if bare.is_some() {
                step(0, connection.outputs.delete_many(spill::all_of(&id))).await?;
            }
            // Without its chunks where a call that was cut off has taken them already.
            if let Some(stored) = whole.or(bare) {
                erased.push(stored.into_record()?);
            }
        }
        if !ids.is_empty() {
            step(0, connection.inferences.delete_many(doc! { "_id": { "$in": ids } })).await?;
        }
        if erased.len() < limit {
            // Chunks whose record was never written.
            step(0, connection.outputs.delete_many(doc! { "user": user })).await?;
        }
        Ok(erased)
    }

    async fn add_feedback(&self, id: &InferenceId, feedback: &Feedback) -> Result<bool> {
        let connection = self.connection().await?;
        let feedback = mongodb::bson::serialize_to_document(&FeedbackDocument::new(feedback));
        let add = doc! { "$addToSet": { "feedback": feedback.map_err(|e| unreadable("feedback", e))? } };
        let done = step(0, connection.inferences.update_one(doc! { "_id": uuid(id) }, add)).await?;
        Ok(done.matched_count > 0)
    }

    /// MongoDB expires records by itself: the index `retention`.
    async fn expire(&self, _before: jiff::Timestamp, _limit: usize) -> Result<usize> {
        Ok(0)
    }

    /// Counts one by one: the number that the server keeps is wrong after a crash.
    async fn count(&self) -> Result<u64> {
        let connection = self.connection().await?;
        let count = connection.inferences.count_documents(doc! {}).max_time(COUNT_DEADLINE);
        let counted = tokio::time::timeout(COUNT_DEADLINE, count).await;
        counted.map_err(|_| late(COUNT_DEADLINE))?.map_err(fault)
    }

    async fn usage(&self, query: &UsageQuery) -> Result<Numbers<UsageRow>> {
        let limit = Limit::new(query.timeout);
        let connection = limit.bound(self.connection()).await?;
        numbers::usage(&connection, query, limit).await
    }

    async fn quality(&self, query: &QualityQuery) -> Result<Numbers<QualityRow>> {
        let limit = Limit::new(query.timeout);
        let connection = limit.bound(self.connection()).await?;
        numbers::quality(&connection, query, limit).await
    }
}

/// One call of the driver that moves about this many bytes, within its deadline.
async fn step<T>(num_bytes: usize, work: impl IntoFuture<Output = mongodb::error::Result<T>>) -> Result<T> {
    let deadline = deadline_of(num_bytes);
    tokio::time::timeout(deadline, work.into_future()).await.map_err(|_| late(deadline))?.map_err(fault)
}

fn deadline_of(num_bytes: usize) -> Duration {
    DEADLINE + PER_MIB * u32::try_from(num_bytes >> 20).unwrap_or(u32::MAX)
}

/// What is said of a call that took too long.
fn late(deadline: Duration) -> Error {
    Error::StoreUnavailable { cause: format!("MongoDB did not answer within {deadline:?}") }
}

/// A duration as the server takes it.
fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}
