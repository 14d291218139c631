//! `POST …/infer`: tensors in, tensors out.

use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use serde::Deserialize;
use utoipa::ToSchema;

use super::answer::{self, Form, Head, Written};
use super::elements::Elements;
use super::signature::{Inputs, OutputTensor, Signature, outputs_of};
use super::tensor::{Data, Datatype, Tensor};
use super::{Asked, ModelPath};
use crate::api::body::{self, Call};
use crate::api::docs::Refusals;
use crate::api::phases::{Served, attach};
use crate::api::status::{Fault, JSON};
use crate::api::{ApiState, tei, write};
use crate::request::{EmbedParams, Request as Embed, Task};
use crate::{Error, Result};

/// Length of the JSON that begins a body, where tensors follow it.
const HEAD_LEN: HeaderName = HeaderName::from_static("inference-header-content-length");

const OCTETS: &str = "application/octet-stream";

/// The body of a request, or the JSON that begins it. Fields not listed are ignored.
#[derive(Debug, Deserialize, ToSchema)]
pub struct InferBody {
    /// Comes back in the answer.
    id: Option<String>,
    parameters: Option<InferParameters>,
    inputs: Vec<InputTensor>,
    /// All outputs, where there are none here.
    outputs: Option<Vec<OutputRequest>>,
}

/// Parameters of a request. Those not listed are ignored.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct InferParameters {
    /// Taken as Triton's clients send it, and not used: no client goes before another.
    #[serde(rename = "priority")]
    #[schema(rename = "priority")]
    _priority: Option<u64>,
    /// Microseconds after which nobody waits any more; 0 and more than the server allows mean what it allows.
    timeout: Option<u64>,
    /// Write the outputs that do not say otherwise as binary tensors.
    #[schema(default = false)]
    binary_data_output: Option<bool>,
    /// Scale each embedding to length 1; the model's own way unless said.
    normalize: Option<bool>,
    /// Keep the first so many values of each embedding.
    #[schema(minimum = 1)]
    dimensions: Option<usize>,
    /// Cut inputs that are longer than the model takes; false unless said otherwise: they are refused.
    #[schema(default = false)]
    truncate: Option<bool>,
    truncation_direction: Option<tei::Direction>,
    /// One of the model's prompts, put before every text.
    prompt_name: Option<String>,
}

/// A tensor of a request.
#[derive(Debug, Deserialize, ToSchema)]
pub struct InputTensor {
    /// A name of the model's metadata.
    #[schema(example = "text")]
    name: String,
    shape: Vec<usize>,
    datatype: Datatype,
    parameters: Option<InputParameters>,
    /// The elements in row-major order, in one list or nested as the shape is. Missing for a binary tensor.
    #[schema(value_type = Option<Vec<serde_json::Value>>)]
    data: Option<Elements>,
}

/// Parameters of an input.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct InputParameters {
    /// The elements are so many bytes behind the JSON, after those of the inputs before.
    binary_data_size: Option<usize>,
    /// Refused: this server maps no memory of its clients.
    shared_memory_region: Option<String>,
}

/// An output that is asked for.
#[derive(Debug, Deserialize, ToSchema)]
pub struct OutputRequest {
    #[schema(example = "embedding")]
    name: String,
    parameters: Option<OutputParameters>,
}

/// Parameters of an output.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct OutputParameters {
    /// Write this one as a binary tensor, or not.
    binary_data: Option<bool>,
    /// Refused: an embedding has no classes.
    classification: Option<u64>,
    /// Refused: this server maps no memory of its clients.
    shared_memory_region: Option<String>,
}

/// The answer, or the JSON that begins it, for the document: it is written by hand.
#[derive(ToSchema)]
#[allow(dead_code)]
pub struct InferAnswer {
    #[schema(example = "all-MiniLM-L6-v2")]
    model_name: String,
    #[schema(example = "1")]
    model_version: String,
    id: Option<String>,
    outputs: Vec<AnsweredTensor>,
}

#[derive(ToSchema)]
#[allow(dead_code)]
struct AnsweredTensor {
    #[schema(example = "embedding")]
    name: String,
    datatype: Datatype,
    shape: Vec<usize>,
    /// The elements in row-major order. Missing for a binary tensor.
    data: Option<Vec<f32>>,
    /// Of a binary tensor: `binary_data_size`.
    parameters: Option<serde_json::Value>,
}

