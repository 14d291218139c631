//! A store and the journal that stands in for it, read as one: what a client of this server would find.

use std::collections::VecDeque;

use super::Consistency;
use super::piece::PieceKind;
use super::source::{Found, FoundPiece, Source, Unreadable};
use crate::Result;
use crate::store::durable::fold::fold;
use crate::store::journal::look::View;
use crate::store::record::{InferenceId, Record};

/// One id of either.
#[derive(Debug)]
pub struct Both {
    pub id: InferenceId,
    /// What store and journal make of it together; `None` where the journal takes it away.
    pub record: Option<Record>,
    /// `None` for a record that the journal has nothing to say of.
    pub journalled: Option<Journalled>,
}

/// An id that is in the journal.
#[derive(Debug)]
pub struct Journalled {
    /// What the store has of it by itself.
    pub stored: Option<Record>,
}

/// The next of either.
#[derive(Debug)]
pub enum Item {
    Both(Box<Both>),
    Unreadable(Unreadable),
}

/// See the file's first line.
pub struct Merged {
    source: Box<dyn Source>,
    journal: Option<View>,
    /// Ids of the journal that are still to come, rising.
    ids: VecDeque<InferenceId>,
    page: VecDeque<Found>,
    is_source_done: bool,
}

impl Merged {
    /// The journal must have been read before the source fixed its moment: what leaves the one for the other between the
    /// two is in both then, and not in neither.
    pub fn new(source: Box<dyn Source>, journal: Option<View>) -> Self {
        let ids = journal.as_ref().map(View::ids).unwrap_or_default().into();
        Self { source, journal, ids, page: VecDeque::new(), is_source_done: false }
    }

    pub fn store(&self) -> &'static str {
        self.source.store()
    }

    pub fn schema(&self) -> i32 {
        self.source.schema()
    }

    pub fn consistency(&self) -> Consistency {
        self.source.consistency()
    }

    pub fn journal(&self) -> Option<&View> {
        self.journal.as_ref()
    }

    /// See [`Source::count`]; ids of the journal are counted as well.
    pub fn count(&mut self) -> Result<u64> {
        Ok(self.source.count()? + self.ids.len() as u64)
    }

    /// See [`Source::check`].
    pub fn check(&mut self) -> Result<Vec<String>> {
        self.source.check()
    }

    /// See [`Source::next_pieces`]: all pieces, before all records.
    pub fn next_pieces(&mut self, kind: PieceKind) -> Result<Vec<FoundPiece>> {
        self.source.next_pieces(kind)
    }

    /// The next id, rising but for what cannot be read; `None` at the end. Errors: the source's.
    pub fn next_item(&mut self) -> Result<Option<Item>> {
        if self.page.is_empty() && !self.is_source_done {
            self.page = self.source.next_page()?.into();
            self.is_source_done = self.page.is_empty();
        }
        let stored_id = match self.page.front() {
            Some(Ok(record)) => Some(record.id),
            Some(Err(_)) => {
                let unreadable = self.page.pop_front().and_then(Found::err);
                return Ok(unreadable.map(Item::Unreadable));
            }
            None => None,
        };
        let journal_id = self.ids.front().copied();
        let (stored, id) = match (stored_id, journal_id) {
            (None, None) => return Ok(None),
            (Some(stored), Some(journal)) if journal < stored => (None, journal),
            (Some(stored), _) => (self.page.pop_front().and_then(Found::ok), stored),
            (None, Some(journal)) => (None, journal),
        };
        let is_journalled = journal_id == Some(id);
        if is_journalled {
            self.ids.pop_front();
        }
        Ok(Some(self.item(id, stored, is_journalled)))
    }

    fn item(&self, id: InferenceId, stored: Option<Record>, is_journalled: bool) -> Item {
        let Some(journal) = &self.journal else {
            return Item::Both(Box::new(Both { id, record: stored, journalled: None }));
        };
        // An erasure reaches records that the journal does not name.
        let is_erased =
            stored.as_ref().and_then(|record| record.facts.user.as_deref()).is_some_and(|user| journal.erases(user));
        if !is_journalled {
            let journalled = if is_erased { Some(Journalled { stored: stored.clone() }) } else { None };
            return Item::Both(Box::new(Both { id, record: stored.filter(|_| !is_erased), journalled }));
        }
        match journal.changes(&id) {
            Ok(changes) => {
                let record = fold(stored.clone(), changes);
                Item::Both(Box::new(Both { id, record, journalled: Some(Journalled { stored }) }))
            }
            Err(cause) => Item::Unreadable(Unreadable { name: format!("journal: {id}"), cause }),
        }
    }
}
