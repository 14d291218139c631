//! Predictions as JSON, written straight into the response's buffer.

use super::super::write;
use super::tensor::Form;
use crate::api::tensors::outputs::{OutputTensor, Values};
use crate::{Error, Result};

/// A named output of a request.
pub struct Column<'a> {
    pub name: &'a str,
    pub output: &'a OutputTensor,
    /// Whether a row goes as the bytes of its values, little-endian.
    pub as_bytes: bool,
}

impl Column<'_> {
    fn num_rows(&self) -> usize {
        self.output.shape.first().copied().unwrap_or(0)
    }

    /// One row: its values in lists as its shape is, or their bytes.
    fn push(&self, out: &mut Vec<u8>, i: usize) -> Result<()> {
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
                write::push_joined(out, ints, |out, int| Ok(write::push_int(out, (*int).into())))
            }),
            Values::Longs(ints) => push_nested(out, dims, &ints[place], &|out, ints: &[i64]| {
                write::push_joined(out, ints, |out, int| Ok(write::push_int(out, *int)))
            }),
            Values::Texts(texts) => push_nested(out, dims, &texts[place], &|out, texts: &[String]| {
                write::push_joined(out, texts, |out, text| Ok(write::push_str(out, text)))
            }),
        }
    }

    fn push_name(&self, out: &mut Vec<u8>) {
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

/// Appends `{"predictions": …}` or `{"outputs": …}`. A lone output goes without its name.
///
/// Errors: those of [`write::push_floats`].
pub fn push(out: &mut Vec<u8>, form: Form, columns: &[Column]) -> Result<()> {
    let num_rows = columns.iter().map(Column::num_rows).min().unwrap_or(0);
    match form {
        Form::Rows => {
            out.extend_from_slice(b"{\"predictions\":");
            push_list(out, 0..num_rows, b"[]", |out, i| match columns {
                [column] => column.push(out, i),
                columns => push_list(out, columns, b"{}", |out, column| {
                    column.push_name(out);
                    column.push(out, i)
                }),
            })?;
        }
        Form::Columns => {
            let all =
                |out: &mut Vec<u8>, column: &Column| push_list(out, 0..num_rows, b"[]", |out, i| column.push(out, i));
            out.extend_from_slice(b"{\"outputs\":");
            match columns {
                [column] => all(out, column)?,
                columns => push_list(out, columns, b"{}", |out, column| {
                    column.push_name(out);
                    all(out, column)
                })?,
            }
        }
    }
    out.push(b'}');
    Ok(())
}

/// Appends items between brackets and commas.
fn push_list<T>(
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::Row;

    #[test]
    fn several_outputs_keep_their_names() {
        let rows = Values::Rows([[1.0, 2.0], [0.5, 4.0]].map(|row| Row::Own(row.to_vec())).to_vec());
        let vectors = OutputTensor { name: "a".into(), shape: vec![2, 2], values: rows };
        let cubes = OutputTensor { name: "c".into(), shape: vec![2, 2, 1], values: Values::Longs(vec![1, 2, 3, 4]) };
        let lengths = OutputTensor { name: "d".into(), shape: vec![2], values: Values::Ints(vec![7, 8]) };
        let written = |form, columns: &[Column]| {
            let mut out = Vec::new();
            push(&mut out, form, columns).unwrap();
            String::from_utf8(out).unwrap()
        };
        let column = |name, output, as_bytes| Column { name, output, as_bytes };
        let columns = [
            column("a", &vectors, false),
            column("b_bytes", &vectors, true),
            column("c", &cubes, false),
            column("d", &lengths, false),
        ];
        let by_row = r#"{"predictions":[{"a":[1.0,2.0],"b_bytes":{"b64":"AACAPwAAAEA="},"c":[[1],[2]],"d":7},{"a":[0.5,4.0],"b_bytes":{"b64":"AAAAPwAAgEA="},"c":[[3],[4]],"d":8}]}"#;
        assert_eq!(written(Form::Rows, &columns), by_row);
        let by_column = r#"{"outputs":{"a":[[1.0,2.0],[0.5,4.0]],"b_bytes":[{"b64":"AACAPwAAAEA="},{"b64":"AAAAPwAAgEA="}],"c":[[[1],[2]],[[3],[4]]],"d":[7,8]}}"#;
        assert_eq!(written(Form::Columns, &columns), by_column);
        assert_eq!(written(Form::Rows, &columns[..1]), r#"{"predictions":[[1.0,2.0],[0.5,4.0]]}"#);
        assert_eq!(written(Form::Columns, &columns[3..]), r#"{"outputs":[7,8]}"#);
    }
}
