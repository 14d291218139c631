//! Writes a backup.

use std::path::Path;

use jiff::Timestamp;

use super::file::NewFile;
use super::key::Lock;
use super::merged::{Item, Merged};
use super::piece::PieceKind;
use super::source::Unreadable;
use super::{Consistency, Digest, Footer, Header, INFERENCES, entry};
use crate::{Error, Result};

/// What to do about a record that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDamage {
    /// End without a backup.
    Fail,
    /// Leave it out, and say so in the backup.
    LeaveOut,
}

/// A backup that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    pub num_records: u64,
    /// Tasks, documents and parts of files of background work.
    pub num_pieces: u64,
    /// Over all records: what `verify` computes of the same ones.
    pub digest: Digest,
    /// Of the file.
    pub num_file_bytes: u64,
    pub footer: Footer,
}

/// Writes all of a store and its journal into the file `out`, which is there when this returns, and not before.
/// `progress` is told how many there are so far.
///
/// Errors: the source's; [`Error::Conflict`] where `out` is there already, [`Error::Backup`] where it cannot be written,
/// [`Error::Internal`] for a record that cannot be read, unless it is to be left out.
pub fn back_up(
    mut from: Merged,
    out: &Path,
    lock: &Lock,
    on_damage: OnDamage,
    progress: &mut dyn FnMut(u64),
) -> Result<Written> {
    let header = Header {
        program: env!("CARGO_PKG_VERSION").to_string(),
        created_at: Timestamp::now(),
        store: from.store().to_string(),
        schema: from.schema(),
    };
    let mut file = NewFile::create(out, lock, &header)?;
    let mut footer = Footer { consistency: Consistency::Snapshot, num_from_journal: 0, num_damaged: 0 };
    let mut num_pieces = 0;
    for kind in PieceKind::ALL {
        file.stream().begin(kind.section()).map_err(|e| file.fault(e))?;
        loop {
            let page = from.next_pieces(kind)?;
            if page.is_empty() {
                break;
            }
            for found in page {
                let Some(piece) = readable(found, on_damage, &mut footer)? else { continue };
                file.stream().entry(&piece.encode()?).map_err(|e| file.fault(e))?;
                num_pieces += 1;
            }
        }
        file.stream().end().map_err(|e| file.fault(e))?;
    }
    file.stream().begin(INFERENCES).map_err(|e| file.fault(e))?;
    let mut num_records = 0;
    while let Some(item) = from.next_item()? {
        let record = match item {
            Item::Both(both) => {
                footer.num_from_journal += u64::from(both.journalled.is_some() && both.record.is_some());
                both.record
            }
            Item::Unreadable(unreadable) => readable(Err(unreadable), on_damage, &mut footer)?,
        };
        let Some(record) = record else { continue };
        let bytes = entry::encode(&record)?;
        file.stream().entry(&bytes).map_err(|e| file.fault(e))?;
        num_records += 1;
        progress(num_records);
    }
    let totals = file.stream().end().map_err(|e| file.fault(e))?;
    footer.consistency = from.consistency();
    let num_file_bytes = file.finish(&footer)?;
    Ok(Written { num_records, num_pieces, digest: totals.digest(), num_file_bytes, footer })
}

/// What was found, or `None` for what cannot be read and may be left out.
fn readable<T>(
    found: std::result::Result<T, Unreadable>,
    on_damage: OnDamage,
    footer: &mut Footer,
) -> Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(Unreadable { name, cause }) if on_damage == OnDamage::LeaveOut => {
            tracing::warn!(name, %cause, "what cannot be read is left out");
            footer.num_damaged += 1;
            Ok(None)
        }
        Err(Unreadable { name, cause }) => {
            Err(Error::Internal { cause: format!("{name} cannot be read: {}", entry::words(cause)) })
        }
    }
}
