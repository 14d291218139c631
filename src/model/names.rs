//! What each architecture and file format calls the encoder's tensors.

use super::config::Architecture;
use super::weights::{Format, Weights, file_error};
use crate::Result;

/// Names of one encoder's tensors. A layer's names follow `layer` with the layer's index for `{}`, or its group's
/// for `{group}` and its own within the group for `{inner}`; each linear and norm has a `.weight` and a `.bias`.
pub(super) struct Names {
    pub word: &'static str,
    pub position: &'static str,
    pub token_type: &'static str,
    pub embedding_norm: &'static str,
    /// The linear from narrower tables to the layers: ELECTRA's, ALBERT's.
    pub projection: &'static str,
    /// MPNet's table of relative distances.
    pub relative_bias: &'static str,
    pub layer: &'static str,
    pub query: &'static str,
    pub key: &'static str,
    pub value: &'static str,
    /// Query, key and value in one tensor, as newer llama.cpp conversions have it.
    pub qkv: &'static str,
    pub attention_output: &'static str,
    pub attention_norm: &'static str,
    pub up: &'static str,
    pub down: &'static str,
    pub output_norm: &'static str,
}

const BERT: Names = Names {
    word: "embeddings.word_embeddings.weight",
    position: "embeddings.position_embeddings.weight",
    token_type: "embeddings.token_type_embeddings.weight",
    embedding_norm: "embeddings.LayerNorm",
    projection: "embeddings_project",
    relative_bias: "encoder.relative_attention_bias.weight",
    layer: "encoder.layer.{}.",
    query: "attention.self.query",
    key: "attention.self.key",
    value: "attention.self.value",
    qkv: "attention.self.qkv",
    attention_output: "attention.output.dense",
    attention_norm: "attention.output.LayerNorm",
    up: "intermediate.dense",
    down: "output.dense",
    output_norm: "output.LayerNorm",
};

const MPNET: Names = Names {
    query: "attention.attn.q",
    key: "attention.attn.k",
    value: "attention.attn.v",
    qkv: "attention.attn.qkv",
    attention_output: "attention.attn.o",
    attention_norm: "attention.LayerNorm",
    ..BERT
};

const DISTILBERT: Names = Names {
    layer: "transformer.layer.{}.",
    query: "attention.q_lin",
    key: "attention.k_lin",
    value: "attention.v_lin",
    qkv: "attention.qkv_lin",
    attention_output: "attention.out_lin",
    attention_norm: "sa_layer_norm",
    up: "ffn.lin1",
    down: "ffn.lin2",
    output_norm: "output_layer_norm",
    ..BERT
};

const ALBERT: Names = Names {
    projection: "encoder.embedding_hidden_mapping_in",
    layer: "encoder.albert_layer_groups.{group}.albert_layers.{inner}.",
    query: "attention.query",
    key: "attention.key",
    value: "attention.value",
    qkv: "attention.qkv",
    attention_output: "attention.dense",
    attention_norm: "attention.LayerNorm",
    up: "ffn",
    down: "ffn_output",
    output_norm: "full_layer_layer_norm",
    ..BERT
};

/// The first version has query, key and value in `in_proj`, and is read by [`super::deberta`].
const DEBERTA: Names = Names {
    query: "attention.self.query_proj",
    key: "attention.self.key_proj",
    value: "attention.self.value_proj",
    ..BERT
};

/// llama.cpp's names, the same for every BERT-like encoder.
pub(super) const GGUF: Names = Names {
    word: "token_embd.weight",
    position: "position_embd.weight",
    token_type: "token_types.weight",
    embedding_norm: "token_embd_norm",
    projection: "token_embd_projection",
    relative_bias: "attn_rel_b.weight",
    layer: "blk.{}.",
    query: "attn_q",
    key: "attn_k",
    value: "attn_v",
    qkv: "attn_qkv",
    attention_output: "attn_output",
    attention_norm: "attn_output_norm",
    up: "ffn_up",
    down: "ffn_down",
    output_norm: "layer_output_norm",
};

impl Names {
    /// The names a file of this format has for this architecture.
    pub fn of(architecture: Architecture, format: Format) -> &'static Names {
        match (format, architecture) {
            (Format::Gguf, _) => &GGUF,
            (_, Architecture::Bert | Architecture::Roberta | Architecture::XlmRoberta | Architecture::Electra) => &BERT,
            (_, Architecture::DistilBert) => &DISTILBERT,
            (_, Architecture::MpNet) => &MPNET,
            (_, Architecture::Albert) => &ALBERT,
            (_, Architecture::Deberta | Architecture::DebertaV2) => &DEBERTA,
            // Never asked for: `gated` has layouts of its own, and what writes GGUF or uploads weights by these
            // names refuses gated layers first.
            (_, Architecture::Gated(_)) => &BERT,
        }
    }

    /// What stands before the names of layer `i`, of `layers_per_group` layers in a group.
    pub fn layer(&self, i: usize, layers_per_group: usize) -> String {
        let (group, inner) = (i / layers_per_group, i % layers_per_group);
        let layer = self.layer.replace("{}", &i.to_string());
        layer.replace("{group}", &group.to_string()).replace("{inner}", &inner.to_string())
    }

    /// [`prefix`] of these names.
    pub fn prefix(&self, weights: &Weights) -> Result<String> {
        prefix(self.word, weights)
    }
}

/// What stands before every name: "" for a bare encoder, "bert." or "roberta." where a head was trained on top.
/// Found by the word embeddings, the one tensor every encoder has.
///
/// Errors: [`crate::Error::Tensor`] if no tensor ends like the word embeddings, or [`crate::Error::ModelFile`] if two
/// do.
pub(super) fn prefix(word: &str, weights: &Weights) -> Result<String> {
    let mut prefixes: Vec<&str> = weights
        .names()
        .into_iter()
        .filter_map(|name| name.strip_suffix(word))
        .filter(|prefix| prefix.is_empty() || prefix.ends_with('.'))
        .collect();
    prefixes.sort_unstable();
    match prefixes.as_slice() {
        [prefix] => Ok(prefix.to_string()),
        [] => Err(crate::Error::Tensor {
            file: weights.path().to_path_buf(),
            tensor: word.to_string(),
            expected: "the word embeddings, under any prefix".to_string(),
            got: "no such tensor".to_string(),
        }),
        several => {
            let reason = format!("several encoders: `{}` with prefixes {}", word, several.join(", "));
            Err(file_error(weights.path(), reason))
        }
    }
}
