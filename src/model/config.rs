//! What a model's own files say of its shape: `config.json` or GGUF metadata.

pub mod deberta;

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use self::deberta::DebertaConfig;
use super::gated::config::{Family, GatedConfig};
use super::gated::read_config;
use super::weights::file_error;
use super::weights::gguf::GgufFile;
use crate::ops::linear::Activation;
use crate::{Error, Result};

/// The architectures that load, by the `model_type` of `config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    Bert,
    /// Also `camembert`, which is RoBERTa with another tokenizer.
    Roberta,
    XlmRoberta,
    DistilBert,
    MpNet,
    /// BERT whose tables may be narrower than its layers.
    Electra,
    /// BERT with narrower tables, and with layers that share their weights.
    Albert,
    /// DeBERTa, the first version.
    Deberta,
    /// DeBERTa v2 and v3.
    DebertaV2,
    /// Layers with a gated feed-forward part: `gated` has the families.
    Gated(Family),
}

/// `model_type` names and what they load as, in the order errors list them.
const ARCHITECTURES: [(&str, Architecture); 18] = [
    ("bert", Architecture::Bert),
    ("roberta", Architecture::Roberta),
    ("xlm-roberta", Architecture::XlmRoberta),
    ("camembert", Architecture::Roberta),
    ("distilbert", Architecture::DistilBert),
    ("mpnet", Architecture::MpNet),
    ("electra", Architecture::Electra),
    ("albert", Architecture::Albert),
    ("deberta", Architecture::Deberta),
    ("deberta-v2", Architecture::DebertaV2),
    ("modernbert", Architecture::Gated(Family::ModernBert)),
    ("nomic_bert", Architecture::Gated(Family::NomicBert)),
    ("gte", Architecture::Gated(Family::Gte)),
    // What the code published with GTE calls itself.
    ("new", Architecture::Gated(Family::Gte)),
    // Jina v2 calls itself `bert` and asks for ALiBi.
    (JINA_BERT, Architecture::Gated(Family::JinaBert)),
    ("qwen3", Architecture::Gated(Family::Qwen3)),
    ("mistral", Architecture::Gated(Family::Mistral)),
    ("gemma3_text", Architecture::Gated(Family::Gemma3)),
];

/// The name of Jina v2, which has none of its own.
const JINA_BERT: &str = "jina_bert";

/// `hidden_act` names. `gelu_fast` and `gelu_python_tanh` compute what `gelu_new` does.
const ACTIVATIONS: [(&str, Activation); 9] = [
    ("gelu", Activation::Gelu),
    ("gelu_python", Activation::Gelu),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_fast", Activation::GeluTanh),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("relu", Activation::Relu),
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("tanh", Activation::Tanh),
];

/// The shape of an encoder: all that is needed to ask for its tensors and to run them.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderConfig {
    pub architecture: Architecture,
    /// Rows of the word embeddings.
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub intermediate_size: usize,
    pub activation: Activation,
    pub layer_norm_eps: f64,
    /// Rows of the position table, those kept for padding included.
    pub num_positions: usize,
    /// Row of a sequence's first token.
    pub position_offset: usize,
    /// Rows of the token-type table, `None` for architectures without one.
    pub type_vocab_size: Option<usize>,
    /// Rows of MPNet's table of relative distances.
    pub num_relative_buckets: Option<usize>,
    /// Columns of the tables where a linear leads from them to the layers; `None` where they have `hidden_size`.
    pub projected_from: Option<usize>,
    /// How layers share their weights; `None` where each has its own.
    pub sharing: Option<LayerSharing>,
    /// What DeBERTa has beside the rest.
    pub deberta: Option<DebertaConfig>,
    /// What [`super::gated::GatedTrunk`] needs beside; `None` for post-norm encoders.
    pub gated: Option<GatedConfig>,
}

/// ALBERT's layers: each of `num_layers` steps is one group, whose layers follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerSharing {
    /// Groups with weights of their own.
    pub num_groups: usize,
    /// Layers with weights of their own in each group.
    pub layers_per_group: usize,
}

