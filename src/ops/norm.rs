//! Residual and layer normalisation.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, Tensor};
use pulp::{Simd, WithSimd};

use super::{check_dims, cpu_values, host_values, reference, simd};
use crate::Result;

/// `LayerNorm(x + residual)`: mean 0 and variance 1 over the columns, then weight and bias.
///
/// Source: Ba, Kiros and Hinton 2016, section 3; the variance is the biased one.
pub struct AddLayerNorm {
    weight: Tensor,
    bias: Tensor,
    /// `weight` and `bias` on the host, for the CPU forward.
    host: (Vec<f32>, Vec<f32>),
    eps: f64,
    hidden_size: usize,
}

impl AddLayerNorm {
    /// Shapes: `weight`, `bias` [hidden_size].
    /// Errors: [`crate::Error::Shape`] if they are not.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Result<Self> {
        let hidden_size = weight.elem_count();
        check_dims("layer_norm", "weight", &weight, &[hidden_size])?;
        check_dims("layer_norm", "bias", &bias, &[hidden_size])?;
        let host = (host_values(&weight)?, host_values(&bias)?);
        Ok(Self { weight, bias, host, eps, hidden_size })
    }

    /// Columns of the input.
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    /// Shapes: `x`, `residual` [m, hidden_size]. Returns [m, hidden_size].
    ///
    /// Errors: [`crate::Error::Shape`] for other shapes.
    pub fn forward(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        let m = x.dims().first().copied().unwrap_or(0);
        check_dims("layer_norm", "x", x, &[m, self.hidden_size])?;
        if let Some(residual) = residual {
            check_dims("layer_norm", "residual", residual, &[m, self.hidden_size])?;
        }
        if !x.device().is_cpu() {
            return reference::add_layer_norm(x, residual, &self.weight, &self.bias, self.eps);
        }
        let x = x.contiguous()?;
        let op = CpuNorm { norm: self };
        Ok(match residual {
            Some(residual) => x.apply_op2_no_bwd(&residual.contiguous()?, &op)?,
            None => x.apply_op1_no_bwd(&op)?,
        })
    }

    /// Normalises rows in place. For the CPU forwards of ops that end in a LayerNorm.
    ///
    /// Shapes: `rows` [m, hidden_size].
    pub(super) fn normalise_rows(&self, rows: &mut [f32]) {
        simd::run(Rows { norm: self, rows });
    }
}

struct CpuNorm<'a> {
    norm: &'a AddLayerNorm,
}

/// Rows a thread takes at a time: 48 KB at 384 columns.
const BLOCK_ROWS: usize = 32;

impl CpuNorm<'_> {
    fn forward(&self, x: &[f32], residual: Option<&[f32]>) -> Vec<f32> {
        let width = self.norm.hidden_size;
        simd::fill_rows(x.len() / width.max(1), width, BLOCK_ROWS, |row, out| {
            let range = row * width..row * width + out.len();
            out.copy_from_slice(&x[range.clone()]);
            if let Some(residual) = residual {
                for (out, residual) in out.iter_mut().zip(&residual[range]) {
                    *out += residual;
                }
            }
            self.norm.normalise_rows(out);
        })
    }
}

impl CustomOp1 for CpuNorm<'_> {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(self.forward(cpu_values(x, layout)?, None)), layout.shape().clone()))
    }
}

impl CustomOp2 for CpuNorm<'_> {
    fn name(&self) -> &'static str {
        "add_layer_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let residual = cpu_values(residual, residual_layout)?;
        let values = self.forward(cpu_values(x, x_layout)?, Some(residual));
        Ok((CpuStorage::F32(values), x_layout.shape().clone()))
    }
}

/// Rows to normalise in place.
struct Rows<'a> {
    norm: &'a AddLayerNorm,
    rows: &'a mut [f32],
}

