//! The journal read beside the server that works on it: nothing is locked, nothing changed.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::disk::ReadOnly;
use super::index::Index;
use super::recover::{Recovery, recover};
use super::{Change, read};
use crate::Result;
use crate::store::record::InferenceId;

/// How often the folder is read anew when a segment goes while it is read: the server removes what the store has got.
const NUM_LOOKS: usize = 5;
const PAUSE: Duration = Duration::from_millis(100);

/// What a journal holds at one moment.
pub struct View {
    index: Index,
    erased: BTreeSet<Arc<str>>,
    /// What was found. A torn end may be an entry that is just being written.
    pub recovery: Recovery,
}

impl View {
    /// Reads the journal in `folder`; `None` where there is no such folder. Blocks: for the reading of all segments.
    ///
    /// Errors: as [`super::Journal::open`].
    pub fn open(folder: &Path) -> Result<Option<Self>> {
        if !folder.is_dir() {
            return Ok(None);
        }
        let disk = ReadOnly::new(folder);
        let mut found = recover(&disk);
        for _ in 1..NUM_LOOKS {
            if found.is_ok() {
                break;
            }
            std::thread::sleep(PAUSE);
            found = recover(&disk);
        }
        let found = found?;
        let erased = found.index.erased_users().into_iter().collect();
        Ok(Some(Self { index: found.index, erased, recovery: found.report }))
    }

    /// The ids that its entries name, rising.
    pub fn ids(&self) -> Vec<InferenceId> {
        self.index.ids()
    }

    /// What happened to an id, oldest first. Blocks: for the disk. Errors: as [`super::Journal::read`].
    pub fn changes(&self, id: &InferenceId) -> Result<Vec<Change>> {
        self.index.changes(id).iter().map(read).collect()
    }

    /// Whether an erasure of this user waits.
    pub fn erases(&self, user: &str) -> bool {
        self.erased.contains(user)
    }
}

#[cfg(test)]
mod tests {
    use super::super::disk::Folder;
    use super::super::{Entry, Journal, Options};
    use super::*;

    fn names(folder: &Path) -> Vec<(String, Vec<u8>)> {
        let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let mut all: Vec<_> = files
            .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap()))
            .collect();
        all.sort();
        all
    }

    #[tokio::test]
    async fn a_journal_in_use_is_read_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("journal");
        assert!(View::open(&folder).unwrap().is_none());
        let disk = Box::new(Folder::open(&folder).unwrap());
        let (journal, _) = Journal::open(disk, Options::of(1 << 20)).unwrap();
        let ids: Vec<InferenceId> = (0..3).map(|_| InferenceId::new()).collect();
        let entries = vec![Entry::delete(ids[2]), Entry::delete(ids[0]), Entry::erase("jörg").unwrap()];
        journal.append(entries, None).unwrap().await.unwrap();
        // As if the next were being written: half of it is there.
        let segment = folder.join("00000000000000000001.segment");
        let whole = std::fs::read(&segment).unwrap();
        std::fs::write(&segment, [&whole[..], &whole[16..30]].concat()).unwrap();
        let before = names(&folder);

        let view = View::open(&folder).unwrap().expect("it is there");
        assert_eq!(view.ids(), [ids[0], ids[2]]);
        assert_eq!(view.changes(&ids[2]).unwrap()[0], Change::Delete(ids[2]));
        assert!(view.changes(&ids[1]).unwrap().is_empty());
        assert!(view.erases("jörg") && !view.erases("erika"));
        assert_eq!(view.recovery.damage.len(), 1, "{:?}", view.recovery);
        assert_eq!(names(&folder), before);
    }
}
