//! What the row kernels require of their operands, and the geometry they are launched with. Needs no device.

use cudarc::driver::LaunchConfig;

use super::super::{HalfType, Header, Span, check_span};
use super::{ActivationArgs, EmbeddingArgs, MAX_HIDDEN_SIZE, NormArgs, PoolArgs, PoolOutput, SwigluArgs};
use crate::{Error, Result};

/// Bytes of an f32 or u32.
const WORD: usize = 4;
const HALF: usize = HalfType::NUM_BYTES;

/// Columns a row of one warp has at most: 32 threads with 32 values.
const WARP_COLUMNS: usize = 1024;
/// Threads of a block of one row at most; kernels/rows.cuh counts its shared memory by it.
const MAX_ROW_THREADS: usize = 256;
/// Rows of a block of rows of one warp.
const WARP_ROWS: usize = 4;
/// Values a thread of an elementwise kernel takes, and threads of its blocks.
const PACK: usize = 8;
const FLAT_THREADS: usize = 256;
/// Threads of a pooling block.
const POOL_THREADS: usize = 512;
/// Capacities and tables are counted in 31 bits: grids end there, and sums of two stay in 32.
const MAX_COUNT: usize = (1 << 31) - 1;

impl EmbeddingArgs {
    pub(super) fn check(&self) -> Result<LaunchConfig> {
        const OP: &str = "embedding";
        let width = self.hidden_size;
        count(OP, "hidden_size", width, MAX_HIDDEN_SIZE)?;
        count(OP, "token_capacity", self.token_capacity, MAX_COUNT)?;
        count(OP, "seq_capacity", self.seq_capacity, MAX_COUNT)?;
        count(OP, "vocab_size", self.vocab_size, MAX_COUNT)?;
        count(OP, "num_positions", self.num_positions, MAX_COUNT)?;
        count(OP, "position_offset + 1", self.position_offset.saturating_add(1), self.num_positions)?;
        halves(OP, "out", self.out, self.token_capacity, width)?;
        words(OP, "header", self.header, Header::NUM_WORDS)?;
        words(OP, "input_ids", self.input_ids, self.token_capacity)?;
        if !self.token_type_ids.is_null() {
            words(OP, "token_type_ids", self.token_type_ids, self.token_capacity)?;
        }
        words(OP, "cu_seqlens", self.cu_seqlens, self.seq_capacity + 1)?;
        halves(OP, "word", self.word, self.vocab_size, width)?;
        halves(OP, "position", self.position, self.num_positions, width)?;
        if !self.token_type.is_null() {
            count(OP, "num_token_types", self.num_token_types, MAX_COUNT)?;
            halves(OP, "token_type", self.token_type, self.num_token_types, width)?;
        }
        check_span(OP, "gamma", self.gamma, width * WORD)?;
        check_span(OP, "beta", self.beta, width * WORD)?;
        Ok(row_geometry(self.token_capacity, width))
    }
}

impl NormArgs {
    pub(super) fn check_layer(&self) -> Result<LaunchConfig> {
        if !self.beta.is_null() {
            check_span("add_layer_norm", "beta", self.beta, self.hidden_size.saturating_mul(WORD))?;
        }
        self.check("add_layer_norm")
    }

    pub(super) fn check_rms(&self) -> Result<LaunchConfig> {
        if !self.beta.is_null() {
            return Err(shape("add_rms_norm", "beta", "none".to_string(), "one".to_string()));
        }
        self.check("add_rms_norm")
    }

    fn check(&self, op: &'static str) -> Result<LaunchConfig> {
        let (rows, width) = (self.token_capacity, self.hidden_size);
        count(op, "hidden_size", width, MAX_HIDDEN_SIZE)?;
        count(op, "token_capacity", rows, MAX_COUNT)?;
        words(op, "header", self.header, Header::NUM_WORDS)?;
        halves(op, "out", self.out, rows, width)?;
        halves(op, "x", self.x, rows, width)?;
        for (operand, span) in [("residual", self.residual), ("sum", self.sum)] {
            if !span.is_null() {
                halves(op, operand, span, rows, width)?;
            }
        }
        check_span(op, "gamma", self.gamma, width * WORD)?;
        let num_bytes = rows * width * HALF;
        apart(op, "out and sum", self.out, self.sum, num_bytes)?;
        for input in [self.x, self.residual] {
            same_or_apart(op, "out", self.out, input, num_bytes)?;
            same_or_apart(op, "sum", self.sum, input, num_bytes)?;
        }
        Ok(row_geometry(rows, width))
    }
}

