//! Background requests use the room that interactive ones leave, and nobody waits for them.

use super::*;

/// Ids from here on are of background requests.
const BACKGROUND_IDS: u32 = 500;

/// First ids of the sequences of each batch, in order.
type Batches = Arc<Mutex<Vec<Vec<u32>>>>;

/// Notes what is launched, as soon as it is.
struct Noting {
    inner: Arc<dyn Backend>,
    batches: Batches,
}

impl Backend for Noting {
    fn launch(&self, batch: PackedInput) -> Result<Box<dyn InFlight>> {
        let starts = &batch.cu_seqlens[..batch.num_seqs()];
        self.batches.lock().push(starts.iter().map(|&start| batch.input_ids[start as usize]).collect());
        self.inner.launch(batch)
    }
}

/// An engine whose batches are noted. A batch takes `per_batch`, and `per_token` for each token, from the warm-up on, so
/// that its cost is known.
async fn noting(
    limits: BatchLimits,
    per_batch: Duration,
    per_token: Duration,
) -> (Arc<Engine>, Arc<Controls>, Batches) {
    let engine = Arc::new(Engine::with_settings(None, settings()));
    let (mut model, controls) = fake::model("fake", MAX_SEQ_LEN);
    *controls.per_batch.lock() = per_batch;
    *controls.per_token.lock() = per_token;
    let batches = Batches::default();
    fake::wrap(&mut model, |inner| Noting { inner, batches: batches.clone() });
    engine.add(model, limits).unwrap();
    wait_for(&engine, |health| *health == Health::Ready).await;
    batches.lock().clear();
    (engine, controls, batches)
}

fn background(inputs: &[u32]) -> Request {
    Request { priority: Priority::Background, ..ids(inputs) }
}

