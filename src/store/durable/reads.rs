//! Store and journal read as one: what is in the journal is what will be in the store.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::fold::{fold, matches};
use super::phase::Phase;
use super::{Journalled, is_away};
use crate::store::journal::entry::Kind;
use crate::store::journal::index::Changes;
use crate::store::journal::{Change, Journal};
use crate::store::numbers::{Numbers, QualityQuery, QualityRow, UsageQuery, UsageRow};
use crate::store::query::{MAX_LIMIT, Page, Query};
use crate::store::record::{InferenceId, Record};
use crate::{Error, Result};

/// Ids of the journal that a step of a list looks at.
const CHUNK: usize = 512;

impl Journalled {
    /// Asks the store, unless it is known to be away.
    async fn ask<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        let is_direct = self.gate.lock().phase == Phase::Direct;
        if !is_direct && !self.answers.load(Ordering::Relaxed) {
            return Err(Error::StoreUnavailable { cause: "it did not answer the last try".to_string() });
        }
        self.bounded(call).await
    }

    /// A record of the journal even while the store is away. Errors: [`Error::StoreUnavailable`] for one that could be
    /// in the store alone.
    pub(super) async fn get(&self, id: &InferenceId) -> Result<Option<Record>> {
        // The journal first: what has left it since, the store has.
        let (changes, erased) = self.journal.changes(id);
        if changes.is_empty() {
            let record = self.ask(self.store.get(id)).await?;
            return Ok(record.filter(|record| !is_erased(record, &erased)));
        }
        let stored = if starts_anew(&changes) {
            None
        } else {
            match self.ask(self.store.get(id)).await {
                // Whatever the store has of it, this is newer. What it lacks is feedback given before.
                Err(e) if is_away(&e) && changes.iter().any(|change| change.kind == Kind::Put) => None,
                answer => answer?,
            }
        };
        let mut folded = fold_all(&self.journal, vec![(changes, stored)]).await?;
        Ok(folded.pop().flatten())
    }

    pub(super) async fn find_by_key(&self, key: &str) -> Result<Option<Record>> {
        let has_key = |record: &Record| record.facts.idempotency_key.as_deref() == Some(key);
        if let Some(id) = self.journal.with_key(key)
            && let Some(record) = self.get(&id).await?.filter(has_key)
        {
            return Ok(Some(record));
        }
        match self.ask(self.store.find_by_key(key)).await? {
            // Once more by its id, for what the journal says of it.
            Some(record) if self.journal.outstanding() > 0 => Ok(self.get(&record.id).await?.filter(has_key)),
            found => Ok(found),
        }
    }

    pub(super) async fn count(&self) -> Result<u64> {
        let journal = self.journal.clone();
        let num_new = tokio::task::spawn_blocking(move || journal.num_new()).await;
        let num_new = num_new.map_err(|e| Error::Internal { cause: format!("reading the journal: {e}") })?;
        Ok(self.ask(self.store.count()).await? + num_new as u64)
    }

    /// The store's numbers, with how much of the journal they lack. To count both as one, each record of the journal would
    /// have to be taken out of the store's sums first; and once the store answers the journal is soon empty.
    /// Errors: [`Error::StoreUnavailable`] while the store is away, as for a list.
    pub(super) async fn usage(&self, query: &UsageQuery) -> Result<Numbers<UsageRow>> {
        let num_pending = self.before_numbers().await?;
        Ok(Numbers { num_pending, ..self.store.usage(query).await? })
    }

    pub(super) async fn quality(&self, query: &QualityQuery) -> Result<Numbers<QualityRow>> {
        let num_pending = self.before_numbers().await?;
        Ok(Numbers { num_pending, ..self.store.quality(query).await? })
    }

    /// Entries that the store may lack, counted before it is asked. What takes long has a time of its own, so whether the
    /// store answers at all is asked for first, within the usual one.
    async fn before_numbers(&self) -> Result<usize> {
        let num_pending = self.journal.outstanding();
        self.ask(self.store.ping()).await?;
        Ok(num_pending)
    }

    /// A page of both. Errors: [`Error::StoreUnavailable`] while the store is away: a page without what it holds would be
    /// taken for the whole.
    pub(super) async fn list(&self, query: &Query) -> Result<Page> {
        if self.journal.outstanding() == 0 {
            return self.ask(self.store.list(query)).await;
        }
        let limit = query.limit.clamp(1, MAX_LIMIT);
        let newest = query.to.map(InferenceId::first_at);
        let mut after = query.after.into_iter().chain(newest).min();
        let mut records: Vec<Record> = Vec::new();
        // Each step takes the newest of the journal and a page of the store, and knows all down to the higher of their
        // ends. The journal first, as in `get`.
        loop {
            let (chunk, erased) = self.journal.below(after, CHUNK);
            let step = Query { after, ..query.clone() };
            let page = self.ask(self.store.list(&step)).await?;
            let chunk_end = chunk.last().map(|(id, _)| *id).filter(|_| chunk.len() == CHUNK);
            let end = chunk_end.into_iter().chain(page.next).max();
            let is_known = |id: &InferenceId| end.is_none_or(|end| *id >= end);

            let mut stored: HashMap<InferenceId, Record> =
                page.records.into_iter().filter(|record| is_known(&record.id)).map(|r| (r.id, r)).collect();
            let changed = chunk.into_iter().filter(|(id, _)| is_known(id));
            // A record that the store has and did not list, because it is not wanted as it is there, is folded from what
            // the journal has of it: all but feedback.
            let changed = changed.map(|(id, changes)| (changes, stored.remove(&id))).collect();
            let folded = fold_all(&self.journal, changed).await?.into_iter().flatten();
            let unchanged = stored.into_values().filter(|record| !is_erased(record, &erased));
            let mut found: Vec<Record> = folded.filter(|record| matches(query, record)).chain(unchanged).collect();
            found.sort_unstable_by_key(|record| std::cmp::Reverse(record.id));
            records.extend(found);

            if records.len() > limit {
                records.truncate(limit);
                return Ok(page_of(records, query, true));
            }
            let floor = query.from.map(InferenceId::first_at);
            match end.filter(|end| floor.is_none_or(|floor| *end > floor)) {
                None => return Ok(page_of(records, query, false)),
                next => after = next,
            }
        }
    }
}

