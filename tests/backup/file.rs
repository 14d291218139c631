//! The file: what was written comes back, and nothing else does.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use age::secrecy::ExposeSecret;
use age::x25519::Identity;
use eremois::store::backup::Consistency;
use eremois::store::backup::key::{Key, Lock};
use eremois::store::backup::merged::Merged;
use eremois::store::backup::piece::{Piece, PieceKind};
use eremois::store::backup::restore::{self, Put, Wanted, WantedWork, check};
use eremois::store::backup::source::{Found, FoundPiece, Source, Unreadable};
use eremois::store::backup::write::{OnDamage, Written, back_up};
use eremois::store::record::{Feedback, InferenceId, Record, Status, StoredOutput, StoredTensor, StoredTensors};
use eremois::store::work::Task;
use eremois::{Error, Result};
use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;

use super::{all_of, bytes_of, eremois, fill, folder, succeeds, text};
use crate::common::records::{record, sample};

/// A store in memory, in pages of three.
struct Given(VecDeque<Found>);

impl Source for Given {
    fn store(&self) -> &'static str {
        "embedded"
    }

    fn schema(&self) -> i32 {
        1
    }

    fn consistency(&self) -> Consistency {
        Consistency::Snapshot
    }

    fn count(&mut self) -> Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn next_pieces(&mut self, _kind: PieceKind) -> Result<Vec<FoundPiece>> {
        Ok(Vec::new())
    }

    fn next_page(&mut self) -> Result<Vec<Found>> {
        let len = self.0.len().min(3);
        Ok(self.0.drain(..len).collect())
    }

    fn check(&mut self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

fn write(found: Vec<Found>, out: &Path, lock: &Lock, on_damage: OnDamage) -> Result<Written> {
    back_up(Merged::new(Box::new(Given(found.into())), None), out, lock, on_damage, &mut |_| {})
}

/// A backup of these records.
fn backup(records: &[Record], dir: &Path, key: &Key) -> PathBuf {
    let out = dir.join("a.backup");
    let found = records.iter().cloned().map(Ok).collect();
    write(found, &out, &key.lock(), OnDamage::Fail).expect("written");
    out
}

/// Takes what a restore writes.
#[derive(Default)]
struct Taken(Vec<Record>);

impl Put for Taken {
    fn records(&mut self, records: &[Record]) -> Result<()> {
        self.0.extend_from_slice(records);
        Ok(())
    }

    fn tasks(&mut self, tasks: &[Task]) -> Result<()> {
        panic!("there is none: {tasks:?}");
    }

    fn piece(&mut self, piece: &Piece) -> Result<()> {
        panic!("there is none: {piece:?}");
    }
}

const ALL: Wanted = Wanted { until: None, work: WantedWork::All };

fn read(path: &Path, key: &Key) -> Result<Vec<Record>> {
    let checked = check(path, key, &ALL, &mut |_| {})?;
    let mut taken = Taken::default();
    restore::restore(path, key, &ALL, &checked, &mut taken, &mut |_| {})?;
    Ok(taken.0)
}

fn identity() -> Key {
    Key::Identities(vec![Identity::generate()])
}

fn records() -> Vec<Record> {
    let mut queued = record();
    queued.facts.status = Status::Queued;
    queued.output = None;
    let mut judged = sample();
    let said = |score| Feedback { at: Timestamp::now(), score, label: Some("good".into()), comment: None };
    // A number that a quick reader of text gets wrong in its last bit.
    judged.facts.feedback = vec![said(Some(0.1 + 0.2)), said(Some(f64::MIN_POSITIVE / 3.0)), said(None)];
    let mut json = record();
    json.output = Some(StoredOutput::Json(serde_json::json!({"label": ["a", 1]})));
    let mut tensors = record();
    let spec = StoredTensor { name: "y".into(), shape: vec![2], is_whole: false };
    let rows = vec![vec![0.1, f32::MIN_POSITIVE / 2.0]];
    tensors.output = Some(StoredOutput::Tensors(Arc::new(StoredTensors { tensors: vec![spec], rows })));
    vec![record(), queued, judged, json, tensors, sample()]
}

#[test]
fn what_was_written_comes_back_bit_for_bit_plain_and_encrypted() {
    let records = records();
    for key in [Key::None, identity()] {
        let dir = folder();
        let path = backup(&records, dir.path(), &key);
        assert_eq!(bytes_of(&read(&path, &key).unwrap()), bytes_of(&records));
        let checked = check(&path, &key, &ALL, &mut |_| {}).unwrap();
        assert_eq!((checked.num_records, checked.header.store.as_str()), (6, "embedded"));
        let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["a.backup"], "nothing is left beside it");
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o077, 0, "only its owner reads it");
    }
}

