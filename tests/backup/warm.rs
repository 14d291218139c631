//! The cache filled from recorded history: what is found afterwards has the bits that were answered.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use eremois::inference::warm::{History, Range, Sink, Warmed, warm};
use eremois::inference::{CacheUse, Computed};
use eremois::request::{Input, Priority, Request, TaskParams, Truncation, TruncationDirection};
use eremois::store::Records;
use eremois::store::cache::{Cache, CacheKey, CachedItem};
use eremois::store::layers::Layers;
use eremois::store::local::LocalCache;
use eremois::store::memory::Memory;
use eremois::store::query::{Page, Query};
use eremois::store::record::{Record, Status, StoredInput, StoredOutput};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::{eremois, folder, succeeds};
use crate::common::http::{self, LONG};
use crate::common::process::{Client, Server, wait_for};
use crate::common::servers::redis::Redis;

const TTL: Duration = Duration::from_secs(600);
const ALL: Range = Range { limit: usize::MAX, from: None };

/// A server of the fake model with a cache in memory, and all its requests recorded.
async fn server() -> http::Server {
    let cache: Arc<dyn Cache> = Arc::new(Layers::new(LocalCache::new(16 << 20), None));
    http::server_with(http::settings(), http::limits(), Some((cache, TTL))).await
}

async fn ask(server: &http::Server, body: Value) -> Value {
    let answer = server.post("/api/v1/inferences", body).await;
    assert_eq!(answer.status.as_u16(), 200, "{}", answer.text());
    answer.json()
}

async fn embed(server: &http::Server, inputs: Vec<Input>, params: TaskParams) -> Computed {
    let deadline = std::time::Instant::now() + LONG;
    let request = Request { model: None, inputs, params, priority: Priority::default(), deadline };
    server.inferences.infer(request, CacheUse::Full).await.expect("all of it is good")
}

async fn fill(server: &http::Server, store: &Memory) -> Warmed {
    warm(&server.inferences.known(), store, server.inferences.as_ref(), ALL, &|_| {}).await.expect("it can be filled")
}

fn texts(texts: &[&str]) -> Vec<Input> {
    texts.iter().map(|text| Input::Text(text.to_string())).collect()
}

#[tokio::test]
async fn what_was_recorded_is_found_by_another_server() {
    let (first, second) = (server().await, server().await);
    let long = "w3 ".repeat(80);
    let bodies = [
        json!({"input": ["w1 w2", "w5"]}),
        json!({"input": "w7", "parameters": {"dimensions": 4}}),
        json!({"input": "w9", "parameters": {"prompt_name": "query"}}),
        json!({"input": ["w1 w2", long], "parameters": {"truncate": "left"}}),
        json!({"input": [[4, 5, 6]]}),
    ];
    for body in &bodies {
        ask(&first, body.clone()).await;
    }
    let warmed = fill(&second, &first.store).await;
    assert_eq!(warmed, Warmed { num_records: 5, num_items: 7, ..Warmed::default() });
    let before = second.controls.num_seqs();
    let cut = Truncation::Cut(TruncationDirection::Left);
    for (inputs, params) in [
        (texts(&["w5", "w1 w2"]), TaskParams::default()),
        (texts(&["w7"]), TaskParams { dimensions: Some(4), ..TaskParams::default() }),
        (texts(&["w9"]), TaskParams { prompt_name: Some("query".into()), ..TaskParams::default() }),
        (texts(&["w1 w2", &long]), TaskParams { truncation: cut, ..TaskParams::default() }),
        (vec![Input::TokenIds(vec![4, 5, 6])], TaskParams::default()),
    ] {
        let found = embed(&second, inputs.clone(), params.clone()).await;
        assert_eq!(found.num_cached, Some(inputs.len()), "{inputs:?}");
        let computed = embed(&first, inputs, params).await;
        let bits = |of: &Computed| -> Vec<Vec<u32>> {
            of.rows.iter().map(|row| row.iter().map(|v| v.to_bits()).collect()).collect()
        };
        assert_eq!(bits(&found), bits(&computed));
        assert_eq!(found.usage, computed.usage, "with the tokens of each input");
    }
    assert_eq!(second.controls.num_seqs(), before, "nothing was computed");
}

