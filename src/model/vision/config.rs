//! What `config.json` says of a model of images.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::Result;
use crate::model::config::{lookup_activation, read_json};
use crate::model::weights::file_error;
use crate::ops::image::Plane;
use crate::ops::linear::Activation;

/// `model_type`s of models that take images, and perhaps texts beside.
pub const ARCHITECTURES: [&str; 3] = ["vit", "resnet", "clip"];

/// A model of images, with its sizes.
#[derive(Debug, Clone, PartialEq)]
pub enum VisionConfig {
    Vit(VitConfig),
    ResNet(ResNetConfig),
    Clip(ClipConfig),
}

/// Layers of attention and feed-forward parts, each behind its norm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TowerConfig {
    pub hidden_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub intermediate_size: usize,
    pub activation: Scaled,
    pub layer_norm_eps: f64,
}

/// `activation(scale x) / scale`: what CLIP calls `quick_gelu` is x / (1 + exp(-1.702 x)), so SiLU with a scale.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scaled {
    pub activation: Activation,
    pub scale: f64,
}

/// How an image is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PatchConfig {
    pub image: Plane,
    pub patch: Plane,
}

/// Source: Dosovitskiy et al. 2020.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VitConfig {
    pub tower: TowerConfig,
    pub patches: PatchConfig,
    pub qkv_bias: bool,
}

/// Source: He et al. 2015.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResNetConfig {
    /// Channels after the stem.
    pub embedding_size: usize,
    /// Channels after each stage.
    pub hidden_sizes: Vec<usize>,
    /// Layers of each stage.
    pub depths: Vec<usize>,
    /// Three convolutions a layer, the middle one on a quarter of the channels; otherwise two.
    pub is_bottleneck: bool,
    pub activation: Activation,
    pub downsample_in_first_stage: bool,
    /// Whether a bottleneck's first convolution takes the steps of two, and not its second.
    pub downsample_in_bottleneck: bool,
}

/// Source: Radford et al. 2021.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClipConfig {
    /// Columns of the space that texts and images share.
    pub projection_dim: usize,
    pub vision: TowerConfig,
    pub patches: PatchConfig,
    pub text: TowerConfig,
    pub vocab_size: usize,
    /// Rows of the table of positions.
    pub num_positions: usize,
    pub end: EndOfText,
}

/// Which token of a text its vector is taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndOfText {
    /// The first one of this id.
    Id(u32),
    /// The first one of the largest id: in older files, whose `eos_token_id` of 2 is not the tokenizer's.
    LargestId,
}

impl PatchConfig {
    /// Whole patches in an image; what is left at its edges is not looked at.
    pub fn grid(self) -> Plane {
        Plane { height: self.image.height / self.patch.height, width: self.image.width / self.patch.width }
    }

    /// Tokens of an image: its patches and the one that stands for the whole.
    pub fn num_tokens(self) -> usize {
        self.grid().num_pixels() + 1
    }

    fn check(self, file: &Path) -> Result<Self> {
        let is_whole = self.patch.num_pixels() > 0 && self.grid().num_pixels() > 0;
        if is_whole { Ok(self) } else { Err(file_error(file, "`image_size` holds no patch of `patch_size`")) }
    }
}

