//! From JSON to named tensors, in row form (`instances`) and in column form (`inputs`).

use std::fmt;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Map, Value};

use super::signature::{Dtype, Signature, TensorSpec};
use crate::{Error, Result};

/// How a request writes its tensors, and so how it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `{"instances": [row, row]}`, answered by `predictions`.
    Rows,
    /// `{"inputs": {name: tensor}}`, answered by `outputs`.
    Columns,
}

/// The values of a tensor, row by row.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    Strings(Vec<Vec<u8>>),
    Integers(Vec<i64>),
    Floats(Vec<f32>),
}

/// A tensor of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// As many dimensions as the signature says, slowest first; those behind an empty one are missing.
    pub shape: Vec<usize>,
    /// The product of `shape`.
    pub values: Values,
}

/// The tensors of a request.
#[derive(Debug, PartialEq)]
pub struct Given {
    pub form: Form,
    /// Whether values stood under their names.
    pub is_named: bool,
    /// In the order of the signature's inputs.
    pub tensors: Vec<Tensor>,
}

impl Given {
    /// How the client would name row `i` of an input.
    pub fn row_name(&self, input: &TensorSpec, i: usize) -> String {
        let name = self.is_named.then_some(input.name.as_str());
        match self.form {
            Form::Rows => Place { row: Some(i), ..Place::new(self.form, name) }.to_string(),
            Form::Columns => Place { indices: vec![i], ..Place::new(self.form, name) }.to_string(),
        }
    }

    /// How the client would name all rows.
    pub fn rows_name(&self, input: &TensorSpec) -> String {
        let name = self.is_named.then_some(input.name.as_str()).filter(|_| self.form == Form::Columns);
        Place::new(self.form, name).to_string()
    }
}

/// Reads `instances`: a list of values, or of objects with a value an input.
///
/// Errors: `Malformed` naming the first value that is not as the signature says, or as the rows before it.
pub fn read_rows(instances: Value, signature: &Signature) -> Result<Given> {
    let place = Place::new(Form::Rows, None);
    let Value::Array(instances) = instances else {
        return Err(place.malformed(format!("expected a list of instances, got {}", word(&instances))));
    };
    let is_named = instances.first().is_some_and(|first| is_named(first, signature));
    let mut builders: Vec<Builder> = signature.inputs.iter().map(Builder::new).collect();
    builders.iter_mut().for_each(|builder| builder.shape.push(instances.len()));
    for (i, instance) in instances.into_iter().enumerate() {
        let row = Place { row: Some(i), ..Place::new(Form::Rows, None) };
        if !is_named {
            let [builder] = &mut builders[..] else {
                return Err(row.malformed(format!("expected an object of {}", names(signature))));
            };
            if i > 0 && self::is_named(&instance, signature) {
                return Err(
                    row.malformed(format!("expected {}, as the first instance is, got an object", builder.spec.dtype))
                );
            }
            builder.fill(instance, 1, &mut Place { ..row })?;
            continue;
        }
        let Value::Object(mut fields) = instance else {
            let got = word(&instance);
            return Err(row.malformed(format!("expected an object, as the first instance is, got {got}")));
        };
        for builder in &mut builders {
            let spec = builder.spec;
            let value = take(&mut fields, spec, &row)?;
            builder.fill(value, 1, &mut Place { row: Some(i), ..Place::new(Form::Rows, Some(&spec.name)) })?;
        }
        refuse_rest(&fields, signature, &row)?;
    }
    Ok(Given { form: Form::Rows, is_named, tensors: builders.into_iter().map(Builder::done).collect() })
}

/// Reads `inputs`: a tensor, or an object of tensors by their names.
///
/// Errors: as [`read_rows`].
pub fn read_columns(inputs: Value, signature: &Signature) -> Result<Given> {
    let place = Place::new(Form::Columns, None);
    let is_named = is_named(&inputs, signature);
    let mut builders: Vec<Builder> = signature.inputs.iter().map(Builder::new).collect();
    match (inputs, &mut builders[..]) {
        (Value::Object(mut fields), builders) if is_named => {
            for builder in builders.iter_mut() {
                let spec = builder.spec;
                let value = take(&mut fields, spec, &place)?;
                builder.fill(value, 0, &mut Place::new(Form::Columns, Some(&spec.name)))?;
            }
            refuse_rest(&fields, signature, &place)?;
        }
        (value, [builder]) => builder.fill(value, 0, &mut Place::new(Form::Columns, None))?,
        (_, _) => return Err(place.malformed(format!("expected an object of {}", names(signature)))),
    }
    Ok(Given { form: Form::Columns, is_named, tensors: builders.into_iter().map(Builder::done).collect() })
}

/// An object is one of named values, unless it can only be bytes: a lone `b64` where a signature has a lone input.
fn is_named(value: &Value, signature: &Signature) -> bool {
    match value {
        Value::Object(fields) => signature.inputs.len() > 1 || bytes_of(fields).is_none(),
        _ => false,
    }
}

