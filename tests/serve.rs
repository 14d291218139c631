//! The engine end to end, over a model that computes almost nothing.

mod common;

#[path = "serve/background.rs"]
mod background;
#[path = "serve/exchange.rs"]
mod exchange;

use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use common::engine::{LONG, answer, ask, request_of, settings, wait_for};
use common::fake::{self, Controls};
use eremois::model::pack::PackedInput;
use eremois::model::{Backend, InFlight, Rows};
use eremois::output::Output;
use eremois::request::{Input, Priority, Request, TaskParams};
use eremois::serve::policy::BatchLimits;
use eremois::serve::{Engine, Health, Settings};
use eremois::{Error, Result};
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinHandle;

const MAX_SEQ_LEN: usize = 64;

fn limits() -> BatchLimits {
    BatchLimits { max_batch_size: 8, max_batch_tokens: 256, max_queue_delay: Duration::ZERO, max_queue_size: 100 }
}

/// An engine with one ready model `fake`.
async fn engine(limits: BatchLimits) -> (Arc<Engine>, Arc<Controls>) {
    let engine = Arc::new(Engine::with_settings(None, settings()));
    let (model, controls) = fake::model("fake", MAX_SEQ_LEN);
    engine.add(model, limits).unwrap();
    wait_for(&engine, |health| *health == Health::Ready).await;
    controls.batch_sizes.lock().clear();
    (engine, controls)
}

fn request(texts: &[&str]) -> Request {
    request_of(texts.iter().map(|t| Input::Text(t.to_string())).collect())
}

/// The first value of each row: the sum of the ids.
async fn sums(engine: &Engine, texts: &[&str]) -> Result<Vec<f32>> {
    Ok(engine.infer(request(texts)).await?.rows.iter().map(|row| row[0]).collect())
}

#[tokio::test]
async fn embeds_texts_and_ids_in_order() {
    let (engine, _) = engine(limits()).await;
    let output = engine.infer(request(&["w1 w2", "w3", "w4 w5 w6"])).await.unwrap();
    let firsts: Vec<f32> = output.rows.iter().map(|row| row[0]).collect();
    assert_eq!(firsts, [3.0, 3.0, 15.0]);
    assert_eq!((output.usage.num_tokens, output.usage.num_chars), (6, 15));
    assert_eq!(&*output.model, "fake");

    let ids = Request { inputs: vec![Input::TokenIds(vec![7, 8])], ..request(&[]) };
    let output = engine.infer(ids).await.unwrap();
    assert_eq!(output.rows[0][..2], [15.0, 2.0]);
    assert_eq!((output.usage.num_tokens, output.usage.num_chars), (2, 0));
}

#[tokio::test]
async fn tokenizes_and_decodes() {
    let (engine, _) = engine(limits()).await;
    let tokens = engine.tokenize(None, vec!["w5 w6".into(), "w7".into()], false).await.unwrap();
    let ids: Vec<Vec<u32>> = tokens.iter().map(|t| t.iter().map(|t| t.id).collect()).collect();
    assert_eq!(ids, [vec![5, 6], vec![7]]);
    assert_eq!(engine.decode(None, ids, false).await.unwrap(), ["w5 w6", "w7"]);
}

#[tokio::test]
async fn names_decide_the_model() {
    let engine = Engine::with_settings(Some("b".into()), settings());
    for name in ["a", "b", "c"] {
        engine.add(fake::model(name, MAX_SEQ_LEN).0, limits()).unwrap();
    }
    wait_for(&engine, |health| *health == Health::Ready).await;
    let names: Vec<_> = engine.models().iter().map(|m| m.name.to_string()).collect();
    assert_eq!(names, ["b", "a", "c"]);
    assert_eq!(&*engine.model(None).unwrap().name, "b");
    let output = engine.infer(Request { model: Some("c".into()), ..request(&["w1"]) }).await.unwrap();
    assert_eq!(&*output.model, "c");
    let error = engine.infer(Request { model: Some("d".into()), ..request(&["w1"]) }).await.unwrap_err();
    assert_eq!(error, Error::UnknownModel { model: "d".into(), served: "a, b, c".into() });
    let twice = engine.add(fake::model("a", MAX_SEQ_LEN).0, limits()).unwrap_err();
    assert!(matches!(twice, Error::Invalid { .. }), "{twice}");
}

