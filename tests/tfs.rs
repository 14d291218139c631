//! TensorFlow Serving's REST protocol, called as a function over the fake model.

mod common;

use std::sync::atomic::Ordering;

use axum::body::Body;
use axum::http::Request;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use common::fake;
use common::http::{self, Server, ok, plain, refused_plainly as refused};
use eremois::api::ApiSettings;
use eremois::api::status::{Envelope, Fault};
use eremois::inference::keep::Scope;
use eremois::serve::policy::BatchLimits;
use serde_json::{Value, json};

const PREDICT: &str = "/v1/models/fake:predict";

// Rows of the fake model: the sum and the count of the ids, then the first of them.
fn w12() -> Value {
    json!([3.0, 2.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0])
}

fn w3() -> Value {
    json!([3.0, 1.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0])
}

#[tokio::test]
async fn rows_are_answered_by_predictions_and_columns_by_outputs() {
    let server = plain().await;
    let b64 = |text: &str| json!({"b64": BASE64_STANDARD.encode(text)});
    let both = json!([w12(), w3()]);
    for instances in [
        json!(["w1 w2", "w3"]),
        json!([{"text": "w1 w2"}, {"text": "w3"}]),
        json!([b64("w1 w2"), "w3"]),
        json!([{"text": b64("w1 w2")}, {"text": "w3"}]),
    ] {
        let body = ok(&server.post(PREDICT, json!({"instances": instances})).await);
        assert_eq!(body, json!({"predictions": both}), "{instances}");
    }
    for inputs in [json!(["w1 w2", "w3"]), json!({"text": ["w1 w2", "w3"]}), json!({"text": [b64("w1 w2"), b64("w3")]})]
    {
        let body = ok(&server.post(PREDICT, json!({"inputs": inputs})).await);
        assert_eq!(body, json!({"outputs": both}), "{inputs}");
    }
    // The default by its name, by an empty one, by none; and what is not known is ignored.
    for name in [json!("serving_default"), json!(""), Value::Null] {
        let body = json!({"signature_name": name, "instances": ["w3"], "inputs": null, "more": 1});
        assert_eq!(ok(&server.post(PREDICT, body).await), json!({"predictions": [w3()]}));
    }
}

#[tokio::test]
async fn token_ids_are_a_signature_of_their_own() {
    let server = plain().await;
    let ask = async |form: &str, value: Value| {
        ok(&server.post(PREDICT, json!({"signature_name": "input_ids", form: value})).await)
    };
    let both = json!([w12(), [10.0, 2.0, 3.0, 7.0, 0.0, 0.0, 0.0, 0.0]]);
    for instances in [json!([[1, 2], [3, 7]]), json!([{"input_ids": [1, 2]}, {"input_ids": [3, 7]}])] {
        assert_eq!(ask("instances", instances).await, json!({"predictions": both}));
    }
    for inputs in [json!([[1, 2], [3, 7]]), json!({"input_ids": [[1, 2], [3, 7]]})] {
        assert_eq!(ask("inputs", inputs).await, json!({"outputs": both}));
    }
}

#[tokio::test]
async fn many_values_are_read_off_the_async_threads() {
    let settings = ApiSettings { max_client_batch_size: 1000, max_body_bytes: 1 << 20, ..http::settings() };
    let server = http::server(settings, BatchLimits { max_queue_size: 1000, ..http::limits() }).await;
    let mut rows = vec![vec![1u32; 20]; 500];
    let body = json!({"signature_name": "input_ids", "instances": rows});
    let predictions = ok(&server.post(PREDICT, body).await)["predictions"].take();
    assert_eq!(predictions.as_array().map(Vec::len), Some(500));
    assert_eq!(predictions[499][1], 20.0);
    rows[400].pop();
    let body = json!({"signature_name": "input_ids", "inputs": rows});
    refused(&server.post(PREDICT, body).await, 400, "inputs[400]: expected 20 values");
}

#[tokio::test]
async fn outputs_named_as_bytes_are_base64() {
    let server = plain().await;
    let body = json!({"signature_name": "embedding_bytes", "instances": ["w1 w2"]});
    let body = ok(&server.post(PREDICT, body).await);
    let bytes = BASE64_STANDARD.decode(body["predictions"][0]["b64"].as_str().unwrap()).unwrap();
    let values: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(json!(values), w12());
    let body = json!({"signature_name": "embedding_bytes", "inputs": {"text": ["w1 w2"]}});
    assert_eq!(ok(&server.post(PREDICT, body).await)["outputs"][0]["b64"], BASE64_STANDARD.encode(&bytes));
}

