//! The routes of text-embeddings-inference. The judge is `huggingface_hub.InferenceClient`.

pub mod heads;
mod pipeline;
pub mod similarity;
pub mod tokens;
pub mod vertex;

use axum::Router;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::{get, post};
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::ToSchema;

use super::body::Call;
use super::docs::Refusals;
use super::forms::{self, Dtype, EncodingFormat, Form};
use super::images::to_base64;
use super::inputs::{Inputs, renamed};
use super::negotiate::{self, Media};
use super::phases::{Served, attach};
use super::status::{Fault, Kind};
use super::{ApiState, body};
use crate::model::ModelInfo;
use crate::model::signature::Modality;
use crate::request::{Request as Embed, Task, TaskParams, Truncation, TruncationDirection};
use crate::{Error, Result};

/// The routes of text-embeddings-inference's protocol.
pub fn routes() -> Router<ApiState> {
    Router::new()
        .route("/", post(main_task))
        .route("/invocations", post(main_task))
        .route("/vertex", post(vertex::vertex))
        .route("/embed", post(embed))
        .route("/embed_all", post(heads::embed_all))
        .route("/embed_sparse", post(heads::embed_sparse))
        .route("/predict", post(heads::predict))
        .route("/rerank", post(heads::rerank))
        .route("/similarity", post(similarity::similarity))
        .route("/tokenize", post(tokens::tokenize))
        .route("/decode", post(tokens::decode))
        .route("/info", get(info))
}

/// The side tokens are cut from where `truncate` is true.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
pub enum Direction {
    #[serde(alias = "left")]
    Left,
    #[default]
    #[serde(alias = "right")]
    Right,
}

/// An embedding, as `encoding_format` has it written.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[allow(dead_code)]
enum EmbeddingForm {
    Numbers(Vec<f32>),
    Base64(String),
}

/// Cut only on demand: without `truncate` a text that is too long is refused, not silently altered.
pub fn truncation(truncate: Option<bool>, direction: Option<Direction>) -> Truncation {
    match (truncate.unwrap_or(false), direction.unwrap_or_default()) {
        (false, _) => Truncation::Refuse,
        (true, Direction::Left) => Truncation::Cut(TruncationDirection::Left),
        (true, Direction::Right) => Truncation::Cut(TruncationDirection::Right),
    }
}

/// The engine names inputs as OpenAI does; clients of these routes wrote `inputs`.
fn rename(error: Error) -> Error {
    renamed(error, "inputs")
}

/// The body of `/embed`. Fields not listed are ignored.
#[derive(Debug, Deserialize, ToSchema)]
pub struct EmbedBody {
    pub inputs: Inputs,
    /// Scale each embedding to length 1; true unless said otherwise.
    #[schema(default = true)]
    pub normalize: Option<bool>,
    /// Cut inputs that are longer than the model takes; false unless said otherwise: they are refused.
    #[schema(default = false)]
    pub truncate: Option<bool>,
    pub truncation_direction: Option<Direction>,
    /// Ours: read an input that is longer than the model takes in chunks that share so many tokens, and answer the mean
    /// of their embeddings.
    pub chunk_overlap: Option<usize>,
    /// One of the model's prompts, put before every text.
    pub prompt_name: Option<String>,
    /// Keep the first so many values of each embedding.
    #[schema(minimum = 1)]
    pub dimensions: Option<usize>,
    /// Ours: the type of the values, float32 unless said otherwise.
    pub dtype: Option<Dtype>,
    /// Ours: how the values are written, as numbers unless said otherwise.
    pub encoding_format: Option<EncodingFormat>,
}

/// Embeddings of one or many inputs.
#[utoipa::path(
    post, path = "/embed", tag = "text-embeddings-inference",
    request_body(content = EmbedBody, examples(
        ("one text" = (value = json!({"inputs": "The quick brown fox"}))),
        ("many texts, cut to what the model takes" = (value = json!({"inputs": ["w1 w2", "w3"], "truncate": true, "truncation_direction": "Left"}))),
        ("token ids, raw" = (value = json!({"inputs": [[101, 102], [101, 103, 102]], "normalize": false, "dimensions": 8}))),
        ("one bit a value" = (value = json!({"inputs": ["w1 w2", "w3"], "dtype": "ubinary", "encoding_format": "base64"}))),
    )),
    responses((status = 200, body = Vec<EmbeddingForm>, description = "One embedding an input, in their order"), Refusals),
)]
pub async fn embed(State(state): State<ApiState>, request: Request) -> Result<Response, Fault> {
    let media = negotiate::media(request.headers())?;
    let call = body::read::<EmbedBody>(&state, request).await?;
    embed_call(&state, call, media).await
}