/// The text of `{"b64": "…"}`.
fn bytes_of(fields: &Map<String, Value>) -> Option<&str> {
    match (fields.len(), fields.get("b64")) {
        (1, Some(Value::String(text))) => Some(text),
        _ => None,
    }
}

fn take(fields: &mut Map<String, Value>, spec: &TensorSpec, place: &Place) -> Result<Value> {
    fields.remove(&spec.name).ok_or_else(|| place.malformed(format!("the input `{}` is missing", spec.name)))
}

fn refuse_rest(fields: &Map<String, Value>, signature: &Signature, place: &Place) -> Result<()> {
    match fields.keys().next() {
        None => Ok(()),
        Some(name) => {
            let reason = format!("signature `{}` has no input `{name}`; it has {}", signature.name, names(signature));
            Err(place.malformed(reason))
        }
    }
}

fn names(signature: &Signature) -> String {
    let names: Vec<String> = signature.inputs.iter().map(|spec| format!("`{}`", spec.name)).collect();
    names.join(", ")
}

/// What a value is, for refusals.
fn word(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A tensor that is being read.
struct Builder<'a> {
    spec: &'a TensorSpec,
    /// Of the dimensions that were seen; the first list at each level sets it for all others.
    shape: Vec<usize>,
    values: Values,
}

impl<'a> Builder<'a> {
    fn new(spec: &'a TensorSpec) -> Self {
        let values = match spec.dtype {
            Dtype::String => Values::Strings(Vec::new()),
            Dtype::Int64 => Values::Integers(Vec::new()),
            Dtype::Float => Values::Floats(Vec::new()),
        };
        Self { spec, shape: Vec::new(), values }
    }

    fn done(self) -> Tensor {
        Tensor { shape: self.shape, values: self.values }
    }

    /// Appends the values of `value`, which lies below `level` lists.
    fn fill(&mut self, value: Value, level: usize, place: &mut Place) -> Result<()> {
        let rank = self.spec.shape.len();
        let items = match value {
            Value::Array(items) if level < rank => items,
            value if level == rank => return self.push(value, place),
            value => {
                return Err(place.malformed(format!("expected a list of {}, got {}", self.spec.dtype, word(&value))));
            }
        };
        let got = items.len();
        match (self.spec.shape[level], self.shape.get(level)) {
            (Some(expected), _) if expected != got => {
                let name = &self.spec.name;
                return Err(place.malformed(format!("`{name}` has {expected} values here, got {got}")));
            }
            (_, Some(&expected)) if expected != got => {
                return Err(place.malformed(format!("expected {expected} values, as the rows before have, got {got}")));
            }
            (_, Some(_)) => {}
            (_, None) => self.shape.push(got),
        }
        for (i, item) in items.into_iter().enumerate() {
            place.indices.push(i);
            self.fill(item, level + 1, place)?;
            place.indices.pop();
        }
        Ok(())
    }

    fn push(&mut self, value: Value, place: &Place) -> Result<()> {
        let dtype = self.spec.dtype;
        let other = |value: &Value| Err(place.malformed(format!("expected {dtype}, got {}", word(value))));
        match (&mut self.values, value) {
            (Values::Strings(texts), Value::String(text)) => texts.push(text.into_bytes()),
            (Values::Strings(texts), Value::Object(fields)) => match bytes_of(&fields) {
                Some(text) => texts.push(decode(text, place)?),
                None => return other(&Value::Object(fields)),
            },
            (Values::Integers(numbers), Value::Number(number)) => match number.as_i64() {
                Some(number) => numbers.push(number),
                None => return Err(place.malformed(format!("expected {dtype} of 64 bits, got {number}"))),
            },
            (Values::Floats(numbers), Value::Number(number)) => match number.as_f64().map(|number| number as f32) {
                Some(number) if number.is_finite() => numbers.push(number),
                _ => return Err(place.malformed(format!("expected {dtype} of 32 bits, got {number}"))),
            },
            (_, value) => return other(&value),
        }
        Ok(())
    }
}

fn decode(text: &str, place: &Place) -> Result<Vec<u8>> {
    BASE64_STANDARD.decode(text).map_err(|e| place.malformed(format!("not base64: {e}")))
}

/// Where a value stands, written only for who asks.
struct Place<'a> {
    form: Form,
    /// Of the row form: the instance.
    row: Option<usize>,
    /// The input, where values stand under their names.
    name: Option<&'a str>,
    /// Positions in the lists below.
    indices: Vec<usize>,
}

impl<'a> Place<'a> {
    fn new(form: Form, name: Option<&'a str>) -> Self {
        Self { form, row: None, name, indices: Vec::new() }
    }

