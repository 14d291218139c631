//! Residual and layer normalisation.

use candle_core::Tensor;

use super::{check_dims, reference};
use crate::Result;

/// `LayerNorm(x + residual)`: mean 0 and variance 1 over the columns, then weight and bias.
///
/// Source: Ba, Kiros and Hinton 2016, section 3; the variance is the biased one.
pub struct AddLayerNorm {
    weight: Tensor,
    bias: Tensor,
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
        Ok(Self { weight, bias, eps, hidden_size })
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
        reference::add_layer_norm(x, residual, &self.weight, &self.bias, self.eps)
    }
}
