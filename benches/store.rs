//! The embedded store: what it takes in, and what a page of a list costs in a large one.
//!
//! `cargo bench --bench store [-- --records 1000000 --dir FOLDER]` prints inserts a second by number of writers, then fills
//! a store with made-up records, counts its numbers, and lists pages of 100 at random depths by every filter and the usual
//! pairs.

#[path = "../tests/store/samples.rs"]
mod samples;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use eremois::store::embedded::Embedded;
use eremois::store::numbers::{Dimension, QualityQuery, UsageQuery};
use eremois::store::query::Query;
use eremois::store::record::{InferenceId, Norms, Record, Status, StoredInput};
use eremois::store::{Inserted, Records};
use jiff::Timestamp;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const MODELS: [&str; 4] = ["all-MiniLM-L6-v2", "bge-small-en-v1.5", "nomic-embed-text-v1.5", "e5-large-v2"];

/// Records of the large store lie this far apart: a million are 30 days.
const STEP_MS: i64 = 2592;

/// When the oldest was made.
const BEGIN_MS: i64 = 1_790_000_000_000;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let value = |name: &str| args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1));
    let is_test = args.iter().any(|arg| arg == "--test");
    let num_records = value("--records").map_or(if is_test { 2000 } else { 1_000_000 }, |num| num.parse().unwrap());
    let span = Duration::from_millis(if is_test { 50 } else { 5000 });
    let num_lists = if is_test { 10 } else { 500 };
    let parent = value("--dir").map_or_else(std::env::temp_dir, Into::into);
    let dir = tempfile::tempdir_in(parent).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        for num_writers in [1, 64, 512] {
            inserts(&dir.path().join(format!("inserts-{num_writers}")), num_writers, span).await;
        }
        let folder = dir.path().join("large");
        let store = fill(&folder, num_records).await;
        numbers(&store, num_records).await;
        lists(&store, num_records, num_lists).await;
        lists_among_writes(&store, num_records, num_lists).await;
    });
}

/// CPU time of this process over all threads: what a record costs also when other work shares the machine.
fn cpu_time() -> Duration {
    const TICK: Duration = Duration::from_millis(10); // USER_HZ is 100 on every Linux
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name in parentheses: utime and stime are fields 14 and 15 of proc_pid_stat(5).
    let ticks = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    TICK * ticks.filter_map(|ticks| ticks.parse::<u32>().ok()).sum()
}

fn quantiles(times: &mut [Duration]) -> (Duration, Duration, Duration) {
    times.sort();
    let at = |quantile: f64| times[((times.len() - 1) as f64 * quantile) as usize];
    (at(0.5), at(0.99), at(1.0))
}

/// Bytes of the files in a folder.
fn size(folder: &Path) -> u64 {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

/// A record as a server makes it: one text of 300 characters, one row of 384 values.
fn usual(rng: &mut StdRng, id: InferenceId) -> Record {
    let mut record = Record { id, ..samples::record() };
    let number = rng.random_range(0..1000);
    // Half of the requests are of the first model; the last one never fails.
    let model_idx = [0, 0, 0, 1, 2, 3][number % 6];
    record.facts.model = MODELS[model_idx].to_string();
    record.facts.input = StoredInput::Full("a text of a usual length that somebody wants embedded ".repeat(6).into());
    record.facts.status = match number {
        0..10 if model_idx != 3 => Status::Failed,
        10 => Status::Cancelled,
        _ => Status::Succeeded,
    };
    // A few users ask most, and many ask little; every fifth request has none.
    let rank = (1.0 / rng.random_range(0.00005f64..1.0)).powf(1.2) as u64;
    record.facts.user = (number % 5 != 0).then(|| format!("user-{}", rank % 20_000));
    record.facts.metadata = BTreeMap::from([
        ("tenant".to_string(), format!("tenant-{}", rng.random_range(0..50))),
        ("env".to_string(), if number % 10 == 0 { "dev" } else { "prod" }.to_string()),
    ]);
    let row: Vec<f32> = (0..384).map(|_| rng.random_range(-0.2f32..0.2)).collect();
    if record.facts.status == Status::Succeeded {
        record.facts.timings.total_us = (5000.0 / rng.random_range(0.05f64..1.0)) as u64;
        record.facts.output_norms = Norms::of(std::slice::from_ref(&row));
        record.output = Some(samples::embeddings(vec![row]));
    } else {
        record.output = None;
    }
    record
}

/// Closed loop: each writer inserts again when its record is on the disk.
async fn inserts(folder: &Path, num_writers: usize, span: Duration) {
    let store = Arc::new(Embedded::open(folder).unwrap());
    let (start, cpu) = (Instant::now(), cpu_time());
    let writers: Vec<_> = (0..num_writers)
        .map(|writer| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut rng = StdRng::seed_from_u64(writer as u64);
                let mut times = Vec::new();
                while start.elapsed() < span {
                    let record = usual(&mut rng, InferenceId::new());
                    let begin = Instant::now();
                    assert_eq!(store.insert(&record).await, Ok(Inserted::New));
                    times.push(begin.elapsed());
                }
                times
            })
        })
        .collect();
    let mut times = Vec::new();
    for writer in writers {
        times.extend(writer.await.unwrap());
    }
    let rate = times.len() as f64 / start.elapsed().as_secs_f64();
    let cpu = (cpu_time() - cpu) / times.len() as u32;
    assert_eq!(store.count().await, Ok(times.len() as u64));
    let (p50, p99, max) = quantiles(&mut times);
    println!(
        "insert: {num_writers:>3} writers: {rate:>6.0} records/s, p50 {p50:>9.1?}, p99 {p99:>9.1?}, max {max:>9.1?}, {cpu:.0?} of CPU each"
    );
}

