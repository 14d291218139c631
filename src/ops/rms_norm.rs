//! Normalisation by the root of the mean square.

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};
use pulp::{Simd, WithSimd};

use super::{check_dims, cpu_values, host_values, reference, simd};
use crate::Result;

/// `x / sqrt(mean(x²) + eps) * weight` over the columns: a LayerNorm without mean and bias.
///
/// Source: Zhang and Sennrich 2019, section 4.
pub struct RmsNorm {
    weight: Tensor,
    /// `weight` on the host, for the CPU forward.
    host: Vec<f32>,
    eps: f64,
}

impl RmsNorm {
    /// Shapes: `weight` [hidden_size].
    /// Errors: [`crate::Error::Shape`] if it is not.
    pub fn new(weight: Tensor, eps: f64) -> Result<Self> {
        check_dims("rms_norm", "weight", &weight, &[weight.elem_count()])?;
        let host = host_values(&weight)?;
        Ok(Self { weight, host, eps })
    }

    /// Columns of the input.
    pub fn hidden_size(&self) -> usize {
        self.host.len()
    }

    /// Shapes: `x` [m, hidden_size]. Returns [m, hidden_size].
    ///
    /// Errors: [`crate::Error::Shape`] for other shapes.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let m = x.dims().first().copied().unwrap_or(0);
        check_dims("rms_norm", "x", x, &[m, self.hidden_size()])?;
        if !x.device().is_cpu() {
            return reference::rms_norm(x, &self.weight, self.eps);
        }
        Ok(x.contiguous()?.apply_op1_no_bwd(&CpuNorm { norm: self })?)
    }

    /// The weight on its device, and what is added to the mean square. For the reference of ops that hold a norm.
    pub(super) fn parts(&self) -> (&Tensor, f64) {
        (&self.weight, self.eps)
    }

    /// Normalises rows in place. For the CPU forwards of ops that hold a norm.
    ///
    /// Shapes: `rows` [m, hidden_size].
    pub(super) fn normalise_rows(&self, rows: &mut [f32]) {
        simd::run(Rows { norm: self, rows });
    }
}

struct CpuNorm<'a> {
    norm: &'a RmsNorm,
}

/// Rows a thread takes at a time: 128 KB at 1024 columns.
const BLOCK_ROWS: usize = 32;

impl CustomOp1 for CpuNorm<'_> {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x: &[f32] = cpu_values(storage, layout)?;
        let width = self.norm.hidden_size();
        let values = simd::fill_rows(x.len() / width.max(1), width, BLOCK_ROWS, |row, out| {
            out.copy_from_slice(&x[row * width..][..out.len()]);
            self.norm.normalise_rows(out);
        });
        Ok((CpuStorage::F32(values), layout.shape().clone()))
    }
}

/// Rows to normalise in place.
struct Rows<'a> {
    norm: &'a RmsNorm,
    rows: &'a mut [f32],
}

impl WithSimd for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let width = self.norm.hidden_size();
        let (weight, weight_tail) = S::as_simd_f32s(&self.norm.host);
        for row in self.rows.chunks_exact_mut(width) {
            let (body, tail) = S::as_mut_simd_f32s(row);
            let mut squares = simd.splat_f32s(0.0);
            for &x in body.iter() {
                squares = simd.mul_add_e_f32s(x, x, squares);
            }
            let square = simd.reduce_sum_f32s(squares) + tail.iter().map(|x| x * x).sum::<f32>();
            let scale = 1.0 / (square / width as f32 + self.norm.eps as f32).sqrt();
            let scales = simd.splat_f32s(scale);
            for (x, &w) in body.iter_mut().zip(weight) {
                *x = simd.mul_f32s(simd.mul_f32s(*x, scales), w);
            }
            for (x, w) in tail.iter_mut().zip(weight_tail) {
                *x = *x * scale * w;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::testing::{assert_close, noise, values};
    use super::*;

    #[test]
    fn worked_numbers() {
        let weight = Tensor::new(&[1f32, 2., 1., 10.], &Device::Cpu).unwrap();
        // (1, 1, 7, 7) has a mean square of 25.
        let x = Tensor::new(&[[1f32, 1., 7., 7.]], &Device::Cpu).unwrap();
        let y = values(&RmsNorm::new(weight, 0.0).unwrap().forward(&x).unwrap());
        for (y, e) in y.iter().zip([0.2, 0.4, 1.4, 14.0]) {
            assert!((y - e).abs() < 1e-6, "{y} for {e}");
        }
    }

    #[test]
    fn equals_the_reference_at_every_edge() {
        for m in [1, 31, 32, 33, 100] {
            for width in [1, 7, 16, 33, 128, 1000] {
                let (x, weight) = ((noise(1, &[m, width]) * 3.0).unwrap(), noise(3, &[width]));
                let expected = reference::rms_norm(&x, &weight, 1e-6).unwrap();
                let norm = RmsNorm::new(weight, 1e-6).unwrap();
                assert_close(&norm.forward(&x).unwrap(), &expected, 2e-6, &format!("{m} x {width}"));
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_in_its_row() {
        let norm = RmsNorm::new(noise(1, &[20]), 1e-6).unwrap();
        let mut x = values(&noise(3, &[3, 20]));
        x[25] = f32::NAN;
        let y = values(&norm.forward(&Tensor::from_vec(x, (3, 20), &Device::Cpu).unwrap()).unwrap());
        assert!(y[20..40].iter().all(|v| v.is_nan()));
        assert!(y[..20].iter().chain(&y[40..]).all(|v| v.is_finite()));
    }

    #[test]
    fn shapes_are_checked_by_name() {
        assert!(RmsNorm::new(noise(1, &[4, 2]), 0.0).err().unwrap().to_string().contains("weight"));
        let norm = RmsNorm::new(noise(1, &[4]), 0.0).unwrap();
        let error = norm.forward(&noise(1, &[2, 5])).unwrap_err().to_string();
        assert!(error.contains("x: expected [2, 4], got [2, 5]"), "{error}");
    }
}
