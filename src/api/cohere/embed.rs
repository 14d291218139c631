//! `POST /v2/embed` and its older form, `POST /v1/embed`.

use std::collections::BTreeSet;

use axum::extract::{Request, State};
use axum::response::Response;
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::content::Item;
use super::units::{EmbedUnits, num_images};
use crate::api::body::{self, Call};
use crate::api::docs::Refusals;
use crate::api::forms::{EmbeddingType, raw};
use crate::api::images::image;
use crate::api::inputs::{check_count, renamed};
use crate::api::negotiate::{Media, media};
use crate::api::phases::{Served, attach};
use crate::api::prompts::Use;
use crate::api::status::Fault;
use crate::api::{ApiState, write};
use crate::inference::Computed;
use crate::request::{Input, Request as Embed, TaskParams, Truncation, TruncationDirection};
use crate::{Error, Result};

/// The body of `/v2/embed` and of `/v1/embed`. Fields not listed are ignored.
#[derive(Debug, Deserialize, ToSchema)]
pub struct EmbedBody {
    /// A name from `/v1/models`; without it the default model answers.
    pub model: Option<String>,
    /// What the embeddings are for. Chooses the model's prompt of that name, where there is one.
    pub input_type: Option<InputType>,
    /// One of these, `images` and `inputs`.
    #[schema(nullable = false)]
    pub texts: Option<Vec<String>>,
    /// PNG, JPEG or WebP files, each as a data URL; for models that take images.
    #[schema(nullable = false)]
    pub images: Option<Vec<String>>,
    /// The forms of each embedding; `float` unless given. At least one.
    #[schema(min_items = 1)]
    pub embedding_types: Option<Vec<EmbeddingType>>,
    /// Keep the first so many values of each embedding, scaled to length 1 again.
    #[schema(minimum = 1)]
    pub output_dimension: Option<usize>,
    /// The side that texts which are too long are cut from; `END` unless given, as Cohere has it.
    pub truncate: Option<Truncate>,
    /// Not taken: a model's own limit holds.
    #[serde(rename = "max_tokens")]
    #[schema(ignore)]
    max_tokens: Option<Value>,
    /// Texts and images in one list, each item with one of them.
    #[schema(nullable = false)]
    pub inputs: Option<Vec<Item>>,
}

/// What Cohere calls the use of an embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum InputType {
    SearchDocument,
    SearchQuery,
    Classification,
    Clustering,
    /// Goes with `images` and `inputs`.
    Image,
}

/// What is done with a text that is too long.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Truncate {
    /// It is refused.
    None,
    /// Its beginning is cut off.
    Start,
    /// Its end is.
    #[default]
    End,
}

/// The answer of `/v2/embed`, for the document: it is written by hand.
#[derive(ToSchema)]
#[allow(dead_code)]
struct EmbedAnswer {
    id: String,
    embeddings: EmbeddingsByType,
    texts: Vec<String>,
    meta: Meta,
    #[schema(example = "embeddings_by_type")]
    response_type: String,
}

/// Those asked for, each one embedding a text.
#[derive(ToSchema)]
#[allow(dead_code)]
struct EmbeddingsByType {
    float: Option<Vec<Vec<f32>>>,
    base64: Option<Vec<String>>,
    fp16: Option<Vec<Vec<f32>>>,
    int8: Option<Vec<Vec<i8>>>,
    uint8: Option<Vec<Vec<u32>>>,
    binary: Option<Vec<Vec<i8>>>,
    ubinary: Option<Vec<Vec<u32>>>,
}

#[derive(ToSchema)]
#[allow(dead_code)]
struct Meta {
    api_version: ApiVersion,
    billed_units: BilledUnits,
}

#[derive(ToSchema)]
#[allow(dead_code)]
struct ApiVersion {
    #[schema(example = "2")]
    version: String,
}

#[derive(ToSchema)]
#[allow(dead_code)]
struct BilledUnits {
    /// Where there are any.
    images: Option<usize>,
    /// Tokens of all texts, special tokens included, whether they were computed or found in the cache; absent where all
    /// inputs are images.
    input_tokens: Option<usize>,
}

fn invalid(field: &str, reason: &str) -> Error {
    Error::Invalid { field: field.to_string(), reason: reason.to_string() }
}

