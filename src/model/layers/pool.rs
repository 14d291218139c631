//! The greatest or the mean of what a window sees, or of all there is.

use candle_core::{Result, Tensor};

use super::build::Build;
use super::list::{LayerSpec, Padding, Pool};
use super::window::{Along, Window};
use super::{Built, Layer};

/// What is made of many values.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    Greatest,
    Mean,
}

/// Builds a pooling over the first `num_axes` of a row's axes.
pub(super) fn pool(
    b: &mut Build,
    spec: &LayerSpec,
    words: &Pool,
    num_axes: usize,
    of: Of,
    x: &[usize],
) -> crate::Result<Built> {
    let strides = if words.strides.is_empty() { &words.size } else { &words.strides };
    let are_right =
        |numbers: &[usize]| numbers.len() == num_axes && numbers.iter().all(|&n| (1..=1 << 16).contains(&n));
    if x.len() != num_axes + 1 || !are_right(&words.size) || !are_right(strides) {
        let reason = format!("takes rows of {} axes, and as size and strides {num_axes} numbers", num_axes + 1);
        return Err(b.fault(spec, format!("{reason} from 1 to 65536; the row is {x:?}")));
    }
    if words.padding == Padding::Causal {
        return Err(b.fault(spec, "padding is `valid` or `same`".to_string()));
    }
    let along: Vec<Along> =
        (0..num_axes).map(|i| Along { len: x[i], size: words.size[i], stride: strides[i], dilation: 1 }).collect();
    let window = Window::new(&along, words.padding, b.device())?.map_err(|reason| b.fault(spec, reason))?;
    let counts = match of {
        Of::Greatest => None,
        Of::Mean => {
            // Padding is no element: a mean is of what is there.
            let ones = [&[1], &x[..num_axes], &[1]].concat();
            let ones = Tensor::ones(ones, candle_core::DType::F32, b.device())?;
            Some(sum(&window.taps(&window.pad_with_zeros(&ones)?)?)?)
        }
    };
    let shape = [window.stops(), vec![x[num_axes]]].concat();
    Ok(Built::new(Pooling { window, counts }, shape))
}

fn sum(taps: &[Tensor]) -> Result<Tensor> {
    let mut sum = taps[0].clone();
    for tap in &taps[1..] {
        sum = sum.add(tap)?;
    }
    Ok(sum)
}

struct Pooling {
    window: Window,
    /// [1, stops..., 1] elements that are seen, for a mean; `None` for the greatest.
    counts: Option<Tensor>,
}

impl Layer for Pooling {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        if let Some(counts) = &self.counts {
            return sum(&self.window.taps(&self.window.pad_with_zeros(inputs[0])?)?)?.broadcast_div(counts);
        }
        let taps = self.window.taps(&self.window.pad_with_edges(inputs[0])?)?;
        let mut greatest = taps[0].contiguous()?;
        for tap in &taps[1..] {
            greatest = greatest.maximum(tap)?;
        }
        Ok(greatest)
    }
}

/// Builds a pooling of all axes but the last.
pub(super) fn global(b: &mut Build, spec: &LayerSpec, of: Of, keepdims: bool, x: &[usize]) -> crate::Result<Built> {
    let Some((&channels, front)) = x.split_last().filter(|(_, front)| !front.is_empty()) else {
        return Err(b.fault(spec, format!("takes rows of two axes or more, got {x:?}")));
    };
    let shape = if keepdims { [vec![1; front.len()], vec![channels]].concat() } else { vec![channels] };
    Ok(Built::new(Global { of, shape: shape.clone() }, shape))
}

struct Global {
    of: Of,
    /// Of a row that comes out.
    shape: Vec<usize>,
}

impl Layer for Global {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        let x = inputs[0];
        let (n, channels) = (x.dim(0)?, x.dim(x.rank() - 1)?);
        let flat = x.reshape((n, x.elem_count() / (n * channels).max(1), channels))?;
        let y = match self.of {
            Of::Greatest => flat.max(1)?,
            Of::Mean => flat.mean(1)?,
        };
        y.reshape([&[n], self.shape.as_slice()].concat())
    }
}
