//! Models loaded, exchanged and unloaded while the real binary serves others: at request and by its settings.

mod common;

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use common::process::{Answer, Client, Server, wait_for};
use eremois::model::repository::sha256_file;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// A repository in a folder of its own.
struct Models(tempfile::TempDir);

impl Models {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// A tensor model with one version of each number; version n answers n times what it is asked.
    fn write(&self, name: &str, versions: &[u64]) {
        let mut manifest = "task = \"infer\"\n".to_string();
        for &version in versions {
            let dir = self.0.path().join(name).join(version.to_string());
            std::fs::create_dir_all(&dir).unwrap();
            let factor: Vec<u8> = (version as f32).to_le_bytes().into();
            let tensors = [("times.kernel", vec![1, 1], factor), ("times.bias", vec![1], vec![0; 4])];
            let views: HashMap<_, _> = tensors
                .iter()
                .map(|(name, shape, data)| (*name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap()))
                .collect();
            // Whole or not at all, as an operator's copy should come.
            std::fs::write(dir.join("new"), safetensors::serialize(views, None).unwrap()).unwrap();
            std::fs::rename(dir.join("new"), dir.join("model.safetensors")).unwrap();
            let sum = sha256_file(&dir.join("model.safetensors")).unwrap().0;
            manifest += &format!(
                "[versions.{version}]\nweights = [\"model.safetensors\"]\noutputs = [\"times\"]\n\
                 [[versions.{version}.inputs]]\nname = \"x\"\ndtype = \"f32\"\nshape = [1]\n\
                 [[versions.{version}.layers]]\nname = \"times\"\nkind = \"dense\"\n\
                 [versions.{version}.files]\n\"model.safetensors\" = \"{sum}\"\n"
            );
        }
        self.write_manifest(name, &manifest);
    }

    fn write_manifest(&self, name: &str, manifest: &str) {
        let dir = self.0.path().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("new"), manifest).unwrap();
        std::fs::rename(dir.join("new"), dir.join("manifest.toml")).unwrap();
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn serve(&self, settings: &str) -> Server {
        let models = [("EREMOIS_AI__MODELS_DIR", self.path().display().to_string())];
        Server::start_with(settings, &models).wait_until_ready()
    }
}

/// No cache, or a swap could hide behind results that were computed before it.
const EXPLICIT: &str = "[cache]\nttl = \"0s\"\n[database]\nrecord = \"none\"\n[ai]\nmodel_control = \"explicit\"\n";

fn post(client: &mut Client, path: &str, body: &str) -> Answer {
    // As tritonclient sends it: without a type.
    let length = body.len();
    let request = format!("POST {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {length}\r\n\r\n{body}");
    client.send(request.as_bytes()).unwrap_or_else(|e| panic!("{path}: {e:?}"))
}

fn posted(server: &Server, path: &str, body: &Value) -> (u16, Value) {
    let answer = post(&mut Client::connect(server.address).unwrap(), path, &body.to_string());
    (answer.status, serde_json::from_str(&answer.body).unwrap_or(Value::Null))
}

