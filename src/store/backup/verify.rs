//! Reads all there is and compares: the store with itself, with the journal, with a backup. Changes nothing.

use std::path::Path;

use jiff::Timestamp;

use super::entry::{self, Relation};
use super::key::Key;
use super::merged::{Both, Item, Journalled, Merged};
use super::piece::PieceKind;
use super::restore::Entries;
use super::source::Unreadable;
use super::{Consistency, Digest, Header, Totals, fault};
use crate::store::journal::DamageKind;
use crate::store::record::{InferenceId, Record, Status};
use crate::{Error, Result};

/// Faults and ids that are kept to be told; all are counted.
pub const MAX_TOLD: usize = 100;

/// Counts what is told, and keeps the first of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Told {
    pub num: u64,
    pub first: Vec<String>,
}

impl Told {
    fn add(&mut self, line: impl Into<String>) {
        self.num += 1;
        if self.first.len() < MAX_TOLD {
            self.first.push(line.into());
        }
    }
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Entries that the store has and that can be read.
    pub num_records: u64,
    /// Over them: equal to that of a backup of the same records.
    pub digest: Digest,
    pub consistency: Consistency,
    /// Tasks, documents and parts of files that can be read.
    pub num_pieces: u64,
    /// `None` where there is none.
    pub journal: Option<JournalReport>,
    /// `None` where none was given.
    pub backup: Option<BackupReport>,
    /// What is wrong with any of them.
    pub faults: Told,
}

/// The journal against the store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JournalReport {
    /// Changes of the journal, one an id, that the store has too, or something later.
    pub num_in_store: u64,
    /// Those that it has yet to get.
    pub num_waiting: u64,
    /// Ends of segments that are no entries: writes nobody was told of, or one that is under way.
    pub num_torn: u64,
}

/// A backup against store and journal together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupReport {
    pub header: Header,
    pub num_records: u64,
    pub digest: Digest,
    pub num_same: u64,
    /// Ended or judged since.
    pub num_later: u64,
    /// Older than records are kept for.
    pub num_expired: u64,
    /// Not there any more: deleted, or lost.
    pub missing: Told,
}

impl Report {
    /// Whether all that was asked for is there and right.
    pub fn is_sound(&self) -> bool {
        self.faults.num == 0 && self.backup.as_ref().is_none_or(|backup| backup.missing.num == 0)
    }
}

/// A backup to compare with.
pub struct Against<'a> {
    pub path: &'a Path,
    pub key: &'a Key,
    /// Entries made before this time may have been deleted for their age.
    pub expired_before: Option<Timestamp>,
}

/// Reads the store, its journal and a backup to their ends. `progress` is told how many records of the store there are so
/// far.
///
/// Errors: the source's, where the store cannot be read at all; [`crate::Error::Backup`] for a backup that is damaged or not
/// opened by its key. All other faults are in the report.
pub fn verify(mut from: Merged, against: Option<&Against>, progress: &mut dyn FnMut(u64)) -> Result<Report> {
    let mut check = Check { totals: Totals::default(), faults: Told::default(), journal: JournalReport::default() };
    let mut num_pieces = 0;
    for kind in PieceKind::ALL {
        loop {
            let page = from.next_pieces(kind)?;
            if page.is_empty() {
                break;
            }
            for found in page {
                match found {
                    Ok(_) => num_pieces += 1,
                    Err(Unreadable { name, cause }) => check.unreadable(&name, cause),
                }
            }
        }
    }
    let mut backup = against.map(Comparison::open).transpose()?;
    while let Some(item) = from.next_item()? {
        match item {
            Item::Both(both) => {
                check.record(&both)?;
                if let Some(backup) = &mut backup {
                    backup.compare(both.id, both.record.as_ref(), &mut check.faults)?;
                }
            }
            Item::Unreadable(Unreadable { name, cause }) => {
                check.unreadable(&name, cause);
                if let (Some(backup), Ok(id)) = (&mut backup, name.parse()) {
                    backup.pass(id)?;
                }
            }
        }
        progress(check.totals.num_entries);
    }
    from.check()?.into_iter().for_each(|line| check.faults.add(line));
    let journal = from.journal().map(|view| {
        for damage in &view.recovery.damage {
            match damage.kind {
                DamageKind::TornTail => check.journal.num_torn += 1,
                DamageKind::Middle | DamageKind::Unknown => check.faults.add(format!("journal: {damage}")),
            }
        }
        for file in view.recovery.kept_aside.iter().filter(|name| !name.ends_with(".torn")) {
            check.faults.add(format!("journal: {file} was kept aside: records in it may be nowhere else"));
        }
        check.journal
    });
    Ok(Report {
        num_records: check.totals.num_entries,
        digest: check.totals.digest(),
        consistency: from.consistency(),
        num_pieces,
        journal,
        backup: backup.map(Comparison::finish).transpose()?,
        faults: check.faults,
    })
}