#[test]
fn an_empty_store_has_a_backup_too() {
    let dir = folder();
    assert_eq!(read(&backup(&[], dir.path(), &Key::None), &Key::None).unwrap(), []);
}

#[test]
fn a_file_that_is_there_is_not_written_over() {
    let dir = folder();
    let path = backup(&records(), dir.path(), &Key::None);
    let before = std::fs::read(&path).unwrap();
    let refused = write(Vec::new(), &path, &Lock::Open, OnDamage::Fail);
    assert!(matches!(&refused, Err(Error::Conflict { field, .. }) if field == "--out"), "{refused:?}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
    let nowhere = write(Vec::new(), &dir.path().join("none/a.backup"), &Lock::Open, OnDamage::Fail);
    assert!(matches!(nowhere, Err(Error::Backup { .. })), "{nowhere:?}");
}

#[test]
fn a_record_that_cannot_be_read_ends_the_backup_or_is_told_of() {
    let dir = folder();
    let out = dir.path().join("a.backup");
    let found = || {
        let broken = Unreadable { name: "inf_broken".into(), cause: Error::Internal { cause: "no JSON".into() } };
        vec![Ok(record()), Err(broken), Ok(record())]
    };
    let failed = write(found(), &out, &Lock::Open, OnDamage::Fail).unwrap_err().to_string();
    assert!(failed.contains("inf_broken") && failed.contains("no JSON"), "{failed}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing half is left");
    let written = write(found(), &out, &Lock::Open, OnDamage::LeaveOut).unwrap();
    assert_eq!((written.num_records, written.footer.num_damaged), (2, 1));
    assert_eq!(check(&out, &Key::None, &ALL, &mut |_| {}).unwrap().footer.num_damaged, 1);
}

#[test]
fn only_the_right_key_opens_it() {
    let dir = folder();
    let key = identity();
    let path = backup(&records(), dir.path(), &key);
    for (wrong, word) in [(identity(), "does not open"), (Key::None, "encrypted")] {
        match read(&path, &wrong) {
            Err(Error::Backup { reason, .. }) => assert!(reason.contains(word), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn every_cut_is_refused() {
    let dir = folder();
    for key in [Key::None, identity()] {
        let path = dir.path().join("cut.backup");
        let whole_path = backup(&records(), dir.path(), &key);
        let whole = std::fs::read(&whole_path).unwrap();
        for len in (0..whole.len()).step_by(7).chain([whole.len() - 1]) {
            std::fs::write(&path, &whole[..len]).unwrap();
            assert!(matches!(read(&path, &key), Err(Error::Backup { .. })), "{len} of {}", whole.len());
        }
        std::fs::write(&path, [&whole[..], &[0]].concat()).unwrap();
        assert!(matches!(read(&path, &key), Err(Error::Backup { .. })), "one more");
        std::fs::remove_file(whole_path).unwrap();
    }
}

#[test]
fn every_flipped_byte_of_a_plain_backup_is_refused() {
    let dir = folder();
    let path = backup(&records()[..2], dir.path(), &Key::None);
    let whole = std::fs::read(&path).unwrap();
    for at in 0..whole.len() {
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << (at % 8);
        std::fs::write(&path, &flipped).unwrap();
        assert!(matches!(check(&path, &Key::None, &ALL, &mut |_| {}), Err(Error::Backup { .. })), "byte {at}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_changed_byte_passes(at: proptest::sample::Index, change in 1u8.., is_encrypted: bool) {
        let dir = folder();
        let key = if is_encrypted { identity() } else { Key::None };
        let path = backup(&records(), dir.path(), &key);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        std::fs::write(&path, &bytes).unwrap();
        let read = check(&path, &key, &ALL, &mut |_| {});
        prop_assert!(matches!(read, Err(Error::Backup { .. })), "byte {} of {}: {:?}", at, bytes.len(), read);
    }
}

#[test]
fn a_file_that_changes_between_check_and_restore_is_noticed() {
    let dir = folder();
    let path = backup(&records(), dir.path(), &Key::None);
    let checked = check(&path, &Key::None, &ALL, &mut |_| {}).unwrap();
    std::fs::remove_file(&path).unwrap();
    backup(&records(), dir.path(), &Key::None);
    let other = restore::restore(&path, &Key::None, &ALL, &checked, &mut Taken::default(), &mut |_| {});
    assert!(matches!(other, Err(Error::Backup { reason, .. }) if reason.contains("changed")));
}

#[test]
fn nothing_is_written_of_a_backup_with_a_changed_byte() {
    let (dir, from, to) = (folder(), folder(), folder());
    fill(from.path(), &records());
    let path = dir.path().join("a.backup");
    succeeds(from.path(), &[], &["backup", "--out", text(&path)]);
    let whole = std::fs::read(&path).unwrap();
    let target = to.path().join("store");
    for at in [0, whole.len() / 2, whole.len() - 1] {
        let mut flipped = whole.clone();
        flipped[at] ^= 0x10;
        std::fs::write(&path, &flipped).unwrap();
        let refused = eremois(&target, &[], &["restore", text(&path)]);
        assert_eq!((refused.code, refused.stdout.as_str()), (1, ""), "{}", refused.stderr);
        assert!(refused.stderr.starts_with("eremois: ") && refused.stderr.contains("a.backup"), "{}", refused.stderr);
        assert!(!target.exists(), "byte {at}");
    }
    std::fs::write(&path, &whole).unwrap();
    succeeds(&target, &[], &["restore", text(&path)]);
    assert_eq!(all_of(&target), all_of(from.path()));
}

#[test]
fn passphrases_and_recipients_by_command() {
    let (dir, from) = (folder(), folder());
    fill(from.path(), &records());
    let file = |name: &str, content: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let secret = Identity::generate();
    let passphrase = file("passphrase", "correct horse\n");
    let wrong = file("wrong", "wrong horse\n");
    let identity = file("identity", &format!("# a comment\n{}\n", secret.to_string().expose_secret()));
    let stranger = file("stranger", Identity::generate().to_string().expose_secret());
    let (by_phrase, by_key) = (dir.path().join("phrase.backup"), dir.path().join("key.backup"));
    succeeds(from.path(), &[], &["backup", "--out", text(&by_phrase), "--key-file", text(&passphrase)]);
    let recipient = secret.to_public().to_string();
    let made = succeeds(from.path(), &[], &["backup", "--out", text(&by_key), "--recipient", &recipient]);
    assert!(!made.stdout.contains("not encrypted"), "{}", made.stdout);

    for (path, option, wrong, right) in
        [(&by_phrase, "--key-file", &wrong, &passphrase), (&by_key, "--identity", &stranger, &identity)]
    {
        let to = folder();
        let target = to.path().join("store");
        let refused = eremois(&target, &[], &["restore", text(path), option, text(wrong)]);
        assert_eq!(refused.code, 1);
        assert!(refused.stderr.contains("this key does not open it") && !target.exists(), "{}", refused.stderr);
        succeeds(&target, &[], &["restore", text(path), option, text(right)]);
        assert_eq!(all_of(&target), all_of(from.path()));
    }
    let both = ["backup", "--out", "x", "--key-file", text(&passphrase), "--recipient", &recipient];
    assert_eq!(eremois(from.path(), &[], &both).code, 2);
    let bad = eremois(from.path(), &[], &["backup", "--out", "x", "--recipient", "age1nobody"]);
    assert!(bad.code == 1 && bad.stderr.contains("--recipient"), "{}", bad.stderr);
}

/// A record made this many milliseconds after 2020 began.
fn made_at(ms: i64) -> Record {
    let at = Timestamp::from_str("2020-01-01T00:00:00Z").unwrap() + SignedDuration::from_millis(ms);
    let mut record = sample();
    record.id = InferenceId::first_at(at);
    record.facts.idempotency_key = None;
    record.facts.completed_at = None;
    record
}

#[test]
fn until_leaves_out_what_came_later() {
    let time = |ms: i64| made_at(ms).id.created_at();
    let ended = |ms, completed| {
        let mut record = made_at(ms);
        record.facts.completed_at = Some(time(completed));
        record
    };
    let mut judged = ended(2, 5);
    let said = |ms| Feedback { at: time(ms), score: Some(1.0), label: None, comment: None };
    judged.facts.feedback = vec![said(9), said(10), said(11)];
    let mut waiting = made_at(3);
    waiting.facts.status = Status::Queued;
    waiting.output = None;
    // In time, on the millisecond; judged later; unfinished; ended later; made later.
    let records = vec![ended(1, 10), judged.clone(), waiting.clone(), ended(4, 11), ended(11, 12)];
    let (from, dir, to) = (folder(), folder(), folder());
    fill(from.path(), &records);
    let path = dir.path().join("a.backup");
    succeeds(from.path(), &[], &["backup", "--out", text(&path)]);
    let until = time(10).to_string();
    let dry = succeeds(to.path(), &[], &["restore", text(&path), "--until", &until, "--dry-run"]);
    assert!(dry.stdout.contains("3 records would be written"), "{}", dry.stdout);
    assert_eq!(std::fs::read_dir(to.path()).unwrap().count(), 0, "a dry run writes nothing");
    let told = succeeds(to.path(), &[], &["restore", text(&path), "--until", &until]);
    assert_eq!(told.number_before(" records were made later"), 1);
    assert_eq!(told.number_before(" were made before and ended later"), 1);
    assert_eq!(told.number_before(" are without feedback"), 1);
    judged.facts.feedback.truncate(2);
    assert_eq!(all_of(to.path()), bytes_of(&[records[0].clone(), judged, waiting]));
    assert_eq!(eremois(to.path(), &[], &["restore", text(&path), "--until", "yesterday"]).code, 2);
}

#[test]
fn a_store_with_records_takes_more_only_when_told_to() {
    let (from, dir, to) = (folder(), folder(), folder());
    let mut shared = sample();
    let said = |score| Feedback { at: Timestamp::now(), score: Some(score), label: None, comment: None };
    let (theirs, ours) = (said(0.5), said(-0.5));
    shared.facts.feedback = vec![theirs.clone()];
    let mut unfinished = record();
    unfinished.facts.status = Status::Running;
    unfinished.output = None;
    let mut finished = unfinished.clone();
    finished.facts.status = Status::Succeeded;
    finished.output = record().output;
    let (alone, own) = (record(), record());
    fill(from.path(), &[shared.clone(), unfinished, alone.clone()]);
    shared.facts.feedback = vec![ours.clone()];
    fill(to.path(), &[shared.clone(), finished.clone(), own.clone()]);
    let path = dir.path().join("a.backup");
    succeeds(from.path(), &[], &["backup", "--out", text(&path)]);
    let before = all_of(to.path());
    let refused = eremois(to.path(), &[], &["restore", text(&path)]);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("3 records") && refused.stderr.contains("--merge"), "{}", refused.stderr);
    assert_eq!(all_of(to.path()), before);
    // Once and again: it ends in the same state.
    for _ in 0..2 {
        succeeds(to.path(), &[], &["restore", text(&path), "--merge"]);
        shared.facts.feedback = vec![ours.clone(), theirs.clone()];
        let mut expected = vec![shared.clone(), finished.clone(), alone.clone(), own.clone()];
        expected.sort_by_key(|record| record.id);
        assert_eq!(all_of(to.path()), bytes_of(&expected));
    }
}
