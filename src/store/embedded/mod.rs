//! The embedded store: records and background work in one SQLite file, written by one thread, read by a few connections.
//!
//! ```text
//! put, insert, … ──▶ channel ──▶ writer thread: all that waits in one transaction, one fsync ──▶ answers
//! get, list, …   ──▶ blocking thread with one of the readers
//! ```
//!
//! `docs/storage.md` says for operators what lies where and what is promised.

pub mod beside;
mod change;
mod fault;
mod files;
mod list;
mod metrics;
mod migrate;
mod numbers;
mod read;
mod row;
mod schema;
mod work;
mod write;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use rusqlite::Connection;

use self::metrics::StoreMetrics;
use super::numbers::{Limit, Numbers, QualityQuery, QualityRow, UsageQuery, UsageRow};
use super::query::{Page, Query};
use super::record::{Feedback, InferenceId, Record};
use super::{Inserted, Migrated, Records};
use crate::{Error, Result};
use files::Lock;
use read::Readers;
use write::Writer;

/// Connections that read: more than the usual server has cores would only wait for each other.
const NUM_READERS: usize = 4;

/// Records in a file of this process's own.
///
/// Dropping it blocks until what waits is committed. The folder is free for another when also the last read has ended.
pub struct Embedded {
    // In the order of dropping: the writer closes the file last, which empties the log into it.
    readers: Arc<Readers>,
    /// One that numbers are read with, one answer after another: what takes seconds takes none of the others' turns.
    numbers: Arc<Readers>,
    writer: Writer,
    metrics: Arc<StoreMetrics>,
}

impl Embedded {
    /// Opens the store in `folder`, makes it where there is none, and brings it to the present schema.
    ///
    /// Blocks: as long as migrations take; call it off the async threads.
    /// Errors: [`crate::Error::Config`] naming `database.path` where the folder cannot be written, another server works on
    /// it, or its file is another program's or a newer version's; the errors of [`Records`] for all else.
    pub fn open(folder: &Path) -> Result<Self> {
        let (conn, lock, _) = Self::prepare(folder)?;
        let (lock, file) = (Arc::new(lock), files::database(folder));
        let readers = (0..NUM_READERS).map(|_| files::open_reader(&file)).collect::<Result<_>>()?;
        let metrics = Arc::new(StoreMetrics::new());
        Ok(Self {
            readers: Readers::new(readers, lock.clone()),
            numbers: Readers::new(vec![files::open_reader(&file)?], lock.clone()),
            writer: Writer::start(conn, metrics.clone(), lock)?,
            metrics,
        })
    }

    /// Brings the store in `folder` to the present schema, makes it where there is none, and says what was done.
    ///
    /// Blocks, and errors: as [`Embedded::open`].
    pub fn migrate(folder: &Path) -> Result<Migrated> {
        Ok(Self::prepare(folder)?.2)
    }

    /// What [`Embedded::migrate`] would do. Changes nothing, and needs no lock.
    pub fn pending(folder: &Path) -> Result<Migrated> {
        let file = files::database(folder);
        if !file.is_file() {
            let changes = vec![format!("store made in {}", folder.display())];
            return Ok(Migrated { from: 0, to: schema::MIGRATIONS.len() as i32, changes });
        }
        migrate::pending(&files::open_reader(&file)?, &file.display().to_string())
    }

    fn prepare(folder: &Path) -> Result<(Connection, Lock, Migrated)> {
        files::make_folder(folder)?;
        let lock = Lock::take(folder)?;
        let file = files::database(folder);
        let mut conn = files::open_writer(&file)?;
        let name = file.display().to_string();
        let migrated = migrate::migrate(&mut conn, &name, schema::MIGRATIONS, schema::INDEXES)?;
        Ok((conn, lock, migrated))
    }

    /// What SQLite finds wrong with the file, one fault a line; empty where it is sound. Reads all of the file.
    pub async fn quick_check(&self) -> Result<Vec<String>> {
        self.read(read::quick_check).await
    }