impl EmbedBody {
    /// Errors: `Invalid` naming what is not offered; `Malformed` without texts, images and inputs, or with two of them.
    fn check(&self) -> Result<()> {
        let given =
            [("texts", self.texts.is_some()), ("images", self.images.is_some()), ("inputs", self.inputs.is_some())];
        let mut given = given.into_iter().filter(|(_, is_there)| *is_there).map(|(name, _)| name);
        if let (Some(first), Some(second)) = (given.next(), given.next()) {
            let reason = format!("expected `texts`, `images` or `inputs`, got `{first}` and `{second}`");
            return Err(Error::Malformed { field: second.to_string(), reason });
        }
        if self.input_type == Some(InputType::Image) && self.texts.is_some() {
            return Err(invalid("input_type", "`image` goes with `images` and `inputs`"));
        }
        if self.max_tokens.is_some() {
            return Err(invalid("max_tokens", "the model's own limit holds"));
        }
        if self.texts.is_none() && self.images.is_none() && self.inputs.is_none() {
            return Err(Error::Malformed { field: "body".to_string(), reason: "missing field `texts`".to_string() });
        }
        Ok(())
    }

    /// Errors: `Empty`, `TooLarge` for a list of no or too many; `Malformed` naming the image that is none.
    fn inputs(&mut self, limit: usize) -> Result<(Vec<Input>, Vec<String>)> {
        if let Some(items) = self.inputs.take() {
            check_count("inputs", items.len(), limit)?;
            let inputs: Vec<Input> =
                items.into_iter().enumerate().map(|(i, item)| item.input(i)).collect::<Result<_>>()?;
            let text = |input: &Input| match input {
                Input::Text(text) => Some(text.clone()),
                _ => None,
            };
            let texts = inputs.iter().filter_map(text).collect();
            return Ok((inputs, texts));
        }
        let Some(images) = self.images.take() else {
            let texts = self.texts.take().unwrap_or_default();
            check_count("texts", texts.len(), limit)?;
            return Ok((texts.iter().cloned().map(Input::Text).collect(), texts));
        };
        check_count("images", images.len(), limit)?;
        let named = |(i, file): (usize, &String)| {
            image(file).map_err(|reason| Error::Malformed { field: format!("images[{i}]"), reason })
        };
        Ok((images.iter().enumerate().map(named).collect::<Result<_>>()?, Vec::new()))
    }

    /// Each once, in the order of [`EmbeddingType`]. Errors: `Empty` for an empty list.
    fn types(&self) -> Result<Vec<EmbeddingType>> {
        let asked = self.embedding_types.as_deref().unwrap_or(&[EmbeddingType::Float]);
        if asked.is_empty() {
            return Err(Error::Empty { field: "embedding_types".to_string() });
        }
        Ok(asked.iter().copied().collect::<BTreeSet<_>>().into_iter().collect())
    }

    /// Errors: `UnknownModel`.
    fn params(&self, state: &ApiState) -> Result<TaskParams> {
        let info = state.engine.model(self.model.as_deref())?;
        let purpose = self.input_type.and_then(|input_type| match input_type {
            InputType::SearchDocument => Some(Use::Document),
            InputType::SearchQuery => Some(Use::Query),
            InputType::Classification => Some(Use::Classification),
            InputType::Clustering => Some(Use::Clustering),
            InputType::Image => None,
        });
        let truncation = match self.truncate.unwrap_or_default() {
            Truncate::None => Truncation::Refuse,
            Truncate::Start => Truncation::Cut(TruncationDirection::Left),
            Truncate::End => Truncation::Cut(TruncationDirection::Right),
        };
        let prompt_name = purpose.and_then(|purpose| purpose.prompt_name(&info));
        let dimensions = self.output_dimension;
        Ok(TaskParams { dimensions, truncation, prompt_name, ..TaskParams::default() })
    }
}

/// The field as Cohere's clients wrote it.
fn rename(error: Error, inputs: &str) -> Error {
    match renamed(error, inputs) {
        Error::Invalid { field, reason } if field == "dimensions" => invalid("output_dimension", &reason),
        other => other,
    }
}

/// Embeddings of texts or of images, each in one or several forms.
#[utoipa::path(
    post, path = "/v2/embed", tag = "Cohere",
    request_body(content = EmbedBody, examples(
        ("queries" = (value = json!({"model": "all-MiniLM-L6-v2", "input_type": "search_query", "texts": ["The quick brown fox"], "embedding_types": ["float"]}))),
        ("documents, short forms" = (value = json!({"model": "all-MiniLM-L6-v2", "input_type": "search_document", "texts": ["w1 w2", "w3"], "embedding_types": ["int8", "ubinary"], "output_dimension": 8, "truncate": "NONE"}))),
        ("items of content" = (value = json!({"model": "all-MiniLM-L6-v2", "input_type": "search_document", "inputs": [{"content": [{"type": "text", "text": "w1 w2"}]}]}))),
    )),
    responses((status = 200, body = EmbedAnswer, description = "One embedding a text of each form, in their order"), Refusals),
)]
pub async fn embed(State(state): State<ApiState>, request: Request) -> Result<Response, Fault> {
    answer(state, request, Version::Two).await
}

