//! OpenAI's files and batches over the fake model: what is taken, answered, refused, and what survives whatever happens.

mod common;

#[path = "batches/crash.rs"]
mod crash;
#[path = "batches/files.rs"]
mod files;
#[path = "batches/help.rs"]
mod help;

use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use common::http::{self, LONG, plain, server_of, server_that_keeps};
use eremois::api::ApiSettings;
use eremois::inference::keep::Scope;
use eremois::jobs::JobSettings;
use eremois::jobs::sweep::Sweep;
use eremois::store::work::memory::MemoryWork;
use eremois::store::work::{DocumentKind, DocumentQuery, TaskKind, Work};
use help::{Runners, batch_of, create, custom_ids, ended, handlers, input, line, lines_of, refused, upload};
use serde_json::{Value, json};

#[tokio::test]
async fn a_batch_is_answered_line_by_line() {
    let server = plain().await;
    let runners = Runners::start(&server, 1);
    let mut text: String = (0..40).map(|i| line(&format!("id-{i}"), &format!("w{i} w1"))).collect();
    text += "\n  \r\n";
    text += &line("empty", "");
    text += &line("broken", "fail");
    text += &line("long", &"w1 ".repeat(http::MAX_SEQ_LEN + 1));
    text += line("other", "w1").trim_end().replace("\"fake\"", "\"other\"").as_str();
    let file = upload(&server, &text).await;
    let metadata = json!({"job": "nightly"});
    let body = json!({
        "input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h", "metadata": metadata,
        "output_expires_after": {"anchor": "created_at", "seconds": 7200},
    });
    let made = create(&server, body).await;
    assert_eq!(
        (&made["object"], &made["status"], &made["metadata"]),
        (&json!("batch"), &json!("validating"), &metadata)
    );
    assert_eq!(made["expires_at"].as_i64().unwrap(), made["created_at"].as_i64().unwrap() + 24 * 3600);
    let batch = ended(&server, &made).await;
    assert_eq!(batch["status"], "completed", "{batch}");
    assert_eq!(batch["request_counts"], json!({"total": 44, "completed": 40, "failed": 4}));
    assert_eq!((&batch["usage"]["total_tokens"], &batch["model"]), (&json!(80), &json!("fake")));
    let times = ["created_at", "in_progress_at", "finalizing_at", "completed_at", "expires_at"];
    let times: Vec<i64> = times.iter().map(|name| batch[name].as_i64().unwrap()).collect();
    assert!(times.is_sorted(), "{batch}");
    assert!(batch["cancelled_at"].is_null() && batch["errors"].is_null());

    let output = lines_of(&server, &batch["output_file_id"]).await;
    let expected: Vec<String> = (0..40).map(|i| format!("id-{i}")).collect();
    assert_eq!(custom_ids(&output), expected);
    for (i, answered) in output.iter().enumerate() {
        let online = server.post("/v1/embeddings", json!({"model": "fake", "input": format!("w{i} w1")})).await;
        assert_eq!(answered["response"]["body"], online.json());
        assert_eq!((&answered["response"]["status_code"], &answered["error"]), (&json!(200), &Value::Null));
        assert!(answered["id"].as_str().unwrap().starts_with("batch_req_"));
    }
    let errors = lines_of(&server, &batch["error_file_id"]).await;
    assert_eq!(custom_ids(&errors), ["empty", "broken", "long", "other"]);
    let status = |i: usize| errors[i]["response"]["status_code"].as_u64().unwrap();
    assert_eq!([status(0), status(1), status(2), status(3)], [400, 500, 413, 404]);
    assert_eq!(errors[2]["response"]["body"]["error"]["code"], "too_large");

    let about = server.get(&format!("/v1/files/{}", batch["output_file_id"].as_str().unwrap())).await.json();
    assert_eq!((&about["purpose"], &about["object"]), (&json!("batch_output"), &json!("file")));
    assert_eq!(about["expires_at"].as_i64().unwrap(), about["created_at"].as_i64().unwrap() + 7200);
    assert!(about["filename"].as_str().unwrap().ends_with("_output.jsonl"));
    runners.stop().await;
}

