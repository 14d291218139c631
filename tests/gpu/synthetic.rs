//! Encoders with made-up weights and batches of made-up tokens: the same numbers on every machine, and the same as
//! benches/peers/gpu.py makes in Python, so that two programs can compare their rows without a file between them.
#![allow(dead_code, reason = "tests and benches each use a part")]

use candle_core::{Device, Tensor};
use eremois::Result;
use eremois::ops::CuSeqlens;
use eremois::ops::attention::{Attention, Mask};
use eremois::ops::cuda::HalfType;
use eremois::ops::cuda::budget::Capacity;
use eremois::ops::cuda::encoder::DeviceEncoder;
use eremois::ops::cuda::engine::Engine;
use eremois::ops::cuda::layout::Batch;
use eremois::ops::cuda::sizes::EncoderSizes;
use eremois::ops::embedding::Embedding;
use eremois::ops::linear::{Activation, Linear};
use eremois::ops::norm::AddLayerNorm;
use eremois::ops::pool::{Pooling, RowSpec, pool};
use eremois::ops::residual::ResidualBlock;
use eremois::ops::weights::{EmbeddingWeights, LayerWeights, LinearWeights, NormWeights};
use rayon::prelude::*;

/// The shapes of sentence-transformers/all-MiniLM-L6-v2.
pub const MINILM_L6: EncoderSizes =
    EncoderSizes { hidden_size: 384, num_layers: 6, intermediate_size: 1536, ..BERT_BASE };
/// Those of BAAI/bge-base-en-v1.5: BERT-base.
pub const BERT_BASE: EncoderSizes = EncoderSizes {
    vocab_size: 30_522,
    num_positions: 512,
    position_offset: 0,
    num_token_types: 2,
    hidden_size: 768,
    num_heads: 12,
    num_layers: 12,
    intermediate_size: 3072,
    activation: Activation::Gelu,
    layer_norm_eps: 1e-12,
};
/// Those of BAAI/bge-large-en-v1.5: BERT-large.
pub const BERT_LARGE: EncoderSizes =
    EncoderSizes { hidden_size: 1024, num_heads: 16, num_layers: 24, intermediate_size: 4096, ..BERT_BASE };

/// A model of the benches by its name there.
pub fn sizes_of(name: &str) -> Option<EncoderSizes> {
    [("minilm-l6", MINILM_L6), ("bert-base", BERT_BASE), ("bert-large", BERT_LARGE)]
        .into_iter()
        .find_map(|(known, sizes)| (known == name).then_some(sizes))
}

