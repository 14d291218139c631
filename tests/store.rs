//! What stores promise, held to by each of them; and what only one of them promises.

#[path = "store/contract.rs"]
mod contract;
#[path = "store/embedded.rs"]
mod embedded;
#[path = "store/numbers.rs"]
mod numbers;
#[allow(dead_code)]
#[path = "common/process.rs"]
mod process;
#[path = "store/samples.rs"]
mod samples;
#[allow(dead_code)]
#[path = "common/servers/mod.rs"]
mod servers;
#[allow(dead_code)] // what tests of the journal itself need
#[path = "durable/watched.rs"]
mod watched;

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use eremois::Error;
use eremois::store::durable::{Durable, Options};
use eremois::store::embedded::Embedded;
use eremois::store::memory::{Ailment, Memory};
use eremois::store::mongo::{MongoSettings, MongoStore};
use eremois::store::query::Query;
use eremois::store::{Records, open};
use futures::future::BoxFuture;
use servers::mongodb::MongoDb;
use watched::{Watched, Writes};

/// Makes an empty store of its own for a test; `None` where its server is not installed.
type Open = fn() -> BoxFuture<'static, Option<Opened>>;

/// Every store, and how a test gets an empty one. A store that is added here is held to the whole contract.
const STORES: &[(&str, Open)] =
    &[("memory", memory), ("embedded", embedded), ("durable", durable), ("journal", journal), ("mongodb", mongodb)];

/// An empty store.
struct Opened {
    records: Arc<dyn Records>,
    /// What it lies in; gone when the test is over.
    _folder: Option<tempfile::TempDir>,
    _server: Option<MongoDb>,
}

fn memory() -> BoxFuture<'static, Option<Opened>> {
    Box::pin(async { Some(Opened { records: Arc::new(Memory::default()), _folder: None, _server: None }) })
}

fn embedded() -> BoxFuture<'static, Option<Opened>> {
    Box::pin(async {
        let folder = tempfile::tempdir().unwrap();
        let store = Embedded::open(folder.path()).unwrap();
        Some(Opened { records: Arc::new(store), _folder: Some(folder), _server: None })
    })
}

fn mongodb() -> BoxFuture<'static, Option<Opened>> {
    Box::pin(async {
        let server = MongoDb::start()?;
        let url = server.url();
        let settings = MongoSettings { url, pool_size: 16, replica_set: None, retention: Duration::ZERO };
        let store = MongoStore::new(settings).unwrap();
        // Collections and indexes take longer than a call may where the machine is busy.
        store.migrate().await.unwrap();
        Some(Opened { records: Arc::new(store), _folder: None, _server: Some(server) })
    })
}

/// A store with a journal that is not needed.
fn durable() -> BoxFuture<'static, Option<Opened>> {
    Box::pin(async {
        let folder = tempfile::tempdir().unwrap();
        let store = journalled(Arc::new(Memory::default()), folder.path()).await;
        Some(Opened { records: Arc::new(store), _folder: Some(folder), _server: None })
    })
}

/// A journal before a store that answers reads and takes no writes: what is written is read from the journal.
fn journal() -> BoxFuture<'static, Option<Opened>> {
    Box::pin(async {
        let folder = tempfile::tempdir().unwrap();
        let store = Watched::new();
        store.set(Writes::Away);
        let records = journalled(store.clone(), folder.path()).await;
        // From the first write that fails on, all go to the journal.
        let passing = samples::record();
        records.put(std::slice::from_ref(&passing)).await.unwrap();
        assert_eq!(records.delete(&passing.id).await, Ok(true));
        store.set(Writes::Refused);
        // The replay learns that the store answers.
        while records.list(&Query { limit: 1, ..Query::default() }).await.is_err() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Some(Opened { records: Arc::new(records), _folder: Some(folder), _server: None })
    })
}

async fn journalled(store: Arc<dyn Records>, folder: &Path) -> Durable {
    let options = Options { backoff: (Duration::from_millis(1), Duration::from_millis(50)), ..Options::default() };
    open::remote(store, folder, 1 << 30, options).await.unwrap()
}

