//! Functions of each element.

use candle_core::{D, Result, Tensor};

use super::build::Build;
use super::list::{Activation, LayerSpec};
use super::{Built, Layer};

/// Slope below zero of the activation `leaky_relu`. Source: Keras 3, `keras.activations.leaky_relu`.
const LEAKY_SLOPE: f64 = 0.2;
/// Source: Klambauer et al. 2017, equation 14.
const SELU_ALPHA: f64 = 1.673_263_242_354_377_3;
const SELU_SCALE: f64 = 1.050_700_987_355_480_5;

impl Activation {
    /// The function of a tensor.
    pub(super) fn of(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Linear => Ok(x.clone()),
            Self::Relu => x.relu(),
            Self::Relu6 => x.clamp(0f32, 6f32),
            Self::LeakyRelu => x.maximum(&x.affine(LEAKY_SLOPE, 0.0)?),
            Self::Elu => x.elu(1.0),
            Self::Selu => x.elu(SELU_ALPHA)?.affine(SELU_SCALE, 0.0),
            Self::Gelu => x.gelu_erf(),
            Self::GeluTanh => x.gelu(),
            Self::Sigmoid => candle_nn::ops::sigmoid(x),
            Self::HardSigmoid => hard_sigmoid(x),
            Self::ClippedSigmoid => x.affine(0.2, 0.5)?.clamp(0f32, 1f32),
            Self::Tanh => x.tanh(),
            Self::Softplus => softplus(x),
            Self::Softsign => x.div(&x.abs()?.affine(1.0, 1.0)?),
            Self::Silu => x.mul(&candle_nn::ops::sigmoid(x)?),
            Self::HardSilu => x.mul(&hard_sigmoid(x)?),
            Self::Exponential => x.exp(),
            Self::Mish => x.mul(&softplus(x)?.tanh()?),
            Self::Softmax => candle_nn::ops::softmax(x, D::Minus1),
            Self::LogSoftmax => candle_nn::ops::log_softmax(x, D::Minus1),
        }
    }
}

fn hard_sigmoid(x: &Tensor) -> Result<Tensor> {
    x.affine(1.0 / 6.0, 0.5)?.clamp(0f32, 1f32)
}

/// log(1 + exp(x)), as the greater of x and 0 and a rest that cannot overflow.
fn softplus(x: &Tensor) -> Result<Tensor> {
    x.relu()?.add(&x.abs()?.neg()?.exp()?.affine(1.0, 1.0)?.log()?)
}

/// A layer that is an activation.
pub(super) struct Function(pub Activation);

impl Layer for Function {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        self.0.of(inputs[0])
    }
}

/// ReLU with a bound, a slope and a threshold.
pub(super) struct Relu {
    pub max_value: Option<f64>,
    pub negative_slope: f64,
    pub threshold: f64,
}

impl Layer for Relu {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        let x = inputs[0];
        let below = x.affine(self.negative_slope, -self.negative_slope * self.threshold)?;
        let passed = x.ge(self.threshold as f32)?.where_cond(x, &below)?;
        match self.max_value {
            Some(max_value) => passed.minimum(max_value as f32),
            None => Ok(passed),
        }
    }
}

/// ELU with an alpha.
pub(super) struct Elu(pub f64);

impl Layer for Elu {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        inputs[0].elu(self.0)
    }
}

/// ReLU with a slope that was learned.
pub(super) struct Prelu {
    /// [1, row shape...], ones where it is shared.
    alpha: Tensor,
}

impl Prelu {
    /// Reads `alpha`, which fits the shape `x` of a row or has 1 in its place.
    pub fn build(b: &mut Build, spec: &LayerSpec, x: &[usize]) -> crate::Result<Built> {
        let shape = b.shape(spec, "alpha", x.len())?;
        if shape.iter().zip(x).any(|(alpha, x)| alpha != x && *alpha != 1) {
            return Err(b.fault(spec, format!("alpha has shape {shape:?}, a row has {x:?}")));
        }
        let alpha = b.get(spec, "alpha", &shape)?.unsqueeze(0)?;
        Ok(Built::new(Self { alpha }, x.to_vec()))
    }
}

impl Layer for Prelu {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        let x = inputs[0];
        x.relu()?.sub(&x.neg()?.relu()?.broadcast_mul(&self.alpha)?)
    }
}

/// Softmax over one axis, the batch counted as 0.
pub(super) struct Softmax(pub usize);

impl Layer for Softmax {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        candle_nn::ops::softmax(inputs[0], self.0)
    }
}
