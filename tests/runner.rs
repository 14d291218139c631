//! What runs tasks, on the plain store in memory: once when all goes well, again when it does not, never by two at once.

#[path = "runner/handlers.rs"]
mod handlers;
#[path = "runner/outages.rs"]
mod outages;

use std::sync::Arc;
use std::time::{Duration, Instant};

use eremois::Error;
use eremois::jobs::Tasks;
use eremois::jobs::runner::{Options, Outcome, Runner};
use eremois::store::record::now;
use eremois::store::work::dispatch::{Dispatch, LocalDispatch};
use eremois::store::work::memory::MemoryWork;
use eremois::store::work::{Claim, Hold, Task, TaskKind, Work};
use handlers::{Act, Watched};
use outages::Outages;
use serde_json::json;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Longer than anything takes that goes well, on a busy machine.
const LONG: Duration = Duration::from_secs(60);

/// Much longer than a test: what needs a lease to end would not end.
const LONG_LEASE: Duration = Duration::from_secs(600);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn options(lease: Duration) -> Options {
    Options { max_concurrency: 4, lease, look_interval: ms(20), backoff: (ms(40), ms(400)) }
}

fn task(id: &str) -> Task {
    Task { id: id.to_string(), kind: TaskKind::Chunk, payload: json!({"of": id}), due_at: now(), attempts: 0 }
}

fn tasks(work: &Arc<impl Work>) -> Tasks {
    Tasks { work: work.clone(), dispatch: Arc::new(LocalDispatch::default()) }
}

/// A runner at work.
struct Running {
    stop: Option<oneshot::Sender<Duration>>,
    task: JoinHandle<()>,
}

impl Running {
    fn start(tasks: &Tasks, handler: &Arc<Watched>, options: Options) -> Self {
        let (stop, stopped) = oneshot::channel();
        let runner = Runner::new(tasks.clone(), vec![(TaskKind::Chunk, handler.clone())], options);
        Self { stop: Some(stop), task: tokio::spawn(runner.run(stopped)) }
    }

