//! Ways a model may lie on disk and still be the same model.

use std::collections::BTreeMap;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use eremois::model::LoadedModel;
use eremois::model::load::{Placement, load_for};
use eremois::model::pack::Pooling;
use eremois::request::{Input, Truncation};
use serde_json::json;

use super::common::*;

const IDS: [u32; 7] = [2, 9, 40, 41, 17, 60, 3];

fn vector(model: &LoadedModel) -> Vec<f32> {
    run(model, &[IDS.to_vec()], false).row(0).to_vec()
}

#[test]
fn files_of_sentence_transformers_say_what_a_manifest_does_not() {
    let bert = load_dir(&fixture("bert-f16")).unwrap().info;
    assert_eq!((bert.pooling, bert.normalize), (Pooling::Mean, true));
    let prompts = [("document", ""), ("query", "tide: ")].map(|(name, text)| (name.to_string(), text.to_string()));
    assert_eq!(bert.prompts, BTreeMap::from(prompts));
    assert_eq!(bert.default_prompt.as_deref(), Some("query"));
    assert_eq!((bert.dtype.as_str(), bert.device.as_str(), bert.hidden_size), ("f32", "cpu", 64));
    assert!(bert.created > 1_500_000_000);
    // The layout of older releases; its limit of 512 is cut to the position table.
    let mpnet = load_dir(&fixture("mpnet")).unwrap().info;
    assert_eq!((mpnet.pooling, mpnet.normalize, mpnet.max_seq_len), (Pooling::Cls, false, 200));
    // Nothing but the encoder: the mean, as sentence-transformers has it.
    let roberta = load_dir(&fixture("roberta-bf16")).unwrap().info;
    assert_eq!((roberta.pooling, roberta.normalize, roberta.max_seq_len), (Pooling::Mean, false, 128));
}

#[test]
fn a_model_is_the_same_on_each_of_its_devices() {
    for name in ["bert-f16", "bert-gguf", "xlm-roberta-sharded"] {
        let devices = [Device::Cpu, Device::Cpu];
        let mut model = load_for(&spec(&fixture(name)), &devices, &Placement::default()).unwrap();
        let names: Vec<&str> = model.backends.iter().map(|placed| placed.device.as_str()).collect();
        assert_eq!((names, model.info.device.as_str()), (vec!["cpu", "cpu"], "cpu,cpu"));
        let first = vector(&model);
        model.backends.rotate_left(1);
        assert_eq!(vector(&model), first, "{name}");
    }
}

#[test]
fn a_manifest_wins_over_the_models_files() {
    let mut spec = spec(&fixture("bert-f16"));
    spec.pooling = Some(Pooling::Max);
    spec.normalize = Some(false);
    spec.max_seq_len = Some(100);
    spec.prompts = BTreeMap::from([("query".to_string(), "ask: ".to_string())]);
    spec.default_prompt = Some("document".to_string());
    let info = load_spec(&spec).unwrap().info;
    assert_eq!((info.pooling, info.normalize, info.max_seq_len), (Pooling::Max, false, 100));
    assert_eq!((info.prompts["query"].as_str(), info.prompts["document"].as_str()), ("ask: ", ""));
    assert_eq!(info.default_prompt.as_deref(), Some("document"));
}

#[test]
fn limits_come_from_the_first_file_that_states_one() {
    let copy = Copied::of("bert-f16");
    let limit = |copy: &Copied| load_dir(copy.dir()).unwrap().info.max_seq_len;
    copy.json("tokenizer_config.json", |config| config["model_max_length"] = json!(300));
    assert_eq!(limit(&copy), 300);
    copy.json("tokenizer_config.json", |config| config["model_max_length"] = json!(1e30));
    assert_eq!(limit(&copy), 512);
    copy.json("sentence_bert_config.json", |config| config["max_seq_length"] = json!(77));
    assert_eq!(limit(&copy), 77);
}

#[test]
fn every_pooling_has_its_name_in_both_layouts() {
    let copy = Copied::of("bert-f16");
    let poolings = [
        ("pooling_mode_cls_token", "cls", Pooling::Cls),
        ("pooling_mode_mean_tokens", "mean", Pooling::Mean),
        ("pooling_mode_max_tokens", "max", Pooling::Max),
        ("pooling_mode_lasttoken", "lasttoken", Pooling::LastToken),
        ("pooling_mode_weightedmean_tokens", "weightedmean", Pooling::WeightedMean),
    ];
    for (key, name, pooling) in poolings {
        for config in [json!({ key: true }), json!({"pooling_mode": name}), json!({"pooling_mode": [name]})] {
            copy.write("1_Pooling/config.json", config.to_string());
            assert_eq!(load_dir(copy.dir()).unwrap().info.pooling, pooling, "{config}");
        }
    }
}

