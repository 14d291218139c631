//! The HTTP routes, called as a function over the fake model.

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{Request, StatusCode};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use common::http::{self, Answer, Server, ok, plain};
use eremois::api::ApiSettings;
use eremois::api::internal::{Background, Internal};
use eremois::api::status::{Envelope, Fault};
use eremois::jobs;
use eremois::serve::Health;
use eremois::serve::policy::BatchLimits;
use eremois::store::record::InferenceId;
use eremois::store::work::{Task, TaskKind};
use serde_json::{Value, json};
use tower::ServiceExt;

/// Asserts a status, a protocol's envelope and what its message says; returns the body.
#[track_caller]
fn refused(answer: &Answer, status: u16, says: &str) -> Value {
    assert_eq!(answer.status.as_u16(), status, "{}", answer.text());
    assert_eq!(answer.header("content-type"), "application/json");
    let body = answer.json();
    let message = match &body["error"] {
        Value::String(message) => {
            assert!(body["error_type"].is_string(), "{body}");
            message
        }
        error => {
            assert!(error["type"].is_string() && error["code"].is_string(), "{body}");
            assert!(error.as_object().unwrap().contains_key("param"), "{body}");
            error["message"].as_str().unwrap()
        }
    };
    assert!(message.contains(says), "`{message}` does not say `{says}`");
    body
}

// ---- OpenAI ------------------------------------------------------------------------------------------

