//! Attention within each sequence of a packed batch.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};
use pulp::{Simd, WithSimd};

use super::gemm::{TILE_ROWS, Tile, tile_vectors, tiles};
use super::tasks::{Task, by_task, check_reach};
use super::{CuSeqlens, check_dims, cpu_values, host_values, reference, simd};
use crate::{Error, Result};

/// Which keys a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mask {
    /// All of its sequence.
    #[default]
    Full,
    /// Those not after it.
    Causal,
    /// Those at most `radius` tokens before or after it.
    Window { radius: usize },
    /// The last `size` of those not after it, itself among them; `size` is at least 1.
    CausalWindow { size: usize },
}

impl Mask {
    /// The keys that the query sees in a sequence of `len` tokens: never none.
    pub fn keys(self, query: usize, len: usize) -> Range<usize> {
        match self {
            Self::Full => 0..len,
            Self::Causal => 0..query + 1,
            Self::Window { radius } => query.saturating_sub(radius)..(query + 1).saturating_add(radius).min(len),
            Self::CausalWindow { size } => (query + 1).saturating_sub(size.max(1))..query + 1,
        }
    }
}

/// How a token's row is divided: its queries, then its keys, then its values, each head by head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Of queries.
    pub num_heads: usize,
    /// Of keys and of values: each serves `num_heads / num_kv_heads` heads of queries that follow one another.
    pub num_kv_heads: usize,
    pub head_dim: usize,
}

impl Heads {
    /// Columns of all heads of queries, and of the result.
    pub fn width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Columns of all heads of keys, or of values.
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Columns of a token's row.
    pub fn row_width(&self) -> usize {
        self.width() + 2 * self.kv_width()
    }

    /// Errors: [`Error::Shape`] for a zero size, or heads of queries that are no multiple of those of keys.
    pub(super) fn check(&self, op: &'static str) -> Result<()> {
        let Self { num_heads, num_kv_heads, head_dim } = *self;
        if num_heads == 0 || num_kv_heads == 0 || head_dim == 0 || !num_heads.is_multiple_of(num_kv_heads) {
            let expected = "at least 1 each, num_heads a multiple of num_kv_heads".to_string();
            let got = format!("{num_heads}, {num_kv_heads}, {head_dim}");
            return Err(Error::Shape { op, operand: "num_heads, num_kv_heads, head_dim", expected, got });
        }
        Ok(())
    }
}

/// `softmax(scale q kᵀ + bias) v`, every sequence and head by itself.
pub struct Attention {
    heads: Heads,
    scale: f64,
    distance_bias: Option<DistanceBias>,
    mask: Mask,
}

/// A bias by distance on its device, and on the host for the CPU forward.
struct DistanceBias {
    /// [num_heads, 2 * max_seq_len - 1]
    tensor: Tensor,
    /// The same, in row-major order.
    host: Vec<f32>,
    max_seq_len: usize,
}

impl Attention {
    /// [`Attention::grouped`] with as many heads of keys and values as of queries.
    pub fn new(
        num_heads: usize,
        head_dim: usize,
        scale: f64,
        distance_bias: Option<Tensor>,
        mask: Mask,
    ) -> Result<Self> {
        Self::grouped(Heads { num_heads, num_kv_heads: num_heads, head_dim }, scale, distance_bias, mask)
    }

    /// `distance_bias[h][key - query + max_seq_len - 1]` is added to head h's scaled score of that pair:
    /// it carries relative position buckets (MPNet, T5) and ALiBi slopes alike.
    ///
    /// Shapes: `distance_bias` [num_heads, 2 * max_seq_len - 1].
    /// Errors: [`Error::Shape`] for heads that do not fit each other or a bias of another shape.
    /// Source of heads that share keys and values: Ainslie et al. 2023 (GQA), section 2.2.
    pub fn grouped(heads: Heads, scale: f64, distance_bias: Option<Tensor>, mask: Mask) -> Result<Self> {
        heads.check("attention")?;
        let num_heads = heads.num_heads;
        if let Some(bias) = &distance_bias {
            let odd = bias.dims().last().is_some_and(|n| n % 2 == 1);
            if bias.dims().len() != 2 || bias.dims()[0] != num_heads || !odd {
                let expected = format!("[{num_heads}, 2 * max_seq_len - 1]");
                let got = format!("{:?}", bias.dims());
                return Err(Error::Shape { op: "attention", operand: "distance_bias", expected, got });
            }
        }
        let distance_bias = match distance_bias {
            Some(tensor) => {
                let host = host_values(&tensor)?;
                let max_seq_len = tensor.dims()[1].div_ceil(2);
                Some(DistanceBias { tensor, host, max_seq_len })
            }
            None => None,
        };
        Ok(Self { heads, scale, distance_bias, mask })
    }

