//! `POST /v1/embeddings`.

use axum::extract::{Request, State};
use axum::response::Response;
use serde::Deserialize;
use utoipa::ToSchema;

use super::super::body::Call;
use super::super::docs::Refusals;
use super::super::forms::{Dtype, EmbeddingType, EncodingFormat, Form, raw};
use super::super::inputs::Inputs;
use super::super::negotiate::{Media, media};
use super::super::phases::{Served, attach};
use super::super::prompts::Use;
use super::super::status::Fault;
use super::super::{ApiState, body, write};
use crate::inference::Computed;
use crate::request::{Request as Embed, TaskParams, Truncation, TruncationDirection};
use crate::{Error, Result};

/// The body of `/v1/embeddings`: OpenAI's fields, Jina's, and `dtype`. Fields not listed are ignored.
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
    /// Ours: the type of the values, float32 unless said otherwise. OpenAI's client must then ask for `encoding_format`
    /// float: it decodes base64 as f32.
    pub dtype: Option<Dtype>,
    /// Jina's: values and how they are written in one word.
    pub embedding_type: Option<EmbeddingType>,
    /// Jina's: what the embeddings are for. Chooses the model's prompt of that name, where there is one.
    pub task: Option<Task>,
    /// Jina's: scale each embedding to length 1; what the model's manifest says unless given.
    pub normalized: Option<bool>,
    /// Jina's: cut inputs that are longer than the model takes, at their end; else they are refused.
    #[schema(default = false)]
    pub truncate: Option<bool>,
    /// Ours: read an input that is longer than the model takes in chunks that share so many tokens, and answer the mean
    /// of their embeddings.
    pub chunk_overlap: Option<usize>,
    /// Jina's, and not offered: true is refused.
    #[schema(default = false)]
    pub late_chunking: Option<bool>,
}

/// Jina's tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
pub enum Task {
    #[serde(rename = "retrieval.query")]
    RetrievalQuery,
    #[serde(rename = "retrieval.passage")]
    RetrievalPassage,
    #[serde(rename = "text-matching")]
    TextMatching,
    #[serde(rename = "classification")]
    Classification,
    #[serde(rename = "separation")]
    Separation,
}

impl Task {
    fn as_use(self) -> Use {
        match self {
            Self::RetrievalQuery => Use::Query,
            Self::RetrievalPassage => Use::Document,
            Self::TextMatching => Use::Similarity,
            Self::Classification => Use::Classification,
            Self::Separation => Use::Clustering,
        }
    }
}

impl EmbeddingsBody {
    /// Errors: `UnknownModel`; `Invalid` for what is not offered.
    fn params(&self, state: &ApiState) -> Result<TaskParams> {
        if self.late_chunking == Some(true) {
            let reason = "inputs are embedded one by one here".to_string();
            return Err(Error::Invalid { field: "late_chunking".to_string(), reason });
        }
        let prompt_name = match self.task {
            Some(task) => task.as_use().prompt_name(&*state.engine.model(self.model.as_deref())?),
            None => None,
        };
        let truncation = match self.truncate {
            Some(true) => Truncation::Cut(TruncationDirection::Right),
            _ => Truncation::Refuse,
        };
        let truncation = truncation.or_chunks(self.chunk_overlap)?;
        let (normalize, dimensions) = (self.normalized, self.dimensions);
        Ok(TaskParams { normalize, dimensions, truncation, prompt_name, ..TaskParams::default() })
    }
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

/// A list of numbers, or base64 of the little-endian values.
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
        ("one bit a value, as Jina's clients ask" = (value = json!({"model": "all-MiniLM-L6-v2", "input": [{"text": "w1"}, "w2"], "embedding_type": "ubinary", "task": "retrieval.passage", "normalized": true}))),
        ("a byte a value" = (value = json!({"model": "all-MiniLM-L6-v2", "input": "w1", "dtype": "int8", "encoding_format": "float"}))),
        ("token ids, shortened" = (value = json!({"model": "all-MiniLM-L6-v2", "input": [[101, 102], [101, 103, 102]], "dimensions": 8}))),
    )),
    responses((status = 200, body = Embeddings, description = "One embedding an input, in their order"), Refusals),
)]
pub async fn embeddings(State(state): State<ApiState>, request: Request) -> Result<Response, Fault> {
    let media = media(request.headers())?;
    let Call { body, deadline, cache_use, priority, record_id, .. } =
        body::read::<EmbeddingsBody>(&state, request).await?;
    let form = Form::of(body.encoding_format, body.dtype, body.embedding_type)?;
    let params = body.params(&state)?;
    let inputs = body.input.checked("input", state.settings.max_client_batch_size)?;
    let request = Embed { model: body.model, inputs, params, deadline, priority };
    let computed = state.keeper.infer(request, cache_use, "openai", record_id).await?;
    let served = Served::of(&computed);
    let num_floats = computed.rows.iter().map(|row| row.len()).sum();
    let mut response = match media {
        Media::Json => write::offload(num_floats, move || write_embeddings(&computed, form)).await?,
        Media::Bytes => raw(computed.rows, form.dtype).await?,
    };
    attach(&mut response, served);
    Ok(response)
}

/// Longest of what stands around an embedding, its position included.
const AROUND_ROW: usize = 80;

/// The answer's JSON. Errors: `Internal` for a row with a value that is no number; `Invalid` for one without this form.
fn write_embeddings(computed: &Computed, form: Form) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(form.rows_len(&computed.rows) + AROUND_ROW * computed.rows.len() + 256);
    let mut scratch = Vec::new();
    out.extend_from_slice(br#"{"object":"list","data":["#);
    for (index, row) in computed.rows.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        out.extend_from_slice(br#"{"object":"embedding","embedding":"#);
        form.push(&mut out, row, &mut scratch)?;
        out.extend_from_slice(format!(r#","index":{index}}}"#).as_bytes());
    }
    out.extend_from_slice(br#"],"model":"#);
    write::push_str(&mut out, &computed.info.name);
    let tokens = computed.usage.num_tokens;
    out.extend_from_slice(format!(r#","usage":{{"prompt_tokens":{tokens},"total_tokens":{tokens}}}}}"#).as_bytes());
    Ok(out)
}
