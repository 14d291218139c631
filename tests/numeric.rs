//! Named tensors on the application API: what is taken, answered, kept, found and refused, over the fake model; and the
//! whole way of a Keras model, from its file to results that are found after a restart.

mod common;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{Device, safetensors};
use common::fake;
use common::http::{self, LONG, ok, server_of_model_with};
use common::process::{Client, Server};
use eremois::api;
use eremois::inference::warm::{Range, Warmed, warm};
use eremois::jobs::inference::Inference;
use eremois::jobs::runner::{Handler, Options, Runner};
use eremois::store::cache::Cache;
use eremois::store::layers::Layers;
use eremois::store::local::LocalCache;
use eremois::store::record::StoredOutput;
use eremois::store::work::TaskKind;
use serde_json::{Value, json};

const PATH: &str = "/api/v1/inferences";

/// Of `x` [2] and whole `n` [] it makes `twice` [2] and `sum` []: see [`fake::tensor_model`].
async fn tensors() -> http::Server {
    let cache: Arc<dyn Cache> = Arc::new(Layers::new(LocalCache::new(16 << 20), None));
    server_of_model_with(fake::tensor_model("m"), Some((cache, Duration::from_secs(600)))).await
}

#[tokio::test]
async fn outputs_are_answered_and_found_by_name() {
    let server = tensors().await;
    let body = json!({
        "model": "m", "task": "infer", "input": {"x": [[0.1, 2], [-3, 4.5]], "n": [5, 6]},
        "user": "u", "metadata": {"k": "v"},
    });
    let made = ok(&server.post(PATH, body.clone()).await);
    // 0.1 in f32, doubled, has the digits of 0.2 again.
    let expected = json!({"tensors": {"twice": [[0.2, 4.0], [-6.0, 9.0]], "sum": [7.1, 7.5]}});
    assert_eq!((&made["output"], &made["task"]), (&expected, &json!("infer")));
    assert_eq!((&made["usage"]["inputs"], &made["stored"]), (&json!(2), &json!(true)));

    let found = ok(&server.get(&format!("{PATH}/{}", made["id"].as_str().unwrap())).await);
    for field in ["id", "output", "usage", "timings", "model", "user", "metadata", "parameters", "task"] {
        assert_eq!(found[field], made[field], "{field}");
    }
    assert_eq!(found["inputs"], json!([{"x": [0.1, 2.0], "n": 5}, {"x": [-3.0, 4.5], "n": 6}]));
    let listed = ok(&server.get(&format!("{PATH}?user=u&metadata.k=v&include=output")).await);
    assert_eq!((&listed["data"][0]["output"], listed["data"].as_array().unwrap().len()), (&expected, 1));
    assert!(ok(&server.get(PATH).await)["data"][0].get("output").is_none());

    // The rows are kept bit by bit.
    let records = server.store.records();
    let Some(StoredOutput::Tensors(kept)) = &records[0].output else { panic!("{records:?}") };
    let bits: Vec<u32> = kept.rows.concat().iter().map(|value| value.to_bits()).collect();
    let values = [0.2f32, 4.0, 0.1 + 2.0 + 5.0, -6.0, 9.0, 7.5];
    assert_eq!(bits, values.map(f32::to_bits));
    assert_eq!(records[0].facts.output_norms, None);

    // Without a task it is the model's own, `inputs` is another name for `input`, and the cache has what was computed.
    let before = server.controls.num_seqs();
    let body = json!({"inputs": {"n": [6, 5], "x": [[-3, 4.5], [0.1, 2]]}, "store": false});
    let again = server.post(PATH, body).await;
    assert_eq!(again.header("x-cache"), "hit");
    let expected = json!({"tensors": {"twice": [[-6.0, 9.0], [0.2, 4.0]], "sum": [7.5, 7.1]}});
    assert_eq!((&ok(&again)["output"], server.controls.num_seqs()), (&expected, before));
}

