//! The OpenAPI document and the page that shows it.

use std::collections::BTreeMap;

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use serde_json::{Value, json};
use utoipa::openapi::{RefOr, Response, ResponseBuilder};
use utoipa::{IntoResponses, OpenApi, ToSchema};
use utoipa_swagger_ui::{Config, SwaggerUi};

use super::app::wire::Problem;
use super::oip::OipError;
use super::status::{Envelope, Fault, Kind};
use super::{ApiState, app, cohere, forms, health, negotiate, oip, openai, rank, tei, tfs};

/// The name that examples are written with; the document served has the default model's instead.
const EXAMPLE_MODEL: &str = "all-MiniLM-L6-v2";

/// The routes of the document and its page.
pub fn routes() -> Router<ApiState> {
    // The address is relative to the page, so that it holds behind a proxy's prefix too.
    let page = SwaggerUi::new("/docs").config(Config::from("../openapi.json"));
    Router::new().route("/openapi.json", get(openapi)).merge(page)
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "eremois",
        description = "Inferences that are kept and found again, and models over the APIs of OpenAI, text-embeddings-inference, Cohere, Jina and TensorFlow Serving and over the Open Inference Protocol."
    ),
    paths(
        app::create::create,
        app::list::list,
        app::records::one,
        app::records::remove,
        app::records::feedback,
        app::records::erase,
        app::events::events,
        app::numbers::usage,
        app::numbers::quality,
        openai::embeddings::embeddings,
        openai::models::models,
        openai::models::model,
        openai::files::create,
        openai::files::list,
        openai::files::one,
        openai::files::remove,
        openai::files::content,
        openai::batches::create,
        openai::batches::list,
        openai::batches::one,
        openai::batches::cancel,
        openai::batches::events,
        cohere::embed::embed,
        cohere::embed::embed_v1,
        tei::main_task,
        tei::invocations,
        tei::vertex::vertex,
        tei::embed,
        tei::similarity::similarity,
        tei::heads::embed_all,
        tei::heads::embed_sparse,
        tei::heads::predict,
        tei::heads::rerank,
        rank::jina,
        rank::cohere,
        tei::tokens::tokenize,
        tei::tokens::decode,
        tei::info,
        oip::metadata::server,
        oip::metadata::live,
        oip::metadata::ready,
        oip::metadata::model,
        oip::metadata::model_version,
        oip::metadata::model_ready,
        oip::metadata::model_version_ready,
        oip::infer::infer,
        oip::infer::infer_version,
        oip::config::config,
        oip::config::config_of_version,
        oip::statistics::all,
        oip::statistics::one,
        oip::statistics::one_version,
        oip::repository::index,
        oip::repository::load,
        oip::repository::unload,
        tfs::status::version,
        tfs::status::label,
        tfs::metadata::metadata,
        tfs::predict::predict,
        tfs::classify::classify,
        tfs::classify::regress,
        health::health,
        health::ping,
        health::live,
        health::ready,
        health::metrics,
        openapi,
    ),
    components(schemas(Problem, OpenAiError, CohereError, OipError, TeiError, TensorFlowError))
)]
struct Document;

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "operations", responses((status = 200, description = "OpenAPI 3.1", body = serde_json::Value)))]
async fn openapi(State(state): State<ApiState>) -> axum::Json<Value> {
    axum::Json(document(&state))
}

/// The document with what is known only while serving: the version, the address, the default model's name.
pub fn document(state: &ApiState) -> Value {
    let mut document = serde_json::to_value(Document::openapi()).unwrap_or_default();
    document["info"]["version"] = json!(state.build.version);
    document["info"]["license"] = json!({"name": "Apache-2.0", "identifier": "Apache-2.0"});
    document["servers"] = json!([{"url": state.settings.url.as_deref().unwrap_or("/")}]);
    for (path, item) in document["paths"].as_object_mut().into_iter().flatten() {
        for (method, operation) in item.as_object_mut().into_iter().flatten() {
            add_errors(path, method, operation);
            if forms::ROUTES.contains(&path.as_str()) {
                add_bytes(operation);
            }
            if path.starts_with("/v2/models/") && path.ends_with("/infer") {
                add_binary_tensors(operation);
            }
        }
    }
    if let Ok(info) = state.engine.model(None) {
        rename_model(&mut document, &info.name);
    }
    document
}

fn rename_model(value: &mut Value, name: &str) {
    match value {
        Value::String(text) if text == EXAMPLE_MODEL => *text = name.to_string(),
        Value::Array(items) => items.iter_mut().for_each(|item| rename_model(item, name)),
        Value::Object(fields) => fields.values_mut().for_each(|field| rename_model(field, name)),
        _ => {}
    }
}

/// OpenAI's form of an error.
#[derive(ToSchema)]
#[allow(dead_code)]
struct OpenAiError {
    error: OpenAiErrorDetail,
}

