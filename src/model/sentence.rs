//! What sentence-transformers writes beside a model: `modules.json`, the pooling's `config.json`,
//! `sentence_bert_config.json` and `config_sentence_transformers.json`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::Device;
use serde::Deserialize;
use serde_json::Value;

use super::config::lookup_module_activation;
use super::config::{read_json, read_json_if_there};
use super::judge::Answers;
use super::manifest::ModelSpec;
use super::pack::Pooling;
use super::weights::{Weights, file_error};
use crate::Result;
use crate::ops::linear::{Activation, Linear};

/// What the files say; `None` where they do not.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SentenceConfig {
    /// Where the encoder's own files lie; often the folder itself.
    pub transformer_dir: PathBuf,
    pub pooling: Option<Pooling>,
    /// What follows the pooling, in this order, but for normalising at the end.
    pub modules: Vec<VectorModule>,
    /// Whether vectors are normalised at the end; `None` without a `modules.json`.
    pub normalize: Option<bool>,
    /// Of a causal language model whose next token answers a question: the ids that count.
    pub(super) answers: Option<Answers>,
    pub max_seq_len: Option<usize>,
    /// Whether the pooling is SPLADE's, over the scores of the vocabulary's tokens.
    pub is_sparse: bool,
    /// Lower-case every text before the tokenizer sees it.
    pub do_lower_case: bool,
    /// Prompt name to prompt text.
    pub prompts: BTreeMap<String, String>,
    /// Name of the prompt that requests without one get.
    pub default_prompt: Option<String>,
}

/// A module between pooling and result.
#[derive(Debug, Clone, PartialEq)]
pub enum VectorModule {
    /// Scales to length 1.
    Normalize,
    Dense(Dense),
}

/// A `Dense` module: `activation(x weightᵀ + bias)`.
#[derive(Debug, Clone, PartialEq)]
pub struct Dense {
    /// Where its weights lie, as `linear.weight` and `linear.bias`.
    pub dir: PathBuf,
    pub in_features: usize,
    pub out_features: usize,
    pub has_bias: bool,
    pub activation: Activation,
}

#[derive(Deserialize)]
struct RawDense {
    in_features: usize,
    out_features: usize,
    bias: Option<bool>,
    activation_function: Option<String>,
    module_input_name: Option<String>,
    module_output_name: Option<String>,
}

#[derive(Deserialize)]
struct LogitScore {
    true_token_id: u32,
    false_token_id: Option<u32>,
}

#[derive(Deserialize)]
struct Module {
    #[serde(default)]
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct SentenceBert {
    max_seq_length: Option<usize>,
    #[serde(default)]
    do_lower_case: bool,
}

#[derive(Deserialize)]
struct Prompts {
    #[serde(default)]
    prompts: BTreeMap<String, Option<String>>,
    default_prompt_name: Option<String>,
}

impl SentenceConfig {
    /// Reads the files of a folder that are there.
    ///
    /// Errors: [`crate::Error::ModelFile`] for a file that cannot be understood, or a module or pooling
    /// that is not supported, by name.
    pub fn read(dir: &Path) -> Result<Self> {
        let mut this = Self { transformer_dir: dir.to_path_buf(), ..Self::default() };
        if let Some(modules) = read_json_if_there::<Vec<Module>>(dir.join("modules.json"))? {
            this.read_modules(dir, &modules)?;
        } else if let Some(pooling) = read_json_if_there(dir.join("1_Pooling/config.json"))? {
            this.pooling = Some(parse_pooling(&pooling, &dir.join("1_Pooling/config.json"))?);
        }
        let file = this.transformer_dir.join("sentence_bert_config.json");
        if let Some(config) = read_json_if_there::<SentenceBert>(file)? {
            this.max_seq_len = config.max_seq_length;
            this.do_lower_case = config.do_lower_case;
        }
        let file = dir.join("config_sentence_transformers.json");
        if let Some(config) = read_json_if_there::<Prompts>(file)? {
            this.prompts = config.prompts.into_iter().filter_map(|(name, text)| Some((name, text?))).collect();
            this.default_prompt = config.default_prompt_name;
        }
        Ok(this)
    }

