//! How the sequences of a batch are shared out among threads, for ops whose rows see those of their sequence.

use candle_core::{CpuStorage, Shape};

use super::gemm::TILE_ROWS;
use super::{CuSeqlens, simd};
use crate::{Error, Result};

/// Errors: [`Error::Shape`] if a sequence is longer than the distances that are known.
pub(super) fn check_reach(op: &'static str, cu_seqlens: &CuSeqlens, max_seq_len: usize) -> Result<()> {
    if cu_seqlens.max_seqlen() <= max_seq_len {
        return Ok(());
    }
    let expected = format!("sequences of at most {max_seq_len} tokens");
    Err(Error::Shape { op, operand: "cu_seqlens", expected, got: cu_seqlens.max_seqlen().to_string() })
}

/// Fills the rows of all tasks, on all threads. `attend` gets the rows of a task's sequence, the task, and where its own
/// rows go.
///
/// Shapes: `qkv` [total_tokens, row_width], what comes out [total_tokens, width], with `widths` (row_width, width).
pub(super) fn by_task(
    qkv: &[f32],
    (row_width, width): (usize, usize),
    cu_seqlens: &CuSeqlens,
    attend: impl Fn(&[f32], &Task, &mut [f32]) + Sync,
) -> (CpuStorage, Shape) {
    let tasks = tasks(cu_seqlens, rayon::current_num_threads());
    let rows: Vec<usize> = tasks.iter().map(|t| t.num_queries).collect();
    let values = simd::fill_blocks(width, &rows, |i, out| {
        let task = &tasks[i];
        attend(&qkv[task.start * row_width..][..task.len * row_width], task, out);
    });
    (CpuStorage::F32(values), (cu_seqlens.total_tokens(), width).into())
}

/// Some queries of one sequence, over all heads: the piece of work one thread takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Task {
    /// The sequence's first token and its length.
    pub(super) start: usize,
    pub(super) len: usize,
    /// The queries within the sequence.
    pub(super) first_query: usize,
    pub(super) num_queries: usize,
}

/// Whole sequences where there are enough of them; long ones are cut, because every cut packs the
/// sequence's keys and values once more.
fn tasks(cu_seqlens: &CuSeqlens, num_threads: usize) -> Vec<Task> {
    // Packing costs as much as about eight queries, so a cut of 48 loses at most a sixth.
    const LEAST_QUERIES: usize = 48;
    let most = match num_threads {
        1 => usize::MAX,
        _ => (cu_seqlens.total_tokens() / (4 * num_threads)).max(LEAST_QUERIES),
    };
    let mut tasks = Vec::with_capacity(cu_seqlens.num_seqs());
    for range in cu_seqlens.ranges() {
        let len = range.len();
        let step = len.div_ceil(len.div_ceil(most)).next_multiple_of(TILE_ROWS);
        for first_query in (0..len).step_by(step) {
            let num_queries = step.min(len - first_query);
            tasks.push(Task { start: range.start, len, first_query, num_queries });
        }
    }
    tasks
}

#[cfg(test)]
mod tests {
    use super::super::testing::bounds;
    use super::*;

    #[test]
    fn tasks_cover_every_query_once() {
        for (lens, num_threads) in [(&[1, 500, 48, 49, 7][..], 2), (&[512], 64), (&[3, 3], 1), (&[8192], 2)] {
            let cu_seqlens = bounds(lens);
            let mut next = 0;
            for task in tasks(&cu_seqlens, num_threads) {
                assert_eq!(task.start + task.first_query, next);
                assert!(task.num_queries > 0 && task.first_query + task.num_queries <= task.len);
                next += task.num_queries;
            }
            assert_eq!(next, cu_seqlens.total_tokens());
        }
        assert_eq!(tasks(&bounds(&[8192]), 2).len(), 8, "a long lone sequence keeps both threads busy");
    }
}
