//! Records in memory, for tests: the contract in its plainest form, and a store that can be away, slow or mute on command.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;

use super::numbers::quality::QualityFold;
use super::numbers::usage::UsageFold;
use super::numbers::{Limit, Numbers, Observed, QualityQuery, QualityRow, UsageQuery, UsageRow};
use super::query::{MAX_LIMIT, Page, Query};
use super::record::{Feedback, InferenceId, Record};
use super::{Inserted, Records};
use crate::{Error, Result};

/// What ails a [`Memory`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Ailment {
    #[default]
    None,
    /// It cannot be reached: nothing is written, and every call fails at once.
    Away,
    /// Every call waits this long before it does anything.
    Slow(Duration),
    /// It does what it is asked, and its answer is lost: every call fails.
    Mute,
}

/// Records that end with the process.
#[derive(Debug, Default)]
pub struct Memory {
    records: Mutex<BTreeMap<InferenceId, Record>>,
    ailment: Mutex<Ailment>,
}

impl Memory {
    /// Ails from the next call on.
    pub fn set(&self, ailment: Ailment) {
        *self.ailment.lock() = ailment;
    }

    /// Everything in it, oldest first, whatever ails it.
    pub fn records(&self) -> Vec<Record> {
        self.records.lock().values().cloned().collect()
    }

    async fn run<T>(&self, work: impl FnOnce(&mut BTreeMap<InferenceId, Record>) -> T) -> Result<T> {
        let unavailable = |cause: &str| Err(Error::StoreUnavailable { cause: cause.to_string() });
        let ailment = *self.ailment.lock();
        match ailment {
            Ailment::Away => return unavailable("told to be away"),
            Ailment::Slow(delay) => tokio::time::sleep(delay).await,
            Ailment::None | Ailment::Mute => {}
        }
        let done = work(&mut self.records.lock());
        if ailment == Ailment::Mute { unavailable("told to lose its answers") } else { Ok(done) }
    }
}

#[async_trait]
impl Records for Memory {
    fn name(&self) -> &'static str {
        "memory"
    }

    async fn ping(&self) -> Result<()> {
        self.run(|_| ()).await
    }

    async fn put(&self, records: &[Record]) -> Result<()> {
        self.run(|all| records.iter().for_each(|record| put(all, record.clone()))).await
    }

    async fn insert(&self, record: &Record) -> Result<Inserted> {
        let work = |all: &mut BTreeMap<InferenceId, Record>| {
            let key = record.facts.idempotency_key.as_deref();
            let there = all.get(&record.id).or_else(|| find_by_key(all, key?));
            if let Some(there) = there {
                return Inserted::Exists(Box::new(there.clone()));
            }
            put(all, record.clone());
            Inserted::New
        };
        self.run(work).await
    }

    async fn get(&self, id: &InferenceId) -> Result<Option<Record>> {
        self.run(|all| all.get(id).cloned()).await
    }

    async fn find_by_key(&self, key: &str) -> Result<Option<Record>> {
        self.run(|all| find_by_key(all, key).cloned()).await
    }

    async fn list(&self, query: &Query) -> Result<Page> {
        self.run(|all| list(all, query)).await
    }

    async fn delete(&self, id: &InferenceId) -> Result<bool> {
        self.run(|all| all.remove(id).is_some()).await
    }

    async fn erase_user(&self, user: &str, limit: usize) -> Result<Vec<Record>> {
        let work = |all: &mut BTreeMap<InferenceId, Record>| {
            let theirs = all.values().filter(|record| record.facts.user.as_deref() == Some(user));
            let ids: Vec<InferenceId> = theirs.take(limit).map(|record| record.id).collect();
            ids.iter().filter_map(|id| all.remove(id)).collect()
        };
        self.run(work).await
    }

    async fn add_feedback(&self, id: &InferenceId, feedback: &Feedback) -> Result<bool> {
        let work = |all: &mut BTreeMap<InferenceId, Record>| {
            let record = all.get_mut(id);
            record.map(|record| join(&mut record.facts.feedback, vec![feedback.clone()])).is_some()
        };
        self.run(work).await
    }

    async fn expire(&self, before: jiff::Timestamp, limit: usize) -> Result<usize> {
        let work = |all: &mut BTreeMap<InferenceId, Record>| {
            let old = all.range(..InferenceId::first_at(before)).take(limit);
            let ids: Vec<InferenceId> = old.map(|(id, _)| *id).collect();
            ids.iter().for_each(|id| drop(all.remove(id)));
            ids.len()
        };
        self.run(work).await
    }

    async fn count(&self) -> Result<u64> {
        self.run(|all| all.len() as u64).await
    }

    async fn usage(&self, query: &UsageQuery) -> Result<Numbers<UsageRow>> {
        let work = |all: &mut BTreeMap<InferenceId, Record>| {
            let mut fold = UsageFold::new(query);
            all.values().for_each(|record| fold.add(&Observed::of(record)));
            fold.finish()
        };
        let limit = Limit::new(query.timeout);
        limit.check()?;
        limit.bound(self.run(work)).await
    }

    async fn quality(&self, query: &QualityQuery) -> Result<Numbers<QualityRow>> {
        let limit = Limit::new(query.timeout);
        limit.check()?;
        limit.bound(self.run(|all| quality(all, query))).await
    }
}

