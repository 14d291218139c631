//! The signatures of a model: the tensors of its tasks by the names that TensorFlow's clients call them.
//!
//! | name | takes | gives |
//! |---|---|---|
//! | `serving_default` | the usual tensors of what the model was made for | its outputs |
//! | `input_ids`, `image` | another form of the same | the same |
//! | a task's name, or with `_input_ids` | those of another task that the model does | its outputs |
//! | `embedding_bytes` | a text | the embedding as bytes |

use super::path::Subject;
use crate::api::tensors::Datatype;
use crate::api::tensors::signature::{self as tensors, Form, TensorSpec};
use crate::model::ModelInfo;
use crate::request::Task;
use crate::{Error, Result};

/// The signature of requests that name none.
pub const DEFAULT: &str = "serving_default";
/// The embedding as the bytes of its values instead of their digits.
const EMBEDDING_BYTES: &str = "embedding_bytes";

/// A way to ask a model for predictions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    pub name: String,
    pub task: Task,
    /// What a request writes: all that is not optional.
    pub form: Form,
    /// Not empty.
    pub outputs: Vec<TensorSpec>,
    /// Whether values go as the bytes of their f32, little-endian, in base64.
    pub as_bytes: bool,
}

impl Signature {
    /// The same as the tensors of a task, with the one form that it has.
    pub fn tensors(&self) -> tensors::Signature {
        let (task, forms, outputs) = (self.task.clone(), vec![self.form.clone()], self.outputs.clone());
        tensors::Signature { task, forms, outputs }
    }
}

/// The signatures that `:predict` takes of a model, the default one first.
pub fn of(info: &ModelInfo) -> Vec<Signature> {
    let main = info.main_task();
    let mut signatures = Vec::new();
    for task in tensors::tasks(info) {
        let tensors::Signature { task, forms, outputs } = tensors::Signature::of(info, task);
        let word = tensors::word(info, &task);
        for (i, form) in forms.into_iter().enumerate() {
            let name = match (task == main, i) {
                (true, 0) => DEFAULT.to_string(),
                (true, _) => form.name().to_string(),
                (false, 0) => word.to_string(),
                (false, _) => format!("{word}_{}", form.name()),
            };
            signatures.push(Signature { name, task: task.clone(), form, outputs: outputs.clone(), as_bytes: false });
        }
    }
    if let (Task::Embed, Some(usual)) = (&main, signatures.first().cloned()) {
        let bytes = TensorSpec {
            name: EMBEDDING_BYTES.into(),
            datatype: Datatype::Bytes,
            shape: vec![None],
            is_optional: false,
        };
        let name = EMBEDDING_BYTES.to_string();
        signatures.push(Signature { name, outputs: vec![bytes], as_bytes: true, ..usual });
    }
    signatures
}

/// The signature of this name, or the default one for none and for an empty name.
///
/// Errors: `Invalid` naming those there are.
pub fn find(info: &ModelInfo, name: Option<&str>) -> Result<Signature> {
    let signatures = of(info);
    let wanted = name.filter(|name| !name.is_empty()).unwrap_or(DEFAULT);
    let names: Vec<&str> = signatures.iter().map(|s| s.name.as_str()).collect();
    let reason = format!("model `{}` has no signature `{wanted}`; it has {}", info.name, names.join(", "));
    let missing = Error::Invalid { field: "signature_name".to_string(), reason };
    signatures.into_iter().find(|signature| signature.name == wanted).ok_or(missing)
}

/// Why a model is not asked this.
pub fn does_not(info: &ModelInfo, subject: Subject) -> Error {
    let names: Vec<String> = of(info).into_iter().map(|s| s.name).collect();
    let names = names.join(", ");
    let reason =
        format!("the task of model `{}` is `{}`: `:predict` takes its signatures {names}", info.name, info.task);
    Error::Invalid { field: format!(":{}", subject.as_str()), reason }
}
