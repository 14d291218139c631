//! The post-norm encoder: BERT and its kin, who differ in names, positions, token types, MPNet's relative bias,
//! the width of ELECTRA's and ALBERT's tables and the layers that ALBERT computes again, all of it data here.
//!
//! Source: Devlin et al. 2018 (BERT); Vaswani et al. 2017, section 3.1 (the layer); Lan et al. 2019, section 3.1
//! (ALBERT).

use candle_core::Tensor;

use super::config::EncoderConfig;
use super::encoder_weights::EncoderWeights;
use super::weights::Weights;
use crate::Result;
use crate::ops::CuSeqlens;
use crate::ops::attention::{Attention, Mask};
use crate::ops::embedding::Embedding;
use crate::ops::linear::{Activation, Linear};
use crate::ops::norm::AddLayerNorm;
use crate::ops::residual::ResidualBlock;
use crate::ops::weights::{LayerWeights, LinearWeights, NormWeights};

/// An encoder on one device, from token ids to hidden states.
pub struct PostNormEncoder {
    embedding: Embedding,
    projection: Option<Linear>,
    /// Those with weights of their own.
    layers: Vec<Layer>,
    /// Which of them are computed, one after another.
    order: Vec<usize>,
}

struct Layer {
    qkv: Linear,
    attention: Attention,
    attention_output: ResidualBlock,
    feed_forward: ResidualBlock,
}

impl PostNormEncoder {
    /// Reads all tensors of an encoder. Tensors it does not need (a pooler, a head) are left alone.
    ///
    /// Errors: [`crate::Error::Tensor`] for one that is missing or does not have the config's shape.
    pub fn load(weights: &Weights, config: &EncoderConfig) -> Result<Self> {
        let reader = EncoderWeights::new(weights, config)?;
        let tables = reader.embedding()?;
        let embedding = Embedding::new(
            tables.word,
            tables.position,
            tables.token_type,
            norm(tables.norm, config)?,
            config.position_offset,
        )?;
        let projection = reader.projection()?.map(|weights| linear(weights, Activation::None)).transpose()?;
        // One table for all layers: the tensor is shared, not copied.
        let distance_bias = reader.distance_bias()?;
        let layers = (0..config.num_own_layers()).map(|i| Layer::new(reader.layer(i)?, config, distance_bias.as_ref()));
        Ok(Self { embedding, projection, layers: layers.collect::<Result<_>>()?, order: config.layer_order() })
    }

    /// The hidden states after the last layer.
    ///
    /// Shapes: `input_ids`, `token_type_ids` [total_tokens] u32; no `token_type_ids` means all 0.
    /// Returns [total_tokens, hidden_size] f32.
    /// Errors: [`crate::Error::Shape`] for operands that do not fit each other or the model.
    pub fn forward(
        &self,
        input_ids: &Tensor,
        token_type_ids: Option<&Tensor>,
        cu_seqlens: &CuSeqlens,
    ) -> Result<Tensor> {
        let mut hidden = self.embedding.forward(input_ids, token_type_ids, cu_seqlens)?;
        if let Some(projection) = &self.projection {
            hidden = projection.forward(&hidden)?;
        }
        for &i in &self.order {
            hidden = self.layers[i].forward(&hidden, cu_seqlens)?;
        }
        Ok(hidden)
    }
}

impl Layer {
    fn new(weights: LayerWeights, config: &EncoderConfig, distance_bias: Option<&Tensor>) -> Result<Self> {
        let scale = 1.0 / (config.head_dim() as f64).sqrt();
        let attention_output = linear(weights.attention_output, Activation::None)?;
        let up = linear(weights.up, config.activation)?;
        let down = linear(weights.down, Activation::None)?;
        Ok(Self {
            qkv: linear(weights.qkv, Activation::None)?,
            attention: Attention::new(config.num_heads, config.head_dim(), scale, distance_bias.cloned(), Mask::Full)?,
            attention_output: ResidualBlock::new(vec![attention_output], norm(weights.attention_norm, config)?)?,
            feed_forward: ResidualBlock::new(vec![up, down], norm(weights.output_norm, config)?)?,
        })
    }

    fn forward(&self, hidden: &Tensor, cu_seqlens: &CuSeqlens) -> Result<Tensor> {
        let context = self.attention.forward(&self.qkv.forward(hidden)?, cu_seqlens)?;
        let hidden = self.attention_output.forward(&context, hidden)?;
        self.feed_forward.forward(&hidden, &hidden)
    }
}

pub(super) fn linear(weights: LinearWeights, activation: Activation) -> Result<Linear> {
    Linear::new(weights.weight, Some(weights.bias), activation)
}

pub(super) fn norm(weights: NormWeights, config: &EncoderConfig) -> Result<AddLayerNorm> {
    AddLayerNorm::new(weights.weight, weights.bias, config.layer_norm_eps)
}
