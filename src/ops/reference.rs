//! The slow compositions of plain candle ops: what each op means, on any device and in any dtype.
//!
//! The CPU forwards are tested against these, and a device without a kernel of its own computes with
//! them. Each takes operands the op's `forward` has already checked.

use candle_core::{D, DType, Device, IndexOp, Tensor};

use super::CuSeqlens;
use super::attention::{Heads, Mask};
use super::disentangled::RelativePositions;
use super::linear::Activation;
use super::pool::{Pooling, RowSpec};
use crate::Result;

/// `activation(x weightᵀ + bias)`.
///
/// Shapes: `x` [m, in]; `weight` [out, in]; `bias` [out]. Returns [m, out].
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
    let mut y = x.matmul(&weight.t()?)?;
    if let Some(bias) = bias {
        y = y.broadcast_add(bias)?;
    }
    Ok(match activation {
        Activation::None => y,
        Activation::Gelu => y.gelu_erf()?,
        Activation::GeluTanh => y.gelu()?,
        Activation::Relu => y.relu()?,
        Activation::Silu => y.silu()?,
        Activation::Tanh => y.tanh()?,
    })
}

/// `softmax(scale q kᵀ + bias) v` of each sequence and head by itself, softmax in f32.
///
/// Shapes: `qkv` [total_tokens, (num_heads + 2 * num_kv_heads) * head_dim]; `distance_bias`
/// [num_heads, 2 * max_seq_len - 1]. Returns [total_tokens, num_heads * head_dim].
pub fn attention(
    qkv: &Tensor,
    cu_seqlens: &CuSeqlens,
    heads: Heads,
    scale: f64,
    distance_bias: Option<&Tensor>,
    mask: Mask,
) -> Result<Tensor> {
    let Heads { num_heads, num_kv_heads, head_dim } = heads;
    let (width, kv_width) = (heads.width(), heads.kv_width());
    let mut outputs = Vec::with_capacity(cu_seqlens.num_seqs());
    for range in cu_seqlens.ranges() {
        let len = range.len();
        let rows = qkv.narrow(0, range.start, len)?;
        // [len, heads * head_dim] -> [heads, len, head_dim]
        let part = |start: usize, heads: usize| -> candle_core::Result<Tensor> {
            let columns = rows.narrow(1, start, heads * head_dim)?;
            columns.reshape((len, heads, head_dim))?.transpose(0, 1)?.contiguous()
        };
        // One head of keys or values for each of queries.
        let spread = |x: Tensor| -> candle_core::Result<Tensor> {
            let shape = (num_kv_heads, num_heads / num_kv_heads, len, head_dim);
            x.unsqueeze(1)?.expand(shape)?.reshape((num_heads, len, head_dim))
        };
        let q = part(0, num_heads)?;
        let (k, v) = (spread(part(width, num_kv_heads)?)?, spread(part(width + kv_width, num_kv_heads)?)?);
        let mut scores = (q.matmul(&k.t()?)?.to_dtype(DType::F32)? * scale)?;
        if let Some(bias) = distance_bias {
            scores = (scores + expand_distance_bias(bias, len)?)?;
        }
        if mask != Mask::Full {
            scores = scores.broadcast_add(&additive_mask(mask, len, qkv.device())?)?;
        }
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(v.dtype())?;
        outputs.push(weights.matmul(&v)?.transpose(0, 1)?.reshape((len, width))?);
    }
    Ok(Tensor::cat(&outputs, 0)?)
}

