//! A cached item as Redis keeps it: bit for bit, in half the bytes where that loses nothing.
//!
//! ```text
//! byte  0      1     2..6         6..14           14..18     18..
//!       format kind  num_tokens   expires_at      CRC-32     values
//!       1      0: f32, 1: f16, 2: bf16, 3: JSON              of all other bytes
//! ```
//!
//! Numbers are little-endian; `expires_at` is in milliseconds of Unix time, by the clock of the process that wrote.

use std::sync::Arc;
use std::time::Duration;

use half::{bf16, f16};

use crate::store::cache::{CachedItem, CachedValue};

/// Raised when the form changes: values of another one do not parse, and are misses.
const FORMAT: u8 = 1;
const HEADER_LEN: usize = 18;

const KIND_F32: u8 = 0;
const KIND_F16: u8 = 1;
const KIND_BF16: u8 = 2;
const KIND_JSON: u8 = 3;

/// Writes an item.
pub fn encode(item: &CachedItem, expires_at_ms: u64) -> Vec<u8> {
    let (kind, value_len) = match &item.value {
        CachedValue::Row(row) if row.iter().all(|value| is_f16(*value)) => (KIND_F16, 2 * row.len()),
        CachedValue::Row(row) if row.iter().all(|value| is_bf16(*value)) => (KIND_BF16, 2 * row.len()),
        CachedValue::Row(row) => (KIND_F32, 4 * row.len()),
        CachedValue::Json(json) => (KIND_JSON, json.len()),
    };
    let mut bytes = Vec::with_capacity(HEADER_LEN + value_len);
    bytes.extend_from_slice(&[FORMAT, kind]);
    bytes.extend_from_slice(&item.num_tokens.to_le_bytes());
    bytes.extend_from_slice(&expires_at_ms.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    match &item.value {
        CachedValue::Row(row) if kind == KIND_F16 => {
            row.iter().for_each(|value| bytes.extend_from_slice(&f16::from_f32(*value).to_le_bytes()));
        }
        CachedValue::Row(row) if kind == KIND_BF16 => {
            row.iter().for_each(|value| bytes.extend_from_slice(&bf16::from_f32(*value).to_le_bytes()));
        }
        CachedValue::Row(row) => row.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes())),
        CachedValue::Json(json) => bytes.extend_from_slice(json),
    }
    let checksum = checksum(&bytes).to_le_bytes();
    bytes[14..18].copy_from_slice(&checksum);
    bytes
}

/// Reads an item and the time it is still good for. `None` for what is not one of this form, whole and unexpired.
///
/// `longest` bounds the time left: clocks of processes may differ.
pub fn decode(bytes: &[u8], now_ms: u64, longest: Duration) -> Option<(CachedItem, Duration)> {
    let (header, value) = bytes.split_at_checked(HEADER_LEN)?;
    let word = |at: usize| Some(u32::from_le_bytes(header.get(at..at + 4)?.try_into().ok()?));
    if header[0] != FORMAT || word(14)? != checksum(bytes) {
        return None;
    }
    let expires_at_ms = u64::from_le_bytes(header.get(6..14)?.try_into().ok()?);
    let left = Duration::from_millis(expires_at_ms.checked_sub(now_ms).filter(|left| *left > 0)?).min(longest);
    let value = match header[1] {
        KIND_F32 => CachedValue::Row(row(value, f32::from_le_bytes)?),
        KIND_F16 => CachedValue::Row(row(value, |bytes| f16::from_le_bytes(bytes).to_f32())?),
        KIND_BF16 => CachedValue::Row(row(value, |bytes| bf16::from_le_bytes(bytes).to_f32())?),
        KIND_JSON => CachedValue::Json(value.into()),
        _ => return None,
    };
    Some((CachedItem { value, num_tokens: word(2)? }, left))
}

/// Values of `N` bytes each; `None` where the last one is cut.
fn row<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f32) -> Option<Arc<[f32]>> {
    let (values, rest) = bytes.as_chunks::<N>();
    rest.is_empty().then(|| values.iter().map(|value| read(*value)).collect())
}

