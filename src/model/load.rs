//! From a [`ModelSpec`] to a running model: what the manifest leaves open, the model's own files say.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;

use super::config::{Architecture, EncoderConfig, read_json_if_there};
use super::embed::EmbedBackend;
use super::encode::Encoder;
use super::fingerprint::{Facts, fingerprint};
use super::head_weights::{self, HeadSpec};
use super::judge::{self, Answers};
use super::labels::HeadConfig;
use super::manifest::{Dtype, ModelSpec};
use super::names;
use super::pack::Pooling;
use super::sentence::{self, SentenceConfig, VectorModule, check_widths};
use super::signature::Signature;
use super::weights::{Format, Weights, file_error, modified};
use super::{Backend, LoadedModel, ModelInfo, Placed, tensors, tokenizer, trunk, vision};
use crate::ops::device;
use crate::{Error, Result};

/// Loads a model onto a device: weights, tokenizer, and what clients may know of it.
///
/// Where the spec says nothing: the architecture and sizes come from `config.json`, else GGUF metadata;
/// pooling from the pooling module's config, else GGUF's `bert.pooling_type`, else mean, as
/// sentence-transformers has it; normalise from `modules.json`, else no; the longest sequence from
/// `sentence_bert_config.json`, else `tokenizer_config.json`, else the position table; prompts from
/// `config_sentence_transformers.json`, with the spec's own put over them.
///
/// Blocks: reads all weights; tenths of a second for a small model.
/// Errors: [`Error::Tensor`] and [`Error::ModelFile`], each naming the file and the thing.
pub fn load(spec: &ModelSpec, device: &Device) -> Result<LoadedModel> {
    load_for(spec, std::slice::from_ref(device), &Placement::default())
}

/// [`load`] onto each of several devices, with what they need to know beforehand, and with what to do where one
/// fails. `devices` is not empty. Files and tokenizer are opened once for all.
///
/// One device after another: the first to time its products leaves the result for the others of its kind.
pub fn load_for(spec: &ModelSpec, devices: &[Device], placement: &Placement) -> Result<LoadedModel> {
    let on_cuda = devices.iter().any(Device::is_cuda);
    match load_on(spec, devices, placement) {
        // A slow server is found by its logs and metrics, one that does not start is missed by its clients.
        Err(
            error @ (Error::Forward { .. }
            | Error::Internal { .. }
            | Error::OutOfMemory { .. }
            | Error::DeviceLost { .. }),
        ) if placement.falls_back && on_cuda => {
            tracing::error!(model = %spec.name, %error, "computing on the CPU: the CUDA device failed");
            load_on(spec, &[Device::Cpu], placement)
        }
        loaded => loaded,
    }
}

fn load_on(spec: &ModelSpec, devices: &[Device], placement: &Placement) -> Result<LoadedModel> {
    if spec.task == "infer" {
        return tensors::load(spec, devices);
    }
    if let Some(vision) = vision::load::describe(spec, devices)? {
        return vision.load(devices);
    }
    let described = described(spec, devices)?;
    let mut backends = Vec::with_capacity(devices.len());
    for device in devices {
        // The kernels' weights are cast on the way: they are read on the CPU.
        let on_engine = half_type(spec, device, &described.modules).is_some();
        let weights = described.weights.on(if on_engine { &Device::Cpu } else { device });
        let backend = backend(spec, device, placement, &weights, &described)?;
        backends.push(Placed { device: device::name(device), backend });
    }
    let Described { info, encoder, .. } = described;
    Ok(LoadedModel { info: Arc::new(info), encoder: Arc::new(encoder), backends })
}

/// What a model would be on these devices, and its tokenizer, without its weights in memory: enough to name its results.
/// `devices` is not empty.
///
/// Blocks: reads the tokenizer, and the weights where no manifest has their checksums. Errors: as [`load`].
pub fn describe(spec: &ModelSpec, devices: &[Device]) -> Result<(Arc<ModelInfo>, Arc<Encoder>)> {
    if spec.task == "infer" {
        return tensors::describe(spec, devices);
    }
    if let Some(vision) = vision::load::describe(spec, devices)? {
        return Ok(vision.named());
    }
    let Described { info, encoder, .. } = described(spec, devices)?;
    Ok((Arc::new(info), Arc::new(encoder)))
}

