//! Counts and times of models, in the form Triton has for them.

use std::sync::Arc;
use std::time::{self, UNIX_EPOCH};

use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::{Asked, ModelPath};
use crate::Result;
use crate::api::ApiState;
use crate::api::docs::Refusals;
use crate::api::status::Fault;
use crate::model::ModelInfo;
use crate::serve::statistics::{Statistics, Timed};

/// The body of the answers.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelsStatistics {
    pub model_stats: Vec<ModelStatistics>,
}

/// A model's counts since the server started.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelStatistics {
    #[schema(example = "all-MiniLM-L6-v2")]
    pub name: String,
    #[schema(example = "1")]
    pub version: String,
    /// Milliseconds since 1970; 0 before the first.
    pub last_inference: u64,
    /// Inputs computed.
    pub inference_count: u64,
    /// Batches computed.
    pub execution_count: u64,
    pub inference_stats: InferenceStatistics,
    /// Not counted by size: always empty.
    pub batch_stats: Vec<serde_json::Value>,
}

/// Requests by how they ended, and where those computed spent their time.
#[derive(Debug, Serialize, ToSchema)]
pub struct InferenceStatistics {
    /// Requests of any protocol that were computed, and those that the cache answered whole.
    pub success: Duration,
    /// Requests answered with an error, refusals for want of room included.
    pub fail: Duration,
    /// From the push to the launch of the batch. As often as `success`: what the cache answers has waited for 0.
    pub queue: Duration,
    /// Tokenising.
    pub compute_input: Duration,
    /// From the launch to the rows on the host.
    pub compute_infer: Duration,
    /// As often as the other two, and part of `compute_infer`: 0 nanoseconds.
    pub compute_output: Duration,
    /// Requests that were answered without computing: from the cache, or with what another request computed.
    pub cache_hit: Duration,
    /// Requests of which the cache had nothing or a part. How long it was looked in is not measured: 0 nanoseconds.
    pub cache_miss: Duration,
}

/// How often, and how long in all.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StatisticDuration)]
pub struct Duration {
    pub count: u64,
    /// Nanoseconds.
    pub ns: u64,
}

impl From<Timed> for Duration {
    fn from(Timed { count, total }: Timed) -> Self {
        Self { count, ns: total.as_nanos() as u64 }
    }
}

impl ModelStatistics {
    fn of(info: &ModelInfo, statistics: Statistics) -> Self {
        let last = statistics.last.and_then(|at| at.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
        // Clients compare these counts, so they are made of two that were read once.
        let (computed, found) = (statistics.success, statistics.found);
        let of_computed = |total| Duration::from(Timed { count: computed.count, total });
        let of_all = |total| Duration::from(Timed { count: computed.count + found.count, total });
        Self {
            name: info.name.to_string(),
            version: info.version.clone(),
            last_inference: last.as_millis() as u64,
            inference_count: statistics.num_inputs,
            execution_count: statistics.num_batches,
            inference_stats: InferenceStatistics {
                success: of_all(computed.total + found.total),
                fail: statistics.fail.into(),
                queue: of_all(statistics.queue),
                compute_input: of_computed(statistics.tokenize),
                compute_infer: of_computed(statistics.inference),
                compute_output: of_computed(time::Duration::ZERO),
                cache_hit: found.into(),
                cache_miss: Duration { count: statistics.num_missed, ns: 0 },
            },
            batch_stats: Vec::new(),
        }
    }
}

/// The counts of these models.
pub fn of_models(state: &ApiState, infos: &[Arc<ModelInfo>]) -> Result<ModelsStatistics> {
    let one = |info: &Arc<ModelInfo>| Ok(ModelStatistics::of(info, state.engine.statistics(&info.name)?));
    Ok(ModelsStatistics { model_stats: infos.iter().map(one).collect::<Result<_>>()? })
}

/// Counts and times of all models.
#[utoipa::path(
    get, path = "/v2/models/stats", tag = "Open Inference Protocol",
    responses((status = 200, body = ModelsStatistics, description = "Since the server started"), Refusals),
)]
pub async fn all(State(state): State<ApiState>) -> Result<axum::Json<ModelsStatistics>, Fault> {
    Ok(axum::Json(of_models(&state, &state.engine.models())?))
}

/// Counts and times of a model.
#[utoipa::path(
    get, path = "/v2/models/{model}/stats", tag = "Open Inference Protocol",
    params(("model" = String, Path, description = "A name from `/v1/models`", example = "all-MiniLM-L6-v2")),
    responses((status = 200, body = ModelsStatistics, description = "Since the server started"), Refusals),
)]
pub async fn one(State(state): State<ApiState>, path: Asked) -> Result<axum::Json<ModelsStatistics>, Fault> {
    let info = ModelPath::of(path)?.find(&state)?;
    Ok(axum::Json(of_models(&state, &[info])?))
}

/// Counts and times of a version of a model.
#[utoipa::path(
    get, path = "/v2/models/{model}/versions/{version}/stats", tag = "Open Inference Protocol",
    params(
        ("model" = String, Path, description = "A name from `/v1/models`", example = "all-MiniLM-L6-v2"),
        ("version" = String, Path, description = "The version served", example = "1"),
    ),
    responses((status = 200, body = ModelsStatistics, description = "Since the server started"), Refusals),
)]
#[allow(dead_code)]
pub fn one_version() {
    // Its description alone: the handler is the one without a version.
}
