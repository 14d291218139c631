//! What the CPU forwards share: the instruction set chosen at run time, vectors of f32, the functions
//! candle computes one value at a time, and rows spread over the cores.
//!
//! The build targets the oldest x86-64; [`run`] picks AVX-512, AVX2 or NEON where the machine has it.

use std::mem::MaybeUninit;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::linear::Activation;

/// Runs `op` compiled for the best instruction set this machine has.
pub(super) fn run<Op: WithSimd>(op: Op) -> Op::Output {
    match Arch::new() {
        // pulp's own fallback computes one value at a time; eight let the compiler use what the target has.
        Arch::Scalar => pulp::Scalar256b.vectorize(op),
        arch => arch.dispatch(op),
    }
}

/// Computes a [rows, width] matrix in blocks of whole rows on all cores.
///
/// `fill(first_row, block)` gets its block zeroed: writing a block twice while it is in the cache costs
/// less than one per cent of any op here, and keeps the ops free of uninitialised memory.
pub(super) fn fill_rows(
    rows: usize,
    width: usize,
    block_rows: usize,
    fill: impl Fn(usize, &mut [f32]) + Sync,
) -> Vec<f32> {
    let blocks = vec![block_rows.max(1); rows / block_rows.max(1)];
    let rest = rows - blocks.len() * block_rows.max(1);
    let blocks: Vec<usize> = blocks.into_iter().chain((rest > 0).then_some(rest)).collect();
    fill_blocks(width, &blocks, |i, block| fill(i * block_rows, block))
}

/// As [`fill_rows`] with blocks of given numbers of rows; `fill(block_idx, block)`.
pub(super) fn fill_blocks(width: usize, blocks: &[usize], fill: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let len = blocks.iter().sum::<usize>() * width;
    let mut values: Vec<f32> = Vec::with_capacity(len);
    let mut parts = Vec::with_capacity(blocks.len());
    let mut rest = &mut values.spare_capacity_mut()[..len];
    for (i, rows) in blocks.iter().enumerate() {
        let (part, tail) = rest.split_at_mut(rows * width);
        parts.push((i, part));
        rest = tail;
    }
    let fill_one = |(i, part): (usize, &mut [MaybeUninit<f32>])| {
        part.fill(MaybeUninit::new(0.0));
        // SAFETY: every value of the part was written on the line before.
        fill(i, unsafe { part.assume_init_mut() });
    };
    match parts.len() {
        // A wake-up of the pool costs more than a small block.
        1 => parts.into_iter().for_each(fill_one),
        _ => parts.into_par_iter().with_max_len(1).for_each(fill_one),
    }
    // SAFETY: the parts cover the first `len` values of the capacity, each was filled with zeros and then
    // only written through `&mut [f32]`. A panic of `fill` leaves this function before this line.
    unsafe { values.set_len(len) };
    values
}

/// Applies an activation in place.
#[inline(always)]
pub(super) fn activate<S: Simd>(simd: S, activation: Activation, values: &mut [f32]) {
    match activation {
        Activation::None => {}
        Activation::Gelu => map(simd, values, GeluErf),
        Activation::GeluTanh => map(simd, values, GeluTanh),
        Activation::Relu => map(simd, values, Relu),
        Activation::Silu => map(simd, values, Silu),
        Activation::Tanh => map(simd, values, Tanh),
    }
}

/// A function of one value, on a vector. A trait and not a closure: a closure is not compiled for the
/// instruction set of the function it is written in.
trait Function: Copy {
    fn apply<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s;
}

#[inline(always)]
fn map<S: Simd>(simd: S, values: &mut [f32], f: impl Function) {
    let (body, tail) = S::as_mut_simd_f32s(values);
    for x in body {
        *x = f.apply(simd, *x);
    }
    if !tail.is_empty() {
        let mut x = simd.splat_f32s(0.0);
        as_lanes::<S>(&mut x)[..tail.len()].copy_from_slice(tail);
        let mut y = f.apply(simd, x);
        tail.copy_from_slice(&as_lanes::<S>(&mut y)[..tail.len()]);
    }
}

/// A vector's values.
#[inline(always)]
pub(super) fn as_lanes<S: Simd>(x: &mut S::f32s) -> &mut [f32] {
    pulp::bytemuck::cast_slice_mut(std::slice::from_mut(x))
}

