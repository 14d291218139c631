//! From a file's bytes to RGB, without trusting them.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::error::{LimitError, LimitErrorKind};
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits};

use super::Rgb;
use crate::{Error, Result};

/// Pixels of the largest image that is decoded unless the settings say otherwise: what a camera of 50 megapixels makes. A
/// file of a few kilobytes can ask for far more.
pub const MAX_PIXELS: usize = 50_000_000;

/// Bytes of the largest file that is decoded unless the settings say otherwise: above what such a camera writes.
pub const MAX_FILE_BYTES: usize = 32 << 20;

/// Longest side of an image that is decoded, in pixels.
pub const MAX_SIDE: usize = 16_384;

/// What a decoder may take of the smallest limit: its own tables do not shrink with it.
const MIN_ALLOC_BYTES: u64 = 16 << 20;

/// What is decoded of clients' files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageLimits {
    /// Pixels of an image, at most.
    pub max_pixels: usize,
    /// Bytes of a file, at most.
    pub max_bytes: usize,
}

impl Default for ImageLimits {
    fn default() -> Self {
        Self { max_pixels: MAX_PIXELS, max_bytes: MAX_FILE_BYTES }
    }
}

impl ImageLimits {
    /// Bytes that a decoder may take for one image: 16 bits of four channels at the largest, and as much for its own work
    /// in between.
    fn max_alloc_bytes(self) -> u64 {
        (self.max_pixels as u64).saturating_mul(2 * 8).max(MIN_ALLOC_BYTES)
    }
}

/// Decodes a PNG, JPEG or WebP file, told by its first bytes; of an animated one the first picture.
///
/// Grey becomes RGB of equal values, what is transparent stands on white, 16 bits are rounded to 8.
/// Errors: as [`super::Preprocessor::pixels`] has them.
pub(super) fn decode(bytes: &[u8], limits: ImageLimits, field: &str) -> Result<Rgb> {
    if bytes.is_empty() {
        return Err(Error::Empty { field: field.to_string() });
    }
    if bytes.len() > limits.max_bytes {
        let (field, limit) = (field.to_string(), limits.max_bytes);
        return Err(Error::TooLarge { field, got: bytes.len(), limit, unit: "bytes" });
    }
    let format = match image::guess_format(bytes) {
        Ok(format @ (ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP)) => format,
        _ => return Err(invalid(field, "is no PNG, JPEG or WebP file".to_string())),
    };
    // The decoders are made to return errors, and a file that makes one panic all the same is still only a bad file.
    // Nothing outlives the call that a panic could leave half done.
    match catch_unwind(AssertUnwindSafe(|| decode_as(format, bytes, limits, field))) {
        Ok(decoded) => decoded,
        Err(_) => Err(invalid(field, format!("cannot be decoded as {}", name(format)))),
    }
}

fn decode_as(format: ImageFormat, bytes: &[u8], sizes: ImageLimits, field: &str) -> Result<Rgb> {
    let fault = |error: ImageError| match error {
        // Dimensions are looked at below, so what is left of the limits is memory.
        ImageError::Limits(limit) => out_of_limits(field, sizes, &limit),
        other => invalid(field, format!("cannot be decoded as {}: {other}", name(format))),
    };
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(sizes.max_alloc_bytes());
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(fault)?;
    let (width, height) = decoder.dimensions();
    check_size(height as usize, width as usize, sizes.max_pixels, field)?;
    Ok(rgb(DynamicImage::from_decoder(decoder).map_err(fault)?))
}

/// Refuses an image that is larger than what is worked on.
pub(super) fn check_size(height: usize, width: usize, max_pixels: usize, field: &str) -> Result<()> {
    let too_large = |got, limit, unit| Err(Error::TooLarge { field: field.to_string(), got, limit, unit });
    let longest = height.max(width);
    if longest > MAX_SIDE {
        return too_large(longest, MAX_SIDE, "pixels on a side");
    }
    if height * width > max_pixels {
        return too_large(height * width, max_pixels, "pixels");
    }
    if height * width == 0 {
        return Err(invalid(field, "is an image without pixels".to_string()));
    }
    Ok(())
}

fn out_of_limits(field: &str, sizes: ImageLimits, limit: &LimitError) -> Error {
    match limit.kind() {
        LimitErrorKind::InsufficientMemory => {
            let limit = sizes.max_alloc_bytes();
            invalid(field, format!("needs more than {limit} bytes to be decoded, which is the limit"))
        }
        _ => invalid(field, format!("cannot be decoded: {limit}")),
    }
}

fn rgb(image: DynamicImage) -> Rgb {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let values = match image.color().has_alpha() {
        false => image.into_rgb8().into_raw(),
        true => image
            .into_rgba8()
            .into_raw()
            .chunks_exact(4)
            .flat_map(|pixel| on_white([pixel[0], pixel[1], pixel[2]], pixel[3]))
            .collect(),
    };
    Rgb { height, width, values }
}

/// A colour of this opacity over white, rounded.
fn on_white(colour: [u8; 3], alpha: u8) -> [u8; 3] {
    let alpha = u32::from(alpha);
    colour.map(|value| ((u32::from(value) * alpha + 255 * (255 - alpha) + 127) / 255) as u8)
}

fn name(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Png => "PNG",
        ImageFormat::Jpeg => "JPEG",
        _ => "WebP",
    }
}

fn invalid(field: &str, reason: String) -> Error {
    Error::Invalid { field: field.to_string(), reason }
}
