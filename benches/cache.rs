//! What the cache costs and saves, around a model that computes nothing: the worst case for its cost.
//!
//! `cargo bench --bench cache` prints two parts: inputs a second through the engine alone, through the cache with
//! misses only, and with hits only, in turns; then criterion's nanoseconds of the pieces. `benches/peers/cache` measures
//! the same over HTTP with the bundled model and with Redis.

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::fake;
use criterion::{Criterion, Throughput};
use eremois::Result;
use eremois::inference::flight::{Flights, Joined};
use eremois::inference::key::Form;
use eremois::inference::{CacheUse, Inferences};
use eremois::model::pack::PackedInput;
use eremois::model::{Backend, InFlight, LoadedModel, ModelInfo, Placed, Rows};
use eremois::request::{Input, Priority, Request, TaskParams};
use eremois::serve::policy::BatchLimits;
use eremois::serve::{Engine, Health};
use eremois::store::cache::{Cache, CacheKey, CachedItem, CachedValue};
use eremois::store::layers::Layers;
use eremois::store::local::LocalCache;

const HIDDEN_SIZE: usize = 384;
const NUM_CLIENTS: usize = 64;
const NUM_ROUNDS: usize = 5;
const TTL: Duration = Duration::from_secs(3600);

/// How long each figure is measured in each round; a moment when cargo only tests that the bench runs.
fn span() -> Duration {
    Duration::from_millis(if std::env::args().any(|arg| arg == "--test") { 30 } else { 1000 })
}

/// Answers a row of one value repeated: the number of tokens.
struct NoOp;

struct Done(Rows);

impl Backend for NoOp {
    fn launch(&self, batch: PackedInput) -> Result<Box<dyn InFlight>> {
        let mut rows = Rows { values: Vec::new(), offsets: vec![0], device_times: None };
        for bounds in batch.cu_seqlens.windows(2) {
            rows.values.resize(rows.values.len() + HIDDEN_SIZE, (bounds[1] - bounds[0]) as f32);
            rows.offsets.push(rows.values.len());
        }
        Ok(Box::new(Done(rows)))
    }
}

impl InFlight for Done {
    fn finish(self: Box<Self>) -> Result<Rows> {
        Ok(self.0)
    }
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let engine = engine().await;
        let cache: Arc<dyn Cache> = Arc::new(Layers::new(LocalCache::new(256 << 20), None));
        let plain = Arc::new(Inferences::new(engine.clone(), None));
        let cached = Arc::new(Inferences::new(engine.clone(), Some((cache, TTL))));
        let next = Arc::new(AtomicU64::new(0));
        let unique = move || next.fetch_add(1, Ordering::Relaxed);
        let few = Arc::new(AtomicU64::new(0));
        let repeated = move || u64::MAX - few.fetch_add(1, Ordering::Relaxed) % 500;
        let mut rates: [Vec<f64>; 3] = Default::default();
        for _ in 0..NUM_ROUNDS {
            rates[0].push(throughput(&plain, unique.clone()).await);
            rates[1].push(throughput(&cached, unique.clone()).await);
            rates[2].push(throughput(&cached, repeated.clone()).await);
        }
        let median = |rates: &[f64]| {
            let mut rates = rates.to_vec();
            rates.sort_by(f64::total_cmp);
            rates[rates.len() / 2]
        };
        let ratio =
            |i: usize| median(&rates[i].iter().zip(&rates[0]).map(|(rate, plain)| rate / plain).collect::<Vec<_>>());
        for (i, name) in ["no cache", "misses", "hits"].into_iter().enumerate() {
            println!("whole: {name:>8}: {:>9.0} inputs/s, {:.2} of that without a cache", median(&rates[i]), ratio(i));
        }
    });
    let mut criterion = Criterion::default().configure_from_args();
    pieces(&mut criterion, &runtime);
    criterion.final_summary();
}

