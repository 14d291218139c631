//! One task that gives the journal's entries to the store, in order and in bulks, for as long as there are any.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::fold::merge;
use super::phase::{Event, Phase};
use super::{Journalled, is_away, within};
use crate::store::journal::Change;
use crate::store::journal::entry::Kind;
use crate::store::journal::index::Located;
use crate::store::record::{InferenceId, Record};
use crate::{Error, Result};

/// Entries of a bulk, and its bytes: enough for the store's throughput, little enough for its limits and for a short wait
/// of the writes that come while the last one is replayed.
const BULK: usize = 256;
const BULK_BYTES: u64 = 8 << 20;

/// Records erased by one call.
const ERASED_AT_A_TIME: usize = 1000;

/// How long the store may take for a bulk. Much: stores have deadlines of their own, and a bulk that is given up too soon
/// would be given up for ever.
const BULK_TIMEOUT: Duration = Duration::from_secs(60);

/// How long the replay waits for news of writes that are on their way into the journal.
const NEWS: Duration = Duration::from_millis(20);

/// Replays for ever; between times it sleeps until the journal is in use.
pub(super) async fn run(journalled: Arc<Journalled>) {
    let mut phases = journalled.phases.subscribe();
    let mut failures = Failures::default();
    let (mut wait, longest) = journalled.options.backoff;
    loop {
        let in_use = phases.wait_for(|_| journalled.gate.lock().phase != Phase::Direct);
        if in_use.await.is_err() {
            return;
        }
        match journalled.step(&mut failures).await {
            Ok(()) => {
                wait = journalled.options.backoff.0;
                failures.in_a_row = 0;
            }
            Err(e) => {
                failures.has_answered = false;
                journalled.answers.store(!is_away(&e), Ordering::Relaxed);
                journalled.on(Event::StoreFailed);
                // One line an outage, and one now and then while something is refused.
                if failures.in_a_row.is_multiple_of(20) {
                    let entries = journalled.journal.outstanding();
                    tracing::warn!(cause = %e, entries, "the journal cannot be replayed; it is tried again");
                }
                failures.in_a_row += 1;
                journalled.journal.observe();
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(longest);
            }
        }
    }
}

/// What went wrong so far.
#[derive(Default)]
struct Failures {
    in_a_row: u32,
    /// Whether the store has answered since the last failure, or since the journal came into use.
    has_answered: bool,
    /// The entry that was refused last, and since when.
    refused: Option<(u64, Instant)>,
}

impl Failures {
    /// How long this entry has been refused, this time included.
    fn refused_for(&mut self, seq: u64) -> Duration {
        let since = self.refused.filter(|(of, _)| *of == seq).map_or_else(Instant::now, |(_, since)| since);
        self.refused = Some((seq, since));
        since.elapsed()
    }
}

impl Journalled {
    /// One bulk, or one look whether the journal is drained.
    async fn step(&self, failures: &mut Failures) -> Result<()> {
        if !failures.has_answered {
            // Known sooner than a bulk would tell, which may take long: everyone who reads waits to hear of it.
            self.bounded(self.store.ping()).await?;
            failures.has_answered = true;
            self.answers.store(true, Ordering::Relaxed);
        }
        let bulk = self.journal.oldest(BULK, BULK_BYTES);
        let Some(last) = bulk.last() else {
            failures.has_answered = false;
            return self.finish().await;
        };
        for run in runs(&bulk) {
            self.replay(&bulk[run], failures).await?;
        }
        self.journal.acknowledge(last.seq).await?;
        if self.journal.outstanding() <= BULK {
            self.on(Event::NearlyDrained);
        }
        Ok(())
    }

    /// Nothing is durable in the journal that the store has not: ends its use, unless writes are on their way into it. The
    /// store has answered: a write that the journal refused in the end may be all that was ever sent to it.
    async fn finish(&self) -> Result<()> {
        let mut commits = self.journal.watch();
        if self.gate.lock().phase == Phase::Direct {
            return Ok(());
        }
        self.on(Event::NearlyDrained);
        let is_drained = {
            let mut gate = self.gate.lock();
            self.journal.outstanding() == 0 && gate.on(Event::Drained, jiff::Timestamp::now())
        };
        if is_drained {
            tracing::info!("the store is back and has all of the journal: results go to it again");
            self.phases.send_modify(|count| *count += 1);
        } else {
            // Either way there is another look.
            let _ = tokio::time::timeout(NEWS, commits.changed()).await;
        }
        Ok(())
    }

