//! Gated layers: the ways their models lie on disk, what they refuse, and rows that do not depend on their batch.

use candle_core::Tensor;
use eremois::Error;
use eremois::model::quantize::{Target, quantize};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::common::*;

const FIXTURES: [&str; 8] = ["modernbert", "nomic-bert", "qwen3", "gte", "gte-ntk", "jina-v2", "mistral", "gemma3"];

/// Longer than every window of the fixtures.
fn sequence(len: usize, seed: usize) -> Vec<u32> {
    (0..len).map(|i| (5 + (i * 37 + seed * 11) % 190) as u32).collect()
}

fn vector(dir: &std::path::Path) -> Vec<f32> {
    let model = load_dir(dir).unwrap_or_else(|e| panic!("{e}"));
    run(&model, &[sequence(60, 1)], false).row(0).to_vec()
}

fn config(copy: &Copied, changes: &[(&str, Value)]) {
    copy.json("config.json", |config| {
        for (key, value) in changes {
            match value {
                Value::Null => drop(config.as_object_mut().unwrap().remove(*key)),
                value => config[*key] = value.clone(),
            }
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn a_row_is_the_same_alone(lengths in prop::collection::vec((1usize..=200, 0usize..1000), 1..8)) {
        for name in FIXTURES {
            let model = load_dir(&fixture(name)).unwrap();
            let sequences: Vec<Vec<u32>> = lengths.iter().map(|&(len, seed)| sequence(len, seed)).collect();
            let together = run(&model, &sequences, true);
            for (i, sequence) in sequences.iter().enumerate() {
                let alone = run(&model, std::slice::from_ref(sequence), true);
                let diff = max_abs_diff(together.row(i), alone.row(0));
                prop_assert!(diff <= 1e-6, "{name}: row {i} of {} tokens differs by {diff}", sequence.len());
            }
        }
    }
}

/// The keys that checkpoints had before transformers 5.
#[test]
fn older_keys_say_the_same() {
    let cases: [(&str, &[(&str, Value)]); 4] = [
        (
            "modernbert",
            &[
                ("layer_types", Value::Null),
                ("rope_parameters", Value::Null),
                ("global_attn_every_n_layers", json!(2)),
                ("global_rope_theta", json!(160000.0)),
                ("local_rope_theta", json!(10000.0)),
            ],
        ),
        (
            "nomic-bert",
            &[
                ("hidden_size", Value::Null),
                ("num_hidden_layers", Value::Null),
                ("num_attention_heads", Value::Null),
                ("intermediate_size", Value::Null),
                ("max_position_embeddings", Value::Null),
                ("hidden_act", Value::Null),
                ("layer_norm_eps", Value::Null),
                ("rope_parameters", Value::Null),
                ("head_dim", Value::Null),
                ("n_embd", json!(48)),
                ("n_layer", json!(2)),
                ("n_head", json!(3)),
                ("n_inner", json!(40)),
                ("n_positions", json!(256)),
                ("activation_function", json!("swiglu")),
                ("layer_norm_epsilon", json!(1e-12)),
                ("rotary_emb_base", json!(1000)),
                ("rotary_emb_fraction", json!(1.0)),
                ("rotary_emb_interleaved", json!(false)),
                ("prenorm", json!(false)),
                ("qkv_proj_bias", json!(false)),
            ],
        ),
        ("qwen3", &[("layer_types", Value::Null), ("rope_parameters", Value::Null), ("rope_theta", json!(10000))]),
        (
            "gemma3",
            &[
                ("layer_types", Value::Null),
                ("_sliding_window_pattern", Value::Null),
                ("sliding_window_pattern", json!(2)),
                ("rope_parameters", Value::Null),
                ("rope_theta", json!(1000000.0)),
                ("rope_local_base_freq", json!(10000.0)),
            ],
        ),
    ];
    for (name, changes) in cases {
        let copy = Copied::of(name);
        config(&copy, changes);
        assert_eq!(vector(copy.dir()), vector(&fixture(name)), "{name}");
    }
}

/// The names that transformers 5 gives the tensors, where it does not write the published ones.
#[test]
fn newer_names_say_the_same() {
    let copy = Copied::of("gte");
    let split = |tensors: &mut std::collections::HashMap<String, Tensor>, from: &str, to: &[&str]| {
        let whole = tensors.remove(from).unwrap();
        let rows = whole.dims()[0] / to.len();
        for (i, name) in to.iter().enumerate() {
            tensors.insert(name.to_string(), whole.narrow(0, i * rows, rows).unwrap().force_contiguous().unwrap());
        }
    };
    copy.weights(|tensors| {
        for i in 0..2 {
            let (old, new) = (format!("encoder.layer.{i}"), format!("gte.layers.{i}"));
            for part in ["weight", "bias"] {
                let to = ["q", "k", "v"].map(|name| format!("{new}.self_attn.{name}_proj.{part}"));
                let to: Vec<&str> = to.iter().map(String::as_str).collect();
                split(tensors, &format!("{old}.attention.qkv_proj.{part}"), &to);
            }
            let to = ["up", "gate"].map(|name| format!("{new}.mlp.{name}_proj.weight"));
            split(tensors, &format!("{old}.mlp.up_gate_proj.weight"), &[&to[0], &to[1]]);
        }
        let renamed: Vec<_> = tensors
            .drain()
            .map(|(name, tensor)| {
                let name = name
                    .replace("encoder.layer.", "gte.layers.")
                    .replace("attention.o_proj", "self_attn.o_proj")
                    .replace("attn_ln", "post_attention_layernorm")
                    .replace("mlp_ln", "post_mlp_layernorm");
                let name = if name.starts_with("embeddings.") { format!("gte.{name}") } else { name };
                (name, tensor)
            })
            .collect();
        tensors.extend(renamed);
    });
    assert_eq!(vector(copy.dir()), vector(&fixture("gte")));
}

/// What a config asks for and is not computed is refused by its key, before any weight is read.
#[test]
fn what_is_not_supported_is_refused_by_name() {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0});
    let cases: [(&str, &str, Value, &str); 24] = [
        ("modernbert", "hidden_size", Value::Null, "`hidden_size` or `n_embd` is missing"),
        ("modernbert", "layer_types", json!(["full_attention"]), "`layer_types` must be 3 times"),
        ("modernbert", "layer_types", json!(["full_attention", "chunked", "full_attention"]), "chunked"),
        ("modernbert", "rope_parameters", json!({"full_attention": yarn}), "`rope_type` `yarn`"),
        ("modernbert", "hidden_activation", json!("mish"), "activation `mish`"),
        ("modernbert", "num_attention_heads", json!(0), "`num_attention_heads` must be a whole number from 1, got 0"),
        ("nomic-bert", "prenorm", json!(true), "`prenorm` true is not supported; supported: false"),
        ("nomic-bert", "rotary_emb_fraction", json!(0.5), "`rotary_emb_fraction` 0.5 is not supported"),
        (
            "nomic-bert",
            "rotary_scaling_factor",
            json!(2),
            "`rotary_scaling_factor` 2 is not supported; supported: null",
        ),
        ("nomic-bert", "num_experts", json!(8), "`num_experts` 8"),
        ("nomic-bert", "activation_function", json!("glu"), "`activation_function` `glu`"),
        ("nomic-bert", "head_dim", json!(15), "`head_dim` 15"),
        ("qwen3", "num_key_value_heads", json!(3), "no multiple of `num_key_value_heads` 3"),
        ("qwen3", "is_causal", json!(false), "`is_causal` false"),
        ("qwen3", "rope_scaling", yarn.clone(), "`rope_type` `yarn`"),
        ("qwen3", "rope_parameters", yarn, "`rope_type` `yarn`"),
        ("qwen3", "rope_parameters", json!({"partial_rotary_factor": 0.5}), "`partial_rotary_factor` 0.5"),
        ("gte-ntk", "logn_attention_scale", json!(true), "`logn_attention_scale` true"),
        ("gte-ntk", "position_embedding_type", json!("absolute"), "`position_embedding_type` \"absolute\""),
        ("gte-ntk", "rope_scaling", json!({"type": "ntk", "factor": 4.0, "mixed_b": 0.5}), "`mixed_b` 0.5"),
        ("gte-ntk", "rope_scaling", json!({"type": "ntk"}), "`factor` of rotary positions is missing"),
        ("jina-v2", "feed_forward_type", json!("original"), "`feed_forward_type` `original`"),
        ("gemma3", "attn_logit_softcapping", json!(50.0), "`attn_logit_softcapping` 50.0"),
        ("mistral", "layer_types", json!(["full_attention"]), "`layer_types`"),
    ];
    for (name, key, value, expected) in cases {
        let copy = Copied::of(name);
        config(&copy, &[(key, value)]);
        match load_dir(copy.dir()) {
            Err(Error::ModelFile { file, reason }) => {
                assert!(file.ends_with("config.json") && reason.contains(expected), "{name}, {key}: {reason}");
            }
            Err(other) => panic!("{name}, {key}: {other:?}"),
            Ok(_) => panic!("{name}, {key}: it loads"),
        }
    }
}

#[test]
fn a_missing_tensor_is_named() {
    for (name, tensor) in [
        ("modernbert", "model.layers.1.attn_norm.weight"),
        ("qwen3", "layers.1.self_attn.q_norm.weight"),
        ("jina-v2", "encoder.layer.0.attention.output.dense.weight"),
        ("gemma3", "layers.0.pre_feedforward_layernorm.weight"),
    ] {
        let copy = Copied::of(name);
        copy.weights(|tensors| drop(tensors.remove(tensor).unwrap()));
        match load_dir(copy.dir()) {
            Err(Error::Tensor { tensor: got, .. }) => assert_eq!(got, tensor),
            other => panic!("{name}: {:?}", other.err()),
        }
    }
}

#[test]
fn gguf_is_neither_read_nor_written() {
    let copy = Copied::of("modernbert");
    let error = quantize(&spec(copy.dir()), Target::F16, &copy.path("model.gguf")).unwrap_err().to_string();
    assert!(error.contains("GGUF has no form") && !copy.path("model.gguf").exists(), "{error}");
    copy.remove("model.safetensors");
    std::fs::copy(fixture("bert-gguf").join("bert.gguf"), copy.path("bert.gguf")).unwrap();
    let error = load_dir(copy.dir()).err().expect("it is a BERT").to_string();
    assert!(error.contains("GGUF is supported for bert alone"), "{error}");
}

/// Jina v2's config calls itself `bert`; a manifest may name it, and what it cannot be is refused.
#[test]
fn a_manifest_names_the_architecture() {
    let mut spec = spec(&fixture("jina-v2"));
    assert_eq!(load_spec(&spec).unwrap().info.architecture, "jina_bert");
    spec.architecture = Some("jina_bert".to_string());
    assert_eq!(load_spec(&spec).unwrap().info.architecture, "jina_bert");
    spec.architecture = Some("roberta".to_string());
    let error = load_spec(&spec).err().expect("RoBERTa has no ALiBi").to_string();
    assert!(error.contains("`position_embedding_type` `alibi`"), "{error}");
}