#[derive(ToSchema)]
#[allow(dead_code)]
struct OpenAiErrorDetail {
    message: String,
    #[schema(example = "invalid_request_error")]
    r#type: String,
    /// The field at fault.
    #[schema(required)]
    param: Option<String>,
    /// The kind of error.
    code: String,
}

/// text-embeddings-inference's form of an error.
#[derive(ToSchema)]
#[allow(dead_code)]
struct TeiError {
    error: String,
    #[schema(example = "Validation")]
    error_type: String,
}

/// TensorFlow Serving's form of an error.
#[derive(ToSchema)]
#[allow(dead_code)]
struct TensorFlowError {
    error: String,
}

/// Cohere's form of an error.
#[derive(ToSchema)]
#[allow(dead_code)]
struct CohereError {
    message: String,
}

/// One event of `text/event-stream`; the answer is a row of them, for which OpenAPI 3.1 has no word.
#[derive(ToSchema)]
#[allow(dead_code)]
pub struct ServerSentEvent {
    /// The status that was reached.
    event: String,
    /// JSON.
    data: String,
}

/// The other type of an answer of the Open Inference Protocol.
fn add_binary_tensors(operation: &mut Value) {
    let success = &mut operation["responses"]["200"];
    success["content"][negotiate::BYTES] = json!({"schema": {
        "type": "string", "format": "binary", "description": "The JSON, and the binary tensors behind it",
    }});
    success["headers"][oip::HEAD_LEN.as_str()] =
        json!({"schema": {"type": "integer"}, "description": "Where binary tensors follow: bytes of the JSON"});
}

/// The other type of an answer with embeddings.
fn add_bytes(operation: &mut Value) {
    let success = &mut operation["responses"]["200"];
    success["content"][negotiate::BYTES] = json!({"schema": {
        "type": "string", "format": "binary", "description": "The rows one after another, little-endian",
    }});
    let header = |text: &str| json!({"schema": {"type": "string"}, "description": text});
    success["headers"][forms::SHAPE.as_str()] = header("Of raw bytes: inputs, comma, items of a row");
    success["headers"][forms::DTYPE.as_str()] = header("Of raw bytes: float32, float16, int8 or uint8");
}

/// Marks a route that answers errors; [`document`] puts those of the status table in its place, in the
/// envelope of the route's protocol.
pub struct Refusals;

const MARK: &str = "default";

impl IntoResponses for Refusals {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        BTreeMap::from([(MARK.to_string(), ResponseBuilder::new().description("An error").into())])
    }
}

/// Replaces the mark of an operation by one response a status, with an example of each kind of error.
fn add_errors(path: &str, method: &str, operation: &mut Value) {
    let Some(responses) = operation.get_mut("responses").and_then(Value::as_object_mut) else {
        return;
    };
    if responses.remove(MARK).is_none() {
        return;
    }
    let envelope = Envelope::of_path(path);
    let schema = match envelope {
        Envelope::Application => "#/components/schemas/Problem",
        Envelope::OpenAi => "#/components/schemas/OpenAiError",
        Envelope::Oip => "#/components/schemas/OipError",
        Envelope::Cohere => "#/components/schemas/CohereError",
        Envelope::Tei => "#/components/schemas/TeiError",
        Envelope::TensorFlow => "#/components/schemas/TensorFlowError",
    };
    for fault in Fault::samples() {
        let class = fault.class();
        let kind = class.kind.as_str();
        if !answers(envelope, path, method, class.kind) {
            continue;
        }
        let response = responses.entry(envelope.status(class).as_str().to_string()).or_insert_with(|| {
            let reason = envelope.status(class).canonical_reason().unwrap_or("an error");
            let mut response = json!({"description": reason});
            response["content"][envelope.content_type()] = json!({"schema": {"$ref": schema}, "examples": {}});
            if fault.retry_after().is_some() {
                response["headers"]["Retry-After"] =
                    json!({"schema": {"type": "integer"}, "description": "Seconds after which to try again"});
            }
            response
        });
        let examples = &mut response["content"][envelope.content_type()]["examples"];
        if examples.get(kind).is_none() {
            examples[kind] = json!({"value": envelope.body(&fault)});
        }
    }
}

