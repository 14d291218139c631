//! From token ids to the first hidden state.

use candle_core::Tensor;

use super::norm::AddLayerNorm;
use super::{CuSeqlens, check_dims, reference};
use crate::{Error, Result};

/// `LayerNorm(word[id] + position[i + position_offset] + token_type[type id])`, i counted from each
/// sequence's first token.
pub struct Embedding {
    word: Tensor,
    position: Tensor,
    token_type: Option<Tensor>,
    norm: AddLayerNorm,
    position_offset: usize,
    hidden_size: usize,
}

impl Embedding {
    /// `position_offset` is 0, or padding_idx + 1 for RoBERTa and its kin, whose first positions are
    /// kept for padding.
    ///
    /// Shapes: `word` [vocab_size, hidden_size]; `position` [num_positions, hidden_size]; `token_type`
    /// [type_vocab_size, hidden_size].
    /// Errors: [`Error::Shape`] if they do not fit each other.
    pub fn new(
        word: Tensor,
        position: Tensor,
        token_type: Option<Tensor>,
        norm: AddLayerNorm,
        position_offset: usize,
    ) -> Result<Self> {
        let hidden_size = word.dims().get(1).copied().unwrap_or(0);
        for (operand, table) in
            [("word", Some(&word)), ("position", Some(&position)), ("token_type", token_type.as_ref())]
        {
            if let Some(table) = table {
                let rows = table.dims().first().copied().unwrap_or(0);
                check_dims("embedding", operand, table, &[rows, hidden_size])?;
            }
        }
        Ok(Self { word, position, token_type, norm, position_offset, hidden_size })
    }

    /// Columns of the result.
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    /// Longest sequence the position table reaches.
    pub fn max_seq_len(&self) -> usize {
        self.position.dims()[0].saturating_sub(self.position_offset)
    }

    /// Shapes: `input_ids`, `token_type_ids` [total_tokens] u32. No `token_type_ids` means all 0.
    /// Returns [total_tokens, hidden_size].
    ///
    /// Errors: [`Error::Shape`] for other shapes, a sequence longer than the positions reach, or an id
    /// beyond its table.
    pub fn forward(
        &self,
        input_ids: &Tensor,
        token_type_ids: Option<&Tensor>,
        cu_seqlens: &CuSeqlens,
    ) -> Result<Tensor> {
        cu_seqlens.check_tokens("embedding", "input_ids", input_ids.elem_count())?;
        check_dims("embedding", "input_ids", input_ids, &[cu_seqlens.total_tokens()])?;
        if let Some(ids) = token_type_ids {
            check_dims("embedding", "token_type_ids", ids, &[cu_seqlens.total_tokens()])?;
        }
        if cu_seqlens.max_seqlen() > self.max_seq_len() {
            return Err(Error::Shape {
                op: "embedding",
                operand: "cu_seqlens",
                expected: format!("sequences of at most {} tokens", self.max_seq_len()),
                got: cu_seqlens.max_seqlen().to_string(),
            });
        }
        let sum = reference::embedding_sum(
            &self.word,
            &self.position,
            self.token_type.as_ref(),
            self.position_offset,
            input_ids,
            token_type_ids,
            cu_seqlens,
        )?;
        self.norm.forward(&sum, None)
    }
}
