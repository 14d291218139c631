//! Backups: all of a store in one file, compressed, checksummed and, with a key, encrypted. One format for both
//! stores: what was read from one can be restored into the other.
//!
//! ```text
//! back up   Source ─▶ with what the journal holds ─▶ entries ─▶ frames ─▶ zstd ─▶ seal ─▶ age ─▶ file
//! restore   file ─▶ age ─▶ seal ─▶ zstd ─▶ frames ─▶ all of it checked ─▶ once more ─▶ Records::put
//! verify    Source ─▶ decoded, hashed, compared with journal and backup
//! ```
//!
//! The format, from the outside in; `docs/backup.md` says for operators what is promised:
//!
//! ```text
//! file     age(content), or content where no key was given            age-encryption.org/v1
//! content  one zstd frame · seal                                      RFC 8878
//! seal     a skippable frame of zstd: 0x184D2A50, u32 · 32, u32 · BLAKE3 of all bytes of the content before
//! frame's  magic, 8 bytes · version, u32 · header's length, u32 · header, JSON · sections · footer
//! section  1, u8 · length of the kind, u8 · kind · entries · 3, u8 · number of entries, u64 · their bytes, u64
//!          · BLAKE3 over the BLAKE3 of each entry
//! entry    2, u8 · length, u64 · bytes
//! footer   4, u8 · number of sections, u32 · length, u32 · what is known at the end, JSON
//!          · BLAKE3 of all bytes of the frame before
//! ```
//!
//! Numbers are little-endian. A section is one kind of thing: `tasks`, `documents` and `parts` of background work, then
//! `inferences` by rising id. So the checksum of that last section is one of the store's records, whichever store they are
//! in: [`Totals`].
//!
//! Everything here blocks, for as long as reading a store takes. Call it on a thread of its own, not on one of a
//! runtime's.

pub mod entry;
pub mod file;
pub mod frame;
pub mod key;
pub mod merged;
pub mod piece;
pub mod restore;
pub mod seal;
pub mod source;
pub mod verify;
pub mod write;

use std::fmt;
use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::Error;

/// The section of records.
pub const INFERENCES: &str = "inferences";

/// What is known before the first record is read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The release that wrote it.
    pub program: String,
    pub created_at: Timestamp,
    /// "embedded", "mongodb".
    pub store: String,
    /// The version of that store's schema.
    pub schema: i32,
}

/// What is known after the last one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Footer {
    pub consistency: Consistency,
    /// Records the journal had and the store had not, or not like that.
    pub num_from_journal: u64,
    /// Records that could not be read and are not in here.
    pub num_damaged: u64,
}

/// Of which moment the records of a backup are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Consistency {
    /// All of them of one.
    Snapshot,
    /// Each of the one it was read at.
    Ranges,
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Snapshot => "all of one moment",
            Self::Ranges => "each of the moment it was read at",
        })
    }
}

/// BLAKE3, shown in hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest(pub [u8; 32]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from(self.0).to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Number, bytes and checksum of entries, in their order.
#[derive(Debug, Clone, Default)]
pub struct Totals {
    pub num_entries: u64,
    pub num_bytes: u64,
    hasher: blake3::Hasher,
}

impl Totals {
    /// Counts an entry's bytes.
    pub fn add(&mut self, entry: &[u8]) {
        self.num_entries += 1;
        self.num_bytes += entry.len() as u64;
        self.hasher.update(blake3::hash(entry).as_bytes());
    }

    /// The checksum over all that were added.
    pub fn digest(&self) -> Digest {
        Digest(*self.hasher.finalize().as_bytes())
    }
}

/// What is wrong with a backup's file.
fn fault(file: &Path, reason: impl fmt::Display) -> Error {
    Error::Backup { file: file.to_path_buf(), reason: reason.to_string() }
}
