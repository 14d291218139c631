//! Servers that tell each other of tasks over a real Redis: each offer goes to one, a dead server's to another, and whatever
//! becomes of Redis, nobody waits for it and nothing fails.

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use common::process::free_address;
use common::servers::redis::{Cluster, MASTER_NAME, PASSWORD, Redis, Sentinel, USER};
use eremois::jobs::Tasks;
use eremois::jobs::runner::{Handler, Options, Outcome, Runner};
use eremois::store::record::now;
use eremois::store::redis::stream::StreamDispatch;
use eremois::store::work::dispatch::{Dispatch, LocalDispatch, Offer};
use eremois::store::work::memory::MemoryWork;
use eremois::store::work::{Task, TaskKind, Work};
use parking_lot::Mutex;
use redis::FromRedisValue;
use tokio::sync::oneshot;

/// Longer than anything takes that goes well, on a busy machine.
const LONG: Duration = Duration::from_secs(60);

/// Much longer than a test: no offer is abandoned.
const LONG_LEASE: Duration = Duration::from_secs(600);

/// More than any call may take beyond its wait, and less than one that hangs until Redis is back.
const BOUND: Duration = Duration::from_secs(3);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn dispatch_of(url: &str, namespace: &str, lease: Duration) -> StreamDispatch {
    StreamDispatch::new(url.parse().unwrap(), namespace, lease).expect("no files are named")
}

fn dispatch(redis: &Redis, lease: Duration) -> StreamDispatch {
    dispatch_of(&redis.url(), "test", lease)
}

fn names(numbers: std::ops::Range<usize>) -> Vec<String> {
    numbers.map(|i| format!("task-{i}")).collect()
}

fn ids(offers: &[Offer]) -> Vec<String> {
    offers.iter().map(|offer| offer.task_id.clone()).collect()
}

/// Asks until there are so many, and settles them.
async fn collect(dispatch: &impl Dispatch, count: usize) -> Vec<String> {
    let start = Instant::now();
    let mut found = Vec::new();
    while found.len() < count {
        assert!(start.elapsed() < LONG, "waited in vain for {count} offers: {found:?}");
        let offers = dispatch.offers(16, ms(200)).await;
        dispatch.settle(&offers).await;
        found.extend(ids(&offers));
    }
    found
}

/// Offers until it comes: Redis may be on its way back.
async fn until_it_works(dispatch: &StreamDispatch) {
    let start = Instant::now();
    for i in 0.. {
        assert!(start.elapsed() < LONG, "no offer comes through");
        let name = format!("back-{i}");
        dispatch.offer(std::slice::from_ref(&name)).await;
        let offers = dispatch.offers(16, ms(200)).await;
        dispatch.settle(&offers).await;
        if ids(&offers).contains(&name) {
            return;
        }
    }
}

/// What is left in the stream: its length, and how many entries are pending.
fn left<T: FromRedisValue>(redis: &Redis, key: &str) -> (usize, T) {
    let pending: (T, redis::Value, redis::Value, redis::Value) = redis.ask(&["XPENDING", key, "servers"]);
    (redis.ask(&["XLEN", key]), pending.0)
}

fn consumers(redis: &Redis, key: &str) -> usize {
    redis.ask::<Vec<redis::Value>>(&["XINFO", "CONSUMERS", key, "servers"]).len()
}

/// The outcome of a call and the time it took.
async fn timed<T>(call: impl Future<Output = T>) -> (T, Duration) {
    let start = Instant::now();
    let outcome = tokio::time::timeout(LONG, call).await.expect("no call hangs");
    (outcome, start.elapsed())
}

/// Every call on a Redis that does not answer: bounded, and without an outcome.
async fn assert_nobody_waits_for_it(dispatch: &StreamDispatch) {
    for wait in [0, 0, 100, 400, 0] {
        let (offers, took) = timed(dispatch.offers(4, ms(wait))).await;
        assert_eq!(offers, []);
        assert!(took >= ms(wait) && took < ms(wait) + BOUND, "asked for {wait} ms: {took:?}");
    }
    let (_, took) = timed(dispatch.offer(&names(0..1000))).await;
    assert!(took < BOUND, "{took:?}");
    let offer = Offer { task_id: "x".into(), token: "1-0".into() };
    let (_, took) = timed(dispatch.settle(&[offer])).await;
    assert!(took < BOUND, "{took:?}");
}

