//! `/similarity`: how near sentences are to one.

use axum::extract::{Request, State};
use axum::response::Response;
use serde::Deserialize;
use utoipa::ToSchema;

use super::{Direction, truncation};
use crate::api::body::{self, Call};
use crate::api::docs::Refusals;
use crate::api::inputs::check_count;
use crate::api::phases::{Served, attach};
use crate::api::status::Fault;
use crate::api::{ApiState, write};
use crate::request::{Input, Request as Embed, Task, TaskParams};
use crate::{Error, Result};

/// A text and those it is compared with.
#[derive(Debug, Deserialize, ToSchema)]
pub struct SimilarityInputs {
    pub source_sentence: String,
    pub sentences: Vec<String>,
}

/// How `/similarity` embeds its sentences.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct SimilarityParameters {
    #[schema(default = false)]
    pub truncate: Option<bool>,
    pub truncation_direction: Option<Direction>,
    pub prompt_name: Option<String>,
}

/// The body of `/similarity`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct SimilarityBody {
    pub inputs: SimilarityInputs,
    pub parameters: Option<SimilarityParameters>,
}

/// Cosine similarity of a text with others.
#[utoipa::path(
    post, path = "/similarity", tag = "text-embeddings-inference",
    request_body(content = SimilarityBody, example = json!({"inputs": {"source_sentence": "w1 w2", "sentences": ["w1 w2", "w3"]}})),
    responses((status = 200, body = Vec<f32>, description = "One cosine a sentence, in their order", example = json!([0.97, 0.12])), Refusals),
)]
pub async fn similarity(State(state): State<ApiState>, request: Request) -> Result<Response, Fault> {
    let call = body::read::<SimilarityBody>(&state, request).await?;
    similarity_call(&state, call).await
}

/// [`similarity`], of a body that was read.
pub async fn similarity_call(state: &ApiState, call: Call<SimilarityBody>) -> Result<Response, Fault> {
    let Call { body: SimilarityBody { inputs, parameters }, deadline, cache_use, priority, .. } = call;
    let parameters = parameters.unwrap_or_default();
    // One place of the limit is the source sentence's.
    let limit = state.settings.max_client_batch_size.saturating_sub(1).max(1);
    check_count("inputs.sentences", inputs.sentences.len(), limit)?;
    let params = TaskParams {
        task: Task::Embed,
        normalize: Some(true),
        dimensions: None,
        truncation: truncation(parameters.truncate, parameters.truncation_direction),
        prompt_name: parameters.prompt_name,
    };
    let texts = std::iter::once(inputs.source_sentence).chain(inputs.sentences).map(Input::Text).collect();
    let request = Embed { model: None, inputs: texts, params, deadline, priority };
    let computed = state.keeper.infer(request, cache_use, "tei", None).await.map_err(rename)?;
    let served = Served::of(&computed);
    let cosines = match computed.rows.split_first() {
        // The rows are of length 1, so the product is the cosine.
        Some((source, others)) => others.iter().map(|row| dot(source, row)).collect::<Vec<f32>>(),
        None => return Err(Error::Internal { cause: "no rows came back".to_string() }.into()),
    };
    let mut out = write::buffer(cosines.len());
    write::push_floats(&mut out, &cosines)?;
    let mut response = write::json(out);
    attach(&mut response, served);
    Ok(response)
}

/// Input 0 is the source sentence, input i + 1 is sentence i.
pub(super) fn rename(error: Error) -> Error {
    let ours = |field: String| {
        let position = field.strip_prefix("input[").and_then(|rest| rest.strip_suffix(']')).map(str::parse::<usize>);
        match position {
            Some(Ok(0)) => "inputs.source_sentence".to_string(),
            Some(Ok(i)) => format!("inputs.sentences[{}]", i - 1),
            _ => field,
        }
    };
    error.with_field(ours)
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}