#[tokio::test]
async fn a_bad_request_is_refused_by_name_before_the_device() {
    let (engine, controls) = engine(limits()).await;
    let long = "w1 ".repeat(MAX_SEQ_LEN + 1);
    let params = |params| Request { params, ..request(&["w1"]) };
    for (request, expected) in [
        (request(&[]), "input must not be empty"),
        (request(&[""]), "input must not be empty"),
        (request(&["w1", "", "w2"]), "input[1] must not be empty"),
        (request(&["w1", &long]), "input[1] has 65 tokens, the limit is 64"),
        (request(&["w1"; 101]), "input has 101 inputs, the limit is 100"),
        (params(TaskParams { dimensions: Some(0), ..Default::default() }), "dimensions: 0 is not in 1 to 8"),
        (params(TaskParams { dimensions: Some(9), ..Default::default() }), "dimensions: 9 is not in 1 to 8"),
        (
            params(TaskParams { prompt_name: Some("x".into()), ..Default::default() }),
            "prompt_name: `x` is not a prompt of this model; known: query",
        ),
        (
            Request { inputs: vec![Input::TokenIds(vec![1]), Input::TokenIds(vec![1000])], ..request(&[]) },
            "input[1]: token id 1000 is not in the vocabulary of 1000 tokens",
        ),
    ] {
        assert_eq!(engine.infer(request).await.unwrap_err().to_string(), expected);
    }
    assert!(controls.batch_sizes.lock().is_empty());
    assert_eq!(sums(&engine, &["w1"]).await.unwrap(), [1.0], "and the room they held is free again");
}

/// The fake model behind a device that waits for a word before each batch.
struct Stepped {
    inner: Arc<dyn Backend>,
    /// A word a batch; all words once the other end is dropped.
    words: Mutex<mpsc::Receiver<()>>,
}

impl Backend for Stepped {
    fn launch(&self, batch: PackedInput) -> Result<Box<dyn InFlight>> {
        let _ = self.words.lock().recv();
        self.inner.launch(batch)
    }
}

/// An engine whose device stands still until told. Requests of token ids are in the queue as soon as their
/// future was polled once, so that on a runtime of one thread the order of everything is fixed.
async fn stepped(limits: BatchLimits, settings: Settings) -> (Arc<Engine>, Arc<Controls>, mpsc::Sender<()>) {
    let engine = Arc::new(Engine::with_settings(None, settings));
    let (mut model, controls) = fake::model("fake", MAX_SEQ_LEN);
    let (step, words) = mpsc::channel();
    fake::wrap(&mut model, |inner| Stepped { inner, words: Mutex::new(words) });
    engine.add(model, limits).unwrap();
    for _ in 0..2 {
        step.send(()).unwrap(); // the warm-up's two batches
    }
    wait_for(&engine, |health| *health == Health::Ready).await;
    controls.batch_sizes.lock().clear();
    (engine, controls, step)
}

fn ids(inputs: &[u32]) -> Request {
    Request { inputs: inputs.iter().map(|&id| Input::TokenIds(vec![id])).collect(), ..request(&[]) }
}

/// Puts request after request of one input into the queue, the first of which is on the device by then.
async fn ask_behind_a_busy_device(
    engine: &Arc<Engine>,
    ids_: impl Iterator<Item = u32>,
) -> Vec<JoinHandle<Result<Output>>> {
    let mut asked = vec![ask(engine, ids(&[0])).await];
    tokio::time::sleep(Duration::from_millis(50)).await;
    for id in ids_ {
        asked.push(ask(engine, ids(&[id])).await);
    }
    asked
}

