//! Writes answers: a JSON head with the values in it, or behind it as they are in memory.

use super::signature::{OutputTensor, OutputValues};
use crate::api::write;
use crate::output::Row;
use crate::{Error, Result};

/// How an output's values are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Json,
    /// Little-endian, behind the head.
    Binary,
}

/// An output and how it is written.
pub type Output = (OutputTensor, Form);

/// An answer's body.
#[derive(Debug)]
pub struct Written {
    pub bytes: Vec<u8>,
    /// Length of the JSON that begins it, where tensors follow.
    pub head_len: Option<usize>,
}

/// What stands beside the outputs.
#[derive(Debug)]
pub struct Head {
    pub model_name: String,
    pub model_version: String,
    /// The request's.
    pub id: Option<String>,
}

/// The body of an answer.
///
/// Errors: `Internal` for values that are no number.
pub fn write(head: &Head, outputs: &[(OutputTensor, Form)]) -> Result<Written> {
    let mut out = write::buffer(num_floats(outputs.iter().filter(|(_, form)| *form == Form::Json)));
    let mut tail = Vec::new();
    out.extend_from_slice(br#"{"model_name":"#);
    write::push_str(&mut out, &head.model_name);
    out.extend_from_slice(br#","model_version":"#);
    write::push_str(&mut out, &head.model_version);
    if let Some(id) = &head.id {
        out.extend_from_slice(br#","id":"#);
        write::push_str(&mut out, id);
    }
    out.extend_from_slice(br#","outputs":["#);
    for (i, (output, form)) in outputs.iter().enumerate() {
        let OutputTensor { name, datatype, shape, values: OutputValues::Rows(rows) } = output;
        let comma = if i > 0 { "," } else { "" };
        let datatype = datatype.as_str();
        let opening = format!(r#"{comma}{{"name":"{name}","datatype":"{datatype}","shape":{shape:?}"#);
        out.extend_from_slice(opening.as_bytes());
        match form {
            Form::Json => {
                out.extend_from_slice(br#","data":["#);
                push_flat(&mut out, rows)?;
                out.push(b']');
            }
            Form::Binary => {
                let before = tail.len();
                push_binary(&mut tail, rows)?;
                let parameters = format!(r#","parameters":{{"binary_data_size":{}}}"#, tail.len() - before);
                out.extend_from_slice(parameters.as_bytes());
            }
        }
        out.push(b'}');
    }
    out.extend_from_slice(b"]}");
    let has_tail = outputs.iter().any(|(_, form)| *form == Form::Binary);
    let head_len = has_tail.then_some(out.len());
    out.append(&mut tail);
    Ok(Written { bytes: out, head_len })
}

/// The bytes of an output. Errors: `Internal` for values that are no number.
pub fn binary(output: &OutputTensor) -> Result<Vec<u8>> {
    let OutputValues::Rows(rows) = &output.values;
    let mut bytes = Vec::new();
    push_binary(&mut bytes, rows)?;
    Ok(bytes)
}

/// How many values these outputs have.
pub fn num_floats<'a>(outputs: impl Iterator<Item = &'a (OutputTensor, Form)>) -> usize {
    outputs.map(|(OutputTensor { values: OutputValues::Rows(rows), .. }, _)| num_values(rows)).sum()
}

fn num_values(rows: &[Row]) -> usize {
    rows.iter().map(|row| row.len()).sum()
}

/// All rows in one list.
fn push_flat(out: &mut Vec<u8>, rows: &[Row]) -> Result<()> {
    for (i, row) in rows.iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        write::push_values(out, row)?;
    }
    Ok(())
}

/// Errors: `Internal` for NaN and infinity, as JSON has it: a wrong answer must not look right.
fn push_binary(out: &mut Vec<u8>, rows: &[Row]) -> Result<()> {
    out.reserve(num_values(rows) * size_of::<f32>());
    for row in rows {
        if let Some(value) = row.iter().find(|value| !value.is_finite()) {
            return Err(Error::Internal { cause: format!("a value of a row is {value}") });
        }
        row.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tensor::Datatype;
    use super::*;
    use serde_json::json;

    fn output(rows: &[[f32; 2]]) -> OutputTensor {
        let values = OutputValues::Rows(rows.iter().map(|row| Row::Own(row.to_vec())).collect());
        OutputTensor { name: "embedding", datatype: Datatype::Fp32, shape: vec![rows.len(), 2], values }
    }

    #[test]
    fn values_stand_in_the_head_or_behind_it() {
        let head = Head { model_name: "a\"b".into(), model_version: "1".into(), id: Some("7".into()) };
        let json_form = write(&head, &[(output(&[[1.0, -0.5], [2.0, 0.25]]), Form::Json)]).unwrap();
        assert_eq!(json_form.head_len, None);
        let body: serde_json::Value = serde_json::from_slice(&json_form.bytes).unwrap();
        let outputs =
            json!([{"name": "embedding", "datatype": "FP32", "shape": [2, 2], "data": [1.0, -0.5, 2.0, 0.25]}]);
        assert_eq!(body, json!({"model_name": "a\"b", "model_version": "1", "id": "7", "outputs": outputs}));

        let binary = write(&head, &[(output(&[[1.0, -0.5]]), Form::Binary)]).unwrap();
        let (head, tail) = binary.bytes.split_at(binary.head_len.unwrap());
        let body: serde_json::Value = serde_json::from_slice(head).unwrap();
        assert_eq!(body["outputs"][0]["parameters"], json!({"binary_data_size": 8}));
        assert_eq!(tail, [1f32.to_le_bytes(), (-0.5f32).to_le_bytes()].concat());
    }

    #[test]
    fn no_number_is_no_answer() {
        let head = Head { model_name: "m".into(), model_version: "1".into(), id: None };
        for form in [Form::Json, Form::Binary] {
            assert!(write(&head, &[(output(&[[f32::NAN, 0.0]]), form)]).is_err());
        }
    }
}