#[tokio::test]
async fn nothing_is_made_of_records_that_may_be_another_result() {
    let (first, second) = (server().await, server().await);
    ask(&first, json!({"input": "w1"})).await;
    let good = first.store.records().remove(0);
    let with = |change: &dyn Fn(&mut Record)| {
        let mut record = good.clone();
        change(&mut record);
        record
    };
    let all = [
        (with(&|r| r.facts.fingerprint = Some("another".into())), "of another"),
        (with(&|r| r.facts.fingerprint = None), "of another"),
        (with(&|r| r.facts.version = "2".into()), "of another"),
        (with(&|r| r.facts.model = "gone".into()), "of another"),
        (with(&|r| r.facts.input = StoredInput::Hash("h".into())), "without"),
        (with(&|r| r.facts.input = StoredInput::None), "without"),
        (with(&|r| r.output = Some(StoredOutput::Json(json!(1)))), "without"),
        (with(&|r| r.facts.usage.num_tokens += 1), "unlike"),
        (with(&|r| r.facts.input = StoredInput::Full(json!(["w1", "w1"]))), "unlike"),
        (with(&|r| r.facts.input = StoredInput::Full(json!(["w1", 7]))), "unlike"),
        (with(&|r| r.facts.parameters = json!({"dimensions": 3})), "unlike"),
        (with(&|r| r.facts.parameters = json!({"dimensions": 999})), "unlike"),
        (with(&|r| r.facts.task = "rank".into()), "unlike"),
        (with(&|r| r.facts.status = Status::Failed), "not read"),
    ];
    for (record, why) in all {
        let store = Memory::default();
        store.put(std::slice::from_ref(&record)).await.unwrap();
        let warmed = fill(&second, &store).await;
        let nothing = Warmed { num_records: u64::from(why != "not read"), ..Warmed::default() };
        let expected = match why {
            "of another" => Warmed { num_of_others: 1, ..nothing },
            "without" => Warmed { num_without_input: 1, ..nothing },
            "unlike" => Warmed { num_unlike: 1, ..nothing },
            _ => nothing,
        };
        assert_eq!(warmed, expected, "{record:?}");
    }
    assert_eq!(embed(&second, texts(&["w1"]), TaskParams::default()).await.num_cached, Some(0));
}

#[tokio::test]
async fn the_newest_are_read_and_no_more_than_asked_for() {
    let (first, second) = (server().await, server().await);
    for n in 0..250 {
        ask(&first, json!({"input": format!("w{n}")})).await;
    }
    let range = Range { limit: 120, from: None };
    let known = second.inferences.known();
    let warmed = warm(&known, first.store.as_ref(), second.inferences.as_ref(), range, &|_| {}).await.unwrap();
    assert_eq!((warmed.num_records, warmed.num_items), (120, 120));
    assert_eq!(embed(&second, texts(&["w249", "w130"]), TaskParams::default()).await.num_cached, Some(2));
    assert_eq!(embed(&second, texts(&["w129"]), TaskParams::default()).await.num_cached, Some(0));
    let from = first.store.records()[200].id.created_at() + jiff::SignedDuration::from_millis(1);
    let range = Range { limit: usize::MAX, from: Some(from) };
    let warmed = warm(&known, first.store.as_ref(), second.inferences.as_ref(), range, &|_| {}).await.unwrap();
    assert!(warmed.num_records < 50, "{warmed:?}");
}

/// A store whose records go between their being read and looked for again.
struct Erasing<'a>(&'a Memory, &'a str);

#[async_trait]
impl History for Erasing<'_> {
    async fn page(&self, query: &Query) -> eremois::Result<Page> {
        let page = self.0.list(query).await;
        self.0.erase_user(self.1, 1000).await?;
        page
    }
}

/// What was put and not removed.
#[derive(Default)]
struct Kept(Mutex<Vec<CacheKey>>);

#[async_trait]
impl Sink for Kept {
    async fn put(&self, items: &[(CacheKey, CachedItem)]) -> eremois::Result<()> {
        self.0.lock().extend(items.iter().map(|(key, _)| *key));
        Ok(())
    }

    async fn remove(&self, keys: &[CacheKey]) {
        self.0.lock().retain(|key| !keys.contains(key));
    }
}

#[tokio::test]
async fn who_is_erased_meanwhile_leaves_nothing() {
    let server = server().await;
    for n in 0..150 {
        let user = if n % 2 == 0 { "gone" } else { "here" };
        ask(&server, json!({"input": format!("w{n}"), "user": user})).await;
    }
    let kept = Kept::default();
    let history = Erasing(&server.store, "gone");
    warm(&server.inferences.known(), &history, &kept, ALL, &|_| {}).await.unwrap();
    let key = |n: usize| {
        let inputs = texts(&[&format!("w{n}")]);
        server.inferences.keys("fake", "1", &TaskParams::default(), &inputs).expect("it is served")[0]
    };
    let keys = kept.0.lock().clone();
    assert_eq!(keys.len(), 75);
    assert!((0..150).all(|n| keys.contains(&key(n)) == (n % 2 == 1)));
}

