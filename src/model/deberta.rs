//! DeBERTa, the first version and v2 with v3: post-norm layers whose attention sees content and relative positions
//! apart.
//!
//! Source: He et al. 2020 (DeBERTa), section 3.1; He et al. 2021 (DeBERTa v3).

use std::sync::Arc;

use candle_core::{IndexOp, Tensor};

use super::config::deberta::{DebertaConfig, RelativeConfig};
use super::config::{Architecture, EncoderConfig};
use super::encoder_weights::EncoderWeights;
use super::post_norm::{linear, norm};
use super::trunk::Trunk;
use super::weights::{Format, Weights, file_error};
use crate::Result;
use crate::ops::CuSeqlens;
use crate::ops::conv::SequenceConv;
use crate::ops::disentangled::{Disentangled, RelativePositions};
use crate::ops::embedding::Embedding;
use crate::ops::linear::{Activation, Linear};
use crate::ops::norm::AddLayerNorm;
use crate::ops::residual::ResidualBlock;

/// An encoder on one device.
pub(super) struct DebertaEncoder {
    embeddings: Embeddings,
    layers: Vec<Layer>,
    /// Of the embeddings, added to what the first layer gives.
    conv: Option<(SequenceConv, AddLayerNorm)>,
}

/// The tables, with the absolute positions or without.
enum Embeddings {
    Positioned(Embedding),
    Plain { word: Tensor, token_type: Option<Tensor>, norm: AddLayerNorm },
}

struct Layer {
    qkv: Linear,
    attention: Disentangled,
    attention_output: ResidualBlock,
    feed_forward: ResidualBlock,
}

impl DebertaEncoder {
    /// Reads all tensors of an encoder, and computes the positions' keys and queries of each layer, which no input
    /// changes.
    ///
    /// Errors: [`crate::Error::Tensor`] for a tensor that is missing or does not have the config's shape;
    /// [`crate::Error::ModelFile`] for GGUF.
    pub fn load(weights: &Weights, config: &EncoderConfig, deberta: &DebertaConfig) -> Result<Self> {
        if weights.format() == Format::Gguf {
            return Err(file_error(weights.path(), "is GGUF; DeBERTa is read from safetensors"));
        }
        let reader = EncoderWeights::new(weights, config)?;
        let embeddings = if deberta.position_biased_input {
            let tables = reader.embedding()?;
            let (word, position, token_type) = (tables.word, tables.position, tables.token_type);
            Embeddings::Positioned(Embedding::new(word, position, token_type, norm(tables.norm, config)?, 0)?)
        } else {
            let norm = norm(reader.embedding_norm()?, config)?;
            Embeddings::Plain { word: reader.word()?, token_type: reader.token_type()?, norm }
        };
        let conv = match &deberta.conv {
            None => None,
            Some(conv) => {
                let hidden = config.hidden_size;
                let weight = reader.get("encoder.conv.conv.weight", &[hidden, hidden, conv.kernel_size])?;
                let bias = reader.get("encoder.conv.conv.bias", &[hidden])?;
                let norm = norm(reader.norm("encoder.conv.LayerNorm", hidden)?, config)?;
                Some((SequenceConv::new(&weight, bias, conv.activation)?, norm))
            }
        };
        let table = deberta.relative.as_ref().map(|relative| Table::read(&reader, config, relative)).transpose()?;
        let layers = (0..config.num_layers).map(|i| Layer::read(&reader, i, config, deberta, table.as_ref()));
        Ok(Self { embeddings, layers: layers.collect::<Result<_>>()?, conv })
    }
}

impl Trunk for DebertaEncoder {
    fn forward(&self, input_ids: &Tensor, token_type_ids: Option<&Tensor>, cu_seqlens: &CuSeqlens) -> Result<Tensor> {
        let embedded = self.embeddings.forward(input_ids, token_type_ids, cu_seqlens)?;
        let mut hidden = embedded.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            hidden = layer.forward(&hidden, cu_seqlens)?;
            if let (0, Some((conv, norm))) = (i, &self.conv) {
                hidden = norm.forward(&conv.forward(&embedded, cu_seqlens)?, Some(&hidden))?;
            }
        }
        Ok(hidden)
    }
}

impl Embeddings {
    fn forward(&self, input_ids: &Tensor, token_type_ids: Option<&Tensor>, cu_seqlens: &CuSeqlens) -> Result<Tensor> {
        match self {
            Self::Positioned(embedding) => embedding.forward(input_ids, token_type_ids, cu_seqlens),
            Self::Plain { word, token_type, norm } => {
                let words = word.index_select(input_ids, 0)?;
                let types = match (token_type, token_type_ids) {
                    (None, _) => None,
                    (Some(table), Some(ids)) => Some(table.index_select(ids, 0)?),
                    (Some(table), None) => Some(table.i(0..1)?.broadcast_as(words.shape())?.contiguous()?),
                };
                norm.forward(&words, types.as_ref())
            }
        }
    }
}

/// The table of relative positions, the same for all layers.
struct Table<'a> {
    relative: &'a RelativeConfig,
    /// [2 * span, hidden_size]
    embeddings: Tensor,
    /// The table's row of each distance query - key, from the farthest key after the query on.
    rows: Arc<[u32]>,
}

impl<'a> Table<'a> {
    fn read(reader: &EncoderWeights, config: &EncoderConfig, relative: &'a RelativeConfig) -> Result<Self> {
        let mut embeddings = reader.get("encoder.rel_embeddings.weight", &[2 * relative.span, config.hidden_size])?;
        if relative.layer_norm {
            let norm = norm(reader.norm("encoder.LayerNorm", config.hidden_size)?, config)?;
            embeddings = norm.forward(&embeddings, None)?;
        }
        let farthest = config.max_seq_len() as i64 - 1;
        let rows = (-farthest..=farthest).map(|distance| row(distance, relative)).collect();
        Ok(Self { relative, embeddings, rows })
    }
}