impl Architecture {
    /// The architecture of a `model_type`. Errors: [`Error::ModelFile`] naming those supported.
    pub fn parse(name: &str, file: &Path) -> Result<Self> {
        lookup(&ARCHITECTURES, "architecture", name, file)
    }
}

impl EncoderConfig {
    /// Values per head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads
    }

    /// Longest sequence the position table reaches.
    pub fn max_seq_len(&self) -> usize {
        self.num_positions - self.position_offset
    }

    /// Columns of the tables.
    pub fn embedding_size(&self) -> usize {
        self.projected_from.unwrap_or(self.hidden_size)
    }

    /// Layers that have weights of their own.
    pub fn num_own_layers(&self) -> usize {
        self.sharing.map_or(self.num_layers, |sharing| sharing.num_groups * sharing.layers_per_group)
    }

    /// Which of the layers with weights of their own are computed, one after another.
    pub fn layer_order(&self) -> Vec<usize> {
        let Some(LayerSharing { num_groups, layers_per_group }) = self.sharing else {
            return (0..self.num_layers).collect();
        };
        // In this order and in f64, as transformers divides: a rounding decides where a group ends.
        let steps_per_group = self.num_layers as f64 / num_groups as f64;
        let group = |step: usize| ((step as f64 / steps_per_group) as usize).min(num_groups - 1);
        (0..self.num_layers)
            .flat_map(|step| (0..layers_per_group).map(move |i| group(step) * layers_per_group + i))
            .collect()
    }

    /// Reads `config.json`. `architecture` goes before the file's `model_type`.
    /// Returns the name the architecture goes by, and the shape.
    ///
    /// Errors: [`Error::ModelFile`] naming the key that is missing, of a wrong kind or not supported.
    pub fn from_json(path: &Path, architecture: Option<&str>) -> Result<(String, Self)> {
        let value: Value = read_json(path)?;
        let own = value.get("model_type").and_then(Value::as_str);
        let mut name = architecture.or(own).ok_or_else(|| file_error(path, "`model_type` is missing"))?.to_string();
        if name == "bert" && value.get("position_embedding_type").and_then(Value::as_str) == Some("alibi") {
            name = JINA_BERT.to_string();
        }
        let architecture = Architecture::parse(&name, path)?;
        if let Architecture::Gated(family) = architecture {
            let config = read_config(family, &name, &value, path)?;
            return Ok((name, config));
        }
        let raw: RawConfig = read_json(path)?;
        let mut config = raw.check(architecture, path)?;
        if matches!(architecture, Architecture::Deberta | Architecture::DebertaV2) {
            config.deberta = Some(DebertaConfig::from_json(path, &config)?);
        }
        Ok((name, config))
    }

    /// Reads a GGUF header with llama.cpp's `bert.*` keys. `vocab_size` and the table sizes come from
    /// the tensors, given as the rows of `token_embd.weight` and of `token_types.weight`.
    ///
    /// llama.cpp cuts the padding rows off RoBERTa's position table, so positions start at row 0. Its
    /// format has no key for the activation; its BERT is computed with GELU, exact here.
    pub fn from_gguf(gguf: &GgufFile, vocab_size: usize, type_vocab_size: Option<usize>) -> Result<(String, Self)> {
        let path = gguf.path();
        let name = gguf
            .string("general.architecture")?
            .ok_or_else(|| file_error(path, "metadata `general.architecture` is missing"))?;
        if name != "bert" {
            let reason = format!("metadata `general.architecture` is `{name}`; of GGUF files only `bert` is supported");
            return Err(file_error(path, reason));
        }
        let number = |key: &str| {
            let key = format!("bert.{key}");
            gguf.number(&key)?.ok_or_else(|| file_error(path, format!("metadata `{key}` is missing")))
        };
        if let Some(true) = gguf.value("bert.attention.causal").and_then(|v| v.to_bool().ok()) {
            return Err(file_error(path, "metadata `bert.attention.causal` is true, which is no encoder"));
        }
        let config = Self {
            architecture: Architecture::Bert,
            vocab_size,
            hidden_size: number("embedding_length")?,
            num_layers: number("block_count")?,
            num_heads: number("attention.head_count")?,
            intermediate_size: number("feed_forward_length")?,
            activation: Activation::Gelu,
            layer_norm_eps: gguf.real("bert.attention.layer_norm_epsilon")?.unwrap_or(1e-12),
            num_positions: number("context_length")?,
            position_offset: 0,
            type_vocab_size,
            num_relative_buckets: None,
            projected_from: None,
            sharing: None,
            deberta: None,
            gated: None,
        };
        config.checked(path).map(|config| (name.to_string(), config))
    }

    /// Refuses sizes that no model has, so that what follows can divide by them.
    fn checked(self, path: &Path) -> Result<Self> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_layers", self.num_layers),
            ("num_heads", self.num_heads),
            ("intermediate_size", self.intermediate_size),
            ("embedding_size", self.embedding_size()),
            ("num_hidden_groups", self.sharing.map_or(1, |sharing| sharing.num_groups)),
            ("inner_group_num", self.sharing.map_or(1, |sharing| sharing.layers_per_group)),
        ];
        if let Some((key, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(file_error(path, format!("`{key}` is 0")));
        }
        if !self.hidden_size.is_multiple_of(self.num_heads) {
            let reason = format!("`hidden_size` {} is no multiple of `num_heads` {}", self.hidden_size, self.num_heads);
            return Err(file_error(path, reason));
        }
        if self.num_positions <= self.position_offset {
            let reason =
                format!("`max_position_embeddings` {} must exceed {}", self.num_positions, self.position_offset);
            return Err(file_error(path, reason));
        }
        Ok(self)
    }
}