/// Whether an operation can answer this kind of error.
fn answers(envelope: Envelope, path: &str, method: &str, kind: Kind) -> bool {
    if envelope == Envelope::Application {
        return app_answers(path, method, kind);
    }
    if envelope == Envelope::Oip {
        return oip_answers(path, method, kind);
    }
    if path.starts_with("/v1/files") || path.starts_with("/v1/batches") {
        return job_answers(path, method, kind);
    }
    match kind {
        // Not of an operation: no operation was found.
        Kind::RouteNotFound | Kind::MethodNotAllowed => false,
        // Of what the application API keeps: these protocols name nothing that is kept.
        Kind::NotFound | Kind::Conflict => false,
        Kind::Loading | Kind::Draining | Kind::Unhealthy | Kind::Internal => true,
        // TEI's routes name no model.
        Kind::ModelNotFound => envelope != Envelope::Tei && envelope != Envelope::Oip,
        Kind::NotAcceptable => forms::ROUTES.contains(&path),
        Kind::Malformed => method == "post" || path.contains('{'),
        // Of a body, or of the work on one.
        Kind::Empty
        | Kind::TooLarge
        | Kind::Invalid
        | Kind::UnsupportedMediaType
        | Kind::RequestTimeout
        | Kind::QueueFull
        | Kind::Overloaded
        | Kind::Deadline
        | Kind::StoreUnavailable
        | Kind::JournalFull
        | Kind::Failed
        | Kind::OutOfMemory
        | Kind::DeviceLost => method == "post",
    }
}

/// The same for the Open Inference Protocol, where one operation computes and two change what is served.
fn oip_answers(path: &str, method: &str, kind: Kind) -> bool {
    let (computes, changes) = (path.ends_with("/infer"), path.ends_with("load"));
    let (reads_body, names_model) = (method == "post", path.contains("{model}"));
    match kind {
        Kind::RouteNotFound | Kind::MethodNotAllowed | Kind::NotAcceptable => false,
        Kind::Conflict => changes,
        Kind::Internal => true,
        Kind::ModelNotFound => names_model,
        Kind::NotFound => path.contains("{version}"),
        Kind::Malformed => reads_body || names_model,
        Kind::Invalid | Kind::OutOfMemory | Kind::DeviceLost => computes || changes,
        Kind::TooLarge | Kind::UnsupportedMediaType | Kind::RequestTimeout => reads_body,
        Kind::Loading => names_model || path.ends_with("/ready"),
        Kind::Draining | Kind::Unhealthy => computes || changes || path.ends_with("/ready"),
        Kind::Empty
        | Kind::QueueFull
        | Kind::Overloaded
        | Kind::Deadline
        | Kind::StoreUnavailable
        | Kind::JournalFull
        | Kind::Failed => computes,
    }
}

/// The same for files and batches, which ask the store and no model.
fn job_answers(path: &str, method: &str, kind: Kind) -> bool {
    let names_one = path.contains("{id}");
    let has_body = method == "post" && !names_one;
    match kind {
        Kind::Internal | Kind::StoreUnavailable => true,
        Kind::NotFound => names_one || path == "/v1/batches" && has_body,
        Kind::Conflict => method == "delete" || method == "post" && path.starts_with("/v1/batches"),
        Kind::Malformed => has_body || names_one,
        Kind::Invalid => !names_one,
        Kind::Empty | Kind::TooLarge | Kind::UnsupportedMediaType | Kind::RequestTimeout => has_body,
        Kind::Deadline => has_body && path == "/v1/batches",
        Kind::RouteNotFound
        | Kind::MethodNotAllowed
        | Kind::NotAcceptable
        | Kind::ModelNotFound
        | Kind::Loading
        | Kind::Draining
        | Kind::Unhealthy
        | Kind::QueueFull
        | Kind::Overloaded
        | Kind::JournalFull
        | Kind::Failed
        | Kind::OutOfMemory
        | Kind::DeviceLost => false,
    }
}

/// The same for the application API, where only one operation computes and all others ask the store.
fn app_answers(path: &str, method: &str, kind: Kind) -> bool {
    let computes = path == "/api/v1/inferences" && method == "post";
    let has_body = method == "post";
    // These take long enough to have a deadline of their own, and read `x-request-timeout`.
    let is_timed = has_body || ["/api/v1/usage", "/api/v1/quality"].contains(&path);
    match kind {
        Kind::RouteNotFound | Kind::MethodNotAllowed | Kind::NotAcceptable => false,
        Kind::Internal | Kind::StoreUnavailable => true,
        Kind::NotFound => path.contains("{id}"),
        Kind::Malformed => is_timed || path.contains('{'),
        Kind::Deadline => is_timed,
        Kind::JournalFull => method != "get",
        Kind::TooLarge => has_body || path.contains("{user}"),
        Kind::Invalid => has_body || method == "get" && !path.contains('{'),
        Kind::Empty | Kind::UnsupportedMediaType | Kind::RequestTimeout => has_body,
        Kind::ModelNotFound
        | Kind::Conflict
        | Kind::Loading
        | Kind::Draining
        | Kind::Unhealthy
        | Kind::QueueFull
        | Kind::Overloaded
        | Kind::Failed
        | Kind::OutOfMemory
        | Kind::DeviceLost => computes,
    }
}