/// Everything of a model but its computing.
struct Described {
    info: ModelInfo,
    encoder: Encoder,
    weights: Weights,
    config: EncoderConfig,
    head: HeadConfig,
    config_file: PathBuf,
    /// What pooled vectors go through.
    modules: Vec<VectorModule>,
    answers: Option<Answers>,
}

fn described(spec: &ModelSpec, devices: &[Device]) -> Result<Described> {
    let sentence = SentenceConfig::read(&spec.dir)?;
    let weights = match spec.weights.as_slice() {
        [] => Weights::open_dir(&sentence.transformer_dir, &Device::Cpu)?,
        files => Weights::open(files, &Device::Cpu)?,
    };
    let (architecture, config) = encoder_config(spec, &sentence, &weights)?;
    let (tokenizer, tokenizer_file) = open_tokenizer(spec, &sentence, &weights)?;

    let num_ids = tokenizer::num_ids(&tokenizer);
    if num_ids > config.vocab_size {
        let word = trunk::word_name(&weights, &config);
        let reason = format!(
            "the tokenizer gives ids up to {}, `{word}` of {} has {} rows",
            num_ids - 1,
            weights.path().display(),
            config.vocab_size
        );
        return Err(file_error(&tokenizer_file, reason));
    }
    let max_seq_len = max_seq_len(spec, &sentence, &config, weights.path())?;
    let num_added = tokenizer::num_added_tokens(&tokenizer);
    if max_seq_len <= num_added {
        let reason = format!("max_seq_len {max_seq_len} leaves no room beside {num_added} special tokens");
        return Err(file_error(&tokenizer_file, reason));
    }
    let pooling = match spec.pooling.or(sentence.pooling) {
        Some(pooling) => pooling,
        None => gguf_pooling(&weights)?.unwrap_or(Pooling::Mean),
    };
    let head = HeadConfig::read(&sentence.transformer_dir)?;
    let judged = judge::of(spec, &sentence, &head, &config, &tokenizer, &tokenizer_file)?;
    let (question, answers) = judged.map_or((None, None), |(question, answers)| (Some(question), Some(answers)));
    let labels = match answers {
        None => labels(spec, &head, &sentence, &weights)?,
        Some(_) => vec!["LABEL_0".to_string()],
    };
    check_widths(&sentence.modules, config.hidden_size)?;
    let dimensions = sentence.out_features().unwrap_or(config.hidden_size);
    let (prompts, default_prompt) = sentence::prompts(spec, sentence.prompts, sentence.default_prompt)?;
    // The same on all of them: it depends on the spec and on the kind of device.
    let dtype = devices.first().map_or("f32", |device| dtype_name(spec, device, &sentence.modules));
    let device_names = device::names(devices);
    let question_of = question.as_ref();
    let device = &device_names;
    let facts = Facts { architecture: &architecture, dtype, device, pooling, max_seq_len, question: question_of };
    let info = ModelInfo {
        name: spec.name.clone(),
        version: spec.version.clone(),
        fingerprint: fingerprint(spec, &tokenizer_file, &facts)?,
        task: spec.task.clone(),
        is_multi_label: head.is_multi_label,
        labels,
        architecture,
        dtype: dtype.to_string(),
        device: device_names,
        hidden_size: config.hidden_size,
        dimensions,
        vocab_size: config.vocab_size,
        max_seq_len,
        signature: Signature::default(),
        pooling,
        normalize: spec.normalize.or(sentence.normalize).unwrap_or(false),
        prompts,
        default_prompt,
        licence: spec.licence.clone(),
        created: modified(weights.path()),
    };
    let encoder =
        Encoder::new(tokenizer, max_seq_len, config.vocab_size).with_token_types(config.type_vocab_size.unwrap_or(0));
    let encoder = match question {
        None => encoder,
        Some(question) => encoder.asking(question).map_err(|reason| file_error(&tokenizer_file, reason))?,
    };
    let config_file = sentence.transformer_dir.join("config.json");
    Ok(Described { info, encoder, weights, config, head, config_file, modules: sentence.modules, answers })
}

/// How a model takes its place on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// Tokens of the largest batch to come. A larger one is computed too; a CUDA device takes its memory then.
    pub max_batch_tokens: usize,
    /// Sequences of the largest batch to come.
    pub max_batch_size: usize,
    /// Where algorithms timed for a CUDA device's products are kept between starts.
    pub cache_dir: Option<PathBuf>,
    /// Whether the CPU takes over where a CUDA device fails to load the model.
    pub falls_back: bool,
}

