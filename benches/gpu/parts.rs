//! Each kernel of a forward by itself, at the sizes of a case: what explains where a forward's time goes.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use eremois::Result;
use eremois::ops::cuda::attention::{AttentionArgs, AttentionKernels, BLOCK_QUERIES};
use eremois::ops::cuda::gemm::{Epilogue, Gemm, GemmOperands, GemmShape};
use eremois::ops::cuda::kernels::{ActivationArgs, EmbeddingArgs, Kernels, NormArgs, PoolArgs, PoolOutput, SwigluArgs};
use eremois::ops::cuda::layout::{seq_bucket, token_bucket};
use eremois::ops::cuda::sizes::EncoderSizes;
use eremois::ops::cuda::{Gpu, HalfType, Span};
use eremois::ops::linear::Activation;
use eremois::ops::pool::Pooling;
use serde::Serialize;
use serde_json::{Value, json};

use super::models::Case;
use super::operands::{Operands, num_sets};
use super::timing::{Spread, time};
use crate::Scale;
use crate::synthetic::{self, Tokens};

const HALF: usize = HalfType::NUM_BYTES;
const SECONDS: f64 = 0.05;

/// A kernel's time and what it must at least move and compute.
#[derive(Debug, Serialize)]
struct Part {
    name: String,
    /// Launches in a forward.
    count: usize,
    #[serde(flatten)]
    spread: Spread,
    /// Read and written once each, of device memory.
    num_bytes: usize,
    /// On tensor cores; 0 for kernels without.
    num_flops: usize,
}

/// What all parts are launched with.
struct Shop {
    kernels: Kernels,
    attention: AttentionKernels,
    gemm: Gemm,
    stream: Arc<CudaStream>,
    dtype: HalfType,
    rotated_bytes: usize,
    tokens: Tokens,
    token_capacity: usize,
    seq_capacity: usize,
    parts: Vec<Part>,
}

/// The kernels of one forward, in their order, with their launches counted.
pub fn of_forward(gpu: &Gpu, scale: &Scale, case: &Case) -> Result<Value> {
    let sizes = &case.sizes;
    let (hidden, intermediate, layers) = (sizes.hidden_size, sizes.intermediate_size, sizes.num_layers);
    let mut shop = Shop::new(gpu, scale, case.dtype, sizes, &case.lens)?;
    shop.embedding(sizes)?;
    shop.product("qkv product", layers, 3 * hidden, hidden, Epilogue::Bias)?;
    shop.attention("attention", layers, sizes.num_heads, sizes.head_dim(), false)?;
    shop.product("attention output product", layers, hidden, hidden, Epilogue::Bias)?;
    shop.layer_norm(2 * layers, hidden)?;
    // As the engine does it: cuBLASLt's GELU is the tanh form, the exact one is a kernel of our own.
    shop.product("up product", layers, intermediate, hidden, Epilogue::None)?;
    shop.activation(layers, intermediate)?;
    shop.product("down product", layers, hidden, intermediate, Epilogue::Bias)?;
    shop.pool(hidden)?;
    shop.answer()
}

/// Kernels that no encoder of the benches uses, at sizes of models to come.
pub fn of_others(gpu: &Gpu, scale: &Scale, dtype: HalfType) -> Result<Value> {
    let len = 512.min(scale.capacity.max_batch_tokens);
    let lens = vec![len; scale.capacity.max_batch_tokens / len];
    let mut shop = Shop::new(gpu, scale, dtype, &synthetic::BERT_LARGE, &lens)?;
    shop.rms_norm(1, 1024)?;
    shop.swiglu(1, 4096)?;
    for head_dim in [32, 64, 96, 128] {
        shop.attention(&format!("attention, heads of {head_dim}"), 1, 1536 / head_dim, head_dim, false)?;
    }
    shop.attention("attention, heads of 128, causal with RoPE", 1, 12, 128, true)?;
    shop.answer()
}

