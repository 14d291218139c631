//! What DeBERTa's `config.json` says beside what every encoder's does.

use std::path::Path;

use serde::Deserialize;

use super::{ACTIVATIONS, Architecture, EncoderConfig, lookup, read_json};
use crate::Result;
use crate::model::weights::file_error;
use crate::ops::linear::Activation;

/// DeBERTa's attention, positions and convolution.
#[derive(Debug, Clone, PartialEq)]
pub struct DebertaConfig {
    /// Parts a score is the sum of: content, and what `pos_att_type` lists. Scores are divided by the root of as
    /// many head dimensions.
    pub num_score_parts: usize,
    /// `None` without `relative_attention`.
    pub relative: Option<RelativeConfig>,
    /// Whether positions are added to the embeddings too.
    pub position_biased_input: bool,
    /// The convolution beside the first layer.
    pub conv: Option<ConvConfig>,
}

/// The table of relative positions, and what is computed with it.
#[derive(Debug, Clone, PartialEq)]
pub struct RelativeConfig {
    /// Half of the table's rows: distances query - key of -span to span - 1.
    pub span: usize,
    /// Distance from which on all share the last bucket; `None` where each distance has a row of its own.
    pub log_buckets_to: Option<usize>,
    /// Whether queries meet the keys' positions.
    pub content_to_position: bool,
    /// Whether keys meet the queries' positions.
    pub position_to_content: bool,
    /// Whether the layer's own query and key products are the positions' too.
    pub share_att_key: bool,
    /// Whether the table goes through a LayerNorm.
    pub layer_norm: bool,
}

/// A convolution over the tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct ConvConfig {
    /// Odd.
    pub kernel_size: usize,
    pub activation: Activation,
}

/// The keys as released checkpoints write them; the defaults are those of transformers.
#[derive(Debug, Deserialize)]
struct Raw {
    #[serde(default)]
    relative_attention: bool,
    #[serde(default = "minus_one")]
    max_relative_positions: i64,
    #[serde(default = "minus_one")]
    position_buckets: i64,
    pos_att_type: Option<PositionTypes>,
    #[serde(default)]
    share_att_key: bool,
    norm_rel_ebd: Option<String>,
    #[serde(default = "yes")]
    position_biased_input: bool,
    #[serde(default)]
    conv_kernel_size: usize,
    conv_act: Option<String>,
    conv_groups: Option<usize>,
    embedding_size: Option<usize>,
    attention_head_size: Option<usize>,
    #[serde(default)]
    talking_head: bool,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum PositionTypes {
    /// "p2c|c2p"
    Joined(String),
    List(Vec<String>),
}

fn minus_one() -> i64 {
    -1
}

fn yes() -> bool {
    true
}

impl DebertaConfig {
    /// Reads what `config.json` has beside `encoder`.
    ///
    /// Errors: [`crate::Error::ModelFile`] naming the key of a value that is not supported.
    pub(super) fn from_json(path: &Path, encoder: &EncoderConfig) -> Result<Self> {
        read_json::<Raw>(path)?.check(encoder, path)
    }
}

impl Raw {
    fn check(self, encoder: &EncoderConfig, path: &Path) -> Result<DebertaConfig> {
        let refuse = |key: &str, got: &dyn std::fmt::Display, supported: &str| {
            Err(file_error(path, format!("`{key}` {got} is not supported; supported: {supported}")))
        };
        let norms = self.norm_rel_ebd.as_deref().unwrap_or("none").to_lowercase();
        let norms: Vec<&str> = norms.split('|').map(str::trim).collect();
        if let Some(norm) = norms.iter().find(|norm| !["none", "layer_norm"].contains(norm)) {
            return refuse("norm_rel_ebd", norm, "none, layer_norm");
        }
        if encoder.architecture == Architecture::Deberta {
            // What only the second version computes; a first one that asks for it was trained by other code.
            let later = [
                ("share_att_key", self.share_att_key),
                ("position_buckets", self.position_buckets > 0),
                ("norm_rel_ebd", norms.contains(&"layer_norm")),
                ("conv_kernel_size", self.conv_kernel_size > 0),
            ];
            if let Some((key, _)) = later.iter().find(|(_, asked)| *asked) {
                return Err(file_error(path, format!("`{key}` is not supported in `deberta`; it is in `deberta-v2`")));
            }
        }
        if self.talking_head {
            return refuse("talking_head", &true, "false");
        }
        if let Some(size) = self.embedding_size.filter(|&size| size != encoder.hidden_size) {
            return refuse("embedding_size", &size, "that of `hidden_size`");
        }
        if let Some(size) = self.attention_head_size.filter(|&size| size != encoder.head_dim()) {
            return refuse("attention_head_size", &size, "`hidden_size` / `num_attention_heads`");
        }
        let conv = match self.conv_kernel_size {
            0 => None,
            even if even.is_multiple_of(2) => return refuse("conv_kernel_size", &even, "odd numbers"),
            kernel_size => {
                if let Some(groups) = self.conv_groups.filter(|&groups| groups != 1) {
                    return refuse("conv_groups", &groups, "1");
                }
                let name = self.conv_act.as_deref().unwrap_or("tanh");
                Some(ConvConfig { kernel_size, activation: lookup(&ACTIVATIONS, "`conv_act`", name, path)? })
            }
        };
        let types = match self.pos_att_type {
            None => Vec::new(),
            Some(PositionTypes::List(list)) => list,
            Some(PositionTypes::Joined(text)) => text.to_lowercase().split('|').map(|t| t.trim().to_string()).collect(),
        };
        if let Some(other) = types.iter().find(|t| !["c2p", "p2c"].contains(&t.as_str())) {
            return refuse("pos_att_type", other, "c2p, p2c");
        }
        let has = |name: &str| types.iter().any(|t| t == name);
        let (content_to_position, position_to_content) = (has("c2p"), has("p2c"));
        let relative = match self.relative_attention {
            false => None,
            true => {
                let reach = usize::try_from(self.max_relative_positions).ok().filter(|&reach| reach > 0);
                let reach = reach.unwrap_or(encoder.num_positions);
                let buckets = usize::try_from(self.position_buckets).ok().filter(|&buckets| buckets > 0);
                // Beyond half of the buckets their width grows by logarithms, of a ratio that must exceed 1.
                if let Some(buckets) = buckets.filter(|&buckets| buckets < 2 || reach <= buckets / 2 + 1) {
                    let supported = format!("2 to less than {}", 2 * reach.saturating_sub(1));
                    return refuse("position_buckets", &buckets, &supported);
                }
                Some(RelativeConfig {
                    span: buckets.unwrap_or(reach),
                    log_buckets_to: buckets.map(|_| reach),
                    content_to_position,
                    position_to_content,
                    share_att_key: self.share_att_key,
                    layer_norm: norms.contains(&"layer_norm"),
                })
            }
        };
        Ok(DebertaConfig {
            num_score_parts: 1 + usize::from(content_to_position) + usize::from(position_to_content),
            relative,
            position_biased_input: self.position_biased_input,
            conv,
        })
    }
}