#[derive(Clone, Copy)]
struct GeluErf;
impl Function for GeluErf {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
        let erf = erf(simd, simd.mul_f32s(x, simd.splat_f32s(std::f32::consts::FRAC_1_SQRT_2)));
        let half = simd.mul_f32s(x, simd.splat_f32s(0.5));
        simd.mul_add_e_f32s(half, erf, half)
    }
}

#[derive(Clone, Copy)]
struct GeluTanh;
impl Function for GeluTanh {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
        // sqrt(2 / pi) (x + 0.044715 x³)
        let cubic = simd.mul_f32s(simd.mul_f32s(x, x), simd.splat_f32s(0.044_715));
        let inner = simd.mul_add_e_f32s(x, cubic, x);
        let tanh = tanh(simd, simd.mul_f32s(inner, simd.splat_f32s(0.797_884_6)));
        let half = simd.mul_f32s(x, simd.splat_f32s(0.5));
        simd.mul_add_e_f32s(half, tanh, half)
    }
}

#[derive(Clone, Copy)]
struct Relu;
impl Function for Relu {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
        at_least(simd, x, 0.0)
    }
}

#[derive(Clone, Copy)]
struct Silu;
impl Function for Silu {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
        let one = simd.splat_f32s(1.0);
        // Below, the true value is under 1e-36, but exp's clamp would leave a share of x.
        let x = at_least(simd, x, -87.3);
        simd.div_f32s(x, simd.add_f32s(one, exp(simd, simd.neg_f32s(x))))
    }
}

#[derive(Clone, Copy)]
struct Tanh;
impl Function for Tanh {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
        tanh(simd, x)
    }
}

/// `exp(x)`, relative error at most 1.5 ulp for x in [-87.3, 88.3]; clamped to that range. NaN stays NaN.
///
/// `x = n ln 2 + r`, |r| <= ln 2 / 2; ln 2 in two parts keeps r exact (Cody and Waite 1980); exp(r) is
/// 1 + r + r² p(r), p fitted by reweighted least squares to a maximum error of 3e-9.
#[inline(always)]
pub(super) fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let x = at_most(simd, at_least(simd, x, -87.3), 88.3);
    // Adding 1.5 * 2²³ rounds to an integer, which then lies in the low bits.
    let magic = simd.splat_f32s(12_582_912.0);
    let shifted = simd.mul_add_e_f32s(x, simd.splat_f32s(std::f32::consts::LOG2_E), magic);
    let n = simd.sub_f32s(shifted, magic);
    // ln 2 = 0.693359375 - 2.12194440e-4; the first part has 9 significant bits, so n times it is exact.
    let r = simd.mul_add_e_f32s(n, simd.splat_f32s(-0.693_359_4), x);
    let r = simd.mul_add_e_f32s(n, simd.splat_f32s(2.121_944_4e-4), r);
    let p = polynomial(simd, r, [0.49999994, 0.16666521, 0.041_668_39, 0.008_368_745, 0.001381454]);
    let y = simd.mul_add_e_f32s(simd.mul_f32s(r, r), p, r);
    let y = simd.add_f32s(y, simd.splat_f32s(1.0));
    // 2ⁿ: n into the exponent field. The low 8 bits of `shifted` are n, its other bits shift out or are
    // taken by the bias; n is within [-126, 127] after the clamp.
    let bits = simd.transmute_u32s_f32s(shifted);
    let biased = simd.add_u32s(bits, simd.splat_u32s(127));
    let power = simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(biased, simd.splat_u32s(23)));
    simd.mul_f32s(y, power)
}

/// `erf(x)`, relative error at most 3 ulp, never beyond ±1. NaN stays NaN.
///
/// `x p(x²) / q(x²)` on |x| <= 3.92, where 1 - erf is below half an ulp of 1. All coefficients are
/// positive, so no digits cancel; fitted to a relative error of 1.9e-8 by reweighted least squares.
#[inline(always)]
pub(super) fn erf<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let x = at_most(simd, at_least(simd, x, -3.92), 3.92);
    let s = simd.mul_f32s(x, x);
    let p = [std::f32::consts::FRAC_2_SQRT_PI, 0.19040592, 0.052748676, 0.003765601, 2.8488348e-4, 2.0501047e-6];
    let q = [1.0, 0.5020756, 0.11410891, 0.014969183, 0.0011625338, 3.809_194e-5];
    ratio(simd, x, s, p, q)
}

