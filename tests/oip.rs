//! The Open Inference Protocol over REST, called as a function over the fake model.

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use common::http::{self, Answer, Server, ok, plain, refused_plainly as refused};
use eremois::inference::keep::Scope;
use eremois::serve::Health;
use serde_json::{Value, json};

const INFER: &str = "/v2/models/fake/infer";
/// What the fake model answers for `w1 w2` and for `w3`.
const W12: [f32; 8] = [3.0, 2.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0];
const W3: [f32; 8] = [3.0, 1.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0];

/// Both, one after the other.
fn both() -> Vec<f32> {
    [W12, W3].concat()
}

fn text(texts: &[&str]) -> Value {
    json!({"name": "text", "shape": [texts.len()], "datatype": "BYTES", "data": texts})
}

fn packed_texts(texts: &[&str]) -> Vec<u8> {
    texts.iter().flat_map(|t| [&(t.len() as u32).to_le_bytes()[..], t.as_bytes()].concat()).collect()
}

/// An input of the binary form.
fn binary(name: &str, datatype: &str, shape: &[usize], bytes: &[u8]) -> Value {
    json!({"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": bytes.len()}})
}

/// Posts a head and what follows it, without a content type, as `tritonclient` does.
async fn post_binary(server: &Server, head: Value, tail: &[u8]) -> Answer {
    let head = head.to_string();
    let request = Request::post(INFER).header("Inference-Header-Content-Length", head.len());
    server.send(request.body(Body::from([head.as_bytes(), tail].concat())).unwrap()).await
}

/// The head of a binary answer and the floats behind it.
#[track_caller]
fn split(answer: &Answer) -> (Value, Vec<f32>) {
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert_eq!(answer.header("content-type"), "application/octet-stream");
    let (head, tail) = answer.body.split_at(answer.header("inference-header-content-length").parse().unwrap());
    let (chunks, rest) = tail.as_chunks::<4>();
    assert!(rest.is_empty());
    (serde_json::from_slice(head).unwrap(), chunks.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect())
}

#[tokio::test]
async fn texts_go_in_and_embeddings_come_out() {
    let server = plain().await;
    let shapes = [(json!([2]), json!(["w1 w2", "w3"])), (json!([2, 1]), json!([["w1 w2"], ["w3"]]))];
    for (path, (shape, data)) in [INFER, "/v2/models/fake/versions/1/infer"].iter().zip(shapes) {
        let input = json!({"name": "text", "shape": shape, "datatype": "BYTES", "data": data});
        let answer = server.post(path, json!({"id": "a-1", "inputs": [input], "more": {"is": "ignored"}})).await;
        let outputs = json!([{"name": "embedding", "datatype": "FP32", "shape": [2, 8], "data": both()}]);
        assert_eq!(ok(&answer), json!({"model_name": "fake", "model_version": "1", "id": "a-1", "outputs": outputs}));
        assert_eq!(answer.header("x-compute-tokens"), "3");
    }
}

#[tokio::test]
async fn token_ids_go_in_without_their_padding() {
    let server = plain().await;
    let infer = async |inputs: Value| ok(&server.post(INFER, json!({"inputs": inputs})).await)["outputs"][0].clone();
    let ids = json!({"name": "input_ids", "shape": [2, 2], "datatype": "INT64", "data": [[1, 2], [3, 0]]});
    let mask = json!({"name": "attention_mask", "shape": [2, 2], "datatype": "INT32", "data": [1, 1, 1, 0]});
    let types = json!({"name": "token_type_ids", "shape": [2, 2], "datatype": "INT64", "data": [0, 0, 0, 0]});
    assert_eq!(infer(json!([mask, ids, types])).await["data"], json!(both()));
    // Without a mask what is written is what is meant.
    let unmasked = infer(json!([ids])).await;
    assert_eq!(unmasked["data"][9], 2.0, "two tokens: {unmasked}");

    let bytes: Vec<u8> = [1i32, 2, 3, 0].iter().flat_map(|id| id.to_le_bytes()).collect();
    let ones: Vec<u8> = [1i64, 1, 1, 0].iter().flat_map(|id| id.to_le_bytes()).collect();
    let inputs = [binary("input_ids", "INT32", &[2, 2], &bytes), binary("attention_mask", "INT64", &[2, 2], &ones)];
    let answer = post_binary(&server, json!({"inputs": inputs}), &[bytes, ones].concat()).await;
    assert_eq!(ok(&answer)["outputs"][0]["data"], json!(both()));
}