async fn embed_call(state: &ApiState, call: Call<EmbedBody>, media: Media) -> Result<Response, Fault> {
    let Call { body, deadline, cache_use, priority, .. } = call;
    let params = TaskParams {
        task: Task::Embed,
        normalize: Some(body.normalize.unwrap_or(true)),
        dimensions: body.dimensions,
        truncation: truncation(body.truncate, body.truncation_direction).or_chunks(body.chunk_overlap)?,
        prompt_name: body.prompt_name,
    };
    let form = Form::of(body.encoding_format, body.dtype, None)?;
    let inputs = body.inputs.checked("inputs", state.settings.max_client_batch_size)?;
    let request = Embed { model: None, inputs, params, deadline, priority };
    let computed = state.keeper.infer(request, cache_use, "tei", None).await.map_err(rename)?;
    let served = Served::of(&computed);
    let mut response = forms::rows(computed.rows, form, media).await?;
    attach(&mut response, served);
    Ok(response)
}

/// What `POST /` takes, in the words of this protocol or with `parameters` as the Hugging Face inference API has it.
#[derive(Debug, Deserialize, ToSchema)]
pub struct MainTaskBody {
    /// A text or several; `source_sentence` with `sentences` for a similarity.
    #[serde(default)]
    inputs: serde_json::Value,
    /// What the pipeline of the model's task takes.
    #[serde(default)]
    #[schema(value_type = Option<serde_json::Value>)]
    parameters: Option<serde_json::Map<String, serde_json::Value>>,
    /// Everything else: the fields of the route of the model's task.
    #[serde(flatten)]
    #[schema(ignore)]
    rest: serde_json::Map<String, serde_json::Value>,
}

impl MainTaskBody {
    /// The body as it would be with the image in it: clients of the Hugging Face inference API send the bare file.
    fn of_image(info: &ModelInfo, file: &[u8]) -> Self {
        let file = to_base64(file);
        let inputs = if info.main_task() == Task::Embed { json!([{"image": file}]) } else { json!(file) };
        Self { inputs, parameters: None, rest: serde_json::Map::new() }
    }
}

/// The model's main task: an embedding, or a similarity where `inputs` has a `source_sentence`.
///
/// Clients that are given only a base URL post here; `/invocations` is the same for SageMaker.
#[utoipa::path(
    post, path = "/", tag = "text-embeddings-inference",
    request_body(content = MainTaskBody, examples(
        ("embedding" = (value = json!({"inputs": "The quick brown fox"}))),
        ("similarity" = (value = json!({"inputs": {"source_sentence": "w1 w2", "sentences": ["w1 w2", "w3"]}}))),
    )),
    responses((status = 200, description = "As `/embed` or `/similarity` answer", body = serde_json::Value), Refusals),
)]
pub async fn main_task(State(state): State<ApiState>, request: Request) -> Result<Response, Fault> {
    let media = negotiate::media(request.headers())?;
    let info = state.engine.model(None)?;
    if info.signature.takes(Modality::Image) && body::may_be_image(request.headers()) {
        let (file, call) = body::receive(&state, request).await?.split();
        return main_task_call(&state, &info, call.with(MainTaskBody::of_image(&info, &file)), media).await;
    }
    let call = body::read::<MainTaskBody>(&state, request).await?;
    main_task_call(&state, &info, call, media).await
}

async fn main_task_call(
    state: &ApiState,
    info: &ModelInfo,
    call: Call<MainTaskBody>,
    media: Media,
) -> Result<Response, Fault> {
    let (MainTaskBody { inputs, parameters, mut rest }, call) = call.split();
    let is_pipeline = parameters.is_some();
    match info.main_task() {
        // A token's vectors, and what else an encoder gives, have routes of their own.
        Task::Embed | Task::EmbedAll if inputs.is_object() => {
            let body = json!({"inputs": inputs, "parameters": parameters});
            similarity::similarity_call(state, call.with(body::of_value(body)?)).await
        }
        Task::Embed | Task::EmbedAll => {
            rest.extend(parameters.unwrap_or_default());
            rest.insert("inputs".to_string(), inputs);
            embed_call(state, call.with(body::of_value(rest.into())?), media).await
        }
        Task::Classify if rest.contains_key("query") => {
            heads::rerank_call(state, call.with(body::of_value(rest.into())?)).await
        }
        Task::Classify if !is_pipeline && !info.signature.takes(Modality::Image) => {
            rest.insert("inputs".to_string(), inputs);
            heads::predict_call(state, call.with(body::of_value(rest.into())?)).await
        }
        Task::Sparse => {
            rest.extend(parameters.unwrap_or_default());
            rest.insert("inputs".to_string(), inputs);
            heads::embed_sparse_call(state, call.with(body::of_value(rest.into())?)).await
        }
        _ => {
            let parameters = parameters.map_or(serde_json::Value::Null, serde_json::Value::Object);
            pipeline::answered(state, info, call.with(pipeline::Asked { inputs, parameters })).await
        }
    }
}

/// As [`main_task`], under SageMaker's name.
#[utoipa::path(
    post, path = "/invocations", tag = "text-embeddings-inference",
    request_body(content = MainTaskBody, example = json!({"inputs": "The quick brown fox"})),
    responses((status = 200, description = "As `/embed` or `/similarity` answer", body = serde_json::Value), Refusals),
)]
#[allow(dead_code)] // a page of the document: the route is main_task
pub async fn invocations() {}

