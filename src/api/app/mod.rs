//! The application API: inferences that can be found again. One envelope for errors, RFC 9457's.

pub mod create;
pub mod events;
pub mod input;
pub mod list;
pub mod numbers;
pub mod records;
pub mod wire;

use axum::Router;
use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::routing::{delete, get, post};
use serde_json::json;

use super::ApiState;
use super::status::Fault;
use crate::store::record::InferenceId;
use crate::{Error, Result};

pub use wire::render;

/// What every path of this API begins with; the version is the only one there is (`api.version`).
pub const PREFIX: &str = "/api/v1";

/// The routes of the application API.
pub fn routes() -> Router<ApiState> {
    Router::new()
        .route("/api/v1/inferences", post(create::create).get(list::list))
        .route("/api/v1/inferences/{id}", get(records::one).delete(records::remove))
        .route("/api/v1/inferences/{id}/events", get(events::events))
        .route("/api/v1/inferences/{id}/feedback", post(records::feedback))
        .route("/api/v1/users/{user}/inferences", delete(records::erase))
        .route("/api/v1/usage", get(numbers::usage))
        .route("/api/v1/quality", get(numbers::quality))
}

/// `{type, title, status, detail, kind, field?}`, RFC 9457.
pub fn error_body(fault: &Fault) -> serde_json::Value {
    let class = fault.class();
    let kind = class.kind.as_str();
    let mut body = json!({
        "type": format!("urn:eremois:problem:{kind}"),
        "title": class.status.canonical_reason().unwrap_or("Error"),
        "status": class.status.as_u16(),
        "detail": fault.message(),
        "kind": kind,
    });
    if let Some(field) = fault.field() {
        body["field"] = json!(field);
    }
    body
}

/// The id of a path. Errors: `Malformed` naming `id`.
fn id_of(path: Result<Path<String>, PathRejection>) -> Result<InferenceId> {
    text_of(path, "id")?.parse()
}

/// The only parameter of a path. Errors: `Malformed` for bytes that are no UTF-8.
fn text_of(path: Result<Path<String>, PathRejection>, field: &str) -> Result<String> {
    let Path(text) = path.map_err(|e| Error::Malformed { field: field.to_string(), reason: e.body_text() })?;
    Ok(text)
}

/// A 404 for an inference.
fn not_found(id: &InferenceId) -> Error {
    Error::NotFound { what: "inference", id: id.to_string() }
}
