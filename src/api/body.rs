//! From a request's bytes to its typed body: type, size, time and form are checked here, once.

use std::time::{Duration, Instant};

use axum::body::{Body, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, header};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

use super::ApiState;
use super::compress::{self, Coding, MAX_INLINE_UNPACKED, Unpacking};
use super::internal::Background;
use super::observe::Arrival;
use super::status::{Fault, JSON, MULTIPART};
use crate::inference::CacheUse;
use crate::request::Priority;
use crate::store::record::InferenceId;
use crate::{Error, Result};

/// A body longer than this is parsed off the async threads: JSON of text is read at 0.5 to 1 GB/s, so
/// below it parsing stays under the 500 microseconds an async thread may be held.
pub const MAX_INLINE_BYTES: usize = 256 << 10;

/// A request after its form is checked.
#[derive(Debug)]
pub struct Call<T> {
    pub body: T,
    pub deadline: Instant,
    /// What `deadline` was made of, for errors.
    pub timeout: Duration,
    /// What `cache-control` asks for.
    pub cache_use: CacheUse,
    pub priority: Priority,
    /// The record that the result is kept in, where the process itself asks.
    pub record_id: Option<InferenceId>,
}

impl<T> Call<T> {
    /// The body, and the call without it.
    pub fn split(self) -> (T, Call<()>) {
        let Self { body, deadline, timeout, cache_use, priority, record_id } = self;
        (body, Call { body: (), deadline, timeout, cache_use, priority, record_id })
    }

    /// The same call with another body.
    pub fn with<U>(self, body: U) -> Call<U> {
        let Self { body: _, deadline, timeout, cache_use, priority, record_id } = self;
        Call { body, deadline, timeout, cache_use, priority, record_id }
    }
}

/// A body that was read as plain JSON first. Errors: `Malformed` with the path to the value at fault.
pub fn of_value<T: DeserializeOwned>(value: serde_json::Value) -> Result<T> {
    serde_path_to_error::deserialize(value).map_err(|tracked| {
        let is_known = tracked.path().iter().next().is_some();
        let field = if is_known { tracked.path().to_string() } else { "body".to_string() };
        malformed(&field, tracked.inner().to_string())
    })
}

/// Waits for `work` to the deadline. For what the engine does not time itself.
///
/// Errors: `Deadline`, and those of `work`.
pub async fn bounded<O>(deadline: Instant, timeout: Duration, work: impl Future<Output = Result<O>>) -> Result<O> {
    match tokio::time::timeout_at(deadline.into(), work).await {
        Ok(result) => result,
        Err(_) => Err(Error::Deadline { timeout }),
    }
}

/// Reads the whole body and parses it.
///
/// Errors: `MediaType`, `ContentEncoding`, `SlowBody`; `TooLarge` with unit "bytes", of the body as it came or unpacked;
/// `Malformed` naming the field, or "body" where the text is no JSON; `Malformed` for `x-request-timeout`.
pub async fn read<T: DeserializeOwned + Send + 'static>(state: &ApiState, request: Request) -> Result<Call<T>, Fault> {
    check_media_type(request.headers())?;
    let call = receive(state, request).await?;
    parsed(call, |bytes| parse(&bytes)).await
}

/// Reads the whole body, whose type the caller has checked.
///
/// Errors: `ContentEncoding`, `SlowBody`; `TooLarge` with unit "bytes", of the body as it came or unpacked; `Malformed` for
/// `x-request-timeout` and for bytes that are not packed as they say.
pub async fn receive(state: &ApiState, request: Request) -> Result<Call<Bytes>, Fault> {
    let arrived = request.extensions().get::<Arrival>().map_or_else(Instant::now, |a| a.at);
    let (parts, body) = request.into_parts();
    let coding = coding(&parts.headers)?;
    let timeout = timeout(&parts.headers, state.settings.timeout)?;
    let asked = parts.headers.get_all(header::CACHE_CONTROL).iter();
    let cache_use = cache_use(asked.filter_map(|value| value.to_str().ok()));
    let background = parts.extensions.get::<Background>().copied();
    let deadline = background.map_or(arrived + timeout, |background| background.deadline);
    let priority = background.map_or(Priority::Interactive, |_| Priority::Background);
    let record_id = background.map(|background| background.record_id);
    let limit = state.settings.max_body_bytes;
    // What the head announces (`content-length`): refused before a byte of it is read.
    let announced = body.size_hint().lower() as usize;
    if announced > limit {
        return Err(too_large(announced, limit).into());
    }
    let body = match tokio::time::timeout_at(deadline.into(), collect(body, limit)).await {
        Ok(bytes) => bytes?,
        Err(_) => return Err(Fault::SlowBody { timeout }),
    };
    let body = match coding {
        Some(coding) if !body.is_empty() => unpack(coding, body, limit).await?,
        _ => body,
    };
    Ok(Call { body, deadline, timeout, cache_use, priority, record_id })
}

