//! From nested JSON to named tensors, in rows (TensorFlow Serving's `instances`) and in columns (its `inputs`, and the
//! application API's `input`).

use std::fmt;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Map, Value};

use super::Datatype;
use super::inputs::{self, Tensor, Values};
use super::signature::{Form, TensorSpec, Written};
use crate::{Error, Result};

/// How a request writes its tensors, and so how it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `[row, row]`, each a value or an object of them.
    Rows,
    /// `{name: tensor}`, or a lone tensor.
    Columns,
}

/// The tensors of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Given {
    pub layout: Layout,
    /// The field of the request.
    root: &'static str,
    /// Whether values stood under their names.
    pub is_named: bool,
    /// In the order of the form, without optional ones that are not there. Dimensions behind an empty one
    /// are missing.
    pub tensors: Vec<Tensor>,
}

impl Given {
    /// How the client would name row `i` of an input.
    pub fn row_name(&self, input: &TensorSpec, i: usize) -> String {
        let name = self.is_named.then_some(&*input.name);
        match self.layout {
            Layout::Rows => Place { row: Some(i), ..Place::new(self.root, name) }.to_string(),
            Layout::Columns => Place { indices: vec![i], ..Place::new(self.root, name) }.to_string(),
        }
    }

    /// How the client would name all rows.
    pub fn rows_name(&self, input: &TensorSpec) -> String {
        let name = self.is_named.then_some(&*input.name).filter(|_| self.layout == Layout::Columns);
        Place::new(self.root, name).to_string()
    }

    /// From "text[1]" to where the client wrote that: `text` alone is of the only input, or of all.
    ///
    /// `num_inputs` is 0 where it is not known yet.
    pub fn rename(&self, error: Error, form: &Form, num_inputs: usize) -> Error {
        let ours = |field: String| {
            let (name, position) = field.split_once('[').unwrap_or((&field, ""));
            let Some(spec) = form.tensors.iter().find(|spec| spec.name == name) else { return field };
            match position.strip_suffix(']').map(str::parse::<usize>) {
                Some(Ok(i)) => self.row_name(spec, i),
                _ if num_inputs == 1 => self.row_name(spec, 0),
                _ => self.rows_name(spec),
            }
        };
        error.with_field(ours)
    }
}