    /// Shapes: `qkv` [total_tokens, (num_heads + 2 * num_kv_heads) * head_dim], rows as [`Heads`] says.
    /// Returns [total_tokens, num_heads * head_dim].
    ///
    /// Errors: [`Error::Shape`] if `qkv` is of another shape, or a sequence is longer than the distance
    /// bias reaches.
    pub fn forward(&self, qkv: &Tensor, cu_seqlens: &CuSeqlens) -> Result<Tensor> {
        check_dims("attention", "qkv", qkv, &[cu_seqlens.total_tokens(), self.heads.row_width()])?;
        if let Some(bias) = &self.distance_bias {
            check_reach("attention", cu_seqlens, bias.max_seq_len)?;
        }
        if qkv.device().is_cpu() {
            let op = CpuAttention { attention: self, cu_seqlens };
            return Ok(qkv.contiguous()?.apply_op1_no_bwd(&op)?);
        }
        let bias = self.distance_bias.as_ref().map(|bias| &bias.tensor);
        reference::attention(qkv, cu_seqlens, self.heads, self.scale, bias, self.mask)
    }
}

struct CpuAttention<'a> {
    attention: &'a Attention,
    cu_seqlens: &'a CuSeqlens,
}

impl CustomOp1 for CpuAttention<'_> {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let qkv = cpu_values(storage, layout)?;
        let widths = (self.attention.heads.row_width(), self.attention.heads.width());
        Ok(by_task(qkv, widths, self.cu_seqlens, |qkv, task, out| {
            simd::run(Block { attention: self.attention, qkv, task, out });
        }))
    }
}

/// One task's forward.
struct Block<'a> {
    attention: &'a Attention,
    /// The sequence's rows, [len, row_width].
    qkv: &'a [f32],
    task: &'a Task,
    /// [num_queries, num_heads * head_dim]
    out: &'a mut [f32],
}

/// Queries whose scores are held at a time: 24 KB at 512 keys, so that they stay in the first-level cache.
pub(super) const SCORE_ROWS: usize = 2 * TILE_ROWS;

impl WithSimd for Block<'_> {
    type Output = ();

    /// For each head: keys transposed and values into panels, then per [`SCORE_ROWS`] queries the scores,
    /// the softmax without its division, the weighted values, and the division. The whole row of scores is
    /// there before its softmax: the sequences of encoders fit, and nothing need be rescaled.
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { attention, qkv, task, out } = self;
        let Heads { num_heads, num_kv_heads, head_dim } = attention.heads;
        let (len, group) = (task.len, num_heads / num_kv_heads);
        let (width, kv_width, ld) = (attention.heads.width(), attention.heads.kv_width(), attention.heads.row_width());
        let lanes = S::F32_LANES;
        let (padded_len, padded_dim) = (len.next_multiple_of(lanes), head_dim.next_multiple_of(lanes));
        let mut keys = vec![0.0; head_dim * padded_len];
        let mut values = vec![0.0; len * padded_dim];
        let mut scores = vec![0.0; SCORE_ROWS * padded_len];
        let mut inverse_sums = [0.0; SCORE_ROWS];

        for head in 0..num_heads {
            let at = head * head_dim;
            if head % group == 0 {
                let kv_at = width + head / group * head_dim;
                pack_keys::<S>(&qkv[kv_at..], ld, len, head_dim, attention.scale as f32, &mut keys);
                pack_values::<S>(&qkv[kv_at + kv_width..], ld, len, head_dim, &mut values);
            }
            for row in (0..task.num_queries).step_by(SCORE_ROWS) {
                let rows = SCORE_ROWS.min(task.num_queries - row);
                let first_query = task.first_query + row;
                let scores = &mut scores[..rows * padded_len];

                let queries = &qkv[first_query * ld + at..];
                multiply(simd, queries, ld, head_dim, &keys, padded_len, scores, padded_len, 0, padded_len);

                for (r, scores) in scores.chunks_exact_mut(padded_len).enumerate() {
                    let query = first_query + r;
                    if let Some(bias) = &attention.distance_bias {
                        // Key 0 lies at distance -query, which is column max_seq_len - 1 - query.
                        let columns = 2 * bias.max_seq_len - 1;
                        let bias = &bias.host[head * columns + bias.max_seq_len - 1 - query..][..len];
                        for (score, bias) in scores.iter_mut().zip(bias) {
                            *score += bias;
                        }
                    }
                    inverse_sums[r] = 1.0 / exponentials(simd, scores, attention.mask.keys(query, len));
                }

                let out = &mut out[row * width..][..rows * width];
                multiply(simd, scores, padded_len, len, &values, padded_dim, out, width, at, head_dim);
                for (out, inverse) in out.chunks_exact_mut(width).zip(inverse_sums) {
                    for value in &mut out[at..at + head_dim] {
                        *value *= inverse;
                    }
                }
            }
        }
    }
}

