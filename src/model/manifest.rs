//! `models/<name>/manifest.toml`: what a model is and where it came from.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::pack::Pooling;
use crate::request::ModelName;

/// One version of one model, as the repository found it: the manifest's words where it has any.
/// `None` means the model's own files say it (`config.json`, `modules.json`, `1_Pooling/config.json`,
/// `sentence_bert_config.json`, or the GGUF metadata).
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    pub name: ModelName,
    pub version: String,
    /// The version's folder; `weights` and the tokenizer lie in it.
    pub dir: PathBuf,
    /// "embed" for now.
    pub task: String,
    pub architecture: Option<String>,
    /// One GGUF file, or one or several safetensors files; empty means "look in `dir`".
    pub weights: Vec<PathBuf>,
    pub tokenizer: Option<PathBuf>,
    pub pooling: Option<Pooling>,
    pub normalize: Option<bool>,
    pub max_seq_len: Option<usize>,
    pub prompts: BTreeMap<String, String>,
    pub default_prompt: Option<String>,
    pub licence: Option<String>,
}
