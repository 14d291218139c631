//! What the embedded store promises of background work beyond the contract.

use std::collections::BTreeSet;
use std::sync::Arc;

use eremois::store::embedded::Embedded;
use eremois::store::work::{Document, DocumentKind, Hold, Task, TaskKind, Work};
use serde_json::json;

use crate::samples::{LEASE, at, claim, document, noise, task};

#[tokio::test]
async fn everything_is_there_after_it_was_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = Document { expires_at: Some(at(5)), parent: Some("p".into()), ..document(DocumentKind::File, "f") };
    {
        let store = Embedded::open(folder.path()).unwrap();
        store.push(&[task("held", 0), task("cancelled", 1), task("waits", 2)]).await.unwrap();
        assert_eq!(store.claim(&claim("x", 1, 10)).await.unwrap().len(), 2);
        assert_eq!(store.cancel("cancelled").await, Ok(true));
        assert_eq!(store.create(&file).await, Ok(true));
        assert_eq!(store.replace(&Document { body: json!(2), ..file.clone() }).await, Ok(true));
        store.put_part("f", 3, &noise(1 << 20, 1)).await.unwrap();
    }
    let store = Embedded::open(folder.path()).unwrap();
    assert_eq!(store.quick_check().await, Ok(vec![]));
    assert_eq!(store.num_tasks().await, Ok(vec![(TaskKind::Chunk, 3)]));
    assert_eq!(store.claim(&claim("y", 2, 10)).await, Ok(vec![Task { attempts: 1, ..task("waits", 2) }]));
    assert_eq!(store.renew("held", "x", at(100)).await, Ok(Hold::Held));
    assert_eq!(store.renew("cancelled", "x", at(100)).await, Ok(Hold::Cancelled));
    let kept = Document { revision: 2, body: json!(2), ..file };
    assert_eq!(store.document(DocumentKind::File, "f").await, Ok(Some(kept.clone())));
    assert_eq!(store.expired(at(5), 10).await, Ok(vec![kept]));
    assert!(store.part("f", 3).await.unwrap() == Some(noise(1 << 20, 1)));
}

#[tokio::test]
async fn a_broken_task_is_passed_over_and_the_others_are_done() {
    let folder = tempfile::tempdir().unwrap();
    let store = Embedded::open(folder.path()).unwrap();
    store.push(&[task("broken", 0), task("sound", 1)]).await.unwrap();
    let shell = rusqlite::Connection::open(folder.path().join("eremois.db")).unwrap();
    shell.execute_batch("UPDATE payloads SET payload = '{' WHERE seq = 1").unwrap();
    let found = store.claim(&claim("x", 1, 10)).await.unwrap();
    assert_eq!(found, [Task { attempts: 1, ..task("sound", 1) }]);
    assert_eq!(store.num_tasks().await, Ok(vec![(TaskKind::Chunk, 2)]));
    // It is not tried again before the lease is over, and can be cancelled and removed.
    assert_eq!(store.claim(&claim("y", 2, 10)).await, Ok(vec![]));
    assert_eq!(store.cancel("broken").await, Ok(true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_tasks_are_each_claimed_once() {
    const NUM_TASKS: usize = 100_000;
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(Embedded::open(folder.path()).unwrap());
    let kind = |i: usize| TaskKind::ALL[i % 4];
    let tasks: Vec<Task> =
        (0..NUM_TASKS).map(|i| Task { kind: kind(i), ..task(&format!("t{i:06}"), (i % 1000) as i64) }).collect();
    let started = std::time::Instant::now();
    store.push(&tasks).await.unwrap();
    println!("pushed after {:?}", started.elapsed());
    // The first half in one piece, whose owner dies; then claimers take what comes, its tasks among them.
    assert_eq!(store.claim(&claim("dead", 1000, NUM_TASKS / 2)).await.unwrap().len(), NUM_TASKS / 2);
    println!("half claimed after {:?}", started.elapsed());
    let now = 1000 + LEASE.as_millis() as i64;
    let claimers = (0..4).map(|i| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut got = Vec::new();
            loop {
                let found = store.claim(&claim(&format!("owner {i}"), now, 250)).await.unwrap();
                if found.is_empty() {
                    return got;
                }
                got.extend(found.into_iter().map(|task| task.id));
            }
        })
    });
    let mut seen = BTreeSet::new();
    for got in futures::future::join_all(claimers).await {
        for id in got.unwrap() {
            assert!(seen.insert(id.clone()), "{id} was claimed twice");
        }
    }
    println!("all claimed after {:?}", started.elapsed());
    assert_eq!(seen.len(), NUM_TASKS);
    let counts = store.num_tasks().await.unwrap();
    assert_eq!(counts, TaskKind::ALL.iter().map(|kind| (*kind, 25_000)).collect::<Vec<_>>());
    // With all of them held, another look finds nothing.
    assert_eq!(store.claim(&claim("late", now, 4)).await, Ok(vec![]));
}