#[tokio::test]
async fn clients_that_come_while_the_device_works_share_the_next_batches() {
    let (engine, controls, step) = stepped(limits(), settings()).await;
    let asked = ask_behind_a_busy_device(&engine, 1..20).await;
    drop(step);
    for (id, asked) in asked.into_iter().enumerate() {
        assert_eq!(answer(asked).await.unwrap().rows[0][0], id as f32);
    }
    assert_eq!(*controls.batch_sizes.lock(), [1, 8, 8, 3]);
}

#[tokio::test]
async fn a_delay_above_zero_waits_for_company_and_no_longer() {
    let delayed = BatchLimits { max_queue_delay: Duration::from_millis(30), ..limits() };
    let (engine, controls) = self::engine(delayed.clone()).await;
    let start = Instant::now();
    let first = ask(&engine, ids(&[1])).await;
    let second = ask(&engine, ids(&[2])).await;
    answer(first).await.unwrap();
    answer(second).await.unwrap();
    assert!(start.elapsed() >= delayed.max_queue_delay);
    assert_eq!(*controls.batch_sizes.lock(), [2]);
    // A full batch waits for nobody, whatever the delay.
    engine.set_limits("fake", BatchLimits { max_queue_delay: LONG * 10, ..limits() }).unwrap();
    engine.infer(ids(&[1; 8])).await.unwrap();
}

#[tokio::test]
async fn the_entries_of_a_client_that_went_are_not_computed() {
    let (engine, controls, step) = stepped(limits(), settings()).await;
    let mut asked = ask_behind_a_busy_device(&engine, 1..4).await;
    asked.remove(2).abort();
    tokio::task::yield_now().await;
    drop(step);
    for (asked, id) in asked.into_iter().zip([0.0, 1.0, 3.0]) {
        assert_eq!(answer(asked).await.unwrap().rows[0][0], id);
    }
    assert_eq!(*controls.batch_sizes.lock(), [1, 2]);
}

#[tokio::test]
async fn a_deadline_is_told_in_time_by_a_busy_server_and_its_entry_is_not_computed() {
    let (engine, controls, step) = stepped(limits(), settings()).await;
    let asked = ask_behind_a_busy_device(&engine, 1..2).await;
    let timeout = Duration::from_millis(40);
    let start = Instant::now();
    let error = engine.infer(Request { deadline: start + timeout, ..ids(&[5]) }).await.unwrap_err();
    assert!(matches!(error, Error::Deadline { timeout: told } if told <= timeout), "{error:?}");
    assert!(start.elapsed() >= timeout);
    drop(step);
    for asked in asked {
        answer(asked).await.unwrap();
    }
    assert_eq!(*controls.batch_sizes.lock(), [1, 1]);
    let past = Request { deadline: Instant::now(), ..request(&["w1"]) };
    assert!(matches!(engine.infer(past).await.unwrap_err(), Error::Deadline { .. }));
}

#[tokio::test]
async fn a_full_queue_refuses_whole_requests_and_says_when_to_come_again() {
    let full = BatchLimits { max_queue_size: 3, ..limits() };
    let (engine, controls, step) = stepped(full, settings()).await;
    let mut asked = ask_behind_a_busy_device(&engine, 1..3).await;
    let error = engine.infer(ids(&[7, 8])).await.unwrap_err();
    let Error::QueueFull { limit: 3, retry_after, .. } = error else { panic!("{error:?}") };
    assert!(retry_after > Duration::ZERO);
    asked.push(ask(&engine, ids(&[3])).await);
    assert!(matches!(engine.infer(ids(&[9])).await.unwrap_err(), Error::QueueFull { .. }));
    assert!(matches!(engine.infer(ids(&[1; 4])).await.unwrap_err(), Error::TooLarge { limit: 3, .. }));
    drop(step);
    for asked in asked {
        answer(asked).await.unwrap();
    }
    assert_eq!(*controls.batch_sizes.lock(), [1, 3], "nothing of the refused requests");
    engine.infer(ids(&[7, 8])).await.unwrap();
}

