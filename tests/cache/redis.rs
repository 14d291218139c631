//! The level that processes share, against real servers: alone, behind sentinels, as a cluster; killed, halted, replaced.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use eremois::store::cache::{Cache, CacheKey, CachedItem, CachedValue, SharedLevel};
use eremois::store::layers::Layers;
use eremois::store::local::LocalCache;
use eremois::store::redis::RedisCache;
use serde_json::json;

use crate::common::http::{self, LONG};
use crate::common::process;
use crate::common::servers::certificates::Certificates;
use crate::common::servers::redis::{Cluster, MASTER_NAME, PASSWORD, Redis, Sentinel, USER};

const TTL: Duration = Duration::from_secs(600);
/// Long enough for a machine on which all tests run at once.
const PATIENT: Duration = Duration::from_millis(500);

fn level(url: &str, timeout: Duration) -> RedisCache {
    RedisCache::start(url.parse().unwrap_or_else(|why| panic!("{why}")), timeout, TTL).expect("its files are there")
}

async fn wait_for(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !is_so().await {
        assert!(start.elapsed() < LONG, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn connected(url: &str, timeout: Duration) -> RedisCache {
    let level = level(url, timeout);
    wait_for("a connection", async || level.is_up()).await;
    level
}

fn key(n: u32) -> CacheKey {
    CacheKey(*blake3::hash(&n.to_le_bytes()).as_bytes())
}

/// Values of which f16 holds none, so that they are kept in full.
fn item(n: u32) -> CachedItem {
    let row: Vec<f32> = (0..384).map(|i| (n as f32 + 0.1) / (i as f32 + 3.0)).collect();
    CachedItem { value: CachedValue::Row(row.into()), num_tokens: n }
}

fn bits(item: &CachedItem) -> Vec<u32> {
    match &item.value {
        CachedValue::Row(row) => row.iter().map(|value| value.to_bits()).collect(),
        CachedValue::Json(json) => panic!("a row was put in: {json:?}"),
    }
}

/// Puts items and waits until all of them are found.
async fn put_and_find(level: &RedisCache, numbers: std::ops::Range<u32>) {
    let items: Vec<(CacheKey, CachedItem)> = numbers.clone().map(|n| (key(n), item(n))).collect();
    let keys: Vec<CacheKey> = items.iter().map(|(key, _)| *key).collect();
    wait_for("what was put to be found", async || {
        level.put(&items, TTL);
        tokio::time::sleep(Duration::from_millis(20)).await;
        let found = level.get(&keys).await;
        let all = found.iter().zip(numbers.clone()).all(|(found, n)| match found {
            Some((found, left)) => {
                assert_eq!((bits(found), found.num_tokens), (bits(&item(n)), n));
                *left <= TTL && *left > TTL / 2
            }
            None => false,
        });
        found.len() == keys.len() && all
    })
    .await;
}

/// The name of the one key there is.
fn only_key(redis: &Redis) -> String {
    let keys: Vec<String> = redis.ask(&["KEYS", "*"]);
    assert_eq!(keys.len(), 1, "{keys:?}");
    keys[0].clone()
}

#[tokio::test]
async fn what_one_process_writes_another_reads_bit_for_bit() {
    let Some(redis) = Redis::start() else { return };
    let (writer, reader) = (connected(&redis.url(), PATIENT).await, connected(&redis.url(), PATIENT).await);
    put_and_find(&writer, 1..301).await;
    let keys: Vec<CacheKey> = [7, 1000, 8].map(key).to_vec();
    let found = reader.get(&keys).await;
    assert_eq!(bits(&found[0].as_ref().expect("there").0), bits(&item(7)));
    assert!(found[1].is_none());
    assert_eq!(found[2].as_ref().expect("there").0.num_tokens, 8);
    // Writes of earlier rounds may be on their way still.
    wait_for("an empty Redis", async || {
        redis.ask::<()>(&["FLUSHALL"]);
        tokio::time::sleep(Duration::from_millis(100)).await;
        redis.ask::<Vec<String>>(&["KEYS", "*"]).is_empty()
    })
    .await;
    put_and_find(&writer, 1..2).await;
    let name = only_key(&redis);
    assert!(name.starts_with("eremois:r1:"), "{name}");
    let left: u64 = redis.ask(&["PTTL", &name]);
    assert!((1..=TTL.as_millis() as u64).contains(&left), "{left}");
    assert_eq!(redis.ask::<usize>(&["STRLEN", &name]), 18 + 4 * 384);
}

#[tokio::test]
async fn rows_of_half_precision_take_half_the_room_and_lose_nothing() {
    let Some(redis) = Redis::start() else { return };
    let level = connected(&redis.url(), PATIENT).await;
    let row: Vec<f32> = (0..384).map(|i| half::f16::from_f32(1.0 / (i as f32 + 1.0)).to_f32()).collect();
    let item = CachedItem { value: CachedValue::Row(row.into()), num_tokens: 9 };
    level.put(&[(key(1), item.clone())], TTL);
    wait_for("the item", async || level.get(&[key(1)]).await[0].is_some()).await;
    assert_eq!(level.get(&[key(1)]).await[0].as_ref().map(|(item, _)| bits(item)), Some(bits(&item)));
    assert_eq!(redis.ask::<usize>(&["STRLEN", &only_key(&redis)]), 18 + 2 * 384);
}

#[tokio::test]
async fn a_value_that_is_not_ours_is_a_miss() {
    let Some(redis) = Redis::start() else { return };
    let level = connected(&redis.url(), PATIENT).await;
    put_and_find(&level, 1..2).await;
    let name = only_key(&redis);
    for value in ["", "garbage", "\u{1}\u{0}0123456789abcdefghijklmnop"] {
        redis.ask::<()>(&["SET", &name, value]);
        assert!(level.get(&[key(1)]).await[0].is_none(), "{value:?}");
    }
    redis.ask::<()>(&["DEL", &name]);
    redis.ask::<()>(&["LPUSH", &name, "a list"]);
    assert!(level.get(&[key(1)]).await[0].is_none());
    assert!(level.is_up(), "what is kept there says nothing against the server");
    put_and_find(&level, 1..2).await;
}

#[tokio::test]
async fn items_expire_and_are_removed() {
    let Some(redis) = Redis::start() else { return };
    let level = connected(&redis.url(), PATIENT).await;
    level.put(&[(key(1), item(1))], Duration::from_millis(300));
    put_and_find(&level, 2..4).await;
    wait_for("the end of an item", async || level.get(&[key(1)]).await[0].is_none()).await;
    // What is put just before is removed as well.
    level.put(&[(key(4), item(4))], TTL);
    assert!(level.remove(&[key(2), key(4), key(5)]).await);
    let found: Vec<bool> = level.get(&[key(2), key(3), key(4)]).await.iter().map(Option::is_some).collect();
    assert_eq!(found, [false, true, false]);
    redis.daemon.kill();
    assert!(!level.remove(&[key(3)]).await, "nobody can know");
}

#[tokio::test]
async fn a_user_logs_in_and_a_wrong_password_is_only_a_miss() {
    let Some(redis) = Redis::with_user() else { return };
    let port = redis.daemon.port;
    let password = PASSWORD.replace('@', "%40").replace('/', "%2F");
    let right = connected(&format!("redis://{USER}:{password}@127.0.0.1:{port}"), PATIENT).await;
    put_and_find(&right, 1..10).await;
    for url in [format!("redis://{USER}:wrong@127.0.0.1:{port}"), format!("redis://127.0.0.1:{port}")] {
        let wrong = level(&url, PATIENT);
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!wrong.is_up(), "{url}");
        wrong.put(&[(key(1), item(1))], TTL);
        assert!(wrong.get(&[key(1), key(2)]).await.iter().all(Option::is_none));
    }
}

#[tokio::test]
async fn over_tls_only_a_known_authority_is_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let certificates = Certificates::make(dir.path());
    let Some(redis) = Redis::with_tls(&certificates) else { return };
    let url = format!("rediss://127.0.0.1:{}", redis.daemon.port);
    let trusting = connected(&format!("{url}?ca={}", certificates.authority.display()), PATIENT).await;
    put_and_find(&trusting, 1..10).await;
    let stranger = level(&url, PATIENT);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!stranger.is_up());
    let gone = RedisCache::start(format!("{url}?ca=/nowhere.pem").parse().unwrap(), PATIENT, TTL);
    assert!(gone.is_err_and(|e| e.to_string().contains("/nowhere.pem")));
}