    async fn read<T: Send + 'static>(&self, read: impl FnOnce(&Connection) -> Result<T> + Send + 'static) -> Result<T> {
        let outcome = self.readers.read(read).await;
        outcome.inspect_err(|error| self.metrics.failed(error))
    }

    /// Reads numbers, its turn included within the timeout.
    async fn count_up<T: Send + 'static>(
        &self,
        timeout: Duration,
        read: impl FnOnce(&Connection, Limit) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let limit = Limit::new(timeout);
        limit.check()?;
        match limit.bound(self.numbers.read(move |conn| read(conn, limit))).await {
            // Asked for too much at once, and not the store's failure.
            Err(late @ Error::Deadline { .. }) => Err(late),
            outcome => outcome.inspect_err(|error| self.metrics.failed(error)),
        }
    }

    async fn change<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let outcome = self.writer.change(change).await;
        outcome.inspect_err(|error| self.metrics.failed(error))
    }
}

#[async_trait]
impl Records for Embedded {
    fn name(&self) -> &'static str {
        "embedded"
    }

    async fn ping(&self) -> Result<()> {
        // Through the writer as well: its thread may have died, or another process may hold the file's lock.
        self.change(|_| Ok(())).await?;
        self.read(|conn| Ok(conn.query_row("SELECT 1", [], |_| Ok(()))?)).await
    }

    async fn put(&self, records: &[Record]) -> Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        let records = records.to_vec();
        self.change(move |conn| records.iter().try_for_each(|record| change::put(conn, record))).await
    }

    async fn insert(&self, record: &Record) -> Result<Inserted> {
        let record = record.clone();
        self.change(move |conn| change::insert(conn, &record)).await
    }

    async fn get(&self, id: &InferenceId) -> Result<Option<Record>> {
        let id = *id;
        self.read(move |conn| read::get(conn, &id)).await
    }

    async fn find_by_key(&self, key: &str) -> Result<Option<Record>> {
        let key = key.to_string();
        self.read(move |conn| read::find_by_key(conn, &key)).await
    }

    async fn list(&self, query: &Query) -> Result<Page> {
        let query = query.clone();
        self.read(move |conn| list::list(conn, &query)).await
    }

    async fn delete(&self, id: &InferenceId) -> Result<bool> {
        let id = *id;
        self.change(move |conn| change::delete(conn, &id)).await
    }

    async fn erase_user(&self, user: &str, limit: usize) -> Result<Vec<Record>> {
        let user = user.to_string();
        let erased = self.change(move |conn| change::erase_user(conn, &user, limit)).await?;
        if erased.len() < limit {
            // The log still has them until it is written over. Erased they are either way, so a reader in its way only
            // puts this off to the next checkpoint.
            if let Err(error) = self.writer.checkpoint().await {
                tracing::warn!(%error, "erased records stay in the write-ahead log until it is next emptied");
            }
        }
        Ok(erased)
    }

    async fn add_feedback(&self, id: &InferenceId, feedback: &Feedback) -> Result<bool> {
        let (id, feedback) = (*id, feedback.clone());
        self.change(move |conn| change::add_feedback(conn, &id, &feedback)).await
    }

    async fn expire(&self, before: jiff::Timestamp, limit: usize) -> Result<usize> {
        self.change(move |conn| change::expire(conn, before, limit)).await
    }

    async fn count(&self) -> Result<u64> {
        self.read(read::count).await
    }

    async fn usage(&self, query: &UsageQuery) -> Result<Numbers<UsageRow>> {
        let query = query.clone();
        self.count_up(query.timeout, move |conn, limit| numbers::usage(conn, &query, limit)).await
    }

    async fn quality(&self, query: &QualityQuery) -> Result<Numbers<QualityRow>> {
        let query = query.clone();
        self.count_up(query.timeout, move |conn, limit| numbers::quality(conn, &query, limit)).await
    }
}

/// A number of rows as SQLite counts them.
fn rows(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}
