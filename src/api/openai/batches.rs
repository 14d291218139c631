//! `/v1/batches`: requests of a file that are answered when there is room.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::Duration;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, RawQuery, Request, State};
use axum::http::HeaderValue;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream};
use serde::Deserialize;
use utoipa::ToSchema;

use super::super::ApiState;
use super::super::app::create::{REPLAYED, check_metadata, idempotency_key};
use super::super::body::{self, Call};
use super::super::docs::{Refusals, ServerSentEvent};
use super::super::status::Fault;
use super::super::watch::Watch;
use super::id_of;
use super::wire::{BatchList, BatchObject, ExpiresAfter, ListQuery};
use crate::jobs::batch::{ENDPOINTS, MAX_WINDOW, MIN_WINDOW, Named, NewBatch, not_found};
use crate::{Error, Result};

/// Most batches of a page, and how many there are where the client does not say.
const MAX_LIMIT: usize = 100;
const DEFAULT_LIMIT: usize = 20;

/// Between two looks at a batch that is watched.
const FIRST_LOOK: Duration = Duration::from_millis(100);
const LAST_LOOK: Duration = Duration::from_secs(1);

/// The body of `POST /v1/batches`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct BatchBody {
    /// A file with the purpose `batch`: JSON lines of `custom_id`, `method`, `url` and `body`.
    #[schema(example = "file-019a7b2c3d4e7f80912a3b4c5d6e7f80")]
    pub input_file_id: String,
    /// The `url` of every line.
    #[schema(example = "/v1/embeddings")]
    pub endpoint: String,
    /// How long it may take: `24h`, as OpenAI's API has it, or another time from `1s` to `30days`.
    #[schema(example = "24h")]
    pub completion_window: String,
    /// At most 16 pairs.
    pub metadata: Option<BTreeMap<String, String>>,
    /// How long the files that it writes are kept.
    pub output_expires_after: Option<ExpiresAfter>,
}

impl BatchBody {
    /// Errors: `Invalid` and `TooLarge` naming the field.
    fn checked(self, idempotency_key: Option<String>) -> Result<NewBatch> {
        let invalid = |field: &str, reason: String| Err(Error::Invalid { field: field.to_string(), reason });
        if !ENDPOINTS.contains(&self.endpoint.as_str()) {
            return invalid("endpoint", format!("expected one of {}", ENDPOINTS.join(", ")));
        }
        let window = match humantime::parse_duration(&self.completion_window) {
            Ok(window) if (MIN_WINDOW..=MAX_WINDOW).contains(&window) => window,
            _ => return invalid("completion_window", "expected `24h`, or another time from 1s to 30days".to_string()),
        };
        let metadata = self.metadata.unwrap_or_default();
        check_metadata(&metadata)?;
        let expires_after = self.output_expires_after.map(|after| after.checked("output_expires_after")).transpose()?;
        Ok(NewBatch {
            input_file_id: self.input_file_id,
            endpoint: self.endpoint,
            completion_window: self.completion_window,
            window,
            metadata,
            output_expires_after: expires_after,
            idempotency_key,
        })
    }
}

