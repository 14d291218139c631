//! CLIP: one tower of images and one of texts, whose vectors lie in one space.
//!
//! Source: Radford et al. 2021, section 2.

use candle_core::Tensor;

use super::config::{ClipConfig, EndOfText, TowerConfig};
use super::patches::PatchEmbedding;
use super::tower::{Names, Reader, Tower};
use crate::Error;
use crate::Result;
use crate::model::weights::Weights;
use crate::ops::CuSeqlens;
use crate::ops::attention::Mask;
use crate::ops::linear::{Activation, Linear};
use crate::ops::norm::AddLayerNorm;

const NAMES: Names = Names {
    layer: "encoder.layers.{}.",
    query: "self_attn.q_proj",
    key: "self_attn.k_proj",
    value: "self_attn.v_proj",
    attention_output: "self_attn.out_proj",
    before_attention: "layer_norm1",
    before_feed_forward: "layer_norm2",
    up: "mlp.fc1",
    down: "mlp.fc2",
};

/// A CLIP on one device.
pub(super) struct Clip {
    images: Images,
    texts: Texts,
}

struct Images {
    embedding: PatchEmbedding,
    before: AddLayerNorm,
    tower: Tower,
    after: AddLayerNorm,
    /// [projection_dim, hidden_size]
    projection: Linear,
}

struct Texts {
    /// [vocab_size, hidden_size]
    word: Tensor,
    /// [num_positions, hidden_size]
    position: Tensor,
    tower: Tower,
    after: AddLayerNorm,
    /// [projection_dim, hidden_size]
    projection: Linear,
    end: EndOfText,
}

impl Clip {
    /// Errors: [`crate::Error::Tensor`] for a tensor that is missing or does not have the config's shape.
    pub fn load(weights: &Weights, config: &ClipConfig) -> Result<Self> {
        Ok(Self { images: Images::load(weights, config)?, texts: Texts::load(weights, config)? })
    }

    /// One vector an image. Shapes: `images` [3, height, width] each. Returns [num_images, projection_dim].
    ///
    /// Errors: [`crate::Error::Shape`] for images of another size.
    pub fn of_images(&self, images: &[&[f32]]) -> Result<Tensor> {
        let Images { embedding, before, tower, after, projection } = &self.images;
        let (hidden, bounds) = embedding.forward(images)?;
        let hidden = tower.forward(before.forward(&hidden, None)?, &bounds)?;
        let first: Vec<u32> = bounds.ranges().map(|range| range.start as u32).collect();
        projection.forward(&after.forward(&rows(&hidden, first)?, None)?)
    }

    /// One vector a text. Shapes: `texts` [seq_len] each, not empty. Returns [num_texts, projection_dim].
    ///
    /// Errors: [`crate::Error::Shape`] for a text longer than the table of positions.
    pub fn of_texts(&self, texts: &[&[u32]]) -> Result<Tensor> {
        let Texts { word, position, tower, after, projection, end } = &self.texts;
        let num_positions = position.dim(0)?;
        if let Some(text) = texts.iter().find(|text| text.len() > num_positions) {
            let (expected, got) = (format!("at most {num_positions} tokens"), text.len().to_string());
            return Err(Error::Shape { op: "clip", operand: "input_ids", expected, got });
        }
        let mut bounds = vec![0u32];
        for text in texts {
            bounds.push(bounds[bounds.len() - 1] + text.len() as u32);
        }
        let bounds = CuSeqlens::new(&bounds, word.device())?;
        let positions = texts.iter().flat_map(|text| 0..text.len() as u32).collect();
        let hidden = (rows(word, texts.concat())? + rows(position, positions)?)?;
        let hidden = tower.forward(hidden, &bounds)?;
        let ends = bounds.ranges().zip(texts).map(|(range, text)| (range.start + end.of(text)) as u32).collect();
        projection.forward(&after.forward(&rows(&hidden, ends)?, None)?)
    }
}

impl EndOfText {
    /// Where a text ends, 0 where it has no end: what `transformers` finds then, too.
    fn of(self, text: &[u32]) -> usize {
        let id = match self {
            Self::Id(id) => Some(id),
            Self::LargestId => text.iter().copied().max(),
        };
        text.iter().position(|token| Some(*token) == id).unwrap_or(0)
    }
}

impl Images {
    fn load(weights: &Weights, config: &ClipConfig) -> Result<Self> {
        let ClipConfig { patches, vision: tower @ TowerConfig { hidden_size, layer_norm_eps: eps, .. }, .. } = *config;
        let reader = Reader { weights, prefix: "vision_model.".to_string() };
        Ok(Self {
            embedding: PatchEmbedding {
                patches,
                projection: reader.patches("embeddings.patch_embedding", patches, hidden_size, false)?,
                class: reader.get("embeddings.class_embedding", &[hidden_size])?.reshape((1, hidden_size))?,
                position: reader.get("embeddings.position_embedding.weight", &[patches.num_tokens(), hidden_size])?,
            },
            // The checkpoints' own spelling.
            before: reader.norm("pre_layrnorm", hidden_size, eps)?,
            tower: Tower::load(&reader, &NAMES, &tower, true, Mask::Full)?,
            after: reader.norm("post_layernorm", hidden_size, eps)?,
            projection: projection(weights, "visual_projection.weight", config.projection_dim, hidden_size)?,
        })
    }
}

impl Texts {
    fn load(weights: &Weights, config: &ClipConfig) -> Result<Self> {
        let ClipConfig { text: tower @ TowerConfig { hidden_size, .. }, vocab_size, num_positions, end, .. } = *config;
        let reader = Reader { weights, prefix: "text_model.".to_string() };
        Ok(Self {
            word: reader.get("embeddings.token_embedding.weight", &[vocab_size, hidden_size])?,
            position: reader.get("embeddings.position_embedding.weight", &[num_positions, hidden_size])?,
            tower: Tower::load(&reader, &NAMES, &tower, true, Mask::Causal)?,
            after: reader.norm("final_layer_norm", hidden_size, tower.layer_norm_eps)?,
            projection: projection(weights, "text_projection.weight", config.projection_dim, hidden_size)?,
            end,
        })
    }
}

fn projection(weights: &Weights, name: &str, out: usize, hidden_size: usize) -> Result<Linear> {
    Linear::new(weights.get(name, &[out, hidden_size])?, None, Activation::None)
}

fn rows(table: &Tensor, indices: Vec<u32>) -> Result<Tensor> {
    let indices = Tensor::new(indices, table.device())?;
    Ok(table.index_select(&indices, 0)?)
}
