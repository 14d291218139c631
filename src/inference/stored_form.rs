//! Inputs and parameters as records hold them, and the way back.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use super::keep::KeptInput;
use super::outcome::number;
use crate::model::DEFAULT_TOP_K;
use crate::model::signature::TensorSpec;
use crate::request::{Input, Task, TaskParams, Truncation, TruncationDirection};
use crate::store::record::StoredInput;

/// Inputs as they are kept: a list of texts, of pairs of texts, of lists of token ids, of
/// `{"token_ids": [u32], "token_type_ids": [u32]}`, of `{"image": base64}` and of `{"values": [f32]}`.
pub fn input_value(inputs: &[Input]) -> serde_json::Value {
    let value = |input: &Input| match input {
        Input::Text(text) => serde_json::Value::from(text.as_str()),
        Input::Pair(first, second) => serde_json::json!([first, second]),
        Input::TokenIds(ids) => serde_json::Value::from(ids.as_slice()),
        Input::TypedTokenIds { ids, types } => serde_json::json!({"token_ids": ids, "token_type_ids": types}),
        Input::Image(file) => serde_json::json!({"image": BASE64_STANDARD.encode(file)}),
        Input::Values(values) => {
            serde_json::json!({"values": values.iter().copied().map(number).collect::<Vec<_>>()})
        }
    };
    serde_json::Value::Array(inputs.iter().map(value).collect())
}

/// As [`input_value`], with rows of tensors by their names: `{"tensors": [{"name": "x", "data": [1, 2]}]}`, in the model's
/// order. Rows that these tensors do not make up stay as they are.
fn named_value(inputs: &[Input], tensors: &[TensorSpec]) -> Value {
    let num_values: usize = tensors.iter().map(TensorSpec::num_values).sum();
    let mut value = input_value(inputs);
    let elements = value.as_array_mut().into_iter().flatten();
    for (element, input) in elements.zip(inputs) {
        let Input::Values(values) = input else { continue };
        if values.len() == num_values && !tensors.is_empty() {
            let mut values = values.iter().copied();
            let named = |spec: &TensorSpec| json!({"name": spec.name, "data": nested(&mut values, &spec.shape, spec)});
            *element = json!({"tensors": tensors.iter().map(named).collect::<Vec<_>>()});
        }
    }
    value
}

/// The next values as lists in lists, by their shape.
fn nested(values: &mut impl Iterator<Item = f32>, shape: &[usize], spec: &TensorSpec) -> Value {
    match shape {
        [] if spec.dtype.is_integer() => values.next().map_or(Value::Null, |value| (value as i64).into()),
        [] => values.next().map_or(Value::Null, number),
        [len, inner @ ..] => (0..*len).map(|_| nested(values, inner, spec)).collect(),
    }
}

/// Inputs of a record as clients are shown them: rows of tensors as objects.
pub fn shown(inputs: &Value) -> Value {
    let of = |input: &Value| {
        let tensors = input.get("tensors").and_then(Value::as_array)?;
        let named = |tensor: &Value| Some((tensor["name"].as_str()?.to_string(), tensor["data"].clone()));
        tensors.iter().map(named).collect::<Option<serde_json::Map<_, _>>>().map(Value::Object)
    };
    match inputs {
        Value::Array(inputs) => inputs.iter().map(|input| of(input).unwrap_or_else(|| input.clone())).collect(),
        other => other.clone(),
    }
}

/// The numbers of a value, however they are nested. Returns whether there was nothing else.
fn flatten(value: &Value, numbers: &mut Vec<f32>) -> bool {
    match value {
        Value::Array(items) => items.iter().all(|item| flatten(item, numbers)),
        value => value.as_f64().map(|number| numbers.push(number as f32)).is_some(),
    }
}