#[tokio::test]
async fn refusals_name_the_value_and_have_this_protocols_statuses() {
    let server = plain().await;
    let long = "w1 ".repeat(65);
    let ids = "input_ids";
    for (body, status, says) in [
        (json!({}), 400, "body: neither `instances` nor `inputs`"),
        (json!({"instances": ["w1"], "inputs": ["w1"]}), 400, "body: both"),
        (json!({"instances": "w1"}), 400, "instances: expected a list"),
        (json!({"instances": []}), 400, "instances must not be empty"),
        (json!({"inputs": {"text": []}}), 400, "inputs.text must not be empty"),
        (json!({"inputs": "w1"}), 400, "inputs: expected a list"),
        (json!({"instances": ["w1", ""]}), 400, "instances[1] must not be empty"),
        (json!({"instances": [{"text": ""}]}), 400, "instances[0].text must not be empty"),
        (json!({"inputs": {"text": ["w1", ""]}}), 400, "inputs.text[1] must not be empty"),
        (json!({"instances": ["w1", ["w1"]]}), 400, "instances[1]: expected a text, or bytes"),
        (json!({"instances": ["w1", {"text": "w1"}]}), 400, "instances[1]: expected a text, or bytes"),
        (json!({"instances": [{"text": "w1"}, "w1"]}), 400, "instances[1]: expected an object, as the first"),
        (json!({"instances": [{"words": "w1"}]}), 400, "instances[0]: the input `text` is missing"),
        (json!({"instances": [7]}), 400, "instances[0]: expected a text, or bytes"),
        (json!({"instances": [{"b64": "?"}]}), 400, "instances[0]: not base64"),
        (json!({"instances": [{"text": {"b64": "/w=="}}]}), 400, "instances[0].text: not UTF-8"),
        (
            json!({"signature_name": "scores", "instances": ["w1"]}),
            400,
            "signature_name: model `fake` has no signature `scores`; it has serving_default, input_ids, embed_all, embed_all_input_ids, embedding_bytes",
        ),
        (json!({"signature_name": 7, "instances": ["w1"]}), 400, "signature_name: "),
        (json!({"signature_name": ids, "instances": [[1, 2], [3]]}), 400, "instances[1]: expected 2 values"),
        (json!({"signature_name": ids, "instances": [[1], []]}), 400, "instances[1]: expected 1 values"),
        (json!({"signature_name": ids, "instances": [[]]}), 400, "instances[0] must not be empty"),
        (json!({"signature_name": ids, "instances": ["w1"]}), 400, "instances[0]: expected a list"),
        (json!({"signature_name": ids, "instances": [[-1]]}), 400, "instances[0]: -1 is no token id"),
        (json!({"signature_name": ids, "instances": [[1.5]]}), 400, "instances[0][0]: expected a whole number"),
        (json!({"signature_name": ids, "instances": [[1000]]}), 400, "instances[0]: token id 1000"),
        (
            json!({"signature_name": ids, "inputs": {"input_ids": [[1], [1000]]}}),
            400,
            "inputs.input_ids[1]: token id 1000",
        ),
        (json!({"instances": vec!["w1"; 33]}), 413, "instances has 33 inputs, the limit is 32"),
        (json!({"instances": ["w1", long]}), 413, "instances[1] has 65 tokens, the limit is 64"),
        (json!({"instances": ["fail"]}), 500, "model `fake` failed on this batch"),
    ] {
        refused(&server.post(PREDICT, body).await, status, says);
    }
    for (body, status, says) in [("", 400, "body must not be empty"), ("{\"instances\": [", 400, "not JSON")] {
        refused(&server.post_with(PREDICT, body.to_string(), &[]).await, status, says);
    }
    let deep = format!("{{\"instances\": {}1{}}}", "[".repeat(5000), "]".repeat(5000));
    refused(&server.post_with(PREDICT, deep, &[]).await, 400, "recursion limit");
    let request = Request::post(PREDICT).body(Body::from("{}")).unwrap();
    refused(&server.send(request).await, 415, "content-type: missing");
}

#[tokio::test]
async fn models_versions_and_labels_are_found_or_named() {
    let server = plain().await;
    let body = json!({"instances": ["w3"]});
    for path in
        ["/v1/models/fake/versions/1:predict", "/v1/models/fake/labels/stable:predict", "/v1/models/fake%3Apredict"]
    {
        assert_eq!(ok(&server.post(path, body.clone()).await), json!({"predictions": [w3()]}), "{path}");
    }
    for (path, says) in [
        ("/v1/models/other:predict", "no model is named `other`; served: fake"),
        ("/v1/models/org/name:predict", "no model is named `org/name`"),
        ("/v1/models/org%2Fname%3Apredict", "no model is named `org/name`"),
        ("/v1/models/fake/versions/2:predict", "`fake/versions/2`; served: fake/versions/1, fake/labels/stable"),
        ("/v1/models/fake/labels/canary:predict", "`fake/labels/canary`"),
        ("/v1/models/other:classify", "`other`"),
    ] {
        refused(&server.post(path, body.clone()).await, 404, says);
    }
    for (path, says) in [
        ("/v1/models/other/metadata", "`other`"),
        ("/v1/models/fake/versions/2", "`fake/versions/2`"),
        ("/v1/models/fake/versions/2/metadata", "`fake/versions/2`"),
        ("/v1/models/fake/labels/canary", "`fake/labels/canary`"),
    ] {
        refused(&server.get(path).await, 404, says);
    }
}

