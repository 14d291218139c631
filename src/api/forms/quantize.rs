//! From a row of f32 to the bytes of another type.
//!
//! | dtype | item | rows that are not of length 1 |
//! |---|---|---|
//! | float32 | x | as they are |
//! | float16 | x, rounded to nearest, ties to even | as they are |
//! | int8 | round(127 · x / ‖x‖), ties to even | scaled to length 1 first |
//! | uint8 | int8 + 128 | the same |
//! | ubinary | bit i of byte j, from the highest: x[8 j + i] > 0; the last byte filled up with zeros | as they are |
//! | binary | ubinary - 128 | as they are |
//!
//! The scale of int8 is fixed, so that a row's result does not depend on its batch, nor on a sample of other rows as where
//! ranges are calibrated: no value of a row of length 1 is cut, and a·b / 127² is the cosine of two rows, to about 0.003
//! whatever their dimensions (a value is off by half a step at most, by 0.29 steps in the root mean square, a step being
//! 1/127 of the row's length). The price is precision: calibrated ranges use all 256 steps for the values that there are.
//!
//! Source of the bits: `quantize_embeddings` of sentence-transformers (`util/quantization.py`), which packs with numpy.packbits.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::Dtype;
use crate::{Error, Result};

/// Appends the row's items, little-endian.
///
/// Shapes: `row` [dimensions]; appends `dtype.num_items(dimensions)` items.
/// Errors: `Internal` for NaN and infinity; `Invalid` naming `dtype` for a value beyond float16.
pub fn push_bytes(out: &mut Vec<u8>, row: &[f32], dtype: Dtype) -> Result<()> {
    // Without an early end, so that it is computed on several values at once.
    if !row.iter().fold(true, |all, value| all & value.is_finite()) {
        return Err(Error::Internal { cause: "a value of a row is no number".to_string() });
    }
    let start = out.len();
    match dtype {
        Dtype::Float32 => {
            out.resize(start + row.len() * 4, 0);
            for (slot, value) in out[start..].chunks_exact_mut(4).zip(row) {
                slot.copy_from_slice(&value.to_le_bytes());
            }
        }
        Dtype::Float16 => push_halves(out, row)?,
        Dtype::Int8 => push_scaled(out, row, 0),
        Dtype::Uint8 => push_scaled(out, row, 128),
        Dtype::Binary => push_bits(out, row, 128),
        Dtype::Ubinary => push_bits(out, row, 0),
    }
    Ok(())
}

fn push_halves(out: &mut Vec<u8>, row: &[f32]) -> Result<()> {
    // The crate converts slices with the processor's own instruction where there is one.
    const ROUND: usize = 64;
    let mut halves = [f16::ZERO; ROUND];
    for values in row.chunks(ROUND) {
        let halves = &mut halves[..values.len()];
        halves.convert_from_f32_slice(values);
        for (half, value) in halves.iter().zip(values) {
            if half.is_infinite() {
                let reason = format!("a value of {value} is beyond float16");
                return Err(Error::Invalid { field: "dtype".to_string(), reason });
            }
            out.extend_from_slice(&half.to_le_bytes());
        }
    }
    Ok(())
}

/// The values of little-endian halves.
pub fn halves(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(2).map(|pair| f16::from_le_bytes([pair[0], pair[1]]).to_f32()).collect()
}

/// `offset` is added to what is rounded: 0 for int8, 128 for uint8.
fn push_scaled(out: &mut Vec<u8>, row: &[f32], offset: u8) {
    // In f64, where no sum of squares of f32 overflows.
    let norm = row.iter().map(|value| f64::from(*value) * f64::from(*value)).sum::<f64>().sqrt();
    let scale = if norm > 0.0 { 127.0 / norm } else { 0.0 };
    // 1.5 · 2^52. A sum with it has no bits left for a fraction: it is rounded as the processor rounds, to nearest and ties
    // to even, and its lowest bits are the integer's. `round_ties_even` would call a function for each value on
    // processors of which no more is known than that they are x86-64.
    const NO_FRACTION: f64 = 6_755_399_441_055_744.0;
    let integer = |value: &f32| (f64::from(*value) * scale + NO_FRACTION).to_bits() as u8;
    out.extend(row.iter().map(|value| integer(value).wrapping_add(offset)));
}