/// `config.json` as the architectures write it; DistilBERT's own names are aliases.
#[derive(Debug, Deserialize)]
struct RawConfig {
    vocab_size: Option<usize>,
    #[serde(alias = "dim")]
    hidden_size: Option<usize>,
    #[serde(alias = "n_layers")]
    num_hidden_layers: Option<usize>,
    #[serde(alias = "n_heads")]
    num_attention_heads: Option<usize>,
    #[serde(alias = "hidden_dim")]
    intermediate_size: Option<usize>,
    #[serde(alias = "activation")]
    hidden_act: Option<String>,
    layer_norm_eps: Option<f64>,
    max_position_embeddings: Option<usize>,
    type_vocab_size: Option<usize>,
    pad_token_id: Option<usize>,
    position_embedding_type: Option<String>,
    relative_attention_num_buckets: Option<usize>,
    embedding_size: Option<usize>,
    num_hidden_groups: Option<usize>,
    inner_group_num: Option<usize>,
    #[serde(default)]
    is_decoder: bool,
}

impl RawConfig {
    fn check(self, architecture: Architecture, path: &Path) -> Result<EncoderConfig> {
        let need =
            |key: &str, value: Option<usize>| value.ok_or_else(|| file_error(path, format!("`{key}` is missing")));
        if let Some(kind) = self.position_embedding_type.as_deref().filter(|kind| *kind != "absolute") {
            let reason = format!("`position_embedding_type` `{kind}` is not supported; supported: absolute");
            return Err(file_error(path, reason));
        }
        if self.is_decoder {
            return Err(file_error(path, "`is_decoder` is true; encoders are supported"));
        }
        let default_activation = if architecture == Architecture::Albert { "gelu_new" } else { "gelu" };
        let activation = self.hidden_act.as_deref().unwrap_or(default_activation);
        let position_offset = match architecture {
            // Position ids count from padding_idx + 1, the rows up to it are kept for padding.
            // A known difference: a padding token written into a text has an ordinary position here, where
            // transformers gives it padding_idx.
            Architecture::Roberta | Architecture::XlmRoberta => self.pad_token_id.unwrap_or(1) + 1,
            // transformers fixes MPNet's padding_idx at 1 whatever the config says.
            Architecture::MpNet => 2,
            _ => 0,
        };
        let type_vocab_size = match architecture {
            Architecture::DistilBert | Architecture::MpNet => None,
            Architecture::Deberta | Architecture::DebertaV2 => self.type_vocab_size.filter(|&rows| rows > 0),
            _ => Some(self.type_vocab_size.unwrap_or(2)),
        };
        let hidden_size = need("hidden_size", self.hidden_size)?;
        let embedding_size = self.embedding_size.unwrap_or(128);
        let projected_from = match architecture {
            // ELECTRA has the linear only where it changes the width.
            Architecture::Electra => Some(embedding_size).filter(|&size| size != hidden_size),
            Architecture::Albert => Some(embedding_size),
            _ => None,
        };
        let sharing = (architecture == Architecture::Albert).then_some(LayerSharing {
            num_groups: self.num_hidden_groups.unwrap_or(1),
            layers_per_group: self.inner_group_num.unwrap_or(1),
        });
        let default_eps = match architecture {
            Architecture::Deberta | Architecture::DebertaV2 => 1e-7,
            // DistilBERT has no key for it.
            _ => 1e-12,
        };
        EncoderConfig {
            architecture,
            vocab_size: need("vocab_size", self.vocab_size)?,
            hidden_size,
            num_layers: need("num_hidden_layers", self.num_hidden_layers)?,
            num_heads: need("num_attention_heads", self.num_attention_heads)?,
            intermediate_size: need("intermediate_size", self.intermediate_size)?,
            activation: lookup_activation(activation, path)?,
            layer_norm_eps: self.layer_norm_eps.unwrap_or(default_eps),
            num_positions: need("max_position_embeddings", self.max_position_embeddings)?,
            position_offset,
            type_vocab_size,
            num_relative_buckets: (architecture == Architecture::MpNet)
                .then_some(self.relative_attention_num_buckets.unwrap_or(32)),
            projected_from,
            sharing,
            deberta: None,
            gated: None,
        }
        .checked(path)
    }
}

