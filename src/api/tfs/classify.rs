//! `POST /v1/models/{m}:classify` and `:regress`: examples of features in, labels with scores or a number out.

use axum::extract::Request;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::super::body::Call;
use super::super::docs::Refusals;
use super::super::inputs::{check_count, renamed};
use super::super::status::Fault;
use super::super::tei::heads::{answer, told};
use super::super::{ApiState, body};
use super::path::{Address, Subject};
use super::signature::{self, DEFAULT, Signature};
use crate::api::tensors::inputs::Inputs;
use crate::api::tensors::nested;
use crate::api::tensors::signature::Written;
use crate::inference::outcome::{number, scores};
use crate::request::{Input, Request as Embed, Task, TaskParams};
use crate::{Error, Result};

/// The body of both routes. Fields not listed are ignored.
#[derive(Debug, Deserialize, ToSchema)]
pub struct ExamplesBody {
    /// `serving_default`, which is taken for none too.
    signature_name: Option<String>,
    /// Features of every example, beside its own.
    #[schema(value_type = Option<Value>)]
    context: Option<Map<String, Value>>,
    /// Features by the names of the model's inputs: a value, or a list of one; token ids as their list.
    #[schema(value_type = Vec<Value>)]
    examples: Vec<Map<String, Value>>,
}

/// What is answered.
#[derive(ToSchema)]
#[allow(dead_code)] // a page of the document
pub struct Results {
    /// One an example: of `:classify` a list of labels with their scores in the model's order, of `:regress` a number.
    result: Vec<Value>,
}

/// The labels of a classifier for each example, with their scores.
#[utoipa::path(
    post, path = "/v1/models/{id}:classify", tag = "TensorFlow Serving",
    params(("id" = String, Path, description = "A name from `/v1/models`", example = "all-MiniLM-L6-v2")),
    request_body(content = ExamplesBody, example = json!({"context": {"text_pair": "w3"}, "examples": [{"text": "w1 w2"}, {"text": ["w3"]}]})),
    responses((status = 200, body = Results, description = "`[label, score]` of each label, in the model's order"), Refusals),
)]
#[allow(dead_code)] // a page of the document: the route is `super::call`
pub async fn classify() {}

/// The score of each example, of a model with a single one.
#[utoipa::path(
    post, path = "/v1/models/{id}:regress", tag = "TensorFlow Serving",
    params(("id" = String, Path, description = "A name from `/v1/models`", example = "all-MiniLM-L6-v2")),
    request_body(content = ExamplesBody, example = json!({"context": {"query": "w1 w2"}, "examples": [{"text": "w1 w2"}, {"text": "w3"}]})),
    responses((status = 200, body = Results, description = "One number an example"), Refusals),
)]
#[allow(dead_code)] // a page of the document: the route is `super::call`
pub async fn regress() {}

/// Answers either.
pub async fn call(state: &ApiState, address: &Address<'_>, request: Request) -> Result<Response, Fault> {
    // Before the body: a client of another model need not send all of it.
    let info = address.find(state)?;
    let is_regression = address.subject == Subject::Regress;
    if info.main_task() != Task::Classify || (is_regression && info.labels.len() != 1) {
        return Err(signature::does_not(&info, address.subject).into());
    }
    let Call { body, deadline, cache_use, priority, .. } = body::read::<ExamplesBody>(state, request).await?;
    let ExamplesBody { signature_name, context, examples } = body;
    if let Some(name) = signature_name.filter(|name| !["", DEFAULT].contains(&name.as_str())) {
        let reason = format!("`:{}` takes `{DEFAULT}` alone, got `{name}`", address.subject.as_str());
        return Err(Error::Invalid { field: "signature_name".to_string(), reason }.into());
    }
    check_count("examples", examples.len(), state.settings.max_client_batch_size)?;
    let signatures: Vec<Signature> =
        signature::of(&info).into_iter().filter(|signature| signature.task == Task::Classify).collect();
    let context = context.unwrap_or_default();
    let one = |(i, example)| input_of(i, example, &context, &signatures);
    let inputs = examples.into_iter().enumerate().map(one).collect::<Result<Vec<Input>>>()?;
    let is_single = inputs.len() == 1;
    let params = TaskParams { task: Task::Classify, ..TaskParams::default() };
    let request = Embed { model: Some(info.name.to_string()), inputs, params, deadline, priority };
    let computed = state.keeper.infer(request, cache_use, "tensorflow", None).await;
    let name = if is_single { "examples[0]" } else { "examples" };
    let computed = computed.map_err(|error| renamed(error, name))?;
    computed.check_model(&info)?;
    let of_row = |row: &[f32]| -> Value {
        let scores = scores::scores(&computed.info, row, scores::Form::Usual);
        match is_regression {
            true => scores.first().map_or(Value::Null, |score| number(*score)),
            false => info.labels.iter().zip(scores).map(|(label, score)| json!([label, number(score)])).collect(),
        }
    };
    let result: Vec<Value> = computed.rows.iter().map(|row| of_row(row)).collect();
    told(answer(&json!({"result": result}))?, &computed)
}

/// The input of one example with the features of all.
fn input_of(
    i: usize,
    example: Map<String, Value>,
    context: &Map<String, Value>,
    signatures: &[Signature],
) -> Result<Input> {
    let place = |field: String| match field.strip_prefix("instances[0]") {
        Some(rest) => format!("examples[{i}]{rest}"),
        None => format!("examples[{i}].{}", field.split('[').next().unwrap_or_default()),
    };
    let mut features = context.clone();
    for (name, value) in example {
        if features.insert(name.clone(), value).is_some() {
            let reason = format!("`{name}` is in `context` too");
            return Err(Error::Malformed { field: format!("examples[{i}]"), reason });
        }
    }
    let is_of = |signature: &&Signature| features.contains_key(signature.form.name());
    let signature = signatures.iter().find(is_of).or(signatures.first());
    let Some(signature) = signature else {
        return Err(Error::Internal { cause: "a classifier without a signature".to_string() });
    };
    if signature.form.written != Written::TokenIds {
        features.values_mut().for_each(unwrap);
    }
    let given = nested::read_rows("instances", Value::Array(vec![Value::Object(features)]), &signature.form);
    let given = given.map_err(|error| error.with_field(place))?;
    let inputs = Inputs::of(given.tensors, &signature.tensors(), 1).map_err(|error| error.with_field(place))?;
    let missing = || Error::Internal { cause: "an example became no input".to_string() };
    inputs.inputs.into_iter().next().ok_or_else(missing)
}

/// A list of one value is that value.
fn unwrap(value: &mut Value) {
    if let Value::Array(items) = value
        && let [only] = &mut items[..]
    {
        *value = only.take();
    }
}