    /// Entries of one kind.
    async fn replay(&self, run: &[Located], failures: &mut Failures) -> Result<()> {
        let mut changes = Vec::with_capacity(run.len());
        for located in run {
            // What is deleted later need not be written first.
            if located.kind == Kind::Put && located.id.is_some_and(|id| self.journal.is_undone(&id, located.seq)) {
                continue;
            }
            match self.read(located).await {
                Ok(change) => changes.push((located, change)),
                // Its segment is kept for a person to look at; the others must not wait for it for ever.
                Err(cause) if self.is_over(failures.refused_for(located.seq)) => {
                    self.set_aside(located, &cause).await?
                }
                Err(cause) => return Err(cause),
            }
        }
        let mut records = Puts::default();
        for (located, change) in changes {
            let done = match change {
                Change::Put(record) => {
                    records.add(located, *record);
                    continue;
                }
                Change::Delete(id) => within(BULK_TIMEOUT, self.store.delete(&id)).await.map(drop),
                Change::Erase(user) => self.erase(&user).await,
                Change::Feedback(id, feedback) => {
                    within(BULK_TIMEOUT, self.store.add_feedback(&id, &feedback)).await.map(drop)
                }
            };
            match done {
                Err(cause) if !is_away(&cause) && self.is_over(failures.refused_for(located.seq)) => {
                    self.set_aside(located, &cause).await?
                }
                done => done?,
            }
        }
        self.write(&records, failures).await
    }

    async fn read(&self, located: &Located) -> Result<Change> {
        let (journal, located) = (self.journal.clone(), located.clone());
        let read = tokio::task::spawn_blocking(move || journal.read(&located)).await;
        read.map_err(|e| Error::Internal { cause: format!("reading the journal: {e}") })?
    }

    /// Whether an entry that nothing else can be compared with has been refused for long enough.
    fn is_over(&self, refused_for: Duration) -> bool {
        refused_for >= self.options.patience
    }

    /// Writes records, each as its last put leaves it. One that the store refuses is set aside if the store takes another
    /// of the same bulk; one that is alone, after some patience. What is refused by a store that refuses everything, for
    /// want of a permission for example, has only to wait.
    async fn write(&self, puts: &Puts<'_>, failures: &mut Failures) -> Result<()> {
        if puts.records.is_empty() {
            return Ok(());
        }
        match within(BULK_TIMEOUT, self.store.put(&puts.records)).await {
            Err(e) if !is_away(&e) => {}
            done => return done,
        }
        // Which of them is it?
        let mut refused = Vec::new();
        for (record, entries) in puts.records.iter().zip(&puts.entries) {
            match within(BULK_TIMEOUT, self.store.put(std::slice::from_ref(record))).await {
                Ok(()) => {}
                Err(e) if is_away(&e) => return Err(e),
                Err(e) => refused.push((entries, e)),
            }
        }
        let Some((entries, first_cause)) = refused.first() else { return Ok(()) };
        let took_others = refused.len() < puts.records.len();
        let is_alone = puts.records.len() == 1;
        let refused_for = failures.refused_for(entries.first().map_or(0, |located| located.seq));
        let is_its_own_fault = took_others || (is_alone && self.is_over(refused_for));
        if !is_its_own_fault {
            return Err(first_cause.clone());
        }
        for (entries, cause) in &refused {
            for located in *entries {
                self.set_aside(located, cause).await?;
            }
        }
        Ok(())
    }

    async fn set_aside(&self, located: &Located, cause: &Error) -> Result<()> {
        let id = located.id.map(|id| id.to_string()).unwrap_or_default();
        tracing::error!(id, seq = located.seq, %cause, "an entry of the journal cannot be replayed: it is set aside");
        self.journal.set_aside(located).await
    }

    async fn erase(&self, user: &str) -> Result<()> {
        loop {
            let call = self.store.erase_user(user, ERASED_AT_A_TIME);
            let erased = within(BULK_TIMEOUT, call).await?;
            let is_last = erased.len() < ERASED_AT_A_TIME;
            if !erased.is_empty() {
                (self.options.on_erased)(erased);
            }
            if is_last {
                return Ok(());
            }
        }
    }
}

/// Where the entries of one kind begin and end: puts go together, and no other change passes them.
fn runs(bulk: &[Located]) -> Vec<Range<usize>> {
    let mut start = 0;
    let same = bulk.chunk_by(|a, b| a.kind == Kind::Put && b.kind == Kind::Put);
    same.map(|run| {
        let range = start..start + run.len();
        start = range.end;
        range
    })
    .collect()
}

/// The records of a bulk, one an id, in the order of their first puts.
#[derive(Default)]
struct Puts<'a> {
    records: Vec<Record>,
    /// What each was put together from.
    entries: Vec<Vec<&'a Located>>,
    places: HashMap<InferenceId, usize>,
}

impl<'a> Puts<'a> {
    fn add(&mut self, located: &'a Located, record: Record) {
        match self.places.get(&record.id) {
            Some(&place) => {
                let before = self.records[place].clone();
                self.records[place] = merge(Some(before), record);
                self.entries[place].push(located);
            }
            None => {
                self.places.insert(record.id, self.records.len());
                self.records.push(record);
                self.entries.push(vec![located]);
            }
        }
    }
}
