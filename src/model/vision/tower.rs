//! Layers of attention and feed-forward parts, each behind its norm: what ViT and both halves of CLIP are made of.

use candle_core::Tensor;

use super::config::{PatchConfig, TowerConfig};
use crate::Result;
use crate::model::weights::Weights;
use crate::ops::CuSeqlens;
use crate::ops::attention::{Attention, Mask};
use crate::ops::linear::{Activation, Linear};
use crate::ops::norm::AddLayerNorm;

/// What a checkpoint calls a layer's tensors.
pub(super) struct Names {
    /// `{}` stands for the layer's number.
    pub layer: &'static str,
    pub query: &'static str,
    pub key: &'static str,
    pub value: &'static str,
    pub attention_output: &'static str,
    pub before_attention: &'static str,
    pub before_feed_forward: &'static str,
    pub up: &'static str,
    pub down: &'static str,
}

/// Asks for tensors below a prefix.
pub(super) struct Reader<'a> {
    pub weights: &'a Weights,
    pub prefix: String,
}

impl Reader<'_> {
    /// The tensor of this name. Errors: [`crate::Error::Tensor`] if there is none of this shape; also below.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.weights.get(&format!("{}{name}", self.prefix), shape)
    }

    /// A layer norm of [width]. Errors: as [`Self::get`].
    pub fn norm(&self, name: &str, width: usize, eps: f64) -> Result<AddLayerNorm> {
        AddLayerNorm::new(
            self.get(&format!("{name}.weight"), &[width])?,
            self.get(&format!("{name}.bias"), &[width])?,
            eps,
        )
    }

    pub fn linear(&self, name: &str, out: usize, input: usize) -> Result<Linear> {
        let weight = self.get(&format!("{name}.weight"), &[out, input])?;
        Linear::new(weight, Some(self.get(&format!("{name}.bias"), &[out])?), Activation::None)
    }

    /// A convolution whose windows are the patches, as a product: [hidden_size, 3 * height * width].
    pub fn patches(&self, name: &str, patches: PatchConfig, hidden_size: usize, has_bias: bool) -> Result<Linear> {
        let (height, width) = (patches.patch.height, patches.patch.width);
        let weight = self.get(&format!("{name}.weight"), &[hidden_size, 3, height, width])?;
        let bias = if has_bias { Some(self.get(&format!("{name}.bias"), &[hidden_size])?) } else { None };
        Linear::new(weight.reshape((hidden_size, 3 * height * width))?, bias, Activation::None)
    }
}

/// The layers of one tower.
pub(super) struct Tower {
    layers: Vec<Layer>,
}

struct Layer {
    before_attention: AddLayerNorm,
    qkv: Linear,
    attention: Attention,
    attention_output: Linear,
    before_feed_forward: AddLayerNorm,
    up: Linear,
    down: Linear,
}

impl Tower {
    /// Errors: [`crate::Error::Tensor`] for one that is missing or does not have the config's shape.
    pub fn load(reader: &Reader, names: &Names, config: &TowerConfig, qkv_bias: bool, mask: Mask) -> Result<Self> {
        let layers = (0..config.num_layers).map(|i| Layer::load(reader, names, config, i, qkv_bias, mask));
        Ok(Self { layers: layers.collect::<Result<_>>()? })
    }

    /// Shapes: `hidden` [total_tokens, hidden_size]; so is the result, without a norm after the last layer.
    pub fn forward(&self, hidden: Tensor, cu_seqlens: &CuSeqlens) -> Result<Tensor> {
        let mut hidden = hidden;
        for layer in &self.layers {
            hidden = layer.forward(&hidden, cu_seqlens)?;
        }
        Ok(hidden)
    }
}

impl Layer {
    fn load(
        reader: &Reader,
        names: &Names,
        config: &TowerConfig,
        i: usize,
        qkv_bias: bool,
        mask: Mask,
    ) -> Result<Self> {
        let TowerConfig {
            hidden_size: hidden, num_heads, intermediate_size: intermediate, layer_norm_eps: eps, ..
        } = *config;
        let layer = names.layer.replace("{}", &i.to_string());
        let name = |part: &str| format!("{layer}{part}");
        // As one product: one pass over the hidden states instead of three.
        let parts = [names.query, names.key, names.value];
        let weights = parts.map(|part| reader.get(&name(&format!("{part}.weight")), &[hidden, hidden]));
        let weights = weights.into_iter().collect::<Result<Vec<_>>>()?;
        let bias = match qkv_bias {
            false => None,
            true => {
                let biases = parts.map(|part| reader.get(&name(&format!("{part}.bias")), &[hidden]));
                Some(Tensor::cat(&biases.into_iter().collect::<Result<Vec<_>>>()?, 0)?)
            }
        };
        // The scale of the activation goes into the weights around it.
        let (activation, scale) = (config.activation.activation, config.activation.scale);
        let up = (reader.get(&name(&format!("{}.weight", names.up)), &[intermediate, hidden])? * scale)?;
        let up_bias = (reader.get(&name(&format!("{}.bias", names.up)), &[intermediate])? * scale)?;
        let down = (reader.get(&name(&format!("{}.weight", names.down)), &[hidden, intermediate])? / scale)?;
        let down_bias = reader.get(&name(&format!("{}.bias", names.down)), &[hidden])?;
        let head_dim = hidden / num_heads;
        Ok(Self {
            before_attention: reader.norm(&name(names.before_attention), hidden, eps)?,
            qkv: Linear::new(Tensor::cat(&weights, 0)?, bias, Activation::None)?,
            attention: Attention::new(num_heads, head_dim, 1.0 / (head_dim as f64).sqrt(), None, mask)?,
            attention_output: reader.linear(&name(names.attention_output), hidden, hidden)?,
            before_feed_forward: reader.norm(&name(names.before_feed_forward), hidden, eps)?,
            up: Linear::new(up, Some(up_bias), activation)?,
            down: Linear::new(down, Some(down_bias), Activation::None)?,
        })
    }

    fn forward(&self, hidden: &Tensor, cu_seqlens: &CuSeqlens) -> Result<Tensor> {
        let qkv = self.qkv.forward(&self.before_attention.forward(hidden, None)?)?;
        let context = self.attention_output.forward(&self.attention.forward(&qkv, cu_seqlens)?)?;
        let hidden = (hidden + context)?;
        let up = self.up.forward(&self.before_feed_forward.forward(&hidden, None)?)?;
        Ok((&hidden + self.down.forward(&up)?)?)
    }
}
