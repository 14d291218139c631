//! The field `input`: texts, token ids and images, or the tensors of a tensor model. Which of them it is to be, the model
//! says: a list of lists of numbers can be either.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::value::RawValue;
use utoipa::openapi::schema::{AnyOfBuilder, ArrayBuilder, Type};
use utoipa::openapi::{Object, ObjectBuilder, RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::super::body;
use super::super::inputs::Inputs;
use super::super::tensors::inputs::Inputs as Rows;
use super::super::tensors::nested::{self, Given};
use super::super::tensors::signature::{Form, Signature};
use crate::model::ModelInfo;
use crate::model::signature::Modality;
use crate::request::Input;
use crate::{Error, Result};

/// The field's name in errors.
const FIELD: &str = "input";

/// Tensors with more bytes of JSON than this are read off the async threads: at about 100 ns a value and five bytes a value
/// or more, below it a handler stays under the 500 microseconds an async thread may be held.
const MAX_INLINE_TENSOR_BYTES: usize = 24 << 10;

/// The field as it came: JSON, and not looked at yet.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub struct RawInput(Box<RawValue>);

/// What the engine is asked, and how the client wrote it.
#[derive(Debug)]
pub struct Asked {
    pub inputs: Vec<Input>,
    /// Of a tensor model.
    written: Option<Written>,
}

/// Where rows of tensors stood in the request.
#[derive(Debug)]
struct Written {
    given: Given,
    form: Form,
    /// Without its inputs, which are the request's.
    rows: Rows,
    num_inputs: usize,
}

impl Asked {
    /// The engine names inputs as lists have them; rows of tensors are told by their tensor.
    pub fn rename(&self, error: Error) -> Error {
        match &self.written {
            None => error,
            Some(Written { given, form, rows, num_inputs }) => given.rename(rows.rename(error), form, *num_inputs),
        }
    }
}

impl RawInput {
    /// What a model is asked with it: at most `limit` inputs.
    ///
    /// Errors: `Malformed` naming the value at fault, such as `input[2]` or `input.x[0][1]`; `Empty` and `TooLarge` for the
    /// number of inputs; `Invalid` for a shape the model does not take.
    pub async fn read(self, info: Arc<ModelInfo>, limit: usize) -> Result<Asked> {
        let num_bytes = self.0.get().len();
        match info.signature.takes(Modality::Tensors) {
            true => body::within(num_bytes, MAX_INLINE_TENSOR_BYTES, move || self.tensors(&info, limit)).await,
            false => body::within(num_bytes, body::MAX_INLINE_BYTES, move || self.inputs(limit)).await,
        }
    }

    fn inputs(self, limit: usize) -> Result<Asked> {
        let inputs: Inputs = body::parse(self.0.get().as_bytes()).map_err(within_field)?;
        Ok(Asked { inputs: inputs.with_pairs(FIELD, limit)?, written: None })
    }

    fn tensors(self, info: &ModelInfo, limit: usize) -> Result<Asked> {
        let signature = Signature::main(info);
        let Some(form) = signature.forms.first().cloned() else {
            return Err(Error::Internal { cause: format!("model `{}` takes no tensors", info.name) });
        };
        let value = body::parse(self.0.get().as_bytes()).map_err(within_field)?;
        let mut given = nested::read_columns(FIELD, value, &form)?;
        let tensors = std::mem::take(&mut given.tensors);
        // Whether there is one input or more is not known yet.
        let rows = Rows::of(tensors, &signature, limit).map_err(|error| given.rename(error, &form, 0));
        let mut rows = rows?;
        let inputs = std::mem::take(&mut rows.inputs);
        let num_inputs = inputs.len();
        Ok(Asked { inputs, written: Some(Written { given, form, rows, num_inputs }) })
    }
}

/// A fault's place in the field is one in the body.
fn within_field(error: Error) -> Error {
    error.with_field(|place| if place == "body" { FIELD.to_string() } else { format!("{FIELD}{place}") })
}

impl PartialSchema for RawInput {
    fn schema() -> RefOr<Schema> {
        let tensor = ArrayBuilder::new().items(RefOr::T(Schema::from(Object::default())));
        let tensors = ObjectBuilder::new()
            .schema_type(Type::Object)
            .description(Some(
                "Of a tensor model: each of its inputs by name, a list with one tensor an input of the request, as lists in \
                 lists of numbers. A model with a single one also takes that list alone.",
            ))
            .additional_properties(Some(tensor));
        AnyOfBuilder::new().item(Inputs::schema()).item(tensors).into()
    }
}

impl ToSchema for RawInput {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_in_the_field_are_places_in_the_body() {
        let refused = |json: &str| {
            let raw: RawInput = serde_json::from_str(json).unwrap();
            match raw.inputs(2) {
                Err(error) => error.to_string(),
                Ok(asked) => panic!("{asked:?}"),
            }
        };
        for (json, says) in [
            (r#"["a", 1.5]"#, "input[1]: "),
            (r#"["a", {"image": "no base64!"}]"#, "input[1]: `image`: expected base64"),
            ("7", "input: invalid type"),
            (r#"{"x": [1]}"#, "input: invalid type: map"),
            ("[]", "input must not be empty"),
            (r#"["a", "b", "c"]"#, "input has 3 inputs"),
        ] {
            let got = refused(json);
            assert!(got.contains(says), "`{got}` does not say `{says}`");
        }
    }
}
