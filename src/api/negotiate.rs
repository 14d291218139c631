//! What a client's `accept` and `accept-encoding` ask for.
//!
//! Source: RFC 9110, sections 12.4.2 (weights), 12.5.1 and 12.5.3.

use axum::http::{HeaderMap, HeaderName, header};

use super::compress::Coding;
use super::status::Fault;

/// The types that embeddings are answered in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Media {
    Json,
    /// Rows as raw bytes: [`super::forms::raw`].
    Bytes,
}

/// The type of [`Media::Bytes`].
pub const BYTES: &str = "application/octet-stream";

/// The type of an answer with embeddings: JSON, unless raw bytes are liked better.
///
/// Errors: `NotAcceptable` where the client takes neither.
pub fn media(headers: &HeaderMap) -> Result<Media, Fault> {
    let ranges = weighted(headers, header::ACCEPT);
    if ranges.is_empty() {
        return Ok(Media::Json);
    }
    let [json, bytes] = [super::status::JSON, BYTES].map(|essence| weight_of_media(&ranges, essence));
    if bytes > json {
        Ok(Media::Bytes)
    } else if json > 0.0 {
        Ok(Media::Json)
    } else {
        let got = headers.get(header::ACCEPT).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
        Err(Fault::NotAcceptable { got: got.unwrap_or_default() })
    }
}

/// Of ranges that match, the most specific one decides: `a/b` before `a/*` before `*/*`.
fn weight_of_media(ranges: &[(String, f32)], essence: &str) -> f32 {
    let family = essence.split_once('/').map_or("", |(family, _)| family);
    let of = |wanted: &dyn Fn(&str) -> bool| ranges.iter().find(|(range, _)| wanted(range)).map(|(_, weight)| *weight);
    of(&|range| range == essence)
        .or_else(|| of(&|range| range.strip_suffix("/*") == Some(family)))
        .or_else(|| of(&|range| range == "*/*"))
        .unwrap_or(0.0)
}

/// What a client says of compressed answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Codings {
    /// The one to use; `None`: the client takes none that we know, or likes none.
    pub best: Option<Coding>,
    /// Whether the client refuses an answer as it is: then any is compressed, not only those that gain by it.
    pub refuses_identity: bool,
}

/// Of codings the client likes equally, the one that is quickest here comes first.
pub fn codings(headers: &HeaderMap) -> Codings {
    let listed = weighted(headers, header::ACCEPT_ENCODING);
    let of = |name: &str| listed.iter().find(|(listed, _)| listed == name).map(|(_, weight)| *weight);
    let rest = of("*");
    let identity = of("identity");
    let mut best: Option<(Coding, f32)> = None;
    for coding in Coding::ALL {
        let weight = of(coding.as_str()).or(rest).unwrap_or(0.0);
        if weight > best.map_or(0.0, |(_, least)| least) {
            best = Some((coding, weight));
        }
    }
    // What is not named is taken, but not liked better than what is.
    let best = best.filter(|(_, weight)| identity.is_none_or(|identity| *weight >= identity));
    let refuses_identity = identity.or(rest) == Some(0.0);
    Codings { best: best.map(|(coding, _)| coding), refuses_identity }
}

/// The list's members in lower case, without their parameters, with their weights. A weight that is none counts as 1.
fn weighted(headers: &HeaderMap, name: HeaderName) -> Vec<(String, f32)> {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    let members = values.flat_map(|value| value.split(',')).filter_map(|member| {
        let mut parts = member.split(';').map(str::trim);
        let essence = parts.next().filter(|essence| !essence.is_empty())?.to_ascii_lowercase();
        let weight = parts.find_map(|part| part.strip_prefix("q=").or_else(|| part.strip_prefix("Q=")));
        let weight = weight.and_then(|text| text.parse::<f32>().ok()).filter(|weight| (0.0..=1.0).contains(weight));
        Some((essence, weight.unwrap_or(1.0)))
    });
    members.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn headers(name: HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    #[test]
    fn json_unless_bytes_are_liked_better() {
        let media = |value| media(&headers(header::ACCEPT, value)).ok();
        for json in ["", "*/*", "application/json", "application/*", "text/html, */*;q=0.1", "application/json; v=1"] {
            assert_eq!(media(json), Some(Media::Json), "{json}");
        }
        for json in ["application/json, application/octet-stream", "application/octet-stream;q=0.5, */*"] {
            assert_eq!(media(json), Some(Media::Json), "{json}");
        }
        for bytes in [
            "application/octet-stream",
            "Application/Octet-Stream, */*;q=0.8",
            "application/json;q=0.2, application/octet-stream;q=0.9",
            "*/*, application/json;q=0",
        ] {
            assert_eq!(media(bytes), Some(Media::Bytes), "{bytes}");
        }
        for neither in ["text/html", "image/*", "*/*;q=0", "application/json;q=0"] {
            assert_eq!(media(neither), None, "{neither}");
        }
        assert_eq!(super::media(&HeaderMap::new()), Ok(Media::Json));
    }

    #[test]
    fn codings_go_by_weight_and_then_by_what_is_quick() {
        let of = |value| codings(&headers(header::ACCEPT_ENCODING, value));
        let best = |value| of(value).best.map(Coding::as_str);
        assert_eq!(best("gzip, deflate"), Some("gzip"));
        assert_eq!(best("gzip, deflate, br, zstd"), Some("zstd"));
        assert_eq!(best("gzip;q=1.0, zstd;q=0.5, br;q=0.9"), Some("gzip"));
        assert_eq!(best("*"), Some("zstd"));
        assert_eq!(best("*, zstd;q=0"), Some("gzip"));
        assert_eq!(best("GZIP;q=0.1"), Some("gzip"));
        for none in ["", "identity", "compress", "gzip;q=0", "*;q=0", "identity, gzip;q=0.5"] {
            assert_eq!(best(none), None, "{none}");
        }
        assert!(of("gzip, identity;q=0").refuses_identity && of("gzip, *;q=0").refuses_identity);
        assert!(!of("gzip").refuses_identity && !of("*;q=0, identity").refuses_identity);
    }
}
