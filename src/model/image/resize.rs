//! Resizing with a filter that grows with the reduction (antialiasing, as Pillow has it), and cropping.

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use super::decode::{MAX_PIXELS, check_size};
use super::{Resize, Rgb};
use crate::{Error, Result};

/// Pillow's `Resampling`.
pub(super) type Filter = ResizeAlg;

/// The filter of a number in `resample`; `None` for one that Pillow does not have.
pub(super) fn filter(number: u64) -> Option<Filter> {
    let convolution = match number {
        0 => return Some(ResizeAlg::Nearest),
        1 => FilterType::Lanczos3,
        2 => FilterType::Bilinear,
        // Both have a = -0.5.
        3 => FilterType::CatmullRom,
        4 => FilterType::Box,
        5 => FilterType::Hamming,
        _ => return None,
    };
    Some(ResizeAlg::Convolution(convolution))
}

/// A picture's sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sides {
    pub height: usize,
    pub width: usize,
}

/// What is done to every image.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Plan {
    pub resize: Option<Resize>,
    pub filter: Filter,
    /// The middle of what was resized; black around one that is smaller.
    pub crop: bool,
    /// What comes out, of any image.
    pub out: Sides,
}

impl Plan {
    /// Errors: `TooLarge` for an image so long and narrow that its resized form is over the limit.
    pub(super) fn apply(&self, mut rgb: Rgb, field: &str) -> Result<Rgb> {
        if let Some(resize) = self.resize {
            let to = resize.sides(&rgb);
            // Not by what clients may send: of the smallest image the model wants as much as of any.
            check_size(to.height, to.width, MAX_PIXELS, &format!("{field}, resized,"))?;
            rgb = resized(rgb, to, self.filter)?;
        }
        Ok(if self.crop { cropped(&rgb, self.out) } else { rgb })
    }
}

impl Resize {
    fn sides(self, rgb: &Rgb) -> Sides {
        match self {
            Self::To { height, width } => Sides { height, width },
            Self::ShortestEdge(edge) => {
                let (short, long) = (rgb.height.min(rgb.width), rgb.height.max(rgb.width));
                // In f64 and cut off: so `transformers` computes it.
                let long = ((edge * long) as f64 / short as f64) as usize;
                if rgb.width <= rgb.height {
                    Sides { height: long, width: edge }
                } else {
                    Sides { height: edge, width: long }
                }
            }
        }
    }
}

/// Rows first and then columns, as Pillow does it: between the two, values are cut off at black and white, so that at sharp
/// edges the order shows by several levels. The library on its own begins with the columns.
fn resized(rgb: Rgb, to: Sides, filter: Filter) -> Result<Rgb> {
    let across = Sides { height: rgb.height, width: to.width };
    resized_at_once(resized_at_once(rgb, across, filter)?, to, filter)
}

fn resized_at_once(rgb: Rgb, to: Sides, filter: Filter) -> Result<Rgb> {
    if (rgb.height, rgb.width) == (to.height, to.width) {
        return Ok(rgb);
    }
    let internal = |error: &dyn std::fmt::Display| Error::Internal { cause: format!("resizing: {error}") };
    // Sides are at most `MAX_SIDE`.
    let source =
        ImageRef::new(rgb.width as u32, rgb.height as u32, &rgb.values, PixelType::U8x3).map_err(|e| internal(&e))?;
    let mut target = Image::new(to.width as u32, to.height as u32, PixelType::U8x3);
    let options = ResizeOptions::new().resize_alg(filter);
    Resizer::new().resize(&source, &mut target, &options).map_err(|e| internal(&e))?;
    Ok(Rgb { height: to.height, width: to.width, values: target.into_vec() })
}

/// The middle of an image. Where it is smaller, it stands in the middle of black; an odd line is put before it.
fn cropped(rgb: &Rgb, to: Sides) -> Rgb {
    let mut values = vec![0; to.height * to.width * 3];
    let (from_row, to_row, rows) = overlap(rgb.height, to.height);
    let (from_column, to_column, columns) = overlap(rgb.width, to.width);
    for row in 0..rows {
        let source = &rgb.values[((from_row + row) * rgb.width + from_column) * 3..][..columns * 3];
        values[((to_row + row) * to.width + to_column) * 3..][..columns * 3].copy_from_slice(source);
    }
    Rgb { height: to.height, width: to.width, values }
}

/// Where the middle begins in the source and in the target, and its length.
fn overlap(source: usize, target: usize) -> (usize, usize, usize) {
    if source >= target { ((source - target) / 2, 0, target) } else { (0, (target - source).div_ceil(2), source) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(values: &[u8]) -> Rgb {
        Rgb { height: 1, width: values.len(), values: values.iter().flat_map(|v| [*v; 3]).collect() }
    }

    #[test]
    fn the_middle_is_kept_and_black_put_around() {
        let reds = |rgb: Rgb| rgb.values.iter().step_by(3).copied().collect::<Vec<u8>>();
        let to = |width| Sides { height: 1, width };
        assert_eq!(reds(cropped(&row(&[1, 2, 3, 4, 5]), to(2))), [2, 3]);
        assert_eq!(reds(cropped(&row(&[1, 2, 3, 4]), to(2))), [2, 3]);
        assert_eq!(reds(cropped(&row(&[1, 2]), to(5))), [0, 0, 1, 2, 0]);
        let tall = cropped(&row(&[9]), Sides { height: 3, width: 1 });
        assert_eq!(reds(tall), [0, 9, 0]);
    }

    #[test]
    fn the_longer_side_is_cut_off() {
        let image = |height, width| Rgb { height, width, values: Vec::new() };
        // 26 * 83 / 61 = 35.4
        assert_eq!(Resize::ShortestEdge(26).sides(&image(61, 83)), Sides { height: 26, width: 35 });
        assert_eq!(Resize::ShortestEdge(26).sides(&image(83, 61)), Sides { height: 35, width: 26 });
    }

    #[test]
    fn a_line_of_pixels_is_not_blown_up() {
        let plan = Plan {
            resize: Some(Resize::ShortestEdge(224)),
            filter: ResizeAlg::Nearest,
            crop: true,
            out: Sides { height: 224, width: 224 },
        };
        let line = Rgb { height: 1, width: 16_000, values: vec![0; 48_000] };
        let error = plan.apply(line, "input[1]").err().expect("3,584,000 pixels on a side").to_string();
        assert!(error.contains("input[1]") && error.contains("16384"), "{error}");
    }
}