/// `scale * keysᵀ` in panels: [head_dim, columns] each, columns a whole tile but for the last panel.
///
/// Shapes: `rows` [len, ld], of which the first head_dim columns are the keys. Columns beyond `len` are 0.
#[inline(always)]
pub(super) fn pack_keys<S: Simd>(rows: &[f32], ld: usize, len: usize, head_dim: usize, scale: f32, panels: &mut [f32]) {
    let lanes = S::F32_LANES;
    let tile = tile_vectors::<S>() * lanes;
    let padded_len = len.next_multiple_of(lanes);
    for first in (0..padded_len).step_by(tile) {
        let columns = tile.min(padded_len - first);
        let panel = &mut panels[first * head_dim..][..columns * head_dim];
        // A vector's worth of keys at a time: their lines stay in the first-level cache while the
        // dimensions go by, and each store is next to the last.
        for column in (0..columns).step_by(lanes) {
            let keys = lanes.min(len.saturating_sub(first + column));
            for d in 0..head_dim {
                let line = &mut panel[d * columns + column..][..lanes];
                for (i, value) in line[..keys].iter_mut().enumerate() {
                    *value = scale * rows[(first + column + i) * ld + d];
                }
                line[keys..].fill(0.0);
            }
        }
    }
}

/// The values in panels: [len, columns] each, columns a whole tile but for the last panel.
///
/// Shapes: `rows` [len, ld], of which the first head_dim columns are the values. Columns beyond head_dim
/// stay as they are; nobody reads what comes of them.
#[inline(always)]
pub(super) fn pack_values<S: Simd>(rows: &[f32], ld: usize, len: usize, head_dim: usize, panels: &mut [f32]) {
    let lanes = S::F32_LANES;
    let tile = tile_vectors::<S>() * lanes;
    let padded_dim = head_dim.next_multiple_of(lanes);
    for first in (0..padded_dim).step_by(tile) {
        let columns = tile.min(padded_dim - first);
        let used = columns.min(head_dim - first);
        let panel = &mut panels[first * len..][..columns * len];
        for (token, line) in panel.chunks_exact_mut(columns).enumerate() {
            line[..used].copy_from_slice(&rows[token * ld + first..][..used]);
        }
    }
}

/// `out[.., column..column + columns] = x panels`, the panels as [`pack_keys`] and [`pack_values`] lay them.
///
/// Shapes: `x` [rows, ldx]; `panels` [depth, padded_columns] in panels; `out` [rows, ld].
#[allow(clippy::too_many_arguments)] // Two strided operands and a place in the result have so many.
#[inline(always)]
pub(super) fn multiply<S: Simd>(
    simd: S,
    x: &[f32],
    ldx: usize,
    depth: usize,
    panels: &[f32],
    padded_columns: usize,
    out: &mut [f32],
    ld: usize,
    column: usize,
    columns: usize,
) {
    let lanes = S::F32_LANES;
    let tile = tile_vectors::<S>() * lanes;
    for first in (0..padded_columns).step_by(tile) {
        let width = tile.min(padded_columns - first);
        let panel = &panels[first * depth..][..width * depth];
        let used = width.min(columns - first);
        let part = Tile { x, ldx, depth, panel, out, ld, column: column + first, columns: used };
        match width / lanes {
            1 => tiles::<S, 1>(simd, part, None),
            2 => tiles::<S, 2>(simd, part, None),
            3 => tiles::<S, 3>(simd, part, None),
            _ => tiles::<S, 4>(simd, part, None),
        }
    }
}

