//! Rotary positions on packed tokens, and the norm of queries and keys before them.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Shape, Tensor};

use super::attention::Heads;
use super::rms_norm::RmsNorm;
use super::{CuSeqlens, check_dims, cpu_values, reference, simd};
use crate::{Error, Result};

/// Cosine and sine of each position's angles. Made once for all layers that turn alike.
///
/// Source: Su et al. 2021 (RoFormer), section 3.2.2, pairs (i, i + head_dim / 2) as GPT-NeoX has them.
pub struct RotaryTable {
    /// [max_seq_len, head_dim / 2] each.
    cos: Tensor,
    sin: Tensor,
    /// The same on the host, for the CPU forward.
    host: (Vec<f32>, Vec<f32>),
    max_seq_len: usize,
    /// head_dim / 2
    half: usize,
}

impl RotaryTable {
    /// Position p turns pair i by `p * inverse_frequencies[i]` radians.
    ///
    /// Shapes: `inverse_frequencies` [head_dim / 2].
    /// Errors: [`Error::Shape`] for no frequency or no position.
    pub fn new(inverse_frequencies: &[f32], max_seq_len: usize, device: &Device) -> Result<Self> {
        let half = inverse_frequencies.len();
        if half == 0 || max_seq_len == 0 {
            let (expected, got) = ("at least 1 of each".to_string(), format!("{half}, {max_seq_len}"));
            return Err(Error::Shape { op: "rotary", operand: "inverse_frequencies, max_seq_len", expected, got });
        }
        let (mut cos, mut sin) = (Vec::with_capacity(max_seq_len * half), Vec::with_capacity(max_seq_len * half));
        for position in 0..max_seq_len {
            for frequency in inverse_frequencies {
                // The angle is rounded to f32, as the models were trained with it; its cosine is exact beyond that.
                let angle = f64::from(position as f32 * frequency);
                cos.push(angle.cos() as f32);
                sin.push(angle.sin() as f32);
            }
        }
        let tensor = |values: &[f32]| Tensor::from_slice(values, (max_seq_len, half), device);
        Ok(Self { cos: tensor(&cos)?, sin: tensor(&sin)?, host: (cos, sin), max_seq_len, half })
    }
}

/// Queries and keys turned by their position in their sequence, each head RMS-normalised before if there are norms;
/// values stay as they are.
pub struct Rotary {
    heads: Heads,
    table: Arc<RotaryTable>,
    norms: Option<QueryKeyNorms>,
}

/// Norms over a head's values. Shapes: [head_dim] each.
pub struct QueryKeyNorms {
    pub query: RmsNorm,
    pub key: RmsNorm,
}

impl Rotary {
    /// Errors: [`Error::Shape`] for heads, a table or norms that do not fit each other.
    pub fn new(heads: Heads, table: Arc<RotaryTable>, norms: Option<QueryKeyNorms>) -> Result<Self> {
        heads.check("rotary")?;
        if heads.head_dim != 2 * table.half {
            let (expected, got) = ((2 * table.half).to_string(), heads.head_dim.to_string());
            return Err(Error::Shape { op: "rotary", operand: "head_dim", expected, got });
        }
        if let Some(norms) = &norms {
            check_dims("rotary", "query_norm", norms.query.parts().0, &[heads.head_dim])?;
            check_dims("rotary", "key_norm", norms.key.parts().0, &[heads.head_dim])?;
        }
        Ok(Self { heads, table, norms })
    }

    /// Shapes: `qkv` [total_tokens, row_width], rows as [`Heads`] says. Returns the same.
    ///
    /// Errors: [`Error::Shape`] if `qkv` is of another shape, or a sequence is longer than the table.
    pub fn forward(&self, qkv: &Tensor, cu_seqlens: &CuSeqlens) -> Result<Tensor> {
        check_dims("rotary", "qkv", qkv, &[cu_seqlens.total_tokens(), self.heads.row_width()])?;
        if cu_seqlens.max_seqlen() > self.table.max_seq_len {
            return Err(Error::Shape {
                op: "rotary",
                operand: "cu_seqlens",
                expected: format!("sequences of at most {} tokens", self.table.max_seq_len),
                got: cu_seqlens.max_seqlen().to_string(),
            });
        }
        if !qkv.device().is_cpu() {
            let norms = self.norms.as_ref().map(|norms| {
                let ((query, eps), (key, _)) = (norms.query.parts(), norms.key.parts());
                (query, key, eps)
            });
            return reference::rotary(qkv, cu_seqlens, self.heads, &self.table.cos, &self.table.sin, norms);
        }
        Ok(qkv.contiguous()?.apply_op1_no_bwd(&CpuRotary { rotary: self, cu_seqlens })?)
    }
}

