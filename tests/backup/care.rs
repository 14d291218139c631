//! What verify and migrate find in an embedded store.

use std::path::Path;

use eremois::store::Records;
use eremois::store::embedded::Embedded;
use eremois::store::record::{Feedback, Record};

use super::{all_of, eremois, fill, folder, runtime, succeeds, text};
use crate::common::records::{record, sample};

fn sql(store: &Path, statements: &str) {
    let conn = rusqlite::Connection::open(store.join("eremois.db")).expect("a store");
    conn.execute_batch(statements).expect("carried out");
}

/// A store of some records, and its backup.
fn store(dir: &Path) -> (Vec<Record>, std::path::PathBuf, std::path::PathBuf) {
    let records: Vec<Record> = (0..600).map(|n| if n % 3 == 0 { sample() } else { record() }).collect();
    let (store, path) = (dir.join("store"), dir.join("a.backup"));
    fill(&store, &records);
    succeeds(&store, &[], &["backup", "--out", text(&path)]);
    (records, store, path)
}

#[test]
fn a_sound_store_is_sound_and_its_checksum_is_its_backups() {
    let dir = folder();
    let (records, store, path) = store(dir.path());
    let made = succeeds(&store, &[], &["restore", text(&path), "--dry-run"]);
    let checked = succeeds(&store, &[], &["verify"]);
    assert_eq!(checked.number_before(" records can be read"), records.len() as u64);
    assert_eq!(checked.after("checksum "), made.after("checksum "));
    assert!(checked.stdout.ends_with("sound\n") && !checked.stdout.contains("NOT"), "{}", checked.stdout);
    // Elsewhere too, in another order of writing.
    let other = dir.path().join("other");
    let backwards: Vec<Record> = records.iter().rev().cloned().collect();
    fill(&other, &backwards);
    assert_eq!(
        succeeds(&other, &[], &["verify", "--backup", text(&path)]).after("checksum "),
        checked.after("checksum ")
    );
}

#[test]
fn verify_finds_each_damaged_record() {
    for (damage, word) in [
        ("DROP INDEX by_numbers; UPDATE inferences SET facts = '{' WHERE seq = 5", "facts"),
        ("UPDATE inferences SET facts = json_remove(facts, '$.model') WHERE seq = 5", "model"),
        ("UPDATE outputs SET rows = x'00' WHERE seq = 5", "rows"),
        ("UPDATE outputs SET row_lens = '[1e9]' WHERE seq = 5", "row_lens"),
        ("DELETE FROM outputs WHERE seq = 5", "has no output"),
        ("INSERT INTO feedback (seq, idx, at) VALUES (5, 0, 'then')", "feedback"),
        ("UPDATE inferences SET status = 'failed' WHERE seq = 5", "columns"),
        ("UPDATE inferences SET user = 'another' WHERE seq = 5", "columns"),
        ("DELETE FROM metadata WHERE seq = 4", "metadata"),
        ("INSERT INTO metadata VALUES ('k', 'v', x'00', 9999)", "metadata"),
        ("INSERT INTO outputs VALUES (9999, '[]', x'', NULL)", "without its record"),
        ("INSERT INTO feedback (seq, idx, at) VALUES (9999, 0, 'then')", "without its record"),
    ] {
        let dir = folder();
        let (_, store, _) = store(dir.path());
        sql(&store, damage);
        let found = eremois(&store, &[], &["verify"]);
        assert_eq!(found.code, 1, "{damage}: {} {}", found.stdout, found.stderr);
        assert_eq!(found.number_before(" faults:"), 1, "{damage}: {}", found.stdout);
        let fault = found.stdout.lines().skip_while(|line| !line.contains("faults:")).nth(1).expect("a fault");
        assert!(fault.contains(word), "{damage}: {fault}");
    }
}

