//! A text model on one device: encoder, head, rows.

use candle_core::{Device, Tensor};

use super::head::Head;
use super::pack::{PackedInput, RowSpec, Wanted};
use super::trunk::Trunk;
use super::{Backend, InFlight, Rows};
use crate::ops::CuSeqlens;
use crate::ops::pool::pool;
use crate::request::ModelName;
use crate::{Error, Result};

/// A text model on one device.
pub(super) struct EmbedBackend {
    pub trunk: Box<dyn Trunk>,
    pub head: Head,
    pub device: Device,
    pub name: ModelName,
    pub vocab_size: usize,
    pub max_seq_len: usize,
    /// Values of a vector, as [`super::ModelInfo::dimensions`].
    pub dimensions: usize,
}

impl Backend for EmbedBackend {
    fn launch(&self, batch: PackedInput) -> Result<Box<dyn InFlight>> {
        batch.check(self.vocab_size, self.max_seq_len, self.dimensions)?;
        let total = batch.total_tokens();
        let PackedInput { input_ids, token_type_ids, cu_seqlens, rows, .. } = batch;
        let vectors: Option<Vec<RowSpec>> = rows.iter().map(Wanted::vector).collect();
        // What the head looks at again; for embeddings nothing.
        let ids = if vectors.is_none() { input_ids.clone() } else { Vec::new() };
        let forward = || -> Result<Box<dyn InFlight>> {
            let cu_seqlens = CuSeqlens::new(&cu_seqlens, &self.device)?;
            let input_ids = Tensor::from_vec(input_ids, total, &self.device)?;
            // Nearly every batch is of single segments: then nothing is copied or gathered.
            let token_type_ids = match token_type_ids.iter().any(|&t| t != 0) {
                true => Some(Tensor::from_vec(token_type_ids, total, &self.device)?),
                false => None,
            };
            let hidden = self.trunk.forward(&input_ids, token_type_ids.as_ref(), &cu_seqlens)?;
            let name = self.name.clone();
            Ok(match (&self.head, vectors) {
                (Head::Vectors { pooling, steps }, Some(rows)) if steps.is_empty() => {
                    Box::new(Pooled { pooled: pool(&hidden, &cu_seqlens, *pooling, &rows)?, rows, name })
                }
                (head, _) => Box::new(Headed { rows: head.rows(&hidden, &cu_seqlens, &ids, &rows)?, name }),
            })
        };
        forward().map_err(|e| by_name(&self.name, e))
    }

    fn hangs_for_good(&self) -> bool {
        self.device.is_cuda()
    }
}

/// A device's failure by the model's name. A broken rule of the batch, a want of memory and a lost device stay what
/// they are.
pub(super) fn by_name(name: &ModelName, error: Error) -> Error {
    match error {
        Error::Internal { cause } => Error::Forward { model: name.to_string(), cause },
        other => other,
    }
}

/// A launched batch: on a CUDA device the kernels may still run, `finish` waits for them.
struct Pooled {
    /// [num_seqs, hidden_size] f32, each row filled up to its `dimensions`.
    pooled: Tensor,
    rows: Vec<RowSpec>,
    name: ModelName,
}

impl InFlight for Pooled {
    /// Errors: [`Error::Forward`] naming the first row with a value that is no number or infinite. The
    /// contract answers a batch as a whole, so that its neighbours fail with it: finite weights never
    /// get here, and a model with others should not be served at all.
    fn finish(self: Box<Self>) -> Result<Rows> {
        let failed = |cause: String| Error::Forward { model: self.name.to_string(), cause };
        let pooled = self.pooled.flatten_all().and_then(|t| t.to_vec1::<f32>());
        let pooled = pooled.map_err(|e| by_name(&self.name, e.into()))?;
        let hidden_size = pooled.len() / self.rows.len().max(1);
        let num_values = self.rows.iter().map(|row| row.dimensions).sum();
        let mut rows = Rows::with_capacity(self.rows.len(), num_values);
        for (i, spec) in self.rows.iter().enumerate() {
            let row = &pooled[i * hidden_size..][..spec.dimensions];
            if let Some(value) = row.iter().find(|value| !value.is_finite()) {
                return Err(failed(format!("row {i} of {} holds {value}", self.rows.len())));
            }
            rows.values.extend_from_slice(row);
            rows.offsets.push(rows.values.len());
        }
        Ok(rows)
    }
}

/// A batch whose rows are on the host already.
pub(super) struct Headed {
    pub rows: Rows,
    pub name: ModelName,
}

impl InFlight for Headed {
    /// Errors: [`Error::Forward`] for a row with a value that is no number or infinite.
    fn finish(self: Box<Self>) -> Result<Rows> {
        let Self { rows, name } = *self;
        match rows.values.iter().position(|value| !value.is_finite()) {
            None => Ok(rows),
            Some(i) => {
                let row = rows.offsets.partition_point(|offset| *offset <= i) - 1;
                let cause = format!("row {row} of {} holds {}", rows.num_rows(), rows.values[i]);
                Err(Error::Forward { model: name.to_string(), cause })
            }
        }
    }
}
