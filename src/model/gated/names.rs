//! What each family calls its tensors.

/// Where three projections lie.
#[derive(Debug)]
pub(super) enum Qkv {
    /// A tensor each.
    Split([&'static str; 3]),
    /// One after another in one tensor.
    Fused(&'static str),
}

/// Where the two products of a gated feed-forward part lie. The gate is the one with the activation.
#[derive(Debug)]
pub(super) enum GateUp {
    Split {
        gate: &'static str,
        up: &'static str,
    },
    /// One tensor, the gate's rows first.
    GateFirst(&'static str),
    /// One tensor, the gate's rows last.
    GateLast(&'static str),
}

/// The norms around a half of a layer, as far as there are any: `sum(hidden + after(half(before(hidden))))`.
#[derive(Debug)]
pub(super) struct Around {
    pub before: Option<&'static str>,
    pub after: Option<&'static str>,
    pub sum: Option<&'static str>,
}

/// Names of one trunk's tensors. A layer's names follow `layer` with the layer's index for `{}`; each linear and norm
/// has a `.weight` and perhaps a `.bias`.
#[derive(Debug)]
pub(in super::super) struct Layout {
    pub word: &'static str,
    pub(super) token_type: &'static str,
    pub(super) embedding_norm: Option<&'static str>,
    pub(super) layer: &'static str,
    pub(super) qkv: Qkv,
    pub(super) query_norm: &'static str,
    pub(super) key_norm: &'static str,
    pub(super) attention_output: &'static str,
    pub(super) attention: Around,
    pub(super) gate_up: GateUp,
    pub(super) down: &'static str,
    pub(super) feed_forward: Around,
    pub(super) final_norm: Option<&'static str>,
}

const SPLIT: Qkv = Qkv::Split(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]);
const SPLIT_GATE: GateUp = GateUp::Split { gate: "mlp.gate_proj", up: "mlp.up_proj" };

const fn before(name: &'static str) -> Around {
    Around { before: Some(name), after: None, sum: None }
}

const fn sum(name: &'static str) -> Around {
    Around { before: None, after: None, sum: Some(name) }
}

/// Qwen3 and Mistral.
pub(super) const DECODER: Layout = Layout {
    word: "embed_tokens.weight",
    token_type: "",
    embedding_norm: None,
    layer: "layers.{}.",
    qkv: SPLIT,
    query_norm: "self_attn.q_norm",
    key_norm: "self_attn.k_norm",
    attention_output: "self_attn.o_proj",
    attention: before("input_layernorm"),
    gate_up: SPLIT_GATE,
    down: "mlp.down_proj",
    feed_forward: before("post_attention_layernorm"),
    final_norm: Some("norm"),
};

/// Gemma 3: norms on both sides of each half.
pub(super) const GEMMA: Layout = Layout {
    attention: Around { before: Some("input_layernorm"), after: Some("post_attention_layernorm"), sum: None },
    feed_forward: Around {
        before: Some("pre_feedforward_layernorm"),
        after: Some("post_feedforward_layernorm"),
        sum: None,
    },
    ..DECODER
};

pub(super) const MODERN_BERT: Layout = Layout {
    word: "embeddings.tok_embeddings.weight",
    embedding_norm: Some("embeddings.norm"),
    qkv: Qkv::Fused("attn.Wqkv"),
    attention_output: "attn.Wo",
    attention: before("attn_norm"),
    gate_up: GateUp::GateFirst("mlp.Wi"),
    down: "mlp.Wo",
    feed_forward: before("mlp_norm"),
    final_norm: Some("final_norm"),
    ..DECODER
};

/// NomicBERT and GTE as transformers has them since its release 5.
pub(super) const POST_NORM: Layout = Layout {
    word: "embeddings.word_embeddings.weight",
    token_type: "embeddings.token_type_embeddings.weight",
    embedding_norm: Some("embeddings.LayerNorm"),
    attention: sum("post_attention_layernorm"),
    feed_forward: sum("post_mlp_layernorm"),
    final_norm: None,
    ..DECODER
};

/// NomicBERT as its authors published it.
pub(super) const NOMIC: Layout = Layout {
    embedding_norm: Some("emb_ln"),
    layer: "encoder.layers.{}.",
    qkv: Qkv::Fused("attn.Wqkv"),
    attention_output: "attn.out_proj",
    attention: sum("norm1"),
    gate_up: GateUp::Split { gate: "mlp.fc12", up: "mlp.fc11" },
    down: "mlp.fc2",
    feed_forward: sum("norm2"),
    ..POST_NORM
};

/// GTE as its authors published it, with the `model_type` `new`.
pub(super) const NEW: Layout = Layout {
    layer: "encoder.layer.{}.",
    qkv: Qkv::Fused("attention.qkv_proj"),
    attention_output: "attention.o_proj",
    attention: sum("attn_ln"),
    gate_up: GateUp::GateLast("mlp.up_gate_proj"),
    feed_forward: sum("mlp_ln"),
    ..POST_NORM
};

pub(super) const JINA: Layout = Layout {
    layer: "encoder.layer.{}.",
    qkv: Qkv::Split(["attention.self.query", "attention.self.key", "attention.self.value"]),
    attention_output: "attention.output.dense",
    attention: sum("attention.output.LayerNorm"),
    gate_up: GateUp::GateFirst("mlp.gated_layers"),
    down: "mlp.wo",
    feed_forward: sum("mlp.layernorm"),
    ..POST_NORM
};