fn id_at(number: u64) -> InferenceId {
    let at = Timestamp::from_millisecond(BEGIN_MS + number as i64 * STEP_MS).unwrap();
    InferenceId(uuid::Uuid::from_u128(InferenceId::first_at(at).0.as_u128() | u128::from(number)))
}

async fn fill(folder: &Path, num_records: u64) -> Embedded {
    let store = Embedded::open(folder).unwrap();
    let mut rng = StdRng::seed_from_u64(7);
    let (start, cpu) = (Instant::now(), cpu_time());
    let mut number = 0;
    while number < num_records {
        let end = num_records.min(number + 500);
        let records: Vec<Record> = (number..end).map(|number| usual(&mut rng, id_at(number))).collect();
        store.put(&records).await.unwrap();
        number = end;
    }
    assert_eq!(store.count().await, Ok(num_records));
    let rate = num_records as f64 / start.elapsed().as_secs_f64();
    let (cpu, bytes) = ((cpu_time() - cpu) / num_records as u32, size(folder) / num_records);
    println!(
        "fill: {num_records} records by 500 a call: {rate:.0} records/s, {cpu:.0?} of CPU each with their making, {bytes} bytes each"
    );
    store
}

/// Lists to measure: what is asked for, and how.
fn queries() -> Vec<(&'static str, Query)> {
    let model = |idx: usize| Some(MODELS[idx].to_string());
    let user = |rank: u64| Some(format!("user-{rank}"));
    let meta = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    let (env, tenant) = (("env", "prod"), ("tenant", "tenant-7"));
    let failed = Some(Status::Failed);
    let all = Query { limit: 100, ..Query::default() };
    vec![
        ("all", all.clone()),
        ("all, with outputs", Query { with_output: true, ..all.clone() }),
        ("model of half", Query { model: model(0), ..all.clone() }),
        ("model of a sixth", Query { model: model(3), ..all.clone() }),
        ("busy user", Query { user: user(1), ..all.clone() }),
        ("usual user", Query { user: user(30), ..all.clone() }),
        ("status succeeded", Query { status: Some(Status::Succeeded), ..all.clone() }),
        ("status failed", Query { status: failed, ..all.clone() }),
        ("metadata of most", Query { metadata: meta(&[env]), ..all.clone() }),
        ("metadata of a fiftieth", Query { metadata: meta(&[tenant]), ..all.clone() }),
        ("model, user", Query { model: model(3), user: user(1), ..all.clone() }),
        ("model, failed", Query { model: model(0), status: failed, ..all.clone() }),
        ("model, failed: none", Query { model: model(3), status: failed, ..all.clone() }),
        ("user, failed", Query { user: user(1), status: failed, ..all.clone() }),
        ("model, user, failed", Query { model: model(0), user: user(1), status: failed, ..all.clone() }),
        ("model, metadata", Query { model: model(3), metadata: meta(&[tenant]), ..all.clone() }),
        ("model, metadata of most", Query { model: model(3), metadata: meta(&[env]), ..all.clone() }),
        ("user, metadata", Query { user: user(1), metadata: meta(&[tenant]), ..all.clone() }),
        ("usual user, metadata of most", Query { user: user(30), metadata: meta(&[env]), ..all.clone() }),
        ("failed, metadata", Query { status: failed, metadata: meta(&[tenant]), ..all.clone() }),
        ("metadata, metadata", Query { metadata: meta(&[env, tenant]), ..all.clone() }),
    ]
}

