//! `POST /api/v1/inferences`.

use std::collections::BTreeMap;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::Response;
use serde::Deserialize;
use utoipa::ToSchema;

use super::super::body::{self, Call};
use super::super::docs::Refusals;
use super::super::phases::{Served, attach};
use super::super::status::Fault;
use super::super::{ApiState, write};
use super::PREFIX;
use super::input::{Asked, RawInput};
use super::records::num_floats;
use super::wire::{Inference, Parts, push_inference, push_record};
use crate::inference::keep::{Accepted, Kept, Scope, Submission};
use crate::inference::stored_form::parameters_of;
use crate::inference::{CacheUse, Computed};
use crate::model::DEFAULT_TOP_K;
use crate::request::{Request as Embed, Task, TaskParams, Truncation, TruncationDirection};
use crate::store::record::Record;
use crate::{Error, Result};

/// Limits of what a client may attach, those of OpenAI's metadata.
const MAX_METADATA: usize = 16;
const MAX_METADATA_KEY_CHARS: usize = 64;
const MAX_METADATA_VALUE_CHARS: usize = 512;
/// Longest `user`, in characters.
pub const MAX_USER_CHARS: usize = 256;
const MAX_KEY_LEN: usize = 255;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Says that an answer is an earlier request's.
pub const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// The body of `POST /api/v1/inferences`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InferenceBody {
    /// A name from `/v1/models`; without it the default model answers.
    pub model: Option<String>,
    /// What to compute on. `inputs` is another name for it.
    #[serde(alias = "inputs")]
    pub input: RawInput,
    /// What is computed; without it, what the model was made for.
    pub task: Option<TaskWord>,
    #[serde(default)]
    pub parameters: Parameters,
    /// On whose behalf: results can be listed and erased by it.
    #[schema(max_length = 256)]
    pub user: Option<String>,
    /// At most 16 pairs; results can be listed by them.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    /// Whether the result is kept. Unless set, it is where the server keeps results (`database.record`).
    pub store: Option<bool>,
    /// `sync`, the default, answers with the result; `async` answers at once, and the result is at `Location` later.
    #[serde(default)]
    pub mode: Mode,
    /// With `async`: a URL that the result is posted to, signed as Standard Webhooks says, until it answers 2xx.
    #[schema(max_length = 2048, example = "https://example.com/results")]
    pub callback: Option<String>,
}

/// When a result is answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    #[default]
    Sync,
    Async,
}

/// What is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TaskWord {
    /// One vector.
    Embed,
    /// One vector a token.
    EmbedAll,
    /// Weights of the vocabulary's tokens.
    Sparse,
    /// Labels with their scores; of a model for ranking, how well a pair of texts fits.
    Classify,
    /// The best label of each token.
    TokenClassify,
    /// The likeliest tokens for each mask.
    FillMask,
    /// All outputs of a tensor model, by their names.
    Infer,
}

/// How embeddings are made; what is not set is as the model's manifest says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Parameters {
    /// Scale each embedding to length 1.
    pub normalize: Option<bool>,
    /// Keep the first so many values, scaled to length 1 again.
    #[schema(minimum = 1)]
    pub dimensions: Option<usize>,
    /// Cut an input that is too long at this side; without it such an input is refused.
    pub truncate: Option<Side>,
    /// Of `embed`: read an input that is too long in chunks that share so many tokens, and answer the mean of their
    /// embeddings.
    pub chunk_overlap: Option<usize>,
    /// A prompt of the model's manifest, put before every text.
    pub prompt_name: Option<String>,
    /// Of `fill_mask`: how many tokens are named for a mask; 5 unless it is set.
    #[schema(minimum = 1, maximum = 1000)]
    pub top_k: Option<u32>,
}

/// The side tokens are cut from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    Left,
    Right,
}

impl Parameters {
    /// With the task; of `task`, only what masks are filled with is in the parameters.
    fn with_task(self, task: Task) -> Result<TaskParams> {
        let parameters = self;
        if task == Task::Infer && parameters != Self::default() {
            let reason = "the task `infer` takes none: a tensor model computes what its inputs say".to_string();
            return Err(Error::Invalid { field: "parameters".to_string(), reason });
        }
        let truncation = match parameters.truncate {
            None => Truncation::Refuse,
            Some(Side::Left) => Truncation::Cut(TruncationDirection::Left),
            Some(Side::Right) => Truncation::Cut(TruncationDirection::Right),
        };
        let truncation = truncation.or_chunks(parameters.chunk_overlap)?;
        let Parameters { normalize, dimensions, prompt_name, top_k, .. } = parameters;
        let task = match (task, top_k) {
            (Task::FillMask { targets, .. }, Some(top_k)) => Task::FillMask { top_k, targets },
            (task, _) => task,
        };
        Ok(TaskParams { task, normalize, dimensions, truncation, prompt_name })
    }
}

