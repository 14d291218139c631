//! Each family's `config.json`: the names of its keys, its defaults, and what it may ask for that is not supported.

use std::path::Path;

use serde_json::{Value, json};

use super::super::config::{Architecture, EncoderConfig, lookup_activation};
use super::super::weights::file_error;
use super::config::{Family, GatedConfig, LayerConfig, NormKind, Rope, RopeScaling};
use super::keys::Keys;
use crate::Result;
use crate::ops::attention::Mask;

/// The shape of a trunk of this family.
///
/// Errors: [`crate::Error::ModelFile`] naming the key that is missing, of a wrong kind or not supported.
pub(in super::super) fn read(family: Family, name: &str, value: &Value, path: &Path) -> Result<EncoderConfig> {
    let keys = Keys { path, value };
    for (key, supported) in [("is_decoder", json!(false)), ("add_cross_attention", json!(false))] {
        keys.only(key, &[supported])?;
    }
    let config = match family {
        Family::ModernBert => modern_bert(&keys)?,
        Family::NomicBert => nomic_bert(&keys)?,
        Family::Gte => gte(&keys, name)?,
        Family::JinaBert => jina_bert(&keys)?,
        Family::Qwen3 => qwen3(&keys)?,
        Family::Mistral => mistral(&keys)?,
        Family::Gemma3 => gemma3(&keys)?,
    };
    checked(config, path)
}

/// The keys most families share, every layer alike and without positions; what differs is put over it.
fn shape(keys: &Keys, family: Family) -> Result<EncoderConfig> {
    let num_layers = keys.need(&["num_hidden_layers", "n_layer"])?;
    let num_heads = keys.need(&["num_attention_heads", "n_head"])?;
    let hidden_size = keys.need(&["hidden_size", "n_embd"])?;
    let head_dim = hidden_size / num_heads;
    Ok(EncoderConfig {
        architecture: Architecture::Gated(family),
        vocab_size: keys.need(&["vocab_size"])?,
        hidden_size,
        num_layers,
        num_heads,
        intermediate_size: keys.need(&["intermediate_size", "n_inner"])?,
        activation: Default::default(),
        layer_norm_eps: 1e-12,
        num_positions: keys.need(&["max_position_embeddings", "n_positions"])?,
        position_offset: 0,
        type_vocab_size: None,
        num_relative_buckets: None,
        projected_from: None,
        sharing: None,
        deberta: None,
        gated: Some(GatedConfig {
            family,
            head_dim,
            num_kv_heads: num_heads,
            scale: 1.0 / (head_dim as f64).sqrt(),
            embedding_scale: None,
            norm: NormKind::Layer { has_bias: true },
            first_norm: true,
            query_key_norm: false,
            qkv_bias: false,
            output_bias: false,
            gate_up_bias: false,
            down_bias: false,
            alibi: false,
            layers: vec![LayerConfig { mask: Mask::Full, rope: None }; num_layers],
        }),
    })
}

/// The same positions for every layer.
fn rope_everywhere(rope: Rope, num_layers: usize) -> Vec<LayerConfig> {
    vec![LayerConfig { mask: Mask::Full, rope: Some(rope) }; num_layers]
}

