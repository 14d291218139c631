//! What the journal holds that the store has not: where each entry lies, by number, by id and by key. In memory.
//!
//! Only durable entries are here, in the order of their numbers. An entry costs about 250 bytes, whatever the size of its
//! record, and counts for at least as many in the journal's bound.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::disk::DiskFile;
use super::entry::{HEADER_LEN, Header, Kind};
use crate::store::record::InferenceId;

/// A file of entries.
pub struct Segment {
    pub name: String,
    /// Read also after the file was removed, by whoever still holds an entry of it.
    pub file: Arc<dyn DiskFile>,
    damaged: AtomicBool,
}

impl Segment {
    pub fn new(name: String, file: Arc<dyn DiskFile>) -> Self {
        Self { name, file, damaged: AtomicBool::new(false) }
    }

    /// Whether something in it could not be read: then the file is kept aside when its entries are done with.
    pub fn is_damaged(&self) -> bool {
        self.damaged.load(Ordering::Relaxed)
    }

    pub fn mark_damaged(&self) {
        self.damaged.store(true, Ordering::Relaxed);
    }
}

/// What the index knows of an entry before it has a place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    pub kind: Kind,
    /// `None` of [`Kind::Erase`] alone.
    pub id: Option<InferenceId>,
    /// Of a record, where it has one; the one erased.
    pub user: Option<Arc<str>>,
    /// The idempotency key of a record.
    pub key: Option<Arc<str>>,
}

/// An entry in the journal.
#[derive(Clone)]
pub struct Located {
    pub seq: u64,
    pub at_ms: i64,
    pub kind: Kind,
    pub id: Option<InferenceId>,
    pub segment: Arc<Segment>,
    /// Of its first byte, that of its header.
    pub offset: u64,
    pub body_len: u32,
    /// Of a put whose idempotency key was another record's: it is read, as stores write it, without the key.
    pub is_keyless: bool,
}

impl Located {
    /// Header and body, if they are still those that were written. Blocks: for the disk, though most are in memory.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; HEADER_LEN + self.body_len as usize];
        self.segment.file.read_at(self.offset, &mut bytes).ok()?;
        let header = Header::decode(&bytes).filter(|header| header.seq == self.seq)?;
        (crc32fast::hash(&bytes[HEADER_LEN..]) == header.body_crc).then_some(bytes)
    }
}

/// What happened to an id, oldest first.
pub type Changes = Vec<Located>;

#[derive(Default)]
struct Touched {
    /// Numbers of the entries that change it, rising.
    seqs: Vec<u64>,
    /// Of a record that is here; `None` where the store alone has it, if there is one.
    put: Option<Put>,
}

struct Put {
    user: Option<Arc<str>>,
    key: Option<Arc<str>>,
}

/// Entries of the journal that the store has not acknowledged.
#[derive(Default)]
pub struct Index {
    /// By rising number.
    log: VecDeque<Located>,
    ids: BTreeMap<InferenceId, Touched>,
    keys: HashMap<Arc<str>, InferenceId>,
    erasures: BTreeMap<u64, Arc<str>>,
}

impl Index {
    pub fn num_entries(&self) -> usize {
        self.log.len()
    }

    /// When the oldest entry was appended, Unix time in milliseconds.
    pub fn oldest_ms(&self) -> Option<i64> {
        self.log.front().map(|entry| entry.at_ms)
    }

    /// Adds an entry with a higher number than all before.
    pub fn add(&mut self, mut entry: Located, mut meta: Meta) {
        debug_assert!(self.log.back().is_none_or(|last| last.seq < entry.seq));
        let seq = entry.seq;
        match (meta.id, meta.user) {
            (Some(id), user) => {
                if let Some(key) = meta.key.take() {
                    // The first record of a key keeps it, unless it was deleted.
                    let owner = self.keys.get(&key).copied();
                    if owner.is_none_or(|owner| owner == id || self.is_dead(&owner)) {
                        self.keys.insert(key.clone(), id);
                        meta.key = Some(key);
                    } else {
                        entry.is_keyless = true;
                    }
                }
                // Whatever comes to an id anew comes after the erasures that may concern its record in the store.
                let earlier = &self.erasures;
                let touched = self
                    .ids
                    .entry(id)
                    .or_insert_with(|| Touched { seqs: earlier.keys().copied().collect(), put: None });
                touched.seqs.push(seq);
                if meta.kind == Kind::Put {
                    touched.put = Some(Put { user, key: meta.key });
                }
            }
            (None, Some(user)) => {
                let is_theirs = |put: &Put| put.user.as_ref() == Some(&user);
                let concerned = self.ids.values_mut().filter(|touched| touched.put.as_ref().is_none_or(is_theirs));
                concerned.for_each(|touched| touched.seqs.push(seq));
                self.erasures.insert(seq, user);
            }
            (None, None) => {}
        }
        self.log.push_back(entry);
    }

