//! From what went wrong to what a client sees: the one table, and the two layers that apply it.

mod envelope;
mod grpc;
mod panics;
mod samples;

use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::ApiState;
use super::compress::KNOWN;
use super::negotiate::BYTES;
use crate::Error;
use crate::store::record::Failure;

pub use envelope::Envelope;
pub use grpc::grpc_status;
pub use panics::catch_panic;

/// The type of bodies.
pub const JSON: &str = "application/json";
/// That of uploads.
pub const MULTIPART: &str = "multipart/form-data";

/// Everything a handler or a layer answers instead of a result.
#[derive(Debug, Clone, PartialEq)]
pub enum Fault {
    /// What the rooms below say.
    Error(Error),
    NoRoute {
        path: String,
    },
    MethodNotAllowed {
        method: String,
        path: String,
    },
    /// A body of another type by its `content-type`. `got` is empty where the header is missing.
    MediaType {
        got: String,
        /// [`JSON`] or [`MULTIPART`].
        expected: &'static str,
    },
    /// A body compressed in a way that is not taken.
    ContentEncoding {
        got: String,
        /// What is, as `accept-encoding` lists it.
        expected: &'static str,
    },
    /// The client takes none of the types that there are.
    NotAcceptable {
        got: String,
    },
    /// The body did not arrive within the request's deadline.
    SlowBody {
        timeout: Duration,
    },
    /// A handler panicked. The cause is for logs.
    Panic {
        cause: String,
    },
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// The class of a fault: a metric label, a log field and the `code` of OpenAI's errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Malformed,
    Empty,
    ModelNotFound,
    TooLarge,
    Invalid,
    RouteNotFound,
    MethodNotAllowed,
    UnsupportedMediaType,
    NotAcceptable,
    RequestTimeout,
    QueueFull,
    Overloaded,
    Loading,
    Draining,
    Unhealthy,
    NotFound,
    Conflict,
    StoreUnavailable,
    JournalFull,
    Deadline,
    Failed,
    OutOfMemory,
    DeviceLost,
    Internal,
}

impl Kind {
    /// The kind as logs and metrics write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Empty => "empty",
            Self::ModelNotFound => "model_not_found",
            Self::TooLarge => "too_large",
            Self::Invalid => "invalid",
            Self::RouteNotFound => "route_not_found",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::UnsupportedMediaType => "unsupported_media_type",
            Self::NotAcceptable => "not_acceptable",
            Self::RequestTimeout => "request_timeout",
            Self::QueueFull => "queue_full",
            Self::Overloaded => "overloaded",
            Self::Loading => "loading",
            Self::Draining => "draining",
            Self::Unhealthy => "unhealthy",
            Self::NotFound => "not_found",
            Self::Conflict => "conflict",
            Self::StoreUnavailable => "store_unavailable",
            Self::JournalFull => "journal_full",
            Self::Deadline => "deadline",
            Self::Failed => "failed",
            Self::OutOfMemory => "out_of_memory",
            Self::DeviceLost => "device_lost",
            Self::Internal => "internal",
        }
    }
}

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Class {
    pub kind: Kind,
    /// The status on every route but TEI's.
    pub status: StatusCode,
    /// The status on TEI's routes, whose clients know that server's table.
    pub tei_status: StatusCode,
}

