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
use super::wire::{Parts, push_inference};
use super::{id_of, not_found};
use crate::Result;
use crate::store::Records;
use crate::store::record::{InferenceId, Record, Status};

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
    let watch = Watch { state, id, next: Some(record), told: None, pause: FIRST_LOOK };
    let events = stream::unfold(Some(watch), |watch| async move {
        let mut watch = watch?;
        let record = watch.changed().await?;
        let is_final = record.facts.status.is_final();
        Some((Ok(event(&record)), (!is_final).then_some(watch)))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::default()))
}

/// A record being watched.
struct Watch {
    state: ApiState,
    id: InferenceId,
    /// Read and not told yet.
    next: Option<Record>,
    told: Option<Status>,
    pause: Duration,
}

impl Watch {
    /// The record when its status is another than the one told; `None` when it is gone. A store that is away is asked
    /// again.
    async fn changed(&mut self) -> Option<Record> {
        loop {
            let record = match self.next.take() {
                Some(record) => record,
                None => {
                    tokio::time::sleep(self.pause).await;
                    self.pause = (self.pause * 2).min(LAST_LOOK);
                    match self.state.keeper.store().get(&self.id).await {
                        Ok(record) => record?,
                        Err(_) => continue,
                    }
                }
            };
            if self.told != Some(record.facts.status) {
                self.told = Some(record.facts.status);
                self.pause = FIRST_LOOK;
                return Some(record);
            }
        }
    }
}

fn event(record: &Record) -> Event {
    let mut out = Vec::new();
    let parts = Parts { inputs: false, is_stored: true };
    // Without rows there is nothing that could fail; an event without data still tells the status.
    let _ = push_inference::<Vec<f32>>(&mut out, record, None, parts);
    Event::default().event(record.facts.status.as_str()).data(String::from_utf8_lossy(&out))
}