fn quality(all: &BTreeMap<InferenceId, Record>, query: &QualityQuery) -> Numbers<QualityRow> {
    let mut fold = QualityFold::new(query);
    for record in all.values() {
        if fold.add_one(&Observed::of(record)) {
            let facts = &record.facts;
            let said = &facts.feedback;
            said.iter().for_each(|said| fold.add_feedback(&facts.model, &facts.version, &said.into()));
        }
    }
    fold.finish()
}

fn find_by_key<'a>(all: &'a BTreeMap<InferenceId, Record>, key: &str) -> Option<&'a Record> {
    all.values().find(|record| record.facts.idempotency_key.as_deref() == Some(key))
}

fn put(all: &mut BTreeMap<InferenceId, Record>, mut record: Record) {
    let key = record.facts.idempotency_key.as_deref();
    if key.and_then(|key| find_by_key(all, key)).is_some_and(|holder| holder.id != record.id) {
        record.facts.idempotency_key = None;
    }
    let said = std::mem::take(&mut record.facts.feedback);
    if let Some(old) = all.get(&record.id) {
        if old.facts.status.is_final() && !record.facts.status.is_final() {
            return;
        }
        record.facts.feedback = old.facts.feedback.clone();
    }
    join(&mut record.facts.feedback, said);
    all.insert(record.id, record);
}

fn join(there: &mut Vec<Feedback>, new: Vec<Feedback>) {
    for said in new {
        if !there.contains(&said) {
            there.push(said);
        }
    }
}

fn list(all: &BTreeMap<InferenceId, Record>, query: &Query) -> Page {
    let limit = query.limit.clamp(1, MAX_LIMIT);
    let is_wanted = |record: &&Record| {
        let (id, facts) = (record.id, &record.facts);
        query.model.as_ref().is_none_or(|model| *model == facts.model)
            && query.user.as_ref().is_none_or(|user| facts.user.as_ref() == Some(user))
            && query.status.is_none_or(|status| status == facts.status)
            && query.from.is_none_or(|from| id >= InferenceId::first_at(from))
            && query.to.is_none_or(|to| id < InferenceId::first_at(to))
            && query.after.is_none_or(|after| id < after)
            && query.metadata.iter().all(|(key, value)| facts.metadata.get(key) == Some(value))
    };
    let mut found = all.values().rev().filter(is_wanted);
    let mut records: Vec<Record> = found.by_ref().take(limit).cloned().collect();
    let next = found.next().and(records.last()).map(|record| record.id);
    if !query.with_output {
        records.iter_mut().for_each(|record| record.output = None);
    }
    Page { records, next }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ails_as_it_is_told() {
        let store = Memory::default();
        let unavailable = |error: Error| matches!(error, Error::StoreUnavailable { .. });
        assert_eq!(store.count().await, Ok(0));
        store.set(Ailment::Away);
        assert!(unavailable(store.count().await.unwrap_err()));
        store.set(Ailment::Slow(Duration::from_secs(600)));
        let brief = Duration::from_millis(1);
        assert!(tokio::time::timeout(brief, store.count()).await.is_err());
        store.set(Ailment::None);
        assert_eq!(store.count().await, Ok(0));
    }
}