impl Fault {
    /// The table. Everything a server of models cannot help (loading a file, settings) is ours: 500.
    pub fn class(&self) -> Class {
        use StatusCode as S;
        let both = |kind, status| Class { kind, status, tei_status: status };
        let apart = |kind, status, tei_status| Class { kind, status, tei_status };
        match self {
            Self::Error(error) => match error {
                Error::Malformed { .. } => apart(Kind::Malformed, S::BAD_REQUEST, S::UNPROCESSABLE_ENTITY),
                Error::Empty { .. } => both(Kind::Empty, S::BAD_REQUEST),
                Error::UnknownModel { .. } => both(Kind::ModelNotFound, S::NOT_FOUND),
                Error::TooLarge { .. } => both(Kind::TooLarge, S::PAYLOAD_TOO_LARGE),
                Error::Invalid { .. } => both(Kind::Invalid, S::UNPROCESSABLE_ENTITY),
                Error::QueueFull { .. } => both(Kind::QueueFull, S::TOO_MANY_REQUESTS),
                Error::Overloaded { .. } => both(Kind::Overloaded, S::TOO_MANY_REQUESTS),
                Error::Loading { .. } => both(Kind::Loading, S::SERVICE_UNAVAILABLE),
                Error::Draining => both(Kind::Draining, S::SERVICE_UNAVAILABLE),
                Error::Unhealthy { .. } => both(Kind::Unhealthy, S::SERVICE_UNAVAILABLE),
                Error::NotFound { .. } => both(Kind::NotFound, S::NOT_FOUND),
                Error::Conflict { .. } => both(Kind::Conflict, S::CONFLICT),
                Error::StoreUnavailable { .. } => both(Kind::StoreUnavailable, S::SERVICE_UNAVAILABLE),
                Error::JournalFull { .. } => both(Kind::JournalFull, S::SERVICE_UNAVAILABLE),
                Error::Deadline { .. } => both(Kind::Deadline, S::GATEWAY_TIMEOUT),
                Error::Forward { .. } => apart(Kind::Failed, S::INTERNAL_SERVER_ERROR, S::FAILED_DEPENDENCY),
                // Nothing is wrong with the request, and nothing broken for good: the memory may be another process's
                // for the moment, and another replica has its own. That is 503's meaning, not 500's.
                Error::OutOfMemory { .. } => both(Kind::OutOfMemory, S::SERVICE_UNAVAILABLE),
                Error::DeviceLost { .. } => apart(Kind::DeviceLost, S::INTERNAL_SERVER_ERROR, S::FAILED_DEPENDENCY),
                Error::Internal { .. }
                | Error::Tensor { .. }
                | Error::Checksum { .. }
                | Error::ModelFile { .. }
                | Error::Backup { .. }
                | Error::Shape { .. }
                | Error::Config { .. } => both(Kind::Internal, S::INTERNAL_SERVER_ERROR),
            },
            Self::NoRoute { .. } => both(Kind::RouteNotFound, S::NOT_FOUND),
            Self::MethodNotAllowed { .. } => both(Kind::MethodNotAllowed, S::METHOD_NOT_ALLOWED),
            Self::MediaType { .. } | Self::ContentEncoding { .. } => {
                both(Kind::UnsupportedMediaType, S::UNSUPPORTED_MEDIA_TYPE)
            }
            Self::NotAcceptable { .. } => both(Kind::NotAcceptable, S::NOT_ACCEPTABLE),
            Self::SlowBody { .. } => both(Kind::RequestTimeout, S::REQUEST_TIMEOUT),
            Self::Panic { .. } => both(Kind::Internal, S::INTERNAL_SERVER_ERROR),
        }
    }

    /// What the client reads: the kind and its operands, never a cause from inside. At most 500 characters,
    /// because operands may be what the client sent.
    pub fn message(&self) -> String {
        const MAX_CHARS: usize = 500;
        shorten(&self.whole_message(), MAX_CHARS)
    }

    fn whole_message(&self) -> String {
        match self {
            Self::Error(Error::Forward { model, .. }) => format!("model `{model}` failed on this batch"),
            Self::Error(Error::Unhealthy { model, .. }) => format!("model `{model}` is not healthy"),
            Self::Error(Error::StoreUnavailable { .. }) => "the store is not available".to_string(),
            Self::Error(Error::JournalFull { .. }) => {
                "results cannot be kept now; requests with `store: false` are answered".to_string()
            }
            Self::Error(Error::OutOfMemory { .. }) => "the device has no memory for this input now".to_string(),
            Self::Error(Error::DeviceLost { .. }) => "the device failed while it computed this request".to_string(),
            Self::Error(error) if self.class().kind != Kind::Internal => error.to_string(),
            Self::Error(_) | Self::Panic { .. } => "internal error".to_string(),
            Self::NoRoute { path } => format!("no route is `{}`; GET /openapi.json lists all", shorten(path, SHORT)),
            Self::MethodNotAllowed { method, path } => {
                format!("`{}` does not take {}", shorten(path, SHORT), shorten(method, SHORT))
            }
            Self::MediaType { got, expected } => {
                let charset = if *expected == JSON { " in UTF-8" } else { "" };
                match shorten(got, SHORT) {
                    got if got.is_empty() => format!("content-type: missing, expected {expected}{charset}"),
                    got => format!("content-type: expected {expected}{charset}, got `{got}`"),
                }
            }
            Self::ContentEncoding { got, expected } => {
                format!("content-encoding: expected one of {expected}, got `{}`", shorten(got, SHORT))
            }
            Self::NotAcceptable { got } => {
                format!("accept: there are {JSON} and {BYTES}, got `{}`", shorten(got, SHORT))
            }
            Self::SlowBody { timeout } => format!("the body did not arrive within {timeout:?}"),
        }
    }

    /// The field of the request that is at fault, as the client wrote it.
    pub fn field(&self) -> Option<&str> {
        match self {
            Self::Error(
                Error::Malformed { field, .. }
                | Error::Empty { field }
                | Error::Invalid { field, .. }
                | Error::Conflict { field, .. }
                | Error::TooLarge { field, .. },
            ) => Some(field),
            Self::Error(Error::UnknownModel { .. }) => Some("model"),
            _ => None,
        }
    }

