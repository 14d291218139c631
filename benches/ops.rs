//! Each op at the shapes of MiniLM-L6 (hidden 384, 12 heads of 32, intermediate 1536), in tokens per second,
//! beside the composition of plain candle ops it replaces. Every op is verified against that composition
//! before it is timed.
//!
//! `cargo bench --bench ops`, or with `--profile quick` while working. `cargo bench --bench ops -- linear`
//! runs one op.

use std::hint::black_box;
use std::time::Duration;

use candle_core::{Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use eremois::ops::attention::{Attention, Heads, Mask};
use eremois::ops::embedding::Embedding;
use eremois::ops::linear::{Activation, Linear};
use eremois::ops::norm::AddLayerNorm;
use eremois::ops::pool::{Pooling, RowSpec, pool};
use eremois::ops::residual::ResidualBlock;
use eremois::ops::{CuSeqlens, reference};
use rand::{Rng, SeedableRng, rngs::StdRng};

const HIDDEN: usize = 384;
const INTERMEDIATE: usize = 1536;
const NUM_HEADS: usize = 12;
const HEAD_DIM: usize = 32;
const VOCAB: usize = 30_522;

/// The reference is timed up to here only: it takes a second a pass beyond.
const MOST_REFERENCE_TOKENS: usize = 2048;

fn noise(rng: &mut StdRng, shape: &[usize], scale: f32) -> Tensor {
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-scale..scale)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Sequences of 8 to 256 tokens, log-uniform, as many as fill `total_tokens`.
fn mixed(rng: &mut StdRng, total_tokens: usize) -> CuSeqlens {
    let (mut bounds, mut last) = (vec![0u32], 0);
    while last < total_tokens {
        let len = (8f64 * 32f64.powf(rng.random_range(0.0..1.0))) as usize;
        last = (last + len).min(total_tokens);
        bounds.push(last as u32);
    }
    CuSeqlens::new(&bounds, &Device::Cpu).unwrap()
}

fn verify(name: &str, got: &Tensor, expected: &Tensor) {
    let difference = (got - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(difference <= 2e-5, "{name}: differs from the reference by {difference}");
}

/// Verifies, then times `ours` and, for batches small enough, `reference`.
fn compare(c: &mut Criterion, name: &str, tokens: usize, ours: impl Fn() -> Tensor, reference: impl Fn() -> Tensor) {
    let with_reference = tokens <= MOST_REFERENCE_TOKENS;
    if with_reference {
        verify(name, &ours(), &reference());
    }
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Elements(tokens as u64));
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    group.bench_function(BenchmarkId::new("eremois", tokens), |b| b.iter(|| black_box(ours())));
    if with_reference {
        group.bench_function(BenchmarkId::new("candle", tokens), |b| b.iter(|| black_box(reference())));
    }
    group.finish();
}

fn bench_ops(c: &mut Criterion) {
    let mut rng = StdRng::seed_from_u64(1);
    let rng = &mut rng;
    for tokens in [512, 2048, 16_384] {
        let cu_seqlens = mixed(rng, tokens);

        for (name, input, out, activation) in [
            ("linear_qkv", HIDDEN, 3 * HIDDEN, Activation::None),
            ("linear_out", HIDDEN, HIDDEN, Activation::None),
            ("linear_up_gelu", HIDDEN, INTERMEDIATE, Activation::Gelu),
            ("linear_down", INTERMEDIATE, HIDDEN, Activation::None),
        ] {
            let (weight, bias) = (noise(rng, &[out, input], 0.1), noise(rng, &[out], 0.1));
            let x = noise(rng, &[tokens, input], 1.0);
            let linear = Linear::new(weight.clone(), Some(bias.clone()), activation).unwrap();
            let plain = || reference::linear(&x, &weight, Some(&bias), activation).unwrap();
            compare(c, name, tokens, || linear.forward(&x).unwrap(), plain);
        }

        let qkv = noise(rng, &[tokens, 3 * HIDDEN], 1.0);
        let scale = 1.0 / (HEAD_DIM as f64).sqrt();
        let attention = Attention::new(NUM_HEADS, HEAD_DIM, scale, None, Mask::Full).unwrap();
        let heads = Heads { num_heads: NUM_HEADS, num_kv_heads: NUM_HEADS, head_dim: HEAD_DIM };
        let plain = || reference::attention(&qkv, &cu_seqlens, heads, scale, None, Mask::Full).unwrap();
        compare(c, "attention", tokens, || attention.forward(&qkv, &cu_seqlens).unwrap(), plain);

        let (weight, bias) = (noise(rng, &[HIDDEN], 1.0), noise(rng, &[HIDDEN], 1.0));
        let norm = AddLayerNorm::new(weight.clone(), bias.clone(), 1e-12).unwrap();
        let (x, residual) = (noise(rng, &[tokens, HIDDEN], 1.0), noise(rng, &[tokens, HIDDEN], 1.0));
        let plain = || reference::add_layer_norm(&x, Some(&residual), &weight, &bias, 1e-12).unwrap();
        compare(c, "add_layer_norm", tokens, || norm.forward(&x, Some(&residual)).unwrap(), plain);

        let [up, up_bias] = [&[INTERMEDIATE, HIDDEN][..], &[INTERMEDIATE]].map(|shape| noise(rng, shape, 0.1));
        let [down, down_bias] = [&[HIDDEN, INTERMEDIATE][..], &[HIDDEN]].map(|shape| noise(rng, shape, 0.1));
        let linears = vec![
            Linear::new(up.clone(), Some(up_bias.clone()), Activation::Gelu).unwrap(),
            Linear::new(down.clone(), Some(down_bias.clone()), Activation::None).unwrap(),
        ];
        let last = AddLayerNorm::new(weight.clone(), bias.clone(), 1e-12).unwrap();
        let block = ResidualBlock::new(linears, last).unwrap();
        let plain = || {
            let y = reference::linear(&x, &up, Some(&up_bias), Activation::Gelu).unwrap();
            let y = reference::linear(&y, &down, Some(&down_bias), Activation::None).unwrap();
            reference::add_layer_norm(&y, Some(&x), &weight, &bias, 1e-12).unwrap()
        };
        compare(c, "feed_forward", tokens, || block.forward(&x, &x).unwrap(), plain);

        let tables = [VOCAB, 512, 2].map(|rows| noise(rng, &[rows, HIDDEN], 1.0));
        let [word, position, segment] = &tables;
        let (w, p, s) = (word.clone(), position.clone(), Some(segment.clone()));
        let last = AddLayerNorm::new(weight.clone(), bias.clone(), 1e-12).unwrap();
        let embedding = Embedding::new(w, p, s, last, 0).unwrap();
        let ids: Vec<u32> = (0..tokens).map(|_| rng.random_range(0..VOCAB as u32)).collect();
        let ids = Tensor::from_vec(ids, tokens, &Device::Cpu).unwrap();
        let plain = || {
            let sum = reference::embedding_sum(word, position, Some(segment), 0, &ids, None, &cu_seqlens).unwrap();
            reference::add_layer_norm(&sum, None, &weight, &bias, 1e-12).unwrap()
        };
        compare(c, "embedding", tokens, || embedding.forward(&ids, None, &cu_seqlens).unwrap(), plain);

        let rows = vec![RowSpec { normalize: true, dimensions: HIDDEN }; cu_seqlens.num_seqs()];
        let plain = || reference::pool(&x, &cu_seqlens, Pooling::Mean, &rows).unwrap();
        compare(c, "pool_mean", tokens, || pool(&x, &cu_seqlens, Pooling::Mean, &rows).unwrap(), plain);
    }
}

criterion_group!(benches, bench_ops);
criterion_main!(benches);
