//! What each architecture calls the tensors of its heads, and what its heads compute.
//!
//! Source: the classes of transformers 5 for each (`...ForSequenceClassification`, `...ForMaskedLM`), and the code
//! published with NomicBERT and GTE where it calls a tensor otherwise.

use super::super::config::{Architecture, EncoderConfig};
use super::super::gated::config::Family;
use super::super::head::ScoredAt;
use super::super::pack::Pooling;
use super::super::weights::{Weights, file_error};
use super::HeadSpec;
use crate::Result;
use crate::ops::linear::Activation;

/// The transformation before the scores: a product with its activation, then perhaps a norm.
pub(super) struct Transform {
    /// `{}` stands for the encoder's prefix.
    pub dense: &'static str,
    pub bias: bool,
    pub activation: Activation,
    pub norm: Option<&'static str>,
    pub norm_bias: bool,
    pub out_width: usize,
}

/// The bias of the last product.
pub(super) enum Bias {
    None,
    IfThere(&'static str),
    /// The first of these that there is; the first one's name is in the error where there is none.
    FirstOf(&'static [&'static str]),
}

/// Names of the tensors of a head.
pub(super) struct HeadNames {
    pub transform: Option<Transform>,
    /// Its `.weight`; where there is none, the word embeddings.
    pub out: &'static str,
    pub bias: Bias,
}

const CLASSIFIER: Bias = Bias::FirstOf(&["classifier.bias"]);

/// Which vector a sequence's scores are of.
pub(super) fn scored_at(config: &EncoderConfig, spec: &HeadSpec) -> Result<ScoredAt> {
    Ok(match config.architecture {
        Architecture::Gated(Family::ModernBert) => ScoredAt::Pooled(spec.config.pooling(spec.config_file)?),
        Architecture::Gated(Family::Qwen3 | Family::Mistral | Family::Gemma3) => match spec.config.pad_id {
            None => ScoredAt::Pooled(Pooling::LastToken),
            Some(pad_id) => ScoredAt::LastBut(pad_id),
        },
        // The classifiers of these architectures were trained on the first token's vector.
        _ => ScoredAt::Pooled(Pooling::Cls),
    })
}

/// The head of sequence classification.
pub(super) fn scores(config: &EncoderConfig, spec: &HeadSpec) -> Result<HeadNames> {
    let dense = |dense, activation| Transform {
        dense,
        bias: true,
        activation,
        norm: None,
        norm_bias: false,
        out_width: config.hidden_size,
    };
    const OUT_PROJ: Bias = Bias::FirstOf(&["classifier.out_proj.bias"]);
    let (transform, out, bias) = match config.architecture {
        Architecture::Bert | Architecture::Gated(Family::NomicBert | Family::Gte | Family::JinaBert) => {
            (dense("{}pooler.dense", Activation::Tanh), "classifier", CLASSIFIER)
        }
        Architecture::DistilBert => (dense("pre_classifier", Activation::Relu), "classifier", CLASSIFIER),
        Architecture::Albert => (dense("{}pooler", Activation::Tanh), "classifier", CLASSIFIER),
        Architecture::Deberta | Architecture::DebertaV2 => {
            (dense("pooler.dense", spec.config.activation(spec.config_file)?), "classifier", CLASSIFIER)
        }
        Architecture::Electra => (dense("classifier.dense", Activation::Gelu), "classifier.out_proj", OUT_PROJ),
        Architecture::Roberta | Architecture::XlmRoberta | Architecture::MpNet => {
            (dense("classifier.dense", Activation::Tanh), "classifier.out_proj", OUT_PROJ)
        }
        Architecture::Gated(Family::ModernBert) => (modern_bert(config, spec)?, "classifier", CLASSIFIER),
        Architecture::Gated(Family::Qwen3 | Family::Mistral | Family::Gemma3) => {
            return Ok(HeadNames { transform: None, out: "score", bias: Bias::None });
        }
    };
    Ok(HeadNames { transform: Some(transform), out, bias })
}

/// The head of token classification.
pub(super) fn token_scores(config: &EncoderConfig, spec: &HeadSpec) -> Result<HeadNames> {
    Ok(match config.architecture {
        Architecture::Gated(Family::Qwen3 | Family::Mistral | Family::Gemma3) => {
            HeadNames { transform: None, out: "score", bias: Bias::IfThere("score.bias") }
        }
        Architecture::Gated(Family::ModernBert) => {
            HeadNames { transform: Some(modern_bert(config, spec)?), out: "classifier", bias: CLASSIFIER }
        }
        _ => HeadNames { transform: None, out: "classifier", bias: CLASSIFIER },
    })
}

