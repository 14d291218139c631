//! A store that goes away and comes back, with a journal in between: nothing acknowledged is lost, nothing is done
//! twice or out of order, and store and journal read as one.

mod common;
#[path = "durable/watched.rs"]
mod watched;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use eremois::Error;
use eremois::store::durable::{Durable, Options, State};
use eremois::store::memory::{Ailment, Memory};
use eremois::store::numbers::{Dimension, QualityQuery, UsageQuery};
use eremois::store::query::Query;
use eremois::store::record::{Feedback, InferenceId, Record, Status, now};
use eremois::store::{Inserted, Records, open};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use common::process::LONG;
use common::records::{record, sample};
use watched::{Watched, Writes, Written};

const ROOM: u64 = 64 << 20;

/// Soon, so that tests are quick; what they decide does not depend on it.
fn options() -> Options {
    Options {
        timeout: Duration::from_millis(500),
        backoff: (Duration::from_millis(2), Duration::from_millis(20)),
        ..Options::default()
    }
}

async fn over(store: Arc<dyn Records>, dir: &Path) -> Durable {
    open::remote(store, dir, ROOM, options()).await.unwrap()
}

async fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let waited = tokio::time::timeout(LONG, async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    assert!(waited.await.is_ok(), "waited in vain for {what}");
}

async fn healthy(durable: &Durable) {
    wait_until("the journal to be replayed", || durable.state() == State::Healthy).await;
}

fn is_unavailable<T: std::fmt::Debug>(answer: Result<T, Error>) -> bool {
    matches!(answer, Err(Error::StoreUnavailable { .. }))
}

fn with_status(record: &Record, status: Status) -> Record {
    let mut record = record.clone();
    record.facts.status = status;
    record
}

fn with_user(user: &str) -> Record {
    let mut record = record();
    record.facts.user = Some(user.to_string());
    record
}

fn with_key(key: &str) -> Record {
    let mut record = record();
    record.facts.idempotency_key = Some(key.to_string());
    record
}

fn all(limit: usize) -> Query {
    Query { limit, with_output: true, ..Query::default() }
}

fn segments(dir: &Path) -> usize {
    let names = std::fs::read_dir(dir.join("journal")).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().ends_with(".segment")).count()
}

#[tokio::test]
async fn what_comes_while_the_store_is_away_reaches_it_in_order_and_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = Watched::new();
    let durable = over(store.clone(), dir.path()).await;
    let before = record();
    durable.put(std::slice::from_ref(&before)).await.unwrap();
    assert_eq!((durable.state(), segments(dir.path())), (State::Healthy, 0));

    store.set(Writes::Away);
    let records: Vec<Record> = (0..600).map(|_| sample()).collect();
    for group in records.chunks(7) {
        durable.put(group).await.unwrap();
    }
    let State::Journalling { entries, .. } = durable.state() else { panic!("{:?}", durable.state()) };
    assert_eq!(entries, 600);
    assert_eq!(store.memory.records().len(), 1);

    store.set(Writes::Taken);
    healthy(&durable).await;
    let expected: Vec<Written> =
        [&before].into_iter().chain(&records).map(|r| Written::Put(r.id, Status::Succeeded)).collect();
    assert_eq!(store.log(), expected);
    assert_eq!(store.memory.records(), [&[before][..], &records].concat());
    assert_eq!(segments(dir.path()), 0, "a replayed segment is deleted");

    // And straight to the store again.
    let after = record();
    durable.put(std::slice::from_ref(&after)).await.unwrap();
    assert_eq!(store.log().last(), Some(&Written::Put(after.id, Status::Succeeded)));
    assert_eq!(segments(dir.path()), 0);
}