#[tokio::test]
async fn whole_numbers_are_written_as_such_and_a_lone_input_needs_no_name() {
    let (mut model, controls) = fake::tensor_model("m");
    let mut info = eremois::model::ModelInfo::clone(&model.info);
    info.signature.inputs.truncate(1);
    info.signature.inputs[0].shape = vec![3];
    info.signature.outputs[0].dtype = eremois::model::signature::Datatype::U8;
    info.signature.outputs[0].shape = vec![1, 2];
    model.info = Arc::new(info);
    let server = server_of_model_with((model, controls), None).await;
    let expected = json!({"tensors": {"twice": [[[2, 4]], [[8, 10]]], "sum": [6.0, 15.0]}});
    for input in [json!([[1, 2, 3], [4, 5, 6]]), json!({"x": [[1, 2, 3], [4, 5, 6]]})] {
        let made = ok(&server.post(PATH, json!({ "input": input })).await);
        assert_eq!(made["output"], expected);
        assert_eq!(made["output"]["tensors"]["twice"].to_string(), "[[[2,4]],[[8,10]]]");
    }
    let refused = server.post(PATH, json!({"input": [[1, 2, 3], [4, 5]]})).await.json();
    assert_eq!(refused["field"], "input[1]");
}

#[tokio::test]
async fn a_key_replays_tensors_and_later_is_as_at_once() {
    let server = tensors().await;
    let body = json!({"input": {"x": [[1, 2]], "n": [3]}});
    let send = |body: &Value| server.post_with(PATH, body.to_string(), &[("idempotency-key", "k")]);
    let (first, second) = (send(&body).await, send(&body).await);
    assert_eq!(second.header("idempotency-replayed"), "true");
    let (first, second) = (ok(&first), ok(&second));
    assert_eq!((&first["id"], &first["output"]), (&second["id"], &second["output"]));
    let other = send(&json!({"input": {"x": [[1, 2]], "n": [4]}})).await;
    assert_eq!((other.status.as_u16(), &other.json()["field"]), (422, &json!("idempotency-key")));

    let later = server.post(PATH, json!({"input": {"x": [[1, 2]], "n": [3]}, "mode": "async"})).await;
    assert_eq!(later.status.as_u16(), 202, "{}", later.text());
    let path = later.header("location").to_string();
    let inference = Inference::new(server.keeper.clone(), server.tasks.clone(), api::status::failure_of);
    let handlers: Vec<(TaskKind, Arc<dyn Handler>)> = vec![(TaskKind::Inference, Arc::new(inference))];
    let options = Options { look_interval: Duration::from_millis(20), ..Options::default() };
    let (_stop, stopped) = tokio::sync::oneshot::channel();
    tokio::spawn(Runner::new(server.tasks.clone(), handlers, options).run(stopped));
    let start = Instant::now();
    let found = loop {
        let found = ok(&server.get(&path).await);
        if found["status"] != "queued" {
            break found;
        }
        assert!(start.elapsed() < LONG, "{found}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert_eq!((&found["status"], &found["output"]), (&json!("succeeded"), &first["output"]));
    assert_eq!(found["inputs"], json!([{"x": [1.0, 2.0], "n": 3}]));
}

#[tokio::test]
async fn a_cache_is_filled_from_kept_tensors() {
    let (first, second) = (tensors().await, tensors().await);
    let body = json!({"input": {"x": [[0.1, 2], [-3, 4.5]], "n": [5, 6]}});
    let made = ok(&first.post(PATH, body.clone()).await);
    let range = Range { limit: 10, from: None };
    let known = second.inferences.known();
    let warmed = warm(&known, first.store.as_ref(), second.inferences.as_ref(), range, &|_| {}).await.unwrap();
    assert_eq!(warmed, Warmed { num_records: 1, num_items: 2, ..Warmed::default() });
    let before = second.controls.num_seqs();
    let found = second.post(PATH, body).await;
    assert_eq!((found.header("x-cache"), second.controls.num_seqs()), ("hit", before));
    assert_eq!(ok(&found)["output"], made["output"]);
}

#[tokio::test]
async fn faults_are_named_by_their_place() {
    let server = tensors().await;
    let many: Vec<[i32; 2]> = vec![[1, 2]; 33];
    for (body, status, field, says) in [
        (json!({"input": {"x": [[1, 2]]}}), 400, "input", "the input `n` is missing"),
        (json!({"input": {"x": [[1, 2]], "n": [1], "z": [1]}}), 400, "input", "no input is named `z`; known: `x`, `n`"),
        (json!({"input": {"x": [[1, "a"]], "n": [1]}}), 400, "input.x[0][1]", "expected a number, got a text"),
        (json!({"input": {"x": [[1, 2], [3]], "n": [1, 2]}}), 400, "input.x[1]", "`x` has 2 values here, got 1"),
        (json!({"input": {"x": [1, 2], "n": [1, 2]}}), 400, "input.x[0]", "expected a list of a number"),
        (json!({"input": {"x": [[1, 2]], "n": [1.5]}}), 400, "input.n[0]", "expected a whole number, got 1.5"),
        (json!({"input": {"x": [[1, 2]], "n": [16777217]}}), 400, "input.n[0]", "2^24"),
        (json!({"input": {"x": [[1, 1e39]], "n": [1]}}), 400, "input.x[0][1]", "32 bits"),
        (json!({"input": {"x": [[1, 2]], "n": [1, 2]}}), 400, "input.n", "has 2 inputs, `x` has 1"),
        (json!({"input": {"x": [], "n": []}}), 400, "input.x", "must not be empty"),
        (json!({"input": {"x": many, "n": vec![1; 33]}}), 413, "input.x", "33 inputs, the limit is 32"),
        (json!({"input": [[1, 2]]}), 400, "input", "expected an object of `x`, `n`"),
        (json!({"input": "w1"}), 400, "input", "expected an object of `x`, `n`"),
        (json!({"task": "embed", "input": {"x": [[1, 2]], "n": [1]}}), 422, "task", "does `infer`"),
        (json!({"input": {"x": [[1, 2]], "n": [1]}, "parameters": {"normalize": true}}), 422, "parameters", "none"),
    ] {
        let answer = server.post(PATH, body.clone()).await;
        let got = answer.json();
        assert_eq!((answer.status.as_u16(), &got["field"]), (status, &json!(field)), "{body}: {got}");
        let detail = got["detail"].as_str().unwrap();
        assert!(detail.contains(says), "{body}: `{detail}` does not say `{says}`");
    }
    assert!(server.store.records().is_empty(), "what was refused leaves no record");
    // And a model of texts says what it takes.
    let texts = http::plain().await;
    let answer = texts.post(PATH, json!({"input": {"x": [[1, 2]]}})).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["field"]), (400, &json!("input")));
    let answer = texts.post(PATH, json!({"input": "w1", "task": "infer"})).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["field"]), (422, &json!("task")));
}

