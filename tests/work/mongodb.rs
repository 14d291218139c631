//! What the store in MongoDB promises of background work beyond the contract: processes share it, and its server may fail.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use eremois::store::mongo::{MongoSettings, MongoStore};
use eremois::store::work::{Claim, Document, DocumentKind, Hold, Task, TaskKind, Work};
use eremois::{Error, Result};
use futures::TryStreamExt;
use mongodb::bson::doc;
use mongodb::{Client, Database, IndexModel};
use serde_json::json;

use crate::samples::{LEASE, at, claim, document, noise, task};
use crate::servers::mongodb::MongoDb;

/// More than any call may take, and less than it would take to hang.
const BOUND: Duration = Duration::from_secs(20);

/// A store whose database is prepared, which takes longer than a call may where the machine is busy.
pub async fn prepared(url: &str) -> MongoStore {
    let settings =
        MongoSettings { url: url.to_string(), pool_size: 16, replica_set: None, retention: Duration::from_secs(60) };
    let store = MongoStore::new(settings).unwrap();
    store.migrate().await.unwrap();
    store
}

/// The database of a url, as an administrator sees it.
async fn raw(url: &str) -> Database {
    Client::with_uri_str(url).await.unwrap().default_database().unwrap()
}

fn is_unavailable<T: std::fmt::Debug>(result: &Result<T>) -> bool {
    matches!(result, Err(Error::StoreUnavailable { .. }))
}

/// An operation that must end in time, however it ends.
async fn bounded<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(BOUND, work).await.expect("no call of a store hangs")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn processes_never_share_a_task_and_leave_none() {
    let Some(server) = MongoDb::start() else { return };
    let url = server.url();
    const NUM_TASKS: usize = 200;
    let stores = [Arc::new(prepared(&url).await), Arc::new(prepared(&url).await), Arc::new(prepared(&url).await)];
    let tasks: Vec<Task> = (0..NUM_TASKS).map(|i| task(&format!("t{i:03}"), 0)).collect();
    stores[0].push(&tasks).await.unwrap();
    let started = Instant::now();
    let claimers = (0..9).map(|i| {
        let store = stores[i % 3].clone();
        tokio::spawn(async move {
            let (owner, mut got) = (format!("owner {i}"), Vec::new());
            loop {
                let found = store.claim(&claim(&owner, 0, 4)).await.unwrap();
                if found.is_empty() {
                    return (owner, got);
                }
                got.extend(found.into_iter().map(|task| task.id));
            }
        })
    });
    let mut seen = BTreeSet::new();
    for claimer in futures::future::join_all(claimers).await {
        let (owner, got) = claimer.unwrap();
        println!("{owner} got {} after {:?}", got.len(), started.elapsed());
        for id in got {
            assert!(seen.insert(id.clone()), "{id} was claimed twice");
            // Every process sees who holds it.
            assert_eq!(stores[0].renew(&id, &owner, at(LEASE.as_millis() as i64)).await, Ok(Hold::Held));
        }
    }
    assert_eq!(seen.len(), NUM_TASKS);
    raw(&url).await.drop().await.unwrap();
}

#[tokio::test]
async fn what_one_process_writes_another_has() {
    let Some(server) = MongoDb::start() else { return };
    let url = server.url();
    let (one, two) = (prepared(&url).await, prepared(&url).await);
    one.push(&[task("a", 0), task("b", 0)]).await.unwrap();
    assert_eq!(two.claim(&claim("two", 0, 1)).await.unwrap().len(), 1);
    assert_eq!(one.claim(&claim("one", 0, 9)).await.unwrap()[0].id, "b");
    assert_eq!(one.cancel("a").await, Ok(true));
    assert_eq!(two.renew("a", "two", at(9)).await, Ok(Hold::Cancelled));
    let batch = document(DocumentKind::Batch, "b");
    assert_eq!(one.create(&batch).await, Ok(true));
    assert_eq!(two.create(&batch).await, Ok(false));
    assert_eq!(two.replace(&Document { body: json!(2), ..batch.clone() }).await, Ok(true));
    assert_eq!(one.replace(&Document { body: json!(1), ..batch }).await, Ok(false));
    one.put_part("f", 0, &noise(3 << 20, 1)).await.unwrap();
    assert!(two.part("f", 0).await.unwrap() == Some(noise(3 << 20, 1)));
    two.remove_parts("f").await.unwrap();
    assert_eq!(one.part("f", 0).await, Ok(None));
    raw(&url).await.drop().await.unwrap();
}

#[tokio::test]
async fn its_collections_are_declared_and_do_not_expire() {
    let Some(server) = MongoDb::start() else { return };
    let url = server.url();
    prepared(&url).await;
    let database = raw(&url).await;
    for (collection, expected) in [
        ("tasks", vec!["_id_", "cancelled", "due"]),
        ("documents", vec!["_id_", "expires_at", "parent"]),
        ("parts", vec!["_id_", "file"]),
    ] {
        let collection = database.collection::<mongodb::bson::Document>(collection);
        let indexes: Vec<IndexModel> = collection.list_indexes().await.unwrap().try_collect().await.unwrap();
        let options = indexes.into_iter().map(|index| index.options.unwrap());
        // The retention of records is a minute here, and none of these.
        let mut names: Vec<String> = options
            .map(|options| {
                assert_eq!(options.expire_after, None);
                options.name.unwrap()
            })
            .collect();
        names.sort();
        assert_eq!(names, expected);
        let stranger = collection.insert_one(doc! { "_id": "not ours" }).await.unwrap_err().to_string();
        assert!(stranger.contains("121"), "{stranger}");
    }
    database.drop().await.unwrap();
}

