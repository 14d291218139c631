//! The row kernels: embedding, norms, activations, pooling.

use candle_core::{DType, Device, Tensor};
use eremois::ops::cuda::kernels::{ActivationArgs, EmbeddingArgs, NormArgs, PoolArgs, PoolOutput, SwigluArgs};
use eremois::ops::cuda::{Header, Span};
use eremois::ops::embedding::Embedding;
use eremois::ops::linear::{Activation, Linear};
use eremois::ops::norm::AddLayerNorm;
use eremois::ops::pool::{Pooling, RowSpec, pool};

use super::desk::{Desk, SPARE, TYPES, assert_twin, bounds, cases, on_cpu, rounded};
use super::{exact, synthetic};

/// f32 arithmetic beside the one rounding.
const TOLERANCE: f64 = 2e-5;
const EPS: f32 = 1e-5;

fn noise(tensor: u32, len: usize) -> Vec<f32> {
    synthetic::values(tensor, len, 1.0)
}

fn sum(x: &[f32], y: &[f32]) -> Vec<f64> {
    x.iter().zip(y).map(|(x, y)| f64::from(*x) + f64::from(*y)).collect()
}

#[test]
fn embedding_equals_the_cpu_and_f64() {
    let Some(mut desk) = Desk::new() else { return };
    const VOCAB: usize = 50;
    const POSITIONS: usize = 600;
    for dtype in TYPES {
        let all: [(usize, &[usize]); 7] = [
            (1, &[1]),
            (31, &[2, 1]),
            (32, &[32]),
            (33, &[31, 32, 33]),
            (384, &[100, 1, 7]),
            (1032, &[5]),
            (8192, &[513]),
        ];
        for &(width, lens) in cases(&all, 5) {
            let (word, position) = (rounded(dtype, 1, VOCAB * width, 1.0), rounded(dtype, 2, POSITIONS * width, 1.0));
            let token_type = rounded(dtype, 3, 3 * width, 1.0);
            let (gamma, beta) = (noise(4, width), noise(5, width));
            let cu_seqlens = bounds(lens);
            let total_tokens = cu_seqlens.total_tokens();
            let ids: Vec<u32> = (0..total_tokens as u32).map(|i| (i * 7 + 3) % VOCAB as u32).collect();
            let types: Vec<u32> = (0..total_tokens as u32).map(|i| i * 5 % 3).collect();

            let positions = cu_seqlens.ranges().flat_map(|range| 2..range.len() + 2);
            let rows = positions.zip(ids.iter().zip(&types)).flat_map(|(p, (&id, &t))| {
                let row = |table: &[f32], i: usize| table[i * width..(i + 1) * width].to_vec();
                let word_and_position = sum(&row(&word, id as usize), &row(&position, p));
                let token_type = row(&token_type, t as usize);
                word_and_position.into_iter().zip(token_type).map(|(x, t)| x + f64::from(t)).collect::<Vec<_>>()
            });
            let sums: Vec<f64> = rows.collect();
            let expected = exact::layer_norm(&sums, width, &gamma, &beta, f64::from(EPS));

            let what = format!("embedding of {width}");
            let norm = AddLayerNorm::new(on_cpu(&gamma, &[width]), on_cpu(&beta, &[width]), f64::from(EPS)).unwrap();
            let tables = [(&word, VOCAB), (&position, POSITIONS), (&token_type, 3)];
            let [w, p, t] = tables.map(|(table, rows)| on_cpu(table, &[rows, width]));
            let twin = Embedding::new(w, p, Some(t), norm, 2).unwrap();
            let ids_on_cpu = |ids: &[u32]| Tensor::new(ids, &Device::Cpu).unwrap();
            let by_cpu = twin.forward(&ids_on_cpu(&ids), Some(&ids_on_cpu(&types)), &cu_seqlens).unwrap();
            assert_twin(&by_cpu, &expected, &what);

            let token_capacity = total_tokens + SPARE;
            let spare = |ids: &[u32]| [ids, &[u32::MAX; SPARE]].concat();
            let args = EmbeddingArgs {
                dtype,
                out: desk.poisoned(token_capacity * width),
                header: desk.header(total_tokens, lens.len(), Header::HAS_TOKEN_TYPES),
                input_ids: desk.words(&spare(&ids)),
                token_type_ids: desk.words(&spare(&types)),
                cu_seqlens: desk.words(cu_seqlens.host()),
                word: desk.halves(dtype, &word, 0),
                position: desk.halves(dtype, &position, 0),
                token_type: desk.halves(dtype, &token_type, 0),
                gamma: desk.floats(&gamma),
                beta: desk.floats(&beta),
                token_capacity,
                seq_capacity: lens.len(),
                vocab_size: VOCAB,
                num_positions: POSITIONS,
                num_token_types: 3,
                hidden_size: width,
                position_offset: 2,
                eps: EPS,
            };
            desk.kernels.embedding(&desk.stream, &args).unwrap();
            desk.assert_halves(dtype, args.out, &expected, TOLERANCE, &what);
        }
    }
}

