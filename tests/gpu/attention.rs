//! Attention within the sequences of a packed batch.

use eremois::ops::attention::{Attention, Mask};
use eremois::ops::cuda::attention::{AttentionArgs, HEAD_DIMS};
use eremois::ops::cuda::{HalfType, Span};

use super::desk::{Desk, SPARE, TYPES, assert_twin, bounds, cases, on_cpu, rounded};
use super::exact::{self, AttentionCase};
use super::synthetic;

/// What is asked of one launch.
#[derive(Debug, Clone, Copy)]
struct Case {
    lens: &'static [usize],
    num_heads: usize,
    causal: bool,
    has_bias: bool,
    has_rope: bool,
    /// Of queries and keys: a large one makes the softmax sharp.
    spread: f32,
}

const PLAIN: Case = Case { lens: &[1], num_heads: 2, causal: false, has_bias: false, has_rope: false, spread: 1.0 };
/// Around attention's blocks of 64 queries and 16 rows of an mma.
const MIXED: &[usize] = &[70, 1, 33, 129, 64];

/// Those that an emulated device computes too come first.
const CASES: [Case; 15] = [
    PLAIN,
    Case { lens: &[31, 32, 33], ..PLAIN },
    Case { lens: &[65, 1, 15, 16, 17], causal: true, ..PLAIN },
    Case { lens: &[66, 7], has_bias: true, ..PLAIN },
    Case { lens: &[66, 7], has_rope: true, ..PLAIN },
    Case { lens: &[67, 5], num_heads: 1, causal: true, has_bias: true, has_rope: true, ..PLAIN },
    Case { lens: &[130], num_heads: 1, spread: 16.0, ..PLAIN },
    Case { lens: MIXED, num_heads: 3, ..PLAIN },
    Case { lens: MIXED, causal: true, ..PLAIN },
    Case { lens: MIXED, has_bias: true, ..PLAIN },
    Case { lens: MIXED, has_rope: true, ..PLAIN },
    Case { lens: &[63, 64, 65, 127, 128], num_heads: 12, ..PLAIN },
    Case { lens: &[512, 511, 513], ..PLAIN },
    Case { lens: &[512, 1], causal: true, has_bias: true, has_rope: true, ..PLAIN },
    Case { lens: &[2, 1, 3, 1, 2, 9, 1, 1, 4], num_heads: 12, ..PLAIN },
];

/// Relative to max(1, |value|): probabilities are rounded to the 2-byte type before the second product, and values
/// lie in [-1, 1).
fn tolerance(dtype: HalfType) -> f64 {
    match dtype {
        HalfType::F16 => 2e-3,
        HalfType::Bf16 => 1.6e-2,
    }
}

fn run(desk: &mut Desk, dtype: HalfType, head_dim: usize, case: Case) {
    let what = format!("attention of head_dim {head_dim}, {case:?}");
    let cu_seqlens = bounds(case.lens);
    let (total_tokens, width) = (cu_seqlens.total_tokens(), case.num_heads * head_dim);
    let max_seq_len = cu_seqlens.max_seqlen() + 3;
    let mut qkv = rounded(dtype, 1, total_tokens * 3 * width, 1.0);
    for row in qkv.chunks_exact_mut(3 * width) {
        // A power of two: still exact in the 2-byte type.
        row[..2 * width].iter_mut().for_each(|x| *x *= case.spread);
    }
    let bias = synthetic::values(2, case.num_heads * (2 * max_seq_len - 1), 2.0);
    let pairs = head_dim / 2;
    let angle = |i: usize| (i / pairs) as f64 * 10000f64.powf(-2.0 * (i % pairs) as f64 / head_dim as f64);
    let [cos, sin] = [f64::cos as fn(f64) -> f64, f64::sin]
        .map(|f| (0..max_seq_len * pairs).map(|i| f(angle(i)) as f32).collect::<Vec<f32>>());
    let scale = 1.0 / (head_dim as f32).sqrt();

    let reference = AttentionCase {
        dtype,
        qkv: &qkv,
        num_heads: case.num_heads,
        head_dim,
        scale: f64::from(scale),
        causal: case.causal,
        distance_bias: case.has_bias.then_some(&bias),
        rope: case.has_rope.then_some((&cos, &sin)),
        max_seq_len,
    };
    let expected = exact::attention(&reference, cu_seqlens.ranges());
    // RoPE has no CPU twin.
    if !case.has_rope {
        let table = case.has_bias.then(|| on_cpu(&bias, &[case.num_heads, 2 * max_seq_len - 1]));
        let mask = if case.causal { Mask::Causal } else { Mask::Full };
        let twin = Attention::new(case.num_heads, head_dim, f64::from(scale), table, mask).unwrap();
        let by_cpu = twin.forward(&on_cpu(&qkv, &[total_tokens, 3 * width]), &cu_seqlens).unwrap();
        assert_twin(&by_cpu, &expected, &what);
    }

    let given = |desk: &mut Desk, is_given: bool, values: &[f32]| match is_given {
        true => desk.floats(values),
        false => Span::NULL,
    };
    let args = AttentionArgs {
        dtype,
        out: desk.poisoned((total_tokens + SPARE) * width),
        header: desk.header(total_tokens, case.lens.len(), 0),
        // NaN behind the batch: a key that is not there shows.
        qkv: desk.halves(dtype, &qkv, SPARE * 3 * width),
        cu_seqlens: desk.words(&[cu_seqlens.host(), &[u32::MAX; SPARE]].concat()),
        distance_bias: given(desk, case.has_bias, &bias),
        cos: given(desk, case.has_rope, &cos),
        sin: given(desk, case.has_rope, &sin),
        token_capacity: total_tokens + SPARE,
        seq_capacity: case.lens.len() + SPARE,
        max_seqlen: cu_seqlens.max_seqlen().next_multiple_of(64),
        max_seq_len,
        num_heads: case.num_heads,
        head_dim,
        scale,
        causal: case.causal,
    };
    desk.attention.forward(&desk.stream, &args).unwrap();
    desk.assert_halves(dtype, args.out, &expected, tolerance(dtype), &what);
}

#[test]
fn attention_equals_the_cpu_and_f64() {
    for dtype in TYPES {
        for head_dim in HEAD_DIMS {
            // A desk each: operands are freed with it.
            let Some(mut desk) = Desk::new() else { return };
            for &case in cases(&CASES, 7) {
                run(&mut desk, dtype, head_dim, case);
            }
        }
    }
}