/// Computes, and keeps the result before it answers: what is answered with `stored: true` can be found again.
#[utoipa::path(
    post, path = "/api/v1/inferences", tag = "application",
    request_body(content = InferenceBody, examples(
        ("one text" = (value = json!({"model": "all-MiniLM-L6-v2", "input": "The quick brown fox"}))),
        ("for a user, with metadata" = (value = json!({"model": "all-MiniLM-L6-v2", "input": ["w1 w2", "w3"], "user": "u-17", "metadata": {"order": "4711"}}))),
        ("later" = (value = json!({"model": "all-MiniLM-L6-v2", "input": "w1", "mode": "async"}))),
        ("not kept" = (value = json!({"model": "all-MiniLM-L6-v2", "input": "w1", "store": false, "parameters": {"dimensions": 8}}))),
    )),
    params(
        ("Idempotency-Key" = Option<String>, Header, description = "At most 255 visible ASCII characters. The same request with the same key is computed once; its later answers are the first one's record, with the header `idempotency-replayed: true`."),
        ("Cache-Control" = Option<String>, Header, description = "`no-cache`: results of the cache are not used; `no-store`: the cache is passed over"),
    ),
    responses(
        (status = 200, body = Inference, description = "The inference with its output"),
        (status = 202, body = Inference, description = "`mode: async`: it will be computed; `Location` is where it is found"),
        Refusals,
    ),
)]
pub async fn create(State(state): State<ApiState>, request: Request) -> Result<Response, Fault> {
    let idempotency_key = idempotency_key(request.headers())?;
    let Call { body, deadline, cache_use, priority, .. } = body::read::<InferenceBody>(&state, request).await?;
    let scope = state.keeper.settings().scope;
    let is_stored = body.store.unwrap_or(scope != Scope::None);
    check(&body, is_stored, scope, idempotency_key.is_some())?;
    check_callback(&state, &body)?;
    let (mode, callback) = (body.mode, body.callback);
    let info = state.engine.model(body.model.as_deref())?;
    let params = body.parameters.with_task(body.task.map_or_else(|| info.main_task(), task_of))?;
    let mut asked = body.input.read(info, state.settings.max_client_batch_size).await?;
    let parameters = parameters_of(&params);
    let inputs = std::mem::take(&mut asked.inputs);
    let request = Embed { model: body.model, inputs, params, deadline, priority };
    if !is_stored {
        return unstored(&state, request, cache_use, &asked).await;
    }
    let submission = Submission {
        request,
        parameters,
        source: "application",
        user: body.user,
        metadata: body.metadata,
        idempotency_key,
        cache_use,
    };
    if mode == Mode::Async {
        return accepted(&state, &submission, callback, &asked).await;
    }
    let kept = state.keeper.run(submission).await;
    let Kept { record, computed } = kept.map_err(|error| asked.rename(error))?;
    let parts = Parts { inputs: false, is_stored: true };
    let location = location(&record);
    let served = computed.as_ref().map(Served::of);
    let num_computed = |computed: &Computed| computed.rows.iter().map(|row| row.len()).sum();
    let num_floats = computed.as_ref().map_or_else(|| num_floats(&record), num_computed);
    let mut response = write::offload(num_floats, move || {
        let mut out = write::buffer(num_floats);
        push_computed(&mut out, &record, computed.as_ref(), parts)?;
        Ok(out)
    })
    .await?;
    response.headers_mut().extend(location);
    match served {
        Some(served) => attach(&mut response, served),
        None => {
            response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
        }
    }
    Ok(response)
}

/// Accepts what is computed later: 202 and where it will be, or, for a key that was used before and whose inference has
/// ended, 200 and the inference.
async fn accepted(
    state: &ApiState,
    submission: &Submission,
    callback: Option<String>,
    asked: &Asked,
) -> Result<Response, Fault> {
    let accepted = state.later.accept(submission, callback).await;
    let Accepted { record, is_known } = accepted.map_err(|error| asked.rename(error))?;
    let mut head = HeaderMap::from_iter(location(&record));
    if is_known {
        head.insert(REPLAYED, HeaderValue::from_static("true"));
    }
    let status = if record.facts.status.is_final() { StatusCode::OK } else { StatusCode::ACCEPTED };
    let num_floats = num_floats(&record);
    let parts = Parts { inputs: false, is_stored: true };
    let mut response = write::offload(num_floats, move || {
        let mut out = write::buffer(num_floats);
        push_record(&mut out, &record, parts)?;
        Ok(out)
    })
    .await?;
    *response.status_mut() = status;
    response.headers_mut().extend(head);
    Ok(response)
}

/// A record with its output: vectors as they were computed, without the copy that the record has of them.
fn push_computed(out: &mut Vec<u8>, record: &Record, computed: Option<&Computed>, parts: Parts) -> Result<()> {
    match computed.filter(|computed| computed.task == Task::Embed) {
        Some(computed) => push_inference(out, record, Some(&computed.rows), parts),
        None => push_record(out, record, parts),
    }
}