#[tokio::test]
async fn a_broken_task_is_passed_over_and_the_others_are_done() {
    let Some(server) = MongoDb::start() else { return };
    let url = server.url();
    let store = prepared(&url).await;
    store.push(&[task("broken", 0), task("sound", 1)]).await.unwrap();
    let tasks = raw(&url).await.collection::<mongodb::bson::Document>("tasks");
    tasks.update_one(doc! { "_id": "broken" }, doc! { "$set": { "payload": "{" } }).await.unwrap();
    let found = store.claim(&claim("x", 1, 10)).await.unwrap();
    assert_eq!(found, [Task { attempts: 1, ..task("sound", 1) }]);
    assert_eq!(store.num_tasks().await, Ok(vec![(TaskKind::Chunk, 2)]));
    assert_eq!(store.claim(&claim("y", 2, 10)).await, Ok(vec![]));
    raw(&url).await.drop().await.unwrap();
}

#[tokio::test]
async fn a_server_that_is_away_is_unavailable_in_time_and_nothing_acknowledged_is_lost() {
    let Some(server) = MongoDb::own() else { return };
    let store = prepared(&server.url()).await;
    store.push(&[task("a", 0), task("b", 0), task("c", 0)]).await.unwrap();
    assert_eq!(store.claim(&Claim { ids: Some(vec!["a".into()]), ..claim("x", 0, 9) }).await.unwrap().len(), 1);
    assert_eq!(store.create(&document(DocumentKind::File, "f")).await, Ok(true));
    store.put_part("f", 0, &noise(100_000, 7)).await.unwrap();
    for is_halted in [true, false] {
        if is_halted {
            server.daemon().pause();
        } else {
            server.daemon().kill();
        }
        let (batch, new) = (document(DocumentKind::Batch, "b"), [task("d", 0)]);
        let started = Instant::now();
        let a_claim = claim("y", 0, 9);
        let outcomes = tokio::join!(
            bounded(store.push(&new)),
            bounded(store.claim(&a_claim)),
            bounded(store.renew("a", "x", at(5))),
            bounded(store.finish("a", "y")),
            bounded(store.postpone("a", "y", at(5))),
            bounded(store.cancel("nobody")),
            bounded(store.create(&batch)),
            bounded(store.part("f", 0)),
            bounded(store.put_part("g", 0, b"x")),
            bounded(store.num_tasks()),
        );
        println!("halted: {is_halted}, all ended after {:?}", started.elapsed());
        let (push, claim, renew, finish, postpone, cancel, create, part, put, count) = &outcomes;
        let all = [
            is_unavailable(push),
            is_unavailable(claim),
            is_unavailable(renew),
            is_unavailable(finish),
            is_unavailable(postpone),
            is_unavailable(cancel),
            is_unavailable(create),
            is_unavailable(part),
            is_unavailable(put),
            is_unavailable(count),
        ];
        assert_eq!(all, [true; 10], "{outcomes:?}");
        if is_halted {
            server.daemon().resume();
        } else {
            assert!(server.daemon().start_again(), "{}", server.daemon().log());
        }
        let started = Instant::now();
        while let Err(error) = bounded(store.num_tasks()).await {
            assert!(started.elapsed() < Duration::from_secs(60), "{error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    assert_eq!(store.renew("a", "x", at(50_000)).await, Ok(Hold::Held));
    // What was on its way may have been taken by a call whose answer nobody got: it is free when that lease is over.
    let later = claim("z", LEASE.as_millis() as i64 + 1, 9);
    let found: BTreeSet<String> = store.claim(&later).await.unwrap().into_iter().map(|task| task.id).collect();
    assert!(found.contains("b") && found.contains("c") && !found.contains("a"), "{found:?}");
    assert_eq!(store.document(DocumentKind::File, "f").await, Ok(Some(document(DocumentKind::File, "f"))));
    assert!(store.part("f", 0).await.unwrap() == Some(noise(100_000, 7)));
}

#[tokio::test]
async fn a_change_of_primary_is_not_noticed() {
    let Some(server) = MongoDb::own() else { return };
    let store = prepared(&server.url()).await;
    let admin = raw(&server.url_of("admin")).await;
    // Seen once by each command that changes something: the driver repeats it.
    let fail = async |command: &str| {
        let data = doc! { "failCommands": [command], "errorCode": 10107, "errorLabels": ["RetryableWriteError"] };
        let point = doc! { "configureFailPoint": "failCommand", "mode": { "times": 1 }, "data": data };
        admin.run_command(point).await.unwrap();
    };
    fail("insert").await;
    bounded(store.push(&[task("a", 0), task("b", 0), task("c", 0)])).await.unwrap();
    fail("findAndModify").await;
    assert_eq!(bounded(store.claim(&claim("x", 0, 9))).await.unwrap().len(), 3);
    fail("findAndModify").await;
    assert_eq!(bounded(store.renew("a", "x", at(50_000))).await, Ok(Hold::Held));
    fail("findAndModify").await;
    assert_eq!(bounded(store.finish("a", "x")).await, Ok(Hold::Held));
    fail("update").await;
    assert_eq!(bounded(store.postpone("b", "x", at(0))).await, Ok(Hold::Held));
    fail("delete").await;
    assert_eq!(bounded(store.cancel("b")).await, Ok(true));
    fail("insert").await;
    assert_eq!(bounded(store.create(&document(DocumentKind::Batch, "b"))).await, Ok(true));
    fail("update").await;
    assert_eq!(bounded(store.replace(&document(DocumentKind::Batch, "b"))).await, Ok(true));
    assert_eq!(store.num_tasks().await, Ok(vec![(TaskKind::Chunk, 1)]));
}