/// `tanh(x)`, relative error at most 3 ulp, never beyond ±1. NaN stays NaN.
///
/// As [`erf`], on |x| <= 9.02.
#[inline(always)]
pub(super) fn tanh<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let x = at_most(simd, at_least(simd, x, -9.02), 9.02);
    let s = simd.mul_f32s(x, x);
    let p = [1.0, 0.14099222, 0.004425966, 4.227416e-5, 1.1117842e-7, 3.6745766e-11];
    let q = [1.0, 0.47432557, 0.029201152, 5.008_374e-4, 2.6038933e-6, 2.951_262e-9];
    ratio(simd, x, s, p, q)
}

/// `x p(s) / q(s)` clamped to ±1.
#[inline(always)]
fn ratio<S: Simd, const N: usize>(simd: S, x: S::f32s, s: S::f32s, p: [f32; N], q: [f32; N]) -> S::f32s {
    let p = simd.mul_f32s(x, polynomial(simd, s, p));
    let y = simd.div_f32s(p, polynomial(simd, s, q));
    at_most(simd, at_least(simd, y, -1.0), 1.0)
}

/// The larger of both, NaN for NaN: a vector's own maximum drops it on some instruction sets, and a
/// broken weight must show in the result.
#[inline(always)]
fn at_least<S: Simd>(simd: S, x: S::f32s, least: f32) -> S::f32s {
    let least = simd.splat_f32s(least);
    simd.select_f32s(simd.less_than_f32s(x, least), least, x)
}

/// The smaller of both, NaN for NaN.
#[inline(always)]
fn at_most<S: Simd>(simd: S, x: S::f32s, most: f32) -> S::f32s {
    let most = simd.splat_f32s(most);
    simd.select_f32s(simd.greater_than_f32s(x, most), most, x)
}