/// The activation of a `hidden_act`. Errors: [`Error::ModelFile`] naming those supported.
pub(super) fn lookup_activation(name: &str, file: &Path) -> Result<Activation> {
    lookup(&ACTIVATIONS, "activation", name, file)
}

/// PyTorch's modules of activation, by the last word of their path.
const MODULE_ACTIVATIONS: [(&str, Activation); 5] = [
    ("Identity", Activation::None),
    ("Tanh", Activation::Tanh),
    ("ReLU", Activation::Relu),
    ("GELU", Activation::Gelu),
    ("SiLU", Activation::Silu),
];

/// The activation of a PyTorch module's path, `torch.nn.modules.activation.Tanh`. Errors: [`Error::ModelFile`] naming
/// those supported.
pub(super) fn lookup_module_activation(path: &str, file: &Path) -> Result<Activation> {
    lookup(&MODULE_ACTIVATIONS, "activation", path.rsplit('.').next().unwrap_or_default(), file)
}

/// Reads a JSON file. Errors: [`Error::ModelFile`] naming it and the fault's place.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(|e| file_error(path, e))?;
    serde_json::from_str(&text).map_err(|e| file_error(path, e))
}

/// Reads a JSON file if there is one.
pub(crate) fn read_json_if_there<T: serde::de::DeserializeOwned>(path: PathBuf) -> Result<Option<T>> {
    if path.is_file() { read_json(&path).map(Some) } else { Ok(None) }
}

fn lookup<T: Copy>(table: &[(&str, T)], what: &str, name: &str, file: &Path) -> Result<T> {
    match table.iter().find(|(known, _)| *known == name) {
        Some((_, value)) => Ok(*value),
        None => {
            let known: Vec<&str> = table.iter().map(|(known, _)| *known).collect();
            let reason = format!("{what} `{name}` is not supported; supported: {}", known.join(", "));
            Err(Error::ModelFile { file: file.to_path_buf(), reason })
        }
    }
}
