//! The journal keeps what it acknowledged: through kills, losses of power, damage, and disks that fail or are full.

mod common;
#[path = "journal/sim_disk.rs"]
mod sim_disk;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use eremois::Error;
use eremois::store::journal::disk::Folder;
use eremois::store::journal::entry::{HEADER_LEN, SEGMENT_HEADER_LEN};
use eremois::store::journal::{Change, DamageKind, Entry, Journal, Options, Recovery};
use eremois::store::record::InferenceId;
use futures::executor::block_on;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use common::records::{record, sample};
use sim_disk::{Faults, SimDisk};

const ROOMY: Options = Options { max_bytes: 64 << 20, segment_bytes: 1 << 20 };

fn open(dir: &Path, options: Options) -> (Journal, Recovery) {
    Journal::open(Box::new(Folder::open(dir).unwrap()), options).unwrap()
}

fn open_sim(disk: &SimDisk, options: Options) -> (Journal, Recovery) {
    Journal::open(Box::new(disk.clone()), options).unwrap()
}

fn append(journal: &Journal, entries: Vec<Entry>) -> Result<(), Error> {
    block_on(journal.append(entries, None)?)
}

/// Everything in it, oldest first.
fn changes(journal: &Journal) -> Vec<Change> {
    journal.oldest(usize::MAX, u64::MAX).iter().map(|located| journal.read(located).unwrap()).collect()
}

/// The ids of what is in it, oldest first.
fn ids(journal: &Journal) -> Vec<InferenceId> {
    journal.oldest(usize::MAX, u64::MAX).iter().filter_map(|located| located.id).collect()
}

fn files(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|name| name != "lock").collect();
    names.sort();
    names
}

fn segment(dir: &Path) -> PathBuf {
    dir.join(files(dir).into_iter().find(|name| name.ends_with(".segment")).expect("a segment"))
}

#[test]
fn what_is_appended_is_read_again_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let one = sample();
    let (journal, recovery) = open(dir.path(), ROOMY);
    assert_eq!(recovery, Recovery::default());
    let expected = [
        Change::Put(Box::new(one.clone())),
        Change::Delete(one.id),
        Change::Erase("u".into()),
        Change::Put(Box::new(one.clone())),
    ];
    append(&journal, vec![Entry::put(&one).unwrap(), Entry::delete(one.id)]).unwrap();
    append(&journal, vec![Entry::erase("u").unwrap(), Entry::put(&one).unwrap()]).unwrap();
    assert_eq!(changes(&journal), expected);
    drop(journal);
    let (journal, recovery) = open(dir.path(), ROOMY);
    assert_eq!((recovery.num_entries, recovery.damage.len()), (4, 0));
    assert_eq!(changes(&journal), expected);
}

#[test]
fn acknowledged_entries_are_gone_and_their_files_with_them() {
    let dir = tempfile::tempdir().unwrap();
    // Segments of a few entries.
    let options = Options { segment_bytes: 1500, ..ROOMY };
    let (journal, _) = open(dir.path(), options);
    for _ in 0..20 {
        append(&journal, vec![Entry::put(&record()).unwrap()]).unwrap();
    }
    let all = ids(&journal);
    assert!(files(dir.path()).len() > 3, "{:?}", files(dir.path()));
    let seventh = journal.oldest(7, u64::MAX)[6].seq;
    block_on(journal.acknowledge(seventh)).unwrap();
    assert_eq!(ids(&journal), all[7..]);
    drop(journal);
    // A crash, or an end, between: the position says where it goes on.
    let (journal, _) = open(dir.path(), options);
    assert_eq!(ids(&journal), all[7..]);
    let last = journal.oldest(usize::MAX, u64::MAX).last().unwrap().seq;
    block_on(journal.acknowledge(last)).unwrap();
    assert_eq!((journal.len(), journal.bytes()), (0, 0));
    assert_eq!(files(dir.path()), ["position"]);
    // Numbers go on: an entry below the position would not be replayed.
    append(&journal, vec![Entry::delete(all[0])]).unwrap();
    drop(journal);
    let (journal, _) = open(dir.path(), options);
    assert_eq!(changes(&journal), [Change::Delete(all[0])]);
}

