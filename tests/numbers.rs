//! Usage and quality over HTTP: of real requests, failures and feedback, on the fake model and a store in memory.

mod common;

use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use common::http::{self, Answer, Server, plain, server_that_keeps};
use common::records::record;
use eremois::inference::keep::Scope;
use eremois::store::Records;
use eremois::store::memory::Ailment;
use eremois::store::record::{InferenceId, Norms};
use serde_json::{Value, json};

const PATH: &str = "/api/v1/inferences";

async fn create(server: &Server, body: Value) -> Value {
    let answer = server.post(PATH, body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    answer.json()
}

async fn fail(server: &Server, body: Value) {
    let answer = server.post(PATH, body).await;
    assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR, "{}", answer.text());
}

async fn say(server: &Server, of: &Value, feedback: Value) {
    let answer = server.post(&format!("{PATH}/{}/feedback", of["id"].as_str().unwrap()), feedback).await;
    assert_eq!(answer.status, StatusCode::NO_CONTENT, "{}", answer.text());
}

async fn numbers(server: &Server, path: &str) -> Value {
    let answer = server.get(path).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    let list = answer.json();
    assert_eq!((&list["object"], &list["truncated"], &list["pending"]), (&json!("list"), &json!(false), &json!(0)));
    list["data"].clone()
}

fn problem(answer: &Answer, status: u16, kind: &str) -> Value {
    assert_eq!(answer.status.as_u16(), status, "{}", answer.text());
    assert_eq!(answer.headers["content-type"], "application/problem+json");
    let body = answer.json();
    assert_eq!(body["kind"], kind, "{body}");
    body
}

#[tokio::test]
async fn usage_is_that_of_the_requests() {
    let server = server_that_keeps(http::settings(), http::limits(), None, Scope::All).await;
    let mut tokens = 0;
    for body in [
        json!({"input": ["w1 w2", "w3"], "user": "anna"}),
        json!({"input": "w1 w2 w3", "user": "anna", "model": "fake"}),
        json!({"input": "w4", "user": "berta"}),
    ] {
        tokens += create(&server, body).await["usage"]["tokens"].as_u64().unwrap();
    }
    create(&server, json!({"input": "w5", "store": false})).await;
    fail(&server, json!({"input": ["fail", "w1"], "user": "berta"})).await;
    assert_eq!(server.post("/v1/embeddings", json!({"input": ["w1", "w2", "w3"]})).await.status, StatusCode::OK);

    let by_user = numbers(&server, "/api/v1/usage?group_by=user").await;
    let told = |item: &Value| {
        let of = |field: &str| item[field].as_u64().unwrap();
        (item["user"].clone(), of("requests"), of("failed"), of("inputs"), of("characters"))
    };
    let told: Vec<_> = by_user.as_array().unwrap().iter().map(told).collect();
    let expected = [(Value::Null, 1, 0, 3, 6), (json!("anna"), 2, 0, 3, 15), (json!("berta"), 2, 1, 3, 2)];
    assert_eq!(told, expected);
    assert!(by_user[0].as_object().unwrap().contains_key("user") && by_user[0].get("model").is_none());

    // A failure counts for the model that failed, also where the client named none.
    let all = numbers(&server, "/api/v1/usage").await;
    assert_eq!(all.as_array().unwrap().len(), 1, "{all}");
    assert_eq!((&all[0]["model"], &all[0]["requests"]), (&json!("fake"), &json!(5)));
    let own = numbers(&server, "/api/v1/usage?group_by=source,status,version&model=fake").await;
    let told: Vec<_> = own.as_array().unwrap().iter().map(|i| (&i["source"], &i["status"], &i["version"])).collect();
    let one = json!("1");
    let (application, openai) = (json!("application"), json!("openai"));
    let (failed, succeeded) = (json!("failed"), json!("succeeded"));
    assert_eq!(told, [(&application, &failed, &one), (&application, &succeeded, &one), (&openai, &succeeded, &one)]);
    assert_eq!(own[1]["tokens"], tokens);

    // By day, today; and a span of time that is over before it.
    let today = jiff::Timestamp::now().to_string()[..10].to_string();
    let days = numbers(&server, "/api/v1/usage?group_by=day&user=anna").await;
    assert!(days[0]["day"].as_str().unwrap() <= &*today && days[0]["day"].as_str().unwrap().len() == 10, "{days}");
    assert_eq!(
        numbers(&server, &format!("/api/v1/usage?to={today}T00:00:00Z&from=2020-01-01T00:00:00Z")).await,
        json!([])
    );

    let first = server.get("/api/v1/usage?group_by=user&limit=2").await.json();
    assert_eq!((first["data"].as_array().unwrap().len(), &first["truncated"]), (2, &json!(true)));
    assert_eq!(first["data"][1], by_user[1]);
}