/// Parses a received body with `parse`, on this thread if it is short and on a blocking one if not.
///
/// Errors: those of `parse`.
pub async fn parsed<T: Send + 'static>(
    call: Call<Bytes>,
    parse: impl FnOnce(Bytes) -> Result<T> + Send + 'static,
) -> Result<Call<T>, Fault> {
    let (bytes, call) = call.split();
    let body = within(bytes.len(), MAX_INLINE_BYTES, move || parse(bytes)).await?;
    Ok(call.with(body))
}

/// Does `work` on so many bytes, on this thread if they are at most `max_inline` and on a blocking one if not.
///
/// Errors: those of `work`.
pub async fn within<T: Send + 'static>(
    num_bytes: usize,
    max_inline: usize,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    if num_bytes <= max_inline { work() } else { blocking(work).await }
}

/// Unpacks a body; what is short unpacked, here.
async fn unpack(coding: Coding, bytes: Bytes, limit: usize) -> Result<Bytes> {
    let mut unpacking = Unpacking::new(coding, bytes, limit)?;
    if unpacking.read(MAX_INLINE_UNPACKED)? {
        return unpacking.finish().map(Bytes::from);
    }
    blocking(move || unpacking.finish().map(Bytes::from)).await
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let joined = tokio::task::spawn_blocking(work).await;
    joined.map_err(|e| Error::Internal { cause: format!("parsing a body: {e}") })?
}

async fn collect(body: Body, limit: usize) -> Result<Bytes> {
    match Limited::new(body, limit).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        // The length is known only to be above the limit: the rest was not read.
        Err(e) if e.is::<LengthLimitError>() || e.source().is_some_and(|s| s.is::<LengthLimitError>()) => {
            Err(too_large(limit + 1, limit))
        }
        // Nobody is there to read this answer: the connection broke while the body was sent.
        Err(e) => Err(malformed("body", format!("could not be read: {e}"))),
    }
}

fn too_large(got: usize, limit: usize) -> Error {
    Error::TooLarge { field: "body".to_string(), got, limit, unit: "bytes" }
}

fn malformed(field: &str, reason: String) -> Error {
    Error::Malformed { field: field.to_string(), reason }
}

/// Reads JSON. Errors: `Malformed` with the path to the value at fault ("input[2]").
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    if bytes.is_empty() {
        return Err(Error::Empty { field: "body".to_string() });
    }
    let error = match serde_json::from_slice(bytes) {
        Ok(body) => return Ok(body),
        Err(error) => error,
    };
    if !error.is_data() {
        return Err(malformed("body", format!("not JSON: {error}")));
    }
    // Well formed but of the wrong type: parse again with the path tracked. Only failures pay for it.
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    match serde_path_to_error::deserialize::<_, T>(&mut deserializer) {
        Err(tracked) if tracked.path().iter().next().is_some() => {
            Err(malformed(&tracked.path().to_string(), tracked.inner().to_string()))
        }
        _ => Err(malformed("body", error.to_string())),
    }
}

