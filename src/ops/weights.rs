//! The weights of a post-norm encoder as checkpoints have them: what any device's form of it is built from.

use candle_core::Tensor;

/// `x weightᵀ + bias`. Shapes: `weight` [out, in]; `bias` [out].
pub struct LinearWeights {
    pub weight: Tensor,
    pub bias: Tensor,
}

/// A LayerNorm's scale and shift. Shapes: [hidden_size] each.
pub struct NormWeights {
    pub weight: Tensor,
    pub bias: Tensor,
}

/// The tables of [`super::embedding::Embedding`] and the norm after them.
pub struct EmbeddingWeights {
    /// [vocab_size, hidden_size]
    pub word: Tensor,
    /// [num_positions, hidden_size]
    pub position: Tensor,
    /// [type_vocab_size, hidden_size]; `None` for architectures without.
    pub token_type: Option<Tensor>,
    pub norm: NormWeights,
}

/// One layer.
pub struct LayerWeights {
    /// [3 * hidden_size, hidden_size]: query, key, value.
    pub qkv: LinearWeights,
    /// [hidden_size, hidden_size]
    pub attention_output: LinearWeights,
    pub attention_norm: NormWeights,
    /// [intermediate_size, hidden_size]
    pub up: LinearWeights,
    /// [hidden_size, intermediate_size]
    pub down: LinearWeights,
    pub output_norm: NormWeights,
}
