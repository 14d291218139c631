//! Norms: with constants of the training, or of the row itself.

use candle_core::{Result, Tensor};

use super::build::{Build, resolve_axes, resolve_axis};
use super::list::LayerSpec;
use super::{Built, Layer};

/// Least deviation that is divided by. Source: Keras, `keras.layers.Normalization`, `backend.epsilon()`.
const LEAST_DEVIATION: f32 = 1e-7;
/// Least square of a length that is divided by. Source: Keras, `keras.layers.UnitNormalization`.
const LEAST_SQUARE: f32 = 1e-12;

/// The shape, the batch in front, that is a row's at these axes and 1 elsewhere.
fn spread(axes: &[usize], x: &[usize]) -> Vec<usize> {
    let sizes = x.iter().enumerate().map(|(i, &size)| if axes.contains(&i) { size } else { 1 });
    std::iter::once(1).chain(sizes).collect()
}

fn sizes(axes: &[usize], x: &[usize]) -> Vec<usize> {
    axes.iter().map(|&axis| x[axis]).collect()
}

/// x * scale + shift, constants that spread over the batch.
struct Affine {
    scale: Tensor,
    shift: Tensor,
}

impl Layer for Affine {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        inputs[0].broadcast_mul(&self.scale)?.broadcast_add(&self.shift)
    }
}

/// Builds a batch norm; `has` says whether there are gamma and beta.
pub(super) fn batch(
    b: &mut Build,
    spec: &LayerSpec,
    axis: i64,
    epsilon: f64,
    has: (bool, bool),
    x: &[usize],
) -> crate::Result<Built> {
    let axes = [resolve_axis(b, spec, axis, x.len())?];
    let size = sizes(&axes, x);
    let mean = b.get(spec, "moving_mean", &size)?;
    let variance = b.get(spec, "moving_variance", &size)?;
    let gamma = b.get_if(has.0, spec, "gamma", &size)?;
    let beta = b.get_if(has.1, spec, "beta", &size)?;
    let mut scale = variance.affine(1.0, epsilon)?.sqrt()?.recip()?;
    if let Some(gamma) = gamma {
        scale = scale.mul(&gamma)?;
    }
    let mut shift = mean.mul(&scale)?.neg()?;
    if let Some(beta) = beta {
        shift = shift.add(&beta)?;
    }
    let shape = spread(&axes, x);
    Ok(Built::new(Affine { scale: scale.reshape(shape.clone())?, shift: shift.reshape(shape)? }, x.to_vec()))
}

/// Builds a normalisation by constants.
pub(super) fn normalize(
    b: &mut Build,
    spec: &LayerSpec,
    axes: &[i64],
    invert: bool,
    x: &[usize],
) -> crate::Result<Built> {
    let axes = resolve_axes(b, spec, axes, x.len())?;
    let size = sizes(&axes, x);
    let mean = b.get(spec, "mean", &size)?;
    let deviation = b.get(spec, "variance", &size)?.sqrt()?.maximum(LEAST_DEVIATION)?;
    let (scale, shift) = if invert {
        (deviation, mean)
    } else {
        let scale = deviation.recip()?;
        let shift = mean.mul(&scale)?.neg()?;
        (scale, shift)
    };
    let shape = spread(&axes, x);
    Ok(Built::new(Affine { scale: scale.reshape(shape.clone())?, shift: shift.reshape(shape)? }, x.to_vec()))
}

/// Builds a layer norm; `has` says whether there are gamma and beta.
pub(super) fn layer(
    b: &mut Build,
    spec: &LayerSpec,
    axes: &[i64],
    epsilon: f64,
    has: (bool, bool),
    x: &[usize],
) -> crate::Result<Built> {
    let axes = resolve_axes(b, spec, axes, x.len())?;
    if axes.is_empty() {
        return Err(b.fault(spec, "needs an axis".to_string()));
    }
    let (size, shape) = (sizes(&axes, x), spread(&axes, x));
    let reshaped = |tensor: Option<Tensor>| tensor.map(|tensor| tensor.reshape(shape.clone())).transpose();
    let gamma = reshaped(b.get_if(has.0, spec, "gamma", &size)?)?;
    let beta = reshaped(b.get_if(has.1, spec, "beta", &size)?)?;
    let axes = axes.iter().map(|axis| axis + 1).collect();
    Ok(Built::new(LayerNorm { axes, epsilon, gamma, beta }, x.to_vec()))
}

struct LayerNorm {
    /// The batch counted.
    axes: Vec<usize>,
    epsilon: f64,
    gamma: Option<Tensor>,
    beta: Option<Tensor>,
}

impl Layer for LayerNorm {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        let centred = inputs[0].broadcast_sub(&inputs[0].mean_keepdim(self.axes.clone())?)?;
        let variance = centred.sqr()?.mean_keepdim(self.axes.clone())?;
        let mut y = centred.broadcast_div(&variance.affine(1.0, self.epsilon)?.sqrt()?)?;
        if let Some(gamma) = &self.gamma {
            y = y.broadcast_mul(gamma)?;
        }
        if let Some(beta) = &self.beta {
            y = y.broadcast_add(beta)?;
        }
        Ok(y)
    }
}

/// Builds a scaling to length 1.
pub(super) fn unit(b: &mut Build, spec: &LayerSpec, axes: &[i64], x: &[usize]) -> crate::Result<Built> {
    let axes = resolve_axes(b, spec, axes, x.len())?;
    if axes.is_empty() {
        return Err(b.fault(spec, "needs an axis".to_string()));
    }
    Ok(Built::new(UnitNorm(axes.iter().map(|axis| axis + 1).collect()), x.to_vec()))
}

/// Axes, the batch counted.
struct UnitNorm(Vec<usize>);

impl Layer for UnitNorm {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        let squares = inputs[0].sqr()?.sum_keepdim(self.0.clone())?;
        inputs[0].broadcast_div(&squares.maximum(LEAST_SQUARE)?.sqrt()?)
    }
}
