//! The gated feed-forward part of a layer.

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use super::linear::{self, Linear};
use super::{check_dims, cpu_values, simd};
use crate::{Error, Result};

/// `down(activation(gate x) * (up x))`, the activation that of `gate`.
///
/// On the CPU a block of rows goes through all of it while it is in the second-level cache, as
/// [`super::residual::ResidualBlock`] does.
/// Source: Shazeer 2020 (GLU variants), section 2.
pub struct GatedFeedForward {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl GatedFeedForward {
    /// Errors: [`Error::Shape`] if the products do not fit each other.
    pub fn new(gate: Linear, up: Linear, down: Linear) -> Result<Self> {
        let (input, inner) = (gate.in_features(), gate.out_features());
        for (operand, expected, got) in [
            ("up", (input, inner), (up.in_features(), up.out_features())),
            ("down", (inner, input), (down.in_features(), down.out_features())),
        ] {
            if got != expected {
                let (expected, got) = (format!("{expected:?} columns in and out"), format!("{got:?}"));
                return Err(Error::Shape { op: "gated", operand, expected, got });
            }
        }
        Ok(Self { gate, up, down })
    }

    /// Shapes: `x` [m, hidden_size]. Returns [m, hidden_size]. A row of the result does not depend on the other
    /// rows; on the CPU it is equal bit by bit.
    ///
    /// Errors: [`Error::Shape`] for other shapes.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let m = x.dims().first().copied().unwrap_or(0);
        check_dims("gated", "x", x, &[m, self.gate.in_features()])?;
        if x.device().is_cpu() && linear::by_rows(m, rayon::current_num_threads()) {
            return Ok(x.contiguous()?.apply_op1_no_bwd(&CpuGated { block: self })?);
        }
        // Too few rows to give every core a block of them: each product is shared out by columns.
        self.down.forward(&(self.gate.forward(x)? * self.up.forward(x)?)?)
    }
}

struct CpuGated<'a> {
    block: &'a GatedFeedForward,
}

impl CustomOp1 for CpuGated<'_> {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x: &[f32] = cpu_values(storage, layout)?;
        let GatedFeedForward { gate, up, down } = self.block;
        let &[m, width] = layout.dims() else { candle_core::bail!("gated: x is not a matrix") };
        let values = simd::fill_rows(m, width, linear::block_rows(m), |row, out| {
            let rows = out.len() / width;
            let x = &x[row * width..][..out.len()];
            let mut gated = vec![0.0; rows * gate.out_features()];
            let mut factors = gated.clone();
            gate.rows_on_cpu(x, &mut gated);
            up.rows_on_cpu(x, &mut factors);
            for (gated, factor) in gated.iter_mut().zip(&factors) {
                *gated *= factor;
            }
            down.rows_on_cpu(&gated, out);
        });
        Ok((CpuStorage::F32(values), (m, width).into()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::linear::Activation;
    use super::super::reference;
    use super::super::testing::{assert_close, noise, values};
    use super::*;

    fn linear(seed: u64, input: usize, out: usize, activation: Activation) -> Linear {
        Linear::new(noise(seed, &[out, input]), Some(noise(seed + 1, &[out])), activation).unwrap()
    }

    fn block() -> GatedFeedForward {
        let (gate, up) = (linear(1, 20, 70, Activation::Silu), linear(3, 20, 70, Activation::None));
        GatedFeedForward::new(gate, up, linear(5, 70, 20, Activation::None)).unwrap()
    }

    #[test]
    fn equals_the_reference_at_every_edge() {
        let plain = |x: &Tensor, seed, input, out, activation| {
            let (weight, bias) = (noise(seed, &[out, input]), noise(seed + 1, &[out]));
            reference::linear(x, &weight, Some(&bias), activation).unwrap()
        };
        for m in [1, 31, 32, 33, 96, 191, 500] {
            let x = noise(7, &[m, 20]);
            let gate = plain(&x, 1, 20, 70, Activation::Silu);
            let gated = (gate * plain(&x, 3, 20, 70, Activation::None)).unwrap();
            let expected = plain(&gated, 5, 70, 20, Activation::None);
            // Sums of 70 products that reach 30 carry errors of 1e-5.
            assert_close(&block().forward(&x).unwrap(), &expected, 3e-5, &format!("{m} rows"));
        }
    }

    #[test]
    fn a_row_alone_equals_that_row_in_any_batch_bit_by_bit() {
        let (block, x) = (block(), noise(7, &[700, 20]));
        let all = values(&block.forward(&x).unwrap());
        for (start, len) in [(0, 1), (699, 1), (47, 2), (10, 300)] {
            let got = values(&block.forward(&x.narrow(0, start, len).unwrap()).unwrap());
            assert!(got == all[start * 20..(start + len) * 20], "rows {start} to {}", start + len);
        }
    }

    #[test]
    fn shapes_are_checked_by_name() {
        let gate = || linear(1, 20, 70, Activation::Silu);
        let error = |up, down| GatedFeedForward::new(gate(), up, down).err().unwrap().to_string();
        let down = || linear(1, 70, 20, Activation::None);
        assert!(error(linear(1, 20, 71, Activation::None), down()).contains("up: expected (20, 70)"));
        assert!(error(gate(), linear(1, 70, 21, Activation::None)).contains("down: expected (70, 20)"));
        let error = block().forward(&noise(1, &[3, 21])).unwrap_err().to_string();
        assert!(error.contains("x: expected [3, 20], got [3, 21]"), "{error}");
    }
}
