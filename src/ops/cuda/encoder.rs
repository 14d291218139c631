//! The post-norm encoder on a CUDA device: its weights in a 2-byte type, its forward as a list of launches.
//!
//! Source: Devlin et al. 2018 (BERT); the CPU's twin is `model::post_norm`.

use std::sync::Arc;

use candle_core::Tensor;
use cudarc::driver::CudaStream;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::arena::{Arena, Uploads};
use super::attention::{AttentionArgs, AttentionKernels, HEAD_DIMS};
use super::gemm::{Epilogue, Gemm, GemmOperands, GemmShape};
use super::kernels::{ActivationArgs, EmbeddingArgs, Kernels, MAX_HIDDEN_SIZE, NormArgs, PoolArgs, PoolOutput};
use super::layout::{BatchSpans, Layout};
use super::{Gpu, HalfType, Span};
use crate::ops::linear::Activation;
use crate::ops::pool::Pooling;
use crate::ops::weights::{EmbeddingWeights, LayerWeights, LinearWeights, NormWeights};
use crate::ops::{check_dims, host_values};
use crate::{Error, Result};

const HALF: usize = HalfType::NUM_BYTES;

/// The sizes of an encoder.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EncoderSizes {
    pub vocab_size: usize,
    /// Rows of the position table.
    pub num_positions: usize,
    /// Row of a sequence's first token.
    pub position_offset: usize,
    /// Rows of the token-type table; 0 where there is none.
    pub num_token_types: usize,
    pub hidden_size: usize,
    pub num_heads: usize,
    pub num_layers: usize,
    pub intermediate_size: usize,
    pub activation: Activation,
    pub layer_norm_eps: f64,
}

impl EncoderSizes {
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads.max(1)
    }

    /// Longest sequence the position table reaches.
    pub fn max_seq_len(&self) -> usize {
        self.num_positions.saturating_sub(self.position_offset)
    }

    /// Refuses, in words, a model that the kernels do not compute.
    pub fn supported(&self) -> Result<(), String> {
        if !HEAD_DIMS.contains(&self.head_dim()) || self.head_dim() * self.num_heads != self.hidden_size {
            return Err(format!("attention heads have {} values; the kernels take 32, 64, 96 or 128", self.head_dim()));
        }
        if self.hidden_size > MAX_HIDDEN_SIZE {
            return Err(format!("hidden_size is {}; the kernels take up to {MAX_HIDDEN_SIZE}", self.hidden_size));
        }
        Ok(())
    }

    /// Device bytes of all weights, to some kilobytes.
    pub fn weight_bytes(&self) -> usize {
        let (hidden, intermediate) = (self.hidden_size, self.intermediate_size);
        let tables = (self.vocab_size + self.num_positions + self.num_token_types) * hidden * HALF;
        let layer = (4 * hidden * hidden + 2 * hidden * intermediate) * HALF;
        // Biases and norms in both forms, each padded.
        let small = 16 * Arena::padded((3 * hidden + intermediate) * 4);
        tables + self.num_layers * (layer + small)
    }

    /// Device bytes of the activations of a bucket.
    pub fn scratch_bytes(&self, token_capacity: usize) -> usize {
        3 * Arena::padded(token_capacity * self.hidden_size * HALF)
            + Arena::padded(token_capacity * self.wide_columns() * HALF)
    }

    /// Columns of the activation that is query, key and value first, and the feed-forward's intermediate after.
    fn wide_columns(&self) -> usize {
        (3 * self.hidden_size).max(self.intermediate_size)
    }
}

/// The activations of a forward. What `hidden` holds at its end is the result.
#[derive(Debug, Clone, Copy)]
pub struct Scratch {
    /// [token_capacity, hidden_size], as the two after it.
    hidden: Span,
    context: Span,
    projected: Span,
    /// [token_capacity, max(3 * hidden_size, intermediate_size)]
    wide: Span,
}

impl Scratch {
    /// Cuts them for the largest bucket; smaller ones use the beginnings.
    pub fn cut(arena: &mut Arena, sizes: &EncoderSizes, token_capacity: usize) -> Result<Self> {
        let num_bytes = token_capacity * sizes.hidden_size * HALF;
        Ok(Self {
            hidden: arena.cut(num_bytes)?,
            context: arena.cut(num_bytes)?,
            projected: arena.cut(num_bytes)?,
            wide: arena.cut(token_capacity * sizes.wide_columns() * HALF)?,
        })
    }
}

