//! What stands on an encoder: from hidden states to the rows that clients asked for.
//!
//! Source: Devlin et al. 2018 (classification of sequences and tokens, masked tokens); Formal et al. 2021 (SPLADE v2, the
//! weights of a vocabulary's tokens).

use candle_core::{DType, Tensor};

use super::Rows;
use super::pack::{Pooling, RowSpec, Wanted};
use crate::ops::CuSeqlens;
use crate::ops::linear::Linear;
use crate::ops::norm::AddLayerNorm;
use crate::ops::pool::pool;
use crate::{Error, Result};

/// Tokens whose scores of a whole vocabulary are in memory at once: 31 MB for 30,522 of them.
const WORDS_AT_ONCE: usize = 256;

/// Transformations, and the product that gives the scores.
pub(super) struct Projection {
    pub steps: Vec<Step>,
    pub out: Linear,
}

/// One transformation of vectors, [m, in_features] to [m, out_features].
pub(super) enum Step {
    Linear(Linear),
    Norm(AddLayerNorm),
    /// Each vector to length 1.
    Normalize,
}

/// One step after another. Shapes: `x` [m, in_features of the first]. Returns [m, out_features of the last] f32.
fn through(steps: &[Step], x: &Tensor) -> Result<Tensor> {
    let mut x = x.clone();
    for step in steps {
        x = match step {
            Step::Linear(linear) => linear.forward(&x)?,
            Step::Norm(norm) => norm.forward(&x, None)?,
            Step::Normalize => normalise(&x)?,
        };
    }
    Ok(x)
}

impl Projection {
    /// Shapes: `x` [m, hidden_size]. Returns [m, out_features] f32.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.out.forward(&through(&self.steps, x)?)
    }
}

/// Which vector of a sequence its scores are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ScoredAt {
    Pooled(Pooling),
    /// The last token that is not this one; the first where all are.
    LastBut(u32),
}

/// The head of a model.
pub(super) enum Head {
    /// The hidden states themselves, token by token, or pooled and then taken through these steps.
    Vectors { pooling: Pooling, steps: Vec<Step> },
    /// Scores of a sequence, from one vector of it.
    Scores { at: ScoredAt, projection: Projection },
    /// Scores of each token.
    TokenScores(Projection),
    /// Scores of all tokens of the vocabulary, at each token.
    Words {
        projection: Projection,
        /// The id that stands for a token to be filled in.
        mask_id: Option<u32>,
    },
}

impl Head {
    /// The rows of a batch on the host.
    ///
    /// Shapes: `hidden` [total_tokens, hidden_size]; `input_ids` [total_tokens]; `wanted` [num_seqs].
    /// Blocks: waits for the device.
    /// Errors: [`Error::Shape`] for a row that this head has not; the device's.
    pub fn rows(&self, hidden: &Tensor, cu_seqlens: &CuSeqlens, input_ids: &[u32], wanted: &[Wanted]) -> Result<Rows> {
        match self {
            Self::Vectors { pooling, steps } => vectors(hidden, cu_seqlens, *pooling, steps, wanted),
            Self::Scores { at, projection } => {
                all_are(wanted, |w| matches!(w, Wanted::Scores))?;
                let pooled = match *at {
                    ScoredAt::Pooled(pooling) => {
                        let row = RowSpec { normalize: false, dimensions: hidden.dim(1)? };
                        pool(hidden, cu_seqlens, pooling, &vec![row; wanted.len()])?
                    }
                    ScoredAt::LastBut(pad_id) => {
                        let last = last_but(pad_id, input_ids, cu_seqlens);
                        hidden.index_select(&Tensor::new(last, hidden.device())?, 0)?
                    }
                };
                let scores = projection.forward(&pooled)?;
                let lens = vec![1; wanted.len()];
                by_sequence(&scores, &lens)
            }
            Self::TokenScores(projection) => {
                all_are(wanted, |w| matches!(w, Wanted::TokenScores))?;
                let lens: Vec<usize> = cu_seqlens.ranges().map(|range| range.len()).collect();
                by_sequence(&projection.forward(hidden)?, &lens)
            }
            Self::Words { projection, mask_id } => {
                all_are(wanted, |w| matches!(w, Wanted::Sparse | Wanted::Masked { .. }))?;
                let mut rows = Rows::with_capacity(wanted.len(), 0);
                for (range, wanted) in cu_seqlens.ranges().zip(wanted) {
                    let states = hidden.narrow(0, range.start, range.len())?;
                    match wanted {
                        Wanted::Masked { top_k, targets } => {
                            let masks: Vec<u32> = (0..)
                                .zip(&input_ids[range])
                                .filter(|(_, id)| Some(**id) == *mask_id)
                                .map(|m| m.0)
                                .collect();
                            let row = masked(projection, &states, &masks, *top_k as usize, targets.as_deref())?;
                            rows.values.extend(row);
                        }
                        _ => rows.values.extend(sparse(projection, &states)?),
                    }
                    rows.offsets.push(rows.values.len());
                }
                Ok(rows)
            }
        }
    }
}