    /// Values of a vector of the last `Dense` module; `None` without one.
    pub fn out_features(&self) -> Option<usize> {
        let dense = |module: &VectorModule| match module {
            VectorModule::Dense(dense) => Some(dense.out_features),
            VectorModule::Normalize => None,
        };
        self.modules.iter().rev().find_map(dense)
    }

    /// A pipeline of Transformer, Pooling and what follows it, in this order; or one of a head alone.
    fn read_modules(&mut self, dir: &Path, modules: &[Module]) -> Result<()> {
        for module in modules {
            let misplaced = || {
                let reason = format!("module `{}` stands on the wrong side of the Pooling", module.kind);
                file_error(&dir.join("modules.json"), reason)
            };
            // Releases of sentence-transformers differ in the module's path but not in its last word.
            match module.kind.rsplit('.').next().unwrap_or_default() {
                "Transformer" => self.transformer_dir = dir.join(&module.path),
                "Pooling" if !self.modules.is_empty() => return Err(misplaced()),
                "Pooling" => {
                    let file = dir.join(&module.path).join("config.json");
                    self.pooling = Some(parse_pooling(&read_json(&file)?, &file)?);
                }
                "Normalize" => self.modules.push(VectorModule::Normalize),
                "Dense" if self.pooling.is_none() => return Err(misplaced()),
                "Dense" => self.modules.push(VectorModule::Dense(Dense::read(&dir.join(&module.path))?)),
                "LogitScore" => {
                    let score: LogitScore = read_json(&dir.join(&module.path).join("config.json"))?;
                    self.answers = Some(Answers { yes: score.true_token_id, no: score.false_token_id });
                }
                // A sparse model of sentence-transformers: its head is the checkpoint's own.
                "MLMTransformer" => self.transformer_dir = dir.join(&module.path),
                "SpladePooling" => {
                    let file = dir.join(&module.path).join("config.json");
                    check_splade(&read_json(&file)?, &file)?;
                    self.is_sparse = true;
                }
                other => {
                    let reason = format!(
                        "module `{other}` ({}) is not supported; supported: Transformer, Pooling, Dense, Normalize, \
                         MLMTransformer, SpladePooling, LogitScore",
                        module.kind
                    );
                    return Err(file_error(&dir.join("modules.json"), reason));
                }
            }
        }
        // What is last is a request's choice; what stands before a Dense is part of the model.
        self.normalize = Some(self.modules.last() == Some(&VectorModule::Normalize));
        while self.modules.last() == Some(&VectorModule::Normalize) {
            self.modules.pop();
        }
        Ok(())
    }
}

impl Dense {
    fn read(dir: &Path) -> Result<Self> {
        let file = dir.join("config.json");
        let raw: RawDense = read_json(&file)?;
        for (key, name) in
            [("module_input_name", &raw.module_input_name), ("module_output_name", &raw.module_output_name)]
        {
            if let Some(other) = name.as_deref().filter(|name| *name != "sentence_embedding") {
                let reason = format!("`{key}` `{other}` is not supported; supported: sentence_embedding");
                return Err(file_error(&file, reason));
            }
        }
        if raw.in_features == 0 || raw.out_features == 0 {
            return Err(file_error(&file, "`in_features` and `out_features` must be at least 1"));
        }
        // sentence-transformers' own default, as the bias is.
        let activation = raw.activation_function.as_deref().unwrap_or("torch.nn.modules.activation.Tanh");
        Ok(Self {
            dir: dir.to_path_buf(),
            in_features: raw.in_features,
            out_features: raw.out_features,
            has_bias: raw.bias.unwrap_or(true),
            activation: lookup_module_activation(activation, &file)?,
        })
    }