/// The default model and the limits in force, in TEI's words.
#[derive(Debug, Serialize, ToSchema)]
pub struct Info {
    model_id: String,
    model_sha: Option<String>,
    /// What is computed in.
    #[schema(example = "float32")]
    model_dtype: String,
    #[schema(value_type = serde_json::Value, example = json!({"embedding": {"pooling": "mean"}}))]
    model_type: serde_json::Value,
    /// Entries that may wait: the queue's bound.
    max_concurrent_requests: usize,
    max_input_length: usize,
    max_batch_tokens: usize,
    max_batch_requests: Option<usize>,
    max_client_batch_size: usize,
    /// Whether inputs are cut without being asked: never.
    auto_truncate: bool,
    tokenization_workers: usize,
    version: String,
    sha: Option<String>,
    docker_label: Option<String>,
}

/// What is served and its limits.
#[utoipa::path(get, path = "/info", tag = "text-embeddings-inference", responses((status = 200, body = Info, description = "The default model"), Refusals))]
pub async fn info(State(state): State<ApiState>) -> Result<axum::Json<Info>, Fault> {
    let model = state.engine.model(None)?;
    let limits = state.engine.limits(Some(&model.name))?;
    Ok(axum::Json(Info {
        model_id: model.name.to_string(),
        model_sha: None,
        model_dtype: dtype_word(&model.dtype).to_string(),
        model_type: model_type(&model),
        max_concurrent_requests: limits.max_queue_size,
        max_input_length: model.max_seq_len,
        max_batch_tokens: limits.max_batch_tokens,
        max_batch_requests: Some(limits.max_batch_size),
        max_client_batch_size: state.settings.max_client_batch_size,
        auto_truncate: false,
        tokenization_workers: std::thread::available_parallelism().map_or(1, usize::from),
        version: state.build.version.clone(),
        sha: state.build.commit.clone(),
        docker_label: None,
    }))
}

/// TEI's word for what the model does; for the tasks that it has none for, the task's own.
fn model_type(model: &ModelInfo) -> serde_json::Value {
    let ids = |by_label: bool| -> serde_json::Map<String, serde_json::Value> {
        let pair = |(i, label): (usize, &String)| match by_label {
            true => (label.clone(), json!(i)),
            false => (i.to_string(), json!(label)),
        };
        model.labels.iter().enumerate().map(pair).collect()
    };
    match model.task.as_str() {
        "embed" => json!({"embedding": {"pooling": model.pooling}}),
        "sparse" => json!({"embedding": {"pooling": "splade"}}),
        "rerank" => json!({"reranker": {"id2label": ids(false), "label2id": ids(true)}}),
        "classify" => json!({"classifier": {"id2label": ids(false), "label2id": ids(true)}}),
        other => json!({other: {"id2label": ids(false), "label2id": ids(true)}}),
    }
}

/// TEI writes torch's names.
fn dtype_word(dtype: &str) -> &str {
    match dtype {
        "f32" => "float32",
        "f16" => "float16",
        "bf16" => "bfloat16",
        other => other,
    }
}

/// `{error, error_type}`, with TEI's own words where it has one.
pub fn error_body(fault: &Fault) -> serde_json::Value {
    let error_type = match fault.class().kind {
        Kind::Empty => "Empty",
        Kind::Malformed | Kind::TooLarge | Kind::Invalid | Kind::UnsupportedMediaType | Kind::NotAcceptable => {
            "Validation"
        }
        Kind::QueueFull | Kind::Overloaded => "Overloaded",
        Kind::Loading
        | Kind::Draining
        | Kind::Unhealthy
        | Kind::OutOfMemory
        | Kind::StoreUnavailable
        | Kind::JournalFull => "Unhealthy",
        Kind::Failed | Kind::DeviceLost => "Backend",
        Kind::ModelNotFound | Kind::RouteNotFound | Kind::NotFound => "NotFound",
        Kind::Conflict => "Conflict",
        Kind::MethodNotAllowed => "MethodNotAllowed",
        Kind::RequestTimeout | Kind::Deadline => "Timeout",
        Kind::Internal => "Internal",
    };
    json!({"error": fault.message(), "error_type": error_type})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_named_as_these_clients_write_them() {
        let renamed = |f: fn(Error) -> Error, field: &str| match f(Error::Empty { field: field.into() }) {
            Error::Empty { field } => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(renamed(rename, "input[3]"), "inputs[3]");
        assert_eq!(renamed(rename, "input"), "inputs");
        assert_eq!(renamed(rename, "prompt_name"), "prompt_name");
        assert_eq!(renamed(similarity::rename, "input[0]"), "inputs.source_sentence");
        assert_eq!(renamed(similarity::rename, "input[3]"), "inputs.sentences[2]");
    }

    #[test]
    fn truncation_is_only_on_demand() {
        assert_eq!(truncation(None, Some(Direction::Left)), Truncation::Refuse);
        assert_eq!(truncation(Some(true), None), Truncation::Cut(TruncationDirection::Right));
    }
}