impl ActivationArgs {
    pub(super) fn check(&self) -> Result<LaunchConfig> {
        const OP: &str = "bias_activation";
        let config = flat_geometry(OP, self.token_capacity, self.num_columns)?;
        words(OP, "header", self.header, Header::NUM_WORDS)?;
        halves(OP, "y", self.y, self.token_capacity, self.num_columns)?;
        if !self.bias.is_null() {
            check_span(OP, "bias", self.bias, self.num_columns * WORD)?;
        }
        Ok(config)
    }
}

impl SwigluArgs {
    pub(super) fn check(&self) -> Result<LaunchConfig> {
        const OP: &str = "swiglu";
        let config = flat_geometry(OP, self.token_capacity, self.num_columns)?;
        words(OP, "header", self.header, Header::NUM_WORDS)?;
        halves(OP, "out", self.out, self.token_capacity, self.num_columns)?;
        halves(OP, "x", self.x, self.token_capacity, 2 * self.num_columns)?;
        apart(OP, "out and x", self.out, self.x, self.token_capacity * 2 * self.num_columns * HALF)?;
        Ok(config)
    }
}

impl PoolArgs {
    pub(super) fn check(&self) -> Result<LaunchConfig> {
        const OP: &str = "pool";
        let width = self.hidden_size;
        count(OP, "hidden_size", width, MAX_HIDDEN_SIZE)?;
        count(OP, "token_capacity", self.token_capacity, MAX_COUNT)?;
        count(OP, "seq_capacity", self.seq_capacity, MAX_COUNT)?;
        match self.output {
            PoolOutput::F32 => check_span(OP, "out", self.out, self.seq_capacity * width * WORD)?,
            PoolOutput::Half => halves(OP, "out", self.out, self.seq_capacity, width)?,
        }
        words(OP, "header", self.header, Header::NUM_WORDS)?;
        halves(OP, "hidden", self.hidden, self.token_capacity, width)?;
        words(OP, "cu_seqlens", self.cu_seqlens, self.seq_capacity + 1)?;
        words(OP, "rows", self.rows, 2 * self.seq_capacity)?;
        words(OP, "not_finite", self.not_finite, 1)?;
        Ok(LaunchConfig {
            grid_dim: (self.seq_capacity as u32, 1, 1),
            block_dim: (POOL_THREADS as u32, 1, 1),
            shared_mem_bytes: (WORD * width.max(PACK * POOL_THREADS)) as u32,
        })
    }
}

/// A warp a row, or a block a row where a warp does not hold it.
fn row_geometry(num_rows: usize, width: usize) -> LaunchConfig {
    let (threads, rows) = if width <= WARP_COLUMNS {
        (32, WARP_ROWS)
    } else {
        (width.div_ceil(PACK).next_multiple_of(32).min(MAX_ROW_THREADS), 1)
    };
    LaunchConfig {
        grid_dim: (num_rows.div_ceil(rows) as u32, 1, 1),
        block_dim: (threads as u32, rows as u32, 1),
        shared_mem_bytes: 0,
    }
}

/// A thread for each 8 of the values.
fn flat_geometry(op: &'static str, num_rows: usize, num_columns: usize) -> Result<LaunchConfig> {
    count(op, "token_capacity", num_rows, MAX_COUNT)?;
    count(op, "num_columns", num_columns, MAX_COUNT)?;
    let num_values = num_rows * num_columns; // 62 bits
    count(op, "token_capacity * num_columns", num_values, MAX_COUNT)?;
    Ok(LaunchConfig {
        grid_dim: (num_values.div_ceil(PACK * FLAT_THREADS) as u32, 1, 1),
        block_dim: (FLAT_THREADS as u32, 1, 1),
        shared_mem_bytes: 0,
    })
}

fn shape(op: &'static str, operand: &'static str, expected: String, got: String) -> Error {
    Error::Shape { op, operand, expected, got }
}

/// Refuses 0 and more than `limit`.
fn count(op: &'static str, operand: &'static str, got: usize, limit: usize) -> Result<()> {
    if (1..=limit).contains(&got) {
        return Ok(());
    }
    Err(shape(op, operand, format!("1 to {limit}"), got.to_string()))
}

/// A matrix of 2-byte values, read 16 bytes at a time. Both sizes were counted to 31 bits.
fn halves(op: &'static str, operand: &'static str, span: Span, num_rows: usize, width: usize) -> Result<()> {
    check_span(op, operand, span, num_rows * width * HALF)
}

