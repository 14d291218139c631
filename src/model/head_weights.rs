//! The weights of a head, whatever its checkpoint calls them.

use super::config::{Architecture, EncoderConfig};
use super::head::{Head, Projection, Step};
use super::names::Names;
use super::pack::Pooling;
use super::weights::{Weights, file_error};
use crate::Result;
use crate::ops::linear::{Activation, Linear};
use crate::ops::norm::AddLayerNorm;

/// The transformation before the scores: a product with its activation, then perhaps a norm.
struct Transform {
    /// `{}` stands for the encoder's prefix.
    dense: &'static str,
    activation: Activation,
    norm: Option<&'static str>,
}

/// Names of the tensors of a head.
struct HeadNames {
    transform: Option<Transform>,
    /// Its `.weight`; where there is none, the word embeddings.
    out: &'static str,
    /// The bias of `out`: the first of these that there is.
    biases: [&'static str; 2],
}

/// Reads the head of a model of this task: one of [`super::manifest::TASKS`].
///
/// `num_labels` is the number of scores of a classifier, `mask_id` what stands for a token to be filled in.
/// Errors: [`crate::Error::Tensor`] for one that is missing or does not have the config's shape.
pub(super) fn read(
    weights: &Weights,
    config: &EncoderConfig,
    task: &str,
    pooling: Pooling,
    num_labels: usize,
    mask_id: Option<u32>,
) -> Result<Head> {
    if task == "embed" {
        return Ok(Head::Vectors(pooling));
    }
    if config.gated.is_some() {
        let reason = format!("task `{task}`: models of this architecture only embed here");
        return Err(file_error(weights.path(), reason));
    }
    let reader = Reader { weights, config, prefix: Names::of(config.architecture, weights.format()).prefix(weights)? };
    Ok(match task {
        "classify" | "rerank" => Head::Scores {
            // The classifiers of these architectures were trained on the first token's vector.
            pooling: Pooling::Cls,
            projection: reader.projection(&scores(config.architecture), num_labels)?,
        },
        "token_classify" => {
            let names = HeadNames { transform: None, out: "classifier", biases: ["classifier.bias", ""] };
            Head::TokenScores(reader.projection(&names, num_labels)?)
        }
        "sparse" | "fill_mask" => {
            Head::Words { projection: reader.projection(&words(config), config.vocab_size)?, mask_id }
        }
        _ => Head::Vectors(pooling),
    })
}

/// The head of sequence classification.
fn scores(architecture: Architecture) -> HeadNames {
    let (dense, activation, out, bias) = match architecture {
        Architecture::Bert => ("{}pooler.dense", Activation::Tanh, "classifier", "classifier.bias"),
        Architecture::DistilBert => ("pre_classifier", Activation::Relu, "classifier", "classifier.bias"),
        Architecture::Albert => ("{}pooler", Activation::Tanh, "classifier", "classifier.bias"),
        Architecture::Deberta | Architecture::DebertaV2 => {
            ("pooler.dense", Activation::Gelu, "classifier", "classifier.bias")
        }
        Architecture::Electra => {
            ("classifier.dense", Activation::Gelu, "classifier.out_proj", "classifier.out_proj.bias")
        }
        _ => ("classifier.dense", Activation::Tanh, "classifier.out_proj", "classifier.out_proj.bias"),
    };
    HeadNames { transform: Some(Transform { dense, activation, norm: None }), out, biases: [bias, ""] }
}

/// The head of masked tokens.
fn words(config: &EncoderConfig) -> HeadNames {
    let (dense, activation, norm, out, biases) = match config.architecture {
        Architecture::Bert => (
            "cls.predictions.transform.dense",
            config.activation,
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.decoder",
            ["cls.predictions.bias", "cls.predictions.decoder.bias"],
        ),
        Architecture::DistilBert => {
            ("vocab_transform", config.activation, "vocab_layer_norm", "vocab_projector", ["vocab_projector.bias", ""])
        }
        _ => (
            "lm_head.dense",
            Activation::Gelu,
            "lm_head.layer_norm",
            "lm_head.decoder",
            ["lm_head.bias", "lm_head.decoder.bias"],
        ),
    };
    HeadNames { transform: Some(Transform { dense, activation, norm: Some(norm) }), out, biases }
}

struct Reader<'a> {
    weights: &'a Weights,
    config: &'a EncoderConfig,
    /// What stands before the encoder's own names.
    prefix: String,
}

impl Reader<'_> {
    fn projection(&self, names: &HeadNames, num_scores: usize) -> Result<Projection> {
        let hidden = self.config.hidden_size;
        let mut steps = Vec::new();
        if let Some(Transform { dense, activation, norm }) = &names.transform {
            let dense = dense.replace("{}", &self.prefix);
            let weight = self.weights.get(&format!("{dense}.weight"), &[hidden, hidden])?;
            let bias = self.weights.get(&format!("{dense}.bias"), &[hidden])?;
            steps.push(Step::Linear(Linear::new(weight, Some(bias), *activation)?));
            if let Some(norm) = norm {
                // Checkpoints converted from TensorFlow call a norm's weight `gamma` and its bias `beta`.
                let is_old = self.weights.contains(&format!("{norm}.gamma"));
                let (weight, bias) = if is_old { ("gamma", "beta") } else { ("weight", "bias") };
                let weight = self.weights.get(&format!("{norm}.{weight}"), &[hidden])?;
                let bias = self.weights.get(&format!("{norm}.{bias}"), &[hidden])?;
                steps.push(Step::Norm(AddLayerNorm::new(weight, bias, self.config.layer_norm_eps)?));
            }
        }
        let own = format!("{}.weight", names.out);
        // A head over the vocabulary often shares the word embeddings' table.
        let tied = format!("{}{}", self.prefix, Names::of(self.config.architecture, self.weights.format()).word);
        let is_tied = num_scores == self.config.vocab_size && !self.weights.contains(&own);
        let weight = self.weights.get(if is_tied { &tied } else { &own }, &[num_scores, hidden])?;
        let bias = names.biases.iter().find(|name| self.weights.contains(name)).unwrap_or(&names.biases[0]);
        let bias = self.weights.get(bias, &[num_scores])?;
        Ok(Projection { steps, out: Linear::new(weight, Some(bias), Activation::None)? })
    }
}
