//! Tensors as lists in lists of JSON, written straight into the response's buffer.

use super::outputs::{OutputTensor, Values};
use crate::api::write;
use crate::{Error, Result};

/// A named output of a request.
pub struct Column<'a> {
    pub name: &'a str,
    pub output: &'a OutputTensor,
    /// Whether a row goes as the bytes of its values, little-endian.
    pub as_bytes: bool,
}

impl Column<'_> {
    /// Inputs that it answers.
    pub fn num_rows(&self) -> usize {
        self.output.shape.first().copied().unwrap_or(0)
    }

    /// One row: its values in lists as its shape is, or their bytes.
    ///
    /// Errors: those of [`write::push_floats`].
    pub fn push(&self, out: &mut Vec<u8>, i: usize) -> Result<()> {
        let dims = self.output.shape.get(1..).unwrap_or_default();
        let len: usize = dims.iter().product();
        let place = i * len..(i + 1) * len;
        match &self.output.values {
            Values::Rows(rows) if self.as_bytes => {
                out.extend_from_slice(b"{\"b64\":");
                write::push_base64(out, &rows[i])?;
                out.push(b'}');
                Ok(())
            }
            _ if self.as_bytes => Err(Error::Internal { cause: "only vectors go as bytes".to_string() }),
            Values::Rows(rows) => push_nested(out, dims, &rows[i], &write::push_values),
            Values::Floats(values) => push_nested(out, dims, &values[place], &write::push_values),
            Values::Ints(ints) => push_nested(out, dims, &ints[place], &|out, ints: &[i32]| {
                write::push_joined(out, ints, |out, int| {
                    write::push_int(out, (*int).into());
                    Ok(())
                })
            }),
            Values::Longs(ints) => push_nested(out, dims, &ints[place], &|out, ints: &[i64]| {
                write::push_joined(out, ints, |out, int| {
                    write::push_int(out, *int);
                    Ok(())
                })
            }),
            Values::Texts(texts) => push_nested(out, dims, &texts[place], &|out, texts: &[String]| {
                write::push_joined(out, texts, |out, text| {
                    write::push_str(out, text);
                    Ok(())
                })
            }),
        }
    }

    /// Its name and a colon.
    pub fn push_name(&self, out: &mut Vec<u8>) {
        write::push_str(out, self.name);
        out.push(b':');
    }
}

/// Appends values in lists as `dims` says; `push` those of an innermost list, without its brackets.
fn push_nested<T>(
    out: &mut Vec<u8>,
    dims: &[usize],
    values: &[T],
    push: &impl Fn(&mut Vec<u8>, &[T]) -> Result<()>,
) -> Result<()> {
    match dims {
        [] => push(out, values),
        [_] => {
            out.push(b'[');
            push(out, values)?;
            out.push(b']');
            Ok(())
        }
        [n, inner @ ..] => {
            let len: usize = inner.iter().product();
            push_list(out, 0..*n, b"[]", |out, i| push_nested(out, inner, &values[i * len..(i + 1) * len], push))
        }
    }
}

/// Appends all rows of a tensor, as a list. Errors: those of [`write::push_floats`].
pub fn push_rows(out: &mut Vec<u8>, column: &Column, num_rows: usize) -> Result<()> {
    push_list(out, 0..num_rows, b"[]", |out, i| column.push(out, i))
}

/// Appends `{name: rows}`. Errors: those of [`write::push_floats`].
pub fn push_named(out: &mut Vec<u8>, columns: &[Column], num_rows: usize) -> Result<()> {
    push_list(out, columns, b"{}", |out, column| {
        column.push_name(out);
        push_rows(out, column, num_rows)
    })
}

/// Appends items between brackets and commas.
pub fn push_list<T>(
    out: &mut Vec<u8>,
    items: impl IntoIterator<Item = T>,
    brackets: &[u8; 2],
    push: impl Fn(&mut Vec<u8>, T) -> Result<()>,
) -> Result<()> {
    out.push(brackets[0]);
    write::push_joined(out, items, push)?;
    out.push(brackets[1]);
    Ok(())
}
