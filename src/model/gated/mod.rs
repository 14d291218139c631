//! Trunks of gated layers: rotary positions or ALiBi, norms before or after the halves of a layer, gated feed-forward
//! parts, shared heads of keys and values. What differs between families is data: [`GatedConfig`] and their tensors'
//! names.

pub mod config;
mod families;
mod keys;
mod names;
mod read;

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::config::EncoderConfig;
use super::trunk::Trunk;
use super::weights::{Format, Weights, file_error};
use crate::Result;
use crate::ops::CuSeqlens;
use crate::ops::attention::{Attention, Heads};
use crate::ops::gated::GatedFeedForward;
use crate::ops::linear::{Activation, Linear};
use crate::ops::norm::AddLayerNorm;
use crate::ops::rms_norm::RmsNorm;
use crate::ops::rotary::{QueryKeyNorms, Rotary, RotaryTable, alibi};
use config::{GatedConfig, NormKind, Rope};
pub(super) use families::read as read_config;
use read::Reader;

/// A trunk of gated layers on one device.
pub struct GatedTrunk {
    /// [vocab_size, hidden_size], multiplied by what the family multiplies it with.
    word: Tensor,
    /// [type_vocab_size, hidden_size]
    token_type: Option<Tensor>,
    embedding_norm: Option<Norm>,
    layers: Vec<Layer>,
    final_norm: Option<Norm>,
}

struct Layer {
    qkv: Linear,
    rotary: Option<Rotary>,
    attention: Attention,
    attention_output: Linear,
    around_attention: Around,
    feed_forward: GatedFeedForward,
    around_feed_forward: Around,
}

/// The norms around a half of a layer: `sum(hidden + after(half(before(hidden))))`.
struct Around {
    before: Option<Norm>,
    after: Option<Norm>,
    sum: Option<Norm>,
}

enum Norm {
    Layer(AddLayerNorm),
    Rms(RmsNorm),
}

impl Norm {
    /// `norm(x)`, or `norm(x + residual)`. Shapes: [m, hidden_size] each.
    fn forward(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        match (self, residual) {
            (Self::Layer(norm), _) => norm.forward(x, residual),
            (Self::Rms(norm), None) => norm.forward(x),
            (Self::Rms(norm), Some(residual)) => norm.forward(&(x + residual)?),
        }
    }
}

impl Around {
    fn forward(&self, hidden: &Tensor, half: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let mut y = match &self.before {
            None => half(hidden)?,
            Some(norm) => half(&norm.forward(hidden, None)?)?,
        };
        if let Some(norm) = &self.after {
            y = norm.forward(&y, None)?;
        }
        match &self.sum {
            None => Ok((hidden + y)?),
            Some(norm) => norm.forward(&y, Some(hidden)),
        }
    }
}

impl GatedTrunk {
    /// Reads all tensors of a trunk.
    ///
    /// Errors: [`crate::Error::Tensor`] for one that is missing or does not have the config's shape;
    /// [`crate::Error::ModelFile`] for GGUF, whose names for these families are not known here.
    pub fn load(weights: &Weights, config: &EncoderConfig, gated: &GatedConfig) -> Result<Self> {
        if weights.format() != Format::Safetensors {
            let reason = "GGUF is supported for bert alone; this architecture is read from safetensors";
            return Err(file_error(weights.path(), reason));
        }
        let reader = Reader::new(weights, config, gated)?;
        let (word, token_type) = reader.tables()?;
        let mut tables = Tables { gated, max_seq_len: config.max_seq_len(), device: word.device(), made: Vec::new() };
        // One table of distances for all layers: the tensor is shared, not copied.
        let distance_bias = match gated.alibi {
            true => Some(alibi(config.num_heads, config.max_seq_len(), word.device())?),
            false => None,
        };
        let mut layers = Vec::with_capacity(config.num_layers);
        for i in 0..config.num_layers {
            layers.push(Layer::load(&reader, i, &mut tables, distance_bias.as_ref())?);
        }
        let (embedding_norm, final_norm) = (reader.embedding_norm()?, reader.final_norm()?);
        drop(tables);
        Ok(Self { word, token_type, embedding_norm, layers, final_norm })
    }
}