/// `offset` is taken from each byte: 128 for binary, 0 for ubinary.
fn push_bits(out: &mut Vec<u8>, row: &[f32], offset: u8) {
    out.extend(row.chunks(8).map(|values| {
        let byte = values.iter().enumerate().fold(0u8, |byte, (i, value)| byte | (u8::from(*value > 0.0) << (7 - i)));
        byte.wrapping_sub(offset)
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(row: &[f32], dtype: Dtype) -> Vec<u8> {
        let mut out = Vec::new();
        push_bytes(&mut out, row, dtype).unwrap();
        out
    }

    /// Worked with numpy: packbits(row > 0), rint(127 row / norm), row.astype("<f2").
    #[test]
    fn worked_numbers() {
        let row = [3.0, -4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 12.0, 1e-9, -0.0];
        assert_eq!(bytes(&row, Dtype::Ubinary), [0b1000_0001, 0b1000_0000]);
        assert_eq!(bytes(&row, Dtype::Binary), [1, 0]);
        let int8 = [29, -39, 0, 0, 0, 0, 0, 117, 0, 0i8].map(|v| v as u8);
        assert_eq!(bytes(&row, Dtype::Int8), int8);
        assert_eq!(bytes(&row, Dtype::Uint8), int8.map(|v| v.wrapping_add(128)));
        assert_eq!(bytes(&[1.0, -0.1], Dtype::Float16), [0x00, 0x3c, 0x66, 0xae]);
        assert_eq!(bytes(&[1.0], Dtype::Float32), [0, 0, 0x80, 0x3f]);
        // Alone in its row a value is at the end of the scale, and a row of zeros has none.
        assert_eq!(bytes(&[-1e30], Dtype::Int8), [(-127i8) as u8]);
        assert_eq!(bytes(&[0.0; 3], Dtype::Int8), [0; 3]);
        assert_eq!(bytes(&[0.0; 3], Dtype::Uint8), [128; 3]);
    }

    #[test]
    fn what_has_no_form_is_an_error() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for dtype in [Dtype::Float32, Dtype::Float16, Dtype::Int8, Dtype::Ubinary] {
                let got = push_bytes(&mut Vec::new(), &[0.0, bad, 1.0], dtype);
                assert!(matches!(got, Err(Error::Internal { .. })), "{dtype:?} {bad}");
            }
        }
        let wide = push_bytes(&mut Vec::new(), &[70_000.0], Dtype::Float16);
        assert!(matches!(wide, Err(Error::Invalid { field, .. }) if field == "dtype"));
        assert_eq!(bytes(&[65_504.0], Dtype::Float16).len(), 2);
    }

    proptest! {
        #[test]
        fn cosines_survive_int8(pair in proptest::collection::vec((-1.0f32..1.0, -1.0f32..1.0), 8..600)) {
            let (a, b): (Vec<f32>, Vec<f32>) = pair.into_iter().unzip();
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
            let wide = |row: &[f32]| row.iter().map(|v| f64::from(*v)).collect::<Vec<f64>>();
            let (fa, fb) = (wide(&a), wide(&b));
            let norms = (dot(&fa, &fa) * dot(&fb, &fb)).sqrt();
            prop_assume!(norms > 1e-6);
            let items = |row: &[f32]| bytes(row, Dtype::Int8).iter().map(|v| f64::from(*v as i8)).collect::<Vec<f64>>();
            let quantised = dot(&items(&a), &items(&b)) / (127.0 * 127.0);
            // Six standard deviations of the two rows' errors, and what their product adds.
            prop_assert!((quantised - dot(&fa, &fb) / norms).abs() < 0.025);
        }

        #[test]
        fn halves_read_back(values in proptest::collection::vec(-1000.0f32..1000.0, 0..200)) {
            let back = halves(&bytes(&values, Dtype::Float16));
            prop_assert_eq!(back.len(), values.len());
            for (half, value) in back.iter().zip(&values) {
                prop_assert!((half - value).abs() <= value.abs() / 2048.0 + 1e-7);
            }
        }

        #[test]
        fn a_row_does_not_depend_on_what_is_written_before(row in proptest::collection::vec(-1.0f32..1.0, 0..50)) {
            for dtype in [Dtype::Float32, Dtype::Float16, Dtype::Int8, Dtype::Uint8, Dtype::Binary, Dtype::Ubinary] {
                let mut out = vec![1, 2, 3];
                push_bytes(&mut out, &row, dtype).unwrap();
                let alone = bytes(&row, dtype);
                prop_assert_eq!(&out[3..], alone.as_slice());
                prop_assert_eq!(alone.len(), dtype.num_items(row.len()) * dtype.item_bytes());
            }
        }
    }
}
