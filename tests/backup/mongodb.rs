//! The same with MongoDB, and from one store into the other.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use eremois::Error;
use eremois::store::Records;
use eremois::store::backup::Consistency;
use eremois::store::backup::merged::{Item, Merged};
use eremois::store::journal::disk::Folder;
use eremois::store::journal::{Entry, Journal, Options};
use eremois::store::mongo::{MongoSettings, MongoStore};
use eremois::store::place::Place;
use eremois::store::record::{Feedback, InferenceId, Record, Status, StoredOutput};
use mongodb::bson;

use super::{all_of, bytes_of, entries, eremois, fill, folder, runtime, succeeds, text};
use crate::common::records::{record, sample};
use crate::common::servers::mongodb::MongoDb;

fn settings(url: &str) -> MongoSettings {
    MongoSettings { url: url.to_string(), pool_size: 4, replica_set: None, retention: Duration::ZERO }
}

/// Writes records into the database.
fn put(url: &str, records: &[Record]) {
    runtime().block_on(async { MongoStore::new(settings(url)).unwrap().put(records).await }).expect("written");
}

/// The canonical bytes of all records of the database, with what the journal in this folder holds.
fn read(url: &str, journal: &Path) -> Vec<Vec<u8>> {
    let place = Place::Mongo { settings: settings(url), journal: journal.to_path_buf() };
    let runtime = runtime();
    entries(place.read(runtime.handle()).expect("it can be read"))
}

fn url_setting(url: &str) -> String {
    format!("database.url={url}")
}

/// More records than a page has, one of them beyond what fits a document.
fn records() -> Vec<Record> {
    let mut records: Vec<Record> = (0..700).map(|n| if n % 2 == 0 { sample() } else { record() }).collect();
    let row: Vec<f32> = (0..384).map(|i| if i % 2 == 0 { -0.0 } else { i as f32 / 7.0 }).collect();
    let rows = vec![row; 9000];
    records[300].output = Some(StoredOutput::Embeddings(Arc::new(rows)));
    let said = |score| Feedback { at: eremois::store::record::now(), score: Some(score), label: None, comment: None };
    records[301].facts.feedback = vec![said(0.1 + 0.2), said(-1.0)];
    records[302].facts.status = Status::Queued;
    records[302].output = None;
    records
}

#[test]
fn from_one_store_into_the_other_and_back_nothing_changes() {
    let Some(mongo) = MongoDb::start() else { return };
    let (url, records) = (mongo.url(), records());
    let setting = url_setting(&url);
    let (from, dir, nowhere, back) = (folder(), folder(), folder(), folder());
    fill(from.path(), &records);
    let (first, second) = (dir.path().join("first.backup"), dir.path().join("second.backup"));
    let made = succeeds(from.path(), &[], &["backup", "--out", text(&first)]);
    succeeds(nowhere.path(), &[&setting], &["restore", text(&first)]);
    assert_eq!(read(&url, nowhere.path()), bytes_of(&records));

    let again = succeeds(nowhere.path(), &[&setting], &["backup", "--out", text(&second)]);
    assert_eq!(again.number_before(" records of MongoDB"), records.len() as u64);
    assert_eq!(again.after("checksum "), made.after("checksum "), "equal contents have equal checksums");
    succeeds(back.path(), &[], &["restore", text(&second)]);
    assert_eq!(all_of(back.path()), bytes_of(&records));
    // Each of both backups is true of both stores.
    for path in [&first, &second] {
        succeeds(nowhere.path(), &[&setting], &["verify", "--backup", text(path)]);
        succeeds(back.path(), &[], &["verify", "--backup", text(path)]);
    }
    let full = eremois(nowhere.path(), &[&setting], &["restore", text(&first)]);
    assert!(full.code == 1 && full.stderr.contains("--merge"), "{}", full.stderr);
    succeeds(nowhere.path(), &[&setting], &["restore", text(&first), "--merge"]);
    assert_eq!(read(&url, nowhere.path()), bytes_of(&records));
}

/// A journal in use, with these entries.
fn journal(folder: &Path, entries: Vec<Entry>) -> Journal {
    let disk = Box::new(Folder::open(folder).unwrap());
    let (journal, _) = Journal::open(disk, Options::of(1 << 20)).unwrap();
    let receipt = journal.append(entries, None).unwrap();
    runtime().block_on(receipt).unwrap();
    journal
}

