//! What a client asks for, in words no protocol owns. Plain values, no I/O.

use std::sync::Arc;
use std::time::Instant;

/// A model's name as clients write it in `model`.
pub type ModelName = Arc<str>;

/// One thing to compute on. Every input of a request is its own entry in the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    Text(String),
    /// Ids of the model's own vocabulary, special tokens included or not: taken as they are.
    TokenIds(Vec<u32>),
}

/// What to do with an input longer than the model's `max_seq_len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Truncation {
    /// Answer [`crate::Error::TooLarge`]: a silently shortened text is an altered result.
    #[default]
    Refuse,
    Cut(TruncationDirection),
}

/// The side tokens are cut from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TruncationDirection {
    Left,
    #[default]
    Right,
}

/// How embeddings are made. `None` means what the model's manifest says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EmbedParams {
    /// Scale each vector to length 1.
    pub normalize: Option<bool>,
    /// Matryoshka cut: keep the first `dimensions` values, then normalise. 1..=hidden_size.
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
    pub params: EmbedParams,
    /// After this nobody waits any more; entries not yet launched are dropped with [`crate::Error::Deadline`].
    pub deadline: Instant,
    pub priority: Priority,
}
