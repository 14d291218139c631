//! What `preprocessor_config.json` asks for, with what each processor of `transformers` means where it says nothing.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::decode::{MAX_PIXELS, check_size};
use super::resize::{Plan, Sides, filter};
use super::{ImageLimits, Preprocessor, Resize};
use crate::Result;
use crate::model::config::{read_json, read_json_if_there};
use crate::model::weights::file_error;

/// What a processor does where the file does not say.
struct Defaults {
    /// The name without its ending: "CLIP" of `CLIPImageProcessor` and `CLIPFeatureExtractor`.
    name: &'static str,
    /// Of a `size` that is one number: both sides, or the shorter one.
    is_square: bool,
    resample: u64,
    do_center_crop: bool,
    mean: [f64; 3],
    std: [f64; 3],
}

const HALF: [f64; 3] = [0.5; 3];
const CLIP_MEAN: [f64; 3] = [0.48145466, 0.4578275, 0.40821073];
const CLIP_STD: [f64; 3] = [0.26862954, 0.26130258, 0.27577711];

/// Sizes have no defaults here: every file has them.
const PROCESSORS: [Defaults; 4] = [
    Defaults { name: "ViT", is_square: true, resample: 2, do_center_crop: false, mean: HALF, std: HALF },
    Defaults { name: "DeiT", is_square: true, resample: 3, do_center_crop: true, mean: HALF, std: HALF },
    Defaults { name: CONVNEXT, is_square: false, resample: 3, do_center_crop: false, mean: HALF, std: HALF },
    Defaults { name: "CLIP", is_square: false, resample: 3, do_center_crop: true, mean: CLIP_MEAN, std: CLIP_STD },
];

/// The processor of ResNet's checkpoints, which crops what it has resized.
const CONVNEXT: &str = "ConvNext";

/// ConvNext's sizes from here on are not cropped.
const CONVNEXT_UNCROPPED: usize = 384;

