//! `POST /v1/models/{m}:predict`: named tensors in, named tensors out.

use axum::extract::Request;
use axum::response::Response;
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::super::body::Call;
use super::super::docs::Refusals;
use super::super::inputs::check_count;
use super::super::phases::{Served, attach};
use super::super::status::Fault;
use super::super::{ApiState, body, write};
use super::answer::{self, Column};
use super::path::Address;
use super::signature::{self, Signature, TensorSpec};
use super::tensor::{self, Given, Tensor, Values};
use crate::request::{Input, Request as Embed, TaskParams};
use crate::{Error, Result};

/// More values than this are read off the async threads: at about 100 ns a value, below it a handler stays under the 500
/// microseconds an async thread may be held.
const MAX_INLINE_VALUES: usize = 4096;

/// The body: either `instances` or `inputs`. Fields not listed are ignored.
#[derive(Debug, Deserialize, ToSchema)]
pub struct TensorsBody {
    /// One of the model's signatures (`…/metadata` lists them); `serving_default` unless given.
    signature_name: Option<String>,
    /// Row form: a list of values of the signature's only input, or of objects with a value an input.
    instances: Option<Value>,
    /// Column form: the values of the only input, or an object of all inputs' values.
    inputs: Option<Value>,
}

/// What is answered.
#[derive(ToSchema)]
#[allow(dead_code)] // a page of the document: `answer` writes it
pub struct Predictions {
    /// To `instances`: one an instance; of several outputs an object of them.
    predictions: Option<Vec<Value>>,
    /// To `inputs`: the only output's values, or an object of all outputs' values.
    outputs: Option<Value>,
}

/// The tensors that a model gives for those of the request. A version or a label may stand before the colon:
/// `/v1/models/{id}/versions/{version}:predict`, `/v1/models/{id}/labels/{label}:predict`.
#[utoipa::path(
    post, path = "/v1/models/{id}:predict", tag = "TensorFlow Serving",
    params(("id" = String, Path, description = "A name from `/v1/models`", example = "all-MiniLM-L6-v2")),
    request_body(content = TensorsBody, examples(
        ("rows" = (value = json!({"instances": ["The quick brown fox", "w3"]}))),
        ("rows with names, of bytes" = (value = json!({"instances": [{"text": {"b64": "dzEgdzI="}}]}))),
        ("columns" = (value = json!({"inputs": {"text": ["w1 w2", "w3"]}}))),
        ("token ids" = (value = json!({"signature_name": "input_ids", "instances": [[101, 102], [101, 103]]}))),
        ("embeddings as bytes" = (value = json!({"signature_name": "embedding_bytes", "instances": ["w1 w2"]}))),
    )),
    responses((status = 200, body = Predictions, description = "In the form of the request"), Refusals),
)]
#[allow(dead_code)] // a page of the document: the route is `super::call`
pub async fn predict() {}

/// Refused: classifiers answer `/predict`. The body has `examples`, a list of objects of features, and may have `context`
/// and `signature_name`.
#[utoipa::path(
    post, path = "/v1/models/{id}:classify", tag = "TensorFlow Serving",
    params(("id" = String, Path, description = "A name from `/v1/models`", example = "all-MiniLM-L6-v2")),
    request_body(content = Value),
    responses(Refusals),
)]
#[allow(dead_code)] // a page of the document: the route is `super::call`
pub async fn classify() {}

/// Refused: no model gives a number by this route. The body is that of `:classify`.
#[utoipa::path(
    post, path = "/v1/models/{id}:regress", tag = "TensorFlow Serving",
    params(("id" = String, Path, description = "A name from `/v1/models`", example = "all-MiniLM-L6-v2")),
    request_body(content = Value),
    responses(Refusals),
)]
#[allow(dead_code)] // a page of the document: the route is `super::call`
pub async fn regress() {}

