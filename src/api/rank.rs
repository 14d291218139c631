//! Ranking as Jina (`/v1/rerank`) and Cohere (`/v2/rerank`) have it. The judge is the `cohere` Python package.

use std::time::Instant;

use axum::Router;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::post;
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::ApiState;
use super::body::{self, Call};
use super::cohere::units::search_units;
use super::docs::Refusals;
use super::status::Fault;
use super::tei::heads::{Query, answer, ranked, told};
use crate::Result;
use crate::inference::CacheUse;
use crate::inference::outcome::number;
use crate::request::{Priority, Request as Embed, TaskParams, Truncation, TruncationDirection};

/// The routes of both protocols.
pub fn routes() -> Router<ApiState> {
    Router::new().route("/v1/rerank", post(jina)).route("/v2/rerank", post(cohere))
}

/// A text, or an object that holds one.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Document {
    Text(String),
    Object { text: String },
}

/// The body of `/v1/rerank` and `/v2/rerank`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct RankBody {
    /// A name from `/v1/models`; without it the default model answers.
    pub model: Option<String>,
    pub query: String,
    pub documents: Vec<Document>,
    /// Answer only so many, the best.
    #[schema(minimum = 1)]
    pub top_n: Option<usize>,
    /// Answer each document beside its score: Jina's default, and not Cohere's.
    pub return_documents: Option<bool>,
}

/// Whose form the answer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    Jina,
    Cohere,
}

/// How well documents answer a query, the best first.
#[utoipa::path(
    post, path = "/v1/rerank", tag = "jina",
    request_body(content = RankBody, example = json!({"query": "w1 w2", "documents": ["w1 w2", {"text": "w3"}], "top_n": 1})),
    responses((status = 200, body = Value, description = "`results` with `index`, `relevance_score` and `document`, the best first; `usage.total_tokens`"), Refusals),
)]
pub async fn jina(State(state): State<ApiState>, request: Request) -> Result<Response, Fault> {
    let Call { body, deadline, cache_use, priority, .. } = body::read::<RankBody>(&state, request).await?;
    answered(&state, body, deadline, priority, cache_use, Dialect::Jina).await
}

/// How well documents answer a query, the best first.
#[utoipa::path(
    post, path = "/v2/rerank", tag = "Cohere",
    request_body(content = RankBody, example = json!({"query": "w1 w2", "documents": ["w1 w2", "w3"]})),
    responses((status = 200, body = Value, description = "`results` with `index` and `relevance_score`, the best first; `meta.billed_units`"), Refusals),
)]
pub async fn cohere(State(state): State<ApiState>, request: Request) -> Result<Response, Fault> {
    let Call { body, deadline, cache_use, priority, .. } = body::read::<RankBody>(&state, request).await?;
    answered(&state, body, deadline, priority, cache_use, Dialect::Cohere).await
}

/// Ranks, and writes the answer of a dialect.
pub async fn answered(
    state: &ApiState,
    body: RankBody,
    deadline: Instant,
    priority: Priority,
    cache_use: CacheUse,
    dialect: Dialect,
) -> Result<Response, Fault> {
    let RankBody { model, query, documents, top_n, return_documents } = body;
    if top_n == Some(0) {
        let reason = "must be at least 1".to_string();
        return Err(crate::Error::Invalid { field: "top_n".to_string(), reason }.into());
    }
    let text = |document: Document| match document {
        Document::Text(text) | Document::Object { text } => text,
    };
    let texts: Vec<String> = documents.into_iter().map(text).collect();
    let params = TaskParams { truncation: Truncation::Cut(TruncationDirection::Right), ..TaskParams::default() };
    let asked = Query { model, query: &query, texts: &texts, field: "documents" };
    let request = Embed { deadline, priority, ..asked.request(state, params)? };
    let source = if dialect == Dialect::Jina { "jina" } else { "cohere" };
    let search_units = match dialect {
        Dialect::Jina => 0,
        Dialect::Cohere => search_units(state, asked.model.as_deref(), &query, &texts).await?,
    };
    let (mut ranks, computed) = ranked(state, request, &asked, cache_use, source, false).await?;
    ranks.truncate(top_n.unwrap_or(usize::MAX));
    let with_documents = return_documents.unwrap_or(dialect == Dialect::Jina);
    let result = |(index, score): (usize, f32)| {
        let mut result = json!({"index": index, "relevance_score": number(score)});
        if with_documents {
            result["document"] = json!({"text": texts[index]});
        }
        result
    };
    let results: Vec<Value> = ranks.into_iter().map(result).collect();
    let num_tokens = computed.usage.num_tokens;
    let id = uuid::Uuid::now_v7().to_string();
    let value = match dialect {
        Dialect::Jina => json!({
            "id": id, "model": &*computed.info.name, "object": "list", "results": results,
            "usage": {"total_tokens": num_tokens, "prompt_tokens": num_tokens},
        }),
        Dialect::Cohere => json!({
            "id": id, "results": results,
            "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": search_units as f64}},
        }),
    };
    told(answer(&value)?, &computed)
}
