//! Each launcher on a device against the op's CPU forward.

use candle_core::{Device, Tensor};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr};
use half::{bf16, f16};

use super::super::{Gpu, HalfType, Header, Span};
use super::*;
use crate::ops::embedding::Embedding;
use crate::ops::linear::Linear;
use crate::ops::norm::AddLayerNorm;
use crate::ops::pool::{RowSpec, pool};
use crate::ops::testing::{bounds, noise, values};

const TYPES: [HalfType; 2] = [HalfType::F16, HalfType::Bf16];
/// Rows that a bucket has beyond its batch.
const SPARE: usize = 5;
/// NaN in both types: what is not written shows.
const POISON: u16 = 0xffff;

/// A device with the kernels and everything uploaded to it, which lives as long as the test.
struct Bench {
    kernels: Kernels,
    stream: Arc<CudaStream>,
    halves: Vec<CudaSlice<u16>>,
    words: Vec<CudaSlice<u32>>,
    floats: Vec<CudaSlice<f32>>,
}

impl Bench {
    fn new() -> Self {
        let gpu = Gpu::open(0).unwrap();
        let kernels = Kernels::load(gpu.context()).unwrap();
        let stream = gpu.new_stream().unwrap();
        Self { kernels, stream, halves: Vec::new(), words: Vec::new(), floats: Vec::new() }
    }

    fn span<T: DeviceRepr>(&self, slice: &CudaSlice<T>) -> Span {
        Span { ptr: slice.device_ptr(&self.stream).0, num_bytes: slice.num_bytes() }
    }

    /// A tensor's values in the 2-byte type, and `spare` poisoned ones behind them.
    fn halves(&mut self, dtype: HalfType, tensor: &Tensor, spare: usize) -> Span {
        let mut bits: Vec<u16> = values(tensor).iter().map(|&x| to_bits(dtype, x)).collect();
        bits.resize(bits.len() + spare, POISON);
        self.halves.push(self.stream.clone_htod(&bits).unwrap());
        self.span(&self.halves[self.halves.len() - 1])
    }

    fn poisoned(&mut self, len: usize) -> Span {
        self.halves.push(self.stream.clone_htod(&vec![POISON; len]).unwrap());
        self.span(&self.halves[self.halves.len() - 1])
    }

    fn floats(&mut self, tensor: &Tensor) -> Span {
        self.floats.push(self.stream.clone_htod(&values(tensor)).unwrap());
        self.span(&self.floats[self.floats.len() - 1])
    }

    fn words(&mut self, words: &[u32]) -> Span {
        self.words.push(self.stream.clone_htod(words).unwrap());
        self.span(&self.words[self.words.len() - 1])
    }

    fn header(&mut self, total_tokens: usize, num_seqs: usize, flags: u32) -> Span {
        self.words(&[total_tokens as u32, num_seqs as u32, 0, flags, 0, 0, 0, 0])
    }

    /// The bits at a span that one of the two uploads above returned.
    fn bits(&self, span: Span) -> Vec<u16> {
        let slice = self.halves.iter().find(|slice| self.span(slice) == span).unwrap();
        let bits = self.stream.clone_dtoh(slice).unwrap();
        self.stream.synchronize().unwrap();
        bits
    }

    /// The values at a span are the expected ones to one rounding, and those behind them are still poison.
    #[track_caller]
    fn assert_equals(&self, dtype: HalfType, span: Span, expected: &Tensor, what: &str) {
        let (bits, expected) = (self.bits(span), values(expected));
        for (i, (&bits, e)) in bits.iter().zip(&expected).enumerate() {
            let got = from_bits(dtype, bits);
            let near = (got - e).abs() <= rounding(dtype) * e.abs() + 2e-5 * e.abs().max(1.0);
            assert!(near, "{what} {dtype:?}: value {i}: got {got}, expected {e}");
        }
        assert!(bits[expected.len()..].iter().all(|&b| b == POISON), "{what} {dtype:?}: wrote beyond the batch");
    }
}