#[test]
fn callers_at_the_same_time_share_syncs() {
    let disk = SimDisk::default();
    let (journal, _) = open_sim(&disk, ROOMY);
    append(&journal, vec![Entry::delete(InferenceId::new())]).unwrap();
    let before = disk.num_ops();
    // The first sync lasts as long as the others take to come, however slow this machine is.
    let slow = disk.hold_syncs();
    let receipts: Vec<_> =
        (0..500).map(|_| journal.append(vec![Entry::delete(InferenceId::new())], None).unwrap()).collect();
    drop(slow);
    receipts.into_iter().for_each(|receipt| block_on(receipt).unwrap());
    let num_ops = disk.num_ops() - before;
    // A write and a sync for each would be a thousand.
    assert!(num_ops < 20, "{num_ops}");
}

#[test]
fn a_second_process_is_refused_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (_journal, _) = open(dir.path(), ROOMY);
    let Err(Error::Config { faults }) = Folder::open(dir.path()) else { panic!("opened twice") };
    assert!(faults[0].contains("database.path") && faults[0].contains("another process"), "{faults:?}");
}

// ---- damage ----------------------------------------------------------------------------------------------------

#[test]
fn a_tail_cut_at_every_byte_costs_the_last_entry_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path(), ROOMY);
    let first = sample();
    append(&journal, vec![Entry::put(&first).unwrap()]).unwrap();
    let whole_len = fs::metadata(segment(dir.path())).unwrap().len() as usize;
    append(&journal, vec![Entry::put(&record()).unwrap()]).unwrap();
    drop(journal);
    let name = segment(dir.path());
    let bytes = fs::read(&name).unwrap();
    for len in whole_len..bytes.len() {
        let copy = tempfile::tempdir().unwrap();
        let torn = copy.path().join(name.file_name().unwrap());
        fs::write(&torn, &bytes[..len]).unwrap();
        let (journal, recovery) = open(copy.path(), ROOMY);
        assert_eq!(changes(&journal), [Change::Put(Box::new(first.clone()))], "cut at {len}");
        let is_torn = len > whole_len;
        assert_eq!(recovery.damage.len(), usize::from(is_torn));
        assert!(recovery.damage.iter().all(|damage| damage.kind == DamageKind::TornTail));
        assert_eq!(fs::metadata(&torn).unwrap().len() as usize, whole_len);
        if is_torn {
            let kept = fs::read(copy.path().join(&recovery.kept_aside[0])).unwrap();
            assert_eq!(kept, bytes[whole_len..len]);
        }
        // What comes now is found beside it by the next start.
        append(&journal, vec![Entry::delete(first.id)]).unwrap();
        drop(journal);
        let (journal, recovery) = open(copy.path(), ROOMY);
        assert_eq!((journal.len(), recovery.damage.len()), (2, 0), "cut at {len}");
    }
}

#[test]
fn damage_in_the_middle_is_reported_and_costs_what_it_covers() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { segment_bytes: 1500, ..ROOMY };
    let (journal, _) = open(dir.path(), options);
    for _ in 0..20 {
        append(&journal, vec![Entry::put(&record()).unwrap()]).unwrap();
    }
    let all = ids(&journal);
    let second = journal.oldest(2, u64::MAX).pop().unwrap();
    drop(journal);

    let name = segment(dir.path());
    let mut bytes = fs::read(&name).unwrap();
    bytes[second.offset as usize + HEADER_LEN + 40] ^= 0x10;
    fs::write(&name, &bytes).unwrap();
    let (journal, recovery) = open(dir.path(), options);
    let expected: Vec<InferenceId> = all.iter().filter(|id| Some(**id) != second.id).copied().collect();
    assert_eq!(ids(&journal), expected);
    let [damage] = &recovery.damage[..] else { panic!("{recovery:?}") };
    assert_eq!(damage.kind, DamageKind::Middle);
    assert_eq!(damage.bytes.start, second.offset);
    assert_eq!(damage.segment, second.segment.name);
    // It outlives its replay, for a person to look at, and counts in the bound.
    let last = journal.oldest(usize::MAX, u64::MAX).last().unwrap().seq;
    block_on(journal.acknowledge(last)).unwrap();
    let kept = format!("{}.damaged", damage.segment);
    assert_eq!(files(dir.path()), [kept.as_str()]);
    assert_eq!(journal.bytes(), bytes.len() as u64);
    drop(journal);
    let (journal, recovery) = open(dir.path(), options);
    assert_eq!((recovery.kept_aside, journal.bytes()), (vec![kept], bytes.len() as u64));
}

