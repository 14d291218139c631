//! Models of images, and of images and texts: ViT, ResNet, CLIP.
//!
//! Each gives hidden states and bounds as a text's encoder does, and the heads of texts stand on them: a class of an image
//! is what [`super::head::Head`] makes of the vector of the whole.

mod backend;
mod clip;
pub mod config;
pub(super) mod load;
mod patches;
mod resnet;
mod tower;
mod vit;

use candle_core::Tensor;

use super::weights::Weights;
use crate::ops::CuSeqlens;
use crate::ops::image::Plane;
use crate::{Error, Result};
use config::VisionConfig;

/// One input of a batch.
#[derive(Debug, Clone, Copy)]
pub enum Item<'a> {
    /// [3, height, width]
    Image(&'a [f32]),
    /// [seq_len], not empty.
    Text(&'a [u32]),
}

/// A model of images without its head, on one device.
pub struct VisionTrunk(Kind);

enum Kind {
    Vit(vit::Vit),
    ResNet(resnet::ResNet),
    Clip(Box<clip::Clip>),
}

impl VisionTrunk {
    /// Reads all tensors but the head's. `image` is what comes out of the model's image processor.
    ///
    /// Blocks: reads the weights.
    /// Errors: [`Error::Tensor`] for one that is missing or does not have the config's shape.
    pub fn load(weights: &Weights, config: &VisionConfig, image: Plane) -> Result<Self> {
        Ok(Self(match config {
            VisionConfig::Vit(config) => Kind::Vit(vit::Vit::load(weights, config)?),
            VisionConfig::ResNet(config) => Kind::ResNet(resnet::ResNet::load(weights, config, image)?),
            VisionConfig::Clip(config) => Kind::Clip(Box::new(clip::Clip::load(weights, config)?)),
        }))
    }

    /// The hidden states of each input and the inputs' bounds: of ViT one row for the whole and one a patch, of ResNet one
    /// row a pixel of the last feature map, of CLIP one row, in the space that texts and images share.
    ///
    /// Shapes: `items` [num_seqs], not empty. Returns [total_rows, hidden_size] f32, the inputs in their order.
    /// Errors: [`Error::Shape`] for an image of another size or a text to a model without texts.
    pub fn forward(&self, items: &[Item]) -> Result<(Tensor, CuSeqlens)> {
        match &self.0 {
            Kind::Vit(vit) => vit.forward(&images(items)?),
            Kind::ResNet(resnet) => resnet.forward(&images(items)?),
            Kind::Clip(clip) => mixed(clip, items),
        }
    }
}

fn images<'a>(items: &[Item<'a>]) -> Result<Vec<&'a [f32]>> {
    let image = |item: &Item<'a>| match *item {
        Item::Image(values) => Ok(values),
        Item::Text(_) => {
            let (expected, got) = ("images".to_string(), "a text".to_string());
            Err(Error::Shape { op: "vision", operand: "inputs", expected, got })
        }
    };
    items.iter().map(image).collect()
}

/// Each tower computes its part of the batch, and the rows go back into their order.
fn mixed(clip: &clip::Clip, items: &[Item]) -> Result<(Tensor, CuSeqlens)> {
    let (mut images, mut texts) = (Vec::new(), Vec::new());
    for item in items {
        match item {
            Item::Image(values) => images.push(*values),
            Item::Text(ids) => texts.push(*ids),
        }
    }
    let rows = match (images.is_empty(), texts.is_empty()) {
        (_, true) => clip.of_images(&images)?,
        (true, false) => clip.of_texts(&texts)?,
        (false, false) => {
            let rows = Tensor::cat(&[clip.of_images(&images)?, clip.of_texts(&texts)?], 0)?;
            let (mut image, mut text) = (0..images.len() as u32, images.len() as u32..items.len() as u32);
            let order: Vec<u32> = items
                .iter()
                .filter_map(|item| match item {
                    Item::Image(_) => image.next(),
                    Item::Text(_) => text.next(),
                })
                .collect();
            rows.index_select(&Tensor::new(order, rows.device())?, 0)?
        }
    };
    let bounds: Vec<u32> = (0..=items.len() as u32).collect();
    let bounds = CuSeqlens::new(&bounds, rows.device())?;
    Ok((rows, bounds))
}
