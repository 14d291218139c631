//! Layers that move values and compute none.

use candle_core::{Result, Tensor};

use super::build::{Build, resolve_axes, resolve_axis};
use super::list::LayerSpec;
use super::{Built, Layer, num_values};

/// What layers for training are.
pub(super) struct Identity;

impl Layer for Identity {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        Ok(inputs[0].clone())
    }
}

/// Builds a row of another shape, of which one size may be -1.
pub(super) fn reshaped(b: &mut Build, spec: &LayerSpec, to: &[i64], x: &[usize]) -> crate::Result<Built> {
    let wrong = || b.fault(spec, format!("shape {to:?} does not hold the values of {x:?}"));
    let total = num_values(x).ok_or_else(wrong)?;
    let known: Vec<usize> = to.iter().filter(|&&size| size != -1).map(|&size| size.max(0) as usize).collect();
    let product = num_values(&known).filter(|&product| product > 0).ok_or_else(wrong)?;
    let is_right = match to.len() - known.len() {
        0 => product == total,
        1 => total % product == 0,
        _ => false,
    };
    if !is_right {
        return Err(wrong());
    }
    let shape: Vec<usize> = to.iter().map(|&size| if size == -1 { total / product } else { size as usize }).collect();
    Ok(Built::new(Reshape(shape.clone()), shape))
}

/// A row's shape.
struct Reshape(Vec<usize>);

impl Layer for Reshape {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        inputs[0].reshape([&[inputs[0].dim(0)?], self.0.as_slice()].concat())
    }
}

/// Builds another order of a row's axes.
pub(super) fn permute(b: &mut Build, spec: &LayerSpec, axes: &[i64], x: &[usize]) -> crate::Result<Built> {
    if resolve_axes(b, spec, axes, x.len())?.len() != x.len() {
        return Err(b.fault(spec, format!("names {} of {} axes", axes.len(), x.len())));
    }
    let order = axes.iter().map(|&axis| resolve_axis(b, spec, axis, x.len())).collect::<crate::Result<Vec<_>>>()?;
    let shape = order.iter().map(|&axis| x[axis]).collect();
    let order = std::iter::once(0).chain(order.iter().map(|axis| axis + 1)).collect();
    Ok(Built::new(Permute(order), shape))
}

/// The batch counted.
struct Permute(Vec<usize>);

impl Layer for Permute {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        inputs[0].permute(self.0.clone())?.contiguous()
    }
}

/// Builds a row of one axis as many rows.
pub(super) fn repeat(b: &mut Build, spec: &LayerSpec, times: usize, x: &[usize]) -> crate::Result<Built> {
    match *x {
        [size] if times > 0 => Ok(Built::new(Repeat(times), vec![times, size])),
        _ => Err(b.fault(spec, format!("takes rows of one axis and a number from 1, got {x:?} and {times}"))),
    }
}

struct Repeat(usize);

impl Layer for Repeat {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        let (n, size) = inputs[0].dims2()?;
        inputs[0].unsqueeze(1)?.broadcast_as((n, self.0, size))?.contiguous()
    }
}

/// Errors: for a list that has not one element for each axis but the last.
fn check_axes(b: &Build, spec: &LayerSpec, len: usize, x: &[usize]) -> crate::Result<()> {
    if len + 1 == x.len() {
        return Ok(());
    }
    Err(b.fault(spec, format!("names {len} axes, a row has {} and the channels", x.len().saturating_sub(1))))
}

/// Builds zeros around the data.
pub(super) fn zero_pad(b: &mut Build, spec: &LayerSpec, pads: &[(usize, usize)], x: &[usize]) -> crate::Result<Built> {
    check_axes(b, spec, pads.len(), x)?;
    let mut shape = x.to_vec();
    for (size, (before, behind)) in shape.iter_mut().zip(pads) {
        *size = size.saturating_add(*before).saturating_add(*behind);
    }
    Ok(Built::new(ZeroPad(pads.to_vec()), shape))
}

struct ZeroPad(Vec<(usize, usize)>);

impl Layer for ZeroPad {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        let mut x = inputs[0].clone();
        for (i, (before, behind)) in self.0.iter().enumerate() {
            x = x.pad_with_zeros(i + 1, *before, *behind)?;
        }
        Ok(x)
    }
}

/// Builds the data without its edges.
pub(super) fn crop(b: &mut Build, spec: &LayerSpec, crops: &[(usize, usize)], x: &[usize]) -> crate::Result<Built> {
    check_axes(b, spec, crops.len(), x)?;
    let mut shape = x.to_vec();
    for (size, (before, behind)) in shape.iter_mut().zip(crops) {
        let rest = size.checked_sub(before.saturating_add(*behind)).filter(|&rest| rest > 0);
        *size = rest.ok_or_else(|| b.fault(spec, format!("nothing is left of {x:?}")))?;
    }
    Ok(Built::new(Crop(crops.iter().zip(&shape).map(|((before, _), &size)| (*before, size)).collect()), shape))
}

/// For each axis where it begins and what is left.
struct Crop(Vec<(usize, usize)>);

impl Layer for Crop {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        let mut x = inputs[0].clone();
        for (i, (start, size)) in self.0.iter().enumerate() {
            x = x.narrow(i + 1, *start, *size)?;
        }
        x.contiguous()
    }
}

/// Builds each element several times.
pub(super) fn upsample(b: &mut Build, spec: &LayerSpec, sizes: &[usize], x: &[usize]) -> crate::Result<Built> {
    check_axes(b, spec, sizes.len(), x)?;
    let mut shape = x.to_vec();
    for (size, times) in shape.iter_mut().zip(sizes) {
        *size = size.saturating_mul(*times);
    }
    // Bounded before the places are listed: these are no values of a row, and nobody else counts them.
    if num_values(&shape).is_none_or(|size| size == 0 || size > super::MAX_ROW_VALUES) {
        return Err(b.fault(spec, format!("gives shape {shape:?}")));
    }
    let mut places = Vec::with_capacity(sizes.len());
    for (axis, &times) in sizes.iter().enumerate() {
        let at: Vec<u32> = (0..shape[axis]).map(|i| (i / times) as u32).collect();
        places.push(Tensor::new(at, b.device())?);
    }
    Ok(Built::new(Upsample(places), shape))
}

/// For each axis the element that is at each place.
struct Upsample(Vec<Tensor>);

impl Layer for Upsample {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        let mut x = inputs[0].contiguous()?;
        for (i, places) in self.0.iter().enumerate() {
            x = x.index_select(places, i + 1)?;
        }
        Ok(x)
    }
}