impl Default for Placement {
    fn default() -> Self {
        Self { max_batch_tokens: 16384, max_batch_size: 512, cache_dir: None, falls_back: false }
    }
}

/// What the engine's kernels compute this model in: f16 unless the spec says otherwise; `None` where f32 is asked for
/// or the device is no CUDA device.
fn half_type(spec: &ModelSpec, device: &Device, modules: &[VectorModule]) -> Option<Dtype> {
    let dtype = spec.dtype.unwrap_or(Dtype::F16);
    // The kernels have no head but pooling: other tasks, and modules after it, are computed by candle's ops on the
    // device.
    let is_pooling = spec.task == "embed" && modules.is_empty();
    (device.is_cuda() && dtype != Dtype::F32 && is_pooling).then_some(dtype)
}

/// What the model computes in on this device.
fn dtype_name(spec: &ModelSpec, device: &Device, modules: &[VectorModule]) -> &'static str {
    match half_type(spec, device, modules) {
        None | Some(Dtype::F32) => "f32",
        Some(Dtype::F16) => "f16",
        Some(Dtype::Bf16) => "bf16",
    }
}

/// The model on its device.
fn backend(
    spec: &ModelSpec,
    device: &Device,
    placement: &Placement,
    weights: &Weights,
    described: &Described,
) -> Result<Arc<dyn Backend>> {
    let Described { info, encoder, config, head, config_file, modules, answers, .. } = described;
    let ModelInfo { pooling, max_seq_len, .. } = *info;
    #[cfg(feature = "cuda")]
    if let (Some(dtype), candle_core::DeviceLocation::Cuda { gpu_id }) =
        (half_type(spec, device, modules), device.location())
    {
        use super::device_embed::{DeviceModel, supported};
        use crate::ops::cuda::HalfType;

        if let Err(reason) = supported(config) {
            return Err(Error::Forward {
                model: spec.name.to_string(),
                cause: format!("{reason}; dtype = \"f32\" does"),
            });
        }
        let dtype = if dtype == Dtype::Bf16 { HalfType::Bf16 } else { HalfType::F16 };
        let model = DeviceModel { name: &spec.name, weights, config, pooling, max_seq_len };
        return Ok(Arc::new(model.load(gpu_id, dtype, placement)?));
    }
    #[cfg(not(feature = "cuda"))]
    let _ = placement;
    let head = HeadSpec {
        task: &info.task,
        pooling,
        modules,
        num_labels: info.labels.len(),
        mask_id: encoder.mask_id(),
        config: head,
        config_file,
        answers: *answers,
    };
    Ok(Arc::new(EmbedBackend {
        trunk: trunk::load(weights, config)?,
        head: head_weights::read(weights, config, &head)?,
        device: device.clone(),
        name: spec.name.clone(),
        vocab_size: config.vocab_size,
        max_seq_len,
        dimensions: info.dimensions,
    }))
}

/// Names of a classifier's scores; none for the other tasks.
///
/// A checkpoint of one score often names none: it is for ranking, and its score needs no name.
fn labels(spec: &ModelSpec, head: &HeadConfig, sentence: &SentenceConfig, weights: &Weights) -> Result<Vec<String>> {
    match (spec.task.as_str(), head.labels.len()) {
        ("classify" | "token_classify", 0) => {
            let reason = format!("no `id2label` and no `num_labels`, which task `{}` needs", spec.task);
            Err(file_error(&sentence.transformer_dir.join("config.json"), reason))
        }
        ("rerank", 0 | 1) => {
            Ok(head.labels.first().cloned().map_or_else(|| vec!["LABEL_0".to_string()], |one| vec![one]))
        }
        ("rerank", more) => {
            Err(file_error(weights.path(), format!("task `rerank` needs a model of one score, this one has {more}")))
        }
        ("classify" | "token_classify", _) => Ok(head.labels.clone()),
        _ => Ok(Vec::new()),
    }
}

