//! Trials of a device with made-up input: the warm-up before the first request, and heartbeats.

use std::time::Instant;

use super::batch::{self, Failure};
use super::worker::Worker;
use crate::model::ModelInfo;
use crate::model::pack::PackedInput;
use crate::model::signature::Modality;

/// Computes a made-up batch, or two: until the device has passed once, the warm-up (the smallest batch and the
/// largest the limits allow, so that no request is the first to meet either); later the smallest alone.
///
/// Where the device has no memory for the largest, half of it is tried, and so on; what passes is the limit then.
/// Errors: the cause, for logs and `/health/ready`.
pub fn run(worker: &mut Worker) -> Result<(), Failure> {
    let limits = worker.shared.limits.load_full();
    let seq_len = worker.shared.info.max_seq_len.min(limits.max_batch_tokens).max(1);
    compute(worker, 1, seq_len.min(2))?;
    if worker.shared.is_warm() {
        return Ok(());
    }
    let largest = (limits.max_batch_tokens / seq_len).clamp(1, limits.max_batch_size);
    let mut num_seqs = largest;
    let mut without_memory = None;
    loop {
        match compute(worker, num_seqs, seq_len) {
            Ok(()) => break,
            Err(Failure::OutOfMemory(cause)) if num_seqs > 1 => {
                without_memory = Some((num_seqs * seq_len, cause));
                num_seqs /= 2;
            }
            Err(failure) => return Err(failure),
        }
    }
    if let Some((num_failed, cause)) = without_memory {
        worker.lower_limits(num_seqs * seq_len, num_failed, &cause);
    }
    worker.backend.warmed_up();
    Ok(())
}

/// One made-up batch from launch to rows.
fn compute(worker: &mut Worker, num_seqs: usize, seq_len: usize) -> Result<(), Failure> {
    let packed = made_up(num_seqs, seq_len, &worker.shared.info);
    let start = Instant::now();
    worker.shared.vitals.set_busy(Some(start));
    let num_tokens = packed.total_tokens();
    batch::launch(&*worker.backend, packed).and_then(|in_flight| batch::finish(in_flight, num_seqs))?;
    worker.fit.learn(num_seqs, num_tokens, start.elapsed());
    worker.shared.cost.publish(&worker.fit);
    Ok(())
}

/// Sequences of token 0, which every vocabulary has, and of zeros where the model takes numbers, both in turn where it
/// takes both: what is computed does not matter, only that it is.
fn made_up(num_seqs: usize, seq_len: usize, info: &ModelInfo) -> PackedInput {
    let mut packed = PackedInput::default();
    let ids = vec![0; seq_len];
    let takes_text = info.signature.takes(Modality::Text);
    for i in 0..num_seqs {
        match info.signature.values {
            Some(shape) if !takes_text || i % 2 == 1 => {
                packed.push_values(&vec![0.0; shape.num_values], shape.num_tokens, info.usual_row());
            }
            _ => packed.push(&ids, &[], info.usual_row()),
        }
    }
    packed
}
