//! The scheduler alone: queue, policy, batch and reply around a model that computes nothing.
//!
//! `cargo bench --bench queue` prints two parts: whole-engine figures measured here (tickets a second, latency
//! of an idle server, and beside background work), then criterion's nanoseconds a ticket of the pieces.

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::fake;
use criterion::{BatchSize, Criterion, Throughput};
use eremois::Result;
use eremois::model::encode::Encoding;
use eremois::model::pack::{PackedInput, RowSpec};
use eremois::model::{Backend, InFlight, LoadedModel, Placed, Rows};
use eremois::request::{Input, Priority, Request, TaskParams};
use eremois::serve::backlog::Backlog;
use eremois::serve::batch::Batch;
use eremois::serve::cost::CostModel;
use eremois::serve::policy::{BatchLimits, Waiting, decide};
use eremois::serve::queue::{Gate, Push};
use eremois::serve::room::Room;
use eremois::serve::ticket::{Answer, Client, Ticket};
use eremois::serve::{Engine, Health};

const SEQ_LEN: usize = 16;

/// How long each whole-engine figure is measured; a moment when cargo only tests that the bench runs.
fn span() -> Duration {
    Duration::from_millis(if std::env::args().any(|arg| arg == "--test") { 30 } else { 3000 })
}

fn limits() -> BatchLimits {
    BatchLimits { max_batch_size: 64, max_batch_tokens: 16384, max_queue_delay: Duration::ZERO, max_queue_size: 16384 }
}

/// Answers one value a sequence: its number of tokens.
struct NoOp;

struct Done(Rows);

impl Backend for NoOp {
    fn launch(&self, batch: PackedInput) -> Result<Box<dyn InFlight>> {
        let values = batch.cu_seqlens.windows(2).map(|w| (w[1] - w[0]) as f32).collect();
        Ok(Box::new(Done(Rows { values, offsets: (0..=batch.num_seqs()).collect(), device_times: None })))
    }
}

impl InFlight for Done {
    fn finish(self: Box<Self>) -> Result<Rows> {
        Ok(self.0)
    }
}

/// As [`NoOp`], in a time that is known.
struct Timed {
    per_batch: Duration,
    per_token: Duration,
}

impl Backend for Timed {
    fn launch(&self, batch: PackedInput) -> Result<Box<dyn InFlight>> {
        std::thread::sleep(self.per_batch + self.per_token * batch.total_tokens() as u32);
        NoOp.launch(batch)
    }
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let engine = engine(Arc::new(NoOp)).await;
        for num_clients in [64, 1024] {
            throughput(&engine, num_clients, 1).await;
        }
        throughput(&engine, 64, 32).await;
        latency(&engine, "token ids", || Input::TokenIds(vec![1; SEQ_LEN])).await;
        latency(&engine, "text", || Input::Text(["w1"; SEQ_LEN].join(" "))).await;
        let micros = Duration::from_micros;
        beside_background("2 ms a batch, 1 us a token", Timed { per_batch: micros(2000), per_token: micros(1) }).await;
        beside_background("0.5 ms a batch, 50 us a token", Timed { per_batch: micros(500), per_token: micros(50) })
            .await;
    });
    let mut criterion = Criterion::default().configure_from_args();
    pieces(&mut criterion);
    criterion.final_summary();
}

