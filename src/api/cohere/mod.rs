//! Cohere's protocol. The judge is the `cohere` Python package.

pub mod content;
pub mod embed;
pub mod units;

use axum::Router;
use axum::routing::post;
use serde_json::json;

use super::ApiState;
use super::status::Fault;

/// The routes of Cohere's protocol.
pub fn routes() -> Router<ApiState> {
    Router::new().route("/v2/embed", post(embed::embed)).route("/v1/embed", post(embed::embed_v1))
}

/// `{message}`.
pub fn error_body(fault: &Fault) -> serde_json::Value {
    json!({"message": fault.message()})
}
