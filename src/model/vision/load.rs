//! From a [`ModelSpec`] to a running model of images.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;

use super::VisionTrunk;
use super::backend::VisionBackend;
use super::config::VisionConfig;
use crate::Result;
use crate::model::encode::text::TextEncoder;
use crate::model::encode::{Encoder, ImageEncoder};
use crate::model::fingerprint::{Facts, fingerprint};
use crate::model::head::{Head, Projection, ScoredAt};
use crate::model::image::Preprocessor;
use crate::model::labels::HeadConfig;
use crate::model::manifest::ModelSpec;
use crate::model::pack::Pooling;
use crate::model::sentence::SentenceConfig;
use crate::model::signature::{Modality, Signature, ValuesShape};
use crate::model::weights::{Weights, file_error, modified};
use crate::model::{LoadedModel, ModelInfo, Placed, tokenizer};
use crate::ops::device;
use crate::ops::image::Plane;
use crate::ops::linear::{Activation, Linear};

/// Everything of a model of images but its computing.
pub(in crate::model) struct Described {
    pub info: ModelInfo,
    pub encoder: Encoder,
    weights: Weights,
    config: VisionConfig,
    image: Plane,
}

/// `None` for a folder of another kind of model. `devices` is not empty.
///
/// Where the spec says nothing, an embedding is the vector of the whole image for ViT and CLIP and the mean of the last
/// feature map for ResNet, and it is normalised for none.
/// Blocks: reads the tokenizer, and the weights where no manifest has their checksums.
/// Errors: [`crate::Error::Tensor`] and [`crate::Error::ModelFile`], each naming the file and the thing.
pub(in crate::model) fn describe(spec: &ModelSpec, devices: &[Device]) -> Result<Option<Described>> {
    let sentence = SentenceConfig::read(&spec.dir)?;
    let dir = &sentence.transformer_dir;
    let Some((architecture, config)) = VisionConfig::read(&dir.join("config.json"), spec.architecture.as_deref())?
    else {
        return Ok(None);
    };
    let weights = match spec.weights.as_slice() {
        [] => Weights::open_dir(dir, &Device::Cpu)?,
        files => Weights::open(files, &Device::Cpu)?,
    };
    let head = HeadConfig::read(dir)?;
    let labels = match (spec.task.as_str(), config.takes_texts()) {
        ("embed", _) => Vec::new(),
        ("classify", false) if !head.labels.is_empty() => head.labels.clone(),
        ("classify", false) => {
            return Err(file_error(
                &dir.join("config.json"),
                "no `id2label` and no `num_labels`, which task `classify` needs",
            ));
        }
        (task, _) => {
            let can = if config.takes_texts() { "embed" } else { "embed and classify" };
            return Err(file_error(weights.path(), format!("task `{task}`: models of this architecture {can} here")));
        }
    };
    let preprocessor = Preprocessor::read(dir)?.with_limits(spec.image_limits);
    let image = Plane { height: preprocessor.height(), width: preprocessor.width() };
    if let Some(expected) = config.image().filter(|expected| *expected != image) {
        let reason = format!(
            "`image_size` is {} x {}, the image processor makes images of {} x {}",
            expected.height, expected.width, image.height, image.width
        );
        return Err(file_error(&dir.join("config.json"), reason));
    }
    let num_tokens = config.num_tokens(image);
    let (text, decided_by) = match &config {
        VisionConfig::Clip(clip) => {
            let (text, file) = text_encoder(spec, dir, clip.num_positions, clip.vocab_size)?;
            (Some(text), file)
        }
        _ => (None, dir.join("config.json")),
    };
    let max_seq_len = text.as_ref().map_or(num_tokens, TextEncoder::max_seq_len);
    let pooling = match &config {
        VisionConfig::Vit(_) => spec.pooling.unwrap_or(Pooling::Cls),
        VisionConfig::ResNet(_) => spec.pooling.unwrap_or(Pooling::Mean),
        // There is but one vector.
        VisionConfig::Clip(_) => Pooling::Cls,
    };
    let device_names = device::names(devices);
    let facts = Facts {
        architecture: &architecture,
        dtype: "f32",
        device: &device_names,
        pooling,
        max_seq_len,
        question: None,
    };
    let mut modalities = vec![Modality::Image];
    modalities.extend(config.takes_texts().then_some(Modality::Text));
    let values = ValuesShape { num_values: 3 * image.num_pixels(), num_tokens };
    let info = ModelInfo {
        name: spec.name.clone(),
        version: spec.version.clone(),
        fingerprint: fingerprint(spec, &decided_by, &facts)?,
        task: spec.task.clone(),
        is_multi_label: head.is_multi_label,
        labels,
        dtype: "f32".to_string(),
        hidden_size: config.hidden_size(),
        dimensions: config.hidden_size(),
        vocab_size: vocab_size(&config),
        max_seq_len,
        signature: Signature { modalities, values: Some(values), ..Signature::default() },
        pooling,
        normalize: spec.normalize.or(sentence.normalize).unwrap_or(false),
        prompts: spec.prompts.clone(),
        default_prompt: spec.default_prompt.clone().filter(|name| spec.prompts.contains_key(name)),
        licence: spec.licence.clone(),
        created: modified(weights.path()),
        device: device_names,
        architecture,
    };
    let encoder = Encoder::of_images(ImageEncoder { preprocessor, num_tokens }, text, max_seq_len);
    Ok(Some(Described { info, encoder, weights, config, image }))
}