/// Answers a prediction.
pub async fn call(state: &ApiState, address: &Address<'_>, request: Request) -> Result<Response, Fault> {
    // Before the body: a client of another model need not send all of it.
    let info = address.find(state)?;
    let Call { body, deadline, cache_use, priority, .. } = body::read::<TensorsBody>(state, request).await?;
    let signature = signature::find(&info, body.signature_name.as_deref())?;
    let is_short = body.num_values() <= MAX_INLINE_VALUES;
    let read = move || read(body, &signature).map(|(given, inputs)| (given, inputs, signature));
    let (given, inputs, signature) = match is_short {
        true => read()?,
        false => {
            let joined = tokio::task::spawn_blocking(read).await;
            joined.map_err(|e| Error::Internal { cause: format!("reading tensors: {e}") })??
        }
    };
    let input = &signature.inputs[0];
    check_count(&given.rows_name(input), inputs.len(), state.settings.max_client_batch_size)?;
    let num_inputs = inputs.len();
    let request =
        Embed { model: Some(info.name.to_string()), inputs, params: TaskParams::default(), deadline, priority };
    let computed = state.keeper.infer(request, cache_use, "tensorflow", None).await;
    let computed = computed.map_err(|error| rename(error, &given, input, num_inputs))?;
    let served = Served::of(&computed);
    let (rows, form) = (computed.rows, given.form);
    let num_floats = rows.iter().map(|row| row.len()).sum();
    let write = move || {
        let mut out = write::buffer(num_floats);
        let columns: Vec<Column> = signature.outputs.iter().map(|output| Column { output, rows: &rows }).collect();
        answer::push(&mut out, form, &columns)?;
        Ok(out)
    };
    let mut response = write::offload(num_floats, write).await?;
    attach(&mut response, served);
    Ok(response)
}

impl TensorsBody {
    /// About how many values there are.
    fn num_values(&self) -> usize {
        [&self.instances, &self.inputs].into_iter().flatten().map(num_values).sum()
    }
}

/// As many as there are if each row has as many as the first.
fn num_values(value: &Value) -> usize {
    match value {
        Value::Array(items) => items.len() * items.first().map_or(1, num_values),
        Value::Object(fields) => fields.values().map(num_values).sum(),
        _ => 1,
    }
}

/// The tensors of a body, and what the engine is asked with them.
///
/// Errors: `Malformed` for a body with both forms or none, and those of the form and of [`inputs`].
fn read(body: TensorsBody, signature: &Signature) -> Result<(Given, Vec<Input>)> {
    let malformed = |reason: &str| Error::Malformed { field: "body".to_string(), reason: reason.to_string() };
    let mut given = match (body.instances, body.inputs) {
        (Some(instances), None) => tensor::read_rows(instances, signature)?,
        (None, Some(inputs)) => tensor::read_columns(inputs, signature)?,
        (None, None) => return Err(malformed("neither `instances` nor `inputs` is there")),
        (Some(_), Some(_)) => return Err(malformed("both `instances` and `inputs` are there; one form is taken")),
    };
    let inputs = inputs(std::mem::take(&mut given.tensors), &given, &signature.inputs[0])?;
    Ok((given, inputs))
}

/// What the engine is asked with the tensors of a signature that embeds: those have one input, of texts or of token ids.
fn inputs(tensors: Vec<Tensor>, given: &Given, input: &TensorSpec) -> Result<Vec<Input>> {
    let malformed = |i, reason: String| Error::Malformed { field: given.row_name(input, i), reason };
    let mut inputs = Vec::new();
    for Tensor { shape, values } in tensors {
        match values {
            Values::Strings(texts) => {
                for (i, text) in texts.into_iter().enumerate() {
                    let text = String::from_utf8(text).map_err(|e| malformed(i, format!("not UTF-8: {e}")))?;
                    inputs.push(Input::Text(text));
                }
            }
            Values::Integers(ids) => {
                // Rows without a value are still rows, which the engine refuses by their place.
                let num_ids = shape.get(1).copied().unwrap_or(0);
                for i in 0..shape.first().copied().unwrap_or(0) {
                    let row = &ids[i * num_ids..(i + 1) * num_ids];
                    let id = |&id: &i64| u32::try_from(id).map_err(|_| malformed(i, format!("no token id is {id}")));
                    inputs.push(Input::TokenIds(row.iter().map(id).collect::<Result<_>>()?));
                }
            }
            Values::Floats(_) => {
                let cause = format!("input `{}` of numbers for a model of texts", input.name);
                return Err(Error::Internal { cause });
            }
        }
    }
    Ok(inputs)
}

/// The engine names inputs as OpenAI does: "input" for one alone or for all, "input[1]" for one of many.
fn rename(error: Error, given: &Given, input: &TensorSpec, num_inputs: usize) -> Error {
    let ours = |field: String| {
        let position = field.strip_prefix("input[").and_then(|rest| rest.strip_suffix(']')).map(str::parse::<usize>);
        match position {
            Some(Ok(i)) => given.row_name(input, i),
            _ if field == "input" && num_inputs == 1 => given.row_name(input, 0),
            _ if field == "input" => given.rows_name(input),
            _ => field,
        }
    };
    error.with_field(ours)
}
