//! What a trunk of gated layers is made of, as data.

use super::names::{self, Layout};
use crate::ops::attention::Mask;
use crate::ops::rotary;

/// Architectures whose layers are gated ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Warner et al. 2024: norms before, every n-th layer global and the others local.
    ModernBert,
    /// Nussbaum et al. 2024: BERT's order with rotary positions and SwiGLU.
    NomicBert,
    /// Zhang et al. 2024 (mGTE): BERT's order with rotary positions and GeGLU.
    Gte,
    /// Günther et al. 2023: BERT's order with ALiBi on both sides.
    JinaBert,
    /// Causal, with norms over each head's queries and keys.
    Qwen3,
    /// Causal within a window.
    Mistral,
    /// Norms on both sides of each half; causal or not.
    Gemma3,
}

impl Family {
    /// The ways its tensors are called, the usual one first.
    pub(in super::super) fn layouts(self) -> &'static [Layout] {
        match self {
            Self::ModernBert => &[names::MODERN_BERT],
            Self::NomicBert => &[names::NOMIC, names::POST_NORM],
            Self::Gte => &[names::NEW, names::POST_NORM],
            Self::JinaBert => &[names::JINA],
            Self::Qwen3 | Self::Mistral => &[names::DECODER],
            Self::Gemma3 => &[names::GEMMA],
        }
    }
}

/// What a trunk's shape does not say.
#[derive(Debug, Clone, PartialEq)]
pub struct GatedConfig {
    pub family: Family,
    pub head_dim: usize,
    /// Heads of keys and of values.
    pub num_kv_heads: usize,
    /// Scores are multiplied by it.
    pub scale: f64,
    /// Word embeddings are multiplied by it.
    pub embedding_scale: Option<f64>,
    pub norm: NormKind,
    /// Whether the first layer's attention has a norm before it.
    pub first_norm: bool,
    /// Whether each head's queries and keys are RMS-normalised.
    pub query_key_norm: bool,
    pub qkv_bias: bool,
    pub output_bias: bool,
    pub gate_up_bias: bool,
    pub down_bias: bool,
    /// Whether scores fall off with distance.
    pub alibi: bool,
    /// [num_layers]
    pub layers: Vec<LayerConfig>,
}

/// What layers of one trunk differ in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerConfig {
    pub mask: Mask,
    /// Rotary positions.
    pub rope: Option<Rope>,
}

/// How layers are normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    Layer {
        has_bias: bool,
    },
    Rms,
    /// The file holds weight - 1.
    RmsAboveOne,
}

/// How far positions turn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// How positions are stretched beyond those of the training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    None,
    /// Positions divided by a factor: Chen et al. 2023.
    Linear {
        factor: f64,
    },
    /// The base multiplied by a factor, frequencies divided by `factor^(2 / head_dim)`, at every length: what GTE's own
    /// code calls NTK. Source: Zhang et al. 2024 (mGTE), section 3.1 and the code published with the models.
    Ntk {
        factor: f64,
    },
}

impl Rope {
    /// Radians a token of each pair. Returns [head_dim / 2].
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        let divided = |theta: f64, by: f64| {
            rotary::inverse_frequencies(theta, head_dim).into_iter().map(|f| f / by as f32).collect()
        };
        match self.scaling {
            RopeScaling::None => rotary::inverse_frequencies(self.theta, head_dim),
            RopeScaling::Linear { factor } => divided(self.theta, factor),
            RopeScaling::Ntk { factor } => divided(self.theta * factor, factor.powf(2.0 / head_dim as f64)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_are_stretched_as_asked() {
        let of = |scaling| Rope { theta: 100.0, scaling }.inverse_frequencies(4);
        assert_eq!(of(RopeScaling::None), [1.0, 0.1]);
        assert_eq!(of(RopeScaling::Linear { factor: 4.0 }), [0.25, 0.025]);
        // A base of 400 gives 1 and 1 / 20, each over 4^(1/2).
        assert_eq!(of(RopeScaling::Ntk { factor: 4.0 }), [0.5, 0.025]);
    }
}
