//! Matrix product with bias and activation.

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::gemm::{self, PackedWeight, TILE_ROWS};
use super::{check_dims, cpu_values, host_values, reference, simd};
use crate::{Error, Result};

/// What follows the product and the bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activation {
    #[default]
    None,
    /// `x Φ(x)`, exact: through erf. Hendrycks and Gimpel 2016.
    Gelu,
    /// The tanh approximation of the same paper: `gelu_new`, `gelu_pytorch_tanh`.
    GeluTanh,
    Relu,
    /// `x / (1 + exp(-x))`.
    Silu,
    Tanh,
}

/// `activation(x weightᵀ + bias)`.
pub struct Linear {
    weights: Weights,
    activation: Activation,
    in_features: usize,
    out_features: usize,
}

/// The weights in the form their device computes with.
enum Weights {
    Cpu(PackedWeight),
    /// Any other device: the composition in [`reference`].
    Device {
        weight: Tensor,
        bias: Option<Tensor>,
    },
}

impl Linear {
    /// Takes the weights as checkpoints store them, on the device to compute on. On the CPU they are
    /// copied into packed form: drop the originals.
    ///
    /// Shapes: `weight` [out, in]; `bias` [out]. On the CPU any float dtype, computed in f32.
    /// Errors: [`Error::Shape`] if they do not fit each other.
    pub fn new(weight: Tensor, bias: Option<Tensor>, activation: Activation) -> Result<Self> {
        let &[out_features, in_features] = weight.dims() else {
            let got = format!("{:?}", weight.dims());
            return Err(Error::Shape { op: "linear", operand: "weight", expected: "[out, in]".to_string(), got });
        };
        if let Some(bias) = &bias {
            check_dims("linear", "bias", bias, &[out_features])?;
        }
        let weights = if weight.device().is_cpu() {
            let bias = bias.as_ref().map(host_values).transpose()?;
            Weights::Cpu(PackedWeight::new(&host_values(&weight)?, bias.as_deref(), out_features, in_features))
        } else {
            Weights::Device { weight, bias }
        };
        Ok(Self { weights, activation, in_features, out_features })
    }

    /// Columns of the input.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Columns of the result.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Shapes: `x` [m, in], on the CPU f32. Returns [m, out]. A row of the result does not depend on the
    /// other rows; on the CPU it is equal bit by bit.
    ///
    /// Errors: [`Error::Shape`] if `x` is of another shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let m = x.dims().first().copied().unwrap_or(0);
        check_dims("linear", "x", x, &[m, self.in_features])?;
        match &self.weights {
            Weights::Cpu(weight) => {
                let op = CpuLinear { weight, activation: self.activation };
                Ok(x.contiguous()?.apply_op1_no_bwd(&op)?)
            }
            Weights::Device { weight, bias } => reference::linear(x, weight, bias.as_ref(), self.activation),
        }
    }
}

impl Linear {
    /// The forward of some rows on the calling thread. For the CPU forwards of ops that hold a linear.
    ///
    /// Shapes: `x` [rows, in]; `out` [rows, out].
    /// Panics: if the weights are on another device, which the op's dispatch rules out.
    pub(super) fn rows_on_cpu(&self, x: &[f32], out: &mut [f32]) {
        let Weights::Cpu(weight) = &self.weights else { panic!("a CPU input met weights of another device") };
        let panels = 0..weight.num_panels();
        simd::run(Block { x, weight, panels, activation: self.activation, out, ld: self.out_features });
    }
}

/// Whether a product of `m` rows gives every thread enough blocks of whole rows.
pub(super) fn by_rows(m: usize, num_threads: usize) -> bool {
    Plan::new(m, usize::MAX, num_threads).panels_per_group == usize::MAX
}

/// Rows of a block; see [`Plan::new`].
pub(super) fn block_rows(m: usize) -> usize {
    Plan::new(m, 1, 1).block_rows
}

struct CpuLinear<'a> {
    weight: &'a PackedWeight,
    activation: Activation,
}

impl CustomOp1 for CpuLinear<'_> {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = cpu_values(storage, layout)?;
        let m = layout.dims()[0];
        let values = forward(x, m, self.weight, self.activation, rayon::current_num_threads());
        Ok((CpuStorage::F32(values), (m, self.weight.out_features()).into()))
    }
}

/// How a product is shared out: blocks of rows, and within a block groups of panels.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    block_rows: usize,
    panels_per_group: usize,
}

