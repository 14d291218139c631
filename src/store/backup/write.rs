//! Writes a backup.

use std::path::Path;

use jiff::Timestamp;

use super::file::NewFile;
use super::key::Lock;
use super::merged::{Item, Merged};
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
    /// Over all records: what `verify` computes of the same ones.
    pub digest: Digest,
    /// Of the file.
    pub num_file_bytes: u64,
    pub footer: Footer,
}

/// Writes all records of a store and its journal into the file `out`, which is there when this returns, and not before.
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
    file.stream().begin(INFERENCES).map_err(|e| file.fault(e))?;
    let mut num_records = 0;
    while let Some(item) = from.next_item()? {
        let record = match item {
            Item::Both(both) => {
                footer.num_from_journal += u64::from(both.journalled.is_some() && both.record.is_some());
                both.record
            }
            Item::Unreadable(unreadable) if on_damage == OnDamage::LeaveOut => {
                tracing::warn!(id = unreadable.name, cause = %unreadable.cause, "a record is left out: it cannot be read");
                footer.num_damaged += 1;
                None
            }
            Item::Unreadable(unreadable) => {
                let cause = format!("{} cannot be read: {}", unreadable.name, entry::words(unreadable.cause));
                return Err(Error::Internal { cause });
            }
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
    Ok(Written { num_records, digest: totals.digest(), num_file_bytes, footer })
}