const SMALL: &str = "[ai]\nmax_batch_tokens = 256\n";

/// An answer of the real server in base64, so that bits can be compared, and whether it came from the cache.
fn real(server: &Server, inputs: &[&str]) -> (Value, String) {
    let body = json!({"input": inputs, "encoding_format": "base64"}).to_string();
    let head = "POST /v1/embeddings HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n";
    let request = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
    let answer = Client::connect(server.address).unwrap().send(request.as_bytes()).expect("answered");
    assert_eq!(answer.status, 200, "{answer:?}");
    let cache = answer.head.lines().find_map(|line| line.to_lowercase().strip_prefix("x-cache: ").map(str::to_string));
    (serde_json::from_str(&answer.body).unwrap(), cache.unwrap_or_default())
}

#[test]
fn a_flushed_redis_is_filled_beside_the_server() {
    let Some(redis) = Redis::start() else { return };
    let (data, other) = (folder(), folder());
    let cache = format!("[cache]\nurl = \"{}\"\ntimeout = \"500ms\"\n", redis.url());
    let settings = |path: &std::path::Path| format!("[database]\npath = {path:?}\nrecord = \"all\"\n{SMALL}{cache}");
    let first = Server::ready(&settings(data.path()));
    let inputs = ["The cat sits outside", "A man plays the guitar", "The cat sits outside"];
    let (answered, _) = real(&first, &inputs);
    wait_for("both results in Redis", || (redis.ask::<usize>(&["DBSIZE"]) == 2).then_some(()));
    redis.ask::<()>(&["FLUSHALL"]);
    let models = format!("ai.models_dir={}", crate::common::process::bundled_models().display());
    let url = format!("cache.url={}", redis.url());
    let told = succeeds(data.path(), &[&models, &url], &["cache", "warm"]);
    assert_eq!(told.number_before(" results of 1 records are in Redis"), 3, "{}", told.stdout);
    assert_eq!(redis.ask::<usize>(&["DBSIZE"]), 2);

    let second = Server::ready(&settings(other.path()));
    let (found, how) = real(&second, &inputs);
    assert_eq!((how.as_str(), &found["data"], &found["usage"]), ("hit", &answered["data"], &answered["usage"]));

    let recent = succeeds(data.path(), &[&models, &url], &["cache", "warm", "--last", "1h", "--limit", "5"]);
    assert_eq!(recent.number_before(" results of 1 records are in Redis"), 3);
    redis.daemon.kill();
    let away = eremois(data.path(), &[&models, &url], &["cache", "warm"]);
    assert!(away.code == 1 && away.stderr.contains("Redis did not answer"), "{}", away.stderr);
}

#[test]
fn only_a_cache_that_is_shared_is_filled_by_command() {
    let data = folder();
    let memory = eremois(data.path(), &[], &["cache", "warm"]);
    assert!(memory.code == 1 && memory.stderr.contains("cache.warm"), "{}", memory.stderr);
    let off = eremois(data.path(), &["cache.url=redis://127.0.0.1:1", "cache.ttl=0s"], &["cache", "warm"]);
    assert!(off.code == 1 && off.stderr.contains("cache.ttl"), "{}", off.stderr);
}

#[test]
fn a_server_fills_its_own_cache_at_its_start() {
    let data = folder();
    let settings = |warm: usize| {
        format!("[database]\npath = {:?}\nrecord = \"all\"\n{SMALL}[cache]\nwarm = {warm}\n", data.path())
    };
    let inputs = ["The cat sits outside", "A man plays the guitar"];
    let mut server = Server::ready(&settings(0));
    let (answered, how) = real(&server, &inputs);
    assert_eq!(how, "miss");
    server.signal("TERM");
    assert!(server.wait().success());

    let server = Server::ready(&settings(1000));
    server.stderr.wait_for(&["the cache is filled from recorded history", "num_items: 2"]);
    let (found, how) = real(&server, &inputs);
    assert_eq!((how.as_str(), &found["data"], &found["usage"]), ("hit", &answered["data"], &answered["usage"]));
    assert_eq!(real(&server, &["Another text"]).1, "miss");
}