impl Shop {
    fn new(gpu: &Gpu, scale: &Scale, dtype: HalfType, sizes: &EncoderSizes, lens: &[usize]) -> Result<Self> {
        let stream = gpu.new_stream()?;
        let tokens = Tokens::new(sizes, lens, 1);
        Ok(Self {
            kernels: Kernels::load(gpu.context())?,
            attention: AttentionKernels::load(gpu.context())?,
            gemm: Gemm::new(gpu, &stream, dtype, None)?,
            stream,
            dtype,
            rotated_bytes: scale.rotated_bytes,
            token_capacity: token_bucket(tokens.input_ids.len()),
            seq_capacity: seq_bucket(lens.len()),
            tokens,
            parts: Vec::new(),
        })
    }

    fn answer(self) -> Result<Value> {
        let num_tokens = self.tokens.input_ids.len();
        Ok(json!({"num_tokens": num_tokens, "token_capacity": self.token_capacity, "parts": self.parts}))
    }

    fn operands(&self) -> Operands {
        Operands::new(&self.stream, self.dtype)
    }

    fn num_tokens(&self) -> usize {
        self.tokens.input_ids.len()
    }

    /// Header and bounds of the batch.
    fn bounds(&self, operands: &mut Operands) -> Result<(Span, Span)> {
        let num_seqs = self.tokens.num_seqs();
        let longest = self.tokens.cu_seqlens.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0);
        let header = operands.words(&[self.num_tokens() as u32, num_seqs as u32, longest, 0, 0, 0, 0, 0])?;
        let mut cu_seqlens = self.tokens.cu_seqlens.clone();
        cu_seqlens.resize(self.seq_capacity + 1, 0);
        Ok((header, operands.words(&cu_seqlens)?))
    }

    fn keep(&mut self, name: &str, count: usize, num_bytes: usize, num_flops: usize, spread: Spread) {
        self.parts.push(Part { name: name.to_string(), count, spread, num_bytes, num_flops });
    }

    fn embedding(&mut self, sizes: &EncoderSizes) -> Result<()> {
        let (mut operands, width) = (self.operands(), sizes.hidden_size);
        let num_bytes = self.num_tokens() * (2 * width * HALF + 4);
        let (header, cu_seqlens) = self.bounds(&mut operands)?;
        let mut ids = self.tokens.input_ids.clone();
        ids.resize(self.token_capacity, 0);
        let first = EmbeddingArgs {
            dtype: self.dtype,
            out: Span::NULL,
            header,
            input_ids: operands.words(&ids)?,
            token_type_ids: Span::NULL,
            cu_seqlens,
            word: operands.halves(sizes.vocab_size * width)?,
            position: operands.halves(sizes.num_positions * width)?,
            token_type: operands.halves(sizes.num_token_types * width)?,
            gamma: operands.floats(width)?,
            beta: operands.floats(width)?,
            token_capacity: self.token_capacity,
            seq_capacity: self.seq_capacity,
            vocab_size: sizes.vocab_size,
            num_positions: sizes.num_positions,
            num_token_types: sizes.num_token_types,
            hidden_size: width,
            position_offset: 0,
            eps: 1e-12,
        };
        let sets = (0..num_sets(num_bytes, self.rotated_bytes))
            .map(|_| Ok(EmbeddingArgs { out: operands.halves(self.token_capacity * width)?, ..first }))
            .collect::<Result<Vec<_>>>()?;
        let spread = time(&self.stream, SECONDS, |i| self.kernels.embedding(&self.stream, &sets[i % sets.len()]))?;
        self.keep("embedding", 1, num_bytes, 0, spread);
        Ok(())
    }

    fn product(&mut self, name: &str, count: usize, columns: usize, depth: usize, epilogue: Epilogue) -> Result<()> {
        let (mut operands, rows) = (self.operands(), self.token_capacity);
        let num_bytes = (rows * depth + columns * depth + rows * columns) * HALF;
        let shape = GemmShape { rows, columns, depth, epilogue };
        let sets = (0..num_sets(num_bytes, self.rotated_bytes))
            .map(|_| {
                let bias = if epilogue == Epilogue::None { Span::NULL } else { operands.halves(columns)? };
                let [x, weight] = [operands.halves(rows * depth)?, operands.halves(columns * depth)?];
                Ok(GemmOperands { x, weight, bias, y: operands.halves(rows * columns)? })
            })
            .collect::<Result<Vec<_>>>()?;
        self.gemm.tune(shape, &sets[0])?;
        let spread = time(&self.stream, SECONDS, |i| self.gemm.launch(shape, &sets[i % sets.len()]))?;
        self.keep(name, count, num_bytes, 2 * rows * columns * depth, spread);
        Ok(())
    }

    fn attention(
        &mut self,
        name: &str,
        count: usize,
        num_heads: usize,
        head_dim: usize,
        is_decoder: bool,
    ) -> Result<()> {
        let (mut operands, width) = (self.operands(), num_heads * head_dim);
        let lens: Vec<usize> = self.tokens.cu_seqlens.windows(2).map(|w| (w[1] - w[0]) as usize).collect();
        let longest = lens.iter().copied().max().unwrap_or(1);
        let num_bytes = 4 * self.num_tokens() * width * HALF;
        let num_flops = lens.iter().map(|len| 4 * len * len * width).sum::<usize>() / if is_decoder { 2 } else { 1 };
        let (header, cu_seqlens) = self.bounds(&mut operands)?;
        let table = |operands: &mut Operands| match is_decoder {
            true => operands.floats(longest * head_dim / 2),
            false => Ok(Span::NULL),
        };
        let first = AttentionArgs {
            dtype: self.dtype,
            out: Span::NULL,
            header,
            qkv: Span::NULL,
            cu_seqlens,
            distance_bias: Span::NULL,
            cos: table(&mut operands)?,
            sin: table(&mut operands)?,
            token_capacity: self.token_capacity,
            seq_capacity: self.seq_capacity,
            max_seqlen: longest.next_multiple_of(BLOCK_QUERIES),
            max_seq_len: longest,
            num_heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            causal: is_decoder,
        };
        let sets = (0..num_sets(num_bytes, self.rotated_bytes))
            .map(|_| {
                let qkv = operands.halves(3 * self.token_capacity * width)?;
                Ok(AttentionArgs { qkv, out: operands.halves(self.token_capacity * width)?, ..first })
            })
            .collect::<Result<Vec<_>>>()?;
        let spread = time(&self.stream, SECONDS, |i| self.attention.forward(&self.stream, &sets[i % sets.len()]))?;
        self.keep(name, count, num_bytes, num_flops, spread);
        Ok(())
    }

    /// Operand sets of a norm, and its bytes.
    fn norm_sets(&self, width: usize, has_beta: bool) -> Result<(Operands, Vec<NormArgs>, usize)> {
        let mut operands = self.operands();
        let num_bytes = 3 * self.num_tokens() * width * HALF;
        let (header, _) = self.bounds(&mut operands)?;
        let (gamma, beta) = (operands.floats(width)?, if has_beta { operands.floats(width)? } else { Span::NULL });
        let sets = (0..num_sets(num_bytes, self.rotated_bytes))
            .map(|_| {
                let x = operands.halves(self.token_capacity * width)?;
                // In place of the residual, as the encoder has it.
                let residual = operands.halves(self.token_capacity * width)?;
                Ok(NormArgs {
                    dtype: self.dtype,
                    out: residual,
                    header,
                    x,
                    residual,
                    sum: Span::NULL,
                    gamma,
                    beta,
                    token_capacity: self.token_capacity,
                    hidden_size: width,
                    eps: 1e-12,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok((operands, sets, num_bytes))
    }

    fn layer_norm(&mut self, count: usize, width: usize) -> Result<()> {
        let (_operands, sets, num_bytes) = self.norm_sets(width, true)?;
        let spread = time(&self.stream, SECONDS, |i| self.kernels.add_layer_norm(&self.stream, &sets[i % sets.len()]))?;
        self.keep("residual and LayerNorm", count, num_bytes, 0, spread);
        Ok(())
    }

    fn rms_norm(&mut self, count: usize, width: usize) -> Result<()> {
        let (_operands, sets, num_bytes) = self.norm_sets(width, false)?;
        let spread = time(&self.stream, SECONDS, |i| self.kernels.add_rms_norm(&self.stream, &sets[i % sets.len()]))?;
        self.keep("residual and RMSNorm", count, num_bytes, 0, spread);
        Ok(())
    }

    fn activation(&mut self, count: usize, num_columns: usize) -> Result<()> {
        let mut operands = self.operands();
        let num_bytes = 2 * self.num_tokens() * num_columns * HALF;
        let ((header, _), bias) = (self.bounds(&mut operands)?, operands.floats(num_columns)?);
        let sets = (0..num_sets(num_bytes, self.rotated_bytes))
            .map(|_| {
                Ok(ActivationArgs {
                    dtype: self.dtype,
                    y: operands.halves(self.token_capacity * num_columns)?,
                    header,
                    bias,
                    token_capacity: self.token_capacity,
                    num_columns,
                    activation: Activation::Gelu,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let spread =
            time(&self.stream, SECONDS, |i| self.kernels.bias_activation(&self.stream, &sets[i % sets.len()]))?;
        self.keep("bias and GELU", count, num_bytes, 0, spread);
        Ok(())
    }

    fn swiglu(&mut self, count: usize, num_columns: usize) -> Result<()> {
        let mut operands = self.operands();
        let num_bytes = 3 * self.num_tokens() * num_columns * HALF;
        let (header, _) = self.bounds(&mut operands)?;
        let sets = (0..num_sets(num_bytes, self.rotated_bytes))
            .map(|_| {
                Ok(SwigluArgs {
                    dtype: self.dtype,
                    out: operands.halves(self.token_capacity * num_columns)?,
                    header,
                    x: operands.halves(2 * self.token_capacity * num_columns)?,
                    token_capacity: self.token_capacity,
                    num_columns,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let spread = time(&self.stream, SECONDS, |i| self.kernels.swiglu(&self.stream, &sets[i % sets.len()]))?;
        self.keep("SwiGLU", count, num_bytes, 0, spread);
        Ok(())
    }

    fn pool(&mut self, width: usize) -> Result<()> {
        let (mut operands, num_seqs) = (self.operands(), self.tokens.num_seqs());
        let num_bytes = self.num_tokens() * width * HALF + num_seqs * width * 4;
        let (header, cu_seqlens) = self.bounds(&mut operands)?;
        let (rows, not_finite) =
            (operands.words(&[width as u32, 1].repeat(self.seq_capacity))?, operands.words(&[0; 4])?);
        let sets = (0..num_sets(num_bytes, self.rotated_bytes))
            .map(|_| {
                Ok(PoolArgs {
                    dtype: self.dtype,
                    output: PoolOutput::F32,
                    out: operands.halves(2 * self.seq_capacity * width)?,
                    header,
                    hidden: operands.halves(self.token_capacity * width)?,
                    cu_seqlens,
                    rows,
                    not_finite,
                    token_capacity: self.token_capacity,
                    seq_capacity: self.seq_capacity,
                    hidden_size: width,
                    pooling: Pooling::Mean,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let spread = time(&self.stream, SECONDS, |i| self.kernels.pool(&self.stream, &sets[i % sets.len()]))?;
        self.keep("pooling", 1, num_bytes, 0, spread);
        Ok(())
    }
}
