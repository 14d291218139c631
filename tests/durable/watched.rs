//! A store that says what it was asked to write, and fails on command.

use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;
use eremois::store::memory::Memory;
use eremois::store::numbers::{Numbers, QualityQuery, QualityRow, UsageQuery, UsageRow};
use eremois::store::query::{Page, Query};
use eremois::store::record::{Feedback, InferenceId, Record, Status};
use eremois::store::{Inserted, Records};
use eremois::{Error, Result};
use parking_lot::Mutex;

/// How writes go; reads always reach the store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Writes {
    #[default]
    Taken,
    /// Unavailable, nothing written.
    Away,
    /// Refused for good, nothing written.
    Refused,
    /// This many more records are taken, then it is away in the middle of a bulk.
    TakenThenAway(usize),
}

/// What was written, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Written {
    Put(InferenceId, Status),
    Delete(InferenceId),
    Erase(String),
    Feedback(InferenceId),
}

#[derive(Default)]
pub struct Watched {
    pub memory: Memory,
    writes: Mutex<Writes>,
    /// Ids it refuses for good.
    refused: Mutex<BTreeSet<InferenceId>>,
    log: Mutex<Vec<Written>>,
}

impl Watched {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    pub fn set(&self, writes: Writes) {
        *self.writes.lock() = writes;
    }

    pub fn refuse(&self, id: InferenceId) {
        self.refused.lock().insert(id);
    }

    pub fn log(&self) -> Vec<Written> {
        self.log.lock().clone()
    }

    fn admit(&self, what: Written) -> Result<()> {
        let mut writes = self.writes.lock();
        let unavailable = || Err(Error::StoreUnavailable { cause: "told to be away".to_string() });
        match &mut *writes {
            Writes::Taken => {}
            Writes::Away => return unavailable(),
            Writes::Refused => return Err(Error::Internal { cause: "told to refuse".to_string() }),
            Writes::TakenThenAway(0) => return unavailable(),
            Writes::TakenThenAway(left) => *left -= 1,
        }
        self.log.lock().push(what);
        Ok(())
    }
}

#[async_trait]
impl Records for Watched {
    fn name(&self) -> &'static str {
        "watched"
    }

    async fn ping(&self) -> Result<()> {
        match *self.writes.lock() {
            Writes::Away | Writes::TakenThenAway(0) => return Err(Error::StoreUnavailable { cause: "away".into() }),
            _ => {}
        }
        self.memory.ping().await
    }

    async fn put(&self, records: &[Record]) -> Result<()> {
        for record in records {
            if self.refused.lock().contains(&record.id) {
                return Err(Error::Internal { cause: "this record is refused".to_string() });
            }
            self.admit(Written::Put(record.id, record.facts.status))?;
            self.memory.put(std::slice::from_ref(record)).await?;
        }
        Ok(())
    }

    async fn insert(&self, record: &Record) -> Result<Inserted> {
        self.admit(Written::Put(record.id, record.facts.status))?;
        self.memory.insert(record).await
    }

    async fn get(&self, id: &InferenceId) -> Result<Option<Record>> {
        self.memory.get(id).await
    }

    async fn find_by_key(&self, key: &str) -> Result<Option<Record>> {
        self.memory.find_by_key(key).await
    }

    async fn list(&self, query: &Query) -> Result<Page> {
        self.memory.list(query).await
    }

    async fn delete(&self, id: &InferenceId) -> Result<bool> {
        self.admit(Written::Delete(*id))?;
        self.memory.delete(id).await
    }

    async fn erase_user(&self, user: &str, limit: usize) -> Result<Vec<Record>> {
        self.admit(Written::Erase(user.to_string()))?;
        self.memory.erase_user(user, limit).await
    }

    async fn add_feedback(&self, id: &InferenceId, feedback: &Feedback) -> Result<bool> {
        self.admit(Written::Feedback(*id))?;
        self.memory.add_feedback(id, feedback).await
    }

    async fn expire(&self, before: jiff::Timestamp, limit: usize) -> Result<usize> {
        self.memory.expire(before, limit).await
    }

    async fn count(&self) -> Result<u64> {
        self.memory.count().await
    }

    async fn usage(&self, query: &UsageQuery) -> Result<Numbers<UsageRow>> {
        self.memory.usage(query).await
    }

    async fn quality(&self, query: &QualityQuery) -> Result<Numbers<QualityRow>> {
        self.memory.quality(query).await
    }
}
