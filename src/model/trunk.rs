//! What every task stands on: from token ids to hidden states.

use candle_core::Tensor;

use super::config::EncoderConfig;
use super::deberta::DebertaEncoder;
use super::gated::GatedTrunk;
use super::names::Names;
use super::post_norm::PostNormEncoder;
use super::weights::Weights;
use crate::Result;
use crate::ops::CuSeqlens;

/// A model without its head, on one device.
pub trait Trunk: Send + Sync {
    /// The hidden states after the last layer.
    ///
    /// Shapes: `input_ids`, `token_type_ids` [total_tokens] u32; no `token_type_ids` means all 0.
    /// Returns [total_tokens, hidden_size] f32.
    /// Errors: [`crate::Error::Shape`] for operands that do not fit each other or the model.
    fn forward(&self, input_ids: &Tensor, token_type_ids: Option<&Tensor>, cu_seqlens: &CuSeqlens) -> Result<Tensor>;
}

impl Trunk for PostNormEncoder {
    fn forward(&self, input_ids: &Tensor, token_type_ids: Option<&Tensor>, cu_seqlens: &CuSeqlens) -> Result<Tensor> {
        PostNormEncoder::forward(self, input_ids, token_type_ids, cu_seqlens)
    }
}

/// Reads the trunk that a config describes. Tensors it does not need (a pooler, a head) are left alone.
///
/// Blocks: reads the weights.
/// Errors: [`crate::Error::Tensor`] for one that is missing or does not have the config's shape.
pub fn load(weights: &Weights, config: &EncoderConfig) -> Result<Box<dyn Trunk>> {
    Ok(match (&config.gated, &config.deberta) {
        (Some(gated), _) => Box::new(GatedTrunk::load(weights, config, gated)?),
        (None, Some(deberta)) => Box::new(DebertaEncoder::load(weights, config, deberta)?),
        (None, None) => Box::new(PostNormEncoder::load(weights, config)?),
    })
}

/// What the word embeddings are called in these files, below any prefix.
pub(super) fn word_name(weights: &Weights, config: &EncoderConfig) -> &'static str {
    match &config.gated {
        None => Names::of(config.architecture, weights.format()).word,
        Some(gated) => gated.family.layouts()[0].word,
    }
}