    /// Whole seconds after which another try may do better: at least 1, because 0 invites a tight loop.
    pub fn retry_after(&self) -> Option<u64> {
        match self {
            Self::Error(Error::QueueFull { retry_after, .. } | Error::Overloaded { retry_after, .. }) => {
                Some((retry_after.as_secs_f64().ceil() as u64).max(1))
            }
            Self::Error(
                Error::Loading { .. } | Error::Draining | Error::Unhealthy { .. } | Error::OutOfMemory { .. },
            ) => Some(1),
            // Looked at again by then: elections take seconds, and so do requests under way.
            Self::Error(Error::StoreUnavailable { .. } | Error::JournalFull { .. } | Error::Conflict { .. }) => Some(2),
            _ => None,
        }
    }

    /// What only the logs may say.
    fn cause(&self) -> Option<String> {
        match self {
            Self::Panic { cause } => Some(cause.clone()),
            Self::Error(
                error @ (Error::Unhealthy { .. } | Error::StoreUnavailable { .. } | Error::JournalFull { .. }),
            ) => Some(error.to_string()),
            Self::Error(error) => match self.class().kind {
                Kind::Internal | Kind::Failed | Kind::OutOfMemory | Kind::DeviceLost => Some(error.to_string()),
                _ => None,
            },
            _ => None,
        }
    }
}

/// How a failure is kept: what a synchronous answer of the application API would have said.
pub fn failure_of(error: &Error) -> Failure {
    let fault = Fault::Error(error.clone());
    let class = fault.class();
    if let Some(cause) = fault.cause() {
        tracing::error!(kind = class.kind.as_str(), cause, "an inference failed");
    }
    Failure {
        kind: class.kind.as_str().to_string(),
        status: class.status.as_u16(),
        message: fault.message(),
        field: fault.field().map(str::to_string),
    }
}

/// Leaves the envelope to [`render`], which knows the route. The body here is what a server without
/// that layer would send.
impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let mut response = (self.class().status, self.message()).into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// Layer: gives a fault its protocol's status and body, and logs what the client must not see.
pub async fn render(State(state): State<ApiState>, request: Request, next: Next) -> Response {
    let envelope = Envelope::of_path(request.uri().path());
    let mut response = next.run(request).await;
    if let Some(Fault::Error(Error::UnknownModel { model, .. })) = response.extensions().get()
        && state.is_starting()
    {
        let fault = Fault::from(Error::Loading { model: model.clone() });
        response.extensions_mut().insert(fault);
    }
    let Some(fault) = response.extensions().get::<Fault>() else {
        return response;
    };
    let class = fault.class();
    if let Some(cause) = fault.cause() {
        tracing::error!(kind = class.kind.as_str(), cause, "request failed");
    }
    let body = envelope.body(fault).to_string();
    let accept = if matches!(fault, Fault::MediaType { expected: MULTIPART, .. }) { MULTIPART } else { JSON };
    let accept_encoding = match fault {
        Fault::ContentEncoding { expected, .. } => expected,
        Fault::MediaType { expected: JSON, .. } => KNOWN,
        _ => "identity",
    };
    let retry_after = fault.retry_after();
    // A refused body may still be on its way: closing is the only way not to read it all. A draining
    // server, or one that will soon, closes so that the client's next connection finds another.
    let close = matches!(class.kind, Kind::Draining | Kind::DeviceLost | Kind::RequestTimeout);
    let (mut parts, _) = response.into_parts();
    parts.status = envelope.status(class);
    parts.headers.remove(header::CONTENT_LENGTH);
    parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(envelope.content_type()));
    if let Some(seconds) = retry_after {
        parts.headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    if close {
        parts.headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if class.kind == Kind::UnsupportedMediaType {
        parts.headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
        parts.headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(accept_encoding));
    }
    Response::from_parts(parts, body.into())
}

/// Characters of a path or a header's value that are worth repeating.
const SHORT: usize = 80;

/// What a client sent, short enough for a message.
fn shorten(text: &str, max_chars: usize) -> String {
    match text.char_indices().nth(max_chars) {
        None => text.to_string(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_always_names_a_wait_of_at_least_a_second() {
        let full = |retry_after| Fault::from(Error::QueueFull { model: "m".into(), limit: 1, retry_after });
        assert_eq!(full(Duration::ZERO).retry_after(), Some(1));
        assert_eq!(full(Duration::from_millis(1001)).retry_after(), Some(2));
    }

    #[test]
    fn causes_stay_inside() {
        for fault in Fault::samples() {
            let message = fault.message();
            assert!(
                !message.contains("bug") && !message.contains("lost") && !message.contains("heartbeat"),
                "{message}"
            );
            assert!(message.chars().next().is_some_and(|c| !c.is_uppercase()) && !message.ends_with('.'), "{message}");
        }
    }

    #[test]
    fn what_a_client_sent_is_cut_between_characters() {
        let message = Fault::NoRoute { path: "/é".repeat(500) }.message();
        assert!(message.len() < 300, "{message}");
        let message = Fault::from(Error::Empty { field: "é".repeat(5000) }).message();
        assert_eq!(message.chars().count(), 501);
    }
}
