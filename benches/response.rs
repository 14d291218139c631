//! Writing responses: 64 embeddings of 384 values as JSON numbers and as base64, against serde_json.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use eremois::api::write;

const NUM_ROWS: usize = 64;
const HIDDEN_SIZE: usize = 384;

/// Rows of length 1, as models give them: about 8 significant digits, most below 0.1.
fn rows() -> Vec<Vec<f32>> {
    let mut state = 0x2545_f491u32;
    let mut value = || {
        // xorshift32, Marsaglia 2003: any digits will do.
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / u32::MAX as f32 - 0.5
    };
    let mut rows: Vec<Vec<f32>> = (0..NUM_ROWS).map(|_| (0..HIDDEN_SIZE).map(|_| value()).collect()).collect();
    for row in &mut rows {
        let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
        row.iter_mut().for_each(|v| *v /= norm);
    }
    rows
}

fn response(c: &mut Criterion) {
    let rows = rows();
    let num_floats = NUM_ROWS * HIDDEN_SIZE;
    let floats = || {
        let mut out = write::buffer(num_floats);
        write::push_rows(&mut out, black_box(&rows)).unwrap();
        out
    };
    let base64 = || {
        let mut out = write::buffer(num_floats);
        black_box(&rows).iter().for_each(|row| write::push_base64(&mut out, row).unwrap());
        out
    };
    // Right before fast.
    let back: Vec<Vec<f32>> = serde_json::from_slice(&floats()).unwrap();
    assert_eq!(back, rows);

    let mut group = c.benchmark_group("response");
    group.throughput(Throughput::Elements(num_floats as u64));
    group.bench_function("floats", |b| b.iter(floats));
    group.bench_function("floats by serde_json", |b| b.iter(|| serde_json::to_vec(black_box(&rows)).unwrap()));
    group.bench_function("base64", |b| b.iter(base64));
    group.finish();
}

criterion_group!(benches, response);
criterion_main!(benches);
