//! Disentangled attention: scores of content and of relative positions, within each sequence of a packed batch.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};
use pulp::{Simd, WithSimd};

use super::attention::{SCORE_ROWS, exponentials, multiply, pack_keys, pack_values};
use super::tasks::{Task, by_task, check_reach};
use super::{CuSeqlens, check_dims, cpu_values, host_values, reference, simd};
use crate::{Error, Result};

/// `softmax(scale (q·k + q·position_key(q - k) + k·position_query(q - k))) v`, every sequence and head by itself.
///
/// Source: He et al. 2020 (DeBERTa), section 3.1, equation 4. Both position terms take the row of the distance
/// query - key, as transformers computes them; the paper writes the last one with the sign turned.
pub struct Disentangled {
    num_heads: usize,
    head_dim: usize,
    scale: f64,
    positions: Option<Positions>,
}

/// Keys and queries of relative positions, with the row each distance has in them.
pub struct RelativePositions {
    /// [2 * max_seq_len - 1], never falling: the row of distance query - key at `max_seq_len - 1` + that distance.
    pub rows: Arc<[u32]>,
    /// [num_rows, num_heads * head_dim], what queries meet; `None` leaves that term out.
    pub keys: Option<Tensor>,
    /// [num_rows, num_heads * head_dim], what keys meet; `None` leaves that term out.
    pub queries: Option<Tensor>,
}

struct Positions {
    rows: Arc<[u32]>,
    max_seq_len: usize,
    keys: Option<Table>,
    queries: Option<Table>,
}

/// A table on its device, and on the host for the CPU forward.
struct Table {
    tensor: Tensor,
    /// The same, in row-major order.
    host: Vec<f32>,
}

impl Disentangled {
    /// Without `positions` it is plain attention.
    ///
    /// Errors: [`Error::Shape`] for a zero size, for tables of another shape and for rows that fall or are beyond them.
    pub fn new(num_heads: usize, head_dim: usize, scale: f64, positions: Option<RelativePositions>) -> Result<Self> {
        let shape = |operand, expected: &str, got: String| Error::Shape {
            op: "disentangled",
            operand,
            expected: expected.to_string(),
            got,
        };
        if num_heads == 0 || head_dim == 0 {
            return Err(shape("num_heads, head_dim", "at least 1 each", format!("{num_heads}, {head_dim}")));
        }
        let Some(RelativePositions { rows, keys, queries }) = positions else {
            return Ok(Self { num_heads, head_dim, scale, positions: None });
        };
        if rows.len().is_multiple_of(2) {
            return Err(shape("rows", "[2 * max_seq_len - 1]", format!("[{}]", rows.len())));
        }
        if let Some(pair) = rows.windows(2).find(|pair| pair[0] > pair[1]) {
            return Err(shape("rows", "rows that never fall", format!("{} then {}", pair[0], pair[1])));
        }
        let table = |operand, tensor: Option<Tensor>| -> Result<Option<Table>> {
            let Some(tensor) = tensor else { return Ok(None) };
            let num_rows = tensor.dims().first().copied().unwrap_or(0);
            check_dims("disentangled", operand, &tensor, &[num_rows, num_heads * head_dim])?;
            match rows.last() {
                Some(&last) if last as usize >= num_rows => {
                    Err(shape(operand, &format!("more than {last} rows"), num_rows.to_string()))
                }
                _ => Ok(Some(Table { host: host_values(&tensor)?, tensor })),
            }
        };
        let (keys, queries) = (table("keys", keys)?, table("queries", queries)?);
        let positions = Positions { max_seq_len: rows.len().div_ceil(2), rows, keys, queries };
        Ok(Self { num_heads, head_dim, scale, positions: Some(positions) })
    }

    /// Shapes: `qkv` [total_tokens, 3 * num_heads * head_dim], a token's queries, then its keys, then its
    /// values, each head by head. Returns [total_tokens, num_heads * head_dim].
    /// Allocates: on the CPU, a thread at a time holds the position scores of one head of one sequence.
    ///
    /// Errors: [`Error::Shape`] if `qkv` is of another shape, or a sequence is longer than the distances reach.
    pub fn forward(&self, qkv: &Tensor, cu_seqlens: &CuSeqlens) -> Result<Tensor> {
        let width = self.num_heads * self.head_dim;
        check_dims("disentangled", "qkv", qkv, &[cu_seqlens.total_tokens(), 3 * width])?;
        if let Some(positions) = &self.positions {
            check_reach("disentangled", cu_seqlens, positions.max_seq_len)?;
        }
        if qkv.device().is_cpu() {
            let op = CpuDisentangled { attention: self, cu_seqlens };
            return Ok(qkv.contiguous()?.apply_op1_no_bwd(&op)?);
        }
        self.reference(qkv, cu_seqlens)
    }

