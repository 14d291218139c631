//! Windows that move over the axes of a row, but the last, which has the channels.

use candle_core::{Device, Result, Tensor};

use super::list::Padding;

/// Where a window stands along one axis.
struct Axis {
    /// Elements added before and behind.
    pads: (usize, usize),
    /// For each place within the window the elements that it sees, one a stop: [stops] u32, or where they begin if they
    /// follow each other.
    taps: Vec<Tap>,
    stops: usize,
    size: usize,
}

enum Tap {
    From(usize),
    At(Tensor),
}

/// A window of one or several axes.
pub(super) struct Window {
    axes: Vec<Axis>,
}

/// One axis of a window in words. `size`, `stride` and `dilation` are at least 1.
pub(super) struct Along {
    pub len: usize,
    pub size: usize,
    pub stride: usize,
    pub dilation: usize,
}

impl Window {
    /// Works out where a window stops.
    ///
    /// Errors: what is wrong, in words, for a window that is larger than its axis.
    /// Source: TensorFlow's rules of padding, as Keras documents them.
    pub fn new(along: &[Along], padding: Padding, device: &Device) -> crate::Result<std::result::Result<Self, String>> {
        let mut axes = Vec::with_capacity(along.len());
        for axis in along {
            let Along { len, size, stride, dilation } = *axis;
            let too_large = || format!("a window of {size} (dilation {dilation}) does not fit into {len} elements");
            let Some(reach) = (size - 1).checked_mul(dilation).map(|reach| reach + 1) else {
                return Ok(Err(too_large()));
            };
            let pads = match padding {
                Padding::Valid => (0, 0),
                Padding::Causal => (reach - 1, 0),
                Padding::Same => {
                    let total = ((len.div_ceil(stride) - 1) * stride + reach).saturating_sub(len);
                    (total / 2, total - total / 2)
                }
            };
            // A window far beyond its axis sees padding alone; nobody means it, and its memory would be real.
            if reach > len + pads.0 + pads.1 || reach > 2 * len + 1024 {
                return Ok(Err(too_large()));
            }
            let stops = (len + pads.0 + pads.1 - reach) / stride + 1;
            let mut taps = Vec::with_capacity(size);
            for i in 0..size {
                taps.push(if stride == 1 {
                    Tap::From(i * dilation)
                } else {
                    let at: Vec<u32> = (0..stops).map(|stop| (stop * stride + i * dilation) as u32).collect();
                    Tap::At(Tensor::new(at, device)?)
                });
            }
            axes.push(Axis { pads, taps, stops, size });
        }
        Ok(Ok(Self { axes }))
    }

    /// How many stops there are along each axis.
    pub fn stops(&self) -> Vec<usize> {
        self.axes.iter().map(|axis| axis.stops).collect()
    }

    /// How many elements the window sees at a stop.
    pub fn size(&self) -> usize {
        self.axes.iter().map(|axis| axis.size).product()
    }

    /// The data with zeros around it.
    pub fn pad_with_zeros(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for (i, axis) in self.axes.iter().enumerate() {
            x = x.pad_with_zeros(i + 1, axis.pads.0, axis.pads.1)?;
        }
        Ok(x)
    }

    /// The data with its edges repeated: the greatest of a window stays the greatest, since each window sees an edge where
    /// it sees what lies behind.
    pub fn pad_with_edges(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for (i, axis) in self.axes.iter().enumerate() {
            x = x.pad_with_same(i + 1, axis.pads.0, axis.pads.1)?;
        }
        Ok(x)
    }

    /// For each place within the window, slowest axis first, what it sees at all stops.
    ///
    /// Shapes: `x` [n, padded axes..., channels]. Returns [n, stops..., channels] each.
    pub fn taps(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let mut taps = vec![x.clone()];
        for (i, axis) in self.axes.iter().enumerate() {
            let mut next = Vec::with_capacity(taps.len() * axis.size);
            for x in &taps {
                for tap in &axis.taps {
                    next.push(match tap {
                        Tap::From(start) => x.narrow(i + 1, *start, axis.stops)?,
                        Tap::At(places) => x.contiguous()?.index_select(places, i + 1)?,
                    });
                }
            }
            taps = next;
        }
        Ok(taps)
    }
}