#[test]
fn verify_compares_with_a_backup() {
    let dir = folder();
    let (records, store, path) = store(dir.path());
    let verify = |arguments: &[&str]| eremois(&store, &[], &[&["verify", "--backup", text(&path)], arguments].concat());
    // Judged and added since: nothing is wrong with that.
    {
        let store = Embedded::open(&store).unwrap();
        let said = Feedback { at: eremois::store::record::now(), score: Some(1.0), label: None, comment: None };
        runtime().block_on(store.add_feedback(&records[7].id, &said)).unwrap();
        runtime().block_on(store.put(&[record()])).unwrap();
    }
    let changed = verify(&[]);
    assert_eq!((changed.code, changed.number_before(" in a later state")), (0, 1), "{}", changed.stdout);
    assert_eq!(changed.number_before(" the same"), records.len() as u64 - 1);
    // Deleted, or lost: nobody but who asks can know.
    runtime().block_on(Embedded::open(&store).unwrap().delete(&records[0].id)).unwrap();
    let missing = verify(&[]);
    assert_eq!((missing.code, missing.number_before(" are not there:")), (1, 1), "{}", missing.stdout);
    assert!(missing.stdout.contains(&records[0].id.to_string()), "{}", missing.stdout);
    assert_eq!(verify(&["--allow-missing"]).code, 0);
    // Of those that are too old nobody expects anything.
    let expired = eremois(&store, &["database.retention=1ms"], &["verify", "--backup", text(&path)]);
    assert_eq!((expired.code, expired.number_before(" have expired")), (0, 1), "{}", expired.stdout);
    // One bit of an output, which the store itself has no means to see.
    sql(&store, "UPDATE outputs SET rows = CAST(x'010080bf' || substr(rows, 5) AS BLOB) WHERE seq = 5");
    assert_eq!(eremois(&store, &[], &["verify"]).code, 0);
    let different = verify(&["--allow-missing"]);
    assert_eq!(different.code, 1);
    assert!(different.stdout.contains("in the backup and another in the store"), "{}", different.stdout);
    // A row that cannot be read is that, and not missing as well.
    sql(&store, "DROP INDEX by_numbers; UPDATE inferences SET facts = '{' WHERE seq = 5");
    let unreadable = verify(&["--allow-missing"]);
    assert_eq!((unreadable.code, unreadable.number_before(" faults:")), (1, 1), "{}", unreadable.stdout);
    assert_eq!(unreadable.number_before(" are not there:"), 1);
}

#[test]
fn a_backup_names_a_damaged_record_or_leaves_it_out() {
    let dir = folder();
    let (records, store, _) = store(dir.path());
    sql(&store, "DROP INDEX by_numbers; UPDATE inferences SET facts = '{' WHERE seq = 5");
    let out = dir.path().join("b.backup");
    let failed = eremois(&store, &[], &["backup", "--out", text(&out)]);
    assert!(failed.code == 1 && !out.exists(), "{}", failed.stdout);
    assert!(failed.stderr.contains("inf_") && failed.stderr.contains("cannot be read"), "{}", failed.stderr);
    let made = succeeds(&store, &[], &["backup", "--out", text(&out), "--skip-damaged"]);
    assert_eq!(made.number_before(" records of the embedded store"), records.len() as u64 - 1);
    assert_eq!(made.number_before(" could not be read"), 1);
}

#[test]
fn reading_needs_a_store_and_makes_none() {
    let dir = folder();
    let (store, out) = (dir.path().join("store"), dir.path().join("a.backup"));
    for arguments in [&["backup", "--out", text(&out)][..], &["verify"]] {
        let refused = eremois(&store, &[], arguments);
        assert_eq!(refused.code, 1);
        assert!(refused.stderr.contains("there is no store"), "{}", refused.stderr);
        assert!(!store.exists() && !out.exists());
    }
}

#[test]
fn migrate_says_what_there_is_to_do_and_does_it() {
    let dir = folder();
    let store = dir.path().join("store");
    let check = || eremois(&store, &[], &["migrate", "--check"]);
    let first = check();
    assert!(first.code == 1 && first.stdout.contains("to do: store made in"), "{}", first.stdout);
    assert!(!store.exists(), "a look makes nothing");
    let made = succeeds(&store, &[], &["migrate"]);
    assert!(made.stdout.contains("schema taken from version 0 to 1"), "{}", made.stdout);
    assert!(made.stdout.contains("index `by_user` created"), "{}", made.stdout);
    assert_eq!(check().code, 0);
    assert!(succeeds(&store, &[], &["migrate"]).stdout.contains("is as it must be"));

    fill(&store, &[sample()]);
    let before = all_of(&store);
    sql(&store, "DROP INDEX by_user");
    let missing = check();
    assert_eq!((missing.code, missing.stdout.lines().next()), (1, Some("to do: index `by_user` created")));
    assert_eq!(check().code, 1, "a look mends nothing");
    // Slower without it, and as right.
    assert_eq!(all_of(&store), before);
    succeeds(&store, &[], &["migrate"]);
    assert_eq!(check().code, 0);
    assert_eq!(all_of(&store), before);

    sql(&store, "PRAGMA user_version = 99");
    for arguments in [&["migrate", "--check"][..], &["migrate"], &["verify"]] {
        let newer = eremois(&store, &[], arguments);
        assert!(newer.code == 1 && newer.stderr.contains("99"), "{}", newer.stderr);
    }
    sql(&store, "PRAGMA user_version = 0");
    let older = eremois(&store, &[], &["verify"]);
    assert!(older.code == 1 && older.stderr.contains("eremois migrate"), "{}", older.stderr);
}