    fn reference(&self, qkv: &Tensor, cu_seqlens: &CuSeqlens) -> Result<Tensor> {
        let tensor = |table: &Option<Table>| table.as_ref().map(|table| table.tensor.clone());
        let positions = self.positions.as_ref().map(|positions| RelativePositions {
            rows: positions.rows.clone(),
            keys: tensor(&positions.keys),
            queries: tensor(&positions.queries),
        });
        reference::disentangled(qkv, cu_seqlens, self.num_heads, self.head_dim, self.scale, positions.as_ref())
    }
}

struct CpuDisentangled<'a> {
    attention: &'a Disentangled,
    cu_seqlens: &'a CuSeqlens,
}

impl CustomOp1 for CpuDisentangled<'_> {
    fn name(&self) -> &'static str {
        "disentangled"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let qkv = cpu_values(storage, layout)?;
        let width = self.attention.num_heads * self.attention.head_dim;
        Ok(by_task(qkv, (3 * width, width), self.cu_seqlens, |qkv, task, out| {
            simd::run(Block { attention: self.attention, qkv, task, out });
        }))
    }
}

/// One task's forward.
struct Block<'a> {
    attention: &'a Disentangled,
    /// The sequence's rows, [len, 3 * num_heads * head_dim].
    qkv: &'a [f32],
    task: &'a Task,
    /// [num_queries, num_heads * head_dim]
    out: &'a mut [f32],
}

/// Which of the tables' rows a task meets.
struct Met<'a> {
    /// Of all distances, nearest to the last key first: that of query q and key k at `q - first_query + len - 1 - k`.
    rows: &'a [u32],
    /// The first row met.
    first: usize,
    /// Rows from the first one to the last one.
    num_rows: usize,
}

impl<'a> Met<'a> {
    fn of(positions: &'a Positions, task: &Task) -> Self {
        let start = positions.max_seq_len + task.first_query - task.len;
        let rows = &positions.rows[start..start + task.len + task.num_queries - 1];
        let (first, last) = (rows[0] as usize, rows[rows.len() - 1] as usize);
        Self { rows, first, num_rows: last - first + 1 }
    }

    /// Columns of the position scores of the task's `query` with keys 0, 1 and so on.
    fn columns(&self, query: usize, len: usize) -> impl Iterator<Item = usize> + '_ {
        self.rows[query..query + len].iter().rev().map(|&row| row as usize - self.first)
    }
}

