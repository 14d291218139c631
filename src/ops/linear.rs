//! Matrix product with bias and activation.

use candle_core::Tensor;

use super::{check_dims, reference};
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
    weight: Tensor,
    bias: Option<Tensor>,
    activation: Activation,
    in_features: usize,
    out_features: usize,
}

impl Linear {
    /// Takes the weights as checkpoints store them.
    ///
    /// Shapes: `weight` [out, in]; `bias` [out].
    /// Errors: [`Error::Shape`] if they do not fit each other.
    pub fn new(weight: Tensor, bias: Option<Tensor>, activation: Activation) -> Result<Self> {
        let &[out_features, in_features] = weight.dims() else {
            let got = format!("{:?}", weight.dims());
            return Err(Error::Shape { op: "linear", operand: "weight", expected: "[out, in]".to_string(), got });
        };
        if let Some(bias) = &bias {
            check_dims("linear", "bias", bias, &[out_features])?;
        }
        Ok(Self { weight, bias, activation, in_features, out_features })
    }

    /// Columns of the input.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Columns of the result.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Shapes: `x` [m, in]. Returns [m, out]. A row of the result does not depend on the other rows.
    ///
    /// Errors: [`Error::Shape`] if `x` is of another shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let m = x.dims().first().copied().unwrap_or(0);
        check_dims("linear", "x", x, &[m, self.in_features])?;
        reference::linear(x, &self.weight, self.bias.as_ref(), self.activation)
    }
}
