//! Launchers of the row kernels: embedding, normalisation, activation, pooling. What each computes stands in the block
//! at the head of its `kernels/*.cu`.
//!
//! A launcher checks every operand's size, address and limits and launches for a bucket's capacity; it waits for nothing
//! and allocates nothing on the device, so it can be captured into a graph.

mod check;

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaFunction, CudaStream, PushKernelArg};
use cudarc::nvrtc::Ptx;

use super::{HalfType, Span};
use crate::Result;
use crate::ops::linear::Activation;
use crate::ops::pool::Pooling;

/// Widest row the kernels hold: 256 threads with 32 values each.
pub const MAX_HIDDEN_SIZE: usize = 8192;

/// The row kernels of one device, loaded.
pub struct Kernels {
    embedding: Pair,
    add_layer_norm: Pair,
    add_rms_norm: Pair,
    bias_activation: Pair,
    swiglu: Pair,
    pool_to_half: Pair,
    pool_to_f32: Pair,
}

/// A kernel for each of the 2-byte types.
struct Pair {
    f16: CudaFunction,
    bf16: CudaFunction,
}

impl Pair {
    fn of(&self, dtype: HalfType) -> &CudaFunction {
        match dtype {
            HalfType::F16 => &self.f16,
            HalfType::Bf16 => &self.bf16,
        }
    }
}

/// `out = LayerNorm(word[id] + position[i + position_offset] + token_type[type id])`.
#[derive(Debug, Clone, Copy)]
pub struct EmbeddingArgs {
    pub dtype: HalfType,
    /// [token_capacity, hidden_size]
    pub out: Span,
    /// [8] u32, see [`super::Header`]
    pub header: Span,
    /// [token_capacity] u32
    pub input_ids: Span,
    /// [token_capacity] u32 or null; read where the header's flag says that they are there.
    pub token_type_ids: Span,
    /// [seq_capacity + 1] u32
    pub cu_seqlens: Span,
    /// [vocab_size, hidden_size]
    pub word: Span,
    /// [num_positions, hidden_size]
    pub position: Span,
    /// [num_token_types, hidden_size] or null
    pub token_type: Span,
    /// [hidden_size] f32
    pub gamma: Span,
    /// [hidden_size] f32
    pub beta: Span,
    pub token_capacity: usize,
    pub seq_capacity: usize,
    pub vocab_size: usize,
    pub num_positions: usize,
    pub num_token_types: usize,
    pub hidden_size: usize,
    pub position_offset: usize,
    pub eps: f32,
}

/// `out = Norm(x + residual)`. `out` and `sum` may each be `x` or `residual`.
#[derive(Debug, Clone, Copy)]
pub struct NormArgs {
    pub dtype: HalfType,
    /// [token_capacity, hidden_size]
    pub out: Span,
    /// [8] u32, see [`super::Header`]
    pub header: Span,
    /// [token_capacity, hidden_size]
    pub x: Span,
    /// [token_capacity, hidden_size] or null
    pub residual: Span,
    /// [token_capacity, hidden_size], gets `x + residual`; null where nobody reads it.
    pub sum: Span,
    /// [hidden_size] f32
    pub gamma: Span,
    /// [hidden_size] f32 or null; RMSNorm has none.
    pub beta: Span,
    pub token_capacity: usize,
    pub hidden_size: usize,
    pub eps: f32,
}

/// `y = activation(y + bias)` in place.
#[derive(Debug, Clone, Copy)]
pub struct ActivationArgs {
    pub dtype: HalfType,
    /// [token_capacity, num_columns]
    pub y: Span,
    /// [8] u32, see [`super::Header`]
    pub header: Span,
    /// [num_columns] f32 or null
    pub bias: Span,
    pub token_capacity: usize,
    pub num_columns: usize,
    pub activation: Activation,
}

/// `out = silu(x's first num_columns) * x's others`.
#[derive(Debug, Clone, Copy)]
pub struct SwigluArgs {
    pub dtype: HalfType,
    /// [token_capacity, num_columns]; not `x`.
    pub out: Span,
    /// [8] u32, see [`super::Header`]
    pub header: Span,
    /// [token_capacity, 2 * num_columns]
    pub x: Span,
    pub token_capacity: usize,
    pub num_columns: usize,
}

/// What pooled rows are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PoolOutput {
    F32,
    /// The type of the hidden states.
    Half,
}