    fn malformed(&self, reason: String) -> Error {
        Error::Malformed { field: self.to_string(), reason }
    }
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self.form {
            Form::Rows => "instances",
            Form::Columns => "inputs",
        })?;
        if let Some(row) = self.row {
            write!(f, "[{row}]")?;
        }
        if let Some(name) = self.name {
            write!(f, ".{name}")?;
        }
        self.indices.iter().try_for_each(|i| write!(f, "[{i}]"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn signature(inputs: &[(&str, Dtype, &[Option<usize>])]) -> Signature {
        let spec = |(name, dtype, shape): &(&str, Dtype, &[Option<usize>])| TensorSpec {
            name: name.to_string(),
            dtype: *dtype,
            shape: shape.to_vec(),
        };
        Signature { name: "s", inputs: inputs.iter().map(spec).collect(), outputs: Vec::new() }
    }

    fn two() -> Signature {
        signature(&[("image_bytes", Dtype::String, &[None]), ("sizes", Dtype::Float, &[None, Some(2)])])
    }

    #[test]
    fn both_forms_of_several_inputs_are_the_same_tensors() {
        let rows = json!([
            {"image_bytes": {"b64": "AP8="}, "sizes": [1, 2.5]},
            {"sizes": [3, 4], "image_bytes": "text"},
        ]);
        let columns = json!({"image_bytes": [{"b64": "AP8="}, "text"], "sizes": [[1, 2.5], [3, 4]]});
        let expected = vec![
            Tensor { shape: vec![2], values: Values::Strings(vec![vec![0, 255], b"text".to_vec()]) },
            Tensor { shape: vec![2, 2], values: Values::Floats(vec![1.0, 2.5, 3.0, 4.0]) },
        ];
        for given in [read_rows(rows, &two()).unwrap(), read_columns(columns, &two()).unwrap()] {
            assert!(given.is_named);
            assert_eq!(given.tensors, expected);
        }
    }

    #[test]
    fn every_fault_is_named_by_its_place() {
        let ids = signature(&[("input_ids", Dtype::Int64, &[None, None])]);
        let refused = |given: Result<Given>| match given {
            Err(Error::Malformed { field, reason }) => format!("{field}: {reason}"),
            other => panic!("{other:?}"),
        };
        for (rows, signature, says) in [
            (json!("w1"), &ids, "instances: expected a list of instances, got a text"),
            (json!([[1, 2], [3]]), &ids, "instances[1]: expected 2 values, as the rows before have, got 1"),
            (json!([{"input_ids": [1]}, {"input_ids": []}]), &ids, "instances[1].input_ids: expected 1 values"),
            (json!([[1], {"input_ids": [1]}]), &ids, "instances[1]: expected a whole number, as the first instance is"),
            (json!([{"input_ids": [1]}, [1]]), &ids, "instances[1]: expected an object, as the first instance is, got"),
            (json!([{"input_ids": [1], "more": 2}]), &ids, "instances[0]: signature `s` has no input `more`"),
            (json!([[1, 2.5]]), &ids, "instances[0][1]: expected a whole number of 64 bits, got 2.5"),
            (json!([[1, [2]]]), &ids, "instances[0][1]: expected a whole number, got a list"),
            (json!([7]), &ids, "instances[0]: expected a list of a whole number, got a number"),
            (json!(["w1"]), &two(), "instances[0]: expected an object of `image_bytes`, `sizes`"),
            (json!([{"b64": "AP8="}]), &two(), "instances[0]: the input `image_bytes` is missing"),
            (json!([{"image_bytes": {"b64": "?"}, "sizes": [1, 2]}]), &two(), "instances[0].image_bytes: not base64"),
            (
                json!([{"image_bytes": "a", "sizes": [1]}]),
                &two(),
                "instances[0].sizes: `sizes` has 2 values here, got 1",
            ),
            (
                json!([{"image_bytes": "a", "sizes": [1, 1e39]}]),
                &two(),
                "instances[0].sizes[1]: expected a number of 32",
            ),
        ] {
            let got = refused(read_rows(rows, signature));
            assert!(got.contains(says), "`{got}` does not say `{says}`");
        }
        for (columns, signature, says) in [
            (json!({"input_ids": [[1, 2], [3]]}), &ids, "inputs.input_ids[1]: expected 2 values"),
            (json!([[1, 2], 3]), &ids, "inputs[1]: expected a list"),
            (json!({"ids": [[1]]}), &ids, "inputs: the input `input_ids` is missing"),
            (json!([[1, 2]]), &two(), "inputs: expected an object of"),
        ] {
            let got = refused(read_columns(columns, signature));
            assert!(got.contains(says), "`{got}` does not say `{says}`");
        }
    }

    #[test]
    fn rows_are_named_as_the_client_wrote_them() {
        let ids = signature(&[("input_ids", Dtype::Int64, &[None, None])]);
        let name = |given: Result<Given>| given.unwrap().row_name(&ids.inputs[0], 1);
        assert_eq!(name(read_rows(json!([[1], [2]]), &ids)), "instances[1]");
        assert_eq!(name(read_rows(json!([{"input_ids": [1]}, {"input_ids": [2]}]), &ids)), "instances[1].input_ids");
        assert_eq!(name(read_columns(json!([[1], [2]]), &ids)), "inputs[1]");
        assert_eq!(name(read_columns(json!({"input_ids": [[1], [2]]}), &ids)), "inputs.input_ids[1]");
    }
}
