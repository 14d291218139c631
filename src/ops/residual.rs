//! The two halves of a post-norm layer after its attention: products, residual and LayerNorm as one op.

use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor};

use super::linear::{self, Linear};
use super::norm::AddLayerNorm;
use super::{check_dims, cpu_values, simd};
use crate::{Error, Result};

/// `LayerNorm(residual + linear_n(... linear_1(x)))`: one linear after the attention, two for a feed-forward
/// part, whose activation belongs to the first.
///
/// On the CPU a block of rows goes through all of it while it is in the second-level cache. As single ops
/// the intermediate of 2048 tokens, 12 MB at MiniLM's sizes, would go out to memory and come back.
pub struct ResidualBlock {
    linears: Vec<Linear>,
    norm: AddLayerNorm,
}

impl ResidualBlock {
    /// Errors: [`Error::Shape`] without a linear, or if an output does not fit the next input.
    pub fn new(linears: Vec<Linear>, norm: AddLayerNorm) -> Result<Self> {
        let shape = |operand, expected: usize, got: usize| Error::Shape {
            op: "residual",
            operand,
            expected: format!("{expected} columns"),
            got: got.to_string(),
        };
        for pair in linears.windows(2) {
            if pair[0].out_features() != pair[1].in_features() {
                return Err(shape("linears", pair[0].out_features(), pair[1].in_features()));
            }
        }
        let last = linears.last().map_or(0, Linear::out_features);
        if last != norm.hidden_size() {
            return Err(shape("norm", last, norm.hidden_size()));
        }
        Ok(Self { linears, norm })
    }

    /// Shapes: `x` [m, the first linear's in]; `residual` [m, hidden_size]. Returns [m, hidden_size]. A row
    /// of the result does not depend on the other rows; on the CPU it is equal bit by bit.
    ///
    /// Errors: [`Error::Shape`] for other shapes.
    pub fn forward(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let m = x.dims().first().copied().unwrap_or(0);
        // `new` refused an empty list: its last output would have no columns to normalise.
        check_dims("residual", "x", x, &[m, self.linears.first().map_or(0, Linear::in_features)])?;
        check_dims("residual", "residual", residual, &[m, self.norm.hidden_size()])?;
        if x.device().is_cpu() && linear::by_rows(m, rayon::current_num_threads()) {
            return Ok(x.contiguous()?.apply_op2_no_bwd(&residual.contiguous()?, &CpuBlock { block: self })?);
        }
        // Too few rows to give every core a block of them: each product is shared out by columns.
        let mut y = x.clone();
        for linear in &self.linears {
            y = linear.forward(&y)?;
        }
        self.norm.forward(&y, Some(residual))
    }
}

struct CpuBlock<'a> {
    block: &'a ResidualBlock,
}

impl CustomOp2 for CpuBlock<'_> {
    fn name(&self) -> &'static str {
        "residual"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, residual) = (cpu_values(x, x_layout)?, cpu_values(residual, residual_layout)?);
        let &[m, k] = x_layout.dims() else { candle_core::bail!("residual: x is not a matrix") };
        let n = self.block.norm.hidden_size();
        let values = simd::fill_rows(m, n, linear::block_rows(m), |row, out| {
            let rows = out.len() / n;
            let mut owned: Vec<f32>;
            let mut input = &x[row * k..][..rows * k];
            if let Some((last, first)) = self.block.linears.split_last() {
                for linear in first {
                    let mut next = vec![0.0; rows * linear.out_features()];
                    linear.rows_on_cpu(input, &mut next);
                    owned = next;
                    input = &owned;
                }
                last.rows_on_cpu(input, out);
            }
            for (out, residual) in out.iter_mut().zip(&residual[row * n..]) {
                *out += residual;
            }
            self.block.norm.normalise_rows(out);
        });
        Ok((CpuStorage::F32(values), (m, n).into()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::linear::Activation;
    use super::super::testing::{assert_close, noise, values};
    use super::*;

    fn linear(seed: u64, input: usize, out: usize, activation: Activation) -> Linear {
        Linear::new(noise(seed, &[out, input]), Some(noise(seed + 1, &[out])), activation).unwrap()
    }

    fn norm(width: usize) -> AddLayerNorm {
        AddLayerNorm::new(noise(8, &[width]), noise(9, &[width]), 1e-12).unwrap()
    }

    /// A feed-forward part of 20 columns and an intermediate of 70.
    fn feed_forward() -> ResidualBlock {
        let linears = vec![linear(1, 20, 70, Activation::Gelu), linear(3, 70, 20, Activation::None)];
        ResidualBlock::new(linears, norm(20)).unwrap()
    }

    #[test]
    fn equals_its_parts_at_every_edge() {
        let up = linear(1, 20, 70, Activation::Gelu);
        let down = linear(3, 70, 20, Activation::None);
        for m in [1, 31, 32, 33, 96, 191, 500] {
            let (x, residual) = (noise(5, &[m, 20]), noise(6, &[m, 20]));
            let got = feed_forward().forward(&x, &residual).unwrap();
            let parts = down.forward(&up.forward(&x).unwrap()).unwrap();
            let expected = norm(20).forward(&parts, Some(&residual)).unwrap();
            assert_close(&got, &expected, 1e-6, &format!("{m} rows"));
        }
    }

    #[test]
    fn a_row_alone_equals_that_row_in_any_batch_bit_by_bit() {
        let block = feed_forward();
        let (x, residual) = (noise(5, &[700, 20]), noise(6, &[700, 20]));
        let all = values(&block.forward(&x, &residual).unwrap());
        for (start, len) in [(0, 1), (699, 1), (47, 2), (10, 300)] {
            let part = |t: &Tensor| t.narrow(0, start, len).unwrap();
            let got = values(&block.forward(&part(&x), &part(&residual)).unwrap());
            assert!(got == all[start * 20..(start + len) * 20], "rows {start} to {}", start + len);
        }
    }

    #[test]
    fn shapes_are_checked_by_name() {
        let error = |linears| ResidualBlock::new(linears, norm(20)).err().unwrap().to_string();
        assert!(error(vec![]).contains("norm: expected 0 columns, got 20"));
        assert!(error(vec![linear(1, 20, 30, Activation::None)]).contains("norm: expected 30 columns"));
        let apart = vec![linear(1, 20, 30, Activation::None), linear(1, 31, 20, Activation::None)];
        assert!(error(apart).contains("linears: expected 30 columns, got 31"));
        let error = feed_forward().forward(&noise(1, &[3, 20]), &noise(1, &[4, 20])).unwrap_err().to_string();
        assert!(error.contains("residual: expected [3, 20], got [4, 20]"), "{error}");
    }
}