/// What a model answers to 3: its version by name and by value.
fn asked(client: &mut Client, model: &str) -> Result<(String, f64), Answer> {
    let body = json!({"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [3.0]}]}).to_string();
    let answer = post(client, &format!("/v2/models/{model}/infer"), &body);
    if answer.status != 200 {
        return Err(answer);
    }
    let body: Value = serde_json::from_str(&answer.body).unwrap();
    Ok((body["model_version"].as_str().unwrap().to_string(), body["outputs"][0]["data"][0].as_f64().unwrap() / 3.0))
}

fn ask(server: &Server, model: &str) -> Result<(String, f64), Answer> {
    asked(&mut Client::connect(server.address).unwrap(), model)
}

fn index(server: &Server) -> Vec<(String, String, String, String)> {
    let (status, index) = posted(server, "/v2/repository/index", &json!({}));
    assert_eq!(status, 200);
    let text = |entry: &Value, key: &str| entry[key].as_str().unwrap().to_string();
    let entries = index.as_array().unwrap().iter();
    entries.map(|e| (text(e, "name"), text(e, "version"), text(e, "state"), text(e, "reason"))).collect()
}

fn entry(name: &str, version: &str, state: &str, reason: &str) -> (String, String, String, String) {
    (name.into(), version.into(), state.into(), reason.into())
}

#[test]
fn models_are_unloaded_and_loaded_at_request() {
    let models = Models::new();
    models.write("a", &[1]);
    models.write("b", &[2]);
    let server = models.serve(EXPLICIT);
    models.write("late", &[5]);
    assert_eq!(
        index(&server),
        [entry("a", "1", "READY", ""), entry("b", "2", "READY", ""), entry("late", "5", "UNAVAILABLE", "unloaded")]
    );

    assert_eq!(
        posted(&server, "/v2/repository/models/b/unload", &json!({"parameters": {"unload_dependents": false}})).0,
        200
    );
    assert_eq!(ask(&server, "b").unwrap_err().status, 404);
    assert_eq!(ask(&server, "a").unwrap(), ("1".to_string(), 1.0));
    assert_eq!(index(&server)[1], entry("b", "2", "UNAVAILABLE", "unloaded"));
    assert_eq!(server.get("/v2/models/b/ready").unwrap().status, 404);
    assert_eq!(server.get("/health/ready").unwrap().status, 200);
    let metrics = server.get("/metrics").unwrap().body;
    assert!(metrics.contains("eremois_model_ready{model=\"b\"} 0"), "{metrics}");
    assert!(metrics.contains("eremois_model_unloads_total{model=\"b\"} 1"), "{metrics}");
    let (status, again) = posted(&server, "/v2/repository/models/b/unload", &json!({}));
    assert_eq!(status, 404, "{again}");

    for name in ["b", "late"] {
        assert_eq!(posted(&server, &format!("/v2/repository/models/{name}/load"), &json!({})).0, 200);
    }
    assert_eq!(ask(&server, "b").unwrap(), ("2".to_string(), 2.0));
    assert_eq!(ask(&server, "late").unwrap(), ("5".to_string(), 5.0));
    let metrics = server.get("/metrics").unwrap().body;
    assert!(metrics.contains("eremois_model_ready{model=\"b\"} 1"), "{metrics}");

    // The last one too, and the server lives on, ready to load another.
    for name in ["a", "b", "late"] {
        assert_eq!(posted(&server, &format!("/v2/repository/models/{name}/unload"), &json!({})).0, 200);
    }
    assert_eq!(server.get("/health/ready").unwrap().status, 200);
    assert_eq!(posted(&server, "/v2/repository/models/a/load", &json!({})).0, 200);
    assert_eq!(ask(&server, "a").unwrap(), ("1".to_string(), 1.0));
}

#[test]
fn what_cannot_be_loaded_is_told_and_what_was_served_goes_on() {
    let models = Models::new();
    models.write("a", &[1]);
    let server = models.serve(EXPLICIT);
    let load = |name: &str, body: Value| {
        let (status, answer) = posted(&server, &format!("/v2/repository/models/{name}/load"), &body);
        (status, answer["error"].as_str().unwrap_or_default().to_string())
    };
    let refused = |(status, says): (u16, String), expected: u16, part: &str| {
        assert_eq!(status, expected, "{says}");
        assert!(says.contains(part), "`{says}` does not say `{part}`");
    };
    refused(load("none", json!({})), 404, "`none`");
    // A path is no name, whatever lies there.
    models.write("deep/er", &[1]);
    refused(load("deep/er", json!({})), 404, "`deep/er`");
    refused(load("..%2F..", json!({})), 404, "no model is named");
    let config = |config: Value| json!({"parameters": {"config": config.to_string()}});
    let version = config(json!({"version_policy": {"specific": {"versions": [9]}}}));
    refused(load("a", version), 422, "has no version 9; it has 1");
    refused(load("a", config(json!({"backend": "onnx"}))), 400, "parameters.config.backend");
    let limits = config(json!({"dynamic_batching": {"preferred_batch_size": [0]}}));
    refused(load("a", limits), 422, "max_batch_size");
    let file = json!({"parameters": {"file:1/model.onnx": "AA==", "config": "{}"}});
    refused(load("a", file), 422, "parameters.file:1/model.onnx");

    // A version that is broken: the one before is served on.
    models.write("a", &[1, 2]);
    std::fs::write(models.path().join("a/2/model.safetensors"), b"no weights").unwrap();
    refused(load("a", json!({})), 422, "model.safetensors");
    assert_eq!(ask(&server, "a").unwrap(), ("1".to_string(), 1.0));
    assert_eq!(index(&server)[0], entry("a", "1", "READY", ""));
    // One that is not served: the index says why.
    models.write_manifest("broken", "task = \"infer\"\n[versions.1]\n");
    refused(load("broken", json!({})), 422, "`broken` cannot be loaded");
    let broken = index(&server).into_iter().find(|entry| entry.0 == "broken").unwrap();
    assert!(broken.2 == "UNAVAILABLE" && broken.3.contains("versions.1"), "{broken:?}");
    // A page of another site has no say.
    let request = "POST /v2/repository/models/a/unload HTTP/1.1\r\nhost: test\r\norigin: http://elsewhere\r\ncontent-length: 0\r\n\r\n";
    assert_eq!(Client::connect(server.address).unwrap().send(request.as_bytes()).unwrap().status, 415);
    models.write("a", &[1, 2]);
    assert_eq!(load("a", json!({})).0, 200);
    assert_eq!(ask(&server, "a").unwrap(), ("2".to_string(), 2.0));
}

#[test]
fn limits_come_with_a_load_and_go_with_the_next() {
    let models = Models::new();
    models.write("a", &[1]);
    let server = models.serve(EXPLICIT);
    let delay = || {
        let answer = server.get("/v2/models/a/config").unwrap();
        let config: Value = serde_json::from_str(&answer.body).unwrap();
        let batching = &config["dynamic_batching"];
        let size = &batching["default_queue_policy"]["max_queue_size"];
        (batching["max_queue_delay_microseconds"].clone(), size.clone())
    };
    let before = delay();
    let batching = json!({"max_queue_delay_microseconds": 1500, "default_queue_policy": {"max_queue_size": 77}});
    let config = json!({"parameters": {"config": json!({"dynamic_batching": batching}).to_string()}});
    assert_eq!(posted(&server, "/v2/repository/models/a/load", &config).0, 200);
    assert_eq!(delay(), (json!(1500), json!(77)));
    // Settings that are read again are under what was asked for.
    server.write_settings(&format!("{EXPLICIT}max_queue_size = 5555\n"));
    server.stderr.wait_for(&["setting changed", "max_queue_size"]);
    assert_eq!(delay(), (json!(1500), json!(77)));
    assert_eq!(posted(&server, "/v2/repository/models/a/load", &json!({})).0, 200);
    assert_eq!(delay(), (before.0, json!(5555)));
}

/// Clients ask without a pause while versions are exchanged: each answer is whole and of one version.
#[test]
fn an_exchange_under_load_is_met_by_nobody() {
    let models = Models::new();
    models.write("a", &[1]);
    let server = models.serve(EXPLICIT);
    let (is_over, num_answers) = (AtomicBool::new(false), AtomicUsize::new(0));
    let seen = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..6)
            .map(|_| {
                scope.spawn(|| {
                    let mut client = Client::connect(server.address).unwrap();
                    let mut seen = Vec::new();
                    while !is_over.load(Ordering::SeqCst) {
                        let (version, factor) = asked(&mut client, "a").unwrap_or_else(|refused| {
                            // Written for one version, computed by the next: to be asked again.
                            assert!(refused.status == 503, "{refused:?}");
                            ("again".to_string(), 0.0)
                        });
                        assert!(version == "again" || version.parse::<f64>() == Ok(factor), "{version} gave {factor}");
                        seen.push(version);
                        num_answers.fetch_add(1, Ordering::SeqCst);
                    }
                    seen
                })
            })
            .collect();
        for version in 2..=6 {
            let before = num_answers.load(Ordering::SeqCst);
            wait_for("answers", || (num_answers.load(Ordering::SeqCst) > before + 50).then_some(()));
            models.write("a", &(1..=version).collect::<Vec<_>>());
            assert_eq!(posted(&server, "/v2/repository/models/a/load", &json!({})).0, 200);
            // Whoever asks after the load is answered by what was loaded.
            assert_eq!(ask(&server, "a").unwrap(), (version.to_string(), version as f64));
        }
        std::thread::sleep(Duration::from_millis(100));
        is_over.store(true, Ordering::SeqCst);
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect::<Vec<_>>()
    });
    for version in 1..=6 {
        assert!(seen.contains(&version.to_string()), "nobody was answered by version {version}");
    }
    // At most the requests that were under way at one of the five exchanges.
    let num_again = seen.iter().filter(|version| *version == "again").count();
    assert!(num_again <= 5 * 6, "{num_again} of {}", seen.len());
    let metrics = server.get("/metrics").unwrap().body;
    assert!(metrics.contains("eremois_model_loads_total{model=\"a\",outcome=\"ok\"} 5"), "{metrics}");
    assert!(metrics.contains("eremois_model_ready{model=\"a\"} 1"), "{metrics}");
}

