//! Trials of a device with made-up input: the warm-up before the first request, and heartbeats.

use std::time::Instant;

use super::batch;
use super::worker::Worker;
use crate::model::pack::{PackedInput, RowSpec};

/// Computes a made-up batch, or two: until the device has passed once, the warm-up (the smallest batch and the
/// largest the limits allow, so that no request is the first to meet either); later the smallest alone.
///
/// Errors: the cause, in words for logs and `/health/ready`.
pub fn run(worker: &mut Worker) -> Result<(), String> {
    let limits = worker.shared.limits.load_full();
    let max_seq_len = worker.shared.info.max_seq_len.min(limits.max_batch_tokens).max(1);
    let mut shapes = vec![(1, max_seq_len.min(2))];
    if !worker.shared.is_warm() {
        let num_seqs = (limits.max_batch_tokens / max_seq_len).clamp(1, limits.max_batch_size);
        shapes.push((num_seqs, max_seq_len));
    }
    for (num_seqs, seq_len) in shapes {
        let packed = made_up(num_seqs, seq_len, worker.shared.info.hidden_size);
        let start = Instant::now();
        worker.shared.vitals.set_busy(Some(start));
        let rows = batch::launch(&*worker.backend, packed).and_then(|in_flight| batch::finish(in_flight, num_seqs));
        rows.map_err(|failure| failure.cause().to_string())?;
        worker.fit.learn(num_seqs, num_seqs * seq_len, start.elapsed());
        worker.shared.cost.publish(&worker.fit);
    }
    Ok(())
}

/// Sequences of token 0, which every vocabulary has: what is computed does not matter, only that it is.
fn made_up(num_seqs: usize, seq_len: usize, hidden_size: usize) -> PackedInput {
    let mut packed = PackedInput::default();
    let ids = vec![0; seq_len];
    for _ in 0..num_seqs {
        packed.push(&ids, &[], RowSpec { normalize: true, dimensions: hidden_size });
    }
    packed
}