impl Layer {
    fn read(
        reader: &EncoderWeights,
        i: usize,
        config: &EncoderConfig,
        deberta: &DebertaConfig,
        table: Option<&Table>,
    ) -> Result<Self> {
        let weights = reader.layer(i)?;
        let qkv = linear(weights.qkv, Activation::None)?;
        let positions = table.map(|table| positions(reader, i, config, table, &qkv)).transpose()?;
        let scale = 1.0 / ((config.head_dim() * deberta.num_score_parts) as f64).sqrt();
        let attention_output = linear(weights.attention_output, Activation::None)?;
        let up = linear(weights.up, config.activation)?;
        let down = linear(weights.down, Activation::None)?;
        Ok(Self {
            qkv,
            attention: Disentangled::new(config.num_heads, config.head_dim(), scale, positions)?,
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

/// What the table's rows are to layer `i`.
fn positions(
    reader: &EncoderWeights,
    i: usize,
    config: &EncoderConfig,
    table: &Table,
    qkv: &Linear,
) -> Result<RelativePositions> {
    let Table { relative, embeddings, rows } = table;
    let hidden = config.hidden_size;
    let (keys, queries) = if relative.share_att_key {
        let all = qkv.forward(embeddings)?;
        let part = |at: usize| -> Result<Tensor> { Ok(all.narrow(1, at, hidden)?.contiguous()?) };
        (
            relative.content_to_position.then(|| part(hidden)).transpose()?,
            relative.position_to_content.then(|| part(0)).transpose()?,
        )
    } else {
        let part = |name: &str, has_bias: bool| -> Result<Tensor> {
            let name = format!("{}attention.self.{name}", reader.layer_prefix(i));
            let weight = reader.get(&format!("{name}.weight"), &[hidden, hidden])?;
            let bias = has_bias.then(|| reader.get(&format!("{name}.bias"), &[hidden])).transpose()?;
            Linear::new(weight, bias, Activation::None)?.forward(embeddings)
        };
        // The first version's keys have no bias, of positions as of content.
        let (key, key_has_bias, query) = match config.architecture {
            Architecture::Deberta => ("pos_proj", false, "pos_q_proj"),
            _ => ("pos_key_proj", true, "pos_query_proj"),
        };
        (
            relative.content_to_position.then(|| part(key, key_has_bias)).transpose()?,
            relative.position_to_content.then(|| part(query, true)).transpose()?,
        )
    };
    Ok(RelativePositions { rows: rows.clone(), keys, queries })
}

/// The table's row of a distance query - key: the middle row for 0, one row a distance near it.
fn row(distance: i64, relative: &RelativeConfig) -> u32 {
    let bucket = match relative.log_buckets_to {
        None => distance,
        Some(farthest) => log_bucket(distance, relative.span, farthest),
    };
    let span = relative.span as i64;
    (bucket + span).clamp(0, 2 * span - 1) as u32
}

/// Signed bucket of a distance: itself up to half of `num_buckets`, then by logarithms, so that `farthest` - 1 is the
/// last.
fn log_bucket(distance: i64, num_buckets: usize, farthest: usize) -> i64 {
    let half = (num_buckets / 2) as i64;
    if distance.abs() <= half {
        return distance;
    }
    // In f32 and in this order, as transformers has it: rounding decides the bucket of distances at the edge of two.
    let ratio = (distance.abs() as f32 / half as f32).ln() / ((farthest - 1) as f32 / half as f32).ln();
    let bucket = (ratio * (half - 1) as f32).ceil() as i64 + half;
    bucket * distance.signum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_exact_near_and_logarithmic_far() {
        // As transformers' make_log_bucket_position computes them; 255 and 256 lie at the edges of buckets, and
        // ln(255 / 128) / ln(511 / 128) * 127 is 63.2, so 192 after rounding up.
        let of_v3 =
            [(0, 0), (1, 1), (128, 128), (129, 129), (131, 131), (132, 131), (133, 132), (254, 191), (255, 192)];
        let beyond = [(500, 254), (505, 254), (506, 255), (511, 255), (512, 256), (596, 270)];
        for (distance, bucket) in of_v3.into_iter().chain(beyond) {
            assert_eq!(log_bucket(distance, 256, 512), bucket, "distance {distance}");
            assert_eq!(log_bucket(-distance, 256, 512), -bucket, "distance {}", -distance);
        }
        for (distance, bucket) in
            [(8, 8), (9, 9), (11, 9), (12, 10), (17, 10), (18, 11), (86, 15), (127, 15), (128, 16)]
        {
            assert_eq!(log_bucket(distance, 16, 128), bucket, "distance {distance}");
        }
    }

    #[test]
    fn rows_stay_within_the_table() {
        let relative = RelativeConfig {
            span: 16,
            log_buckets_to: None,
            content_to_position: true,
            position_to_content: true,
            share_att_key: false,
            layer_norm: false,
        };
        let far = RelativeConfig { log_buckets_to: Some(128), ..relative.clone() };
        for (distance, near, bucketed) in
            [(0, 16, 16), (15, 31, 26), (16, 31, 26), (-16, 0, 6), (5000, 31, 31), (-5000, 0, 0)]
        {
            assert_eq!((row(distance, &relative), row(distance, &far)), (near, bucketed), "distance {distance}");
        }
    }
}