impl Trunk for GatedTrunk {
    fn forward(&self, input_ids: &Tensor, token_type_ids: Option<&Tensor>, cu_seqlens: &CuSeqlens) -> Result<Tensor> {
        let mut hidden = self.word.index_select(input_ids, 0)?;
        if let Some(table) = &self.token_type {
            hidden = match token_type_ids {
                Some(ids) => (hidden + table.index_select(ids, 0)?)?,
                None => hidden.broadcast_add(&table.get(0)?)?,
            };
        }
        if let Some(norm) = &self.embedding_norm {
            hidden = norm.forward(&hidden, None)?;
        }
        for layer in &self.layers {
            hidden = layer.forward(&hidden, cu_seqlens)?;
        }
        match &self.final_norm {
            None => Ok(hidden),
            Some(norm) => norm.forward(&hidden, None),
        }
    }
}

/// The tables of angles, one for each way that layers turn.
struct Tables<'a> {
    gated: &'a GatedConfig,
    max_seq_len: usize,
    device: &'a Device,
    made: Vec<(Rope, Arc<RotaryTable>)>,
}

impl Tables<'_> {
    fn of(&mut self, rope: Rope) -> Result<Arc<RotaryTable>> {
        if let Some((_, table)) = self.made.iter().find(|(made, _)| *made == rope) {
            return Ok(table.clone());
        }
        let frequencies = rope.inverse_frequencies(self.gated.head_dim);
        let table = Arc::new(RotaryTable::new(&frequencies, self.max_seq_len, self.device)?);
        self.made.push((rope, table.clone()));
        Ok(table)
    }
}

impl Layer {
    fn load(reader: &Reader, i: usize, tables: &mut Tables, distance_bias: Option<&Tensor>) -> Result<Self> {
        let (config, gated) = (reader.config, reader.gated);
        let heads = Heads { num_heads: config.num_heads, num_kv_heads: gated.num_kv_heads, head_dim: gated.head_dim };
        let of_layer = &gated.layers[i];
        let norms = match gated.query_key_norm {
            true => Some(QueryKeyNorms { query: reader.query_norm(i)?, key: reader.key_norm(i)? }),
            false => None,
        };
        let rotary = match of_layer.rope {
            Some(rope) => Some(Rotary::new(heads, tables.of(rope)?, norms)?),
            None => None,
        };
        let (gate, up) = reader.gate_up(i)?;
        let (around_attention, around_feed_forward) = reader.around(i)?;
        Ok(Self {
            qkv: reader.qkv(i)?,
            rotary,
            attention: Attention::grouped(heads, gated.scale, distance_bias.cloned(), of_layer.mask)?,
            attention_output: reader.attention_output(i)?,
            around_attention,
            feed_forward: GatedFeedForward::new(
                gate.into_linear(config.activation)?,
                up.into_linear(Activation::None)?,
                reader.down(i)?,
            )?,
            around_feed_forward,
        })
    }

    fn forward(&self, hidden: &Tensor, cu_seqlens: &CuSeqlens) -> Result<Tensor> {
        let hidden = self.around_attention.forward(hidden, |x| {
            let mut qkv = self.qkv.forward(x)?;
            if let Some(rotary) = &self.rotary {
                qkv = rotary.forward(&qkv, cu_seqlens)?;
            }
            self.attention_output.forward(&self.attention.forward(&qkv, cu_seqlens)?)
        })?;
        self.around_feed_forward.forward(&hidden, |x| self.feed_forward.forward(x))
    }
}

/// A norm of a family's kind. Shapes: `weight`, `bias` [hidden_size].
fn norm(kind: NormKind, eps: f64, weight: Tensor, bias: Option<Tensor>) -> Result<Norm> {
    Ok(match kind {
        NormKind::Layer { .. } => {
            let bias = bias.map_or_else(|| weight.zeros_like(), Ok)?;
            Norm::Layer(AddLayerNorm::new(weight, bias, eps)?)
        }
        NormKind::Rms | NormKind::RmsAboveOne => Norm::Rms(rms_norm(kind, eps, weight)?),
    })
}

fn rms_norm(kind: NormKind, eps: f64, weight: Tensor) -> Result<RmsNorm> {
    let weight = if kind == NormKind::RmsAboveOne { (weight + 1.0)? } else { weight };
    RmsNorm::new(weight, eps)
}
