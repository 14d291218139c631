//! What a client asks for, in words no protocol owns. Plain values, no I/O.

use std::sync::Arc;
use std::time::Instant;

use crate::{Error, Result};

use bytes::Bytes;

/// A model's name as clients write it in `model`.
pub type ModelName = Arc<str>;

/// One thing to compute on. Every input of a request is its own entry in the queue.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    Text(String),
    /// Two texts that are read together, for models that were trained on pairs.
    Pair(String, String),
    /// Ids of the model's own vocabulary, special tokens included or not: taken as they are.
    TokenIds(Vec<u32>),
    /// The same, each with the segment it is of, for models with a table of token types. Made by [`Input::of_ids`]: as many
    /// types as ids, and not all 0.
    TypedTokenIds {
        ids: Vec<u32>,
        types: Vec<u32>,
    },
    /// A file: PNG, JPEG or WebP.
    Image(Bytes),
    /// The values of all inputs of a tensor model, one after another, each row-major. Integers are exact below 2^24.
    Values(Arc<[f32]>),
}

impl Input {
    /// Token ids with a type each, or with none: all 0 is what they are without.
    ///
    /// Shapes: `types` as `ids`, or empty.
    pub fn of_ids(ids: Vec<u32>, types: Vec<u32>) -> Self {
        match types.iter().all(|&t| t == 0) {
            true => Self::TokenIds(ids),
            false => Self::TypedTokenIds { ids, types },
        }
    }

    /// What it is, for errors.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) => "a text",
            Self::Pair(..) => "a pair of texts",
            Self::TokenIds(_) => "a list of token ids",
            Self::TypedTokenIds { .. } => "a list of token ids with types",
            Self::Image(_) => "an image",
            Self::Values(_) => "a row of tensors",
        }
    }

    /// Unicode scalar values of its texts.
    pub fn num_chars(&self) -> usize {
        match self {
            Self::Text(text) => text.chars().count(),
            Self::Pair(first, second) => first.chars().count() + second.chars().count(),
            Self::TokenIds(_) | Self::TypedTokenIds { .. } | Self::Image(_) | Self::Values(_) => 0,
        }
    }

    /// What it takes in memory, without what holds it together.
    pub fn num_bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Pair(first, second) => first.len() + second.len(),
            Self::TokenIds(ids) => 4 * ids.len(),
            Self::TypedTokenIds { ids, types } => 4 * (ids.len() + types.len()),
            Self::Image(file) => file.len(),
            Self::Values(values) => 4 * values.len(),
        }
    }
}

/// What to do with an input longer than the model's `max_seq_len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Truncation {
    /// Answer [`crate::Error::TooLarge`]: a silently shortened text is an altered result.
    #[default]
    Refuse,
    Cut(TruncationDirection),
    /// Of embeddings: read it in chunks of `max_seq_len` that share `overlap` tokens with the next one, and pool their
    /// vectors.
    Chunk {
        overlap: usize,
    },
}

impl Truncation {
    /// With what a request's `chunk_overlap` says. Errors: [`Error::Invalid`] where it asks for a cut too.
    pub fn or_chunks(self, chunk_overlap: Option<usize>) -> Result<Self> {
        match (self, chunk_overlap) {
            (kept, None) => Ok(kept),
            (Self::Refuse, Some(overlap)) => Ok(Self::Chunk { overlap }),
            (_, Some(_)) => {
                let reason = "an input is either cut, by `truncate`, or read in chunks".to_string();
                Err(Error::Invalid { field: "chunk_overlap".to_string(), reason })
            }
        }
    }
}

/// The side tokens are cut from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TruncationDirection {
    Left,
    #[default]
    Right,
}

/// What is computed of each input.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum Task {
    /// One vector.
    #[default]
    Embed,
    /// One vector a token.
    EmbedAll,
    /// Weights of the vocabulary's tokens: those above zero.
    Sparse,
    /// One score a label of the model; of a model with a single label, how well a pair fits.
    Classify,
    /// One score a label, for each token.
    TokenClassify,
    /// The likeliest tokens for each mask of a text.
    FillMask {
        /// How many of them, at least 1.
        top_k: u32,
        /// The only ones that are considered, where there are any.
        targets: Option<Arc<[u32]>>,
    },
    /// All outputs of a tensor model.
    Infer,
}

impl Task {
    /// The word of the API, of manifests and of records.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::EmbedAll => "embed_all",
            Self::Sparse => "sparse",
            Self::Classify => "classify",
            Self::TokenClassify => "token_classify",
            Self::FillMask { .. } => "fill_mask",
            Self::Infer => "infer",
        }
    }
}

/// How results are made. `None` means what the model's manifest says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TaskParams {
    pub task: Task,
    /// Of embeddings: scale each vector to length 1.
    pub normalize: Option<bool>,
    /// Of embeddings, Matryoshka cut: keep the first `dimensions` values, then normalise. 1..=the model's dimensions.
    pub dimensions: Option<usize>,
    pub truncation: Truncation,
    /// A name from the manifest's `prompts`, put before every text.
    pub prompt_name: Option<String>,
}

/// Who waits for a request's results, and so which requests it has to stand behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Priority {
    /// Somebody waits for the answer.
    #[default]
    Interactive,
    /// Nobody does now: it uses the room that interactive requests leave, and may wait for as long as they leave none.
    Background,
}

/// One client's request, checked for form but not yet tokenised.
#[derive(Debug, Clone)]
pub struct Request {
    /// `None` is the configured default model.
    pub model: Option<String>,
    /// Not empty.
    pub inputs: Vec<Input>,
    pub params: TaskParams,
    /// After this nobody waits any more; entries not yet launched are dropped with [`crate::Error::Deadline`].
    pub deadline: Instant,
    pub priority: Priority,
}