/// An encoder's weights on a device, and the kernels that compute it.
pub struct DeviceEncoder {
    kernels: Kernels,
    attention: AttentionKernels,
    pub sizes: EncoderSizes,
    pub dtype: HalfType,
    embedding: Embedding,
    /// [num_heads, 2 * max_seq_len - 1] f32 or null
    distance_bias: Span,
    layers: Vec<Layer>,
    /// Owns what the spans point to.
    uploads: Uploads,
}

struct Embedding {
    word: Span,
    position: Span,
    token_type: Span,
    norm: Norm,
}

struct Layer {
    qkv: Linear,
    attention_output: Linear,
    attention_norm: Norm,
    up: Linear,
    down: Linear,
    output_norm: Norm,
}

#[derive(Clone, Copy)]
struct Linear {
    weight: Span,
    /// In the 2-byte type for an epilogue; f32 for the activation kernel.
    bias: Span,
    columns: usize,
    depth: usize,
    after: After,
}

/// What follows a product, and which kernel computes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    Epilogue(Epilogue),
    /// The product alone, then bias and activation by a kernel of our own.
    Kernel(Activation),
}

impl After {
    fn of(activation: Activation) -> Self {
        match activation {
            Activation::None => Self::Epilogue(Epilogue::Bias),
            Activation::Relu => Self::Epilogue(Epilogue::BiasRelu),
            Activation::GeluTanh => Self::Epilogue(Epilogue::BiasGeluTanh),
            // The epilogue's GELU is the tanh form: another function than the model was trained with.
            Activation::Gelu | Activation::Silu | Activation::Tanh => Self::Kernel(activation),
        }
    }

    fn epilogue(self) -> Epilogue {
        match self {
            Self::Epilogue(epilogue) => epilogue,
            Self::Kernel(_) => Epilogue::None,
        }
    }
}

#[derive(Clone, Copy)]
struct Norm {
    /// f32, [hidden_size] each.
    gamma: Span,
    beta: Span,
}

impl DeviceEncoder {
    /// Uploads the weights, which are CPU tensors of any float type; layers are taken one at a time.
    ///
    /// Shapes: those of [`EmbeddingWeights`] and [`LayerWeights`] for these sizes; `distance_bias`
    /// [num_heads, 2 * max_seq_len - 1].
    /// Blocks: until all is on the device.
    /// Errors: [`Error::Shape`] for weights of another shape, [`Error::Internal`] for a value beyond f16 and for the
    /// device's own.
    pub fn new(
        gpu: &Gpu,
        stream: &Arc<CudaStream>,
        dtype: HalfType,
        sizes: EncoderSizes,
        embedding: EmbeddingWeights,
        distance_bias: Option<Tensor>,
        layers: impl Iterator<Item = Result<LayerWeights>>,
    ) -> Result<Self> {
        let mut uploader = Uploader { stream, dtype, uploads: Uploads::default() };
        let hidden = sizes.hidden_size;
        let embedding = Embedding {
            word: uploader.matrix("word", &embedding.word, sizes.vocab_size, hidden)?,
            position: uploader.matrix("position", &embedding.position, sizes.num_positions, hidden)?,
            token_type: match &embedding.token_type {
                Some(table) => uploader.matrix("token_type", table, sizes.num_token_types, hidden)?,
                None => Span::NULL,
            },
            norm: uploader.norm(&embedding.norm, hidden)?,
        };
        let distance_bias = match distance_bias {
            None => Span::NULL,
            Some(bias) => {
                check_dims("encoder", "distance_bias", &bias, &[sizes.num_heads, 2 * sizes.max_seq_len() - 1])?;
                uploader.floats(&bias)?
            }
        };
        let layers = layers.map(|layer| uploader.layer(&layer?, &sizes)).collect::<Result<Vec<_>>>()?;
        if layers.len() != sizes.num_layers {
            let got = layers.len().to_string();
            return Err(Error::Shape { op: "encoder", operand: "layers", expected: sizes.num_layers.to_string(), got });
        }
        stream.synchronize()?;
        Ok(Self {
            kernels: Kernels::load(gpu.context())?,
            attention: AttentionKernels::load(gpu.context())?,
            sizes,
            dtype,
            embedding,
            distance_bias,
            layers,
            uploads: uploader.uploads,
        })
    }