#[tokio::test]
async fn a_store_that_does_not_answer_is_away_in_bounded_time() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(Memory::default());
    let options = Options { timeout: Duration::from_millis(50), ..options() };
    let durable = open::remote(store.clone(), dir.path(), ROOM, options).await.unwrap();
    store.set(Ailment::Slow(Duration::from_secs(3600)));
    let one = record();
    tokio::time::timeout(LONG, durable.put(std::slice::from_ref(&one))).await.unwrap().unwrap();
    assert!(matches!(durable.state(), State::Journalling { .. }));
    assert_eq!(durable.get(&one.id).await.unwrap(), Some(one));
    assert!(is_unavailable(durable.get(&InferenceId::new()).await));
}

#[tokio::test]
async fn an_answer_that_was_lost_leads_to_one_record() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(Memory::default());
    let durable = over(store.clone(), dir.path()).await;
    let (put, inserted) = (sample(), with_key("k"));
    store.set(Ailment::Mute);
    durable.put(std::slice::from_ref(&put)).await.unwrap();
    assert_eq!(durable.insert(&inserted).await.unwrap(), Inserted::New);
    let feedback = Feedback { at: now(), score: Some(1.0), label: None, comment: None };
    assert!(durable.add_feedback(&put.id, &feedback).await.unwrap());
    // Replayed again and again, each time without an answer.
    tokio::time::sleep(Duration::from_millis(60)).await;
    store.set(Ailment::None);
    healthy(&durable).await;
    let found = store.records();
    assert_eq!(found.len(), 2);
    assert_eq!(found[0].facts.feedback, [feedback]);
    assert_eq!(found[1], inserted);
}

#[tokio::test]
async fn a_replay_that_breaks_off_goes_on_where_the_store_is() {
    let dir = tempfile::tempdir().unwrap();
    let store = Watched::new();
    let durable = over(store.clone(), dir.path()).await;
    store.set(Writes::Away);
    let records: Vec<Record> = (0..900).map(|_| record()).collect();
    durable.put(&records).await.unwrap();
    for taken in [1, 100, 300, 255, 256, 257] {
        store.set(Writes::TakenThenAway(taken));
        wait_until("the store to break off", || durable_is_away(&store)).await;
    }
    store.set(Writes::Taken);
    healthy(&durable).await;
    assert_eq!(store.memory.records(), records);
    // Whole bulks are repeated, never what came before them.
    let repeated = store.log().len() - records.len();
    assert!(repeated <= 7 * 256, "{repeated}");
}

/// Whether it has taken what it was told to.
fn durable_is_away(store: &Watched) -> bool {
    futures::executor::block_on(store.ping()).is_err()
}

#[tokio::test]
async fn a_restart_replays_what_the_last_life_left() {
    let dir = tempfile::tempdir().unwrap();
    let store = Watched::new();
    store.set(Writes::Away);
    let mut records = Vec::new();
    for _ in 0..3 {
        let durable = over(store.clone(), dir.path()).await;
        let one = sample();
        durable.put(std::slice::from_ref(&one)).await.unwrap();
        records.push(one);
        assert_eq!(durable.get(&records[0].id).await.unwrap().as_ref(), Some(&records[0]));
        assert_eq!(durable.drain(Duration::from_millis(10)).await, records.len());
    }
    store.set(Writes::Taken);
    let durable = over(store.clone(), dir.path()).await;
    assert!(matches!(durable.state(), State::Journalling { entries: 3, .. }));
    // Written at once: behind what is older.
    let last = record();
    durable.put(std::slice::from_ref(&last)).await.unwrap();
    healthy(&durable).await;
    let written: Vec<InferenceId> =
        store.log().iter().map(|w| if let Written::Put(id, _) = w { *id } else { panic!() }).collect();
    let expected: Vec<InferenceId> = records.iter().chain([&last]).map(|record| record.id).collect();
    assert_eq!(written, expected);
    assert_eq!(durable.drain(Duration::from_secs(5)).await, 0);
}