#[tokio::test]
async fn what_is_wrong_with_an_input_fails_its_batch_before_anything_is_computed() {
    let server = plain().await;
    let runners = Runners::start(&server, 1);
    let text = format!(
        "{}{}not json\n{}",
        line("a", "w1"),
        line("a", "w2"),
        line("b", "w1").replace("embeddings", "responses")
    );
    let computed = server.controls.num_seqs();
    let batch = ended(&server, &batch_of(&server, &text, "24h").await).await;
    assert_eq!(batch["status"], "failed");
    let faults: Vec<(&str, u64)> = batch["errors"]["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|fault| (fault["code"].as_str().unwrap(), fault["line"].as_u64().unwrap()))
        .collect();
    assert_eq!(faults, [("duplicate_custom_id", 2), ("invalid_json_line", 3), ("mismatched_url", 4)]);
    assert!(batch["failed_at"].is_i64() && batch["output_file_id"].is_null());
    assert_eq!(server.controls.num_seqs(), computed);
    // Nothing can be undone.
    let path = format!("/v1/batches/{}/cancel", batch["id"].as_str().unwrap());
    refused(&server.post_with(&path, "", &[]).await, 409, "conflict", "status");
    runners.stop().await;
}

#[tokio::test]
async fn requests_for_batches_are_checked_at_the_door() {
    let server = plain().await;
    let file = upload(&server, &line("a", "w1")).await;
    let with = |name: &str, value: Value| {
        let mut body = json!({"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"});
        body[name] = value;
        body
    };
    let many: serde_json::Map<String, Value> = (0..17).map(|i| (format!("k{i}"), json!("v"))).collect();
    for (name, value, status, kind, field) in [
        ("input_file_id", json!("file-019a7b2c3d4e7f80912a3b4c5d6e7f80"), 404, "not_found", ""),
        ("input_file_id", json!("../secret"), 404, "not_found", ""),
        ("endpoint", json!("/v1/responses"), 422, "invalid", "endpoint"),
        ("completion_window", json!("soon"), 422, "invalid", "completion_window"),
        ("completion_window", json!("999ms"), 422, "invalid", "completion_window"),
        ("completion_window", json!("31days"), 422, "invalid", "completion_window"),
        ("metadata", json!(many), 413, "too_large", "metadata"),
        ("metadata", json!({"k": 1}), 400, "malformed", "metadata.k"),
        (
            "output_expires_after",
            json!({"anchor": "created_at", "seconds": 3599}),
            422,
            "invalid",
            "output_expires_after.seconds",
        ),
        (
            "output_expires_after",
            json!({"anchor": "now", "seconds": 3600}),
            422,
            "invalid",
            "output_expires_after.anchor",
        ),
    ] {
        refused(&server.post("/v1/batches", with(name, value.clone())).await, status, kind, field);
    }
    refused(&server.post("/v1/batches", json!({"endpoint": "/v1/embeddings"})).await, 400, "malformed", "body");
    for path in ["/v1/batches/batch_019a7b2c3d4e7f80912a3b4c5d6e7f80", "/v1/batches/x", "/v1/batches/x/events"] {
        refused(&server.get(path).await, 404, "not_found", "");
    }
    refused(&server.post_with("/v1/batches/x/cancel", "", &[]).await, 404, "not_found", "");
    refused(&server.get("/v1/batches?limit=101").await, 422, "invalid", "limit");
}

#[tokio::test]
async fn what_a_batch_has_written_is_no_input() {
    let server = plain().await;
    let runners = Runners::start(&server, 1);
    let batch = ended(&server, &batch_of(&server, &line("a", "w1"), "24h").await).await;
    let body =
        json!({"input_file_id": batch["output_file_id"], "endpoint": "/v1/embeddings", "completion_window": "24h"});
    refused(&server.post("/v1/batches", body).await, 422, "invalid", "input_file_id");
    runners.stop().await;
}

#[tokio::test]
async fn a_server_that_keeps_nothing_takes_neither_files_nor_batches() {
    let server = server_that_keeps(http::settings(), http::limits(), None, Scope::None).await;
    let answer = help::post_file(&server, &line("a", "w1"), "batch").await;
    let message = refused(&answer, 422, "invalid", "file");
    assert!(message.contains("database.record"), "{message}");
    let body = json!({"input_file_id": "file-1", "endpoint": "/v1/embeddings", "completion_window": "24h"});
    refused(&server.post("/v1/batches", body).await, 422, "invalid", "input_file_id");
    assert_eq!(server.get("/v1/batches").await.json()["data"], json!([]));
}

#[tokio::test]
async fn the_same_key_makes_one_batch() {
    let server = plain().await;
    let file = upload(&server, &line("a", "w1")).await;
    let send = |window: &'static str| {
        let body = json!({"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": window});
        let server = &server;
        async move { server.post_with("/v1/batches", body.to_string(), &[("idempotency-key", "k-1")]).await }
    };
    let (first, second) = tokio::join!(send("24h"), send("24h"));
    assert_eq!((first.status, second.status), (StatusCode::OK, StatusCode::OK), "{} {}", first.text(), second.text());
    assert_eq!(first.json()["id"], second.json()["id"]);
    let replayed = send("24h").await;
    assert_eq!((replayed.header("idempotency-replayed"), &replayed.json()["id"]), ("true", &first.json()["id"]));
    let message = refused(&send("1h").await, 422, "invalid", "idempotency-key");
    assert!(message.contains(first.json()["id"].as_str().unwrap()), "{message}");
    assert_eq!(server.get("/v1/batches").await.json()["data"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_cancelled_batch_ends_with_what_it_has() {
    let server = plain().await;
    let runners = Runners::start(&server, 1);
    // One chunk is answered, then the device stands still.
    let text = input(300, |i| format!("w{i}"));
    *server.controls.per_batch.lock() = Duration::from_millis(10);
    let made = batch_of(&server, &text, "24h").await;
    help::until(&server, &made, |batch| batch["request_counts"]["completed"].as_u64() > Some(0)).await;
    server.controls.hold();
    let path = format!("/v1/batches/{}", made["id"].as_str().unwrap());
    let cancelling = server.post_with(&format!("{path}/cancel"), "", &[]).await.json();
    assert_eq!(cancelling["status"], "cancelling");
    assert!(cancelling["cancelling_at"].is_i64());
    assert_eq!(
        server.post_with(&format!("{path}/cancel"), "", &[]).await.json()["cancelling_at"],
        cancelling["cancelling_at"]
    );
    let batch = ended(&server, &made).await;
    server.controls.release();
    assert_eq!(batch["status"], "cancelled", "{batch}");
    let (output, errors) =
        (lines_of(&server, &batch["output_file_id"]).await, lines_of(&server, &batch["error_file_id"]).await);
    assert_eq!(output.len() as u64, batch["request_counts"]["completed"].as_u64().unwrap());
    assert!(!output.is_empty() && errors.len() > 100);
    assert!(errors.iter().all(|line| line["error"]["code"] == "batch_cancelled" && line["response"].is_null()));
    help::each_once(&output, &errors, 300);
    // Once more is no error, and changes nothing.
    assert_eq!(server.post_with(&format!("{path}/cancel"), "", &[]).await.json(), batch);
    runners.stop().await;
}

#[tokio::test]
async fn a_batch_that_is_cancelled_before_its_input_is_read_has_no_files() {
    let server = plain().await;
    let made = batch_of(&server, &input(10, |i| format!("w{i}")), "24h").await;
    let path = format!("/v1/batches/{}/cancel", made["id"].as_str().unwrap());
    assert_eq!(server.post_with(&path, "", &[]).await.json()["status"], "cancelling");
    let computed = server.controls.num_seqs();
    let runners = Runners::start(&server, 1);
    let batch = ended(&server, &made).await;
    assert_eq!((&batch["status"], &batch["output_file_id"]), (&json!("cancelled"), &Value::Null));
    assert_eq!(server.controls.num_seqs(), computed);
    runners.stop().await;
}

#[tokio::test]
async fn a_batch_whose_window_is_over_tells_what_it_has_not_answered() {
    let server = plain().await;
    let runners = Runners::start(&server, 1);
    *server.controls.per_batch.lock() = Duration::from_millis(5);
    let made = batch_of(&server, &input(200, |i| format!("w{i}")), "2s").await;
    help::until(&server, &made, |batch| batch["request_counts"]["completed"].as_u64() > Some(0)).await;
    server.controls.hold();
    let batch = ended(&server, &made).await;
    server.controls.release();
    assert_eq!(batch["status"], "expired", "{batch}");
    assert!(batch["expired_at"].is_i64());
    let (output, errors) =
        (lines_of(&server, &batch["output_file_id"]).await, lines_of(&server, &batch["error_file_id"]).await);
    assert!(!output.is_empty() && !errors.is_empty());
    assert!(errors.iter().all(|line| line["error"]["code"] == "batch_expired"));
    help::each_once(&output, &errors, 200);
    runners.stop().await;
}

#[tokio::test]
async fn requests_wait_for_a_server_without_room() {
    let limits = eremois::serve::policy::BatchLimits { max_queue_size: 4, ..http::limits() };
    let server = http::server(ApiSettings { max_client_batch_size: 4, ..http::settings() }, limits).await;
    let runners = Runners::start(&server, 2);
    *server.controls.per_batch.lock() = Duration::from_millis(5);
    let text = input(60, |i| format!("w{i}"));
    let batch = ended(&server, &batch_of(&server, &text, "24h").await).await;
    assert_eq!(batch["request_counts"], json!({"total": 60, "completed": 60, "failed": 0}), "{batch}");
    runners.stop().await;
}

#[tokio::test]
async fn requests_are_kept_once_where_all_are_kept() {
    let server = server_that_keeps(http::settings(), http::limits(), None, Scope::All).await;
    let made = batch_of(&server, &input(20, |i| format!("w{i}")), "24h").await;
    let handlers = handlers(&server);
    let id = made["id"].as_str().unwrap();
    help::run_task(&server, &handlers, TaskKind::Batch, id).await;
    // Twice at once: as by two servers, one of which was thought dead.
    for index in 0..3 {
        let task = help::chunk_task(id, index);
        let chunk = &handlers[&TaskKind::Chunk];
        let (first, second) = tokio::join!(chunk.run(&task), chunk.run(&task));
        first.unwrap();
        second.unwrap();
    }
    let batch = ended(&server, &made).await;
    assert_eq!(batch["request_counts"]["completed"], 20);
    help::each_once(&lines_of(&server, &batch["output_file_id"]).await, &[], 20);
    let records = server.store.records();
    assert_eq!(records.len(), 20);
    assert!(records.iter().all(|record| record.facts.source == "openai"));
}

#[tokio::test]
async fn only_some_chunks_of_a_batch_stand_in_line_at_once() {
    let server = plain().await;
    let made = batch_of(&server, &input(9000, |i| format!("w{}", i % 900)), "24h").await;
    let handlers = handlers(&server);
    help::run_task(&server, &handlers, TaskKind::Batch, made["id"].as_str().unwrap()).await;
    let waiting = server.state.tasks.work.num_tasks().await.unwrap();
    let chunks = waiting.iter().find(|(kind, _)| *kind == TaskKind::Chunk).map(|(_, count)| *count);
    assert_eq!(chunks, Some(64));
    // And a small one that comes later need not wait for all of the large one.
    *server.controls.per_batch.lock() = Duration::from_millis(2);
    let small = batch_of(&server, &input(3, |i| format!("w{i}")), "24h").await;
    let runners = Runners::start(&server, 1);
    ended(&server, &small).await;
    let large = server.get(&format!("/v1/batches/{}", made["id"].as_str().unwrap())).await.json();
    assert_eq!(large["status"], "in_progress", "{large}");
    let large = ended(&server, &made).await;
    assert_eq!(large["request_counts"]["completed"], 9000);
    help::each_once(&lines_of(&server, &large["output_file_id"]).await, &[], 9000);
    runners.stop().await;
}

#[tokio::test]
async fn lists_go_from_the_newest_on() {
    let server = plain().await;
    let mut made = Vec::new();
    for i in 0..7 {
        made.push(batch_of(&server, &line(&i.to_string(), "w1"), "24h").await["id"].as_str().unwrap().to_string());
    }
    made.reverse();
    let mut found = Vec::new();
    let mut after = String::new();
    loop {
        let page = server.get(&format!("/v1/batches?limit=3{after}")).await.json();
        let ids: Vec<String> =
            page["data"].as_array().unwrap().iter().map(|batch| batch["id"].as_str().unwrap().to_string()).collect();
        assert_eq!((&page["first_id"], &page["last_id"]), (&json!(ids.first()), &json!(ids.last())));
        found.extend(ids);
        if page["has_more"] == false {
            break;
        }
        after = format!("&after={}", found.last().unwrap());
    }
    assert_eq!(found, made);
    assert_eq!(server.get("/v1/batches").await.json()["data"].as_array().unwrap().len(), 7);
}

#[tokio::test]
async fn events_tell_every_change_until_the_last() {
    let server = Arc::new(plain().await);
    let made = batch_of(&server, &input(200, |i| format!("w{i}")), "24h").await;
    let path = format!("/v1/batches/{}/events", made["id"].as_str().unwrap());
    let watching = tokio::spawn({
        let server = server.clone();
        async move { server.get(&path).await.text() }
    });
    *server.controls.per_batch.lock() = Duration::from_millis(20);
    let runners = Runners::start(&server, 1);
    let text = tokio::time::timeout(LONG, watching).await.unwrap().unwrap();
    let events: Vec<(&str, Value)> = text
        .split("\n\n")
        .filter_map(|event| event.strip_prefix("event: ")?.split_once("\ndata: "))
        .map(|(name, data)| (name, serde_json::from_str(data).unwrap()))
        .collect();
    assert_eq!((events[0].0, events.last().unwrap().0), ("validating", "completed"), "{text}");
    assert!(events.iter().all(|(name, batch)| batch["status"] == *name));
    let counts: Vec<u64> =
        events.iter().map(|(_, batch)| batch["request_counts"]["completed"].as_u64().unwrap()).collect();
    assert!(counts.is_sorted() && counts.iter().any(|count| (1..200).contains(count)), "{counts:?}");
    runners.stop().await;
}

#[tokio::test]
async fn what_expired_is_swept_with_all_it_has_written() {
    let work = Arc::new(help::Watched::default());
    let jobs = JobSettings { retention: Duration::from_secs(3600), ..JobSettings::default() };
    let server = server_of(http::settings(), http::limits(), None, Scope::Application, jobs, work.clone()).await;
    let runners = Runners::start(&server, 1);
    let batch = ended(&server, &batch_of(&server, &input(100, |i| format!("w{i}")), "1h").await).await;
    assert_eq!(batch["status"], "completed");
    runners.stop().await;
    let sweep = Sweep::new(server.state.tasks.clone(), server.state.jobs.clone());
    let days =
        |days: i64| eremois::store::record::now().checked_add(jiff::SignedDuration::from_hours(24 * days)).unwrap();
    assert_eq!(sweep.once(days(0)).await.unwrap(), 0);
    while sweep.once(days(30)).await.unwrap() > 0 {}
    assert_eq!(work.parts(), Vec::<String>::new());
    for kind in DocumentKind::ALL {
        let query = DocumentQuery { kind: *kind, parent: None, after: None, limit: 100 };
        assert_eq!(work.documents(&query).await.unwrap(), [], "{kind:?}");
    }
}

#[tokio::test]
async fn a_batch_that_lost_its_tasks_is_driven_on_by_the_sweep() {
    let work = Arc::new(MemoryWork::default());
    let jobs = JobSettings::default();
    let server = server_of(http::settings(), http::limits(), None, Scope::Application, jobs, work.clone()).await;
    let made = batch_of(&server, &input(10, |i| format!("w{i}")), "1s").await;
    let id = made["id"].as_str().unwrap();
    assert!(work.cancel(id).await.unwrap());
    let sweep = Sweep::new(server.state.tasks.clone(), server.state.jobs.clone());
    let soon = eremois::store::record::now().checked_add(jiff::SignedDuration::from_hours(2)).unwrap();
    assert_eq!(sweep.once(soon).await.unwrap(), 1);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let runners = Runners::start(&server, 1);
    let batch = ended(&server, &made).await;
    assert_eq!(batch["status"], "expired");
    help::each_once(&[], &lines_of(&server, &batch["error_file_id"]).await, 10);
    runners.stop().await;
}

#[tokio::test]
async fn an_input_that_is_damaged_fails_its_batch() {
    let work = Arc::new(help::Watched::default());
    let jobs = JobSettings::default();
    let server = server_of(http::settings(), http::limits(), None, Scope::Application, jobs, work.clone()).await;
    let made = batch_of(&server, &input(10, |i| format!("w{i}")), "24h").await;
    let name = work.parts().pop().unwrap();
    let mut bytes = work.part(&name, 0).await.unwrap().unwrap();
    bytes[20] ^= 1;
    work.put_part(&name, 0, &bytes).await.unwrap();
    let runners = Runners::start(&server, 1);
    let batch = ended(&server, &made).await;
    assert_eq!(batch["errors"]["data"][0]["code"], "unreadable", "{batch}");
    runners.stop().await;
}

#[tokio::test]
async fn a_store_that_is_away_is_answered_503() {
    let work = Arc::new(help::Watched::default());
    let jobs = JobSettings::default();
    let server = server_of(http::settings(), http::limits(), None, Scope::Application, jobs, work.clone()).await;
    let file = upload(&server, &line("a", "w1")).await;
    work.fail_always(true);
    refused(&help::post_file(&server, &line("a", "w1"), "batch").await, 503, "store_unavailable", "");
    let body = json!({"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"});
    refused(&server.post("/v1/batches", body).await, 503, "store_unavailable", "");
    refused(&server.get("/v1/files").await, 503, "store_unavailable", "");
    work.fail_always(false);
    assert_eq!(server.get(&format!("/v1/files/{file}")).await.status, StatusCode::OK);
}