#[test]
fn an_id_beyond_the_table_gives_a_row_of_nan_and_reads_nothing() {
    let Some(mut desk) = Desk::new() else { return };
    for dtype in TYPES {
        let width = 64;
        let table = rounded(dtype, 1, 8 * width, 1.0);
        let (gamma, beta) = (vec![1.0; width], vec![0.0; width]);
        let args = EmbeddingArgs {
            dtype,
            out: desk.poisoned(3 * width),
            header: desk.header(3, 1, 0),
            input_ids: desk.words(&[1, 8, 2]),
            token_type_ids: Span::NULL,
            cu_seqlens: desk.words(&[0, 3]),
            word: desk.halves(dtype, &table, 0),
            position: desk.halves(dtype, &table, 0),
            token_type: Span::NULL,
            gamma: desk.floats(&gamma),
            beta: desk.floats(&beta),
            token_capacity: 3,
            seq_capacity: 1,
            vocab_size: 8,
            num_positions: 8,
            num_token_types: 0,
            hidden_size: width,
            position_offset: 0,
            eps: EPS,
        };
        desk.kernels.embedding(&desk.stream, &args).unwrap();
        let is_nan = |bits: u16| match dtype {
            eremois::ops::cuda::HalfType::F16 => half::f16::from_bits(bits).is_nan(),
            eremois::ops::cuda::HalfType::Bf16 => half::bf16::from_bits(bits).is_nan(),
        };
        let bits = desk.read_bits(args.out);
        let rows: Vec<(usize, usize)> =
            bits.chunks_exact(width).map(|row| (row.iter().filter(|&&b| is_nan(b)).count(), row.len())).collect();
        assert_eq!(rows, [(0, width), (width, width), (0, width)], "{dtype:?}");
    }
}