#[tokio::test]
async fn a_drain_replays_what_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let store = Watched::new();
    let durable = over(store.clone(), dir.path()).await;
    store.set(Writes::Away);
    durable.put(&(0..500).map(|_| record()).collect::<Vec<_>>()).await.unwrap();
    store.set(Writes::Taken);
    assert_eq!(durable.drain(LONG).await, 0);
    assert_eq!(store.memory.records().len(), 500);
    // Drained, it still answers; with the store away it refuses.
    durable.put(&[record()]).await.unwrap();
    store.set(Writes::Away);
    assert!(matches!(durable.put(&[record()]).await, Err(Error::JournalFull { .. })));
}

#[tokio::test]
async fn a_full_journal_refuses_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Watched::new();
    let durable = open::remote(store.clone(), dir.path(), 200_000, options()).await.unwrap();
    store.set(Writes::Away);
    let mut kept = BTreeSet::new();
    let cause = loop {
        let one = record();
        match durable.put(std::slice::from_ref(&one)).await {
            Ok(()) => kept.insert(one.id),
            Err(Error::JournalFull { cause }) => break cause,
            Err(e) => panic!("{e}"),
        };
    };
    let State::Full { entries, cause: shown, .. } = durable.state() else { panic!("{:?}", durable.state()) };
    assert_eq!((entries, shown), (kept.len(), cause));
    store.set(Writes::Taken);
    healthy(&durable).await;
    assert_eq!(store.memory.records().iter().map(|record| record.id).collect::<BTreeSet<_>>(), kept);
    durable.put(&[record()]).await.unwrap();
}

#[tokio::test]
async fn what_the_store_refuses_for_good_is_set_aside_once_others_pass() {
    let dir = tempfile::tempdir().unwrap();
    let store = Watched::new();
    let durable = over(store.clone(), dir.path()).await;
    store.set(Writes::Away);
    let poison = record();
    durable.put(std::slice::from_ref(&poison)).await.unwrap();
    // A store that refuses everything, for want of a permission say: all of it waits.
    store.set(Writes::Refused);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(matches!(durable.state(), State::Journalling { entries: 1, .. }));
    store.set(Writes::Away);
    let good = [record(), record()];
    durable.put(&good).await.unwrap();
    store.refuse(poison.id);
    store.set(Writes::Taken);
    healthy(&durable).await;
    assert_eq!(store.memory.records(), good);
    let journal = std::fs::read_dir(dir.path().join("journal")).unwrap();
    let kept = journal.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().ends_with(".refused"));
    assert_eq!(kept.count(), 1);
}

#[tokio::test]
async fn an_entry_that_cannot_be_read_delays_the_others_and_does_not_stop_them() {
    let dir = tempfile::tempdir().unwrap();
    let store = Watched::new();
    let options = Options { patience: Duration::from_millis(50), ..options() };
    let durable = open::remote(store.clone(), dir.path(), ROOM, options).await.unwrap();
    store.set(Writes::Away);
    let records: Vec<Record> = (0..5).map(|_| record()).collect();
    durable.put(&records).await.unwrap();
    let journal = dir.path().join("journal");
    let name = std::fs::read_dir(&journal).unwrap().map(|entry| entry.unwrap().path());
    let name = name.into_iter().find(|path| path.extension().is_some_and(|e| e == "segment")).unwrap();
    let mut bytes = std::fs::read(&name).unwrap();
    // Within the facts of the second.
    let at = 16 + (bytes.len() - 16) / 5 + 100;
    bytes[at] ^= 1;
    std::fs::write(&name, bytes).unwrap();
    store.set(Writes::Taken);
    healthy(&durable).await;
    let expected: Vec<Record> = records.iter().enumerate().filter(|(i, _)| *i != 1).map(|(_, r)| r.clone()).collect();
    assert_eq!(store.memory.records(), expected);
    let kept = std::fs::read_dir(&journal).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(kept.into_iter().any(|name| name.to_string_lossy().ends_with(".damaged")));
}

