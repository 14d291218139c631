//! `POST /v1/embeddings`.

use axum::extract::{Request, State};
use axum::response::Response;
use serde::Deserialize;
use utoipa::ToSchema;

use super::super::body::Call;
use super::super::docs::Refusals;
use super::super::inputs::Inputs;
use super::super::phases::{Served, attach};
use super::super::status::Fault;
use super::super::{ApiState, body, write};
use crate::Result;
use crate::inference::Computed;
use crate::request::{EmbedParams, Request as Embed};

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
    let Call { body, deadline, cache_use, priority, record_id, .. } =
        body::read::<EmbeddingsBody>(&state, request).await?;
    let params = EmbedParams { dimensions: body.dimensions, ..EmbedParams::default() };
    let inputs = body.input.checked("input", state.settings.max_client_batch_size)?;
    let request = Embed { model: body.model, inputs, params, deadline, priority };
    let computed = state.keeper.embed(request, cache_use, "openai", record_id).await?;
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
