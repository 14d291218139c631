//! Three servers on one MongoDB and one Redis share a batch; one is killed in its midst, and each item's result is there
//! once.

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use common::process::{Answer, Client, Server, wait_for};
use common::servers::mongodb::MongoDb;
use common::servers::redis::Redis;
use serde_json::{Value, json};

/// Items of the batch: enough for a kill in their midst here, and 20,000 by `EREMOIS_TEST_BATCH_ITEMS=20000`.
fn num_items() -> usize {
    std::env::var("EREMOIS_TEST_BATCH_ITEMS").ok().and_then(|text| text.parse().ok()).unwrap_or(1200)
}

/// The longest the batch may take.
fn longest() -> Duration {
    Duration::from_secs(90 + num_items() as u64 / 10)
}

fn send(server: &Server, head: &str, body: &[u8]) -> Answer {
    let mut request = format!("{head}\r\nhost: test\r\ncontent-length: {}\r\n\r\n", body.len()).into_bytes();
    request.extend_from_slice(body);
    let answer = Client::connect(server.address).expect("a connection").send(&request).expect("an answer");
    assert!(answer.status < 300, "{answer:?}");
    answer
}

fn json(answer: &Answer) -> Value {
    serde_json::from_str(&answer.body).unwrap_or_else(|e| panic!("{e}: {}", answer.body))
}

/// What an item computes on: a few words, so that a debug build is quick.
fn text(item: usize) -> String {
    format!("item number {item}")
}

fn upload(server: &Server) -> String {
    let mut lines = String::new();
    for item in 0..num_items() {
        let body = json!({"input": text(item), "dimensions": 8});
        let line =
            json!({"custom_id": format!("item-{item}"), "method": "POST", "url": "/v1/embeddings", "body": body});
        lines.push_str(&line.to_string());
        lines.push('\n');
    }
    let boundary = "a-line-that-is-in-no-item";
    let part = |name: &str, more: &str, value: &str| {
        format!("--{boundary}\r\ncontent-disposition: form-data; name=\"{name}\"{more}\r\n\r\n{value}\r\n")
    };
    let file = part("file", "; filename=\"items.jsonl\"", &lines);
    let body = format!("{}{file}--{boundary}--\r\n", part("purpose", "", "batch"));
    let head = format!("POST /v1/files HTTP/1.1\r\ncontent-type: multipart/form-data; boundary={boundary}");
    json(&send(server, &head, body.as_bytes()))["id"].as_str().expect("an id").to_string()
}

fn batch(server: &Server, id: &str) -> Value {
    // A server that is starting or busy answers a little later.
    wait_for("the batch", || {
        server.get(&format!("/v1/batches/{id}")).filter(|answer| answer.status == 200).map(|a| json(&a))
    })
}

fn num_completed(batch: &Value) -> u64 {
    batch["request_counts"]["completed"].as_u64().expect("a count")
}

#[test]
fn a_batch_shared_by_three_servers_outlives_one_of_them() {
    let (Some(mongo), Some(redis)) = (MongoDb::own(), Redis::start()) else { return };
    let folders: Vec<_> = (0..3).map(|_| tempfile::tempdir().expect("a folder")).collect();
    let (mongo_url, redis_url) = (mongo.url(), redis.url());
    let settings = |i: usize| {
        let path = folders[i].path();
        format!(
            "[database]\nurl = \"{mongo_url}\"\npath = {path:?}\n[cache]\nurl = \"{redis_url}\"\n[jobs]\nlease = \"2s\"\n\
             [ai]\nmax_batch_tokens = 512\nmax_batch_size = 32\n"
        )
    };
    let mut servers: Vec<Server> = (0..3).map(|i| Server::ready(&settings(i))).collect();
    let file = upload(&servers[0]);
    let body = json!({"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"});
    let head = "POST /v1/batches HTTP/1.1\r\ncontent-type: application/json";
    let id = json(&send(&servers[0], head, body.to_string().as_bytes()))["id"].as_str().expect("an id").to_string();

    // The one that took it in is killed when a third is done.
    let start = Instant::now();
    let a_third = num_items() as u64 / 3;
    while num_completed(&batch(&servers[1], &id)) < a_third {
        assert!(start.elapsed() < longest(), "{}", batch(&servers[1], &id));
        std::thread::sleep(Duration::from_millis(20));
    }
    servers[0].signal("KILL");
    servers[0].wait();
    let done = loop {
        let now = batch(&servers[1], &id);
        if !matches!(now["status"].as_str(), Some("validating" | "in_progress" | "finalizing")) {
            break now;
        }
        assert!(start.elapsed() < longest(), "{now}");
        std::thread::sleep(Duration::from_millis(100));
    };
    assert_eq!(done["status"], "completed", "{done}");
    let counts = json!({"total": num_items(), "completed": num_items(), "failed": 0});
    assert_eq!(done["request_counts"], counts, "{done}");
    assert_eq!(done["error_file_id"], Value::Null, "{done}");

    // Another server than the one that was asked has the same file.
    let output = done["output_file_id"].as_str().expect("a file");
    let answer = servers[2].get(&format!("/v1/files/{output}/content")).expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.body);
    let mut found: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for line in answer.body.lines() {
        let line: Value = serde_json::from_str(line).expect("a whole line");
        assert_eq!((&line["response"]["status_code"], &line["error"]), (&json!(200), &Value::Null), "{line}");
        let row = line["response"]["body"]["data"][0]["embedding"].as_array().expect("an embedding");
        let row: Vec<f64> = row.iter().map(|value| value.as_f64().expect("a number")).collect();
        assert_eq!(row.len(), 8, "{line}");
        let custom_id = line["custom_id"].as_str().expect("an id").to_string();
        assert_eq!(found.insert(custom_id.clone(), row), None, "{custom_id} is there twice");
    }
    assert_eq!(found.len(), num_items());
    // Each has its own result: some of them are asked for once more.
    for item in (0..num_items()).step_by(num_items() / 10) {
        let body = json!({"input": text(item), "dimensions": 8}).to_string();
        let head = "POST /v1/embeddings HTTP/1.1\r\ncontent-type: application/json\r\ncache-control: no-store";
        let answer = json(&send(&servers[1], head, body.as_bytes()));
        let wanted = answer["data"][0]["embedding"].as_array().expect("an embedding");
        let row = &found[&format!("item-{item}")];
        let difference =
            row.iter().zip(wanted).map(|(a, b)| (a - b.as_f64().expect("a number")).abs()).fold(0.0, f64::max);
        assert!(difference <= 1e-6, "item {item}: {difference}");
    }
    println!("{} items by three servers, one killed: each result once, in {:.0?}", num_items(), start.elapsed());
    // The work was shared, by what the servers say of themselves.
    for server in &servers[1..] {
        let metrics = server.get("/metrics").expect("an answer").body;
        let done = r#"eremois_jobs_total{kind="chunk",outcome="done"}"#;
        assert!(metrics.lines().any(|line| line.starts_with(done)), "a server did nothing of it");
    }
}
