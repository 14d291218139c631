//! `GET /v1/models`.

use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use super::super::ApiState;
use super::super::docs::Refusals;
use super::super::status::Fault;
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

/// One model.
#[utoipa::path(
    get, path = "/v1/models/{id}", tag = "OpenAI",
    params(("id" = String, Path, description = "A name from `/v1/models`", example = "all-MiniLM-L6-v2")),
    responses((status = 200, body = Model, description = "The model"), Refusals),
)]
pub async fn model(
    State(state): State<ApiState>,
    id: Result<Path<String>, axum::extract::rejection::PathRejection>,
) -> Result<axum::Json<Model>, Fault> {
    let Path(id) = id.map_err(|e| Error::Malformed { field: "id".to_string(), reason: e.body_text() })?;
    let info = state.engine.model(Some(&id))?;
    Ok(axum::Json(Model::from(&*info)))
}
