//! MongoDB killed, halted and started again under load, by its wire protocol and the official driver: every write is
//! acknowledged, and every acknowledged record is in MongoDB in the end.

#[allow(dead_code)]
mod common {
    pub mod process;
    pub mod records;
    pub mod servers;
}

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use eremois::store::durable::{Durable, Options, State};
use eremois::store::mongo::{MongoSettings, MongoStore};
use eremois::store::query::Query;
use eremois::store::record::{InferenceId, Record};
use eremois::store::{Inserted, Records, open};

use common::process::LONG;
use common::records::record;
use common::servers::mongodb::MongoDb;

/// Half of them with idempotency keys.
const NUM_WRITERS: usize = 4;

async fn opened(server: &MongoDb, path: &std::path::Path) -> Arc<Durable> {
    let url = server.url_of("durable");
    let store = MongoStore::new(MongoSettings { url, pool_size: 16, replica_set: None, retention: Duration::ZERO });
    Arc::new(open::remote(Arc::new(store.unwrap()), path, 256 << 20, Options::default()).await.unwrap())
}

async fn wait_for(what: &str, durable: &Durable, is_so: impl Fn(&State) -> bool) {
    let start = Instant::now();
    while !is_so(&durable.state()) {
        assert!(start.elapsed() < LONG, "waited in vain for {what}: {:?}", durable.state());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn one(key: bool) -> Record {
    let mut one = record();
    one.facts.idempotency_key = key.then(|| format!("key of {}", one.id));
    one
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mongodb_killed_and_halted_under_load_costs_no_acknowledged_record() {
    let Some(server) = MongoDb::own() else { return };
    let dir = tempfile::tempdir().unwrap();
    let durable = opened(&server, dir.path()).await;
    durable.put(&[record()]).await.unwrap();
    wait_for("the first write", &durable, |state| *state == State::Healthy).await;

    let done = Arc::new(AtomicBool::new(false));
    let interval_ms = Arc::new(AtomicU64::new(50));
    let writers: Vec<_> = (0..NUM_WRITERS)
        .map(|writer| {
            let (durable, done, interval_ms) = (durable.clone(), done.clone(), interval_ms.clone());
            tokio::spawn(async move {
                let mut acknowledged: Vec<InferenceId> = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    let one = one(writer % 2 == 0);
                    let written = if writer % 2 == 0 {
                        durable.insert(&one).await.map(|inserted| assert_eq!(inserted, Inserted::New))
                    } else {
                        durable.put(std::slice::from_ref(&one)).await
                    };
                    written.unwrap_or_else(|e| panic!("a write was refused: {e}"));
                    acknowledged.push(one.id);
                    // Fewer a second than the tests' server takes: a journal that is filled faster never empties.
                    tokio::time::sleep(Duration::from_millis(interval_ms.load(Ordering::Relaxed))).await;
                }
                acknowledged
            })
        })
        .collect();

    let pause = |seconds| tokio::time::sleep(Duration::from_secs(seconds));
    pause(2).await;
    server.daemon().kill();
    wait_for("the journal", &durable, |state| matches!(state, State::Journalling { .. })).await;
    let kept = one(true);
    assert_eq!(durable.insert(&kept).await.unwrap(), Inserted::New);
    assert_eq!(durable.get(&kept.id).await.unwrap(), Some(kept.clone()));
    assert_eq!(durable.insert(&kept).await.unwrap(), Inserted::Exists(Box::new(kept.clone())));
    pause(4).await;
    assert!(server.daemon().start_again());
    // On a busy machine the replay is slow too: writes go on, but leave it room.
    interval_ms.store(1000, Ordering::Relaxed);
    wait_for("MongoDB to be used again", &durable, |state| *state == State::Healthy).await;
    interval_ms.store(50, Ordering::Relaxed);
    pause(1).await;
    // Worse than a kill: connections stay open and nothing answers.
    server.daemon().pause();
    pause(5).await;
    server.daemon().resume();
    interval_ms.store(1000, Ordering::Relaxed);
    wait_for("MongoDB to be used again", &durable, |state| *state == State::Healthy).await;
    pause(1).await;
    done.store(true, Ordering::Relaxed);

    let mut acknowledged = BTreeSet::from([kept.id]);
    for writer in writers {
        acknowledged.extend(writer.await.unwrap());
    }
    wait_for("the end", &durable, |state| *state == State::Healthy).await;
    assert_eq!(durable.drain(Duration::from_secs(10)).await, 0);
    drop(durable);

    // As the next start sees it: the journal is empty, all is in MongoDB, once.
    let durable = opened(&server, dir.path()).await;
    assert_eq!(durable.state(), State::Healthy);
    let mut found = BTreeSet::new();
    let mut query = Query { limit: 1000, ..Query::default() };
    loop {
        let page = durable.list(&query).await.unwrap();
        for record in &page.records {
            assert!(found.insert(record.id), "{} is there twice", record.id);
        }
        query.after = page.next;
        if query.after.is_none() {
            break;
        }
    }
    let lost: Vec<&InferenceId> = acknowledged.difference(&found).collect();
    assert!(lost.is_empty(), "{} of {} are lost: {lost:?}", lost.len(), acknowledged.len());
    assert!(acknowledged.len() > 500, "hardly anything was written: {}", acknowledged.len());
}