async fn engine(backend: Arc<dyn Backend>) -> Arc<Engine> {
    let engine = Arc::new(Engine::new(None));
    let backends = vec![Placed { device: "cpu".to_string(), backend }];
    let model = LoadedModel { backends, ..fake::model("no-op", 256).0 };
    engine.add(model, limits()).unwrap();
    while engine.health()[0].1 != Health::Ready {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    engine
}

fn request(inputs: Vec<Input>) -> Request {
    Request {
        model: None,
        inputs,
        params: TaskParams::default(),
        deadline: Instant::now() + Duration::from_secs(30),
        priority: Priority::Interactive,
    }
}

/// Tickets a second, closed loop: each client asks again when it is answered.
async fn throughput(engine: &Arc<Engine>, num_clients: usize, num_inputs: usize) {
    let stop = Arc::new(AtomicBool::new(false));
    let num_tickets = Arc::new(AtomicU64::new(0));
    let clients: Vec<_> = (0..num_clients)
        .map(|_| {
            let (engine, stop, num_tickets) = (engine.clone(), stop.clone(), num_tickets.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let output =
                        engine.infer(request(vec![Input::TokenIds(vec![1; SEQ_LEN]); num_inputs])).await.unwrap();
                    assert!(
                        output.rows.len() == num_inputs && output.rows.iter().all(|row| row[..] == [SEQ_LEN as f32])
                    );
                    num_tickets.fetch_add(num_inputs as u64, Ordering::Relaxed);
                }
            })
        })
        .collect();
    tokio::time::sleep(span() / 6).await; // caches and allocator warm
    let (start, cpu, before) = (Instant::now(), cpu_time(), num_tickets.load(Ordering::Relaxed));
    tokio::time::sleep(span()).await;
    let num_done = num_tickets.load(Ordering::Relaxed) - before;
    let rate = num_done as f64 / start.elapsed().as_secs_f64();
    let per_ticket = (cpu_time() - cpu).as_nanos() as f64 / num_done as f64;
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    println!(
        "engine: {num_clients:>4} clients × {num_inputs:>2} inputs: {rate:>9.0} tickets/s, {per_ticket:>5.0} ns of CPU a ticket"
    );
}

/// CPU time of this process over all threads, clients included: what a ticket costs also when other work
/// shares the machine. Zero where there is no `/proc`.
fn cpu_time() -> Duration {
    const TICK: Duration = Duration::from_millis(10); // USER_HZ is 100 on every Linux
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name in parentheses: utime and stime are fields 14 and 15 of proc_pid_stat(5).
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<u32>().ok()).unwrap_or(0);
    TICK * (ticks(11) + ticks(12))
}

/// Handler to device and back, one request at a time.
async fn latency(engine: &Arc<Engine>, name: &str, input: impl Fn() -> Input + Send + 'static) {
    let times = latencies(engine, input).await;
    println!("engine: idle latency, one {name}: {}", quantiles(&times));
}

