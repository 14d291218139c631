//! The journal's folder at start: what a process before left in it.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::disk::{self, Disk};
use super::entry::{self, VERSION};
use super::index::{Index, Located, Segment};
use super::{change, charge};
use crate::{Error, Result};

const SEGMENT: &str = ".segment";
/// A segment with something unreadable in it, after all that was readable reached the store.
const DAMAGED: &str = ".damaged";
/// What was cut from the end of a segment.
const TORN: &str = ".torn";
/// Records the store would not take: see [`super::Journal::set_aside`].
pub(super) const REFUSED: &str = ".refused";
const POSITION: &str = "position";

/// A segment and what must be known to dispose of it.
pub(super) struct Held {
    pub segment: Arc<Segment>,
    pub first_seq: u64,
    /// Of its last durable entry; below `first_seq` while it has none.
    pub last_seq: u64,
    /// What it counts for in the bound.
    pub charge: u64,
}

/// A part of a file that could not be read as entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    pub segment: String,
    pub bytes: Range<u64>,
    pub kind: DamageKind,
}

/// What a [`Damage`] may have cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DamageKind {
    /// At the end: what a crash leaves of entries nobody was told of. Cut off, with a copy kept aside.
    TornTail,
    /// Before whole entries: acknowledged ones may be lost.
    Middle,
    /// A whole entry that says nothing this version understands.
    Unknown,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            DamageKind::TornTail => "a torn tail",
            DamageKind::Middle => "damage before whole entries",
            DamageKind::Unknown => "an entry that is not understood",
        };
        write!(f, "{}: {what} in bytes {} to {}", self.segment, self.bytes.start, self.bytes.end)
    }
}

/// What was found at start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Entries the store has not acknowledged.
    pub num_entries: usize,
    pub damage: Vec<Damage>,
    /// Files kept aside, by this start and earlier ones, for a person to look at. They count in the bound.
    pub kept_aside: Vec<String>,
}

impl Recovery {
    pub(super) fn log(&self) {
        for damage in &self.damage {
            match damage.kind {
                DamageKind::TornTail => {
                    tracing::warn!("journal: {damage}, kept aside: a write that a crash interrupted")
                }
                _ => tracing::error!("journal: {damage}, kept aside: acknowledged records may be lost"),
            }
        }
        if !self.kept_aside.is_empty() {
            let files = self.kept_aside.join(", ");
            tracing::warn!(files, "the journal's folder has files kept aside: look at them, then remove them");
        }
        if self.num_entries > 0 {
            tracing::info!(num_entries = self.num_entries, "the journal holds what the store has not: it is replayed");
        }
    }
}

/// A folder read.
pub(super) struct Recovered {
    pub segments: VecDeque<Held>,
    pub index: Index,
    pub next_seq: u64,
    pub aside_bytes: u64,
    pub report: Recovery,
}

/// The name of the segment whose first entry has this number. Names sort by number.
pub(super) fn segment_name(first_seq: u64) -> String {
    format!("{first_seq:020}{SEGMENT}")
}

fn first_seq_of(name: &str) -> Option<u64> {
    name.strip_suffix(SEGMENT).filter(|digits| digits.len() == 20)?.parse().ok()
}