impl TowerConfig {
    fn check(self, file: &Path) -> Result<Self> {
        if self.hidden_size == 0 || self.num_heads == 0 || !self.hidden_size.is_multiple_of(self.num_heads) {
            let (hidden_size, num_heads) = (self.hidden_size, self.num_heads);
            return Err(file_error(
                file,
                format!("`hidden_size` {hidden_size} is no multiple of `num_attention_heads` {num_heads}"),
            ));
        }
        if self.intermediate_size == 0 {
            return Err(file_error(file, "`intermediate_size` is 0"));
        }
        Ok(self)
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawSides {
    Square(usize),
    Sides([usize; 2]),
}

impl RawSides {
    fn plane(self) -> Plane {
        match self {
            Self::Square(side) => Plane { height: side, width: side },
            Self::Sides([height, width]) => Plane { height, width },
        }
    }
}

/// One tower. What a file leaves out is what its class in `transformers` means.
#[derive(Deserialize, Default)]
#[serde(default)]
struct RawTower {
    hidden_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    intermediate_size: Option<usize>,
    hidden_act: Option<String>,
    layer_norm_eps: Option<f64>,
    image_size: Option<RawSides>,
    patch_size: Option<RawSides>,
    num_channels: Option<usize>,
    qkv_bias: Option<bool>,
    vocab_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    eos_token_id: Option<u32>,
}

/// What a tower's sizes are where the file says nothing: older files of CLIP do so.
struct Defaults {
    hidden_size: usize,
    intermediate_size: usize,
    num_heads: usize,
    activation: &'static str,
    eps: f64,
    patch_size: usize,
}

const VIT: Defaults = Defaults {
    hidden_size: 768,
    intermediate_size: 3072,
    num_heads: 12,
    activation: "gelu",
    eps: 1e-12,
    patch_size: 16,
};
const CLIP_VISION: Defaults = Defaults { activation: QUICK_GELU, eps: 1e-5, patch_size: 32, ..VIT };
const CLIP_TEXT: Defaults = Defaults { hidden_size: 512, intermediate_size: 2048, num_heads: 8, ..CLIP_VISION };

const QUICK_GELU: &str = "quick_gelu";

impl RawTower {
    fn tower(&self, defaults: &Defaults, file: &Path) -> Result<TowerConfig> {
        let activation = match self.hidden_act.as_deref().unwrap_or(defaults.activation) {
            QUICK_GELU => Scaled { activation: Activation::Silu, scale: 1.702 },
            other => Scaled { activation: lookup_activation(other, file)?, scale: 1.0 },
        };
        TowerConfig {
            hidden_size: self.hidden_size.unwrap_or(defaults.hidden_size),
            num_layers: self.num_hidden_layers.unwrap_or(12),
            num_heads: self.num_attention_heads.unwrap_or(defaults.num_heads),
            intermediate_size: self.intermediate_size.unwrap_or(defaults.intermediate_size),
            activation,
            layer_norm_eps: self.layer_norm_eps.unwrap_or(defaults.eps),
        }
        .check(file)
    }

    fn patches(&mut self, defaults: &Defaults, file: &Path) -> Result<PatchConfig> {
        check_channels(self.num_channels, file)?;
        let sides = |raw: Option<RawSides>, default| raw.unwrap_or(RawSides::Square(default)).plane();
        PatchConfig {
            image: sides(self.image_size.take(), 224),
            patch: sides(self.patch_size.take(), defaults.patch_size),
        }
        .check(file)
    }
}

fn check_channels(num_channels: Option<usize>, file: &Path) -> Result<()> {
    match num_channels {
        None | Some(3) => Ok(()),
        Some(other) => Err(file_error(file, format!("`num_channels` {other} is not supported; supported: 3"))),
    }
}

#[derive(Deserialize)]
#[serde(default)]
struct RawResNet {
    num_channels: usize,
    embedding_size: usize,
    hidden_sizes: Vec<usize>,
    depths: Vec<usize>,
    layer_type: String,
    hidden_act: String,
    downsample_in_first_stage: bool,
    downsample_in_bottleneck: bool,
}

impl Default for RawResNet {
    fn default() -> Self {
        Self {
            num_channels: 3,
            embedding_size: 64,
            hidden_sizes: vec![256, 512, 1024, 2048],
            depths: vec![3, 4, 6, 3],
            layer_type: "bottleneck".to_string(),
            hidden_act: "relu".to_string(),
            downsample_in_first_stage: false,
            downsample_in_bottleneck: false,
        }
    }
}

#[derive(Deserialize)]
struct RawClip {
    projection_dim: Option<usize>,
    text_config: Option<RawTower>,
    vision_config: Option<RawTower>,
}

impl VisionConfig {
    /// Reads a `config.json` whose `model_type`, or `architecture` where it is said, is one of [`ARCHITECTURES`].
    /// `None` for any other, and where there is no such file.
    ///
    /// Errors: [`crate::Error::ModelFile`] naming the key that is not supported.
    pub fn read(file: &Path, architecture: Option<&str>) -> Result<Option<(String, Self)>> {
        if !file.is_file() {
            return Ok(None);
        }
        let value: Value = read_json(file)?;
        let name =
            architecture.or_else(|| value.get("model_type").and_then(Value::as_str)).unwrap_or_default().to_string();
        let config = match name.as_str() {
            "vit" => {
                let mut raw: RawTower = parse(value, file)?;
                let (tower, patches) = (raw.tower(&VIT, file)?, raw.patches(&VIT, file)?);
                Self::Vit(VitConfig { tower, patches, qkv_bias: raw.qkv_bias.unwrap_or(true) })
            }
            "resnet" => Self::ResNet(resnet(parse(value, file)?, file)?),
            "clip" => Self::Clip(clip(parse(value, file)?, file)?),
            _ => return Ok(None),
        };
        Ok(Some((name, config)))
    }

    /// Whether the model takes texts too.
    pub fn takes_texts(&self) -> bool {
        matches!(self, Self::Clip(_))
    }

    /// Columns of an embedding.
    pub fn hidden_size(&self) -> usize {
        match self {
            Self::Vit(config) => config.tower.hidden_size,
            // Checked to have a stage.
            Self::ResNet(config) => config.hidden_sizes.last().copied().unwrap_or_default(),
            Self::Clip(config) => config.projection_dim,
        }
    }

    /// Tokens that an image of these sides costs: what is computed grows with them as with a text's.
    pub fn num_tokens(&self, image: Plane) -> usize {
        match self {
            Self::Vit(VitConfig { patches, .. }) | Self::Clip(ClipConfig { patches, .. }) => patches.num_tokens(),
            // As a ViT's with patches of 16: a ResNet-50 costs about a quarter of ViT-B, and the queue learns the rest.
            Self::ResNet(_) => (image.height.div_ceil(16) * image.width.div_ceil(16)) + 1,
        }
    }

    /// The sides that images must have; `None` where any will do.
    pub fn image(&self) -> Option<Plane> {
        match self {
            Self::Vit(VitConfig { patches, .. }) | Self::Clip(ClipConfig { patches, .. }) => Some(patches.image),
            Self::ResNet(_) => None,
        }
    }
}

fn parse<T: DeserializeOwned>(value: Value, file: &Path) -> Result<T> {
    serde_json::from_value(value).map_err(|e| file_error(file, e))
}

fn resnet(raw: RawResNet, file: &Path) -> Result<ResNetConfig> {
    check_channels(Some(raw.num_channels), file)?;
    let is_bottleneck = match raw.layer_type.as_str() {
        "bottleneck" => true,
        "basic" => false,
        other => {
            return Err(file_error(
                file,
                format!("`layer_type` `{other}` is not supported; supported: basic, bottleneck"),
            ));
        }
    };
    if raw.hidden_sizes.is_empty() || raw.hidden_sizes.len() != raw.depths.len() {
        return Err(file_error(file, "`hidden_sizes` and `depths` need one number a stage each"));
    }
    let smallest = if is_bottleneck { 4 } else { 1 };
    if raw.embedding_size == 0 || raw.hidden_sizes.iter().any(|size| *size < smallest) || raw.depths.contains(&0) {
        return Err(file_error(
            file,
            "`embedding_size`, `hidden_sizes` or `depths` holds a size that no stage can have",
        ));
    }
    Ok(ResNetConfig {
        embedding_size: raw.embedding_size,
        hidden_sizes: raw.hidden_sizes,
        depths: raw.depths,
        is_bottleneck,
        activation: lookup_activation(&raw.hidden_act, file)?,
        downsample_in_first_stage: raw.downsample_in_first_stage,
        downsample_in_bottleneck: raw.downsample_in_bottleneck,
    })
}

fn clip(raw: RawClip, file: &Path) -> Result<ClipConfig> {
    let (text, mut vision) = (raw.text_config.unwrap_or_default(), raw.vision_config.unwrap_or_default());
    let config = ClipConfig {
        projection_dim: raw.projection_dim.unwrap_or(512),
        vision: vision.tower(&CLIP_VISION, file)?,
        patches: vision.patches(&CLIP_VISION, file)?,
        text: text.tower(&CLIP_TEXT, file)?,
        vocab_size: text.vocab_size.unwrap_or(49_408),
        num_positions: text.max_position_embeddings.unwrap_or(77),
        end: match text.eos_token_id {
            Some(2) => EndOfText::LargestId,
            id => EndOfText::Id(id.unwrap_or(49_407)),
        },
    };
    if config.projection_dim == 0 || config.vocab_size == 0 || config.num_positions == 0 {
        return Err(file_error(file, "`projection_dim`, `vocab_size` or `max_position_embeddings` is 0"));
    }
    Ok(config)
}