    /// Forgets all entries up to this number.
    pub fn remove_through(&mut self, seq: u64) {
        while self.log.front().is_some_and(|entry| entry.seq <= seq) {
            let Some(entry) = self.log.pop_front() else { break };
            match entry.id {
                Some(id) => self.forget(id, entry.seq),
                None => {
                    self.erasures.remove(&entry.seq);
                    let concerned: Vec<InferenceId> =
                        self.ids.iter().filter(|(_, of)| of.seqs.contains(&entry.seq)).map(|(id, _)| *id).collect();
                    concerned.into_iter().for_each(|id| self.forget(id, entry.seq));
                }
            }
        }
    }

    fn forget(&mut self, id: InferenceId, seq: u64) {
        let Some(touched) = self.ids.get_mut(&id) else { return };
        touched.seqs.retain(|of| *of != seq);
        if touched.seqs.is_empty() {
            let key = self.ids.remove(&id).and_then(|touched| touched.put?.key);
            if let Some(key) = key.filter(|key| self.keys.get(key) == Some(&id)) {
                self.keys.remove(&key);
            }
        }
    }

    /// The oldest entries, at most this many and, but for the first, of at most so many bytes.
    pub fn oldest(&self, max_entries: usize, max_bytes: u64) -> Vec<Located> {
        let mut bytes = 0;
        let fits = |entry: &&Located| {
            let is_first = bytes == 0;
            bytes += u64::from(entry.body_len).max(1);
            is_first || bytes <= max_bytes
        };
        self.log.iter().take(max_entries).take_while(fits).cloned().collect()
    }

    /// All ids that entries name, rising.
    pub fn ids(&self) -> Vec<InferenceId> {
        self.ids.keys().copied().collect()
    }

    /// What happened to this id; empty if nothing did.
    pub fn changes(&self, id: &InferenceId) -> Changes {
        self.ids.get(id).map(|touched| self.entries(touched)).unwrap_or_default()
    }

    fn entries(&self, touched: &Touched) -> Changes {
        touched.seqs.iter().filter_map(|seq| self.entry(*seq)).cloned().collect()
    }

    fn entry(&self, seq: u64) -> Option<&Located> {
        self.log.binary_search_by_key(&seq, |entry| entry.seq).ok().and_then(|i| self.log.get(i))
    }

    /// Whether the last that happened to an id took its record away.
    fn is_dead(&self, id: &InferenceId) -> bool {
        let last = self.ids.get(id).and_then(|touched| touched.seqs.last());
        last.and_then(|seq| self.entry(*seq)).is_some_and(|entry| matches!(entry.kind, Kind::Delete | Kind::Erase))
    }

    /// Whether a put of this number is undone by a later entry: then the store need not see it.
    pub fn is_undone(&self, id: &InferenceId, seq: u64) -> bool {
        let later = self.ids.get(id).into_iter().flat_map(|touched| &touched.seqs).filter(|of| **of > seq);
        later.filter_map(|of| self.entry(*of)).any(|entry| matches!(entry.kind, Kind::Delete | Kind::Erase))
    }

    /// The id that a record was written with under this key, if it still has one here.
    pub fn with_key(&self, key: &str) -> Option<InferenceId> {
        self.keys.get(key).copied().filter(|id| !self.is_dead(id))
    }

    /// Whether there is a record with this id, as far as the journal can tell.
    pub fn has(&self, id: &InferenceId) -> bool {
        self.ids.contains_key(id) && !self.is_dead(id)
    }

    /// Ids of this user's records, newest first.
    pub fn of_user(&self, user: &str) -> Vec<InferenceId> {
        let of_user = |(id, touched): &(&InferenceId, &Touched)| {
            touched.put.as_ref().and_then(|put| put.user.as_deref()) == Some(user) && !self.is_dead(id)
        };
        self.ids.iter().rev().filter(of_user).map(|(id, _)| *id).collect()
    }

    /// Ids that came with a record, not with a change of one that the store has, and still have it. Looks at every id.
    pub fn num_new(&self) -> usize {
        let is_new = |(id, touched): &(&InferenceId, &Touched)| {
            let first = touched.seqs.iter().filter_map(|seq| self.entry(*seq)).find(|entry| entry.kind != Kind::Erase);
            first.is_some_and(|entry| entry.kind == Kind::Put) && !self.is_dead(id)
        };
        self.ids.iter().filter(is_new).count()
    }

    /// Users whose erasure the store has not carried out.
    pub fn erased_users(&self) -> Vec<Arc<str>> {
        self.erasures.values().cloned().collect()
    }