/// A form with files, not compressed. Errors: `MediaType`, `ContentEncoding`.
pub fn check_multipart(headers: &HeaderMap) -> Result<(), Fault> {
    let got = header_text(headers, header::CONTENT_TYPE);
    let essence = got.split(';').next().unwrap_or_default().trim();
    if !essence.eq_ignore_ascii_case(MULTIPART) {
        return Err(Fault::MediaType { got, expected: MULTIPART });
    }
    match encoding(headers) {
        None => Ok(()),
        Some(got) => Err(Fault::ContentEncoding { got, expected: "identity" }),
    }
}

/// Whether a body says that it is a file of an image, or does not say what it is: clients that have only its bytes send
/// nothing.
pub fn may_be_image(headers: &HeaderMap) -> bool {
    let got = header_text(headers, header::CONTENT_TYPE).trim().to_ascii_lowercase();
    got.is_empty() || got.starts_with("image/") || got.starts_with("application/octet-stream")
}

/// JSON only. Not for the parser's sake: a page of another site can make a browser send `text/plain`
/// here without asking, but not `application/json`.
fn check_media_type(headers: &HeaderMap) -> Result<(), Fault> {
    let got = header_text(headers, header::CONTENT_TYPE);
    let mut parts = got.split(';').map(|part| part.trim().to_ascii_lowercase());
    let essence = parts.next().unwrap_or_default();
    let is_json = essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"));
    let is_utf8 = parts.filter_map(|p| p.strip_prefix("charset=").map(str::to_string)).all(|charset| {
        let charset = charset.trim_matches('"');
        matches!(charset, "utf-8" | "utf8" | "us-ascii")
    });
    if !is_json || !is_utf8 {
        return Err(Fault::MediaType { got, expected: JSON });
    }
    Ok(())
}

/// How the body is compressed. One coding: nothing gains by a second one. Errors: `ContentEncoding`.
fn coding(headers: &HeaderMap) -> Result<Option<Coding>, Fault> {
    let Some(got) = encoding(headers) else {
        return Ok(None);
    };
    match Coding::named(&got) {
        Some(coding) => Ok(Some(coding)),
        None => Err(Fault::ContentEncoding { got, expected: compress::KNOWN }),
    }
}

/// What stands in `content-encoding`; `None` where the body is as it is.
fn encoding(headers: &HeaderMap) -> Option<String> {
    let got = header_text(headers, header::CONTENT_ENCODING).trim().to_string();
    (!got.is_empty() && !got.eq_ignore_ascii_case("identity")).then_some(got)
}

/// Empty where the header is missing.
pub fn header_text(headers: &HeaderMap, name: HeaderName) -> String {
    headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).unwrap_or_default()
}

/// What the values of `cache-control` ask for. `no-store`: the cache is passed over; `no-cache`: its results are not used.
/// Other directives are of no concern here.
///
/// Source: RFC 9111, section 5.2.1.
pub fn cache_use<'a>(values: impl Iterator<Item = &'a str>) -> CacheUse {
    let mut cache_use = CacheUse::Full;
    for directive in values.flat_map(|value| value.split(',')).map(str::trim) {
        if directive.eq_ignore_ascii_case("no-store") {
            return CacheUse::Bypass;
        }
        if directive.eq_ignore_ascii_case("no-cache") {
            cache_use = CacheUse::Refresh;
        }
    }
    cache_use
}

