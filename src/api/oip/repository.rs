//! The repository: its index, and loading and unloading of its models.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Asked, ModelPath, load_options};
use crate::api::docs::Refusals;
use crate::api::status::{Fault, JSON};
use crate::api::{ApiState, body};
use crate::model::ModelInfo;
use crate::serve::control::{Idle, IdleState, LoadOptions, ModelControl};
use crate::serve::{Engine, Health};
use crate::{Error, Result};

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
    /// The one that is served, or would be; empty where none can be told.
    #[schema(example = "1")]
    pub version: String,
    /// "READY", "LOADING", "UNLOADING" or "UNAVAILABLE".
    #[schema(example = "READY")]
    pub state: &'static str,
    /// Why it is not ready; empty where it is.
    pub reason: String,
}

/// The models that are served, ready or not, and where `ai.model_control` is `explicit` also the others of the repository.
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
    Ok(axum::Json(entries(&state, only_ready).await?))
}

/// The index: what is served, default model first, then the rest by name.
pub async fn entries(state: &ApiState, only_ready: bool) -> Result<Vec<IndexEntry>> {
    let health = state.engine.health();
    let entry = |info: Arc<ModelInfo>| {
        let health = health.iter().find(|(name, _)| *name == info.name).map(|(_, health)| health);
        let (state, reason) = match health {
            Some(Health::Ready) => ("READY", ""),
            Some(Health::Loading) | None => ("LOADING", "not warmed up yet"),
            Some(Health::Unhealthy(_)) => ("UNAVAILABLE", "no device of it answers"),
            Some(Health::Draining) => ("UNAVAILABLE", "the server is draining"),
        };
        IndexEntry { name: info.name.to_string(), version: info.version.clone(), state, reason: reason.to_string() }
    };
    let mut entries: Vec<IndexEntry> = state.engine.models().into_iter().map(entry).collect();
    if only_ready {
        entries.retain(|entry| entry.state == "READY");
        return Ok(entries);
    }
    let mut others: BTreeMap<String, IndexEntry> = BTreeMap::new();
    let idle = blocking(state, |control, engine| Ok(control.idle(engine))).await?;
    others.extend(idle.into_iter().map(|idle| (idle.name.clone(), of_idle(idle))));
    for info in state.engine.retired() {
        let (name, version) = (info.name.to_string(), info.version.clone());
        let reason = "answers the requests that it has".to_string();
        others.insert(name.clone(), IndexEntry { name, version, state: "UNLOADING", reason });
    }
    // One that is exchanged, or was put in meanwhile, is listed as what it is now.
    entries.iter().for_each(|entry| drop(others.remove(&entry.name)));
    entries.extend(others.into_values());
    Ok(entries)
}

fn of_idle(idle: Idle) -> IndexEntry {
    let Idle { name, version, state } = idle;
    let (state, reason) = match state {
        IdleState::Loading => ("LOADING", "its files are read".to_string()),
        IdleState::Unloaded => ("UNAVAILABLE", "unloaded".to_string()),
        IdleState::Failed(reason) => ("UNAVAILABLE", reason),
    };
    IndexEntry { name, version, state, reason }
}

/// What a request to load a model says beside its name.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct LoadBody {
    /// `config`: a model configuration as JSON, of which `version_policy`, `dynamic_batching` and the parameter
    /// `max_batch_tokens` can be set.
    #[schema(value_type = Object, example = json!({"config": "{\"version_policy\": {\"specific\": {\"versions\": [1]}}}"}))]
    parameters: Option<BTreeMap<String, serde_json::Value>>,
}

/// Loads a model of the repository, or exchanges the one that is served for its highest version, without a gap. Answers
/// when the model takes requests; refused unless `ai.model_control` is `explicit`.
#[utoipa::path(
    post, path = "/v2/repository/models/{model}/load", tag = "Open Inference Protocol",
    params(("model" = String, Path, description = "A model's name", example = "all-MiniLM-L6-v2")),
    request_body(content = Option<LoadBody>),
    responses((status = 200, description = "The model takes requests"), Refusals),
)]
pub async fn load(State(state): State<ApiState>, path: Asked, request: Request) -> Result<(), Fault> {
    let name = ModelPath::of(path)?.name();
    let body: LoadBody = read(&state, request).await?;
    let options = load_options::of(&name, body.parameters.unwrap_or_default())?;
    Ok(load_named(&state, name, options).await?)
}

/// What a request to unload a model says beside its name.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct UnloadBody {
    /// `unload_dependents` changes nothing: no model depends on another.
    #[allow(dead_code)]
    #[schema(value_type = Object)]
    parameters: Option<BTreeMap<String, serde_json::Value>>,
}

/// Has a model take no more requests. Answers when its last one is answered, at most after `api.drain_timeout`; refused
/// unless `ai.model_control` is `explicit`.
#[utoipa::path(
    post, path = "/v2/repository/models/{model}/unload", tag = "Open Inference Protocol",
    params(("model" = String, Path, description = "A model's name", example = "all-MiniLM-L6-v2")),
    request_body(content = Option<UnloadBody>),
    responses((status = 200, description = "The model takes no more requests"), Refusals),
)]
pub async fn unload(State(state): State<ApiState>, path: Asked, request: Request) -> Result<(), Fault> {
    let name = ModelPath::of(path)?.name();
    let _: UnloadBody = read(&state, request).await?;
    Ok(unload_named(&state, name).await?)
}

/// Errors: those of [`ModelControl::load`].
pub async fn load_named(state: &ApiState, name: String, options: LoadOptions) -> Result<()> {
    blocking(state, move |control, engine| control.load(engine, &name, options)).await
}

/// Errors: those of [`ModelControl::unload`].
pub async fn unload_named(state: &ApiState, name: String) -> Result<()> {
    blocking(state, move |control, engine| control.unload(engine, &name)).await
}

/// On a thread that may wait, to the end also when the client goes: half a load would be none.
async fn blocking<T: Send + 'static>(
    state: &ApiState,
    work: impl FnOnce(&dyn ModelControl, &Arc<Engine>) -> Result<T> + Send + 'static,
) -> Result<T> {
    let (control, engine) = (state.control.clone(), state.engine.clone());
    let joined = tokio::task::spawn_blocking(move || work(&*control, &engine)).await;
    joined.map_err(|e| Error::Internal { cause: format!("loading or unloading: {e}") })?
}

/// The body, if there is one. `tritonclient` names no type; a page of another site is refused by the `origin` that browsers
/// put beside what they send unasked.
async fn read<T>(state: &ApiState, request: Request) -> Result<T, Fault>
where
    T: serde::de::DeserializeOwned + Default + Send + 'static,
{
    let headers: &HeaderMap = request.headers();
    let got = body::header_text(headers, header::CONTENT_TYPE);
    if headers.contains_key(header::ORIGIN) && !got.trim().to_ascii_lowercase().starts_with(JSON) {
        return Err(Fault::MediaType { got, expected: JSON });
    }
    let call = body::receive(state, request).await?;
    let parse = |bytes: Bytes| if bytes.is_empty() { Ok(T::default()) } else { body::parse(&bytes) };
    Ok(body::parsed(call, parse).await?.body)
}