#[tokio::test]
async fn binary_tensors_go_both_ways() {
    let server = plain().await;
    let bytes = packed_texts(&["w1 w2", "w3"]);
    let inputs = json!([binary("text", "BYTES", &[2], &bytes)]);
    let output = |is_binary: bool| json!([{"name": "embedding", "parameters": {"binary_data": is_binary}}]);
    let values = both();
    for asks in [
        json!({"inputs": inputs, "outputs": output(true)}),
        json!({"inputs": inputs, "parameters": {"binary_data_output": true}}),
    ] {
        let (head, floats) = split(&post_binary(&server, asks, &bytes).await);
        let parameters = json!({"binary_data_size": 64});
        let outputs = json!([{"name": "embedding", "datatype": "FP32", "shape": [2, 8], "parameters": parameters}]);
        assert_eq!(head, json!({"model_name": "fake", "model_version": "1", "outputs": outputs}));
        assert_eq!(floats, values);
    }
    // An output's own word goes before the request's, and JSON may ask for binary.
    let json_output = json!({"inputs": inputs, "outputs": output(false), "parameters": {"binary_data_output": true}});
    assert_eq!(ok(&post_binary(&server, json_output, &bytes).await)["outputs"][0]["data"], json!(values));
    let from_json = json!({"inputs": [text(&["w3"])], "outputs": output(true)});
    assert_eq!(split(&server.post(INFER, from_json).await).1, W3);
}

#[tokio::test]
async fn parameters_say_how_embeddings_are_made() {
    let server = plain().await;
    let infer = async |parameters: Value| {
        server.post(INFER, json!({"inputs": [text(&["w2"])], "parameters": parameters})).await
    };
    let data = |answer: Answer| ok(&answer)["outputs"][0].clone();
    let cut = data(infer(json!({"dimensions": 3, "priority": 1, "sequence_id": 7, "normalize": false})).await);
    assert_eq!((&cut["shape"], &cut["data"]), (&json!([1, 3]), &json!([2.0, 1.0, 2.0])));
    // The prompt is `w1 `.
    assert_eq!(data(infer(json!({"prompt_name": "query"})).await)["data"], json!(W12));
    refused(&infer(json!({"prompt_name": "no"})).await, 422, "parameters.prompt_name");
    refused(&infer(json!({"dimensions": 9})).await, 422, "parameters.dimensions");
    refused(&infer(json!({"dimensions": "9"})).await, 400, "parameters.dimensions");

    let long = "w1 ".repeat(http::MAX_SEQ_LEN) + "w2";
    let asks = |parameters: Value| json!({"inputs": [text(&["w3", &long])], "parameters": parameters});
    refused(&server.post(INFER, asks(json!({}))).await, 413, "text[1] has 65 tokens, the limit is 64");
    let left = ok(&server.post(INFER, asks(json!({"truncate": true, "truncation_direction": "Left"}))).await);
    assert_eq!(left["outputs"][0]["data"][8], 65.0, "63 of w1, and w2");
}

#[tokio::test]
async fn a_timeout_shortens_the_deadline() {
    let server = plain().await;
    server.controls.hold();
    let asks = |timeout: u64| json!({"inputs": [text(&["w1"])], "parameters": {"timeout": timeout}});
    refused(&server.post(INFER, asks(20_000)).await, 504, "within the deadline");
    server.controls.release();
    // None, and one above the server's own.
    for timeout in [0, u64::MAX] {
        ok(&server.post(INFER, asks(timeout)).await);
    }
}