#[derive(Debug, Deserialize)]
struct Raw {
    #[serde(alias = "feature_extractor_type")]
    image_processor_type: Option<String>,
    do_resize: Option<bool>,
    size: Option<RawSize>,
    resample: Option<u64>,
    do_center_crop: Option<bool>,
    crop_size: Option<RawSize>,
    crop_pct: Option<f64>,
    do_rescale: Option<bool>,
    rescale_factor: Option<f64>,
    do_normalize: Option<bool>,
    image_mean: Option<PerChannel>,
    image_std: Option<PerChannel>,
    do_pad: Option<bool>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
enum RawSize {
    One(usize),
    /// Height and width.
    Pair([usize; 2]),
    Sides {
        height: usize,
        width: usize,
    },
    Edges {
        shortest_edge: usize,
        longest_edge: Option<usize>,
    },
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
enum PerChannel {
    Same(f64),
    Each([f64; 3]),
}

impl PerChannel {
    fn values(self) -> [f64; 3] {
        match self {
            Self::Same(value) => [value; 3],
            Self::Each(values) => values,
        }
    }
}

/// Errors: [`crate::Error::ModelFile`] naming the file and the key.
pub(super) fn read(dir: &Path) -> Result<Preprocessor> {
    let file = dir.join("preprocessor_config.json");
    if file.is_file() {
        return preprocessor(read_json(&file)?, &file);
    }
    // Newer folders of models of several kinds keep it beside what is said of the others.
    let whole = dir.join("processor_config.json");
    let of_images =
        read_json_if_there::<Value>(whole.clone())?.and_then(|mut all| Some(all.get_mut("image_processor")?.take()));
    match of_images {
        Some(value) => preprocessor(
            serde_json::from_value(value).map_err(|e| file_error(&whole, format!("image_processor: {e}")))?,
            &whole,
        ),
        None => Err(file_error(
            &file,
            "no such file, and no `image_processor` in processor_config.json: how images become pixels is not known",
        )),
    }
}

fn preprocessor(raw: Raw, file: &Path) -> Result<Preprocessor> {
    let fault = |reason: String| file_error(file, reason);
    let kind = raw.image_processor_type.as_deref().unwrap_or_default();
    let name = kind.trim_end_matches("Fast").trim_end_matches("Pil");
    let name =
        name.strip_suffix("ImageProcessor").or_else(|| name.strip_suffix("FeatureExtractor")).unwrap_or_default();
    let Some(defaults) = PROCESSORS.iter().find(|known| known.name == name) else {
        let known: Vec<String> = PROCESSORS.iter().map(|known| format!("{}ImageProcessor", known.name)).collect();
        return Err(fault(format!(
            "`image_processor_type` `{kind}` is not supported; supported: {}",
            known.join(", ")
        )));
    };
    if raw.do_pad == Some(true) {
        return Err(fault("`do_pad` is not supported".to_string()));
    }
    let resample = raw.resample.unwrap_or(defaults.resample);
    let filter = filter(resample).ok_or_else(|| fault(format!("`resample` {resample} is not one of 0 to 5")))?;

    let mut resize = match raw.do_resize.unwrap_or(true) {
        false => None,
        true => Some(raw.size.ok_or_else(|| fault("`size` is missing".to_string()))?.resize(defaults.is_square, file)?),
    };
    let mut crop = match raw.do_center_crop.unwrap_or(defaults.do_center_crop) {
        false => None,
        true => match raw.crop_size.map(|size| size.resize(true, file)).transpose()? {
            Some(Resize::To { height, width }) => Some(Sides { height, width }),
            Some(Resize::ShortestEdge(_)) => return Err(fault("`crop_size` needs `height` and `width`".to_string())),
            None => return Err(fault("`do_center_crop` needs `crop_size`".to_string())),
        },
    };
    if let (CONVNEXT, Some(Resize::ShortestEdge(edge))) = (defaults.name, resize) {
        if edge >= CONVNEXT_UNCROPPED {
            resize = Some(Resize::To { height: edge, width: edge });
        } else {
            let crop_pct = raw.crop_pct.unwrap_or(224.0 / 256.0);
            if !(crop_pct > 0.0 && crop_pct <= 1.0) {
                return Err(fault(format!("`crop_pct` must be above 0 and at most 1, got {crop_pct}")));
            }
            if crop.is_some() {
                return Err(fault("`crop_pct` and `do_center_crop` together are not supported".to_string()));
            }
            resize = Some(Resize::ShortestEdge((edge as f64 / crop_pct) as usize));
            crop = Some(Sides { height: edge, width: edge });
        }
    }
    let out = match (crop, resize) {
        (Some(crop), _) => crop,
        (None, Some(Resize::To { height, width })) => Sides { height, width },
        (None, _) => {
            return Err(fault(
                "images would come out with different sizes: `size` needs `height` and `width`, or `do_center_crop`"
                    .to_string(),
            ));
        }
    };
    let fits = check_size(out.height, out.width, MAX_PIXELS, "size");
    fits.map_err(|e| fault(e.to_string()))?;
    let (plan, levels) = (Plan { resize, filter, crop: crop.is_some(), out }, levels(&raw, defaults, file)?);
    Ok(Preprocessor { plan, levels, limits: ImageLimits::default() })
}

impl RawSize {
    fn resize(self, is_square: bool, file: &Path) -> Result<Resize> {
        let resize = match self {
            Self::One(side) if is_square => Resize::To { height: side, width: side },
            Self::One(edge) | Self::Edges { shortest_edge: edge, longest_edge: None } => Resize::ShortestEdge(edge),
            Self::Pair([height, width]) | Self::Sides { height, width } => Resize::To { height, width },
            Self::Edges { longest_edge: Some(_), .. } => {
                return Err(file_error(file, "`size.longest_edge` is not supported"));
            }
        };
        let shortest = match resize {
            Resize::To { height, width } => height.min(width),
            Resize::ShortestEdge(edge) => edge,
        };
        if shortest == 0 { Err(file_error(file, "a `size` of 0")) } else { Ok(resize) }
    }
}

/// Scaled in f64, then rounded to f32 and normalised in f32: the steps of `transformers`, so that values are equal bit
/// by bit.
fn levels(raw: &Raw, defaults: &Defaults, file: &Path) -> Result<Box<[[f32; 256]; 3]>> {
    let factor = if raw.do_rescale.unwrap_or(true) { raw.rescale_factor.unwrap_or(1.0 / 255.0) } else { 1.0 };
    let mean = raw.image_mean.map_or(defaults.mean, PerChannel::values);
    let std = raw.image_std.map_or(defaults.std, PerChannel::values);
    let do_normalize = raw.do_normalize.unwrap_or(true);
    if do_normalize && std.contains(&0.0) {
        return Err(file_error(file, "`image_std` holds a 0"));
    }
    let mut levels = Box::new([[0.0; 256]; 3]);
    for (channel, levels) in levels.iter_mut().enumerate() {
        for (level, value) in levels.iter_mut().enumerate() {
            *value = (level as f64 * factor) as f32;
            if do_normalize {
                *value = (*value - mean[channel] as f32) / std[channel] as f32;
            }
        }
    }
    Ok(levels)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Result<Preprocessor> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("preprocessor_config.json"), json).unwrap();
        read(dir.path())
    }