fn modern_bert(keys: &Keys) -> Result<EncoderConfig> {
    let config = shape(keys, Family::ModernBert)?;
    let every = keys.number(&["global_attn_every_n_layers"])?.unwrap_or(3);
    let radius = keys.number(&["local_attention"])?.unwrap_or(128) / 2;
    let global = keys.rope(Some("full_attention"), &["global_rope_theta"], 160_000.0, false)?;
    let local = keys.rope(Some("sliding_attention"), &["local_rope_theta"], 10_000.0, false)?;
    let sliding = keys.sliding(config.num_layers, |i| !i.is_multiple_of(every))?;
    let attention_bias = keys.flag("attention_bias", false)?;
    let mlp_bias = keys.flag("mlp_bias", false)?;
    let norm = NormKind::Layer { has_bias: keys.flag("norm_bias", false)? };
    with_gated(
        EncoderConfig {
            activation: lookup_activation(keys.text(&["hidden_activation"])?.unwrap_or("gelu"), keys.path)?,
            layer_norm_eps: keys.real(&["norm_eps"])?.unwrap_or(1e-5),
            ..config
        },
        |gated| GatedConfig {
            norm,
            first_norm: false,
            qkv_bias: attention_bias,
            output_bias: attention_bias,
            gate_up_bias: mlp_bias,
            down_bias: mlp_bias,
            layers: sliding
                .iter()
                .map(|sliding| match sliding {
                    true => LayerConfig { mask: Mask::Window { radius }, rope: Some(local) },
                    false => LayerConfig { mask: Mask::Full, rope: Some(global) },
                })
                .collect(),
            ..gated
        },
    )
}

fn nomic_bert(keys: &Keys) -> Result<EncoderConfig> {
    // Keys of the code published with the models, whose other values compute something else.
    for key in ["prenorm", "parallel_block", "use_rms_norm", "causal", "rotary_emb_interleaved"] {
        keys.only(key, &[json!(false)])?;
    }
    for key in ["scale_attn_by_inverse_layer_idx", "multi_query", "parallel_block_tied_norm"] {
        keys.only(key, &[json!(false)])?;
    }
    keys.only("scale_attn_weights", &[json!(true)])?;
    keys.only("rotary_emb_fraction", &[json!(1)])?;
    keys.only("rotary_emb_scale_base", &[])?;
    keys.only("rotary_scaling_factor", &[])?;
    for key in ["num_experts", "moe_every_n_layers"] {
        keys.only(key, &[json!(0)])?;
    }
    let config = shape(keys, Family::NomicBert)?;
    let activation = match keys.text(&["activation_function"])? {
        None => keys.text(&["hidden_act"])?.unwrap_or("silu"),
        Some("swiglu") => "silu",
        Some("geglu") => "gelu",
        Some(other) => {
            let reason = format!("`activation_function` `{other}` is not supported; supported: swiglu, geglu");
            return Err(file_error(keys.path, reason));
        }
    };
    let rope = keys.rope(None, &["rotary_emb_base"], 1000.0, false)?;
    let attention_bias = keys.flag("qkv_proj_bias", false)?;
    let (gate_up_bias, down_bias) = (keys.flag("mlp_fc1_bias", false)?, keys.flag("mlp_fc2_bias", false)?);
    let head_dim = keys.number(&["head_dim"])?;
    let num_layers = config.num_layers;
    with_gated(
        EncoderConfig {
            activation: lookup_activation(activation, keys.path)?,
            layer_norm_eps: keys.real(&["layer_norm_eps", "layer_norm_epsilon"])?.unwrap_or(1e-12),
            type_vocab_size: token_types(keys, 2)?,
            ..config
        },
        |gated| {
            let head_dim = head_dim.unwrap_or(gated.head_dim);
            GatedConfig {
                head_dim,
                scale: 1.0 / (head_dim as f64).sqrt(),
                qkv_bias: attention_bias,
                output_bias: attention_bias,
                gate_up_bias,
                down_bias,
                layers: rope_everywhere(rope, num_layers),
                ..gated
            }
        },
    )
}

fn gte(keys: &Keys, name: &str) -> Result<EncoderConfig> {
    keys.only("position_embedding_type", &[json!("rope")])?;
    keys.only("layer_norm_type", &[json!("layer_norm")])?;
    keys.only("logn_attention_scale", &[json!(false)])?;
    keys.only("logn_attention_clip1", &[json!(false)])?;
    let config = shape(keys, Family::Gte)?;
    let default_theta = if name == "new" { 10_000.0 } else { 160_000.0 };
    let rope = keys.rope(None, &["rope_theta"], default_theta, true)?;
    let num_layers = config.num_layers;
    with_gated(
        EncoderConfig {
            activation: lookup_activation(keys.text(&["hidden_act"])?.unwrap_or("gelu"), keys.path)?,
            layer_norm_eps: keys.real(&["layer_norm_eps"])?.unwrap_or(1e-12),
            type_vocab_size: token_types(keys, 1)?,
            ..config
        },
        |gated| GatedConfig {
            qkv_bias: true,
            output_bias: true,
            down_bias: true,
            layers: rope_everywhere(rope, num_layers),
            ..gated
        },
    )
}