/// Takes a batch. When this is answered it will be run, whatever happens to this server.
#[utoipa::path(
    post, path = "/v1/batches", tag = "OpenAI",
    request_body(content = BatchBody, example = json!({"input_file_id": "file-019a7b2c3d4e7f80912a3b4c5d6e7f80", "endpoint": "/v1/embeddings", "completion_window": "24h"})),
    params(("Idempotency-Key" = Option<String>, Header, description = "At most 255 visible ASCII characters. The same request with the same key makes one batch, within a day; later answers have the header `idempotency-replayed: true`.")),
    responses((status = 200, body = BatchObject, description = "The batch"), Refusals),
)]
pub async fn create(State(state): State<ApiState>, request: Request) -> Result<Response, Fault> {
    state.check_durable("input_file_id")?;
    let key = idempotency_key(request.headers())?;
    let Call { body, deadline, timeout, .. } = body::read::<BatchBody>(&state, request).await?;
    let new = body.checked(key)?;
    let created = body::bounded(deadline, timeout, state.batches().create(new)).await?;
    let mut response = axum::Json(BatchObject::from(&created.named)).into_response();
    if created.is_replay {
        response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// Batches, newest first.
#[utoipa::path(
    get, path = "/v1/batches", tag = "OpenAI",
    params(
        ("after" = Option<String>, Query, description = "The last id of the page before"),
        ("limit" = Option<usize>, Query, description = "1 to 100; 20 is the default", example = 20),
    ),
    responses((status = 200, body = BatchList, description = "A page"), Refusals),
)]
pub async fn list(State(state): State<ApiState>, RawQuery(query): RawQuery) -> Result<axum::Json<BatchList>, Fault> {
    let query = ListQuery::parse(query.as_deref().unwrap_or_default(), MAX_LIMIT)?;
    let page = state.batches().list(query.after, query.limit.unwrap_or(DEFAULT_LIMIT)).await?;
    Ok(axum::Json(BatchList::from(&page)))
}

/// One batch.
#[utoipa::path(
    get, path = "/v1/batches/{id}", tag = "OpenAI",
    params(("id" = String, Path, description = "The `id` of a batch", example = "batch_019a7b2c3d4e7f80912a3b4c5d6e7f80")),
    responses((status = 200, body = BatchObject, description = "The batch"), Refusals),
)]
pub async fn one(
    State(state): State<ApiState>,
    path: Result<Path<String>, PathRejection>,
) -> Result<axum::Json<BatchObject>, Fault> {
    let named = found(&state, &id_of(path)?).await?;
    Ok(axum::Json(BatchObject::from(&named)))
}

/// Ends a batch early: what is answered by then is in its files, the rest is told there as `batch_cancelled`.
#[utoipa::path(
    post, path = "/v1/batches/{id}/cancel", tag = "OpenAI",
    params(("id" = String, Path, description = "The `id` of a batch", example = "batch_019a7b2c3d4e7f80912a3b4c5d6e7f80")),
    responses((status = 200, body = BatchObject, description = "The batch, which is `cancelling` or `cancelled`"), Refusals),
)]
pub async fn cancel(
    State(state): State<ApiState>,
    path: Result<Path<String>, PathRejection>,
) -> Result<axum::Json<BatchObject>, Fault> {
    let named = state.batches().cancel(&id_of(path)?).await?;
    Ok(axum::Json(BatchObject::from(&named)))
}

async fn found(state: &ApiState, id: &str) -> Result<Named> {
    state.batches().get(id).await?.ok_or_else(|| not_found(id))
}

/// An event whenever a batch has changed, named by its status, the data as `GET` answers it; the stream ends with the
/// final one. OpenAI's API has none.
#[utoipa::path(
    get, path = "/v1/batches/{id}/events", tag = "OpenAI",
    params(("id" = String, Path, description = "The `id` of a batch", example = "batch_019a7b2c3d4e7f80912a3b4c5d6e7f80")),
    responses((status = 200, description = "Events named by the status", body = ServerSentEvent, content_type = "text/event-stream"), Refusals),
)]
pub async fn events(
    State(state): State<ApiState>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Fault> {
    let id = id_of(path)?;
    let named = found(&state, &id).await?;
    let watch = Watch::new(named, FIRST_LOOK, LAST_LOOK);
    let events = stream::unfold(Some((state, id, watch)), |watched| async move {
        let (state, id, mut watch) = watched?;
        let batches = state.batches();
        let named = watch.changed(|| batches.get(&id), |named| BatchObject::from(named)).await?;
        let status = named.batch.status;
        // An event without data still tells the status.
        let event = Event::default().event(status.as_str()).json_data(BatchObject::from(&named)).unwrap_or_default();
        Some((Ok(event), (!status.is_final()).then_some((state, id, watch))))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::default()))
}
