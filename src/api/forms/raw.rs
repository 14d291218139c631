//! Embeddings as nothing but their bytes.

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::Response;

use super::{Dtype, quantize};
use crate::Result;
use crate::api::negotiate::BYTES;
use crate::api::write;
use crate::output::Row;

/// "num_inputs,items of a row": numpy's shape without its brackets.
pub const SHAPE: HeaderName = HeaderName::from_static("x-eremois-shape");
/// The type of an item: "float32", "float16", "int8" or "uint8".
pub const DTYPE: HeaderName = HeaderName::from_static("x-eremois-dtype");

/// Values that are copied in the time that one is written in digits.
const COPIED_PER_WRITTEN: usize = 16;

/// The rows one after another, little-endian, and the headers that say what they are.
///
/// Shapes: `rows` [num_inputs] of `dimensions` values each.
/// Errors: those of [`quantize::push_bytes`].
pub async fn raw(rows: Vec<Row>, dtype: Dtype) -> Result<Response> {
    let num_values: usize = rows.iter().map(|row| row.len()).sum();
    let num_items = dtype.num_items(rows.first().map_or(0, |row| row.len()));
    let shape = format!("{},{num_items}", rows.len());
    let write = move || {
        let mut out = Vec::with_capacity(rows.len() * num_items * dtype.item_bytes());
        rows.iter().try_for_each(|row| quantize::push_bytes(&mut out, row, dtype))?;
        Ok(out)
    };
    let bytes = write::written(num_values / COPIED_PER_WRITTEN, write).await?;
    let mut response = Response::new(Body::from(bytes));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(BYTES));
    headers.insert(DTYPE, HeaderValue::from_static(dtype.item()));
    if let Ok(shape) = HeaderValue::try_from(shape) {
        headers.insert(SHAPE, shape);
    }
    Ok(response)
}
