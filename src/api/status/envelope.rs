//! The forms that protocols give their errors.

use axum::http::StatusCode;

use super::{Class, Fault};
use crate::api::{app, cohere, oip, openai, tei, tfs};

/// The form of a protocol's errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Envelope {
    Application,
    OpenAi,
    Cohere,
    /// The Open Inference Protocol's.
    Oip,
    Tei,
    TensorFlow,
}

impl Envelope {
    /// The protocol a path belongs to, whether it is a route or not.
    pub fn of_path(path: &str) -> Self {
        let is_under =
            |prefix: &str| path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        if is_under("/v2/embed") || is_under("/v1/embed") || is_under("/v2/rerank") {
            Self::Cohere
        } else if tfs::path::is_ours(path) {
            Self::TensorFlow
        } else if is_under("/v1") {
            Self::OpenAi
        } else if oip::owns(path) {
            Self::Oip
        } else if is_under("/api") {
            Self::Application
        } else {
            Self::Tei
        }
    }

    /// The status that this protocol's clients know for such a fault.
    pub fn status(self, class: Class) -> StatusCode {
        match self {
            Self::Application | Self::OpenAi | Self::Cohere | Self::Oip => class.status,
            Self::Tei => class.tei_status,
            // Its statuses are those of gRPC's codes, where a value that is not taken is an invalid argument.
            Self::TensorFlow if class.status == StatusCode::UNPROCESSABLE_ENTITY => StatusCode::BAD_REQUEST,
            Self::TensorFlow => class.status,
        }
    }

    /// The type of the body.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Application => "application/problem+json",
            Self::OpenAi | Self::Cohere | Self::Oip | Self::Tei | Self::TensorFlow => "application/json",
        }
    }

    /// The body, as JSON.
    pub fn body(self, fault: &Fault) -> serde_json::Value {
        match self {
            Self::Application => app::error_body(fault),
            Self::OpenAi => openai::error_body(fault),
            Self::Cohere => cohere::error_body(fault),
            Self::Oip => oip::error_body(fault),
            Self::Tei => tei::error_body(fault),
            Self::TensorFlow => tfs::error_body(fault),
        }
    }
}