fn task_of(word: TaskWord) -> Task {
    match word {
        TaskWord::Embed => Task::Embed,
        TaskWord::EmbedAll => Task::EmbedAll,
        TaskWord::Sparse => Task::Sparse,
        TaskWord::Classify => Task::Classify,
        TaskWord::TokenClassify => Task::TokenClassify,
        TaskWord::FillMask => Task::FillMask { top_k: DEFAULT_TOP_K, targets: None },
        TaskWord::Infer => Task::Infer,
    }
}

/// Where a record is found. An id is always a header's value.
fn location(record: &Record) -> Option<(HeaderName, HeaderValue)> {
    let path = format!("{PREFIX}/inferences/{}", record.id);
    HeaderValue::try_from(path).ok().map(|path| (header::LOCATION, path))
}

/// Errors: `Invalid` and `TooLarge` naming `callback`.
fn check_callback(state: &ApiState, body: &InferenceBody) -> Result<()> {
    let Some(url) = &body.callback else { return Ok(()) };
    let invalid = |reason: &str| Error::Invalid { field: "callback".to_string(), reason: reason.to_string() };
    if body.mode != Mode::Async {
        return Err(invalid("needs `mode: async`; the answer to this request brings the result"));
    }
    let unsigned = || invalid("this server sends none (jobs.callback_secret is not set)");
    state.settings.callbacks.as_ref().ok_or_else(unsigned)?.check(url)
}

/// Computes and forgets. The answer has an id, which nobody will find.
async fn unstored(state: &ApiState, request: Embed, cache_use: CacheUse, asked: &Asked) -> Result<Response, Fault> {
    let submission = Submission {
        parameters: parameters_of(&request.params),
        request: request.clone(),
        source: "application",
        user: None,
        metadata: BTreeMap::new(),
        idempotency_key: None,
        cache_use,
    };
    let computed = state.keeper.inferences().infer(request, cache_use).await;
    let computed = computed.map_err(|error| asked.rename(error))?;
    let record = state.keeper.unstored_record(&submission, &computed);
    let served = Served::of(&computed);
    let num_floats = computed.rows.iter().map(|row| row.len()).sum();
    let mut response = write::offload(num_floats, move || {
        let mut out = write::buffer(num_floats);
        let parts = Parts { inputs: false, is_stored: false };
        push_computed(&mut out, &record, Some(&computed), parts)?;
        Ok(out)
    })
    .await?;
    attach(&mut response, served);
    Ok(response)
}

/// Errors: `Invalid` and `TooLarge` naming the field.
fn check(body: &InferenceBody, is_stored: bool, scope: Scope, has_key: bool) -> Result<()> {
    let invalid =
        |field: &str, reason: &str| Err(Error::Invalid { field: field.to_string(), reason: reason.to_string() });
    if is_stored && scope == Scope::None {
        return invalid("store", "this server keeps no results (database.record is `none`)");
    }
    if body.mode == Mode::Async && !is_stored {
        return invalid("mode", "`async` needs a result that is kept (`store: true`)");
    }
    if has_key && !is_stored {
        return invalid("idempotency-key", "needs a result that is kept (`store: true`)");
    }
    if let Some(user) = &body.user {
        check_user(user)?;
    }
    check_metadata(&body.metadata)
}

/// Errors: `Invalid` and `TooLarge` naming `metadata`, or the pair of it.
pub fn check_metadata(metadata: &BTreeMap<String, String>) -> Result<()> {
    let too_large = |field: String, got: usize, limit: usize, unit: &'static str| {
        if got > limit { Err(Error::TooLarge { field, got, limit, unit }) } else { Ok(()) }
    };
    too_large("metadata".to_string(), metadata.len(), MAX_METADATA, "pairs")?;
    for (key, value) in metadata {
        if key.is_empty() {
            return Err(Error::Invalid { field: "metadata".to_string(), reason: "a key is empty".to_string() });
        }
        too_large("metadata".to_string(), key.chars().count(), MAX_METADATA_KEY_CHARS, "characters in a key")?;
        too_large(format!("metadata.{key}"), value.chars().count(), MAX_METADATA_VALUE_CHARS, "characters")?;
    }
    Ok(())
}

/// Errors: `Empty` and `TooLarge` naming `user`.
pub fn check_user(user: &str) -> Result<()> {
    let field = "user".to_string();
    match user.chars().count() {
        0 => Err(Error::Empty { field }),
        got if got > MAX_USER_CHARS => Err(Error::TooLarge { field, got, limit: MAX_USER_CHARS, unit: "characters" }),
        _ => Ok(()),
    }
}

/// Errors: `Malformed` for a key that is empty, too long, or not of visible ASCII characters.
pub fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>> {
    let Some(value) = headers.get(IDEMPOTENCY_KEY) else { return Ok(None) };
    let is_plain = |text: &&str| (1..=MAX_KEY_LEN).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
    match value.to_str().ok().filter(is_plain) {
        Some(text) => Ok(Some(text.to_string())),
        None => Err(Error::Malformed {
            field: "idempotency-key".to_string(),
            reason: format!("expected 1 to {MAX_KEY_LEN} visible ASCII characters"),
        }),
    }
}
