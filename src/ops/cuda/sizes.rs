//! What an encoder's sizes come to: whether the kernels take them, and the memory of weights and activations.

use super::arena::Arena;
use super::attention::HEAD_DIMS;
use super::kernels::MAX_HIDDEN_SIZE;
use super::{HalfType, Span};
use crate::Result;
use crate::ops::linear::Activation;

const HALF: usize = HalfType::NUM_BYTES;

/// The sizes of an encoder.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EncoderSizes {
    pub vocab_size: usize,
    /// Rows of the position table.
    pub num_positions: usize,
    /// Row of a sequence's first token.
    pub position_offset: usize,
    /// Rows of the token-type table; 0 where there is none.
    pub num_token_types: usize,
    pub hidden_size: usize,
    pub num_heads: usize,
    pub num_layers: usize,
    pub intermediate_size: usize,
    pub activation: Activation,
    pub layer_norm_eps: f64,
}

impl EncoderSizes {
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads.max(1)
    }

    /// Longest sequence the position table reaches.
    pub fn max_seq_len(&self) -> usize {
        self.num_positions.saturating_sub(self.position_offset)
    }

    /// Refuses, in words, a model that the kernels do not compute.
    pub fn supported(&self) -> Result<(), String> {
        if !HEAD_DIMS.contains(&self.head_dim()) || self.head_dim() * self.num_heads != self.hidden_size {
            return Err(format!("attention heads have {} values; the kernels take 32, 64, 96 or 128", self.head_dim()));
        }
        if self.hidden_size > MAX_HIDDEN_SIZE {
            return Err(format!("hidden_size is {}; the kernels take up to {MAX_HIDDEN_SIZE}", self.hidden_size));
        }
        Ok(())
    }

    /// Device bytes of all weights, to some kilobytes.
    pub fn weight_bytes(&self) -> usize {
        let (hidden, intermediate) = (self.hidden_size, self.intermediate_size);
        let tables = (self.vocab_size + self.num_positions + self.num_token_types) * hidden * HALF;
        let layer = (4 * hidden * hidden + 2 * hidden * intermediate) * HALF;
        // Biases and norms in both forms, each padded.
        let small = 16 * Arena::padded((3 * hidden + intermediate) * 4);
        tables + self.num_layers * (layer + small)
    }

    /// Device bytes of the activations of a bucket.
    pub fn scratch_bytes(&self, token_capacity: usize) -> usize {
        3 * Arena::padded(token_capacity * self.hidden_size * HALF)
            + Arena::padded(token_capacity * self.wide_columns() * HALF)
    }

    /// Columns of the activation that is query, key and value first, and the feed-forward's intermediate after.
    fn wide_columns(&self) -> usize {
        (3 * self.hidden_size).max(self.intermediate_size)
    }
}

/// The activations of a forward. What `hidden` holds at its end is the result.
#[derive(Debug, Clone, Copy)]
pub struct Scratch {
    /// [token_capacity, hidden_size], as the two after it.
    pub(super) hidden: Span,
    pub(super) context: Span,
    pub(super) projected: Span,
    /// [token_capacity, max(3 * hidden_size, intermediate_size)]
    pub(super) wide: Span,
}

impl Scratch {
    /// Cuts them for the largest bucket; smaller ones use the beginnings.
    pub fn cut(arena: &mut Arena, sizes: &EncoderSizes, token_capacity: usize) -> Result<Self> {
        let num_bytes = token_capacity * sizes.hidden_size * HALF;
        Ok(Self {
            hidden: arena.cut(num_bytes)?,
            context: arena.cut(num_bytes)?,
            projected: arena.cut(num_bytes)?,
            wide: arena.cut(token_capacity * sizes.wide_columns() * HALF)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bert_base() -> EncoderSizes {
        EncoderSizes {
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
        }
    }

    #[test]
    fn the_weights_of_bert_base_are_counted() {
        // 108.9 million parameters without the pooler, in 2 bytes each; the rest is padding and norms in f32.
        let parameters = 108_891_648 * 2;
        let counted = bert_base().weight_bytes();
        assert!(counted > parameters && counted < parameters * 103 / 100, "{counted}");
        // 16384 tokens: 3 of 768 columns and one of 3072.
        assert_eq!(bert_base().scratch_bytes(16384), 16384 * (3 * 768 + 3072) * 2);
    }

    #[test]
    fn what_the_kernels_do_not_compute_is_named() {
        assert_eq!(bert_base().supported(), Ok(()));
        let odd = EncoderSizes { num_heads: 16, ..bert_base() }.supported().unwrap_err();
        assert!(odd.contains("48 values"), "{odd}");
        let wide = EncoderSizes { hidden_size: 16384, num_heads: 128, ..bert_base() }.supported().unwrap_err();
        assert!(wide.contains("16384"), "{wide}");
    }
}
