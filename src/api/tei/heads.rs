//! `/predict`, `/rerank`, `/embed_all`, `/embed_sparse`: what models with other heads than pooling do.

use axum::extract::{Request, State};
use axum::response::Response;
use serde::{Deserialize, Serialize};

use utoipa::ToSchema;

use super::{Direction, rename, truncation};
use crate::api::body::{self, Call};
use crate::api::docs::Refusals;
use crate::api::inputs::{Inputs, check_count};
use crate::api::phases::{Served, attach};
use crate::api::rank::{self, Dialect, Document, RankBody};
use crate::api::status::Fault;
use crate::api::{ApiState, write};
use crate::inference::outcome::{pairs, scores};
use crate::inference::{CacheUse, Computed};
use crate::request::{Input, Request as Embed, Task, TaskParams};
use crate::{Error, Result};

/// A text, two texts that belong together, or a list of lists of one or two texts.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum PredictInputs {
    One(String),
    Pair(String, String),
    Many(Vec<PredictInput>),
}

/// One element of a list of inputs.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum PredictInput {
    /// A text, as it stands.
    Text(String),
    /// One text.
    One([String; 1]),
    /// Two that belong together.
    Pair([String; 2]),
}

/// The body of `/predict`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct PredictBody {
    pub inputs: PredictInputs,
    /// Scores as the model gives them.
    #[schema(default = false)]
    pub raw_scores: Option<bool>,
    #[schema(default = false)]
    pub truncate: Option<bool>,
    pub truncation_direction: Option<Direction>,
}

/// A label with its score.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Prediction {
    pub score: f32,
    pub label: String,
}

/// Labels of one or many texts, or pairs of texts.
#[utoipa::path(
    post, path = "/predict", tag = "text-embeddings-inference",
    request_body(content = PredictBody, examples(
        ("one text" = (value = json!({"inputs": "w1 w2"}))),
        ("one pair" = (value = json!({"inputs": ["w1 w2", "w3"]}))),
        ("many" = (value = json!({"inputs": [["w1 w2"], ["w3"]], "raw_scores": true}))),
    )),
    responses((status = 200, description = "Labels with scores, the best first; of many inputs a list of those", body = serde_json::Value), Refusals),
)]
pub async fn predict(State(state): State<ApiState>, request: Request) -> Result<Response, Fault> {
    let call = body::read::<PredictBody>(&state, request).await?;
    predict_call(&state, call).await
}

/// As [`predict`], once the body is read.
pub async fn predict_call(state: &ApiState, call: Call<PredictBody>) -> Result<Response, Fault> {
    let Call { body, deadline, cache_use, priority, .. } = call;
    let (inputs, is_list) = match body.inputs {
        PredictInputs::One(text) => (vec![Input::Text(text)], false),
        PredictInputs::Pair(first, second) => (vec![Input::Pair(first, second)], false),
        PredictInputs::Many(many) => (many.into_iter().map(input).collect(), true),
    };
    check_count("inputs", inputs.len(), state.settings.max_client_batch_size)?;
    let params = TaskParams {
        task: Task::Classify,
        truncation: truncation(body.truncate, body.truncation_direction),
        ..TaskParams::default()
    };
    let request = Embed { model: None, inputs, params, deadline, priority };
    let computed = state.keeper.infer(request, cache_use, "tei", None).await.map_err(rename)?;
    let form = if body.raw_scores.unwrap_or(false) { scores::Form::Raw } else { scores::Form::Usual };
    let of_row = |row: &[f32]| -> Vec<Prediction> {
        let ranked = scores::ranked(&computed.info, row, form).into_iter();
        ranked.map(|(label, score)| Prediction { score, label: label.to_string() }).collect()
    };
    let mut rows = computed.rows.iter().map(|row| of_row(row));
    let response = match (is_list, rows.next()) {
        (false, Some(one)) => answer(&one),
        (_, first) => answer(&first.into_iter().chain(rows).collect::<Vec<_>>()),
    };
    told(response?, &computed)
}

fn input(input: PredictInput) -> Input {
    match input {
        PredictInput::Text(text) | PredictInput::One([text]) => Input::Text(text),
        PredictInput::Pair([first, second]) => Input::Pair(first, second),
    }
}

/// The body of `/rerank`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct RerankBody {
    pub query: String,
    /// What is ranked. Jina's clients write `documents` instead, and get Jina's answer.
    #[serde(default)]
    pub texts: Option<Vec<String>>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub jina: Jina,
    /// Scores as the model gives them.
    #[schema(default = false)]
    pub raw_scores: Option<bool>,
    /// Answer each text beside its score.
    #[schema(default = false)]
    pub return_text: Option<bool>,
    #[schema(default = false)]
    pub truncate: Option<bool>,
    pub truncation_direction: Option<Direction>,
}