#[tokio::test]
async fn two_share_offers_and_each_goes_to_one() {
    let Some(redis) = Redis::start() else { return };
    let (one, two, three) = (dispatch(&redis, LONG_LEASE), dispatch(&redis, LONG_LEASE), dispatch(&redis, LONG_LEASE));
    assert_eq!(one.offers(4, ms(10)).await, []);
    three.offer(&names(0..300)).await;
    let seen: Mutex<Vec<String>> = Mutex::default();
    let take = async |from: &StreamDispatch| {
        let mut count = 0;
        let start = Instant::now();
        while seen.lock().len() < 300 {
            assert!(start.elapsed() < LONG, "{:?}", seen.lock());
            let offers = from.offers(5, ms(50)).await;
            assert!(offers.len() <= 5);
            from.settle(&offers).await;
            count += offers.len();
            seen.lock().extend(ids(&offers));
        }
        count
    };
    let (by_one, by_two) = tokio::join!(take(&one), take(&two));
    assert!(by_one > 50 && by_two > 50, "{by_one} {by_two}");
    let mut seen = seen.into_inner();
    seen.sort();
    let mut expected = names(0..300);
    expected.sort();
    assert_eq!(seen, expected);
    assert_eq!(left::<usize>(&redis, one.key()), (0, 0), "what is settled is deleted");
}

#[tokio::test]
async fn an_offer_wakes_who_waits() {
    let Some(redis) = Redis::start() else { return };
    let (one, two) = (Arc::new(dispatch(&redis, LONG_LEASE)), dispatch(&redis, LONG_LEASE));
    let waiting = tokio::spawn({
        let one = one.clone();
        async move { timed(one.offers(4, LONG - ms(5000))).await }
    });
    tokio::time::sleep(ms(300)).await;
    two.offer(&names(0..1)).await;
    let (offers, took) = waiting.await.unwrap();
    assert_eq!(ids(&offers), names(0..1));
    assert!(took < LONG / 2, "it waited for the end: {took:?}");
}

#[tokio::test]
async fn a_dead_ones_offers_are_taken_over_and_its_name_is_removed() {
    let Some(redis) = Redis::start() else { return };
    let lease = ms(1000);
    let (dead, living) = (dispatch(&redis, lease), dispatch(&redis, lease));
    living.offer(&names(0..40)).await;
    let mut held = Vec::new();
    while held.len() < 25 {
        held.extend(dead.offers(25 - held.len(), ms(500)).await);
    }
    let key = dead.key().to_string();
    let begun = Instant::now();
    drop(dead);
    // What it settled, it would have had.
    let fresh = living.offers(15, ms(100)).await;
    living.settle(&fresh).await;
    let all = collect(&living, 40 - fresh.len()).await;
    assert!(begun.elapsed() >= lease - ms(50), "taken over before the lease was over: {:?}", begun.elapsed());
    let all: BTreeSet<String> = all.into_iter().chain(ids(&fresh)).collect();
    assert_eq!(all, names(0..40).into_iter().collect());
    assert_eq!(left::<usize>(&redis, &key), (0, 0));
    let begun = Instant::now();
    while consumers(&redis, &key) > 1 {
        assert!(begun.elapsed() < LONG, "its name is still there");
        assert_eq!(living.offers(4, ms(100)).await, []);
    }
    // The one that lives has stayed.
    living.offer(&names(0..1)).await;
    assert_eq!(collect(&living, 1).await, names(0..1));
}

#[tokio::test]
async fn databases_do_not_mix() {
    let Some(redis) = Redis::start() else { return };
    let (one, two) = (dispatch_of(&redis.url(), "one", LONG_LEASE), dispatch_of(&redis.url(), "two", LONG_LEASE));
    one.offer(&names(0..3)).await;
    two.offer(&names(7..8)).await;
    assert_eq!(collect(&two, 1).await, names(7..8));
    assert_eq!(two.offers(4, ms(100)).await, []);
    assert_eq!(collect(&one, 3).await, names(0..3));
    let mut keys: Vec<String> = redis.ask(&["KEYS", "*"]);
    keys.sort();
    assert_eq!(keys, ["eremois:j1:one", "eremois:j1:two"]);
    let expires: i64 = redis.ask(&["TTL", "eremois:j1:one"]);
    assert!(expires == -1 || expires > 3600, "{expires}");
}

