//! One vector a sequence.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::{CuSeqlens, check_dims, reference};
use crate::{Error, Result};

/// The form of one result row, with nothing left to default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowSpec {
    /// Scale to length 1, after the cut.
    pub normalize: bool,
    /// Keep the first so many values; 1..=hidden_size.
    pub dimensions: usize,
}

/// How a sequence's token vectors become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pooling {
    /// The first token's vector.
    Cls,
    Mean,
    /// The largest value of each dimension.
    Max,
    LastToken,
    /// Token at position i (from 1) has weight i: SGPT, Muennighoff 2022, section 4.
    WeightedMean,
}

/// Pools each sequence, keeps the row's first `dimensions` values and, where asked, scales them to
/// length 1. A zero vector stays zero.
///
/// Shapes: `hidden` [total_tokens, hidden_size]; `rows` [num_seqs].
/// Returns [num_seqs, hidden_size] f32; beyond a row's `dimensions` it is 0, so that rows of different
/// length share one tensor and one copy to the host.
/// Errors: [`Error::Shape`] for other shapes or `dimensions` out of range.
/// Source: Reimers and Gurevych 2019, section 3 (mean, max, cls).
pub fn pool(hidden: &Tensor, cu_seqlens: &CuSeqlens, pooling: Pooling, rows: &[RowSpec]) -> Result<Tensor> {
    let hidden_size = hidden.dims().get(1).copied().unwrap_or(0);
    check_dims("pool", "hidden", hidden, &[cu_seqlens.total_tokens(), hidden_size])?;
    let shape = |operand, expected: String, got: String| Error::Shape { op: "pool", operand, expected, got };
    if rows.len() != cu_seqlens.num_seqs() {
        return Err(shape("rows", cu_seqlens.num_seqs().to_string(), rows.len().to_string()));
    }
    if let Some(row) = rows.iter().find(|r| r.dimensions == 0 || r.dimensions > hidden_size) {
        return Err(shape("rows.dimensions", format!("1 to {hidden_size}"), row.dimensions.to_string()));
    }
    reference::pool(hidden, cu_seqlens, pooling, rows)
}
