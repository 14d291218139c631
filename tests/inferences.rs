//! The application API over the fake model and a store in memory: what is answered, kept, found, refused and erased.

mod common;

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use common::http::{self, Answer, Server, plain, server_that_keeps, server_with};
use eremois::inference::keep::Scope;
use eremois::store::layers::Layers;
use eremois::store::local::LocalCache;
use eremois::store::memory::Ailment;
use eremois::store::record::Status;
use serde_json::{Value, json};

const PATH: &str = "/api/v1/inferences";

async fn create(server: &Server, body: Value) -> Value {
    let answer = server.post(PATH, body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    answer.json()
}

async fn delete(server: &Server, path: &str) -> Answer {
    server.send(Request::delete(path).body(Body::empty()).unwrap()).await
}

fn problem(answer: &Answer, status: u16, kind: &str) -> Value {
    assert_eq!(answer.status.as_u16(), status, "{}", answer.text());
    assert_eq!(answer.headers["content-type"], "application/problem+json");
    let body = answer.json();
    assert_eq!((body["status"].as_u64(), body["kind"].as_str()), (Some(u64::from(status)), Some(kind)), "{body}");
    assert_eq!(body["type"], format!("urn:eremois:problem:{kind}"));
    assert!(body["detail"].is_string() && body["title"].is_string());
    body
}

#[tokio::test]
async fn what_is_answered_can_be_found_again() {
    let server = plain().await;
    let body = json!({
        "model": "fake", "input": ["w1 w2", [7, 8]], "task": "embed", "user": "ü-1",
        "metadata": {"order": "4711"}, "parameters": {"dimensions": 4},
    });
    let answer = server.post(PATH, body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    let made = answer.json();
    let id = made["id"].as_str().unwrap();
    assert_eq!(answer.headers["location"], format!("{PATH}/{id}"));
    assert_eq!((&made["status"], &made["stored"], &made["cached"]), (&json!("succeeded"), &json!(true), &json!(false)));
    assert_eq!(made["output"]["embeddings"].as_array().unwrap().len(), 2);
    assert_eq!((&made["usage"]["inputs"], &made["version"]), (&json!(2), &json!("1")));

    let found = server.get(&format!("{PATH}/{id}")).await.json();
    for field in ["id", "output", "usage", "timings", "model", "user", "metadata", "parameters", "created_at"] {
        assert_eq!(found[field], made[field], "{field}");
    }
    assert_eq!(found["inputs"], json!(["w1 w2", [7, 8]]));
    assert!(found["created_at"].as_str().unwrap().ends_with('Z'));
}

#[tokio::test]
async fn what_is_not_to_be_kept_is_not() {
    let server = plain().await;
    let made = create(&server, json!({"input": "w1", "store": false})).await;
    assert_eq!(made["stored"], json!(false));
    assert!(server.store.records().is_empty());
    problem(&server.get(&format!("{PATH}/{}", made["id"].as_str().unwrap())).await, 404, "not_found");
}

#[tokio::test]
async fn a_result_that_cannot_be_kept_is_no_success() {
    let server = plain().await;
    server.store.set(Ailment::Away);
    let answer = server.post(PATH, json!({"input": "w1"})).await;
    problem(&answer, 503, "store_unavailable");
    assert!(answer.headers.contains_key("retry-after"));
    // Who wants it not kept is answered, and so are the compatible protocols.
    create(&server, json!({"input": "w1", "store": false})).await;
    assert_eq!(server.post("/v1/embeddings", json!({"input": "w1"})).await.status, StatusCode::OK);
    server.store.set(Ailment::None);
    create(&server, json!({"input": "w1"})).await;
}

#[tokio::test]
async fn the_same_key_is_computed_once() {
    let server = plain().await;
    let headers = [("idempotency-key", "order-1")];
    let send = |text: &'static str| server.post_with(PATH, json!({"input": text}).to_string(), &headers);
    let first = send("w1").await;
    let second = send("w1").await;
    assert_eq!((first.status, second.status), (StatusCode::OK, StatusCode::OK), "{}", second.text());
    let (first, replay) = (first.json(), second.json());
    assert_eq!((&first["id"], &first["output"]), (&replay["id"], &replay["output"]));
    assert_eq!(second.headers["idempotency-replayed"], "true");
    assert_eq!(server.store.records().len(), 1);
    let other = problem(&send("w2").await, 422, "invalid");
    assert_eq!(other["field"], "idempotency-key");
    assert!(other["detail"].as_str().unwrap().contains(first["id"].as_str().unwrap()));
}

#[tokio::test]
async fn a_key_whose_request_is_under_way_conflicts_and_one_that_failed_is_free() {
    let server = Arc::new(plain().await);
    *server.controls.per_batch.lock() = Duration::from_millis(300);
    let send = |server: Arc<Server>, text: &'static str| async move {
        let body = json!({ "input": text }).to_string();
        server.post_with(PATH, body, &[("idempotency-key", "k")]).await
    };
    let first = tokio::spawn(send(server.clone(), "w1"));
    while server.store.records().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    problem(&send(server.clone(), "w1").await, 409, "conflict");
    assert_eq!(first.await.unwrap().status, StatusCode::OK);
    assert_eq!(send(server.clone(), "w1").await.status, StatusCode::OK);

    *server.controls.per_batch.lock() = Duration::ZERO;
    let fail = |server: Arc<Server>| async move {
        server.post_with(PATH, json!({"input": "fail"}).to_string(), &[("idempotency-key", "k2")]).await
    };
    problem(&fail(server.clone()).await, 500, "failed");
    problem(&fail(server.clone()).await, 500, "failed");
    let failed = server.get(&format!("{PATH}?status=failed")).await.json();
    assert_eq!(failed["data"].as_array().unwrap().len(), 2);
    assert_eq!(failed["data"][0]["error"]["kind"], "failed");
}

#[tokio::test]
async fn a_reservation_without_an_owner_is_taken_over() {
    use eremois::store::Records;
    let server = plain().await;
    let headers = [("idempotency-key", "k")];
    let body = json!({"input": "w1"}).to_string();
    server.post_with(PATH, body.clone(), &headers).await;
    // As a process leaves it that ended in between, an hour ago.
    let mut record = server.store.records()[0].clone();
    server.store.delete(&record.id).await.unwrap();
    let before = jiff::Timestamp::now() - jiff::SignedDuration::from_hours(1);
    record.id = eremois::store::record::InferenceId::first_at(before);
    record.facts.status = Status::Running;
    record.output = None;
    server.store.put(&[record.clone()]).await.unwrap();
    let answer = server.post_with(PATH, body, &headers).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert_ne!(answer.json()["id"], json!(record.id.to_string()));
    assert_eq!(server.store.records().len(), 1);
}

#[tokio::test]
async fn pages_are_stable_and_filters_hold() {
    let server = plain().await;
    for i in 0..7 {
        let user = if i % 2 == 0 { "even" } else { "odd" };
        create(&server, json!({"input": "w1", "user": user, "metadata": {"n": i.to_string()}})).await;
    }
    let mut seen = Vec::new();
    let mut cursor = String::new();
    loop {
        let page = server.get(&format!("{PATH}?user=even&limit=3{cursor}")).await.json();
        for item in page["data"].as_array().unwrap() {
            assert!(item["output"].is_null());
            seen.push(item["metadata"]["n"].as_str().unwrap().to_string());
        }
        create(&server, json!({"input": "w1", "user": "even", "metadata": {"n": "late"}})).await;
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(seen, ["6", "4", "2", "0"]);
    let one = server.get(&format!("{PATH}?metadata.n=3&include=output")).await.json();
    assert_eq!(one["data"].as_array().unwrap().len(), 1);
    assert_eq!(one["data"][0]["output"]["embeddings"].as_array().unwrap().len(), 1);
    for (query, field) in [("limit=0", "limit"), ("status=x", "status"), ("who=me", "who"), ("cursor=x", "cursor")] {
        assert_eq!(problem(&server.get(&format!("{PATH}?{query}")).await, 422, "invalid")["field"], field);
    }
}

#[tokio::test]
async fn deleting_and_erasing_leave_nothing() {
    let cache: Arc<Layers> = Arc::new(Layers::new(LocalCache::new(1 << 20), None));
    let server = server_with(http::settings(), http::limits(), Some((cache, Duration::from_secs(60)))).await;
    let one = create(&server, json!({"input": "w1 w2", "user": "u", "store": true})).await;
    create(&server, json!({"input": ["w3", "w4"], "user": "u"})).await;
    create(&server, json!({"input": "w5", "user": "v"})).await;
    let path = format!("{PATH}/{}", one["id"].as_str().unwrap());
    assert_eq!(delete(&server, &path).await.status, StatusCode::NO_CONTENT);
    problem(&delete(&server, &path).await, 404, "not_found");
    problem(&delete(&server, &format!("{PATH}/inf_12")).await, 400, "malformed");

    let hit = create(&server, json!({"input": ["w3", "w4"], "store": false})).await;
    assert_eq!((&hit["cached"], &hit["usage"]["cached_inputs"]), (&json!(true), &json!(2)));
    let erased = delete(&server, "/api/v1/users/u/inferences").await.json();
    assert_eq!(erased, json!({"deleted": 1, "cache_cleared": true}));
    let miss = create(&server, json!({"input": ["w3", "w4"], "store": false})).await;
    assert_eq!(miss["cached"], json!(false));
    assert_eq!(server.store.records().len(), 1);
    assert_eq!(delete(&server, "/api/v1/users/u/inferences").await.json()["deleted"], 0);
}

#[tokio::test]
async fn feedback_is_kept_and_checked() {
    let server = plain().await;
    let made = create(&server, json!({"input": "w1"})).await;
    let path = format!("{PATH}/{}/feedback", made["id"].as_str().unwrap());
    let said = server.post(&path, json!({"score": 0.5, "label": "good", "comment": "yes"})).await;
    assert_eq!(said.status, StatusCode::NO_CONTENT, "{}", said.text());
    let found = server.get(&format!("{PATH}/{}", made["id"].as_str().unwrap())).await.json();
    assert_eq!((&found["feedback"][0]["score"], &found["feedback"][0]["label"]), (&json!(0.5), &json!("good")));
    assert_eq!(problem(&server.post(&path, json!({"score": 1.5})).await, 422, "invalid")["field"], "score");
    problem(&server.post(&path, json!({})).await, 400, "empty");
    problem(&server.post(&path, json!({"stars": 5})).await, 400, "malformed");
    let nobody = path.replace(made["id"].as_str().unwrap(), "inf_019a7b2c3d4e7f80912a3b4c5d6e7f80");
    problem(&server.post(&nobody, json!({"score": 1})).await, 404, "not_found");
}

#[tokio::test]
async fn events_end_with_the_final_state() {
    let server = plain().await;
    let made = create(&server, json!({"input": "w1"})).await;
    let answer = server.get(&format!("{PATH}/{}/events", made["id"].as_str().unwrap())).await;
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    let text = answer.text();
    assert!(text.starts_with("event: succeeded\ndata: {"), "{text}");
    assert_eq!(text.matches("event:").count(), 1);
}

#[tokio::test]
async fn the_compatible_protocols_are_kept_where_all_are() {
    let server = server_that_keeps(http::settings(), http::limits(), None, Scope::All).await;
    assert_eq!(server.post("/v1/embeddings", json!({"input": ["w1", "w2"]})).await.status, StatusCode::OK);
    assert_eq!(server.post("/embed", json!({"inputs": "w3"})).await.status, StatusCode::OK);
    let list = server.get(PATH).await.json();
    let sources: Vec<&str> =
        list["data"].as_array().unwrap().iter().filter_map(|item| item["source"].as_str()).collect();
    assert_eq!(sources, ["tei", "openai"]);

    let nobody = server_that_keeps(http::settings(), http::limits(), None, Scope::None).await;
    let made = create(&nobody, json!({"input": "w1"})).await;
    assert_eq!(made["stored"], json!(false));
    let refused = nobody.post(PATH, json!({"input": "w1", "store": true})).await;
    assert_eq!(problem(&refused, 422, "invalid")["field"], "store");
    assert!(nobody.store.records().is_empty());
}

#[tokio::test]
async fn bad_requests_are_named_and_leave_nothing() {
    let server = plain().await;
    let long = "x".repeat(600);
    let pairs: serde_json::Map<String, Value> = (0..17).map(|i| (i.to_string(), json!(""))).collect();
    for (body, status, kind, field) in [
        (json!({}), 400, "malformed", "body"),
        (json!({"input": []}), 400, "empty", "input"),
        (json!({"input": "w1", "inputs": "w1"}), 400, "malformed", "body"),
        (json!({"input": "w1", "task": "rank"}), 400, "malformed", "task"),
        (json!({"input": "w1", "stor": true}), 400, "malformed", "stor"),
        (json!({"input": "w1", "model": "other"}), 404, "model_not_found", "model"),
        (json!({"input": "w1", "user": ""}), 400, "empty", "user"),
        (json!({"input": "w1", "user": long}), 413, "too_large", "user"),
        (json!({"input": "w1", "metadata": pairs}), 413, "too_large", "metadata"),
        (json!({"input": "w1", "metadata": {"k": long}}), 413, "too_large", "metadata.k"),
        (json!({"input": "w1", "metadata": {"k": 1}}), 400, "malformed", "metadata.k"),
        (json!({"input": "w1", "parameters": {"dimensions": 9}}), 422, "invalid", "dimensions"),
    ] {
        let answer = server.post(PATH, body.clone()).await;
        let body_of = problem(&answer, status, kind);
        assert_eq!(body_of["field"], field, "{body} {body_of}");
    }
    for key in ["", "a b", "ü"] {
        let answer = server.post_with(PATH, json!({"input": "w1"}).to_string(), &[("idempotency-key", key)]).await;
        assert_eq!(problem(&answer, 400, "malformed")["field"], "idempotency-key");
    }
    let unkept = json!({"input": "w1", "store": false}).to_string();
    let answer = server.post_with(PATH, unkept, &[("idempotency-key", "k")]).await;
    assert_eq!(problem(&answer, 422, "invalid")["field"], "idempotency-key");
    problem(&server.get("/api/v1/nothing").await, 404, "route_not_found");
    assert!(server.store.records().is_empty());
}