fn jina_bert(keys: &Keys) -> Result<EncoderConfig> {
    keys.only("position_embedding_type", &[json!("alibi")])?;
    let config = shape(keys, Family::JinaBert)?;
    let activation = match keys.text(&["feed_forward_type"])? {
        Some("geglu") => "gelu",
        Some("reglu") => "relu",
        other => {
            let got = other.unwrap_or("original");
            let reason = format!("`feed_forward_type` `{got}` is not supported; supported: geglu, reglu");
            return Err(file_error(keys.path, reason));
        }
    };
    with_gated(
        EncoderConfig {
            activation: lookup_activation(activation, keys.path)?,
            layer_norm_eps: keys.real(&["layer_norm_eps"])?.unwrap_or(1e-12),
            type_vocab_size: token_types(keys, 2)?,
            ..config
        },
        |gated| GatedConfig { qkv_bias: true, output_bias: true, down_bias: true, alibi: true, ..gated },
    )
}

/// What decoders share: RMS norms, shared heads of keys and values, a head dimension of their own.
fn decoder(keys: &Keys, family: Family, default_head_dim: Option<usize>) -> Result<EncoderConfig> {
    let config = shape(keys, family)?;
    let head_dim = keys.number(&["head_dim"])?.or(default_head_dim);
    let num_kv_heads = keys.number(&["num_key_value_heads"])?;
    with_gated(
        EncoderConfig {
            activation: lookup_activation(
                keys.text(&["hidden_act", "hidden_activation"])?.unwrap_or("silu"),
                keys.path,
            )?,
            layer_norm_eps: keys.real(&["rms_norm_eps"])?.unwrap_or(1e-6),
            ..config
        },
        |gated| {
            let head_dim = head_dim.unwrap_or(gated.head_dim);
            GatedConfig {
                head_dim,
                num_kv_heads: num_kv_heads.unwrap_or(gated.num_kv_heads),
                scale: 1.0 / (head_dim as f64).sqrt(),
                norm: NormKind::Rms,
                ..gated
            }
        },
    )
}

fn qwen3(keys: &Keys) -> Result<EncoderConfig> {
    keys.only("is_causal", &[json!(true)])?;
    keys.only("use_bidirectional_attention", &[json!(false)])?;
    let config = decoder(keys, Family::Qwen3, Some(128))?;
    let rope = Some(keys.rope(None, &["rope_theta"], 10_000.0, false)?);
    let window = match keys.flag("use_sliding_window", false)? {
        true => keys.number(&["sliding_window"])?,
        false => None,
    };
    let first = keys.number(&["max_window_layers"])?.unwrap_or(28);
    let sliding = keys.sliding(config.num_layers, |i| window.is_some() && i >= first)?;
    let bias = keys.flag("attention_bias", false)?;
    let layers = sliding.iter().map(|sliding| match (sliding, window) {
        (true, Some(size)) => LayerConfig { mask: Mask::CausalWindow { size }, rope },
        _ => LayerConfig { mask: Mask::Causal, rope },
    });
    let layers = layers.collect();
    with_gated(config, |gated| GatedConfig { query_key_norm: true, qkv_bias: bias, output_bias: bias, layers, ..gated })
}

