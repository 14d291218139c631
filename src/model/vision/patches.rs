//! From a host's pixels to the rows that models multiply.

use candle_core::{Device, Tensor};

use super::config::PatchConfig;
use crate::ops::CuSeqlens;
use crate::ops::image::Plane;
use crate::ops::linear::Linear;
use crate::{Error, Result};

/// Refuses images that are not [3, height, width].
pub(super) fn check(images: &[&[f32]], image: Plane) -> Result<()> {
    let expected = 3 * image.num_pixels();
    match images.iter().find(|values| values.len() != expected) {
        None => Ok(()),
        Some(other) => {
            let expected = format!("3 x {} x {} of each image", image.height, image.width);
            Err(Error::Shape { op: "vision", operand: "values", expected, got: other.len().to_string() })
        }
    }
}

/// Each pixel's channels side by side. Shapes: `images` [3, height, width] each. Returns [num_images * height * width, 3].
pub(super) fn pixels(images: &[&[f32]], image: Plane, device: &Device) -> Result<Tensor> {
    check(images, image)?;
    let num_pixels = image.num_pixels();
    let mut values = Vec::with_capacity(images.len() * num_pixels * 3);
    for planes in images {
        values.extend((0..num_pixels).flat_map(|i| [planes[i], planes[num_pixels + i], planes[2 * num_pixels + i]]));
    }
    Ok(Tensor::from_vec(values, (images.len() * num_pixels, 3), device)?)
}

/// What stands before the layers of a tower of images.
pub(super) struct PatchEmbedding {
    pub patches: PatchConfig,
    /// [hidden_size, 3 * height * width] of a patch.
    pub projection: Linear,
    /// The token that stands for the whole: [1, hidden_size].
    pub class: Tensor,
    /// [num_tokens, hidden_size], the row of `class` first.
    pub position: Tensor,
}

impl PatchEmbedding {
    /// One row a token, and where each image begins.
    ///
    /// Shapes: `images` [3, height, width] each. Returns [num_images * num_tokens, hidden_size].
    /// Errors: [`Error::Shape`] for images of another size.
    pub fn forward(&self, images: &[&[f32]]) -> Result<(Tensor, CuSeqlens)> {
        check(images, self.patches.image)?;
        let device = self.class.device();
        let (grid, patch, width) = (self.patches.grid(), self.patches.patch, self.patches.image.width);
        let mut values = Vec::with_capacity(images.len() * grid.num_pixels() * self.projection.in_features());
        for (image, row, column) in images.iter().flat_map(|image| {
            (0..grid.height).flat_map(move |row| (0..grid.width).map(move |column| (image, row, column)))
        }) {
            for plane in image.chunks_exact(self.patches.image.num_pixels()) {
                for line in 0..patch.height {
                    let at = (row * patch.height + line) * width + column * patch.width;
                    values.extend_from_slice(&plane[at..at + patch.width]);
                }
            }
        }
        let rows = Tensor::from_vec(values, (images.len() * grid.num_pixels(), self.projection.in_features()), device)?;
        let hidden_size = self.projection.out_features();
        let patches = self.projection.forward(&rows)?.reshape((images.len(), grid.num_pixels(), hidden_size))?;
        let class = self.class.unsqueeze(0)?.expand((images.len(), 1, hidden_size))?;
        let hidden = Tensor::cat(&[&class, &patches], 1)?.broadcast_add(&self.position)?;
        let num_tokens = self.patches.num_tokens();
        let bounds: Vec<u32> = (0..=images.len()).map(|i| (i * num_tokens) as u32).collect();
        Ok((hidden.reshape((images.len() * num_tokens, hidden_size))?, CuSeqlens::new(&bounds, device)?))
    }
}