    /// Device bytes of the weights.
    pub fn num_bytes(&self) -> usize {
        self.uploads.num_bytes()
    }

    /// Enqueues embedding and layers; `scratch.hidden` is the result. Allocates and waits for nothing, and enqueues
    /// the same launches for the same layout, `max_seqlen` and presence of token types: it can be captured.
    ///
    /// `max_seqlen` is at least that of the batch: it decides how many queries attention is launched for.
    pub fn forward(
        &self,
        stream: &CudaStream,
        gemm: &mut Gemm,
        batch: &BatchSpans,
        layout: &Layout,
        max_seqlen: usize,
        scratch: &Scratch,
    ) -> Result<()> {
        let Self { sizes, dtype, .. } = *self;
        let Scratch { hidden, context, projected, wide } = *scratch;
        self.kernels.embedding(
            stream,
            &EmbeddingArgs {
                dtype,
                out: hidden,
                header: batch.header,
                input_ids: batch.input_ids,
                token_type_ids: batch.token_type_ids,
                cu_seqlens: batch.cu_seqlens,
                word: self.embedding.word,
                position: self.embedding.position,
                token_type: self.embedding.token_type,
                gamma: self.embedding.norm.gamma,
                beta: self.embedding.norm.beta,
                token_capacity: layout.token_capacity,
                seq_capacity: layout.seq_capacity,
                vocab_size: sizes.vocab_size,
                num_positions: sizes.num_positions,
                num_token_types: sizes.num_token_types,
                hidden_size: sizes.hidden_size,
                position_offset: sizes.position_offset,
                eps: sizes.layer_norm_eps as f32,
            },
        )?;
        for layer in &self.layers {
            self.linear(stream, gemm, batch, layout, &layer.qkv, hidden, wide)?;
            self.attention.forward(
                stream,
                &AttentionArgs {
                    dtype,
                    out: context,
                    header: batch.header,
                    qkv: wide,
                    cu_seqlens: batch.cu_seqlens,
                    distance_bias: self.distance_bias,
                    cos: Span::NULL,
                    sin: Span::NULL,
                    token_capacity: layout.token_capacity,
                    seq_capacity: layout.seq_capacity,
                    max_seqlen,
                    max_seq_len: sizes.max_seq_len(),
                    num_heads: sizes.num_heads,
                    head_dim: sizes.head_dim(),
                    scale: 1.0 / (sizes.head_dim() as f32).sqrt(),
                    causal: false,
                },
            )?;
            self.linear(stream, gemm, batch, layout, &layer.attention_output, context, projected)?;
            self.add_norm(stream, batch, layout, &layer.attention_norm, projected, hidden)?;
            self.linear(stream, gemm, batch, layout, &layer.up, hidden, wide)?;
            self.linear(stream, gemm, batch, layout, &layer.down, wide, projected)?;
            self.add_norm(stream, batch, layout, &layer.output_norm, projected, hidden)?;
        }
        Ok(())
    }

    /// Enqueues the pooling of the forward's result into `out`, [seq_capacity, hidden_size] f32. `not_finite` is one
    /// word, 0 before; see [`PoolArgs`].
    #[allow(clippy::too_many_arguments, reason = "each is an operand of one launch")]
    pub fn pool(
        &self,
        stream: &CudaStream,
        batch: &BatchSpans,
        layout: &Layout,
        scratch: &Scratch,
        pooling: Pooling,
        out: Span,
        not_finite: Span,
    ) -> Result<()> {
        self.kernels.pool(
            stream,
            &PoolArgs {
                dtype: self.dtype,
                output: PoolOutput::F32,
                out,
                header: batch.header,
                hidden: scratch.hidden,
                cu_seqlens: batch.cu_seqlens,
                rows: batch.rows,
                not_finite,
                token_capacity: layout.token_capacity,
                seq_capacity: layout.seq_capacity,
                hidden_size: self.sizes.hidden_size,
                pooling,
            },
        )
    }

