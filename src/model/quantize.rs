//! Writing a model as one GGUF file with llama.cpp's names and metadata for BERT.
//!
//! Two-dimensional tensors are written in the format asked for, where their rows divide into its blocks;
//! vectors stay f32, and so do the position and token-type tables: they are small, and llama.cpp keeps them
//! so, too. llama.cpp's computing of BERT knows one activation, GELU, and its format has no key for another.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::config::{Architecture, EncoderConfig};
use super::manifest::ModelSpec;
use super::names::{self, Names};
use super::pack::Pooling;
use super::sentence::SentenceConfig;
use super::tokenizer;
use super::weights::{Format, Weights};
use crate::ops::linear::Activation;
use crate::{Error, Result};

/// What two-dimensional tensors are written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Blocks of 32 values: one f16 scale, 8 bits a value.
    Q8_0,
    /// Blocks of 32 values: one f16 scale, 4 bits a value.
    Q4_0,
    F16,
    F32,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    pub path: PathBuf,
    pub num_bytes: u64,
    /// Bytes the tensors have in f32.
    pub num_bytes_f32: u64,
    /// Number of tensors of each ggml type, by its name.
    pub num_tensors: BTreeMap<String, usize>,
    /// Tensors of the source that no embedding needs: heads and poolers.
    pub left_out: Vec<String>,
}

impl Target {
    /// The name on the command line and in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    fn dtype(self) -> GgmlDType {
        match self {
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::F16 => GgmlDType::F16,
            Self::F32 => GgmlDType::F32,
        }
    }

    /// llama.cpp's number of the file's main type.
    fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
        }
    }
}

/// Writes the safetensors of `spec` as one GGUF file at `path`, which appears when it is whole.
///
/// Blocks: reads all weights; holds them in memory twice.
/// Errors: [`Error::ModelFile`] for a source that is no safetensors model or has an activation the format
/// cannot say, the readers' own, and for a file that cannot be written.
pub fn quantize(spec: &ModelSpec, target: Target, path: &Path) -> Result<Written> {
    let sentence = SentenceConfig::read(&spec.dir)?;
    let weights = match spec.weights.as_slice() {
        [] => Weights::open_dir(&sentence.transformer_dir, &Device::Cpu)?,
        files => Weights::open(files, &Device::Cpu)?,
    };
    if weights.format() != Format::Safetensors {
        return Err(fault(weights.path(), "is GGUF already; quantize the safetensors it was made from"));
    }
    if !sentence.modules.is_empty() {
        let file = spec.dir.join("modules.json");
        return Err(fault(&file, "GGUF has no form for what follows the pooling but normalising"));
    }
    let config_file = sentence.transformer_dir.join("config.json");
    let (architecture, config) = EncoderConfig::from_json(&config_file, spec.architecture.as_deref())?;
    if config.activation != Activation::Gelu {
        return Err(fault(&config_file, "`hidden_act` is not gelu, and GGUF has no key to say so"));
    }
    let is_bert_like = config.gated.is_none() && config.deberta.is_none();
    if !is_bert_like || config.projected_from.is_some() || config.sharing.is_some() {
        return Err(fault(&config_file, format!("`model_type` {architecture}: GGUF has no form for such an encoder")));
    }
    let renamed = renamed(&config);
    let prefix = Names::of(config.architecture, Format::Safetensors).prefix(&weights)?;

    let mut tensors = Vec::new();
    let mut num_tensors = BTreeMap::new();
    let mut num_bytes_f32 = 0;
    for (from, to) in &renamed {
        let from = format!("{prefix}{from}");
        // A tensor that is missing has no shape, and `get` names it.
        let shape = weights.shape(&from).unwrap_or_default().to_vec();
        let tensor = weights.get(&from, &shape)?;
        let tensor = if to == names::GGUF.position { cut_padding(&tensor, &config)? } else { tensor };
        num_bytes_f32 += tensor.elem_count() as u64 * 4;
        let dtype = dtype_of(to, tensor.dims(), target);
        *num_tensors.entry(format!("{dtype:?}").to_lowercase()).or_insert(0) += 1;
        tensors.push((to.clone(), QTensor::quantize(&tensor, dtype)?));
    }
    let taken = |name: &str| name.strip_prefix(&prefix).is_some_and(|n| renamed.iter().any(|(from, _)| from == n));
    let mut left_out: Vec<String> = weights.names().into_iter().filter(|n| !taken(n)).map(str::to_string).collect();
    left_out.sort();

    let mut metadata = architecture_metadata(spec, &sentence, &config, target);
    metadata.extend(tokenizer_metadata(spec, &sentence, &config)?);
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let num_bytes = write(path, &metadata, &tensors)?;
    Ok(Written { path: path.to_path_buf(), num_bytes, num_bytes_f32, num_tensors, left_out })
}

