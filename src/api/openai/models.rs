//! `GET /v1/models`.

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::super::ApiState;
use super::super::docs::Refusals;
use super::super::status::Fault;
use super::super::tfs::{self, status::ModelVersions};
use crate::model::ModelInfo;
use crate::{Error, Result};

/// One model, as OpenAI describes it.
#[derive(Debug, Serialize, ToSchema)]
pub struct Model {
    #[schema(example = "all-MiniLM-L6-v2")]
    id: String,
    #[schema(example = "model")]
    object: &'static str,
    /// Unix seconds of the model's files.
    created: u64,
    #[schema(example = "eremois")]
    owned_by: &'static str,
}

/// One model, as OpenAI and as TensorFlow Serving describe it: both ask at the same address, and each reads its own fields.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelWithStatus {
    #[serde(flatten)]
    model: Model,
    #[serde(flatten)]
    status: ModelVersions,
}

/// The body of `GET /v1/models`.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelList {
    #[schema(example = "list")]
    object: &'static str,
    data: Vec<Model>,
}

impl From<&ModelInfo> for Model {
    fn from(info: &ModelInfo) -> Self {
        Self { id: info.name.to_string(), object: "model", created: info.created, owned_by: "eremois" }
    }
}

/// The models served, default first.
#[utoipa::path(get, path = "/v1/models", tag = "OpenAI", responses((status = 200, body = ModelList, description = "All models")))]
pub async fn models(State(state): State<ApiState>) -> axum::Json<ModelList> {
    let data = state.engine.models().iter().map(|info| Model::from(&**info)).collect();
    axum::Json(ModelList { object: "list", data })
}

/// One model; and the status of its version, for clients of TensorFlow Serving.
#[utoipa::path(
    get, path = "/v1/models/{id}", tag = "OpenAI",
    params(("id" = String, Path, description = "A name from `/v1/models`", example = "all-MiniLM-L6-v2")),
    responses((status = 200, body = ModelWithStatus, description = "The model"), Refusals),
)]
pub async fn model(
    State(state): State<ApiState>,
    id: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Response, Fault> {
    let Path(id) = id.map_err(|e| Error::Malformed { field: "id".to_string(), reason: e.body_text() })?;
    match state.engine.model(Some(&id)) {
        Ok(info) => {
            let status = ModelVersions::of(&state, &info);
            Ok(axum::Json(ModelWithStatus { model: Model::from(&*info), status }).into_response())
        }
        Err(unknown) => tfs::read(&state, &id, &request).unwrap_or(Err(unknown.into())),
    }
}
