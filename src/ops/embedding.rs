//! From token ids to the first hidden state.

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use super::norm::AddLayerNorm;
use super::{CuSeqlens, check_dims, cpu_values, host_values, reference, simd};
use crate::{Error, Result};

/// `LayerNorm(word[id] + position[i + position_offset] + token_type[type id])`, i counted from each
/// sequence's first token.
pub struct Embedding {
    tables: Tables,
    norm: AddLayerNorm,
    position_offset: usize,
    num_positions: usize,
    hidden_size: usize,
}

/// The tables in the form their device computes with.
enum Tables {
    /// Row-major f32.
    Cpu { word: Vec<f32>, position: Vec<f32>, token_type: Option<Vec<f32>> },
    /// Any other device: the composition in [`reference`].
    Device { word: Tensor, position: Tensor, token_type: Option<Tensor> },
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
        let num_positions = position.dims()[0];
        let tables = if word.device().is_cpu() {
            let token_type = token_type.as_ref().map(host_values).transpose()?;
            Tables::Cpu { word: host_values(&word)?, position: host_values(&position)?, token_type }
        } else {
            Tables::Device { word, position, token_type }
        };
        Ok(Self { tables, norm, position_offset, num_positions, hidden_size })
    }

    /// Columns of the result.
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    /// Longest sequence the position table reaches.
    pub fn max_seq_len(&self) -> usize {
        self.num_positions.saturating_sub(self.position_offset)
    }

    /// Shapes: `input_ids`, `token_type_ids` [total_tokens] u32. No `token_type_ids` means all 0.
    /// Returns [total_tokens, hidden_size].
    ///
    /// Errors: [`Error::Shape`] for other shapes, a sequence longer than the positions reach, and an error for
    /// an id beyond its table.
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
        match &self.tables {
            Tables::Device { word, position, token_type } => {
                let sum = reference::embedding_sum(
                    word,
                    position,
                    token_type.as_ref(),
                    self.position_offset,
                    input_ids,
                    token_type_ids,
                    cu_seqlens,
                )?;
                self.norm.forward(&sum, None)
            }
            Tables::Cpu { word, position, token_type } => {
                let token_type_ids = token_type_ids.map(|ids| ids.to_vec1::<u32>()).transpose()?;
                let op = CpuEmbedding {
                    embedding: self,
                    word,
                    position,
                    token_type: token_type.as_deref(),
                    token_type_ids: token_type_ids.as_deref(),
                    cu_seqlens,
                };
                Ok(input_ids.contiguous()?.apply_op1_no_bwd(&op)?)
            }
        }
    }
}

struct CpuEmbedding<'a> {
    embedding: &'a Embedding,
    word: &'a [f32],
    position: &'a [f32],
    token_type: Option<&'a [f32]>,
    token_type_ids: Option<&'a [u32]>,
    cu_seqlens: &'a CuSeqlens,
}

/// Tokens a thread takes at a time: 48 KB at 384 columns.
const BLOCK_TOKENS: usize = 32;

impl CustomOp1 for CpuEmbedding<'_> {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let input_ids: &[u32] = cpu_values(storage, layout)?;
        let width = self.embedding.hidden_size;
        check_ids("input_ids", input_ids, self.word.len() / width)?;
        if let (Some(table), Some(ids)) = (self.token_type, self.token_type_ids) {
            check_ids("token_type_ids", ids, table.len() / width)?;
        }
        let bounds = self.cu_seqlens.host();
        let values = simd::fill_rows(input_ids.len(), width, BLOCK_TOKENS, |first, out| {
            // The sequence of the block's first token: the last bound not after it.
            let mut seq = bounds.partition_point(|&b| b as usize <= first) - 1;
            for (token, out) in (first..).zip(out.chunks_exact_mut(width)) {
                if token >= bounds[seq + 1] as usize {
                    seq += 1;
                }
                let position = token - bounds[seq] as usize + self.embedding.position_offset;
                let row = |i: usize| i * width..(i + 1) * width;
                let word = &self.word[row(input_ids[token] as usize)];
                let position = &self.position[row(position)];
                for (out, (w, p)) in out.iter_mut().zip(word.iter().zip(position)) {
                    *out = w + p;
                }
                if let Some(table) = self.token_type {
                    let type_id = self.token_type_ids.map_or(0, |ids| ids[token] as usize);
                    for (out, t) in out.iter_mut().zip(&table[row(type_id)]) {
                        *out += t;
                    }
                }
            }
            self.embedding.norm.normalise_rows(out);
        });
        Ok((CpuStorage::F32(values), (input_ids.len(), width).into()))
    }
}

