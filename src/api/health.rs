//! For probes, scrapers and operators.

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Serialize;
use serde_json::json;
use utoipa::ToSchema;

use super::ApiState;
use super::docs::Refusals;
use super::status::Fault;
use crate::Error;
use crate::serve::{Health, ModelHealth};
use crate::store::Records;
use crate::store::durable::{self, Durable};

/// The routes of health and metrics.
pub fn routes() -> Router<ApiState> {
    Router::new()
        .route("/health/live", get(live))
        .route("/health/ready", get(ready))
        .route("/health", get(health))
        .route("/ping", get(ping))
        .route("/metrics", get(metrics))
}

/// Whether the server takes requests, and each model's state.
#[derive(Debug, Serialize, ToSchema)]
pub struct Readiness {
    /// "ready", or the state of the first model that is not.
    #[schema(example = "ready")]
    status: &'static str,
    models: Vec<ModelStatus>,
    store: StoreStatus,
}

/// Where results are kept, and how well. A store that is away does not make the server unready: other replicas would have
/// it no better, and what is not to be kept is answered as ever.
#[derive(Debug, Serialize, ToSchema)]
pub struct StoreStatus {
    /// "embedded", "mongodb", or "memory" where nothing is kept.
    #[schema(example = "embedded")]
    name: &'static str,
    /// "healthy"; "journalling" while MongoDB is away or catches up; "full" when results can be kept no more.
    #[schema(example = "healthy")]
    status: &'static str,
    /// Entries of the journal that MongoDB has not.
    journal_entries: usize,
    /// RFC 3339; `null` while it is healthy.
    since: Option<String>,
}

impl StoreStatus {
    fn of(store: &Durable) -> Self {
        let (status, journal_entries, since) = match store.state() {
            durable::State::Healthy => ("healthy", 0, None),
            durable::State::Journalling { since, entries } => ("journalling", entries, Some(since)),
            durable::State::Full { since, entries, cause: _ } => ("full", entries, Some(since)),
        };
        Self { name: store.name(), status, journal_entries, since: since.map(|at| format!("{at:.3}")) }
    }
}

/// One model's part of the answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelStatus {
    #[schema(example = "all-MiniLM-L6-v2")]
    name: String,
    /// "ready", "loading", "unhealthy" or "draining".
    #[schema(example = "ready")]
    status: &'static str,
    /// Each device that computes the model. The model is ready while one of them is.
    devices: Vec<DeviceStatus>,
}

/// One device's part of the answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct DeviceStatus {
    #[schema(example = "cuda:0")]
    name: String,
    /// "ready", "loading" or "unhealthy".
    #[schema(example = "ready")]
    status: &'static str,
}

impl ModelStatus {
    fn of(model: &ModelHealth) -> Self {
        let device = |(name, health): &(String, Health)| DeviceStatus { name: name.clone(), status: word(health) };
        Self {
            name: model.model.to_string(),
            status: word(&model.health),
            devices: model.devices.iter().map(device).collect(),
        }
    }
}

fn word(health: &Health) -> &'static str {
    match health {
        Health::Loading => "loading",
        Health::Ready => "ready",
        Health::Unhealthy(_) => "unhealthy",
        Health::Draining => "draining",
    }
}

/// The process answers.
#[utoipa::path(get, path = "/health/live", tag = "operations", responses((status = 200, description = "Alive", body = serde_json::Value, example = json!({"status": "live"}))))]
pub async fn live() -> axum::Json<serde_json::Value> {
    axum::Json(json!({"status": "live"}))
}

/// Every model is warmed up and a device of it answers. How results are kept is told, and does not decide.
#[utoipa::path(
    get, path = "/health/ready", tag = "operations",
    responses(
        (status = 200, description = "All models are ready", body = Readiness),
        (status = 503, description = "At least one model is loading, unhealthy or draining", body = Readiness, example = json!({"status": "loading", "models": [{"name": "all-MiniLM-L6-v2", "status": "loading", "devices": [{"name": "cpu", "status": "loading"}]}], "store": {"name": "embedded", "status": "healthy", "journal_entries": 0, "since": null}})),
    ),
)]
pub async fn ready(State(state): State<ApiState>) -> Response {
    let models = state.engine.models_health();
    let status = match models.iter().find(|m| m.health != Health::Ready) {
        Some(model) => word(&model.health),
        // All are ready that are there: the next is being read from disk.
        None if state.is_starting() => "loading",
        None => "ready",
    };
    let models = models.iter().map(ModelStatus::of).collect();
    let code = if status == "ready" { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let store = StoreStatus::of(state.keeper.store());
    (code, axum::Json(Readiness { status, models, store })).into_response()
}

/// As `/health/ready`, in TEI's form: nothing to read but the status.
#[utoipa::path(get, path = "/health", tag = "text-embeddings-inference", responses((status = 200, description = "All models are ready"), Refusals))]
pub async fn health(State(state): State<ApiState>) -> Result<StatusCode, Fault> {
    let health = state.engine.health();
    match health.iter().find(|(_, h)| *h != Health::Ready) {
        None if state.is_starting() => Err(Error::Loading { model: "default".to_string() }.into()),
        None => Ok(StatusCode::OK),
        Some((model, health)) => Err(unready(model, health).into()),
    }
}

/// What a model that is not ready answers.
pub fn unready(model: &str, health: &Health) -> Error {
    let model = model.to_string();
    match health {
        Health::Unhealthy(reason) => Error::Unhealthy { model, reason: reason.clone() },
        Health::Draining => Error::Draining,
        Health::Loading | Health::Ready => Error::Loading { model },
    }
}

/// As `/health`, under SageMaker's name.
#[utoipa::path(get, path = "/ping", tag = "text-embeddings-inference", responses((status = 200, description = "All models are ready"), Refusals))]
pub async fn ping(state: State<ApiState>) -> Result<StatusCode, Fault> {
    health(state).await
}

/// All metrics, in Prometheus' text format.
#[utoipa::path(get, path = "/metrics", tag = "operations", responses((status = 200, description = "Prometheus' text format", body = String, content_type = "text/plain")))]
pub async fn metrics(State(state): State<ApiState>) -> Response {
    // Folding the samples and reading the kernel's files takes longer than an async thread may be held.
    let text = tokio::task::spawn_blocking(move || (state.metrics)()).await;
    match text {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(e) => Fault::from(Error::Internal { cause: format!("metrics: {e}") }).into_response(),
    }
}