/// Asks and puts all the time until it is told to end. Every call comes back, and soon: that is what is tested.
async fn under_load(level: &Arc<RedisCache>, trouble: impl Future<Output = ()>) -> Duration {
    let (ends, num_calls) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..16u32)
        .map(|client| {
            let (level, ends, num_calls) = (level.clone(), ends.clone(), num_calls.clone());
            tokio::spawn(async move {
                let mut slowest = Duration::ZERO;
                for n in 0.. {
                    if ends.load(Ordering::Relaxed) {
                        break;
                    }
                    let start = Instant::now();
                    let n = client * 1_000_000 + n % 50;
                    assert_eq!(level.get(&[key(n), key(n + 1)]).await.len(), 2);
                    level.put(&[(key(n), item(n))], TTL);
                    slowest = slowest.max(start.elapsed());
                    num_calls.fetch_add(1, Ordering::Relaxed);
                    // While Redis is away a call takes no time at all: others must run too.
                    tokio::time::sleep(Duration::from_micros(500)).await;
                }
                slowest
            })
        })
        .collect();
    trouble.await;
    ends.store(true, Ordering::Relaxed);
    let mut slowest = Duration::ZERO;
    for client in clients {
        slowest = slowest.max(client.await.expect("no call fails"));
    }
    println!("{} calls, the slowest took {slowest:?}", num_calls.load(Ordering::Relaxed));
    slowest
}

