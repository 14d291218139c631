//! TensorFlow Serving's REST protocol: status, metadata and predictions of the models served.
//!
//! Source: tensorflow/serving `tensorflow_serving/g3doc/api_rest.md`. `path` reads the addresses, `signature` names the
//! ways to ask a model ([`super::tensors`] knows their tensors, and reads and writes them), `predict` and `classify` compute, `answer`
//! writes; `status` and `metadata` are the two documents about a model.

mod answer;
pub mod classify;
pub mod metadata;
pub mod path;
pub mod predict;
mod signature;
pub mod status;

use std::sync::Arc;

use axum::Router;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use serde_json::{Value, json};

use super::ApiState;
use super::status::Fault;
use crate::model::ModelInfo;
use crate::{Error, Result};
use path::{Address, Subject, Which};

/// The routes of this protocol that take a body. Those that do not share their address with OpenAI's: [`read`].
pub fn routes() -> Router<ApiState> {
    // The whole rest of the path, as there: a colon within a segment is nothing that axum's paths can say.
    Router::new().route("/v1/models/{*id}", post(call))
}

async fn call(
    State(state): State<ApiState>,
    rest: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Response, Fault> {
    let Path(rest) = rest.map_err(|e| Error::Malformed { field: "model".to_string(), reason: e.body_text() })?;
    let no_route = || Fault::NoRoute { path: request.uri().path().to_string() };
    let address = path::parse(&rest).ok_or_else(no_route)?;
    match address.subject {
        Subject::Predict => predict::call(&state, &address, request).await,
        Subject::Classify | Subject::Regress => classify::call(&state, &address, request).await,
        Subject::Status | Subject::Metadata => Ok(method_not_allowed(&request)),
    }
}

/// What a `GET` below `/v1/models/` is answered where `rest` is no model's name; `None` if that is all it could be.
pub fn read(state: &ApiState, rest: &str, request: &Request) -> Option<Result<Response, Fault>> {
    let address = path::parse(rest).filter(Address::is_more_than_a_name)?;
    let answer = |info: Arc<ModelInfo>| match address.subject {
        Subject::Status => axum::Json(status::ModelVersions::of(state, &info)).into_response(),
        Subject::Metadata => axum::Json(metadata::Metadata::of(&info)).into_response(),
        Subject::Predict | Subject::Classify | Subject::Regress => method_not_allowed(request),
    };
    Some(address.find(state).map(answer).map_err(Fault::from))
}

/// What a method that an address does not take is answered. The addresses below `/v1/models/` are one route to axum, so that
/// its `allow` would name what any of them takes.
pub fn method_not_allowed(request: &Request) -> Response {
    let (method, path) = (request.method().to_string(), request.uri().path().to_string());
    let allowed = path::subject(&path).map(|subject| match subject {
        Subject::Status | Subject::Metadata => "GET,HEAD",
        Subject::Predict | Subject::Classify | Subject::Regress => "POST",
    });
    let mut response = Fault::MethodNotAllowed { method, path }.into_response();
    if let Some(allowed) = allowed {
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allowed));
    }
    response
}

impl Address<'_> {
    /// The model asked for. One version of each is served, which the label `stable` names too.
    ///
    /// Errors: `UnknownModel` for a model, version or label that is not served.
    fn find(&self, state: &ApiState) -> Result<Arc<ModelInfo>> {
        let info = state.engine.model(Some(self.model))?;
        let asked = match self.which {
            Which::Served => return Ok(info),
            Which::Version(version) if version == info.version => return Ok(info),
            Which::Label(STABLE) => return Ok(info),
            Which::Version(version) => format!("{}/versions/{version}", self.model),
            Which::Label(label) => format!("{}/labels/{label}", self.model),
        };
        let served = format!("{0}/versions/{1}, {0}/labels/{STABLE}", self.model, info.version);
        Err(Error::UnknownModel { model: asked, served })
    }
}

/// The usual name of the version that clients shall use.
const STABLE: &str = "stable";

/// `{error}`.
pub fn error_body(fault: &Fault) -> Value {
    json!({"error": fault.message()})
}
