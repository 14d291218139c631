//! Convolution over the tokens of each sequence of a packed batch.

use candle_core::Tensor;

use super::linear::{Activation, Linear};
use super::{CuSeqlens, check_dims};
use crate::{Error, Result};

/// `activation(conv(x) + bias)` over each sequence's tokens, zeros beyond its ends.
///
/// A product over each token and its neighbours side by side: a value that is copied once takes part in as many
/// multiply-adds as the result has columns.
pub struct SequenceConv {
    /// [out, kernel_size * in]
    linear: Linear,
    kernel_size: usize,
    in_features: usize,
}

impl SequenceConv {
    /// Shapes: `weight` [out, in, kernel_size], kernel_size odd; `bias` [out].
    /// Errors: [`Error::Shape`] if they are not.
    pub fn new(weight: &Tensor, bias: Tensor, activation: Activation) -> Result<Self> {
        let &[out, in_features, kernel_size] = weight.dims() else {
            return Err(weight_error(weight));
        };
        if kernel_size.is_multiple_of(2) {
            return Err(weight_error(weight));
        }
        let weight = weight.transpose(1, 2)?.contiguous()?.reshape((out, kernel_size * in_features))?;
        Ok(Self { linear: Linear::new(weight, Some(bias), activation)?, kernel_size, in_features })
    }

    /// Shapes: `x` [total_tokens, in]. Returns [total_tokens, out].
    /// Allocates: kernel_size times `x` beside the result.
    ///
    /// Errors: [`Error::Shape`] if `x` is of another shape.
    pub fn forward(&self, x: &Tensor, cu_seqlens: &CuSeqlens) -> Result<Tensor> {
        let total = cu_seqlens.total_tokens();
        check_dims("conv", "x", x, &[total, self.in_features])?;
        let before = self.kernel_size / 2;
        let mut neighbours = Vec::with_capacity(total * self.kernel_size);
        for range in cu_seqlens.ranges() {
            for token in range.clone() {
                // Counted from `before` tokens ahead, so that nothing is negative.
                let inside = |at: usize| at.checked_sub(before).filter(|token| range.contains(token));
                // The row after the last token holds zeros.
                neighbours.extend((token..token + self.kernel_size).map(|at| inside(at).unwrap_or(total) as u32));
            }
        }
        let zeros = Tensor::zeros((1, self.in_features), x.dtype(), x.device())?;
        let neighbours = Tensor::from_vec(neighbours, total * self.kernel_size, x.device())?;
        let side_by_side = Tensor::cat(&[x, &zeros], 0)?.index_select(&neighbours, 0)?;
        self.linear.forward(&side_by_side.reshape((total, self.kernel_size * self.in_features))?)
    }
}

fn weight_error(weight: &Tensor) -> Error {
    let (expected, got) = ("[out, in, odd kernel_size]".to_string(), format!("{:?}", weight.dims()));
    Error::Shape { op: "conv", operand: "weight", expected, got }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::testing::{assert_close, bounds, noise, values};
    use super::*;

    #[test]
    fn worked_numbers() {
        // One column: each token is its left neighbour, ten times itself and a hundred times its right one.
        let weight = Tensor::new(&[[[1f32, 10., 100.]]], &Device::Cpu).unwrap();
        let conv = SequenceConv::new(&weight, Tensor::new(&[0.5f32], &Device::Cpu).unwrap(), Activation::None).unwrap();
        let x = Tensor::new(&[[1f32], [2.], [3.], [4.]], &Device::Cpu).unwrap();
        // Sequences (1, 2, 3) and (4): nothing crosses from one to the other.
        assert_eq!(values(&conv.forward(&x, &bounds(&[3, 1])).unwrap()), [210.5, 321.5, 32.5, 40.5]);
    }

    #[test]
    fn equals_candles_convolution_of_each_sequence() {
        for kernel_size in [1, 3, 5] {
            let (weight, bias) = (noise(1, &[7, 6, kernel_size]), noise(2, &[7]));
            let conv = SequenceConv::new(&weight, bias.clone(), Activation::Tanh).unwrap();
            let cu_seqlens = bounds(&[1, 2, 33, 5]);
            let x = noise(3, &[41, 6]);
            let expected: Vec<Tensor> = cu_seqlens
                .ranges()
                .map(|range| {
                    let x = x.narrow(0, range.start, range.len()).unwrap().t().unwrap().unsqueeze(0).unwrap();
                    let y = x.contiguous().unwrap().conv1d(&weight, kernel_size / 2, 1, 1, 1).unwrap();
                    y.squeeze(0).unwrap().t().unwrap().broadcast_add(&bias).unwrap().tanh().unwrap()
                })
                .collect();
            let got = conv.forward(&x, &cu_seqlens).unwrap();
            assert_close(&got, &Tensor::cat(&expected, 0).unwrap(), 2e-6, &format!("kernel of {kernel_size}"));
        }
    }

    #[test]
    fn shapes_are_checked_by_name() {
        let error = |r: Result<SequenceConv>| r.err().unwrap().to_string();
        for shape in [&[4, 4, 2][..], &[4, 4]] {
            assert!(error(SequenceConv::new(&noise(1, shape), noise(1, &[4]), Activation::None)).contains("odd"));
        }
        assert!(error(SequenceConv::new(&noise(1, &[4, 4, 3]), noise(1, &[5]), Activation::None)).contains("bias"));
        let conv = SequenceConv::new(&noise(1, &[4, 4, 3]), noise(1, &[4]), Activation::None).unwrap();
        let error = conv.forward(&noise(1, &[3, 5]), &bounds(&[3])).unwrap_err().to_string();
        assert!(error.contains("x: expected [3, 4]"), "{error}");
    }
}
