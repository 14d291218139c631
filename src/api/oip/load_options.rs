//! What a request to load a model may set, in the words of Triton's model configuration.
//!
//! Source: triton-inference-server/server `docs/protocol/extension_model_repository.md`; triton-inference-server/common
//! `protobuf/model_config.proto`.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use crate::api::body;
use crate::serve::control::LoadOptions;
use crate::{Error, Result};

/// The part of a model configuration that can be set. Another key is refused: it would be a setting without effect.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    /// The model's, where it is said.
    name: Option<String>,
    version_policy: Option<VersionPolicy>,
    dynamic_batching: Option<DynamicBatching>,
    parameters: Option<Parameters>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct VersionPolicy {
    specific: Option<Specific>,
    latest: Option<Latest>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Specific {
    versions: Vec<Number>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Latest {
    num_versions: Option<Number>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DynamicBatching {
    preferred_batch_size: Option<Vec<Number>>,
    max_queue_delay_microseconds: Option<Number>,
    default_queue_policy: Option<QueuePolicy>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueuePolicy {
    max_queue_size: Option<Number>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    max_batch_tokens: Option<Parameter>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameter {
    string_value: Number,
}

/// JSON of protobuf writes 64-bit integers as text, and reads both.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "Value")]
struct Number(u64);

impl TryFrom<Value> for Number {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        let number = value.as_u64().or_else(|| value.as_str().and_then(|text| text.parse().ok()));
        number.map(Self).ok_or_else(|| format!("expected a whole number from 0, got {value}"))
    }
}

/// Reads the parameters of a request to load a model.
///
/// Errors: `Malformed` for a configuration that is none; `Invalid` for what cannot be set.
pub fn of(model: &str, parameters: BTreeMap<String, Value>) -> Result<LoadOptions> {
    let mut options = LoadOptions::default();
    for (name, value) in parameters {
        match (name.as_str(), value) {
            ("config", Value::String(config)) => options = of_config(model, &config)?,
            ("config", _) => {
                let reason = "expected a model configuration as JSON in a string".to_string();
                return Err(Error::Malformed { field: "parameters.config".to_string(), reason });
            }
            _ => {
                let reason = "cannot be set: a model's files are those of the repository; `config` can".to_string();
                return Err(Error::Invalid { field: format!("parameters.{name}"), reason });
            }
        }
    }
    Ok(options)
}

fn of_config(model: &str, config: &str) -> Result<LoadOptions> {
    let within = |field: String| match field.as_str() {
        "body" => "parameters.config".to_string(),
        _ => format!("parameters.config.{field}"),
    };
    let config: Config = body::parse(config.as_bytes()).map_err(|error| error.with_field(within))?;
    if config.name.is_some_and(|name| name != model) {
        return Err(invalid("name", "is not that of the model to be loaded"));
    }
    let mut options = LoadOptions::default();
    if let Some(VersionPolicy { specific, latest }) = config.version_policy {
        let num_latest = latest.map(|latest| latest.num_versions.map_or(1, |number| number.0));
        let versions: Option<Vec<u64>> = specific.map(|s| s.versions.iter().map(|number| number.0).collect());
        options.version = match (versions.as_deref(), num_latest) {
            (None, None | Some(1)) => None,
            (Some([version]), None) => Some(*version),
            _ => return Err(invalid("version_policy", "one version of a model is served at a time")),
        };
    }
    if let Some(batching) = config.dynamic_batching {
        let sizes = batching.preferred_batch_size.unwrap_or_default();
        options.batching.max_batch_size = match sizes[..] {
            [] => None,
            [size] => Some(to_usize(size)),
            _ => return Err(invalid("dynamic_batching.preferred_batch_size", "expected one size: the largest batch")),
        };
        let delay = batching.max_queue_delay_microseconds;
        options.batching.max_queue_delay = delay.map(|delay| Duration::from_micros(delay.0));
        options.batching.max_queue_size = batching.default_queue_policy.and_then(|p| p.max_queue_size).map(to_usize);
    }
    let tokens = config.parameters.and_then(|parameters| parameters.max_batch_tokens);
    options.batching.max_batch_tokens = tokens.map(|tokens| to_usize(tokens.string_value));
    Ok(options)
}

/// What is too large for the machine is too large for the limits' own checks, too.
fn to_usize(number: Number) -> usize {
    usize::try_from(number.0).unwrap_or(usize::MAX)
}

fn invalid(field: &str, reason: &str) -> Error {
    Error::Invalid { field: format!("parameters.config.{field}"), reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(config: Value) -> Result<LoadOptions> {
        of("m", BTreeMap::from([("config".to_string(), Value::String(config.to_string()))]))
    }

    #[test]
    fn a_configuration_sets_version_and_limits() {
        let all = read(json!({
            "version_policy": {"specific": {"versions": ["3"]}},
            "dynamic_batching": {
                "preferred_batch_size": [8],
                "max_queue_delay_microseconds": "250",
                "default_queue_policy": {"max_queue_size": 9},
            },
            "parameters": {"max_batch_tokens": {"string_value": "4096"}},
        }));
        let LoadOptions { version, batching } = all.unwrap();
        assert_eq!(version, Some(3));
        assert_eq!((batching.max_batch_size, batching.max_batch_tokens), (Some(8), Some(4096)));
        assert_eq!((batching.max_queue_delay, batching.max_queue_size), (Some(Duration::from_micros(250)), Some(9)));
        for nothing in [json!({}), json!({"name": "m"}), json!({"version_policy": {"latest": {"num_versions": 1}}})] {
            assert_eq!(read(nothing).unwrap(), LoadOptions::default());
        }
    }

    #[test]
    fn what_cannot_be_set_is_named() {
        let field = |error| match error {
            Error::Malformed { field, .. } | Error::Invalid { field, .. } => field,
            other => panic!("{other}"),
        };
        for (config, expected) in [
            (json!({"version_policy": {"latest": {"num_versions": 2}}}), "parameters.config.version_policy"),
            (json!({"version_policy": {"specific": {"versions": [1, 2]}}}), "parameters.config.version_policy"),
            (json!({"version_policy": {"all": {}}}), "parameters.config.version_policy.all"),
            (json!({"name": "n"}), "parameters.config.name"),
            (json!({"backend": "onnxruntime"}), "parameters.config.backend"),
            (
                json!({"dynamic_batching": {"preferred_batch_size": [4, 8]}}),
                "parameters.config.dynamic_batching.preferred_batch_size",
            ),
            (
                json!({"dynamic_batching": {"max_queue_delay_microseconds": -1}}),
                "parameters.config.dynamic_batching.max_queue_delay_microseconds",
            ),
        ] {
            assert_eq!(field(read(config).unwrap_err()), expected);
        }
        let of = |name: &str, value| field(of("m", BTreeMap::from([(name.to_string(), value)])).unwrap_err());
        assert_eq!(of("config", json!("{")), "parameters.config");
        assert_eq!(of("config", json!(1)), "parameters.config");
        assert_eq!(of("file:1/model.onnx", json!("AA==")), "parameters.file:1/model.onnx");
    }
}