/// Refuses an id beyond its table.
fn check_ids(operand: &str, ids: &[u32], rows: usize) -> candle_core::Result<()> {
    match ids.iter().find(|&&id| id as usize >= rows) {
        Some(id) => candle_core::bail!("embedding: {operand}: expected < {rows}, got {id}"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::testing::{assert_close, bounds, noise};
    use super::*;

    fn norm(width: usize) -> AddLayerNorm {
        AddLayerNorm::new(noise(8, &[width]), noise(9, &[width]), 1e-12).unwrap()
    }

    fn ids(num: usize, below: u32) -> Tensor {
        let ids: Vec<u32> = (0..num as u32).map(|i| (i * 7 + 3) % below).collect();
        Tensor::from_vec(ids, num, &Device::Cpu).unwrap()
    }

    #[test]
    fn equals_the_reference_with_and_without_segments_and_offset() {
        for width in [5, 32, 384] {
            for lens in [&[1][..], &[31, 32, 33], &[1, 1, 2, 70, 1]] {
                let cu_seqlens = bounds(lens);
                let total = cu_seqlens.total_tokens();
                let (word, position, segment) = (noise(1, &[50, width]), noise(2, &[72, width]), noise(3, &[2, width]));
                for offset in [0, 2] {
                    for (segment, type_ids) in
                        [(None, None), (Some(&segment), None), (Some(&segment), Some(ids(total, 2)))]
                    {
                        let (w, p, s) = (word.clone(), position.clone(), segment.cloned());
                        let embedding = Embedding::new(w, p, s, norm(width), offset).unwrap();
                        let got = embedding.forward(&ids(total, 50), type_ids.as_ref(), &cu_seqlens).unwrap();
                        let sum = reference::embedding_sum(
                            &word,
                            &position,
                            segment,
                            offset,
                            &ids(total, 50),
                            type_ids.as_ref(),
                            &cu_seqlens,
                        );
                        let expected = norm(width).forward(&sum.unwrap(), None).unwrap();
                        assert_close(&got, &expected, 1e-6, &format!("{width} wide, {lens:?}, offset {offset}"));
                    }
                }
            }
        }
    }

    #[test]
    fn other_devices_take_the_reference_and_agree() {
        let (word, position) = (noise(1, &[50, 16]), noise(2, &[12, 16]));
        let cpu = Embedding::new(word.clone(), position.clone(), None, norm(16), 0).unwrap();
        let tables = Tables::Device { word, position, token_type: None };
        let device = Embedding { tables, norm: norm(16), position_offset: 0, num_positions: 12, hidden_size: 16 };
        let (ids, cu_seqlens) = (ids(19, 50), bounds(&[7, 12]));
        let got = cpu.forward(&ids, None, &cu_seqlens).unwrap();
        assert_close(&got, &device.forward(&ids, None, &cu_seqlens).unwrap(), 1e-6, "dispatch");
    }

    #[test]
    fn limits_are_named() {
        let embedding = Embedding::new(noise(1, &[10, 4]), noise(2, &[6, 4]), None, norm(4), 2).unwrap();
        assert_eq!(embedding.max_seq_len(), 4);
        let error = |ids: &Tensor, lens: &[usize]| embedding.forward(ids, None, &bounds(lens)).unwrap_err().to_string();
        assert!(error(&ids(5, 10), &[5]).contains("at most 4 tokens"));
        assert!(error(&ids(3, 10), &[4]).contains("input_ids: expected 4 tokens, got 3"));
        assert!(error(&ids(4, 18), &[4]).contains("input_ids: expected < 10, got"));
        let narrow = Embedding::new(noise(1, &[10, 4]), noise(2, &[6, 5]), None, norm(4), 0);
        assert!(narrow.err().unwrap().to_string().contains("position"));
    }
}