/// The architecture's name and the encoder's shape.
fn encoder_config(spec: &ModelSpec, sentence: &SentenceConfig, weights: &Weights) -> Result<(String, EncoderConfig)> {
    let file = sentence.transformer_dir.join("config.json");
    let Some(gguf) = weights.gguf() else {
        return EncoderConfig::from_json(&file, spec.architecture.as_deref());
    };
    let rows = |name: &str| weights.shape(name).and_then(|shape| shape.first().copied());
    if !file.is_file() {
        let vocab_size = rows(names::GGUF.word).unwrap_or(0);
        let (name, config) = EncoderConfig::from_gguf(gguf, vocab_size, rows(names::GGUF.token_type))?;
        return match &spec.architecture {
            None => Ok((name, config)),
            Some(name) => Architecture::parse(name, weights.path()).map(|_| (name.clone(), config)),
        };
    }
    // A config.json beside a GGUF file knows more than its metadata (the activation, the padding rows).
    let (name, mut config) = EncoderConfig::from_json(&file, spec.architecture.as_deref())?;
    if rows(names::GGUF.position) == Some(config.max_seq_len()) {
        // llama.cpp cuts the rows kept for padding off the position table.
        config.num_positions = config.max_seq_len();
        config.position_offset = 0;
    }
    Ok((name, config))
}

/// The tokenizer and the file it came from.
fn open_tokenizer(
    spec: &ModelSpec,
    sentence: &SentenceConfig,
    weights: &Weights,
) -> Result<(tokenizers::Tokenizer, PathBuf)> {
    let beside = [sentence.transformer_dir.join("tokenizer.json"), spec.dir.join("tokenizer.json")];
    let file = spec.tokenizer.clone().or_else(|| beside.iter().find(|path| path.is_file()).cloned());
    let (mut tokenizer, file) = match (file, weights.gguf()) {
        (Some(file), _) => (tokenizer::from_file(&file)?, file),
        (None, Some(gguf)) => (tokenizer::from_gguf(gguf)?, gguf.path().to_path_buf()),
        (None, None) => return Err(file_error(&beside[0], "no such file: the model has no tokenizer")),
    };
    if sentence.do_lower_case {
        tokenizer::lower_case(&mut tokenizer, &file)?;
    }
    Ok((tokenizer, file))
}

/// An operator's limit beyond the position table is a fault; one from the model's own files, which
/// sentence-transformers lets pass, is cut to it.
fn max_seq_len(spec: &ModelSpec, sentence: &SentenceConfig, config: &EncoderConfig, file: &Path) -> Result<usize> {
    #[derive(serde::Deserialize)]
    struct TokenizerConfig {
        /// An integer, or 1e30 for "no limit".
        model_max_length: Option<f64>,
    }
    let reach = config.max_seq_len();
    if let Some(max_seq_len) = spec.max_seq_len {
        if max_seq_len == 0 || max_seq_len > reach {
            let reason = format!("max_seq_len is {max_seq_len}, the position table reaches 1 to {reach}");
            return Err(file_error(file, reason));
        }
        return Ok(max_seq_len);
    }
    let stated = match sentence.max_seq_len {
        Some(stated) => Some(stated),
        None => {
            let file = sentence.transformer_dir.join("tokenizer_config.json");
            let config: Option<TokenizerConfig> = read_json_if_there(file)?;
            config.and_then(|c| c.model_max_length).filter(|n| *n >= 1.0).map(|n| n.min(reach as f64) as usize)
        }
    };
    match stated {
        Some(stated) if stated > reach => {
            tracing::warn!(model = %spec.name, max_seq_len = stated, reach, "max_seq_len is cut to the position table");
            Ok(reach)
        }
        other => Ok(other.unwrap_or(reach)),
    }
}

/// llama.cpp's number of a pooling. Errors: [`Error::ModelFile`] for one that gives no embedding.
fn gguf_pooling(weights: &Weights) -> Result<Option<Pooling>> {
    let Some(gguf) = weights.gguf().filter(|_| weights.format() == Format::Gguf) else { return Ok(None) };
    match gguf.number("bert.pooling_type")? {
        None | Some(0) => Ok(None),
        Some(1) => Ok(Some(Pooling::Mean)),
        Some(2) => Ok(Some(Pooling::Cls)),
        Some(3) => Ok(Some(Pooling::LastToken)),
        Some(other) => Err(file_error(
            gguf.path(),
            format!("metadata `bert.pooling_type` {other} is not supported; supported: 1 to 3"),
        )),
    }
}