/// What a backlog of background work costs interactive requests that come one at a time to a device that takes its time:
/// at most the rest of a short batch each. The backlog is kept up by clients of lists.
async fn beside_background(name: &str, device: Timed) {
    const NUM_CLIENTS: usize = 16;
    let engine = engine(Arc::new(device)).await;
    let alone = latencies(&engine, || Input::TokenIds(vec![1; SEQ_LEN])).await;
    let stop = Arc::new(AtomicBool::new(false));
    let num_done = Arc::new(AtomicU64::new(0));
    let clients: Vec<_> = (0..NUM_CLIENTS)
        .map(|_| {
            let (engine, stop, num_done) = (engine.clone(), stop.clone(), num_done.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let list = request(vec![Input::TokenIds(vec![1; SEQ_LEN]); 64]);
                    let output = engine.infer(Request { priority: Priority::Background, ..list }).await.unwrap();
                    num_done.fetch_add(output.rows.len() as u64, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let start = Instant::now();
    let beside = latencies(&engine, || Input::TokenIds(vec![1; SEQ_LEN])).await;
    let rate = num_done.load(Ordering::Relaxed) as f64 / start.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    println!("engine: {name}: alone {}", quantiles(&alone));
    println!("engine: {name}: beside {rate:.0} background tickets/s {}", quantiles(&beside));
}

/// Times of requests, sorted.
async fn latencies(engine: &Arc<Engine>, input: impl Fn() -> Input + Send + 'static) -> Vec<Duration> {
    let engine = engine.clone();
    // On a runtime thread, as a handler is: `block_on`'s own thread is woken another way.
    let measured = tokio::spawn(async move {
        let mut times = Vec::new();
        let end = Instant::now() + span();
        while Instant::now() < end {
            // Spaced, so that every thread has gone to sleep: the idle server's case.
            tokio::time::sleep(Duration::from_millis(1)).await;
            let request = request(vec![input()]);
            let start = Instant::now();
            let output = engine.infer(request).await.unwrap();
            times.push(start.elapsed());
            assert_eq!(output.rows, [[SEQ_LEN as f32]]);
        }
        times
    });
    let mut times = measured.await.unwrap();
    times.sort();
    times
}

fn quantiles(times: &[Duration]) -> String {
    let at = |quantile: f64| times[((times.len() - 1) as f64 * quantile) as usize];
    format!("p50 {:?}, p99 {:?} of {}", at(0.5), at(0.99), times.len())
}

/// The handler's end of a request: while it is kept, the client waits.
type Handler = tokio::sync::oneshot::Receiver<Result<Answer>>;

fn push(gate: &Arc<Gate>, room: &Arc<Room>, num_inputs: usize) -> (Push, Handler) {
    let now = Instant::now();
    let accepted = gate.enter(num_inputs).unwrap();
    let (client, answer) = Client::new(num_inputs, now, now + Duration::from_secs(30), Priority::Interactive, accepted);
    let ticket = |input_idx| Ticket {
        encoding: Encoding { input_ids: vec![1; SEQ_LEN], ..Encoding::default() },
        row: RowSpec { normalize: true, dimensions: 1 }.into(),
        input_idx,
        pushed: now,
        was_handed_over: false,
        client: client.clone(),
    };
    let tickets = (0..num_inputs).map(ticket).collect();
    (Push { tickets, client, places: room.reserve(Priority::Interactive, num_inputs, usize::MAX).unwrap() }, answer)
}

fn pieces(criterion: &mut Criterion) {
    const NUM_TICKETS: usize = 1024;
    let (gate, room, cost, limits) = (Arc::default(), Arc::default(), CostModel::default(), limits());
    let now = Instant::now();

    let mut group = criterion.benchmark_group("queue");
    group.bench_function("decide", |b| {
        let waiting = Waiting { num_entries: 3, num_tokens: 48, oldest: Some(now), num_background: 0 };
        b.iter(|| decide(black_box(&waiting), black_box(&limits), now));
    });
    group.throughput(Throughput::Elements(NUM_TICKETS as u64));
    for num_inputs in [1, 32] {
        let pushes =
            || (0..NUM_TICKETS / num_inputs).map(|_| push(&gate, &room, num_inputs)).unzip::<_, _, Vec<_>, Vec<_>>();
        group.bench_function(format!("push_take_pack/{num_inputs}_inputs"), |b| {
            b.iter_batched(
                pushes,
                |(pushes, handlers)| {
                    let mut backlog = Backlog::new(256);
                    pushes.into_iter().for_each(|p| backlog.push(p));
                    let mut num_taken = 0;
                    let mut batches = Vec::new();
                    while !backlog.is_empty() {
                        let tickets = backlog.take(Priority::Interactive, &limits, &cost, now).tickets;
                        num_taken += tickets.len();
                        let batch = Batch { tickets };
                        batches.push((batch.pack(), batch));
                    }
                    assert_eq!(num_taken, NUM_TICKETS);
                    (batches, handlers)
                },
                BatchSize::LargeInput,
            );
        });
        group.bench_function(format!("reply/{num_inputs}_inputs"), |b| {
            b.iter_batched(
                || {
                    let (pushes, handlers) = pushes();
                    let tickets = pushes.into_iter().flat_map(|p| p.tickets).collect();
                    let rows = Rows {
                        values: vec![1.0; NUM_TICKETS],
                        offsets: (0..=NUM_TICKETS).collect(),
                        device_times: None,
                    };
                    (Batch { tickets }, rows, handlers)
                },
                |(batch, rows, handlers)| {
                    batch.reply(&rows, now, now);
                    handlers
                },
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
}
