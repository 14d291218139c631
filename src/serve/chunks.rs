//! Inputs that are longer than the model takes, in chunks: each an entry of the queue, their vectors pooled into one.
//!
//! ```text
//! input ─▶ encoders: chunks of token ids ─▶ one request of all chunks ─▶ rows ─▶ mean by tokens ─▶ cut, length 1
//! ```

use std::time::Instant;

use super::served::{Form, Served};
use crate::model::encode::Encoding;
use crate::model::pack::RowSpec;
use crate::output::{Output, Usage};
use crate::request::{Input, Request, Task, TaskParams, Truncation};
use crate::{Error, Result};

/// Chunks of one input at most: 128,000 tokens of a model that takes 512. What one input may take of the queue is
/// bounded.
pub const MAX_CHUNKS: usize = 256;

/// Refuses chunks where they mean nothing. Errors: `Invalid`.
pub(super) fn check(params: &TaskParams) -> Result<()> {
    match params.truncation {
        Truncation::Chunk { .. } if params.task != Task::Embed => {
            let reason = format!("is for embeddings; `{}` has nothing that can be pooled", params.task.as_str());
            Err(Error::Invalid { field: "chunk_overlap".to_string(), reason })
        }
        _ => Ok(()),
    }
}

impl Served {
    /// Computes each input as a whole, in as many chunks as it takes.
    ///
    /// A row is the mean of the chunks' rows, weighted by their tokens, then cut and normalised as the request asks.
    /// Errors: those of `infer`; `TooLarge` with unit "chunks" for an input of more than [`MAX_CHUNKS`], and with unit
    /// "inputs" where all chunks together do not fit the queue.
    pub(super) async fn infer_in_chunks(&self, request: Request, overlap: usize, start: Instant) -> Result<Output> {
        let Request { model, inputs, params, deadline, priority } = request;
        let form = Form::of(&self.info, &params)?;
        let Some(RowSpec { normalize, dimensions }) = form.row.vector() else {
            return Err(Error::Internal { cause: "chunks of what is no vector".to_string() });
        };
        let num_inputs = inputs.len();
        let prompt = form.prompt;
        let chunked = self.on_encoders("input", inputs, Input::num_bytes, move |encoder, i, input| {
            let field = if num_inputs == 1 { "input".to_string() } else { format!("input[{i}]") };
            encoder.chunks(input, &field, prompt.as_deref(), overlap, MAX_CHUNKS)
        });
        let chunked: Vec<Vec<Encoding>> = chunked.await?;
        let num_chars = chunked.iter().flatten().map(|chunk| chunk.num_chars).sum();
        let num_chunks: Vec<usize> = chunked.iter().map(Vec::len).collect();
        let ids = |chunk: Encoding| Input::of_ids(chunk.input_ids, chunk.token_type_ids);
        let params = TaskParams { normalize: Some(false), ..TaskParams::default() };
        let inputs = chunked.into_iter().flatten().map(ids).collect();
        let output = self.infer_uncounted(Request { model, inputs, params, deadline, priority }, start).await?;

        let (mut rows, mut num_tokens) = (Vec::with_capacity(num_inputs), Vec::with_capacity(num_inputs));
        let mut of_chunks = output.rows.into_iter().zip(output.num_tokens);
        for num_chunks in num_chunks {
            let chunks: Vec<(Vec<f32>, u32)> = of_chunks.by_ref().take(num_chunks).collect();
            num_tokens.push(chunks.iter().map(|(_, len)| len).sum());
            let mut row = mean(&chunks);
            row.truncate(dimensions);
            if normalize {
                to_length_one(&mut row);
            }
            rows.push(row);
        }
        let usage = Usage { num_chars, ..output.usage };
        Ok(Output { rows, num_tokens, usage, ..output })
    }
}

/// The mean of rows, each with its weight, summed in f64. Rows have one length, and there is at least one.
fn mean(rows: &[(Vec<f32>, u32)]) -> Vec<f32> {
    let total: f64 = rows.iter().map(|(_, weight)| f64::from(*weight)).sum();
    let width = rows.first().map_or(0, |(row, _)| row.len());
    let value = |i: usize| {
        let sum: f64 = rows.iter().map(|(row, weight)| f64::from(row[i]) * f64::from(*weight)).sum();
        (sum / total) as f32
    };
    (0..width).map(value).collect()
}

/// A zero vector stays zero.
fn to_length_one(row: &mut [f32]) {
    let length = row.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt();
    if length > 0.0 {
        row.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longer_chunks_weigh_more() {
        // By hand: (3 * 1 + 1 * 5) / 4 and (3 * 2 - 1 * 2) / 4.
        assert_eq!(mean(&[(vec![1.0, 2.0], 3), (vec![5.0, -2.0], 1)]), [2.0, 1.0]);
        let mut row = [3.0, 4.0];
        to_length_one(&mut row);
        assert_eq!(row, [0.6, 0.8]);
        let mut nothing = [0.0, 0.0];
        to_length_one(&mut nothing);
        assert_eq!(nothing, [0.0, 0.0]);
    }

    #[test]
    fn only_vectors_are_pooled() {
        let params = |task| TaskParams { task, truncation: Truncation::Chunk { overlap: 0 }, ..TaskParams::default() };
        assert!(check(&params(Task::Embed)).is_ok());
        let error = check(&params(Task::Sparse)).unwrap_err().to_string();
        assert_eq!(error, "chunk_overlap: is for embeddings; `sparse` has nothing that can be pooled");
    }
}