/// What tells a request of Jina's from one of this protocol.
#[derive(Debug, Default, Deserialize)]
pub struct Jina {
    model: Option<String>,
    documents: Option<Vec<Document>>,
    top_n: Option<usize>,
    return_documents: Option<bool>,
}

/// A text by its place, with how well it answers the query.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Rank {
    pub index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    pub score: f32,
}

/// How well texts answer a query, the best first.
#[utoipa::path(
    post, path = "/rerank", tag = "text-embeddings-inference",
    request_body(content = RerankBody, example = json!({"query": "w1 w2", "texts": ["w1 w2", "w3"], "return_text": true})),
    responses((status = 200, description = "The best first", body = Vec<Rank>), Refusals),
)]
pub async fn rerank(State(state): State<ApiState>, request: Request) -> Result<Response, Fault> {
    let call = body::read::<RerankBody>(&state, request).await?;
    rerank_call(&state, call).await
}

/// As [`rerank`], once the body is read.
pub async fn rerank_call(state: &ApiState, call: Call<RerankBody>) -> Result<Response, Fault> {
    let Call { body, deadline, cache_use, priority, .. } = call;
    let RerankBody { query, texts, jina, raw_scores, return_text, truncate, truncation_direction } = body;
    let texts = match (texts, jina) {
        (None, Jina { model, documents: Some(documents), top_n, return_documents }) => {
            let body = RankBody { model, query, documents, top_n, return_documents };
            return rank::answered(state, body, deadline, priority, cache_use, Dialect::Jina).await;
        }
        (Some(texts), _) => texts,
        (None, _) => {
            let reason = "is missing".to_string();
            return Err(Error::Malformed { field: "texts".to_string(), reason }.into());
        }
    };
    let params = TaskParams { truncation: truncation(truncate, truncation_direction), ..TaskParams::default() };
    let asked = Query { model: None, query: &query, texts: &texts, field: "texts" };
    let request = asked.request(state, params)?;
    let request = Embed { deadline, priority, ..request };
    let (ranks, computed) = ranked(state, request, &asked, cache_use, "tei", raw_scores.unwrap_or(false)).await?;
    let with_text = |(index, score): (usize, f32)| Rank {
        index,
        text: return_text.unwrap_or(false).then(|| texts[index].clone()),
        score,
    };
    told(answer(&ranks.into_iter().map(with_text).collect::<Vec<_>>())?, &computed)
}

/// What is to be ranked, in any protocol.
pub struct Query<'a> {
    pub model: Option<String>,
    pub query: &'a str,
    pub texts: &'a [String],
    /// What the protocol calls the texts.
    pub field: &'static str,
}

impl Query<'_> {
    /// The request for the scores of each pair; its deadline is now.
    ///
    /// Errors: `Empty` and `TooLarge` naming the texts' field; `UnknownModel`; `Invalid` for a model of several scores.
    pub fn request(&self, state: &ApiState, params: TaskParams) -> Result<Embed> {
        check_count(self.field, self.texts.len(), state.settings.max_client_batch_size)?;
        if self.query.is_empty() {
            return Err(Error::Empty { field: "query".to_string() });
        }
        let info = state.engine.model(self.model.as_deref())?;
        if info.does(&Task::Classify) && info.labels.len() != 1 {
            let reason = format!("`{}` gives {} scores; one of a single score ranks", info.name, info.labels.len());
            return Err(Error::Invalid { field: "model".to_string(), reason });
        }
        Ok(Embed {
            model: self.model.clone(),
            inputs: self.texts.iter().map(|text| Input::Pair(self.query.to_string(), text.clone())).collect(),
            params: TaskParams { task: Task::Classify, ..params },
            deadline: std::time::Instant::now(),
            priority: crate::request::Priority::Interactive,
        })
    }
}

/// The places of texts with their scores, the best first, equal ones in the client's order.
pub async fn ranked(
    state: &ApiState,
    request: Embed,
    asked: &Query<'_>,
    cache_use: CacheUse,
    source: &'static str,
    raw_scores: bool,
) -> Result<(Vec<(usize, f32)>, Computed)> {
    let by_field = |error| rename_to(error, asked.field);
    let computed = state.keeper.infer(request, cache_use, source, None).await.map_err(by_field)?;
    let score = |row: &[f32]| match row.first() {
        Some(&score) if raw_scores => score,
        Some(&score) => scores::sigmoid(score),
        None => 0.0,
    };
    let mut ranks: Vec<(usize, f32)> = computed.rows.iter().map(|row| score(row)).enumerate().collect();
    ranks.sort_by(|a, b| b.1.total_cmp(&a.1));
    Ok((ranks, computed))
}

