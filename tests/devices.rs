//! One model on several devices: who gets what, and what becomes of it when one of them fails.
//!
//! Costs are taught by the warm-up, with devices that sleep; what is asserted is only who got how much.

mod common;

use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use common::engine::{LONG, answer, ask, request_of, settings};
use common::fake::{self, Controls};
use eremois::model::pack::PackedInput;
use eremois::model::{Backend, InFlight, Rows};
use eremois::request::{Input, Priority, Request};
use eremois::serve::policy::BatchLimits;
use eremois::serve::{Engine, Health, Settings};
use eremois::{Error, Result};
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const MAX_SEQ_LEN: usize = 64;
const DEVICES: [&str; 3] = ["cuda:0", "cuda:1", "cuda:2"];

fn limits() -> BatchLimits {
    BatchLimits { max_batch_size: 8, max_batch_tokens: 256, max_queue_delay: Duration::ZERO, max_queue_size: 500 }
}

/// An engine with one model on as many devices, all ready, that have learned what a batch takes on each.
async fn engine(batch_ms: &[u64]) -> (Arc<Engine>, Vec<Arc<Controls>>) {
    engine_with(batch_ms, settings()).await
}

async fn engine_with(batch_ms: &[u64], settings: Settings) -> (Arc<Engine>, Vec<Arc<Controls>>) {
    let engine = Arc::new(Engine::with_settings(None, settings));
    let (model, controls) = fake::model_on(&DEVICES[..batch_ms.len()], "fake", MAX_SEQ_LEN);
    for (controls, &ms) in controls.iter().zip(batch_ms) {
        *controls.per_batch.lock() = Duration::from_millis(ms);
    }
    engine.add(model, limits()).unwrap();
    wait_for(&engine, |devices| devices.iter().all(|health| *health == Health::Ready)).await;
    for controls in &controls {
        *controls.per_batch.lock() = Duration::ZERO;
        controls.batch_sizes.lock().clear();
    }
    (engine, controls)
}

/// The health of each device.
fn devices(engine: &Engine) -> Vec<Health> {
    engine.models_health().remove(0).devices.into_iter().map(|(_, health)| health).collect()
}

