//! The device memory a model takes, planned before anything is allocated.

use std::fmt;

use super::arena::Arena;
use super::gemm::WORKSPACE_BYTES;
use super::layout::{Layout, WORD, seq_bucket, token_bucket};
use super::sizes::EncoderSizes;
use super::staging::Slot;

/// Slots that are kept for reuse: one on the device, one being packed, one being read.
pub const MAX_FREE_SLOTS: usize = 3;

/// The largest batch to hold memory for. A larger one is not refused: the memory grows when it comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    pub max_batch_tokens: usize,
    pub max_batch_size: usize,
}

impl Capacity {
    /// The largest of both in each.
    pub fn max(self, other: Self) -> Self {
        Self {
            max_batch_tokens: self.max_batch_tokens.max(other.max_batch_tokens),
            max_batch_size: self.max_batch_size.max(other.max_batch_size),
        }
    }

    /// Of the bucket that holds it.
    pub(super) fn layout(&self) -> Layout {
        // A sequence has at least one token.
        let num_seqs = self.max_batch_size.min(self.max_batch_tokens).max(1);
        Layout::new(token_bucket(self.max_batch_tokens), seq_bucket(num_seqs))
    }
}

/// Device memory of a model, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    pub weights: usize,
    /// Activations of the largest bucket.
    pub activations: usize,
    /// What cuBLASLt works in.
    pub workspace: usize,
    /// Uploads and rows of the batches under way.
    pub staging: usize,
}

impl Budget {
    /// Of a model with these sizes at this capacity.
    pub fn of(sizes: &EncoderSizes, capacity: &Capacity) -> Self {
        let layout = capacity.layout();
        Self {
            weights: sizes.weight_bytes(),
            activations: sizes.scratch_bytes(layout.token_capacity),
            workspace: WORKSPACE_BYTES,
            staging: Arena::padded(layout.num_words(true) * WORD)
                + MAX_FREE_SLOTS * Slot::device_bytes(layout.seq_capacity, sizes.hidden_size),
        }
    }

    /// All of it.
    pub fn num_bytes(&self) -> usize {
        self.weights + self.activations + self.workspace + self.staging
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |num_bytes: usize| num_bytes.div_ceil(1 << 20);
        write!(
            f,
            "{} MiB (weights {}, activations {}, workspace {}, staging {})",
            mib(self.num_bytes()),
            mib(self.weights),
            mib(self.activations),
            mib(self.workspace),
            mib(self.staging)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::linear::Activation;

    #[test]
    fn the_budget_adds_up_and_says_what_for() {
        let sizes = EncoderSizes {
            vocab_size: 30522,
            num_positions: 512,
            position_offset: 0,
            num_token_types: 2,
            hidden_size: 768,
            num_heads: 12,
            num_layers: 12,
            intermediate_size: 3072,
            activation: Activation::Gelu,
            layer_norm_eps: 1e-12,
        };
        let budget = Budget::of(&sizes, &Capacity { max_batch_tokens: 16384, max_batch_size: 1024 });
        assert_eq!(budget.activations, 16384 * (3 * 768 + 3072) * 2);
        assert_eq!(budget.workspace, 32 << 20);
        let text = budget.to_string();
        assert!(text.contains("activations 168") && text.contains("workspace 32"), "{text}");
        let parts = [budget.weights, budget.activations, budget.workspace, budget.staging];
        assert_eq!(budget.num_bytes(), parts.iter().sum::<usize>());
    }

    #[test]
    fn the_larger_of_two_capacities_holds_both() {
        let of = |max_batch_tokens, max_batch_size| Capacity { max_batch_tokens, max_batch_size };
        assert_eq!(of(100, 8).max(of(50, 9)), of(100, 9));
    }

    #[test]
    fn a_capacity_has_no_more_sequences_than_tokens() {
        let layout = Capacity { max_batch_tokens: 100, max_batch_size: 1000 }.layout();
        assert_eq!((layout.token_capacity, layout.seq_capacity), (128, 128));
    }
}