#[test]
fn an_entry_damaged_after_the_start_is_an_error_and_no_other_record() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path(), ROOMY);
    append(&journal, vec![Entry::put(&record()).unwrap()]).unwrap();
    let located = journal.oldest(1, 0).pop().unwrap();
    let name = segment(dir.path());
    let mut bytes = fs::read(&name).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&name, &bytes).unwrap();
    assert!(matches!(journal.read(&located), Err(Error::Internal { .. })));
    block_on(journal.acknowledge(located.seq)).unwrap();
    assert!(files(dir.path()).iter().any(|name| name.ends_with(".damaged")));
}

#[test]
fn a_segment_of_a_newer_version_stops_the_start_and_stays() {
    let dir = tempfile::tempdir().unwrap();
    let mut header = b"eremoisJ\x02\x00\x00\x00".to_vec();
    header.extend_from_slice(&crc32fast::hash(&header).to_le_bytes());
    let name = dir.path().join("00000000000000000001.segment");
    fs::write(&name, &header).unwrap();
    let opened = Journal::open(Box::new(Folder::open(dir.path()).unwrap()), ROOMY).map(drop);
    let Err(Error::Config { faults }) = opened else { panic!("opened") };
    assert!(faults[0].contains("version 2"), "{faults:?}");
    assert_eq!(fs::read(&name).unwrap(), header);
}

#[test]
fn a_damaged_position_replays_from_the_beginning() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path(), ROOMY);
    append(&journal, (0..3).map(|_| Entry::put(&record()).unwrap()).collect()).unwrap();
    let all = ids(&journal);
    block_on(journal.acknowledge(journal.oldest(1, 0)[0].seq)).unwrap();
    assert_eq!(ids(&journal), all[1..]);
    drop(journal);
    fs::write(dir.path().join("position"), "acknowledged 3 crc32 00000000\n").unwrap();
    assert_eq!(ids(&open(dir.path(), ROOMY).0), all);
}

// ---- a disk that is full or fails ------------------------------------------------------------------------------

#[test]
fn a_full_journal_refuses_at_once_and_takes_again_when_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { max_bytes: 20_000, segment_bytes: 4000 };
    let (journal, _) = open(dir.path(), options);
    let mut kept = 0;
    let refused = loop {
        match append(&journal, vec![Entry::put(&record()).unwrap()]) {
            Ok(()) => kept += 1,
            Err(e) => break e,
        }
    };
    let Error::JournalFull { cause } = refused else { panic!("{refused:?}") };
    assert!(cause.contains("database.journal_max_bytes = 20000"), "{cause}");
    assert!(kept > 5 && journal.bytes() <= 20_000 && journal.refusal().is_some());
    let on_disk: u64 = files(dir.path()).iter().map(|name| fs::metadata(dir.path().join(name)).unwrap().len()).sum();
    assert!(on_disk <= 20_000, "{on_disk}");
    assert_eq!(journal.len(), kept);
    // All of a group or nothing.
    let before = journal.len();
    assert!(append(&journal, (0..50).map(|_| Entry::delete(InferenceId::new())).collect()).is_err());
    assert_eq!(journal.len(), before);

    block_on(journal.acknowledge(journal.oldest(kept / 2, u64::MAX).last().unwrap().seq)).unwrap();
    assert_eq!(journal.refusal(), None);
    append(&journal, vec![Entry::put(&record()).unwrap()]).unwrap();
}

