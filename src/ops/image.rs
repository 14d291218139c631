//! Convolution and pooling over images whose pixels lie one after another, each with its channels side by side.
//!
//! So a feature map is a matrix as every other op here has it, [num_images * height * width, channels], and a convolution
//! is a product over each pixel's window.

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use super::linear::{Activation, Linear, block_rows};
use super::{check_dims, cpu_values, simd};
use crate::{Error, Result};

/// The sides of an image or a feature map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plane {
    pub height: usize,
    pub width: usize,
}

impl Plane {
    /// Pixels of it.
    pub fn num_pixels(self) -> usize {
        self.height * self.width
    }
}

/// A square window that goes over an image in steps, beginning `padding` pixels outside of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Window {
    size: usize,
    stride: usize,
    padding: usize,
}

impl Window {
    /// The sides of the result; at least 1 for an image of at least one pixel, as `padding` is half of `size`.
    fn out(self, plane: Plane) -> Plane {
        let out = |side: usize| (side + 2 * self.padding).saturating_sub(self.size) / self.stride + 1;
        Plane { height: out(plane.height), width: out(plane.width) }
    }

    /// The pixels under the window for one pixel of the result, of all images: line by line, `None` outside.
    fn pixels(self, plane: Plane, at: usize) -> impl Iterator<Item = Option<usize>> {
        let out = self.out(plane);
        let (image, at) = (at / out.num_pixels(), at % out.num_pixels());
        let (row, column) = (at / out.width * self.stride, at % out.width * self.stride);
        let first = image * plane.num_pixels();
        (0..self.size * self.size).map(move |i| {
            // Counted from `padding` ahead, so that nothing is negative.
            let row = (row + i / self.size).checked_sub(self.padding).filter(|row| *row < plane.height)?;
            let column = (column + i % self.size).checked_sub(self.padding).filter(|column| *column < plane.width)?;
            Some(first + row * plane.width + column)
        })
    }

    /// For devices without an op of their own: the rows of `x` under each window, [num_out, size * size * channels].
    /// Outside of an image there is `padding`.
    fn gathered(self, x: &Tensor, num_images: usize, plane: Plane, padding: f64) -> Result<Tensor> {
        let (outside, channels) = x.dims2()?;
        let num_out = num_images * self.out(plane).num_pixels();
        let indices: Vec<u32> = (0..num_out)
            .flat_map(|at| self.pixels(plane, at).map(move |pixel| pixel.unwrap_or(outside) as u32))
            .collect();
        let indices = Tensor::from_vec(indices, num_out * self.size * self.size, x.device())?;
        let row = Tensor::full(padding as f32, (1, channels), x.device())?;
        Ok(Tensor::cat(&[x, &row], 0)?
            .index_select(&indices, 0)?
            .reshape((num_out, self.size * self.size * channels))?)
    }
}

/// `activation(conv(x) + bias)` over each image, zeros beyond its edges, half a window of them.
pub struct ImageConv {
    /// [out, size * size * in]
    linear: Linear,
    window: Window,
    in_features: usize,
}

impl ImageConv {
    /// Shapes: `weight` [out, in, size, size], size odd; `bias` [out].
    /// Errors: [`Error::Shape`] if they are not, or for a stride of 0.
    pub fn new(weight: &Tensor, bias: Tensor, stride: usize, activation: Activation) -> Result<Self> {
        let bad = || {
            let (expected, got) = (
                "[out, in, size, size], size odd, stride from 1".to_string(),
                format!("{:?} by {stride}", weight.dims()),
            );
            Error::Shape { op: "image_conv", operand: "weight", expected, got }
        };
        let &[out, in_features, size, width] = weight.dims() else { return Err(bad()) };
        if size != width || size.is_multiple_of(2) || stride == 0 {
            return Err(bad());
        }
        // Channels innermost, as a pixel has them.
        let weight = weight.permute((0, 2, 3, 1))?.contiguous()?.reshape((out, size * size * in_features))?;
        let window = Window { size, stride, padding: size / 2 };
        Ok(Self { linear: Linear::new(weight, Some(bias), activation)?, window, in_features })
    }

    /// The sides of the result for images of these sides.
    pub fn out(&self, plane: Plane) -> Plane {
        self.window.out(plane)
    }

    /// Channels of the result.
    pub fn out_features(&self) -> usize {
        self.linear.out_features()
    }

    /// Shapes: `x` [num_images * height * width, in]. Returns [num_images * out height * out width, out].
    /// An image's result does not depend on the others; on the CPU it is equal bit by bit.
    ///
    /// Errors: [`Error::Shape`] if `x` is of another shape.
    pub fn forward(&self, x: &Tensor, num_images: usize, plane: Plane) -> Result<Tensor> {
        check_dims("image_conv", "x", x, &[num_images * plane.num_pixels(), self.in_features])?;
        if self.window.size == 1 && self.window.stride == 1 {
            return self.linear.forward(x);
        }
        if x.device().is_cpu() {
            return Ok(x.contiguous()?.apply_op1_no_bwd(&CpuConv { conv: self, num_images, plane })?);
        }
        self.linear.forward(&self.window.gathered(x, num_images, plane, 0.0)?)
    }
}