/// `x-request-timeout`, never above `longest`; `longest` without the header.
///
/// Units: seconds ("2", "0.5") or with a unit ("500ms", "1m").
/// Errors: `Malformed` for another form and for no time at all.
pub fn timeout(headers: &HeaderMap, longest: Duration) -> Result<Duration> {
    const NAME: &str = "x-request-timeout";
    let Some(value) = headers.get(NAME) else {
        return Ok(longest);
    };
    let text = value.to_str().unwrap_or_default().trim();
    let seconds = |s: f64| Duration::try_from_secs_f64(s).ok();
    let parsed = match text.parse::<f64>() {
        // A wait of ages is no error: the limit is the server's.
        Ok(s) if s.is_finite() && s > 1e9 => Some(longest),
        Ok(s) => seconds(s),
        Err(_) => humantime::parse_duration(text).ok(),
    };
    match parsed {
        Some(timeout) if !timeout.is_zero() => Ok(timeout.min(longest)),
        _ => Err(malformed(NAME, "expected seconds above 0, or a time like `500ms`".to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn headers(name: &'static str, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name.parse().unwrap(), HeaderValue::from_static(value))])
    }

    #[test]
    fn a_client_may_ask_for_less_time_but_not_for_more() {
        let longest = Duration::from_secs(30);
        let asked = |value| timeout(&headers("x-request-timeout", value), longest);
        assert_eq!(timeout(&HeaderMap::new(), longest), Ok(longest));
        assert_eq!(asked("2"), Ok(Duration::from_secs(2)));
        assert_eq!(asked("0.25"), Ok(Duration::from_millis(250)));
        assert_eq!(asked("500ms"), Ok(Duration::from_millis(500)));
        for more in ["31", "1h", "1e300", "99999999999999999999"] {
            assert_eq!(asked(more), Ok(longest), "{more}");
        }
        for bad in ["0", "-1", "soon", "", "NaN", "inf", "0ms", "\u{7f}"] {
            let Ok(value) = HeaderValue::from_str(bad) else { continue };
            let map = HeaderMap::from_iter([("x-request-timeout".parse().unwrap(), value)]);
            assert!(timeout(&map, longest).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_client_may_do_without_the_cache() {
        assert_eq!(cache_use([].into_iter()), CacheUse::Full);
        let asked = |value| cache_use([value].into_iter());
        assert_eq!(asked("max-age=5, must-understand"), CacheUse::Full);
        assert_eq!(asked("No-Cache"), CacheUse::Refresh);
        assert_eq!(asked("max-age=0,no-cache , no-store"), CacheUse::Bypass);
        assert_eq!(cache_use(["no-store", "no-cache"].into_iter()), CacheUse::Bypass);
    }

    #[test]
    fn only_json_in_utf8_is_taken() {
        let ok = |value| check_media_type(&headers("content-type", value)).is_ok();
        assert!(ok("application/json"));
        assert!(ok("Application/JSON; charset=UTF-8"));
        assert!(ok("application/vnd.api+json"));
        assert!(!ok("text/json"));
        assert!(!ok("application/json; charset=latin1"));
        assert!(!ok("application/x-www-form-urlencoded"));
        assert!(check_media_type(&HeaderMap::new()).is_err());
    }

    #[test]
    fn json_may_be_compressed_once_and_files_may_not() {
        let coding_of = |value| coding(&headers("content-encoding", value));
        assert_eq!(coding_of("X-GZIP"), Ok(Some(Coding::Gzip)));
        assert_eq!((coding(&HeaderMap::new()), coding_of(" identity ")), (Ok(None), Ok(None)));
        let refused = Fault::ContentEncoding { got: "gzip, br".into(), expected: compress::KNOWN };
        assert_eq!(coding_of("gzip, br"), Err(refused));
        let mut file = headers("content-type", "multipart/form-data; boundary=b");
        assert_eq!(check_multipart(&file), Ok(()));
        file.insert("content-encoding", HeaderValue::from_static("zstd"));
        let refused = Fault::ContentEncoding { got: "zstd".into(), expected: "identity" };
        assert_eq!(check_multipart(&file), Err(refused));
    }

    #[test]
    fn a_value_of_the_wrong_type_is_named_by_its_path() {
        #[derive(Debug, PartialEq, serde::Deserialize)]
        struct Form {
            input: super::super::inputs::Inputs,
        }
        let field = |json: &str| match parse::<Form>(json.as_bytes()) {
            Err(Error::Malformed { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(field(r#"{"input": ["a", 1.5]}"#), "input[1]");
        assert_eq!(field(r#"{"input": [[1], [2, "x"]]}"#), "input[1][1]");
        assert_eq!(field(r#"{"input": null}"#), "input");
        assert_eq!(field("{}"), "body");
        assert_eq!(field(r#"{"input": "\ud800"}"#), "body");
        // A list where an object belongs is read field by field, so the fault lies in its first place.
        assert_eq!(field("[1"), "[0]");
        assert_eq!(parse::<Form>(b""), Err(Error::Empty { field: "body".into() }));
    }
}