#[test]
fn small_entries_count_for_the_memory_of_their_index() {
    let (journal, _) = open_sim(&SimDisk::default(), ROOMY);
    append(&journal, vec![Entry::delete(InferenceId::new())]).unwrap();
    assert_eq!(journal.bytes(), SEGMENT_HEADER_LEN as u64 + 256);
}

#[test]
fn a_disk_that_cannot_be_written_is_a_full_journal_with_its_cause() {
    let faults = [
        Faults { write: Some(io::ErrorKind::StorageFull), ..Faults::default() },
        Faults { sync: Some(io::ErrorKind::Other), ..Faults::default() },
        Faults { create: Some(io::ErrorKind::ReadOnlyFilesystem), ..Faults::default() },
    ];
    for fault in faults {
        let disk = SimDisk::default();
        // Every segment holds one entry, so that each append also makes a file.
        let (journal, _) = open_sim(&disk, Options { segment_bytes: 1, ..ROOMY });
        let before = record();
        append(&journal, vec![Entry::put(&before).unwrap()]).unwrap();
        disk.set(fault);
        for _ in 0..3 {
            let refused = append(&journal, vec![Entry::put(&record()).unwrap()]);
            assert!(matches!(refused, Err(Error::JournalFull { .. })), "{fault:?} {refused:?}");
        }
        assert!(journal.refusal().is_some());
        assert_eq!(ids(&journal), [before.id], "{fault:?}");
        disk.set(Faults::default());
        let after = record();
        append(&journal, vec![Entry::put(&after).unwrap()]).unwrap();
        assert_eq!((ids(&journal), journal.refusal()), (vec![before.id, after.id], None), "{fault:?}");
        let bytes = journal.bytes();
        drop(journal);
        let (journal, recovery) = open_sim(&disk, ROOMY);
        assert_eq!((ids(&journal), recovery.damage), (vec![before.id, after.id], vec![]), "{fault:?}");
        assert_eq!(journal.bytes(), bytes, "{fault:?}");
    }
}

#[test]
fn after_a_failed_sync_the_segment_is_left() {
    let disk = SimDisk::default();
    let (journal, _) = open_sim(&disk, ROOMY);
    let [first, lost, second] = std::array::from_fn(|_| record());
    append(&journal, vec![Entry::put(&first).unwrap()]).unwrap();
    disk.set(Faults { sync: Some(io::ErrorKind::Other), ..Faults::default() });
    assert!(append(&journal, vec![Entry::put(&lost).unwrap()]).is_err());
    disk.set(Faults::default());
    append(&journal, vec![Entry::put(&second).unwrap()]).unwrap();
    let segments = disk.names().iter().filter(|name| name.ends_with(".segment")).count();
    assert_eq!(segments, 2);
    // In one segment the second entry would be behind a hole that a later sync did not fill.
    let mut rng = StdRng::seed_from_u64(1);
    for _ in 0..50 {
        let (journal, _) = open_sim(&disk.after_power_loss(&mut rng), ROOMY);
        assert_eq!(ids(&journal), [first.id, second.id]);
    }
}

#[test]
fn an_acknowledgement_that_cannot_be_remembered_is_an_error_and_undoes_nothing() {
    let disk = SimDisk::default();
    let (journal, _) = open_sim(&disk, ROOMY);
    append(&journal, (0..2).map(|_| Entry::put(&record()).unwrap()).collect()).unwrap();
    let all = ids(&journal);
    let seqs: Vec<u64> = journal.oldest(2, u64::MAX).iter().map(|located| located.seq).collect();
    disk.set(Faults { create: Some(io::ErrorKind::StorageFull), ..Faults::default() });
    assert!(matches!(block_on(journal.acknowledge(seqs[0])), Err(Error::JournalFull { .. })));
    assert_eq!(ids(&journal), all);
    // All of a segment needs no position, and its removal no space.
    block_on(journal.acknowledge(seqs[1])).unwrap();
    assert_eq!((journal.len(), disk.names().len()), (0, 0));
}