#[tokio::test]
async fn quality_is_that_of_each_version() {
    let server = plain().await;
    // What an earlier version left, with rows of another length.
    let mut old = record();
    let day = jiff::SignedDuration::from_hours(24);
    old.id = InferenceId::first_at(jiff::Timestamp::now() - day);
    old.facts.model = "fake".to_string();
    old.facts.version = "0".to_string();
    old.facts.output_norms = Some(Norms { num: 2, sum: 2.0, sum_squares: 2.0, min: 1.0, max: 1.0 });
    server.store.put(&[old]).await.unwrap();

    let made = create(&server, json!({"input": ["w1 w2", "w3"]})).await;
    let other = create(&server, json!({"input": "w4"})).await;
    let cut = create(&server, json!({"input": "w5 w6 w7", "parameters": {"dimensions": 2}})).await;
    fail(&server, json!({"input": "fail"})).await;
    say(&server, &made, json!({"score": 0.5, "label": "good"})).await;
    say(&server, &made, json!({"score": -1, "label": "bad", "comment": "no"})).await;
    say(&server, &other, json!({"label": "good"})).await;

    let all = numbers(&server, "/api/v1/quality").await;
    let versions: Vec<&str> = all.as_array().unwrap().iter().filter_map(|item| item["version"].as_str()).collect();
    assert_eq!(versions, ["0", "1"]);
    assert_eq!((&all[0]["error_rate"], &all[0]["output_norms"]["mean_change"]), (&json!(0.0), &Value::Null));
    let now = &all[1];
    assert_eq!((&now["requests"], &now["succeeded"], &now["failed"]), (&json!(4), &json!(3), &json!(1)));
    assert_eq!((&now["error_rate"], &now["errors"]), (&json!(0.25), &json!([{"kind": "failed", "count": 1}])));
    let expected = json!({
        "count": 3, "scored": 2, "mean_score": -0.25, "positive": 1, "negative": 1,
        "labels": [{"label": "good", "count": 2}, {"label": "bad", "count": 1}], "other_labels": 0,
    });
    assert_eq!(now["feedback"], expected);
    for phase in ["total", "inference"] {
        let of = |field: &str| now["latency"][phase][field].as_u64().unwrap();
        assert_eq!(of("count"), 3);
        assert!(of("p50_us") <= of("p90_us") && of("p90_us") <= of("p99_us"), "{now}");
    }
    assert!(now["latency"]["total"]["p99_us"].as_u64().unwrap() > 0);

    // The norms are those of the rows as they were answered.
    let norms: Vec<f64> = [&made, &other, &cut]
        .into_iter()
        .flat_map(|answer| answer["output"]["embeddings"].as_array().unwrap())
        .map(|row| row.as_array().unwrap().iter().map(|v| v.as_f64().unwrap().powi(2)).sum::<f64>().sqrt())
        .collect();
    let told = &now["output_norms"];
    let near = |field: &str, expected: f64| (told[field].as_f64().unwrap() - expected).abs() < 1e-5;
    let mean = norms.iter().sum::<f64>() / 4.0;
    let variance = norms.iter().map(|norm| (norm - mean).powi(2)).sum::<f64>() / 4.0;
    assert_eq!((&told["count"], &told["previous_version"]), (&json!(4), &json!("0")));
    assert!(near("mean", mean) && near("std", variance.sqrt()) && near("mean_change", mean - 1.0), "{told} {norms:?}");
    let ends = norms.iter().fold((f64::MAX, 0.0f64), |(min, max), norm| (norm.min(min), norm.max(max)));
    assert!(near("min", ends.0) && near("max", ends.1), "{told} {norms:?}");

    // One version alone is told the same, drift included; nobody's is nothing.
    assert_eq!(numbers(&server, "/api/v1/quality?model=fake&version=1").await, json!([now]));
    assert_eq!(numbers(&server, "/api/v1/quality?model=other").await, json!([]));
    let later = all[1]["first_used_at"].as_str().unwrap();
    let alone = numbers(&server, &format!("/api/v1/quality?from={later}")).await;
    assert_eq!(
        (alone[0]["version"].as_str(), &alone[0]["output_norms"]["previous_version"]),
        (Some("1"), &Value::Null)
    );
}