fn page_of(mut records: Vec<Record>, query: &Query, has_more: bool) -> Page {
    if !query.with_output {
        records.iter_mut().for_each(|record| record.output = None);
    }
    let next = records.last().map(|record| record.id).filter(|_| has_more);
    Page { records, next }
}

fn is_erased(record: &Record, erased: &[Arc<str>]) -> bool {
    record.facts.user.as_ref().is_some_and(|user| erased.iter().any(|of| **of == **user))
}

/// Whether what the store has does not matter.
fn starts_anew(changes: &Changes) -> bool {
    changes.first().is_some_and(|change| change.kind == Kind::Delete)
}

/// Records as their changes leave them. Blocks: no, the reading is done elsewhere.
async fn fold_all(journal: &Arc<Journal>, of: Vec<(Changes, Option<Record>)>) -> Result<Vec<Option<Record>>> {
    if of.is_empty() {
        return Ok(Vec::new());
    }
    let journal = journal.clone();
    let read_and_fold = move || {
        let fold_one = |(changes, stored): (Changes, Option<Record>)| {
            let changes = changes.iter().map(|located| journal.read(located)).collect::<Result<Vec<Change>>>()?;
            Ok(fold(stored, changes))
        };
        of.into_iter().map(fold_one).collect()
    };
    let done = tokio::task::spawn_blocking(read_and_fold).await;
    done.map_err(|e| Error::Internal { cause: format!("reading the journal: {e}") })?
}
