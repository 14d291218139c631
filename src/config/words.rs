//! The kinds of values only this server knows: addresses of services, devices, log filters.

use super::values::{Field, Raw, TextValue, quote, set_text, text_field};
use crate::Error;
use crate::jobs::callback::sign::Secret;
use crate::ops::device::DeviceSpec;
use crate::store::redis::address::Address;

text_field!(
    Networks,
    ApiVersion,
    DatabaseUrl,
    CacheUrl,
    RecordScope,
    StoreInput,
    DeviceSpec,
    LogFormat,
    LogFilter,
    ControlMode
);

/// The version of the application API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ApiVersion {
    V1,
}

impl std::fmt::Display for ApiVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&TextValue::text(self))
    }
}

impl TextValue for ApiVersion {
    const FORM: &'static str = "v1";
    fn parse(text: &str) -> Result<Self, String> {
        if text == "v1" { Ok(Self::V1) } else { Err(format!("this server speaks v1, got {text:?}")) }
    }
    fn text(&self) -> String {
        "v1".to_string()
    }
}

/// An http or https address without a trailing slash.
#[derive(Clone, PartialEq, Eq)]
pub struct HttpUrl(pub String);

impl TextValue for HttpUrl {
    const FORM: &'static str = "an http:// or https:// address";
    fn parse(text: &str) -> Result<Self, String> {
        let fault = |why: &str| format!("expected {}, got {text:?}{why}", Self::FORM);
        let url = url::Url::parse(text).map_err(|e| fault(&format!(": {e}")))?;
        match url.scheme() {
            "http" | "https" => Ok(Self(text.trim_end_matches('/').to_string())),
            _ => Err(fault("")),
        }
    }
    fn text(&self) -> String {
        mask(&self.0)
    }
}

/// The address with its password replaced by `***`.
fn mask(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_string() };
    let authority_end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    // The last @ ends the user part: passwords may hold one.
    let Some(at) = rest[..authority_end].rfind('@') else { return url.to_string() };
    match rest[..at].split_once(':') {
        Some((user, _)) => format!("{scheme}://{user}:***{}", &rest[at..]),
        None => url.to_string(),
    }
}

/// Where results are kept.
#[derive(Clone, PartialEq, Eq)]
pub enum DatabaseUrl {
    Embedded,
    /// A connection string, which may carry a password.
    Mongo(String),
}

impl TextValue for DatabaseUrl {
    const FORM: &'static str = "`embedded`, or mongodb:// or mongodb+srv:// and a host";
    fn parse(text: &str) -> Result<Self, String> {
        if text == "embedded" {
            return Ok(Self::Embedded);
        }
        // Several hosts with ports make a valid connection string and no valid URL: the driver reads the rest.
        let rest = text.strip_prefix("mongodb://").or_else(|| text.strip_prefix("mongodb+srv://"));
        match rest {
            Some(rest) if !rest.is_empty() && !rest.starts_with(['/', '?']) => Ok(Self::Mongo(text.to_string())),
            _ => Err(format!("expected {}, got {:?}", Self::FORM, mask(text))),
        }
    }
    fn text(&self) -> String {
        match self {
            Self::Embedded => "embedded".to_string(),
            Self::Mongo(url) => mask(url),
        }
    }
}

/// Where results already computed are kept.
#[derive(Clone, PartialEq, Eq)]
pub enum CacheUrl {
    Memory,
    /// Where Redis is, which may carry passwords.
    Redis(Address),
}

impl TextValue for CacheUrl {
    const FORM: &'static str =
        "`memory`, or redis://, redis+sentinel:// or redis+cluster:// (rediss… with TLS) and a host or several";
    fn parse(text: &str) -> Result<Self, String> {
        if text == "memory" {
            return Ok(Self::Memory);
        }
        // A text of no known scheme may as well be a misspelt `memory`.
        text.parse().map(Self::Redis).map_err(|why: String| why.replace(Address::FORM, Self::FORM))
    }
    fn text(&self) -> String {
        match self {
            Self::Memory => "memory".to_string(),
            Self::Redis(address) => address.to_string(),
        }
    }
}

/// Whose requests are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordScope {
    /// Those of the application API that do not say `store: false`.
    Application,
    /// Those, and all of the compatible protocols.
    All,
    None,
}

impl TextValue for RecordScope {
    const FORM: &'static str = "application, all or none";
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "application" => Ok(Self::Application),
            "all" => Ok(Self::All),
            "none" => Ok(Self::None),
            _ => Err(format!("expected {}, got {text:?}", Self::FORM)),
        }
    }
    fn text(&self) -> String {
        match self {
            Self::Application => "application".to_string(),
            Self::All => "all".to_string(),
            Self::None => "none".to_string(),
        }
    }
}

