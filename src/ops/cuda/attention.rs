//! Launcher of the attention kernels; what they compute stands at the head of `kernels/attention.cu`.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaFunction, CudaStream, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;

use super::{HalfType, Header, Span, check_span};
use crate::{Error, Result};

/// The sizes of a head that there is a kernel for.
pub const HEAD_DIMS: [usize; 4] = [32, 64, 96, 128];
/// Queries of one block; `max_seqlen` is best a multiple of it.
pub const BLOCK_QUERIES: usize = 64;
const NUM_THREADS: u32 = 128;
const WORD: usize = 4;
/// What a grid has room for in its first dimension, and in its second.
const MAX_BLOCKS: usize = (1 << 31) - 1;
const MAX_HEADS: usize = 65535;

/// `out = softmax(scale q kᵀ + bias) v`, every sequence and head by itself.
#[derive(Debug, Clone, Copy)]
pub struct AttentionArgs {
    pub dtype: HalfType,
    /// [token_capacity, num_heads * head_dim]; not `qkv`.
    pub out: Span,
    /// [8] u32, see [`super::Header`]
    pub header: Span,
    /// [token_capacity, 3 * num_heads * head_dim]: a token's queries, keys, values, each head by head.
    pub qkv: Span,
    /// [seq_capacity + 1] u32
    pub cu_seqlens: Span,
    /// [num_heads, 2 * max_seq_len - 1] f32 or null: added to the score of a pair by `key - query + max_seq_len - 1`.
    pub distance_bias: Span,
    /// RoPE's tables: [max_seq_len, head_dim / 2] f32 each, or both null.
    pub cos: Span,
    pub sin: Span,
    pub token_capacity: usize,
    pub seq_capacity: usize,
    /// At least the batch's longest sequence: decides how many blocks are launched. Queries beyond it are not computed.
    pub max_seqlen: usize,
    /// Longest sequence that bias and tables reach.
    pub max_seq_len: usize,
    pub num_heads: usize,
    pub head_dim: usize,
    pub scale: f32,
    pub causal: bool,
}

/// The attention kernels of one device, loaded.
pub struct AttentionKernels {
    /// By [`HEAD_DIMS`].
    f16: [CudaFunction; 4],
    bf16: [CudaFunction; 4],
}

impl AttentionKernels {
    /// Loads the kernels into a device's context.
    ///
    /// Blocks: some milliseconds; seconds on a device newer than the machine code, whose driver compiles the PTX.
    /// Errors: [`Error::Internal`] if the driver refuses them: the device is older than sm_80.
    pub fn load(context: &Arc<CudaContext>) -> Result<Self> {
        let image = include_bytes!(concat!(env!("OUT_DIR"), "/attention.fatbin"));
        let module = context.load_module(Ptx::from_binary(image.to_vec()))?;
        let load = |name: &str| module.load_function(name);
        Ok(Self {
            f16: [
                load("attention_f16_32")?,
                load("attention_f16_64")?,
                load("attention_f16_96")?,
                load("attention_f16_128")?,
            ],
            bf16: [
                load("attention_bf16_32")?,
                load("attention_bf16_64")?,
                load("attention_bf16_96")?,
                load("attention_bf16_128")?,
            ],
        })
    }

    /// Errors: [`Error::Shape`] for operands the kernel cannot take.
    pub fn forward(&self, stream: &CudaStream, args: &AttentionArgs) -> Result<()> {
        let (config, kernel, num_query_blocks) = args.check()?;
        let function = match args.dtype {
            HalfType::F16 => &self.f16[kernel],
            HalfType::Bf16 => &self.bf16[kernel],
        };
        let sizes = [args.num_heads as u32, num_query_blocks, args.max_seq_len as u32];
        let causal = u32::from(args.causal);
        let mut launch = stream.launch_builder(function);
        for span in [&args.out, &args.header, &args.qkv, &args.cu_seqlens, &args.distance_bias, &args.cos, &args.sin] {
            launch.arg(&span.ptr);
        }
        for size in &sizes {
            launch.arg(size);
        }
        launch.arg(&args.scale).arg(&causal);
        // SAFETY: the arguments are the kernel's parameters in order and type; `check` proved that every span holds what
        // the kernel reads and writes for this capacity, and the header bounds it to the batch.
        unsafe { launch.launch(config) }?;
        Ok(())
    }
}

