//! The status of a model's versions.

use serde::Serialize;
use utoipa::ToSchema;

use super::super::ApiState;
use crate::model::ModelInfo;
use crate::serve::Health;

/// TensorFlow Serving's `GetModelStatusResponse`.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelVersions {
    /// One a version; one version of each model is served.
    model_version_status: Vec<VersionStatus>,
}

/// One version's state.
#[derive(Debug, Serialize, ToSchema)]
pub struct VersionStatus {
    #[schema(example = "1")]
    version: String,
    /// "LOADING", "AVAILABLE", "UNLOADING" while the server drains, or "END" where the device does not answer.
    #[schema(example = "AVAILABLE")]
    state: &'static str,
    status: VersionError,
}

/// What is wrong with it.
#[derive(Debug, Serialize, ToSchema)]
pub struct VersionError {
    #[schema(example = "OK")]
    error_code: &'static str,
    /// Empty where all is well. Causes are in the logs.
    #[schema(example = "")]
    error_message: &'static str,
}

impl ModelVersions {
    /// The state of a model that is served.
    pub fn of(state: &ApiState, info: &ModelInfo) -> Self {
        let health = state.engine.models_health().into_iter().find(|model| model.model == info.name);
        let (state, error_code, error_message) = match health.map_or(Health::Loading, |model| model.health) {
            Health::Loading => ("LOADING", "OK", ""),
            Health::Ready => ("AVAILABLE", "OK", ""),
            Health::Draining => ("UNLOADING", "OK", ""),
            Health::Unhealthy(_) => ("END", "UNAVAILABLE", "the device does not answer"),
        };
        let status = VersionError { error_code, error_message };
        Self { model_version_status: vec![VersionStatus { version: info.version.clone(), state, status }] }
    }
}

/// The version that is served. `/v1/models/{id}` alone answers the same, together with OpenAI's model.
#[utoipa::path(
    get, path = "/v1/models/{id}/versions/{version}", tag = "TensorFlow Serving",
    params(
        ("id" = String, Path, description = "A name from `/v1/models`", example = "all-MiniLM-L6-v2"),
        ("version" = String, Path, description = "The version that is served", example = "1"),
    ),
    responses((status = 200, body = ModelVersions, description = "Its state"), super::super::docs::Refusals),
)]
#[allow(dead_code)] // a page of the document: the route is `super::read`
pub async fn version() {}

/// The version that a label names: `stable` is the one that is served.
#[utoipa::path(
    get, path = "/v1/models/{id}/labels/{label}", tag = "TensorFlow Serving",
    params(
        ("id" = String, Path, description = "A name from `/v1/models`", example = "all-MiniLM-L6-v2"),
        ("label" = String, Path, description = "`stable`", example = "stable"),
    ),
    responses((status = 200, body = ModelVersions, description = "Its state"), super::super::docs::Refusals),
)]
#[allow(dead_code)] // a page of the document: the route is `super::read`
pub async fn label() {}
