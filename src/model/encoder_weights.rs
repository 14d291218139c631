//! A post-norm encoder's weights out of a model's files, whatever its checkpoint calls them.

use candle_core::{D, Tensor};

use super::config::{Architecture, EncoderConfig};
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
        Ok(EmbeddingWeights {
            word: self.word()?,
            position: self.get(self.names.position, &[self.config.num_positions, self.config.embedding_size()])?,
            token_type: self.token_type()?,
            norm: self.embedding_norm()?,
        })
    }

    /// The word embeddings, [vocab_size, embedding_size].
    pub fn word(&self) -> Result<Tensor> {
        self.get(self.names.word, &[self.config.vocab_size, self.config.embedding_size()])
    }

    /// The token types' table, [type_vocab_size, embedding_size], if the architecture has one.
    pub fn token_type(&self) -> Result<Option<Tensor>> {
        let Some(rows) = self.config.type_vocab_size else { return Ok(None) };
        self.get(self.names.token_type, &[rows, self.config.embedding_size()]).map(Some)
    }

    /// The norm after the tables.
    pub fn embedding_norm(&self) -> Result<NormWeights> {
        self.norm(self.names.embedding_norm, self.config.embedding_size())
    }

    /// The linear from narrower tables to the layers, if there is one.
    pub fn projection(&self) -> Result<Option<LinearWeights>> {
        let Some(embedding_size) = self.config.projected_from else { return Ok(None) };
        self.linear(self.names.projection, self.config.hidden_size, embedding_size).map(Some)
    }

    /// MPNet's bias by distance, [num_heads, 2 * max_seq_len - 1]; `None` for the others.
    pub fn distance_bias(&self) -> Result<Option<Tensor>> {
        let Some(num_buckets) = self.config.num_relative_buckets else { return Ok(None) };
        let table = self.get(self.names.relative_bias, &[num_buckets, self.config.num_heads])?;
        Ok(Some(mpnet::distance_bias(&table, self.config.max_seq_len())?))
    }

    /// Layer `i`, i < num_own_layers.
    pub fn layer(&self, i: usize) -> Result<LayerWeights> {
        let Self { names, config, .. } = self;
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let layer = self.layer_prefix(i);
        let name = |part: &str| format!("{layer}{part}");
        Ok(LayerWeights {
            qkv: self.qkv(&layer)?,
            attention_output: self.linear(&name(names.attention_output), hidden, hidden)?,
            attention_norm: self.norm(&name(names.attention_norm), hidden)?,
            up: self.linear(&name(names.up), intermediate, hidden)?,
            down: self.linear(&name(names.down), hidden, intermediate)?,
            output_norm: self.norm(&name(names.output_norm), hidden)?,
        })
    }

    /// What stands before the names of layer `i`, without the prefix of all names.
    pub fn layer_prefix(&self, i: usize) -> String {
        self.names.layer(i, self.config.sharing.map_or(1, |sharing| sharing.layers_per_group))
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.weights.get(&format!("{}{name}", self.prefix), shape)
    }

    fn has(&self, name: &str) -> bool {
        self.weights.contains(&format!("{}{name}", self.prefix))
    }

    /// The linear of this name.
    pub fn linear(&self, name: &str, out: usize, input: usize) -> Result<LinearWeights> {
        Ok(LinearWeights {
            weight: self.get(&format!("{name}.weight"), &[out, input])?,
            bias: self.get(&format!("{name}.bias"), &[out])?,
        })
    }

    /// Query, key and value as one product: one pass over the hidden states instead of three.
    fn qkv(&self, layer: &str) -> Result<LinearWeights> {
        let Self { names, .. } = self;
        let hidden = self.config.hidden_size;
        if self.config.architecture == Architecture::Deberta {
            return self.interleaved_qkv(layer);
        }
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

    /// The first DeBERTa's one product, whose rows go head by head: a head's queries, keys and values. Keys have
    /// no bias.
    fn interleaved_qkv(&self, layer: &str) -> Result<LinearWeights> {
        let EncoderConfig { hidden_size: hidden, num_heads, .. } = *self.config;
        let head_dim = self.config.head_dim();
        let name = |part: &str| format!("{layer}attention.self.{part}");
        let by_head = self.get(&name("in_proj.weight"), &[3 * hidden, hidden])?;
        let by_head = by_head.reshape((num_heads, 3, head_dim, hidden))?;
        let weight = by_head.transpose(0, 1)?.contiguous()?.reshape((3 * hidden, hidden))?;
        let (query, value) = (self.get(&name("q_bias"), &[hidden])?, self.get(&name("v_bias"), &[hidden])?);
        let bias = Tensor::cat(&[&query, &query.zeros_like()?, &value], 0)?;
        Ok(LinearWeights { weight, bias })
    }

    /// The norm of this name over `width` columns. Checkpoints converted from TensorFlow call its weight `gamma`
    /// and its bias `beta`.
    pub fn norm(&self, name: &str, width: usize) -> Result<NormWeights> {
        let (weight, bias) = if self.has(&format!("{name}.gamma")) { ("gamma", "beta") } else { ("weight", "bias") };
        Ok(NormWeights {
            weight: self.get(&format!("{name}.{weight}"), &[width])?,
            bias: self.get(&format!("{name}.{bias}"), &[width])?,
        })
    }
}