/// `softmax(scale (q·k + q·position_key + k·position_query)) v` of each sequence and head by itself, softmax in f32.
///
/// Shapes: `qkv` [total_tokens, 3 * num_heads * head_dim]. Returns [total_tokens, num_heads * head_dim].
pub fn disentangled(
    qkv: &Tensor,
    cu_seqlens: &CuSeqlens,
    num_heads: usize,
    head_dim: usize,
    scale: f64,
    positions: Option<&RelativePositions>,
) -> Result<Tensor> {
    let width = num_heads * head_dim;
    // [rows, width] -> [num_heads, rows, head_dim]
    let by_head = |x: &Tensor| -> candle_core::Result<Tensor> {
        x.reshape((x.dim(0)?, num_heads, head_dim))?.transpose(0, 1)?.contiguous()
    };
    let mut outputs = Vec::with_capacity(cu_seqlens.num_seqs());
    for range in cu_seqlens.ranges() {
        let len = range.len();
        let rows = qkv.narrow(0, range.start, len)?;
        let part = |i: usize| -> candle_core::Result<Tensor> { by_head(&rows.narrow(1, i * width, width)?) };
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let mut scores = q.matmul(&k.t()?)?;
        if let Some(RelativePositions { rows, keys, queries }) = positions {
            let reach = rows.len() / 2;
            let by_query: Vec<u32> =
                (0..len).flat_map(|query| (0..len).map(move |key| rows[reach + query - key])).collect();
            let by_query = Tensor::from_vec(by_query, (1, len, len), qkv.device())?;
            let expanded = |idx: &Tensor| idx.broadcast_as((num_heads, len, len))?.contiguous();
            if let Some(keys) = keys {
                let all = q.matmul(&by_head(keys)?.t()?)?;
                scores = (scores + all.gather(&expanded(&by_query)?, 2)?)?;
            }
            if let Some(queries) = queries {
                // By key and query, then the other way round.
                let all = k.matmul(&by_head(queries)?.t()?)?;
                scores = (scores + all.gather(&expanded(&by_query.transpose(1, 2)?)?, 2)?.transpose(1, 2)?)?;
            }
        }
        let scores = (scores.to_dtype(DType::F32)? * scale)?;
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(v.dtype())?;
        outputs.push(weights.matmul(&v)?.transpose(0, 1)?.reshape((len, width))?);
    }
    Ok(Tensor::cat(&outputs, 0)?)
}

/// [num_heads, 2 * max_seq_len - 1] by distance -> [num_heads, len, len] by query and key.
fn expand_distance_bias(bias: &Tensor, len: usize) -> Result<Tensor> {
    let max_seq_len = bias.dim(1)?.div_ceil(2);
    let idx: Vec<u32> =
        (0..len).flat_map(|query| (0..len).map(move |key| (key + max_seq_len - 1 - query) as u32)).collect();
    let idx = Tensor::from_vec(idx, len * len, bias.device())?;
    Ok(bias.index_select(&idx, 1)?.reshape((bias.dim(0)?, len, len))?.to_dtype(DType::F32)?)
}

/// [len, len] f32: 0 where the query sees the key, else minus infinity.
fn additive_mask(mask: Mask, len: usize, device: &Device) -> Result<Tensor> {
    let row = |query: usize| {
        let seen = mask.keys(query, len);
        (0..len).map(move |key| if seen.contains(&key) { 0.0 } else { f32::NEG_INFINITY })
    };
    let values: Vec<f32> = (0..len).flat_map(row).collect();
    Ok(Tensor::from_vec(values, (len, len), device)?)
}

/// `LayerNorm(x + residual) * weight + bias`, mean and variance in f32.
///
/// Shapes: `x`, `residual` [m, hidden_size]; `weight`, `bias` [hidden_size]. Returns [m, hidden_size].
pub fn add_layer_norm(
    x: &Tensor,
    residual: Option<&Tensor>,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<Tensor> {
    let dtype = x.dtype();
    let x = match residual {
        Some(residual) => (x + residual)?,
        None => x.clone(),
    };
    let x = x.to_dtype(DType::F32)?;
    let centred = x.broadcast_sub(&x.mean_keepdim(1)?)?;
    let variance = centred.sqr()?.mean_keepdim(1)?;
    let normed = centred.broadcast_div(&(variance + eps)?.sqrt()?)?.to_dtype(dtype)?;
    Ok(normed.broadcast_mul(weight)?.broadcast_add(bias)?)
}

/// `x / sqrt(mean(x²) + eps) * weight`, in f32.
///
/// Shapes: `x` [m, hidden_size]; `weight` [hidden_size]. Returns [m, hidden_size].
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let dtype = x.dtype();
    let x = x.to_dtype(DType::F32)?;
    let scale = (x.sqr()?.mean_keepdim(1)? + eps)?.sqrt()?;
    Ok(x.broadcast_div(&scale)?.to_dtype(dtype)?.broadcast_mul(weight)?)
}