// ---- order -----------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_write_overtakes_an_earlier_one_of_its_record() {
    let dir = tempfile::tempdir().unwrap();
    let store = Watched::new();
    let durable = Arc::new(over(store.clone(), dir.path()).await);
    let writers: Vec<_> = (0..16)
        .map(|_| {
            let durable = durable.clone();
            tokio::spawn(async move {
                let mut ids = Vec::new();
                for _ in 0..40 {
                    let one = record();
                    for status in [Status::Queued, Status::Running, Status::Succeeded] {
                        durable.put(&[with_status(&one, status)]).await.unwrap();
                        tokio::task::yield_now().await;
                    }
                    ids.push(one.id);
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                ids
            })
        })
        .collect();
    let done = Arc::new(AtomicBool::new(false));
    let flapping = tokio::spawn({
        let (store, done) = (store.clone(), done.clone());
        async move {
            let mut rng = StdRng::seed_from_u64(3);
            while !done.load(Ordering::Relaxed) {
                store.set(Writes::TakenThenAway(rng.random_range(0..60)));
                tokio::time::sleep(Duration::from_millis(rng.random_range(0..15))).await;
                store.set(Writes::Taken);
                tokio::time::sleep(Duration::from_millis(rng.random_range(0..15))).await;
            }
        }
    });
    let mut expected = BTreeSet::new();
    for writer in writers {
        expected.extend(writer.await.unwrap());
    }
    done.store(true, Ordering::Relaxed);
    flapping.await.unwrap();
    store.set(Writes::Taken);
    healthy(&durable).await;

    let found = store.memory.records();
    assert!(found.iter().all(|record| record.facts.status == Status::Succeeded));
    assert_eq!(found.iter().map(|record| record.id).collect::<BTreeSet<_>>(), expected);
    // A bulk that broke off is repeated from its beginning; what was repeated leaves no older state behind, and a first
    // write never comes after a later one.
    let mut seen: BTreeMap<InferenceId, Vec<Status>> = BTreeMap::new();
    for written in store.log() {
        if let Written::Put(id, status) = written {
            seen.entry(id).or_default().push(status);
        }
    }
    let rank = |status: &Status| [Status::Queued, Status::Running, Status::Succeeded].iter().position(|s| s == status);
    for (id, statuses) in seen {
        assert!(statuses.iter().map(rank).is_sorted(), "{id}: {statuses:?}");
    }
}

#[tokio::test]
async fn deletions_stay_behind_what_they_delete() {
    let dir = tempfile::tempdir().unwrap();
    let store = Watched::new();
    let durable = over(store.clone(), dir.path()).await;
    let [stored, again, gone] = std::array::from_fn(|_| record());
    durable.put(&[stored.clone(), again.clone()]).await.unwrap();
    store.set(Writes::Away);
    durable.put(std::slice::from_ref(&gone)).await.unwrap();
    // Wait until a replay has failed and the store is asked again, or the reads below are refused.
    for id in [stored.id, again.id, gone.id] {
        delete(&store, &durable, &id).await;
        assert!(!durable.delete(&id).await.unwrap());
        assert_eq!(durable.get(&id).await.unwrap(), None);
    }
    durable.put(std::slice::from_ref(&again)).await.unwrap();
    store.set(Writes::Taken);
    healthy(&durable).await;
    assert_eq!(store.memory.records(), std::slice::from_ref(&again));
    let log = store.log();
    assert!(!log.contains(&Written::Put(gone.id, Status::Succeeded)), "what is deleted need not be written");
    let of_again: Vec<&Written> =
        log.iter().filter(|w| matches!(w, Written::Put(id, _) | Written::Delete(id) if *id == again.id)).collect();
    assert_eq!(of_again.len(), 3);
    assert_eq!(of_again[1], &Written::Delete(again.id));
}