fn mistral(keys: &Keys) -> Result<EncoderConfig> {
    keys.only("is_causal", &[json!(true)])?;
    keys.only("use_bidirectional_attention", &[json!(false)])?;
    keys.only("layer_types", &[])?;
    let config = decoder(keys, Family::Mistral, None)?;
    let rope = Some(keys.rope(None, &["rope_theta"], 10_000.0, false)?);
    // Without the key it is 4096, with null there is none.
    let window = match keys.value.get("sliding_window") {
        None => Some(4096),
        Some(_) => keys.number(&["sliding_window"])?,
    };
    let mask = window.map_or(Mask::Causal, |size| Mask::CausalWindow { size });
    let layers = vec![LayerConfig { mask, rope }; config.num_layers];
    with_gated(config, |gated| GatedConfig { layers, ..gated })
}

fn gemma3(keys: &Keys) -> Result<EncoderConfig> {
    keys.only("attn_logit_softcapping", &[])?;
    let mut config = decoder(keys, Family::Gemma3, Some(256))?;
    if keys.text(&["hidden_activation", "hidden_act"])?.is_none() {
        config.activation = lookup_activation("gelu_pytorch_tanh", keys.path)?;
    }
    let global = keys.rope(Some("full_attention"), &["rope_theta"], 1_000_000.0, false)?;
    let mut local = keys.rope(Some("sliding_attention"), &["rope_local_base_freq"], 10_000.0, false)?;
    if keys.value.get("rope_parameters").is_none_or(Value::is_null) {
        // The older form stretches the global layers alone.
        local.scaling = RopeScaling::None;
    }
    let pattern = keys.number(&["sliding_window_pattern", "_sliding_window_pattern"])?.unwrap_or(6);
    let sliding = keys.sliding(config.num_layers, |i| !(i + 1).is_multiple_of(pattern))?;
    let window = keys.number(&["sliding_window"])?.unwrap_or(4096);
    let (full, narrow) = match keys.flag("use_bidirectional_attention", false)? {
        // transformers halves the window then, and looks that far to both sides.
        true => (Mask::Full, Mask::Window { radius: window / 2 }),
        false => (Mask::Causal, Mask::CausalWindow { size: window }),
    };
    let layers = sliding.iter().map(|sliding| match sliding {
        true => LayerConfig { mask: narrow, rope: Some(local) },
        false => LayerConfig { mask: full, rope: Some(global) },
    });
    let layers = layers.collect();
    let scalar = keys.real(&["query_pre_attn_scalar"])?.unwrap_or(256.0);
    let bias = keys.flag("attention_bias", false)?;
    let hidden_size = config.hidden_size;
    with_gated(config, |gated| GatedConfig {
        scale: 1.0 / scalar.sqrt(),
        embedding_scale: Some((hidden_size as f64).sqrt()),
        norm: NormKind::RmsAboveOne,
        query_key_norm: true,
        qkv_bias: bias,
        output_bias: bias,
        layers,
        ..gated
    })
}

/// Rows of the token-type table; 0 means that there is none.
fn token_types(keys: &Keys, default: usize) -> Result<Option<usize>> {
    match keys.value.get("type_vocab_size").and_then(Value::as_u64) {
        Some(0) => Ok(None),
        _ => Ok(Some(keys.number(&["type_vocab_size"])?.unwrap_or(default))),
    }
}

fn with_gated(config: EncoderConfig, change: impl FnOnce(GatedConfig) -> GatedConfig) -> Result<EncoderConfig> {
    let gated = config.gated.map(change);
    Ok(EncoderConfig { gated, ..config })
}

/// Refuses sizes that do not fit each other, so that what follows can divide by them.
fn checked(config: EncoderConfig, path: &Path) -> Result<EncoderConfig> {
    let Some(gated) = &config.gated else { return Ok(config) };
    if !config.num_heads.is_multiple_of(gated.num_kv_heads) {
        let (heads, kv_heads) = (config.num_heads, gated.num_kv_heads);
        let reason = format!("`num_attention_heads` {heads} is no multiple of `num_key_value_heads` {kv_heads}");
        return Err(file_error(path, reason));
    }
    if gated.head_dim == 0 || !gated.head_dim.is_multiple_of(2) {
        return Err(file_error(path, format!("`head_dim` {} is no even number from 2", gated.head_dim)));
    }
    Ok(config)
}