#[tokio::test]
async fn one_short_question_does_not_wait_behind_a_long_list() {
    let (engine, controls, step) = stepped(limits(), settings()).await;
    let list = ask(&engine, ids(&[1; 90])).await;
    let question = ask(&engine, ids(&[2])).await;
    // One turn of the list is MAX_SEQ_LEN tokens: eight batches of eight. The question goes with the next.
    for _ in 0..9 {
        step.send(()).unwrap();
    }
    assert_eq!(answer(question).await.unwrap().rows[0][0], 2.0);
    assert!(!list.is_finished());
    drop(step);
    assert_eq!(answer(list).await.unwrap().rows.len(), 90);
    assert_eq!(controls.batch_sizes.lock().iter().sum::<usize>(), 91);
}

#[tokio::test]
async fn one_bad_input_fails_its_own_request_and_no_neighbour() {
    for bad in [fake::PANIC_ID, fake::FAIL_ID] {
        let (engine, controls, step) = stepped(limits(), settings()).await;
        let asked = ask_behind_a_busy_device(&engine, (1..9).map(|id| if id == 5 { bad } else { id })).await;
        drop(step);
        for (id, asked) in asked.into_iter().enumerate() {
            match answer(asked).await {
                Ok(output) => assert_eq!(output.rows[0][0], id as f32),
                Err(error) => assert!(id == 5 && matches!(error, Error::Forward { .. }), "{id}: {error:?}"),
            }
        }
        // The whole batch, then halves: 2 log2(8) + 1 batches at most, and a trial for each failure.
        assert!(controls.batch_sizes.lock().len() <= 1 + 7 + 4, "{:?}", controls.batch_sizes.lock());
        wait_for(&engine, |health| *health == Health::Ready).await;
        assert_eq!(sums(&engine, &["w6"]).await.unwrap(), [6.0]);
    }
}

#[tokio::test]
async fn a_bad_input_fails_its_whole_request_also_across_batches() {
    let (engine, _) = engine(limits()).await;
    let mut inputs = vec![1; 50];
    inputs[30] = fake::FAIL_ID;
    assert!(matches!(engine.infer(ids(&inputs)).await.unwrap_err(), Error::Forward { .. }));
    assert_eq!(engine.drain(LONG).await, 0, "and leaves nothing behind");
}

#[tokio::test]
async fn a_lost_device_is_told_refused_and_recovered_from() {
    let (engine, controls) = engine(limits()).await;
    controls.broken.store(true, Ordering::SeqCst);
    assert!(matches!(sums(&engine, &["w1"]).await.unwrap_err(), Error::Forward { .. }));
    wait_for(&engine, |health| matches!(health, Health::Unhealthy(_))).await;
    assert!(matches!(sums(&engine, &["w1"]).await.unwrap_err(), Error::Unhealthy { .. }));
    controls.broken.store(false, Ordering::SeqCst);
    wait_for(&engine, |health| *health == Health::Ready).await;
    assert_eq!(sums(&engine, &["w1"]).await.unwrap(), [1.0]);
}

#[tokio::test]
async fn heartbeats_find_a_device_lost_while_idle() {
    let settings = Settings { heartbeat_interval: Duration::from_millis(5), ..settings() };
    let engine = Arc::new(Engine::with_settings(None, settings));
    let (model, controls) = fake::model("fake", MAX_SEQ_LEN);
    engine.add(model, limits()).unwrap();
    wait_for(&engine, |health| *health == Health::Ready).await;
    controls.broken.store(true, Ordering::SeqCst);
    wait_for(&engine, |health| matches!(health, Health::Unhealthy(_))).await;
    controls.broken.store(false, Ordering::SeqCst);
    wait_for(&engine, |health| *health == Health::Ready).await;
}

#[tokio::test]
async fn a_hung_device_is_unhealthy_until_it_answers() {
    let settings = Settings { device_timeout: Duration::from_millis(30), ..settings() };
    let (engine, _, step) = stepped(limits(), settings).await;
    let asked = ask(&engine, ids(&[1])).await;
    wait_for(&engine, |health| matches!(health, Health::Unhealthy(_))).await;
    assert!(matches!(engine.infer(ids(&[2])).await.unwrap_err(), Error::Unhealthy { .. }));
    drop(step);
    answer(asked).await.unwrap();
    wait_for(&engine, |health| *health == Health::Ready).await;
}

