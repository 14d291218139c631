//! Computing through the cache, over a model that counts what reaches it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use eremois::Error;
use eremois::inference::{CacheUse, Computed};
use eremois::request::{Input, Priority, Request, TaskParams};
use eremois::store::cache::{Cache, CacheKey, CachedItem};
use eremois::store::layers::Layers;
use eremois::store::local::LocalCache;

use crate::common::http::{self, LONG, Server};

pub const TTL: Duration = Duration::from_secs(600);

/// A server with a cache in memory.
pub async fn server() -> Server {
    let cache: Arc<dyn Cache> = Arc::new(Layers::new(LocalCache::new(16 << 20), None));
    http::server_with(http::settings(), http::limits(), Some((cache, TTL))).await
}

/// Inputs that have reached the model.
pub fn num_computed(server: &Server) -> usize {
    server.controls.batch_sizes.lock().iter().sum()
}

fn request(texts: &[&str], time: Duration) -> Request {
    let inputs = texts.iter().map(|text| Input::Text(text.to_string())).collect();
    Request {
        model: None,
        inputs,
        params: TaskParams::default(),
        deadline: Instant::now() + time,
        priority: Priority::Interactive,
    }
}

async fn embed(server: &Server, texts: &[&str]) -> Computed {
    server.inferences.infer(request(texts, LONG), CacheUse::Full).await.expect("all of it is good")
}

fn bits(computed: &Computed) -> Vec<Vec<u32>> {
    computed.rows.iter().map(|row| row.iter().map(|value| value.to_bits()).collect()).collect()
}

