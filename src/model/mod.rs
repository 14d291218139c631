//! From a folder to a running model: manifest, repository, weights, tokenizer, architectures.
//!
//! The contract between the queue and a device is [`Backend`] and [`InFlight`]; all of `serve` is
//! written against these two and can be tested with a model that computes nothing.

pub mod config;
mod deberta;
#[cfg(feature = "cuda")]
mod device_embed;
mod embed;
pub mod encode;
mod encoder_weights;
mod fingerprint;
pub mod gated;
mod head;
mod head_weights;
pub mod hub;
pub mod image;
pub mod install;
pub mod judge;
pub mod keras;
pub mod labels;
pub mod layers;
pub mod load;
pub mod manifest;
mod mpnet;
mod names;
pub mod pack;
pub mod post_norm;
pub mod prove;
pub mod quantize;
pub mod repository;
mod section;
pub mod sentence;
pub mod signature;
mod tensors;
mod tokenizer;
pub mod trunk;
pub mod vision;
pub mod weights;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::Result;
use crate::request::{ModelName, Task};
use encode::Encoder;
use pack::{PackedInput, RowSpec, Wanted};
use signature::Signature;

/// Tokens that are named for a mask where a request does not say how many: as the pipelines of `transformers` have it.
pub const DEFAULT_TOP_K: u32 = 5;

/// Computes a model on one device. Shared by the worker and by whoever asks what it is.
pub trait Backend: Send + Sync + 'static {
    /// Starts the forward of a packed batch and returns without waiting for the device where it can.
    ///
    /// Blocks: a CPU device computes here. The next batch may be launched before this one is finished.
    /// Errors: [`crate::Error::Shape`] for a batch that breaks [`PackedInput`]'s rules; for the device's own failures
    /// [`crate::Error::OutOfMemory`], after which smaller batches may be launched at once,
    /// [`crate::Error::DeviceLost`], after which nothing may, and [`crate::Error::Forward`] for the rest. May panic on
    /// a bug: the worker catches it.
    fn launch(&self, batch: PackedInput) -> Result<Box<dyn InFlight>>;

    /// Refuses limits whose batches the device has no memory for. Called before new limits are put in force.
    ///
    /// Blocks: no; also not while the device computes or hangs.
    /// Errors: [`crate::Error::Invalid`] naming the limit, what it takes and what there is.
    fn check_limits(&self, _max_batch_tokens: usize, _max_batch_size: usize) -> Result<()> {
        Ok(())
    }

    /// Told by the worker when the warm-up at the limits has passed: what that took can be compared with the plan.
    fn warmed_up(&self) {}

    /// Whether a batch that is not back after `ai.device_timeout` never will be, and nothing else can be computed in
    /// this process until then. So it is where a kernel hangs; a CPU is only slow.
    fn hangs_for_good(&self) -> bool {
        false
    }
}

/// A launched batch. Dropping it abandons the results, not the computation.
pub trait InFlight: Send {
    /// Whether `finish` returns without waiting for the device. The worker finishes such a batch at once
    /// instead of launching another first: a device that computes in `launch` says true, as here.
    fn is_ready(&self) -> bool {
        true
    }

    /// Waits for the device and copies the rows to the host.
    ///
    /// Errors: the device's own failures, as [`Backend::launch`] has them.
    fn finish(self: Box<Self>) -> Result<Rows>;
}

/// The result of a batch: row i answers sequence i.
///
/// Shapes: `values` holds the rows one after another; row i is `values[offsets[i]..offsets[i + 1]]`,
/// `offsets` [num_seqs + 1]. Rows differ in length when their requests asked for different `dimensions`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rows {
    pub values: Vec<f32>,
    pub offsets: Vec<usize>,
    /// Where the device has a clock of its own.
    pub device_times: Option<DeviceTimes>,
}

/// What a device was doing for one batch, by its own clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceTimes {
    /// The copy of the batch to the device.
    pub upload: Duration,
    /// From the end of the upload to the pooled rows.
    pub forward: Duration,
    /// From the pooled rows to their copy on the host. The next batch's upload and forward may go on beside it.
    pub download: Duration,
    /// From the end of the forward before to the beginning of this upload: nothing was computed in between. `None` for
    /// the first batch.
    pub idle: Option<Duration>,
}

impl Rows {
    /// No rows yet, with room for so many.
    pub fn with_capacity(num_rows: usize, num_values: usize) -> Self {
        let mut offsets = Vec::with_capacity(num_rows + 1);
        offsets.push(0);
        Self { values: Vec::with_capacity(num_values), offsets, device_times: None }
    }