#[tokio::test]
async fn warms_up_at_the_limits_before_it_is_ready() {
    let engine = Engine::with_settings(None, settings());
    let (mut model, controls) = fake::model("fake", MAX_SEQ_LEN);
    let (step, words) = mpsc::channel();
    fake::wrap(&mut model, |inner| Stepped { inner, words: Mutex::new(words) });
    engine.add(model, limits()).unwrap();
    assert_eq!(engine.health()[0].1, Health::Loading);
    assert!(matches!(engine.infer(ids(&[1])).await.unwrap_err(), Error::Loading { .. }));
    drop(step);
    wait_for(&engine, |health| *health == Health::Ready).await;
    assert_eq!(*controls.batch_sizes.lock(), [1, 4], "one short sequence, and 256 tokens in sequences of 64");
}

#[tokio::test]
async fn a_drain_refuses_new_work_and_finishes_what_was_accepted() {
    let (engine, _, step) = stepped(limits(), settings()).await;
    let asked = ask_behind_a_busy_device(&engine, 1..30).await;
    let drain = tokio::spawn({
        let engine = engine.clone();
        async move { engine.drain(LONG).await }
    });
    tokio::task::yield_now().await;
    assert_eq!(engine.health()[0].1, Health::Draining);
    assert_eq!(engine.infer(ids(&[1])).await.unwrap_err(), Error::Draining);
    assert_eq!(engine.tokenize(None, vec!["w1".into()], false).await.unwrap_err(), Error::Draining);
    assert!(!drain.is_finished());
    drop(step);
    for (id, asked) in asked.into_iter().enumerate() {
        assert_eq!(answer(asked).await.unwrap().rows[0][0], id as f32);
    }
    assert_eq!(drain.await.unwrap(), 0);
}

#[tokio::test]
async fn a_drain_past_its_deadline_answers_what_is_left() {
    let (engine, _, step) = stepped(limits(), settings()).await;
    let mut asked = ask_behind_a_busy_device(&engine, 1..30).await;
    assert_eq!(engine.drain(Duration::from_millis(20)).await, 30);
    drop(step);
    answer(asked.remove(0)).await.expect("it was on the device");
    for asked in asked {
        assert_eq!(answer(asked).await.unwrap_err(), Error::Draining);
    }
}

#[tokio::test]
async fn limits_change_while_it_serves() {
    let (engine, controls, step) = stepped(limits(), settings()).await;
    let asked = ask_behind_a_busy_device(&engine, 1..13).await;
    let smaller = BatchLimits { max_batch_size: 5, max_queue_size: 12, ..limits() };
    engine.set_limits("fake", smaller.clone()).unwrap();
    assert_eq!(*engine.limits(None).unwrap(), smaller);
    assert!(matches!(engine.infer(ids(&[1])).await.unwrap_err(), Error::QueueFull { limit: 12, .. }));
    let bad = engine.set_limits("fake", BatchLimits { max_batch_tokens: MAX_SEQ_LEN - 1, ..limits() }).unwrap_err();
    assert!(bad.to_string().starts_with("max_batch_tokens"), "{bad}");
    assert!(matches!(engine.set_limits("other", limits()), Err(Error::UnknownModel { .. })));
    assert_eq!(*engine.limits(None).unwrap(), smaller, "a bad change changes nothing");
    drop(step);
    for asked in asked {
        answer(asked).await.unwrap();
    }
    assert_eq!(*controls.batch_sizes.lock(), [1, 5, 5, 2]);
}

/// A device that works on its own: `launch` returns at once and `finish` waits. Notes what it was asked.
struct Asynchronous {
    inner: Arc<dyn Backend>,
    events: Arc<Mutex<Vec<&'static str>>>,
    /// Held back until the test has filled the queue.
    words: Arc<Mutex<mpsc::Receiver<()>>>,
}

