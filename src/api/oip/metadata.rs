//! What the server and its models are, and whether they take requests.

use axum::extract::State;
use serde::Serialize;
use serde_json::json;
use utoipa::ToSchema;

use super::{Asked, ModelPath};
use crate::Result;
use crate::api::docs::Refusals;
use crate::api::status::Fault;
use crate::api::tensors::Datatype;
use crate::api::tensors::signature::{Signature, TensorSpec};
use crate::api::{ApiState, health};
use crate::model::ModelInfo;
use crate::serve::Health;

/// The extensions of the protocol that are spoken, by Triton's names.
pub const EXTENSIONS: [&str; 6] =
    ["binary_tensor_data", "classification", "model_configuration", "model_repository", "parameters", "statistics"];

/// What the server is.
#[derive(Debug, Serialize, ToSchema)]
pub struct ServerMetadata {
    #[schema(example = "eremois")]
    name: &'static str,
    version: String,
    /// Names of Triton's extensions.
    #[schema(value_type = Vec<String>)]
    extensions: [&'static str; EXTENSIONS.len()],
}

/// A model and its tensors.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelMetadata {
    #[schema(example = "all-MiniLM-L6-v2")]
    name: String,
    /// The only one served.
    #[schema(example = json!(["1"]))]
    versions: [String; 1],
    platform: String,
    /// Of the usual form of a request; the configuration's parameter `other_inputs` has the others.
    inputs: Vec<TensorMetadata>,
    outputs: Vec<TensorMetadata>,
}

/// A tensor of a model.
#[derive(Debug, Serialize, ToSchema)]
pub struct TensorMetadata {
    #[schema(example = "text")]
    name: String,
    datatype: Datatype,
    /// -1 for a dimension of any length.
    #[schema(example = json!([-1, 1]))]
    shape: Vec<i64>,
}

impl TensorMetadata {
    pub(super) fn of_input(spec: &TensorSpec) -> Self {
        Self { name: spec.name.to_string(), datatype: spec.datatype, shape: spec.input_dims() }
    }

    fn of_output(spec: &TensorSpec) -> Self {
        let shape = spec.shape.iter().map(|dim| dim.map_or(-1, |dim| dim as i64)).collect();
        Self { name: spec.name.to_string(), datatype: spec.datatype, shape }
    }
}

/// The server's name, version and extensions.
#[utoipa::path(get, path = "/v2", tag = "Open Inference Protocol", responses((status = 200, body = ServerMetadata, description = "The server")))]
pub async fn server(State(state): State<ApiState>) -> axum::Json<ServerMetadata> {
    let version = state.build.version.clone();
    axum::Json(ServerMetadata { name: "eremois", version, extensions: EXTENSIONS })
}

/// The process answers.
#[utoipa::path(get, path = "/v2/health/live", tag = "Open Inference Protocol", responses((status = 200, description = "Alive", body = serde_json::Value, example = json!({"live": true}))))]
pub async fn live() -> axum::Json<serde_json::Value> {
    axum::Json(json!({"live": true}))
}

/// All models take requests.
#[utoipa::path(get, path = "/v2/health/ready", tag = "Open Inference Protocol", responses((status = 200, description = "Ready", body = serde_json::Value, example = json!({"ready": true})), Refusals))]
pub async fn ready(state: State<ApiState>) -> Result<axum::Json<serde_json::Value>, Fault> {
    health::health(state).await?;
    Ok(axum::Json(json!({"ready": true})))
}

/// A model and its tensors.
#[utoipa::path(
    get, path = "/v2/models/{model}", tag = "Open Inference Protocol",
    params(("model" = String, Path, description = "A name from `/v1/models`", example = "all-MiniLM-L6-v2")),
    responses((status = 200, body = ModelMetadata, description = "The model"), Refusals),
)]
pub async fn model(State(state): State<ApiState>, path: Asked) -> Result<axum::Json<ModelMetadata>, Fault> {
    let info = ModelPath::of(path)?.find(&state)?;
    let signature = Signature::main(&info);
    Ok(axum::Json(ModelMetadata {
        name: info.name.to_string(),
        versions: [info.version.clone()],
        platform: platform(&info),
        inputs: signature.usual().iter().map(TensorMetadata::of_input).collect(),
        outputs: signature.outputs.iter().map(TensorMetadata::of_output).collect(),
    }))
}

/// What kind of thing a model is, in a word of this protocol: who runs it and what it is.
pub fn platform(info: &ModelInfo) -> String {
    format!("eremois_{}", info.architecture)
}

/// A version of a model and its tensors.
#[utoipa::path(
    get, path = "/v2/models/{model}/versions/{version}", tag = "Open Inference Protocol",
    params(
        ("model" = String, Path, description = "A name from `/v1/models`", example = "all-MiniLM-L6-v2"),
        ("version" = String, Path, description = "The version served", example = "1"),
    ),
    responses((status = 200, body = ModelMetadata, description = "The model"), Refusals),
)]
#[allow(dead_code)]
pub fn model_version() {
    // Its description alone: the handler is the one without a version.
}

/// A model takes requests.
#[utoipa::path(
    get, path = "/v2/models/{model}/ready", tag = "Open Inference Protocol",
    params(("model" = String, Path, description = "A name from `/v1/models`", example = "all-MiniLM-L6-v2")),
    responses((status = 200, description = "Ready", body = serde_json::Value, example = json!({"name": "all-MiniLM-L6-v2", "ready": true})), Refusals),
)]
pub async fn model_ready(State(state): State<ApiState>, path: Asked) -> Result<axum::Json<serde_json::Value>, Fault> {
    let info = ModelPath::of(path)?.find(&state)?;
    check_ready(&state, &info)?;
    Ok(axum::Json(json!({"name": &*info.name, "ready": true})))
}

/// Errors: what a request to this model would be refused with now.
pub fn check_ready(state: &ApiState, info: &ModelInfo) -> Result<()> {
    match state.engine.health().into_iter().find(|(name, _)| *name == info.name) {
        Some((_, Health::Ready)) => Ok(()),
        Some((name, health)) => Err(health::unready(&name, &health)),
        None => Err(health::unready(&info.name, &Health::Loading)),
    }
}

/// A version of a model takes requests.
#[utoipa::path(
    get, path = "/v2/models/{model}/versions/{version}/ready", tag = "Open Inference Protocol",
    params(
        ("model" = String, Path, description = "A name from `/v1/models`", example = "all-MiniLM-L6-v2"),
        ("version" = String, Path, description = "The version served", example = "1"),
    ),
    responses((status = 200, description = "Ready", body = serde_json::Value, example = json!({"name": "all-MiniLM-L6-v2", "ready": true})), Refusals),
)]
#[allow(dead_code)]
pub fn model_version_ready() {
    // Its description alone: the handler is the one without a version.
}
