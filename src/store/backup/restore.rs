//! Reads a backup: all of it to check it, then once more to write what is in it.

use std::io::Read;
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use tokio::runtime::Handle;

use super::frame::{Part, StreamReader};
use super::key::Key;
use super::piece::{Piece, PieceKind};
use super::{Digest, Footer, Header, INFERENCES, entry, fault, file};
use crate::store::place::Opened;
use crate::store::record::Record;
use crate::store::work::Task;
use crate::{Error, Result};

/// Records, or tasks, written by one call, and about the bytes of records.
const BATCH: usize = 256;
const BATCH_BYTES: usize = 8 << 20;

/// How often a call is tried while the store does not answer, and the pause between.
const NUM_TRIES: usize = 5;
const PAUSE: Duration = Duration::from_secs(2);

/// Which of a backup is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Only what there was at this time. Of background work nobody knows that, so it is left out then.
    pub until: Option<Timestamp>,
    pub work: WantedWork,
}

/// Whether background work is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WantedWork {
    /// It goes on where it is restored.
    All,
    /// The store it is from does it still, or nobody shall.
    None,
}

impl Wanted {
    fn has_work(&self) -> bool {
        self.work == WantedWork::All && self.until.is_none()
    }
}

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

/// What is wanted of it, and what is not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Selected {
    pub num_records: u64,
    /// Made later than the time asked for.
    pub num_made_later: u64,
    /// Made before it and ended later: what they were at that time is not known any more.
    pub num_ended_later: u64,
    /// Records without what was said of them later.
    pub num_without_feedback: u64,
    pub num_tasks: u64,
    /// Documents and parts of files.
    pub num_others: u64,
    /// Tasks, documents and parts that are not wanted.
    pub num_pieces_left_out: u64,
}

impl Selected {
    /// The record as it was at this time, as far as its own times tell; `None` where they do not.
    fn record(&mut self, mut record: Record, wanted: &Wanted) -> Option<Record> {
        if let Some(until) = wanted.until {
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

    fn piece(&mut self, piece: Piece, wanted: &Wanted) -> Option<Piece> {
        match (wanted.has_work(), piece.kind()) {
            (false, _) => self.num_pieces_left_out += 1,
            (true, PieceKind::Task) => self.num_tasks += 1,
            (true, _) => self.num_others += 1,
        }
        Some(piece).filter(|_| wanted.has_work())
    }
}

/// Something of a backup.
#[derive(Debug)]
pub enum Entry {
    Piece(Piece),
    Record(Box<Record>),
}

/// Where a restore writes. Every call may be repeated.
pub trait Put {
    /// See [`crate::store::Records::put`].
    fn records(&mut self, records: &[Record]) -> Result<()>;

    /// See [`crate::store::work::Work::push`].
    fn tasks(&mut self, tasks: &[Task]) -> Result<()>;

    /// Writes a document or a part. A document that is there stays as it is.
    fn piece(&mut self, piece: &Piece) -> Result<()>;
}

/// A store, reached through a runtime, on none of whose threads this may be called.
pub struct Store<'a> {
    pub runtime: &'a Handle,
    pub store: &'a Opened,
}

impl Put for Store<'_> {
    fn records(&mut self, records: &[Record]) -> Result<()> {
        self.runtime.block_on(self.store.records.put(records))
    }

    fn tasks(&mut self, tasks: &[Task]) -> Result<()> {
        self.runtime.block_on(self.store.work.push(tasks))
    }

    fn piece(&mut self, piece: &Piece) -> Result<()> {
        let work = &self.store.work;
        match piece {
            Piece::Task(task) => self.tasks(std::slice::from_ref(task)),
            Piece::Document(document) => self.runtime.block_on(work.create(document)).map(drop),
            Piece::Part { file, index, bytes } => self.runtime.block_on(work.put_part(file, *index, bytes)),
        }
    }
}

/// Reads all of a backup, checks its sums and decodes it; writes nothing. `progress` is told how many records were read.
///
/// Errors: [`Error::Backup`] saying what is wrong with the file or the key.
pub fn check(path: &Path, key: &Key, wanted: &Wanted, progress: &mut dyn FnMut(u64)) -> Result<Checked> {
    read(path, key, wanted, &mut |_| Ok(()), progress)
}

/// Writes what is wanted of a backup that was [checked](check): documents and files, records by id in calls of some hundred,
/// and at last tasks, which servers may take at once. Each call may be repeated.
///
/// Errors: those of `put`; [`Error::Backup`] where the file is not the one that was checked, which may be found out late.
pub fn restore(
    path: &Path,
    key: &Key,
    wanted: &Wanted,
    checked: &Checked,
    put: &mut dyn Put,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let (mut batch, mut num_bytes) = (Vec::with_capacity(BATCH), 0);
    let mut write = |entry| {
        match entry {
            Entry::Piece(Piece::Task(_)) => {}
            Entry::Piece(piece) => return patiently(|| put.piece(&piece)),
            Entry::Record(record) => {
                num_bytes += record.approximate_bytes();
                batch.push(*record);
            }
        }
        if batch.len() == BATCH || num_bytes >= BATCH_BYTES {
            patiently(|| put.records(&batch))?;
            batch.clear();
            num_bytes = 0;
        }
        Ok(())
    };
    let again = read(path, key, wanted, &mut write, progress)?;
    if !batch.is_empty() {
        patiently(|| put.records(&batch))?;
    }
    if again != *checked {
        return Err(fault(path, "it was changed while it was read"));
    }
    if checked.selected.num_tasks == 0 {
        return Ok(());
    }
    let mut tasks = Vec::new();
    let mut push = |entry| {
        if let Entry::Piece(Piece::Task(task)) = entry {
            tasks.push(task);
        }
        if tasks.len() == BATCH {
            patiently(|| put.tasks(&tasks))?;
            tasks.clear();
        }
        Ok(())
    };
    read(path, key, wanted, &mut push, &mut |_| {})?;
    if tasks.is_empty() { Ok(()) } else { patiently(|| put.tasks(&tasks)) }
}