/// Far more than any call may take, far less than one that hangs until Redis is back.
const BOUND: Duration = Duration::from_millis(1500);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_under_load_it_costs_no_answer_and_comes_back() {
    let Some(redis) = Redis::start() else { return };
    let level = Arc::new(connected(&redis.url(), Duration::from_millis(50)).await);
    let slowest = under_load(&level, async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        redis.daemon.kill();
        wait_for("the loss to be seen", async || !level.is_up()).await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        redis.start_again();
        wait_for("the connection", async || level.is_up()).await;
    })
    .await;
    assert!(slowest < BOUND, "{slowest:?}");
    put_and_find(&level, 1..10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn halted_under_load_it_is_passed_over_until_it_answers() {
    let Some(redis) = Redis::start() else { return };
    let level = Arc::new(connected(&redis.url(), Duration::from_millis(50)).await);
    let slowest = under_load(&level, async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        redis.daemon.pause();
        wait_for("the breaker to open", async || !level.is_up()).await;
        for _ in 0..20 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert!(!level.is_up(), "its port takes connections, and still nothing answers");
        }
        redis.daemon.resume();
        wait_for("the connection", async || level.is_up()).await;
    })
    .await;
    assert!(slowest < BOUND, "{slowest:?}");
    put_and_find(&level, 1..10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinels_name_another_master_when_theirs_is_killed() {
    let Some(redis) = Sentinel::start() else { return };
    let sentinels: Vec<String> = redis.sentinels.iter().map(|s| format!("127.0.0.1:{}", s.port)).collect();
    let url = format!("redis+sentinel://{}/{MASTER_NAME}", sentinels.join(","));
    let level = Arc::new(connected(&url, Duration::from_millis(50)).await);
    put_and_find(&level, 1..50).await;
    let old = redis.master().daemon.port;
    let slowest = under_load(&level, async {
        redis.master().daemon.kill();
        wait_for("the loss to be seen", async || !level.is_up()).await;
        wait_for("the new master", async || level.is_up()).await;
    })
    .await;
    assert!(slowest < BOUND, "{slowest:?}");
    assert_ne!(redis.master().daemon.port, old);
    put_and_find(&level, 50..99).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_serves_every_slot_again_when_a_master_is_killed() {
    let Some(redis) = Cluster::start() else { return };
    let hosts: Vec<String> = redis.nodes.iter().map(|node| format!("127.0.0.1:{}", node.daemon.port)).collect();
    let level = Arc::new(connected(&format!("redis+cluster://{}", hosts.join(",")), Duration::from_millis(50)).await);
    put_and_find(&level, 1..200).await;
    let sizes: Vec<usize> = redis.nodes[..3].iter().map(|node| node.ask(&["DBSIZE"])).collect();
    assert!(sizes.iter().all(|size| *size > 20), "all masters hold some: {sizes:?}");
    let slowest = under_load(&level, async {
        redis.nodes[1].daemon.kill();
        tokio::time::sleep(Duration::from_secs(3)).await;
        wait_for("all slots to be served", async || {
            level.is_up() && redis.nodes[0].ask::<String>(&["CLUSTER", "INFO"]).contains("cluster_state:ok")
        })
        .await;
    })
    .await;
    assert!(slowest < BOUND, "{slowest:?}");
    put_and_find(&level, 200..400).await;
    let keys: Vec<CacheKey> = (200..400).map(key).collect();
    assert!(level.remove(&keys).await, "keys of all slots");
    assert!(level.get(&keys).await.iter().all(Option::is_none));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_answered_whatever_becomes_of_redis() {
    let Some(redis) = Redis::start() else { return };
    let shared = Arc::new(connected(&redis.url(), Duration::from_millis(50)).await);
    let cache: Arc<dyn Cache> = Arc::new(Layers::new(LocalCache::new(1 << 20), Some(shared.clone())));
    let server = Arc::new(http::server_with(http::settings(), http::limits(), Some((cache, TTL))).await);
    let ends = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..8usize)
        .map(|client| {
            let (server, ends) = (server.clone(), ends.clone());
            tokio::spawn(async move {
                let mut num_answered = 0;
                for n in 0.. {
                    if ends.load(Ordering::Relaxed) {
                        break;
                    }
                    let word = |i: usize| format!("w{}", (client * 100 + n * 7 + i) % 997);
                    let texts = [word(0), word(1), format!("{} {}", word(2), word(3))];
                    let answer = server.post("/v1/embeddings", json!({"input": texts})).await;
                    assert_eq!(answer.status.as_u16(), 200, "{}", answer.text());
                    num_answered += 1;
                    // What is found in memory is answered without a pause, and others want the thread too.
                    tokio::task::yield_now().await;
                }
                num_answered
            })
        })
        .collect();
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        redis.daemon.kill();
        tokio::time::sleep(Duration::from_millis(500)).await;
        redis.start_again();
        wait_for("the connection", async || shared.is_up()).await;
        redis.daemon.pause();
        tokio::time::sleep(Duration::from_millis(500)).await;
        redis.daemon.resume();
        wait_for("the connection", async || shared.is_up()).await;
    }
    ends.store(true, Ordering::Relaxed);
    for client in clients {
        assert!(client.await.expect("every request is answered with 200") > 0);
    }
}

#[test]
fn two_real_servers_share_results_and_a_wrong_password_only_warns() {
    let Some(redis) = Redis::with_user() else { return };
    let password = PASSWORD.replace('@', "%40").replace('/', "%2F");
    let settings = |password: &str| {
        let url = format!("redis://{USER}:{password}@127.0.0.1:{}", redis.daemon.port);
        format!("[ai]\nmax_batch_tokens = 256\n[cache]\nurl = \"{url}\"\ntimeout = \"500ms\"\n")
    };
    let servers = [&*password, &password, "wr0ng"].map(|password| process::Server::ready(&settings(password)));
    let body = json!({"input": ["The cat sits outside", "A man plays the guitar"], "encoding_format": "base64"});
    let body = body.to_string();
    let ask = |server: &process::Server| {
        let head = "POST /v1/embeddings HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n";
        let request = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
        let answer = process::Client::connect(server.address).unwrap().send(request.as_bytes()).expect("answered");
        assert_eq!(answer.status, 200, "{answer:?}");
        answer
    };
    let [first, second, wrong] = &servers;
    let miss = ask(first);
    assert!(miss.head.contains("x-cache: miss"), "{}", miss.head);
    // It has answered without waiting for what it writes.
    let url = format!("redis://{USER}:{password}@127.0.0.1:{}", redis.daemon.port);
    let mut client = ::redis::Client::open(url).unwrap().get_connection().unwrap();
    process::wait_for("both results in Redis", || {
        (::redis::cmd("DBSIZE").query::<usize>(&mut client).unwrap() == 2).then_some(())
    });
    let hit = ask(second);
    assert!(hit.head.contains("x-cache: hit"), "{}", hit.head);
    assert_eq!(hit.body, miss.body, "bit for bit");
    let metrics = second.get("/metrics").expect("served").body;
    assert!(metrics.contains("eremois_cache_hits_total{level=\"redis\"} 2"), "{metrics}");
    let rows: serde_json::Value = serde_json::from_str(&miss.body).unwrap();
    let row = BASE64_STANDARD.decode(rows["data"][0]["embedding"].as_str().unwrap()).unwrap();
    assert_eq!(row.len(), 4 * 384);

    let line = wrong.stderr.wait_for(&["WARN", "the cache's Redis is away"]);
    assert!(!line.contains("wr0ng"), "{line}");
    assert!(ask(wrong).head.contains("x-cache: miss"));
    assert!(ask(wrong).head.contains("x-cache: hit"), "this process's own level goes on");
    let metrics = wrong.get("/metrics").expect("served").body;
    assert!(metrics.contains("eremois_cache_up{level=\"redis\"} 0"), "{metrics}");
}
