//! `POST /v1/models/{m}:predict`: named tensors in, named tensors out.

use axum::extract::Request;
use axum::response::Response;
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::super::body::Call;
use super::super::docs::Refusals;
use super::super::phases::{Served, attach};
use super::super::status::Fault;
use super::super::{ApiState, body, write};
use super::answer;
use super::path::Address;
use super::signature::{self, Signature};
use crate::api::tensors::inputs::Inputs;
use crate::api::tensors::nested::{self, Given};
use crate::api::tensors::outputs::outputs_of;
use crate::api::tensors::written::Column;
use crate::inference::outcome::scores;
use crate::request::{Request as Embed, TaskParams};
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

/// Answers a prediction.
pub async fn call(state: &ApiState, address: &Address<'_>, request: Request) -> Result<Response, Fault> {
    // Before the body: a client of another model need not send all of it.
    let info = address.find(state)?;
    let Call { body, deadline, cache_use, priority, .. } = body::read::<TensorsBody>(state, request).await?;
    let signature = signature::find(&info, body.signature_name.as_deref())?;
    let is_short = body.num_values() <= MAX_INLINE_VALUES;
    let limit = state.settings.max_client_batch_size;
    let read = move || read(body, &signature, limit).map(|(given, inputs)| (given, inputs, signature));
    let (given, mut inputs, signature) = match is_short {
        true => read()?,
        false => {
            let joined = tokio::task::spawn_blocking(read).await;
            joined.map_err(|e| Error::Internal { cause: format!("reading tensors: {e}") })??
        }
    };
    let asked = std::mem::take(&mut inputs.inputs);
    let num_inputs = asked.len();
    let params = TaskParams { task: signature.task.clone(), ..TaskParams::default() };
    let request = Embed { model: Some(info.name.to_string()), inputs: asked, params, deadline, priority };
    let computed = state.keeper.infer(request, cache_use, "tensorflow", None).await;
    let computed = computed.map_err(|error| given.rename(inputs.rename(error), &signature.form, num_inputs))?;
    computed.check_model(&info)?;
    let served = Served::of(&computed);
    let layout = given.layout;
    let num_floats = computed.rows.iter().map(|row| row.len()).sum();
    let write = move || {
        let outputs = outputs_of(computed, &signature.tensors(), scores::Form::Usual)?;
        let mut out = write::buffer(num_floats);
        let columns: Vec<Column> =
            outputs.iter().map(|output| Column { name: &output.name, output, as_bytes: signature.as_bytes }).collect();
        answer::push(&mut out, layout, &columns)?;
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
/// Errors: `Malformed` for a body with both forms or none, and those of the form and of [`Inputs::of`].
fn read(body: TensorsBody, signature: &Signature, limit: usize) -> Result<(Given, Inputs)> {
    let malformed = |reason: &str| Error::Malformed { field: "body".to_string(), reason: reason.to_string() };
    let mut given = match (body.instances, body.inputs) {
        (Some(instances), None) => nested::read_rows("instances", instances, &signature.form)?,
        (None, Some(inputs)) => nested::read_columns("inputs", inputs, &signature.form)?,
        (None, None) => return Err(malformed("neither `instances` nor `inputs` is there")),
        (Some(_), Some(_)) => return Err(malformed("both `instances` and `inputs` are there; one form is taken")),
    };
    let tensors = std::mem::take(&mut given.tensors);
    let inputs = Inputs::of(tensors, &signature.tensors(), limit);
    // Of none of them, or of all: a single one is not known yet.
    let inputs = inputs.map_err(|error| given.rename(error, &signature.form, 0))?;
    Ok((given, inputs))
}
