//! Which named tensors each model takes and gives: the one place where a model's task becomes a signature.

use std::fmt;

use super::path::Subject;
use crate::Error;
use crate::Result;
use crate::model::ModelInfo;

/// The signature of requests that name none.
pub const DEFAULT: &str = "serving_default";
/// Token ids instead of a text.
const TOKEN_IDS: &str = "input_ids";
/// The embedding as the bytes of its values instead of their digits.
const EMBEDDING_BYTES: &str = "embedding_bytes";
/// Tensors of strings whose names end so hold bytes, which JSON carries in base64.
pub const BYTES_SUFFIX: &str = "_bytes";

/// The type of a tensor's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// Bytes; text is those of its UTF-8.
    String,
    Int64,
    Float,
}

impl Dtype {
    /// TensorFlow's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::String => "DT_STRING",
            Self::Int64 => "DT_INT64",
            Self::Float => "DT_FLOAT",
        }
    }
}

/// What a value is called in refusals.
impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::String => "a text, or bytes as {\"b64\": \"…\"}",
            Self::Int64 => "a whole number",
            Self::Float => "a number",
        })
    }
}

/// A tensor of a signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub dtype: Dtype,
    /// Slowest dimension first, which is that of the rows; `None` for one that each request chooses.
    pub shape: Vec<Option<usize>>,
}

impl TensorSpec {
    fn new(name: &str, dtype: Dtype, shape: &[Option<usize>]) -> Self {
        Self { name: name.to_string(), dtype, shape: shape.to_vec() }
    }
}

/// A way to ask a model for predictions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    pub name: &'static str,
    /// Not empty; a request gives each of them.
    pub inputs: Vec<TensorSpec>,
    /// Not empty.
    pub outputs: Vec<TensorSpec>,
}

/// The signatures that `:predict` takes of a model, the default one first; none for a task that has none.
pub fn of(info: &ModelInfo) -> Vec<Signature> {
    match info.task.as_str() {
        "embed" => {
            let text = || vec![TensorSpec::new("text", Dtype::String, &[None])];
            let embedding = || vec![TensorSpec::new("embedding", Dtype::Float, &[None, Some(info.dimensions)])];
            let bytes = vec![TensorSpec::new(EMBEDDING_BYTES, Dtype::String, &[None])];
            let ids = vec![TensorSpec::new(TOKEN_IDS, Dtype::Int64, &[None, None])];
            vec![
                Signature { name: DEFAULT, inputs: text(), outputs: embedding() },
                Signature { name: TOKEN_IDS, inputs: ids, outputs: embedding() },
                Signature { name: EMBEDDING_BYTES, inputs: text(), outputs: bytes },
            ]
        }
        _ => Vec::new(),
    }
}

/// The signature of this name, or the default one for none and for an empty name.
///
/// Errors: `Invalid` naming those there are.
pub fn find(info: &ModelInfo, name: Option<&str>) -> Result<Signature> {
    let signatures = of(info);
    let wanted = name.filter(|name| !name.is_empty()).unwrap_or(DEFAULT);
    if signatures.is_empty() {
        return Err(does_not(info, Subject::Predict));
    }
    let names: Vec<&str> = signatures.iter().map(|s| s.name).collect();
    let reason = format!("model `{}` has no signature `{wanted}`; it has {}", info.name, names.join(", "));
    let missing = Error::Invalid { field: "signature_name".to_string(), reason };
    signatures.into_iter().find(|signature| signature.name == wanted).ok_or(missing)
}

/// Why a model is not asked this.
pub fn does_not(info: &ModelInfo, subject: Subject) -> Error {
    let names: Vec<&str> = of(info).iter().map(|s| s.name).collect();
    let instead = match names.is_empty() {
        true => "it has no signatures".to_string(),
        false => format!("`:predict` takes its signatures {}", names.join(", ")),
    };
    let reason = format!("the task of model `{}` is `{}`: {instead}", info.name, info.task);
    Error::Invalid { field: format!(":{}", subject.as_str()), reason }
}
