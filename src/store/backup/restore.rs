//! Reads a backup: all of it to check it, then once more to write its records.

use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;

use super::frame::Part;
use super::key::Key;
use super::{Digest, Footer, Header, INFERENCES, entry, fault, file};
use crate::store::record::Record;
use crate::{Error, Result};

/// Records written by one call, and about their bytes.
const BATCH: usize = 256;
const BATCH_BYTES: usize = 8 << 20;

/// How often a batch is tried while the store does not answer, and the pause between.
const NUM_TRIES: usize = 5;
const PAUSE: Duration = Duration::from_secs(2);

/// What a backup holds, all of which was read and found right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    pub header: Header,
    pub footer: Footer,
    /// All records of it.
    pub num_records: u64,
    /// Over all records.
    pub digest: Digest,
    /// Over the whole content.
    whole: Digest,
    pub selected: Selected,
}

/// Which of its records are wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Selected {
    pub num_records: u64,
    /// Made later than the time asked for.
    pub num_made_later: u64,
    /// Made before it and ended later: what they were at that time is not known any more.
    pub num_ended_later: u64,
    /// Records without what was said of them later.
    pub num_without_feedback: u64,
}

impl Selected {
    /// The record as it was at this time, as far as its own times tell; `None` where they do not.
    fn take(&mut self, mut record: Record, until: Option<Timestamp>) -> Option<Record> {
        if let Some(until) = until {
            if record.id.created_at() > until {
                self.num_made_later += 1;
                return None;
            }
            if record.facts.completed_at.is_some_and(|completed| completed > until) {
                self.num_ended_later += 1;
                return None;
            }
            let before = record.facts.feedback.len();
            record.facts.feedback.retain(|said| said.at <= until);
            self.num_without_feedback += u64::from(record.facts.feedback.len() < before);
        }
        self.num_records += 1;
        Some(record)
    }
}

/// Reads all of a backup, checks its sums and decodes its records; writes nothing.
///
/// Errors: [`Error::Backup`] saying what is wrong with the file or the key.
pub fn check(path: &Path, key: &Key, until: Option<Timestamp>, progress: &mut dyn FnMut(u64)) -> Result<Checked> {
    read(path, key, until, &mut |_| Ok(()), progress)
}

/// Writes the records of a backup that was [checked](check), in calls of some hundred. Each may be repeated: records are
/// written by id.
///
/// Errors: those of `put`; [`Error::Backup`] where the file is not the one that was checked, which may be found out late.
pub fn restore(
    path: &Path,
    key: &Key,
    until: Option<Timestamp>,
    checked: &Checked,
    put: &mut dyn FnMut(&[Record]) -> Result<()>,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let mut batch = Vec::with_capacity(BATCH);
    let mut num_bytes = 0;
    let mut write = |record: Option<Record>| -> Result<()> {
        let is_last = record.is_none();
        num_bytes += record.as_ref().map_or(0, Record::approximate_bytes);
        batch.extend(record);
        if !batch.is_empty() && (is_last || batch.len() == BATCH || num_bytes >= BATCH_BYTES) {
            patiently(put, &batch)?;
            batch.clear();
            num_bytes = 0;
        }
        Ok(())
    };
    let again = read(path, key, until, &mut |record| write(Some(record)), progress)?;
    write(None)?;
    match again == *checked {
        true => Ok(()),
        false => Err(fault(path, "it was changed while it was read")),
    }
}

/// Writes a batch, again where the store did not answer: elections of a primary take seconds.
fn patiently(put: &mut dyn FnMut(&[Record]) -> Result<()>, batch: &[Record]) -> Result<()> {
    for _ in 1..NUM_TRIES {
        match put(batch) {
            Err(Error::StoreUnavailable { cause }) => {
                tracing::warn!(cause, "the store does not answer: what was to be written is tried again");
                std::thread::sleep(PAUSE);
            }
            done => return done,
        }
    }
    put(batch)
}

/// Reads a backup and hands out the records that are wanted.
fn read(
    path: &Path,
    key: &Key,
    until: Option<Timestamp>,
    take: &mut dyn FnMut(Record) -> Result<()>,
    progress: &mut dyn FnMut(u64),
) -> Result<Checked> {
    let mut records = Records::open(path, key)?;
    let mut selected = Selected::default();
    let mut num_records = 0;
    while let Some(record) = records.next_record()? {
        if let Some(record) = selected.take(record, until) {
            take(record)?;
        }
        num_records += 1;
        progress(num_records);
    }
    let Records { stream, end, .. } = records;
    let (footer, digest, whole) = end.ok_or_else(|| fault(path, "it has no end"))?;
    Ok(Checked { header: stream.header, footer, num_records, digest, whole, selected })
}

/// The records of a backup, one after another.
pub struct Records<'a, R> {
    path: &'a Path,
    stream: super::frame::StreamReader<R>,
    /// The footer, the checksum over all records and that over all.
    end: Option<(Footer, Digest, Digest)>,
    digest: Option<Digest>,
}

impl<'a> Records<'a, ()> {
    /// Opens a backup. Errors: as [`check`].
    pub fn open(path: &'a Path, key: &Key) -> Result<Records<'a, impl std::io::Read + use<>>> {
        Ok(Records { path, stream: file::open(path, key)?, end: None, digest: None })
    }
}

impl<R: std::io::Read> Records<'_, R> {
    /// What is known of it before its end.
    pub fn header(&self) -> &Header {
        &self.stream.header
    }

    /// The checksum over all records, once they were read.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The next record; `None` when all that there is was read and its sums were right. Errors: as [`check`].
    pub fn next_record(&mut self) -> Result<Option<Record>> {
        while self.end.is_none() {
            let part = self.stream.next_part().map_err(|e| fault(self.path, file::read_error(e)))?;
            match part {
                Part::Section(kind) if kind == INFERENCES => {}
                Part::Section(kind) => {
                    return Err(fault(self.path, format!("this program does not know its `{kind}`: use a newer one")));
                }
                Part::Entry(bytes) => {
                    let record = entry::decode(&bytes);
                    return record.map(Some).map_err(|e| fault(self.path, entry::words(e)));
                }
                Part::SectionEnd(digest) => self.digest = Some(digest),
                Part::End(footer, whole) => {
                    let digest = self.digest.ok_or_else(|| fault(self.path, "it has no records' section"))?;
                    self.end = Some((footer, digest, whole));
                }
            }
        }
        Ok(None)
    }
}

/// Whether records may be written into a store that has some.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Only where there is none.
    Empty,
    /// What is there stays, but for records of the backup's ids: see [`crate::store::Records::put`].
    Any,
}

/// Refuses a store that has records, unless they may be there. Errors: [`Error::Conflict`].
pub fn admit(num_there: u64, target: Target) -> Result<()> {
    match (target, num_there) {
        (Target::Any, _) | (Target::Empty, 0) => Ok(()),
        (Target::Empty, num) => Err(Error::Conflict {
            field: "database".to_string(),
            reason: format!(
                "the store has {num} records; --merge writes the backup's beside and over them, also to go on with a \
                 restore that was interrupted"
            ),
        }),
    }
}
