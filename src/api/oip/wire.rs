//! What a request says: its wire types, and the way from the bytes of a body to tensors.

use axum::http::HeaderName;
use bytes::Bytes;
use serde::Deserialize;
use utoipa::ToSchema;

use super::elements::Elements;
use super::tensor::{Data, Tensor};
use crate::api::tensors::Datatype;
use crate::api::{body, tei};
use crate::{Error, Result};

/// Length of the JSON that begins a body, where tensors follow it.
pub const HEAD_LEN: HeaderName = HeaderName::from_static("inference-header-content-length");

/// The body of a request, or the JSON that begins it. Fields not listed are ignored.
#[derive(Debug, Deserialize, ToSchema)]
pub struct InferBody {
    /// Comes back in the answer.
    pub id: Option<String>,
    pub parameters: Option<InferParameters>,
    pub inputs: Vec<InputTensor>,
    /// All outputs, where there are none here.
    pub outputs: Option<Vec<OutputRequest>>,
}

/// Parameters of a request. Those not listed are ignored.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct InferParameters {
    /// Taken as Triton's clients send it, and not used: no client goes before another.
    #[serde(rename = "priority")]
    #[schema(rename = "priority")]
    pub _priority: Option<u64>,
    /// Microseconds after which nobody waits any more; 0 and more than the server allows mean what it allows.
    pub timeout: Option<u64>,
    /// Write the outputs that do not say otherwise as binary tensors.
    #[schema(default = false)]
    pub binary_data_output: Option<bool>,
    /// One of the tasks in the model's configuration, which has tensors of its own; what the model was made for unless
    /// said.
    #[schema(example = "embed_all")]
    pub task: Option<String>,
    /// Of classes: their scores as the model gives them, not softmax or sigmoid of these.
    #[schema(default = false)]
    pub raw_scores: Option<bool>,
    /// Of masks: how many tokens are named for each.
    #[schema(minimum = 1, default = 5)]
    pub top_k: Option<u32>,
    /// Scale each embedding to length 1; the model's own way unless said.
    pub normalize: Option<bool>,
    /// Keep the first so many values of each embedding.
    #[schema(minimum = 1)]
    pub dimensions: Option<usize>,
    /// Cut inputs that are longer than the model takes; false unless said otherwise: they are refused.
    #[schema(default = false)]
    pub truncate: Option<bool>,
    pub truncation_direction: Option<tei::Direction>,
    /// One of the model's prompts, put before every text.
    pub prompt_name: Option<String>,
}

/// A tensor of a request.
#[derive(Debug, Deserialize, ToSchema)]
pub struct InputTensor {
    /// A name of the model's metadata.
    #[schema(example = "text")]
    pub name: String,
    pub shape: Vec<usize>,
    pub datatype: Datatype,
    pub parameters: Option<InputParameters>,
    /// The elements in row-major order, in one list or nested as the shape is. Missing for a binary tensor.
    #[schema(value_type = Option<Vec<serde_json::Value>>)]
    pub data: Option<Elements>,
}

/// Parameters of an input.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct InputParameters {
    /// The elements are so many bytes behind the JSON, after those of the inputs before.
    pub binary_data_size: Option<usize>,
    /// Refused: this server maps no memory of its clients.
    pub shared_memory_region: Option<String>,
}

/// An output that is asked for.
#[derive(Debug, Deserialize, ToSchema)]
pub struct OutputRequest {
    #[schema(example = "embedding")]
    pub name: String,
    pub parameters: Option<OutputParameters>,
}

/// Parameters of an output.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct OutputParameters {
    /// Write this one as a binary tensor, or not.
    pub binary_data: Option<bool>,
    /// Of classes' scores: answer the best so many as texts, "score:place:label", instead of all as numbers.
    pub classification: Option<u64>,
    /// Refused: this server maps no memory of its clients.
    pub shared_memory_region: Option<String>,
}

/// The answer, or the JSON that begins it, for the document: it is written by hand.
#[derive(ToSchema)]
#[allow(dead_code)]
pub struct InferAnswer {
    #[schema(example = "all-MiniLM-L6-v2")]
    pub model_name: String,
    #[schema(example = "1")]
    pub model_version: String,
    pub id: Option<String>,
    pub outputs: Vec<AnsweredTensor>,
}

/// An output of the answer.
#[derive(ToSchema)]
#[allow(dead_code)]
pub struct AnsweredTensor {
    #[schema(example = "embedding")]
    pub name: String,
    pub datatype: Datatype,
    pub shape: Vec<usize>,
    /// The elements in row-major order: numbers, or texts for BYTES. Missing for a binary tensor.
    pub data: Option<Vec<serde_json::Value>>,
    /// Of a binary tensor: `binary_data_size`.
    pub parameters: Option<serde_json::Value>,
}

/// A request with its tensors in hand.
#[derive(Debug)]
pub struct Asking {
    pub id: Option<String>,
    pub parameters: InferParameters,
    pub tensors: Vec<Tensor>,
    pub outputs: Vec<OutputRequest>,
}

