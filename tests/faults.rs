//! Devices without memory, lost devices and hung ones, over a model that computes almost nothing.

mod common;

use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use common::engine::{self, answer, ask, request_of, wait_for as becomes};
use common::fake::{self, Controls};
use common::process::{Answer, Client, LONG, embeddings, free_address, wait_for};
use eremois::app::{self, Models, Parts, logs};
use eremois::config::Sources;
use eremois::model::pack::PackedInput;
use eremois::model::{Backend, InFlight, Rows};
use eremois::output::Output;
use eremois::request::{Input, Request};
use eremois::serve::control::Fixed;
use eremois::serve::policy::BatchLimits;
use eremois::serve::{Engine, Health, Settings};
use eremois::{Error, Result, cli, metrics};
use parking_lot::Mutex;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;

const MAX_SEQ_LEN: usize = 16;

fn limits() -> BatchLimits {
    BatchLimits { max_batch_size: 100, max_batch_tokens: 256, max_queue_delay: Duration::ZERO, max_queue_size: 1000 }
}

/// No device counts as hung because a machine is slow.
fn settings() -> Settings {
    Settings { device_timeout: Duration::from_secs(3600), num_encoders: 1, ..engine::settings() }
}

/// An engine with one ready model, and nothing counted yet.
async fn engine(settings: Settings) -> (Arc<Engine>, Arc<Controls>) {
    let engine = Arc::new(Engine::with_settings(None, settings));
    let (model, controls) = fake::model("fake", MAX_SEQ_LEN);
    engine.add(model, limits()).unwrap();
    becomes(&engine, |health| *health == Health::Ready).await;
    controls.batch_sizes.lock().clear();
    (engine, controls)
}

