//! From an image's file to the pixels a model takes, as the image processors of `transformers` make them.
//!
//! A file is decoded under limits ([`decode`]), made RGB, resized and cropped ([`resize`]), and each value goes through a
//! table that scales and normalises it. What a model wants is said by its `preprocessor_config.json` ([`config`]).
//!
//! As those processors have it, the orientation that a camera writes beside the pixels (EXIF) is not applied: a client
//! that wants it applied turns its image first.

mod config;
mod decode;
mod resize;

use std::path::Path;

pub use decode::{ImageLimits, MAX_FILE_BYTES, MAX_PIXELS, MAX_SIDE};

use crate::Result;
use resize::Plan;

/// Makes a model's pixels of images. Every image comes out with one size.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocessor {
    plan: Plan,
    /// What is given for each of the 256 levels, by channel: scaled, then normalised.
    levels: Box<[[f32; 256]; 3]>,
    limits: ImageLimits,
}

/// How an image is resized, as files say it.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Resize {
    /// To these sides, whatever its own were.
    To { height: usize, width: usize },
    /// The shorter side to this length, the longer one in proportion.
    ShortestEdge(usize),
}

impl Preprocessor {
    /// Reads a folder's `preprocessor_config.json`, or what `processor_config.json` says of images.
    ///
    /// Blocks: reads a file.
    /// Errors: [`crate::Error::ModelFile`] naming the file and the key that is missing or not supported.
    pub fn read(dir: &Path) -> Result<Self> {
        config::read(dir)
    }

    /// The same with other limits than the usual ones.
    pub fn with_limits(self, limits: ImageLimits) -> Self {
        Self { limits, ..self }
    }

    /// Height of what [`Self::pixels`] gives.
    pub fn height(&self) -> usize {
        self.plan.out.height
    }

    /// Width of what [`Self::pixels`] gives.
    pub fn width(&self) -> usize {
        self.plan.out.width
    }

    /// Decodes one file and makes the model's pixels of it. `field` names it in errors ("input[3]").
    ///
    /// Shapes: returns [3, height, width].
    /// Blocks: a millisecond for a small image, a second for the largest; call it off the async threads.
    /// Errors: [`crate::Error::Empty`] for no bytes; [`crate::Error::TooLarge`] with unit "bytes" or "pixels" for
    /// more than the limits, and for a side of more than [`MAX_SIDE`]; [`crate::Error::Invalid`] for what is no PNG, JPEG
    /// or WebP, and for a file that is broken.
    pub fn pixels(&self, bytes: &[u8], field: &str) -> Result<Vec<f32>> {
        let rgb = decode::decode(bytes, self.limits, field)?;
        let rgb = self.plan.apply(rgb, field)?;
        let num_pixels = rgb.height * rgb.width;
        let mut pixels = Vec::with_capacity(3 * num_pixels);
        for (channel, levels) in self.levels.iter().enumerate() {
            pixels.extend(rgb.values[channel..].iter().step_by(3).map(|&level| levels[usize::from(level)]));
        }
        Ok(pixels)
    }
}

/// An image on the host. Shapes: `values` [height, width, 3].
struct Rgb {
    height: usize,
    width: usize,
    values: Vec<u8>,
}
