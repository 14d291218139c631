//! Requests that this process sends itself: what marks them, and how those of batches are answered.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{Extensions, HeaderValue, Method, Uri, header};
use axum::middleware::{from_fn, from_fn_with_state};
use bytes::Bytes;
use http_body_util::BodyExt;
use tower::ServiceExt;
use tracing::Instrument;

use super::phases::Served;
use super::status::{self, Fault, Kind};
use super::{ApiState, openai};
use crate::jobs::batch::call::{Again, EndpointAnswer, EndpointCall, Endpoints};
use crate::store::record::InferenceId;

/// Marks a request whose answer nobody waits for now: it is computed with [`crate::request::Priority::Background`].
///
/// An extension of the request, and so nothing that could come over the network: no client can ask for it, nor be held
/// back by it.
#[derive(Debug, Clone, Copy)]
pub struct Background {
    /// In place of `api.timeout`: there is room when there is.
    pub deadline: Instant,
    /// The record of the result, where it is kept.
    pub record_id: InferenceId,
}

impl Background {
    /// Marks the request that these extensions are of.
    pub fn mark(self, extensions: &mut Extensions) {
        extensions.insert(self);
    }
}

/// The routes that batches ask, without what concerns connections: these requests have a line in no log and count as none.
pub struct Internal(Router);

impl Internal {
    /// Answers as the router of this state does.
    pub fn new(state: ApiState) -> Self {
        let router = openai::answered()
            .fallback(super::no_route)
            .layer(from_fn(status::catch_panic))
            .layer(from_fn_with_state(state.clone(), status::render))
            .with_state(state);
        Self(router)
    }
}

#[async_trait]
impl Endpoints for Internal {
    async fn call(&self, call: EndpointCall) -> EndpointAnswer {
        let span = tracing::info_span!("batch request", id = call.request_id);
        let mut request = Request::new(Body::from(call.body));
        *request.method_mut() = Method::POST;
        // The batch's endpoint was compared with a list of good ones.
        *request.uri_mut() = call.url.parse::<Uri>().unwrap_or_default();
        request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Background { deadline: call.deadline, record_id: call.record_id }.mark(request.extensions_mut());
        let response = match self.0.clone().oneshot(request).instrument(span).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        let again = response.extensions().get::<Fault>().map_or(Again::No, again);
        let served = response.extensions().get::<Served>();
        let num_tokens = served.map_or(0, |served| served.usage.num_tokens as u64);
        let model: Option<Arc<str>> = served.map(|served| served.model.clone());
        let status = response.status().as_u16();
        // These answers are in memory already: reading them fails no more than copying them.
        let body = response.into_body().collect().await.map_or_else(|_| Bytes::new(), |body| body.to_bytes());
        EndpointAnswer { status, body, num_tokens, model, again }
    }
}

/// Whether a request that was answered so should be asked again.
fn again(fault: &Fault) -> Again {
    let wait = Duration::from_secs(fault.retry_after().unwrap_or(0));
    match fault.class().kind {
        Kind::QueueFull
        | Kind::Overloaded
        | Kind::Loading
        | Kind::Draining
        | Kind::Unhealthy
        | Kind::StoreUnavailable
        | Kind::JournalFull
        | Kind::Conflict
        | Kind::RequestTimeout
        | Kind::Deadline => Again::Later(wait),
        // An input may be what brings them about.
        Kind::OutOfMemory | Kind::DeviceLost | Kind::Failed | Kind::Internal => Again::FewTimes(wait),
        Kind::Malformed
        | Kind::Empty
        | Kind::ModelNotFound
        | Kind::TooLarge
        | Kind::Invalid
        | Kind::RouteNotFound
        | Kind::MethodNotAllowed
        | Kind::UnsupportedMediaType
        | Kind::NotAcceptable
        | Kind::NotFound => Again::No,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use crate::jobs::batch::ENDPOINTS;

    #[test]
    fn what_the_request_is_to_blame_for_is_not_asked_again() {
        let again = |error: Error| again(&Fault::from(error));
        assert_eq!(again(Error::Empty { field: "input".into() }), Again::No);
        assert_eq!(again(Error::UnknownModel { model: "m".into(), served: "n".into() }), Again::No);
        let retry_after = Duration::from_millis(2500);
        let full = Error::QueueFull { model: "m".into(), limit: 1, retry_after };
        assert_eq!(again(full), Again::Later(Duration::from_secs(3)));
        assert_eq!(again(Error::Forward { model: "m".into(), cause: "c".into() }), Again::FewTimes(Duration::ZERO));
    }

    #[test]
    fn endpoints_are_paths() {
        for endpoint in ENDPOINTS {
            assert_eq!(endpoint.parse::<Uri>().unwrap().path(), *endpoint);
        }
    }
}