impl WithSimd for Rows<'_> {
    type Output = ();

    /// Mean first, then the mean square of what is left: one pass less, as E[x²] - E[x]², cancels digits,
    /// and the row is in the first-level cache anyway.
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let width = self.norm.hidden_size;
        let (weight, weight_tail) = S::as_simd_f32s(&self.norm.host.0);
        let (bias, bias_tail) = S::as_simd_f32s(&self.norm.host.1);
        for row in self.rows.chunks_exact_mut(width) {
            let (body, tail) = S::as_mut_simd_f32s(row);
            let mut sum = simd.splat_f32s(0.0);
            for &x in body.iter() {
                sum = simd.add_f32s(sum, x);
            }
            let mean = (simd.reduce_sum_f32s(sum) + tail.iter().sum::<f32>()) / width as f32;
            let means = simd.splat_f32s(mean);
            let mut squares = simd.splat_f32s(0.0);
            for x in body.iter_mut() {
                *x = simd.sub_f32s(*x, means);
                squares = simd.mul_add_e_f32s(*x, *x, squares);
            }
            let mut square = simd.reduce_sum_f32s(squares);
            for x in tail.iter_mut() {
                *x -= mean;
                square += *x * *x;
            }
            let scale = 1.0 / (square / width as f32 + self.norm.eps as f32).sqrt();
            let scales = simd.splat_f32s(scale);
            for (x, (&w, &b)) in body.iter_mut().zip(weight.iter().zip(bias)) {
                *x = simd.mul_add_e_f32s(simd.mul_f32s(*x, scales), w, b);
            }
            for (x, (w, b)) in tail.iter_mut().zip(weight_tail.iter().zip(bias_tail)) {
                *x = *x * scale * w + b;
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
        let norm = AddLayerNorm::new(
            Tensor::new(&[1f32, 2., 1., 1.], &Device::Cpu).unwrap(),
            Tensor::new(&[0f32, 0., 10., 0.], &Device::Cpu).unwrap(),
            0.0,
        )
        .unwrap();
        // (1, 2, 3, 4) has mean 2.5 and variance 1.25.
        let x = Tensor::new(&[[1f32, 1., 3., 0.]], &Device::Cpu).unwrap();
        let residual = Tensor::new(&[[0f32, 1., 0., 4.]], &Device::Cpu).unwrap();
        let y = values(&norm.forward(&x, Some(&residual)).unwrap());
        for (y, e) in y.iter().zip([-1.341_640_8, -0.894_427_2, 10.447_214, 1.341_640_8]) {
            assert!((y - e).abs() < 1e-6, "{y} for {e}");
        }
    }

    #[test]
    fn equals_the_reference_at_every_edge() {
        for m in [1, 31, 32, 33, 100] {
            for width in [1, 7, 16, 33, 384, 1000] {
                let (x, residual) = ((noise(1, &[m, width]) * 3.0).unwrap(), noise(2, &[m, width]));
                let (weight, bias) = (noise(3, &[width]), noise(4, &[width]));
                let norm = AddLayerNorm::new(weight.clone(), bias.clone(), 1e-12 + 1e-5).unwrap();
                for residual in [Some(&residual), None] {
                    let expected = reference::add_layer_norm(&x, residual, &weight, &bias, 1e-12 + 1e-5).unwrap();
                    let what = format!("{m} x {width}, residual {}", residual.is_some());
                    assert_close(&norm.forward(&x, residual).unwrap(), &expected, 2e-6, &what);
                }
            }
        }
    }

    #[test]
    fn a_large_mean_does_not_cancel_the_variance() {
        let x = (noise(1, &[3, 384]) + 1000.0).unwrap();
        let (one, zero) = (noise(2, &[384]).ones_like().unwrap(), noise(2, &[384]).zeros_like().unwrap());
        let y = values(&AddLayerNorm::new(one, zero, 1e-12).unwrap().forward(&x, None).unwrap());
        for y in y.chunks_exact(384) {
            let variance = y.iter().map(|y| f64::from(*y).powi(2)).sum::<f64>() / 384.0;
            assert!((variance - 1.0).abs() < 1e-3, "{variance}");
        }
    }

    #[test]
    fn what_is_no_number_stays_in_its_row() {
        let norm = AddLayerNorm::new(noise(1, &[20]), noise(2, &[20]), 1e-12).unwrap();
        let mut x = values(&noise(3, &[3, 20]));
        x[25] = f32::NAN;
        let y = values(&norm.forward(&Tensor::from_vec(x, (3, 20), &Device::Cpu).unwrap(), None).unwrap());
        assert!(y[20..40].iter().all(|v| v.is_nan()));
        assert!(y[..20].iter().chain(&y[40..]).all(|v| v.is_finite()));
    }

    #[test]
    fn shapes_are_checked_by_name() {
        assert!(AddLayerNorm::new(noise(1, &[4]), noise(1, &[5]), 0.0).err().unwrap().to_string().contains("bias"));
        let norm = AddLayerNorm::new(noise(1, &[4]), noise(1, &[4]), 0.0).unwrap();
        let error = norm.forward(&noise(1, &[2, 4]), Some(&noise(1, &[3, 4]))).unwrap_err().to_string();
        assert!(error.contains("residual: expected [2, 4], got [3, 4]"), "{error}");
    }
}