#[tokio::test]
async fn a_wait_that_is_given_up_takes_no_offers_with_it() {
    let Some(redis) = Redis::start() else { return };
    let one = dispatch(&redis, LONG_LEASE);
    for i in 0..5 {
        let given_up = tokio::time::timeout(ms(100), one.offers(4, LONG)).await;
        assert!(given_up.is_err());
        // Redis sees the closed connection.
        tokio::time::sleep(ms(100)).await;
        one.offer(&names(i..i + 1)).await;
        assert_eq!(collect(&one, 1).await, names(i..i + 1));
    }
}

#[tokio::test]
async fn an_emptied_redis_is_as_good_as_a_new_one() {
    let Some(redis) = Redis::start() else { return };
    let one = Arc::new(dispatch(&redis, LONG_LEASE));
    until_it_works(&one).await;
    // While nobody waits, while somebody does, and with offers that are lost.
    redis.ask::<()>(&["FLUSHALL"]);
    until_it_works(&one).await;
    let waiting = tokio::spawn({
        let one = one.clone();
        async move { collect(one.as_ref(), 2).await }
    });
    tokio::time::sleep(ms(300)).await;
    redis.ask::<()>(&["FLUSHALL"]);
    one.offer(&names(0..2)).await;
    assert_eq!(waiting.await.unwrap(), names(0..2), "added after the loss, before the group was there");
    one.offer(&names(0..100)).await;
    let held = one.offers(4, ms(100)).await;
    redis.ask::<()>(&["DEL", one.key()]);
    one.settle(&held).await;
    until_it_works(&one).await;
    // A group that somebody removed.
    redis.ask::<()>(&["XGROUP", "DESTROY", one.key(), "servers"]);
    until_it_works(&one).await;
}

#[tokio::test]
async fn a_restart_is_survived_and_nobody_waits_meanwhile() {
    let Some(redis) = Redis::start() else { return };
    let one = dispatch(&redis, LONG_LEASE);
    until_it_works(&one).await;
    assert_eq!(one.patience(), Duration::from_secs(3), "what is overdue was lost");
    one.offer(&names(0..5)).await;
    redis.daemon.kill();
    assert_nobody_waits_for_it(&one).await;
    assert_eq!(one.patience(), Duration::ZERO, "everybody looks into the store");
    redis.start_again();
    // What it had on its disk comes, what was offered meanwhile does not.
    let found = collect(&one, 5).await;
    assert_eq!(found, names(0..5));
    until_it_works(&one).await;
    assert_ne!(one.patience(), Duration::ZERO);
}

#[tokio::test]
async fn a_halt_of_five_seconds_is_survived_and_nobody_waits_meanwhile() {
    let Some(redis) = Redis::start() else { return };
    let one = dispatch(&redis, LONG_LEASE);
    until_it_works(&one).await;
    redis.daemon.pause();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(5) {
        assert_nobody_waits_for_it(&one).await;
        assert_eq!(one.patience(), Duration::ZERO);
    }
    redis.daemon.resume();
    until_it_works(&one).await;
}

#[tokio::test]
async fn a_redis_that_was_never_there_costs_nothing_but_its_offers() {
    let away = dispatch_of(&format!("redis://{}", free_address()), "test", LONG_LEASE);
    assert_nobody_waits_for_it(&away).await;
    assert!(!away.is_up());
}

