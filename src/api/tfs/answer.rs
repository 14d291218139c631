//! Predictions as JSON, written straight into the response's buffer.

use super::super::write;
use super::signature::{BYTES_SUFFIX, TensorSpec};
use super::tensor::Form;
use crate::Result;
use crate::output::Row;

/// A named output of a request.
pub struct Column<'a> {
    pub output: &'a TensorSpec,
    /// One an input.
    pub rows: &'a [Row],
}

impl Column<'_> {
    /// One row: its values, or where the name says that it is bytes, those of its values in little-endian order.
    fn push(&self, out: &mut Vec<u8>, i: usize) -> Result<()> {
        if !self.output.name.ends_with(BYTES_SUFFIX) {
            return write::push_floats(out, &self.rows[i]);
        }
        out.extend_from_slice(b"{\"b64\":");
        write::push_base64(out, &self.rows[i])?;
        out.push(b'}');
        Ok(())
    }

    fn push_name(&self, out: &mut Vec<u8>) {
        write::push_str(out, &self.output.name);
        out.push(b':');
    }
}

/// Appends `{"predictions": …}` or `{"outputs": …}`. A lone output goes without its name.
///
/// Errors: those of [`write::push_floats`].
pub fn push(out: &mut Vec<u8>, form: Form, columns: &[Column]) -> Result<()> {
    let num_rows = columns.iter().map(|column| column.rows.len()).min().unwrap_or(0);
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
    for (i, item) in items.into_iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        push(out, item)?;
    }
    out.push(brackets[1]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::signature::Dtype;
    use super::*;

    #[test]
    fn several_outputs_keep_their_names() {
        let spec = |name: &str| TensorSpec { name: name.into(), dtype: Dtype::Float, shape: vec![None, None] };
        let (a, b) = (spec("a"), spec("b_bytes"));
        let rows = [Row::Own(vec![1.0, 2.0]), Row::Own(vec![0.5])];
        let written = |form, columns: &[Column]| {
            let mut out = Vec::new();
            push(&mut out, form, columns).unwrap();
            String::from_utf8(out).unwrap()
        };
        let both = || [Column { output: &a, rows: &rows }, Column { output: &b, rows: &rows }];
        let by_row = r#"{"predictions":[{"a":[1.0,2.0],"b_bytes":{"b64":"AACAPwAAAEA="}},{"a":[0.5],"b_bytes":{"b64":"AAAAPw=="}}]}"#;
        assert_eq!(written(Form::Rows, &both()), by_row);
        let by_column = r#"{"outputs":{"a":[[1.0,2.0],[0.5]],"b_bytes":[{"b64":"AACAPwAAAEA="},{"b64":"AAAAPw=="}]}}"#;
        assert_eq!(written(Form::Columns, &both()), by_column);
        assert_eq!(written(Form::Rows, &both()[..1]), r#"{"predictions":[[1.0,2.0],[0.5]]}"#);
        assert_eq!(written(Form::Columns, &both()[..1]), r#"{"outputs":[[1.0,2.0],[0.5]]}"#);
    }
}