#[test]
fn norms_equal_the_cpu_and_f64() {
    let Some(mut desk) = Desk::new() else { return };
    let all =
        [(1, 1), (31, 31), (32, 32), (33, 33), (384, 100), (1030, 3), (768, 1023), (1024, 33), (1536, 33), (8192, 3)];
    for dtype in TYPES {
        for &(width, m) in cases(&all, 6) {
            let (x, residual) = (rounded(dtype, 1, m * width, 1.0), rounded(dtype, 2, m * width, 1.0));
            let (gamma, beta) = (noise(4, width), noise(5, width));
            let sums = sum(&x, &residual);
            let expected = exact::layer_norm(&sums, width, &gamma, &beta, f64::from(EPS));
            let what = format!("LayerNorm of {m} x {width}");
            let twin = AddLayerNorm::new(on_cpu(&gamma, &[width]), on_cpu(&beta, &[width]), f64::from(EPS)).unwrap();
            let by_cpu = twin.forward(&on_cpu(&x, &[m, width]), Some(&on_cpu(&residual, &[m, width]))).unwrap();
            assert_twin(&by_cpu, &expected, &what);

            let args = NormArgs {
                dtype,
                out: desk.poisoned((m + SPARE) * width),
                header: desk.header(m, 1, 0),
                x: desk.halves(dtype, &x, SPARE * width),
                residual: desk.halves(dtype, &residual, SPARE * width),
                sum: Span::NULL,
                gamma: desk.floats(&gamma),
                beta: desk.floats(&beta),
                token_capacity: m + SPARE,
                hidden_size: width,
                eps: EPS,
            };
            desk.kernels.add_layer_norm(&desk.stream, &args).unwrap();
            desk.assert_halves(dtype, args.out, &expected, TOLERANCE, &what);

            // In place of its operands, as the encoder and a pre-norm model use it. RMSNorm has no CPU twin.
            let expected = exact::rms_norm(&sums, width, &gamma, f64::from(EPS));
            let args = NormArgs { out: args.residual, sum: args.x, beta: Span::NULL, ..args };
            desk.kernels.add_rms_norm(&desk.stream, &args).unwrap();
            desk.assert_halves(dtype, args.out, &expected, TOLERANCE, &format!("RMSNorm of {m} x {width}"));
            desk.assert_halves(dtype, args.sum, &sums, TOLERANCE, &format!("sum of {m} x {width}"));
        }
    }
}

#[test]
fn activations_equal_the_cpu_and_f64() {
    let Some(mut desk) = Desk::new() else { return };
    let kinds = [
        Activation::None,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
        Activation::Silu,
        Activation::Tanh,
    ];
    let all = [(1, 1), (7, 33), (8, 31), (33, 32), (1536, 32), (4096, 257)];
    for dtype in TYPES {
        for &(width, m) in cases(&all, 4) {
            let y = rounded(dtype, 1, m * width, 8.0);
            let bias = noise(2, width);
            for activation in kinds {
                let biased = y.iter().enumerate().map(|(i, y)| f64::from(*y) + f64::from(bias[i % width]));
                let expected: Vec<f64> = biased.map(|x| exact::activate(activation, x)).collect();
                let what = format!("{activation:?} of {m} x {width}");
                if width <= 1536 {
                    // The CPU's activations follow a product: by the identity matrix here.
                    let identity = Tensor::eye(width, DType::F32, &Device::Cpu).unwrap();
                    let twin = Linear::new(identity, Some(on_cpu(&bias, &[width])), activation).unwrap();
                    assert_twin(&twin.forward(&on_cpu(&y, &[m, width])).unwrap(), &expected, &what);
                }
                let args = ActivationArgs {
                    dtype,
                    y: desk.halves(dtype, &y, SPARE * width),
                    header: desk.header(m, 1, 0),
                    bias: desk.floats(&bias),
                    token_capacity: m + SPARE,
                    num_columns: width,
                    activation,
                };
                desk.kernels.bias_activation(&desk.stream, &args).unwrap();
                desk.assert_halves(dtype, args.y, &expected, TOLERANCE, &what);
            }
            // SwiGLU has no CPU twin.
            let x = rounded(dtype, 3, m * 2 * width, 4.0);
            let expected: Vec<f64> = x
                .chunks_exact(2 * width)
                .flat_map(|row| {
                    let gated = row[..width].iter().zip(&row[width..]);
                    gated.map(|(g, x)| exact::activate(Activation::Silu, f64::from(*g)) * f64::from(*x))
                })
                .collect();
            let args = SwigluArgs {
                dtype,
                out: desk.poisoned((m + SPARE) * width),
                header: desk.header(m, 1, 0),
                x: desk.halves(dtype, &x, SPARE * 2 * width),
                token_capacity: m + SPARE,
                num_columns: width,
            };
            desk.kernels.swiglu(&desk.stream, &args).unwrap();
            desk.assert_halves(dtype, args.out, &expected, TOLERANCE, &format!("SwiGLU of {m} x {width}"));
        }
    }
}

