//! The post-norm encoder on a CUDA device: its weights in a 2-byte type, its forward as a list of launches.
//!
//! Source: Devlin et al. 2018 (BERT); the CPU's twin is `model::post_norm`.

use std::sync::Arc;

use candle_core::Tensor;
use cudarc::driver::CudaStream;

use super::arena::Uploads;
use super::attention::{AttentionArgs, AttentionKernels};
use super::gemm::Gemm;
use super::kernels::{ActivationArgs, EmbeddingArgs, Kernels, NormArgs, PoolArgs, PoolOutput};
use super::layout::{BatchSpans, Layout};
use super::sizes::{EncoderSizes, Scratch};
use super::weights::{After, Embedding, Layer, Linear, Norm, Uploader};
use super::{Gpu, HalfType, Span};
use crate::ops::check_dims;
use crate::ops::pool::Pooling;
use crate::ops::weights::{EmbeddingWeights, LayerWeights};
use crate::{Error, Result};

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