struct CpuConv<'a> {
    conv: &'a ImageConv,
    num_images: usize,
    plane: Plane,
}

impl CustomOp1 for CpuConv<'_> {
    fn name(&self) -> &'static str {
        "image_conv"
    }

    /// A block of windows is gathered and multiplied while it is in the second-level cache: all windows of a batch at
    /// once would be nine times the image, out to memory and back.
    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = cpu_values(storage, layout)?;
        let ImageConv { linear, window, in_features: width } = self.conv;
        let rows = self.num_images * window.out(self.plane).num_pixels();
        let out_features = linear.out_features();
        let values = simd::fill_rows(rows, out_features, block_rows(rows), |first, out| {
            let num_rows = out.len() / out_features;
            let mut windows = vec![0.0; num_rows * linear.in_features()];
            for (at, line) in (first..).zip(windows.chunks_exact_mut(linear.in_features())) {
                for (pixel, values) in window.pixels(self.plane, at).zip(line.chunks_exact_mut(*width)) {
                    if let Some(pixel) = pixel {
                        values.copy_from_slice(&x[pixel * width..][..*width]);
                    }
                }
            }
            linear.rows_on_cpu(&windows, out);
        });
        Ok((CpuStorage::F32(values), (rows, out_features).into()))
    }
}

/// The largest value of each channel under a window; what lies beyond the edges counts for nothing.
pub struct ImageMaxPool {
    window: Window,
}

impl ImageMaxPool {
    /// Errors: [`Error::Shape`] for an even size or a stride of 0.
    pub fn new(size: usize, stride: usize) -> Result<Self> {
        if size.is_multiple_of(2) || stride == 0 {
            let (expected, got) = ("an odd size, a stride from 1".to_string(), format!("{size} by {stride}"));
            return Err(Error::Shape { op: "image_max_pool", operand: "size", expected, got });
        }
        Ok(Self { window: Window { size, stride, padding: size / 2 } })
    }

    /// The sides of the result for images of these sides.
    pub fn out(&self, plane: Plane) -> Plane {
        self.window.out(plane)
    }

    /// Shapes: `x` [num_images * height * width, channels]. Returns [num_images * out height * out width, channels].
    ///
    /// Errors: [`Error::Shape`] if `x` is of another shape.
    pub fn forward(&self, x: &Tensor, num_images: usize, plane: Plane) -> Result<Tensor> {
        let channels = x.dims().get(1).copied().unwrap_or(0);
        check_dims("image_max_pool", "x", x, &[num_images * plane.num_pixels(), channels])?;
        if x.device().is_cpu() {
            return Ok(x.contiguous()?.apply_op1_no_bwd(&CpuMaxPool { window: self.window, num_images, plane })?);
        }
        let windows = self.window.gathered(x, num_images, plane, f64::NEG_INFINITY)?;
        let num_out = windows.dim(0)?;
        Ok(windows.reshape((num_out, self.window.size * self.window.size, channels))?.max(1)?)
    }
}

struct CpuMaxPool {
    window: Window,
    num_images: usize,
    plane: Plane,
}