#[tokio::test]
async fn a_result_that_is_no_number_is_kept_and_never_answered_as_one() {
    let server = tensors().await;
    let largest = f64::from(f32::MAX);
    let answer = server.post(PATH, json!({"input": {"x": [[largest, 1]], "n": [1]}})).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["kind"]), (500, &json!("internal")));
    let records = server.store.records();
    let Some(StoredOutput::Tensors(kept)) = &records[0].output else { panic!("{records:?}") };
    assert_eq!(kept.rows[0][0], f32::INFINITY);
}

fn keras(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/keras").join(name)
}

/// Named tensors of what Keras recorded: `in.NAME` and `out.NAME`, as lists in lists.
fn recorded(file: &str, prefix: &str) -> Value {
    let all = safetensors::load(keras(file), &Device::Cpu).unwrap();
    let of = |(name, tensor): (&String, &candle_core::Tensor)| {
        let name = name.strip_prefix(prefix)?.to_string();
        let value = match tensor.rank() {
            2 => json!(tensor.to_vec2::<f32>().unwrap()),
            3 => json!(tensor.to_vec3::<f32>().unwrap()),
            rank => panic!("{name} has rank {rank}"),
        };
        Some((name, value))
    };
    all.iter().filter_map(of).collect::<serde_json::Map<_, _>>().into()
}

/// With whole numbers written as such, which whole inputs ask for.
fn whole(value: &Value) -> Value {
    match value {
        Value::Array(items) => items.iter().map(whole).collect(),
        value => json!(value.as_f64().unwrap() as i64),
    }
}

#[track_caller]
fn close(got: &Value, expected: &Value) {
    match (got, expected) {
        (Value::Array(got), Value::Array(expected)) => {
            assert_eq!(got.len(), expected.len());
            got.iter().zip(expected).for_each(|(got, expected)| close(got, expected));
        }
        (Value::Object(got), Value::Object(expected)) => {
            assert!(got.keys().eq(expected.keys()), "{:?} {:?}", got.keys(), expected.keys());
            got.iter().for_each(|(name, got)| close(got, &expected[name]));
        }
        (got, expected) => {
            let (got, expected) = (got.as_f64().unwrap(), expected.as_f64().unwrap());
            assert!((got - expected).abs() <= 1e-5 * expected.abs().max(1.0), "{got}, Keras has {expected}");
        }
    }
}