/// As `/v2/embed`, for Cohere's older clients: without `embedding_types` the answer's `embeddings` are the floats themselves.
#[utoipa::path(
    post, path = "/v1/embed", tag = "Cohere",
    request_body(content = EmbedBody, example = json!({"model": "all-MiniLM-L6-v2", "input_type": "search_query", "texts": ["The quick brown fox"]})),
    responses((status = 200, body = Value, description = "As `/v2/embed` answers, or with `embeddings` as a list"), Refusals),
)]
pub async fn embed_v1(State(state): State<ApiState>, request: Request) -> Result<Response, Fault> {
    answer(state, request, Version::One).await
}

/// That of Cohere's API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

async fn answer(state: ApiState, request: Request, version: Version) -> Result<Response, Fault> {
    let media = media(request.headers())?;
    let Call { mut body, deadline, cache_use, priority, .. } = body::read::<EmbedBody>(&state, request).await?;
    body.check()?;
    let types = body.types()?;
    let shape = match (version, &body.embedding_types) {
        (Version::One, None) => Shape::Floats,
        _ => Shape::ByType(types.clone(), version),
    };
    if media == Media::Bytes && types.len() > 1 {
        return Err(invalid("embedding_types", "one form fits into raw bytes").into());
    }
    let params = body.params(&state)?;
    let named = match (&body.images, &body.inputs) {
        (Some(_), _) => "images",
        (_, Some(_)) => "inputs",
        (None, None) => "texts",
    };
    // The answer repeats texts.
    let (inputs, echo) = body.inputs(state.settings.max_client_batch_size)?;
    let num_images = num_images(&inputs);
    let request = Embed { model: body.model, inputs, params, deadline, priority };
    let computed = state.keeper.infer(request, cache_use, "cohere", None).await.map_err(|e| rename(e, named))?;
    let served = Served::of(&computed);
    let mut response = match (media, types.first()) {
        (Media::Bytes, Some(asked)) => raw(computed.rows, asked.form().dtype).await?,
        _ => {
            let num_floats: usize = computed.rows.iter().map(|row| row.len()).sum();
            // A text is copied in a tenth of the time of digits.
            let work = num_floats * types.len() + echo.iter().map(|text| text.len() / 64).sum::<usize>();
            write::offload(work, move || write_answer(&computed, &shape, &echo, num_images)).await?
        }
    };
    attach(&mut response, served);
    Ok(response)
}

/// What `embeddings` is.
enum Shape {
    /// `[[..]]`, in version 1 alone.
    Floats,
    /// `{"int8": [[..]], ..}`.
    ByType(Vec<EmbeddingType>, Version),
}

/// The answer's JSON. Errors: `Internal` for a row with a value that is no number; `Invalid` for one without this form.
fn write_answer(computed: &Computed, shape: &Shape, texts: &[String], num_images: usize) -> Result<Vec<u8>> {
    let (types, response_type, version) = match shape {
        Shape::Floats => (&[EmbeddingType::Float][..], "embeddings_floats", Version::One),
        Shape::ByType(types, version) => (&types[..], "embeddings_by_type", *version),
    };
    let rows_len: usize = types.iter().map(|asked| asked.form().rows_len(&computed.rows)).sum();
    let texts_len: usize = texts.iter().map(|text| text.len() + 3).sum();
    let mut out = Vec::with_capacity(rows_len + texts_len + 512);
    let id = uuid::Uuid::now_v7();
    out.extend_from_slice(format!(r#"{{"id":"{id}","embeddings":"#).as_bytes());
    for (i, asked) in types.iter().enumerate() {
        if let Shape::ByType(..) = shape {
            let before = if i == 0 { '{' } else { ',' };
            out.extend_from_slice(format!(r#"{before}"{}":"#, asked.as_str()).as_bytes());
        }
        asked.form().push_rows(&mut out, &computed.rows)?;
    }
    let end = if let Shape::ByType(..) = shape { "}" } else { "" };
    out.extend_from_slice(format!(r#"{end},"texts":["#).as_bytes());
    for (i, text) in texts.iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        write::push_str(&mut out, text);
    }
    let units = EmbedUnits::of(computed, num_images).json(num_images < computed.rows.len());
    let version = if version == Version::One { 1 } else { 2 };
    let meta = format!(r#"{{"api_version":{{"version":"{version}"}},"billed_units":{units}}}"#);
    out.extend_from_slice(format!(r#"],"meta":{meta},"response_type":"{response_type}"}}"#).as_bytes());
    Ok(out)
}
