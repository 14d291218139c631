//! What stores of background work promise, held to by each of them; and what only one of them promises.

#[path = "work/documents.rs"]
mod documents;
#[path = "work/embedded.rs"]
mod embedded;
#[path = "work/model.rs"]
mod model;
#[path = "work/mongodb.rs"]
mod mongodb;
#[path = "work/parts.rs"]
mod parts;
#[allow(dead_code)]
#[path = "common/process.rs"]
mod process;
#[path = "work/samples.rs"]
mod samples;
#[allow(dead_code)]
#[path = "common/servers/mod.rs"]
mod servers;
#[path = "work/tasks.rs"]
mod tasks;

use std::future::Future;
use std::sync::Arc;

use eremois::store::embedded::Embedded;
use eremois::store::work::Work;
use eremois::store::work::memory::MemoryWork;
use futures::future::BoxFuture;
use servers::mongodb::MongoDb;

/// Makes an empty store of its own for a test; `None` where its server is not installed.
type Open = fn() -> BoxFuture<'static, Option<Opened>>;

/// Every store, and how a test gets an empty one. A store that is added here is held to the whole contract.
const STORES: &[(&str, Open)] = &[("memory", memory), ("embedded", embedded), ("mongodb", mongodb)];

/// An empty store.
struct Opened {
    work: Arc<dyn Work>,
    /// What it lies in; gone when the test is over.
    _folder: Option<tempfile::TempDir>,
    _server: Option<MongoDb>,
}

fn memory() -> BoxFuture<'static, Option<Opened>> {
    Box::pin(async { Some(Opened { work: Arc::new(MemoryWork::default()), _folder: None, _server: None }) })
}

fn embedded() -> BoxFuture<'static, Option<Opened>> {
    Box::pin(async {
        let folder = tempfile::tempdir().unwrap();
        let store = Embedded::open(folder.path()).unwrap();
        Some(Opened { work: Arc::new(store), _folder: Some(folder), _server: None })
    })
}

fn mongodb() -> BoxFuture<'static, Option<Opened>> {
    Box::pin(async {
        let server = MongoDb::start()?;
        let store = mongodb::prepared(&server.url()).await;
        Some(Opened { work: Arc::new(store), _folder: None, _server: Some(server) })
    })
}

/// Runs a part of the contract on each store, a fresh one each time.
fn on_every_store<F: Future<Output = ()>>(test: fn(Arc<dyn Work>) -> F) {
    for (name, open) in STORES {
        // Shown with a failure: whose it is.
        println!("on the store `{name}`");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            // Who is left out has said so.
            if let Some(opened) = open().await {
                test(opened.work.clone()).await;
            }
        });
    }
}

/// A test a promise, on every store.
macro_rules! on_every_store {
    ($($module:ident::$promise:ident),* $(,)?) => {
        $(
            #[test]
            fn $promise() {
                on_every_store($module::$promise);
            }
        )*
    };
}

on_every_store! {
    tasks::an_empty_store_answers,
    tasks::a_task_comes_back_as_it_was_pushed,
    tasks::what_is_pushed_again_is_left_as_it_is,
    tasks::what_is_due_the_longest_is_claimed_first,
    tasks::a_claim_gets_only_what_it_names,
    tasks::nobody_gets_a_held_task_until_its_lease_is_over,
    tasks::a_lease_is_renewed_by_its_owner_alone,
    tasks::what_is_finished_is_gone,
    tasks::what_is_postponed_is_due_again_in_time,
    tasks::what_waits_is_cancelled_at_once,
    tasks::the_owner_learns_of_a_cancellation,
    tasks::a_cancelled_task_of_a_dead_owner_is_gone,
    tasks::tasks_are_counted_by_kind,
    tasks::many_claimers_never_share_a_task,
    tasks::one_of_many_ends_a_task,
    tasks::payloads_of_several_mib_are_whole,
    tasks::ids_may_have_their_longest,
    documents::a_document_comes_back_as_it_was_created,
    documents::one_of_many_creates_a_document,
    documents::what_was_read_is_replaced_and_no_other_revision,
    documents::replacing_leaves_kind_id_and_parent,
    documents::no_change_of_many_is_lost,
    documents::what_is_removed_is_gone,
    documents::lists_fall_by_the_bytes_of_ids,
    documents::pages_follow_each_other,
    documents::a_page_has_its_limit,
    documents::what_is_over_comes_earliest_first,
    parts::parts_come_back_bit_by_bit,
    parts::a_part_has_its_limit,
    parts::a_part_is_replaced,
    parts::all_parts_of_a_file_go_and_no_others,
    model::any_calls_have_the_outcomes_of_the_plain_store,
}
