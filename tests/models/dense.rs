//! Modules after the pooling against sentence-transformers: scripts/make-head-fixtures.py.

use candle_core::{DType, Device, Tensor};
use eremois::Error;
use eremois::model::LoadedModel;
use eremois::model::install::import;
use eremois::model::manifest::Manifest;
use eremois::model::pack::{PackedInput, RowSpec, Wanted};
use eremois::model::quantize::{Target, quantize};
use eremois::model::repository::Repository;
use serde_json::{Value, json};

use super::common::{Copied, load_dir, spec};
use super::heads::{close, floats, heads, references, rows};

fn copy() -> Copied {
    Copied::of_dir(&heads().join("bert-dense"))
}

fn vectors(model: &LoadedModel, dimensions: usize, normalize: bool) -> Vec<Vec<f32>> {
    let inputs = references("bert-dense")["inputs"].as_array().unwrap().clone();
    rows(model, &inputs, &Wanted::Vector(RowSpec { normalize, dimensions }))
}

fn expected(key: &str) -> Vec<Vec<f32>> {
    references("bert-dense")[key].as_array().unwrap().iter().map(floats).collect()
}

#[test]
fn vectors_go_through_the_modules_in_their_order() {
    let model = load_dir(&heads().join("bert-dense")).unwrap();
    assert_eq!((model.info.hidden_size, model.info.dimensions, model.info.normalize), (24, 16, true));
    for (got, expected) in vectors(&model, 16, true).iter().zip(expected("vectors")) {
        close(got, &expected, "two Dense and Normalize");
    }
    let copy = copy();
    copy.json("modules.json", |modules| {
        let modules = modules.as_array_mut().unwrap();
        let normalize = modules.pop().unwrap();
        modules.insert(2, normalize);
    });
    let between = load_dir(copy.dir()).unwrap();
    assert!(!between.info.normalize, "what is last decides");
    for (got, expected) in vectors(&between, 16, false).iter().zip(expected("normalized_between")) {
        close(got, &expected, "Normalize before two Dense");
    }
}

#[test]
fn the_cut_comes_after_the_last_module() {
    let model = load_dir(&heads().join("bert-dense")).unwrap();
    for (cut, whole) in vectors(&model, 5, true).iter().zip(vectors(&model, 16, false)) {
        let length = whole[..5].iter().map(|x| x * x).sum::<f32>().sqrt();
        close(cut, &whole[..5].iter().map(|x| x / length).collect::<Vec<_>>(), "cut, then normalised");
    }
    // The tokens' vectors stay those of the encoder, and stand beside pooled ones in one batch.
    let mut batch = PackedInput::default();
    batch.push(&[2, 118, 3], &[], Wanted::TokenVectors);
    batch.push(&[2, 118, 3], &[], RowSpec { normalize: false, dimensions: 16 });
    let rows = model.backend().launch(batch).unwrap().finish().unwrap();
    assert_eq!((rows.row(0).len(), rows.row(1).len()), (3 * 24, 16));
    let mut batch = PackedInput::default();
    batch.push(&[2, 118, 3], &[], RowSpec { normalize: false, dimensions: 17 });
    assert!(matches!(model.backend().launch(batch).err().unwrap(), Error::Shape { .. }));
}

#[test]
fn weights_of_modules_count_in_the_fingerprint() {
    let copy = copy();
    let before = load_dir(copy.dir()).unwrap().info.fingerprint.clone();
    let weights = Tensor::zeros((40, 24), DType::F32, &Device::Cpu).unwrap();
    let tensors = std::collections::HashMap::from([("linear.weight".to_string(), weights)]);
    candle_core::safetensors::save(&tensors, copy.path("2_Dense/model.safetensors")).unwrap();
    assert_ne!(load_dir(copy.dir()).unwrap().info.fingerprint, before);
}

#[test]
fn modules_are_installed_with_their_weights() {
    let models = tempfile::tempdir().unwrap();
    let repository = Repository::new(models.path());
    let installed = import(&repository, &heads().join("bert-dense"), Some("dense"), None).unwrap();
    let manifest = Manifest::read(&models.path().join("dense/manifest.toml")).unwrap();
    assert_eq!(manifest.task, "embed");
    assert!(manifest.versions[&1].files.contains_key("3_Dense/model.safetensors"));
    let model = load_dir(&installed.dir).unwrap();
    close(&vectors(&model, 16, true)[0], &expected("vectors")[0], "installed");
}

#[test]
fn what_a_module_cannot_be_is_refused_by_name() {
    type Change = fn(&Copied);
    let cases: [(Change, &str); 7] = [
        (
            |c| c.json("2_Dense/config.json", |v| v["in_features"] = json!(23)),
            "`in_features` is 23, what comes in has 24",
        ),
        (|c| c.json("3_Dense/config.json", |v| v["out_features"] = json!(0)), "must be at least 1"),
        (|c| c.json("3_Dense/config.json", |v| v["out_features"] = json!(15)), "linear.weight"),
        (
            |c| c.json("3_Dense/config.json", |v| v["activation_function"] = json!("torch.nn.modules.activation.Mish")),
            "activation `Mish` is not supported",
        ),
        (
            |c| c.json("2_Dense/config.json", |v| v["module_input_name"] = json!("token_embeddings")),
            "`module_input_name` `token_embeddings` is not supported",
        ),
        (|c| c.remove("2_Dense/model.safetensors"), "no weights: looked for model.safetensors"),
        (
            |c| c.json("modules.json", |v: &mut Value| v.as_array_mut().unwrap().swap(1, 2)),
            "on the wrong side of the Pooling",
        ),
    ];
    for (change, expected) in cases {
        let copy = copy();
        change(&copy);
        let error = load_dir(copy.dir()).err().expect(expected).to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let copy = copy();
    let error = quantize(&spec(copy.dir()), Target::F16, &copy.path("model.gguf")).unwrap_err().to_string();
    assert!(error.contains("GGUF has no form for what follows the pooling"), "{error}");
}

/// What `config.json` calls the model's class is what it is installed for.
#[test]
fn heads_are_installed_for_their_tasks() {
    for (name, task) in [
        ("modernbert-rerank", "rerank"),
        ("gte-rerank", "rerank"),
        ("mistral-rerank", "rerank"),
        ("qwen3-nli", "classify"),
        ("qwen3-reranker", "rerank"),
        ("deberta-v3-ner", "token_classify"),
        ("albert-masked-lm", "fill_mask"),
    ] {
        let models = tempfile::tempdir().unwrap();
        import(&Repository::new(models.path()), &heads().join(name), Some("m"), None).unwrap();
        assert_eq!(Manifest::read(&models.path().join("m/manifest.toml")).unwrap().task, task, "{name}");
    }
}