struct Check {
    totals: Totals,
    faults: Told,
    journal: JournalReport,
}

impl Check {
    fn unreadable(&mut self, name: &str, cause: Error) {
        self.faults.add(format!("{name} cannot be read: {}", entry::words(cause)));
    }

    fn record(&mut self, both: &Both) -> Result<()> {
        let stored = both.journalled.as_ref().map_or(both.record.as_ref(), |journalled| journalled.stored.as_ref());
        if let Some(stored) = stored {
            self.totals.add(&entry::encode(stored)?);
            if stored.facts.status == Status::Succeeded && stored.output.is_none() {
                self.faults.add(format!("{} has succeeded and has no output", stored.id));
            }
        }
        let Some(Journalled { stored }) = &both.journalled else { return Ok(()) };
        match (stored, &both.record) {
            (None, None) => self.journal.num_in_store += 1,
            (Some(stored), Some(record)) => match Relation::of(stored, record)? {
                Relation::Same => self.journal.num_in_store += 1,
                Relation::Later => self.journal.num_waiting += 1,
                Relation::Different => {
                    self.faults.add(format!("{} is one thing in the journal and another in the store", both.id));
                }
            },
            _ => self.journal.num_waiting += 1,
        }
        Ok(())
    }
}

/// A backup on its way past the store: both rise by id.
struct Comparison<'a, R> {
    against: &'a Against<'a>,
    records: Entries<'a, R>,
    next: Option<Record>,
    report: BackupReport,
}

impl<'a> Comparison<'a, ()> {
    fn open(against: &'a Against<'a>) -> Result<Comparison<'a, impl std::io::Read + use<>>> {
        let mut records = Entries::open(against.path, against.key)?;
        let report = BackupReport {
            header: records.header().clone(),
            num_records: 0,
            digest: Totals::default().digest(),
            num_same: 0,
            num_later: 0,
            num_expired: 0,
            missing: Told::default(),
        };
        let next = records.next_record()?;
        Ok(Comparison { against, records, next, report })
    }
}

impl<R: std::io::Read> Comparison<'_, R> {
    /// The next record of the backup, if its id is not beyond this one.
    fn take(&mut self, up_to: Option<InferenceId>) -> Result<Option<Record>> {
        let Some(record) = self.next.take_if(|next| up_to.is_none_or(|id| next.id <= id)) else { return Ok(None) };
        self.next = self.records.next_record()?;
        if self.next.as_ref().is_some_and(|next| next.id <= record.id) {
            return Err(fault(self.against.path, "its records are not in the order of their ids"));
        }
        self.report.num_records += 1;
        Ok(Some(record))
    }

    /// Counts those before this id as missing, and compares the one that has it.
    fn compare(&mut self, id: InferenceId, now: Option<&Record>, faults: &mut Told) -> Result<()> {
        while let Some(earlier) = self.take(Some(id))? {
            let Some(now) = now.filter(|_| earlier.id == id) else {
                self.missing(earlier.id);
                continue;
            };
            match Relation::of(&earlier, now)? {
                Relation::Same => self.report.num_same += 1,
                Relation::Later => self.report.num_later += 1,
                Relation::Different => faults.add(format!("{id} is one thing in the backup and another in the store")),
            }
        }
        Ok(())
    }

    /// As [`Comparison::compare`], for an id whose record the store cannot read: it is no more than that.
    fn pass(&mut self, id: InferenceId) -> Result<()> {
        while let Some(earlier) = self.take(Some(id))? {
            if earlier.id != id {
                self.missing(earlier.id);
            }
        }
        Ok(())
    }

    fn missing(&mut self, id: InferenceId) {
        match self.against.expired_before.is_some_and(|before| id.created_at() < before) {
            true => self.report.num_expired += 1,
            false => self.report.missing.add(id.to_string()),
        }
    }

    fn finish(mut self) -> Result<BackupReport> {
        while let Some(earlier) = self.take(None)? {
            self.missing(earlier.id);
        }
        let digest = self.records.digest().ok_or_else(|| fault(self.against.path, "it has no end"))?;
        Ok(BackupReport { digest, ..self.report })
    }
}