/// A request with its tensors in hand.
#[derive(Debug)]
struct Asking {
    id: Option<String>,
    parameters: InferParameters,
    tensors: Vec<Tensor>,
    outputs: Vec<OutputRequest>,
}

/// Outputs of a model for tensors.
#[utoipa::path(
    post, path = "/v2/models/{model}/infer", tag = "Open Inference Protocol",
    params(("model" = String, Path, description = "A name from `/v1/models`", example = "all-MiniLM-L6-v2")),
    request_body(content = InferBody, examples(
        ("one text" = (value = json!({"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["The quick brown fox"]}]}))),
        ("token ids, padded" = (value = json!({"id": "7", "inputs": [
            {"name": "input_ids", "shape": [2, 3], "datatype": "INT64", "data": [[101, 103, 102], [101, 102, 0]]},
            {"name": "attention_mask", "shape": [2, 3], "datatype": "INT64", "data": [[1, 1, 1], [1, 1, 0]]},
        ], "parameters": {"dimensions": 8, "timeout": 5000000}, "outputs": [{"name": "embedding"}]}))),
    )),
    responses((status = 200, body = InferAnswer, description = "The outputs. Binary tensors stand behind the JSON, whose length `inference-header-content-length` then tells"), Refusals),
)]
pub async fn infer(State(state): State<ApiState>, path: Asked, request: Request) -> Result<Response, Fault> {
    let path = ModelPath::of(path)?;
    check_head(request.headers())?;
    let head_len = head_len(request.headers())?;
    let call = body::receive(&state, request).await?;
    let Call { body: asking, mut deadline, timeout, cache_use, priority, .. } =
        body::parsed(call, move |bytes| asking_of(bytes, head_len)).await?;
    let info = path.find(&state)?;
    let Asking { id, parameters, tensors, outputs } = asking;
    let wanted = wanted_of(&Signature::of(&info), &outputs, &parameters)?;
    let mut inputs = Inputs::of(tensors, state.settings.max_client_batch_size)?;
    let asked = Duration::from_micros(parameters.timeout.unwrap_or(0));
    if !asked.is_zero() && asked < timeout {
        deadline -= timeout - asked;
    }
    let params = EmbedParams {
        task: Task::Embed,
        normalize: parameters.normalize,
        dimensions: parameters.dimensions,
        truncation: tei::truncation(parameters.truncate, parameters.truncation_direction),
        prompt_name: parameters.prompt_name,
    };
    let model = Some(info.name.to_string());
    let request = Embed { model, inputs: std::mem::take(&mut inputs.inputs), params, deadline, priority };
    let computed = state.keeper.embed(request, cache_use, "oip", None).await.map_err(|e| inputs.rename(e))?;
    let served = Served::of(&computed);
    let head = Head { model_name: info.name.to_string(), model_version: computed.info.version.clone(), id };
    let outputs = wanted.choose(outputs_of(computed));
    let num_floats = answer::num_floats(outputs.iter());
    let written = write::written(num_floats, move || answer::write(&head, &outputs)).await?;
    let mut response = response_of(written);
    attach(&mut response, served);
    Ok(response)
}

/// Outputs of one version of a model for tensors.
#[utoipa::path(
    post, path = "/v2/models/{model}/versions/{version}/infer", tag = "Open Inference Protocol",
    params(
        ("model" = String, Path, description = "A name from `/v1/models`", example = "all-MiniLM-L6-v2"),
        ("version" = String, Path, description = "The version served", example = "1"),
    ),
    request_body(content = InferBody, example = json!({"inputs": [{"name": "text", "shape": [2, 1], "datatype": "BYTES", "data": ["w1 w2", "w3"]}]})),
    responses((status = 200, body = InferAnswer, description = "As of the model"), Refusals),
)]
#[allow(dead_code)]
pub fn infer_version() {
    // Its description alone: the handler is the one without a version.
}

