//! A store as it is read for a backup or a check: all of it, in one order, without a change.

use super::Consistency;
use super::piece::{Piece, PieceKind};
use crate::store::record::Record;
use crate::{Error, Result};

/// A record that is there and cannot be read.
#[derive(Debug, Clone, PartialEq)]
pub struct Unreadable {
    /// Its id, or what there is in the id's place.
    pub name: String,
    pub cause: Error,
}

/// A record, or what cannot be read in its place.
pub type Found = std::result::Result<Record, Unreadable>;

/// Something of background work, or what cannot be read in its place.
pub type FoundPiece = std::result::Result<Piece, Unreadable>;

/// The records of a store, by rising id. Blocks: every method.
///
/// Errors of every method: those of [`crate::store::Records`].
pub trait Source: Send {
    /// "embedded", "mongodb".
    fn store(&self) -> &'static str;

    /// The version of the store's schema.
    fn schema(&self) -> i32;

    /// Of which moment the records are that came so far.
    fn consistency(&self) -> Consistency;

    /// Number of records, or about it, for who watches.
    fn count(&mut self) -> Result<u64>;

    /// Some more of the background work of this kind. None at its end, and at no other time. Kinds are asked for one after
    /// another as [`PieceKind::ALL`] has them, before all records.
    fn next_pieces(&mut self, kind: PieceKind) -> Result<Vec<FoundPiece>>;

    /// Some more records. None at the end, and at no other time.
    fn next_page(&mut self) -> Result<Vec<Found>>;

    /// What is wrong with the store beside records that cannot be read, one fault a line. Called at the end.
    fn check(&mut self) -> Result<Vec<String>>;
}
