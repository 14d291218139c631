//! What is special about the store in MongoDB, on a real server of its wire protocol. What it has in common with the other
//! stores is in the suite of all.

#[allow(dead_code)]
mod common {
    pub mod process;
    pub mod servers;
}

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use eremois::store::mongo::{MongoSettings, MongoStore};
use eremois::store::numbers::{Dimension, QualityQuery, UsageQuery};
use eremois::store::query::Query;
use eremois::store::record::{Facts, InferenceId, Record, Status, StoredInput, StoredOutput, now};
use eremois::store::{Inserted, Records};
use eremois::{Error, Result};
use futures::TryStreamExt;
use futures::future::join_all;
use jiff::Timestamp;
use mongodb::bson::{DateTime, Document, doc};
use mongodb::options::IndexOptions;
use mongodb::{Client, Database, IndexModel};
use parking_lot::Mutex;

use common::servers::certificates::Certificates;
use common::servers::mongodb::MongoDb;

/// More than any call may take, and less than it would take to hang.
const BOUND: Duration = Duration::from_secs(15);

fn settings(url: &str) -> MongoSettings {
    MongoSettings { url: url.to_string(), pool_size: 16, replica_set: None, retention: Duration::ZERO }
}

fn store(url: &str) -> MongoStore {
    MongoStore::new(settings(url)).unwrap()
}

/// A store whose database is prepared, which may take longer than a call on a busy machine.
async fn prepared(url: &str) -> MongoStore {
    let store = store(url);
    store.migrate().await.unwrap();
    store
}

fn kept_for(url: &str, retention: Duration) -> MongoStore {
    MongoStore::new(MongoSettings { retention, ..settings(url) }).unwrap()
}

/// The database of a url, as an administrator sees it.
async fn raw(url: &str) -> Database {
    Client::with_uri_str(url).await.unwrap().default_database().unwrap()
}

/// A record that has succeeded, with rows of this many values.
fn record(row_lens: &[usize]) -> Record {
    let row = |len: usize| (0..len).map(|i| (i as f32).sin()).collect();
    let facts = Facts {
        completed_at: Some(now()),
        user: Some("u".into()),
        metadata: BTreeMap::from([("k".to_string(), "v".to_string())]),
        input: StoredInput::Full(serde_json::json!(["a text"])),
        ..Facts::new(Status::Succeeded, "m", "1", "embed", "application")
    };
    let rows = row_lens.iter().map(|len| row(*len)).collect();
    Record { id: InferenceId::new(), facts, output: Some(StoredOutput::Embeddings(Arc::new(rows))) }
}

fn is_unavailable<T: std::fmt::Debug>(result: &Result<T>) -> bool {
    matches!(result, Err(Error::StoreUnavailable { .. }))
}

/// An operation that must end in time, however it ends.
async fn bounded<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(BOUND, work).await.expect("no call of a store hangs")
}

