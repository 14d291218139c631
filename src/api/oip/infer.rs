//! `POST …/infer`: tensors in, tensors out.

use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::Response;

use super::answer::{self, Form, Head, Written};
use super::tensor;
use super::wire::{Asking, HEAD_LEN, InferAnswer, InferBody, InferParameters, OutputParameters, OutputRequest};
use super::wire::{asking_of, malformed, no_shared_memory};
use super::{Asked, ModelPath};
use crate::api::body::{self, Call};
use crate::api::docs::Refusals;
use crate::api::phases::{Served, attach};
use crate::api::status::{Fault, JSON};
use crate::api::tensors::inputs::Inputs;
use crate::api::tensors::outputs::{OutputTensor, outputs_of};
use crate::api::tensors::signature::Signature;
use crate::api::{ApiState, tei, write};
use crate::inference::outcome::scores;
use crate::request::{Request as Embed, Task, TaskParams};
use crate::{Error, Result};

const OCTETS: &str = "application/octet-stream";

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
        ("vectors of all tokens" = (value = json!({"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["w1 w2", "w3"]}], "parameters": {"task": "embed_all"}}))),
    )),
    responses((status = 200, body = InferAnswer, description = "The outputs. Binary tensors stand behind the JSON, whose length `inference-header-content-length` then tells"), Refusals),
)]
pub async fn infer(State(state): State<ApiState>, path: Asked, request: Request) -> Result<Response, Fault> {
    let path = ModelPath::of(path)?;
    check_head(request.headers())?;
    let head_len = head_len(request.headers())?;
    let call = body::receive(&state, request).await?;
    let call = body::parsed(call, move |bytes| asking_of(bytes, head_len)).await?;
    let Answered { head, outputs, served } = compute(&state, &path, call).await?;
    let num_values = answer::num_values(outputs.iter());
    let written = write::written(num_values, move || answer::write(&head, &outputs)).await?;
    let mut response = response_of(written);
    attach(&mut response, served);
    Ok(response)
}

/// A computed request, not written yet.
#[derive(Debug)]
pub struct Answered {
    pub head: Head,
    pub outputs: Vec<(OutputTensor, Form)>,
    pub served: Served,
}

/// Computes what was asked, over whatever transport.
///
/// Errors: `UnknownModel`, `NotFound` for a version; those of [`Inputs::of`] and of the keeper, which name the tensor.
pub async fn compute(state: &ApiState, path: &ModelPath, call: Call<Asking>) -> Result<Answered> {
    let Call { body: asking, mut deadline, timeout, cache_use, priority, .. } = call;
    let info = path.find(state)?;
    let Asking { id, parameters, tensors, outputs } = asking;
    let mut signature = Signature::named(&info, parameters.task.as_deref()).map_err(rename)?;
    if let (Task::FillMask { top_k, .. }, Some(asked)) = (&mut signature.task, parameters.top_k) {
        *top_k = asked;
    }
    let wanted = wanted_of(&signature, &outputs, &parameters)?;
    let num_values =
        tensors.iter().map(|tensor| tensor.shape.iter().fold(1usize, |n, &dim| n.saturating_mul(dim))).max();
    let (limit, of) = (state.settings.max_client_batch_size, signature.clone());
    let read = move || Inputs::of(tensor::read(tensors, &of)?, &of, limit);
    let mut inputs = write::written(num_values.unwrap_or(0), read).await?;
    let asked = Duration::from_micros(parameters.timeout.unwrap_or(0));
    if !asked.is_zero() && asked < timeout {
        deadline = deadline.checked_sub(timeout - asked).unwrap_or(deadline);
    }
    let params = TaskParams {
        task: signature.task.clone(),
        normalize: parameters.normalize,
        dimensions: parameters.dimensions,
        truncation: tei::truncation(parameters.truncate, parameters.truncation_direction),
        prompt_name: parameters.prompt_name,
    };
    let model = Some(info.name.to_string());
    let request = Embed { model, inputs: std::mem::take(&mut inputs.inputs), params, deadline, priority };
    let computed = state.keeper.infer(request, cache_use, "oip", None).await;
    let computed = computed.map_err(|error| rename(inputs.rename(error)))?;
    computed.check_model(&info)?;
    let served = Served::of(&computed);
    let head = Head { model_name: info.name.to_string(), model_version: computed.info.version.clone(), id };
    let form = if parameters.raw_scores.unwrap_or(false) { scores::Form::Raw } else { scores::Form::Usual };
    let num_values = computed.rows.iter().map(|row| row.len()).sum();
    let outputs = move || Ok(wanted.choose(outputs_of(computed, &signature, form)?, &info.labels));
    Ok(Answered { head, outputs: write::written(num_values, outputs).await?, served })
}

/// The engine names parameters without where they stand.
fn rename(error: Error) -> Error {
    let ours = |field: String| match field.as_str() {
        "dimensions" | "prompt_name" | "task" | "top_k" => format!("parameters.{field}"),
        _ => field,
    };
    error.with_field(ours)
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

/// Which outputs are answered, and how.
#[derive(Debug)]
struct Wanted {
    /// In the order asked for; `None`: all.
    chosen: Option<Vec<Chosen>>,
    usual: Form,
}

#[derive(Debug)]
struct Chosen {
    name: String,
    form: Form,
    /// So many classes as texts instead of all scores.
    num_classes: Option<usize>,
}

impl Wanted {
    fn choose(&self, outputs: Vec<OutputTensor>, labels: &[String]) -> Vec<(OutputTensor, Form)> {
        let Some(chosen) = &self.chosen else {
            return outputs.into_iter().map(|output| (output, self.usual)).collect();
        };
        let mut outputs = outputs;
        let take = |Chosen { name, form, num_classes }: &Chosen| {
            let output = outputs.swap_remove(outputs.iter().position(|output| output.name == *name)?);
            Some((num_classes.map_or_else(|| output.clone(), |k| output.classes(labels, k)), *form))
        };
        chosen.iter().filter_map(take).collect()
    }
}

/// Errors: `Invalid` for a name that is no output's, and for what this server does not do with one; `Malformed` for one
/// that comes twice.
fn wanted_of(signature: &Signature, outputs: &[OutputRequest], parameters: &InferParameters) -> Result<Wanted> {
    let form_of = |is_binary: bool| if is_binary { Form::Binary } else { Form::Json };
    let is_binary = parameters.binary_data_output.unwrap_or(false);
    let none = OutputParameters::default();
    let mut chosen: Vec<Chosen> = Vec::with_capacity(outputs.len());
    for (i, OutputRequest { name, parameters }) in outputs.iter().enumerate() {
        let output = signature.output(name)?;
        let parameters = parameters.as_ref().unwrap_or(&none);
        let num_classes = parameters.classification.filter(|num_classes| *num_classes > 0);
        if num_classes.is_some() && !signature.has_classes(output) {
            let reason = format!("`{name}` has no classes");
            return Err(Error::Invalid { field: format!("outputs[{i}].parameters.classification"), reason });
        }
        if parameters.shared_memory_region.is_some() {
            return Err(no_shared_memory(&format!("outputs[{i}]")));
        }
        if chosen.iter().any(|other| other.name == *name) {
            return Err(malformed(&format!("outputs[{i}]"), format!("`{name}` comes twice")));
        }
        let num_classes = num_classes.map(|num_classes| usize::try_from(num_classes).unwrap_or(usize::MAX));
        let form = form_of(parameters.binary_data.unwrap_or(is_binary));
        chosen.push(Chosen { name: name.clone(), form, num_classes });
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