/// Each head of queries and keys RMS-normalised where there are weights for it, then turned by its token's
/// position; values as they are.
///
/// Shapes: `qkv` [total_tokens, row_width]; `cos`, `sin` [max_seq_len, head_dim / 2]; `norms` [head_dim] each,
/// of queries and of keys. Returns [total_tokens, row_width].
pub fn rotary(
    qkv: &Tensor,
    cu_seqlens: &CuSeqlens,
    heads: Heads,
    cos: &Tensor,
    sin: &Tensor,
    norms: Option<(&Tensor, &Tensor, f64)>,
) -> Result<Tensor> {
    let (total, half) = (cu_seqlens.total_tokens(), heads.head_dim / 2);
    let positions: Vec<u32> = cu_seqlens.ranges().flat_map(|r| 0..r.len() as u32).collect();
    let positions = Tensor::from_vec(positions, total, qkv.device())?;
    let rows = |table: &Tensor| table.index_select(&positions, 0)?.unsqueeze(1);
    let (cos, sin) = (rows(cos)?, rows(sin)?);
    let turned = |start: usize, num_heads: usize, norm: Option<(&Tensor, f64)>| -> Result<Tensor> {
        let width = num_heads * heads.head_dim;
        let mut x = qkv.narrow(1, start, width)?.contiguous()?;
        if let Some((weight, eps)) = norm {
            x = rms_norm(&x.reshape((total * num_heads, heads.head_dim))?, weight, eps)?;
        }
        let x = x.reshape((total, num_heads, heads.head_dim))?;
        let (first, second) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
        let turned = [
            (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?,
            (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?,
        ];
        Ok(Tensor::cat(&turned, 2)?.reshape((total, width))?)
    };
    let queries = turned(0, heads.num_heads, norms.map(|(query, _, eps)| (query, eps)))?;
    let keys = turned(heads.width(), heads.num_kv_heads, norms.map(|(_, key, eps)| (key, eps)))?;
    let values = qkv.narrow(1, heads.width() + heads.kv_width(), heads.kv_width())?;
    Ok(Tensor::cat(&[queries, keys, values.contiguous()?], 1)?)
}

/// Sum of the word, position and token-type rows of each token, before LayerNorm.
///
/// Shapes: `input_ids`, `token_type_ids` [total_tokens] u32. Returns [total_tokens, hidden_size].
pub fn embedding_sum(
    word: &Tensor,
    position: &Tensor,
    token_type: Option<&Tensor>,
    position_offset: usize,
    input_ids: &Tensor,
    token_type_ids: Option<&Tensor>,
    cu_seqlens: &CuSeqlens,
) -> Result<Tensor> {
    let positions: Vec<u32> =
        cu_seqlens.ranges().flat_map(|r| (0..r.len()).map(|i| (i + position_offset) as u32)).collect();
    let positions = Tensor::from_vec(positions, cu_seqlens.total_tokens(), input_ids.device())?;
    let mut sum = (word.index_select(input_ids, 0)? + position.index_select(&positions, 0)?)?;
    if let Some(table) = token_type {
        sum = match token_type_ids {
            Some(ids) => (sum + table.index_select(ids, 0)?)?,
            None => sum.broadcast_add(&table.i(0)?)?,
        };
    }
    Ok(sum)
}

/// One vector a sequence, cut and scaled as its row asks; see [`super::pool::pool`].
pub fn pool(hidden: &Tensor, cu_seqlens: &CuSeqlens, pooling: Pooling, rows: &[RowSpec]) -> Result<Tensor> {
    let hidden_size = hidden.dim(1)?;
    let mut pooled = Vec::with_capacity(rows.len());
    for (range, row) in cu_seqlens.ranges().zip(rows) {
        let len = range.len();
        let tokens = hidden.narrow(0, range.start, len)?.to_dtype(DType::F32)?;
        let vector = match pooling {
            Pooling::Cls => tokens.i(0)?,
            Pooling::LastToken => tokens.i(len - 1)?,
            Pooling::Mean => tokens.mean(0)?,
            Pooling::Max => tokens.max(0)?,
            Pooling::WeightedMean => {
                let total = (len * (len + 1) / 2) as f32;
                let weights: Vec<f32> = (1..=len).map(|i| i as f32 / total).collect();
                let weights = Tensor::from_vec(weights, (1, len), hidden.device())?;
                weights.matmul(&tokens)?.i(0)?
            }
        };
        let mut vector = vector.narrow(0, 0, row.dimensions)?;
        if row.normalize {
            let norm = vector.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?;
            if norm != 0.0 {
                vector = (vector / f64::from(norm))?;
            }
        }
        pooled.push(vector.pad_with_zeros(0, 0, hidden_size - row.dimensions)?);
    }
    Ok(Tensor::stack(&pooled, 0)?)
}