/// CRC-32 of all bytes but its own.
fn checksum(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..14]);
    hasher.update(&bytes[18..]);
    hasher.finalize()
}

/// Whether the value comes back from f16 with all its bits.
fn is_f16(value: f32) -> bool {
    f16::from_f32(value).to_f32().to_bits() == value.to_bits()
}

fn is_bf16(value: f32) -> bool {
    bf16::from_f32(value).to_f32().to_bits() == value.to_bits()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LONG: Duration = Duration::from_secs(1 << 30);

    fn item(row: Vec<f32>) -> CachedItem {
        CachedItem { value: CachedValue::Row(row.into()), num_tokens: 77 }
    }

    fn bits(item: &CachedItem) -> Vec<u32> {
        match &item.value {
            CachedValue::Row(row) => row.iter().map(|value| value.to_bits()).collect(),
            CachedValue::Json(_) => panic!("a row was put in"),
        }
    }

    proptest! {
        #[test]
        fn every_bit_comes_back(values in proptest::collection::vec(any::<u32>(), 0..70), tokens: u32, at in 1u64..1 << 50) {
            let row: Vec<f32> = values.iter().map(|bits| f32::from_bits(*bits)).collect();
            // Of every row also the half-precision one that is nearest, which takes the shorter forms.
            let halves = row.iter().map(|value| f16::from_f32(*value).to_f32()).collect();
            let brains = row.iter().map(|value| bf16::from_f32(*value).to_f32()).collect();
            for row in [row, halves, brains] {
                let item = CachedItem { value: CachedValue::Row(row.into()), num_tokens: tokens };
                let bytes = encode(&item, at);
                let (back, left) = decode(&bytes, at - 1, LONG).expect("what was written is read");
                prop_assert_eq!(bits(&back), bits(&item));
                prop_assert_eq!((back.num_tokens, left), (tokens, Duration::from_millis(1)));
            }
        }

        #[test]
        fn no_flipped_bit_and_no_cut_is_read(values in proptest::collection::vec(any::<f32>(), 1..20), byte: usize, bit in 0..8u8) {
            let bytes = encode(&item(values), 1000);
            let mut flipped = bytes.clone();
            let at = byte % bytes.len();
            flipped[at] ^= 1 << bit;
            prop_assert!(decode(&flipped, 0, LONG).is_none());
            prop_assert!(decode(&bytes[..at], 0, LONG).is_none());
        }

        #[test]
        fn garbage_is_a_miss(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(decode(&bytes, 0, LONG).is_none());
        }
    }

    #[test]
    fn rows_of_half_precision_take_half_the_bytes() {
        let len = |row: Vec<f32>| encode(&item(row), 1).len() - HEADER_LEN;
        assert_eq!(len(vec![0.5, -0.25, 65504.0, 2f32.powi(-24)]), 8);
        assert_eq!(len(vec![f16::from_f32(0.1).to_f32(); 3]), 6);
        assert_eq!(len(vec![bf16::from_f32(3e38).to_f32(), 1.0]), 4);
        assert_eq!(len(vec![0.1, 1.0]), 8);
        assert_eq!(len(vec![]), 0);
    }

    #[test]
    fn time_is_bounded_on_both_sides() {
        let bytes = encode(&item(vec![1.0]), 1000);
        let left = |now, longest| decode(&bytes, now, longest).map(|(_, left)| left);
        assert_eq!(left(999, LONG), Some(Duration::from_millis(1)));
        assert_eq!(left(1000, LONG), None);
        assert_eq!(left(5000, LONG), None);
        assert_eq!(left(0, Duration::from_millis(10)), Some(Duration::from_millis(10)), "their clock may be ahead");
    }

    #[test]
    fn other_tasks_are_kept_as_they_are() {
        let json = CachedItem { value: CachedValue::Json(br#"{"label":"a"}"#[..].into()), num_tokens: 2 };
        assert_eq!(decode(&encode(&json, 10), 1, LONG), Some((json, Duration::from_millis(9))));
    }
}