/// Horner's rule, the constant term first.
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(simd: S, x: S::f32s, coefficients: [f32; N]) -> S::f32s {
    let mut y = simd.splat_f32s(coefficients[N - 1]);
    let mut i = N - 1;
    while i > 0 {
        i -= 1;
        y = simd.mul_add_e_f32s(y, x, simd.splat_f32s(coefficients[i]));
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values over the whole range of f32 and dense where functions bend.
    fn inputs() -> Vec<f32> {
        let mut x: Vec<f32> = (-40_000..=40_000).map(|i| i as f32 * 3e-4).collect();
        x.extend((-300..300).flat_map(|e| [1.37f32, -1.91].map(|m| m * 1.3f32.powi(e))));
        x.extend([0.0, -0.0, 1e-30, f32::MIN_POSITIVE, 87.2, -87.2, 88.2, 1e30, -1e30]);
        x.retain(|x| x.is_finite());
        x
    }

    fn apply(f: impl Function + Send, x: &[f32]) -> Vec<f32> {
        struct Apply<'a, F>(F, &'a mut [f32]);
        impl<F: Function> WithSimd for Apply<'_, F> {
            type Output = ();
            #[inline(always)]
            fn with_simd<S: Simd>(self, simd: S) {
                map(simd, self.1, self.0);
            }
        }
        let mut y = x.to_vec();
        run(Apply(f, &mut y));
        let mut portable = x.to_vec();
        pulp::Scalar256b.vectorize(Apply(f, &mut portable));
        for ((x, a), b) in x.iter().zip(&y).zip(&portable) {
            let close = (a - b).abs() <= 1e-6 * a.abs().max(1e-3) || a.is_nan() && b.is_nan() || a == b;
            assert!(close, "{x}: {a} here, {b} on the portable path");
        }
        y
    }

    #[derive(Clone, Copy)]
    struct Exp;
    impl Function for Exp {
        #[inline(always)]
        fn apply<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
            exp(simd, x)
        }
    }
    #[derive(Clone, Copy)]
    struct Erf;
    impl Function for Erf {
        #[inline(always)]
        fn apply<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
            erf(simd, x)
        }
    }

    /// Largest error in half ulps of `max(|exact|, floor(x))`.
    fn worst(x: &[f32], y: &[f32], floor: fn(f64) -> f64, exact: impl Fn(f64) -> f64) -> f64 {
        let ulp = f64::from(f32::EPSILON) / 2.0;
        x.iter()
            .zip(y)
            .map(|(&x, &y)| {
                let exact = exact(f64::from(x));
                (f64::from(y) - exact).abs() / (exact.abs().max(floor(f64::from(x))) * ulp)
            })
            .fold(0.0, f64::max)
    }

    fn erf64(x: f64) -> f64 {
        candle_core::cpu::erf::erf_f64(x)
    }

    #[test]
    fn functions_err_by_few_ulp() {
        let x = inputs();
        let within: Vec<f32> = x.iter().copied().filter(|x| (-87.2..88.2).contains(x)).collect();
        let tiny = |_| f64::from(f32::MIN_POSITIVE);
        for (name, limit, error) in [
            ("exp", 3.0, worst(&within, &apply(Exp, &within), tiny, f64::exp)),
            ("erf", 6.0, worst(&x, &apply(Erf, &x), tiny, erf64)),
            ("tanh", 6.0, worst(&x, &apply(Tanh, &x), tiny, f64::tanh)),
            ("silu", 8.0, worst(&x, &apply(Silu, &x), |_| 1e-28, |x| x / (1.0 + (-x).exp()))),
            // 1 + erf cancels in the left tail, in torch's form as in ours: the error is relative to x there.
            ("gelu", 8.0, worst(&x, &apply(GeluErf, &x), f64::abs, |x| 0.5 * x * (1.0 + erf64(x / 2f64.sqrt())))),
            (
                "gelu_tanh",
                8.0,
                worst(&x, &apply(GeluTanh, &x), f64::abs, |x| {
                    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
                    0.5 * x * (1.0 + inner.tanh())
                }),
            ),
        ] {
            println!("{name}: {error:.2} half ulp");
            assert!(error <= limit, "{name}: {error} half ulp, at most {limit}");
        }
    }

    #[test]
    fn worked_numbers() {
        let x = [-1.0, 0.0, 1.0, 3.0];
        let close = |y: Vec<f32>, expected: [f32; 4]| {
            for (y, e) in y.iter().zip(expected) {
                assert!((y - e).abs() <= 2e-7 * e.abs().max(1.0), "{y} for {e}");
            }
        };
        close(apply(Erf, &x), [-0.842_700_8, 0.0, 0.842_700_8, 0.999_977_9]);
        close(apply(GeluErf, &x), [-0.158_655_25, 0.0, 0.841_344_8, 2.995_950_3]);
        close(apply(GeluTanh, &x), [-0.158_808_01, 0.0, 0.841_192, 2.996_362_7]);
        close(apply(Relu, &x), [0.0, 0.0, 1.0, 3.0]);
        close(apply(Silu, &x), [-0.268_941_43, 0.0, 0.731_058_6, 2.857_722_3]);
        close(apply(Tanh, &x), [-0.761_594_2, 0.0, 0.761_594_2, 0.995_054_8]);
    }

    #[test]
    fn what_is_no_number_stays_so_and_infinities_have_limits() {
        let x = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        for y in [
            apply(Exp, &x),
            apply(Erf, &x),
            apply(Tanh, &x),
            apply(Relu, &x),
            apply(Silu, &x),
            apply(GeluErf, &x),
            apply(GeluTanh, &x),
        ] {
            assert!(y[0].is_nan(), "{y:?}");
        }
        assert_eq!(apply(Erf, &x)[1..], [1.0, -1.0]);
        assert_eq!(apply(Tanh, &x)[1..], [1.0, -1.0]);
        assert_eq!(apply(Relu, &x)[1..], [f32::INFINITY, 0.0]);
        assert!(apply(Exp, &x)[2] < 1.3e-38);
    }

    #[test]
    fn rows_are_each_filled_once() {
        for (rows, block) in [(0, 4), (1, 4), (4, 4), (9, 4), (33, 1), (5, 100)] {
            let got = fill_rows(rows, 3, block, |first, part| {
                for (i, v) in part.iter_mut().enumerate() {
                    assert_eq!(*v, 0.0);
                    *v += (first * 3 + i) as f32;
                }
            });
            let expected: Vec<f32> = (0..rows * 3).map(|i| i as f32).collect();
            assert_eq!(got, expected, "{rows} rows in blocks of {block}");
        }
    }
}
