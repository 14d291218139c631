//! Convolutions: what a window sees, as rows of a matrix, times the kernel.

use candle_core::{D, Result, Tensor};

use super::build::Build;
use super::list::{Activation, Conv, LayerSpec, Padding};
use super::window::{Along, Window};
use super::{Built, Layer};

/// The window of a convolution of so many axes, over rows of shape `x`. `kernel` begins with the window's sizes.
fn window(b: &Build, spec: &LayerSpec, words: &Conv, kernel: &[usize], x: &[usize]) -> crate::Result<Window> {
    let num_axes = x.len() - 1;
    let numbers = |what: &str, numbers: &[usize]| match numbers {
        [] => Ok(vec![1; num_axes]),
        some if some.len() == num_axes && some.iter().all(|&n| (1..=1 << 16).contains(&n)) => Ok(some.to_vec()),
        _ => Err(b.fault(spec, format!("{what} needs {num_axes} numbers from 1 to 65536, got {numbers:?}"))),
    };
    let (strides, dilation) = (numbers("strides", &words.strides)?, numbers("dilation", &words.dilation)?);
    if words.padding == Padding::Causal && num_axes != 1 {
        return Err(b.fault(spec, "padding `causal` is for one axis".to_string()));
    }
    let along: Vec<Along> = (0..num_axes)
        .map(|i| Along { len: x[i], size: kernel[i], stride: strides[i], dilation: dilation[i] })
        .collect();
    Window::new(&along, words.padding, b.device())?.map_err(|reason| b.fault(spec, reason))
}

fn check_rank(b: &Build, spec: &LayerSpec, num_axes: usize, x: &[usize]) -> crate::Result<()> {
    if x.len() == num_axes + 1 {
        return Ok(());
    }
    Err(b.fault(spec, format!("takes rows of {} axes, the last with the channels, got {x:?}", num_axes + 1)))
}

/// Builds a convolution over the first `num_axes` of a row's axes.
pub(super) fn conv(
    b: &mut Build,
    spec: &LayerSpec,
    words: &Conv,
    num_axes: usize,
    x: &[usize],
) -> crate::Result<Built> {
    check_rank(b, spec, num_axes, x)?;
    let (channels, groups) = (x[num_axes], words.groups);
    let mut shape = b.shape(spec, "kernel", num_axes + 2)?;
    let filters = shape[num_axes + 1];
    if groups == 0 || channels % groups != 0 || filters % groups != 0 {
        let reason = format!("{groups} groups do not divide {channels} channels and {filters} filters");
        return Err(b.fault(spec, reason));
    }
    let window = window(b, spec, words, &shape, x)?;
    shape[num_axes] = channels / groups;
    let kernel = b.get(spec, "kernel", &shape)?.reshape((window.size() * channels / groups, filters))?;
    let kernels = (0..groups)
        .map(|group| kernel.narrow(1, group * filters / groups, filters / groups)?.contiguous())
        .collect::<Result<Vec<_>>>()?;
    let bias = b.get_if(words.use_bias, spec, "bias", &[filters])?;
    let scratch = window.stops().iter().product::<usize>().saturating_mul(window.size()).saturating_mul(channels);
    let shape = [window.stops(), vec![filters]].concat();
    let conv = Convolution { window, kernels, bias, activation: words.activation };
    Ok(Built::new(conv, shape).with_scratch(scratch))
}

struct Convolution {
    window: Window,
    /// One a group: [window * channels of the group, filters of the group].
    kernels: Vec<Tensor>,
    /// [filters].
    bias: Option<Tensor>,
    activation: Activation,
}

impl Layer for Convolution {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        let taps = self.window.taps(&self.window.pad_with_zeros(inputs[0])?)?;
        let mut shape = taps[0].dims().to_vec();
        let channels = shape.pop().unwrap_or(1) / self.kernels.len();
        let mut groups = Vec::with_capacity(self.kernels.len());
        for (group, kernel) in self.kernels.iter().enumerate() {
            let seen = taps.iter().map(|tap| tap.narrow(D::Minus1, group * channels, channels));
            let seen = Tensor::cat(&seen.collect::<Result<Vec<_>>>()?, D::Minus1)?;
            let rows = seen.elem_count() / kernel.dim(0)?.max(1);
            groups.push(seen.reshape((rows, kernel.dim(0)?))?.matmul(kernel)?);
        }
        let mut y = if groups.len() == 1 { groups.remove(0) } else { Tensor::cat(&groups, 1)? };
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        shape.push(y.dim(1)?);
        self.activation.of(&y.reshape(shape)?)
    }
}

/// Builds a convolution of each channel by itself.
pub(super) fn depthwise(
    b: &mut Build,
    spec: &LayerSpec,
    words: &Conv,
    num_axes: usize,
    x: &[usize],
) -> crate::Result<Built> {
    check_rank(b, spec, num_axes, x)?;
    if words.groups != 1 {
        return Err(b.fault(spec, "each channel is a group: `groups` is not for it".to_string()));
    }
    let channels = x[num_axes];
    let mut shape = b.shape(spec, "kernel", num_axes + 2)?;
    let multiplier = shape[num_axes + 1];
    let window = window(b, spec, words, &shape, x)?;
    shape[num_axes] = channels;
    let kernel = b.get(spec, "kernel", &shape)?.reshape((window.size(), channels, multiplier))?;
    let kernels = (0..window.size()).map(|i| kernel.get(i)?.contiguous()).collect::<Result<Vec<_>>>()?;
    let filters = channels.saturating_mul(multiplier);
    let bias = b.get_if(words.use_bias, spec, "bias", &[filters])?;
    let shape = [window.stops(), vec![filters]].concat();
    let scratch = shape.iter().fold(2usize, |product, &size| product.saturating_mul(size));
    Ok(Built::new(Depthwise { window, kernels, bias, activation: words.activation }, shape).with_scratch(scratch))
}

struct Depthwise {
    window: Window,
    /// One a place within the window: [channels, multiplier].
    kernels: Vec<Tensor>,
    /// [channels * multiplier].
    bias: Option<Tensor>,
    activation: Activation,
}

impl Layer for Depthwise {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        let taps = self.window.taps(&self.window.pad_with_zeros(inputs[0])?)?;
        let mut shape = taps[0].dims().to_vec();
        let mut sum: Option<Tensor> = None;
        for (tap, kernel) in taps.iter().zip(&self.kernels) {
            let product = tap.unsqueeze(D::Minus1)?.broadcast_mul(kernel)?;
            sum = Some(match sum {
                Some(sum) => sum.add(&product)?,
                None => product,
            });
        }
        let sum = sum.ok_or_else(|| candle_core::Error::Msg("a window without places".to_string()))?;
        if let (Some(last), Some(kernel)) = (shape.last_mut(), self.kernels.first()) {
            *last = kernel.elem_count();
        }
        let mut y = sum.reshape(shape)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        self.activation.of(&y)
    }
}