/// Deletes while writes are refused, so that the store answers reads and the journal stays.
async fn delete(store: &Watched, durable: &Durable, id: &InferenceId) {
    store.set(Writes::Refused);
    let deleted = tokio::time::timeout(LONG, async {
        loop {
            match durable.delete(id).await {
                // Until the replay has learned that the store answers.
                Err(Error::StoreUnavailable { .. }) => tokio::time::sleep(Duration::from_millis(2)).await,
                other => return other,
            }
        }
    });
    assert_eq!(deleted.await.unwrap(), Ok(true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_comes_back_to_the_store_while_writes_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let store = Watched::new();
    let durable = Arc::new(over(store.clone(), dir.path()).await);
    let done = Arc::new(AtomicBool::new(false));
    let num_written = Arc::new(AtomicUsize::new(0));
    let writers: Vec<_> = (0..8)
        .map(|_| {
            let (durable, done, num_written) = (durable.clone(), done.clone(), num_written.clone());
            tokio::spawn(async move {
                while !done.load(Ordering::Relaxed) {
                    durable.put(&[record()]).await.unwrap();
                    num_written.fetch_add(1, Ordering::Relaxed);
                    // A store in memory never makes a task wait, and timers need a thread now and then.
                    tokio::time::sleep(Duration::from_micros(200)).await;
                }
            })
        })
        .collect();
    for _ in 0..5 {
        store.set(Writes::Away);
        wait_until("the journal to be used", || durable.state() != State::Healthy).await;
        tokio::time::sleep(Duration::from_millis(30)).await;
        store.set(Writes::Taken);
        // No pause of the writers is needed.
        healthy(&durable).await;
    }
    done.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    healthy(&durable).await;
    assert_eq!(store.memory.records().len(), num_written.load(Ordering::Relaxed));
}

// ---- keys ------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_names_one_record_in_the_journal_too() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(Memory::default());
    let durable = Arc::new(over(store.clone(), dir.path()).await);
    store.set(Ailment::Away);
    for round in 0..20 {
        let key = format!("key {round}");
        let inserts: Vec<_> = (0..8)
            .map(|_| {
                let (durable, one) = (durable.clone(), with_key(&key));
                tokio::spawn(async move { (one.id, durable.insert(&one).await.unwrap()) })
            })
            .collect();
        let mut winners = Vec::new();
        let mut told = Vec::new();
        for insert in inserts {
            match insert.await.unwrap() {
                (id, Inserted::New) => winners.push(id),
                (_, Inserted::Exists(there)) => told.push(there.id),
            }
        }
        assert_eq!(winners.len(), 1);
        assert!(told.iter().all(|id| *id == winners[0]));
        assert_eq!(durable.find_by_key(&key).await.unwrap().map(|record| record.id), Some(winners[0]));
    }
    // An id is taken as well as a key.
    let one = record();
    assert_eq!(durable.insert(&one).await.unwrap(), Inserted::New);
    assert_eq!(durable.insert(&one).await.unwrap(), Inserted::Exists(Box::new(one)));
    store.set(Ailment::None);
    healthy(&durable).await;
    assert_eq!(store.records().len(), 21);
}

#[tokio::test]
async fn a_key_that_the_store_holds_costs_the_second_record_its_key_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(Memory::default());
    let durable = over(store.clone(), dir.path()).await;
    store.set(Ailment::Away);
    let (first, second) = (with_key("k"), with_key("k"));
    assert_eq!(durable.insert(&second).await.unwrap(), Inserted::New);
    // Another replica, which reaches the store or whose journal comes first.
    store.set(Ailment::None);
    store.put(std::slice::from_ref(&first)).await.unwrap();
    healthy(&durable).await;
    assert_eq!(durable.find_by_key("k").await.unwrap().map(|record| record.id), Some(first.id));
    let found = durable.get(&second.id).await.unwrap().unwrap();
    assert_eq!((found.facts.idempotency_key, found.output), (None, second.output));
}

#[tokio::test]
async fn keys_in_the_store_count_as_long_as_it_answers() {
    let dir = tempfile::tempdir().unwrap();
    let store = Watched::new();
    let durable = over(store.clone(), dir.path()).await;
    let first = with_key("k");
    durable.insert(&first).await.unwrap();
    store.set(Writes::Away);
    durable.put(&[record()]).await.unwrap();
    store.set(Writes::Refused);
    wait_until("the store to be asked again", || futures::executor::block_on(durable.get(&InferenceId::new())).is_ok())
        .await;
    assert_eq!(durable.insert(&with_key("k")).await.unwrap(), Inserted::Exists(Box::new(first)));
}