/// Makes a call, again where the store did not answer: elections of a primary take seconds.
fn patiently(mut call: impl FnMut() -> Result<()>) -> Result<()> {
    for _ in 1..NUM_TRIES {
        match call() {
            Err(Error::StoreUnavailable { cause }) => {
                tracing::warn!(cause, "the store does not answer: what was to be written is tried again");
                std::thread::sleep(PAUSE);
            }
            done => return done,
        }
    }
    call()
}

/// Reads a backup and hands out what is wanted.
fn read(
    path: &Path,
    key: &Key,
    wanted: &Wanted,
    take: &mut dyn FnMut(Entry) -> Result<()>,
    progress: &mut dyn FnMut(u64),
) -> Result<Checked> {
    let mut entries = Entries::open(path, key)?;
    let mut selected = Selected::default();
    let mut num_records = 0;
    while let Some(entry) = entries.next_entry()? {
        match entry {
            Entry::Piece(piece) => {
                if let Some(piece) = selected.piece(piece, wanted) {
                    take(Entry::Piece(piece))?;
                }
            }
            Entry::Record(record) => {
                if let Some(record) = selected.record(*record, wanted) {
                    take(Entry::Record(Box::new(record)))?;
                }
                num_records += 1;
                progress(num_records);
            }
        }
    }
    let Entries { stream, end, .. } = entries;
    let (footer, digest, whole) = end.ok_or_else(|| fault(path, "it has no end"))?;
    Ok(Checked { header: stream.header, footer, num_records, digest, whole, selected })
}

/// What entries of a section are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Section {
    Records,
    Pieces(PieceKind),
}

/// What is in a backup, one after another.
pub struct Entries<'a, R> {
    path: &'a Path,
    stream: StreamReader<R>,
    section: Option<Section>,
    /// Over all records, once they were read.
    digest: Option<Digest>,
    /// The footer, the checksum over all records and that over all.
    end: Option<(Footer, Digest, Digest)>,
}

impl<'a> Entries<'a, ()> {
    /// Opens a backup. Errors: as [`check`].
    pub fn open(path: &'a Path, key: &Key) -> Result<Entries<'a, impl Read + use<>>> {
        Ok(Entries { path, stream: file::open(path, key)?, section: None, digest: None, end: None })
    }
}

impl<R: Read> Entries<'_, R> {
    /// What is known of it before its end.
    pub fn header(&self) -> &Header {
        &self.stream.header
    }

    /// The checksum over all records, once they were read.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The next entry; `None` when all that there is was read and its sums were right. Errors: as [`check`].
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        while self.end.is_none() {
            let part = self.stream.next_part().map_err(|e| fault(self.path, file::read_error(e)))?;
            match (part, self.section) {
                (Part::Section(kind), _) => self.section = Some(self.section(&kind)?),
                (Part::Entry(bytes), Some(section)) => {
                    let entry = match section {
                        Section::Records => entry::decode(&bytes).map(|record| Entry::Record(Box::new(record))),
                        Section::Pieces(kind) => Piece::decode(kind, &bytes).map(Entry::Piece),
                    };
                    return entry.map(Some).map_err(|e| fault(self.path, entry::words(e)));
                }
                (Part::SectionEnd(digest), Some(Section::Records)) => self.digest = Some(digest),
                // The stream has no entries outside a section.
                (Part::SectionEnd(_) | Part::Entry(_), _) => {}
                (Part::End(footer, whole), _) => {
                    let digest = self.digest.ok_or_else(|| fault(self.path, "it has no records' section"))?;
                    self.end = Some((footer, digest, whole));
                }
            }
        }
        Ok(None)
    }

    /// As [`Entries::next_entry`], records alone.
    pub fn next_record(&mut self) -> Result<Option<Record>> {
        loop {
            match self.next_entry()? {
                Some(Entry::Record(record)) => return Ok(Some(*record)),
                Some(Entry::Piece(_)) => {}
                None => return Ok(None),
            }
        }
    }

    fn section(&self, kind: &str) -> Result<Section> {
        match (kind, PieceKind::of(kind)) {
            (INFERENCES, _) => Ok(Section::Records),
            (_, Some(kind)) => Ok(Section::Pieces(kind)),
            (_, None) => Err(fault(self.path, format!("this program does not know its `{kind}`: use a newer one"))),
        }
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
