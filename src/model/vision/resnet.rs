//! ResNet: stages of residual layers of convolutions.
//!
//! Source: He et al. 2015, section 3.3 and figure 5; the norms are those of Ioffe and Szegedy 2015, in their form for
//! inference, which a convolution takes into its weights.

use candle_core::{Device, Tensor};

use super::config::ResNetConfig;
use super::patches;
use super::tower::Reader;
use crate::Result;
use crate::model::names::prefix;
use crate::model::weights::Weights;
use crate::ops::CuSeqlens;
use crate::ops::image::{ImageConv, ImageMaxPool, Plane};
use crate::ops::linear::Activation;

/// What is added to a variance: `transformers` has no key for it.
const EPS: f64 = 1e-5;

/// By how much a bottleneck's middle is narrower.
const REDUCTION: usize = 4;

/// A ResNet without its head, on one device.
pub(super) struct ResNet {
    stem: ImageConv,
    pool: ImageMaxPool,
    layers: Vec<Layer>,
    activation: Activation,
    image: Plane,
    device: Device,
}

struct Layer {
    convs: Vec<ImageConv>,
    shortcut: Option<ImageConv>,
}

impl ResNet {
    /// Reads all tensors; a head is left alone. `image` is what its images are.
    ///
    /// Errors: [`crate::Error::Tensor`] for one that is missing or does not have the config's shape.
    pub fn load(weights: &Weights, config: &ResNetConfig, image: Plane) -> Result<Self> {
        let reader = Reader { weights, prefix: prefix("embedder.embedder.convolution.weight", weights)? };
        let conv = |name: &str, out, input, size, stride, activation| {
            conv(&reader, name, [out, input, size], stride, activation)
        };
        let ResNetConfig { embedding_size, activation, .. } = *config;
        let stem = conv("embedder.embedder", embedding_size, 3, 7, 2, activation)?;
        let device = reader.get("embedder.embedder.normalization.weight", &[embedding_size])?.device().clone();
        let mut layers = Vec::new();
        let mut input = embedding_size;
        for (stage, (&out, &depth)) in config.hidden_sizes.iter().zip(&config.depths).enumerate() {
            for i in 0..depth {
                let is_halved = i == 0 && (stage > 0 || config.downsample_in_first_stage);
                let stride = if is_halved { 2 } else { 1 };
                let name = |part: String| format!("encoder.stages.{stage}.layers.{i}.{part}");
                let part = |n: usize| name(format!("layer.{n}"));
                let convs = if config.is_bottleneck {
                    let narrow = out / REDUCTION;
                    let (first, second) = if config.downsample_in_bottleneck { (stride, 1) } else { (1, stride) };
                    // Inside of a bottleneck it is ReLU whatever the config says of the rest.
                    vec![
                        conv(&part(0), narrow, input, 1, first, Activation::Relu)?,
                        conv(&part(1), narrow, narrow, 3, second, Activation::Relu)?,
                        conv(&part(2), out, narrow, 1, 1, Activation::None)?,
                    ]
                } else {
                    vec![
                        conv(&part(0), out, input, 3, stride, Activation::Relu)?,
                        conv(&part(1), out, out, 3, 1, Activation::None)?,
                    ]
                };
                let shortcut = match input != out || stride != 1 {
                    true => Some(conv(&name("shortcut".to_string()), out, input, 1, stride, Activation::None)?),
                    false => None,
                };
                layers.push(Layer { convs, shortcut });
                input = out;
            }
        }
        Ok(Self { stem, pool: ImageMaxPool::new(3, 2)?, layers, activation, image, device })
    }

    /// The last feature map, a row a pixel.
    ///
    /// Shapes: `images` [3, height, width] each. Returns [num_images * out height * out width, hidden_size] and the images'
    /// bounds.
    /// Errors: [`crate::Error::Shape`] for images of another size.
    pub fn forward(&self, images: &[&[f32]]) -> Result<(Tensor, CuSeqlens)> {
        let num_images = images.len();
        let mut plane = self.image;
        let mut hidden = self.stem.forward(&patches::pixels(images, plane, &self.device)?, num_images, plane)?;
        plane = self.stem.out(plane);
        hidden = self.pool.forward(&hidden, num_images, plane)?;
        plane = self.pool.out(plane);
        for layer in &self.layers {
            (hidden, plane) = layer.forward(&hidden, num_images, plane, self.activation)?;
        }
        let bounds: Vec<u32> = (0..=num_images).map(|i| (i * plane.num_pixels()) as u32).collect();
        Ok((hidden, CuSeqlens::new(&bounds, &self.device)?))
    }
}

impl Layer {
    fn forward(
        &self,
        hidden: &Tensor,
        num_images: usize,
        plane: Plane,
        activation: Activation,
    ) -> Result<(Tensor, Plane)> {
        let (mut x, mut at) = (hidden.clone(), plane);
        for conv in &self.convs {
            x = conv.forward(&x, num_images, at)?;
            at = conv.out(at);
        }
        let sum = match &self.shortcut {
            Some(shortcut) => (x + shortcut.forward(hidden, num_images, plane)?)?,
            None => (x + hidden)?,
        };
        Ok((activate(&sum, activation)?, at))
    }
}

/// An activation of a sum, which no product comes before.
fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    Ok(match activation {
        Activation::None => x.clone(),
        Activation::Relu => x.relu()?,
        Activation::Gelu => x.gelu_erf()?,
        Activation::GeluTanh => x.gelu()?,
        Activation::Silu => x.silu()?,
        Activation::Tanh => x.tanh()?,
    })
}

/// A convolution with the norm behind it: `gamma (w x - mean) / sqrt(variance + eps) + beta` is another convolution.
///
/// `shape`: channels of the result and of the input, and the window's side.
fn conv(reader: &Reader, name: &str, shape: [usize; 3], stride: usize, activation: Activation) -> Result<ImageConv> {
    let [out, input, size] = shape;
    let weight = reader.get(&format!("{name}.convolution.weight"), &[out, input, size, size])?;
    let norm = |part: &str| reader.get(&format!("{name}.normalization.{part}"), &[out]);
    let scale = (norm("weight")? / (norm("running_var")? + EPS)?.sqrt()?)?;
    let bias = (norm("bias")? - (norm("running_mean")? * &scale)?)?;
    ImageConv::new(&weight.broadcast_mul(&scale.reshape((out, 1, 1, 1))?)?, bias, stride, activation)
}
