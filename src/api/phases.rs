//! What a computed answer tells beside its body: TEI's headers, W3C's `server-timing`, the access log.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::Response;

use crate::inference::Computed;
use crate::output::{Phases, Usage};
use crate::request::ModelName;

/// Rides in a response's extensions to the access log.
#[derive(Debug, Clone)]
pub struct Served {
    pub model: ModelName,
    pub usage: Usage,
    pub phases: Phases,
    /// "gpu" or "cpu".
    compute_type: &'static str,
    /// "hit", "miss" or "partial"; `None` where the cache was not asked.
    pub cache: Option<&'static str>,
}

impl Served {
    /// What there is to tell of these results.
    pub fn of(computed: &Computed) -> Self {
        let Computed { info, task: _, rows, usage, phases, num_cached } = computed;
        let compute_type = if info.device.starts_with("cuda") { "gpu" } else { "cpu" };
        let cache = num_cached.map(|num_cached| match num_cached {
            0 => "miss",
            _ if num_cached == rows.len() => "hit",
            _ => "partial",
        });
        Self { model: info.name.clone(), usage: *usage, phases: *phases, compute_type, cache }
    }
}

/// Puts the headers on a response and leaves `served` for the log.
///
/// Units: `x-…-time` are whole milliseconds, as TEI's clients parse them; `server-timing` has the fractions.
pub fn attach(response: &mut Response, served: Served) {
    let Phases { tokenize, queue, inference, total } = served.phases;
    let headers = response.headers_mut();
    headers.insert("x-compute-type", HeaderValue::from_static(served.compute_type));
    if let Some(cache) = served.cache {
        headers.insert("x-cache", HeaderValue::from_static(cache));
    }
    number(headers, "x-compute-characters", served.usage.num_chars as u64);
    number(headers, "x-compute-tokens", served.usage.num_tokens as u64);
    number(headers, "x-compute-time", total.as_millis() as u64);
    number(headers, "x-total-time", total.as_millis() as u64);
    number(headers, "x-tokenization-time", tokenize.as_millis() as u64);
    number(headers, "x-queue-time", queue.as_millis() as u64);
    number(headers, "x-inference-time", inference.as_millis() as u64);
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    let timing = format!(
        "tokenize;dur={:.3}, queue;dur={:.3}, inference;dur={:.3}, total;dur={:.3}",
        ms(tokenize),
        ms(queue),
        ms(inference),
        ms(total)
    );
    if let Ok(value) = HeaderValue::try_from(timing) {
        headers.insert(HeaderName::from_static("server-timing"), value);
    }
    response.extensions_mut().insert(served);
}

fn number(headers: &mut HeaderMap, name: &'static str, value: u64) {
    headers.insert(HeaderName::from_static(name), HeaderValue::from(value));
}
