//! `GET /api/v1/inferences/{id}/events`: server-sent events until an inference is final.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::response::sse::{Event, KeepAlive, Sse};
use futures::Stream;
use futures::stream;

use super::super::ApiState;
use super::super::docs::{Refusals, ServerSentEvent};
use super::super::status::Fault;
use super::super::watch::Watch;
use super::wire::{Parts, push_inference};
use super::{id_of, not_found};
use crate::Result;
use crate::store::Records;
use crate::store::record::Record;

/// Between two looks at the record: at first, and at most. It doubles.
const FIRST_LOOK: Duration = Duration::from_millis(50);
const LAST_LOOK: Duration = Duration::from_secs(2);

/// An event a change of status, the data as `GET` answers it but for the output; the stream ends with the final one.
#[utoipa::path(
    get, path = "/api/v1/inferences/{id}/events", tag = "application",
    params(("id" = String, Path, description = "The `id` of an answer", example = "inf_019a7b2c3d4e7f80912a3b4c5d6e7f80")),
    responses((status = 200, description = "Events named by the status", body = ServerSentEvent, content_type = "text/event-stream"), Refusals),
)]
pub async fn events(
    State(state): State<ApiState>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Fault> {
    let id = id_of(path)?;
    let record = state.keeper.store().get(&id).await?.ok_or_else(|| not_found(&id))?;
    let watch = Watch::new(record, FIRST_LOOK, LAST_LOOK);
    let events = stream::unfold(Some((state, id, watch)), |watched| async move {
        let (state, id, mut watch) = watched?;
        let record = watch.changed(|| state.keeper.store().get(&id), |record: &Record| record.facts.status).await?;
        let is_final = record.facts.status.is_final();
        Some((Ok(event(&record)), (!is_final).then_some((state, id, watch))))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::default()))
}

fn event(record: &Record) -> Event {
    let mut out = Vec::new();
    let parts = Parts { inputs: false, is_stored: true };
    // Without rows there is nothing that could fail; an event without data still tells the status.
    let _ = push_inference::<Vec<f32>>(&mut out, record, None, parts);
    Event::default().event(record.facts.status.as_str()).data(String::from_utf8_lossy(&out))
}
