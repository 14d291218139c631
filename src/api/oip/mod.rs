//! The Open Inference Protocol, version 2, over REST and gRPC, with Triton's extensions for binary tensors, statistics, model
//! configuration and the repository's index. The judge is `tritonclient`.
//!
//! What a model's inputs and outputs are called and shaped is known to [`super::tensors`] alone; `tensor` and `elements` read
//! tensors as this protocol writes them.
//!
//! ```text
//! body ─▶ split: JSON head, raw tensors ─▶ InferBody ─▶ Tensor ─▶ Inputs ─▶ Request ─▶ … ─▶ Computed ─▶ OutputTensor ─▶ answer
//! ```
//!
//! Sources: kserve/open-inference-protocol `specification/protocol/inference_rest.md`; triton-inference-server/server
//! `docs/protocol/extension_*.md`.

mod answer;
pub mod config;
mod elements;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod grpc;
pub mod infer;
mod load_options;
pub mod metadata;
pub mod repository;
pub mod statistics;
mod tensor;
mod wire;

use std::sync::Arc;

use axum::Router;
use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::routing::{get, post};
use serde::Deserialize;
use serde_json::json;

use super::ApiState;
use super::status::Fault;
use crate::model::ModelInfo;
use crate::{Error, Result};

pub use wire::HEAD_LEN;
#[cfg(any(test, feature = "fuzzing"))]
pub use wire::InferBody;

/// The routes of the protocol.
pub fn routes() -> Router<ApiState> {
    let mut router = Router::new()
        .route("/v2", get(metadata::server))
        .route("/v2/health/live", get(metadata::live))
        .route("/v2/health/ready", get(metadata::ready))
        .route("/v2/models/stats", get(statistics::all))
        .route("/v2/repository/index", post(repository::index));
    // Names of the hub have a slash ("org/name"), and clients do not escape it.
    for model in ["{model}", "{org}/{model}"] {
        for version in ["", "/versions/{version}"] {
            let path = format!("/v2/models/{model}{version}");
            router = router
                .route(&path, get(metadata::model))
                .route(&format!("{path}/ready"), get(metadata::model_ready))
                .route(&format!("{path}/config"), get(config::config))
                .route(&format!("{path}/stats"), get(statistics::one))
                .route(&format!("{path}/infer"), post(infer::infer));
        }
        router = router
            .route(&format!("/v2/repository/models/{model}/load"), post(repository::load))
            .route(&format!("/v2/repository/models/{model}/unload"), post(repository::unload));
    }
    router
}

/// Whether a path is of this protocol; others under `/v2` are Cohere's.
pub fn owns(path: &str) -> bool {
    let rest = path.strip_prefix("/v2").unwrap_or("/none");
    let mut segments = rest.trim_start_matches('/').split('/');
    (rest.is_empty() || rest.starts_with('/'))
        && matches!(segments.next(), Some("" | "health" | "models" | "repository"))
}

/// `{error}`: the message is all there is.
pub fn error_body(fault: &Fault) -> serde_json::Value {
    json!({"error": fault.message()})
}

/// The form of an error, for the document.
#[derive(utoipa::ToSchema)]
#[allow(dead_code)]
pub struct OipError {
    error: String,
}

/// What a path says of the model.
#[derive(Debug, Deserialize)]
pub struct ModelPath {
    /// The part of the name before a slash.
    org: Option<String>,
    model: String,
    version: Option<String>,
}

type Asked = Result<Path<ModelPath>, PathRejection>;

impl ModelPath {
    /// Errors: `Malformed` for bytes that are no UTF-8.
    fn of(path: Asked) -> Result<Self> {
        let Path(path) = path.map_err(|e| Error::Malformed { field: "model".to_string(), reason: e.body_text() })?;
        Ok(path)
    }

    /// From the fields of a gRPC request; an empty version is the one served.
    fn new(model: String, version: String) -> Self {
        Self { org: None, model, version: Some(version).filter(|version| !version.is_empty()) }
    }

    fn name(&self) -> String {
        match &self.org {
            Some(org) => format!("{org}/{}", self.model),
            None => self.model.clone(),
        }
    }

    /// Errors: `UnknownModel`; `NotFound` for a version that is not the one served.
    fn find(&self, state: &ApiState) -> Result<Arc<ModelInfo>> {
        let info = state.engine.model(Some(&self.name()))?;
        match &self.version {
            Some(version) if *version != info.version => {
                Err(Error::NotFound { what: "version of this model", id: version.clone() })
            }
            _ => Ok(info),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::owns;

    #[test]
    fn only_its_own_paths_are_the_protocols() {
        for path in ["/v2", "/v2/", "/v2/models", "/v2/models/m/infer", "/v2/health/none", "/v2/repository/index"] {
            assert!(owns(path), "{path}");
        }
        for path in ["/", "/v1/models", "/v2/rerank", "/v2/embed", "/v22", "/v2models", "/v2/modelsx"] {
            assert!(!owns(path), "{path}");
        }
    }
}