    /// Reads the weights onto a device.
    ///
    /// Errors: [`crate::Error::ModelFile`] for a folder without safetensors, [`crate::Error::Tensor`].
    pub(super) fn read_weights(&self, device: &Device) -> Result<Linear> {
        let weights = Weights::open_dir(&self.dir, device)?;
        let weight = weights.get("linear.weight", &[self.out_features, self.in_features])?;
        let bias = self.has_bias.then(|| weights.get("linear.bias", &[self.out_features])).transpose()?;
        Linear::new(weight, bias, self.activation)
    }
}

/// Refuses modules whose widths do not fit each other, before anything is computed. `hidden_size` is what is pooled.
///
/// Errors: [`crate::Error::ModelFile`] naming the module's file.
pub(super) fn check_widths(modules: &[VectorModule], hidden_size: usize) -> Result<()> {
    let mut width = hidden_size;
    for module in modules {
        let VectorModule::Dense(dense) = module else { continue };
        if dense.in_features != width {
            let reason = format!("`in_features` is {}, what comes in has {width} values", dense.in_features);
            return Err(file_error(&dense.dir.join("config.json"), reason));
        }
        width = dense.out_features;
    }
    Ok(())
}

/// Refuses what another release's SPLADE may ask for. Errors: [`crate::Error::ModelFile`] naming the key.
fn check_splade(config: &Value, file: &Path) -> Result<()> {
    for (key, supported) in [("pooling_strategy", "max"), ("activation_function", "relu")] {
        if let Some(other) = config[key].as_str().filter(|value| *value != supported) {
            return Err(file_error(file, format!("`{key}` `{other}` is not supported; supported: {supported}")));
        }
    }
    Ok(())
}

/// The keys of old and new releases, and what they ask for.
const POOLINGS: [(&str, &str, Option<Pooling>); 6] = [
    ("pooling_mode_cls_token", "cls", Some(Pooling::Cls)),
    ("pooling_mode_max_tokens", "max", Some(Pooling::Max)),
    ("pooling_mode_mean_tokens", "mean", Some(Pooling::Mean)),
    ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens", None),
    ("pooling_mode_weightedmean_tokens", "weightedmean", Some(Pooling::WeightedMean)),
    ("pooling_mode_lasttoken", "lasttoken", Some(Pooling::LastToken)),
];

/// One pooling of a pooling module's config: either a bool a mode, or `pooling_mode` with one name.
fn parse_pooling(config: &Value, file: &Path) -> Result<Pooling> {
    if config["include_prompt"] == Value::Bool(false) {
        return Err(file_error(file, "`include_prompt` false is not supported"));
    }
    let names: Vec<&str> = match &config["pooling_mode"] {
        Value::String(name) => vec![name],
        Value::Array(names) => names.iter().filter_map(Value::as_str).collect(),
        _ => POOLINGS.iter().filter(|(key, ..)| config[key] == Value::Bool(true)).map(|(_, name, _)| *name).collect(),
    };
    match names.as_slice() {
        // sentence-transformers takes the mean where no mode is asked for.
        [] => Ok(Pooling::Mean),
        [name] => {
            let found = POOLINGS.iter().find(|(_, known, _)| known == name).and_then(|(.., pooling)| *pooling);
            found.ok_or_else(|| {
                let known: Vec<_> = POOLINGS.iter().filter(|p| p.2.is_some()).map(|(_, name, _)| *name).collect();
                file_error(file, format!("pooling `{name}` is not supported; supported: {}", known.join(", ")))
            })
        }
        several => {
            let reason = format!("several poolings side by side ({}) are not supported", several.join(", "));
            Err(file_error(file, reason))
        }
    }
}

/// The spec's prompts over the files' ones, and a default that is one of them.
pub(super) fn prompts(
    spec: &ModelSpec,
    mut prompts: BTreeMap<String, String>,
    default_prompt: Option<String>,
) -> Result<(BTreeMap<String, String>, Option<String>)> {
    prompts.extend(spec.prompts.clone());
    let default_prompt = spec.default_prompt.clone().or(default_prompt);
    match &default_prompt {
        Some(name) if !prompts.contains_key(name) => {
            let known: Vec<&str> = prompts.keys().map(String::as_str).collect();
            let reason = format!("default prompt `{name}` is none of the prompts: {}", known.join(", "));
            Err(file_error(&spec.dir, reason))
        }
        _ => Ok((prompts, default_prompt)),
    }
}