/// Scrambles 32 bits one to one. Source: Wellons 2018, "Prospecting for Hash Functions" (lowbias32).
fn mix(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// Value `i` of tensor number `tensor`, in [-1, 1). Exact in f32, so that any language gives the same.
pub fn value(tensor: u32, i: u32) -> f32 {
    (mix(i ^ mix(tensor)) >> 8) as f32 * (2.0 / 16_777_216.0) - 1.0
}

/// Values of a tensor, each times `scale`.
pub fn values(tensor: u32, len: usize, scale: f32) -> Vec<f32> {
    (0..len as u32).into_par_iter().map(|i| value(tensor, i) * scale).collect()
}

fn tensor(number: u32, shape: &[usize], scale: f32) -> Tensor {
    let values = values(number, shape.iter().product(), scale);
    Tensor::from_vec(values, shape, &Device::Cpu).expect("as many values as the shape has")
}

/// The numbers of an encoder's tensors: the tables and their norm, then 16 a layer.
const LAYER_TENSORS: u32 = 16;
const SMALL: f32 = 0.1;

/// A matrix whose product has about the variance of its input: far enough from the start of a training, where layers
/// hardly change their input and any error would hide in the residual.
fn linear(number: u32, out: usize, input: usize) -> LinearWeights {
    let scale = (GAIN / input as f64).sqrt() as f32;
    LinearWeights { weight: tensor(number, &[out, input], scale), bias: tensor(number + 1, &[out], SMALL) }
}

/// Of the variance of a product's input: uniform values in [-a, a) have variance a² / 3.
const GAIN: f64 = 3.0;

fn norm(number: u32, hidden_size: usize) -> NormWeights {
    let gamma: Vec<f32> = values(number, hidden_size, SMALL).into_iter().map(|x| 1.0 + x).collect();
    let weight = Tensor::from_vec(gamma, hidden_size, &Device::Cpu).expect("as many values as columns");
    NormWeights { weight, bias: tensor(number + 1, &[hidden_size], SMALL) }
}

pub fn embedding_weights(sizes: &EncoderSizes) -> EmbeddingWeights {
    let hidden = sizes.hidden_size;
    EmbeddingWeights {
        word: tensor(0, &[sizes.vocab_size, hidden], 1.0),
        position: tensor(1, &[sizes.num_positions, hidden], 1.0),
        token_type: (sizes.num_token_types > 0).then(|| tensor(2, &[sizes.num_token_types, hidden], 1.0)),
        norm: norm(3, hidden),
    }
}

pub fn layer_weights(sizes: &EncoderSizes, i: usize) -> LayerWeights {
    let (hidden, intermediate) = (sizes.hidden_size, sizes.intermediate_size);
    let first = LAYER_TENSORS * (i as u32 + 1);
    LayerWeights {
        qkv: linear(first, 3 * hidden, hidden),
        attention_output: linear(first + 2, hidden, hidden),
        attention_norm: norm(first + 4, hidden),
        up: linear(first + 6, intermediate, hidden),
        down: linear(first + 8, hidden, intermediate),
        output_norm: norm(first + 10, hidden),
    }
}

/// A bias by distance as MPNet has it, [num_heads, 2 * max_seq_len - 1].
pub fn distance_bias(sizes: &EncoderSizes) -> Tensor {
    tensor(9, &[sizes.num_heads, 2 * sizes.max_seq_len() - 1], 1.0)
}

/// An encoder of these sizes on the CPU in f32: the twin of [`device_encoder`].
pub struct CpuEncoder {
    embedding: Embedding,
    layers: Vec<CpuLayer>,
}

struct CpuLayer {
    qkv: Linear,
    attention: Attention,
    attention_output: ResidualBlock,
    feed_forward: ResidualBlock,
}

impl CpuEncoder {
    pub fn new(sizes: &EncoderSizes, distance_bias: Option<&Tensor>) -> Result<Self> {
        let norm = |norm: NormWeights| AddLayerNorm::new(norm.weight, norm.bias, sizes.layer_norm_eps);
        let linear = |linear: LinearWeights, activation| Linear::new(linear.weight, Some(linear.bias), activation);
        let EmbeddingWeights { word, position, token_type, norm: first } = embedding_weights(sizes);
        let embedding = Embedding::new(word, position, token_type, norm(first)?, sizes.position_offset)?;
        let scale = 1.0 / (sizes.head_dim() as f64).sqrt();
        let layers = (0..sizes.num_layers).map(|i| {
            let weights = layer_weights(sizes, i);
            let up = linear(weights.up, sizes.activation)?;
            let down = linear(weights.down, Activation::None)?;
            let bias = distance_bias.cloned();
            Ok(CpuLayer {
                qkv: linear(weights.qkv, Activation::None)?,
                attention: Attention::new(sizes.num_heads, sizes.head_dim(), scale, bias, Mask::Full)?,
                attention_output: ResidualBlock::new(
                    vec![linear(weights.attention_output, Activation::None)?],
                    norm(weights.attention_norm)?,
                )?,
                feed_forward: ResidualBlock::new(vec![up, down], norm(weights.output_norm)?)?,
            })
        });
        Ok(Self { embedding, layers: layers.collect::<Result<_>>()? })
    }

    /// The rows of a batch.
    pub fn rows(&self, tokens: &Tokens, pooling: Pooling) -> Result<Vec<Vec<f32>>> {
        let on_cpu = |ids: &[u32]| Tensor::new(ids, &Device::Cpu);
        let cu_seqlens = CuSeqlens::new(&tokens.cu_seqlens, &Device::Cpu)?;
        let types = tokens.token_type_ids.as_deref().map(on_cpu).transpose()?;
        let mut hidden = self.embedding.forward(&on_cpu(&tokens.input_ids)?, types.as_ref(), &cu_seqlens)?;
        for layer in &self.layers {
            let context = layer.attention.forward(&layer.qkv.forward(&hidden)?, &cu_seqlens)?;
            hidden = layer.attention_output.forward(&context, &hidden)?;
            hidden = layer.feed_forward.forward(&hidden, &hidden)?;
        }
        Ok(pool(&hidden, &cu_seqlens, pooling, &tokens.rows)?.to_vec2::<f32>()?)
    }
}

/// An encoder of these sizes at work on a device, and the stream it computes on.
pub fn engine(
    gpu: &eremois::ops::cuda::Gpu,
    dtype: HalfType,
    sizes: &EncoderSizes,
    distance_bias: Option<Tensor>,
    pooling: Pooling,
    capacity: Capacity,
    cache_dir: Option<&std::path::Path>,
) -> Result<(Engine, std::sync::Arc<cudarc::driver::CudaStream>)> {
    let compute = gpu.new_stream()?;
    let layers = (0..sizes.num_layers).map(|i| Ok(layer_weights(sizes, i)));
    let encoder = DeviceEncoder::new(gpu, &compute, dtype, *sizes, embedding_weights(sizes), distance_bias, layers)?;
    let engine = Engine::new(gpu.clone(), compute.clone(), encoder, pooling, capacity, cache_dir)?;
    Ok((engine, compute))
}

/// A batch with its memory.
#[derive(Debug, Clone)]
pub struct Tokens {
    pub input_ids: Vec<u32>,
    pub token_type_ids: Option<Vec<u32>>,
    pub cu_seqlens: Vec<u32>,
    pub rows: Vec<RowSpec>,
}

impl Tokens {
    /// Sequences of these lengths; `seed` tells one batch from another. All rows whole and of length 1.
    pub fn new(sizes: &EncoderSizes, lens: &[usize], seed: u32) -> Self {
        let mut cu_seqlens = vec![0u32];
        for &len in lens {
            cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + len as u32);
        }
        let total_tokens: usize = lens.iter().sum();
        let input_ids = (0..total_tokens as u32).map(|i| mix(i ^ mix(seed)) % sizes.vocab_size as u32).collect();
        let row = RowSpec { normalize: true, dimensions: sizes.hidden_size };
        Self { input_ids, token_type_ids: None, cu_seqlens, rows: vec![row; lens.len()] }
    }

    /// The same with types, of those that the model has.
    pub fn with_token_types(mut self, sizes: &EncoderSizes) -> Self {
        let types = sizes.num_token_types as u32;
        self.token_type_ids = Some((0..self.input_ids.len() as u32).map(|i| mix(i) % types).collect());
        self
    }

    pub fn batch(&self) -> Batch<'_> {
        Batch {
            input_ids: &self.input_ids,
            token_type_ids: self.token_type_ids.as_deref(),
            cu_seqlens: &self.cu_seqlens,
            rows: &self.rows,
        }
    }

    pub fn num_seqs(&self) -> usize {
        self.rows.len()
    }

    /// Sequence `i` as a batch of its own.
    pub fn alone(&self, i: usize) -> Self {
        let range = self.cu_seqlens[i] as usize..self.cu_seqlens[i + 1] as usize;
        Self {
            input_ids: self.input_ids[range.clone()].to_vec(),
            token_type_ids: self.token_type_ids.as_ref().map(|types| types[range.clone()].to_vec()),
            cu_seqlens: vec![0, range.len() as u32],
            rows: vec![self.rows[i]],
        }
    }
}

/// Waits for a batch under way and reads its rows.
pub fn read_rows(pending: &eremois::ops::cuda::engine::Pending, tokens: &Tokens) -> Result<Vec<Vec<f32>>> {
    pending.wait()?;
    let mut rows = Vec::with_capacity(tokens.num_seqs());
    for (i, spec) in tokens.rows.iter().enumerate() {
        let mut row = Vec::with_capacity(spec.dimensions);
        pending.read_row(i, spec.dimensions, &mut row)?;
        rows.push(row);
    }
    Ok(rows)
}

/// Cosine of the angle between two vectors of one length, summed in f64; NaN where one has a NaN.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// The smallest cosine between rows; NaN if there is one.
pub fn min_cosine(a: &[Vec<f32>], b: &[Vec<f32>]) -> f64 {
    let cosines = a.iter().zip(b).map(|(a, b)| cosine(a, b));
    cosines.fold(1.0, |least, cosine| if cosine < least || cosine.is_nan() { cosine } else { least })
}
