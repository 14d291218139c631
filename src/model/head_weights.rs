//! The weights of a head, whatever its checkpoint calls them.

mod names;

use std::path::Path;

use candle_core::Tensor;

use self::names::{Bias, HeadNames, Transform};
use super::config::EncoderConfig;
use super::head::{Head, Projection, ScoredAt, Step};
use super::judge::Answers;
use super::labels::HeadConfig;
use super::names::prefix;
use super::pack::Pooling;
use super::sentence::VectorModule;
use super::trunk::word_name;
use super::weights::{Weights, file_error};
use crate::Result;
use crate::ops::linear::{Activation, Linear};
use crate::ops::norm::AddLayerNorm;

/// What a head is, beside its weights.
pub(super) struct HeadSpec<'a> {
    /// One of [`super::manifest::TASKS`].
    pub task: &'a str,
    /// Of embeddings.
    pub pooling: Pooling,
    /// What pooled vectors go through.
    pub modules: &'a [VectorModule],
    /// Number of scores of a classifier.
    pub num_labels: usize,
    /// What stands for a token to be filled in.
    pub mask_id: Option<u32>,
    /// What `config.json` says of it, and where that lies.
    pub config: &'a HeadConfig,
    pub config_file: &'a Path,
    /// Of a causal language model that answers with a word.
    pub answers: Option<Answers>,
}

/// Reads the head of a model.
///
/// Errors: [`crate::Error::Tensor`] for one that is missing or does not have the config's shape;
/// [`crate::Error::ModelFile`] for a task that the architecture has no head for.
pub(super) fn read(weights: &Weights, config: &EncoderConfig, spec: &HeadSpec) -> Result<Head> {
    let word = word_name(weights, config);
    let reader = Reader { weights, config, spec, word, prefix: prefix(word, weights)? };
    Ok(match spec.task {
        "classify" | "rerank" => match spec.answers {
            Some(answers) => Head::Scores {
                at: ScoredAt::Pooled(Pooling::LastToken),
                projection: Projection { steps: Vec::new(), out: reader.answer(answers)? },
            },
            None => Head::Scores {
                at: names::scored_at(config, spec)?,
                projection: reader.projection(&names::scores(config, spec)?, spec.num_labels)?,
            },
        },
        "token_classify" => Head::TokenScores(reader.projection(&names::token_scores(config, spec)?, spec.num_labels)?),
        "sparse" | "fill_mask" => Head::Words {
            projection: reader.projection(&names::words(weights, config, spec)?, config.vocab_size)?,
            mask_id: spec.mask_id,
        },
        _ => {
            let mut steps = Vec::with_capacity(spec.modules.len());
            for module in spec.modules {
                steps.push(match module {
                    VectorModule::Normalize => Step::Normalize,
                    VectorModule::Dense(dense) => Step::Linear(dense.read_weights(weights.device())?),
                });
            }
            Head::Vectors { pooling: spec.pooling, steps }
        }
    })
}

struct Reader<'a> {
    weights: &'a Weights,
    config: &'a EncoderConfig,
    spec: &'a HeadSpec<'a>,
    /// The word embeddings, below the prefix.
    word: &'static str,
    /// What stands before the encoder's own names.
    prefix: String,
}

impl Reader<'_> {
    fn projection(&self, names: &HeadNames, num_scores: usize) -> Result<Projection> {
        let mut width = self.config.hidden_size;
        let mut steps = Vec::new();
        if let Some(Transform { dense, bias, activation, norm, norm_bias, out_width }) = &names.transform {
            let dense = dense.replace("{}", &self.prefix);
            let weight = self.weights.get(&format!("{dense}.weight"), &[*out_width, width])?;
            let name = format!("{dense}.bias");
            let bias = if *bias { Some(self.weights.get(&name, &[*out_width])?) } else { None };
            steps.push(Step::Linear(Linear::new(weight, bias, *activation)?));
            width = *out_width;
            if let Some(norm) = norm {
                steps.push(Step::Norm(self.norm(norm, width, *norm_bias)?));
            }
        }
        let weight = self.weights.get(&self.out(names.out, num_scores), &[num_scores, width])?;
        let bias = match names.bias {
            Bias::None => None,
            Bias::IfThere(name) if !self.weights.contains(name) => None,
            Bias::IfThere(name) => Some(self.weights.get(name, &[num_scores])?),
            Bias::FirstOf(names) => {
                let name = names.iter().find(|name| self.weights.contains(name)).unwrap_or(&names[0]);
                Some(self.weights.get(name, &[num_scores])?)
            }
        };
        Ok(Projection { steps, out: Linear::new(weight, bias, Activation::None)? })
    }

    /// The tensor of the last product. A head over the vocabulary often shares the word embeddings' table.
    fn out(&self, out: &str, num_scores: usize) -> String {
        let own = format!("{out}.weight");
        let is_tied = num_scores == self.config.vocab_size && !self.weights.contains(&own);
        if is_tied { format!("{}{}", self.prefix, self.word) } else { own }
    }

    fn norm(&self, name: &str, width: usize, has_bias: bool) -> Result<AddLayerNorm> {
        // Checkpoints converted from TensorFlow call a norm's weight `gamma` and its bias `beta`.
        let is_old = self.weights.contains(&format!("{name}.gamma"));
        let (weight, bias) = if is_old { ("gamma", "beta") } else { ("weight", "bias") };
        let weight = self.weights.get(&format!("{name}.{weight}"), &[width])?;
        let bias = match has_bias {
            true => self.weights.get(&format!("{name}.{bias}"), &[width])?,
            false => weight.zeros_like()?,
        };
        AddLayerNorm::new(weight, bias, self.config.layer_norm_eps)
    }

    /// One row: the score of the one answer less that of the other, whose sigmoid is the softmax over both.
    fn answer(&self, answers: Answers) -> Result<Linear> {
        let (hidden, vocab_size) = (self.config.hidden_size, self.config.vocab_size);
        let beyond = [Some(answers.yes), answers.no].into_iter().flatten().find(|id| *id as usize >= vocab_size);
        if let Some(id) = beyond {
            let reason = format!("token id {id} of an answer is not below `vocab_size` {vocab_size}");
            return Err(file_error(self.spec.config_file, reason));
        }
        let table = self.weights.get(&self.out("lm_head", vocab_size), &[vocab_size, hidden])?;
        let row = |id: u32| -> Result<Tensor> { Ok(table.narrow(0, id as usize, 1)?.contiguous()?) };
        let weight = match answers.no {
            None => row(answers.yes)?,
            Some(no) => (row(answers.yes)? - row(no)?)?,
        };
        Linear::new(weight, None, Activation::None)
    }
}
