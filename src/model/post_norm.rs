//! The post-norm encoder: BERT and its kin, who differ in names, positions, token types and MPNet's
//! relative bias, all of it data here.
//!
//! Source: Devlin et al. 2018 (BERT); Vaswani et al. 2017, section 3.1 (the layer).

use candle_core::{D, Tensor};

use super::config::EncoderConfig;
use super::mpnet;
use super::names::Names;
use super::weights::Weights;
use crate::Result;
use crate::ops::CuSeqlens;
use crate::ops::attention::{Attention, Mask};
use crate::ops::embedding::Embedding;
use crate::ops::linear::{Activation, Linear};
use crate::ops::norm::AddLayerNorm;
use crate::ops::residual::ResidualBlock;

/// An encoder on one device, from token ids to hidden states.
pub struct PostNormEncoder {
    embedding: Embedding,
    layers: Vec<Layer>,
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
        let names = Names::of(config.architecture, weights.format());
        let reader = Reader { weights, prefix: names.prefix(weights)?, config };
        let hidden = config.hidden_size;
        let token_type = match config.type_vocab_size {
            None => None,
            Some(rows) => Some(reader.get(names.token_type, &[rows, hidden])?),
        };
        let embedding = Embedding::new(
            reader.get(names.word, &[config.vocab_size, hidden])?,
            reader.get(names.position, &[config.num_positions, hidden])?,
            token_type,
            reader.norm(names.embedding_norm)?,
            config.position_offset,
        )?;
        // One table for all layers: the tensor is shared, not copied.
        let distance_bias = match config.num_relative_buckets {
            None => None,
            Some(num_buckets) => {
                let table = reader.get(names.relative_bias, &[num_buckets, config.num_heads])?;
                Some(mpnet::distance_bias(&table, config.max_seq_len())?)
            }
        };
        let layers = (0..config.num_layers).map(|i| Layer::load(&reader, names, i, distance_bias.as_ref()));
        Ok(Self { embedding, layers: layers.collect::<Result<_>>()? })
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
        for layer in &self.layers {
            hidden = layer.forward(&hidden, cu_seqlens)?;
        }
        Ok(hidden)
    }
}

impl Layer {
    fn load(reader: &Reader, names: &Names, i: usize, distance_bias: Option<&Tensor>) -> Result<Self> {
        let config = reader.config;
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let layer = names.layer.replace("{}", &i.to_string());
        let name = |part: &str| format!("{layer}{part}");
        let scale = 1.0 / (config.head_dim() as f64).sqrt();
        let attention_output = reader.linear(&name(names.attention_output), hidden, hidden, Activation::None)?;
        let up = reader.linear(&name(names.up), intermediate, hidden, config.activation)?;
        let down = reader.linear(&name(names.down), hidden, intermediate, Activation::None)?;
        Ok(Self {
            qkv: reader.qkv(names, &layer)?,
            attention: Attention::new(config.num_heads, config.head_dim(), scale, distance_bias.cloned(), Mask::Full)?,
            attention_output: ResidualBlock::new(vec![attention_output], reader.norm(&name(names.attention_norm))?)?,
            feed_forward: ResidualBlock::new(vec![up, down], reader.norm(&name(names.output_norm))?)?,
        })
    }

    fn forward(&self, hidden: &Tensor, cu_seqlens: &CuSeqlens) -> Result<Tensor> {
        let context = self.attention.forward(&self.qkv.forward(hidden)?, cu_seqlens)?;
        let hidden = self.attention_output.forward(&context, hidden)?;
        self.feed_forward.forward(&hidden, &hidden)
    }
}

/// Asks for tensors under the model's prefix and with the config's shapes.
struct Reader<'a> {
    weights: &'a Weights,
    prefix: String,
    config: &'a EncoderConfig,
}

impl Reader<'_> {
    fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.weights.get(&format!("{}{name}", self.prefix), shape)
    }

    fn has(&self, name: &str) -> bool {
        self.weights.contains(&format!("{}{name}", self.prefix))
    }

    fn linear(&self, name: &str, out: usize, input: usize, activation: Activation) -> Result<Linear> {
        let weight = self.get(&format!("{name}.weight"), &[out, input])?;
        let bias = self.get(&format!("{name}.bias"), &[out])?;
        Linear::new(weight, Some(bias), activation)
    }

    /// Query, key and value as one product: one pass over the hidden states instead of three.
    fn qkv(&self, names: &Names, layer: &str) -> Result<Linear> {
        let hidden = self.config.hidden_size;
        let fused = format!("{layer}{}", names.qkv);
        if self.has(&format!("{fused}.weight")) {
            return self.linear(&fused, 3 * hidden, hidden, Activation::None);
        }
        let (mut weights, mut biases) = (Vec::with_capacity(3), Vec::with_capacity(3));
        for part in [names.query, names.key, names.value] {
            weights.push(self.get(&format!("{layer}{part}.weight"), &[hidden, hidden])?);
            biases.push(self.get(&format!("{layer}{part}.bias"), &[hidden])?);
        }
        Linear::new(Tensor::cat(&weights, 0)?, Some(Tensor::cat(&biases, D::Minus1)?), Activation::None)
    }

    /// Checkpoints converted from TensorFlow call a norm's weight `gamma` and its bias `beta`.
    fn norm(&self, name: &str) -> Result<AddLayerNorm> {
        let hidden = self.config.hidden_size;
        let (weight, bias) = if self.has(&format!("{name}.gamma")) { ("gamma", "beta") } else { ("weight", "bias") };
        let weight = self.get(&format!("{name}.{weight}"), &[hidden])?;
        let bias = self.get(&format!("{name}.{bias}"), &[hidden])?;
        AddLayerNorm::new(weight, bias, self.config.layer_norm_eps)
    }
}
