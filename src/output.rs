//! What a client gets, in words no protocol owns. Plain values, no I/O.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use crate::request::ModelName;

/// Embeddings of one request, in the order of its inputs.
#[derive(Debug, Clone)]
pub struct Output {
    pub model: ModelName,
    /// One vector an input; f32, `dimensions` or hidden_size values.
    pub rows: Vec<Vec<f32>>,
    /// [num_inputs], tokens of each input, special tokens included: what a cached row reports again.
    pub num_tokens: Vec<u32>,
    pub usage: Usage,
    pub phases: Phases,
}

/// One vector of an answer: its own, or one that the cache holds too.
#[derive(Debug, Clone)]
pub enum Row {
    Own(Vec<f32>),
    Shared(Arc<[f32]>),
}

impl Deref for Row {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::Own(values) => values,
            Self::Shared(values) => values,
        }
    }
}

/// What was counted on the way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens, special tokens included, over all inputs; those of a cached result count as when it was computed.
    pub num_tokens: usize,
    /// Unicode scalar values of all text inputs.
    pub num_chars: usize,
}

/// Where the time went. Of several inputs, each phase is the mean over those that were computed for this request (as
/// TEI reports); where all came from the cache there is only `total`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Phases {
    pub tokenize: Duration,
    /// From the push to the launch of the batch.
    pub queue: Duration,
    /// From the launch to the rows on the host.
    pub inference: Duration,
    /// From the body parsed to the output ready.
    pub total: Duration,
}

/// One token of a text, as `/tokenize` answers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    pub id: u32,
    /// The vocabulary's form of it: "##ing".
    pub piece: String,
    /// As the text has it.
    pub text: String,
    pub special: bool,
    /// Offsets in Unicode scalar values, `None` for tokens the tokenizer added.
    pub start: Option<usize>,
    pub stop: Option<usize>,
}