impl Plan {
    /// About 48 rows a block: 74 KB of inputs at 384 columns stay in the second-level cache beside a panel,
    /// and the weights are read from the third level once per 48 rows, a byte a cycle. Batches too small
    /// to give every thread two such blocks are split by columns instead: two threads that shared out
    /// eight rows would each read all weights.
    fn new(m: usize, num_panels: usize, num_threads: usize) -> Self {
        const BLOCK_ROWS: usize = 8 * TILE_ROWS;
        let wanted = 2 * num_threads;
        let num_blocks = m.div_ceil(BLOCK_ROWS).max(1);
        let block_rows = m.div_ceil(num_blocks).next_multiple_of(TILE_ROWS);
        let groups = if num_threads == 1 { 1 } else { wanted.div_ceil(num_blocks).min(num_panels.max(1)) };
        Self { block_rows, panels_per_group: num_panels.div_ceil(groups).max(1) }
    }
}

/// Shapes: `x` [m, in]. Returns [m, out].
fn forward(x: &[f32], m: usize, weight: &PackedWeight, activation: Activation, num_threads: usize) -> Vec<f32> {
    let (k, n) = (weight.in_features(), weight.out_features());
    let plan = Plan::new(m, weight.num_panels(), num_threads);
    let one_group = plan.panels_per_group >= weight.num_panels();
    simd::fill_rows(m, n, plan.block_rows, |row, out| {
        let rows = out.len() / n;
        let x = &x[row * k..][..rows * k];
        if one_group {
            simd::run(Block { x, weight, panels: 0..weight.num_panels(), activation, out, ld: n });
            return;
        }
        let groups: Vec<_> = (0..weight.num_panels()).step_by(plan.panels_per_group).collect();
        let parts: Vec<(usize, usize, Vec<f32>)> = groups
            .into_par_iter()
            .with_max_len(1)
            .map(|first| {
                let panels = first..(first + plan.panels_per_group).min(weight.num_panels());
                let start = weight.columns(first).0;
                let (last, columns) = weight.columns(panels.end - 1);
                let ld = last + columns - start;
                let mut part = vec![0.0; rows * ld];
                simd::run(Block { x, weight, panels, activation, out: &mut part, ld });
                (start, ld, part)
            })
            .collect();
        for (start, ld, part) in parts {
            for (out, part) in out.chunks_exact_mut(n).zip(part.chunks_exact(ld)) {
                out[start..start + ld].copy_from_slice(part);
            }
        }
    })
}

/// Some rows times some panels, activation included.
struct Block<'a> {
    x: &'a [f32],
    weight: &'a PackedWeight,
    panels: std::ops::Range<usize>,
    activation: Activation,
    out: &'a mut [f32],
    ld: usize,
}

