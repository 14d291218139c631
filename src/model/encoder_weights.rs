//! A post-norm encoder's weights out of a model's files, whatever its checkpoint calls them.

use candle_core::{D, Tensor};

use super::config::EncoderConfig;
use super::mpnet;
use super::names::Names;
use super::weights::Weights;
use crate::Result;
use crate::ops::weights::{EmbeddingWeights, LayerWeights, LinearWeights, NormWeights};

/// Asks for tensors under the model's prefix and with the config's shapes.
pub(super) struct EncoderWeights<'a> {
    weights: &'a Weights,
    names: &'static Names,
    prefix: String,
    config: &'a EncoderConfig,
}

impl<'a> EncoderWeights<'a> {
    /// Errors: [`crate::Error::Tensor`] if no prefix leads to an encoder.
    pub fn new(weights: &'a Weights, config: &'a EncoderConfig) -> Result<Self> {
        let names = Names::of(config.architecture, weights.format());
        Ok(Self { weights, names, prefix: names.prefix(weights)?, config })
    }

    /// The tables and the norm after them.
    ///
    /// Errors: [`crate::Error::Tensor`] for one that is missing or does not have the config's shape; also below.
    pub fn embedding(&self) -> Result<EmbeddingWeights> {
        let Self { names, config, .. } = self;
        let hidden = config.hidden_size;
        Ok(EmbeddingWeights {
            word: self.get(names.word, &[config.vocab_size, hidden])?,
            position: self.get(names.position, &[config.num_positions, hidden])?,
            token_type: match config.type_vocab_size {
                None => None,
                Some(rows) => Some(self.get(names.token_type, &[rows, hidden])?),
            },
            norm: self.norm(names.embedding_norm)?,
        })
    }

    /// MPNet's bias by distance, [num_heads, 2 * max_seq_len - 1]; `None` for the others.
    pub fn distance_bias(&self) -> Result<Option<Tensor>> {
        let Some(num_buckets) = self.config.num_relative_buckets else { return Ok(None) };
        let table = self.get(self.names.relative_bias, &[num_buckets, self.config.num_heads])?;
        Ok(Some(mpnet::distance_bias(&table, self.config.max_seq_len())?))
    }

    /// Layer `i`, i < num_layers.
    pub fn layer(&self, i: usize) -> Result<LayerWeights> {
        let Self { names, config, .. } = self;
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let layer = names.layer.replace("{}", &i.to_string());
        let name = |part: &str| format!("{layer}{part}");
        Ok(LayerWeights {
            qkv: self.qkv(&layer)?,
            attention_output: self.linear(&name(names.attention_output), hidden, hidden)?,
            attention_norm: self.norm(&name(names.attention_norm))?,
            up: self.linear(&name(names.up), intermediate, hidden)?,
            down: self.linear(&name(names.down), hidden, intermediate)?,
            output_norm: self.norm(&name(names.output_norm))?,
        })
    }

    fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.weights.get(&format!("{}{name}", self.prefix), shape)
    }

    fn has(&self, name: &str) -> bool {
        self.weights.contains(&format!("{}{name}", self.prefix))
    }

    fn linear(&self, name: &str, out: usize, input: usize) -> Result<LinearWeights> {
        Ok(LinearWeights {
            weight: self.get(&format!("{name}.weight"), &[out, input])?,
            bias: self.get(&format!("{name}.bias"), &[out])?,
        })
    }

    /// Query, key and value as one product: one pass over the hidden states instead of three.
    fn qkv(&self, layer: &str) -> Result<LinearWeights> {
        let Self { names, .. } = self;
        let hidden = self.config.hidden_size;
        let fused = format!("{layer}{}", names.qkv);
        if self.has(&format!("{fused}.weight")) {
            return self.linear(&fused, 3 * hidden, hidden);
        }
        let (mut weights, mut biases) = (Vec::with_capacity(3), Vec::with_capacity(3));
        for part in [names.query, names.key, names.value] {
            weights.push(self.get(&format!("{layer}{part}.weight"), &[hidden, hidden])?);
            biases.push(self.get(&format!("{layer}{part}.bias"), &[hidden])?);
        }
        Ok(LinearWeights { weight: Tensor::cat(&weights, 0)?, bias: Tensor::cat(&biases, D::Minus1)? })
    }

    /// Checkpoints converted from TensorFlow call a norm's weight `gamma` and its bias `beta`.
    fn norm(&self, name: &str) -> Result<NormWeights> {
        let hidden = self.config.hidden_size;
        let (weight, bias) = if self.has(&format!("{name}.gamma")) { ("gamma", "beta") } else { ("weight", "bias") };
        Ok(NormWeights {
            weight: self.get(&format!("{name}.{weight}"), &[hidden])?,
            bias: self.get(&format!("{name}.{bias}"), &[hidden])?,
        })
    }
}