#[tokio::test]
async fn methods_and_verbs_that_are_none_are_refused() {
    let server = plain().await;
    let answer = server.get(PREDICT).await;
    refused(&answer, 405, "does not take GET");
    assert_eq!(answer.header("allow"), "POST");
    let answer = server.post("/v1/models/fake/metadata", json!({})).await;
    refused(&answer, 405, "does not take POST");
    assert_eq!(answer.header("allow"), "GET,HEAD");
    for (path, allowed) in [
        (PREDICT, "POST"),
        ("/v1/models/fake%3Aclassify", "POST"),
        ("/v1/models/fake/metadata", "GET,HEAD"),
        ("/v1/models/fake", "GET,HEAD"),
    ] {
        let answer = server.send(Request::delete(path).body(Body::empty()).unwrap()).await;
        assert_eq!((answer.status.as_u16(), answer.header("allow")), (405, allowed), "{path}");
    }
    // Addresses that are not this protocol's keep the envelope of OpenAI's.
    let answer = server.post("/v1/models/fake:explain", json!({})).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["error"]["code"]), (404, &json!("route_not_found")));
    let answer = server.post("/v1/models/fake", json!({})).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["error"]["code"]), (405, &json!("method_not_allowed")));
}

#[tokio::test]
async fn a_model_that_embeds_says_so_to_who_wants_classes_or_numbers() {
    let server = plain().await;
    for verb in ["classify", "regress"] {
        let body = json!({"examples": [{"text": "w1"}]});
        let answer = server.post(&format!("/v1/models/fake:{verb}"), body).await;
        refused(&answer, 400, &format!(":{verb}: the task of model `fake` is `embed`: `:predict` takes"));
    }
}

#[tokio::test]
async fn metadata_has_the_signatures_as_protobufs_are_written_in_json() {
    let server = plain().await;
    let body = ok(&server.get("/v1/models/fake/metadata").await);
    assert_eq!(body["model_spec"], json!({"name": "fake", "signature_name": "", "version": "1"}));
    let signatures = &body["metadata"]["signature_def"]["signature_def"];
    let names: Vec<&String> = signatures.as_object().unwrap().keys().collect();
    assert_eq!(names, ["embed_all", "embed_all_input_ids", "embedding_bytes", "input_ids", "serving_default"]);
    let dim = |size: &str| json!({"size": size, "name": ""});
    let tensor = |name: &str, dtype: &str, dims: &[&str]| {
        let dims: Vec<Value> = dims.iter().map(|size| dim(size)).collect();
        json!({"dtype": dtype, "tensor_shape": {"dim": dims, "unknown_rank": false}, "name": name})
    };
    let embedding = tensor("embedding", "DT_FLOAT", &["-1", "8"]);
    let expected = json!({
        "inputs": {"text": tensor("text", "DT_STRING", &["-1"])},
        "outputs": {"embedding": embedding},
        "method_name": "tensorflow/serving/predict",
    });
    assert_eq!(signatures["serving_default"], expected);
    assert_eq!(signatures["input_ids"]["inputs"]["input_ids"], tensor("input_ids", "DT_INT64", &["-1", "-1"]));
    assert_eq!(signatures["input_ids"]["outputs"]["embedding"], embedding);
    let bytes = tensor("embedding_bytes", "DT_STRING", &["-1"]);
    assert_eq!(signatures["embedding_bytes"]["outputs"]["embedding_bytes"], bytes);
    for path in ["/v1/models/fake/versions/1/metadata", "/v1/models/fake/labels/stable/metadata"] {
        assert_eq!(ok(&server.get(path).await), body, "{path}");
    }
}