    #[test]
    fn older_files_are_understood() {
        // As the best known checkpoints of ViT, CLIP and ResNet have them.
        let vit = of(r#"{"feature_extractor_type": "ViTFeatureExtractor", "size": 224}"#).unwrap();
        assert_eq!(vit.plan.resize, Some(Resize::To { height: 224, width: 224 }));
        assert_eq!((vit.levels[0][0], vit.levels[0][255]), (-1.0, 1.0));
        let clip =
            of(r#"{"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3}"#)
                .unwrap();
        assert_eq!((clip.plan.resize, clip.plan.crop), (Some(Resize::ShortestEdge(224)), true));
        let resnet =
            of(r#"{"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224, "crop_pct": 0.875}"#).unwrap();
        assert_eq!((resnet.plan.resize, resnet.height()), (Some(Resize::ShortestEdge(256)), 224));
        let large =
            of(r#"{"image_processor_type": "ConvNextImageProcessorFast", "size": {"shortest_edge": 384}}"#).unwrap();
        assert_eq!((large.plan.resize, large.plan.crop), (Some(Resize::To { height: 384, width: 384 }), false));
    }

    #[test]
    fn what_cannot_be_followed_is_named() {
        for (json, expected) in [
            (r#"{"size": 224}"#, "image_processor_type"),
            (
                r#"{"image_processor_type": "LlavaImageProcessor", "size": 224}"#,
                "`LlavaImageProcessor` is not supported",
            ),
            (r#"{"image_processor_type": "ViTImageProcessor"}"#, "`size` is missing"),
            (r#"{"image_processor_type": "ViTImageProcessor", "size": 0}"#, "`size` of 0"),
            (r#"{"image_processor_type": "ViTImageProcessor", "size": 99999}"#, "the limit is 16384"),
            (r#"{"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 9}}"#, "different sizes"),
            (
                r#"{"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 9, "longest_edge": 12}}"#,
                "longest_edge",
            ),
            (r#"{"image_processor_type": "ViTImageProcessor", "size": 9, "resample": 6}"#, "`resample` 6"),
            (r#"{"image_processor_type": "ViTImageProcessor", "size": 9, "image_std": [1, 0, 1]}"#, "image_std"),
            (r#"{"image_processor_type": "ViTImageProcessor", "size": 9, "image_mean": [1, 0]}"#, "PerChannel"),
            (r#"{"image_processor_type": "ViTImageProcessor", "size": 9, "do_pad": true}"#, "do_pad"),
            (r#"{"image_processor_type": "ConvNextImageProcessor", "size": 9, "crop_pct": 0}"#, "crop_pct"),
            (r#"{"image_processor_type": "CLIPImageProcessor", "size": 9}"#, "crop_size"),
        ] {
            let error = of(json).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("preprocessor_config.json"), "{json}: {error}");
        }
    }
}
