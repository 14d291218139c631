//! What every architecture is to the heads above it: token ids in, hidden states out.

use candle_core::Tensor;

use super::config::EncoderConfig;
use super::deberta::DebertaEncoder;
use super::post_norm::PostNormEncoder;
use super::weights::Weights;
use crate::Result;
use crate::ops::CuSeqlens;

/// An encoder on one device.
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

/// Reads the encoder that the config describes.
///
/// Errors: [`crate::Error::Tensor`] for a tensor that is missing or does not have the config's shape.
pub fn load(weights: &Weights, config: &EncoderConfig) -> Result<Box<dyn Trunk>> {
    Ok(match &config.deberta {
        Some(deberta) => Box::new(DebertaEncoder::load(weights, config, deberta)?),
        None => Box::new(PostNormEncoder::load(weights, config)?),
    })
}