#[tokio::test]
async fn status_follows_the_models_health() {
    let server = plain().await;
    let state = async |server: &Server| {
        let body = ok(&server.get("/v1/models/fake/versions/1").await);
        assert_eq!(ok(&server.get("/v1/models/fake/labels/stable").await), body);
        // OpenAI's clients and these ask for the name alone.
        let shared = ok(&server.get("/v1/models/fake").await);
        assert_eq!((&shared["model_version_status"], &shared["id"]), (&body["model_version_status"], &json!("fake")));
        let status = &body["model_version_status"][0];
        assert_eq!(status["version"], "1");
        let word = |value: &Value| value.as_str().unwrap().to_string();
        (word(&status["state"]), word(&status["status"]["error_code"]))
    };
    assert_eq!(state(&server).await, ("AVAILABLE".into(), "OK".into()));
    let (waiting, controls) = fake::model("later", 8);
    controls.hold();
    server.engine.add(waiting, BatchLimits { max_queue_size: 8, ..http::limits() }).unwrap();
    let later = ok(&server.get("/v1/models/later/versions/1").await);
    assert_eq!(later["model_version_status"][0]["state"], "LOADING");
    refused(&server.post("/v1/models/later:predict", json!({"instances": ["w1"]})).await, 503, "`later` is loading");
    controls.release();
    assert_eq!(server.engine.drain(http::LONG).await, 0);
    assert_eq!(state(&server).await, ("UNLOADING".into(), "OK".into()));
    let answer = server.post(PREDICT, json!({"instances": ["w1"]})).await;
    refused(&answer, 503, "draining");
    assert_eq!(answer.header("retry-after"), "1");
}

#[tokio::test]
async fn a_device_that_fails_ends_the_version() {
    let server = plain().await;
    server.controls.broken.store(true, Ordering::SeqCst);
    let answer = server.post(PREDICT, json!({"instances": ["w1"]})).await;
    assert!(answer.status.is_server_error(), "{}", answer.text());
    let end = std::time::Instant::now() + http::LONG;
    loop {
        let body = ok(&server.get("/v1/models/fake/versions/1").await);
        let status = &body["model_version_status"][0];
        if status["state"] == "END" {
            assert_eq!(
                status["status"],
                json!({"error_code": "UNAVAILABLE", "error_message": "the device does not answer"})
            );
            break;
        }
        assert!(std::time::Instant::now() < end, "{status}");
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_model_that_is_named_like_an_address_is_still_found() {
    let server = plain().await;
    let (model, _) = fake::model("org/metadata", 8);
    server.engine.add(model, http::limits()).unwrap();
    let one = ok(&server.get("/v1/models/org/metadata").await);
    assert_eq!((&one["id"], &one["object"]), (&json!("org/metadata"), &json!("model")));
    let two = ok(&server.get("/v1/models/org/metadata/metadata").await);
    assert_eq!(two["model_spec"]["name"], "org/metadata");
}

#[tokio::test]
async fn predictions_carry_their_phases_and_are_kept_where_all_is() {
    let server = http::server_that_keeps(http::settings(), http::limits(), None, Scope::All).await;
    let answer = server.post(PREDICT, json!({"instances": ["w1 w2", "w3"]})).await;
    ok(&answer);
    assert_eq!((answer.header("x-compute-type"), answer.header("x-compute-tokens")), ("cpu", "3"));
    let listed = ok(&server.get("/api/v1/inferences").await);
    assert_eq!(listed["data"][0]["source"], "tensorflow", "{listed}");
}

/// Names of schemas are the whole document's: two protocols that used one would each describe the other.
#[tokio::test]
async fn schemas_of_the_document_are_this_protocols_own() {
    let server = plain().await;
    let document = ok(&server.get("/openapi.json").await);
    let properties = |content: &Value| {
        let reference = content["application/json"]["schema"]["$ref"].as_str().unwrap_or_else(|| panic!("{content}"));
        let schema = document.pointer(reference.trim_start_matches('#')).unwrap();
        schema["properties"].as_object().unwrap().keys().cloned().collect::<Vec<_>>()
    };
    let answer = |path: &str| properties(&document["paths"][path]["get"]["responses"]["200"]["content"]);
    assert_eq!(answer("/v1/models/{id}/versions/{version}"), ["model_version_status"]);
    assert_eq!(answer("/v1/models/{id}/metadata"), ["metadata", "model_spec"]);
    let predict = &document["paths"]["/v1/models/{id}:predict"]["post"]["requestBody"]["content"];
    assert_eq!(properties(predict), ["inputs", "instances", "signature_name"]);
    let of_health = &document["components"]["schemas"]["ModelStatus"]["properties"];
    assert!(of_health["devices"].is_object(), "{of_health}");
}

#[test]
fn every_fault_has_this_protocols_envelope() {
    for fault in Fault::samples() {
        let class = fault.class();
        assert_eq!(Envelope::TensorFlow.body(&fault), json!({"error": fault.message()}));
        let status = Envelope::TensorFlow.status(class).as_u16();
        assert_ne!(status, 422, "TensorFlow Serving has no such status");
        assert!(status == class.status.as_u16() || (status, class.status.as_u16()) == (400, 422));
    }
}