#[test]
fn entries_refused_by_the_store_are_kept_in_a_file_that_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = open(dir.path(), ROOMY);
    let one = record();
    append(&journal, vec![Entry::put(&one).unwrap()]).unwrap();
    let located = journal.oldest(1, 0).pop().unwrap();
    block_on(journal.set_aside(&located)).unwrap();
    block_on(journal.acknowledge(located.seq)).unwrap();
    let [name] = &files(dir.path())[..] else { panic!("{:?}", files(dir.path())) };
    assert!(name.ends_with(".refused"));
    // Under the name of a segment it is replayed.
    let other = tempfile::tempdir().unwrap();
    fs::copy(dir.path().join(name), other.path().join("00000000000000000001.segment")).unwrap();
    assert_eq!(changes(&open(other.path(), ROOMY).0), [Change::Put(Box::new(one))]);
}

// ---- loss of power ---------------------------------------------------------------------------------------------

/// What the journal promised before the power went.
#[derive(Default)]
struct Promised {
    /// Appended with a receipt, and not acknowledged to the journal.
    kept: BTreeSet<InferenceId>,
    /// Acknowledged to the journal, which said that it will remember.
    done: BTreeSet<InferenceId>,
    /// Neither: an append or an acknowledgement without an answer.
    open: BTreeSet<InferenceId>,
    order: Vec<InferenceId>,
}

impl Promised {
    fn check(&self, journal: &Journal, seed: u64) {
        let found = ids(journal);
        let set: BTreeSet<InferenceId> = found.iter().copied().collect();
        assert_eq!(set.len(), found.len(), "seed {seed}: an entry is there twice");
        assert!(self.kept.is_subset(&set), "seed {seed}: an acknowledged entry is lost");
        assert!(self.done.is_disjoint(&set), "seed {seed}: an entry that the store has is replayed");
        let places: BTreeMap<InferenceId, usize> = self.order.iter().enumerate().map(|(i, id)| (*id, i)).collect();
        assert!(found.iter().map(|id| places[id]).is_sorted(), "seed {seed}: out of order");
        // Entries read as what they were.
        for change in changes(journal) {
            let Change::Put(record) = change else { panic!("only records were put") };
            assert!(set.contains(&record.id));
        }
    }

    /// Works until the power fails.
    fn work(&mut self, journal: &Journal, rng: &mut StdRng) {
        for _ in 0..200 {
            if rng.random_bool(0.3) {
                let oldest = journal.oldest(rng.random_range(1..20), u64::MAX);
                let Some(last) = oldest.last() else { continue };
                let ids: Vec<InferenceId> = oldest.iter().filter_map(|located| located.id).collect();
                let remembered = block_on(journal.acknowledge(last.seq)).is_ok();
                for id in ids {
                    self.kept.remove(&id);
                    self.open.remove(&id);
                    if remembered {
                        self.done.insert(id)
                    } else {
                        self.open.insert(id)
                    };
                }
                if !remembered {
                    return;
                }
            } else {
                let groups: Vec<_> = (0..rng.random_range(1..4))
                    .map(|_| {
                        let records: Vec<_> = (0..rng.random_range(1..4)).map(|_| record()).collect();
                        self.order.extend(records.iter().map(|record| record.id));
                        self.open.extend(records.iter().map(|record| record.id));
                        let entries = records.iter().map(|record| Entry::put(record).unwrap()).collect();
                        (records, journal.append(entries, None))
                    })
                    .collect();
                for (records, receipt) in groups {
                    let Ok(receipt) = receipt else { return };
                    if block_on(receipt).is_err() {
                        return;
                    }
                    for record in records {
                        self.open.remove(&record.id);
                        self.kept.insert(record.id);
                    }
                }
            }
        }
    }
}