/// Tries until the store answers again.
async fn wait_until_back(store: &MongoStore) {
    let start = Instant::now();
    while let Err(error) = bounded(store.ping()).await {
        assert!(start.elapsed() < Duration::from_secs(60), "{error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn index_names(database: &Database, collection: &str) -> BTreeSet<String> {
    let indexes = database.collection::<Document>(collection).list_indexes().await.unwrap();
    let indexes: Vec<IndexModel> = indexes.try_collect().await.unwrap();
    indexes.into_iter().map(|index| index.options.unwrap().name.unwrap()).collect()
}

/// Seconds after which each collection expires.
async fn expiries(database: &Database) -> Vec<Option<u64>> {
    let mut found = Vec::new();
    for collection in ["inferences", "outputs"] {
        let indexes = database.collection::<Document>(collection).list_indexes().await.unwrap();
        let indexes: Vec<IndexModel> = indexes.try_collect().await.unwrap();
        let after = indexes.into_iter().find_map(|index| index.options.unwrap().expire_after);
        found.push(after.map(|after| after.as_secs()));
    }
    found
}

async fn num_chunks(database: &Database) -> u64 {
    database.collection::<Document>("outputs").count_documents(doc! {}).await.unwrap()
}

/// Makes commands fail until [`heal`], or a number of times.
async fn fail(server: &MongoDb, mode: impl Into<mongodb::bson::Bson>, data: Document) {
    let admin = raw(&server.url_of("admin")).await;
    admin.run_command(doc! { "configureFailPoint": "failCommand", "mode": mode, "data": data }).await.unwrap();
}

async fn heal(server: &MongoDb) {
    let admin = raw(&server.url_of("admin")).await;
    admin.run_command(doc! { "configureFailPoint": "failCommand", "mode": "off" }).await.unwrap();
}

// ---- layout ----------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_start_makes_what_is_missing_and_changes_nothing_else() {
    let Some(server) = MongoDb::start() else { return };
    let url = server.url();
    let database = raw(&url).await;

    let first = store(&url).migrate().await.unwrap();
    assert_eq!((first.from, first.to), (0, 1));
    assert!(first.changes.iter().any(|change| change == "collection `inferences` created"), "{first:?}");
    let names = index_names(&database, "inferences").await;
    for name in ["idempotency_key", "metadata", "model", "model_status", "status", "user", "user_model"] {
        assert!(names.contains(name), "{names:?}");
    }

    let second = store(&url).migrate().await.unwrap();
    assert_eq!((second.from, second.changes), (1, vec![]));

    // An index of an administrator's own is left alone, one of ours that is gone is made again.
    let inferences = database.collection::<Document>("inferences");
    inferences.create_index(IndexModel::builder().keys(doc! { "source": 1 }).build()).await.unwrap();
    inferences.drop_index("user").await.unwrap();
    let third = store(&url).migrate().await.unwrap();
    assert_eq!(third.changes, ["index `user` of `inferences` created"]);
    let names = index_names(&database, "inferences").await;
    assert!(names.contains("user") && names.contains("source_1"), "{names:?}");

    // The validator holds for everybody.
    let stranger = inferences.insert_one(doc! { "_id": "not a record" }).await.unwrap_err().to_string();
    assert!(stranger.contains("121"), "{stranger}");
    database.run_command(doc! { "collMod": "inferences", "validator": {} }).await.unwrap();
    assert_eq!(store(&url).migrate().await.unwrap().changes, ["validator of `inferences` set"]);
    database.drop().await.unwrap();
}

#[tokio::test]
async fn an_index_made_otherwise_is_named() {
    let Some(server) = MongoDb::start() else { return };
    let url = server.url();
    let database = raw(&url).await;
    store(&url).migrate().await.unwrap();
    let inferences = database.collection::<Document>("inferences");
    inferences.drop_index("idempotency_key").await.unwrap();
    let mut options = IndexOptions::default();
    options.name = Some("idempotency_key".to_string());
    let index = IndexModel::builder().keys(doc! { "idempotency_key": 1 }).options(options).build();
    inferences.create_index(index).await.unwrap();

    let strange = store(&url);
    for result in [strange.migrate().await.map(|_| ()), strange.ping().await] {
        let Err(Error::Internal { cause }) = result else { panic!("{result:?}") };
        assert!(cause.contains("index `idempotency_key` of `inferences`") && cause.contains("drop it"), "{cause}");
    }
    inferences.drop_index("idempotency_key").await.unwrap();
    strange.ping().await.expect("mended without a restart");
    database.drop().await.unwrap();
}

#[tokio::test]
async fn records_expire_after_the_retention_that_is_set() {
    let Some(server) = MongoDb::start() else { return };
    let url = server.url();
    let database = raw(&url).await;
    let seconds = Duration::from_secs;

    store(&url).migrate().await.unwrap();
    assert_eq!(expiries(&database).await, [None, None]);
    kept_for(&url, seconds(600)).migrate().await.unwrap();
    assert_eq!(expiries(&database).await, [Some(600), Some(4200)]);
    let changed = kept_for(&url, seconds(7200)).migrate().await.unwrap();
    assert_eq!(changed.changes, ["`inferences` expires after 7200 s", "`outputs` expires after 10800 s"]);
    assert_eq!(expiries(&database).await, [Some(7200), Some(10800)]);

    // One of three hours ago, and one of now.
    let hours_ago = Timestamp::from_second(now().as_second() - 3 * 3600).unwrap();
    let old = Record { id: InferenceId::first_at(hours_ago), ..record(&[2]) };
    let new = record(&[2]);
    let kept = kept_for(&url, seconds(7200));
    kept.migrate().await.unwrap();
    kept.put(&[old.clone(), new.clone()]).await.unwrap();
    // MongoDB looks once a minute.
    let start = Instant::now();
    while kept.get(&old.id).await.unwrap().is_some() {
        assert!(start.elapsed() < seconds(150), "never expired");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(kept.get(&new.id).await.unwrap(), Some(new));
    assert_eq!(kept.expire(now(), 10).await, Ok(0));

    store(&url).migrate().await.unwrap();
    assert_eq!(expiries(&database).await, [None, None]);
    database.drop().await.unwrap();
}

#[tokio::test]
async fn many_that_start_at_once_migrate_once() {
    let Some(server) = MongoDb::start() else { return };
    let url = server.url();
    let stores: Vec<MongoStore> = (0..8).map(|_| store(&url)).collect();
    let migrated = join_all(stores.iter().map(MongoStore::migrate)).await;
    let migrated: Vec<_> = migrated.into_iter().map(|one| one.unwrap()).collect();
    let num_changed = migrated.iter().filter(|one| !one.changes.is_empty()).count();
    assert_eq!(num_changed, 1, "{migrated:#?}");

    let database = raw(&url).await;
    let schema = database.collection::<Document>("schema");
    let state = schema.find_one(doc! { "_id": "schema" }).await.unwrap().unwrap();
    assert_eq!(state.get_array("history").unwrap().len(), 1, "{state}");
    assert_eq!(schema.find_one(doc! { "_id": "lock" }).await.unwrap(), None, "the lock is given back");
    database.drop().await.unwrap();
}

#[tokio::test]
async fn a_lock_holds_for_its_lease_and_is_then_taken_over() {
    let Some(server) = MongoDb::start() else { return };
    let url = server.url();
    let database = raw(&url).await;
    let schema = database.collection::<Document>("schema");
    let lock = |until_ms: i64| {
        let until = DateTime::from_millis(now().as_millisecond() + until_ms);
        doc! { "_id": "lock", "holder": "one that died", "until": until }
    };

    schema.insert_one(lock(60_000)).await.unwrap();
    let waiting = store(&url);
    assert!(is_unavailable(&bounded(waiting.ping()).await), "another process is at it");
    assert_eq!(index_names_of(&database).await, Vec::<String>::new(), "changed without the lock");
    schema.delete_one(doc! { "_id": "lock" }).await.unwrap();
    wait_until_back(&waiting).await;

    schema.insert_one(lock(-30 * 60_000)).await.unwrap();
    database.collection::<Document>("inferences").drop_index("user").await.unwrap();
    let migrated = bounded(store(&url).migrate()).await.unwrap();
    assert_eq!(migrated.changes, ["index `user` of `inferences` created"]);
    assert_eq!(schema.find_one(doc! { "_id": "lock" }).await.unwrap(), None);
    database.drop().await.unwrap();
}

/// Collections but the one of the lock.
async fn index_names_of(database: &Database) -> Vec<String> {
    database.list_collection_names().await.unwrap().into_iter().filter(|name| name != "schema").collect()
}

#[tokio::test]
async fn a_newer_layout_is_refused() {
    let Some(server) = MongoDb::start() else { return };
    let url = server.url();
    let database = raw(&url).await;
    database.collection::<Document>("schema").insert_one(doc! { "_id": "schema", "version": 99 }).await.unwrap();
    let result = store(&url).put(&[record(&[1])]).await;
    let Err(Error::Internal { cause }) = result else { panic!("{result:?}") };
    assert!(cause.contains("layout 99"), "{cause}");
    database.drop().await.unwrap();
}

// ---- large records ---------------------------------------------------------------------------------------------

#[tokio::test]
async fn outputs_beyond_a_document_are_whole_or_not_there() {
    let Some(server) = MongoDb::start() else { return };
    let url = server.url();
    let (store, database) = (prepared(&url).await, raw(&url).await);

    // 20 MiB of rows.
    let large = record(&[1 << 20; 5]);
    store.put(std::slice::from_ref(&large)).await.unwrap();
    assert_eq!(store.get(&large.id).await.unwrap().as_ref(), Some(&large));
    assert_eq!(num_chunks(&database).await, 6);
    store.put(std::slice::from_ref(&large)).await.unwrap();
    assert_eq!(num_chunks(&database).await, 6, "a repetition adds nothing");
    assert_eq!(store.insert(&large).await.unwrap(), Inserted::Exists(Box::new(large.clone())));

    let query = Query { limit: 10, ..Query::default() };
    let page = store.list(&query).await.unwrap();
    assert_eq!(page.records, [Record { output: None, ..large.clone() }]);
    let page = store.list(&Query { with_output: true, ..query.clone() }).await.unwrap();
    assert_eq!(page.records, std::slice::from_ref(&large));

    // Another output takes its place. A late state that is not final, large as well, takes nothing away.
    let other = Record { output: record(&[1 << 20; 4]).output, ..large.clone() };
    store.put(std::slice::from_ref(&other)).await.unwrap();
    let mut late = Record { output: None, ..large.clone() };
    late.facts.status = Status::Running;
    late.facts.input = StoredInput::Full(serde_json::json!("word ".repeat(4 << 20)));
    store.put(&[late]).await.unwrap();
    assert_eq!(store.get(&large.id).await.unwrap(), Some(other));

    // An input that is too large by itself: a list reads it where it is.
    let mut wordy = record(&[3]);
    wordy.facts.input = StoredInput::Full(serde_json::json!("word ".repeat(4 << 20)));
    assert_eq!(store.insert(&wordy).await.unwrap(), Inserted::New);
    assert_eq!(store.get(&wordy.id).await.unwrap().as_ref(), Some(&wordy));
    assert_eq!(store.list(&query).await.unwrap().records[0], Record { output: None, ..wordy.clone() });

    assert!(store.delete(&large.id).await.unwrap());
    assert_eq!(store.erase_user("u", 10).await.unwrap(), [wordy]);
    assert_eq!(num_chunks(&database).await, 0);
    database.drop().await.unwrap();
}

#[tokio::test]
async fn chunks_without_their_record_are_seen_by_nobody_and_erased_with_their_user() {
    let Some(server) = MongoDb::own() else { return };
    let url = server.url();
    let (store, database) = (prepared(&url).await, raw(&url).await);

    let large = record(&[1 << 20; 5]);
    fail(&server, "alwaysOn", doc! { "failCommands": ["update"], "errorCode": 10107 }).await;
    assert!(is_unavailable(&bounded(store.put(std::slice::from_ref(&large))).await));
    heal(&server).await;
    wait_until_back(&store).await;
    assert_eq!(num_chunks(&database).await, 6);
    assert_eq!(store.get(&large.id).await, Ok(None));
    assert_eq!(store.count().await, Ok(0));
    // What was begun is taken up by the repetition.
    store.put(std::slice::from_ref(&large)).await.unwrap();
    assert_eq!(store.get(&large.id).await.unwrap().as_ref(), Some(&large));
    assert_eq!(num_chunks(&database).await, 6);

    // A record whose deletion was cut off after its chunks is not there, and a page goes on behind it.
    let before = record(&[1]);
    let before = Record { id: InferenceId::first_at(Timestamp::from_second(1).unwrap()), ..before };
    store.put(std::slice::from_ref(&before)).await.unwrap();
    database.collection::<Document>("outputs").delete_many(doc! {}).await.unwrap();
    assert_eq!(store.get(&large.id).await, Ok(None));
    let query = Query { limit: 1, with_output: true, ..Query::default() };
    let first = store.list(&query).await.unwrap();
    assert_eq!((first.records.len(), first.next), (0, Some(large.id)));
    let second = store.list(&Query { after: first.next, ..query }).await.unwrap();
    assert_eq!((second.records, second.next), (vec![before.clone()], None));
    assert!(store.delete(&large.id).await.unwrap());
    assert!(store.delete(&before.id).await.unwrap());
    store.put(std::slice::from_ref(&large)).await.unwrap();

    // The record lost, and not its chunks.
    database.collection::<Document>("inferences").delete_many(doc! {}).await.unwrap();
    assert_eq!(store.erase_user("u", 10).await, Ok(vec![]));
    assert_eq!(num_chunks(&database).await, 0);
}

// ---- a server that fails ---------------------------------------------------------------------------------------

#[tokio::test]
async fn a_primary_that_is_away_is_unavailable_and_then_back() {
    let Some(server) = MongoDb::own() else { return };
    let store = prepared(&server.url()).await;
    let kept = record(&[4]);
    store.put(std::slice::from_ref(&kept)).await.unwrap();

    let commands = ["update", "insert", "find", "delete", "aggregate"];
    for data in [
        doc! { "failCommands": commands.to_vec(), "errorCode": 10107 },
        doc! { "failCommands": commands.to_vec(), "errorCode": 91 },
        doc! { "failCommands": commands.to_vec(), "errorCode": 13435 },
        doc! { "failCommands": commands.to_vec(), "closeConnection": true },
    ] {
        fail(&server, "alwaysOn", data.clone()).await;
        let new = record(&[4]);
        let query = Query { limit: 1, ..Query::default() };
        let results = tokio::join!(
            bounded(store.put(std::slice::from_ref(&new))),
            bounded(store.insert(&new)),
            bounded(store.get(&kept.id)),
            bounded(store.list(&query)),
            bounded(store.delete(&kept.id)),
            bounded(store.count()),
        );
        let (put, insert, get, list, delete, count) = &results;
        let failed = [is_unavailable(put), is_unavailable(insert), is_unavailable(get)];
        let failed = failed.into_iter().chain([is_unavailable(list), is_unavailable(delete), is_unavailable(count)]);
        assert!(failed.into_iter().all(|failed| failed), "{data}: {results:?}");
        heal(&server).await;
        wait_until_back(&store).await;
        assert_eq!(bounded(store.get(&kept.id)).await, Ok(Some(kept.clone())));
        bounded(store.put(&[new])).await.unwrap();
    }

    // A change of primary, seen once: nobody notices.
    fail(&server, doc! { "times": 1 }, doc! { "failCommands": ["update"], "errorCode": 10107 }).await;
    bounded(store.put(&[record(&[4])])).await.unwrap();

    // Written, but by no majority: it may be undone.
    let concern = doc! { "code": 64, "errmsg": "waiting for replication timed out" };
    fail(&server, "alwaysOn", doc! { "failCommands": ["update"], "writeConcernError": concern }).await;
    assert!(is_unavailable(&bounded(store.put(&[record(&[4])])).await));
    heal(&server).await;
}

#[tokio::test]
async fn numbers_tell_a_server_that_is_away_from_one_that_is_asked_too_much() {
    let Some(server) = MongoDb::own() else { return };
    let store = prepared(&server.url()).await;
    store.put(&[record(&[4])]).await.unwrap();
    let by = vec![Dimension::Day];
    let usage = UsageQuery { model: None, user: None, from: None, to: None, by, limit: 10, timeout: BOUND };
    let quality = QualityQuery { model: None, version: None, from: None, to: None, timeout: BOUND };
    for (code, is_too_much) in [(50, true), (10107, false), (91, false)] {
        fail(&server, "alwaysOn", doc! { "failCommands": ["aggregate"], "errorCode": code }).await;
        let (usage, quality) = (bounded(store.usage(&usage)).await, bounded(store.quality(&quality)).await);
        if is_too_much {
            assert_eq!(
                (usage, quality),
                (Err(Error::Deadline { timeout: BOUND }), Err(Error::Deadline { timeout: BOUND }))
            );
        } else {
            assert!(is_unavailable(&usage) && is_unavailable(&quality), "{code}: {usage:?} {quality:?}");
        }
        heal(&server).await;
    }
    wait_until_back(&store).await;
    assert_eq!(store.usage(&usage).await.unwrap().rows[0].usage.num_requests, 1);
    // One that is halted costs no more than the time that was given.
    server.daemon().pause();
    let timeout = Duration::from_millis(300);
    let late = bounded(store.usage(&UsageQuery { timeout, ..usage })).await;
    assert_eq!(late, Err(Error::Deadline { timeout }));
    server.daemon().resume();
}

#[tokio::test]
async fn a_server_that_is_halted_is_unavailable_in_time_and_then_back() {
    let Some(server) = MongoDb::own() else { return };
    let store = prepared(&server.url()).await;
    let kept = record(&[4]);
    store.put(std::slice::from_ref(&kept)).await.unwrap();
    server.daemon().pause();
    assert!(is_unavailable(&bounded(store.put(&[record(&[4])])).await));
    assert!(is_unavailable(&bounded(store.ping()).await));
    server.daemon().resume();
    wait_until_back(&store).await;
    assert_eq!(bounded(store.get(&kept.id)).await, Ok(Some(kept)));
}

#[tokio::test]
async fn a_store_is_made_while_its_server_is_away() {
    let Some(server) = MongoDb::own() else { return };
    server.daemon().kill();
    let store = Arc::new(store(&server.url()));
    let pings: Vec<_> = (0..50).map(|_| store.ping()).collect();
    assert!(bounded(join_all(pings)).await.iter().all(is_unavailable));
    assert!(server.daemon().start_again());
    wait_until_back(&store).await;
    let record = record(&[4]);
    store.put(std::slice::from_ref(&record)).await.unwrap();
    assert_eq!(store.get(&record.id).await, Ok(Some(record)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_acknowledged_write_is_lost_when_the_server_is_killed() {
    let Some(server) = MongoDb::own() else { return };
    let store = Arc::new(prepared(&server.url()).await);
    let acknowledged: Arc<Mutex<Vec<Record>>> = Arc::default();
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..8)
        .map(|i| {
            let (store, acknowledged, stop) = (store.clone(), acknowledged.clone(), stop.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let record = record(&[16]);
                    let done = match i {
                        0 => bounded(store.insert(&record)).await.map(|_| ()),
                        _ => bounded(store.put(std::slice::from_ref(&record))).await,
                    };
                    match done {
                        Ok(()) => acknowledged.lock().push(record),
                        Err(error) => assert!(matches!(error, Error::StoreUnavailable { .. }), "{error}"),
                    }
                }
            })
        })
        .collect();
    for round in 1..=3 {
        let enough = acknowledged.lock().len() + 50;
        let start = Instant::now();
        while acknowledged.lock().len() < enough {
            assert!(start.elapsed() < Duration::from_secs(60), "nothing is written in round {round}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        server.daemon().kill();
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(server.daemon().start_again(), "{}", server.daemon().log());
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    wait_until_back(&store).await;
    let acknowledged = acknowledged.lock().clone();
    println!("{} writes were acknowledged over three kills", acknowledged.len());
    for record in acknowledged {
        assert_eq!(store.get(&record.id).await.unwrap().as_ref(), Some(&record));
    }
}

// ---- many callers ----------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn calls_that_share_a_command_keep_their_own_outcomes() {
    let Some(server) = MongoDb::start() else { return };
    let url = server.url();
    let store = prepared(&url).await;
    // Every fourth is an older state of one record that is final, every fourth has one key.
    let done = record(&[8]);
    store.put(std::slice::from_ref(&done)).await.unwrap();
    let records: Vec<Record> = (0..200)
        .map(|i| {
            let mut record = record(&[8]);
            match i % 4 {
                0 => {
                    record.id = done.id;
                    record.facts.status = Status::Running;
                    record.output = None;
                }
                1 => record.facts.idempotency_key = Some("the one".into()),
                _ => {}
            }
            record
        })
        .collect();
    let start = Instant::now();
    let results = join_all(records.iter().map(|record| store.put(std::slice::from_ref(record)))).await;
    println!("200 puts at once took {:?}", start.elapsed());
    assert!(results.iter().all(Result::is_ok), "{results:?}");

    assert_eq!(store.get(&done.id).await.unwrap().as_ref(), Some(&done), "an older state undid a final one");
    let holder = store.find_by_key("the one").await.unwrap().expect("one has the key");
    let mut num_without = 0;
    for record in records.iter().filter(|record| record.id != done.id) {
        let found = store.get(&record.id).await.unwrap().expect("written");
        assert_eq!(found.output, record.output);
        num_without += usize::from(record.facts.idempotency_key.is_some() && found.facts.idempotency_key.is_none());
        assert_eq!(found.facts.idempotency_key.is_some(), found.id == holder.id);
    }
    assert_eq!(num_without, 49);
    raw(&url).await.drop().await.unwrap();
}

#[tokio::test]
async fn more_than_a_command_holds_is_written_in_several() {
    let Some(server) = MongoDb::start() else { return };
    let url = server.url();
    let store = prepared(&url).await;
    // 40 MiB in records of 4, and 3,000 small ones with a record in two states.
    let large: Vec<Record> = (0..10).map(|_| record(&[1 << 20])).collect();
    store.put(&large).await.unwrap();
    let mut small: Vec<Record> = (0..3000).map(|_| record(&[1])).collect();
    small[0].facts.status = Status::Running;
    small[0].output = None;
    small.push(Record { id: small[0].id, ..record(&[2]) });
    store.put(&small).await.unwrap();
    assert_eq!(store.count().await, Ok(3010));
    assert_eq!(store.get(&small[0].id).await.unwrap().as_ref(), small.last());
    for record in &large {
        assert_eq!(store.get(&record.id).await.unwrap().as_ref(), Some(record));
    }
    raw(&url).await.drop().await.unwrap();
}

// ---- connecting ------------------------------------------------------------------------------------------------

#[tokio::test]
async fn tls_is_as_the_url_says() {
    let dir = tempfile::tempdir().unwrap();
    let certificates = Certificates::make(dir.path());
    let Some(server) = MongoDb::with_tls(&certificates) else { return };
    let plain = store(&server.url());
    assert!(is_unavailable(&bounded(plain.ping()).await), "a server of TLS took plain text");
    let authority = certificates.authority.display();
    let trusted = prepared(&format!("{}&tls=true&tlsCAFile={authority}", server.url())).await;
    let record = record(&[4]);
    bounded(trusted.put(std::slice::from_ref(&record))).await.unwrap();
    assert_eq!(bounded(trusted.get(&record.id)).await, Ok(Some(record)));
    // The public authorities know nothing of ours.
    let strict = store(&format!("{}&tls=true", server.url()));
    assert!(is_unavailable(&bounded(strict.ping()).await), "any certificate would do");
}

/// Everything that is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn passwords_are_in_no_log_and_no_error() {
    let Some(server) = MongoDb::own() else { return };
    let log = Log::default();
    let sink = log.clone();
    let subscriber =
        tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(move || sink.clone()).finish();
    let _guard = tracing::subscriber::set_default(subscriber);

    prepared(&server.url()).await;
    let with_user = server.url().replace("mongodb://", "mongodb://somebody:s3cr%40t@") + "&authSource=admin";
    let refused = bounded(store(&with_user).ping()).await;
    // Nobody of this name is there.
    assert!(is_unavailable(&refused), "{refused:?}");
    server.daemon().kill();
    let away = bounded(store(&with_user).ping()).await;
    assert!(is_unavailable(&away), "{away:?}");

    let all = format!("{} {refused:?} {away:?}", String::from_utf8_lossy(&log.0.lock()));
    assert!(all.contains("is prepared"), "nothing was logged: {all}");
    assert!(!all.contains("s3cr"), "{all}");
}
