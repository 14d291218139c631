//! One record, feedback on it, and erasure.

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::super::body::{self, Call};
use super::super::docs::Refusals;
use super::super::status::Fault;
use super::super::{ApiState, write};
use super::create::check_user;
use super::wire::{Inference, Parts, push_record};
use super::{id_of, not_found, text_of};
use crate::store::Records;
use crate::store::record::{self, Feedback, Record, StoredOutput};
use crate::{Error, Result};

/// Longest label and comment, in characters.
const MAX_LABEL_CHARS: usize = 64;
const MAX_COMMENT_CHARS: usize = 4096;

/// One inference, with its inputs as far as they are kept, its output and what was said of it.
#[utoipa::path(
    get, path = "/api/v1/inferences/{id}", tag = "application",
    params(("id" = String, Path, description = "The `id` of an answer", example = "inf_019a7b2c3d4e7f80912a3b4c5d6e7f80")),
    responses((status = 200, body = Inference, description = "The inference"), Refusals),
)]
pub async fn one(State(state): State<ApiState>, path: Result<Path<String>, PathRejection>) -> Result<Response, Fault> {
    let id = id_of(path)?;
    let record = state.keeper.store().get(&id).await?.ok_or_else(|| not_found(&id))?;
    let num_floats = num_floats(&record);
    let parts = Parts { inputs: true, is_stored: true };
    let response = write::offload(num_floats, move || {
        let mut out = write::buffer(num_floats);
        push_record(&mut out, &record, parts)?;
        Ok(out)
    });
    Ok(response.await?)
}

/// Floats of a record's output.
pub fn num_floats(record: &Record) -> usize {
    match &record.output {
        Some(StoredOutput::Embeddings(rows)) => rows.iter().map(Vec::len).sum(),
        Some(StoredOutput::Tensors(output)) => output.rows.iter().map(Vec::len).sum(),
        Some(StoredOutput::Json(_)) | None => 0,
    }
}

/// Deletes an inference from the store; one that is not computed yet will not be. What was computed for it may stay in the cache until its time is over.
#[utoipa::path(
    delete, path = "/api/v1/inferences/{id}", tag = "application",
    params(("id" = String, Path, description = "The `id` of an answer", example = "inf_019a7b2c3d4e7f80912a3b4c5d6e7f80")),
    responses((status = 204, description = "It is gone"), Refusals),
)]
pub async fn remove(
    State(state): State<ApiState>,
    path: Result<Path<String>, PathRejection>,
) -> Result<StatusCode, Fault> {
    let id = id_of(path)?;
    match state.later.delete(&id).await? {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(not_found(&id).into()),
    }
}

/// What somebody says of a result; at least one of the three.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FeedbackBody {
    /// -1 to 1, the better the higher.
    #[schema(minimum = -1, maximum = 1)]
    pub score: Option<f64>,
    #[schema(max_length = 64)]
    pub label: Option<String>,
    #[schema(max_length = 4096)]
    pub comment: Option<String>,
}

impl FeedbackBody {
    /// Errors: `Empty` for nothing, `Invalid` and `TooLarge` naming the field.
    fn checked(self) -> Result<Feedback> {
        let Self { score, label, comment } = self;
        if score.is_none() && label.is_none() && comment.is_none() {
            return Err(Error::Empty { field: "body".to_string() });
        }
        if let Some(got) = score.filter(|score| !(-1.0..=1.0).contains(score)) {
            return Err(Error::Invalid { field: "score".to_string(), reason: format!("expected -1 to 1, got {got}") });
        }
        for (field, text, limit) in [("label", &label, MAX_LABEL_CHARS), ("comment", &comment, MAX_COMMENT_CHARS)] {
            let got = text.as_ref().map_or(0, |text| text.chars().count());
            if got > limit {
                return Err(Error::TooLarge { field: field.to_string(), got, limit, unit: "characters" });
            }
        }
        Ok(Feedback { at: record::now(), score, label, comment })
    }
}

/// Adds what somebody says of a result.
#[utoipa::path(
    post, path = "/api/v1/inferences/{id}/feedback", tag = "application",
    params(("id" = String, Path, description = "The `id` of an answer", example = "inf_019a7b2c3d4e7f80912a3b4c5d6e7f80")),
    request_body(content = FeedbackBody, example = json!({"score": 1.0, "label": "relevant"})),
    responses((status = 204, description = "It is kept"), Refusals),
)]
pub async fn feedback(
    State(state): State<ApiState>,
    path: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<StatusCode, Fault> {
    let id = id_of(path)?;
    let Call { body, deadline, timeout, .. } = body::read::<FeedbackBody>(&state, request).await?;
    let feedback = body.checked()?;
    let store = state.keeper.store().clone();
    match body::bounded(deadline, timeout, async move { store.add_feedback(&id, &feedback).await }).await? {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(not_found(&id).into()),
    }
}

/// What became of an erasure.
#[derive(Debug, Serialize, ToSchema)]
pub struct Erasure {
    /// Records that were deleted.
    deleted: u64,
    /// Whether what was computed for them is known to be gone from the cache too. If not (its Redis is away, or inputs
    /// were not kept), it is gone when `cache.ttl` is over.
    cache_cleared: bool,
}

/// Deletes all of a user's inferences, from the store, the journal and the cache.
#[utoipa::path(
    delete, path = "/api/v1/users/{user}/inferences", tag = "application",
    params(("user" = String, Path, description = "The `user` of the requests", example = "u-17")),
    responses((status = 200, body = Erasure, description = "They are gone"), Refusals),
)]
pub async fn erase(
    State(state): State<ApiState>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Response, Fault> {
    let user = text_of(path, "user")?;
    check_user(&user)?;
    let erased = state.keeper.erase_user(&user).await?;
    state.later.forget(&erased.unfinished).await?;
    let body = Erasure { deleted: erased.num_records, cache_cleared: erased.is_cache_clear };
    Ok(axum::Json(body).into_response())
}