impl WithSimd for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        gemm::linear(simd, self.x, self.weight, self.panels, self.out, self.ld);
        // The block is still in the second-level cache; one more pass over it costs about a hundredth.
        simd::activate(simd, self.activation, self.out);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::testing::{assert_close, noise, values};
    use super::*;

    const ALL: [Activation; 6] = [
        Activation::None,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
        Activation::Silu,
        Activation::Tanh,
    ];

    #[test]
    fn worked_numbers() {
        let weight = Tensor::new(&[[1f32, 2.], [3., 4.], [0., -1.]], &Device::Cpu).unwrap();
        let bias = Tensor::new(&[0.5f32, 0., -1.], &Device::Cpu).unwrap();
        let x = Tensor::new(&[[1f32, 1.], [2., -1.]], &Device::Cpu).unwrap();
        let linear = Linear::new(weight, Some(bias), Activation::Relu).unwrap();
        assert_eq!(values(&linear.forward(&x).unwrap()), [3.5, 7., 0., 0.5, 2., 0.]);
    }

    #[test]
    fn equals_the_reference_at_every_edge() {
        let sizes = [1, 5, 31, 32, 33, 64, 100, 129];
        for (i, &m) in [1, 2, 5, 6, 7, 8, 11, 12, 13, 31, 32, 33, 47, 49, 97, 200].iter().enumerate() {
            let (k, n) = (sizes[i % 8], sizes[(3 * i + 1) % 8]);
            let (x, weight, bias) = (noise(1, &[m, k]), noise(2, &[n, k]), noise(3, &[n]));
            for activation in ALL {
                for bias in [Some(&bias), None] {
                    let linear = Linear::new(weight.clone(), bias.cloned(), activation).unwrap();
                    let expected = reference::linear(&x, &weight, bias, activation).unwrap();
                    let what = format!("{m} x {k} x {n} {activation:?}");
                    assert_close(&linear.forward(&x).unwrap(), &expected, 5e-6, &what);
                }
            }
        }
    }

    #[test]
    fn a_row_alone_equals_that_row_in_any_batch_bit_by_bit() {
        let (k, n) = (96, 200);
        let linear = Linear::new(noise(1, &[n, k]), Some(noise(2, &[n])), Activation::Gelu).unwrap();
        let x = noise(3, &[257, k]);
        let all = values(&linear.forward(&x).unwrap());
        for (start, len) in [(0, 1), (256, 1), (17, 1), (3, 9), (100, 50), (1, 256)] {
            let part = values(&linear.forward(&x.narrow(0, start, len).unwrap()).unwrap());
            assert_eq!(part, all[start * n..(start + len) * n], "rows {start} to {}", start + len);
        }
    }

    #[test]
    fn the_result_does_not_depend_on_the_number_of_threads() {
        let (m, k, n) = (130, 40, 300);
        let (x, weight) = (values(&noise(1, &[m, k])), values(&noise(2, &[n, k])));
        let weight = PackedWeight::new(&weight, None, n, k);
        let one = forward(&x, m, &weight, Activation::Silu, 1);
        for num_threads in [2, 3, 64] {
            assert!(forward(&x, m, &weight, Activation::Silu, num_threads) == one, "{num_threads} threads");
        }
    }

    #[test]
    fn plans_give_every_thread_work() {
        // A lone short query is split by columns, a large batch by rows only.
        assert_eq!(Plan::new(8, 24, 2), Plan { block_rows: 12, panels_per_group: 6 });
        assert_eq!(Plan::new(2048, 24, 2), Plan { block_rows: 48, panels_per_group: 24 });
        assert_eq!(Plan::new(1, 1, 64), Plan { block_rows: 6, panels_per_group: 1 });
        assert_eq!(Plan::new(1000, 24, 1).panels_per_group, 24);
    }

    #[test]
    fn other_devices_take_the_reference_and_agree() {
        let (weight, bias, x) = (noise(1, &[20, 30]), noise(2, &[20]), noise(3, &[7, 30]));
        let cpu = Linear::new(weight.clone(), Some(bias.clone()), Activation::Gelu).unwrap();
        let device = Linear {
            weights: Weights::Device { weight, bias: Some(bias) },
            activation: Activation::Gelu,
            in_features: 30,
            out_features: 20,
        };
        assert_close(&cpu.forward(&x).unwrap(), &device.forward(&x).unwrap(), 1e-6, "dispatch");
    }

    #[test]
    fn strided_inputs_and_half_weights_are_taken() {
        let (x, weight) = (noise(1, &[30, 9]).t().unwrap(), noise(2, &[20, 30]));
        let half = weight.to_dtype(candle_core::DType::BF16).unwrap();
        let expected = reference::linear(&x, &half.to_dtype(candle_core::DType::F32).unwrap(), None, Activation::None);
        let linear = Linear::new(half, None, Activation::None).unwrap();
        assert_close(&linear.forward(&x).unwrap(), &expected.unwrap(), 2e-6, "bf16 weights");
    }

    #[test]
    fn shapes_are_checked_by_name() {
        let error = |r: Result<Linear>| r.err().unwrap().to_string();
        assert!(error(Linear::new(noise(1, &[4]), None, Activation::None)).contains("weight: expected [out, in]"));
        assert!(error(Linear::new(noise(1, &[4, 2]), Some(noise(1, &[3])), Activation::None)).contains("bias"));
        let linear = Linear::new(noise(1, &[4, 2]), None, Activation::None).unwrap();
        assert!(linear.forward(&noise(1, &[5, 3])).unwrap_err().to_string().contains("x: expected [5, 2]"));
    }

    #[test]
    fn what_is_no_number_stays_in_its_row() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = values(&noise(1, &[9, 16]));
            x[4 * 16 + 3] = bad;
            let x = Tensor::from_vec(x, (9, 16), &Device::Cpu).unwrap();
            for activation in ALL {
                let linear = Linear::new(noise(2, &[70, 16]), None, activation).unwrap();
                let y = values(&linear.forward(&x).unwrap());
                for (row, y) in y.chunks_exact(70).enumerate() {
                    let finite = y.iter().all(|v| v.is_finite());
                    assert!(finite || row == 4, "{activation:?}: row {row}");
                    assert!(row != 4 || !bad.is_nan() || y.iter().all(|v| v.is_nan()), "{activation:?}");
                }
            }
        }
    }
}