impl Described {
    /// Enough to name the model's results.
    pub fn named(self) -> (Arc<ModelInfo>, Arc<Encoder>) {
        (Arc::new(self.info), Arc::new(self.encoder))
    }

    /// Onto each of several devices, where every one computes in f32.
    ///
    /// Blocks: reads all weights.
    /// Errors: as [`describe`].
    pub fn load(self, devices: &[Device]) -> Result<LoadedModel> {
        let Self { info, encoder, weights, config, image } = self;
        let mut backends = Vec::with_capacity(devices.len());
        for device in devices {
            let weights = weights.on(device);
            let backend = VisionBackend {
                trunk: VisionTrunk::load(&weights, &config, image)?,
                head: head(&weights, &config, &info)?,
                name: info.name.clone(),
                vocab_size: info.vocab_size,
                longest: info.max_seq_len.max(config.num_tokens(image)),
                hidden_size: info.hidden_size,
                is_cuda: device.is_cuda(),
            };
            backends.push(Placed { device: device::name(device), backend: Arc::new(backend) });
        }
        Ok(LoadedModel { info: Arc::new(info), encoder: Arc::new(encoder), backends })
    }
}

fn vocab_size(config: &VisionConfig) -> usize {
    match config {
        VisionConfig::Clip(clip) => clip.vocab_size,
        _ => 1,
    }
}

fn head(weights: &Weights, config: &VisionConfig, info: &ModelInfo) -> Result<Head> {
    if info.task == "embed" {
        return Ok(Head::Vectors { pooling: info.pooling, steps: Vec::new() });
    }
    // Classes are told by the vector that the classifier was trained on, whatever embeddings are made of.
    let (pooling, name) = match config {
        VisionConfig::ResNet(_) => (Pooling::Mean, "classifier.1"),
        _ => (Pooling::Cls, "classifier"),
    };
    let num_labels = info.labels.len();
    let weight = weights.get(&format!("{name}.weight"), &[num_labels, info.hidden_size])?;
    let bias = weights.get(&format!("{name}.bias"), &[num_labels])?;
    let out = Linear::new(weight, Some(bias), Activation::None)?;
    Ok(Head::Scores { at: ScoredAt::Pooled(pooling), projection: Projection { steps: Vec::new(), out } })
}

/// The tokenizer of a tower of texts, and its file.
fn text_encoder(
    spec: &ModelSpec,
    dir: &Path,
    num_positions: usize,
    vocab_size: usize,
) -> Result<(TextEncoder, PathBuf)> {
    let file = spec.tokenizer.clone().unwrap_or_else(|| dir.join("tokenizer.json"));
    let tokenizer = tokenizer::from_file(&file)?;
    let num_ids = tokenizer::num_ids(&tokenizer);
    if num_ids > vocab_size {
        let reason =
            format!("the tokenizer gives ids up to {}, the word embeddings have {vocab_size} rows", num_ids - 1);
        return Err(file_error(&file, reason));
    }
    let max_seq_len = spec.max_seq_len.unwrap_or(num_positions);
    let num_added = tokenizer::num_added_tokens(&tokenizer);
    if max_seq_len > num_positions || max_seq_len <= num_added {
        let reason = format!("max_seq_len {max_seq_len} is not in {} to {num_positions}", num_added + 1);
        return Err(file_error(&file, reason));
    }
    Ok((TextEncoder::new(tokenizer, max_seq_len, vocab_size), file))
}
