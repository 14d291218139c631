//! Writes answers: a JSON head with the values in it, or behind it as they are in memory.

use crate::api::tensors::outputs::{OutputTensor, Values};
use crate::api::write;
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
    let mut out = write::buffer(num_values(outputs.iter().filter(|(_, form)| *form == Form::Json)));
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
        out.extend_from_slice(if i > 0 { br#",{"name":"# } else { br#"{"name":"# });
        write::push_str(&mut out, &output.name);
        let opening = format!(r#","datatype":"{}","shape":{:?}"#, output.datatype().as_str(), output.shape);
        out.extend_from_slice(opening.as_bytes());
        match form {
            Form::Json => {
                out.extend_from_slice(br#","data":["#);
                push_flat(&mut out, &output.values)?;
                out.push(b']');
            }
            Form::Binary => {
                let before = tail.len();
                push_binary(&mut tail, &output.values)?;
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
    let mut bytes = Vec::new();
    push_binary(&mut bytes, &output.values)?;
    Ok(bytes)
}

/// How many values these outputs have.
pub fn num_values<'a>(outputs: impl Iterator<Item = &'a Output>) -> usize {
    outputs.map(|(output, _)| output.num_values()).sum()
}

/// All elements in one list.
fn push_flat(out: &mut Vec<u8>, values: &Values) -> Result<()> {
    match values {
        Values::Rows(rows) => write::push_joined(out, rows, |out, row| write::push_values(out, row)),
        Values::Floats(values) => write::push_values(out, values),
        Values::Ints(ints) => write::push_joined(out, ints, |out, int| Ok(write::push_int(out, (*int).into()))),
        Values::Longs(ints) => write::push_joined(out, ints, |out, int| Ok(write::push_int(out, *int))),
        Values::Texts(texts) => write::push_joined(out, texts, |out, text| Ok(write::push_str(out, text))),
    }
}

/// Errors: `Internal` for NaN and infinity, as JSON has it: a wrong answer must not look right.
fn push_binary(out: &mut Vec<u8>, values: &Values) -> Result<()> {
    match values {
        Values::Rows(rows) => rows.iter().try_for_each(|row| push_floats(out, row))?,
        Values::Floats(values) => push_floats(out, values)?,
        Values::Ints(ints) => ints.iter().for_each(|int| out.extend_from_slice(&int.to_le_bytes())),
        Values::Longs(ints) => ints.iter().for_each(|int| out.extend_from_slice(&int.to_le_bytes())),
        Values::Texts(texts) => texts.iter().for_each(|text| {
            // A label with a score, or a word: nothing comes near 4 GiB.
            out.extend_from_slice(&(text.len() as u32).to_le_bytes());
            out.extend_from_slice(text.as_bytes());
        }),
    }
    Ok(())
}

fn push_floats(out: &mut Vec<u8>, values: &[f32]) -> Result<()> {
    out.reserve(size_of_val(values));
    if let Some(value) = values.iter().find(|value| !value.is_finite()) {
        return Err(Error::Internal { cause: format!("a value of a row is {value}") });
    }
    values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::Row;
    use serde_json::json;

    fn output(rows: &[[f32; 2]]) -> OutputTensor {
        let values = Values::Rows(rows.iter().map(|row| Row::Own(row.to_vec())).collect());
        OutputTensor { name: "embedding".into(), shape: vec![rows.len(), 2], values }
    }

    #[test]
    fn every_type_is_written_both_ways() {
        let head = Head { model_name: "m".into(), model_version: "1".into(), id: None };
        for (values, datatype, data, bytes) in [
            (Values::Floats(vec![0.5]), "FP32", json!([0.5]), vec![0, 0, 0, 63]),
            (Values::Ints(vec![-2]), "INT32", json!([-2]), vec![254, 255, 255, 255]),
            (Values::Longs(vec![3]), "INT64", json!([3]), vec![3, 0, 0, 0, 0, 0, 0, 0]),
            (Values::Texts(vec!["a\"é".into()]), "BYTES", json!(["a\"é"]), vec![4, 0, 0, 0, 97, 34, 195, 169]),
        ] {
            let output = OutputTensor { name: "o".into(), shape: vec![1], values };
            let body = write(&head, &[(output.clone(), Form::Json)]).unwrap().bytes;
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            let expected = json!({"name": "o", "datatype": datatype, "shape": [1], "data": data});
            assert_eq!(body["outputs"][0], expected);
            assert_eq!(binary(&output).unwrap(), bytes, "{datatype}");
        }
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