/// Half a unit in the last place, relative.
fn rounding(dtype: HalfType) -> f32 {
    match dtype {
        HalfType::F16 => 1.0 / 2048.0,
        HalfType::Bf16 => 1.0 / 256.0,
    }
}

fn to_bits(dtype: HalfType, x: f32) -> u16 {
    match dtype {
        HalfType::F16 => f16::from_f32(x).to_bits(),
        HalfType::Bf16 => bf16::from_f32(x).to_bits(),
    }
}

fn from_bits(dtype: HalfType, bits: u16) -> f32 {
    match dtype {
        HalfType::F16 => f16::from_bits(bits).to_f32(),
        HalfType::Bf16 => bf16::from_bits(bits).to_f32(),
    }
}

/// Noise that the 2-byte type holds exactly, so that both sides compute from the same values.
fn rounded(dtype: HalfType, seed: u64, shape: &[usize]) -> Tensor {
    let rounded: Vec<f32> = values(&noise(seed, shape)).iter().map(|&x| from_bits(dtype, to_bits(dtype, x))).collect();
    Tensor::from_vec(rounded, shape, &Device::Cpu).unwrap()
}

#[test]
#[ignore = "needs a CUDA device"]
fn embedding_equals_the_cpu() {
    let mut bench = Bench::new();
    for dtype in TYPES {
        for (width, lens) in [(1, &[1][..]), (33, &[31, 32, 33]), (384, &[100, 1, 7]), (1032, &[5]), (8192, &[2, 1])] {
            let (word, position) = (rounded(dtype, 1, &[50, width]), rounded(dtype, 2, &[120, width]));
            let token_type = rounded(dtype, 3, &[3, width]);
            let (gamma, beta) = (noise(4, &[width]), noise(5, &[width]));
            let norm = AddLayerNorm::new(gamma.clone(), beta.clone(), 1e-12).unwrap();
            let op = Embedding::new(word.clone(), position.clone(), Some(token_type.clone()), norm, 2).unwrap();
            let cu_seqlens = bounds(lens);
            let total_tokens = cu_seqlens.total_tokens();
            let ids: Vec<u32> = (0..total_tokens as u32).map(|i| (i * 7 + 3) % 50).collect();
            let types: Vec<u32> = (0..total_tokens as u32).map(|i| i * 5 % 3).collect();
            let on_cpu = |values: &[u32]| Tensor::new(values, &Device::Cpu).unwrap();
            let expected = op.forward(&on_cpu(&ids), Some(&on_cpu(&types)), &cu_seqlens).unwrap();

            let token_capacity = total_tokens + SPARE;
            let spare = |ids: &[u32]| [ids, &[u32::MAX; SPARE]].concat();
            let out = bench.poisoned(token_capacity * width);
            let args = EmbeddingArgs {
                dtype,
                out,
                header: bench.header(total_tokens, lens.len(), Header::HAS_TOKEN_TYPES),
                input_ids: bench.words(&spare(&ids)),
                token_type_ids: bench.words(&spare(&types)),
                cu_seqlens: bench.words(cu_seqlens.host()),
                word: bench.halves(dtype, &word, 0),
                position: bench.halves(dtype, &position, 0),
                token_type: bench.halves(dtype, &token_type, 0),
                gamma: bench.floats(&gamma),
                beta: bench.floats(&beta),
                token_capacity,
                seq_capacity: lens.len(),
                vocab_size: 50,
                num_positions: 120,
                num_token_types: 3,
                hidden_size: width,
                position_offset: 2,
                eps: 1e-12,
            };
            bench.kernels.embedding(&bench.stream, &args).unwrap();
            bench.assert_equals(dtype, out, &expected, &format!("embedding of {width}"));
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn norms_equal_the_cpu() {
    let mut bench = Bench::new();
    for dtype in TYPES {
        for (width, m) in [(1, 1), (31, 31), (32, 32), (33, 33), (384, 100), (1030, 3), (1536, 33), (8192, 3)] {
            let (x, residual) = (rounded(dtype, 1, &[m, width]), rounded(dtype, 2, &[m, width]));
            let (gamma, beta) = (noise(4, &[width]), noise(5, &[width]));
            let norm = AddLayerNorm::new(gamma.clone(), beta.clone(), 1e-5).unwrap();
            let expected = norm.forward(&x, Some(&residual)).unwrap();
            let args = NormArgs {
                dtype,
                out: bench.poisoned((m + SPARE) * width),
                header: bench.header(m, 1, 0),
                x: bench.halves(dtype, &x, SPARE * width),
                residual: bench.halves(dtype, &residual, SPARE * width),
                sum: Span::NULL,
                gamma: bench.floats(&gamma),
                beta: bench.floats(&beta),
                token_capacity: m + SPARE,
                hidden_size: width,
                eps: 1e-5,
            };
            bench.kernels.add_layer_norm(&bench.stream, &args).unwrap();
            bench.assert_equals(dtype, args.out, &expected, &format!("LayerNorm of {width}"));

            // RMSNorm has no CPU op: `s / sqrt(mean(s²) + eps) * gamma` as it is written.
            let sum = (&x + &residual).unwrap();
            let mean = sum.sqr().unwrap().mean_keepdim(1).unwrap();
            let scale = (mean + 1e-5).unwrap().sqrt().unwrap();
            let expected = sum.broadcast_div(&scale).unwrap().broadcast_mul(&gamma).unwrap();
            let args = NormArgs { out: args.residual, sum: args.x, beta: Span::NULL, ..args };
            bench.kernels.add_rms_norm(&bench.stream, &args).unwrap();
            bench.assert_equals(dtype, args.out, &expected, &format!("RMSNorm in place of {width}"));
            bench.assert_equals(dtype, args.sum, &sum, &format!("sum of {width}"));
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn activations_equal_the_cpu() {
    let all = [
        Activation::None,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
        Activation::Silu,
        Activation::Tanh,
    ];
    let mut bench = Bench::new();
    for dtype in TYPES {
        for (width, m) in [(1, 1), (7, 33), (8, 31), (1536, 32)] {
            let y = rounded(dtype, 1, &[m, width]).affine(8.0, 0.0).unwrap();
            let bias = noise(2, &[width]);
            for activation in all {
                // The CPU's activations follow a product: by the identity matrix here.
                let identity = Tensor::eye(width, candle_core::DType::F32, &Device::Cpu).unwrap();
                let expected = Linear::new(identity, Some(bias.clone()), activation).unwrap().forward(&y).unwrap();
                let args = ActivationArgs {
                    dtype,
                    y: bench.halves(dtype, &y, SPARE * width),
                    header: bench.header(m, 1, 0),
                    bias: bench.floats(&bias),
                    token_capacity: m + SPARE,
                    num_columns: width,
                    activation,
                };
                bench.kernels.bias_activation(&bench.stream, &args).unwrap();
                bench.assert_equals(dtype, args.y, &expected, &format!("{activation:?} of {width}"));
            }
            let x = rounded(dtype, 3, &[m, 2 * width]);
            let (gate, up) = (x.narrow(1, 0, width).unwrap(), x.narrow(1, width, width).unwrap());
            let expected = (gate.silu().unwrap() * up).unwrap();
            let args = SwigluArgs {
                dtype,
                out: bench.poisoned((m + SPARE) * width),
                header: bench.header(m, 1, 0),
                x: bench.halves(dtype, &x, SPARE * 2 * width),
                token_capacity: m + SPARE,
                num_columns: width,
            };
            bench.kernels.swiglu(&bench.stream, &args).unwrap();
            bench.assert_equals(dtype, args.out, &expected, &format!("SwiGLU of {width}"));
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn pooling_equals_the_cpu() {
    let all = [Pooling::Cls, Pooling::Mean, Pooling::Max, Pooling::LastToken, Pooling::WeightedMean];
    let mut bench = Bench::new();
    for dtype in TYPES {
        for (width, lens) in [(1, &[1][..]), (33, &[31, 32, 33]), (384, &[100, 1, 513]), (8192, &[2, 1])] {
            let cu_seqlens = bounds(lens);
            let (total_tokens, num_seqs) = (cu_seqlens.total_tokens(), lens.len());
            let hidden = rounded(dtype, 1, &[total_tokens, width]);
            let rows: Vec<RowSpec> = (0..num_seqs)
                .map(|i| RowSpec { normalize: i % 2 == 0, dimensions: [width, 1, width.div_ceil(2)][i % 3] })
                .collect();
            let specs: Vec<u32> = rows.iter().flat_map(|r| [r.dimensions as u32, u32::from(r.normalize)]).collect();
            for pooling in all {
                let expected = pool(&hidden, &cu_seqlens, pooling, &rows).unwrap();
                let spare = |words: &[u32], num: usize| [words, &vec![u32::MAX; num]].concat();
                let args = PoolArgs {
                    dtype,
                    output: PoolOutput::Half,
                    out: bench.poisoned((num_seqs + SPARE) * width),
                    header: bench.header(total_tokens, num_seqs, 0),
                    hidden: bench.halves(dtype, &hidden, SPARE * width),
                    cu_seqlens: bench.words(&spare(cu_seqlens.host(), SPARE)),
                    rows: bench.words(&spare(&specs, 2 * SPARE)),
                    not_finite: bench.words(&[0]),
                    token_capacity: total_tokens + SPARE,
                    seq_capacity: num_seqs + SPARE,
                    hidden_size: width,
                    pooling,
                };
                bench.kernels.pool(&bench.stream, &args).unwrap();
                bench.assert_equals(dtype, args.out, &expected, &format!("{pooling:?} of {width}"));

                // As f32, whose memory is twice as many halves.
                let out = bench.poisoned(2 * (num_seqs + SPARE) * width);
                let args = PoolArgs { output: PoolOutput::F32, out, ..args };
                bench.kernels.pool(&bench.stream, &args).unwrap();
                let words: Vec<u32> =
                    bench.bits(out).chunks_exact(2).map(|w| u32::from(w[0]) | u32::from(w[1]) << 16).collect();
                for (i, (&word, e)) in words.iter().zip(values(&expected)).enumerate() {
                    let got = f32::from_bits(word);
                    assert!((got - e).abs() <= 2e-6 * e.abs().max(1.0), "{pooling:?}: value {i}: {got} for {e}");
                }
                assert!(words[num_seqs * width..].iter().all(|&w| w == u32::MAX), "{pooling:?} wrote beyond the batch");
                assert_eq!(bench.flag(args.not_finite), 0);
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn what_is_not_finite_is_reported_by_row() {
    let mut bench = Bench::new();
    for dtype in TYPES {
        let mut hidden = values(&rounded(dtype, 1, &[6, 16]));
        hidden[4 * 16 + 3] = f32::NAN;
        let hidden = Tensor::from_vec(hidden, (6, 16), &Device::Cpu).unwrap();
        let args = PoolArgs {
            dtype,
            output: PoolOutput::Half,
            out: bench.poisoned(2 * 16),
            header: bench.header(6, 2, 0),
            hidden: bench.halves(dtype, &hidden, 0),
            cu_seqlens: bench.words(&[0, 3, 6]),
            rows: bench.words(&[16, 1, 16, 1]),
            not_finite: bench.words(&[0]),
            token_capacity: 6,
            seq_capacity: 2,
            hidden_size: 16,
            pooling: Pooling::Mean,
        };
        bench.kernels.pool(&bench.stream, &args).unwrap();
        assert_eq!(bench.flag(args.not_finite), 2);
    }
}

impl Bench {
    /// The one word at a span that `words` returned.
    fn flag(&self, span: Span) -> u32 {
        let slice = self.words.iter().find(|slice| self.span(slice) == span).unwrap();
        let words = self.stream.clone_dtoh(slice).unwrap();
        self.stream.synchronize().unwrap();
        words[0]
    }
}