/// Puts a request onto the device, which stands still from then on.
async fn hold_with(
    engine: &Arc<Engine>,
    controls: &Controls,
    batches: &Batches,
    request: Request,
) -> JoinHandle<Result<Output>> {
    let before = batches.lock().len();
    controls.hold();
    let asked = ask(engine, request).await;
    let end = Instant::now() + LONG;
    while batches.lock().len() == before {
        assert!(Instant::now() < end, "nothing was launched");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    asked
}

async fn all(asked: Vec<JoinHandle<Result<Output>>>) -> Vec<Output> {
    let mut outputs = Vec::new();
    for asked in asked {
        outputs.push(answer(asked).await.unwrap());
    }
    outputs
}

/// Batches in which interactive entries are launched that wait for a device that is busy with one.
async fn interactive_batches(with_background: bool) -> Vec<Vec<u32>> {
    let roomy = BatchLimits { max_queue_size: 1000, ..limits() };
    let (engine, controls, batches) = noting(roomy, Duration::ZERO, Duration::ZERO).await;
    let mut asked = vec![hold_with(&engine, &controls, &batches, ids(&[0])).await];
    let requests: [&[u32]; 6] = [&[1], &[2; 12], &[3], &[4, 4, 4], &[5; 20], &[6]];
    for (i, request) in requests.into_iter().enumerate() {
        if with_background {
            asked.push(ask(&engine, background(&[BACKGROUND_IDS + i as u32; 5])).await);
        }
        asked.push(ask(&engine, ids(request)).await);
    }
    controls.release();
    all(asked).await;
    let batches = batches.lock();
    let is_interactive = |id: &u32| *id < BACKGROUND_IDS;
    let num_interactive = batches.iter().rposition(|batch| batch.iter().any(is_interactive)).unwrap() + 1;
    assert!(batches[..num_interactive].iter().all(|batch| is_interactive(&batch[0])), "{batches:?}");
    assert_eq!(batches.iter().flatten().filter(|id| !is_interactive(id)).count(), if with_background { 30 } else { 0 });
    batches[..num_interactive].iter().map(|batch| batch.iter().copied().filter(is_interactive).collect()).collect()
}

#[tokio::test]
async fn interactive_batches_are_the_same_with_and_without_a_background_backlog() {
    let without = interactive_batches(false).await;
    assert_eq!(without.iter().map(Vec::len).collect::<Vec<_>>(), [1, 8, 8, 8, 8, 6]);
    assert_eq!(interactive_batches(true).await, without);
}

#[tokio::test]
async fn an_interactive_request_goes_before_all_the_background_work_that_waits() {
    let (engine, controls, batches) = noting(limits(), Duration::ZERO, Duration::ZERO).await;
    let mut asked = vec![hold_with(&engine, &controls, &batches, background(&[BACKGROUND_IDS; 40])).await];
    asked.push(ask(&engine, ids(&[1])).await);
    controls.release();
    all(asked).await;
    let batches = batches.lock();
    assert_eq!(batches[1][0], 1, "{batches:?}");
    assert_eq!(batches.iter().map(Vec::len).sum::<usize>(), 41);
}

#[tokio::test]
async fn background_entries_ride_along_where_that_costs_nothing() {
    // As on a large device: a batch takes its time whatever is in it.
    let (engine, controls, batches) = noting(limits(), Duration::from_millis(20), Duration::ZERO).await;
    let mut asked = vec![hold_with(&engine, &controls, &batches, ids(&[0])).await];
    asked.push(ask(&engine, background(&[BACKGROUND_IDS; 7])).await);
    asked.push(ask(&engine, ids(&[1, 1, 1])).await);
    controls.release();
    all(asked).await;
    let ours = BACKGROUND_IDS;
    assert_eq!(batches.lock()[1..], [vec![1, 1, 1, ours, ours, ours, ours, ours], vec![ours, ours]]);
}

#[tokio::test]
async fn background_work_alone_takes_the_device_for_a_short_time() {
    // As on a slow one: a batch takes a millisecond a token. The limits would allow all of it in one.
    let wide = BatchLimits { max_batch_size: 256, ..limits() };
    let (engine, _, batches) = noting(wide, Duration::ZERO, Duration::from_millis(1)).await;
    let output = engine.infer(background(&[BACKGROUND_IDS; 90])).await.unwrap();
    assert_eq!(output.rows.len(), 90);
    // About ten of them in 10 ms; more where this machine is slow to wake.
    assert!(batches.lock().iter().all(|batch| batch.len() <= 45), "{:?}", batches.lock());
}

#[tokio::test]
async fn background_work_alone_waits_for_no_company() {
    let delayed = BatchLimits { max_queue_delay: LONG * 10, ..limits() };
    let (engine, _, _) = noting(delayed, Duration::ZERO, Duration::ZERO).await;
    let output = answer(ask(&engine, background(&[BACKGROUND_IDS, 7])).await).await.unwrap();
    assert_eq!(output.rows.iter().map(|row| row[0]).collect::<Vec<_>>(), [BACKGROUND_IDS as f32, 7.0]);
    let text = Request { priority: Priority::Background, ..request(&["w1 w2"]) };
    assert_eq!(engine.infer(text).await.unwrap().rows[0][0], 3.0);
}

#[tokio::test]
async fn background_work_never_fills_the_queue_for_others() {
    let small = BatchLimits { max_queue_size: 10, ..limits() };
    let (engine, controls, batches) = noting(small, Duration::ZERO, Duration::ZERO).await;
    let mut asked = vec![hold_with(&engine, &controls, &batches, background(&[BACKGROUND_IDS])).await];
    for _ in 0..5 {
        asked.push(ask(&engine, background(&[BACKGROUND_IDS])).await);
    }
    let refused = engine.infer(background(&[BACKGROUND_IDS])).await.unwrap_err();
    assert!(matches!(refused, Error::QueueFull { limit: 5, .. }), "{refused:?}");
    for id in 0..10 {
        asked.push(ask(&engine, ids(&[id])).await);
    }
    assert!(asked.iter().all(|asked| !asked.is_finished()), "nobody was refused");
    let refused = engine.infer(ids(&[11])).await.unwrap_err();
    assert!(matches!(refused, Error::QueueFull { limit: 10, .. }), "{refused:?}");
    let refused = engine.infer(background(&[BACKGROUND_IDS; 11])).await.unwrap_err();
    assert!(matches!(refused, Error::TooLarge { limit: 10, .. }), "{refused:?}");
    controls.release();
    all(asked).await;
    let long = engine.infer(background(&[BACKGROUND_IDS; 10])).await.expect("a long one goes into an empty queue");
    assert_eq!(long.rows.len(), 10);
}

#[tokio::test]
async fn the_deadline_of_a_background_request_applies_while_others_fill_the_batches() {
    let (engine, controls, batches) = noting(limits(), Duration::ZERO, Duration::ZERO).await;
    let mut asked = vec![hold_with(&engine, &controls, &batches, ids(&[0])).await];
    let timeout = Duration::from_millis(40);
    let late = ask(&engine, Request { deadline: Instant::now() + timeout, ..background(&[BACKGROUND_IDS]) }).await;
    asked.push(ask(&engine, ids(&[1; 20])).await);
    assert!(matches!(answer(late).await.unwrap_err(), Error::Deadline { timeout: told } if told <= timeout));
    controls.release();
    all(asked).await;
    assert!(batches.lock().iter().flatten().all(|&id| id < BACKGROUND_IDS), "{:?}", batches.lock());
    assert_eq!(engine.drain(LONG).await, 0);
}

#[tokio::test]
async fn a_drain_finishes_or_answers_both_classes() {
    for deadline in [LONG, Duration::from_millis(20)] {
        let (engine, controls, batches) = noting(limits(), Duration::ZERO, Duration::ZERO).await;
        let first = hold_with(&engine, &controls, &batches, ids(&[0])).await;
        let mut asked = Vec::new();
        for id in 1..20 {
            asked.push(ask(&engine, ids(&[id])).await);
            asked.push(ask(&engine, background(&[BACKGROUND_IDS + id])).await);
        }
        let drain = tokio::spawn({
            let engine = engine.clone();
            async move { engine.drain(deadline).await }
        });
        tokio::task::yield_now().await;
        assert_eq!(engine.infer(background(&[BACKGROUND_IDS])).await.unwrap_err(), Error::Draining);
        if deadline < LONG {
            assert_eq!(drain.await.unwrap(), 39);
            controls.release();
            answer(first).await.expect("it was on the device");
            for asked in asked {
                assert_eq!(answer(asked).await.unwrap_err(), Error::Draining);
            }
        } else {
            controls.release();
            asked.push(first);
            all(asked).await;
            assert_eq!(drain.await.unwrap(), 0);
        }
    }
}

#[tokio::test]
async fn a_bad_input_in_the_background_fails_no_interactive_neighbour() {
    for bad in [fake::PANIC_ID, fake::FAIL_ID] {
        let (engine, controls, batches) = noting(limits(), Duration::from_millis(20), Duration::ZERO).await;
        let mut asked = vec![hold_with(&engine, &controls, &batches, ids(&[0])).await];
        let bad = ask(&engine, background(&[bad])).await;
        let neighbour = ask(&engine, background(&[BACKGROUND_IDS])).await;
        for id in 1..4 {
            asked.push(ask(&engine, ids(&[id])).await);
        }
        controls.release();
        for (id, output) in all(asked).await.into_iter().enumerate() {
            assert_eq!(output.rows[0][0], id as f32);
        }
        assert!(matches!(answer(bad).await.unwrap_err(), Error::Forward { .. }));
        assert_eq!(answer(neighbour).await.unwrap().rows[0][0], BACKGROUND_IDS as f32);
    }
}

/// Series are made when the model is added, with the recorder of this thread.
#[tokio::test]
async fn each_class_is_counted_for_itself() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let small = BatchLimits { max_queue_size: 10, ..limits() };
    let (engine, controls, batches) = noting(small, Duration::ZERO, Duration::ZERO).await;
    let value = |name: &str, labels: &str| {
        let text = recorder.handle().render();
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}{{model=\"fake\",{labels}}} ")));
        line.unwrap_or_else(|| panic!("no {name} {labels} in\n{text}")).parse::<f64>().unwrap()
    };
    let both = |name: &str, before: &str, after: &str| {
        ["interactive", "background"].map(|class| value(name, &format!("{before}class=\"{class}\"{after}")))
    };
    let mut asked = vec![hold_with(&engine, &controls, &batches, ids(&[0])).await];
    asked.push(ask(&engine, background(&[BACKGROUND_IDS; 6])).await);
    asked.push(ask(&engine, ids(&[1, 2])).await);
    assert!(engine.infer(background(&[BACKGROUND_IDS])).await.is_err());
    assert_eq!(both("eremois_queue_depth", "", ""), [2.0, 6.0]);
    assert_eq!(both("eremois_refused_total", "", ",reason=\"full\""), [0.0, 1.0]);
    controls.release();
    all(asked).await;
    // A batch is counted after it was answered.
    let end = Instant::now() + LONG;
    while both("eremois_inputs_total", "device=\"cpu\",", "") != [3.0, 6.0] {
        assert!(Instant::now() < end, "{}", recorder.handle().render());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(both("eremois_queue_depth", "", ""), [0.0, 0.0]);
    assert_eq!(both("eremois_requests_total", "", ",outcome=\"ok\""), [2.0, 1.0]);
    assert_eq!(both("eremois_requests_total", "", ",outcome=\"refused\""), [0.0, 1.0]);
    assert_eq!(both("eremois_queue_wait_seconds_count", "device=\"cpu\",", ""), [3.0, 6.0]);
}