#[test]
fn a_prefix_and_tensorflow_names_change_nothing() {
    let copy = Copied::of("bert-f16");
    let before = vector(&load_dir(copy.dir()).unwrap());
    copy.weights(|tensors| {
        let renamed = tensors.drain().map(|(name, tensor)| {
            let name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
            (format!("bert.{name}"), tensor)
        });
        *tensors = renamed.collect::<Vec<_>>().into_iter().collect();
    });
    assert_eq!(vector(&load_dir(copy.dir()).unwrap()), before);
}

#[test]
fn do_lower_case_lowers_texts() {
    let copy = Copied::of("roberta-bf16");
    let ids = |copy: &Copied, text: &str| {
        let encoder = load_dir(copy.dir()).unwrap().encoder;
        encoder.encode(&Input::Text(text.to_string()), "input", None, Truncation::Refuse).unwrap().input_ids
    };
    assert_ne!(ids(&copy, "FOG"), ids(&copy, "fog"));
    let plain = ids(&copy, "fog");
    copy.write("sentence_bert_config.json", r#"{"max_seq_length": 64, "do_lower_case": true}"#);
    assert_eq!(ids(&copy, "FOG"), plain);
}

#[test]
fn the_encoder_may_lie_in_a_folder_of_its_own() {
    let copy = Copied::of("bert-f16");
    let before = vector(&load_dir(copy.dir()).unwrap());
    std::fs::create_dir(copy.path("0_Transformer")).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json", "sentence_bert_config.json"] {
        std::fs::rename(copy.path(file), copy.path("0_Transformer").join(file)).unwrap();
    }
    copy.json("modules.json", |modules| modules[0]["path"] = json!("0_Transformer"));
    assert_eq!(vector(&load_dir(copy.dir()).unwrap()), before);
}

#[test]
fn a_gguf_file_may_have_hugging_face_files_beside_it() {
    let alone = vector(&load_dir(&fixture("bert-gguf")).unwrap());
    let copy = Copied::of("bert-gguf");
    for file in ["config.json", "tokenizer.json", "modules.json"] {
        std::fs::copy(fixture("bert-f16").join(file), copy.path(file)).unwrap();
    }
    copy.json("modules.json", |modules| {
        modules.as_array_mut().unwrap().remove(1);
    });
    let model = load_dir(copy.dir()).unwrap();
    assert!(model.info.normalize);
    assert_eq!(vector(&model), alone);
}

/// llama.cpp's RoBERTa is named bert and lacks the position rows kept for padding.
#[test]
fn a_roberta_in_gguf_equals_its_safetensors() {
    let folder = fixture("roberta-bf16");
    let expected = vector(&load_dir(&folder).unwrap());
    let names = [
        ("embeddings.word_embeddings", "token_embd"),
        ("embeddings.position_embeddings", "position_embd"),
        ("embeddings.token_type_embeddings", "token_types"),
        ("embeddings.LayerNorm", "token_embd_norm"),
        ("encoder.layer.0.attention.output.LayerNorm", "blk.0.attn_output_norm"),
        ("encoder.layer.0.attention.output.dense", "blk.0.attn_output"),
        ("encoder.layer.0.intermediate.dense", "blk.0.ffn_up"),
        ("encoder.layer.0.output.dense", "blk.0.ffn_down"),
        ("encoder.layer.0.output.LayerNorm", "blk.0.layer_output_norm"),
    ];
    let read = tensors(&folder.join("model.safetensors"));
    let f32_of = |name: &str| read[name].to_dtype(candle_core::DType::F32).unwrap();
    let quantized = |tensor: &Tensor| QTensor::quantize(tensor, GgmlDType::F32).unwrap();
    let mut written = Vec::new();
    for (theirs, ours) in names {
        for suffix in ["weight", "bias"] {
            if read.contains_key(&format!("{theirs}.{suffix}")) {
                let mut tensor = f32_of(&format!("{theirs}.{suffix}"));
                if ours == "position_embd" {
                    tensor = tensor.narrow(0, 2, 128).unwrap().force_contiguous().unwrap();
                }
                written.push((format!("{ours}.{suffix}"), quantized(&tensor)));
            }
        }
    }
    // The three projections as one tensor, as newer conversions have it.
    for suffix in ["weight", "bias"] {
        let part = |name| f32_of(&format!("encoder.layer.0.attention.self.{name}.{suffix}"));
        let fused = Tensor::cat(&[part("query"), part("key"), part("value")], 0).unwrap();
        written.push((format!("blk.0.attn_qkv.{suffix}"), quantized(&fused)));
    }
    let copy = Copied::of("roberta-bf16");
    copy.remove("model.safetensors");
    let mut file = std::fs::File::create(copy.path("model.gguf")).unwrap();
    let architecture = Value::String("bert".to_string());
    let tensors: Vec<(&str, &QTensor)> = written.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut file, &[("general.architecture", &architecture)], &tensors).unwrap();
    let model = load_dir(copy.dir()).unwrap();
    assert_eq!((model.info.architecture.as_str(), model.info.max_seq_len), ("roberta", 128));
    assert_eq!(vector(&model), expected);
}