#[test]
fn what_waits_in_the_journal_is_in_the_backup() {
    let Some(mongo) = MongoDb::start() else { return };
    let (url, data, dir, to) = (mongo.url(), folder(), folder(), folder());
    let setting = url_setting(&url);
    let mut queued = record();
    queued.facts.status = Status::Queued;
    queued.output = None;
    let mut done = queued.clone();
    done.facts.status = Status::Succeeded;
    done.output = record().output;
    let mut erased = record();
    erased.facts.user = Some("erased".into());
    let (kept, deleted, replayed) = (sample(), record(), record());
    let mut judged = kept.clone();
    let said = Feedback { at: eremois::store::record::now(), score: Some(1.0), label: None, comment: None };
    judged.facts.feedback.push(said.clone());
    let new = sample();
    put(&url, &[queued.clone(), erased.clone(), kept.clone(), deleted.clone(), replayed.clone()]);
    let waiting = vec![
        Entry::put(&replayed).unwrap(),
        Entry::put(&done).unwrap(),
        Entry::put(&new).unwrap(),
        Entry::feedback(kept.id, &said).unwrap(),
        Entry::delete(deleted.id),
        Entry::erase("erased").unwrap(),
    ];
    // Held: a server has it open.
    let _journal = journal(&data.path().join("journal"), waiting);
    let mut expected = vec![replayed, done, judged, new];
    expected.sort_by_key(|record| record.id);

    let path = dir.path().join("a.backup");
    let made = succeeds(data.path(), &[&setting], &["backup", "--out", text(&path)]);
    assert_eq!(made.number_before(" of them come from the journal"), 4);
    succeeds(to.path(), &[], &["restore", text(&path)]);
    assert_eq!(all_of(to.path()), bytes_of(&expected));

    let checked = succeeds(data.path(), &[&setting], &["verify", "--backup", text(&path)]);
    assert_eq!(checked.number_before(" are in the store"), 1, "{}", checked.stdout);
    assert_eq!(checked.number_before(" wait to be replayed"), 5, "{}", checked.stdout);
    assert_eq!(checked.number_before(" the same"), 4);
    // Of the store alone.
    assert_eq!(checked.number_before(" records can be read"), 5);
}

#[test]
fn where_history_ends_the_rest_is_read_as_of_now() {
    // A server of our own: what is made to fail is so for all of its clients.
    let Some(mongo) = MongoDb::own() else { return };
    let (url, data) = (mongo.url(), folder());
    let records: Vec<Record> = (0..700).map(|_| record()).collect();
    put(&url, &records[..600]);
    let fail = |code: i32, times: i32| {
        let admin = mongo.url_of("admin");
        runtime().block_on(async move {
            let admin = mongodb::Client::with_uri_str(&admin).await.unwrap().default_database().unwrap();
            let data = bson::doc! { "failCommands": ["find"], "errorCode": code };
            let command = bson::doc! { "configureFailPoint": "failCommand", "mode": { "times": times }, "data": data };
            admin.run_command(command).await.unwrap();
        });
    };
    let place = Place::Mongo { settings: settings(&url), journal: data.path().join("journal") };
    let runtime = runtime();
    let mut from = place.read(runtime.handle()).unwrap();
    assert_eq!(from.consistency(), Consistency::Snapshot);
    let mut ids: Vec<InferenceId> = (0..300).map(|_| next_id(&mut from)).collect();
    // What comes to be now was not there at the start: all that was is what is promised.
    put(&url, &records[600..]);
    fail(239, 1);
    ids.extend((300..600).map(|_| next_id(&mut from)));
    assert_eq!(ids, records[..600].iter().map(|record| record.id).collect::<Vec<_>>());
    assert!(from.next_item().unwrap().is_none());
    assert_eq!(from.consistency(), Consistency::Ranges);
    // A primary that steps down, three times over, is waited for.
    let mut from = place.read(runtime.handle()).unwrap();
    fail(189, 2);
    let ids: Vec<InferenceId> = (0..700).map(|_| next_id(&mut from)).collect();
    assert_eq!(ids.len(), 700);
    // Nobody is waited for without end.
    let mut from = place.read(runtime.handle()).unwrap();
    fail(189, 100);
    assert!(matches!(from.next_item(), Err(Error::StoreUnavailable { .. })));
    fail(189, 0);
}

fn next_id(from: &mut Merged) -> InferenceId {
    match from.next_item().expect("it can be read") {
        Some(Item::Both(both)) => both.id,
        other => panic!("{other:?}"),
    }
}

#[test]
fn verify_finds_what_is_wrong_with_the_journal() {
    let Some(mongo) = MongoDb::start() else { return };
    let (url, data) = (mongo.url(), folder());
    let setting = url_setting(&url);
    let original = sample();
    put(&url, std::slice::from_ref(&original));
    let mut other = original.clone();
    other.output = Some(StoredOutput::Embeddings(Arc::new(vec![vec![9.0]])));
    let folder = data.path().join("journal");
    let entries = vec![Entry::put(&other).unwrap(), Entry::put(&record()).unwrap(), Entry::put(&record()).unwrap()];
    drop(journal(&folder, entries));
    let faults = || {
        let found = eremois(data.path(), &[&setting], &["verify"]);
        assert_eq!(found.code, 1, "{} {}", found.stdout, found.stderr);
        let lines = found.stdout.lines().skip_while(|line| !line.contains("faults:")).skip(1);
        lines.take_while(|line| line.starts_with("  ")).map(str::to_string).collect::<Vec<_>>()
    };
    let found = faults();
    assert!(found.len() == 1 && found[0].contains("in the journal and another in the store"), "{found:?}");

    let segment = folder.join("00000000000000000001.segment");
    let mut bytes = std::fs::read(&segment).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    std::fs::write(folder.join("00000000000000000000.refused"), "a record").unwrap();
    let found = faults();
    assert!(found.iter().any(|line| line.contains("damage before whole entries")), "{found:?}");
    assert!(found.iter().any(|line| line.contains(".refused was kept aside")), "{found:?}");
}