    /// Number of rows.
    pub fn num_rows(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Row `i`, i < num_rows.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values[self.offsets[i]..self.offsets[i + 1]]
    }
}

/// What clients and operators may know of a loaded model.
#[derive(Debug, Clone, serde::Serialize)]
pub struct ModelInfo {
    pub name: ModelName,
    pub version: String,
    /// Of all that decides results: files, dtype, kind of device. Results may be shared where it is equal.
    pub fingerprint: String,
    /// One of [`manifest::TASKS`]: what the model was made for.
    pub task: String,
    /// Names of the scores of a classifier, in their order; empty for the others.
    pub labels: Vec<String>,
    /// Whether a text may have several labels: each score stands for itself, where otherwise they share 1.
    pub is_multi_label: bool,
    /// "bert", "xlm-roberta", ...: the manifest's or `config.json`'s `model_type`; "jina_bert" for a `bert` with ALiBi.
    pub architecture: String,
    /// "f32", "f16", "bf16": what is computed in, not what the file holds.
    pub dtype: String,
    /// "cpu", "cuda:0"; of several devices "cuda:0,1".
    pub device: String,
    /// Values of a token's vector. Of a tensor model: the values of all its outputs.
    pub hidden_size: usize,
    /// Values of a text's vector: `hidden_size`, or what the last `Dense` module makes of them.
    pub dimensions: usize,
    /// 1 where there are no token ids.
    pub vocab_size: usize,
    /// Longest sequence in tokens, special tokens included.
    pub max_seq_len: usize,
    /// What kinds of input it takes.
    pub signature: Signature,
    pub pooling: pack::Pooling,
    /// What `TaskParams::normalize: None` means.
    pub normalize: bool,
    /// Prompt name to prompt text.
    pub prompts: BTreeMap<String, String>,
    pub default_prompt: Option<String>,
    pub licence: Option<String>,
    /// Unix seconds of the model's files, for OpenAI's `created`.
    pub created: u64,
}

impl ModelInfo {
    /// Whether there is a head for this.
    pub fn does(&self, task: &Task) -> bool {
        match task {
            Task::Embed => self.task == "embed",
            // The engine's kernels give pooled rows alone.
            Task::EmbedAll => {
                self.task == "embed"
                    && self.signature.values.is_none()
                    && (self.dtype == "f32" || !self.device.starts_with("cuda"))
            }
            Task::Classify => matches!(self.task.as_str(), "classify" | "rerank"),
            Task::TokenClassify => self.task == "token_classify",
            Task::Sparse | Task::FillMask { .. } => matches!(self.task.as_str(), "sparse" | "fill_mask"),
            Task::Infer => self.task == "infer",
        }
    }

    /// What is computed where a request does not say what.
    pub fn main_task(&self) -> Task {
        match self.task.as_str() {
            "classify" | "rerank" => Task::Classify,
            "token_classify" => Task::TokenClassify,
            "sparse" => Task::Sparse,
            "infer" => Task::Infer,
            "fill_mask" => Task::FillMask { top_k: DEFAULT_TOP_K, targets: None },
            _ => Task::Embed,
        }
    }

    /// What trials of the model ask for: what clients will, as far as any text has it.
    pub fn usual_row(&self) -> Wanted {
        match self.main_task() {
            Task::Classify => Wanted::Scores,
            Task::TokenClassify => Wanted::TokenScores,
            // A made-up text has no mask.
            Task::Sparse | Task::FillMask { .. } => Wanted::Sparse,
            Task::Infer => Wanted::Outputs,
            Task::Embed | Task::EmbedAll => {
                Wanted::Vector(RowSpec { normalize: self.normalize, dimensions: self.dimensions })
            }
        }
    }
}

/// A model on one device.
#[derive(Clone)]
pub struct Placed {
    /// "cpu", "cuda:0".
    pub device: String,
    pub backend: Arc<dyn Backend>,
}

/// A model ready to serve.
#[derive(Clone)]
pub struct LoadedModel {
    pub info: Arc<ModelInfo>,
    pub encoder: Arc<Encoder>,
    /// One a device, all of the same weights. Not empty.
    pub backends: Vec<Placed>,
}

impl LoadedModel {
    /// The model on its first device, for who needs no more than one.
    pub fn backend(&self) -> &dyn Backend {
        &*self.backends[0].backend
    }
}