/// The engine counts pairs as inputs; clients of these routes wrote texts.
fn rename_to(error: Error, name: &str) -> Error {
    let ours = |field: String| match field.strip_prefix("input") {
        Some("") => format!("{name}[0]"),
        Some(rest) if rest.starts_with('[') => format!("{name}{rest}"),
        _ => field,
    };
    match error {
        Error::TooLarge { unit: "inputs", .. } => error,
        _ => error.with_field(ours),
    }
}

/// The body of `/embed_all` and `/embed_sparse`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct TokensBody {
    pub inputs: Inputs,
    #[schema(default = false)]
    pub truncate: Option<bool>,
    pub truncation_direction: Option<Direction>,
    /// One of the model's prompts, put before every text.
    pub prompt_name: Option<String>,
}

async fn computed(state: &ApiState, call: Call<TokensBody>, task: Task) -> Result<Computed> {
    let Call { body, deadline, cache_use, priority, .. } = call;
    let params = TaskParams {
        task,
        truncation: truncation(body.truncate, body.truncation_direction),
        prompt_name: body.prompt_name,
        ..TaskParams::default()
    };
    let inputs = body.inputs.checked("inputs", state.settings.max_client_batch_size)?;
    let request = Embed { model: None, inputs, params, deadline, priority };
    state.keeper.infer(request, cache_use, "tei", None).await.map_err(rename)
}

/// The vectors of all tokens of one or many inputs, special tokens included, neither pooled nor scaled.
#[utoipa::path(
    post, path = "/embed_all", tag = "text-embeddings-inference",
    request_body(content = TokensBody, example = json!({"inputs": ["w1 w2", "w3"]})),
    responses((status = 200, body = Vec<Vec<Vec<f32>>>, description = "One list of vectors an input"), Refusals),
)]
pub async fn embed_all(State(state): State<ApiState>, request: Request) -> Result<Response, Fault> {
    let call = body::read::<TokensBody>(&state, request).await?;
    let computed = computed(&state, call, Task::EmbedAll).await?;
    let num_floats = computed.rows.iter().map(|row| row.len()).sum();
    let (rows, width) = (computed.rows.clone(), computed.info.hidden_size);
    let response = write::offload(num_floats, move || {
        let mut out = write::buffer(num_floats);
        out.push(b'[');
        for (i, row) in rows.iter().enumerate() {
            if i > 0 {
                out.push(b',');
            }
            write::push_rows(&mut out, &row.chunks_exact(width).collect::<Vec<_>>())?;
        }
        out.push(b']');
        Ok(out)
    });
    told(response.await?, &computed)
}

/// A token of the vocabulary with its weight.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct SparseValue {
    pub index: u32,
    pub value: f32,
}

/// The weights of the vocabulary's tokens for one or many inputs: those above zero.
#[utoipa::path(
    post, path = "/embed_sparse", tag = "text-embeddings-inference",
    request_body(content = TokensBody, example = json!({"inputs": ["w1 w2", "w3"]})),
    responses((status = 200, body = Vec<Vec<SparseValue>>, description = "One list an input, by rising index"), Refusals),
)]
pub async fn embed_sparse(State(state): State<ApiState>, request: Request) -> Result<Response, Fault> {
    let call = body::read::<TokensBody>(&state, request).await?;
    embed_sparse_call(&state, call).await
}

/// As [`embed_sparse`], once the body is read.
pub async fn embed_sparse_call(state: &ApiState, call: Call<TokensBody>) -> Result<Response, Fault> {
    let computed = computed(state, call, Task::Sparse).await?;
    let list = |row: &[f32]| pairs(row).map(|(index, value)| SparseValue { index, value }).collect::<Vec<_>>();
    let values: Vec<Vec<SparseValue>> = computed.rows.iter().map(|row| list(row)).collect();
    told(answer(&values)?, &computed)
}

/// A 200 of this value. Errors: `Internal` for a value JSON has no word for.
pub fn answer(value: &impl Serialize) -> Result<Response> {
    let bytes = serde_json::to_vec(value).map_err(|e| Error::Internal { cause: format!("writing a response: {e}") })?;
    Ok(write::json(bytes))
}

/// The answer with what was counted.
pub fn told(mut response: Response, computed: &Computed) -> Result<Response, Fault> {
    attach(&mut response, Served::of(computed));
    Ok(response)
}