#[tokio::test]
async fn what_the_model_does_not_take_is_told() {
    let server = plain().await;
    let inputs = |input: Value| json!({"inputs": [input]});
    let ids = |shape: Value, data: Value| {
        inputs(json!({"name": "input_ids", "shape": shape, "datatype": "INT64", "data": data}))
    };
    let asks_for = |output: Value| json!({"inputs": [text(&["w1"])], "outputs": [output]});
    let many = vec!["w1"; 33];
    for (body, status, says) in [
        (json!({}), 400, "missing field `inputs`"),
        (json!({"inputs": []}), 400, "inputs: expected the tensor `text` or `input_ids`"),
        (inputs(text(&[])), 400, "text must not be empty"),
        (inputs(text(&[""])), 400, "text must not be empty"),
        (inputs(text(&["w1", ""])), 400, "text[1] must not be empty"),
        (inputs(text(&many)), 413, "text has 33 inputs, the limit is 32"),
        (inputs(json!({"name": "images", "shape": [1], "datatype": "UINT8", "data": [1]})), 422, "inputs[0].name"),
        (
            inputs(json!({"name": "text", "shape": [1], "datatype": "FP32", "data": [1]})),
            422,
            "expected BYTES, got FP32",
        ),
        (
            inputs(json!({"name": "text", "shape": [1, 2], "datatype": "BYTES", "data": ["a", "b"]})),
            422,
            "[n] or [n, 1]",
        ),
        (inputs(json!({"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a"]})), 400, "has 1 elements"),
        (
            inputs(json!({"name": "text", "shape": [1], "datatype": "BYTES", "data": [1]})),
            400,
            "expected texts, got numbers",
        ),
        (ids(json!([1, 2]), json!([[1], [2]])), 400, "nested as [2, 1], its shape is [1, 2]"),
        (ids(json!([1, 1]), json!([5000])), 422, "input_ids: token id 5000"),
        (ids(json!([2, 1]), json!([1, 5000])), 422, "input_ids[1]: token id 5000"),
        (ids(json!([1, 1]), json!([-1])), 422, "input_ids[0]: -1 is no token id"),
        (asks_for(json!({"name": "logits"})), 422, "no output is named `logits`; known: embedding"),
        (asks_for(json!({"name": "embedding", "parameters": {"classification": 3}})), 422, "has no classes"),
        (
            asks_for(json!({"name": "embedding", "parameters": {"shared_memory_region": "r"}})),
            422,
            "outputs[0].parameters.shared_memory_region",
        ),
    ] {
        refused(&server.post(INFER, body.clone()).await, status, says);
    }
    let bytes = packed_texts(&["w1"]);
    let head = |len: usize| json!({"inputs": [binary("text", "BYTES", &[1], &bytes[..len])]});
    refused(
        &post_binary(&server, head(bytes.len()), &bytes[1..]).await,
        400,
        "binary_data_size: is 6, 5 bytes are left",
    );
    refused(&post_binary(&server, head(5), &bytes).await, 400, "1 bytes are left behind the last tensor");
    refused(&post_binary(&server, head(5), &bytes[..5]).await, 400, "text: its bytes end within element 0");
    refused(&server.post(INFER, head(6)).await, 400, "0 bytes are left");
    let with = [("inference-header-content-length", "-1")];
    refused(&server.post_with(INFER, "{}", &with).await, 400, "inference-header-content-length");
    refused(&server.post_with(INFER, vec![b' '; 65 << 10], &[]).await, 413, "body has");
}

/// A page of another site can have a browser send these without asking first.
#[tokio::test]
async fn what_pages_send_unasked_is_refused() {
    let server = plain().await;
    let body = json!({"inputs": [text(&["w1"])]}).to_string();
    let send = async |headers: &[(&str, &str)]| {
        let request = headers.iter().fold(Request::post(INFER), |request, (name, value)| request.header(*name, *value));
        server.send(request.body(Body::from(body.clone())).unwrap()).await
    };
    ok(&send(&[]).await);
    ok(&send(&[("content-type", "application/json"), ("origin", "http://a.example")]).await);
    ok(&send(&[("content-type", "application/octet-stream")]).await);
    refused(&send(&[("content-type", "text/plain")]).await, 415, "content-type");
    refused(&send(&[("content-type", "application/x-www-form-urlencoded")]).await, 415, "content-type");
    refused(&send(&[("origin", "http://a.example")]).await, 415, "content-type");
    refused(&send(&[("content-encoding", "snappy")]).await, 415, "content-encoding");
}