    /// Times the products of a bucket on the activations' memory, whose content goes.
    ///
    /// Blocks: some milliseconds, unless all are kept from an earlier start.
    pub fn tune(&self, gemm: &mut Gemm, token_capacity: usize, scratch: &Scratch) -> Result<()> {
        // All layers have the same shapes.
        let Some(layer) = self.layers.first() else { return Ok(()) };
        let Scratch { hidden, context, projected, wide } = *scratch;
        for (linear, x, y) in [
            (&layer.qkv, hidden, wide),
            (&layer.attention_output, context, projected),
            (&layer.up, hidden, wide),
            (&layer.down, wide, projected),
        ] {
            let (shape, operands) = linear.product(token_capacity, x, y);
            gemm.tune(shape, &operands)?;
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments, reason = "the forward's context, and one product's operands")]
    fn linear(
        &self,
        stream: &CudaStream,
        gemm: &mut Gemm,
        batch: &BatchSpans,
        layout: &Layout,
        linear: &Linear,
        x: Span,
        y: Span,
    ) -> Result<()> {
        let (shape, operands) = linear.product(layout.token_capacity, x, y);
        gemm.launch(shape, &operands)?;
        let After::Kernel(activation) = linear.after else { return Ok(()) };
        self.kernels.bias_activation(
            stream,
            &ActivationArgs {
                dtype: self.dtype,
                y,
                header: batch.header,
                bias: linear.bias,
                token_capacity: layout.token_capacity,
                num_columns: linear.columns,
                activation,
            },
        )
    }

    /// `hidden = LayerNorm(x + hidden)`.
    fn add_norm(
        &self,
        stream: &CudaStream,
        batch: &BatchSpans,
        layout: &Layout,
        norm: &Norm,
        x: Span,
        hidden: Span,
    ) -> Result<()> {
        self.kernels.add_layer_norm(
            stream,
            &NormArgs {
                dtype: self.dtype,
                out: hidden,
                header: batch.header,
                x,
                residual: hidden,
                sum: Span::NULL,
                gamma: norm.gamma,
                beta: norm.beta,
                token_capacity: layout.token_capacity,
                hidden_size: self.sizes.hidden_size,
                eps: self.sizes.layer_norm_eps as f32,
            },
        )
    }
}

impl Linear {
    fn product(&self, rows: usize, x: Span, y: Span) -> (GemmShape, GemmOperands) {
        let epilogue = self.after.epilogue();
        let shape = GemmShape { rows, columns: self.columns, depth: self.depth, epilogue };
        let bias = if epilogue == Epilogue::None { Span::NULL } else { self.bias };
        (shape, GemmOperands { x, weight: self.weight, bias, y })
    }
}

/// Brings tensors to the device in the types the kernels take.
struct Uploader<'a> {
    stream: &'a Arc<CudaStream>,
    dtype: HalfType,
    uploads: Uploads,
}

impl Uploader<'_> {
    fn layer(&mut self, layer: &LayerWeights, sizes: &EncoderSizes) -> Result<Layer> {
        let (hidden, intermediate) = (sizes.hidden_size, sizes.intermediate_size);
        Ok(Layer {
            qkv: self.linear(&layer.qkv, 3 * hidden, hidden, Activation::None)?,
            attention_output: self.linear(&layer.attention_output, hidden, hidden, Activation::None)?,
            attention_norm: self.norm(&layer.attention_norm, hidden)?,
            up: self.linear(&layer.up, intermediate, hidden, sizes.activation)?,
            down: self.linear(&layer.down, hidden, intermediate, Activation::None)?,
            output_norm: self.norm(&layer.output_norm, hidden)?,
        })
    }

    fn linear(
        &mut self,
        linear: &LinearWeights,
        columns: usize,
        depth: usize,
        activation: Activation,
    ) -> Result<Linear> {
        let after = After::of(activation);
        check_dims("encoder", "bias", &linear.bias, &[columns])?;
        Ok(Linear {
            weight: self.matrix("weight", &linear.weight, columns, depth)?,
            bias: match after {
                After::Epilogue(_) => self.halves("bias", &linear.bias)?,
                After::Kernel(_) => self.floats(&linear.bias)?,
            },
            columns,
            depth,
            after,
        })
    }

    fn norm(&mut self, norm: &NormWeights, hidden_size: usize) -> Result<Norm> {
        check_dims("encoder", "norm", &norm.weight, &[hidden_size])?;
        check_dims("encoder", "norm", &norm.bias, &[hidden_size])?;
        Ok(Norm { gamma: self.floats(&norm.weight)?, beta: self.floats(&norm.bias)? })
    }

    fn matrix(&mut self, operand: &'static str, tensor: &Tensor, rows: usize, columns: usize) -> Result<Span> {
        check_dims("encoder", operand, tensor, &[rows, columns])?;
        self.halves(operand, tensor)
    }

    fn floats(&mut self, tensor: &Tensor) -> Result<Span> {
        self.uploads.add(self.stream, &host_values(tensor)?)
    }

    fn halves(&mut self, operand: &'static str, tensor: &Tensor) -> Result<Span> {
        let values = host_values(tensor)?;
        match self.dtype {
            HalfType::F16 => self.uploads.add(self.stream, &to_f16(operand, &values)?),
            HalfType::Bf16 => {
                let mut halves = vec![bf16::ZERO; values.len()];
                halves.convert_from_f32_slice(&values);
                self.uploads.add(self.stream, &halves)
            }
        }
    }
}