/// From the bytes of a body to its tensors, which stay where they are in it.
///
/// Errors: `Malformed` for a head that is longer than the body, for JSON of another form, for tensors without elements or
/// with two kinds of them, and for bytes that are too few or left over; `Invalid` for shared memory.
pub fn asking_of(mut bytes: Bytes, head_len: Option<usize>) -> Result<Asking> {
    let body_len = bytes.len();
    let head_len = head_len.unwrap_or(body_len);
    if head_len > body_len {
        return Err(malformed(HEAD_LEN.as_str(), format!("is {head_len}, the body has {body_len} bytes")));
    }
    let head = bytes.split_to(head_len);
    let InferBody { id, parameters, inputs, outputs } = body::parse(&head)?;
    let mut rest = bytes;
    let mut tensors = Vec::with_capacity(inputs.len());
    for (i, input) in inputs.into_iter().enumerate() {
        let InputTensor { name, shape, datatype, parameters, data } = input;
        let InputParameters { binary_data_size, shared_memory_region } = parameters.unwrap_or_default();
        if shared_memory_region.is_some() {
            return Err(no_shared_memory(&format!("inputs[{i}]")));
        }
        let data = match (data, binary_data_size) {
            (Some(elements), None) => Data::Listed(elements),
            (None, Some(len)) if len <= rest.len() => Data::Binary(rest.split_to(len)),
            (None, Some(len)) => {
                let reason = format!("is {len}, {} bytes are left behind the JSON", rest.len());
                return Err(malformed(&format!("inputs[{i}].parameters.binary_data_size"), reason));
            }
            (Some(_), Some(_)) => {
                return Err(malformed(&format!("inputs[{i}]"), "has both data and binary_data_size".to_string()));
            }
            (None, None) => return Err(malformed(&format!("inputs[{i}]"), "has no data".to_string())),
        };
        tensors.push(Tensor { name, datatype, shape, data });
    }
    if !rest.is_empty() {
        return Err(malformed("body", format!("{} bytes are left behind the last tensor", rest.len())));
    }
    let (parameters, outputs) = (parameters.unwrap_or_default(), outputs.unwrap_or_default());
    Ok(Asking { id, parameters, tensors, outputs })
}

/// What a tensor in shared memory is answered.
pub fn no_shared_memory(field: &str) -> Error {
    let reason = "this server maps no memory of its clients".to_string();
    Error::Invalid { field: format!("{field}.parameters.shared_memory_region"), reason }
}

/// `Malformed`, which nearly all faults of a form are.
pub fn malformed(field: &str, reason: String) -> Error {
    Error::Malformed { field: field.to_string(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    /// A head with these sizes of binary tensors.
    fn head(sizes: &[usize]) -> Vec<u8> {
        let input =
            |size| json!({"name": "text", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": size}});
        json!({"inputs": sizes.iter().map(input).collect::<Vec<_>>()}).to_string().into_bytes()
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            head_len in prop::option::of(prop_oneof![0usize..400, any::<usize>()]),
        ) {
            let _ = asking_of(bytes.into(), head_len);
        }

        #[test]
        fn tensors_are_cut_where_their_sizes_say(
            sizes in proptest::collection::vec(prop_oneof![20 => 0usize..50, 1 => Just(usize::MAX)], 0..5),
            wrong_by in prop_oneof![Just(0isize), -3isize..4],
            off in -3isize..4,
        ) {
            let head = head(&sizes);
            let total = sizes.iter().try_fold(0usize, |sum, &size| sum.checked_add(size)).filter(|&sum| sum < 1000);
            let tail_len = total.unwrap_or(100).saturating_add_signed(wrong_by);
            let tail: Vec<u8> = (0..tail_len).map(|i| i as u8).collect();
            let bytes: Bytes = [&head[..], &tail].concat().into();
            let is_whole = total == Some(tail.len());
            match asking_of(bytes.clone(), Some(head.len())) {
                Ok(asking) => {
                    prop_assert!(is_whole);
                    let parts = asking.tensors.into_iter().map(|t| if let Data::Binary(part) = t.data { part } else { panic!() });
                    prop_assert_eq!(parts.collect::<Vec<_>>().concat(), tail);
                }
                Err(_) => prop_assert!(!is_whole),
            }
            // A length that is wrong by a few bytes cuts the JSON or leaves something of it: never a panic.
            let _ = asking_of(bytes, head.len().checked_add_signed(off));
        }
    }

    #[test]
    fn what_is_wrong_with_a_tensor_is_named_by_its_place() {
        let refused = |inputs: serde_json::Value| {
            let bytes = json!({"inputs": inputs}).to_string().into_bytes();
            asking_of(bytes.into(), None).unwrap_err().to_string()
        };
        let input = |more: serde_json::Value| {
            let mut input = json!({"name": "text", "shape": [1], "datatype": "BYTES"});
            input.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json!([input])
        };
        for (inputs, says) in [
            (input(json!({})), "inputs[0]: has no data"),
            (input(json!({"data": ["a"], "parameters": {"binary_data_size": 0}})), "inputs[0]: has both"),
            (
                input(json!({"parameters": {"binary_data_size": 3}})),
                "inputs[0].parameters.binary_data_size: is 3, 0 bytes",
            ),
            (input(json!({"data": ["a"], "shape": [-1]})), "inputs[0].shape[0]"),
            (input(json!({"data": ["a"], "datatype": "STRING"})), "inputs[0].datatype"),
            (input(json!({"parameters": {"shared_memory_region": "r"}})), "inputs[0].parameters.shared_memory_region"),
        ] {
            let error = refused(inputs);
            assert!(error.starts_with(says), "`{error}` does not begin with `{says}`");
        }
        let long = asking_of(head(&[]).into(), Some(4096)).unwrap_err().to_string();
        assert!(long.starts_with("inference-header-content-length: is 4096"), "{long}");
    }
}
