//! Attention within each sequence of a packed batch.

use candle_core::Tensor;

use super::{CuSeqlens, check_dims, reference};
use crate::{Error, Result};

/// Which keys a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mask {
    /// All of its sequence.
    #[default]
    Full,
    /// Those not after it.
    Causal,
}

/// `softmax(scale q kᵀ + bias) v`, every sequence and head by itself.
pub struct Attention {
    num_heads: usize,
    head_dim: usize,
    scale: f64,
    distance_bias: Option<Tensor>,
    mask: Mask,
}

impl Attention {
    /// `distance_bias[h][key - query + max_seq_len - 1]` is added to head h's scaled score of that pair:
    /// it carries relative position buckets (MPNet, T5) and ALiBi slopes alike.
    ///
    /// Shapes: `distance_bias` [num_heads, 2 * max_seq_len - 1].
    /// Errors: [`Error::Shape`] for a zero size or a bias of another shape.
    pub fn new(
        num_heads: usize,
        head_dim: usize,
        scale: f64,
        distance_bias: Option<Tensor>,
        mask: Mask,
    ) -> Result<Self> {
        let shape = |operand, expected: &str, got: String| Error::Shape {
            op: "attention",
            operand,
            expected: expected.to_string(),
            got,
        };
        if num_heads == 0 || head_dim == 0 {
            return Err(shape("num_heads, head_dim", "at least 1 each", format!("{num_heads}, {head_dim}")));
        }
        if let Some(bias) = &distance_bias {
            let odd = bias.dims().last().is_some_and(|n| n % 2 == 1);
            if bias.dims().len() != 2 || bias.dims()[0] != num_heads || !odd {
                let expected = format!("[{num_heads}, 2 * max_seq_len - 1]");
                return Err(shape("distance_bias", &expected, format!("{:?}", bias.dims())));
            }
        }
        Ok(Self { num_heads, head_dim, scale, distance_bias, mask })
    }

    /// Shapes: `qkv` [total_tokens, 3 * num_heads * head_dim], a token's queries, then its keys, then its
    /// values, each head by head. Returns [total_tokens, num_heads * head_dim].
    ///
    /// Errors: [`Error::Shape`] if `qkv` is of another shape, or a sequence is longer than the distance
    /// bias reaches.
    pub fn forward(&self, qkv: &Tensor, cu_seqlens: &CuSeqlens) -> Result<Tensor> {
        let width = self.num_heads * self.head_dim;
        check_dims("attention", "qkv", qkv, &[cu_seqlens.total_tokens(), 3 * width])?;
        if let Some(bias) = &self.distance_bias {
            let max_seq_len = bias.dims()[1].div_ceil(2);
            if cu_seqlens.max_seqlen() > max_seq_len {
                return Err(Error::Shape {
                    op: "attention",
                    operand: "cu_seqlens",
                    expected: format!("sequences of at most {max_seq_len} tokens"),
                    got: cu_seqlens.max_seqlen().to_string(),
                });
            }
        }
        let bias = self.distance_bias.as_ref();
        reference::attention(qkv, cu_seqlens, self.num_heads, self.head_dim, self.scale, bias, self.mask)
    }
}