#[test]
fn the_settings_say_what_is_served_each_time_they_are_read() {
    const SETTINGS: &str = "[cache]\nttl = \"0s\"\n[database]\nrecord = \"none\"\n[ai]\n";
    let models = Models::new();
    models.write("a", &[1]);
    models.write("b", &[1]);
    let server = models.serve(&format!("{SETTINGS}models = [\"a\"]\n"));
    assert_eq!(ask(&server, "b").unwrap_err().status, 404);
    let (status, refused) = posted(&server, "/v2/repository/models/b/load", &json!({}));
    assert_eq!(status, 422);
    assert!(refused["error"].as_str().unwrap().contains("ai.model_control"), "{refused}");

    // Another model, by the file.
    server.write_settings(&format!("{SETTINGS}models = [\"b\", \"a\"]\n"));
    wait_for("b", || ask(&server, "b").ok());
    // A newer version and a broken one, by a signal.
    models.write("b", &[1, 3]);
    server.signal("HUP");
    wait_for("version 3 of b", || ask(&server, "b").ok().filter(|(version, _)| version == "3"));
    models.write("b", &[1, 3, 4]);
    std::fs::write(models.path().join("b/4/model.safetensors"), b"no weights").unwrap();
    server.signal("HUP");
    server.stderr.wait_for(&["could not be loaded", "model.safetensors"]);
    assert_eq!(ask(&server, "b").unwrap(), ("3".to_string(), 3.0));
    // Names that are not there change nothing.
    server.write_settings(&format!("{SETTINGS}models = [\"nobody\"]\n"));
    server.stderr.wait_for(&["the models stay as they are", "nobody"]);
    assert_eq!(ask(&server, "a").unwrap(), ("1".to_string(), 1.0));
    // A pinned version, and one model less.
    server.write_settings(&format!("{SETTINGS}models = [\"b@1\"]\n"));
    wait_for("version 1 of b", || ask(&server, "b").ok().filter(|(version, _)| version == "1"));
    wait_for("the end of a", || ask(&server, "a").err().filter(|refused| refused.status == 404));
    // Everything there is.
    models.write("b", &[1, 3]);
    models.write("c", &[7]);
    server.write_settings(SETTINGS);
    wait_for("c", || ask(&server, "c").ok());
    wait_for("a", || ask(&server, "a").ok());
    wait_for("version 3 of b", || ask(&server, "b").ok().filter(|(version, _)| version == "3"));
}
