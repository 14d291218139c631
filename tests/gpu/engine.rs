//! The engine around the kernels: whole encoders with made-up weights, graphs, batches under way together.

use eremois::Error;
use eremois::ops::cuda::budget::Capacity;
use eremois::ops::cuda::engine::Engine;
use eremois::ops::cuda::sizes::EncoderSizes;
use eremois::ops::cuda::{Gpu, HalfType};
use eremois::ops::linear::Activation;
use eremois::ops::pool::{Pooling, RowSpec};

use super::desk::{TYPES, gpu, is_small};
use super::synthetic::{self, BERT_BASE, BERT_LARGE, CpuEncoder, MINILM_L6, Tokens, cosine, min_cosine, read_rows};

/// Small enough for an emulated device, with all that a layer has.
const TINY: EncoderSizes = EncoderSizes {
    vocab_size: 100,
    num_positions: 140,
    position_offset: 0,
    num_token_types: 2,
    hidden_size: 64,
    num_heads: 2,
    num_layers: 2,
    intermediate_size: 128,
    activation: Activation::Gelu,
    layer_norm_eps: 1e-12,
};
const CAPACITY: Capacity = Capacity { max_batch_tokens: 192, max_batch_size: 8 };
/// One token, an odd number, around attention's blocks.
const LENS: [usize; 4] = [1, 7, 33, 65];

/// What the issue of this engine asks for.
fn least_cosine(dtype: HalfType) -> f64 {
    match dtype {
        HalfType::F16 => 0.9999,
        HalfType::Bf16 => 0.999,
    }
}

fn tiny(gpu: &Gpu, dtype: HalfType) -> Engine {
    synthetic::engine(gpu, dtype, &TINY, None, Pooling::Mean, CAPACITY, None).unwrap().0
}

fn rows(engine: &Engine, tokens: &Tokens) -> Vec<Vec<f32>> {
    let pending = engine.launch(&tokens.batch()).unwrap();
    assert_eq!(pending_not_finite(&pending), None);
    read_rows(&pending, tokens).unwrap()
}

fn pending_not_finite(pending: &eremois::ops::cuda::engine::Pending) -> Option<usize> {
    pending.wait().unwrap();
    pending.not_finite_row().unwrap()
}

#[track_caller]
fn assert_equals_the_cpu(gpu: &Gpu, sizes: &EncoderSizes, has_bias: bool, pooling: Pooling, what: &str) {
    let bias = has_bias.then(|| synthetic::distance_bias(sizes));
    let cpu = CpuEncoder::new(sizes, bias.as_ref()).unwrap();
    let mut tokens = Tokens::new(sizes, &LENS, 1);
    if sizes.num_token_types > 1 {
        tokens = tokens.with_token_types(sizes);
    }
    let expected = cpu.rows(&tokens, pooling).unwrap();
    for pair in expected.windows(2) {
        let alike = cosine(&pair[0], &pair[1]);
        assert!(alike < 0.98, "{what}: rows that are alike prove nothing: cosine {alike}");
    }
    for dtype in TYPES {
        let (engine, _) = synthetic::engine(gpu, dtype, sizes, bias.clone(), pooling, CAPACITY, None).unwrap();
        let cosine = min_cosine(&expected, &rows(&engine, &tokens));
        println!("{what} {}: smallest cosine to the CPU {cosine:.6}", dtype.name());
        assert!(cosine >= least_cosine(dtype), "{what} {}: cosine {cosine:.6}", dtype.name());
    }
}

#[test]
fn encoders_of_every_kind_equal_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let kinds = [
        ("exact GELU, heads of 32", TINY),
        ("tanh GELU, heads of 64", EncoderSizes { activation: Activation::GeluTanh, num_heads: 1, ..TINY }),
        ("ReLU, heads of 96", EncoderSizes { activation: Activation::Relu, hidden_size: 192, ..TINY }),
        ("SiLU, heads of 128", EncoderSizes { activation: Activation::Silu, hidden_size: 128, num_heads: 1, ..TINY }),
        ("no types, positions from 2", EncoderSizes { num_token_types: 0, position_offset: 2, ..TINY }),
        ("one type", EncoderSizes { num_token_types: 1, ..TINY }),
    ];
    for (what, sizes) in kinds {
        assert_equals_the_cpu(&gpu, &sizes, false, Pooling::Mean, what);
    }
    assert_equals_the_cpu(&gpu, &TINY, true, Pooling::Cls, "distance bias");
}

#[test]
fn minilm_bert_base_and_bert_large_equal_the_cpu() {
    let Some(gpu) = gpu() else { return };
    if is_small() {
        return;
    }
    for (what, sizes) in [("MiniLM-L6", MINILM_L6), ("BERT-base", BERT_BASE), ("BERT-large", BERT_LARGE)] {
        assert_equals_the_cpu(&gpu, &sizes, false, Pooling::Mean, what);
    }
}

#[test]
fn a_row_in_a_batch_equals_the_row_alone() {
    let Some(gpu) = gpu() else { return };
    for dtype in TYPES {
        let engine = tiny(&gpu, dtype);
        let mut tokens = Tokens::new(&TINY, &[65, 1, 33, 7, 2, 64], 2);
        tokens.rows[1] = RowSpec { normalize: false, dimensions: 5 };
        let together = rows(&engine, &tokens);
        for (i, row) in together.iter().enumerate() {
            let alone = rows(&engine, &tokens.alone(i));
            // Another bucket is another algorithm, which sums in another order.
            let cosine = min_cosine(std::slice::from_ref(row), &alone);
            let least = 1.0 - (1.0 - least_cosine(dtype)) / 10.0;
            assert!(cosine >= least, "row {i} {}: cosine {cosine:.7} to itself alone", dtype.name());
        }
    }
}