/// Replaces a row of scores by `exp(score - largest)` and returns their sum, over `keys`; the others
/// become 0.
///
/// Shapes: `scores` a whole number of vectors.
#[inline(always)]
pub(super) fn exponentials<S: Simd>(simd: S, scores: &mut [f32], keys: Range<usize>) -> f32 {
    let lanes = S::F32_LANES;
    // Whole vectors around the keys.
    let used = keys.start / lanes * lanes..keys.end.next_multiple_of(lanes);
    scores[used.start..keys.start].fill(f32::NEG_INFINITY);
    scores[keys.end..used.end].fill(f32::NEG_INFINITY);
    let vectors = S::as_mut_simd_f32s(&mut scores[used]).0;
    let mut largest = simd.splat_f32s(f32::NEG_INFINITY);
    for &x in vectors.iter() {
        largest = simd.max_f32s(largest, x);
    }
    let largest = simd.splat_f32s(simd.reduce_max_f32s(largest));
    let mut sum = simd.splat_f32s(0.0);
    for x in vectors {
        // A masked lane adds 1e-38 to a sum of at least 1.
        *x = simd::exp(simd, simd.sub_f32s(*x, largest));
        sum = simd.add_f32s(sum, *x);
    }
    scores[..keys.start].fill(0.0);
    scores[keys.end..].fill(0.0);
    simd.reduce_sum_f32s(sum)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::testing::{assert_close, bounds, noise, values};
    use super::*;

    const MASKS: [Mask; 5] = [
        Mask::Full,
        Mask::Causal,
        Mask::Window { radius: 0 },
        Mask::Window { radius: 20 },
        Mask::CausalWindow { size: 17 },
    ];

    #[test]
    fn worked_numbers() {
        // One head of one dimension, two tokens: q = (1, 0), k = (0, ln 3), v = (1, 5).
        let qkv = [[1f32, 0., 1.], [0., 3f32.ln(), 5.]];
        let qkv = Tensor::new(&qkv, &Device::Cpu).unwrap();
        let full = Attention::new(1, 1, 1.0, None, Mask::Full).unwrap();
        // Token 0 weighs its keys 1 to 3, token 1 evenly.
        let y = values(&full.forward(&qkv, &bounds(&[2])).unwrap());
        assert!((y[0] - 4.0).abs() < 1e-6 && (y[1] - 3.0).abs() < 1e-6, "{y:?}");
        let causal = Attention::new(1, 1, 1.0, None, Mask::Causal).unwrap();
        let y = values(&causal.forward(&qkv, &bounds(&[2])).unwrap());
        assert!((y[0] - 1.0).abs() < 1e-6 && (y[1] - 3.0).abs() < 1e-6, "{y:?}");
        // A sequence of one token is its value.
        assert_eq!(values(&full.forward(&qkv, &bounds(&[1, 1])).unwrap()), [1.0, 5.0]);
    }

    #[test]
    fn equals_the_reference_over_lengths_head_dims_masks_and_biases() {
        for (num_heads, head_dim) in [(12, 32), (3, 64), (2, 96), (1, 128), (2, 40), (3, 7)] {
            for lens in [&[1][..], &[31, 32, 33], &[1, 64, 2, 65, 17], &[130, 5]] {
                let cu_seqlens = bounds(lens);
                let qkv = noise(1, &[cu_seqlens.total_tokens(), 3 * num_heads * head_dim]);
                let scale = 1.0 / (head_dim as f64).sqrt();
                for bias in [None, Some(noise(2, &[num_heads, 2 * 130 - 1]))] {
                    for mask in MASKS {
                        let heads = Heads { num_heads, num_kv_heads: num_heads, head_dim };
                        let attention = Attention::new(num_heads, head_dim, scale, bias.clone(), mask).unwrap();
                        let got = attention.forward(&qkv, &cu_seqlens).unwrap();
                        let expected = reference::attention(&qkv, &cu_seqlens, heads, scale, bias.as_ref(), mask);
                        let what = format!("{heads:?}, {lens:?}, {mask:?}, bias {}", bias.is_some());
                        assert_close(&got, &expected.unwrap(), 2e-6, &what);
                    }
                }
            }
        }
    }

    #[test]
    fn heads_share_keys_and_values() {
        for (num_heads, num_kv_heads, head_dim) in [(4, 2, 32), (6, 1, 24), (12, 3, 7), (2, 2, 16)] {
            let heads = Heads { num_heads, num_kv_heads, head_dim };
            for lens in [&[1][..], &[33, 2, 70]] {
                let cu_seqlens = bounds(lens);
                let qkv = noise(1, &[cu_seqlens.total_tokens(), heads.row_width()]);
                let bias = noise(2, &[num_heads, 2 * 70 - 1]);
                for mask in MASKS {
                    let attention = Attention::grouped(heads, 0.3, Some(bias.clone()), mask).unwrap();
                    let got = attention.forward(&qkv, &cu_seqlens).unwrap();
                    let expected = reference::attention(&qkv, &cu_seqlens, heads, 0.3, Some(&bias), mask).unwrap();
                    assert_close(&got, &expected, 2e-6, &format!("{heads:?}, {lens:?}, {mask:?}"));
                }
            }
        }
    }

    #[test]
    fn masks_say_which_keys_are_seen() {
        let seen = |mask: Mask| (0..4).map(|query| mask.keys(query, 4)).collect::<Vec<_>>();
        assert_eq!(seen(Mask::Full), [0..4, 0..4, 0..4, 0..4]);
        assert_eq!(seen(Mask::Causal), [0..1, 0..2, 0..3, 0..4]);
        assert_eq!(seen(Mask::Window { radius: 1 }), [0..2, 0..3, 1..4, 2..4]);
        assert_eq!(seen(Mask::Window { radius: usize::MAX }), seen(Mask::Full));
        assert_eq!(seen(Mask::CausalWindow { size: 2 }), [0..1, 0..2, 1..3, 2..4]);
    }

    #[test]
    fn large_scores_do_not_overflow() {
        let cu_seqlens = bounds(&[40]);
        let qkv = (noise(1, &[40, 3 * 32]) * 30.0).unwrap();
        let attention = Attention::new(1, 32, 1.0, None, Mask::Full).unwrap();
        let expected = reference::attention(
            &qkv,
            &cu_seqlens,
            Heads { num_heads: 1, num_kv_heads: 1, head_dim: 32 },
            1.0,
            None,
            Mask::Full,
        )
        .unwrap();
        // Scores of some thousands carry errors of 1e-4 into the exponent.
        assert_close(&attention.forward(&qkv, &cu_seqlens).unwrap(), &expected, 2e-3, "scores in the thousands");
    }

    #[test]
    fn a_sequence_alone_equals_that_sequence_in_any_batch_bit_by_bit() {
        let lens = [7, 300, 1, 33, 120];
        let cu_seqlens = bounds(&lens);
        let attention = Attention::new(4, 32, 0.2, None, Mask::Full).unwrap();
        let qkv = noise(1, &[cu_seqlens.total_tokens(), 3 * 128]);
        let all = attention.forward(&qkv, &cu_seqlens).unwrap();
        for (range, len) in cu_seqlens.ranges().zip(lens) {
            let alone = attention.forward(&qkv.narrow(0, range.start, len).unwrap(), &bounds(&[len])).unwrap();
            assert!(values(&alone) == values(&all.narrow(0, range.start, len).unwrap()), "length {len}");
        }
    }

    #[test]
    fn what_is_no_number_stays_in_its_sequence() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let cu_seqlens = bounds(&[5, 6, 7]);
            let mut qkv = values(&noise(1, &[18, 96]));
            qkv[6 * 96 + 40] = bad; // a key of the second sequence
            let qkv = Tensor::from_vec(qkv, (18, 96), &Device::Cpu).unwrap();
            let attention = Attention::new(1, 32, 0.2, None, Mask::Full).unwrap();
            let y = values(&attention.forward(&qkv, &cu_seqlens).unwrap());
            assert!(y[..5 * 32].iter().chain(&y[11 * 32..]).all(|v| v.is_finite()), "{bad}");
            assert!(!bad.is_nan() || y[5 * 32..11 * 32].iter().all(|v| v.is_nan()), "{bad}");
        }
    }

    #[test]
    fn shapes_are_checked_by_name() {
        let error = |r: Result<Attention>| r.err().unwrap().to_string();
        assert!(error(Attention::new(0, 32, 1.0, None, Mask::Full)).contains("num_heads"));
        let uneven = Heads { num_heads: 4, num_kv_heads: 3, head_dim: 8 };
        assert!(error(Attention::grouped(uneven, 1.0, None, Mask::Full)).contains("4, 3, 8"));
        for shape in [&[2, 7][..], &[1, 8], &[7]] {
            assert!(error(Attention::new(1, 32, 1.0, Some(noise(1, shape)), Mask::Full)).contains("distance_bias"));
        }
        let attention = Attention::new(1, 8, 1.0, Some(noise(1, &[1, 7])), Mask::Full).unwrap();
        let error = attention.forward(&noise(1, &[5, 24]), &bounds(&[5])).unwrap_err().to_string();
        assert!(error.contains("at most 4 tokens"), "{error}");
        assert!(attention.forward(&noise(1, &[4, 23]), &bounds(&[4])).unwrap_err().to_string().contains("qkv"));
    }
}