/// The way back from [`input_value`], and from the input of a record. What is none of these stands for nothing.
pub fn inputs_of(value: &serde_json::Value) -> Vec<Input> {
    let input = |value: &serde_json::Value| match value {
        serde_json::Value::String(text) => Some(Input::Text(text.clone())),
        serde_json::Value::Array(pair) if pair.first().is_some_and(serde_json::Value::is_string) => {
            let [serde_json::Value::String(first), serde_json::Value::String(second)] = pair.as_slice() else {
                return None;
            };
            Some(Input::Pair(first.clone(), second.clone()))
        }
        serde_json::Value::Array(_) => ids_of(value).map(Input::TokenIds),
        serde_json::Value::Object(fields) if fields.contains_key("tensors") => {
            let mut values = Vec::new();
            let tensors = fields["tensors"].as_array()?;
            let is_whole = tensors.iter().all(|tensor| flatten(&tensor["data"], &mut values));
            is_whole.then(|| Input::Values(values.into()))
        }
        serde_json::Value::Object(fields) => match (fields.get("image"), fields.get("values"), fields.get("token_ids"))
        {
            (Some(serde_json::Value::String(file)), ..) => {
                BASE64_STANDARD.decode(file).ok().map(|file| Input::Image(file.into()))
            }
            (_, Some(serde_json::Value::Array(values)), _) => {
                let values: Option<Vec<f32>> = values.iter().map(|v| v.as_f64().map(|v| v as f32)).collect();
                values.map(|values| Input::Values(values.into()))
            }
            (.., Some(ids)) => {
                let (ids, types) = (ids_of(ids)?, ids_of(fields.get("token_type_ids")?)?);
                (ids.len() == types.len()).then(|| Input::of_ids(ids, types))
            }
            _ => None,
        },
        _ => None,
    };
    value.as_array().map(|values| values.iter().filter_map(input).collect()).unwrap_or_default()
}

/// What is kept of inputs; `tensors` are the inputs of a tensor model.
pub fn stored_input(inputs: &[Input], kept: KeptInput, tensors: &[TensorSpec]) -> StoredInput {
    match kept {
        KeptInput::Full => StoredInput::Full(named_value(inputs, tensors)),
        KeptInput::Hash => {
            StoredInput::Hash(blake3::hash(input_value(inputs).to_string().as_bytes()).to_hex().to_string())
        }
        KeptInput::None => StoredInput::None,
    }
}

/// The parameters of a request as an object, in the application API's words; what is left to the model is left out.
pub fn parameters_of(params: &TaskParams) -> serde_json::Value {
    let mut object = serde_json::Map::new();
    if params.task != Task::Embed {
        object.insert("task".to_string(), params.task.as_str().into());
    }
    if let Task::FillMask { top_k, targets } = &params.task {
        object.insert("top_k".to_string(), (*top_k).into());
        if let Some(targets) = targets {
            object.insert("targets".to_string(), targets.to_vec().into());
        }
    }
    if let Some(normalize) = params.normalize {
        object.insert("normalize".to_string(), normalize.into());
    }
    if let Some(dimensions) = params.dimensions {
        object.insert("dimensions".to_string(), dimensions.into());
    }
    if let Some(name) = &params.prompt_name {
        object.insert("prompt_name".to_string(), name.as_str().into());
    }
    let truncate = match params.truncation {
        Truncation::Refuse | Truncation::Chunk { .. } => None,
        Truncation::Cut(TruncationDirection::Right) => Some("right"),
        Truncation::Cut(TruncationDirection::Left) => Some("left"),
    };
    if let Some(truncate) = truncate {
        object.insert("truncate".to_string(), truncate.into());
    }
    if let Truncation::Chunk { overlap } = params.truncation {
        object.insert("chunk_overlap".to_string(), overlap.into());
    }
    serde_json::Value::Object(object)
}

fn ids_of(value: &serde_json::Value) -> Option<Vec<u32>> {
    value.as_array()?.iter().map(id).collect()
}