#[tokio::test]
async fn a_key_of_another_type_and_a_refused_login_are_no_errors() {
    let Some(redis) = Redis::start() else { return };
    let one = dispatch(&redis, LONG_LEASE);
    redis.ask::<()>(&["SET", one.key(), "something else"]);
    assert_nobody_waits_for_it(&one).await;
    redis.ask::<()>(&["DEL", one.key()]);
    until_it_works(&one).await;

    let Some(redis) = Redis::with_user() else { return };
    let wrong = dispatch_of(&format!("redis://{USER}:wrong@127.0.0.1:{}", redis.daemon.port), "test", LONG_LEASE);
    assert_nobody_waits_for_it(&wrong).await;
    let password = PASSWORD.replace('@', "%40").replace('/', "%2F");
    let right = dispatch_of(&format!("redis://{USER}:{password}@127.0.0.1:{}", redis.daemon.port), "test", LONG_LEASE);
    until_it_works(&right).await;
}

#[tokio::test]
async fn the_commands_of_the_documents_are_enough() {
    let commands = "+xadd +xreadgroup +xautoclaim +xack +xdel +xgroup +xinfo +expire";
    let user = format!("user default off\nuser jobs on >pw ~eremois:j1:* {commands}");
    let Some(redis) = Redis::with(&user) else { return };
    // Short enough for what is done now and then.
    let one = dispatch_of(&format!("redis://jobs:pw@127.0.0.1:{}", redis.daemon.port), "test", ms(200));
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(1) {
        until_it_works(&one).await;
        assert!(one.is_up());
    }
}

