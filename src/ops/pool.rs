//! One vector a sequence.

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};
use serde::{Deserialize, Serialize};

use super::{CuSeqlens, check_dims, cpu_values, reference, simd};
use crate::{Error, Result};

/// The form of one result row, with nothing left to default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowSpec {
    /// Scale to length 1, after the cut.
    pub normalize: bool,
    /// Keep the first so many values; 1..=hidden_size.
    pub dimensions: usize,
}

/// How a sequence's token vectors become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pooling {
    /// The first token's vector.
    Cls,
    Mean,
    /// The largest value of each dimension.
    Max,
    LastToken,
    /// Token at position i (from 1) has weight i: SGPT, Muennighoff 2022, section 4.
    WeightedMean,
}

/// Pools each sequence, keeps the row's first `dimensions` values and, where asked, scales them to
/// length 1. A zero vector stays zero.
///
/// Shapes: `hidden` [total_tokens, hidden_size]; `rows` [num_seqs].
/// Returns [num_seqs, hidden_size] f32; beyond a row's `dimensions` it is 0, so that rows of different
/// length share one tensor and one copy to the host.
/// Errors: [`Error::Shape`] for other shapes or `dimensions` out of range.
/// Source: Reimers and Gurevych 2019, section 3 (mean, max, cls).
pub fn pool(hidden: &Tensor, cu_seqlens: &CuSeqlens, pooling: Pooling, rows: &[RowSpec]) -> Result<Tensor> {
    let hidden_size = hidden.dims().get(1).copied().unwrap_or(0);
    check_dims("pool", "hidden", hidden, &[cu_seqlens.total_tokens(), hidden_size])?;
    let shape = |operand, expected: String, got: String| Error::Shape { op: "pool", operand, expected, got };
    if rows.len() != cu_seqlens.num_seqs() {
        return Err(shape("rows", cu_seqlens.num_seqs().to_string(), rows.len().to_string()));
    }
    if let Some(row) = rows.iter().find(|r| r.dimensions == 0 || r.dimensions > hidden_size) {
        return Err(shape("rows.dimensions", format!("1 to {hidden_size}"), row.dimensions.to_string()));
    }
    if !hidden.device().is_cpu() {
        return reference::pool(hidden, cu_seqlens, pooling, rows);
    }
    let op = CpuPool { cu_seqlens, pooling, rows };
    Ok(hidden.contiguous()?.apply_op1_no_bwd(&op)?)
}

struct CpuPool<'a> {
    cu_seqlens: &'a CuSeqlens,
    pooling: Pooling,
    rows: &'a [RowSpec],
}

/// Sequences a thread takes at a time; a sequence of 64 tokens at 384 columns is 100 KB.
const BLOCK_SEQS: usize = 4;

impl CustomOp1 for CpuPool<'_> {
    fn name(&self) -> &'static str {
        "pool"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let hidden = cpu_values(storage, layout)?;
        let width = layout.dims()[1];
        let bounds = self.cu_seqlens.host();
        let values = simd::fill_rows(self.rows.len(), width, BLOCK_SEQS, |first, out| {
            for (seq, out) in (first..).zip(out.chunks_exact_mut(width)) {
                let tokens = &hidden[bounds[seq] as usize * width..bounds[seq + 1] as usize * width];
                let row = self.rows[seq];
                let out = &mut out[..row.dimensions];
                pool_one(tokens, width, self.pooling, out);
                if row.normalize {
                    normalise(out);
                }
            }
        });
        Ok((CpuStorage::F32(values), (self.rows.len(), width).into()))
    }
}

/// Pools the first `out.len()` columns of one sequence into `out`, which is 0.
///
/// Shapes: `tokens` [len, width], len at least 1; `out` [dimensions].
fn pool_one(tokens: &[f32], width: usize, pooling: Pooling, out: &mut [f32]) {
    let len = tokens.len() / width;
    match pooling {
        Pooling::Cls => out.copy_from_slice(&tokens[..out.len()]),
        Pooling::LastToken => out.copy_from_slice(&tokens[(len - 1) * width..][..out.len()]),
        Pooling::Max => {
            out.copy_from_slice(&tokens[..out.len()]);
            for token in tokens.chunks_exact(width).skip(1) {
                for (out, &x) in out.iter_mut().zip(token) {
                    // `f32::max` would drop NaN, and a broken result must show.
                    *out = if x > *out || x.is_nan() { x } else { *out };
                }
            }
        }
        Pooling::Mean => {
            for token in tokens.chunks_exact(width) {
                for (out, x) in out.iter_mut().zip(token) {
                    *out += x;
                }
            }
            scale(out, 1.0 / len as f32);
        }
        Pooling::WeightedMean => {
            for (i, token) in tokens.chunks_exact(width).enumerate() {
                let weight = (i + 1) as f32;
                for (out, x) in out.iter_mut().zip(token) {
                    *out += weight * x;
                }
            }
            scale(out, 1.0 / (len * (len + 1) / 2) as f32);
        }
    }
}