struct CpuRotary<'a> {
    rotary: &'a Rotary,
    cu_seqlens: &'a CuSeqlens,
}

/// Tokens a thread takes at a time: 288 KB at 768 columns of queries.
const BLOCK_TOKENS: usize = 32;

impl CustomOp1 for CpuRotary<'_> {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let qkv: &[f32] = cpu_values(storage, layout)?;
        let Rotary { heads, table, norms } = self.rotary;
        let (row_width, half, bounds) = (heads.row_width(), table.half, self.cu_seqlens.host());
        let values = simd::fill_rows(self.cu_seqlens.total_tokens(), row_width, BLOCK_TOKENS, |first, out| {
            out.copy_from_slice(&qkv[first * row_width..][..out.len()]);
            // The sequence of the block's first token: the last bound not after it.
            let mut seq = bounds.partition_point(|&b| b as usize <= first) - 1;
            for (token, row) in (first..).zip(out.chunks_exact_mut(row_width)) {
                if token >= bounds[seq + 1] as usize {
                    seq += 1;
                }
                let at = (token - bounds[seq] as usize) * half;
                let (cos, sin) = (&table.host.0[at..at + half], &table.host.1[at..at + half]);
                let (queries, rest) = row.split_at_mut(heads.width());
                let keys = &mut rest[..heads.kv_width()];
                if let Some(norms) = norms {
                    norms.query.normalise_rows(queries);
                    norms.key.normalise_rows(keys);
                }
                for head in queries.chunks_exact_mut(2 * half).chain(keys.chunks_exact_mut(2 * half)) {
                    turn(head, cos, sin);
                }
            }
        });
        Ok((CpuStorage::F32(values), layout.shape().clone()))
    }
}

/// Turns the pairs (i, i + half) of one head.
fn turn(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(cos.len());
    for ((x, y), (cos, sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
        (*x, *y) = (*x * cos - *y * sin, *y * cos + *x * sin);
    }
}

/// Inverse frequencies of a head: `base^(-2i / head_dim)`, i < head_dim / 2, computed in f32 as the models' own code
/// does.
///
/// Source: Su et al. 2021, section 3.2.2.
pub fn inverse_frequencies(base: f64, head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2).map(|i| 1.0 / (base as f32).powf(2.0 * i as f32 / head_dim as f32)).collect()
}

/// A bias by distance that falls off on both sides by a slope of each head's own, as [`super::attention::Attention`]
/// takes it.
///
/// Returns [num_heads, 2 * max_seq_len - 1] f32.
/// Source: Press et al. 2021 (ALiBi), section 3; of both sides: Günther et al. 2023 (Jina v2), section 3.1.
pub fn alibi(num_heads: usize, max_seq_len: usize, device: &Device) -> Result<Tensor> {
    let columns = 2 * max_seq_len - 1;
    let mut values = Vec::with_capacity(num_heads * columns);
    for slope in slopes(num_heads) {
        values.extend((0..columns).map(|i| -slope * i.abs_diff(max_seq_len - 1) as f32));
    }
    Ok(Tensor::from_vec(values, (num_heads, columns), device)?)
}