/// The last answer may be there a moment before the worker has looked back.
async fn limit_becomes(engine: &Engine, max_batch_tokens: usize) {
    let end = Instant::now() + LONG;
    while engine.limits(None).unwrap().max_batch_tokens != max_batch_tokens {
        assert!(Instant::now() < end, "{:?}", engine.limits(None));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// A request of inputs of these lengths, all of the id `id`.
fn ids(id: u32, lens: &[usize]) -> Request {
    request_of(lens.iter().map(|&len| Input::TokenIds(vec![id; len])).collect())
}

// ---- memory --------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_batch_without_memory_is_computed_in_parts_and_the_limit_follows() {
    let (engine, controls) = engine(settings()).await;
    controls.memory_tokens.store(40, Ordering::SeqCst);
    // One request: its inputs must be parted, not only requests from one another.
    let output = engine.infer(ids(7, &[4; 64])).await.unwrap();
    assert_eq!(output.rows.len(), 64);
    assert!(output.rows.iter().all(|row| row[..2] == [28.0, 4.0]), "{:?}", output.rows);
    // Halves of 256 tokens down to 32; what is as large as one that failed is not tried. No trial in between.
    assert_eq!(*controls.batch_sizes.lock(), [64, 32, 16, 8, 8, 8, 8, 8, 8, 8, 8]);
    assert_eq!(engine.health()[0].1, Health::Ready);
    limit_becomes(&engine, 32).await;
    // From now on batches fit at once.
    controls.batch_sizes.lock().clear();
    engine.infer(ids(7, &[4; 64])).await.unwrap();
    assert_eq!(*controls.batch_sizes.lock(), [8; 8]);
    // Other limits are as they were, and settings that are read again put back the one that was lowered.
    assert_eq!(*engine.limits(None).unwrap(), BatchLimits { max_batch_tokens: 32, ..limits() });
    engine.set_limits("fake", limits()).unwrap();
    assert_eq!(*engine.limits(None).unwrap(), limits());
}

#[tokio::test]
async fn the_limit_is_not_lowered_below_the_longest_sequence() {
    let (engine, controls) = engine(settings()).await;
    controls.memory_tokens.store(5, Ordering::SeqCst);
    engine.infer(ids(1, &[4; 8])).await.unwrap();
    limit_becomes(&engine, MAX_SEQ_LEN).await;
    for _ in 0..2 {
        engine.infer(ids(1, &[4; 8])).await.unwrap();
        assert_eq!(engine.limits(None).unwrap().max_batch_tokens, MAX_SEQ_LEN);
    }
}

#[tokio::test]
async fn an_input_without_memory_fails_its_request_and_no_neighbour() {
    let (engine, controls, step) = stepped(settings()).await;
    let mut asked = vec![ask(&engine, ids(0, &[1])).await];
    tokio::time::sleep(Duration::from_millis(50)).await;
    for id in 1..9 {
        asked.push(ask(&engine, ids(id, &[if id == 5 { 12 } else { 2 }])).await);
    }
    controls.memory_tokens.store(8, Ordering::SeqCst);
    drop(step);
    for (id, asked) in asked.into_iter().enumerate() {
        match answer(asked).await {
            Ok(output) => assert_eq!(output.rows[0][0], (id * if id == 0 { 1 } else { 2 }) as f32),
            Err(error) => assert!(id == 5 && matches!(error, Error::OutOfMemory { .. }), "{id}: {error:?}"),
        }
    }
    assert_eq!(engine.health()[0].1, Health::Ready);
    assert_eq!(engine.drain(LONG).await, 0, "every entry has left");
}

#[tokio::test]
async fn where_nothing_fits_everybody_is_told_and_the_limit_stays() {
    let (engine, controls) = engine(settings()).await;
    controls.memory_tokens.store(1, Ordering::SeqCst);
    let error = engine.infer(ids(1, &[4; 64])).await.unwrap_err();
    assert!(matches!(&error, Error::OutOfMemory { cause } if cause.contains("beyond 1 tokens")), "{error:?}");
    // 64, 32, 16, ... 1, and then nothing of that size is tried again.
    assert_eq!(*controls.batch_sizes.lock(), [64, 32, 16, 8, 4, 2, 1]);
    assert_eq!(*engine.limits(None).unwrap(), limits());
    controls.memory_tokens.store(0, Ordering::SeqCst);
    engine.infer(ids(1, &[4; 64])).await.unwrap();
    assert_eq!(engine.drain(LONG).await, 0, "every entry has left");
}

#[tokio::test]
async fn a_bad_input_in_a_part_fails_its_own_request_only() {
    let (engine, controls, step) = stepped(settings()).await;
    let mut asked = vec![ask(&engine, ids(0, &[1])).await];
    tokio::time::sleep(Duration::from_millis(50)).await;
    for id in 1..9 {
        asked.push(ask(&engine, ids(if id == 5 { fake::FAIL_ID } else { id }, &[2])).await);
    }
    controls.memory_tokens.store(8, Ordering::SeqCst);
    drop(step);
    for (id, asked) in asked.into_iter().enumerate() {
        let result = answer(asked).await;
        assert_eq!(result.is_err(), id == 5, "{id}: {result:?}");
    }
}

#[tokio::test]
async fn a_warm_up_without_memory_lowers_the_limit_and_gets_ready() {
    let engine = Arc::new(Engine::with_settings(None, settings()));
    let (model, controls) = fake::model("fake", MAX_SEQ_LEN);
    controls.memory_tokens.store(100, Ordering::SeqCst);
    engine.add(model, limits()).unwrap();
    becomes(&engine, |health| *health == Health::Ready).await;
    assert_eq!(*controls.batch_sizes.lock(), [1, 16, 8, 4]);
    assert_eq!(engine.limits(None).unwrap().max_batch_tokens, 64);
    assert_eq!(controls.num_warmed_up.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn limits_that_the_device_has_no_memory_for_change_nothing() {
    let (engine, controls) = engine(settings()).await;
    controls.most_tokens.store(512, Ordering::SeqCst);
    let beyond = BatchLimits { max_batch_tokens: 513, ..limits() };
    let error = engine.set_limits("fake", beyond).unwrap_err().to_string();
    assert!(error.starts_with("max_batch_tokens") && error.contains("512"), "{error}");
    assert_eq!(*engine.limits(None).unwrap(), limits());
    engine.set_limits("fake", BatchLimits { max_batch_tokens: 512, ..limits() }).unwrap();
    assert_eq!(engine.limits(None).unwrap().max_batch_tokens, 512);
}

#[test]
fn the_limit_in_force_and_what_lowered_it_are_metrics() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let engine = Arc::new(Engine::with_settings(None, settings()));
    let (model, controls) = fake::model("fake", MAX_SEQ_LEN);
    ::metrics::with_local_recorder(&recorder, || engine.add(model, limits()).unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let shown = |line: &str| {
        let text = recorder.handle().render();
        assert!(text.contains(line), "no {line} in {text}");
    };
    runtime.block_on(becomes(&engine, |health| *health == Health::Ready));
    shown("eremois_max_batch_tokens{model=\"fake\"} 256\n");
    controls.memory_tokens.store(40, Ordering::SeqCst);
    runtime.block_on(engine.infer(ids(7, &[4; 64]))).unwrap();
    runtime.block_on(limit_becomes(&engine, 32));
    runtime.block_on(engine.drain(LONG));
    shown("eremois_max_batch_tokens{model=\"fake\"} 32\n");
    shown("eremois_limits_lowered_total{model=\"fake\"} 1\n");
    shown("eremois_batch_failures_total{model=\"fake\",device=\"cpu\",kind=\"out_of_memory\"} 3\n");
    engine.set_limits("fake", limits()).unwrap();
    shown("eremois_max_batch_tokens{model=\"fake\"} 256\n");
}

// ---- lost devices --------------------------------------------------------------------------------------------------

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

async fn stepped(settings: Settings) -> (Arc<Engine>, Arc<Controls>, mpsc::Sender<()>) {
    let engine = Arc::new(Engine::with_settings(None, settings));
    let (mut model, controls) = fake::model("fake", MAX_SEQ_LEN);
    let (step, words) = mpsc::channel();
    fake::wrap(&mut model, |inner| Stepped { inner, words: Mutex::new(words) });
    engine.add(model, limits()).unwrap();
    for _ in 0..2 {
        step.send(()).unwrap(); // the warm-up's two batches
    }
    becomes(&engine, |health| *health == Health::Ready).await;
    controls.batch_sizes.lock().clear();
    (engine, controls, step)
}

#[tokio::test]
async fn a_lost_device_fails_its_batch_refuses_what_waits_and_is_not_asked_again() {
    let (engine, controls, step) = stepped(settings()).await;
    let on_device = ask(&engine, ids(fake::LOSE_ID, &[1])).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let waiting = ask(&engine, ids(2, &[1; 5])).await;
    drop(step);
    let told = tokio::time::timeout(LONG, engine.lost()).await.expect("nobody was told");
    assert!(matches!(&told, Error::DeviceLost { cause } if cause.contains("lose the device")), "{told:?}");
    assert_eq!(answer(on_device).await.unwrap_err(), told);
    let refused = answer(waiting).await.unwrap_err();
    assert!(matches!(&refused, Error::Unhealthy { reason, .. } if reason.contains("lose the device")), "{refused:?}");
    assert!(matches!(engine.health()[0].1, Health::Unhealthy(_)));
    assert!(matches!(engine.infer(ids(3, &[1])).await.unwrap_err(), Error::Unhealthy { .. }));
    assert_eq!(*controls.batch_sizes.lock(), [1], "no trial, and nothing after");
    assert_eq!(engine.drain(LONG).await, 0, "nothing waits on the device");
    assert_eq!(engine.loss(), Some(told));
}

#[tokio::test]
async fn heartbeats_and_the_warm_up_find_a_lost_device() {
    let (engine, controls) = engine(Settings { heartbeat_interval: Duration::from_millis(5), ..settings() }).await;
    assert_eq!(engine.loss(), None);
    controls.lost.store(true, Ordering::SeqCst);
    tokio::time::timeout(LONG, engine.lost()).await.expect("nobody was told");
    let num_batches = controls.num_batches.load(Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(controls.num_batches.load(Ordering::SeqCst), num_batches, "no heartbeat goes to a lost device");

    let engine = Engine::with_settings(None, settings());
    let (model, controls) = fake::model("fake", MAX_SEQ_LEN);
    controls.lost.store(true, Ordering::SeqCst);
    engine.add(model, limits()).unwrap();
    tokio::time::timeout(LONG, engine.lost()).await.expect("nobody was told");
    assert!(matches!(engine.health()[0].1, Health::Unhealthy(_)));
}

/// A device that is lost while two batches are on it. Waiting for the second would never end.
struct LostInFlight {
    inner: Arc<dyn Backend>,
    num_launched: AtomicUsize,
    words: Arc<Mutex<mpsc::Receiver<()>>>,
}

struct OnItsWay {
    inner: Box<dyn InFlight>,
    /// Counted from the warm-up's two.
    number: usize,
    words: Arc<Mutex<mpsc::Receiver<()>>>,
}

impl Backend for LostInFlight {
    fn launch(&self, batch: PackedInput) -> Result<Box<dyn InFlight>> {
        let number = self.num_launched.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(OnItsWay { inner: self.inner.launch(batch)?, number, words: self.words.clone() }))
    }
}

impl InFlight for OnItsWay {
    fn is_ready(&self) -> bool {
        false
    }

    fn finish(self: Box<Self>) -> Result<Rows> {
        match self.number {
            0 | 1 => self.inner.finish(),
            2 => {
                let _ = self.words.lock().recv();
                Err(Error::DeviceLost { cause: "lost under way".into() })
            }
            _ => loop {
                std::thread::park();
            },
        }
    }
}

#[tokio::test]
async fn the_batch_behind_the_one_that_lost_the_device_is_not_waited_for() {
    let engine = Arc::new(Engine::with_settings(None, settings()));
    let (mut model, _) = fake::model("fake", MAX_SEQ_LEN);
    let (step, words) = mpsc::channel();
    let words = Arc::new(Mutex::new(words));
    fake::wrap(&mut model, |inner| LostInFlight { inner, num_launched: AtomicUsize::new(0), words });
    engine.add(model, BatchLimits { max_batch_size: 1, ..limits() }).unwrap();
    becomes(&engine, |health| *health == Health::Ready).await;
    // Two batches of one: both are on the device when the first turns out to be lost, the third waits.
    let asked = [ask(&engine, ids(1, &[1; 3])).await, ask(&engine, ids(2, &[1])).await];
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(step);
    for asked in asked {
        let error = answer(asked).await.unwrap_err();
        assert!(matches!(error, Error::DeviceLost { .. } | Error::Unhealthy { .. }), "{error:?}");
    }
    assert_eq!(engine.drain(LONG).await, 0);
}

#[tokio::test]
async fn a_hung_device_is_a_lost_one_where_its_kind_never_comes_back() {
    let settings = Settings { device_timeout: Duration::from_millis(40), ..settings() };
    let engine = Arc::new(Engine::with_settings(None, settings));
    let (model, controls) = fake::model("fake", MAX_SEQ_LEN);
    controls.hangs_for_good.store(true, Ordering::SeqCst);
    engine.add(model, limits()).unwrap();
    becomes(&engine, |health| *health == Health::Ready).await;
    let on_device = ask(&engine, ids(fake::HANG_ID, &[1])).await;
    tokio::time::sleep(Duration::from_millis(10)).await;
    let waiting = ask(&engine, ids(2, &[1])).await;
    let told = tokio::time::timeout(LONG, engine.lost()).await.expect("nobody found out");
    assert!(matches!(&told, Error::DeviceLost { cause } if cause.contains("40ms")), "{told:?}");
    // The worker can answer nobody: the handlers see for themselves, long before their deadline.
    for asked in [on_device, waiting] {
        assert!(matches!(answer(asked).await.unwrap_err(), Error::Unhealthy { .. }));
    }
    let start = Instant::now();
    assert!(engine.drain(Duration::from_millis(20)).await > 0, "what hangs is not computed");
    assert!(start.elapsed() < LONG / 2, "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_slow_cpu_is_not_a_lost_device() {
    let settings = Settings { device_timeout: Duration::from_millis(20), ..settings() };
    let (engine, _, step) = stepped(settings).await;
    let asked = ask(&engine, ids(1, &[1])).await;
    becomes(&engine, |health| matches!(health, Health::Unhealthy(_))).await;
    assert!(tokio::time::timeout(Duration::from_millis(100), engine.lost()).await.is_err(), "it comes back");
    drop(step);
    answer(asked).await.unwrap();
    becomes(&engine, |health| *health == Health::Ready).await;
}

#[tokio::test]
async fn another_models_device_goes_on_until_it_is_drained() {
    let (engine, controls) = engine(settings()).await;
    let (other, _) = fake::model("other", MAX_SEQ_LEN);
    engine.add(other, limits()).unwrap();
    becomes(&engine, |health| *health == Health::Ready).await;
    controls.lost.store(true, Ordering::SeqCst);
    assert!(matches!(engine.infer(ids(1, &[1])).await.unwrap_err(), Error::DeviceLost { .. }));
    tokio::time::timeout(LONG, engine.lost()).await.expect("nobody was told");
    let request = Request { model: Some("other".into()), ..ids(4, &[2]) };
    assert_eq!(engine.infer(request).await.unwrap().rows[0][0], 8.0);
}

// ---- one model on several devices ----------------------------------------------------------------------------------

const DEVICES: [&str; 3] = ["cuda:0", "cuda:1", "cuda:2"];

/// An engine with one model on as many devices, all ready, and nothing counted yet.
async fn engine_on(num_devices: usize, settings: Settings) -> (Arc<Engine>, Vec<Arc<Controls>>) {
    let engine = Arc::new(Engine::with_settings(None, settings));
    let (model, controls) = fake::model_on(&DEVICES[..num_devices], "fake", MAX_SEQ_LEN);
    // Long enough for the warm-up to teach that all are as fast.
    controls.iter().for_each(|c| *c.per_batch.lock() = Duration::from_millis(20));
    engine.add(model, limits()).unwrap();
    devices_become(&engine, |devices| devices.iter().all(|health| *health == Health::Ready)).await;
    for controls in &controls {
        *controls.per_batch.lock() = Duration::ZERO;
        controls.batch_sizes.lock().clear();
    }
    (engine, controls)
}

/// Makes all devices stand still, and asks until each has something and more waits. The requests are all the same.
async fn hold_with_work(engine: &Arc<Engine>, controls: &[Arc<Controls>]) -> Vec<JoinHandle<Result<Output>>> {
    controls.iter().for_each(|c| c.hold());
    let before: Vec<usize> = controls.iter().map(|c| c.num_seqs()).collect();
    let (mut asked, end) = (Vec::new(), Instant::now() + LONG);
    while asked.len() < 20 || controls.iter().zip(&before).any(|(c, before)| c.num_seqs() == *before) {
        assert!(Instant::now() < end, "a device gets nothing");
        asked.push(ask(engine, ids(3, &[2; 4])).await);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    asked
}

async fn all_answered(asked: Vec<JoinHandle<Result<Output>>>) {
    for asked in asked {
        assert!(answer(asked).await.unwrap().rows.iter().all(|row| row[0] == 6.0));
    }
}

/// The health of each device of the only model.
fn devices(engine: &Engine) -> Vec<Health> {
    engine.models_health().remove(0).devices.into_iter().map(|(_, health)| health).collect()
}

async fn devices_become(engine: &Engine, wanted: impl Fn(&[Health]) -> bool) {
    let end = Instant::now() + LONG;
    while !wanted(&devices(engine)) {
        assert!(Instant::now() < end, "{:?}", devices(engine));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_model_goes_on_without_a_lost_device_until_it_has_none() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let _guard = ::metrics::set_default_local_recorder(&recorder);
    let shown = |line: &str| {
        let text = recorder.handle().render();
        assert!(text.contains(line), "no {line} in {text}");
    };
    let (engine, controls) = engine_on(2, settings()).await;
    let asked = hold_with_work(&engine, &controls).await;
    controls[0].lost.store(true, Ordering::SeqCst);
    controls.iter().for_each(|c| c.release());
    all_answered(asked).await;
    assert_eq!(engine.health()[0].1, Health::Ready);
    assert!(matches!(&devices(&engine)[..], [Health::Unhealthy(_), Health::Ready]), "{:?}", devices(&engine));
    assert_eq!(engine.loss(), None, "the other one is well");
    let num_batches = controls[0].num_batches.load(Ordering::SeqCst);
    for id in 0..10 {
        assert_eq!(engine.infer(ids(id, &[1])).await.unwrap().rows[0][0], id as f32);
    }
    assert_eq!(controls[0].num_batches.load(Ordering::SeqCst), num_batches, "a lost device is not asked again");
    shown("eremois_device_lost{model=\"fake\",device=\"cuda:0\"} 1\n");
    shown("eremois_device_ready{model=\"fake\",device=\"cuda:0\"} 0\n");
    shown("eremois_device_lost{model=\"fake\",device=\"cuda:1\"} 0\n");
    shown("eremois_model_ready{model=\"fake\"} 1\n");

    controls[1].lost.store(true, Ordering::SeqCst);
    let error = engine.infer(ids(1, &[1])).await.unwrap_err();
    assert!(matches!(error, Error::DeviceLost { .. }), "{error:?}");
    tokio::time::timeout(LONG, engine.lost()).await.expect("nobody was told");
    let Error::Unhealthy { reason, .. } = engine.infer(ids(1, &[1])).await.unwrap_err() else { panic!("it is let in") };
    assert!(reason.contains("cuda:0: ") && reason.contains("cuda:1: "), "{reason}");
    shown("eremois_model_ready{model=\"fake\"} 0\n");
    assert_eq!(engine.drain(LONG).await, 0, "every entry has left");
}

#[tokio::test]
async fn an_input_that_loses_devices_loses_two_and_no_third() {
    let (engine, _) = engine_on(3, settings()).await;
    let error = engine.infer(ids(fake::LOSE_ID, &[1])).await.unwrap_err();
    assert!(matches!(error, Error::DeviceLost { .. }), "{error:?}");
    let num_lost = devices(&engine).iter().filter(|health| matches!(health, Health::Unhealthy(_))).count();
    assert_eq!((num_lost, engine.health()[0].1.clone(), engine.loss()), (2, Health::Ready, None));
    assert_eq!(engine.infer(ids(4, &[2])).await.unwrap().rows[0][0], 8.0);
}

#[tokio::test]
async fn a_device_that_only_fails_its_trials_keeps_the_process_from_ending() {
    let (engine, controls) = engine_on(2, settings()).await;
    controls[1].broken.store(true, Ordering::SeqCst);
    controls[0].lost.store(true, Ordering::SeqCst);
    // Both turns, so that each device is asked.
    while devices(&engine).contains(&Health::Ready) {
        let _ = engine.infer(ids(1, &[1])).await;
    }
    assert_eq!(engine.loss(), None, "it may pass again");
    controls[1].broken.store(false, Ordering::SeqCst);
    becomes(&engine, |health| *health == Health::Ready).await;
    assert_eq!(engine.infer(ids(4, &[2])).await.unwrap().rows[0][0], 8.0);
}

#[tokio::test]
async fn one_of_two_that_hangs_takes_along_only_what_was_sent_to_it() {
    let times = Settings { device_timeout: Duration::from_millis(100), ..settings() };
    let engine = Arc::new(Engine::with_settings(None, times));
    let (model, controls) = fake::model_on(&DEVICES[..2], "fake", MAX_SEQ_LEN);
    controls[0].hangs_for_good.store(true, Ordering::SeqCst);
    // The warm-up teaches that the first is the faster one: what hangs goes there.
    *controls[1].per_batch.lock() = Duration::from_millis(40);
    engine.add(model, limits()).unwrap();
    devices_become(&engine, |devices| devices.iter().all(|health| *health == Health::Ready)).await;
    let hung = ask(&engine, ids(fake::HANG_ID, &[1])).await;
    devices_become(&engine, |devices| matches!(devices, [Health::Unhealthy(_), Health::Ready])).await;
    controls[1].hold();
    let elsewhere = ask(&engine, ids(2, &[1])).await;
    assert!(!hung.is_finished(), "nobody has given it up yet");
    assert_eq!(engine.loss(), None, "the other device is left");
    let error = answer(hung).await.unwrap_err();
    assert!(matches!(error, Error::Unhealthy { .. }), "{error:?}");
    // Longer than the handlers take to look again.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!elsewhere.is_finished());
    controls[1].release();
    assert_eq!(answer(elsewhere).await.unwrap().rows[0][0], 2.0);
    // It was slow for longer than the timeout: it is trusted again at the next look.
    devices_become(&engine, |devices| matches!(devices, [Health::Unhealthy(_), Health::Ready])).await;
    assert_eq!(engine.infer(ids(3, &[1])).await.unwrap().rows[0][0], 3.0);
    assert_eq!((engine.health()[0].1.clone(), engine.loss()), (Health::Ready, None));
}

#[tokio::test]
async fn what_one_of_two_has_no_memory_for_lowers_the_models_limit() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let _guard = ::metrics::set_default_local_recorder(&recorder);
    let (engine, controls) = engine_on(2, settings()).await;
    controls[0].memory_tokens.store(40, Ordering::SeqCst);
    // A full batch for each, whichever is the first.
    let output = engine.infer(ids(7, &[4; 128])).await.unwrap();
    assert!(output.rows.len() == 128 && output.rows.iter().all(|row| row[..2] == [28.0, 4.0]), "{:?}", output.rows);
    limit_becomes(&engine, 32).await;
    assert_eq!(devices(&engine), [Health::Ready, Health::Ready]);
    controls.iter().for_each(|c| c.batch_sizes.lock().clear());
    engine.infer(ids(7, &[4; 64])).await.unwrap();
    assert!(controls.iter().all(|c| c.batch_sizes.lock().iter().all(|&num_seqs| num_seqs <= 8)), "of both devices");
    let text = recorder.handle().render();
    for line in [
        "eremois_max_batch_tokens{model=\"fake\"} 32\n",
        "eremois_limits_lowered_total{model=\"fake\"} 1\n",
        "eremois_batch_failures_total{model=\"fake\",device=\"cuda:0\",kind=\"out_of_memory\"} 3\n",
        "eremois_batch_failures_total{model=\"fake\",device=\"cuda:1\",kind=\"out_of_memory\"} 0\n",
    ] {
        assert!(text.contains(line), "no {line} in {text}");
    }
    // New limits need every device's consent, but for a lost one's.
    controls[1].most_tokens.store(512, Ordering::SeqCst);
    let beyond = BatchLimits { max_batch_tokens: 513, ..limits() };
    let error = engine.set_limits("fake", beyond.clone()).unwrap_err().to_string();
    assert!(error.contains("cuda:1") && error.contains("512"), "{error}");
    let asked = hold_with_work(&engine, &controls).await;
    controls[1].lost.store(true, Ordering::SeqCst);
    controls.iter().for_each(|c| c.release());
    all_answered(asked).await;
    devices_become(&engine, |devices| matches!(devices, [Health::Ready, Health::Unhealthy(_)])).await;
    engine.set_limits("fake", beyond.clone()).unwrap();
    assert_eq!(*engine.limits(None).unwrap(), beyond);
}

// ---- the whole process ---------------------------------------------------------------------------------------------

/// Where a child of a test listens. A process with this variable is that child.
const CHILD: &str = "EREMOIS_TEST_CHILD";

/// Serves the fake model on so many devices as the binary serves its own, if this process is a test's child; never returns then.
fn be_the_child(num_devices: usize) {
    let Ok(address) = std::env::var(CHILD) else { return };
    let overrides = ["ai.device_timeout=1s", "api.drain_timeout=2s", "log.format=json", "database.record=none"]
        .map(String::from)
        .to_vec();
    let sources = Sources { overrides, ..Sources::default() };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let served = runtime.block_on(async {
        let loaded = sources.load()?;
        let logs = logs::install(&loaded.settings.log);
        let metrics = metrics::install().unwrap();
        let listener = tokio::net::TcpListener::bind(&address).await.unwrap();
        let models = Models {
            default_model: None,
            load: Box::new(move |engine| {
                let (model, controls) = fake::model_on(&DEVICES[..num_devices], "fake", MAX_SEQ_LEN);
                controls.iter().for_each(|c| c.hangs_for_good.store(true, Ordering::SeqCst));
                engine.add(model, limits())
            }),
            apply: Box::new(|_, _| {}),
            control: Arc::new(Fixed),
        };
        let parts = Parts { sources, loaded, logs, metrics };
        let mut terminate = signal(SignalKind::terminate()).unwrap();
        let terminated = async move { terminate.recv().await.unwrap_or_default() };
        app::run_models(listener, parts, models, terminated).await
    });
    cli::serve::end(served);
    panic!("the server waits for its devices");
}

/// A process that serves; killed when dropped.
struct Served {
    child: Child,
    address: SocketAddr,
}

impl Served {
    /// Starts the test of this name anew as a child that serves, and waits until it is ready.
    fn start(test: &str) -> Self {
        let address = free_address();
        let child = Command::new(std::env::current_exe().expect("a test has a file"))
            .args(["--exact", test, "--nocapture"])
            .env(CHILD, address.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("the test runs again");
        let mut served = Self { child, address };
        wait_for("readiness", || {
            assert_eq!(served.child.try_wait().unwrap(), None, "the child ended");
            served.get("/health/ready").filter(|answer| answer.status == 200)
        });
        served
    }

    fn get(&self, path: &str) -> Option<Answer> {
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        Client::connect(self.address).ok()?.send(request.as_bytes()).ok()
    }

    fn embed(&self, text: &str) -> Answer {
        let mut client = Client::connect(self.address).expect("it listens");
        client.send(&embeddings(&[text.to_string()])).expect("an answer, not a cut")
    }

    fn wait(&mut self) -> ExitStatus {
        wait_for("the end of the child", || self.child.try_wait().unwrap())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Already gone where the test goes well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_lost_device_ends_the_process_with_75() {
    be_the_child(1);
    let mut served = Served::start("a_lost_device_ends_the_process_with_75");
    assert_eq!(served.embed("w1 w2").status, 200);
    let start = Instant::now();
    let failed = served.embed("w1 lose");
    assert_eq!(failed.status, 500, "{failed:?}");
    assert!(failed.body.contains("device_lost") && failed.closes(), "{failed:?}");
    // Until it ends it says so to whoever asks.
    if let Some(ready) = served.get("/health/ready") {
        assert_eq!(ready.status, 503, "{ready:?}");
    }
    assert_eq!(served.wait().code(), Some(75));
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn a_hung_device_ends_the_process_with_75() {
    be_the_child(1);
    let mut served = Served::start("a_hung_device_ends_the_process_with_75");
    let start = Instant::now();
    let refused = served.embed("w1 hang");
    assert_eq!(refused.status, 503, "{refused:?}");
    assert!(refused.body.contains("unhealthy"), "{refused:?}");
    assert_eq!(served.wait().code(), Some(75));
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
}

#[test]
fn a_server_of_several_devices_ends_with_75_when_the_last_is_lost() {
    be_the_child(3);
    let mut served = Served::start("a_server_of_several_devices_ends_with_75_when_the_last_is_lost");
    // Handed over once, so that two are lost.
    assert_eq!(served.embed("w1 lose").status, 500);
    let ready = served.get("/health/ready").expect("it is alive");
    assert_eq!((ready.status, ready.body.matches("unhealthy").count()), (200, 2), "{ready:?}");
    for _ in 0..3 {
        assert_eq!(served.embed("w1 w2").status, 200);
    }
    assert_eq!(served.child.try_wait().unwrap(), None, "one is left");
    assert_eq!(served.embed("w1 lose").status, 500);
    assert_eq!(served.wait().code(), Some(75));
}

#[test]
fn a_server_that_goes_on_without_a_hung_device_ends_with_0_when_it_is_asked_to() {
    be_the_child(2);
    let mut served = Served::start("a_server_that_goes_on_without_a_hung_device_ends_with_0_when_it_is_asked_to");
    assert_eq!(served.embed("w1 hang").status, 503);
    assert_eq!(served.embed("w1 w2").status, 200);
    assert_eq!(served.get("/health/ready").expect("it is alive").status, 200);
    let sent = Command::new("kill").args(["-TERM", &served.child.id().to_string()]).status();
    assert!(sent.expect("kill runs").success());
    assert_eq!(served.wait().code(), Some(0));
}
