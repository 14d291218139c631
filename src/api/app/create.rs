//! `POST /api/v1/inferences`.

use std::collections::BTreeMap;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::Response;
use serde::Deserialize;
use utoipa::ToSchema;

use super::super::body::{self, Call};
use super::super::docs::Refusals;
use super::super::inputs::Inputs;
use super::super::phases::{Served, attach};
use super::super::status::Fault;
use super::super::{ApiState, write};
use super::PREFIX;
use super::wire::{Inference, Parts, push_inference, push_record};
use crate::inference::CacheUse;
use crate::inference::keep::{Kept, Scope, Submission};
use crate::inference::stored_form::parameters_of;
use crate::request::{EmbedParams, Priority, Request as Embed, Truncation, TruncationDirection};
use crate::{Error, Result};

/// Limits of what a client may attach, those of OpenAI's metadata.
const MAX_METADATA: usize = 16;
const MAX_METADATA_KEY_CHARS: usize = 64;
const MAX_METADATA_VALUE_CHARS: usize = 512;
/// Longest `user`, in characters.
pub const MAX_USER_CHARS: usize = 256;
const MAX_KEY_LEN: usize = 255;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// The body of `POST /api/v1/inferences`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InferenceBody {
    /// A name from `/v1/models`; without it the default model answers.
    pub model: Option<String>,
    /// What to compute on. `inputs` is another name for it.
    #[serde(alias = "inputs")]
    pub input: Inputs,
    /// "embed" is the only task of an embedding model: anything else is refused while the body is read.
    #[serde(rename = "task")]
    #[schema(rename = "task")]
    pub _task: Option<Task>,
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
}

/// What is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    Embed,
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
    /// A prompt of the model's manifest, put before every text.
    pub prompt_name: Option<String>,
}

/// The side tokens are cut from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    Left,
    Right,
}

impl From<Parameters> for EmbedParams {
    fn from(parameters: Parameters) -> Self {
        let truncation = match parameters.truncate {
            None => Truncation::Refuse,
            Some(Side::Left) => Truncation::Cut(TruncationDirection::Left),
            Some(Side::Right) => Truncation::Cut(TruncationDirection::Right),
        };
        let Parameters { normalize, dimensions, prompt_name, .. } = parameters;
        Self { normalize, dimensions, truncation, prompt_name }
    }
}

/// Computes, and keeps the result before it answers: what is answered with `stored: true` can be found again.
#[utoipa::path(
    post, path = "/api/v1/inferences", tag = "application",
    request_body(content = InferenceBody, examples(
        ("one text" = (value = json!({"model": "all-MiniLM-L6-v2", "input": "The quick brown fox"}))),
        ("for a user, with metadata" = (value = json!({"model": "all-MiniLM-L6-v2", "input": ["w1 w2", "w3"], "user": "u-17", "metadata": {"order": "4711"}}))),
        ("not kept" = (value = json!({"model": "all-MiniLM-L6-v2", "input": "w1", "store": false, "parameters": {"dimensions": 8}}))),
    )),
    params(
        ("Idempotency-Key" = Option<String>, Header, description = "At most 255 visible ASCII characters. The same request with the same key is computed once; its later answers are the first one's record, with the header `idempotency-replayed: true`."),
        ("Cache-Control" = Option<String>, Header, description = "`no-cache`: results of the cache are not used; `no-store`: the cache is passed over"),
    ),
    responses((status = 200, body = Inference, description = "The inference with its output"), Refusals),
)]
pub async fn create(State(state): State<ApiState>, request: Request) -> Result<Response, Fault> {
    let idempotency_key = idempotency_key(request.headers())?;
    let Call { body, deadline, cache_use, .. } = body::read::<InferenceBody>(&state, request).await?;
    let scope = state.keeper.settings().scope;
    let is_stored = body.store.unwrap_or(scope != Scope::None);
    check(&body, is_stored, scope, idempotency_key.is_some())?;
    let inputs = body.input.checked("input", state.settings.max_client_batch_size)?;
    let params = EmbedParams::from(body.parameters);
    let parameters = parameters_of(&params);
    let request = Embed { model: body.model, inputs, params, deadline, priority: Priority::Interactive };
    if !is_stored {
        return unstored(&state, request, cache_use).await;
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
    let Kept { record, computed } = state.keeper.run(submission).await?;
    let parts = Parts { inputs: false, is_stored: true };
    let location = format!("{PREFIX}/inferences/{}", record.id);
    let served = computed.as_ref().map(Served::of);
    let num_floats = computed.as_ref().map_or(0, |c| c.rows.iter().map(|row| row.len()).sum());
    let mut response = write::offload(num_floats, move || {
        let mut out = write::buffer(num_floats);
        match &computed {
            Some(computed) => push_inference(&mut out, &record, Some(&computed.rows), parts)?,
            None => push_record(&mut out, &record, parts)?,
        }
        Ok(out)
    })
    .await?;
    if let Ok(location) = HeaderValue::try_from(location) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    match served {
        Some(served) => attach(&mut response, served),
        None => {
            response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
        }
    }
    Ok(response)
}

/// Computes and forgets. The answer has an id, which nobody will find.
async fn unstored(state: &ApiState, request: Embed, cache_use: CacheUse) -> Result<Response, Fault> {
    let submission = Submission {
        parameters: parameters_of(&request.params),
        request: request.clone(),
        source: "application",
        user: None,
        metadata: BTreeMap::new(),
        idempotency_key: None,
        cache_use,
    };
    let computed = state.keeper.inferences().embed(request, cache_use).await?;
    let record = state.keeper.unstored_record(&submission, &computed);
    let served = Served::of(&computed);
    let num_floats = computed.rows.iter().map(|row| row.len()).sum();
    let mut response = write::offload(num_floats, move || {
        let mut out = write::buffer(num_floats);
        let parts = Parts { inputs: false, is_stored: false };
        push_inference(&mut out, &record, Some(&computed.rows), parts)?;
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
    if has_key && !is_stored {
        return invalid("idempotency-key", "needs a result that is kept (`store: true`)");
    }
    let too_large = |field: String, got: usize, limit: usize, unit: &'static str| {
        if got > limit { Err(Error::TooLarge { field, got, limit, unit }) } else { Ok(()) }
    };
    if let Some(user) = &body.user {
        check_user(user)?;
    }
    too_large("metadata".to_string(), body.metadata.len(), MAX_METADATA, "pairs")?;
    for (key, value) in &body.metadata {
        if key.is_empty() {
            return invalid("metadata", "a key is empty");
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
fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>> {
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