impl CustomOp1 for CpuMaxPool {
    fn name(&self) -> &'static str {
        "image_max_pool"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x: &[f32] = cpu_values(storage, layout)?;
        let channels = layout.dims()[1];
        let rows = self.num_images * self.window.out(self.plane).num_pixels();
        let values = simd::fill_rows(rows, channels, block_rows(rows), |first, out| {
            for (at, out) in (first..).zip(out.chunks_exact_mut(channels)) {
                out.fill(f32::NEG_INFINITY);
                for pixel in self.window.pixels(self.plane, at).flatten() {
                    for (out, &value) in out.iter_mut().zip(&x[pixel * channels..]) {
                        // `f32::max` would drop NaN, and a broken result must show.
                        *out = if value > *out || value.is_nan() { value } else { *out };
                    }
                }
            }
        });
        Ok((CpuStorage::F32(values), (rows, channels).into()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::testing::{assert_close, noise, values};
    use super::*;

    /// [num_images, channels, height, width] and back.
    fn planes(x: &Tensor, num_images: usize, plane: Plane) -> Tensor {
        let x = x.reshape((num_images, plane.height, plane.width, x.dim(1).unwrap())).unwrap();
        x.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap()
    }

    fn pixels(x: &Tensor) -> Tensor {
        let (images, channels, height, width) = x.dims4().unwrap();
        let x = x.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap();
        x.reshape((images * height * width, channels)).unwrap()
    }

    const SIZES: [Plane; 5] = [
        Plane { height: 1, width: 1 },
        Plane { height: 2, width: 7 },
        Plane { height: 9, width: 8 },
        Plane { height: 17, width: 3 },
        Plane { height: 31, width: 33 },
    ];

    #[test]
    fn worked_numbers() {
        // Of each pixel of [[1, 2], [3, 4]]: its right neighbour tenfold and its lower one hundredfold.
        let weight = Tensor::new(&[[[[0f32, 0., 0.], [0., 1., 10.], [0., 100., 0.]]]], &Device::Cpu).unwrap();
        let bias = Tensor::new(&[0.5f32], &Device::Cpu).unwrap();
        let x = Tensor::new(&[[1f32], [2.], [3.], [4.]], &Device::Cpu).unwrap();
        let plane = Plane { height: 2, width: 2 };
        let conv = ImageConv::new(&weight, bias.clone(), 1, Activation::None).unwrap();
        assert_eq!(values(&conv.forward(&x, 1, plane).unwrap()), [321.5, 402.5, 43.5, 4.5]);
        let conv = ImageConv::new(&weight, bias, 2, Activation::None).unwrap();
        assert_eq!(values(&conv.forward(&x, 1, plane).unwrap()), [321.5]);
        let negative = (x * -1.0).unwrap();
        let pool = ImageMaxPool::new(3, 2).unwrap();
        assert_eq!(values(&pool.forward(&negative, 1, plane).unwrap()), [-1.0], "zeros beyond the edge do not count");
    }

    #[test]
    fn equals_candles_convolution_and_its_own_form_for_other_devices() {
        for (plane, (size, stride)) in
            SIZES.into_iter().flat_map(|p| [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)].map(|w| (p, w)))
        {
            let (weight, bias) = (noise(1, &[5, 4, size, size]), noise(2, &[5]));
            let x = noise(3, &[2 * plane.num_pixels(), 4]);
            let conv = ImageConv::new(&weight, bias.clone(), stride, Activation::Relu).unwrap();
            let expected = planes(&x, 2, plane).conv2d(&weight, size / 2, stride, 1, 1).unwrap();
            let expected = expected.broadcast_add(&bias.reshape((1, 5, 1, 1)).unwrap()).unwrap().relu().unwrap();
            let what = format!("{plane:?}, {size} by {stride}");
            let got = conv.forward(&x, 2, plane).unwrap();
            assert_close(&got, &pixels(&expected), 5e-6, &what);
            assert_eq!(conv.out(plane).num_pixels() * 2, got.dim(0).unwrap());
            let gathered = conv.linear.forward(&conv.window.gathered(&x, 2, plane, 0.0).unwrap()).unwrap();
            assert_eq!(values(&got), values(&gathered), "{what}");
        }
    }

    #[test]
    fn the_largest_value_equals_candles() {
        // Candle's pooling knows no padding: a border of very small values stands in.
        for plane in SIZES {
            let x = noise(4, &[3 * plane.num_pixels(), 6]);
            let pool = ImageMaxPool::new(3, 2).unwrap();
            let wide = (planes(&x, 3, plane) + 10.0)
                .unwrap()
                .pad_with_zeros(2, 1, 1)
                .unwrap()
                .pad_with_zeros(3, 1, 1)
                .unwrap();
            let expected = (wide.max_pool2d_with_stride(3, 2).unwrap() - 10.0).unwrap();
            let got = pool.forward(&x, 3, plane).unwrap();
            assert_close(&got, &pixels(&expected), 2e-6, &format!("{plane:?}"));
            let gathered = pool.window.gathered(&x, 3, plane, f64::NEG_INFINITY).unwrap();
            let gathered = gathered.reshape((gathered.dim(0).unwrap(), 9, 6)).unwrap().max(1).unwrap();
            assert_eq!(values(&got), values(&gathered));
        }
    }

    #[test]
    fn shapes_are_checked_by_name() {
        let error = |r: Result<ImageConv>| r.err().unwrap().to_string();
        for (shape, stride) in [(&[4, 4, 2, 2][..], 1), (&[4, 4, 3, 1], 1), (&[4, 4, 3], 1), (&[4, 4, 3, 3], 0)] {
            assert!(
                error(ImageConv::new(&noise(1, shape), noise(1, &[4]), stride, Activation::None)).contains("weight")
            );
        }
        assert!(error(ImageConv::new(&noise(1, &[4, 4, 3, 3]), noise(1, &[5]), 1, Activation::None)).contains("bias"));
        assert!(ImageMaxPool::new(2, 2).is_err() && ImageMaxPool::new(3, 0).is_err());
        let conv = ImageConv::new(&noise(1, &[4, 4, 3, 3]), noise(1, &[4]), 1, Activation::None).unwrap();
        let error = conv.forward(&noise(1, &[5, 4]), 1, Plane { height: 2, width: 2 }).unwrap_err().to_string();
        assert!(error.contains("x: expected [4, 4]"), "{error}");
        let error = ImageMaxPool::new(3, 2).unwrap().forward(&noise(1, &[5, 4]), 1, Plane { height: 2, width: 2 });
        assert!(error.unwrap_err().to_string().contains("x: expected [4, 4]"));
    }
}