/// Vectors of sequences and of their tokens, side by side. The steps are for the first.
fn vectors(
    hidden: &Tensor,
    cu_seqlens: &CuSeqlens,
    pooling: Pooling,
    steps: &[Step],
    wanted: &[Wanted],
) -> Result<Rows> {
    all_are(wanted, |w| matches!(w, Wanted::Vector(_) | Wanted::TokenVectors))?;
    let width = hidden.dim(1)?;
    let (pooled, pooled_width) = if steps.is_empty() {
        // Where tokens' vectors are wanted, the pooled one is made for one value and thrown away.
        let unused = RowSpec { normalize: false, dimensions: 1 };
        let specs: Vec<RowSpec> = wanted.iter().map(|w| w.vector().unwrap_or(unused)).collect();
        (host(&pool(hidden, cu_seqlens, pooling, &specs)?)?, width)
    } else {
        // What is asked of a row is asked of the last step's vector.
        let whole = RowSpec { normalize: false, dimensions: width };
        let vectors = through(steps, &pool(hidden, cu_seqlens, pooling, &vec![whole; wanted.len()])?)?;
        (host(&vectors)?, vectors.dim(1)?)
    };
    let any_tokens = wanted.iter().any(|w| w.vector().is_none());
    let all = if any_tokens { host(hidden)? } else { Vec::new() };
    let mut rows = Rows::with_capacity(wanted.len(), pooled.len());
    for (i, (range, wanted)) in cu_seqlens.ranges().zip(wanted).enumerate() {
        match wanted.vector() {
            Some(row) => {
                let start = rows.values.len();
                rows.values.extend_from_slice(&pooled[i * pooled_width..][..row.dimensions]);
                if row.normalize && !steps.is_empty() {
                    crate::ops::pool::normalise(&mut rows.values[start..]);
                }
            }
            None => rows.values.extend_from_slice(&all[range.start * width..range.end * width]),
        }
        rows.offsets.push(rows.values.len());
    }
    Ok(rows)
}

/// Each row to length 1. Shapes: `x` [m, n].
fn normalise(x: &Tensor) -> Result<Tensor> {
    let (num_rows, width) = x.dims2()?;
    let mut values = host(x)?;
    values.chunks_exact_mut(width.max(1)).for_each(crate::ops::pool::normalise);
    Ok(Tensor::from_vec(values, (num_rows, width), x.device())?)
}

/// The place in the batch of each sequence's last token that is no padding. transformers takes the first token of a
/// sequence that is all padding.
fn last_but(pad_id: u32, input_ids: &[u32], cu_seqlens: &CuSeqlens) -> Vec<u32> {
    let last = |range: std::ops::Range<usize>| {
        let from_end = input_ids[range.clone()].iter().rposition(|id| *id != pad_id);
        (range.start + from_end.unwrap_or(0)) as u32
    };
    cu_seqlens.ranges().map(last).collect()
}