#[tokio::test]
async fn server_and_models_describe_themselves() {
    let server = plain().await;
    let about = ok(&server.get("/v2").await);
    assert_eq!((&about["name"], &about["version"]), (&json!("eremois"), &json!("0.0.0")));
    assert!(about["extensions"].as_array().unwrap().contains(&json!("binary_tensor_data")));
    let ids = |name: &str| json!({"name": name, "datatype": "INT64", "shape": [-1, -1]});
    let others = json!([[ids("input_ids"), ids("attention_mask"), ids("token_type_ids")]]);
    let expected = json!({
        "name": "fake", "versions": ["1"], "platform": "eremois_fake",
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1, 1]}],
        "outputs": [{"name": "embedding", "datatype": "FP32", "shape": [-1, 8]}],
    });
    for path in ["/v2/models/fake", "/v2/models/fake/versions/1"] {
        assert_eq!(ok(&server.get(path).await), expected);
        let config = ok(&server.get(&format!("{path}/config")).await);
        assert_eq!((&config["name"], &config["max_batch_size"]), (&json!("fake"), &json!(32)));
        let text = json!({"name": "text", "data_type": "TYPE_STRING", "dims": [1], "optional": false});
        assert_eq!(config["input"], json!([text]));
        let told: Value =
            serde_json::from_str(config["parameters"]["other_inputs"]["string_value"].as_str().unwrap()).unwrap();
        assert_eq!(told, others);
        assert_eq!(config["response_cache"], json!({"enable": false}));
        assert_eq!(config["output"], json!([{"name": "embedding", "data_type": "TYPE_FP32", "dims": [8]}]));
        assert_eq!(config["instance_group"][0]["kind"], "KIND_CPU");
        assert_eq!(config["dynamic_batching"]["preferred_batch_size"], json!([8]));
        assert_eq!(ok(&server.get(&format!("{path}/ready")).await), json!({"name": "fake", "ready": true}));
    }
    for path in ["", "/ready", "/config", "/stats"] {
        refused(&server.get(&format!("/v2/models/other{path}")).await, 404, "no model is named `other`");
        refused(&server.get(&format!("/v2/models/fake/versions/7{path}")).await, 404, "the id `7`");
        // Names of the hub have a slash.
        refused(&server.get(&format!("/v2/models/org/name{path}")).await, 404, "no model is named `org/name`");
    }
    refused(&server.get("/v2/health/nothing").await, 404, "no route");
    refused(&server.get("/v2/models/%ff").await, 400, "model");
    refused(&server.get(INFER).await, 405, "GET");
}

#[tokio::test]
async fn health_is_that_of_the_models() {
    let server = plain().await;
    assert_eq!(ok(&server.get("/v2/health/live").await), json!({"live": true}));
    assert_eq!(ok(&server.get("/v2/health/ready").await), json!({"ready": true}));
    server.starting.store(true, Ordering::Relaxed);
    refused(&server.get("/v2/health/ready").await, 503, "loading");
    refused(&server.get("/v2/models/other/ready").await, 503, "loading");
    server.starting.store(false, Ordering::Relaxed);
    server.controls.broken.store(true, Ordering::SeqCst);
    refused(&server.post(INFER, json!({"inputs": [text(&["w1"])]})).await, 500, "failed");
    server.wait_for(|health| matches!(health, Health::Unhealthy(_))).await;
    refused(&server.get("/v2/health/ready").await, 503, "not healthy");
    refused(&server.get("/v2/models/fake/ready").await, 503, "not healthy");
    ok(&server.get("/v2/health/live").await);
    let index = server.post("/v2/repository/index", json!({})).await;
    assert_eq!(ok(&index)[0]["state"], "UNAVAILABLE");
    assert_eq!(ok(&server.post("/v2/repository/index", json!({"ready": true})).await), json!([]));
}