/// The head of masked tokens.
pub(super) fn words(weights: &Weights, config: &EncoderConfig, spec: &HeadSpec) -> Result<HeadNames> {
    let transform = |dense, activation, norm| Transform {
        dense,
        bias: true,
        activation,
        norm: Some(norm),
        norm_bias: true,
        // As wide as the table that the scores are often made with.
        out_width: config.embedding_size(),
    };
    const PREDICTIONS: Bias = Bias::FirstOf(&["cls.predictions.bias", "cls.predictions.decoder.bias"]);
    const LM_HEAD: Bias = Bias::FirstOf(&["lm_head.bias", "lm_head.decoder.bias"]);
    let bert = |norm| {
        let transform = transform("cls.predictions.transform.dense", config.activation, norm);
        (transform, "cls.predictions.decoder", PREDICTIONS)
    };
    let (transform, out, bias) = match config.architecture {
        // Both versions were trained with a head of their own, and transformers trains another.
        Architecture::Deberta | Architecture::DebertaV2 if weights.contains("lm_predictions.lm_head.dense.weight") => {
            let (dense, norm) = ("lm_predictions.lm_head.dense", "lm_predictions.lm_head.LayerNorm");
            // The scores are made with the word embeddings always: no tensor has this name.
            let out = "lm_predictions.lm_head.decoder";
            (transform(dense, config.activation, norm), out, Bias::FirstOf(&["lm_predictions.lm_head.bias"]))
        }
        Architecture::Bert
        | Architecture::Deberta
        | Architecture::DebertaV2
        | Architecture::Gated(Family::JinaBert) => bert("cls.predictions.transform.LayerNorm"),
        Architecture::Gated(Family::NomicBert) => bert("cls.predictions.transform.layer_norm"),
        Architecture::DistilBert => (
            transform("vocab_transform", config.activation, "vocab_layer_norm"),
            "vocab_projector",
            Bias::FirstOf(&["vocab_projector.bias"]),
        ),
        Architecture::Electra => (
            transform("generator_predictions.dense", Activation::Gelu, "generator_predictions.LayerNorm"),
            "generator_lm_head",
            Bias::FirstOf(&["generator_lm_head.bias"]),
        ),
        Architecture::Albert => (
            transform("predictions.dense", config.activation, "predictions.LayerNorm"),
            "predictions.decoder",
            Bias::FirstOf(&["predictions.bias", "predictions.decoder.bias"]),
        ),
        Architecture::Gated(Family::Gte) => {
            // The first is what the code published with the models calls it.
            let norm = if weights.contains("lm_head.norm.weight") { "lm_head.norm" } else { "lm_head.layer_norm" };
            (transform("lm_head.dense", config.activation, norm), "lm_head.decoder", LM_HEAD)
        }
        Architecture::Roberta | Architecture::XlmRoberta | Architecture::MpNet => {
            (transform("lm_head.dense", Activation::Gelu, "lm_head.layer_norm"), "lm_head.decoder", LM_HEAD)
        }
        Architecture::Gated(Family::ModernBert) => {
            let bias = match spec.config.decoder_bias.unwrap_or(true) {
                true => Bias::FirstOf(&["decoder.bias"]),
                false => Bias::None,
            };
            (modern_bert(config, spec)?, "decoder", bias)
        }
        Architecture::Gated(Family::Qwen3 | Family::Mistral | Family::Gemma3) => {
            let reason = format!("task `{}`: models of this architecture have no head for masked tokens", spec.task);
            return Err(file_error(weights.path(), reason));
        }
    };
    Ok(HeadNames { transform: Some(transform), out, bias })
}

/// ModernBERT has one transformation for all its heads.
fn modern_bert(config: &EncoderConfig, spec: &HeadSpec) -> Result<Transform> {
    Ok(Transform {
        dense: "head.dense",
        bias: spec.config.dense_bias.unwrap_or(false),
        activation: spec.config.activation(spec.config_file)?,
        norm: Some("head.norm"),
        norm_bias: spec.config.norm_bias.unwrap_or(false),
        out_width: config.hidden_size,
    })
}