/// Words read one by one: parts of a batch's upload, which begin at any word.
fn words(op: &'static str, operand: &'static str, span: Span, num_words: usize) -> Result<()> {
    if !span.ptr.is_multiple_of(WORD as u64) {
        return Err(shape(op, operand, format!("an address that is a multiple of {WORD}"), format!("{:#x}", span.ptr)));
    }
    if span.is_null() || span.num_bytes < num_words * WORD {
        let got = if span.is_null() { "a null pointer".to_string() } else { format!("{} bytes", span.num_bytes) };
        return Err(shape(op, operand, format!("{} bytes", num_words * WORD), got));
    }
    Ok(())
}

/// Refuses two operands that share one of their first `num_bytes`; a null one shares none.
fn apart(op: &'static str, operand: &'static str, a: Span, b: Span, num_bytes: usize) -> Result<()> {
    let overlap = a.ptr < b.ptr + num_bytes as u64 && b.ptr < a.ptr + num_bytes as u64;
    if a.is_null() || b.is_null() || !overlap {
        return Ok(());
    }
    let got = format!("{:#x} and {:#x}", a.ptr, b.ptr);
    Err(shape(op, operand, format!("{num_bytes} bytes apart"), got))
}

fn same_or_apart(op: &'static str, operand: &'static str, a: Span, b: Span, num_bytes: usize) -> Result<()> {
    if a.ptr == b.ptr { Ok(()) } else { apart(op, operand, a, b, num_bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::linear::Activation;
    use crate::ops::pool::Pooling;

    /// Memory at an address of its own for each number; nothing is there.
    fn span(number: u64, num_bytes: usize) -> Span {
        Span { ptr: number << 40, num_bytes }
    }

    fn norm() -> NormArgs {
        NormArgs {
            dtype: HalfType::F16,
            out: span(1, 10 * 384 * 2),
            header: span(2, 32),
            x: span(3, 10 * 384 * 2),
            residual: Span::NULL,
            sum: Span::NULL,
            gamma: span(4, 384 * 4),
            beta: Span::NULL,
            token_capacity: 10,
            hidden_size: 384,
            eps: 1e-5,
        }
    }

    fn embedding() -> EmbeddingArgs {
        EmbeddingArgs {
            dtype: HalfType::Bf16,
            out: span(1, 10 * 33 * 2),
            header: span(2, 32),
            input_ids: span(3, 40),
            token_type_ids: Span::NULL,
            cu_seqlens: span(4, 12),
            word: span(5, 100 * 33 * 2),
            position: span(6, 20 * 33 * 2),
            token_type: span(7, 2 * 33 * 2),
            gamma: span(8, 33 * 4),
            beta: span(9, 33 * 4),
            token_capacity: 10,
            seq_capacity: 2,
            vocab_size: 100,
            num_positions: 20,
            num_token_types: 2,
            hidden_size: 33,
            position_offset: 2,
            eps: 1e-12,
        }
    }

    fn pool() -> PoolArgs {
        PoolArgs {
            dtype: HalfType::F16,
            output: PoolOutput::F32,
            out: span(1, 2 * 384 * 4),
            header: span(2, 32),
            hidden: span(3, 10 * 384 * 2),
            cu_seqlens: span(4, 12),
            rows: Span { ptr: (5 << 40) + 4, num_bytes: 16 },
            not_finite: span(6, 4),
            token_capacity: 10,
            seq_capacity: 2,
            hidden_size: 384,
            pooling: Pooling::Mean,
        }
    }

    #[track_caller]
    fn refused(result: Result<LaunchConfig>, part: &str) {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }

    #[test]
    fn rows_fit_their_threads() {
        for (width, threads, rows) in
            [(1, 32, 4), (384, 32, 4), (1024, 32, 4), (1025, 160, 1), (2048, 256, 1), (8191, 256, 1), (8192, 256, 1)]
        {
            let config = row_geometry(10, width);
            assert_eq!(config.block_dim, (threads, rows, 1), "{width}");
            assert_eq!(config.grid_dim.0, 10u32.div_ceil(rows), "{width}");
            assert!(threads as usize * 32 >= width, "{width}");
        }
    }

    #[test]
    fn grids_cover_the_capacity() {
        assert_eq!(norm().check_layer().unwrap().grid_dim, (3, 1, 1));
        assert_eq!(embedding().check().unwrap().grid_dim, (3, 1, 1));
        let config = pool().check().unwrap();
        assert_eq!((config.grid_dim.0, config.shared_mem_bytes), (2, 16384));
        assert_eq!(flat_geometry("op", 3, 1025).unwrap().grid_dim, (2, 1, 1));
        refused(flat_geometry("op", 1 << 20, 1 << 11), "op: token_capacity * num_columns: expected 1 to 2147483647");
    }

    #[test]
    fn embedding_operands_are_checked_by_name() {
        refused(EmbeddingArgs { hidden_size: 8193, ..embedding() }.check(), "hidden_size: expected 1 to 8192");
        refused(EmbeddingArgs { token_capacity: 11, ..embedding() }.check(), "out: expected 726 bytes, got 660");
        refused(EmbeddingArgs { seq_capacity: 3, ..embedding() }.check(), "cu_seqlens: expected 16 bytes, got 12");
        refused(EmbeddingArgs { vocab_size: 101, ..embedding() }.check(), "word");
        refused(EmbeddingArgs { position_offset: 20, ..embedding() }.check(), "position_offset");
        refused(EmbeddingArgs { num_token_types: 3, ..embedding() }.check(), "token_type");
        refused(EmbeddingArgs { token_type_ids: span(7, 39), ..embedding() }.check(), "token_type_ids");
        refused(EmbeddingArgs { beta: Span::NULL, ..embedding() }.check(), "beta: expected 132 bytes, got a null");
    }

    #[test]
    fn norm_operands_are_checked_by_name() {
        refused(NormArgs { x: Span::NULL, ..norm() }.check_layer(), "add_layer_norm: x");
        refused(NormArgs { residual: span(9, 100), ..norm() }.check_layer(), "residual");
        refused(NormArgs { beta: span(9, 100), ..norm() }.check_layer(), "beta");
        refused(NormArgs { beta: span(9, 1 << 20), ..norm() }.check_rms(), "add_rms_norm: beta: expected none");
        // In place, but not shifted; and one result each.
        let shifted = Span { ptr: norm().out.ptr + 16, num_bytes: 1 << 20 };
        assert!(NormArgs { x: norm().out, ..norm() }.check_layer().is_ok());
        refused(NormArgs { x: shifted, ..norm() }.check_layer(), "out: expected 7680 bytes apart");
        refused(NormArgs { sum: norm().out, ..norm() }.check_layer(), "out and sum");
    }

    #[test]
    fn elementwise_operands_are_checked_by_name() {
        let args = ActivationArgs {
            dtype: HalfType::F16,
            y: span(1, 10 * 30 * 2),
            header: span(2, 32),
            bias: span(3, 120),
            token_capacity: 10,
            num_columns: 30,
            activation: Activation::Gelu,
        };
        assert!(args.check().is_ok());
        refused(ActivationArgs { bias: span(3, 119), ..args }.check(), "bias");
        refused(ActivationArgs { num_columns: 0, ..args }.check(), "num_columns");
        refused(ActivationArgs { y: Span { ptr: (1 << 40) + 8, ..args.y }, ..args }.check(), "multiple of 16");
        let args = SwigluArgs {
            dtype: HalfType::F16,
            out: span(1, 10 * 30 * 2),
            header: span(2, 32),
            x: span(3, 10 * 60 * 2),
            token_capacity: 10,
            num_columns: 30,
        };
        assert!(args.check().is_ok());
        refused(SwigluArgs { x: span(3, 10 * 30 * 2), ..args }.check(), "x: expected 1200 bytes");
        refused(SwigluArgs { out: args.x, ..args }.check(), "out and x");
    }

    #[test]
    fn pool_operands_are_checked_by_name() {
        refused(PoolArgs { seq_capacity: 0, ..pool() }.check(), "seq_capacity");
        refused(PoolArgs { out: span(1, 2 * 384 * 2), ..pool() }.check(), "out: expected 3072 bytes");
        refused(PoolArgs { rows: span(5, 12), ..pool() }.check(), "rows: expected 16 bytes, got 12");
        refused(PoolArgs { rows: Span { ptr: 2, num_bytes: 64 }, ..pool() }.check(), "multiple of 4");
        refused(PoolArgs { not_finite: Span::NULL, ..pool() }.check(), "not_finite: expected 4 bytes, got a null");
        let half = PoolArgs { out: span(1, 2 * 384 * 2), output: PoolOutput::Half, ..pool() };
        assert!(half.check().is_ok());
    }
}