#[test]
fn pooling_equals_the_cpu_and_f64() {
    let Some(mut desk) = Desk::new() else { return };
    let kinds = [Pooling::Cls, Pooling::Mean, Pooling::Max, Pooling::LastToken, Pooling::WeightedMean];
    let all: [(usize, &[usize]); 5] =
        [(1, &[1]), (33, &[31, 32, 33]), (384, &[100, 1, 65]), (768, &[513, 2, 511, 1]), (8192, &[2, 1])];
    for dtype in TYPES {
        for &(width, lens) in cases(&all, 3) {
            let cu_seqlens = bounds(lens);
            let (total_tokens, num_seqs) = (cu_seqlens.total_tokens(), lens.len());
            let hidden = rounded(dtype, 1, total_tokens * width, 1.0);
            let rows: Vec<RowSpec> = (0..num_seqs)
                .map(|i| RowSpec { normalize: i % 2 == 0, dimensions: [width, 1, width.div_ceil(2)][i % 3] })
                .collect();
            let specs: Vec<u32> = rows.iter().flat_map(|r| [r.dimensions as u32, u32::from(r.normalize)]).collect();
            for pooling in kinds {
                let what = format!("{pooling:?} of {width}");
                let expected = exact::pool(&hidden, width, cu_seqlens.ranges(), pooling, &rows);
                let by_cpu = pool(&on_cpu(&hidden, &[total_tokens, width]), &cu_seqlens, pooling, &rows).unwrap();
                assert_twin(&by_cpu, &expected, &what);

                let spare = |words: &[u32], num: usize| [words, &vec![u32::MAX; num]].concat();
                let args = PoolArgs {
                    dtype,
                    output: PoolOutput::Half,
                    out: desk.poisoned((num_seqs + SPARE) * width),
                    header: desk.header(total_tokens, num_seqs, 0),
                    hidden: desk.halves(dtype, &hidden, SPARE * width),
                    cu_seqlens: desk.words(&spare(cu_seqlens.host(), SPARE)),
                    rows: desk.words(&spare(&specs, 2 * SPARE)),
                    not_finite: desk.words(&[0]),
                    token_capacity: total_tokens + SPARE,
                    seq_capacity: num_seqs + SPARE,
                    hidden_size: width,
                    pooling,
                };
                desk.kernels.pool(&desk.stream, &args).unwrap();
                desk.assert_halves(dtype, args.out, &expected, TOLERANCE, &what);

                // As f32, whose memory is that of twice as many 2-byte values.
                let out = desk.poisoned(2 * (num_seqs + SPARE) * width);
                let args = PoolArgs { output: PoolOutput::F32, out, ..args };
                desk.kernels.pool(&desk.stream, &args).unwrap();
                desk.assert_floats(args.out, &expected, 2e-6, &what);
                assert_eq!(desk.read_words(args.not_finite), [0], "{what}");
            }
        }
    }
}

#[test]
fn what_is_not_finite_is_reported_by_row() {
    let Some(mut desk) = Desk::new() else { return };
    for dtype in TYPES {
        for (bad, at) in [(f32::NAN, 4 * 16 + 3), (f32::INFINITY, 5 * 16)] {
            let mut hidden = rounded(dtype, 1, 6 * 16, 1.0);
            hidden[at] = bad;
            let args = PoolArgs {
                dtype,
                output: PoolOutput::F32,
                out: desk.poisoned(2 * 2 * 16),
                header: desk.header(6, 2, 0),
                hidden: desk.halves(dtype, &hidden, 0),
                cu_seqlens: desk.words(&[0, 3, 6]),
                rows: desk.words(&[16, 1, 16, 1]),
                not_finite: desk.words(&[0]),
                token_capacity: 6,
                seq_capacity: 2,
                hidden_size: 16,
                pooling: Pooling::Mean,
            };
            desk.kernels.pool(&desk.stream, &args).unwrap();
            assert_eq!(desk.read_words(args.not_finite), [2], "{dtype:?} {bad}");
        }
    }
}