#[test]
fn verify_finds_each_damaged_document() {
    let Some(mongo) = MongoDb::start() else { return };
    let (url, data, dir) = (mongo.url(), folder(), folder());
    let setting = url_setting(&url);
    let records = records();
    put(&url, &records);
    let path = dir.path().join("a.backup");
    succeeds(data.path(), &[&setting], &["backup", "--out", text(&path)]);
    let id = |record: &Record| bson::Uuid::from_bytes(record.id.0.into_bytes());
    let update = |record: &Record, set: bson::Document| {
        let (url, id) = (url.clone(), id(record));
        runtime().block_on(async move {
            let database = mongodb::Client::with_uri_str(&url).await.unwrap().default_database().unwrap();
            let command = bson::doc! {
                "update": "inferences",
                "bypassDocumentValidation": true,
                "updates": [{ "q": { "_id": id }, "u": { "$set": set } }],
            };
            let reply = database.run_command(command).await.unwrap();
            assert_eq!(reply.get_i32("n").ok(), Some(1), "{reply}");
        });
    };
    update(&records[10], bson::doc! { "output": { "json": "{" } });
    update(&records[20], bson::doc! { "timings": "soon" });
    let deleted = records[300].id;
    runtime().block_on(async {
        let database = mongodb::Client::with_uri_str(&url).await.unwrap().default_database().unwrap();
        database.collection::<bson::Document>("outputs").delete_one(bson::doc! {}).await.unwrap();
        database
            .collection::<bson::Document>("inferences")
            .delete_one(bson::doc! { "_id": id(&records[30]) })
            .await
            .unwrap();
    });
    let found = eremois(data.path(), &[&setting], &["verify", "--backup", text(&path)]);
    assert_eq!((found.code, found.number_before(" faults:")), (1, 3), "{} {}", found.stdout, found.stderr);
    assert_eq!(found.number_before(" are not there:"), 1, "{}", found.stdout);
    for (id, word) in
        [(records[10].id, "output"), (records[20].id, "Timings"), (deleted, "chunks"), (records[30].id, "inf_")]
    {
        let id: InferenceId = id;
        let told = found
            .stdout
            .lines()
            .find(|line| line.contains(&id.to_string()))
            .unwrap_or_else(|| panic!("{id}: {}", found.stdout));
        assert!(told.contains(word), "{told}");
    }
}

#[test]
fn migrate_prepares_a_database_and_says_how() {
    let Some(mongo) = MongoDb::start() else { return };
    let (url, data) = (mongo.url(), folder());
    let setting = url_setting(&url);
    let check = || eremois(data.path(), &[&setting], &["migrate", "--check"]);
    let unread = eremois(data.path(), &[&setting], &["verify"]);
    assert!(unread.code == 1 && unread.stderr.contains("eremois migrate"), "{}", unread.stderr);
    let first = check();
    assert_eq!(first.code, 1, "{}", first.stderr);
    assert!(first.stdout.contains("to do: collection `inferences` created"), "{}", first.stdout);
    let again = check();
    assert_eq!((again.code, again.stdout), (1, first.stdout), "a look changes nothing");
    let made = succeeds(data.path(), &[&setting], &["migrate"]);
    assert!(made.stdout.contains("index `user` of `inferences` created"), "{}", made.stdout);
    let done = check();
    assert!(done.code == 0 && done.stdout.contains("MongoDB is as it must be"), "{} {}", done.stdout, done.stderr);
    let retained = eremois(data.path(), &[&setting, "database.retention=1h"], &["migrate", "--check"]);
    assert!(retained.code == 1 && retained.stdout.contains("retention"), "{}", retained.stdout);
    assert!(!data.path().join("journal").exists());
}

#[test]
fn a_database_that_is_away_is_told_within_a_bounded_time() {
    let (data, dir) = (folder(), folder());
    let address = crate::common::process::free_address();
    let setting = url_setting(&format!("mongodb://user:s3cret@{address}/a"));
    let out = dir.path().join("a.backup");
    for arguments in [&["backup", "--out", text(&out)][..], &["verify"], &["migrate", "--check"]] {
        let failed = eremois(data.path(), &[&setting], arguments);
        assert_eq!(failed.code, 1);
        assert!(failed.stderr.contains("not available") && !failed.stderr.contains("s3cret"), "{}", failed.stderr);
    }
    assert!(!out.exists());
}