fn ask(server: &Server, path: &str, body: &Value) -> Value {
    let (body, head) = (body.to_string(), "host: test\r\ncontent-type: application/json");
    let request = format!("POST {path} HTTP/1.1\r\n{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let answer = Client::connect(server.address).unwrap().send(request.as_bytes()).unwrap();
    assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    serde_json::from_str(&answer.body).unwrap()
}

#[test]
fn a_keras_model_is_imported_served_and_its_results_found_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let models = folder.path().join("models");
    let import = |name: &str, file: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_eremois"));
        command.env_clear().current_dir(folder.path()).arg("--set").arg(format!("ai.models_dir={}", models.display()));
        let output = command.args(["models", "import", "keras", "--name", name]).arg(keras(file)).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    // A functional model of three inputs, one of them whole numbers, and two outputs; a sequential one of one each.
    import("joined", "joined.keras");
    import("mlp", "mlp.h5");
    let (mut joined, mlp) = (recorded("joined.safetensors", "in."), recorded("mlp.safetensors", "in."));
    joined["kind"] = whole(&joined["kind"]);
    let expected = recorded("joined.safetensors", "out.");
    let probabilities = &recorded("mlp.safetensors", "out.")["probabilities"];

    let database = folder.path().join("records.db");
    let settings = format!("[ai]\nmodels = [\"joined\", \"mlp\"]\n[database]\npath = {database:?}\n");
    let start = || {
        let models_dir = ("EREMOIS_AI__MODELS_DIR", models.display().to_string());
        Server::start_with(&settings, &[models_dir]).wait_until_ready()
    };
    let mut server = start();
    let made = ask(&server, PATH, &json!({"model": "joined", "task": "infer", "input": joined, "user": "u"}));
    close(&made["output"]["tensors"], &expected);
    let bare = ask(&server, PATH, &json!({"model": "mlp", "input": mlp["x"]}));
    close(&bare["output"]["tensors"]["probabilities"], probabilities);

    // The other protocols say the same of the same.
    let columns = ask(&server, "/v1/models/joined:predict", &json!({ "inputs": joined }));
    close(&columns["outputs"], &expected);
    let rows = ask(&server, "/v1/models/mlp:predict", &json!({"instances": mlp["x"]}));
    close(&rows["predictions"], probabilities);
    let shape = |rows: &Value| json!([rows.as_array().unwrap().len(), rows[0].as_array().unwrap().len()]);
    let tensor = |(name, rows): (&String, &Value)| {
        let datatype = if name == "kind" { "INT32" } else { "FP32" };
        json!({"name": name, "shape": shape(rows), "datatype": datatype, "data": rows})
    };
    let inputs: Vec<Value> = joined.as_object().unwrap().iter().map(tensor).collect();
    let answer = ask(&server, "/v2/models/joined/infer", &json!({ "inputs": inputs }));
    let outputs = answer["outputs"].as_array().unwrap();
    assert_eq!(outputs.len(), expected.as_object().unwrap().len());
    for output in outputs {
        let of_keras = &expected[output["name"].as_str().unwrap()];
        assert_eq!(output["shape"], shape(of_keras));
        let flat: Vec<Value> =
            of_keras.as_array().unwrap().iter().flat_map(|row| row.as_array().unwrap().clone()).collect();
        close(&output["data"], &flat.into());
    }

    server.signal("TERM");
    assert!(server.wait().success());
    let server = start();
    for made in [&made, &bare] {
        let found = server.get(&format!("{PATH}/{}", made["id"].as_str().unwrap())).unwrap();
        let found: Value = serde_json::from_str(&found.body).unwrap();
        assert_eq!((&found["output"], &found["id"]), (&made["output"], &made["id"]), "to the last digit");
    }
    let listed: Value =
        serde_json::from_str(&server.get(&format!("{PATH}?user=u&include=output")).unwrap().body).unwrap();
    assert_eq!(listed["data"][0]["output"], made["output"]);
}
