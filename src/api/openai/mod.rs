//! OpenAI's embeddings, models, files and batches. The judge is the `openai` Python package.

pub mod batches;
pub mod embeddings;
pub mod files;
pub mod models;
mod wire;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::routing::{get, post};
use serde_json::json;

use super::ApiState;
use super::status::{Fault, Kind};
use crate::{Error, Result};

/// The routes of OpenAI's protocol.
pub fn routes() -> Router<ApiState> {
    // An upload has a limit of its own, which is told while it comes in.
    let uploads =
        Router::new().route("/v1/files", post(files::create).get(files::list)).layer(DefaultBodyLimit::disable());
    Router::new()
        .merge(answered())
        .merge(uploads)
        .route("/v1/models", get(models::models))
        // The rest of the path, because ids of the hub have a slash ("org/name").
        .route("/v1/models/{*id}", get(models::model))
        .route("/v1/files/{id}", get(files::one).delete(files::remove))
        .route("/v1/files/{id}/content", get(files::content))
        .route("/v1/batches", post(batches::create).get(batches::list))
        .route("/v1/batches/{id}", get(batches::one))
        .route("/v1/batches/{id}/cancel", post(batches::cancel))
        .route("/v1/batches/{id}/events", get(batches::events))
}

/// Those that batches may ask: [`crate::jobs::batch::ENDPOINTS`].
pub fn answered() -> Router<ApiState> {
    Router::new().route("/v1/embeddings", post(embeddings::embeddings))
}

/// The only parameter of a path. Errors: `Malformed` for bytes that are no UTF-8.
fn id_of(path: Result<Path<String>, PathRejection>) -> Result<String> {
    let Path(id) = path.map_err(|e| Error::Malformed { field: "id".to_string(), reason: e.body_text() })?;
    Ok(id)
}

/// `{error: {message, type, param, code}}`. `code` is our kind, but for the one code clients match on.
pub fn error_body(fault: &Fault) -> serde_json::Value {
    let class = fault.class();
    let kind = match class.kind {
        Kind::QueueFull | Kind::Overloaded => "rate_limit_error",
        _ if class.status.is_server_error() => "server_error",
        _ => "invalid_request_error",
    };
    json!({"error": {"message": fault.message(), "type": kind, "param": fault.field(), "code": class.kind.as_str()}})
}