/// Every tensor an encoder of this shape has: its safetensors name without prefix, and llama.cpp's.
fn renamed(config: &EncoderConfig) -> Vec<(String, String)> {
    let (from, to) = (Names::of(config.architecture, Format::Safetensors), &names::GGUF);
    let mut pairs = vec![(from.word.to_string(), to.word.to_string())];
    let mut single = |from: &str, to: &str| pairs.push((from.to_string(), to.to_string()));
    single(from.position, to.position);
    if config.type_vocab_size.is_some() {
        single(from.token_type, to.token_type);
    }
    if config.num_relative_buckets.is_some() {
        single(from.relative_bias, to.relative_bias);
    }
    let mut both = |from: String, to: String| {
        for part in ["weight", "bias"] {
            pairs.push((format!("{from}.{part}"), format!("{to}.{part}")));
        }
    };
    both(from.embedding_norm.to_string(), to.embedding_norm.to_string());
    for i in 0..config.num_layers {
        let layer = |names: &Names| names.layer.replace("{}", &i.to_string());
        for (a, b) in [
            (from.query, to.query),
            (from.key, to.key),
            (from.value, to.value),
            (from.attention_output, to.attention_output),
            (from.attention_norm, to.attention_norm),
            (from.up, to.up),
            (from.down, to.down),
            (from.output_norm, to.output_norm),
        ] {
            both(format!("{}{a}", layer(from)), format!("{}{b}", layer(to)));
        }
    }
    pairs
}

/// The position table without the rows RoBERTa keeps for padding: in GGUF positions start at row 0.
fn cut_padding(table: &Tensor, config: &EncoderConfig) -> Result<Tensor> {
    let rows = table.dim(0)?.saturating_sub(config.position_offset);
    // Forced: candle quantizes a view's whole storage, and a cut at the front passes for contiguous.
    Ok(table.narrow(0, config.position_offset, rows)?.force_contiguous()?)
}

fn dtype_of(name: &str, shape: &[usize], target: Target) -> GgmlDType {
    let small = [names::GGUF.position, names::GGUF.token_type, names::GGUF.relative_bias].contains(&name);
    let dtype = target.dtype();
    match shape {
        [_, columns] if !small && columns.is_multiple_of(dtype.block_size()) => dtype,
        // Rows that do not divide into blocks: half the bytes, and more precision than blocks have.
        [_, _] if !small => GgmlDType::F16,
        _ => GgmlDType::F32,
    }
}

fn architecture_metadata(
    spec: &ModelSpec,
    sentence: &SentenceConfig,
    config: &EncoderConfig,
    target: Target,
) -> Vec<(String, Value)> {
    // llama.cpp computes BERT, RoBERTa, XLM-RoBERTa and DistilBERT as "bert"; it does not know MPNet, whose
    // file is only read beside its config.json.
    let architecture = if config.architecture == Architecture::MpNet { "mpnet" } else { "bert" };
    let pooling = match spec.pooling.or(sentence.pooling).unwrap_or(Pooling::Mean) {
        Pooling::Mean => Some(1),
        Pooling::Cls => Some(2),
        Pooling::LastToken => Some(3),
        // llama.cpp has no number for these: the manifest or 1_Pooling/config.json must say it.
        Pooling::Max | Pooling::WeightedMean => None,
    };
    let text = |s: &str| Value::String(s.to_string());
    let key = |name: &str| format!("{architecture}.{name}");
    let number = |n: usize| Value::U32(n as u32);
    let mut metadata = vec![
        ("general.architecture".to_string(), text(architecture)),
        ("general.name".to_string(), text(&spec.name)),
        ("general.file_type".to_string(), Value::U32(target.file_type())),
        ("general.quantization_version".to_string(), Value::U32(2)),
        (key("block_count"), number(config.num_layers)),
        (key("context_length"), number(config.max_seq_len())),
        (key("embedding_length"), number(config.hidden_size)),
        (key("feed_forward_length"), number(config.intermediate_size)),
        (key("attention.head_count"), number(config.num_heads)),
        (key("attention.layer_norm_epsilon"), Value::F32(config.layer_norm_eps as f32)),
        (key("attention.causal"), Value::Bool(false)),
    ];
    metadata.extend(pooling.map(|n| (key("pooling_type"), Value::U32(n))));
    metadata.extend(spec.licence.as_ref().map(|licence| ("general.license".to_string(), text(licence))));
    metadata
}