/// ALiBi's slopes: 2^(-8i / n), i from 1, for n heads, n a power of two; other numbers take those of the next lower
/// power, then every second one of the next higher.
fn slopes(num_heads: usize) -> Vec<f32> {
    let of_power = |n: usize| (1..=n).map(move |i| (-8.0 * i as f64 / n as f64).exp2() as f32);
    let lower = if num_heads.is_power_of_two() { num_heads } else { num_heads.next_power_of_two() / 2 };
    of_power(lower).chain(of_power(2 * lower).step_by(2)).take(num_heads).collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, bounds, noise, values};
    use super::*;

    fn table(head_dim: usize, max_seq_len: usize) -> Arc<RotaryTable> {
        Arc::new(RotaryTable::new(&inverse_frequencies(100.0, head_dim), max_seq_len, &Device::Cpu).unwrap())
    }

    fn norms(head_dim: usize) -> QueryKeyNorms {
        let norm = |seed| RmsNorm::new(noise(seed, &[head_dim]), 1e-6).unwrap();
        QueryKeyNorms { query: norm(3), key: norm(4) }
    }

    #[test]
    fn worked_numbers() {
        // One head of two dimensions turns by one radian a token; the value stays.
        let heads = Heads { num_heads: 1, num_kv_heads: 1, head_dim: 2 };
        let rotary = Rotary::new(heads, table(2, 4), None).unwrap();
        let row = [1f32, 0., 0., 2., 5., 6.];
        let qkv = Tensor::new(&[row, row, row], &Device::Cpu).unwrap();
        let y = values(&rotary.forward(&qkv, &bounds(&[2, 1])).unwrap());
        assert_eq!((&y[..6], &y[12..]), (&row[..], &row[..]), "the first token of a sequence is not turned");
        let (sin, cos) = 1f32.sin_cos();
        for (y, e) in y[6..12].iter().zip([cos, sin, -2.0 * sin, 2.0 * cos, 5.0, 6.0]) {
            assert!((y - e).abs() < 1e-6, "{y} for {e}");
        }
    }

    #[test]
    fn equals_the_reference_with_and_without_norms() {
        for (num_heads, num_kv_heads, head_dim) in [(2, 2, 16), (4, 1, 10), (6, 3, 64)] {
            let heads = Heads { num_heads, num_kv_heads, head_dim };
            for lens in [&[1][..], &[31, 32, 33], &[1, 70, 2]] {
                let cu_seqlens = bounds(lens);
                let qkv = noise(1, &[cu_seqlens.total_tokens(), heads.row_width()]);
                for has_norms in [false, true] {
                    let table = table(head_dim, 70);
                    let rotary = Rotary::new(heads, table.clone(), has_norms.then(|| norms(head_dim))).unwrap();
                    let (query, key) = (noise(3, &[head_dim]), noise(4, &[head_dim]));
                    let parts = has_norms.then_some((&query, &key, 1e-6));
                    let expected = reference::rotary(&qkv, &cu_seqlens, heads, &table.cos, &table.sin, parts).unwrap();
                    let got = rotary.forward(&qkv, &cu_seqlens).unwrap();
                    assert_close(&got, &expected, 2e-6, &format!("{heads:?}, {lens:?}, norms {has_norms}"));
                }
            }
        }
    }

    #[test]
    fn slopes_are_those_of_the_paper() {
        let eight: Vec<f32> = (1..=8).map(|i| 0.5f32.powi(i)).collect();
        assert_eq!(slopes(8), eight);
        let twelve: Vec<f32> = eight.into_iter().chain([0.5, 1.5, 2.5, 3.5].map(|x: f64| (-x).exp2() as f32)).collect();
        assert_eq!(slopes(12), twelve);
        let bias = values(&alibi(2, 3, &Device::Cpu).unwrap());
        let near = 0.5f32.powi(4);
        assert_eq!(bias[..5], [-2.0 * near, -near, -0.0, -near, -2.0 * near]);
    }

    #[test]
    fn limits_are_named() {
        assert!(RotaryTable::new(&[], 3, &Device::Cpu).is_err());
        let heads = Heads { num_heads: 2, num_kv_heads: 1, head_dim: 4 };
        let error = |r: Result<Rotary>| r.err().unwrap().to_string();
        assert!(error(Rotary::new(heads, table(6, 4), None)).contains("head_dim: expected 6, got 4"));
        assert!(error(Rotary::new(heads, table(4, 4), Some(norms(6)))).contains("query_norm"));
        let rotary = Rotary::new(heads, table(4, 4), None).unwrap();
        let error = rotary.forward(&noise(1, &[5, 16]), &bounds(&[5])).unwrap_err().to_string();
        assert!(error.contains("at most 4 tokens"), "{error}");
        assert!(rotary.forward(&noise(1, &[4, 15]), &bounds(&[4])).unwrap_err().to_string().contains("qkv"));
    }
}
