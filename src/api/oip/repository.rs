//! The repository's index, and what is not done at run time.

use std::sync::Arc;

use axum::extract::{Request, State};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Asked, ModelPath};
use crate::Error;
use crate::api::docs::Refusals;
use crate::api::status::Fault;
use crate::api::{ApiState, body};
use crate::model::ModelInfo;
use crate::serve::Health;

/// What of the index is asked for. A request without a body asks for all.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct IndexBody {
    /// Only models that take requests.
    #[schema(default = false)]
    ready: Option<bool>,
}

/// A model of the index.
#[derive(Debug, Serialize, ToSchema)]
pub struct IndexEntry {
    #[schema(example = "all-MiniLM-L6-v2")]
    pub name: String,
    #[schema(example = "1")]
    pub version: String,
    /// "READY", "LOADING" or "UNAVAILABLE".
    #[schema(example = "READY")]
    pub state: &'static str,
    /// Why it is not ready; empty where it is.
    pub reason: &'static str,
}

/// The models that are served, ready or not.
#[utoipa::path(
    post, path = "/v2/repository/index", tag = "Open Inference Protocol",
    request_body(content = Option<IndexBody>, example = json!({"ready": true})),
    responses((status = 200, body = Vec<IndexEntry>, description = "The models, default first"), Refusals),
)]
pub async fn index(State(state): State<ApiState>, request: Request) -> Result<axum::Json<Vec<IndexEntry>>, Fault> {
    // `tritonclient` sends no body and names no type. What is answered changes nothing, so a page may ask for it too.
    let call = body::receive(&state, request).await?;
    let parse = |bytes: Bytes| if bytes.is_empty() { Ok(IndexBody::default()) } else { body::parse(&bytes) };
    let only_ready = body::parsed(call, parse).await?.body.ready.unwrap_or(false);
    Ok(axum::Json(entries(&state, only_ready)))
}

/// The index, default model first.
pub fn entries(state: &ApiState, only_ready: bool) -> Vec<IndexEntry> {
    let health = state.engine.health();
    let entry = |info: Arc<ModelInfo>| {
        let health = health.iter().find(|(name, _)| *name == info.name).map(|(_, health)| health);
        let (state, reason) = match health {
            Some(Health::Ready) => ("READY", ""),
            Some(Health::Loading) | None => ("LOADING", "not warmed up yet"),
            Some(Health::Unhealthy(_)) => ("UNAVAILABLE", "no device of it answers"),
            Some(Health::Draining) => ("UNAVAILABLE", "the server is draining"),
        };
        IndexEntry { name: info.name.to_string(), version: info.version.clone(), state, reason }
    };
    let entries = state.engine.models().into_iter().map(entry);
    entries.filter(|entry| !only_ready || entry.state == "READY").collect()
}

/// Always refused: models are those of the settings, read when the server starts.
#[utoipa::path(
    post, path = "/v2/repository/models/{model}/load", tag = "Open Inference Protocol",
    params(("model" = String, Path, description = "A model's name", example = "all-MiniLM-L6-v2")),
    responses(Refusals),
)]
pub async fn load(path: Asked) -> Result<(), Fault> {
    Err(refused(path, "loaded"))
}

/// Always refused: models are those of the settings, until the server ends.
#[utoipa::path(
    post, path = "/v2/repository/models/{model}/unload", tag = "Open Inference Protocol",
    params(("model" = String, Path, description = "A model's name", example = "all-MiniLM-L6-v2")),
    responses(Refusals),
)]
pub async fn unload(path: Asked) -> Result<(), Fault> {
    Err(refused(path, "unloaded"))
}

fn refused(path: Asked, done: &str) -> Fault {
    match ModelPath::of(path) {
        Err(error) => error.into(),
        Ok(path) => fixed(&path.name(), done),
    }
}

/// What a model that is to be loaded or unloaded is answered.
pub fn fixed(name: &str, done: &str) -> Fault {
    let reason = format!("`{name}` cannot be {done} while the server runs: its models are those of ai.models");
    Error::Invalid { field: "model".to_string(), reason }.into()
}