// ---- reading ---------------------------------------------------------------------------------------------------

#[tokio::test]
async fn records_of_the_journal_are_read_while_the_store_is_away() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(Memory::default());
    let durable = over(store.clone(), dir.path()).await;
    let stored = record();
    durable.put(std::slice::from_ref(&stored)).await.unwrap();
    store.set(Ailment::Away);
    let mut one = sample();
    durable.put(&[with_status(&one, Status::Queued)]).await.unwrap();
    durable.put(std::slice::from_ref(&one)).await.unwrap();
    let feedback = Feedback { at: now(), score: None, label: Some("good".into()), comment: None };
    assert!(durable.add_feedback(&one.id, &feedback).await.unwrap());
    one.facts.feedback.push(feedback.clone());
    assert_eq!(durable.get(&one.id).await.unwrap(), Some(one.clone()));
    let key = one.facts.idempotency_key.clone().unwrap();
    assert_eq!(durable.find_by_key(&key).await.unwrap(), Some(one.clone()));
    // What may be in the store alone is not said to be missing.
    assert!(is_unavailable(durable.get(&stored.id).await));
    assert!(is_unavailable(durable.find_by_key("another").await));
    assert!(is_unavailable(durable.list(&all(10)).await));
    assert!(is_unavailable(durable.delete(&stored.id).await));
    assert!(is_unavailable(durable.add_feedback(&stored.id, &feedback).await));
    assert!(durable.delete(&one.id).await.unwrap());
    assert_eq!(durable.get(&one.id).await.unwrap(), None);
    store.set(Ailment::None);
    healthy(&durable).await;
    assert_eq!(store.records(), [stored]);
}