/// Reads the field `root`: a list of values, or of objects with a value an input.
///
/// Errors: `Malformed` naming the first value that is not as the form says, or as the rows before it.
pub fn read_rows(root: &'static str, instances: Value, form: &Form) -> Result<Given> {
    let place = Place::new(root, None);
    let Value::Array(instances) = instances else {
        return Err(place.malformed(format!("expected a list of instances, got {}", word(&instances))));
    };
    let is_named = instances.first().is_some_and(|first| is_named(first, form));
    let is_there = |spec: &TensorSpec| match instances.first() {
        Some(Value::Object(fields)) if is_named => fields.contains_key(&*spec.name),
        _ => false,
    };
    let mut builders = builders(form, is_there);
    builders.iter_mut().for_each(|builder| builder.shape.push(instances.len()));
    for (i, instance) in instances.into_iter().enumerate() {
        let row = Place { row: Some(i), ..Place::new(root, None) };
        if !is_named {
            let [builder] = &mut builders[..] else {
                return Err(row.malformed(format!("expected an object of {}", names(form))));
            };
            if i > 0 && self::is_named(&instance, form) {
                return Err(
                    row.malformed(format!("expected {}, as the first instance is, got an object", builder.kind))
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
            builder.fill(value, 1, &mut Place { row: Some(i), ..Place::new(root, Some(&spec.name)) })?;
        }
        refuse_rest(&fields, form, &row)?;
    }
    Ok(Given { layout: Layout::Rows, root, is_named, tensors: builders.into_iter().map(Builder::done).collect() })
}

/// Reads the field `root`: a tensor, or an object of tensors by their names.
///
/// Errors: as [`read_rows`].
pub fn read_columns(root: &'static str, inputs: Value, form: &Form) -> Result<Given> {
    let place = Place::new(root, None);
    let is_named = is_named(&inputs, form);
    let is_there = |spec: &TensorSpec| inputs.as_object().is_some_and(|fields| fields.contains_key(&*spec.name));
    let mut builders = builders(form, is_there);
    match (inputs, &mut builders[..]) {
        (Value::Object(mut fields), builders) if is_named => {
            for builder in builders.iter_mut() {
                let spec = builder.spec;
                let value = take(&mut fields, spec, &place)?;
                builder.fill(value, 0, &mut Place::new(root, Some(&spec.name)))?;
            }
            refuse_rest(&fields, form, &place)?;
        }
        (value, [builder]) => builder.fill(value, 0, &mut Place::new(root, None))?,
        (_, _) => return Err(place.malformed(format!("expected an object of {}", names(form)))),
    }
    Ok(Given { layout: Layout::Columns, root, is_named, tensors: builders.into_iter().map(Builder::done).collect() })
}

/// An object is one of named values, unless it can only be bytes: a lone `b64` where a form has a lone input.
fn is_named(value: &Value, form: &Form) -> bool {
    match value {
        Value::Object(fields) => {
            form.tensors.iter().filter(|spec| !spec.is_optional).count() > 1 || bytes_of(fields).is_none()
        }
        _ => false,
    }
}

/// One a tensor that the request has: those that it must have, and those it may have that are there.
fn builders(form: &Form, is_there: impl Fn(&TensorSpec) -> bool) -> Vec<Builder<'_>> {
    let is_needed = |spec: &&TensorSpec| !spec.is_optional || is_there(spec);
    form.tensors.iter().filter(is_needed).map(|spec| Builder::new(spec, form.written)).collect()
}

/// The text of `{"b64": "…"}`.
fn bytes_of(fields: &Map<String, Value>) -> Option<&str> {
    match (fields.len(), fields.get("b64")) {
        (1, Some(Value::String(text))) => Some(text),
        _ => None,
    }
}

fn take(fields: &mut Map<String, Value>, spec: &TensorSpec, place: &Place) -> Result<Value> {
    fields.remove(&*spec.name).ok_or_else(|| place.malformed(format!("the input `{}` is missing", spec.name)))
}

fn refuse_rest(fields: &Map<String, Value>, form: &Form, place: &Place) -> Result<()> {
    match fields.keys().next() {
        None => Ok(()),
        Some(name) => {
            let reason = format!("no input is named `{name}`; known: {}", names(form));
            Err(place.malformed(reason))
        }
    }
}

fn names(form: &Form) -> String {
    let names: Vec<String> = form.tensors.iter().map(|spec| format!("`{}`", spec.name)).collect();
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

/// What the values of a tensor are in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Bytes,
    Ints,
    /// Numbers that a model computes on, to the nearest f32.
    Floats,
    /// Those that must be whole, and exact in f32.
    Whole,
}

/// What a value is called in refusals.
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Bytes => "a text, or bytes as {\"b64\": \"…\"}",
            Self::Ints | Self::Whole => "a whole number",
            Self::Floats => "a number",
        })
    }
}

/// A tensor that is being read.
struct Builder<'a> {
    spec: &'a TensorSpec,
    kind: Kind,
    /// Of the dimensions that were seen; the first list at each level sets it for all others.
    shape: Vec<usize>,
    values: Values,
}

impl<'a> Builder<'a> {
    fn new(spec: &'a TensorSpec, written: Written) -> Self {
        let is_whole = spec.datatype.is_integer() || spec.datatype == Datatype::Bool;
        let (kind, values) = match (written, spec.datatype) {
            (Written::Tensors, _) => (if is_whole { Kind::Whole } else { Kind::Floats }, Values::Floats(Vec::new())),
            (_, Datatype::Bytes) => (Kind::Bytes, Values::Bytes(Vec::new())),
            _ => (Kind::Ints, Values::Ints(Vec::new())),
        };
        Self { spec, kind, shape: Vec::new(), values }
    }

    fn done(self) -> Tensor {
        Tensor { name: self.spec.name.to_string(), shape: self.shape, values: self.values }
    }