async fn lists(store: &Embedded, num_records: u64, num_lists: usize) {
    let mut rng = StdRng::seed_from_u64(11);
    let page = store.list(&queries()[0].1).await.unwrap();
    assert_eq!(page.records.first().map(|record| record.id), Some(id_at(num_records - 1)));
    for (name, query) in queries() {
        for within in [None, Some(num_records / 30)] {
            // Within a thirtieth: a day of the month.
            let label = if within.is_some() { format!("{name}, from, to") } else { name.to_string() };
            measure(store, &label, num_records, num_lists, &query, within, &mut rng).await;
        }
    }
    let mut times = Vec::new();
    for _ in 0..num_lists {
        let id = id_at(rng.random_range(0..num_records));
        let start = Instant::now();
        assert!(store.get(&id).await.unwrap().is_some());
        times.push(start.elapsed());
    }
    let (p50, p99, max) = quantiles(&mut times);
    println!("get: {p50:>9.1?} p50 {p99:>9.1?} p99 {max:>9.1?} max");
}

/// Lists at random depths, and the first page once in ten.
async fn measure(
    store: &Embedded,
    name: &str,
    num_records: u64,
    num_lists: usize,
    query: &Query,
    within: Option<u64>,
    rng: &mut StdRng,
) {
    let mut times = Vec::new();
    let mut num_rows = 0;
    for i in 0..num_lists {
        let number = if i % 10 == 0 { num_records } else { rng.random_range(0..num_records) };
        let mut query = Query { after: Some(id_at(number)), ..query.clone() };
        if let Some(span) = within {
            query.from = Some(id_at(number.saturating_sub(span)).created_at());
            query.to = Some(id_at(number).created_at());
            query.after = None;
        }
        let start = Instant::now();
        let page = store.list(&query).await.unwrap();
        times.push(start.elapsed());
        num_rows += page.records.len();
    }
    let (p50, p99, max) = quantiles(&mut times);
    let rows = num_rows / num_lists;
    println!("list: {name:<40} {p50:>9.1?} p50 {p99:>9.1?} p99 {max:>9.1?} max, {rows:>3} rows a page");
}

/// Numbers over all records, and how long a record by its id takes meanwhile.
async fn numbers(store: &Embedded, num_records: u64) {
    use Dimension::{Day, Model, User};
    let mut rng = StdRng::seed_from_u64(17);
    for by in [&[Model][..], &[Day], &[Model, User, Day]] {
        let query = UsageQuery {
            model: None,
            user: None,
            from: None,
            to: None,
            by: by.to_vec(),
            limit: 10_000,
            timeout: Duration::from_secs(600),
        };
        let start = Instant::now();
        let told = store.usage(&query).await.unwrap();
        let names: Vec<&str> = by.iter().map(|by| by.as_str()).collect();
        let (took, rows) = (start.elapsed(), told.rows.len());
        println!("usage by {:<16} {took:>9.1?}, {rows} rows", names.join(","));
    }
    let timeout = Duration::from_secs(600);
    let query = QualityQuery { model: None, version: None, from: None, to: None, timeout };
    let start = Instant::now();
    let told = store.quality(&query).await.unwrap();
    println!("quality                   {:>9.1?}, {} rows", start.elapsed(), told.rows.len());
    let mut times = Vec::new();
    let many = futures::future::join_all((0..8).map(|_| store.quality(&query)));
    let gets = async {
        for _ in 0..200 {
            let id = id_at(rng.random_range(0..num_records));
            let start = Instant::now();
            assert!(store.get(&id).await.unwrap().is_some());
            times.push(start.elapsed());
        }
    };
    tokio::join!(many, gets);
    let (p50, p99, max) = quantiles(&mut times);
    println!("get, while 8 ask for quality: {p50:>9.1?} p50 {p99:>9.1?} p99 {max:>9.1?} max");
}

/// The plain list while 64 writers insert.
async fn lists_among_writes(store: &Embedded, num_records: u64, num_lists: usize) {
    let mut rng = StdRng::seed_from_u64(13);
    let is_over = std::sync::atomic::AtomicBool::new(false);
    let write = |writer: u64| {
        let is_over = &is_over;
        async move {
            let mut rng = StdRng::seed_from_u64(writer);
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                store.insert(&usual(&mut rng, InferenceId::new())).await.unwrap();
            }
        }
    };
    let read = async {
        let query = &queries()[0].1;
        measure(store, "all, while 64 write", num_records, num_lists, query, None, &mut rng).await;
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
    };
    tokio::join!(read, futures::future::join_all((0..64).map(write)));
}