/// Scales to length 1; the sum of squares in f64, which no f32 vector overflows. A zero vector stays zero.
pub fn normalise(vector: &mut [f32]) {
    let norm = vector.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    if norm != 0.0 {
        for x in vector {
            *x = (f64::from(*x) / norm) as f32;
        }
    }
}

fn scale(vector: &mut [f32], factor: f32) {
    for x in vector {
        *x *= factor;
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::testing::{assert_close, bounds, noise, values};
    use super::*;

    const ALL: [Pooling; 5] = [Pooling::Cls, Pooling::Mean, Pooling::Max, Pooling::LastToken, Pooling::WeightedMean];

    fn plain(dimensions: usize) -> RowSpec {
        RowSpec { normalize: false, dimensions }
    }

    #[test]
    fn worked_numbers() {
        // Sequences (1, 2) (4, -2) and (3, 4).
        let hidden = Tensor::new(&[[1f32, 2.], [4., -2.], [3., 4.]], &Device::Cpu).unwrap();
        for (pooling, expected) in [
            (Pooling::Cls, [1., 2., 3., 4.]),
            (Pooling::LastToken, [4., -2., 3., 4.]),
            (Pooling::Mean, [2.5, 0., 3., 4.]),
            (Pooling::Max, [4., 2., 3., 4.]),
            (Pooling::WeightedMean, [3., -2. / 3., 3., 4.]),
        ] {
            let got = values(&pool(&hidden, &bounds(&[2, 1]), pooling, &[plain(2), plain(2)]).unwrap());
            assert!(got.iter().zip(expected).all(|(g, e): (_, f32)| (g - e).abs() < 1e-6), "{pooling:?}: {got:?}");
        }
        // The cut comes before the scaling; beyond it is 0.
        let row = RowSpec { normalize: true, dimensions: 1 };
        let got = values(&pool(&hidden, &bounds(&[2, 1]), Pooling::Cls, &[row, row]).unwrap());
        assert_eq!(got, [1., 0., 1., 0.]);
    }

    #[test]
    fn equals_the_reference_for_mixed_rows() {
        for lens in [&[1][..], &[31, 32, 33], &[1, 2, 3, 4, 5, 6, 7, 100, 9]] {
            let cu_seqlens = bounds(lens);
            let hidden = noise(1, &[cu_seqlens.total_tokens(), 33]);
            let rows: Vec<RowSpec> = (0..lens.len())
                .map(|i| RowSpec { normalize: i % 2 == 0, dimensions: [33, 1, 16, 32][i % 4] })
                .collect();
            for pooling in ALL {
                let expected = reference::pool(&hidden, &cu_seqlens, pooling, &rows).unwrap();
                let got = pool(&hidden, &cu_seqlens, pooling, &rows).unwrap();
                assert_close(&got, &expected, 1e-6, &format!("{pooling:?} {lens:?}"));
            }
        }
    }

    #[test]
    fn a_zero_vector_stays_zero_and_a_huge_one_has_length_one() {
        let row = RowSpec { normalize: true, dimensions: 2 };
        for (value, expected) in [(0f32, 0.0), (3e38, 0.5f32.sqrt()), (1e-30, 0.5f32.sqrt())] {
            let hidden = Tensor::new(&[[value, value]], &Device::Cpu).unwrap();
            let got = values(&pool(&hidden, &bounds(&[1]), Pooling::Cls, &[row]).unwrap());
            assert!(got.iter().all(|g| (g - expected).abs() < 1e-6), "{value}: {got:?}");
        }
    }

    #[test]
    fn what_is_no_number_stays_in_its_sequence_and_shows() {
        let mut hidden = values(&noise(1, &[6, 3]));
        hidden[4 * 3 + 1] = f32::NAN;
        let hidden = Tensor::from_vec(hidden, (6, 3), &Device::Cpu).unwrap();
        for pooling in [Pooling::Mean, Pooling::Max, Pooling::WeightedMean] {
            let got = values(&pool(&hidden, &bounds(&[3, 3]), pooling, &[plain(3), plain(3)]).unwrap());
            assert!(got[..3].iter().all(|g| g.is_finite()), "{pooling:?}");
            assert!(got[4].is_nan(), "{pooling:?}: {got:?}");
        }
    }

    #[test]
    fn shapes_are_checked_by_name() {
        let error = |lens: &[usize], rows: &[RowSpec]| {
            pool(&noise(1, &[4, 3]), &bounds(lens), Pooling::Mean, rows).unwrap_err().to_string()
        };
        assert!(error(&[5], &[plain(3)]).contains("hidden"));
        assert!(error(&[4], &[]).contains("rows: expected 1, got 0"));
        assert!(error(&[4], &[plain(4)]).contains("rows.dimensions: expected 1 to 3, got 4"));
        assert!(error(&[4], &[plain(0)]).contains("rows.dimensions"));
    }
}