/// What is kept of an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreInput {
    Full,
    Hash,
    None,
}

impl TextValue for StoreInput {
    const FORM: &'static str = "full, hash or none";
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "full" => Ok(Self::Full),
            "hash" => Ok(Self::Hash),
            "none" => Ok(Self::None),
            _ => Err(format!("expected {}, got {text:?}", Self::FORM)),
        }
    }
    fn text(&self) -> String {
        match self {
            Self::Full => "full".to_string(),
            Self::Hash => "hash".to_string(),
            Self::None => "none".to_string(),
        }
    }
}

impl TextValue for DeviceSpec {
    const FORM: &'static str = "auto, cpu, cuda or cuda:N,N";
    fn parse(text: &str) -> Result<Self, String> {
        text.parse().map_err(|e| match e {
            Error::Invalid { reason, .. } => format!("expected {}: {reason}", Self::FORM),
            other => other.to_string(),
        })
    }
    fn text(&self) -> String {
        self.to_string()
    }
}

/// Who says which models are served while the server runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControlMode {
    /// `ai.models`, whenever the settings are read.
    Settings,
    /// Requests of clients; the settings only at the start.
    Explicit,
}

impl TextValue for ControlMode {
    const FORM: &'static str = "settings or explicit";
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "settings" => Ok(Self::Settings),
            "explicit" => Ok(Self::Explicit),
            _ => Err(format!("expected {}, got {text:?}", Self::FORM)),
        }
    }
    fn text(&self) -> String {
        match self {
            Self::Settings => "settings".to_string(),
            Self::Explicit => "explicit".to_string(),
        }
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Human,
    Json,
}

impl TextValue for LogFormat {
    const FORM: &'static str = "human or json";
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            _ => Err(format!("expected {}, got {text:?}", Self::FORM)),
        }
    }
    fn text(&self) -> String {
        match self {
            Self::Human => "human".to_string(),
            Self::Json => "json".to_string(),
        }
    }
}

/// Directives of a log filter, known to parse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogFilter(pub String);

impl TextValue for LogFilter {
    const FORM: &'static str = "a level, or levels by module such as info,eremois::serve=debug";
    fn parse(text: &str) -> Result<Self, String> {
        let fault = |why: String| format!("expected {}, got {text:?}{why}", Self::FORM);
        // A bare word that is no level would be taken for a module's name and silence everything else.
        let levels = ["off", "error", "warn", "info", "debug", "trace"];
        for part in text.split(',').map(str::trim) {
            if !part.contains(['=', ':', '[']) && !levels.contains(&part.to_ascii_lowercase().as_str()) {
                return Err(fault(format!(": {part:?} is no level")));
            }
        }
        match tracing_subscriber::EnvFilter::try_new(text) {
            Ok(_) => Ok(Self(text.to_string())),
            Err(e) => Err(fault(format!(": {e}"))),
        }
    }
    fn text(&self) -> String {
        self.0.clone()
    }
}

/// The key of callbacks. It is shown nowhere.
impl TextValue for Secret {
    const FORM: &'static str = "`whsec_` and base64 of 24 to 64 random bytes";
    fn parse(text: &str) -> Result<Self, String> {
        // What was written is not repeated: it may be nearly right.
        Secret::parse(text)
    }
    fn text(&self) -> String {
        "***".to_string()
    }
}

/// Networks by address and length of their prefix.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Networks(pub Vec<ipnet::IpNet>);

impl TextValue for Networks {
    const FORM: &'static str = "networks such as \"10.0.0.0/8, fd00::/8\", separated by commas";
    fn parse(text: &str) -> Result<Self, String> {
        let words = text.split(',').map(str::trim).filter(|word| !word.is_empty());
        let network = |word: &str| {
            let one = word.parse::<std::net::IpAddr>().map(ipnet::IpNet::from);
            word.parse().or(one).map_err(|_| format!("expected {}, got {word:?}", Self::FORM))
        };
        words.map(network).collect::<Result<_, _>>().map(Self)
    }
    fn text(&self) -> String {
        self.0.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    }
}

/// Passwords stay out of logs, so the derived form is not good enough.
macro_rules! masked_debug {
    ($($t:ty),*) => {$(
        impl std::fmt::Debug for $t {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&TextValue::text(self))
            }
        }
    )*};
}

masked_debug!(HttpUrl, DatabaseUrl, CacheUrl);