impl AttentionArgs {
    /// The launch, the kernel's place in [`HEAD_DIMS`], and the blocks of a sequence.
    fn check(&self) -> Result<(LaunchConfig, usize, u32)> {
        const OP: &str = "attention";
        let fault = |operand, expected: String, got: String| Err(Error::Shape { op: OP, operand, expected, got });
        let Some(kernel) = HEAD_DIMS.iter().position(|&dim| dim == self.head_dim) else {
            return fault("head_dim", format!("one of {HEAD_DIMS:?}"), self.head_dim.to_string());
        };
        for (operand, size, limit) in [
            ("num_heads", self.num_heads, MAX_HEADS),
            ("token_capacity", self.token_capacity, MAX_BLOCKS),
            ("seq_capacity", self.seq_capacity, MAX_BLOCKS),
            ("max_seqlen", self.max_seqlen, MAX_BLOCKS),
            ("max_seq_len", self.max_seq_len, MAX_BLOCKS),
        ] {
            if !(1..=limit).contains(&size) {
                return fault(operand, format!("1 to {limit}"), size.to_string());
            }
        }
        let width = self.num_heads * self.head_dim;
        let row_bytes = width * HalfType::NUM_BYTES; // 24 bits, times 31
        check_span(OP, "out", self.out, self.token_capacity * row_bytes)?;
        check_span(OP, "qkv", self.qkv, 3 * self.token_capacity * row_bytes)?;
        for (operand, span, num_words) in
            [("header", self.header, Header::NUM_WORDS), ("cu_seqlens", self.cu_seqlens, self.seq_capacity + 1)]
        {
            check_span(OP, operand, span, num_words * WORD)?;
        }
        if !self.distance_bias.is_null() {
            let num_values = self.num_heads * (2 * self.max_seq_len - 1);
            check_span(OP, "distance_bias", self.distance_bias, num_values * WORD)?;
        }
        if self.cos.is_null() != self.sin.is_null() {
            return fault("cos and sin", "both tables or none".to_string(), "one".to_string());
        }
        for (operand, span) in [("cos", self.cos), ("sin", self.sin)] {
            if !span.is_null() {
                check_span(OP, operand, span, self.max_seq_len * self.head_dim / 2 * WORD)?;
            }
        }
        let num_query_blocks = self.max_seqlen.div_ceil(BLOCK_QUERIES);
        let num_blocks = self.seq_capacity * num_query_blocks;
        if num_blocks > MAX_BLOCKS {
            return fault("seq_capacity * max_seqlen", format!("up to {MAX_BLOCKS} blocks"), num_blocks.to_string());
        }
        let config = LaunchConfig {
            grid_dim: (num_blocks as u32, self.num_heads as u32, 1),
            block_dim: (NUM_THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        Ok((config, kernel, num_query_blocks as u32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> AttentionArgs {
        let span = |number: u64, num_bytes: usize| Span { ptr: number << 40, num_bytes };
        AttentionArgs {
            dtype: HalfType::F16,
            out: span(1, 10 * 64 * 2),
            header: span(2, 32),
            qkv: span(3, 3 * 10 * 64 * 2),
            cu_seqlens: span(4, 12),
            distance_bias: Span::NULL,
            cos: Span::NULL,
            sin: Span::NULL,
            token_capacity: 10,
            seq_capacity: 2,
            max_seqlen: 65,
            max_seq_len: 512,
            num_heads: 2,
            head_dim: 32,
            scale: 1.0,
            causal: false,
        }
    }

    #[test]
    fn a_block_for_each_64_queries_of_a_head() {
        let (config, kernel, num_query_blocks) = args().check().unwrap();
        assert_eq!((config.grid_dim, config.block_dim), ((4, 2, 1), (128, 1, 1)));
        assert_eq!((kernel, num_query_blocks), (0, 2));
    }

    #[test]
    fn operands_are_checked_by_name() {
        let span = |num_bytes: usize| Span { ptr: 9 << 40, num_bytes };
        for (bad, part) in [
            (AttentionArgs { head_dim: 48, ..args() }, "head_dim: expected one of [32, 64, 96, 128], got 48"),
            (AttentionArgs { head_dim: 64, ..args() }, "out: expected 2560 bytes, got 1280"),
            (AttentionArgs { num_heads: 0, ..args() }, "num_heads"),
            (AttentionArgs { token_capacity: 11, ..args() }, "out"),
            (AttentionArgs { seq_capacity: 3, ..args() }, "cu_seqlens: expected 16 bytes, got 12"),
            (AttentionArgs { max_seqlen: 0, ..args() }, "max_seqlen"),
            (AttentionArgs { qkv: args().out, ..args() }, "qkv: expected 3840 bytes"),
            (AttentionArgs { distance_bias: span(2 * 1023 * 4 - 1), ..args() }, "distance_bias"),
            (AttentionArgs { cos: span(1 << 20), ..args() }, "cos and sin"),
            (AttentionArgs { cos: span(1 << 20), sin: span(512 * 16 * 4 - 1), ..args() }, "sin: expected 32768"),
            (
                AttentionArgs { seq_capacity: 1 << 20, max_seqlen: 1 << 20, cu_seqlens: span(1 << 30), ..args() },
                "blocks",
            ),
        ] {
            let error = bad.check().unwrap_err().to_string();
            assert!(error.starts_with("attention: ") && error.contains(part), "{error}");
        }
    }
}