struct OnItsWay(Box<dyn InFlight>, Arc<Mutex<Vec<&'static str>>>, Arc<Mutex<mpsc::Receiver<()>>>);

impl Backend for Asynchronous {
    fn launch(&self, batch: PackedInput) -> Result<Box<dyn InFlight>> {
        self.events.lock().push("launch");
        Ok(Box::new(OnItsWay(self.inner.launch(batch)?, self.events.clone(), self.words.clone())))
    }
}

impl InFlight for OnItsWay {
    fn is_ready(&self) -> bool {
        false
    }

    fn finish(self: Box<Self>) -> Result<Rows> {
        let _ = self.2.lock().recv();
        self.1.lock().push("finish");
        self.0.finish()
    }
}

#[tokio::test]
async fn the_next_batch_is_launched_before_the_last_is_finished() {
    let engine = Arc::new(Engine::with_settings(None, settings()));
    let (mut model, _) = fake::model("fake", MAX_SEQ_LEN);
    let events = Arc::new(Mutex::new(Vec::new()));
    let (step, words) = mpsc::channel();
    let words = Arc::new(Mutex::new(words));
    fake::wrap(&mut model, |inner| Asynchronous { inner, events: events.clone(), words });
    engine.add(model, limits()).unwrap();
    for _ in 0..2 {
        step.send(()).unwrap();
    }
    wait_for(&engine, |health| *health == Health::Ready).await;
    events.lock().clear();
    let asked = ask_behind_a_busy_device(&engine, 1..24).await;
    drop(step);
    for (id, asked) in asked.into_iter().enumerate() {
        assert_eq!(answer(asked).await.unwrap().rows[0][0], id as f32);
    }
    // The first was alone, so it is finished; of the rest each is behind one on the device.
    let expected = ["launch", "finish", "launch", "launch", "finish", "launch", "finish", "finish"];
    assert_eq!(*events.lock(), expected);
    assert_eq!(engine.health()[0].1, Health::Ready);
}

#[tokio::test]
async fn phases_say_where_the_time_went() {
    let (engine, controls) = engine(limits()).await;
    *controls.per_batch.lock() = Duration::from_millis(20);
    let phases = engine.infer(request(&["w1", "w2"])).await.unwrap().phases;
    assert!(phases.inference >= Duration::from_millis(20), "{phases:?}");
    assert!(phases.total >= phases.tokenize + phases.queue + phases.inference, "{phases:?}");
}

#[tokio::test]
async fn the_threads_end_with_the_engine() {
    let (engine, controls) = engine(limits()).await;
    sums(&engine, &["w1"]).await.unwrap();
    drop(engine);
    let end = Instant::now() + LONG;
    // The worker's backend holds the other count.
    while Arc::strong_count(&controls) > 1 {
        assert!(Instant::now() < end, "the worker still runs");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Every ticket is answered exactly once, or its client has gone: whatever is cancelled, late or broken.
#[tokio::test(flavor = "multi_thread", worker_threads = 8)]
async fn every_ticket_is_answered_once_under_stress() {
    const NUM_REQUESTS: usize = 10_000;
    let (engine, _) = engine(BatchLimits { max_queue_size: 64, ..limits() }).await;
    let tasks: Vec<_> = (0..8u64)
        .map(|seed| {
            let engine = engine.clone();
            tokio::spawn(async move {
                let mut rng = SmallRng::seed_from_u64(seed);
                let mut num_answered = 0;
                for _ in 0..NUM_REQUESTS {
                    let inputs: Vec<u32> = (0..rng.random_range(1..4)).map(|_| rng.random_range(0..900)).collect();
                    let mut request = ids(&inputs);
                    if rng.random_range(0..4) == 0 {
                        request.priority = Priority::Background;
                    }
                    match rng.random_range(0..100) {
                        0..10 => request.deadline = Instant::now() + Duration::from_micros(rng.random_range(0..300)),
                        10 => request.inputs[0] = Input::TokenIds(vec![fake::FAIL_ID]),
                        11..20 => request.inputs[0] = Input::Text(format!("w{}", inputs[0])),
                        _ => {}
                    }
                    let is_cancelled = rng.random_range(0..10) == 0;
                    let mut embed = Box::pin(engine.infer(request));
                    if is_cancelled {
                        // Polled a few times, then dropped wherever it is.
                        for _ in 0..rng.random_range(0..3) {
                            if futures::poll!(&mut embed).is_ready() {
                                break;
                            }
                            tokio::task::yield_now().await;
                        }
                        continue;
                    }
                    match embed.await {
                        Ok(output) => {
                            let firsts: Vec<f32> = output.rows.iter().map(|row| row[0]).collect();
                            assert_eq!(firsts, inputs.iter().map(|&id| id as f32).collect::<Vec<_>>());
                            num_answered += 1;
                        }
                        Err(
                            Error::QueueFull { .. }
                            | Error::Overloaded { .. }
                            | Error::Deadline { .. }
                            | Error::Forward { .. },
                        ) => {}
                        Err(error) => panic!("{error:?}"),
                    }
                }
                num_answered
            })
        })
        .collect();
    let mut num_answered = 0;
    for task in tasks {
        num_answered += tokio::time::timeout(LONG * 4, task).await.expect("a ticket was lost").unwrap();
    }
    assert!(num_answered > 8 * NUM_REQUESTS / 4, "{num_answered}");
    assert_eq!(engine.drain(LONG).await, 0, "every entry has left");
}

/// What waits takes longer than the deadline leaves: told at once, not at the deadline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_would_only_wait_for_its_deadline_is_refused_at_once() {
    let (engine, controls) = engine(BatchLimits { max_queue_size: 1000, ..limits() }).await;
    *controls.per_batch.lock() = Duration::from_millis(100);
    for id in 0..20 {
        engine.infer(ids(&[id])).await.unwrap(); // the cost of a batch is learned
    }
    let waiting: Vec<_> = (0..80)
        .map(|id| {
            let engine = engine.clone();
            tokio::spawn(async move { engine.infer(ids(&[id])).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let start = Instant::now();
    let short = Request { deadline: start + Duration::from_millis(300), ..ids(&[7]) };
    let error = engine.infer(short).await.unwrap_err();
    let Error::Overloaded { expected, timeout, retry_after, .. } = error else { panic!("{error:?}") };
    assert!(start.elapsed() < Duration::from_millis(200), "told after {:?}", start.elapsed());
    assert!(expected > timeout && retry_after > timeout, "{expected:?}, {timeout:?}, {retry_after:?}");
    engine.infer(ids(&[8])).await.expect("there is time for this one");
    for task in waiting {
        task.await.unwrap().unwrap();
    }
}

/// Ten times more than the device can do, and a queue far longer than the deadline allows: the device must
/// work for those whose answers still come in time, and every answer is a row or a typed refusal.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overload_wastes_no_device_time() {
    let (engine, controls) = engine(BatchLimits { max_queue_size: 1000, ..limits() }).await;
    *controls.per_batch.lock() = Duration::from_millis(10);
    let timeout = Duration::from_millis(150);
    let (mut tasks, start) = (Vec::new(), Instant::now());
    // 80 every 10 ms, of which a batch takes 8.
    for tick in 1..100 {
        for id in 0..80 {
            let engine = engine.clone();
            tasks.push(tokio::spawn(async move {
                engine.infer(Request { deadline: Instant::now() + timeout, ..ids(&[id]) }).await
            }));
        }
        tokio::time::sleep_until((start + Duration::from_millis(10) * tick).into()).await;
    }
    let (num_asked, mut num_ok) = (tasks.len(), 0);
    for task in tasks {
        match tokio::time::timeout(LONG, task).await.expect("no answer").unwrap() {
            Ok(_) => num_ok += 1,
            Err(Error::QueueFull { .. } | Error::Overloaded { .. } | Error::Deadline { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
    }
    let num_computed: usize = controls.batch_sizes.lock().iter().sum();
    assert!(num_asked > 3 * num_computed, "no overload: {num_computed} of {num_asked}");
    assert!(num_ok * 10 >= num_computed * 9, "{num_ok} in time of {num_computed} computed");
}