    /// Ends it, with this time for what runs.
    async fn end(mut self, drain: Duration) {
        self.stop.take().expect("ended once").send(drain).expect("it runs");
        tokio::time::timeout(LONG, &mut self.task).await.expect("a runner ends").expect("a runner does not panic");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !is_so().await {
        assert!(start.elapsed() < LONG, "waited in vain for {what}");
        tokio::time::sleep(ms(5)).await;
    }
}

async fn num_tasks(work: &Arc<impl Work>) -> u64 {
    work.num_tasks().await.unwrap().into_iter().map(|(_, count)| count).sum()
}

async fn until_none_is_left(work: &Arc<impl Work>) {
    until("the end of all tasks", async || num_tasks(work).await == 0).await;
}

/// A claim of all there is, by somebody else, at a time when every lease is over.
fn theft() -> Claim {
    let late = now().checked_add(jiff::SignedDuration::from_hours(1000)).unwrap();
    Claim {
        owner: "thief".into(),
        now: late,
        due_by: late,
        lease: LONG_LEASE,
        limit: 100,
        kinds: TaskKind::ALL.to_vec(),
        ids: None,
    }
}

// ---- all goes well ---------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_task_is_run_once_and_no_more_at_once_than_may() {
    let work = Arc::new(MemoryWork::default());
    let handler = Watched::new(|_| Act::After(ms(3)));
    let tasks = tasks(&work);
    let running = Running::start(&tasks, &handler, options(LONG_LEASE));
    let all: Vec<Task> = (0..200).map(|i| task(&format!("t{i}"))).collect();
    for some in all.chunks(17) {
        tasks.push(some).await.unwrap();
    }
    until_none_is_left(&work).await;
    running.end(LONG).await;
    assert_eq!(handler.num_runs(), 200);
    assert!(handler.runs().values().all(|runs| runs.len() == 1));
    assert!(handler.most_at_once() <= 4, "{}", handler.most_at_once());
    assert!(handler.most_at_once() > 1);
    assert_eq!(handler.payload_of("t7"), json!({"of": "t7"}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_runners_share_tasks_and_run_none_at_once() {
    let work = Arc::new(MemoryWork::default());
    // One handler sees both runners' runs.
    let handler = Watched::new(|_| Act::After(ms(8)));
    let (one, two) = (tasks(&work), tasks(&work));
    let all: Vec<Task> = (0..150).map(|i| task(&format!("t{i}"))).collect();
    // Only the first is told of them: the other one looks.
    one.push(&all).await.unwrap();
    let runners = [&one, &two].map(|tasks| Running::start(tasks, &handler, options(LONG_LEASE)));
    until_none_is_left(&work).await;
    for runner in runners {
        runner.end(LONG).await;
    }
    assert_eq!((handler.num_runs(), handler.num_overlaps()), (150, 0));
    assert!(handler.runs().values().all(|runs| runs.len() == 1));
    assert!(handler.most_at_once() > 4, "both have run some: {}", handler.most_at_once());
    assert!(handler.most_at_once() <= 8);
}

#[tokio::test]
async fn what_is_offered_twice_is_run_once() {
    let work = Arc::new(MemoryWork::default());
    let handler = Watched::new(|_| Act::After(ms(100)));
    let tasks = tasks(&work);
    work.push(&[task("a"), task("b")]).await.unwrap();
    let offers: Vec<String> = ["a", "a", "nobody", "b", "a"].map(str::to_string).to_vec();
    tasks.dispatch.offer(&offers).await;
    let running = Running::start(&tasks, &handler, options(LONG_LEASE));
    until("a run", async || handler.num_runs() > 0).await;
    tasks.dispatch.offer(&offers).await;
    until_none_is_left(&work).await;
    running.end(LONG).await;
    assert_eq!(handler.num_runs(), 2);
}

#[tokio::test]
async fn a_task_is_not_run_before_its_time_unless_the_clock_may_differ() {
    let work = Arc::new(MemoryWork::default());
    let handler = Watched::new(|_| Act::Done);
    let tasks = tasks(&work);
    let running = Running::start(&tasks, &handler, options(LONG_LEASE));
    let later = |time_ms: i64| now().checked_add(jiff::SignedDuration::from_millis(time_ms)).unwrap();
    let begun = Instant::now();
    tasks.push(&[Task { due_at: later(1500), ..task("later") }]).await.unwrap();
    // Due by the clock of the server that offers it.
    work.push(&[Task { due_at: later(900), ..task("skewed") }]).await.unwrap();
    tasks.dispatch.offer(&["skewed".to_string()]).await;
    until("the one that was offered", async || handler.num_runs() == 1).await;
    assert!(handler.runs().contains_key("skewed"));
    until_none_is_left(&work).await;
    assert!(begun.elapsed() >= ms(1500), "{:?}", begun.elapsed());
    running.end(LONG).await;
}

#[tokio::test]
async fn kinds_without_a_handler_are_left_alone() {
    let work = Arc::new(MemoryWork::default());
    let handler = Watched::new(|_| Act::Done);
    let tasks = tasks(&work);
    let running = Running::start(&tasks, &handler, options(LONG_LEASE));
    let other = Task { kind: TaskKind::Callback, ..task("other") };
    tasks.push(&[other.clone(), task("ours")]).await.unwrap();
    until("one of them", async || num_tasks(&work).await == 1).await;
    tokio::time::sleep(ms(100)).await;
    running.end(LONG).await;
    assert_eq!(work.claim(&theft()).await, Ok(vec![Task { attempts: 1, ..other }]), "never claimed");

    // Without any handler a runner takes nobody's offers, and ends.
    let dispatch = Arc::new(LocalDispatch::default());
    dispatch.offer(&["x".to_string()]).await;
    let (stop, stopped) = oneshot::channel();
    let idle = Runner::new(Tasks { work, dispatch: dispatch.clone() }, Vec::new(), options(LONG_LEASE));
    let idle = tokio::spawn(idle.run(stopped));
    tokio::time::sleep(ms(50)).await;
    stop.send(LONG).unwrap();
    idle.await.unwrap();
    assert_eq!(dispatch.offers(9, Duration::ZERO).await.len(), 1);
}

#[tokio::test]
async fn what_is_to_be_run_again_is_after_its_delay() {
    let work = Arc::new(MemoryWork::default());
    let handler = Watched::new(|task| match task.attempts {
        1..=3 => Act::Ends(Ok(Outcome::Again(ms(60)))),
        _ => Act::Done,
    });
    let tasks = tasks(&work);
    let running = Running::start(&tasks, &handler, options(LONG_LEASE));
    tasks.push(&[task("a")]).await.unwrap();
    until_none_is_left(&work).await;
    running.end(LONG).await;
    let runs = handler.runs()["a"].clone();
    assert_eq!(runs.len(), 4);
    // Milliseconds are cut off of the time at which it is due again.
    assert!(runs.windows(2).all(|pair| pair[1] - pair[0] >= ms(58)), "{runs:?}");
}

// ---- a handler fails -------------------------------------------------------------------------------------------

#[tokio::test]
async fn what_fails_is_tried_again_later_and_later() {
    let work = Arc::new(MemoryWork::default());
    let failure = || Error::Internal { cause: "a failure of this test".into() };
    let handler = Watched::new(move |task| match (task.id.as_str(), task.attempts) {
        ("a", 1..=4) => Act::Ends(Err(failure())),
        _ => Act::Done,
    });
    let tasks = tasks(&work);
    let running = Running::start(&tasks, &handler, options(LONG_LEASE));
    tasks.push(&[task("a"), task("b")]).await.unwrap();
    until_none_is_left(&work).await;
    running.end(LONG).await;
    let runs = handler.runs();
    assert_eq!((runs["a"].len(), runs["b"].len()), (5, 1));
    for (i, pair) in runs["a"].windows(2).enumerate() {
        let (pause, least) = (pair[1] - pair[0], ms(40) * (1 << i) - ms(2));
        assert!(pause >= least, "pause {i}: {pause:?}");
    }
}

#[tokio::test]
async fn a_panic_ends_neither_the_runner_nor_the_task() {
    let work = Arc::new(MemoryWork::default());
    let handler = Watched::new(|task| if task.attempts < 3 { Act::Panics } else { Act::Done });
    let tasks = tasks(&work);
    // One place: a panic that kept it would be the end.
    let running = Running::start(&tasks, &handler, Options { max_concurrency: 1, ..options(LONG_LEASE) });
    tasks.push(&[task("a"), task("b")]).await.unwrap();
    until_none_is_left(&work).await;
    running.end(LONG).await;
    let runs = handler.runs();
    assert_eq!((runs["a"].len(), runs["b"].len()), (3, 3));
}

// ---- leases ----------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_lease_is_kept_for_as_long_as_the_task_takes() {
    let work = Arc::new(MemoryWork::default());
    let handler = Watched::new(|_| Act::After(ms(2500)));
    let (one, two) = (tasks(&work), tasks(&work));
    let lease = ms(600);
    let runners = [&one, &two].map(|tasks| Running::start(tasks, &handler, options(lease)));
    one.push(&[task("a")]).await.unwrap();
    until_none_is_left(&work).await;
    for runner in runners {
        runner.end(LONG).await;
    }
    assert_eq!(handler.num_runs(), 1);
}

#[tokio::test]
async fn what_another_one_has_is_dropped() {
    let work = Arc::new(MemoryWork::default());
    let handler = Watched::new(|_| Act::Never);
    let tasks = tasks(&work);
    let running = Running::start(&tasks, &handler, options(ms(300)));
    tasks.push(&[task("a")]).await.unwrap();
    until("the run", async || handler.num_runs() == 1).await;
    assert_eq!(work.claim(&theft()).await.unwrap().len(), 1);
    until("the end of the run", async || handler.num_at_once() == 0).await;
    assert_eq!(handler.num_dropped(), 1);
    running.end(LONG).await;
    assert_eq!(work.renew("a", "thief", now()).await, Ok(Hold::Held), "it is the other one's");
    assert_eq!(handler.cancelled(), [""; 0]);
}

#[tokio::test]
async fn what_ends_too_late_ends_nothing() {
    let work = Arc::new(MemoryWork::default());
    let handler = Watched::new(|_| Act::After(ms(300)));
    let tasks = tasks(&work);
    // The lease would be renewed long after.
    let running = Running::start(&tasks, &handler, options(LONG_LEASE));
    tasks.push(&[task("a")]).await.unwrap();
    until("the run", async || handler.num_runs() == 1).await;
    assert_eq!(work.claim(&theft()).await.unwrap().len(), 1);
    until("the end of the run", async || handler.num_at_once() == 0).await;
    running.end(LONG).await;
    assert_eq!(work.finish("a", "thief").await, Ok(Hold::Held));
}

// ---- cancelled -------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_cancelled_run_is_dropped_and_cleaned_up_behind() {
    let work = Arc::new(MemoryWork::default());
    let handler = Watched::new(|_| Act::Never);
    let tasks = tasks(&work);
    let running = Running::start(&tasks, &handler, options(ms(300)));
    tasks.push(&[task("a"), task("b")]).await.unwrap();
    until("both runs", async || handler.num_runs() == 2).await;
    assert_eq!(work.cancel("a").await, Ok(true));
    until("the clean-up", async || handler.cancelled() == ["a"]).await;
    assert_eq!(num_tasks(&work).await, 1);
    assert_eq!((handler.num_dropped(), handler.num_at_once()), (1, 1), "dropped before it is cleaned up behind");
    running.end(Duration::ZERO).await;
}

#[tokio::test]
async fn one_that_ends_while_it_is_cancelled_is_cleaned_up_behind() {
    let work = Arc::new(MemoryWork::default());
    let failure = || Error::Internal { cause: "a failure of this test".into() };
    for outcome in [Ok(Outcome::Done), Ok(Outcome::Again(ms(1))), Err(failure())] {
        let ending = outcome.clone();
        let handler = Watched::new(move |task| match task.id.as_str() {
            "a" => Act::EndsAfter(ms(200), ending.clone()),
            _ => Act::Done,
        });
        handler.panic_when_cancelled();
        let tasks = tasks(&work);
        // The run ends before the lease is renewed, and so before it learns of anything.
        let running = Running::start(&tasks, &handler, Options { max_concurrency: 1, ..options(LONG_LEASE) });
        tasks.push(&[task("a"), task("b")]).await.unwrap();
        until("the run", async || handler.num_runs() == 1).await;
        assert_eq!(work.cancel("a").await, Ok(true));
        // A panic in the clean-up keeps the one place there is no more than one in a run.
        until_none_is_left(&work).await;
        running.end(LONG).await;
        assert_eq!(handler.cancelled(), ["a"], "{outcome:?}");
        assert_eq!(handler.num_runs(), 2);
    }
}

// ---- the end ---------------------------------------------------------------------------------------------------

#[tokio::test]
async fn what_has_not_ended_at_the_end_is_another_ones_at_once() {
    let work = Arc::new(MemoryWork::default());
    let (stuck, quick) = (Watched::new(|_| Act::Never), Watched::new(|_| Act::Done));
    let (one, two) = (tasks(&work), tasks(&work));
    let running = Running::start(&one, &stuck, options(LONG_LEASE));
    one.push(&[task("a"), task("b"), task("c"), task("d"), task("e")]).await.unwrap();
    until("four runs", async || stuck.num_runs() == 4).await;
    running.end(ms(100)).await;
    assert_eq!((stuck.num_dropped(), stuck.num_at_once()), (4, 0));
    // With leases of ten minutes.
    let running = Running::start(&two, &quick, options(LONG_LEASE));
    until_none_is_left(&work).await;
    running.end(LONG).await;
    assert_eq!(quick.num_runs(), 5);
    assert_eq!(quick.attempts_of("a"), [2]);
}

#[tokio::test]
async fn what_ends_in_the_time_that_is_left_is_done() {
    let work = Arc::new(MemoryWork::default());
    let handler = Watched::new(|_| Act::After(ms(300)));
    let tasks = tasks(&work);
    let running = Running::start(&tasks, &handler, options(ms(200)));
    tasks.push(&[task("a"), task("b")]).await.unwrap();
    until("both runs", async || handler.num_runs() == 2).await;
    tasks.push(&[Task { kind: TaskKind::Callback, ..task("c") }]).await.unwrap();
    running.end(LONG).await;
    assert_eq!((handler.num_dropped(), num_tasks(&work).await), (0, 1));
    // A runner whose end is dropped gives no time.
    let mut running = Running::start(&tasks, &handler, options(LONG_LEASE));
    tasks.push(&[task("d")]).await.unwrap();
    until("a run", async || handler.num_runs() == 3).await;
    drop(running.stop.take());
    tokio::time::timeout(LONG, &mut running.task).await.expect("it ends").unwrap();
    assert_eq!(handler.num_dropped(), 1);
    assert_eq!(work.claim(&Claim { now: now(), due_by: now(), ..theft() }).await.unwrap().len(), 2);
}

#[tokio::test]
async fn what_is_claimed_at_the_very_end_is_given_back() {
    let work = Arc::new(Outages::new());
    let handler = Watched::new(|_| Act::Never);
    let tasks = tasks(&work);
    work.set_claim_delay(ms(400));
    let running = Running::start(&tasks, &handler, options(LONG_LEASE));
    work.push(&[task("a"), task("b")]).await.unwrap();
    until("a claim on its way", async || work.num_claims() > 0).await;
    running.end(LONG).await;
    let free = work.claim(&Claim { now: now(), due_by: now(), ..theft() }).await.unwrap();
    assert_eq!(free.len(), 2, "held by nobody");
}

// ---- the store is away -----------------------------------------------------------------------------------------

#[tokio::test]
async fn a_task_lost_to_an_outage_is_dropped_in_time_and_run_again() {
    let work = Arc::new(Outages::new());
    let handler = Watched::new(|task| if task.attempts == 1 { Act::Never } else { Act::Done });
    let tasks = tasks(&work);
    let running = Running::start(&tasks, &handler, options(ms(400)));
    tasks.push(&[task("a")]).await.unwrap();
    until("the run", async || handler.num_runs() == 1).await;
    let begun = Instant::now();
    work.set_away(true);
    until("the end of the run", async || handler.num_at_once() == 0).await;
    assert!(begun.elapsed() >= ms(200), "given up before the lease may be over: {:?}", begun.elapsed());
    assert_eq!(handler.num_dropped(), 1);
    tokio::time::sleep(ms(100)).await;
    work.set_away(false);
    // It was not done, so it must not be ended by who has lost it.
    until_none_is_left(&work).await;
    running.end(LONG).await;
    assert_eq!(handler.num_runs(), 2);
    assert_eq!(handler.cancelled(), [""; 0]);
}

#[tokio::test]
async fn a_store_that_never_answers_holds_no_run_beyond_its_lease() {
    let work = Arc::new(Outages::new());
    let handler = Watched::new(|_| Act::Never);
    let tasks = tasks(&work);
    let running = Running::start(&tasks, &handler, options(ms(400)));
    tasks.push(&[task("a")]).await.unwrap();
    until("the run", async || handler.num_runs() == 1).await;
    work.set_silent(true);
    until("the end of the run", async || handler.num_at_once() == 0).await;
    // Nor does it hold the end.
    let begun = Instant::now();
    running.end(ms(100)).await;
    assert!(begun.elapsed() < LONG / 2, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn an_outage_at_the_end_of_a_task_is_waited_for() {
    let work = Arc::new(Outages::new());
    let handler = Watched::new(|_| Act::After(ms(200)));
    let tasks = tasks(&work);
    let running = Running::start(&tasks, &handler, options(LONG_LEASE));
    tasks.push(&[task("a")]).await.unwrap();
    until("the run", async || handler.num_runs() == 1).await;
    work.set_away(true);
    until("the end of the run", async || handler.num_at_once() == 0).await;
    tokio::time::sleep(ms(150)).await;
    work.set_away(false);
    until_none_is_left(&work).await;
    running.end(LONG).await;
    assert_eq!(handler.num_runs(), 1);
}

#[tokio::test]
async fn an_outage_before_a_task_is_survived() {
    let work = Arc::new(Outages::new());
    let handler = Watched::new(|_| Act::Done);
    let tasks = tasks(&work);
    work.set_away(true);
    let running = Running::start(&tasks, &handler, options(LONG_LEASE));
    tokio::time::sleep(ms(150)).await;
    let asked = work.num_claims();
    assert!((1..30).contains(&asked), "asked {asked} times, with pauses of 20 ms");
    work.set_away(false);
    tasks.push(&[task("a")]).await.unwrap();
    until_none_is_left(&work).await;
    running.end(LONG).await;
}

#[tokio::test]
async fn a_process_that_loses_a_task_and_has_it_again_runs_it_once_at_a_time() {
    let work = Arc::new(Outages::new());
    let handler = Watched::new(|_| Act::Never);
    let tasks = tasks(&work);
    let running = Running::start(&tasks, &handler, options(Duration::from_secs(1)));
    tasks.push(&[task("a")]).await.unwrap();
    until("the run", async || handler.num_runs() == 1).await;
    for round in 2..5 {
        // Only renewals fail: the runner itself claims what it has lost.
        work.set_deaf(true);
        until("another run", async || handler.num_runs() >= round).await;
        work.set_deaf(false);
    }
    // What the runs before it do when they are dropped ends nothing of the last one's.
    tokio::time::sleep(ms(1500)).await;
    assert_eq!((handler.num_at_once(), handler.num_overlaps()), (1, 0));
    running.end(Duration::ZERO).await;
    assert_eq!(handler.num_at_once(), 0);
}