fn id(value: &serde_json::Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// The way back from [`parameters_of`], for records that this server wrote.
pub fn params_of(parameters: &serde_json::Value) -> TaskParams {
    let truncation = match parameters["truncate"].as_str() {
        Some("right") => Truncation::Cut(TruncationDirection::Right),
        Some("left") => Truncation::Cut(TruncationDirection::Left),
        _ => match parameters["chunk_overlap"].as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(overlap) => Truncation::Chunk { overlap },
            None => Truncation::Refuse,
        },
    };
    let targets = || parameters["targets"].as_array().map(|ids| ids.iter().filter_map(id).collect());
    let task = match parameters["task"].as_str() {
        Some("embed_all") => Task::EmbedAll,
        Some("sparse") => Task::Sparse,
        Some("classify") => Task::Classify,
        Some("token_classify") => Task::TokenClassify,
        Some("infer") => Task::Infer,
        Some("fill_mask") => {
            Task::FillMask { top_k: id(&parameters["top_k"]).unwrap_or(DEFAULT_TOP_K), targets: targets() }
        }
        _ => Task::Embed,
    };
    TaskParams {
        task,
        normalize: parameters["normalize"].as_bool(),
        dimensions: parameters["dimensions"].as_u64().and_then(|n| usize::try_from(n).ok()),
        truncation,
        prompt_name: parameters["prompt_name"].as_str().map(str::to_string),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::signature::Datatype;

    #[test]
    fn inputs_come_back_as_they_were_kept() {
        let inputs = vec![
            Input::Text("a \"b\"".into()),
            Input::TokenIds(vec![0, u32::MAX]),
            Input::TokenIds(vec![]),
            Input::of_ids(vec![7, 8], vec![0, 1]),
            Input::Pair("q".into(), "".into()),
            Input::Image(vec![0, 255, 10].into()),
            Input::Values([0.1, -3e30, 0.0].into()),
        ];
        assert_eq!(inputs_of(&input_value(&inputs)), inputs);
        let uneven = serde_json::json!([{"token_ids": [1, 2], "token_type_ids": [1]}, {"token_ids": [1]}]);
        assert_eq!(inputs_of(&uneven), []);
        assert!(matches!(stored_input(&inputs, KeptInput::Hash, &[]), StoredInput::Hash(hash) if hash.len() == 64));
        assert_ne!(stored_input(&inputs, KeptInput::Hash, &[]), stored_input(&inputs[..1], KeptInput::Hash, &[]));
        assert_eq!(stored_input(&inputs, KeptInput::None, &[]), StoredInput::None);
    }

    #[test]
    fn rows_of_tensors_are_kept_by_name_and_come_back_bit_by_bit() {
        let spec = |name: &str, dtype, shape: &[usize]| TensorSpec { name: name.into(), dtype, shape: shape.to_vec() };
        // Not in the order of the alphabet, which objects are in.
        let tensors = [spec("x", Datatype::F32, &[2, 1]), spec("n", Datatype::I64, &[])];
        let inputs: Vec<Input> =
            [[0.1, -0.0, 7.0], [1e-45, f32::MAX, -16777216.0]].map(|row: [f32; 3]| Input::Values(row.into())).to_vec();
        let StoredInput::Full(kept) = stored_input(&inputs, KeptInput::Full, &tensors) else { panic!("all of it") };
        let bits = |inputs: &[Input]| -> Vec<Vec<u32>> {
            let values = |input: &Input| match input {
                Input::Values(values) => values.iter().map(|value| value.to_bits()).collect(),
                other => panic!("{other:?}"),
            };
            inputs.iter().map(values).collect()
        };
        // Through text, as stores have it.
        let kept: Value = serde_json::from_str(&kept.to_string()).unwrap();
        assert_eq!(bits(&inputs_of(&kept)), bits(&inputs));
        assert_eq!(shown(&kept)[0], json!({"x": [[0.1], [-0.0]], "n": 7}));
        // Rows of another model, and other inputs, are shown and kept as ever.
        let others = vec![Input::Values([1.0].into()), Input::Text("tensors".into())];
        assert_eq!(named_value(&others, &tensors), input_value(&others));
        assert_eq!(shown(&input_value(&others)), input_value(&others));
        assert_eq!(inputs_of(&json!([{"tensors": [{"name": "x", "data": ["a"]}]}])), vec![]);
    }

    #[test]
    fn parameters_come_back_as_they_were_kept() {
        let params = TaskParams {
            task: Task::FillMask { top_k: 3, targets: Some([7, 9].into()) },
            normalize: Some(false),
            dimensions: Some(64),
            truncation: Truncation::Cut(TruncationDirection::Left),
            prompt_name: Some("query".into()),
        };
        assert_eq!(params_of(&parameters_of(&params)), params);
        let chunks = TaskParams { truncation: Truncation::Chunk { overlap: 16 }, ..TaskParams::default() };
        assert_eq!(params_of(&parameters_of(&chunks)), chunks);
        assert_eq!(params_of(&parameters_of(&TaskParams::default())), TaskParams::default());
        assert_eq!(parameters_of(&TaskParams::default()), serde_json::json!({}));
    }
}
