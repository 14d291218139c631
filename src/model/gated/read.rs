//! A trunk's tensors out of a model's files.

use candle_core::{D, Tensor};

use super::super::config::EncoderConfig;
use super::super::names::prefix;
use super::super::weights::Weights;
use super::config::{GatedConfig, NormKind};
use super::names::{self, GateUp, Layout, Qkv};
use super::{Around, Norm, norm, rms_norm};
use crate::Result;
use crate::ops::linear::{Activation, Linear};
use crate::ops::rms_norm::RmsNorm;

/// Asks for tensors under the model's prefix and with the config's shapes.
pub(super) struct Reader<'a> {
    weights: &'a Weights,
    pub config: &'a EncoderConfig,
    pub gated: &'a GatedConfig,
    layout: &'static Layout,
    prefix: String,
}

/// `x weightᵀ + bias`. Shapes: `weight` [out, in]; `bias` [out].
pub(super) struct Product {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Product {
    pub fn into_linear(self, activation: Activation) -> Result<Linear> {
        Linear::new(self.weight, self.bias, activation)
    }

    /// Rows `start..start + len` as a product of their own.
    fn rows(&self, start: usize, len: usize) -> Result<Self> {
        let part = |tensor: &Tensor| tensor.narrow(0, start, len)?.contiguous();
        Ok(Self { weight: part(&self.weight)?, bias: self.bias.as_ref().map(part).transpose()? })
    }
}

impl<'a> Reader<'a> {
    /// Errors: [`crate::Error::Tensor`] if no prefix leads to word embeddings.
    pub fn new(weights: &'a Weights, config: &'a EncoderConfig, gated: &'a GatedConfig) -> Result<Self> {
        let layouts = gated.family.layouts();
        let prefix = prefix(layouts[0].word, weights)?;
        // Told apart by a tensor of the first layer that each has under another name.
        let has = |layout: &&Layout| {
            let first_layer = layout.layer.replace("{}", "0");
            weights.contains(&format!("{prefix}{first_layer}{}.weight", layout.attention_output))
        };
        // None fits: the first one's names are in the error to come.
        let layout = layouts.iter().find(has).unwrap_or(&layouts[0]);
        Ok(Self { weights, config, gated, layout, prefix })
    }

    /// The word embeddings, and those of token types where there are any.
    pub fn tables(&self) -> Result<(Tensor, Option<Tensor>)> {
        let hidden = self.config.hidden_size;
        let mut word = self.get(self.layout.word, &[self.config.vocab_size, hidden])?;
        if let Some(scale) = self.gated.embedding_scale {
            word = (word * scale)?;
        }
        let token_type = match self.config.type_vocab_size {
            None => None,
            Some(rows) => Some(self.get(self.layout.token_type, &[rows, hidden])?),
        };
        Ok((word, token_type))
    }

    pub fn embedding_norm(&self) -> Result<Option<Norm>> {
        self.layout.embedding_norm.map(|name| self.norm(name)).transpose()
    }

    pub fn final_norm(&self) -> Result<Option<Norm>> {
        self.layout.final_norm.map(|name| self.norm(name)).transpose()
    }

    /// Queries, keys and values as one product.
    pub fn qkv(&self, i: usize) -> Result<Linear> {
        let (hidden, has_bias) = (self.config.hidden_size, self.gated.qkv_bias);
        let width = self.config.num_heads * self.gated.head_dim;
        let kv_width = self.gated.num_kv_heads * self.gated.head_dim;
        let product = match &self.layout.qkv {
            Qkv::Fused(name) => self.product(i, name, width + 2 * kv_width, hidden, has_bias)?,
            Qkv::Split([query, key, value]) => {
                let (mut weights, mut biases) = (Vec::with_capacity(3), Vec::with_capacity(3));
                for (name, out) in [(query, width), (key, kv_width), (value, kv_width)] {
                    let part = self.product(i, name, out, hidden, has_bias)?;
                    weights.push(part.weight);
                    biases.extend(part.bias);
                }
                let bias = if has_bias { Some(Tensor::cat(&biases, D::Minus1)?) } else { None };
                Product { weight: Tensor::cat(&weights, 0)?, bias }
            }
        };
        product.into_linear(Activation::None)
    }