#[tokio::test]
async fn a_stream_does_not_grow_for_ever() {
    let Some(redis) = Redis::with("appendfsync no") else { return };
    let one = dispatch(&redis, LONG_LEASE);
    until_it_works(&one).await;
    for from in (0..120_000).step_by(10_000) {
        one.offer(&names(from..from + 10_000)).await;
    }
    let len: usize = redis.ask(&["XLEN", one.key()]);
    assert!((90_000..=101_000).contains(&len), "{len}");
    // The oldest are gone.
    let first = one.offers(1, ms(500)).await;
    let number: usize = first[0].task_id.strip_prefix("task-").unwrap().parse().unwrap();
    assert!(number > 10_000, "{first:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinels_name_another_master_when_theirs_is_killed() {
    let Some(redis) = Sentinel::start() else { return };
    let sentinels: Vec<String> = redis.sentinels.iter().map(|s| format!("127.0.0.1:{}", s.port)).collect();
    let one = dispatch_of(&format!("redis+sentinel://{}/{MASTER_NAME}", sentinels.join(",")), "test", LONG_LEASE);
    until_it_works(&one).await;
    let old = redis.master().daemon.port;
    redis.master().daemon.kill();
    assert_nobody_waits_for_it(&one).await;
    until_it_works(&one).await;
    assert_ne!(redis.master().daemon.port, old);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_carries_them_also_when_a_master_is_killed() {
    let Some(redis) = Cluster::start() else { return };
    let hosts: Vec<String> = redis.nodes.iter().map(|node| format!("127.0.0.1:{}", node.daemon.port)).collect();
    let url = format!("redis+cluster://{}", hosts.join(","));
    let (one, two) = (dispatch_of(&url, "test", LONG_LEASE), dispatch_of(&url, "test", LONG_LEASE));
    until_it_works(&one).await;
    two.offer(&names(0..30)).await;
    let (a, b) = tokio::join!(collect(&one, 15), collect(&two, 10));
    assert!(a.iter().all(|id| !b.contains(id)));
    // A read stays open for longer than other answers may take.
    let (offers, took) = timed(one.offers(1, ms(1500))).await;
    assert!(offers.len() <= 1 && (took >= ms(1500) || offers.len() == 1), "{took:?}");
    assert!(one.is_up());
    // The one that has the key.
    let slot: u16 = redis.nodes[0].ask(&["CLUSTER", "KEYSLOT", one.key()]);
    redis.nodes[usize::from(slot / 5461).min(2)].daemon.kill();
    let (_, took) = timed(one.offers(1, ms(100))).await;
    assert!(took < BOUND, "{took:?}");
    until_it_works(&one).await;
}

// ---- runners ---------------------------------------------------------------------------------------------------

/// Notes what it ran.
struct Noting {
    name: &'static str,
    runs: Arc<Mutex<Vec<(String, &'static str)>>>,
}

#[async_trait]
impl Handler for Noting {
    async fn run(&self, task: &Task) -> eremois::Result<Outcome> {
        tokio::time::sleep(ms(5)).await;
        self.runs.lock().push((task.id.clone(), self.name));
        Ok(Outcome::Done)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runners_that_share_a_redis_share_tasks_and_go_on_without_it() {
    let Some(redis) = Redis::start() else { return };
    let work = Arc::new(MemoryWork::default());
    let runs: Arc<Mutex<Vec<(String, &'static str)>>> = Arc::default();
    let mut ends = Vec::new();
    let mut dispatches = Vec::new();
    for name in ["one", "two"] {
        let dispatch = Arc::new(dispatch(&redis, Duration::from_secs(5)));
        dispatches.push(dispatch.clone());
        let tasks = Tasks { work: work.clone(), dispatch };
        let handler: Arc<dyn Handler> = Arc::new(Noting { name, runs: runs.clone() });
        let (stop, stopped) = oneshot::channel();
        let options = Options { max_concurrency: 4, lease: Duration::from_secs(5), ..Options::default() };
        let runner = Runner::new(tasks, vec![(TaskKind::Chunk, handler)], options);
        ends.push((stop, tokio::spawn(runner.run(stopped))));
    }
    let push = async |numbers: std::ops::Range<usize>| {
        let task = |id: String| {
            let payload = serde_json::Value::Null;
            Task { id, kind: TaskKind::Chunk, payload, due_at: now(), attempts: 0 }
        };
        let all: Vec<Task> = names(numbers).into_iter().map(task).collect();
        // A server that only accepts: it tells the others, and never looks.
        let tasks = Tasks { work: work.clone(), dispatch: Arc::new(dispatch(&redis, LONG_LEASE)) };
        tasks.push(&all).await.unwrap();
    };
    let until = async |count: usize| {
        let start = Instant::now();
        while runs.lock().len() < count || work.num_tasks().await != Ok(vec![]) {
            assert!(start.elapsed() < LONG, "{} of {count} were run", runs.lock().len());
            tokio::time::sleep(ms(10)).await;
        }
    };
    push(0..200).await;
    until(200).await;
    redis.daemon.kill();
    push(200..300).await;
    until(300).await;
    redis.start_again();
    push(300..400).await;
    until(400).await;
    for (stop, end) in ends {
        stop.send(LONG).unwrap();
        end.await.unwrap();
    }
    let runs = runs.lock().clone();
    let ids: BTreeSet<&String> = runs.iter().map(|(id, _)| id).collect();
    assert_eq!((runs.len(), ids.len()), (400, 400), "each once");
    for name in ["one", "two"] {
        let count = runs[..200].iter().filter(|(_, by)| *by == name).count();
        assert!(count > 20, "{name} ran {count} of the first 200");
    }
    drop(dispatches);
}

// ---- within a process ------------------------------------------------------------------------------------------

#[tokio::test]
async fn within_a_process_offers_go_to_one_and_wake_who_waits() {
    let local = Arc::new(LocalDispatch::default());
    assert_eq!(local.patience(), Duration::ZERO);
    let (offers, took) = timed(local.offers(4, ms(50))).await;
    assert_eq!((offers, took >= ms(50)), (vec![], true));
    let waiting: Vec<_> = (0..3)
        .map(|_| {
            let local = local.clone();
            tokio::spawn(async move { timed(local.offers(2, LONG - ms(5000))).await })
        })
        .collect();
    tokio::time::sleep(ms(50)).await;
    // One notice for all of them.
    local.offer(&names(0..6)).await;
    let mut seen = Vec::new();
    for one in waiting {
        let (offers, took) = one.await.unwrap();
        assert!(offers.len() == 2 && took < LONG / 2, "{took:?}");
        seen.extend(ids(&offers));
    }
    seen.sort();
    assert_eq!(seen, names(0..6));
    // A notice of offers that are taken ends no wait.
    local.offer(&names(0..1)).await;
    assert_eq!(local.offers(4, Duration::ZERO).await.len(), 1);
    let (offers, took) = timed(local.offers(4, ms(100))).await;
    assert_eq!((offers, took >= ms(100)), (vec![], true));
    local.offer(&names(0..20_000)).await;
    assert_eq!(local.offers(usize::MAX, Duration::ZERO).await.len(), 10_000, "more are found by looking");
}