/// JSON with or without tensors behind it. `tritonclient` names no type at all.
///
/// What a page of another site can have a browser send unasked is refused: forms and plain text by their type, a body
/// without one by the `origin` that browsers put beside it.
/// Errors: `MediaType`.
fn check_head(headers: &HeaderMap) -> Result<(), Fault> {
    let got = body::header_text(headers, header::CONTENT_TYPE);
    let essence = got.split(';').next().unwrap_or_default().trim();
    let is_unnamed = got.is_empty() && !headers.contains_key(header::ORIGIN);
    if !is_unnamed && ![JSON, OCTETS].iter().any(|known| essence.eq_ignore_ascii_case(known)) {
        return Err(Fault::MediaType { got, expected: JSON });
    }
    Ok(())
}

/// `None` where all of the body is JSON. Errors: `Malformed`.
fn head_len(headers: &HeaderMap) -> Result<Option<usize>> {
    let Some(value) = headers.get(HEAD_LEN) else { return Ok(None) };
    let len = value.to_str().ok().and_then(|text| text.trim().parse::<usize>().ok());
    len.map(Some).ok_or_else(|| malformed(HEAD_LEN.as_str(), "expected the length of the JSON in bytes".to_string()))
}

fn malformed(field: &str, reason: String) -> Error {
    Error::Malformed { field: field.to_string(), reason }
}

/// From the bytes of a body to its tensors, which stay where they are in it.
///
/// Errors: `Malformed` for a head that is longer than the body, for JSON of another form, for tensors without elements or
/// with two kinds of them, and for bytes that are too few or left over; `Invalid` for shared memory.
fn asking_of(mut bytes: Bytes, head_len: Option<usize>) -> Result<Asking> {
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
            (Some(elements), None) => Data::Json(elements),
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

fn no_shared_memory(field: &str) -> Error {
    let reason = "this server maps no memory of its clients".to_string();
    Error::Invalid { field: format!("{field}.parameters.shared_memory_region"), reason }
}

/// Which outputs are answered, and how.
#[derive(Debug)]
struct Wanted {
    /// In the order asked for; `None`: all.
    chosen: Option<Vec<(String, Form)>>,
    usual: Form,
}

impl Wanted {
    fn choose(&self, outputs: Vec<OutputTensor>) -> Vec<(OutputTensor, Form)> {
        let Some(chosen) = &self.chosen else {
            return outputs.into_iter().map(|output| (output, self.usual)).collect();
        };
        let mut outputs = outputs;
        let mut take = |name: &str| Some(outputs.swap_remove(outputs.iter().position(|output| output.name == name)?));
        chosen.iter().filter_map(|(name, form)| Some((take(name)?, *form))).collect()
    }
}

/// Errors: `Invalid` for a name that is no output's, and for what this server does not do with one; `Malformed` for one
/// that comes twice.
fn wanted_of(signature: &Signature, outputs: &[OutputRequest], parameters: &InferParameters) -> Result<Wanted> {
    let form_of = |is_binary: bool| if is_binary { Form::Binary } else { Form::Json };
    let is_binary = parameters.binary_data_output.unwrap_or(false);
    let none = OutputParameters::default();
    let mut chosen: Vec<(String, Form)> = Vec::with_capacity(outputs.len());
    for (i, OutputRequest { name, parameters }) in outputs.iter().enumerate() {
        signature.check_output(name)?;
        let parameters = parameters.as_ref().unwrap_or(&none);
        if parameters.classification.is_some_and(|num_classes| num_classes > 0) {
            let reason = format!("`{name}` has no classes");
            return Err(Error::Invalid { field: format!("outputs[{i}].parameters.classification"), reason });
        }
        if parameters.shared_memory_region.is_some() {
            return Err(no_shared_memory(&format!("outputs[{i}]")));
        }
        if chosen.iter().any(|(other, _)| other == name) {
            return Err(malformed(&format!("outputs[{i}]"), format!("`{name}` comes twice")));
        }
        chosen.push((name.clone(), form_of(parameters.binary_data.unwrap_or(is_binary))));
    }
    Ok(Wanted { chosen: (!chosen.is_empty()).then_some(chosen), usual: form_of(is_binary) })
}

fn response_of(written: Written) -> Response {
    let mut response = write::json(written.bytes);
    if let Some(len) = written.head_len {
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(OCTETS));
        headers.insert(HEAD_LEN, HeaderValue::from(len));
    }
    response
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
            (input(json!({"data": [1.5]})), "inputs[0].data"),
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