#[tokio::test]
async fn the_index_lists_what_is_served_and_nothing_is_loaded_unless_the_settings_say_so() {
    let server = plain().await;
    let entry = json!([{"name": "fake", "version": "1", "state": "READY", "reason": ""}]);
    let bare = Request::post("/v2/repository/index").body(Body::empty()).unwrap();
    assert_eq!(ok(&server.send(bare).await), entry);
    assert_eq!(ok(&server.post("/v2/repository/index", json!({"ready": true})).await), entry);
    for (path, says) in [
        ("fake/load", "`fake` cannot be loaded"),
        ("fake/unload", "`fake` cannot be unloaded"),
        ("org/name/load", "`org/name` cannot be loaded"),
    ] {
        let request = Request::post(format!("/v2/repository/models/{path}")).body(Body::from("{}")).unwrap();
        refused(&server.send(request).await, 422, says);
    }
}

#[tokio::test]
async fn statistics_count_what_was_computed() {
    let server = plain().await;
    let none = ok(&server.get("/v2/models/stats").await);
    let stats = &none["model_stats"][0];
    assert_eq!((&stats["name"], &stats["version"]), (&json!("fake"), &json!("1")));
    for count in ["last_inference", "inference_count", "execution_count"] {
        assert_eq!(stats[count], 0, "the warm-up is nobody's inference");
    }
    *server.controls.per_batch.lock() = Duration::from_millis(5);
    ok(&server.post(INFER, json!({"inputs": [text(&["w1 w2", "w3", "w4"])]})).await);
    // Of any protocol.
    ok(&server.post("/embed", json!({"inputs": "w1"})).await);
    refused(&server.post(INFER, json!({"inputs": [text(&["fail"])]})).await, 500, "failed");
    let stats = ok(&server.get("/v2/models/fake/stats").await)["model_stats"][0].clone();
    assert_eq!((&stats["inference_count"], &stats["execution_count"]), (&json!(4), &json!(2)));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64;
    let last = stats["last_inference"].as_u64().unwrap();
    assert!(last <= now && now - last < http::LONG.as_millis() as u64, "{stats}");
    let of = |name: &str| {
        let timed = &stats["inference_stats"][name];
        (timed["count"].as_u64().unwrap(), timed["ns"].as_u64().unwrap())
    };
    let (num_computed, success_ns) = of("success");
    assert_eq!((num_computed, of("fail").0), (2, 1));
    assert_eq!((of("compute_output"), of("cache_hit"), of("cache_miss")), ((2, 0), (0, 0), (0, 0)));
    for phase in ["queue", "compute_input", "compute_infer"] {
        let (count, ns) = of(phase);
        assert!(count == 2 && ns <= success_ns, "{phase}: {stats}");
    }
    assert!(of("compute_infer").1 >= 10_000_000, "two batches of 5 ms each: {stats}");
    let version = ok(&server.get("/v2/models/fake/versions/1/stats").await);
    assert_eq!(version["model_stats"][0], stats);
}

#[tokio::test]
async fn results_are_kept_where_everybodys_are() {
    let server = http::server_that_keeps(http::settings(), http::limits(), None, Scope::All).await;
    ok(&server.post(INFER, json!({"inputs": [text(&["w1 w2"])], "parameters": {"dimensions": 3}})).await);
    let list = ok(&server.get("/api/v1/inferences").await);
    let kept = &list["data"][0];
    assert_eq!(list["data"].as_array().unwrap().len(), 1);
    assert_eq!((&kept["source"], &kept["model"]), (&json!("oip"), &json!("fake")));
    assert_eq!(kept["parameters"]["dimensions"], 3);
}

#[tokio::test]
async fn requests_at_once_share_batches() {
    let server = Arc::new(plain().await);
    server.controls.hold();
    let asked: Vec<_> = (0..9)
        .map(|i| {
            let server = server.clone();
            let body = json!({"inputs": [text(&[&format!("w{i}")])], "parameters": {"binary_data_output": true}});
            tokio::spawn(async move { server.post(INFER, body).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    server.controls.release();
    for (i, asked) in asked.into_iter().enumerate() {
        let (_, floats) = split(&asked.await.unwrap());
        assert_eq!(floats[..3], [i as f32, 1.0, i as f32]);
    }
    let largest = server.controls.batch_sizes.lock().iter().copied().max();
    assert!(largest > Some(1), "what waited was computed together: {largest:?}");
}
