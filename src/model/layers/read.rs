//! A list of layers out of a manifest.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use toml::de::DeValue;

use super::list::{InputSpec, Kind, LayerList, LayerSpec};
use crate::model::section::{Faults, Section};

/// Takes `inputs`, `outputs` and `layers` of a version; `None` where there is none of them.
pub(in crate::model) fn read(section: &mut Section, faults: &mut Faults) -> Option<LayerList> {
    if !["inputs", "outputs", "layers"].iter().any(|key| section.has(key)) {
        return None;
    }
    let outputs = section.list("outputs", faults);
    let inputs = elements(section, "inputs", faults, from_value::<InputSpec>);
    let layers = elements(section, "layers", faults, layer);
    Some(LayerList { inputs, outputs, layers })
}

/// The elements of a list of tables, each read by itself; what is wrong with one is a fault of its number.
fn elements<T>(
    section: &mut Section,
    key: &str,
    faults: &mut Faults,
    read: impl Fn(Value) -> Result<T, String>,
) -> Vec<T> {
    let Some(value) = section.take(key) else { return Vec::new() };
    let Some(list) = value.as_array() else {
        faults.key(section, key, "must be a list of tables");
        return Vec::new();
    };
    let mut found = Vec::with_capacity(list.len());
    for (i, element) in list.iter().enumerate() {
        match read(json(element.get_ref())) {
            Ok(element) => found.push(element),
            Err(reason) => faults.at(Some(element.span()), &format!("{}.{key}[{i}]: {reason}", section.path())),
        }
    }
    found
}

/// A layer: its name, what it reads, and the words of its kind.
pub(in crate::model) fn layer(value: Value) -> Result<LayerSpec, String> {
    let Value::Object(mut fields) = value else { return Err("must be a table".to_string()) };
    let name = from_value(fields.remove("name").ok_or("`name` is missing")?).map_err(|e| format!("name: {e}"))?;
    let inputs = fields.remove("inputs").map_or_else(|| Ok(Vec::new()), from_value);
    let weights = fields.remove("weights").map(from_value).transpose();
    let has_more = fields.len() > 1;
    let kind: Kind = from_value(Value::Object(fields))?;
    if has_more && is_bare(&kind) {
        return Err(format!("kind `{}` has no further keys", kind.word()));
    }
    Ok(LayerSpec {
        name,
        inputs: inputs.map_err(|e| format!("inputs: {e}"))?,
        weights: weights.map_err(|e| format!("weights: {e}"))?,
        kind,
    })
}

/// Whether a kind is a word alone: of these serde passes over keys that it does not know.
fn is_bare(kind: &Kind) -> bool {
    use Kind::*;
    matches!(
        kind,
        Embedding
            | Reverse
            | Prelu
            | Flatten
            | Identity
            | Add
            | Subtract
            | Multiply
            | Divide
            | Average
            | Maximum
            | Minimum
    )
}

fn from_value<T: DeserializeOwned>(value: Value) -> Result<T, String> {
    serde_json::from_value(value).map_err(|e| e.to_string())
}

/// The value as JSON has it, which serde reads by any type's rules.
fn json(value: &DeValue) -> Value {
    match value {
        DeValue::String(text) => Value::from(text.as_ref()),
        DeValue::Integer(number) => {
            i64::from_str_radix(number.as_str(), number.radix()).map_or(Value::Null, Value::from)
        }
        DeValue::Float(number) => number.as_str().parse::<f64>().map_or(Value::Null, Value::from),
        DeValue::Boolean(value) => Value::from(*value),
        DeValue::Datetime(time) => Value::from(time.to_string()),
        DeValue::Array(list) => list.iter().map(|value| json(value.get_ref())).collect(),
        DeValue::Table(table) => {
            let fields = table.iter().map(|(key, value)| (key.get_ref().to_string(), json(value.get_ref())));
            Value::Object(fields.collect::<Map<_, _>>())
        }
    }
}
