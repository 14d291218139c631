//! Writes: to the store, or to the journal while it is away.

use std::time::Duration;

use jiff::Timestamp;

use super::phase::{Event, Route};
use super::{Admitted, Journalled, is_away, within};
use crate::store::Inserted;
use crate::store::journal::{Claimed, Entry};
use crate::store::record::{Feedback, InferenceId, Record};
use crate::{Error, Result};

impl Journalled {
    /// Where a write goes: `None` to the store.
    async fn admit(&self) -> Option<Admitted<'_>> {
        let mut phases = self.phases.subscribe();
        loop {
            // A statement of its own: the guard must not live until the await.
            let route = self.gate.lock().admit();
            match route {
                Route::Store => return None,
                Route::Journal => return Some(Admitted(self)),
                Route::Wait => {}
            }
            // The replay changes the phase in no longer than the store's answers take. Should it have ended, writes go on.
            if tokio::time::timeout(self.options.timeout * 4, phases.changed()).await.is_err() {
                self.on(Event::StoreFailed);
            }
        }
    }

    /// The way of a write that the store did not take.
    fn fall_back(&self, cause: &Error) -> Admitted<'_> {
        let is_news = {
            let mut gate = self.gate.lock();
            let is_news = gate.on(Event::StoreFailed, Timestamp::now());
            let route = gate.admit();
            debug_assert_eq!(route, Route::Journal, "after a failure of the store there is no other way");
            is_news
        };
        if is_news {
            self.phases.send_modify(|count| *count += 1);
            tracing::warn!(%cause, "the store is away: results go to the journal");
        }
        Admitted(self)
    }

    /// Writes entries to the journal and waits until they are durable.
    async fn append(&self, way: Admitted<'_>, entries: Vec<Entry>) -> Result<()> {
        let receipt = self.journal.append(entries, None)?;
        drop(way);
        receipt.await
    }

    pub(super) async fn put(&self, records: &[Record]) -> Result<()> {
        let way = match self.admit().await {
            Some(way) => way,
            None => match within(self.limit_for(records), self.store.put(records)).await {
                Err(e) if is_away(&e) => self.fall_back(&e),
                done => return done,
            },
        };
        let entries = entries_of(records).await?;
        self.append(way, entries).await
    }

    /// How long the store may take for these.
    fn limit_for(&self, records: &[Record]) -> Duration {
        let num_mib = records.iter().map(Record::approximate_bytes).sum::<usize>() >> 20;
        let times = |each_ms, count: usize| Duration::from_millis(each_ms) * u32::try_from(count).unwrap_or(u32::MAX);
        let more = times(5, records.len().saturating_sub(1)).saturating_add(times(1000, num_mib));
        self.options.timeout.saturating_add(more)
    }

    pub(super) async fn insert(&self, record: &Record) -> Result<Inserted> {
        let way = match self.admit().await {
            Some(way) => way,
            None => match within(self.limit_for(std::slice::from_ref(record)), self.store.insert(record)).await {
                Err(e) if is_away(&e) => self.fall_back(&e),
                done => return done,
            },
        };
        let key = record.facts.idempotency_key.as_deref();
        let mut commits = self.journal.watch();
        let claim = loop {
            match self.journal.claim(record.id, key) {
                Claimed::Yours(claim) => break claim,
                Claimed::Taken(owner) => {
                    if let Some(there) = self.get(&owner).await? {
                        return Ok(Inserted::Exists(Box::new(there)));
                    }
                    // It left the journal, or was deleted, since.
                    tokio::task::yield_now().await;
                }
                // The journal outlives this call, so it does change or is closed, and then refuses.
                Claimed::Busy => drop(commits.changed().await),
            }
        };
        // Asked after the claim: what was in the journal before it and no longer is, the store has.
        match self.find_taken(record).await {
            Ok(None) => {}
            Ok(Some(there)) => return Ok(Inserted::Exists(Box::new(there))),
            // That keys are unique holds while the store can be asked: docs/storage.md.
            Err(e) if is_away(&e) => {}
            Err(e) => return Err(e),
        }
        let entries = entries_of(std::slice::from_ref(record)).await?;
        let receipt = self.journal.append(entries, Some(claim))?;
        drop(way);
        receipt.await?;
        Ok(Inserted::New)
    }

    /// The record that has the id or the key of a new one.
    async fn find_taken(&self, record: &Record) -> Result<Option<Record>> {
        if let Some(key) = &record.facts.idempotency_key
            && let Some(there) = self.find_by_key(key).await?
        {
            return Ok(Some(there));
        }
        self.get(&record.id).await
    }

    pub(super) async fn delete(&self, id: &InferenceId) -> Result<bool> {
        let way = match self.admit().await {
            Some(way) => way,
            None => match self.bounded(self.store.delete(id)).await {
                Err(e) if is_away(&e) => self.fall_back(&e),
                done => return done,
            },
        };
        if self.get(id).await?.is_none() {
            return Ok(false);
        }
        self.append(way, vec![Entry::delete(*id)]).await?;
        Ok(true)
    }

    pub(super) async fn add_feedback(&self, id: &InferenceId, feedback: &Feedback) -> Result<bool> {
        let way = match self.admit().await {
            Some(way) => way,
            None => match self.bounded(self.store.add_feedback(id, feedback)).await {
                Err(e) if is_away(&e) => self.fall_back(&e),
                done => return done,
            },
        };
        if self.get(id).await?.is_none() {
            return Ok(false);
        }
        self.append(way, vec![Entry::feedback(*id, feedback)?]).await?;
        Ok(true)
    }

    pub(super) async fn erase_user(&self, user: &str, limit: usize) -> Result<Vec<Record>> {
        let way = match self.admit().await {
            Some(way) => way,
            None => match self.bounded(self.store.erase_user(user, limit)).await {
                Err(e) if is_away(&e) => self.fall_back(&e),
                done => return done,
            },
        };
        // Those of the store are erased by the replay, which hands them to `Options::on_erased`.
        let mut ids = self.journal.of_user(user);
        let entries = if ids.len() > limit {
            ids.truncate(limit);
            ids.iter().map(|id| Entry::delete(*id)).collect()
        } else {
            vec![Entry::erase(user)?]
        };
        let mut erased = Vec::with_capacity(ids.len());
        for id in &ids {
            erased.extend(self.get(id).await?);
        }
        self.append(way, entries).await?;
        Ok(erased)
    }
}

/// Bytes of outputs that are copied on the spot: more would hold up the other requests of this thread.
const MAX_INLINE_BYTES: usize = 256 << 10;

async fn entries_of(records: &[Record]) -> Result<Vec<Entry>> {
    let encode = |records: &[Record]| records.iter().map(Entry::put).collect::<Result<Vec<Entry>>>();
    if records.iter().map(Record::approximate_bytes).sum::<usize>() <= MAX_INLINE_BYTES {
        return encode(records);
    }
    let records = records.to_vec();
    let encoded = tokio::task::spawn_blocking(move || encode(&records)).await;
    encoded.map_err(|e| Error::Internal { cause: format!("encoding for the journal: {e}") })?
}