    pub fn query_norm(&self, i: usize) -> Result<RmsNorm> {
        self.head_norm(i, self.layout.query_norm)
    }

    pub fn key_norm(&self, i: usize) -> Result<RmsNorm> {
        self.head_norm(i, self.layout.key_norm)
    }

    pub fn attention_output(&self, i: usize) -> Result<Linear> {
        let (width, hidden) = (self.config.num_heads * self.gated.head_dim, self.config.hidden_size);
        self.product(i, self.layout.attention_output, hidden, width, self.gated.output_bias)?
            .into_linear(Activation::None)
    }

    /// The gate and what it gates.
    pub fn gate_up(&self, i: usize) -> Result<(Product, Product)> {
        let (hidden, inner, has_bias) =
            (self.config.hidden_size, self.config.intermediate_size, self.gated.gate_up_bias);
        let halves = |name: &str| -> Result<(Product, Product)> {
            let both = self.product(i, name, 2 * inner, hidden, has_bias)?;
            Ok((both.rows(0, inner)?, both.rows(inner, inner)?))
        };
        match &self.layout.gate_up {
            GateUp::Split { gate, up } => {
                Ok((self.product(i, gate, inner, hidden, has_bias)?, self.product(i, up, inner, hidden, has_bias)?))
            }
            GateUp::GateFirst(name) => halves(name),
            GateUp::GateLast(name) => halves(name).map(|(up, gate)| (gate, up)),
        }
    }

    pub fn down(&self, i: usize) -> Result<Linear> {
        let (hidden, inner) = (self.config.hidden_size, self.config.intermediate_size);
        self.product(i, self.layout.down, hidden, inner, self.gated.down_bias)?.into_linear(Activation::None)
    }

    /// The norms around a layer's attention and around its feed-forward part.
    pub fn around(&self, i: usize) -> Result<(Around, Around)> {
        let around = |names: &names::Around| -> Result<Around> {
            let norm = |name: Option<&str>| name.map(|name| self.norm(&self.in_layer(i, name))).transpose();
            Ok(Around { before: norm(names.before)?, after: norm(names.after)?, sum: norm(names.sum)? })
        };
        let mut attention = &self.layout.attention;
        if i == 0 && !self.gated.first_norm {
            attention = &names::Around { before: None, after: None, sum: None };
        }
        Ok((around(attention)?, around(&self.layout.feed_forward)?))
    }

    fn in_layer(&self, i: usize, name: &str) -> String {
        format!("{}{name}", self.layout.layer.replace("{}", &i.to_string()))
    }

    fn product(&self, i: usize, name: &str, out: usize, input: usize, has_bias: bool) -> Result<Product> {
        let name = self.in_layer(i, name);
        let weight = self.get(&format!("{name}.weight"), &[out, input])?;
        let bias = if has_bias { Some(self.get(&format!("{name}.bias"), &[out])?) } else { None };
        Ok(Product { weight, bias })
    }

    fn norm(&self, name: &str) -> Result<Norm> {
        let hidden = self.config.hidden_size;
        let weight = self.get(&format!("{name}.weight"), &[hidden])?;
        let bias = match self.gated.norm {
            NormKind::Layer { has_bias: true } => Some(self.get(&format!("{name}.bias"), &[hidden])?),
            _ => None,
        };
        norm(self.gated.norm, self.config.layer_norm_eps, weight, bias)
    }

    fn head_norm(&self, i: usize, name: &str) -> Result<RmsNorm> {
        let weight = self.get(&format!("{}.weight", self.in_layer(i, name)), &[self.gated.head_dim])?;
        rms_norm(self.gated.norm, self.config.layer_norm_eps, weight)
    }

    fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.weights.get(&format!("{}{name}", self.prefix), shape)
    }
}
