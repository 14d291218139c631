//! The host form of a batch: sequences flat, one after another, no padding anywhere.

use std::sync::Arc;

pub use crate::ops::pool::{Pooling, RowSpec};
use crate::{Error, Result};

/// What is wanted of one sequence. It decides what its row holds; no row is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// One vector: [dimensions].
    Vector(RowSpec),
    /// All hidden states: [seq_len * hidden_size], token by token.
    TokenVectors,
    /// Token ids of the vocabulary with their weights, [id, weight, id, weight, ...], ids rising and weights above 0. Ids
    /// are exact in f32: no vocabulary has 2^24 tokens. A sequence without any has the one pair [0, 0].
    Sparse,
    /// One score a label: [num_labels], as the model gives them.
    Scores,
    /// One score a label for each token: [seq_len * num_labels].
    TokenScores,
    /// For each token that is the mask, in their order, the likeliest tokens: [num_masks * k * 2], pairs of id and
    /// probability, the likeliest first. k is `top_k`, or the number of targets or of the vocabulary where it is less.
    Masked { top_k: u32, targets: Option<Arc<[u32]>> },
    /// All outputs of a tensor model, one after another: [sum of their values].
    Outputs,
}

impl From<RowSpec> for Wanted {
    fn from(row: RowSpec) -> Self {
        Self::Vector(row)
    }
}

impl Wanted {
    /// The row of a vector; `None` for anything else.
    pub fn vector(&self) -> Option<RowSpec> {
        match self {
            Self::Vector(row) => Some(*row),
            _ => None,
        }
    }
}

/// A batch as the model takes it.
///
/// ```text
/// sequences   [101 7592 102] [101 2088 999 102]
/// input_ids    101 7592 102   101 2088 999 102      [total_tokens]
/// cu_seqlens   0              3                7    [num_seqs + 1]
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PackedInput {
    /// [total_tokens], each < vocab_size.
    pub input_ids: Vec<u32>,
    /// [total_tokens]; all 0 for models without segments.
    pub token_type_ids: Vec<u32>,
    /// [num_seqs + 1], first 0, strictly rising, last total_tokens. Positions are derived from it.
    pub cu_seqlens: Vec<u32>,
    /// [num_seqs]: what each result row holds.
    pub rows: Vec<Wanted>,
    /// The numbers of all inputs that are no text, one after another. Their `input_ids` are fillers.
    pub values: Vec<f32>,
    /// [num_seqs + 1], first 0, rising, last the number of values; empty where no input has any. Sequence i is numbers
    /// where `cu_values[i] < cu_values[i + 1]`.
    pub cu_values: Vec<usize>,
}

impl PackedInput {
    pub fn num_seqs(&self) -> usize {
        self.rows.len()
    }

    pub fn total_tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Length in tokens of the longest sequence; 0 for an empty batch.
    pub fn max_seqlen(&self) -> usize {
        self.cu_seqlens.windows(2).map(|w| (w[1] - w[0]) as usize).max().unwrap_or(0)
    }

    /// Adds one sequence at the end. `token_type_ids` empty means all 0.
    pub fn push(&mut self, input_ids: &[u32], token_type_ids: &[u32], row: impl Into<Wanted>) {
        if self.cu_seqlens.is_empty() {
            self.cu_seqlens.push(0);
        }
        self.input_ids.extend_from_slice(input_ids);
        self.token_type_ids.extend_from_slice(token_type_ids);
        self.token_type_ids.resize(self.input_ids.len(), 0);
        self.cu_seqlens.push(self.input_ids.len() as u32);
        self.rows.push(row.into());
        if !self.cu_values.is_empty() {
            self.cu_values.push(self.values.len());
        }
    }

    /// Adds one input of numbers at the end, which counts as `num_tokens` tokens. `values` is not empty.
    pub fn push_values(&mut self, values: &[f32], num_tokens: usize, row: impl Into<Wanted>) {
        if self.cu_values.is_empty() {
            self.cu_values.resize(self.num_seqs() + 1, 0);
        }
        self.values.extend_from_slice(values);
        self.push(&vec![0; num_tokens], &[], row);
    }

    /// The numbers of sequence `i` < num_seqs; empty for a text.
    pub fn values_of(&self, i: usize) -> &[f32] {
        match self.cu_values.get(i..i + 2) {
            Some(bounds) => &self.values[bounds[0]..bounds[1]],
            None => &[],
        }
    }

    /// Checks the rules stated on the fields, once, before anything is launched.
    ///
    /// `dimensions` are a vector's values.
    ///
    /// Errors: [`Error::Shape`] naming the field that breaks its rule.
    pub fn check(&self, vocab_size: usize, max_seq_len: usize, dimensions: usize) -> Result<()> {
        let shape = |operand, expected: String, got: String| Error::Shape { op: "pack", operand, expected, got };
        let total = self.total_tokens();
        if self.token_type_ids.len() != total {
            return Err(shape("token_type_ids", total.to_string(), self.token_type_ids.len().to_string()));
        }
        if self.cu_seqlens.len() != self.num_seqs() + 1
            || self.cu_seqlens.first() != Some(&0)
            || self.cu_seqlens.last().map(|&n| n as usize) != Some(total)
        {
            let got = format!("{} bounds, last {:?}", self.cu_seqlens.len(), self.cu_seqlens.last());
            return Err(shape("cu_seqlens", format!("{} bounds, last {total}", self.num_seqs() + 1), got));
        }
        for w in self.cu_seqlens.windows(2) {
            let rising = w[0] < w[1];
            if !rising || (w[1] - w[0]) as usize > max_seq_len {
                return Err(shape(
                    "cu_seqlens",
                    format!("steps of 1 to {max_seq_len}"),
                    format!("{} to {}", w[0], w[1]),
                ));
            }
        }
        if let Some(id) = self.input_ids.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(shape("input_ids", format!("< {vocab_size}"), id.to_string()));
        }
        let mut vectors = self.rows.iter().filter_map(Wanted::vector);
        if let Some(row) = vectors.find(|r| r.dimensions == 0 || r.dimensions > dimensions) {
            return Err(shape("rows.dimensions", format!("1 to {dimensions}"), row.dimensions.to_string()));
        }
        Ok(())
    }
}