    /// The newest ids below `after`, newest first, at most `limit`, with what happened to each.
    pub fn below(&self, after: Option<InferenceId>, limit: usize) -> Vec<(InferenceId, Changes)> {
        let end = after.map_or(Bound::Unbounded, Bound::Excluded);
        let ids = self.ids.range((Bound::Unbounded, end)).rev().take(limit);
        ids.map(|(id, touched)| (*id, self.entries(touched))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::journal::disk::{Disk, Folder};

    struct Fixture {
        index: Index,
        segment: Arc<Segment>,
        next_seq: u64,
    }

    impl Fixture {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let file = Folder::open(dir.path()).unwrap().create("s").unwrap();
            Self { index: Index::default(), segment: Arc::new(Segment::new("s".into(), file)), next_seq: 1 }
        }

        fn add(&mut self, kind: Kind, id: Option<InferenceId>, user: Option<&str>, key: Option<&str>) -> u64 {
            let seq = self.next_seq;
            self.next_seq += 2; // numbers may be missing
            let segment = self.segment.clone();
            let located =
                Located { seq, at_ms: seq as i64, kind, id, segment, offset: 0, body_len: 10, is_keyless: false };
            self.index.add(located, Meta { kind, id, user: user.map(Arc::from), key: key.map(Arc::from) });
            seq
        }

        fn seqs(&self, id: &InferenceId) -> Vec<u64> {
            self.index.changes(id).iter().map(|entry| entry.seq).collect()
        }
    }

    #[test]
    fn ids_and_keys_leave_with_their_last_entry() {
        let (mut f, id) = (Fixture::new(), InferenceId::new());
        let first = f.add(Kind::Put, Some(id), None, Some("k"));
        let second = f.add(Kind::Put, Some(id), None, Some("k"));
        assert_eq!(f.seqs(&id), [first, second]);
        f.index.remove_through(first);
        assert_eq!((f.seqs(&id), f.index.with_key("k")), (vec![second], Some(id)));
        f.index.remove_through(second);
        assert!(f.seqs(&id).is_empty() && f.index.with_key("k").is_none() && !f.index.has(&id));
        assert_eq!((f.index.num_entries(), f.index.ids.len(), f.index.keys.len()), (0, 0, 0));
    }

    #[test]
    fn a_deleted_record_frees_its_key() {
        let (mut f, first, second, third) =
            (Fixture::new(), InferenceId::new(), InferenceId::new(), InferenceId::new());
        let put = f.add(Kind::Put, Some(first), None, Some("k"));
        f.add(Kind::Put, Some(second), None, Some("k"));
        assert_eq!(f.index.with_key("k"), Some(first));
        let is_keyless = |id| f.index.changes(&id)[0].is_keyless;
        assert_eq!((is_keyless(first), is_keyless(second)), (false, true));
        let deleted = f.add(Kind::Delete, Some(first), None, None);
        assert_eq!(f.index.with_key("k"), None);
        assert!(f.index.is_undone(&first, put) && !f.index.is_undone(&first, deleted));
        f.add(Kind::Put, Some(third), None, Some("k"));
        f.index.remove_through(deleted);
        assert_eq!(f.index.with_key("k"), Some(third));
    }

    #[test]
    fn an_erasure_concerns_what_came_before_it() {
        let mut f = Fixture::new();
        let [theirs, other, nobodys, told, later] = std::array::from_fn(|_| InferenceId::new());
        let put = f.add(Kind::Put, Some(theirs), Some("u"), None);
        f.add(Kind::Put, Some(other), Some("v"), None);
        f.add(Kind::Put, Some(nobodys), None, None);
        // Its record, and whose it is, are in the store.
        f.add(Kind::Feedback, Some(told), None, None);
        assert_eq!(f.index.of_user("u"), [theirs]);
        let erased = f.add(Kind::Erase, None, Some("u"), None);
        f.add(Kind::Put, Some(later), Some("u"), None);
        assert_eq!(f.index.of_user("u"), [later]);
        assert!(f.index.is_undone(&theirs, put) && !f.index.has(&theirs) && f.index.has(&other) && f.index.has(&later));
        let has = |id| f.seqs(id).contains(&erased);
        assert!(has(&theirs) && !has(&other) && !has(&nobodys) && has(&told) && has(&later));
        assert_eq!(f.index.erased_users(), [Arc::from("u")]);
        f.index.remove_through(erased);
        assert!(f.index.erased_users().is_empty() && f.seqs(&theirs).is_empty() && f.seqs(&later).len() == 1);
    }

    #[test]
    fn ranges_of_ids_come_newest_first() {
        let mut f = Fixture::new();
        let ids: Vec<InferenceId> = (0..5).map(|_| InferenceId::new()).collect();
        for id in &ids {
            f.add(Kind::Put, Some(*id), None, None);
        }
        let below = |after, limit| f.index.below(after, limit).into_iter().map(|(id, _)| id).collect::<Vec<_>>();
        assert_eq!(below(None, 2), [ids[4], ids[3]]);
        assert_eq!(below(Some(ids[3]), 9), [ids[2], ids[1], ids[0]]);
        assert_eq!(below(Some(ids[0]), 9), []);
    }

    #[test]
    fn the_oldest_come_by_number_and_bytes_and_never_none() {
        let mut f = Fixture::new();
        for _ in 0..5 {
            f.add(Kind::Put, Some(InferenceId::new()), None, None);
        }
        let oldest = |entries, bytes| f.index.oldest(entries, bytes).iter().map(|entry| entry.seq).collect::<Vec<_>>();
        assert_eq!(oldest(2, 1000), [1, 3]);
        assert_eq!(oldest(9, 35), [1, 3, 5]);
        assert_eq!(oldest(9, 0), [1]);
    }
}