/// Rounds to f16. Errors: [`Error::Internal`] for a finite value that f16 has no number for.
fn to_f16(operand: &str, values: &[f32]) -> Result<Vec<f16>> {
    let mut halves = vec![f16::ZERO; values.len()];
    halves.convert_from_f32_slice(values);
    match halves.iter().zip(values).find(|(half, value)| half.is_infinite() && value.is_finite()) {
        None => Ok(halves),
        Some((_, value)) => {
            let cause = format!("a {operand} of {value:e} is beyond f16, which ends at 65504: set dtype = \"bf16\"");
            Err(Error::Internal { cause })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bert_base() -> EncoderSizes {
        EncoderSizes {
            vocab_size: 30522,
            num_positions: 512,
            position_offset: 0,
            num_token_types: 2,
            hidden_size: 768,
            num_heads: 12,
            num_layers: 12,
            intermediate_size: 3072,
            activation: Activation::Gelu,
            layer_norm_eps: 1e-12,
        }
    }

    #[test]
    fn the_weights_of_bert_base_are_counted() {
        // 108.9 million parameters without the pooler, in 2 bytes each; the rest is padding and norms in f32.
        let parameters = 108_891_648 * 2;
        let counted = bert_base().weight_bytes();
        assert!(counted > parameters && counted < parameters * 103 / 100, "{counted}");
        // 16384 tokens: 3 of 768 columns and one of 3072.
        assert_eq!(bert_base().scratch_bytes(16384), 16384 * (3 * 768 + 3072) * 2);
    }

    #[test]
    fn what_the_kernels_do_not_compute_is_named() {
        assert_eq!(bert_base().supported(), Ok(()));
        let odd = EncoderSizes { num_heads: 16, ..bert_base() }.supported().unwrap_err();
        assert!(odd.contains("48 values"), "{odd}");
        let wide = EncoderSizes { hidden_size: 16384, num_heads: 128, ..bert_base() }.supported().unwrap_err();
        assert!(wide.contains("16384"), "{wide}");
    }

    #[test]
    fn only_what_cublaslt_computes_exactly_is_an_epilogue() {
        assert_eq!(After::of(Activation::Gelu).epilogue(), Epilogue::None);
        assert_eq!(After::of(Activation::GeluTanh), After::Epilogue(Epilogue::BiasGeluTanh));
        assert_eq!(After::of(Activation::None), After::Epilogue(Epilogue::Bias));
    }

    #[test]
    fn a_weight_beyond_f16_is_refused_by_value() {
        assert_eq!(to_f16("bias", &[1.0, -65504.0]).unwrap(), [f16::ONE, f16::MIN]);
        let error = to_f16("bias", &[0.0, 7e4]).unwrap_err().to_string();
        assert!(error.contains("7e4") && error.contains("bf16"), "{error}");
        // One that is infinite in the file is the model's own fault, and shows as such.
        assert!(to_f16("bias", &[f32::INFINITY]).is_ok());
    }
}