/// `log(1 + relu(x))` of each token's scores, the largest over the sequence. The function rises, so the largest is found
/// first.
fn sparse(projection: &Projection, states: &Tensor) -> Result<Vec<f32>> {
    let mut largest = vec![0f32; projection.out.out_features()];
    let num_tokens = states.dim(0)?;
    for start in (0..num_tokens).step_by(WORDS_AT_ONCE) {
        let len = WORDS_AT_ONCE.min(num_tokens - start);
        let scores = host(&projection.forward(&states.narrow(0, start, len)?)?)?;
        for token in scores.chunks_exact(largest.len()) {
            for (largest, &score) in largest.iter_mut().zip(token) {
                // `f32::max` would drop NaN, and a broken result must show.
                *largest = if score > *largest || score.is_nan() { score } else { *largest };
            }
        }
    }
    let above = largest.iter().enumerate().filter(|(_, x)| **x > 0.0 || x.is_nan());
    let pairs: Vec<f32> = above.flat_map(|(id, x)| [id as f32, x.ln_1p()]).collect();
    Ok(if pairs.is_empty() { vec![0.0, 0.0] } else { pairs })
}

/// The likeliest tokens at each of these places. The probabilities are of the whole vocabulary, also where only some
/// tokens are considered.
fn masked(
    projection: &Projection,
    states: &Tensor,
    masks: &[u32],
    top_k: usize,
    targets: Option<&[u32]>,
) -> Result<Vec<f32>> {
    let vocab_size = projection.out.out_features();
    if masks.is_empty() {
        let (operand, expected) = ("input_ids", "a mask".to_string());
        return Err(Error::Shape { op: "fill_mask", operand, expected, got: "none".to_string() });
    }
    let mut row = Vec::new();
    for masks in masks.chunks(WORDS_AT_ONCE) {
        let at = states.index_select(&Tensor::new(masks, states.device())?, 0)?;
        let scores = host(&projection.forward(&at)?)?;
        for scores in scores.chunks_exact(vocab_size) {
            let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = scores.iter().map(|x| f64::from(x - largest).exp()).sum();
            let mut ids: Vec<u32> = match targets {
                Some(targets) => targets.iter().copied().filter(|id| (*id as usize) < vocab_size).collect(),
                None => (0..vocab_size as u32).collect(),
            };
            let by_score = |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b));
            let top_k = top_k.min(ids.len());
            if top_k < ids.len() && top_k > 0 {
                ids.select_nth_unstable_by(top_k - 1, by_score);
                ids.truncate(top_k);
            }
            ids.sort_unstable_by(by_score);
            let probability = |id: u32| (f64::from(scores[id as usize] - largest).exp() / sum) as f32;
            row.extend(ids.into_iter().flat_map(|id| [id as f32, probability(id)]));
        }
    }
    Ok(row)
}

/// Rows of so many lines of `values` each.
fn by_sequence(values: &Tensor, lens: &[usize]) -> Result<Rows> {
    let width = values.dim(1)?;
    let values = host(values)?;
    let mut rows = Rows::with_capacity(lens.len(), 0);
    rows.values = values;
    let mut end = 0;
    for len in lens {
        end += len * width;
        rows.offsets.push(end);
    }
    Ok(rows)
}

fn host(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

fn all_are(wanted: &[Wanted], can: impl Fn(&Wanted) -> bool) -> Result<()> {
    match wanted.iter().find(|w| !can(w)) {
        None => Ok(()),
        Some(other) => {
            let (operand, expected) = ("rows", "what the model's head gives".to_string());
            Err(Error::Shape { op: "head", operand, expected, got: format!("{other:?}") })
        }
    }
}
