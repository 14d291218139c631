//! JSON of many floats, written straight into the response's buffer.
//!
//! serde_json would do it through a call per value and a growing `Vec`; a response of 64 embeddings is
//! 24,576 floats, so this is where the CPU time of a handler goes.

use std::ops::Deref;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

use crate::{Error, Result};

/// Rows with more floats than this are written off the async threads: at about 20 ns a float, below
/// it a handler stays under the 500 microseconds an async thread may be held.
const MAX_INLINE_FLOATS: usize = 16 * 1024;

/// Longest form of an f32 with its comma ("-1.17549435e-38,"); the usual is 12 bytes.
pub const BYTES_PER_FLOAT: usize = 13;

/// Writes with `write`, on this thread if it is short and on a blocking one if not.
///
/// `num_floats` is how many floats `write` will write.
pub async fn offload(
    num_floats: usize,
    write: impl FnOnce() -> Result<Vec<u8>> + Send + 'static,
) -> Result<Response<Body>> {
    written(num_floats, write).await.map(json)
}

/// As [`offload`], for what is more than JSON.
pub async fn written<T: Send + 'static>(
    num_floats: usize,
    write: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    if num_floats <= MAX_INLINE_FLOATS {
        return write();
    }
    let joined = tokio::task::spawn_blocking(write).await;
    joined.map_err(|e| Error::Internal { cause: format!("writing a response: {e}") })?
}

/// A 200 of this JSON.
pub fn json(bytes: Vec<u8>) -> Response<Body> {
    let mut response = Response::new(Body::from(bytes));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A buffer for rows of so many floats in all.
pub fn buffer(num_floats: usize) -> Vec<u8> {
    Vec::with_capacity(num_floats * BYTES_PER_FLOAT + 256)
}

/// Appends `[0.1,-0.2]`: of each value the shortest digits that read back as the same f32.
///
/// Errors: `Internal` for a value JSON has no word for (NaN, infinity): a wrong answer must not look right.
pub fn push_floats(out: &mut Vec<u8>, values: &[f32]) -> Result<()> {
    out.push(b'[');
    push_values(out, values)?;
    out.push(b']');
    Ok(())
}

/// Appends `0.1,-0.2`, the inside of a list. Errors: those of [`push_floats`].
pub fn push_values(out: &mut Vec<u8>, values: &[f32]) -> Result<()> {
    let mut digits = zmij::Buffer::new();
    for (i, &value) in values.iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        if !value.is_finite() {
            return Err(Error::Internal { cause: format!("value {i} of a row is {value}") });
        }
        out.extend_from_slice(digits.format_finite(value).as_bytes());
    }
    Ok(())
}

/// Appends items with commas between them. Errors: those of `push`.
pub fn push_joined<T>(
    out: &mut Vec<u8>,
    items: impl IntoIterator<Item = T>,
    push: impl Fn(&mut Vec<u8>, T) -> Result<()>,
) -> Result<()> {
    for (i, item) in items.into_iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        push(out, item)?;
    }
    Ok(())
}

/// Appends the digits of a whole number.
pub fn push_int(out: &mut Vec<u8>, int: i64) {
    out.extend_from_slice(int.to_string().as_bytes());
}

/// Appends `[[..],[..]]`, one list a row. Errors: those of [`push_floats`].
pub fn push_rows(out: &mut Vec<u8>, rows: &[impl Deref<Target = [f32]>]) -> Result<()> {
    out.push(b'[');
    push_joined(out, rows, |out, row| push_floats(out, row))?;
    out.push(b']');
    Ok(())
}

/// Appends a JSON string of the base64 of the values' little-endian bytes.
///
/// Errors: `Internal` for NaN and infinity, as in [`push_floats`].
pub fn push_base64(out: &mut Vec<u8>, values: &[f32]) -> Result<()> {
    // 768 bytes a round: a multiple of 3, so that only the last round can end in padding.
    const ROUND: usize = 192;
    let mut bytes = [0u8; ROUND * 4];
    out.push(b'"');
    for round in values.chunks(ROUND) {
        for (slot, value) in bytes.chunks_exact_mut(4).zip(round) {
            if !value.is_finite() {
                return Err(Error::Internal { cause: format!("a value of a row is {value}") });
            }
            slot.copy_from_slice(&value.to_le_bytes());
        }
        extend_base64(out, &bytes[..round.len() * 4])?;
    }
    out.push(b'"');
    Ok(())
}

/// Appends a JSON string of the bytes' base64.
pub fn push_base64_bytes(out: &mut Vec<u8>, bytes: &[u8]) -> Result<()> {
    out.push(b'"');
    extend_base64(out, bytes)?;
    out.push(b'"');
    Ok(())
}

fn extend_base64(out: &mut Vec<u8>, bytes: &[u8]) -> Result<()> {
    let end = out.len();
    out.resize(end + bytes.len().div_ceil(3) * 4, 0);
    let written = BASE64_STANDARD.encode_slice(bytes, &mut out[end..]);
    written.map(drop).map_err(|e| Error::Internal { cause: format!("base64: {e}") })
}

/// Appends a JSON string.
pub fn push_str(out: &mut Vec<u8>, text: &str) {
    // Writing a string into memory cannot fail: it has no keys to refuse and no I/O.
    let _ = serde_json::to_writer(out, text);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn floats_read_back_bit_for_bit(bits in proptest::collection::vec(any::<u32>(), 0..200)) {
            let values: Vec<f32> = bits.into_iter().map(f32::from_bits).filter(|v| v.is_finite()).collect();
            let mut out = Vec::new();
            push_floats(&mut out, &values).unwrap();
            let back: Vec<f32> = serde_json::from_slice(&out).unwrap();
            prop_assert_eq!(values.len(), back.len());
            for (a, b) in values.iter().zip(&back) {
                prop_assert_eq!(a.to_bits(), b.to_bits());
            }
        }

        #[test]
        fn base64_is_that_of_all_bytes_at_once(values in proptest::collection::vec(-1.0f32..1.0, 0..700)) {
            let mut out = Vec::new();
            push_base64(&mut out, &values).unwrap();
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let expected = format!("\"{}\"", BASE64_STANDARD.encode(bytes));
            prop_assert_eq!(String::from_utf8(out).unwrap(), expected);
        }
    }

    #[test]
    fn f32_digits_are_the_shortest() {
        let mut out = Vec::new();
        push_floats(&mut out, &[0.1, -0.25, 1.0, 1e-7, 0.0]).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "[0.1,-0.25,1.0,1e-7,0.0]");
    }

    #[test]
    fn no_number_is_an_error() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(push_floats(&mut Vec::new(), &[0.0, bad]).is_err());
            assert!(push_base64(&mut Vec::new(), &[0.0, bad]).is_err());
        }
    }

    #[test]
    fn strings_are_escaped() {
        let mut out = Vec::new();
        push_str(&mut out, "a\"\u{1}é");
        assert_eq!(String::from_utf8(out).unwrap(), "\"a\\\"\\u0001é\"");
    }
}