#[test]
fn a_loss_of_power_at_any_moment_costs_nothing_that_was_acknowledged() {
    let options = Options { max_bytes: 1 << 20, segment_bytes: 6000 };
    for seed in 0..150 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut disk = SimDisk::default();
        let mut promised = Promised::default();
        // Several lives of one journal, the recovery of each cut off as well.
        for _ in 0..4 {
            disk.set(Faults { power_fails_at: Some(rng.random_range(0..120)), ..Faults::default() });
            if let Ok((journal, _)) = Journal::open(Box::new(disk.clone()), options) {
                promised.check(&journal, seed);
                promised.work(&journal, &mut rng);
            }
            disk = disk.after_power_loss(&mut rng);
        }
        promised.check(&open_sim(&disk, options).0, seed);
    }
}

// ---- kill -9 ---------------------------------------------------------------------------------------------------

const CHILD: &str = "EREMOIS_TEST_JOURNAL";

/// The other side of the next test: appends until it is killed, and says what was acknowledged. Without its variable
/// there is nothing for it to do.
#[test]
fn child_that_is_killed() {
    let Some(dir) = std::env::var_os(CHILD) else { return };
    let journal = Arc::new(open(Path::new(&dir), Options { segment_bytes: 64 << 10, ..ROOMY }).0);
    // Should nobody kill it, it must not write for ever.
    let end = Instant::now() + Duration::from_secs(20);
    let threads: Vec<_> = (0..8)
        .map(|_| {
            let journal = journal.clone();
            std::thread::spawn(move || {
                while Instant::now() < end {
                    let records = [record(), record()];
                    let entries = records.iter().map(|record| Entry::put(record).unwrap()).collect();
                    if append(&journal, entries).is_ok() {
                        let mut out = io::stdout().lock();
                        writeln!(out, "kept {} {}", records[0].id, records[1].id).unwrap();
                    }
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn killed_at_random_moments_it_has_every_acknowledged_id_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = StdRng::seed_from_u64(9);
    let mut num_acknowledged = 0;
    for round in 0..15 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_is_killed", "--nocapture", "--test-threads=1"])
            .env(CHILD, dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // From the first answer on, so that it is killed at work and not at its start; once right away.
        let mut acknowledged: BTreeSet<InferenceId> = BTreeSet::new();
        let mut take = |line: &str| {
            let Some(ids) = line.split("kept ").nth(1) else { return };
            // The last line may be cut; an id is whole or does not parse.
            acknowledged.extend(ids.split(' ').filter_map(|id| id.parse::<InferenceId>().ok()));
        };
        if round > 0 {
            lines.by_ref().map_while(Result::ok).find(|line| line.contains("kept ")).iter().for_each(|line| take(line));
            std::thread::sleep(Duration::from_micros(rng.random_range(0..100_000)));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        lines.map_while(Result::ok).for_each(|line| take(&line));

        let (journal, recovery) = open(dir.path(), ROOMY);
        let found = ids(&journal);
        let set: BTreeSet<InferenceId> = found.iter().copied().collect();
        assert_eq!(set.len(), found.len(), "an entry is there twice");
        assert!(acknowledged.is_subset(&set), "an acknowledged id is lost");
        // A kill tears nothing but the last write.
        assert!(recovery.damage.iter().all(|damage| damage.kind == DamageKind::TornTail), "{recovery:?}");
        num_acknowledged += acknowledged.len();
        assert_eq!(changes(&journal).len(), found.len());
        // Some rounds begin with a journal that holds entries, some in the middle of a segment, some with an empty one.
        let oldest = journal.oldest(found.len() * (round % 3) / 2, u64::MAX);
        if let Some(last) = oldest.last() {
            block_on(journal.acknowledge(last.seq)).unwrap();
        }
    }
    assert!(num_acknowledged > 100, "the child hardly wrote: {num_acknowledged}");
}