/// One row a sequence: pooled, cut, scaled, 0 beyond the cut.
#[derive(Debug, Clone, Copy)]
pub struct PoolArgs {
    pub dtype: HalfType,
    pub output: PoolOutput,
    /// [seq_capacity, hidden_size] of `output`
    pub out: Span,
    /// [8] u32, see [`super::Header`]
    pub header: Span,
    /// [token_capacity, hidden_size]
    pub hidden: Span,
    /// [seq_capacity + 1] u32
    pub cu_seqlens: Span,
    /// [seq_capacity, 2] u32: dimensions, and 1 to scale to length 1
    pub rows: Span,
    /// [1] u32, 0 before the batch; afterwards 1 + the last row that holds a NaN or an infinity, or 0.
    pub not_finite: Span,
    pub token_capacity: usize,
    pub seq_capacity: usize,
    pub hidden_size: usize,
    pub pooling: Pooling,
}

impl Kernels {
    /// Loads the kernels into a device's context.
    ///
    /// Blocks: some milliseconds; seconds on a device newer than the machine code, whose driver compiles the PTX.
    /// Errors: [`crate::Error::Internal`] if the driver refuses them: the device is older than sm_80.
    pub fn load(context: &Arc<CudaContext>) -> Result<Self> {
        let module = |image: &[u8]| context.load_module(Ptx::from_binary(image.to_vec()));
        let embedding = module(include_bytes!(concat!(env!("OUT_DIR"), "/embedding.fatbin")))?;
        let norm = module(include_bytes!(concat!(env!("OUT_DIR"), "/norm.fatbin")))?;
        let activation = module(include_bytes!(concat!(env!("OUT_DIR"), "/activation.fatbin")))?;
        let pool = module(include_bytes!(concat!(env!("OUT_DIR"), "/pool.fatbin")))?;
        Ok(Self {
            embedding: Pair {
                f16: embedding.load_function("embedding_f16")?,
                bf16: embedding.load_function("embedding_bf16")?,
            },
            add_layer_norm: Pair {
                f16: norm.load_function("add_layer_norm_f16")?,
                bf16: norm.load_function("add_layer_norm_bf16")?,
            },
            add_rms_norm: Pair {
                f16: norm.load_function("add_rms_norm_f16")?,
                bf16: norm.load_function("add_rms_norm_bf16")?,
            },
            bias_activation: Pair {
                f16: activation.load_function("bias_activation_f16")?,
                bf16: activation.load_function("bias_activation_bf16")?,
            },
            swiglu: Pair {
                f16: activation.load_function("swiglu_f16")?,
                bf16: activation.load_function("swiglu_bf16")?,
            },
            pool_to_half: Pair {
                f16: pool.load_function("pool_f16_to_f16")?,
                bf16: pool.load_function("pool_bf16_to_bf16")?,
            },
            pool_to_f32: Pair {
                f16: pool.load_function("pool_f16_to_f32")?,
                bf16: pool.load_function("pool_bf16_to_f32")?,
            },
        })
    }

    /// Errors: [`crate::Error::Shape`] for operands the kernel cannot take.
    pub fn embedding(&self, stream: &CudaStream, args: &EmbeddingArgs) -> Result<()> {
        let config = args.check()?;
        let sizes = [args.vocab_size, args.num_positions, args.num_token_types, args.hidden_size, args.position_offset]
            .map(|size| size as u32);
        let mut launch = stream.launch_builder(self.embedding.of(args.dtype));
        for span in [&args.out, &args.header, &args.input_ids, &args.token_type_ids, &args.cu_seqlens] {
            launch.arg(&span.ptr);
        }
        for span in [&args.word, &args.position, &args.token_type, &args.gamma, &args.beta] {
            launch.arg(&span.ptr);
        }
        for size in &sizes {
            launch.arg(size);
        }
        launch.arg(&args.eps);
        // SAFETY: the arguments are those of `embedding_*` in their order and types. `check` proved that each span holds
        // what the kernel reads or writes for the bucket; a token beyond the header's count is not touched, and an id
        // beyond its table is not read.
        unsafe { launch.launch(config) }?;
        Ok(())
    }