async fn engine() -> Arc<Engine> {
    let engine = Arc::new(Engine::new(None));
    let (fake, _) = fake::model("no-op", 256);
    let info =
        Arc::new(ModelInfo { hidden_size: HIDDEN_SIZE, dimensions: HIDDEN_SIZE, ..ModelInfo::clone(&fake.info) });
    let backends = vec![Placed { device: "cpu".to_string(), backend: Arc::new(NoOp) }];
    let limits = BatchLimits {
        max_batch_size: 64,
        max_batch_tokens: 16384,
        max_queue_delay: Duration::ZERO,
        max_queue_size: 4096,
    };
    engine.add(LoadedModel { info, backends, ..fake }, limits).unwrap();
    while engine.health()[0].1 != Health::Ready {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    engine
}

/// A text of sixteen tokens, another one for every number.
fn text(number: u64) -> Input {
    let words: Vec<String> = (0..16).map(|i| format!("w{}", (number >> (4 * i)) & 15)).collect();
    Input::Text(words.join(" "))
}

fn request(number: u64) -> Request {
    let deadline = Instant::now() + Duration::from_secs(30);
    Request {
        model: None,
        inputs: vec![text(number)],
        params: TaskParams::default(),
        deadline,
        priority: Priority::Interactive,
    }
}

/// Inputs a second, closed loop: each client asks again when it is answered.
async fn throughput(inferences: &Arc<Inferences>, number: impl Fn() -> u64 + Clone + Send + 'static) -> f64 {
    let (stop, num_done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let clients: Vec<_> = (0..NUM_CLIENTS)
        .map(|_| {
            let (inferences, stop, num_done, number) =
                (inferences.clone(), stop.clone(), num_done.clone(), number.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let computed = inferences.infer(request(number()), CacheUse::Full).await.unwrap();
                    assert!(computed.rows[0][HIDDEN_SIZE - 1] == 16.0);
                    num_done.fetch_add(1, Ordering::Relaxed);
                    // Hits never wait: without this one client would keep its thread to itself.
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    tokio::time::sleep(span() / 6).await;
    let (start, before) = (Instant::now(), num_done.load(Ordering::Relaxed));
    tokio::time::sleep(span()).await;
    let rate = (num_done.load(Ordering::Relaxed) - before) as f64 / start.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    rate
}

fn pieces(criterion: &mut Criterion, runtime: &tokio::runtime::Runtime) {
    let info = fake::model("no-op", 256).0.info;
    let params = TaskParams::default();
    let form = Form::of(&info, &params).expect("the defaults are good");
    let key = |n: u64| CacheKey(*blake3::hash(&n.to_le_bytes()).as_bytes());
    let item = CachedItem { value: CachedValue::Row(vec![0.5; HIDDEN_SIZE].into()), num_tokens: 16 };

    let mut group = criterion.benchmark_group("cache");
    group.bench_function("form", |b| b.iter(|| Form::of(black_box(&info), black_box(&params))));
    for len in [64, 1024] {
        let input = Input::Text("x".repeat(len));
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(format!("key/{len}_bytes"), |b| b.iter(|| form.key(black_box(&input))));
    }
    group.throughput(Throughput::Elements(1));
    let local = LocalCache::new(256 << 20);
    (0..1000).for_each(|n| local.put(key(n), item.clone(), TTL));
    let keys: Vec<CacheKey> = (0..1000).map(key).collect();
    let mut turn = 0;
    group.bench_function("local_hit", |b| {
        b.iter(|| {
            turn = (turn + 1) % keys.len();
            local.peek(black_box(&keys[turn])).expect("it is there")
        });
    });
    let mut n = 1 << 40;
    group.bench_function("local_put", |b| {
        b.iter(|| {
            n += 1;
            local.put(CacheKey([n as u8; 32]), item.clone(), TTL);
        });
    });
    let flights = Flights::default();
    group.bench_function("flight_alone", |b| {
        b.iter(|| match flights.join(keys[0]) {
            Joined::Lead(lead) => lead.complete(&item),
            Joined::Wait(_) => unreachable!("nobody else flies"),
        });
    });
    let cache: Arc<dyn Cache> = Arc::new(Layers::new(LocalCache::new(256 << 20), None));
    let cached = runtime.block_on(async {
        let cached = Inferences::new(engine().await, Some((cache, TTL)));
        cached.infer(request(1), CacheUse::Full).await.unwrap();
        cached
    });
    group.bench_function("whole_hit", |b| {
        b.iter(|| futures::executor::block_on(cached.infer(request(1), CacheUse::Full)).unwrap());
    });
    group.finish();
}
