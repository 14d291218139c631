//! Processes that end at any point, lose their leases and run what others run: each request is in the files once.

use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use eremois::inference::keep::Scope;
use eremois::jobs::JobSettings;
use eremois::jobs::runner::Outcome;
use eremois::jobs::sweep::Sweep;
use eremois::store::record;
use eremois::store::work::{Claim, Hold, TaskKind};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use super::common::http::{self, LONG, Server, server_of};
use super::help::{self, Handlers, Watched, batch_of, ended, handlers, input, lines_of};

/// Polls a future a few times, and drops it where it is.
async fn cut<T>(future: impl Future<Output = T>, num_polls: u32) -> Option<T> {
    let mut future = pin!(future);
    let mut left = num_polls;
    std::future::poll_fn(move |context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        future.as_mut().poll(context).map(Some)
    })
    .await
}

/// A process: takes a task, does it, and dies now and then, after which its lease has to be over.
async fn process(server: &Server, handlers: &Handlers, seed: u64, end: Instant) {
    let mut random = StdRng::seed_from_u64(seed);
    let work = &server.state.tasks.work;
    while Instant::now() < end {
        let lease = Duration::from_millis(random.random_range(1..60));
        let now = record::now();
        let owner = format!("process {seed} {}", random.random::<u32>());
        let kinds = vec![TaskKind::Batch, TaskKind::Chunk];
        let claim = Claim { owner: owner.clone(), now, due_by: now, lease, limit: 1, kinds, ids: None };
        let Ok(tasks) = work.claim(&claim).await else { continue };
        let Some(task) = tasks.first() else {
            match work.num_tasks().await {
                Ok(counts) if counts.iter().all(|(_, count)| *count == 0) => return,
                _ => tokio::time::sleep(Duration::from_millis(2)).await,
            }
            continue;
        };
        let handler = &handlers[&task.kind];
        // Most often it dies, as likely near the start as far into the work.
        let num_polls = if random.random_ratio(1, 3) { u32::MAX } else { 1 << random.random_range(0..11) };
        match cut(handler.run(task), num_polls).await {
            Some(Ok(Outcome::Done)) if random.random_ratio(4, 5) => {
                let _: Result<Hold, _> = work.finish(&task.id, &owner).await;
            }
            Some(Ok(Outcome::Again(_)) | Err(_)) => {
                let _ = work.postpone(&task.id, &owner, record::now()).await;
            }
            Some(Ok(Outcome::Done)) | None => {}
        }
    }
    panic!("the batch does not end");
}

async fn torn_server(failures: u32) -> (Server, Arc<Watched>) {
    let work = Arc::new(Watched::default());
    let jobs = JobSettings::default();
    let server = server_of(http::settings(), http::limits(), None, Scope::Application, jobs, work.clone()).await;
    work.fail_sometimes(failures);
    (server, work)
}

/// Runs three processes until there is nothing to do.
async fn run(server: &Server, seed: u64) {
    let handlers = [handlers(server), handlers(server), handlers(server)];
    let end = Instant::now() + 2 * LONG;
    let [a, b, c] = &handlers;
    tokio::join!(
        process(server, a, 3 * seed, end),
        process(server, b, 3 * seed + 1, end),
        process(server, c, 3 * seed + 2, end),
    );
}

/// What is in the store is what the documents speak of; nothing of those who died is left once their time is over.
async fn no_leftovers(server: &Server, work: &Watched, batch: &Value) {
    let sweep = Sweep::new(server.state.tasks.clone(), server.state.jobs.clone());
    // Beyond the drafts' time, before the files'.
    let later = record::now().checked_add(jiff::SignedDuration::from_hours(24 * 5)).unwrap();
    while sweep.once(later).await.unwrap() > 0 {}
    let num_lines =
        lines_of(server, &batch["output_file_id"]).await.len() + lines_of(server, &batch["error_file_id"]).await.len();
    assert_eq!(num_lines as u64, batch["request_counts"]["total"].as_u64().unwrap());
    let ids: Vec<&str> = [&batch["input_file_id"], &batch["output_file_id"], &batch["error_file_id"]]
        .into_iter()
        .filter_map(Value::as_str)
        .collect();
    let mut named = 1; // The plan.
    for id in ids {
        let file =
            server.state.tasks.work.document(eremois::store::work::DocumentKind::File, id).await.unwrap().unwrap();
        let segments = file.body["segments"].as_array().unwrap();
        named += segments.iter().map(|segment| segment["part_lens"].as_array().unwrap().len()).sum::<usize>();
    }
    assert_eq!(work.parts().len(), named);
}

/// A prime, so that the last chunk is not full.
const COUNT: usize = 211;

fn text(i: usize) -> String {
    // Some are refused, so that there are both files.
    if i % 29 == 3 { String::new() } else { format!("w{i} w{}", i % 7) }
}

async fn survives(seed: u64, failures: u32) {
    let (server, work) = torn_server(0).await;
    let made = batch_of(&server, &input(COUNT, text), "24h").await;
    work.fail_sometimes(failures);
    run(&server, seed).await;
    work.fail_sometimes(0);
    let batch = ended(&server, &made).await;
    assert_eq!(batch["status"], "completed", "seed {seed}: {batch}");
    let (output, errors) =
        (lines_of(&server, &batch["output_file_id"]).await, lines_of(&server, &batch["error_file_id"]).await);
    let num_failed = (0..COUNT).filter(|i| text(*i).is_empty()).count();
    assert_eq!((output.len(), errors.len()), (COUNT - num_failed, num_failed), "seed {seed}");
    let counts = &batch["request_counts"];
    assert_eq!(
        (counts["completed"].as_u64(), counts["failed"].as_u64()),
        (Some(output.len() as u64), Some(num_failed as u64))
    );
    help::each_once(&output, &errors, COUNT);
    for answered in &output {
        let i: usize = answered["custom_id"].as_str().unwrap()[3..].parse().unwrap();
        assert_eq!(answered["response"]["body"]["data"][0]["embedding"][2], i as f64, "{answered}");
    }
    no_leftovers(&server, &work, &batch).await;
}

#[tokio::test]
async fn whoever_dies_wherever_each_request_is_answered_once() {
    for seed in 0..12 {
        survives(seed, 0).await;
    }
}

#[tokio::test]
async fn a_store_that_fails_at_random_changes_nothing_of_that() {
    for seed in 100..108 {
        survives(seed, 60).await;
    }
}

#[tokio::test]
async fn a_batch_that_is_cancelled_meanwhile_tells_of_each_request_once() {
    for seed in 200..206 {
        let (server, work) = torn_server(0).await;
        let made = batch_of(&server, &input(COUNT, text), "24h").await;
        let path = format!("/v1/batches/{}/cancel", made["id"].as_str().unwrap());
        let cancel = async {
            help::until(&server, &made, |batch| batch["request_counts"]["completed"].as_u64() > Some(20)).await;
            server.post_with(&path, "", &[]).await
        };
        tokio::join!(run(&server, seed), cancel);
        let batch = ended(&server, &made).await;
        let (output, errors) =
            (lines_of(&server, &batch["output_file_id"]).await, lines_of(&server, &batch["error_file_id"]).await);
        help::each_once(&output, &errors, COUNT);
        assert!(["cancelled", "completed"].contains(&batch["status"].as_str().unwrap()), "{batch}");
        no_leftovers(&server, &work, &batch).await;
    }
}
