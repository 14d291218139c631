//! The outermost layer: request id, clock, span, access log, counts.

use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;

use super::ApiState;
use super::phases::Served;
use super::status::Fault;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest id of a client that is taken over: enough for a UUID, a trace id or a path of them.
const MAX_REQUEST_ID_LEN: usize = 128;

/// When the request's head was read; rides in its extensions.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    pub at: Instant,
}

/// Registers help and units of what this module counts.
pub fn describe_metrics() {
    use ::metrics::Unit;
    ::metrics::describe_counter!(
        "eremois_http_requests_total",
        Unit::Count,
        "Requests answered, by route, model and outcome (ok, an error's kind, not_ready of a probe, or cancelled by the client)"
    );
    ::metrics::describe_histogram!(
        "eremois_http_request_duration_seconds",
        Unit::Seconds,
        "From the head of a request read to its answer ready, by route, method and class of status"
    );
    ::metrics::describe_gauge!("eremois_http_requests_in_flight", Unit::Count, "Requests being worked on");
}

/// Layer: see the module.
///
/// The id of the client is kept where it is 1 to 128 visible ASCII characters; any other is replaced
/// rather than refused, because an odd proxy must not fail a good request.
pub async fn observe(State(_state): State<ApiState>, mut request: Request, next: Next) -> Response {
    let at = Instant::now();
    let id = request_id(&request);
    let route = match request.extensions().get::<MatchedPath>() {
        Some(path) => path.as_str().to_string(),
        None => "unmatched".to_string(),
    };
    let method = method_label(request.method());
    request.extensions_mut().insert(Arrival { at });
    let span = tracing::info_span!("request", id = id.to_str().unwrap_or_default(), method, route);

    let mut record = Record::start(at, route, method, span.clone());
    let mut response = next.run(request).instrument(span).await;
    record.finish(&response);
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

fn request_id(request: &Request) -> HeaderValue {
    let taken = request.headers().get(&REQUEST_ID).filter(|id| {
        let bytes = id.as_bytes();
        !bytes.is_empty() && bytes.len() <= MAX_REQUEST_ID_LEN && bytes.iter().all(u8::is_ascii_graphic)
    });
    match taken {
        Some(id) => id.clone(),
        None => {
            let mut buffer = [0; uuid::fmt::Hyphenated::LENGTH];
            let id = uuid::Uuid::now_v7().hyphenated().encode_lower(&mut buffer);
            // A UUID is hexadecimal digits and hyphens: always a header's value.
            HeaderValue::from_str(id).unwrap_or(HeaderValue::from_static("none"))
        }
    }
}

/// A closed set, because labels must be: anything may stand in a request line.
fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

/// One request's line in the log and its counts. Dropped without [`Self::finish`], the client has gone.
struct Record {
    at: Instant,
    route: String,
    method: &'static str,
    span: tracing::Span,
    finished: bool,
}

impl Record {
    fn start(at: Instant, route: String, method: &'static str, span: tracing::Span) -> Self {
        ::metrics::gauge!("eremois_http_requests_in_flight").increment(1.0);
        Self { at, route, method, span, finished: false }
    }

    fn finish(&mut self, response: &Response) {
        self.finished = true;
        let status = response.status().as_u16();
        let served = response.extensions().get::<Served>();
        let outcome = match response.extensions().get::<Fault>() {
            Some(fault) => fault.class().kind.as_str(),
            // Only a probe answers so in words of its own.
            None if status >= 500 => "not_ready",
            None => "ok",
        };
        let class = match status / 100 {
            1..=3 => "2xx",
            4 => "4xx",
            _ => "5xx",
        };
        let elapsed = self.count(served, outcome, class);
        let elapsed_us = elapsed.as_micros() as u64;
        let _in_span = self.span.enter();
        match served {
            Some(Served { model, usage, phases, cache, .. }) => tracing::info!(
                status,
                outcome,
                model = &**model,
                tokens = usage.num_tokens,
                cache,
                tokenize_us = phases.tokenize.as_micros() as u64,
                queue_us = phases.queue.as_micros() as u64,
                inference_us = phases.inference.as_micros() as u64,
                elapsed_us,
                "answered"
            ),
            // Probes and scrapes come every few seconds for ever: not worth a line at the usual level. What they
            // see change is logged where it changes.
            None if self.is_probe() => tracing::debug!(status, outcome, elapsed_us, "answered"),
            None => {
                let reason = response.extensions().get::<Fault>().map(Fault::message);
                tracing::info!(status, outcome, reason, elapsed_us, "answered");
            }
        }
    }

    fn is_probe(&self) -> bool {
        let is_probe = |route: &str| {
            matches!(route, "/metrics" | "/ping" | "/health" | "/health/live" | "/health/ready")
                || matches!(route, "/v2/health/live" | "/v2/health/ready" | "/v2/models/{model}/ready")
        };
        self.method == "GET" && is_probe(&self.route)
    }

    fn count(&self, served: Option<&Served>, outcome: &'static str, class: &'static str) -> std::time::Duration {
        let model = served.map_or_else(|| "none".into(), |s| s.model.clone());
        let elapsed = self.at.elapsed();
        let route = self.route.clone();
        ::metrics::counter!("eremois_http_requests_total", "route" => route.clone(), "model" => model, "outcome" => outcome)
            .increment(1);
        ::metrics::histogram!(
            "eremois_http_request_duration_seconds", "route" => route, "method" => self.method, "status" => class
        )
        .record(elapsed);
        elapsed
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        ::metrics::gauge!("eremois_http_requests_in_flight").decrement(1.0);
        if !self.finished {
            let elapsed = self.count(None, "cancelled", "none");
            let _in_span = self.span.enter();
            tracing::info!(outcome = "cancelled", elapsed_us = elapsed.as_micros() as u64, "the client has gone");
        }
    }
}
