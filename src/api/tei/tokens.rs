//! `/tokenize` and `/decode`: what the model's tokenizer does, without the model.

use axum::extract::{Request, State};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::rename;
use crate::Error;
use crate::api::ApiState;
use crate::api::body::{self, Call};
use crate::api::docs::Refusals;
use crate::api::inputs::Inputs;
use crate::api::status::Fault;
use crate::output::Token;

/// The body of `/tokenize`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct TokenizeBody {
    /// A text or a list of texts.
    #[schema(value_type = Inputs)]
    pub inputs: Inputs,
    #[schema(default = true)]
    pub add_special_tokens: Option<bool>,
    /// One of the model's prompts, put before every text.
    pub prompt_name: Option<String>,
}

/// One token of a text.
#[derive(Debug, Serialize, ToSchema)]
pub struct SimpleToken {
    #[schema(example = 101)]
    id: u32,
    #[schema(example = "[CLS]")]
    text: String,
    special: bool,
    /// Where it begins, in Unicode scalar values; null for tokens that stand for no text.
    #[schema(required)]
    start: Option<usize>,
    #[schema(required)]
    stop: Option<usize>,
}

impl From<Token> for SimpleToken {
    fn from(Token { id, piece: _, text, special, start, stop }: Token) -> Self {
        Self { id, text, special, start, stop }
    }
}

/// The tokens of texts, never truncated.
#[utoipa::path(
    post, path = "/tokenize", tag = "text-embeddings-inference",
    request_body(content = TokenizeBody, example = json!({"inputs": ["w1 w2", "w3"], "add_special_tokens": true})),
    responses((status = 200, body = Vec<Vec<SimpleToken>>, description = "The tokens of each text"), Refusals),
)]
pub async fn tokenize(
    State(state): State<ApiState>,
    request: Request,
) -> Result<axum::Json<Vec<Vec<SimpleToken>>>, Fault> {
    let Call { body, deadline, timeout, .. } = body::read::<TokenizeBody>(&state, request).await?;
    let mut texts = body.inputs.texts("inputs", state.settings.max_client_batch_size)?;
    if let Some(name) = &body.prompt_name {
        let info = state.engine.model(None)?;
        let prompt = info.prompts.get(name).ok_or_else(|| {
            let known = info.prompts.keys().cloned().collect::<Vec<_>>().join(", ");
            Error::Invalid { field: "prompt_name".into(), reason: format!("no prompt is named so; known: {known}") }
        })?;
        texts.iter_mut().for_each(|text| text.insert_str(0, prompt));
    }
    let work = state.engine.tokenize(None, texts, body.add_special_tokens.unwrap_or(true));
    let tokens = body::bounded(deadline, timeout, work).await.map_err(rename)?;
    Ok(axum::Json(tokens.into_iter().map(|text| text.into_iter().map(SimpleToken::from).collect()).collect()))
}

/// The body of `/decode`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct DecodeBody {
    /// A list of token ids or a list of those.
    pub ids: Inputs,
    #[schema(default = true)]
    pub skip_special_tokens: Option<bool>,
}

/// The texts of token ids.
#[utoipa::path(
    post, path = "/decode", tag = "text-embeddings-inference",
    request_body(content = DecodeBody, example = json!({"ids": [[101, 102], [101, 103, 102]], "skip_special_tokens": true})),
    responses((status = 200, body = Vec<String>, description = "One text a list"), Refusals),
)]
pub async fn decode(State(state): State<ApiState>, request: Request) -> Result<axum::Json<Vec<String>>, Fault> {
    let Call { body, deadline, timeout, .. } = body::read::<DecodeBody>(&state, request).await?;
    let ids = body.ids.token_ids("ids", state.settings.max_client_batch_size)?;
    let work = state.engine.decode(None, ids, body.skip_special_tokens.unwrap_or(true));
    Ok(axum::Json(body::bounded(deadline, timeout, work).await?))
}
