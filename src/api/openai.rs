//! OpenAI's embeddings and models. The judge is the `openai` Python package.

use axum::Router;
use axum::extract::{Path, Request, State};
use axum::response::Response;
use axum::routing::{get, post};
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::ToSchema;

use super::body::Call;
use super::docs::Refusals;
use super::inputs::Inputs;
use super::phases::{Served, attach};
use super::status::{Fault, Kind};
use super::{ApiState, body, write};
use crate::inference::Computed;
use crate::model::ModelInfo;
use crate::request::{EmbedParams, Request as Embed};
use crate::{Error, Result};

/// The routes of OpenAI's protocol.
pub fn routes() -> Router<ApiState> {
    Router::new()
        .route("/v1/embeddings", post(embeddings))
        .route("/v1/models", get(models))
        // The rest of the path, because ids of the hub have a slash ("org/name").
        .route("/v1/models/{*id}", get(model))
}

/// The body of `/v1/embeddings`. Fields not listed are ignored.
#[derive(Debug, Deserialize, ToSchema)]
pub struct EmbeddingsBody {
    pub input: Inputs,
    /// A name from `/v1/models`; without it the default model answers.
    pub model: Option<String>,
    pub encoding_format: Option<EncodingFormat>,
    /// Keep the first so many values of each embedding, scaled to length 1 again.
    #[schema(minimum = 1)]
    pub dimensions: Option<usize>,
    /// Taken as OpenAI's clients send it, and not used.
    #[serde(rename = "user")]
    #[schema(rename = "user")]
    pub _user: Option<String>,
}

/// How embeddings are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum EncodingFormat {
    /// A list of numbers.
    #[default]
    Float,
    /// Base64 of the little-endian f32 values: a third of the bytes, and what OpenAI's Python client asks for.
    Base64,
}

/// The answer of `/v1/embeddings`, for the document: it is written by hand.
#[derive(ToSchema)]
#[allow(dead_code)]
pub struct Embeddings {
    #[schema(example = "list")]
    object: String,
    data: Vec<Embedding>,
    #[schema(example = "all-MiniLM-L6-v2")]
    model: String,
    usage: EmbeddingsUsage,
}

#[derive(ToSchema)]
#[allow(dead_code)]
struct Embedding {
    #[schema(example = "embedding")]
    object: String,
    embedding: EmbeddingValue,
    /// The position of its input.
    index: usize,
}

/// A list of numbers, or base64 of little-endian f32 values.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code)]
enum EmbeddingValue {
    Float(Vec<f32>),
    Base64(String),
}

#[derive(ToSchema)]
#[allow(dead_code)]
struct EmbeddingsUsage {
    /// Tokens of all inputs, special tokens included, whether they were computed or found in the cache.
    prompt_tokens: usize,
    total_tokens: usize,
}

/// Embeddings of one or many inputs.
#[utoipa::path(
    post, path = "/v1/embeddings", tag = "OpenAI",
    request_body(content = EmbeddingsBody, examples(
        ("one text" = (value = json!({"model": "all-MiniLM-L6-v2", "input": "The quick brown fox"}))),
        ("many texts, base64" = (value = json!({"model": "all-MiniLM-L6-v2", "input": ["w1 w2", "w3"], "encoding_format": "base64"}))),
        ("token ids, shortened" = (value = json!({"model": "all-MiniLM-L6-v2", "input": [[101, 102], [101, 103, 102]], "dimensions": 8}))),
    )),
    responses((status = 200, body = Embeddings, description = "One embedding an input, in their order"), Refusals),
)]
pub async fn embeddings(State(state): State<ApiState>, request: Request) -> Result<Response, Fault> {
    let Call { body, deadline, cache_use, priority, .. } = body::read::<EmbeddingsBody>(&state, request).await?;
    let params = EmbedParams { dimensions: body.dimensions, ..EmbedParams::default() };
    let inputs = body.input.checked("input", state.settings.max_client_batch_size)?;
    let request = Embed { model: body.model, inputs, params, deadline, priority };
    let computed = state.keeper.embed(request, cache_use, "openai").await?;
    let served = Served::of(&computed);
    let format = body.encoding_format.unwrap_or_default();
    let num_floats = computed.rows.iter().map(|row| row.len()).sum();
    let mut response = write::offload(num_floats, move || write_embeddings(&computed, format, num_floats)).await?;
    attach(&mut response, served);
    Ok(response)
}

/// The answer's JSON. Errors: `Internal` for a row with a value that is no number.
fn write_embeddings(computed: &Computed, format: EncodingFormat, num_floats: usize) -> Result<Vec<u8>> {
    let mut out = write::buffer(num_floats + 8 * computed.rows.len());
    out.extend_from_slice(br#"{"object":"list","data":["#);
    for (index, row) in computed.rows.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        out.extend_from_slice(br#"{"object":"embedding","embedding":"#);
        match format {
            EncodingFormat::Float => write::push_floats(&mut out, row)?,
            EncodingFormat::Base64 => write::push_base64(&mut out, row)?,
        }
        out.extend_from_slice(format!(r#","index":{index}}}"#).as_bytes());
    }
    out.extend_from_slice(br#"],"model":"#);
    write::push_str(&mut out, &computed.info.name);
    let tokens = computed.usage.num_tokens;
    out.extend_from_slice(format!(r#","usage":{{"prompt_tokens":{tokens},"total_tokens":{tokens}}}}}"#).as_bytes());
    Ok(out)
}

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
