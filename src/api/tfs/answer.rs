//! Predictions as JSON, written straight into the response's buffer.

use crate::Result;
use crate::api::tensors::nested::Layout;
use crate::api::tensors::written::{Column, push_list, push_named, push_rows};

/// Appends `{"predictions": …}` or `{"outputs": …}`. A lone output goes without its name.
///
/// Errors: those of [`push_rows`].
pub fn push(out: &mut Vec<u8>, layout: Layout, columns: &[Column]) -> Result<()> {
    let num_rows = columns.iter().map(Column::num_rows).min().unwrap_or(0);
    match layout {
        Layout::Rows => {
            out.extend_from_slice(b"{\"predictions\":");
            push_list(out, 0..num_rows, b"[]", |out, i| match columns {
                [column] => column.push(out, i),
                columns => push_list(out, columns, b"{}", |out, column| {
                    column.push_name(out);
                    column.push(out, i)
                }),
            })?;
        }
        Layout::Columns => {
            out.extend_from_slice(b"{\"outputs\":");
            match columns {
                [column] => push_rows(out, column, num_rows)?,
                columns => push_named(out, columns, num_rows)?,
            }
        }
    }
    out.push(b'}');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::tensors::outputs::{OutputTensor, Values};
    use crate::output::Row;

    #[test]
    fn several_outputs_keep_their_names() {
        let rows = Values::Rows([[1.0, 2.0], [0.5, 4.0]].map(|row| Row::Own(row.to_vec())).to_vec());
        let vectors = OutputTensor { name: "a".into(), shape: vec![2, 2], values: rows };
        let cubes = OutputTensor { name: "c".into(), shape: vec![2, 2, 1], values: Values::Longs(vec![1, 2, 3, 4]) };
        let lengths = OutputTensor { name: "d".into(), shape: vec![2], values: Values::Ints(vec![7, 8]) };
        let written = |layout, columns: &[Column]| {
            let mut out = Vec::new();
            push(&mut out, layout, columns).unwrap();
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
        assert_eq!(written(Layout::Rows, &columns), by_row);
        let by_column = r#"{"outputs":{"a":[[1.0,2.0],[0.5,4.0]],"b_bytes":[{"b64":"AACAPwAAAEA="},{"b64":"AAAAPwAAgEA="}],"c":[[[1],[2]],[[3],[4]]],"d":[7,8]}}"#;
        assert_eq!(written(Layout::Columns, &columns), by_column);
        assert_eq!(written(Layout::Rows, &columns[..1]), r#"{"predictions":[[1.0,2.0],[0.5,4.0]]}"#);
        assert_eq!(written(Layout::Columns, &columns[3..]), r#"{"outputs":[7,8]}"#);
    }
}