#[tokio::test]
async fn numbers_are_the_stores_and_say_what_the_journal_holds() {
    let dir = tempfile::tempdir().unwrap();
    let store = Watched::new();
    let durable = over(store.clone(), dir.path()).await;
    let by = vec![Dimension::Model];
    let usage = UsageQuery { model: None, user: None, from: None, to: None, by, limit: 10, timeout: LONG };
    let quality = QualityQuery { model: None, version: None, from: None, to: None, timeout: LONG };
    durable.put(&[sample()]).await.unwrap();
    store.set(Writes::Away);
    durable.put(&[sample(), sample()]).await.unwrap();
    // As for a list: what lacks most would be taken for the whole.
    assert!(is_unavailable(durable.usage(&usage).await));
    assert!(is_unavailable(durable.quality(&quality).await));
    // It answers again, and has not taken what is in the journal.
    store.set(Writes::Refused);
    let start = std::time::Instant::now();
    let told = loop {
        match durable.usage(&usage).await {
            Ok(told) => break told,
            Err(error) => assert!(is_unavailable::<()>(Err(error)) && start.elapsed() < LONG),
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    };
    assert_eq!((told.rows[0].usage.num_requests, told.num_pending), (1, 2));
    let told = durable.quality(&quality).await.unwrap();
    assert_eq!((told.rows[0].num_requests, told.num_pending), (1, 2));
    store.set(Writes::Taken);
    healthy(&durable).await;
    let told = durable.usage(&usage).await.unwrap();
    assert_eq!((told.rows[0].usage.num_requests, told.num_pending), (3, 0));
    assert_eq!(durable.quality(&quality).await.unwrap().rows[0].num_requests, 3);
}

#[tokio::test]
async fn an_erasure_reaches_store_and_journal_and_not_what_comes_later() {
    let dir = tempfile::tempdir().unwrap();
    let store = Watched::new();
    let handed_on: Arc<Mutex<Vec<Record>>> = Arc::default();
    let on_erased = {
        let handed_on = handed_on.clone();
        Arc::new(move |records| handed_on.lock().extend(records))
    };
    let durable = open::remote(store.clone(), dir.path(), ROOM, Options { on_erased, ..options() }).await.unwrap();
    let stored: Vec<Record> = (0..3).map(|_| with_user("u")).collect();
    let other = with_user("v");
    durable.put(&[&stored[..], std::slice::from_ref(&other)].concat()).await.unwrap();
    store.set(Writes::Away);
    let journalled: Vec<Record> = (0..5).map(|_| with_user("u")).collect();
    durable.put(&journalled).await.unwrap();

    // Those of the journal come at once, in portions; those of the store when it is back.
    let mut erased = BTreeSet::new();
    loop {
        let portion = durable.erase_user("u", 2).await.unwrap();
        erased.extend(portion.iter().map(|record| record.id));
        if portion.len() < 2 {
            break;
        }
    }
    assert_eq!(erased, journalled.iter().map(|record| record.id).collect::<BTreeSet<_>>());
    assert_eq!(durable.get(&journalled[0].id).await.unwrap(), None);
    let later = with_user("u");
    durable.put(std::slice::from_ref(&later)).await.unwrap();
    // Nor is what the store still has of them shown, once it answers.
    store.set(Writes::Refused);
    wait_until("the store to be asked again", || futures::executor::block_on(durable.get(&InferenceId::new())).is_ok())
        .await;
    assert_eq!(durable.get(&stored[0].id).await.unwrap(), None);
    let shown: Vec<InferenceId> = durable.list(&all(10)).await.unwrap().records.iter().map(|r| r.id).collect();
    assert_eq!(shown, [later.id, other.id]);

    store.set(Writes::Taken);
    healthy(&durable).await;
    assert_eq!(store.memory.records(), [other, later]);
    let handed_on: BTreeSet<InferenceId> = handed_on.lock().iter().map(|record| record.id).collect();
    assert_eq!(handed_on, stored.iter().map(|record| record.id).collect());
    for id in journalled.iter().map(|record| record.id) {
        assert!(!store.log().contains(&Written::Put(id, Status::Succeeded)), "an erased record is not written first");
    }
}

/// Every page, followed to its end.
async fn pages(store: &dyn Records, query: &Query) -> Vec<Record> {
    let mut query = query.clone();
    let mut found = Vec::new();
    for _ in 0..10_000 {
        let page = store.list(&query).await.unwrap();
        assert!(page.records.len() <= query.limit);
        found.extend(page.records);
        match page.next {
            None => return found,
            after => query.after = after,
        }
    }
    panic!("the pages have no end");
}

#[tokio::test]
async fn lists_are_those_of_a_store_that_had_everything() {
    for seed in 0..8 {
        let mut rng = StdRng::seed_from_u64(seed);
        let dir = tempfile::tempdir().unwrap();
        let (store, model) = (Watched::new(), Memory::default());
        let durable = over(store.clone(), dir.path()).await;
        let mut ids: Vec<InferenceId> = Vec::new();
        for step in 0..700 {
            if step == 250 {
                store.set(Writes::Away);
                put(&durable, &model, record()).await;
            }
            if step == 251 {
                store.set(Writes::Refused);
            }
            match rng.random_range(0..20) {
                0 if !ids.is_empty() => {
                    let id = ids[rng.random_range(0..ids.len())];
                    assert_eq!(retried(|| durable.delete(&id)).await, model.delete(&id).await.unwrap());
                }
                1 if !ids.is_empty() => {
                    let id = ids[rng.random_range(0..ids.len())];
                    let said = Feedback { at: now(), score: Some(0.5), label: None, comment: Some(step.to_string()) };
                    let known = retried(|| durable.add_feedback(&id, &said)).await;
                    assert_eq!(known, model.add_feedback(&id, &said).await.unwrap());
                }
                2 if step % 9 == 0 => {
                    let user = format!("u{}", rng.random_range(0..4));
                    durable.erase_user(&user, 10_000).await.unwrap();
                    model.erase_user(&user, 10_000).await.unwrap();
                }
                3..=5 if !ids.is_empty() => {
                    // A later state of one that may be there.
                    let id = ids[rng.random_range(0..ids.len())];
                    if let Some(mut known) = model.get(&id).await.unwrap() {
                        known.facts.status = Status::Succeeded;
                        put(&durable, &model, known).await;
                    }
                }
                _ => {
                    let mut one = record();
                    one.facts.user = Some(format!("u{}", rng.random_range(0..4)));
                    one.facts.model = format!("m{}", rng.random_range(0..2));
                    one.facts.status = if rng.random_bool(0.5) { Status::Queued } else { Status::Succeeded };
                    one.facts.metadata = [("n".to_string(), (step % 3).to_string())].into();
                    ids.push(one.id);
                    put(&durable, &model, one).await;
                }
            }
        }
        assert!(matches!(durable.state(), State::Journalling { .. }), "{:?}", durable.state());
        wait_until("the store to be asked again", || futures::executor::block_on(durable.list(&all(1))).is_ok()).await;
        let middle = ids[ids.len() / 2].created_at();
        let queries = [
            all(7),
            all(1000),
            Query { user: Some("u1".into()), ..all(5) },
            Query { status: Some(Status::Queued), ..all(13) },
            Query { status: Some(Status::Succeeded), model: Some("m1".into()), ..all(3) },
            Query { metadata: [("n".to_string(), "1".to_string())].into(), ..all(50) },
            Query { from: Some(middle), ..all(4) },
            Query { to: Some(middle), with_output: false, ..all(4) },
            Query { user: Some("nobody".into()), ..all(4) },
        ];
        for query in &queries {
            assert_eq!(pages(&durable, query).await, pages(&model, query).await, "seed {seed} {query:?}");
        }
        for id in &ids {
            assert_eq!(durable.get(id).await.unwrap(), model.get(id).await.unwrap(), "seed {seed} {id}");
        }
        store.set(Writes::Taken);
        healthy(&durable).await;
        assert_eq!(store.memory.records(), model.records(), "seed {seed}");
    }
}

async fn put(durable: &Durable, model: &Memory, record: Record) {
    durable.put(std::slice::from_ref(&record)).await.unwrap();
    model.put(&[record]).await.unwrap();
}

/// Until the replay has learned that the store answers reads.
async fn retried<F: Future<Output = Result<bool, Error>>>(call: impl Fn() -> F) -> bool {
    let answered = tokio::time::timeout(LONG, async {
        loop {
            match call().await {
                Err(Error::StoreUnavailable { .. }) => tokio::time::sleep(Duration::from_millis(2)).await,
                other => return other.unwrap(),
            }
        }
    });
    answered.await.unwrap()
}

// ---- old records -----------------------------------------------------------------------------------------------

#[tokio::test]
async fn old_records_are_deleted_and_young_ones_are_not() {
    let store = Memory::default();
    let records: Vec<Record> = (0..2500).map(|_| record()).collect();
    store.put(&records).await.unwrap();
    let hour = Duration::from_secs(3600);
    let later = |seconds| now() + jiff::SignedDuration::from_secs(seconds);
    assert_eq!(open::expire(&store, hour, later(3000)).await, Ok(0));
    assert_eq!(open::expire(&store, hour, later(3700)).await, Ok(2500));
    assert_eq!(open::expire(&store, Duration::MAX, later(0)).await, Ok(0));
    let store: Arc<dyn Records> = Arc::new(store);
    assert!(open::Expiry::start(store.clone(), Duration::ZERO).is_none());
    // At its first look.
    let mut old = record();
    old.id = InferenceId::first_at(later(-7200));
    let young = record();
    store.put(&[old, young]).await.unwrap();
    let _expiry = open::Expiry::start(store.clone(), hour).unwrap();
    wait_until("the old one to go", || futures::executor::block_on(store.count()) == Ok(1)).await;
}