#[test]
fn a_graph_computes_the_bits_of_the_plain_launches() {
    let Some(gpu) = gpu() else { return };
    for dtype in TYPES {
        // Two batches of one bucket, their plain results from an engine that has captured nothing yet.
        let batches = [Tokens::new(&TINY, &[65, 7, 33], 3), Tokens::new(&TINY, &[65, 30, 5], 4)];
        let plain = tiny(&gpu, dtype);
        let expected = batches.each_ref().map(|tokens| rows(&plain, tokens));
        assert_eq!(plain.num_graphs(), 0);
        let engine = tiny(&gpu, dtype);
        for round in 0..4 {
            for (tokens, expected) in batches.iter().zip(&expected) {
                assert!(rows(&engine, tokens) == *expected, "{} round {round}: other bits", dtype.name());
            }
        }
        assert_eq!(engine.num_graphs(), 1, "a bucket that comes back is captured");
        // Types are another launch list of the same bucket.
        let typed = batches[0].clone().with_token_types(&TINY);
        let expected = rows(&plain, &typed);
        for _ in 0..4 {
            assert!(rows(&engine, &typed) == expected, "{}: other bits with types", dtype.name());
        }
        assert_eq!(engine.num_graphs(), 2);
    }
}

#[test]
fn batches_under_way_together_compute_the_bits_of_each_alone() {
    let Some(gpu) = gpu() else { return };
    for dtype in TYPES {
        let engine = tiny(&gpu, dtype);
        let lens: [&[usize]; 4] = [&[65, 7, 33], &[1], &[2, 64, 64], &[33, 31]];
        let batches: Vec<Tokens> = (5..).zip(lens).map(|(seed, lens)| Tokens::new(&TINY, lens, seed)).collect();
        let expected: Vec<_> = batches.iter().map(|tokens| rows(&engine, tokens)).collect();
        // Two and then four at once, plain and captured, finished in the order of their launch.
        for num_together in [2, 4] {
            for round in 0..3 {
                for (batches, expected) in batches.chunks(num_together).zip(expected.chunks(num_together)) {
                    let launched: Vec<_> = batches.iter().map(|t| engine.launch(&t.batch()).unwrap()).collect();
                    for ((pending, tokens), expected) in launched.iter().zip(batches).zip(expected) {
                        let got = read_rows(pending, tokens).unwrap();
                        assert!(got == *expected, "{num_together} together, round {round}: other bits");
                    }
                }
            }
        }
        let pending = engine.launch(&batches[0].batch()).unwrap();
        pending.wait().unwrap();
        assert!(pending.is_ready() && pending.times().is_some());
        // One that nobody waits for leaves its slot usable.
        drop(engine.launch(&batches[1].batch()).unwrap());
        assert!(rows(&engine, &batches[0]) == expected[0]);
    }
}

#[test]
fn memory_grows_for_a_batch_beyond_the_capacity() {
    let Some(gpu) = gpu() else { return };
    let engine = tiny(&gpu, HalfType::F16);
    let small = Tokens::new(&TINY, &[33, 7], 6);
    let expected = rows(&engine, &small);
    let large = Tokens::new(&TINY, &[100; 12], 7);
    let rows_of_large = rows(&engine, &large);
    let cpu = CpuEncoder::new(&TINY, None).unwrap().rows(&large, Pooling::Mean).unwrap();
    let cosine = min_cosine(&cpu, &rows_of_large);
    assert!(cosine >= least_cosine(HalfType::F16), "{cosine}");
    assert!(rows(&engine, &small) == expected, "the small batch computes other bits in the larger memory");
}

#[test]
fn a_row_that_overflows_is_named_and_the_next_batch_is_whole() {
    let Some(gpu) = gpu() else { return };
    let engine = tiny(&gpu, HalfType::F16);
    let good = Tokens::new(&TINY, &[3, 4, 5], 8);
    let expected = rows(&engine, &good);
    // An id beyond the vocabulary gives NaN: `model` refuses it before, the kernels answer it by the flag.
    let mut bad = good.clone();
    bad.input_ids[4] = TINY.vocab_size as u32;
    for _ in 0..4 {
        assert_eq!(pending_not_finite(&engine.launch(&bad.batch()).unwrap()), Some(1));
        assert!(rows(&engine, &good) == expected);
    }
}

#[test]
fn batches_that_break_the_rules_are_refused_by_name() {
    let Some(gpu) = gpu() else { return };
    let engine = tiny(&gpu, HalfType::F16);
    let good = Tokens::new(&TINY, &[3, 4], 9);
    let long = Tokens::new(&TINY, &[TINY.num_positions + 1], 9);
    let falling = Tokens { cu_seqlens: vec![0, 8, 7], ..good.clone() };
    let short = Tokens { cu_seqlens: vec![0, 3, 6], ..good.clone() };
    for (tokens, part) in [(long, "at most 140 tokens"), (falling, "rising bounds"), (short, "last bound 7")] {
        match engine.launch(&tokens.batch()) {
            Err(error @ Error::Shape { .. }) => assert!(error.to_string().contains(part), "{error}"),
            Err(error) => panic!("{part}: {error}"),
            Ok(_) => panic!("{part}: was launched"),
        }
    }
    rows(&engine, &good);
}
