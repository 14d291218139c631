//! `POST /vertex`: several requests to the main task in one, as Vertex AI sends them.
//!
//! Source: huggingface/text-embeddings-inference `router/src/http/types.rs`, `VertexRequest`.

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use futures::StreamExt;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{MainTaskBody, main_task_call};
use crate::api::body::{self, Call};
use crate::api::docs::Refusals;
use crate::api::inputs::check_count;
use crate::api::negotiate::Media;
use crate::api::status::Fault;
use crate::api::{ApiState, write};
use crate::model::ModelInfo;
use crate::{Error, Result};

/// How many instances are asked at once: enough to fill a batch, and few enough that their answers are small beside it.
const AT_ONCE: usize = 64;

/// The body of `/vertex`. Fields not listed are ignored.
#[derive(Debug, Deserialize, ToSchema)]
pub struct VertexBody {
    /// Each what `/` takes.
    #[schema(value_type = Vec<Value>)]
    instances: Vec<Map<String, Value>>,
    /// The `parameters` of instances that have none.
    #[schema(value_type = Option<Value>)]
    parameters: Option<Map<String, Value>>,
}

/// What is answered.
#[derive(ToSchema)]
#[allow(dead_code)] // a page of the document
pub struct VertexPredictions {
    /// One an instance, each what `/` answers.
    predictions: Vec<Value>,
}

/// The main task of the default model for each instance.
///
/// All are answered or none: the first instance that is refused is named.
#[utoipa::path(
    post, path = "/vertex", tag = "text-embeddings-inference",
    request_body(content = VertexBody, example = json!({"instances": [{"inputs": "w1 w2"}, {"inputs": ["w1", "w3"]}]})),
    responses((status = 200, body = VertexPredictions, description = "One prediction an instance, in their order"), Refusals),
)]
pub async fn vertex(State(state): State<ApiState>, request: Request) -> Result<Response, Fault> {
    let call = body::read::<VertexBody>(&state, request).await?;
    let (VertexBody { instances, parameters }, Call { deadline, timeout, cache_use, priority, .. }) = call.split();
    check_count("instances", instances.len(), state.settings.max_client_batch_size)?;
    let info = state.engine.model(None)?;
    let one = async |(i, mut instance): (usize, Map<String, Value>)| {
        if let Some(parameters) = &parameters {
            instance.entry("parameters").or_insert_with(|| parameters.clone().into());
        }
        let call = Call { body: instance, deadline, timeout, cache_use, priority, record_id: None };
        prediction(&state, &info, call).await.map_err(|fault| named(fault, i))
    };
    let mut predictions = futures::stream::iter(instances.into_iter().enumerate().map(one)).buffered(AT_ONCE);
    let mut out = br#"{"predictions":["#.to_vec();
    while let Some(prediction) = predictions.next().await {
        if out.last() != Some(&b'[') {
            out.push(b',');
        }
        out.extend_from_slice(prediction?.get().as_bytes());
    }
    out.extend_from_slice(b"]}");
    Ok(write::json(out))
}

/// What `/` answers, as it was written.
async fn prediction(
    state: &ApiState,
    info: &ModelInfo,
    call: Call<Map<String, Value>>,
) -> Result<Box<RawValue>, Fault> {
    let (instance, call) = call.split();
    let body: MainTaskBody = body::of_value(instance.into())?;
    let answer = main_task_call(state, info, call.with(body), Media::Json).await?;
    let internal = |cause: String| Error::Internal { cause };
    let bytes = axum::body::to_bytes(Body::new(answer.into_body()), usize::MAX).await;
    let bytes = bytes.map_err(|e| internal(format!("reading a prediction: {e}")))?;
    let text = String::from_utf8(bytes.into()).map_err(|e| internal(format!("a prediction is no text: {e}")))?;
    Ok(RawValue::from_string(text).map_err(|e| internal(format!("a prediction is no JSON: {e}")))?)
}

/// Fields are an instance's.
fn named(fault: Fault, i: usize) -> Fault {
    match fault {
        Fault::Error(error) => Fault::Error(error.with_field(|field| format!("instances[{i}].{field}"))),
        fault => fault,
    }
}