impl WithSimd for Block<'_> {
    type Output = ();

    /// As plain attention's block, with two more products a head: of keys and the positions' queries once, [len,
    /// num_rows], and of [`SCORE_ROWS`] queries and the positions' keys at a time. Their values are then gathered by
    /// distance. Only rows of distances that the task has take part, so that short sequences pay little.
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { attention, qkv, task, out } = self;
        let (len, head_dim, scale) = (task.len, attention.head_dim, attention.scale as f32);
        let width = attention.num_heads * head_dim;
        let lanes = S::F32_LANES;
        let (padded_len, padded_dim) = (len.next_multiple_of(lanes), head_dim.next_multiple_of(lanes));
        let mut keys = vec![0.0; head_dim * padded_len];
        let mut values = vec![0.0; len * padded_dim];
        let mut scores = vec![0.0; SCORE_ROWS * padded_len];
        let mut inverse_sums = [0.0; SCORE_ROWS];

        let positions = attention.positions.as_ref();
        let met = positions.map(|positions| Met::of(positions, task));
        let num_rows = met.as_ref().map_or(0, |met| met.num_rows);
        let padded_rows = num_rows.next_multiple_of(lanes);
        let position_keys = positions.and_then(|positions| positions.keys.as_ref());
        let position_queries = positions.and_then(|positions| positions.queries.as_ref());
        let mut panels = vec![0.0; head_dim * padded_rows];
        let mut by_key = vec![0.0; if position_queries.is_some() { len * padded_rows } else { 0 }];
        let mut by_query = vec![0.0; SCORE_ROWS * padded_rows];

        for head in 0..attention.num_heads {
            let at = head * head_dim;
            pack_keys::<S>(&qkv[width + at..], 3 * width, len, head_dim, scale, &mut keys);
            pack_values::<S>(&qkv[2 * width + at..], 3 * width, len, head_dim, &mut values);
            let first_row = met.as_ref().map_or(0, |met| met.first);
            if let Some(table) = position_queries {
                pack_keys::<S>(&table.host[first_row * width + at..], width, num_rows, head_dim, scale, &mut panels);
                let rows = &qkv[width + at..];
                multiply(
                    simd,
                    rows,
                    3 * width,
                    head_dim,
                    &panels,
                    padded_rows,
                    &mut by_key,
                    padded_rows,
                    0,
                    padded_rows,
                );
            }
            if let Some(table) = position_keys {
                pack_keys::<S>(&table.host[first_row * width + at..], width, num_rows, head_dim, scale, &mut panels);
            }
            for row in (0..task.num_queries).step_by(SCORE_ROWS) {
                let rows = SCORE_ROWS.min(task.num_queries - row);
                let scores = &mut scores[..rows * padded_len];
                let queries = &qkv[(task.first_query + row) * 3 * width + at..];
                multiply(simd, queries, 3 * width, head_dim, &keys, padded_len, scores, padded_len, 0, padded_len);

                if let (Some(met), true) = (&met, position_keys.is_some()) {
                    let out = &mut by_query[..rows * padded_rows];
                    multiply(
                        simd,
                        queries,
                        3 * width,
                        head_dim,
                        &panels,
                        padded_rows,
                        out,
                        padded_rows,
                        0,
                        padded_rows,
                    );
                    for (r, scores) in scores.chunks_exact_mut(padded_len).enumerate() {
                        let position = &by_query[r * padded_rows..][..padded_rows];
                        for (score, column) in scores.iter_mut().zip(met.columns(row + r, len)) {
                            *score += position[column];
                        }
                    }
                }
                if let (Some(met), true) = (&met, position_queries.is_some()) {
                    // Key by key: what all these queries take of one key's line lies side by side.
                    for (key, position) in by_key.chunks_exact(padded_rows).enumerate() {
                        let met_rows = &met.rows[row + len - 1 - key..][..rows];
                        for (r, &met_row) in met_rows.iter().enumerate() {
                            scores[r * padded_len + key] += position[met_row as usize - met.first];
                        }
                    }
                }
                for (r, scores) in scores.chunks_exact_mut(padded_len).enumerate() {
                    inverse_sums[r] = 1.0 / exponentials(simd, scores, 0..len);
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

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::testing::{assert_close, bounds, noise, values};
    use super::*;

    /// Rows of distances up to `max_seq_len - 1`, one a distance up to `span`, the outermost shared beyond.
    fn rows(max_seq_len: i64, span: i64) -> Arc<[u32]> {
        (1 - max_seq_len..max_seq_len).map(|distance| (distance + span).clamp(0, 2 * span - 1) as u32).collect()
    }

    fn attention(heads: usize, dim: usize, rows: Arc<[u32]>, keys: bool, queries: bool) -> Disentangled {
        let num_rows = rows[rows.len() - 1] as usize + 1;
        let table = |has: bool, seed| has.then(|| noise(seed, &[num_rows, heads * dim]));
        let positions = RelativePositions { rows, keys: table(keys, 5), queries: table(queries, 6) };
        Disentangled::new(heads, dim, 1.0 / (dim as f64 * 3.0).sqrt(), Some(positions)).unwrap()
    }

    #[test]
    fn worked_numbers() {
        // One head of one dimension, two tokens: q = (1, 0), k = (0, 1), v = (1, 5); rows of distances -1, 0, 1.
        let qkv = Tensor::new(&[[1f32, 0., 1.], [0., 1., 5.]], &Device::Cpu).unwrap();
        let column = |values: [f32; 3]| Some(Tensor::new(&values, &Device::Cpu).unwrap().reshape((3, 1)).unwrap());
        let run = |keys, queries| {
            let positions = RelativePositions { rows: [0, 1, 2].into(), keys, queries };
            let op = Disentangled::new(1, 1, 1.0, Some(positions)).unwrap();
            values(&op.forward(&qkv, &bounds(&[2])).unwrap())
        };
        let mean = |a: f32, b: f32| (a.exp() + 5.0 * b.exp()) / (a.exp() + b.exp());
        let (a, b, c) = (0.3, -0.7, 1.1);
        // Query 0 meets itself at distance 0 and key 1 at distance -1; query 1 is 0, its scores are those of k alone.
        let y = run(column([a, b, c]), None);
        assert!((y[0] - mean(b, 1.0 + a)).abs() < 1e-6 && (y[1] - mean(0.0, 0.0)).abs() < 1e-6, "{y:?}");
        // Key 0 is 0 and adds nothing; key 1 adds its row of distance -1 for query 0, of distance 0 for query 1.
        let y = run(None, column([a, b, c]));
        assert!((y[0] - mean(0.0, 1.0 + a)).abs() < 1e-6 && (y[1] - mean(0.0, b)).abs() < 1e-6, "{y:?}");
    }

    #[test]
    fn equals_the_reference_over_lengths_head_dims_spans_and_terms() {
        for (heads, dim) in [(12, 32), (3, 64), (2, 40), (3, 7)] {
            for lens in [&[1][..], &[31, 32, 33], &[1, 64, 2, 65, 17], &[130, 5]] {
                let cu_seqlens = bounds(lens);
                let qkv = noise(1, &[cu_seqlens.total_tokens(), 3 * heads * dim]);
                for span in [1, 20, 130] {
                    for (keys, queries) in [(true, true), (true, false), (false, true), (false, false)] {
                        let op = attention(heads, dim, rows(130, span), keys, queries);
                        let expected = op.reference(&qkv, &cu_seqlens).unwrap();
                        let what = format!("{heads} heads of {dim}, {lens:?}, span {span}, {keys}, {queries}");
                        assert_close(&op.forward(&qkv, &cu_seqlens).unwrap(), &expected, 3e-6, &what);
                    }
                }
            }
        }
    }

    #[test]
    fn without_positions_it_is_plain_attention() {
        use super::super::attention::{Attention, Mask};
        let (cu_seqlens, qkv) = (bounds(&[5, 33]), noise(1, &[38, 3 * 64]));
        let plain = Attention::new(2, 32, 0.2, None, Mask::Full).unwrap().forward(&qkv, &cu_seqlens).unwrap();
        let got = Disentangled::new(2, 32, 0.2, None).unwrap();
        assert_close(&got.forward(&qkv, &cu_seqlens).unwrap(), &plain, 1e-6, "the CPU's own");
        assert_close(&got.reference(&qkv, &cu_seqlens).unwrap(), &plain, 2e-6, "the composition");
    }

    #[test]
    fn a_sequence_alone_equals_that_sequence_in_any_batch_bit_by_bit() {
        let lens = [7, 300, 1, 33, 120];
        let cu_seqlens = bounds(&lens);
        let op = attention(4, 32, rows(300, 64), true, true);
        let qkv = noise(1, &[cu_seqlens.total_tokens(), 3 * 128]);
        let all = op.forward(&qkv, &cu_seqlens).unwrap();
        for (range, len) in cu_seqlens.ranges().zip(lens) {
            let alone = op.forward(&qkv.narrow(0, range.start, len).unwrap(), &bounds(&[len])).unwrap();
            assert!(values(&alone) == values(&all.narrow(0, range.start, len).unwrap()), "length {len}");
        }
    }

    #[test]
    fn what_is_no_number_stays_in_its_sequence() {
        let cu_seqlens = bounds(&[5, 6, 7]);
        let mut qkv = values(&noise(1, &[18, 96]));
        qkv[6 * 96 + 40] = f32::NAN; // a key of the second sequence
        let qkv = Tensor::from_vec(qkv, (18, 96), &Device::Cpu).unwrap();
        let y = values(&attention(1, 32, rows(8, 4), true, true).forward(&qkv, &cu_seqlens).unwrap());
        assert!(y[..5 * 32].iter().chain(&y[11 * 32..]).all(|v| v.is_finite()));
        assert!(y[5 * 32..11 * 32].iter().all(|v| v.is_nan()));
    }

    #[test]
    fn shapes_are_checked_by_name() {
        let new = |rows: &[u32], shape: &[usize]| {
            let positions = RelativePositions { rows: rows.into(), keys: None, queries: Some(noise(1, shape)) };
            Disentangled::new(1, 8, 1.0, Some(positions))
        };
        let error = |r: Result<Disentangled>| r.err().unwrap().to_string();
        assert!(error(Disentangled::new(0, 8, 1.0, None)).contains("num_heads"));
        assert!(error(new(&[0, 1], &[2, 8])).contains("2 * max_seq_len - 1"));
        assert!(error(new(&[0, 2, 1], &[3, 8])).contains("2 then 1"));
        assert!(error(new(&[0, 1, 2], &[3, 7])).contains("queries: expected [3, 8]"));
        assert!(error(new(&[0, 1, 2], &[2, 8])).contains("more than 2 rows"));
        let op = new(&[0, 1, 2], &[3, 8]).unwrap();
        let error = op.forward(&noise(1, &[3, 24]), &bounds(&[3])).unwrap_err().to_string();
        assert!(error.contains("at most 2 tokens"), "{error}");
        assert!(op.forward(&noise(1, &[2, 23]), &bounds(&[2])).unwrap_err().to_string().contains("qkv"));
    }
}