/// Reads the folder. Torn tails are cut, segments whose entries all reached the store are removed.
///
/// Errors: [`Error::Internal`] where a file cannot be read at all, [`Error::Config`] for a segment of a newer version:
/// both are left as they are.
pub(super) fn recover(disk: &dyn Disk) -> Result<Recovered> {
    let unreadable = |name: &str, e: io::Error| Error::Internal { cause: format!("journal: {name}: {e}") };
    let names = disk.list().map_err(|e| unreadable("the folder", e))?;
    let position = match disk::read_whole(disk, POSITION) {
        Ok((_, bytes)) => parse_position(&bytes).unwrap_or_else(|| {
            tracing::warn!("the journal's position is damaged: what it holds is replayed from its beginning");
            0
        }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => 0,
        Err(e) => return Err(unreadable(POSITION, e)),
    };
    let mut found = Recovered {
        segments: VecDeque::new(),
        index: Index::default(),
        next_seq: position.saturating_add(1),
        aside_bytes: 0,
        report: Recovery::default(),
    };
    let mut seqs: Vec<u64> = names.iter().filter_map(|name| first_seq_of(name)).collect();
    seqs.sort_unstable();
    for first_seq in seqs {
        let name = segment_name(first_seq);
        let held = found.read_segment(disk, &name, first_seq, position).map_err(|fault| match fault {
            Fault::Io(e) => unreadable(&name, e),
            Fault::Newer(version) => Error::Config {
                faults: vec![format!(
                    "database.path: journal segment {name} has version {version}, this server reads {VERSION}: \
                     start the newer server to empty it"
                )],
            },
        })?;
        found.next_seq = found.next_seq.max(held.last_seq.saturating_add(1)).max(first_seq);
        let is_needed = held.last_seq >= first_seq && held.last_seq > position;
        if is_needed || dispose(disk, &held.segment).is_err() {
            found.segments.push_back(held);
        }
    }
    // Looked at again: the lines above may have kept something aside.
    for name in disk.list().map_err(|e| unreadable("the folder", e))? {
        if [DAMAGED, TORN, REFUSED].iter().any(|ending| name.ends_with(ending)) {
            // Names go on behind theirs: nothing kept aside is ever written over.
            let number = name.get(..20).and_then(|digits| digits.parse::<u64>().ok()).unwrap_or(0);
            found.next_seq = found.next_seq.max(number.saturating_add(1));
            found.aside_bytes += disk.open(&name).and_then(|file| file.len()).unwrap_or(0);
            found.report.kept_aside.push(name);
        }
    }
    found.report.kept_aside.sort();
    found.report.num_entries = found.index.num_entries();
    Ok(found)
}

enum Fault {
    Io(io::Error),
    Newer(u32),
}

impl From<io::Error> for Fault {
    fn from(e: io::Error) -> Self {
        Self::Io(e)
    }
}

impl Recovered {
    fn read_segment(&mut self, disk: &dyn Disk, name: &str, first_seq: u64, position: u64) -> Result<Held, Fault> {
        let (file, bytes) = disk::read_whole(disk, name)?;
        if let Some(version) = entry::segment_version(&bytes).filter(|version| *version > VERSION) {
            return Err(Fault::Newer(version));
        }
        let segment = Arc::new(Segment::new(name.to_string(), file));
        let scan = entry::scan(&bytes, first_seq);
        let last_seq = first_seq.saturating_sub(1);
        let mut held = Held { segment, first_seq, last_seq, charge: entry::SEGMENT_HEADER_LEN as u64 };
        for placed in &scan.entries {
            let header = placed.header;
            held.last_seq = header.seq;
            held.charge += charge(header.entry_len());
            if header.seq <= position {
                continue;
            }
            match change::meta_of(header.kind, &bytes[placed.body()]) {
                Ok(meta) => {
                    let located = Located {
                        seq: header.seq,
                        at_ms: header.at_ms,
                        kind: header.kind,
                        id: meta.id,
                        segment: held.segment.clone(),
                        offset: placed.offset,
                        body_len: header.body_len,
                        is_keyless: false,
                    };
                    self.index.add(located, meta);
                }
                Err(_) => {
                    let end = placed.offset + header.entry_len();
                    self.report(&held.segment, placed.offset..end, DamageKind::Unknown);
                }
            }
        }
        for range in scan.damage {
            self.report(&held.segment, range, DamageKind::Middle);
        }
        if let Some(tail) = scan.tail {
            match cut(disk, &held.segment, &bytes, tail.clone()) {
                Ok(()) => {
                    let segment = name.to_string();
                    self.report.damage.push(Damage { segment, bytes: tail, kind: DamageKind::TornTail });
                }
                // Still there at the next start, and in the copy that is kept of a damaged segment.
                Err(_) => self.report(&held.segment, tail, DamageKind::TornTail),
            }
        }
        Ok(held)
    }

    fn report(&mut self, segment: &Segment, bytes: Range<u64>, kind: DamageKind) {
        segment.mark_damaged();
        self.report.damage.push(Damage { segment: segment.name.clone(), bytes, kind });
    }
}

/// Cuts the end off a segment after copying it: should it have been an entry that was acknowledged and then damaged, a
/// person can still try to read it.
fn cut(disk: &dyn Disk, segment: &Segment, bytes: &[u8], tail: Range<u64>) -> io::Result<()> {
    disk::replace(disk, &format!("{}{TORN}", segment.name), &bytes[tail.start as usize..tail.end as usize])?;
    segment.file.truncate(tail.start)?;
    segment.file.sync()
}

/// Removes a segment whose entries all reached the store, or keeps a damaged one aside. Durable when it returns.
/// Returns the bytes kept.
pub(super) fn dispose(disk: &dyn Disk, segment: &Segment) -> io::Result<u64> {
    let gone = |done: io::Result<()>| match done {
        // By a call before whose sync failed.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    let kept = if segment.is_damaged() {
        gone(disk.rename(&segment.name, &format!("{}{DAMAGED}", segment.name)))?;
        segment.file.len().unwrap_or(0)
    } else {
        gone(disk.remove(&segment.name))?;
        0
    };
    disk.sync_names()?;
    Ok(kept)
}

/// Remembers that the store has all entries up to this number.
pub(super) fn write_position(disk: &dyn Disk, seq: u64) -> io::Result<()> {
    disk::replace(disk, POSITION, position_text(seq).as_bytes())
}

fn position_text(seq: u64) -> String {
    let line = format!("acknowledged {seq}");
    format!("{line} crc32 {:08x}\n", crc32fast::hash(line.as_bytes()))
}

fn parse_position(bytes: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(bytes).ok()?;
    let seq = text.split(' ').nth(1)?.parse().ok()?;
    (text == position_text(seq)).then_some(seq)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_read_whole_or_not_at_all() {
        for seq in [0, 1, u64::MAX - 1] {
            let text = position_text(seq);
            assert_eq!(parse_position(text.as_bytes()), Some(seq));
            for len in 0..text.len() {
                assert_eq!(parse_position(&text.as_bytes()[..len]), None);
            }
        }
        assert_eq!(parse_position(position_text(10).replace("10", "11").as_bytes()), None);
    }

    #[test]
    fn names_of_segments_sort_by_number() {
        assert_eq!(first_seq_of(&segment_name(u64::MAX)), Some(u64::MAX));
        assert!(segment_name(9) < segment_name(10));
        for other in ["position", "lock", "1.segment", "00000000000000000001.segment.torn"] {
            assert_eq!(first_seq_of(other), None);
        }
    }
}