    /// Appends the values of `value`, which lies below `level` lists.
    fn fill(&mut self, value: Value, level: usize, place: &mut Place) -> Result<()> {
        let rank = self.spec.shape.len();
        let items = match value {
            Value::Array(items) if level < rank => items,
            value if level == rank => return self.push(value, place),
            value => {
                return Err(place.malformed(format!("expected a list of {}, got {}", self.kind, word(&value))));
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
        let kind = self.kind;
        let other = |value: &Value| Err(place.malformed(format!("expected {kind}, got {}", word(value))));
        match (&mut self.values, value) {
            (Values::Bytes(texts), Value::String(text)) => texts.push(text.into_bytes()),
            (Values::Bytes(texts), Value::Object(fields)) => match bytes_of(&fields) {
                Some(text) => texts.push(decode(text, place)?),
                None => return other(&Value::Object(fields)),
            },
            (Values::Ints(numbers), Value::Number(number)) => match number.as_i64() {
                Some(number) => numbers.push(number),
                None => return Err(place.malformed(format!("expected {kind} of 64 bits, got {number}"))),
            },
            (Values::Floats(numbers), Value::Bool(is)) => numbers.push(if is { 1.0 } else { 0.0 }),
            (Values::Floats(numbers), Value::Number(number)) if kind == Kind::Whole => match number.as_i64() {
                Some(int) => match inputs::whole(int) {
                    Some(number) => numbers.push(number),
                    None => return Err(place.malformed(format!("got {int}: {}", inputs::NOT_EXACT))),
                },
                None => return Err(place.malformed(format!("expected {kind}, got {number}"))),
            },
            (Values::Floats(numbers), Value::Number(number)) => match number.as_f64().and_then(inputs::float) {
                Some(number) => numbers.push(number),
                None => return Err(place.malformed(format!("expected {kind} of 32 bits, got {number}"))),
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
    /// The field of the request.
    root: &'static str,
    /// Of rows: which one.
    row: Option<usize>,
    /// The input, where values stand under their names.
    name: Option<&'a str>,
    /// Positions in the lists below.
    indices: Vec<usize>,
}

impl<'a> Place<'a> {
    fn new(root: &'static str, name: Option<&'a str>) -> Self {
        Self { root, row: None, name, indices: Vec::new() }
    }

    fn malformed(&self, reason: String) -> Error {
        Error::Malformed { field: self.to_string(), reason }
    }
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.root)?;
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

    fn form(written: Written, inputs: &[(&'static str, Datatype, &[Option<usize>])]) -> Form {
        let spec = |(name, datatype, shape): &(&'static str, Datatype, &[Option<usize>])| TensorSpec {
            name: (*name).into(),
            datatype: *datatype,
            shape: shape.to_vec(),
            is_optional: *name == "mask",
        };
        Form { written, tensors: inputs.iter().map(spec).collect() }
    }

    fn read_rows(rows: Value, form: &Form) -> Result<Given> {
        super::read_rows("instances", rows, form)
    }

    fn read_columns(columns: Value, form: &Form) -> Result<Given> {
        super::read_columns("inputs", columns, form)
    }

    fn two() -> Form {
        form(Written::Tensors, &[("flags", Datatype::Int64, &[None]), ("sizes", Datatype::Fp32, &[None, Some(2)])])
    }

    fn files() -> Form {
        form(Written::Images, &[("image", Datatype::Bytes, &[None])])
    }

    fn masked_ids() -> Form {
        let shape: &[Option<usize>] = &[None, None];
        form(Written::TokenIds, &[("input_ids", Datatype::Int64, shape), ("mask", Datatype::Int64, shape)])
    }

    #[test]
    fn what_is_optional_may_be_there_or_not() {
        let ids = masked_ids();
        let named = read_rows(json!([{"input_ids": [1, 2], "mask": [1, 0]}]), &ids).unwrap();
        assert_eq!(named.tensors.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["input_ids", "mask"]);
        for given in [read_rows(json!([[1, 2]]), &ids), read_rows(json!([{"input_ids": [1, 2]}]), &ids)] {
            assert_eq!(given.unwrap().tensors.len(), 1);
        }
        let columns = read_columns(json!({"mask": [[1]], "input_ids": [[1]]}), &ids).unwrap();
        assert_eq!(columns.tensors.len(), 2);
        let error = read_rows(json!([{"input_ids": [1], "mask": [1]}, {"input_ids": [1]}]), &ids).unwrap_err();
        assert!(error.to_string().contains("instances[1]: the input `mask` is missing"), "{error}");
    }

    #[test]
    fn both_forms_of_several_inputs_are_the_same_tensors() {
        let rows = json!([{"flags": 7, "sizes": [1, 2.5]}, {"sizes": [3, 4], "flags": true}]);
        let columns = json!({"flags": [7, true], "sizes": [[1, 2.5], [3, 4]]});
        let tensor = |name: &str, shape: &[usize], values: &[f32]| Tensor {
            name: name.into(),
            shape: shape.to_vec(),
            values: Values::Floats(values.to_vec()),
        };
        let expected = vec![tensor("flags", &[2], &[7.0, 1.0]), tensor("sizes", &[2, 2], &[1.0, 2.5, 3.0, 4.0])];
        for given in [read_rows(rows, &two()).unwrap(), read_columns(columns, &two()).unwrap()] {
            assert!(given.is_named);
            assert_eq!(given.tensors, expected);
        }
    }

    #[test]
    fn every_fault_is_named_by_its_place() {
        let ids = form(Written::TokenIds, &[("input_ids", Datatype::Int64, &[None, None])]);
        let refused = |given: Result<Given>| match given {
            Err(Error::Malformed { field, reason }) => format!("{field}: {reason}"),
            other => panic!("{other:?}"),
        };
        for (rows, form, says) in [
            (json!("w1"), &ids, "instances: expected a list of instances, got a text"),
            (json!([[1, 2], [3]]), &ids, "instances[1]: expected 2 values, as the rows before have, got 1"),
            (json!([{"input_ids": [1]}, {"input_ids": []}]), &ids, "instances[1].input_ids: expected 1 values"),
            (json!([[1], {"input_ids": [1]}]), &ids, "instances[1]: expected a whole number, as the first instance is"),
            (json!([{"input_ids": [1]}, [1]]), &ids, "instances[1]: expected an object, as the first instance is, got"),
            (
                json!([{"input_ids": [1], "more": 2}]),
                &ids,
                "instances[0]: no input is named `more`; known: `input_ids`",
            ),
            (json!([[1, 2.5]]), &ids, "instances[0][1]: expected a whole number of 64 bits, got 2.5"),
            (json!([[1, [2]]]), &ids, "instances[0][1]: expected a whole number, got a list"),
            (json!([7]), &ids, "instances[0]: expected a list of a whole number, got a number"),
            (json!(["w1"]), &two(), "instances[0]: expected an object of `flags`, `sizes`"),
            (json!([{"b64": "AP8="}]), &two(), "instances[0]: the input `flags` is missing"),
            (json!([{"b64": "?"}]), &files(), "instances[0]: not base64"),
            (json!([7]), &files(), "instances[0]: expected a text, or bytes"),
            (json!([{"flags": 1, "sizes": [1]}]), &two(), "instances[0].sizes: `sizes` has 2 values here, got 1"),
            (json!([{"flags": 1, "sizes": [1, 1e39]}]), &two(), "instances[0].sizes[1]: expected a number of 32"),
            (json!([{"flags": 1.5, "sizes": [1, 1]}]), &two(), "instances[0].flags: expected a whole number, got 1.5"),
            (json!([{"flags": 16777217, "sizes": [1, 1]}]), &two(), "instances[0].flags: got 16777217: models"),
        ] {
            let got = refused(read_rows(rows, form));
            assert!(got.contains(says), "`{got}` does not say `{says}`");
        }
        for (columns, form, says) in [
            (json!({"input_ids": [[1, 2], [3]]}), &ids, "inputs.input_ids[1]: expected 2 values"),
            (json!([[1, 2], 3]), &ids, "inputs[1]: expected a list"),
            (json!({"ids": [[1]]}), &ids, "inputs: the input `input_ids` is missing"),
            (json!([[1, 2]]), &two(), "inputs: expected an object of"),
        ] {
            let got = refused(read_columns(columns, form));
            assert!(got.contains(says), "`{got}` does not say `{says}`");
        }
    }

    #[test]
    fn rows_are_named_as_the_client_wrote_them() {
        let ids = form(Written::TokenIds, &[("input_ids", Datatype::Int64, &[None, None])]);
        let name = |given: Result<Given>| given.unwrap().row_name(&ids.tensors[0], 1);
        assert_eq!(name(read_rows(json!([[1], [2]]), &ids)), "instances[1]");
        assert_eq!(name(read_rows(json!([{"input_ids": [1]}, {"input_ids": [2]}]), &ids)), "instances[1].input_ids");
        assert_eq!(name(read_columns(json!([[1], [2]]), &ids)), "inputs[1]");
        assert_eq!(name(read_columns(json!({"input_ids": [[1], [2]]}), &ids)), "inputs.input_ids[1]");
    }
}
