//! ViT: an image's patches as the tokens of an encoder.
//!
//! Source: Dosovitskiy et al. 2020, section 3.1.

use candle_core::Tensor;

use super::config::{TowerConfig, VitConfig};
use super::patches::PatchEmbedding;
use super::tower::{Names, Reader, Tower};
use crate::Result;
use crate::model::names::prefix;
use crate::model::weights::Weights;
use crate::ops::CuSeqlens;
use crate::ops::attention::Mask;
use crate::ops::norm::AddLayerNorm;

const NAMES: Names = Names {
    layer: "encoder.layer.{}.",
    query: "attention.attention.query",
    key: "attention.attention.key",
    value: "attention.attention.value",
    attention_output: "attention.output.dense",
    before_attention: "layernorm_before",
    before_feed_forward: "layernorm_after",
    up: "intermediate.dense",
    down: "output.dense",
};

/// A ViT without its head, on one device.
pub(super) struct Vit {
    embedding: PatchEmbedding,
    tower: Tower,
    norm: AddLayerNorm,
}

impl Vit {
    /// Reads all tensors; a pooler and a head are left alone.
    ///
    /// Errors: [`crate::Error::Tensor`] for one that is missing or does not have the config's shape.
    pub fn load(weights: &Weights, config: &VitConfig) -> Result<Self> {
        let VitConfig { patches, tower: tower @ TowerConfig { hidden_size, .. }, qkv_bias } = *config;
        let reader = Reader { weights, prefix: prefix("embeddings.cls_token", weights)? };
        let position = reader.get("embeddings.position_embeddings", &[1, patches.num_tokens(), hidden_size])?;
        Ok(Self {
            embedding: PatchEmbedding {
                patches,
                projection: reader.patches("embeddings.patch_embeddings.projection", patches, hidden_size, true)?,
                class: reader.get("embeddings.cls_token", &[1, 1, hidden_size])?.reshape((1, hidden_size))?,
                position: position.squeeze(0)?,
            },
            tower: Tower::load(&reader, &NAMES, &tower, qkv_bias, Mask::Full)?,
            norm: reader.norm("layernorm", hidden_size, tower.layer_norm_eps)?,
        })
    }

    /// The hidden states of the whole and of each patch.
    ///
    /// Shapes: `images` [3, height, width] each. Returns [num_images * num_tokens, hidden_size] and the images' bounds.
    /// Errors: [`crate::Error::Shape`] for images of another size.
    pub fn forward(&self, images: &[&[f32]]) -> Result<(Tensor, CuSeqlens)> {
        let (hidden, bounds) = self.embedding.forward(images)?;
        let hidden = self.tower.forward(hidden, &bounds)?;
        Ok((self.norm.forward(&hidden, None)?, bounds))
    }
}