    /// Errors: [`crate::Error::Shape`] for operands the kernel cannot take.
    pub fn add_layer_norm(&self, stream: &CudaStream, args: &NormArgs) -> Result<()> {
        let config = args.check_layer()?;
        let hidden_size = args.hidden_size as u32;
        let mut launch = stream.launch_builder(self.add_layer_norm.of(args.dtype));
        for span in [&args.out, &args.header, &args.x, &args.residual, &args.sum, &args.gamma, &args.beta] {
            launch.arg(&span.ptr);
        }
        launch.arg(&hidden_size).arg(&args.eps);
        // SAFETY: the arguments are those of `add_layer_norm_*` in their order and types; `check` proved the spans'
        // sizes for the bucket, and that no two operands overlap in a way the kernel does not allow.
        unsafe { launch.launch(config) }?;
        Ok(())
    }

    /// Errors: [`crate::Error::Shape`] for operands the kernel cannot take, a `beta` among them.
    pub fn add_rms_norm(&self, stream: &CudaStream, args: &NormArgs) -> Result<()> {
        let config = args.check_rms()?;
        let hidden_size = args.hidden_size as u32;
        let mut launch = stream.launch_builder(self.add_rms_norm.of(args.dtype));
        for span in [&args.out, &args.header, &args.x, &args.residual, &args.sum, &args.gamma] {
            launch.arg(&span.ptr);
        }
        launch.arg(&hidden_size).arg(&args.eps);
        // SAFETY: as for `add_layer_norm`, without beta.
        unsafe { launch.launch(config) }?;
        Ok(())
    }

    /// Errors: [`crate::Error::Shape`] for operands the kernel cannot take.
    pub fn bias_activation(&self, stream: &CudaStream, args: &ActivationArgs) -> Result<()> {
        let config = args.check()?;
        let (num_columns, activation) = (args.num_columns as u32, activation_number(args.activation));
        let mut launch = stream.launch_builder(self.bias_activation.of(args.dtype));
        launch.arg(&args.y.ptr).arg(&args.header.ptr).arg(&args.bias.ptr).arg(&num_columns).arg(&activation);
        // SAFETY: the arguments are those of `bias_activation_*` in their order and types; `check` proved the spans'
        // sizes for the bucket and that 32 bits count its values.
        unsafe { launch.launch(config) }?;
        Ok(())
    }

    /// Errors: [`crate::Error::Shape`] for operands the kernel cannot take.
    pub fn swiglu(&self, stream: &CudaStream, args: &SwigluArgs) -> Result<()> {
        let config = args.check()?;
        let num_columns = args.num_columns as u32;
        let mut launch = stream.launch_builder(self.swiglu.of(args.dtype));
        launch.arg(&args.out.ptr).arg(&args.header.ptr).arg(&args.x.ptr).arg(&num_columns);
        // SAFETY: the arguments are those of `swiglu_*` in their order and types; `check` proved the spans' sizes for
        // the bucket, that 32 bits count x's values, and that out is not x.
        unsafe { launch.launch(config) }?;
        Ok(())
    }

    /// Errors: [`crate::Error::Shape`] for operands the kernel cannot take.
    pub fn pool(&self, stream: &CudaStream, args: &PoolArgs) -> Result<()> {
        let config = args.check()?;
        let (hidden_size, pooling) = (args.hidden_size as u32, pooling_number(args.pooling));
        let function = match args.output {
            PoolOutput::F32 => self.pool_to_f32.of(args.dtype),
            PoolOutput::Half => self.pool_to_half.of(args.dtype),
        };
        let mut launch = stream.launch_builder(function);
        for span in [&args.out, &args.header, &args.hidden, &args.cu_seqlens, &args.rows] {
            launch.arg(&span.ptr);
        }
        launch.arg(&hidden_size).arg(&pooling).arg(&args.not_finite.ptr);
        // SAFETY: the arguments are those of `pool_*` in their order and types; `check` proved the spans' sizes for the
        // bucket and the width that its shared memory is counted for. The bounds were checked before their upload.
        unsafe { launch.launch(config) }?;
        Ok(())
    }
}

/// The numbers of `Activation` in kernels/activation.cu.
fn activation_number(activation: Activation) -> u32 {
    match activation {
        Activation::None => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
        Activation::Relu => 3,
        Activation::Silu => 4,
        Activation::Tanh => 5,
    }
}

/// The numbers of `Pooling` in kernels/pool.cu.
fn pooling_number(pooling: Pooling) -> u32 {
    match pooling {
        Pooling::Cls => 0,
        Pooling::Mean => 1,
        Pooling::Max => 2,
        Pooling::LastToken => 3,
        Pooling::WeightedMean => 4,
    }
}