#[tokio::test]
async fn openai_embeds_every_form_of_input() {
    let server = plain().await;
    let w12 = json!([3.0, 2.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0]);
    let w3 = json!([3.0, 1.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    for (input, rows, tokens) in [
        (json!("w1 w2"), vec![&w12], 2),
        (json!(["w1 w2", "w3"]), vec![&w12, &w3], 3),
        (json!([1, 2]), vec![&w12], 2),
        (json!([[1, 2], [3]]), vec![&w12, &w3], 3),
        (json!(["w1 w2", [3]]), vec![&w12, &w3], 3),
    ] {
        let body = ok(&server.post("/v1/embeddings", json!({"model": "fake", "input": input})).await);
        assert_eq!(body["object"], "list");
        assert_eq!(body["model"], "fake");
        assert_eq!(body["usage"], json!({"prompt_tokens": tokens, "total_tokens": tokens}));
        let data = body["data"].as_array().unwrap();
        assert_eq!(data.len(), rows.len());
        for (i, (item, row)) in data.iter().zip(rows).enumerate() {
            assert_eq!(item["object"], "embedding");
            assert_eq!(item["index"], i);
            assert_eq!(&item["embedding"], row);
        }
    }
}

#[tokio::test]
async fn requests_marked_in_this_process_are_background_work_and_others_are_not() {
    let server = http::server(http::settings(), BatchLimits { max_queue_size: 8, ..http::limits() }).await;
    let post = |path: &str, body: &Value, is_marked: bool| {
        // Nothing that a client can send marks a request.
        let request = Request::post(path).header("content-type", "application/json").header("priority", "u=7");
        let mut request = request.body(Body::from(body.to_string())).unwrap();
        if is_marked {
            let mark = Background { deadline: Instant::now() + http::LONG, record_id: InferenceId::new() };
            mark.mark(request.extensions_mut());
        }
        let router = server.router.clone();
        tokio::spawn(async move { router.oneshot(request).await.unwrap().status() })
    };
    let until = async |what: &str, is_so: &dyn Fn() -> bool| {
        let end = Instant::now() + http::LONG;
        while !is_so() {
            assert!(Instant::now() < end, "{what}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let (embeddings, one) = ("/v1/embeddings", json!({"input": [1]}));
    let before = server.controls.num_seqs();
    server.controls.hold();
    let mut asked = vec![post(embeddings, &one, false)];
    until("nothing was launched", &|| server.controls.num_seqs() > before).await;
    // Half of the room is taken with these, and nothing more gets in but what others wait for.
    asked.extend((0..4).map(|_| post(embeddings, &one, true)));
    tokio::time::sleep(Duration::from_millis(50)).await;
    for (path, body) in [
        (embeddings, one.clone()),
        ("/embed", json!({"inputs": "w1"})),
        ("/", json!({"inputs": "w1"})),
        ("/similarity", json!({"inputs": {"source_sentence": "w1", "sentences": ["w2"]}})),
        ("/api/v1/inferences", json!({"input": "w1"})),
    ] {
        assert_eq!(post(path, &body, true).await.unwrap(), StatusCode::TOO_MANY_REQUESTS, "{path}");
        asked.push(post(path, &body, false));
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(asked.iter().all(|asked| !asked.is_finished()), "all of these wait for the device");
    server.controls.release();
    for asked in asked {
        assert_eq!(asked.await.unwrap(), StatusCode::OK);
    }
}

#[tokio::test]
async fn openai_writes_base64_and_cuts_dimensions() {
    let server = plain().await;
    let body = json!({"input": ["w1 w2"], "encoding_format": "base64", "dimensions": 3, "user": "u", "new_field": [1]});
    let body = ok(&server.post("/v1/embeddings", body).await);
    let bytes = BASE64_STANDARD.decode(body["data"][0]["embedding"].as_str().unwrap()).unwrap();
    let values: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(values, [3.0, 2.0, 1.0]);
    // What OpenAI's clients send for fields not set.
    let nulls = json!({"input": "w1", "model": null, "dimensions": null, "encoding_format": null, "user": null});
    ok(&server.post("/v1/embeddings", nulls).await);
}

#[tokio::test]
async fn openai_refusals_name_field_and_limit() {
    let server = plain().await;
    let long = "w1 ".repeat(65);
    let big = format!("{{\"input\": \"{}\"}}", "a".repeat(70_000));
    for (body, status, param, code, says) in [
        (json!({"input": "w1", "model": "gpt-9"}), 404, "model", "model_not_found", "`gpt-9`; served: fake"),
        (json!({"input": []}), 400, "input", "empty", "input must not be empty"),
        (json!({"input": ""}), 400, "input", "empty", "input must not be empty"),
        (json!({"input": ["w1", ""]}), 400, "input[1]", "empty", "input[1] must not be empty"),
        (json!({"input": [[1], []]}), 400, "input[1]", "empty", "input[1] must not be empty"),
        (json!({"input": ["w1", 7.5]}), 400, "input[1]", "malformed", "expected a text, a token id"),
        (json!({"input": [[1], ["x"]]}), 400, "input[1]", "malformed", "a pair has two"),
        (json!({"input": [[1], [2, "x"]]}), 400, "input[1][1]", "malformed", "expected u32"),
        (json!({"input": [["a", "b"]]}), 400, "input[0]", "malformed", "got a pair of texts"),
        (json!({"input": {"a": 1}}), 400, "input", "malformed", "expected a text"),
        (json!({"model": "fake"}), 400, "body", "malformed", "missing field `input`"),
        (json!({"input": "w1", "encoding_format": "int8"}), 400, "encoding_format", "malformed", "base64"),
        (json!({"input": "w1", "dimensions": 0}), 422, "dimensions", "invalid", "1 to 8"),
        (json!({"input": "w1", "dimensions": 9}), 422, "dimensions", "invalid", "1 to 8"),
        (json!({"input": [[1000]]}), 422, "input", "invalid", "token id 1000"),
        (json!({"input": vec!["w1"; 33]}), 413, "input", "too_large", "input has 33 inputs, the limit is 32"),
        (json!({"input": ["w1", long]}), 413, "input[1]", "too_large", "65 tokens, the limit is 64"),
    ] {
        let answer = server.post("/v1/embeddings", body).await;
        let error = &refused(&answer, status, says)["error"];
        assert_eq!((&error["param"], &error["code"]), (&json!(param), &json!(code)));
        assert_eq!(error["type"], "invalid_request_error");
    }
    for (body, status, says) in [
        (big.as_str(), 413, "body has 70013 bytes, the limit is 65536"),
        ("", 400, "body must not be empty"),
        ("{\"input\": \"w1\"", 400, "not JSON: EOF"),
        ("{\"input\": \"w1\"} x", 400, "not JSON: trailing"),
        ("{\"input\": \"\\ud800\"}", 400, "not JSON"),
    ] {
        refused(&server.post_with("/v1/embeddings", body.to_string(), &[]).await, status, says);
    }
}

#[tokio::test]
async fn a_body_of_unknown_length_is_bounded_too() {
    let server = plain().await;
    let chunks = futures::stream::iter((0..100).map(|_| Ok::<_, std::io::Error>(vec![b' '; 1000])));
    let answer = server.post_with("/v1/embeddings", Body::from_stream(chunks), &[]).await;
    refused(&answer, 413, "the limit is 65536");
}

#[tokio::test]
async fn a_body_that_never_ends_is_answered_in_time() {
    let server = plain().await;
    let stuck = Body::from_stream(futures::stream::pending::<Result<Vec<u8>, std::io::Error>>());
    let answer = server.post_with("/embed", stuck, &[("x-request-timeout", "20ms")]).await;
    refused(&answer, 408, "did not arrive within 20ms");
    assert_eq!(answer.header("connection"), "close");
}

#[tokio::test]
async fn openai_lists_models() {
    let server = plain().await;
    let model = json!({"id": "fake", "object": "model", "created": 0, "owned_by": "eremois"});
    assert_eq!(ok(&server.get("/v1/models").await), json!({"object": "list", "data": [model]}));
    // With what TensorFlow Serving's clients ask for at the same address.
    let status = json!({"error_code": "OK", "error_message": ""});
    let mut with_status = model.clone();
    with_status["model_version_status"] = json!([{"version": "1", "state": "AVAILABLE", "status": status}]);
    assert_eq!(ok(&server.get("/v1/models/fake").await), with_status);
    let missing = refused(&server.get("/v1/models/org%2Fname").await, 404, "`org/name`");
    assert_eq!(missing["error"]["code"], "model_not_found");
    refused(&server.get("/v1/models/org/name").await, 404, "`org/name`");
    refused(&server.get("/v1/models/%ff").await, 400, "id: ");
}

// ---- text-embeddings-inference -----------------------------------------------------------------------

#[tokio::test]
async fn tei_embeds_normalised_unless_told_not_to() {
    let server = plain().await;
    let raw = |normalize: Value| json!({"inputs": ["w3 w4"], "normalize": normalize});
    let row = ok(&server.post("/embed", raw(json!(false))).await);
    assert_eq!(row, json!([[7.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0]]));
    // The fake model does not scale; what the device is asked for is what counts.
    for asked in [json!(true), Value::Null] {
        assert_eq!(ok(&server.post("/embed", raw(asked)).await).as_array().unwrap().len(), 1);
    }
    assert_eq!(ok(&server.post("/embed", json!({"inputs": [5, 6], "dimensions": 2})).await), json!([[11.0, 2.0]]));
    let prompted = json!({"inputs": "w5", "prompt_name": "query", "dimensions": 2, "normalize": false});
    assert_eq!(ok(&server.post("/embed", prompted).await), json!([[6.0, 2.0]]));
}

#[tokio::test]
async fn tei_truncates_only_on_demand() {
    let server = plain().await;
    let long = format!("{} w9", "w1 ".repeat(64));
    let asked = |more: Value| {
        let mut body = json!({"inputs": long, "normalize": false, "dimensions": 2});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let body = refused(&server.post("/embed", asked(json!({}))).await, 413, "inputs has 65 tokens, the limit is 64");
    assert_eq!(body["error_type"], "Validation");
    let cut = |direction: &str| asked(json!({"truncate": true, "truncation_direction": direction}));
    assert_eq!(ok(&server.post("/embed", cut("Right")).await), json!([[64.0, 64.0]]));
    assert_eq!(ok(&server.post("/embed", cut("Left")).await), json!([[72.0, 64.0]]));
    assert_eq!(ok(&server.post("/embed", cut("left")).await), json!([[72.0, 64.0]]), "as InferenceClient writes it");
    assert_eq!(ok(&server.post("/embed", asked(json!({"truncate": true}))).await), json!([[64.0, 64.0]]));
}

#[tokio::test]
async fn tei_refusals_have_its_statuses_and_words() {
    let server = plain().await;
    for (path, body, status, error_type, says) in [
        ("/embed", json!({"inputs": []}), 400, "Empty", "inputs must not be empty"),
        ("/embed", json!({"inputs": ["w1", ""]}), 400, "Empty", "inputs[1] must not be empty"),
        ("/embed", json!({"inputs": vec!["w1"; 33]}), 413, "Validation", "inputs has 33 inputs, the limit is 32"),
        ("/embed", json!({"inputs": 7}), 422, "Validation", "inputs: "),
        ("/embed", json!({"inputs": "w1", "prompt_name": "x"}), 422, "Validation", "known: query"),
        ("/embed", json!({"inputs": "w1", "truncation_direction": "up"}), 422, "Validation", "truncation_direction"),
        ("/embed", json!({"inputs": "fail"}), 424, "Backend", "model `fake` failed"),
        ("/tokenize", json!({"inputs": [[1, 2]]}), 422, "Validation", "inputs[0]: expected a text"),
        ("/tokenize", json!({"inputs": "w1", "prompt_name": "x"}), 422, "Validation", "prompt_name"),
        ("/decode", json!({"ids": ["w1"]}), 422, "Validation", "ids[0]: expected token ids"),
        ("/decode", json!({"ids": [[5000]]}), 422, "Validation", "token id 5000"),
        (
            "/similarity",
            json!({"inputs": {"source_sentence": "w1", "sentences": []}}),
            400,
            "Empty",
            "inputs.sentences",
        ),
        (
            "/similarity",
            json!({"inputs": {"source_sentence": "w1", "sentences": vec!["w1"; 32]}}),
            413,
            "Validation",
            "inputs.sentences has 32 inputs, the limit is 31",
        ),
        (
            "/similarity",
            json!({"inputs": {"source_sentence": "", "sentences": ["w1"]}}),
            400,
            "Empty",
            "inputs.source_sentence",
        ),
        (
            "/similarity",
            json!({"inputs": {"source_sentence": "w1", "sentences": ["w1", ""]}}),
            400,
            "Empty",
            "inputs.sentences[1]",
        ),
        ("/similarity", json!({"inputs": {"source_sentence": "w1"}}), 422, "Validation", "sentences"),
    ] {
        let answer = server.post(path, body).await;
        assert_eq!(refused(&answer, status, says)["error_type"], error_type, "{says}");
    }
}

#[tokio::test]
async fn tei_compares_texts() {
    let server = plain().await;
    let body = json!({"inputs": {"source_sentence": "w1 w2", "sentences": ["w1 w2", "w3"]}});
    let cosines = ok(&server.post("/similarity", body.clone()).await);
    // The fake model's rows are not scaled: these are plain products of [3 2 1 2 0 0] with itself and [3 1 3].
    assert_eq!(cosines, json!([18.0, 14.0]));
    assert_eq!(ok(&server.post("/", body).await), cosines, "the client that knows only the base URL");
    let embedded = ok(&server.post("/", json!({"inputs": ["w1"], "dimensions": 1})).await);
    assert_eq!(embedded, json!([[1.0]]));
    assert_eq!(ok(&server.post("/invocations", json!({"inputs": "w1", "dimensions": 1})).await), embedded);
}

#[tokio::test]
async fn tei_tokenizes_and_decodes() {
    let server = plain().await;
    let tokens = ok(&server.post("/tokenize", json!({"inputs": ["w5 w6", "w7"]})).await);
    let second = json!({"id": 6, "text": "w6", "special": false, "start": 3, "stop": 5});
    assert_eq!((&tokens[0][1], tokens.as_array().unwrap().len()), (&second, 2));
    let prompted = ok(&server.post("/tokenize", json!({"inputs": "w5", "prompt_name": "query"})).await);
    assert_eq!((&prompted[0][0]["id"], &prompted[0][1]["id"]), (&json!(1), &json!(5)));
    assert_eq!(ok(&server.post("/decode", json!({"ids": [5, 6]})).await), json!(["w5 w6"]));
    assert_eq!(ok(&server.post("/decode", json!({"ids": [[5], [6]]})).await), json!(["w5", "w6"]));
}

#[tokio::test]
async fn tei_tells_what_it_serves() {
    let server = plain().await;
    let info = ok(&server.get("/info").await);
    assert_eq!(info["model_id"], "fake");
    assert_eq!(info["model_dtype"], "float32");
    assert_eq!(info["model_type"], json!({"embedding": {"pooling": "mean"}}));
    assert_eq!(info["max_input_length"], 64);
    assert_eq!(info["max_batch_tokens"], 256);
    assert_eq!(info["max_client_batch_size"], 32);
    assert_eq!((&info["version"], &info["sha"]), (&json!("0.0.0"), &json!("abc")));
    for path in ["/health", "/ping"] {
        let answer = server.get(path).await;
        assert_eq!((answer.status, answer.body.len()), (StatusCode::OK, 0), "{path}");
    }
}

#[tokio::test]
async fn answers_carry_the_times_of_their_phases() {
    let server = plain().await;
    for (path, field) in [("/embed", "inputs"), ("/v1/embeddings", "input")] {
        let answer = server.post(path, json!({field: ["w1 w2", "w3"]})).await;
        ok(&answer);
        assert_eq!(answer.header("x-compute-type"), "cpu");
        assert_eq!(answer.header("x-compute-tokens"), "3");
        assert_eq!(answer.header("x-compute-characters"), "7");
        for name in ["x-compute-time", "x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time"] {
            assert!(answer.header(name).parse::<u64>().is_ok_and(|ms| ms < 30_000), "{name}");
        }
        assert!(answer.header("server-timing").starts_with("tokenize;dur="));
    }
}

// ---- what all routes share ----------------------------------------------------------------------------

#[tokio::test]
async fn no_route_and_no_method_speak_the_protocol_of_their_path() {
    let server = plain().await;
    assert_eq!(refused(&server.get("/v1/embedding").await, 404, "/v1/embedding")["error"]["code"], "route_not_found");
    assert_eq!(refused(&server.get("/embeds").await, 404, "/openapi.json")["error_type"], "NotFound");
    let answer = server.get("/v1/embeddings").await;
    assert_eq!(refused(&answer, 405, "GET")["error"]["code"], "method_not_allowed");
    assert_eq!(answer.header("allow"), "POST");
    let answer = server.post("/info", json!({})).await;
    assert_eq!(refused(&answer, 405, "POST")["error_type"], "MethodNotAllowed");
}

#[tokio::test]
async fn only_json_is_taken() {
    let server = plain().await;
    for kind in ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin1"] {
        let request = Request::post("/embed").header("content-type", kind).body(Body::from("{}")).unwrap();
        let answer = server.send(request).await;
        refused(&answer, 415, kind);
        assert_eq!(answer.header("accept"), "application/json");
    }
    refused(&server.send(Request::post("/embed").body(Body::from("{}")).unwrap()).await, 415, "content-type: missing");
    refused(&server.post_with("/v1/embeddings", "{}", &[("content-encoding", "zip")]).await, 415, "`zip`");
}

#[tokio::test]
async fn a_request_id_comes_back_or_is_made() {
    let server = plain().await;
    let id_of = async |id: &str| {
        let answer = server.post_with("/embed", r#"{"inputs": "w1"}"#, &[("x-request-id", id)]).await;
        answer.header("x-request-id").to_string()
    };
    assert_eq!(id_of("trace-42").await, "trace-42");
    let is_ours = |id: &str| uuid::Uuid::parse_str(id).is_ok_and(|id| id.get_version_num() == 7);
    for odd in ["", "a b", &"x".repeat(129)] {
        assert!(is_ours(&id_of(odd).await), "`{odd}`");
    }
    assert!(is_ours(server.get("/nothing").await.header("x-request-id")), "refusals have one too");
}

#[tokio::test]
async fn a_deadline_is_kept_while_the_device_is_busy() {
    let server = plain().await;
    *server.controls.per_batch.lock() = Duration::from_millis(300);
    let start = std::time::Instant::now();
    let answer = server.post_with("/v1/embeddings", r#"{"input": "w1"}"#, &[("x-request-timeout", "50ms")]).await;
    assert_eq!(refused(&answer, 504, "within the deadline of")["error"]["type"], "server_error");
    assert!(start.elapsed() < Duration::from_millis(280), "{:?}", start.elapsed());
    refused(&server.post_with("/embed", "{}", &[("x-request-timeout", "soon")]).await, 422, "x-request-timeout: ");
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let server = http::server(http::settings(), BatchLimits { max_queue_size: 2, ..http::limits() }).await;
    *server.controls.per_batch.lock() = Duration::from_millis(200);
    let send = |path: &'static str, field: &'static str| server.post(path, json!({field: ["w1", "w2"]}));
    // At most three of the eight find room: one being computed, one launched behind it, one in the queue.
    let (openai, tei) = tokio::join!(
        futures::future::join_all((0..4).map(|_| send("/v1/embeddings", "input"))),
        futures::future::join_all((0..4).map(|_| send("/embed", "inputs"))),
    );
    let full = |answers: Vec<Answer>| -> Vec<Answer> {
        answers.into_iter().filter(|a| a.status == StatusCode::TOO_MANY_REQUESTS).collect()
    };
    let (openai, tei) = (full(openai), full(tei));
    assert!(!openai.is_empty() && !tei.is_empty());
    for answer in &openai {
        assert_eq!(refused(answer, 429, "(2 entries)")["error"]["type"], "rate_limit_error");
        assert!(answer.header("retry-after").parse::<u64>().is_ok_and(|s| s >= 1));
    }
    for answer in &tei {
        assert_eq!(refused(answer, 429, "full")["error_type"], "Overloaded");
    }
}

#[tokio::test]
async fn a_panic_in_the_model_is_a_500_and_the_next_request_is_served() {
    let server = plain().await;
    let answer = server.post("/v1/embeddings", json!({"input": "panic"})).await;
    let error = &refused(&answer, 500, "model `fake` failed on this batch")["error"];
    assert_eq!((&error["type"], &error["code"]), (&json!("server_error"), &json!("failed")));
    server.wait_for(|health| *health == Health::Ready).await;
    ok(&server.post("/v1/embeddings", json!({"input": "w1"})).await);
}

#[tokio::test]
async fn readiness_follows_the_models() {
    let server = plain().await;
    assert_eq!(ok(&server.get("/health/live").await), json!({"status": "live"}));
    let ready = json!({"status": "ready", "models": [{"name": "fake", "status": "ready", "devices": [{"name": "cpu", "status": "ready"}]}]});
    let answer = ok(&server.get("/health/ready").await);
    assert_eq!((&answer["status"], &answer["models"]), (&ready["status"], &ready["models"]));
    let store = json!({"name": "memory", "status": "healthy", "journal_entries": 0, "since": null});
    assert_eq!(answer["store"], store);

    server.starting.store(true, Ordering::Relaxed);
    let answer = server.get("/health/ready").await;
    assert_eq!((answer.status.as_u16(), &answer.json()["status"]), (503, &json!("loading")));
    assert_eq!(refused(&server.get("/health").await, 503, "loading")["error_type"], "Unhealthy");
    let answer = server.post("/v1/embeddings", json!({"input": "w1", "model": "later"})).await;
    refused(&answer, 503, "model `later` is loading");
    assert_eq!(answer.header("retry-after"), "1");
    server.starting.store(false, Ordering::Relaxed);
    refused(&server.post("/v1/embeddings", json!({"input": "w1", "model": "later"})).await, 404, "`later`");
}

#[tokio::test]
async fn a_draining_server_refuses_and_closes() {
    let server = plain().await;
    assert_eq!(server.engine.drain(http::LONG).await, 0);
    let answer = server.post("/v1/embeddings", json!({"input": "w1"})).await;
    assert_eq!(refused(&answer, 503, "draining")["error"]["code"], "draining");
    assert_eq!(answer.header("connection"), "close");
    assert_eq!(server.get("/health/ready").await.json()["status"], "draining");
    refused(&server.get("/ping").await, 503, "draining");
    assert_eq!(server.get("/health/live").await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_entries_along() {
    let server = plain().await;
    *server.controls.per_batch.lock() = Duration::from_millis(150);
    let before = server.controls.num_batches.load(Ordering::SeqCst);
    let gone = server.post("/embed", json!({"inputs": "w1"}));
    let waiting = async {
        // Behind the first batch; dropped before that is done.
        tokio::time::sleep(Duration::from_millis(30)).await;
        let left = tokio::time::timeout(Duration::from_millis(30), server.post("/embed", json!({"inputs": "w2"})));
        assert!(left.await.is_err());
    };
    let (answer, ()) = tokio::join!(gone, waiting);
    ok(&answer);
    ok(&server.post("/embed", json!({"inputs": "w3"})).await);
    assert_eq!(server.controls.num_batches.load(Ordering::SeqCst) - before, 2, "w2 was never launched");
}

#[tokio::test]
async fn large_answers_are_the_same_off_the_async_threads() {
    // 32 inputs of 8 values are small: many requests' worth are asked at once through a higher limit.
    let settings = ApiSettings { max_client_batch_size: 4096, max_body_bytes: 8 << 20, ..http::settings() };
    let server = http::server(settings, BatchLimits { max_queue_size: 10_000, ..http::limits() }).await;
    let inputs: Vec<String> = (0..3000).map(|i| format!("w{} w1", i % 995)).collect();
    let rows = ok(&server.post("/embed", json!({"inputs": inputs, "dimensions": 8})).await);
    assert_eq!(rows.as_array().unwrap().len(), 3000);
    for (i, row) in rows.as_array().unwrap().iter().enumerate() {
        assert_eq!(row[0], (i % 995 + 1) as f32);
    }
}

#[tokio::test]
async fn metrics_are_plain_text() {
    let answer = plain().await.get("/metrics").await;
    assert_eq!(answer.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    assert_eq!(answer.text(), "# no recorder here\n");
}

// ---- the document ----------------------------------------------------------------------------------------

fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let paths = document["paths"].as_object().unwrap();
    let each = paths.iter().flat_map(|(path, item)| {
        item.as_object().unwrap().iter().map(move |(method, op)| (path.clone(), method.clone(), op.clone()))
    });
    each.collect()
}

/// The ids of a file and of a batch of it that has ended.
async fn file_and_batch(server: &Server) -> (String, String) {
    let form = "--b\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n\
        --b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\nno request\r\n--b--\r\n";
    let request = Request::post("/v1/files").header("content-type", "multipart/form-data; boundary=b");
    let file = ok(&server.send(request.body(Body::from(form)).unwrap()).await)["id"].as_str().unwrap().to_string();
    let body = json!({"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"});
    let batch = ok(&server.post("/v1/batches", body).await)["id"].as_str().unwrap().to_string();
    let endpoints = Arc::new(Internal::new(server.state.clone()));
    let handlers = jobs::batch::handlers(&server.tasks, &server.state.jobs, endpoints);
    let (_, split) = handlers.iter().find(|(kind, _)| *kind == TaskKind::Batch).unwrap();
    let (id, due_at) = (batch.clone(), eremois::store::record::now());
    split.run(&Task { id, kind: TaskKind::Batch, payload: Value::Null, due_at, attempts: 1 }).await.unwrap();
    (file, batch)
}

#[tokio::test]
async fn the_document_has_every_route_and_its_examples_work() {
    let server = plain().await;
    let document = ok(&server.get("/openapi.json").await);
    assert_eq!(document["openapi"], "3.1.0");
    assert_eq!(document["info"]["version"], "0.0.0");
    let mut routes: Vec<String> = operations(&document).into_iter().map(|(path, m, _)| format!("{m} {path}")).collect();
    routes.sort();
    let expected = "delete /api/v1/inferences/{id},delete /api/v1/users/{user}/inferences,delete /v1/files/{id},get /api/v1/inferences,\
        get /api/v1/inferences/{id},get /api/v1/inferences/{id}/events,get /api/v1/quality,get /api/v1/usage,get /health,get /health/live,get /health/ready,get /info,get /metrics,get /openapi.json,get /ping,\
        get /v1/batches,get /v1/batches/{id},get /v1/batches/{id}/events,get /v1/files,get /v1/files/{id},get /v1/files/{id}/content,\
        get /v1/models,get /v1/models/{id},get /v1/models/{id}/labels/{label},get /v1/models/{id}/metadata,get /v1/models/{id}/versions/{version},\
        get /v2,get /v2/health/live,get /v2/health/ready,get /v2/models/stats,\
        get /v2/models/{model},get /v2/models/{model}/config,get /v2/models/{model}/ready,get /v2/models/{model}/stats,\
        get /v2/models/{model}/versions/{version},get /v2/models/{model}/versions/{version}/config,\
        get /v2/models/{model}/versions/{version}/ready,get /v2/models/{model}/versions/{version}/stats,post /,post /api/v1/inferences,post /api/v1/inferences/{id}/feedback,post /decode,post /embed,post /embed_all,post /embed_sparse,post /invocations,post /predict,post /rerank,post /similarity,\
        post /tokenize,post /v1/batches,post /v1/batches/{id}/cancel,post /v1/embed,post /v1/embeddings,post /v1/files,\
        post /v1/models/{id}:classify,post /v1/models/{id}:predict,post /v1/models/{id}:regress,post /v1/rerank,\
        post /v2/embed,post /v2/models/{model}/infer,post /v2/models/{model}/versions/{version}/infer,post /v2/repository/index,\
        post /v2/repository/models/{model}/load,post /v2/repository/models/{model}/unload,post /v2/rerank,post /vertex";
    assert_eq!(routes.join(","), expected);

    let kept = ok(&server.post("/api/v1/inferences", json!({"input": "w1"})).await);
    let kept = kept["id"].as_str().unwrap();
    let (file, batch) = file_and_batch(&server).await;
    let mut num_examples = 0;
    for (path, method, operation) in operations(&document) {
        assert!(operation["summary"].is_string() && operation["tags"].is_array(), "{method} {path}");
        let ids = [("/api", kept), ("/v1/files", &file), ("/v1/batches", &batch), ("/v1/models", "fake")];
        let id = ids.iter().find(|(prefix, _)| path.starts_with(prefix)).map_or("", |(_, id)| *id);
        let path =
            path.replace("{id}", id).replace("{model}", "fake").replace("{version}", "1").replace("{label}", "stable");
        if method == "get" {
            let answer = server.get(&path).await;
            assert_eq!(answer.status, StatusCode::OK, "{path}");
            continue;
        }
        if method == "delete" {
            continue; // tests/inferences.rs, tests/batches/files.rs
        }
        let content = &operation["requestBody"]["content"]["application/json"];
        let one = content.get("example").cloned();
        let many = content["examples"].as_object().into_iter().flatten().map(|(_, e)| e["value"].clone());
        for mut example in one.into_iter().chain(many) {
            num_examples += 1;
            if let Some(id) = example.get_mut("input_file_id") {
                *id = json!(file);
            }
            let answer = server.post(&path, example.clone()).await;
            if ["/embed_sparse", "/predict", "/rerank", "/v1/rerank", "/v2/rerank"].contains(&path.as_str()) {
                // Of other tasks than the model's: tests/tasks.rs has models for them.
                assert_eq!(answer.status.as_u16(), 422, "{path} {example}: {}", answer.text());
                assert!(answer.text().contains("does `embed`"), "{path} {example}: {}", answer.text());
                continue;
            }
            if path.ends_with(":classify") || path.ends_with(":regress") {
                // tests/tensors.rs has models for these.
                assert_eq!(answer.status.as_u16(), 400, "{path} {example}: {}", answer.text());
                assert!(answer.text().contains("is `embed`"), "{path} {example}: {}", answer.text());
                continue;
            }
            assert!(answer.status.is_success(), "{path} {example}: {}", answer.text());
        }
    }
    assert!(num_examples >= 12, "{num_examples}");
    refused(&server.get("/v1/models/other").await, 404, "`other`");
}

#[tokio::test]
async fn the_document_tells_every_refusal_of_an_operation() {
    let server = plain().await;
    let document = ok(&server.get("/openapi.json").await);
    let statuses = |path: &str, method: &str| -> Vec<String> {
        document["paths"][path][method]["responses"].as_object().unwrap().keys().cloned().collect()
    };
    let openai = ["200", "400", "404", "406", "408", "413", "415", "422", "429", "500", "503", "504"];
    assert_eq!(statuses("/v1/embeddings", "post"), openai);
    assert_eq!(statuses("/v2/embed", "post"), openai);
    assert_eq!(
        statuses("/embed", "post"),
        ["200", "400", "406", "408", "413", "415", "422", "424", "429", "500", "503", "504"]
    );
    assert_eq!(statuses("/v1/files", "post"), ["200", "400", "408", "413", "415", "422", "500", "503"]);
    assert_eq!(statuses("/v1/files/{id}", "delete"), ["200", "400", "404", "409", "500", "503"]);
    assert_eq!(
        statuses("/v1/batches", "post"),
        ["200", "400", "404", "408", "409", "413", "415", "422", "500", "503", "504"]
    );
    assert_eq!(
        statuses("/v2/models/{model}/infer", "post"),
        ["200", "400", "404", "408", "413", "415", "422", "429", "500", "503", "504"]
    );
    assert_eq!(statuses("/v2/models/{model}", "get"), ["200", "400", "404", "500", "503"]);
    assert_eq!(
        statuses("/v2/repository/models/{model}/load", "post"),
        ["200", "400", "404", "408", "409", "413", "415", "422", "500", "503"]
    );
    assert_eq!(statuses("/v1/batches", "get"), ["200", "422", "500", "503"]);
    assert_eq!(
        statuses("/v1/models/{id}:predict", "post"),
        ["200", "400", "404", "408", "413", "415", "429", "500", "503", "504"]
    );
    assert_eq!(statuses("/v1/models/{id}/metadata", "get"), ["200", "400", "404", "500", "503"]);
    // Every reference leads somewhere.
    let text = document.to_string();
    for reference in text.split("\"$ref\":\"#").skip(1).map(|rest| rest.split('"').next().unwrap()) {
        assert!(document.pointer(reference).is_some(), "{reference}");
    }
}

#[tokio::test]
async fn the_page_of_the_document_is_served_from_the_binary() {
    let server = plain().await;
    assert_eq!(server.get("/docs").await.header("location"), "/docs/");
    let page = server.get("/docs/").await;
    assert_eq!(page.status, StatusCode::OK);
    assert!(page.text().contains("swagger-ui"));
    let script = server.get("/docs/swagger-initializer.js").await;
    assert!(script.text().contains("openapi.json"), "{}", script.text());
    assert_eq!(server.get("/docs/swagger-ui-bundle.js").await.status, StatusCode::OK);
}

#[test]
fn the_page_on_refusals_is_the_table() {
    let page = include_str!("../docs/api.md");
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
    for fault in Fault::samples() {
        let class = fault.class();
        let word = Envelope::Tei.body(&fault)["error_type"].as_str().unwrap().to_string();
        let ours = format!("| {} | {} `{word}` |", class.status.as_u16(), class.tei_status.as_u16());
        let kind = format!("`{}`", class.kind.as_str());
        assert!(rows.iter().any(|row| row.contains(&kind) && row.contains(&ours)), "no row with {kind} and {ours}");
    }
}

/// Counts are read as a scrape sees them. The recorder is this thread's, and so is the runtime.
#[tokio::test]
async fn requests_are_counted_by_route_model_and_outcome() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let server = plain().await;
    let _guard = metrics::set_default_local_recorder(&recorder);
    ok(&server.post("/v1/embeddings", json!({"input": "w1"})).await);
    ok(&server.post("/v1/embeddings", json!({"input": "w1"})).await);
    refused(&server.post("/v1/embeddings", json!({"input": []})).await, 400, "empty");
    refused(&server.get("/some/path/of/a/scanner").await, 404, "no route");
    server.starting.store(true, Ordering::Relaxed);
    assert_eq!(server.get("/health/ready").await.status, StatusCode::SERVICE_UNAVAILABLE);
    server.starting.store(false, Ordering::Relaxed);
    *server.controls.per_batch.lock() = Duration::from_millis(100);
    let left = tokio::time::timeout(Duration::from_millis(20), server.post("/embed", json!({"inputs": "w2"})));
    assert!(left.await.is_err());

    let text = recorder.handle().render();
    for line in [
        r#"eremois_http_requests_total{route="/v1/embeddings",model="fake",outcome="ok"} 2"#,
        r#"eremois_http_requests_total{route="/v1/embeddings",model="none",outcome="empty"} 1"#,
        r#"eremois_http_requests_total{route="unmatched",model="none",outcome="route_not_found"} 1"#,
        r#"eremois_http_requests_total{route="/embed",model="none",outcome="cancelled"} 1"#,
        r#"eremois_http_request_duration_seconds_count{route="/v1/embeddings",method="POST",status="2xx"} 2"#,
        r#"eremois_http_request_duration_seconds_count{route="/v1/embeddings",method="POST",status="4xx"} 1"#,
        r#"eremois_http_requests_total{route="/health/ready",model="none",outcome="not_ready"} 1"#,
        "eremois_http_requests_in_flight 0",
    ] {
        assert!(text.contains(line), "no `{line}` in\n{text}");
    }
    assert!(!text.contains("scanner"), "a path of a client's making is no label");
}

#[test]
fn the_table_answers_every_fault_in_both_envelopes() {
    let mut seen = std::collections::BTreeSet::new();
    for fault in Fault::samples() {
        let class = fault.class();
        seen.insert(class.kind);
        for status in [class.status, class.tei_status] {
            assert!(status.is_client_error() || status.is_server_error(), "{fault:?}");
        }
        let openai = Envelope::OpenAi.body(&fault);
        assert_eq!(openai["error"]["message"], fault.message());
        assert_eq!(openai["error"]["code"], class.kind.as_str());
        assert_eq!(Envelope::Tei.body(&fault)["error"], fault.message());
        assert_eq!(Envelope::Cohere.body(&fault)["message"], fault.message());
    }
    assert_eq!(seen.len(), 24, "a sample of every kind");
}