async fn wait_for(engine: &Engine, wanted: impl Fn(&[Health]) -> bool) {
    let end = Instant::now() + LONG;
    while !wanted(&devices(engine)) {
        assert!(Instant::now() < end, "{:?}", devices(engine));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn is_down(health: &Health) -> bool {
    matches!(health, Health::Unhealthy(_))
}

fn ids(inputs: &[u32]) -> Request {
    request_of(inputs.iter().map(|&id| Input::TokenIds(vec![id])).collect())
}

/// What each device launched while `asked` was answered, all of them held until everything was in the queue.
async fn shares(
    engine: &Arc<Engine>,
    controls: &[Arc<Controls>],
    requests: impl Iterator<Item = Vec<u32>>,
) -> Vec<usize> {
    controls.iter().for_each(|c| c.hold());
    let mut asked = Vec::new();
    for inputs in requests {
        asked.push((ask(engine, ids(&inputs)).await, inputs));
    }
    controls.iter().for_each(|c| c.release());
    for (asked, inputs) in asked {
        let firsts: Vec<f32> = answer(asked).await.unwrap().rows.iter().map(|row| row[0]).collect();
        assert_eq!(firsts, inputs.iter().map(|&id| id as f32).collect::<Vec<_>>());
    }
    controls.iter().map(|c| c.num_seqs()).collect()
}

#[tokio::test]
async fn equal_devices_share_requests_evenly() {
    let (engine, controls) = engine(&[40, 40, 40]).await;
    let shares = shares(&engine, &controls, (0..240).map(|id| vec![id])).await;
    assert!(shares.iter().all(|share| (40..=120).contains(share)), "{shares:?}");
    assert_eq!(shares.iter().sum::<usize>(), 240);
}

#[tokio::test]
async fn a_fast_and_a_slow_device_share_in_proportion() {
    let (engine, controls) = engine(&[160, 40]).await;
    let shares = shares(&engine, &controls, (0..200).map(|id| vec![id])).await;
    // A fifth for the slow one.
    assert!((16..=72).contains(&shares[0]), "{shares:?}");
    assert_eq!(shares.iter().sum::<usize>(), 200);
}

async fn wait_until_busy(device: &Controls) {
    let end = Instant::now() + LONG;
    while device.num_seqs() == 0 {
        assert!(Instant::now() < end, "the device has not begun");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn background_work_that_runs_on_a_device_sends_others_to_an_idle_one() {
    let (engine, controls) = engine(&[40, 60]).await;
    controls.iter().for_each(|c| c.hold());
    let background = ask(&engine, Request { priority: Priority::Background, ..ids(&[1; 8]) }).await;
    wait_until_busy(&controls[0]).await;
    // 60 ms on the slower one, 80 behind what runs.
    let other = ask(&engine, ids(&[2; 8])).await;
    controls.iter().for_each(|c| c.release());
    answer(background).await.unwrap();
    answer(other).await.unwrap();
    assert_eq!([controls[0].num_seqs(), controls[1].num_seqs()], [8, 8]);
}

#[tokio::test]
async fn background_work_that_waits_for_a_device_sends_nobody_to_another() {
    let (engine, controls) = engine(&[40, 50]).await;
    controls.iter().for_each(|c| c.hold());
    let mut asked = Vec::new();
    // The first is the faster one also for two batches, of which one waits. Then the second is.
    for (device, inputs) in [(0, &[1; 15][..]), (1, &[1; 8][..])] {
        asked.push(ask(&engine, Request { priority: Priority::Background, ..ids(inputs) }).await);
        wait_until_busy(&controls[device]).await;
    }
    // 80 ms or 100, behind what runs; 120 on the first behind all that waits there too.
    asked.push(ask(&engine, ids(&[2; 8])).await);
    controls.iter().for_each(|c| c.release());
    for asked in asked {
        answer(asked).await.unwrap();
    }
    assert_eq!([controls[0].num_seqs(), controls[1].num_seqs()], [23, 8]);
}

#[tokio::test]
async fn an_idle_fast_device_is_preferred_to_an_idle_slow_one() {
    let (engine, controls) = engine(&[160, 40]).await;
    for id in 0..20 {
        assert_eq!(engine.infer(ids(&[id])).await.unwrap().rows[0][0], id as f32);
    }
    // The worker may not yet have counted off the batch whose answer is here; that is a batch on the fast one, and so
    // still less than one on the slow.
    assert_eq!([controls[0].num_seqs(), controls[1].num_seqs()], [0, 20]);
}

#[tokio::test]
async fn a_long_list_uses_all_devices_and_its_rows_keep_their_order() {
    let (engine, controls) = engine(&[40, 40]).await;
    let shares = shares(&engine, &controls, std::iter::once((0..203).collect())).await;
    assert!(shares.iter().all(|share| (56..=152).contains(share)), "{shares:?}");
    assert_eq!(shares.iter().sum::<usize>(), 203);
}

#[tokio::test]
async fn a_list_of_less_than_two_batches_stays_on_one_device() {
    let (engine, controls) = engine(&[1, 1]).await;
    let mut shares = shares(&engine, &controls, std::iter::once((0..15).collect())).await;
    shares.sort();
    assert_eq!(shares, [0, 15]);
}

#[tokio::test]
async fn a_question_does_not_wait_behind_a_list_on_any_device() {
    let (engine, controls) = engine(&[40, 40]).await;
    controls.iter().for_each(|c| c.hold());
    let list = ask(&engine, ids(&[1; 400])).await;
    let question = ask(&engine, ids(&[2])).await;
    controls.iter().for_each(|c| *c.per_batch.lock() = Duration::from_millis(20));
    controls.iter().for_each(|c| c.release());
    answer(question).await.unwrap();
    // One turn of the list is MAX_SEQ_LEN tokens, eight batches, on each device.
    assert!(!list.is_finished());
    assert_eq!(answer(list).await.unwrap().rows.len(), 400);
}

#[tokio::test]
async fn the_queue_is_bounded_for_all_devices_together() {
    let (engine, controls) = engine(&[10, 10]).await;
    controls.iter().for_each(|c| c.hold());
    let list = ask(&engine, ids(&[1; 480])).await;
    let end = Instant::now() + LONG;
    while controls.iter().any(|c| c.num_seqs() == 0) {
        assert!(Instant::now() < end, "no device has begun");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // 464 wait, 16 are on the devices.
    let error = engine.infer(ids(&[2; 37])).await.unwrap_err();
    assert!(matches!(error, Error::QueueFull { limit: 500, .. }), "{error:?}");
    let fits = ask(&engine, ids(&[2; 36])).await;
    controls.iter().for_each(|c| c.release());
    answer(list).await.unwrap();
    answer(fits).await.unwrap();
    assert_eq!(engine.drain(LONG).await, 0);
}

#[tokio::test]
async fn a_device_that_fails_mid_way_loses_no_request() {
    let (engine, controls) = engine(&[10, 10]).await;
    controls.iter().for_each(|c| c.hold());
    let mut asked = Vec::new();
    for id in 0..60 {
        asked.push(ask(&engine, ids(&[id])).await);
    }
    let list = ask(&engine, ids(&[7; 100])).await;
    controls[0].broken.store(true, Ordering::SeqCst);
    controls.iter().for_each(|c| c.release());
    for (id, asked) in asked.into_iter().enumerate() {
        assert_eq!(answer(asked).await.unwrap().rows[0][0], id as f32);
    }
    assert!(answer(list).await.unwrap().rows.iter().all(|row| row[0] == 7.0));
    let health = engine.models_health().remove(0);
    assert_eq!(health.health, Health::Ready);
    assert!(is_down(&health.devices[0].1) && health.devices[1].1 == Health::Ready, "{health:?}");

    // Meanwhile the other gets everything, and after its recovery both take part again.
    assert_eq!(engine.infer(ids(&[3])).await.unwrap().rows[0][0], 3.0);
    controls[0].broken.store(false, Ordering::SeqCst);
    wait_for(&engine, |devices| devices.iter().all(|health| *health == Health::Ready)).await;
    assert_eq!(engine.drain(LONG).await, 0);
}

#[tokio::test]
async fn without_another_device_what_waited_is_answered_with_the_reason() {
    let (engine, controls) = engine(&[10, 10]).await;
    controls.iter().for_each(|c| c.hold());
    let mut asked = Vec::new();
    for id in 0..60 {
        asked.push(ask(&engine, ids(&[id])).await);
    }
    controls.iter().for_each(|c| c.broken.store(true, Ordering::SeqCst));
    controls.iter().for_each(|c| c.release());
    for asked in asked {
        let error = answer(asked).await.unwrap_err();
        assert!(matches!(error, Error::Forward { .. } | Error::Unhealthy { .. }), "{error:?}");
    }
    wait_for(&engine, |devices| devices.iter().all(is_down)).await;
    let Error::Unhealthy { reason, .. } = engine.infer(ids(&[1])).await.unwrap_err() else { panic!("it is let in") };
    assert!(reason.contains("cuda:0: ") && reason.contains("cuda:1: "), "{reason}");
    assert_eq!(engine.drain(LONG).await, 0, "and nothing is left behind");
}

/// The id of an input that loses the device it is computed on.
const POISON_ID: u32 = 900;

struct Fragile {
    inner: Arc<dyn Backend>,
    controls: Arc<Controls>,
}

impl Backend for Fragile {
    fn launch(&self, batch: PackedInput) -> Result<Box<dyn InFlight>> {
        if batch.input_ids.contains(&POISON_ID) {
            self.controls.broken.store(true, Ordering::SeqCst);
        }
        self.inner.launch(batch)
    }
}

#[tokio::test]
async fn what_loses_one_device_may_lose_a_second_and_no_third() {
    let engine = Arc::new(Engine::with_settings(None, settings()));
    let (mut model, controls) = fake::model_on(&DEVICES, "fake", MAX_SEQ_LEN);
    for (placed, controls) in model.backends.iter_mut().zip(&controls) {
        placed.backend = Arc::new(Fragile { inner: placed.backend.clone(), controls: controls.clone() });
    }
    engine.add(model, limits()).unwrap();
    wait_for(&engine, |devices| devices.iter().all(|health| *health == Health::Ready)).await;
    let error = engine.infer(ids(&[1, POISON_ID])).await.unwrap_err();
    assert!(matches!(error, Error::Forward { .. }), "{error:?}");
    let num_down = devices(&engine).iter().filter(|health| is_down(health)).count();
    assert_eq!(num_down, 2, "{:?}", devices(&engine));
    assert_eq!(engine.infer(ids(&[5])).await.unwrap().rows[0][0], 5.0);
}

/// A device that works on its own: `launch` returns at once, and `finish` waits for a word.
struct Deferred {
    inner: Arc<dyn Backend>,
    words: Arc<Mutex<mpsc::Receiver<()>>>,
}

struct OnItsWay {
    inner: Arc<dyn Backend>,
    batch: PackedInput,
    words: Arc<Mutex<mpsc::Receiver<()>>>,
}

impl Backend for Deferred {
    fn launch(&self, batch: PackedInput) -> Result<Box<dyn InFlight>> {
        Ok(Box::new(OnItsWay { inner: self.inner.clone(), batch, words: self.words.clone() }))
    }
}

impl InFlight for OnItsWay {
    fn is_ready(&self) -> bool {
        false
    }

    fn finish(self: Box<Self>) -> Result<Rows> {
        let _ = self.words.lock().recv();
        self.inner.launch(self.batch)?.finish()
    }
}

#[tokio::test]
async fn the_batch_behind_the_one_that_failed_is_not_kept_waiting_for_the_device() {
    // Nothing is tried again while this test runs.
    let engine = Arc::new(Engine::with_settings(None, Settings { retry_interval: LONG * 10, ..settings() }));
    let (mut model, controls) = fake::model("fake", MAX_SEQ_LEN);
    let (step, words) = mpsc::channel();
    fake::wrap(&mut model, |inner| Deferred { inner, words: Arc::new(Mutex::new(words)) });
    engine.add(model, limits()).unwrap();
    for _ in 0..2 {
        step.send(()).unwrap(); // the warm-up's two batches
    }
    wait_for(&engine, |devices| devices[0] == Health::Ready).await;
    let first = ask(&engine, ids(&[1])).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let behind = [ask(&engine, ids(&[2; 8])).await, ask(&engine, ids(&[3; 8])).await];
    step.send(()).unwrap();
    answer(first).await.unwrap();
    // By now, or in a moment, both of these are launched and the worker waits for the first of them.
    controls.broken.store(true, Ordering::SeqCst);
    drop(step);
    for asked in behind {
        assert!(matches!(answer(asked).await.unwrap_err(), Error::Forward { .. }));
    }
    assert_eq!(engine.drain(LONG).await, 0);
}

#[tokio::test]
async fn one_bad_input_fails_its_own_request_and_no_device() {
    for bad in [fake::PANIC_ID, fake::FAIL_ID] {
        let (engine, controls) = engine(&[10, 10]).await;
        controls.iter().for_each(|c| c.hold());
        let mut asked = Vec::new();
        for id in 0..20 {
            asked.push(ask(&engine, ids(&[if id == 5 { bad } else { id }])).await);
        }
        controls.iter().for_each(|c| c.release());
        for (id, asked) in asked.into_iter().enumerate() {
            match answer(asked).await {
                Ok(output) => assert_eq!(output.rows[0][0], id as f32),
                Err(error) => assert!(id == 5 && matches!(error, Error::Forward { .. }), "{id}: {error:?}"),
            }
        }
        wait_for(&engine, |devices| devices.iter().all(|health| *health == Health::Ready)).await;
    }
}

#[tokio::test]
async fn ready_with_one_of_two_while_the_other_warms_up_or_is_lost() {
    for is_broken in [false, true] {
        let engine = Arc::new(Engine::with_settings(None, settings()));
        let (model, controls) = fake::model_on(&DEVICES[..2], "fake", MAX_SEQ_LEN);
        match is_broken {
            true => controls[0].broken.store(true, Ordering::SeqCst),
            false => controls[0].hold(),
        }
        engine.add(model, limits()).unwrap();
        wait_for(&engine, |devices| devices[1] == Health::Ready && is_down(&devices[0]) == is_broken).await;
        assert_eq!(engine.health()[0].1, Health::Ready);
        let before = controls[1].num_seqs();
        for id in 0..10 {
            assert_eq!(engine.infer(ids(&[id])).await.unwrap().rows[0][0], id as f32);
        }
        assert_eq!(controls[1].num_seqs(), before + 10, "all by the one that is ready");
        controls[0].broken.store(false, Ordering::SeqCst);
        controls[0].release();
        wait_for(&engine, |devices| devices[0] == Health::Ready).await;
    }
}

#[tokio::test]
async fn a_hung_device_gets_nothing_until_it_answers() {
    let times = Settings { device_timeout: Duration::from_millis(200), ..settings() };
    let (engine, controls) = engine_with(&[1, 1], times).await;
    controls.iter().for_each(|c| c.hold());
    // As both stand still, both get some of these.
    let (mut asked, end) = (Vec::new(), Instant::now() + LONG);
    while controls[0].num_seqs() == 0 {
        assert!(Instant::now() < end, "the first device gets nothing");
        asked.push(ask(&engine, ids(&[1])).await);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    controls[1].release();
    wait_for(&engine, |devices| is_down(&devices[0])).await;
    assert_eq!(engine.health()[0].1, Health::Ready);
    for id in 0..50 {
        assert_eq!(engine.infer(ids(&[id])).await.unwrap().rows[0][0], id as f32);
    }
    controls[0].release();
    for asked in asked {
        answer(asked).await.unwrap();
    }
    wait_for(&engine, |devices| devices[0] == Health::Ready).await;
}

/// Series are made when the model is added, with the recorder of this thread.
#[tokio::test]
async fn each_device_has_its_own_series() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let (engine, controls) = engine(&[10, 10]).await;
    controls[1].broken.store(true, Ordering::SeqCst);
    shares(&engine, &controls, std::iter::once((0..128).collect())).await;
    let value = |name: &str, labels: &str| {
        let text = recorder.handle().render();
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}{{model=\"fake\"{labels}}} ")));
        line.unwrap_or_else(|| panic!("no {name}{labels} in\n{text}")).parse::<f64>().unwrap()
    };
    let of = |name: &str, device: usize| {
        let class = if name == "eremois_inputs_total" { ",class=\"interactive\"" } else { "" };
        value(name, &format!(",device=\"{}\"{class}", DEVICES[device]))
    };
    // A batch is counted after it was answered.
    let end = Instant::now() + LONG;
    while of("eremois_inputs_total", 0) < 128.0 || of("eremois_handed_over_total", 1) == 0.0 {
        assert!(Instant::now() < end, "{}", recorder.handle().render());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!((of("eremois_inputs_total", 0), of("eremois_inputs_total", 1)), (128.0, 0.0));
    assert_eq!(of("eremois_handed_over_total", 0), 0.0);
    assert_eq!((of("eremois_device_ready", 0), of("eremois_device_ready", 1)), (1.0, 0.0));
    assert_eq!((value("eremois_model_ready", ""), value("eremois_queue_depth", ",class=\"interactive\"")), (1.0, 0.0));
}

#[tokio::test]
async fn the_threads_end_with_the_engine() {
    let (engine, controls) = engine(&[1, 1, 1]).await;
    engine.infer(ids(&[1])).await.unwrap();
    drop(engine);
    let end = Instant::now() + LONG;
    // Each worker's backend holds the other count.
    while controls.iter().any(|controls| Arc::strong_count(controls) > 1) {
        assert!(Instant::now() < end, "a worker still runs");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Every request is answered once, with its own rows or a typed error, while devices fail and come back.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_request_is_answered_once_while_devices_come_and_go() {
    const NUM_REQUESTS: usize = 8_000;
    let (engine, controls) = engine(&[1, 1, 1]).await;
    let flapping = tokio::spawn(async move {
        let mut rng = SmallRng::seed_from_u64(9);
        loop {
            let device = &controls[rng.random_range(0..2)];
            device.broken.store(true, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(rng.random_range(1..8))).await;
            device.broken.store(false, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(rng.random_range(1..8))).await;
        }
    });
    let tasks: Vec<_> = (0..8u64)
        .map(|seed| {
            let engine = engine.clone();
            tokio::spawn(async move {
                let mut rng = SmallRng::seed_from_u64(seed);
                let mut num_answered = 0;
                for _ in 0..NUM_REQUESTS {
                    let num_inputs = if rng.random_range(0..20) == 0 { 40 } else { rng.random_range(1..4) };
                    let inputs: Vec<u32> = (0..num_inputs).map(|_| rng.random_range(0..900)).collect();
                    let mut embed = Box::pin(engine.infer(ids(&inputs)));
                    if rng.random_range(0..10) == 0 {
                        let _ = futures::poll!(&mut embed);
                        tokio::task::yield_now().await;
                        continue;
                    }
                    match embed.await {
                        Ok(output) => {
                            let firsts: Vec<f32> = output.rows.iter().map(|row| row[0]).collect();
                            assert_eq!(firsts, inputs.iter().map(|&id| id as f32).collect::<Vec<_>>());
                            num_answered += 1;
                        }
                        // Lost on two devices in a row.
                        Err(Error::Forward { .. } | Error::QueueFull { .. }) => {}
                        Err(error) => panic!("{error:?}"),
                    }
                }
                num_answered
            })
        })
        .collect();
    let mut num_answered = 0;
    for task in tasks {
        num_answered += tokio::time::timeout(LONG * 4, task).await.expect("a request was lost").unwrap();
    }
    flapping.abort();
    assert!(num_answered > 8 * NUM_REQUESTS * 8 / 10, "{num_answered}");
    assert_eq!(engine.drain(LONG).await, 0, "every entry has left");
}
