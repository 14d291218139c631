//! Whom to ask and in which words: URL, protocol, the bodies made before the clock starts.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use hyper::Uri;
use hyper::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use serde_json::json;

/// The wire format of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Api {
    /// `POST /v1/embeddings`, vectors as decimal numbers.
    Openai,
    /// `POST /v1/embeddings`, vectors as base64 of little-endian f32.
    OpenaiBase64,
    /// text-embeddings-inference's `POST /embed`.
    Tei,
}

impl Api {
    fn default_path(self) -> &'static str {
        match self {
            Self::Openai | Self::OpenaiBase64 => "/v1/embeddings",
            Self::Tei => "/embed",
        }
    }
}

impl FromStr for Api {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "openai" => Ok(Self::Openai),
            "openai-base64" => Ok(Self::OpenaiBase64),
            "tei" => Ok(Self::Tei),
            _ => Err(format!("`{s}` is not one of openai, openai-base64, tei")),
        }
    }
}

impl fmt::Display for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Openai => "openai",
            Self::OpenaiBase64 => "openai-base64",
            Self::Tei => "tei",
        })
    }
}

/// One server under load.
#[derive(Debug, Clone)]
pub struct Target {
    /// As the tables write it.
    pub name: String,
    /// Whole, with the path that is posted to.
    pub uri: Uri,
    pub api: Api,
    /// The `model` field; servers of one model take any.
    pub model: Option<String>,
    /// What every request carries, `host` included.
    pub headers: HeaderMap,
}

impl Target {
    /// Checks the address and fills in the protocol's path where `url` names none.
    ///
    /// `http://host:port` and `…/v1` get the protocol's path; any other path is taken as it is (infinity without
    /// a prefix serves `/embeddings`).
    ///
    /// Errors: a sentence naming what is wrong with the address.
    pub fn new(name: &str, url: &str, api: Api, model: Option<String>) -> Result<Self, String> {
        let url = if url.contains("://") { url.to_string() } else { format!("http://{url}") };
        let parsed = url::Url::parse(&url).map_err(|e| format!("`{url}` is not a URL: {e}"))?;
        if !matches!(parsed.scheme(), "http" | "https") {
            return Err(format!("`{url}` is neither http nor https"));
        }
        let path = match parsed.path().trim_end_matches('/') {
            "" => api.default_path().to_string(),
            "/v1" if api != Api::Tei => "/v1/embeddings".to_string(),
            path => path.to_string(),
        };
        let query = parsed.query().map(|q| format!("?{q}")).unwrap_or_default();
        let host = parsed.host_str().unwrap_or_default();
        let authority = parsed.port().map_or(host.to_string(), |port| format!("{host}:{port}"));
        let uri = format!("{}://{authority}{path}{query}", parsed.scheme());
        let uri: Uri = uri.parse().map_err(|e| format!("`{uri}` is not a URL: {e}"))?;
        let mut headers = HeaderMap::new();
        headers.insert(HOST, HeaderValue::from_str(&authority).map_err(|e| format!("host `{authority}`: {e}"))?);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(USER_AGENT, HeaderValue::from_static("eremois-bench"));
        Ok(Self { name: name.to_string(), uri, api, model, headers })
    }

    /// Adds a header, written `name: value`; one of the same name is replaced.
    pub fn add_header(&mut self, line: &str) -> Result<(), String> {
        let (name, value) = line.split_once(':').ok_or_else(|| format!("header `{line}` has no colon"))?;
        let name: HeaderName = name.trim().parse().map_err(|e| format!("header `{line}`: {e}"))?;
        let value: HeaderValue = value.trim().parse().map_err(|e| format!("header `{line}`: {e}"))?;
        self.headers.insert(name, value);
        Ok(())
    }

    /// The body that asks for these texts; a single text goes as a plain string, as clients write it.
    pub fn body(&self, texts: &[&str], truncate: bool) -> Bytes {
        let input = if let [text] = texts { json!(text) } else { json!(texts) };
        let mut body = match self.api {
            Api::Openai => json!({"input": input, "encoding_format": "float"}),
            Api::OpenaiBase64 => json!({"input": input, "encoding_format": "base64"}),
            Api::Tei => json!({"inputs": input}),
        };
        match &self.model {
            Some(model) if self.api != Api::Tei => body["model"] = json!(model),
            _ => {}
        }
        if truncate && self.api == Api::Tei {
            body["truncate"] = json!(true);
        }
        Bytes::from(body.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(url: &str, api: Api) -> String {
        Target::new("t", url, api, None).unwrap().uri.to_string()
    }

    #[test]
    fn paths_are_filled_in_where_there_is_none() {
        assert_eq!(uri("127.0.0.1:8080", Api::Openai), "http://127.0.0.1:8080/v1/embeddings");
        assert_eq!(uri("http://h:1/", Api::Tei), "http://h:1/embed");
        assert_eq!(uri("https://h/v1/", Api::OpenaiBase64), "https://h/v1/embeddings");
        assert_eq!(uri("http://h/embeddings", Api::Openai), "http://h/embeddings");
        assert_eq!(uri("http://[::1]:80/x?y=1", Api::Tei), "http://[::1]/x?y=1");
        assert!(Target::new("t", "ftp://h", Api::Tei, None).is_err());
    }

    #[test]
    fn bodies_are_what_the_protocol_asks_for() {
        let openai = Target::new("t", "h", Api::OpenaiBase64, Some("m".into())).unwrap();
        let body: serde_json::Value = serde_json::from_slice(&openai.body(&["a \"b\""], true)).unwrap();
        assert_eq!(body, json!({"input": "a \"b\"", "encoding_format": "base64", "model": "m"}));
        let tei = Target::new("t", "h", Api::Tei, Some("m".into())).unwrap();
        let body: serde_json::Value = serde_json::from_slice(&tei.body(&["a", "b"], true)).unwrap();
        assert_eq!(body, json!({"inputs": ["a", "b"], "truncate": true}));
    }

    #[test]
    fn headers_are_checked() {
        let mut target = Target::new("t", "h", Api::Tei, None).unwrap();
        target.add_header("Authorization: Bearer a:b").unwrap();
        assert_eq!(target.headers["authorization"], "Bearer a:b");
        assert!(target.add_header("no colon").is_err());
        assert!(target.add_header("bad name: x").is_err());
    }
}