#[tokio::test]
async fn what_came_from_the_cache_is_no_inference() {
    use eremois::store::layers::Layers;
    use eremois::store::local::LocalCache;
    let cache = std::sync::Arc::new(Layers::new(LocalCache::new(1 << 20), None));
    let cache = Some((cache as std::sync::Arc<dyn eremois::store::cache::Cache>, Duration::from_secs(60)));
    let server = http::server_with(http::settings(), http::limits(), cache).await;
    for _ in 0..3 {
        create(&server, json!({"input": "w1 w2"})).await;
    }
    let usage = numbers(&server, "/api/v1/usage").await;
    assert_eq!((&usage[0]["inputs"], &usage[0]["cached_inputs"]), (&json!(3), &json!(2)));
    let quality = numbers(&server, "/api/v1/quality").await;
    let latency = &quality[0]["latency"];
    assert_eq!((&latency["total"]["count"], &latency["inference"]["count"]), (&json!(3), &json!(1)));
    assert_eq!(quality[0]["output_norms"]["count"], 3);
}

#[tokio::test]
async fn what_cannot_be_applied_is_refused_by_name() {
    let server = plain().await;
    let backwards = "from=2026-01-02T00:00:00Z&to=2026-01-01T00:00:00Z";
    for (path, field) in [
        ("usage?group_by=model,week".to_string(), "group_by"),
        ("usage?group_by=".to_string(), "group_by"),
        ("usage?limit=0".to_string(), "limit"),
        ("usage?limit=10001".to_string(), "limit"),
        ("usage?from=yesterday".to_string(), "from"),
        (format!("usage?{backwards}"), "from"),
        (format!("quality?{backwards}"), "from"),
        ("quality?modle=m".to_string(), "modle"),
        ("quality?version=1&version=2".to_string(), "version"),
    ] {
        let refused = problem(&server.get(&format!("/api/v1/{path}")).await, 422, "invalid");
        assert_eq!(refused["field"], field, "{path}: {refused}");
        assert!(refused["detail"].as_str().unwrap().starts_with(field), "{refused}");
    }
    let refused = server.post("/api/v1/usage", json!({})).await;
    problem(&refused, 405, "method_not_allowed");
}

#[tokio::test]
async fn a_store_that_is_away_or_slow_is_no_empty_answer() {
    let server = plain().await;
    create(&server, json!({"input": "w1"})).await;
    let get = async |path: &str, timeout: &str| {
        let request = Request::get(path).header("x-request-timeout", timeout).body(Body::empty()).unwrap();
        server.send(request).await
    };
    for path in ["/api/v1/usage", "/api/v1/quality"] {
        server.store.set(Ailment::Away);
        let away = server.get(path).await;
        problem(&away, 503, "store_unavailable");
        assert!(away.headers.contains_key("retry-after"));
        server.store.set(Ailment::Slow(Duration::from_secs(600)));
        problem(&get(path, "20ms").await, 504, "deadline");
        server.store.set(Ailment::None);
        assert_eq!(problem(&get(path, "soon").await, 400, "malformed")["field"], "x-request-timeout");
        assert_eq!(get(path, "20").await.status, StatusCode::OK);
    }
}

#[tokio::test]
async fn the_document_tells_what_numbers_are_refused_with() {
    let server = plain().await;
    let document = server.get("/openapi.json").await.json();
    for path in ["/api/v1/usage", "/api/v1/quality"] {
        let operation = &document["paths"][path]["get"];
        let statuses: Vec<&String> = operation["responses"].as_object().unwrap().keys().collect();
        assert_eq!(statuses, ["200", "400", "422", "500", "503", "504"], "{path}");
        // What is answered has the fields that the document requires.
        create(&server, json!({"input": "w1"})).await;
        let item = &numbers(&server, path).await[0];
        let name = if path.ends_with("usage") { "UsageItem" } else { "QualityItem" };
        let required = document["components"]["schemas"][name]["required"].as_array().unwrap().clone();
        assert!(required.len() > 6, "{required:?}");
        for field in required {
            assert!(item.get(field.as_str().unwrap()).is_some(), "{name}.{field}: {item}");
        }
    }
}
