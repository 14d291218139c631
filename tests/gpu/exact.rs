//! What each kernel computes, in f64 and as plainly as it can be written.

use std::ops::Range;

use candle_core::cpu::erf::erf_f64;
use eremois::ops::cuda::HalfType;
use eremois::ops::linear::Activation;
use eremois::ops::pool::{Pooling, RowSpec};
use rayon::prelude::*;

use super::desk::rounded_value;

/// `(x - mean) / sqrt(variance + eps) * gamma + beta` of each row of `columns`.
pub fn layer_norm(x: &[f64], columns: usize, gamma: &[f32], beta: &[f32], eps: f64) -> Vec<f64> {
    let normed = x.chunks_exact(columns).flat_map(|row| {
        let mean = row.iter().sum::<f64>() / columns as f64;
        let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / columns as f64;
        let scale = 1.0 / (variance + eps).sqrt();
        let columns = row.iter().zip(gamma).zip(beta);
        columns.map(move |((x, g), b)| (x - mean) * scale * f64::from(*g) + f64::from(*b)).collect::<Vec<_>>()
    });
    normed.collect()
}

/// `x / sqrt(mean(x²) + eps) * gamma` of each row of `columns`.
pub fn rms_norm(x: &[f64], columns: usize, gamma: &[f32], eps: f64) -> Vec<f64> {
    let normed = x.chunks_exact(columns).flat_map(|row| {
        let square = row.iter().map(|x| x * x).sum::<f64>() / columns as f64;
        let scale = 1.0 / (square + eps).sqrt();
        row.iter().zip(gamma).map(move |(x, g)| x * scale * f64::from(*g)).collect::<Vec<_>>()
    });
    normed.collect()
}

pub fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::None => x,
        Activation::Gelu => 0.5 * x * (1.0 + erf_f64(x / std::f64::consts::SQRT_2)),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Relu => x.max(0.0),
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Tanh => x.tanh(),
    }
}

/// `activation(x weightᵀ + bias)`. Shapes: `x` [rows, depth]; `weight` [columns, depth]; `bias` [columns].
pub fn linear(x: &[f32], weight: &[f32], bias: Option<&[f32]>, depth: usize, activation: Activation) -> Vec<f64> {
    let row = |x: &[f32]| {
        let product = weight.chunks_exact(depth).enumerate().map(|(column, weight)| {
            let dot = x.iter().zip(weight).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>();
            activate(activation, dot + bias.map_or(0.0, |bias| f64::from(bias[column])))
        });
        product.collect::<Vec<f64>>()
    };
    x.par_chunks_exact(depth).flat_map_iter(row).collect()
}

/// One row a sequence, as `ops::pool::pool` has them. Shapes: `hidden` [total_tokens, columns].
pub fn pool(
    hidden: &[f32],
    columns: usize,
    ranges: impl Iterator<Item = Range<usize>>,
    pooling: Pooling,
    rows: &[RowSpec],
) -> Vec<f64> {
    let pooled = ranges.zip(rows).flat_map(|(range, spec)| {
        let len = range.len();
        let tokens = &hidden[range.start * columns..range.end * columns];
        let mut row: Vec<f64> = (0..columns)
            .map(|column| {
                let values = tokens.chunks_exact(columns).map(|token| f64::from(token[column]));
                match pooling {
                    Pooling::Cls => f64::from(tokens[column]),
                    Pooling::LastToken => f64::from(tokens[(len - 1) * columns + column]),
                    Pooling::Mean => values.sum::<f64>() / len as f64,
                    Pooling::Max => values.fold(f64::NEG_INFINITY, f64::max),
                    Pooling::WeightedMean => {
                        let weighted = values.enumerate().map(|(i, x)| (i + 1) as f64 * x).sum::<f64>();
                        weighted / (len * (len + 1) / 2) as f64
                    }
                }
            })
            .collect();
        row[spec.dimensions..].fill(0.0);
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        if spec.normalize && norm != 0.0 {
            row.iter_mut().for_each(|x| *x /= norm);
        }
        row
    });
    pooled.collect()
}

/// The operands of attention in a reference's words.
pub struct AttentionCase<'a> {
    pub dtype: HalfType,
    /// [total_tokens, 3 * num_heads * head_dim]
    pub qkv: &'a [f32],
    pub num_heads: usize,
    pub head_dim: usize,
    pub scale: f64,
    pub causal: bool,
    /// [num_heads, 2 * max_seq_len - 1]
    pub distance_bias: Option<&'a [f32]>,
    /// cos and sin, [max_seq_len, head_dim / 2] each
    pub rope: Option<(&'a [f32], &'a [f32])>,
    pub max_seq_len: usize,
}

/// Attention of each sequence and head by itself, [total_tokens, num_heads * head_dim].
pub fn attention(case: &AttentionCase, ranges: impl Iterator<Item = Range<usize>>) -> Vec<f64> {
    let width = case.num_heads * case.head_dim;
    let mut out = Vec::new();
    for range in ranges {
        let first = out.len();
        out.resize(first + range.len() * width, 0.0);
        for head in 0..case.num_heads {
            let part = |part: usize| -> Vec<Vec<f64>> {
                (0..range.len()).map(|i| case.vector(range.start + i, i, part, head)).collect()
            };
            let (queries, keys, values) = (part(0), part(1), part(2));
            for (i, query) in queries.iter().enumerate() {
                let num_keys = if case.causal { i + 1 } else { range.len() };
                let score = |j: usize| {
                    let dot = query.iter().zip(&keys[j]).map(|(q, k)| q * k).sum::<f64>() * case.scale;
                    let row = 2 * case.max_seq_len - 1;
                    let distance = j + case.max_seq_len - 1 - i;
                    dot + case.distance_bias.map_or(0.0, |bias| f64::from(bias[head * row + distance]))
                };
                let mut weights: Vec<f64> = (0..num_keys).map(score).collect();
                let largest = weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                weights.iter_mut().for_each(|w| *w = (*w - largest).exp());
                let sum: f64 = weights.iter().sum();
                let row = &mut out[first + i * width + head * case.head_dim..][..case.head_dim];
                for (weight, value) in weights.iter().zip(&values) {
                    row.iter_mut().zip(value).for_each(|(out, v)| *out += weight / sum * v);
                }
            }
        }
    }
    out
}

impl AttentionCase<'_> {
    /// Query (part 0), key (1) or value (2) of a token, turned and rounded as the kernel does where there is RoPE.
    fn vector(&self, token: usize, position: usize, part: usize, head: usize) -> Vec<f64> {
        let width = self.num_heads * self.head_dim;
        let row = &self.qkv[token * 3 * width + part * width + head * self.head_dim..][..self.head_dim];
        let plain = || row.iter().map(|&x| f64::from(x)).collect();
        let Some((cos, sin)) = self.rope.filter(|_| part < 2) else { return plain() };
        let pairs = self.head_dim / 2;
        let turned = (0..self.head_dim).map(|c| {
            let d = c % pairs;
            let (c0, s0) = (f64::from(cos[position * pairs + d]), f64::from(sin[position * pairs + d]));
            let (x1, x2) = (f64::from(row[d]), f64::from(row[d + pairs]));
            let x = if c < pairs { x1 * c0 - x2 * s0 } else { x2 * c0 + x1 * s0 };
            f64::from(rounded_value(self.dtype, x as f32))
        });
        turned.collect()
    }
}
