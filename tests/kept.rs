//! The real server with a real store: whatever is killed, what was acknowledged is found, and once.

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use common::process::{Answer, Client, LONG, Server, wait_for};
use common::servers::mongodb::MongoDb;
use common::servers::redis::Redis;
use parking_lot::Mutex;
use serde_json::{Value, json};

/// A model of small batches, so that a debug build answers in milliseconds.
const SMALL: &str = "[ai]\nmax_batch_tokens = 256\nmax_batch_size = 16\n";
const NUM_CLIENTS: usize = 32;

/// How often a server is killed: a handful here, and 50 times by `EREMOIS_TEST_KILLS=50`.
fn num_kills() -> usize {
    std::env::var("EREMOIS_TEST_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(4)
}

/// How many seconds a database stays away: few here, and 20 by `EREMOIS_TEST_OUTAGE=20`.
fn outage() -> Duration {
    let seconds = std::env::var("EREMOIS_TEST_OUTAGE").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(4))
}

fn settings(path: &Path, url: &str) -> String {
    format!("[database]\npath = {path:?}\nurl = \"{url}\"\n[jobs]\nlease = \"1s\"\n{SMALL}")
}

fn post(key: &str, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    let head = "POST /api/v1/inferences HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n";
    format!("{head}idempotency-key: {key}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

fn json(answer: &Answer) -> Value {
    serde_json::from_str(&answer.body).expect("JSON")
}

/// Every fourth request is not waited for.
fn body(client: usize, n: usize) -> Value {
    let mode = if n % 4 == 3 { "async" } else { "sync" };
    json!({"input": format!("text {n} of client {client}"), "user": "load", "mode": mode})
}

/// Clients that post until they are told to end, each request under a key of its own.
struct Load {
    ends: Arc<AtomicBool>,
    /// Key and id of everything that was acknowledged.
    acknowledged: Arc<Mutex<Vec<(String, String)>>>,
    /// Keys of requests without an answer.
    unanswered: Arc<Mutex<Vec<String>>>,
    num_refused: Arc<AtomicUsize>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Load {
    fn start(server: &Server, round: &str) -> Self {
        let (ends, acknowledged, unanswered) = (Arc::default(), Arc::default(), Arc::default());
        let num_refused = Arc::new(AtomicUsize::new(0));
        let address = server.address;
        let threads = (0..NUM_CLIENTS).map(|client| {
            let (ends, acknowledged): (Arc<AtomicBool>, Arc<Mutex<Vec<_>>>) =
                (Arc::clone(&ends), Arc::clone(&acknowledged));
            let (unanswered, num_refused): (Arc<Mutex<Vec<String>>>, _) =
                (Arc::clone(&unanswered), num_refused.clone());
            let round = round.to_string();
            std::thread::spawn(move || {
                let mut connection = Client::connect(address).expect("a connection");
                for n in 0.. {
                    if ends.load(Ordering::Relaxed) {
                        return;
                    }
                    let key = format!("{round}-{client}-{n}");
                    match connection.send(&post(&key, &body(client, n))) {
                        Ok(answer) if matches!(answer.status, 200 | 202) => {
                            let id = json(&answer)["id"].as_str().expect("an id").to_string();
                            acknowledged.lock().push((key, id));
                        }
                        Ok(answer) => {
                            assert_eq!(answer.status, 503, "{answer:?}");
                            num_refused.fetch_add(1, Ordering::Relaxed);
                            std::thread::sleep(Duration::from_millis(50));
                        }
                        Err(_) => return unanswered.lock().push(key),
                    }
                }
            })
        });
        let threads = threads.collect();
        Self { ends, acknowledged, unanswered, num_refused, threads }
    }

    fn end(self) -> (Vec<(String, String)>, Vec<String>, usize) {
        self.ends.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().expect("a client ends in order"));
        let acknowledged = std::mem::take(&mut *self.acknowledged.lock());
        let unanswered = std::mem::take(&mut *self.unanswered.lock());
        (acknowledged, unanswered, self.num_refused.load(Ordering::Relaxed))
    }
}

/// All ids of the user `load`, by pages; each is whole and there once.
fn listed(server: &Server) -> BTreeSet<String> {
    let mut ids = BTreeSet::new();
    let mut cursor = String::new();
    loop {
        let path = format!("/api/v1/inferences?user=load&status=succeeded&limit=500&include=output{cursor}");
        let answer = server.get(&path).expect("an answer");
        assert_eq!(answer.status, 200, "{}", answer.body);
        let page = json(&answer);
        for item in page["data"].as_array().expect("a list") {
            let row = item["output"]["embeddings"][0].as_array().expect("no record is half");
            assert_eq!(row.len(), 384);
            assert!(ids.insert(item["id"].as_str().expect("an id").to_string()), "twice: {item}");
        }
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return ids,
        }
    }
}

#[test]
fn a_server_killed_under_load_keeps_what_it_acknowledged() {
    let data = tempfile::tempdir().expect("a folder");
    kill_under_load(&settings(data.path(), "embedded"));
}

#[test]
fn a_server_killed_under_load_on_mongodb_and_redis_keeps_what_it_acknowledged() {
    let (Some(mongo), Some(redis)) = (MongoDb::own(), Redis::start()) else { return };
    let data = tempfile::tempdir().expect("a folder");
    kill_under_load(&format!("{}[cache]\nurl = \"{}\"\n", settings(data.path(), &mongo.url()), redis.url()));
}

fn kill_under_load(settings: &str) {
    let mut all = Vec::new();
    for round in 0..num_kills() {
        let mut server = Server::ready(settings);
        let load = Load::start(&server, &round.to_string());
        // A store over a network takes its time for the first.
        wait_for("answers", || (load.acknowledged.lock().len() > 4).then_some(()));
        // Another moment each time; what varies more is the machine.
        std::thread::sleep(Duration::from_millis(150 + (round as u64 * 173) % 500));
        server.signal("KILL");
        server.wait();
        let (acknowledged, unanswered, _) = load.end();
        all.extend(acknowledged);

        let server = Server::ready(settings);
        assert_found(&server, &all);
        // Who has no answer asks again and gets the record, or the request that is not known is computed now; a
        // reservation that the end has left behind is told as such.
        let mut client = Client::connect(server.address).expect("a connection");
        for key in unanswered {
            let (client_number, n) = key[key.find('-').expect("a key") + 1..].split_once('-').expect("a key");
            let body = body(client_number.parse().expect("a number"), n.parse().expect("a number"));
            let answer = client.send(&post(&key, &body)).expect("an answer");
            assert!(matches!(answer.status, 200 | 202 | 409), "{answer:?}");
        }
        let keys: BTreeSet<&String> = all.iter().map(|(key, _)| key).collect();
        assert_eq!(keys.len(), all.len());
    }
    println!(
        "{} kills, {} requests acknowledged by {NUM_CLIENTS} clients: all found, none twice",
        num_kills(),
        all.len()
    );
    assert!(all.len() > num_kills(), "too little was done to show anything: {}", all.len());
}

/// Everything that was acknowledged is there once and whole, what was only accepted as soon as it is computed.
fn assert_found(server: &Server, acknowledged: &[(String, String)]) {
    let mut missing = Vec::new();
    let start = std::time::Instant::now();
    while start.elapsed() < LONG {
        let found = listed(server);
        missing = acknowledged.iter().filter(|(_, id)| !found.contains(id)).collect();
        if missing.is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("{} of {} were acknowledged and are gone: {missing:?}", missing.len(), acknowledged.len());
}

#[test]
fn a_second_server_on_the_same_folder_is_refused() {
    let data = tempfile::tempdir().expect("a folder");
    let settings = settings(data.path(), "embedded");
    let _first = Server::ready(&settings);
    let mut second = Server::start(&settings);
    assert_eq!(second.wait().code(), Some(1));
    second.stderr.wait_for(&["database.path"]);
}

#[test]
fn results_go_to_the_journal_while_mongodb_is_away() {
    let Some(mongo) = MongoDb::own() else { return };
    let data = tempfile::tempdir().expect("a folder");
    let server = Server::ready(&settings(data.path(), &mongo.url()));
    let load = Load::start(&server, "m");
    std::thread::sleep(Duration::from_millis(500));
    mongo.daemon().kill();
    std::thread::sleep(outage());
    // Nobody who wants nothing kept notices.
    let body = json!({"input": "not kept", "store": false}).to_string();
    let head = "POST /api/v1/inferences HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n";
    let request = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
    let answer = Client::connect(server.address).expect("a connection").send(request.as_bytes()).expect("an answer");
    assert_eq!(answer.status, 200, "{answer:?}");
    let before = load.acknowledged.lock().len();
    wait_for("results that the journal keeps", || (load.acknowledged.lock().len() > before + 10).then_some(()));
    assert!(mongo.daemon().start_again());
    wait_for("an empty journal", || {
        server.get("/metrics").filter(|answer| answer.body.contains("\neremois_journal_entries 0\n"))
    });
    std::thread::sleep(Duration::from_millis(500));
    let (acknowledged, unanswered, _) = load.end();
    assert!(unanswered.is_empty(), "{unanswered:?}");
    assert_found(&server, &acknowledged);
    println!("MongoDB away for {:?}: {} requests acknowledged, all found", outage(), acknowledged.len());
    assert_eq!(acknowledged.iter().map(|(_, id)| id).collect::<BTreeSet<_>>().len(), acknowledged.len());
}

#[test]
fn redis_away_costs_nobody_an_answer() {
    let Some(redis) = Redis::start() else { return };
    let data = tempfile::tempdir().expect("a folder");
    let settings = format!("{}[cache]\nurl = \"{}\"\n", settings(data.path(), "embedded"), redis.url());
    let server = Server::ready(&settings);
    let load = Load::start(&server, "r");
    std::thread::sleep(Duration::from_millis(500));
    redis.daemon.kill();
    std::thread::sleep(outage() / 2);
    assert!(redis.daemon.start_again());
    std::thread::sleep(Duration::from_secs(1));
    // Worse: connections stay open, and nothing answers.
    redis.daemon.pause();
    let before = load.acknowledged.lock().len();
    std::thread::sleep(outage() / 2);
    assert!(load.acknowledged.lock().len() > before, "nothing was answered while Redis stood still");
    redis.daemon.resume();
    wait_for("the cache to be used again", || {
        server.get("/metrics").filter(|answer| answer.body.contains("eremois_cache_up{level=\"redis\"} 1"))
    });
    let (acknowledged, unanswered, num_refused) = load.end();
    assert!(unanswered.is_empty() && num_refused == 0, "{num_refused} refused, without an answer: {unanswered:?}");
    assert_found(&server, &acknowledged);
    println!("Redis away for {:?}: {} requests acknowledged, none refused, all found", outage(), acknowledged.len());
}