/// Starts a request on a task of its own and waits until the model works on it.
async fn in_flight(
    server: &Server,
    texts: &[&str],
    time: Duration,
) -> tokio::task::JoinHandle<eremois::Result<Computed>> {
    let before = num_computed(server);
    let (inferences, request) = (server.inferences.clone(), request(texts, time));
    let task = tokio::spawn(async move { inferences.infer(request, CacheUse::Full).await });
    while num_computed(server) == before {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    task
}

#[tokio::test]
async fn a_hit_has_the_bits_and_the_usage_of_its_miss() {
    let server = server().await;
    let before = num_computed(&server);
    let miss = embed(&server, &["w1 w2", "w3"]).await;
    assert_eq!((num_computed(&server) - before, miss.num_cached), (2, Some(0)));
    let hit = embed(&server, &["w1 w2", "w3"]).await;
    assert_eq!((num_computed(&server) - before, hit.num_cached), (2, Some(2)));
    assert_eq!(bits(&hit), bits(&miss));
    assert_eq!(hit.usage, miss.usage);
    assert_eq!((miss.usage.num_tokens, miss.usage.num_chars), (3, 7));
    assert!(hit.phases.inference.is_zero() && !miss.phases.inference.is_zero());
}

#[tokio::test]
async fn only_what_is_missing_is_computed_and_the_order_stays() {
    let server = server().await;
    embed(&server, &["w2", "w4"]).await;
    let before = num_computed(&server);
    let some = embed(&server, &["w1", "w2", "w3", "w4", "w5"]).await;
    assert_eq!((num_computed(&server) - before, some.num_cached), (3, Some(2)));
    let firsts: Vec<f32> = some.rows.iter().map(|row| row[0]).collect();
    assert_eq!(firsts, [1.0, 2.0, 3.0, 4.0, 5.0]);
    assert_eq!(some.usage.num_tokens, 5);
}

#[tokio::test]
async fn repetitions_in_a_request_are_computed_once() {
    let server = server().await;
    let before = num_computed(&server);
    let texts = ["w7", "w8", "w7", "w7", "w8"];
    let some = embed(&server, &texts).await;
    assert_eq!((num_computed(&server) - before, some.num_cached), (2, Some(3)));
    assert_eq!(some.usage.num_tokens, 5, "usage is that of all of them");
    assert_eq!(some.rows.iter().map(|row| row[0]).collect::<Vec<_>>(), [7.0, 8.0, 7.0, 7.0, 8.0]);
}

#[tokio::test]
async fn equal_inputs_in_flight_are_computed_once() {
    let server = server().await;
    *server.controls.per_batch.lock() = Duration::from_millis(100);
    let before = num_computed(&server);
    let crowd = (0..20).map(|i| {
        let inferences = server.inferences.clone();
        let own = format!("w{}", 100 + i);
        tokio::spawn(async move { inferences.infer(request(&["w1", &own, "w2"], LONG), CacheUse::Full).await })
    });
    for answer in crowd.collect::<Vec<_>>() {
        let rows = answer.await.unwrap().expect("all of it is good").rows;
        assert_eq!((rows[0][0], rows[2][0]), (1.0, 2.0));
    }
    assert_eq!(num_computed(&server) - before, 22);
}

#[tokio::test]
async fn nobody_waits_for_a_background_request_nor_it_for_others() {
    let server = server().await;
    let background = |texts: &[&str]| {
        let request = Request { priority: Priority::Background, ..request(texts, LONG) };
        let inferences = server.inferences.clone();
        tokio::spawn(async move { inferences.infer(request, CacheUse::Full).await })
    };
    let before = num_computed(&server);
    let twice = background(&["w1", "w2", "w1"]).await.unwrap().unwrap();
    assert_eq!((num_computed(&server) - before, twice.num_cached), (2, Some(1)), "repetitions are computed once");
    assert_eq!(embed(&server, &["w1", "w2"]).await.num_cached, Some(2), "and all of it is kept");
    let hit = background(&["w2", "w3"]).await.unwrap().unwrap();
    assert_eq!((num_computed(&server) - before, hit.num_cached), (3, Some(1)));

    // The same input in flight for both, whoever came first: each computes it.
    *server.controls.per_batch.lock() = Duration::from_millis(50);
    for (text, is_first) in [("w11", true), ("w12", false)] {
        let before = num_computed(&server);
        let both = match is_first {
            true => [background(&[text]), in_flight(&server, &[text], LONG).await],
            false => [in_flight(&server, &[text], LONG).await, background(&[text])],
        };
        for task in both {
            assert_eq!(task.await.unwrap().unwrap().num_cached, Some(0));
        }
        assert_eq!(num_computed(&server) - before, 2);
        assert_eq!(embed(&server, &[text]).await.num_cached, Some(1));
    }
}

/// A cache that has nothing at hand: what it has is in another place.
struct Remote(LocalCache);

#[async_trait]
impl Cache for Remote {
    fn peek(&self, _: &CacheKey) -> Option<CachedItem> {
        None
    }

    async fn get(&self, keys: &[CacheKey]) -> Vec<Option<CachedItem>> {
        keys.iter().map(|key| self.0.get(key)).collect()
    }

    async fn put(&self, items: &[(CacheKey, CachedItem)], ttl: Duration) {
        items.iter().for_each(|(key, item)| self.0.put(*key, item.clone(), ttl));
    }

    async fn remove(&self, _: &[CacheKey]) -> bool {
        false
    }

    fn upkeep(&self) {}
}

#[tokio::test]
async fn a_background_request_finds_what_is_in_another_place() {
    let cache: Arc<dyn Cache> = Arc::new(Remote(LocalCache::new(16 << 20)));
    let server = http::server_with(http::settings(), http::limits(), Some((cache, TTL))).await;
    embed(&server, &["w1", "w2"]).await;
    let before = num_computed(&server);
    let background = Request { priority: Priority::Background, ..request(&["w2", "w3", "w1"], LONG) };
    let computed = server.inferences.infer(background, CacheUse::Full).await.expect("all of it is good");
    assert_eq!((num_computed(&server) - before, computed.num_cached), (1, Some(2)));
    assert_eq!(computed.rows.iter().map(|row| row[0]).collect::<Vec<_>>(), [2.0, 3.0, 1.0]);
}

#[tokio::test]
async fn who_waits_tries_itself_when_the_other_client_goes() {
    let server = server().await;
    *server.controls.per_batch.lock() = Duration::from_millis(100);
    let first = in_flight(&server, &["w1"], LONG).await;
    let second = {
        let inferences = server.inferences.clone();
        tokio::spawn(async move { inferences.infer(request(&["w1"], LONG), CacheUse::Full).await })
    };
    tokio::time::sleep(Duration::from_millis(20)).await;
    first.abort();
    assert_eq!(second.await.unwrap().expect("it computes itself").rows[0][0], 1.0);
}

#[tokio::test]
async fn everybody_keeps_the_own_deadline() {
    let server = server().await;
    *server.controls.per_batch.lock() = Duration::from_millis(300);
    // Who waits is not held by the longer deadline of the one who computes,
    let slow = in_flight(&server, &["w1"], LONG).await;
    let short = Duration::from_millis(50);
    let hasty = server.inferences.infer(request(&["w1"], short), CacheUse::Full).await;
    assert!(matches!(hasty, Err(Error::Deadline { timeout }) if timeout <= short), "{hasty:?}");
    assert!(!slow.is_finished(), "nor does it take the result away");
    slow.await.unwrap().expect("the other one is not disturbed");
    // nor lost with the shorter one.
    let hasty = in_flight(&server, &["w2"], short).await;
    let patient = server.inferences.infer(request(&["w2"], LONG), CacheUse::Full).await;
    assert_eq!(patient.expect("it computes itself").rows[0][0], 2.0);
    assert!(matches!(hasty.await.unwrap(), Err(Error::Deadline { .. })));
}

#[tokio::test]
async fn a_failure_is_not_passed_on_and_not_kept() {
    let server = server().await;
    *server.controls.per_batch.lock() = Duration::from_millis(50);
    let before = num_computed(&server);
    let first = in_flight(&server, &["fail"], LONG).await;
    let second = server.inferences.infer(request(&["fail"], LONG), CacheUse::Full).await;
    assert!(matches!(second, Err(Error::Forward { .. })), "{second:?}");
    assert!(matches!(first.await.unwrap(), Err(Error::Forward { .. })));
    let third = server.inferences.infer(request(&["fail"], LONG), CacheUse::Full).await;
    assert!(matches!(third, Err(Error::Forward { .. })));
    assert!(num_computed(&server) - before >= 3, "each has tried");
}

#[tokio::test]
async fn a_bad_input_is_named_by_its_place_in_the_request() {
    let server = server().await;
    embed(&server, &["w1", "w2"]).await;
    let long = "w1 ".repeat(65);
    for (texts, place) in [
        (vec!["w1", "w2", ""], "input[2]"),
        (vec!["w1", "w5", "w2", "", "w6"], "input[3]"),
        (vec!["", "", ""], "input[0]"),
        (vec![""], "input"),
        (vec!["w1", "w1", "w9", &long], "input[3]"),
    ] {
        match server.inferences.infer(request(&texts, LONG), CacheUse::Full).await {
            Err(Error::Empty { field } | Error::TooLarge { field, .. }) => assert_eq!(field, place, "{texts:?}"),
            other => panic!("{texts:?}: {other:?}"),
        }
    }
    let none = server.inferences.infer(request(&[], LONG), CacheUse::Full).await;
    assert_eq!(none.err(), Some(Error::Empty { field: "input".into() }));
}

#[tokio::test]
async fn parameters_that_change_a_result_are_other_results() {
    let server = server().await;
    embed(&server, &["w1"]).await;
    let before = num_computed(&server);
    let with = |params| Request { params, ..request(&["w1"], LONG) };
    for params in [
        TaskParams { dimensions: Some(3), ..TaskParams::default() },
        TaskParams { prompt_name: Some("query".into()), ..TaskParams::default() },
    ] {
        let computed = server.inferences.infer(with(params), CacheUse::Full).await.unwrap();
        assert_eq!(computed.num_cached, Some(0));
    }
    assert_eq!(num_computed(&server) - before, 2);
    let ids = Request { inputs: vec![Input::TokenIds(vec![1])], ..request(&[], LONG) };
    assert_eq!(server.inferences.infer(ids, CacheUse::Full).await.unwrap().num_cached, Some(0));
    let bad = with(TaskParams { dimensions: Some(0), ..TaskParams::default() });
    assert!(matches!(server.inferences.infer(bad, CacheUse::Full).await, Err(Error::Invalid { .. })));
}

#[tokio::test]
async fn a_request_may_do_without_and_may_refresh() {
    let server = server().await;
    let before = num_computed(&server);
    let with = |cache_use| server.inferences.infer(request(&["w1"], LONG), cache_use);
    assert_eq!(with(CacheUse::Bypass).await.unwrap().num_cached, None);
    assert_eq!(with(CacheUse::Full).await.unwrap().num_cached, Some(0), "the one before left nothing");
    assert_eq!(with(CacheUse::Refresh).await.unwrap().num_cached, Some(0));
    assert_eq!(with(CacheUse::Bypass).await.unwrap().num_cached, None);
    assert_eq!(num_computed(&server) - before, 4);
    assert_eq!(with(CacheUse::Full).await.unwrap().num_cached, Some(1));
    let refreshed = server.inferences.infer(request(&["w2"], LONG), CacheUse::Refresh).await.unwrap();
    assert_eq!(refreshed.num_cached, Some(0));
    assert_eq!(embed(&server, &["w2"]).await.num_cached, Some(1), "what is computed anew is kept");
}

#[tokio::test]
async fn results_of_an_erased_user_are_forgotten() {
    let server = server().await;
    embed(&server, &["w1", "w2"]).await;
    let inputs = [Input::Text("w1".into())];
    let keys = server.inferences.keys("fake", "1", &TaskParams::default(), &inputs).expect("it is served");
    assert!(server.inferences.forget(&keys).await);
    assert_eq!(embed(&server, &["w2"]).await.num_cached, Some(1));
    assert_eq!(embed(&server, &["w1"]).await.num_cached, Some(0));
    assert_eq!(server.inferences.keys("fake", "2", &TaskParams::default(), &inputs), None);
    assert_eq!(server.inferences.keys("gone", "1", &TaskParams::default(), &inputs), None);
}

#[tokio::test]
async fn a_draining_server_answers_from_no_cache() {
    let server = server().await;
    embed(&server, &["w1"]).await;
    server.engine.drain(LONG).await;
    let refused = server.inferences.infer(request(&["w1"], LONG), CacheUse::Full).await;
    assert_eq!(refused.err(), Some(Error::Draining));
}

#[tokio::test]
async fn long_requests_are_hashed_elsewhere_and_come_out_the_same() {
    let server = server().await;
    // Words that the model's tokenizer does not know are one token each: bytes without tokens.
    let texts: Vec<String> = (0..20).map(|i| format!("{}{i}", "x".repeat(20 << 10))).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let miss = embed(&server, &texts).await;
    let hit = embed(&server, &texts).await;
    assert_eq!((miss.num_cached, hit.num_cached), (Some(0), Some(20)));
    assert_eq!((bits(&miss), miss.usage), (bits(&hit), hit.usage));
}