/// The vocabulary of a WordPiece tokenizer in llama.cpp's form; nothing for another kind, which is read from
/// the tokenizer.json beside the file.
fn tokenizer_metadata(
    spec: &ModelSpec,
    sentence: &SentenceConfig,
    config: &EncoderConfig,
) -> Result<Vec<(String, Value)>> {
    let beside = sentence.transformer_dir.join("tokenizer.json");
    let tokenizer = tokenizer::from_file(spec.tokenizer.as_deref().unwrap_or(&beside))?;
    if !matches!(tokenizer.get_model(), tokenizers::ModelWrapper::WordPiece(_)) {
        return Ok(Vec::new());
    }
    const NORMAL: i32 = 1;
    const CONTROL: i32 = 3;
    const UNUSED: i32 = 5;
    let specials = tokenizer.get_added_tokens_decoder();
    let (mut tokens, mut kinds) = (Vec::new(), Vec::new());
    // One entry a row of the embeddings, which may be more than the tokenizer has.
    for id in 0..config.vocab_size as u32 {
        let (token, kind) = match tokenizer.id_to_token(id) {
            None => (format!("[PAD{id}]"), UNUSED),
            Some(token) if specials.get(&id).is_some_and(|t| t.special) => (token, CONTROL),
            Some(token) => match token.strip_prefix("##") {
                Some(rest) => (rest.to_string(), NORMAL),
                None => (format!("\u{2581}{token}"), NORMAL),
            },
        };
        tokens.push(Value::String(token));
        kinds.push(Value::I32(kind));
    }
    let mut metadata = vec![
        ("tokenizer.ggml.model".to_string(), Value::String("bert".to_string())),
        ("tokenizer.ggml.pre".to_string(), Value::String("default".to_string())),
        ("tokenizer.ggml.token_type_count".to_string(), Value::U32(config.type_vocab_size.unwrap_or(1) as u32)),
        ("tokenizer.ggml.tokens".to_string(), Value::Array(tokens)),
        ("tokenizer.ggml.token_type".to_string(), Value::Array(kinds)),
    ];
    // "seperator" is how the format spells it.
    for (key, token) in [
        ("unknown", "[UNK]"),
        ("seperator", "[SEP]"),
        ("padding", "[PAD]"),
        ("cls", "[CLS]"),
        ("mask", "[MASK]"),
        // Where older readers look for CLS and SEP.
        ("bos", "[CLS]"),
        ("eos", "[SEP]"),
    ] {
        if let Some(id) = tokenizer.token_to_id(token) {
            metadata.push((format!("tokenizer.ggml.{key}_token_id"), Value::U32(id)));
        }
    }
    Ok(metadata)
}

/// Writes beside the final name, then renames. Returns the file's length in bytes.
fn write(path: &Path, metadata: &[(&str, &Value)], tensors: &[(&str, &QTensor)]) -> Result<u64> {
    let mut unfinished = path.as_os_str().to_os_string();
    unfinished.push(".part");
    let unfinished = PathBuf::from(unfinished);
    let io = |e: std::io::Error| fault(path, e);
    let mut file = BufWriter::new(File::create(&unfinished).map_err(io)?);
    gguf_file::write(&mut file, metadata, tensors)?;
    file.flush().map_err(io)?;
    let num_bytes = file.get_ref().metadata().map_err(io)?.len();
    std::fs::rename(&unfinished, path).map_err(io)?;
    Ok(num_bytes)
}

fn fault(file: &Path, reason: impl ToString) -> Error {
    Error::ModelFile { file: file.to_path_buf(), reason: reason.to_string() }
}