/// Runs a part of the contract on each store, a fresh one each time.
fn on_every_store<F: Future<Output = ()>>(test: fn(Arc<dyn Records>) -> F) {
    on_stores_but("", test);
}

fn on_stores_but<F: Future<Output = ()>>(left_out: &str, test: fn(Arc<dyn Records>) -> F) {
    for (name, open) in STORES.iter().filter(|(name, _)| *name != left_out) {
        // Shown with a failure: whose it is.
        println!("on the store `{name}`");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            // Who is left out has said so.
            if let Some(opened) = open().await {
                test(opened.records.clone()).await;
            }
        });
    }
}

#[test]
fn an_empty_store_answers() {
    on_every_store(contract::an_empty_store_answers);
}

#[test]
fn a_record_comes_back_as_it_was_written() {
    on_every_store(contract::a_record_comes_back_as_it_was_written);
}

#[test]
fn outputs_come_back_bit_by_bit() {
    on_every_store(contract::outputs_come_back_bit_by_bit);
}

#[test]
fn large_records_are_whole() {
    on_every_store(contract::large_records_are_whole);
}

#[test]
fn put_replaces_what_may_change() {
    on_every_store(contract::put_replaces_what_may_change);
}

#[test]
fn put_writes_many_and_repeats() {
    on_every_store(contract::put_writes_many_and_repeats);
}

#[test]
fn feedback_is_kept() {
    on_every_store(contract::feedback_is_kept);
}

#[test]
fn insert_says_what_was_there() {
    on_every_store(contract::insert_says_what_was_there);
}

#[test]
fn put_leaves_a_key_to_its_holder() {
    on_every_store(contract::put_leaves_a_key_to_its_holder);
}

#[test]
fn one_of_many_inserts_of_a_key_wins() {
    on_every_store(contract::one_of_many_inserts_of_a_key_wins);
}

#[test]
fn pages_follow_each_other() {
    on_every_store(contract::pages_follow_each_other);
}

#[test]
fn a_late_record_stands_at_its_time() {
    on_every_store(contract::a_late_record_stands_at_its_time);
}

#[test]
fn filters_hold_alone_and_together() {
    on_every_store(contract::filters_hold_alone_and_together);
}

#[test]
fn pages_are_stable_while_others_write() {
    on_every_store(contract::pages_are_stable_while_others_write);
}

#[test]
fn what_is_deleted_is_gone() {
    on_every_store(contract::what_is_deleted_is_gone);
}

#[test]
fn a_user_is_erased_in_chunks() {
    on_every_store(contract::a_user_is_erased_in_chunks);
}

#[test]
fn old_records_expire() {
    // What is in a journal expires once the store has it.
    on_stores_but("journal", contract::old_records_expire);
}

#[test]
fn many_write_at_once() {
    on_every_store(contract::many_write_at_once);
}

// What is in a journal alone is in no numbers: `tests/durable.rs`.

#[test]
fn an_empty_store_has_no_numbers() {
    on_stores_but("journal", numbers::an_empty_store_has_no_numbers);
}

#[test]
fn usage_adds_up() {
    on_stores_but("journal", numbers::usage_adds_up);
}

#[test]
fn usage_is_told_up_to_a_limit() {
    on_stores_but("journal", numbers::usage_is_told_up_to_a_limit);
}

#[test]
fn quality_is_that_of_each_version() {
    on_stores_but("journal", numbers::quality_is_that_of_each_version);
}

#[test]
fn numbers_follow_the_records() {
    on_stores_but("journal", numbers::numbers_follow_the_records);
}

#[test]
fn numbers_end_in_time() {
    on_stores_but("journal", numbers::numbers_end_in_time);
}

#[tokio::test]
async fn the_memory_can_lose_its_answers() {
    let store = Memory::default();
    let written = samples::record();
    store.set(Ailment::Mute);
    let lost = store.put(std::slice::from_ref(&written)).await;
    assert!(matches!(lost, Err(Error::StoreUnavailable { .. })), "{lost:?}");
    store.set(Ailment::None);
    assert_eq!(store.records(), [written]);
}
