//! From a model to its tensors and back: the one place that knows what its inputs and outputs are called and shaped.
//!
//! A text model takes `text`, or `input_ids` with what a tokeniser puts beside them. What it answers depends on its task.

use super::tensor::{Datatype, Tensor};
use crate::api::inputs::check_count;
use crate::inference::Computed;
use crate::model::ModelInfo;
use crate::output::Row;
use crate::request::Input;
use crate::{Error, Result};

const TEXT: &str = "text";
const INPUT_IDS: &str = "input_ids";
const ATTENTION_MASK: &str = "attention_mask";
const TOKEN_TYPE_IDS: &str = "token_type_ids";

/// A tensor as metadata describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: &'static str,
    pub datatype: Datatype,
    /// The inputs of a request first; `None` where the length is the request's.
    pub shape: Vec<Option<usize>>,
    /// Whether a request may be without it.
    pub is_optional: bool,
}

impl TensorSpec {
    /// The dimensions without the batch's, as a configuration has them, and whether they stand for none at all: the
    /// configuration knows no tensor without a dimension beside the batch's.
    pub fn config_dims(&self) -> (Vec<i64>, bool) {
        let dims: Vec<i64> = self.shape.iter().skip(1).map(|dim| dim.map_or(-1, |dim| dim as i64)).collect();
        if dims.is_empty() { (vec![1], true) } else { (dims, false) }
    }
}

/// The tensors of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    pub inputs: Vec<TensorSpec>,
    pub outputs: Vec<TensorSpec>,
}

/// The values of an output.
#[derive(Debug, Clone)]
pub enum OutputValues {
    /// FP32, one row an input.
    Rows(Vec<Row>),
}

/// An output with its values.
#[derive(Debug, Clone)]
pub struct OutputTensor {
    pub name: &'static str,
    pub datatype: Datatype,
    pub shape: Vec<usize>,
    pub values: OutputValues,
}

impl Signature {
    /// The tensors of a model by its task.
    pub fn of(info: &ModelInfo) -> Self {
        let spec = |name, datatype, shape: &[Option<usize>], is_optional| TensorSpec {
            name,
            datatype,
            shape: shape.to_vec(),
            is_optional,
        };
        let ids = |name| spec(name, Datatype::Int64, &[None, None], true);
        Self {
            // `text` is optional too where there are `input_ids`; a client that fills in all that is not optional
            // sends one of the two.
            inputs: vec![
                spec(TEXT, Datatype::Bytes, &[None], false),
                ids(INPUT_IDS),
                ids(ATTENTION_MASK),
                ids(TOKEN_TYPE_IDS),
            ],
            outputs: vec![spec("embedding", Datatype::Fp32, &[None, Some(info.hidden_size)], false)],
        }
    }

    /// Errors: `Invalid` for a name that is no output's.
    pub fn check_output(&self, name: &str) -> Result<()> {
        if self.outputs.iter().any(|output| output.name == name) {
            return Ok(());
        }
        let known = self.outputs.iter().map(|output| output.name).collect::<Vec<_>>().join(", ");
        Err(Error::Invalid {
            field: "outputs".to_string(),
            reason: format!("no output is named `{name}`; known: {known}"),
        })
    }
}

/// The inputs of a request, and which tensor they came in.
#[derive(Debug, Clone, PartialEq)]
pub struct Inputs {
    pub inputs: Vec<Input>,
    name: &'static str,
}

impl Inputs {
    /// From the tensors of a request, of at most `limit` inputs.
    ///
    /// Shapes: `text` [n] or [n, 1]; `input_ids`, `attention_mask`, `token_type_ids` [n, longest].
    /// Errors: `Malformed` for tensors that are missing, that come twice or disagree; `Invalid` for names, types, shapes
    /// and values the model does not take; `Empty` and `TooLarge` for the number of inputs.
    pub fn of(mut tensors: Vec<Tensor>, limit: usize) -> Result<Self> {
        let known = [TEXT, INPUT_IDS, ATTENTION_MASK, TOKEN_TYPE_IDS];
        for (i, tensor) in tensors.iter().enumerate() {
            if !known.contains(&tensor.name.as_str()) {
                let reason = format!("no input is named `{}`; known: {}", tensor.name, known.join(", "));
                return Err(Error::Invalid { field: format!("inputs[{i}].name"), reason });
            }
            if tensors[..i].iter().any(|other| other.name == tensor.name) {
                return Err(malformed(&tensor.name, "comes twice"));
            }
        }
        let mut take = |name| Some(tensors.swap_remove(tensors.iter().position(|tensor| tensor.name == name)?));
        let (text, ids, mask, types) = (take(TEXT), take(INPUT_IDS), take(ATTENTION_MASK), take(TOKEN_TYPE_IDS));
        match (text, ids) {
            (Some(text), None) if mask.is_none() && types.is_none() => {
                Ok(Self { inputs: texts_of(text, limit)?.into_iter().map(Input::Text).collect(), name: TEXT })
            }
            (None, Some(ids)) => {
                let inputs = rows_of(ids, mask, types, limit)?;
                Ok(Self { inputs, name: INPUT_IDS })
            }
            (Some(_), _) => Err(malformed(TEXT, "a text comes alone, without token ids or what belongs to them")),
            (None, None) => Err(malformed("inputs", "expected the tensor `text` or `input_ids`")),
        }
    }

    /// The engine names inputs as OpenAI does, and parameters without where they stand.
    pub fn rename(&self, error: Error) -> Error {
        let ours = |field: String| match field.strip_prefix("input") {
            Some(rest) if rest.is_empty() || rest.starts_with('[') => format!("{}{rest}", self.name),
            _ if ["dimensions", "prompt_name"].contains(&field.as_str()) => format!("parameters.{field}"),
            _ => field,
        };
        error.with_field(ours)
    }
}

fn malformed(field: &str, reason: &str) -> Error {
    Error::Malformed { field: field.to_string(), reason: reason.to_string() }
}

fn wrong_shape(tensor: &Tensor, expected: &str) -> Error {
    let reason = format!("expected the shape {expected}, got {:?}", tensor.shape);
    Error::Invalid { field: tensor.name.clone(), reason }
}

fn texts_of(tensor: Tensor, limit: usize) -> Result<Vec<String>> {
    if tensor.datatype != Datatype::Bytes {
        let reason = format!("expected BYTES, got {}", tensor.datatype.as_str());
        return Err(Error::Invalid { field: tensor.name.clone(), reason });
    }
    match tensor.shape[..] {
        [n] | [n, 1] => check_count(&tensor.name, n, limit)?,
        _ => return Err(wrong_shape(&tensor, "[n] or [n, 1]")),
    }
    tensor.texts()
}

/// The token ids of each row, without its padding.
fn rows_of(ids: Tensor, mask: Option<Tensor>, types: Option<Tensor>, limit: usize) -> Result<Vec<Input>> {
    let [n, longest] = ids.shape[..] else { return Err(wrong_shape(&ids, "[n, longest]")) };
    check_count(&ids.name, n, limit)?;
    if longest == 0 {
        return Err(Error::Empty { field: ids.name.clone() });
    }
    let beside = |tensor: Option<Tensor>| match tensor {
        Some(tensor) if tensor.shape != ids.shape => {
            Err(wrong_shape(&tensor, &format!("of input_ids, {:?}", ids.shape)))
        }
        Some(tensor) => tensor.ints().map(Some),
        None => Ok(None),
    };
    let (mask, types) = (beside(mask)?, beside(types)?);
    let values = ids.ints()?;
    if types.is_some_and(|types| types.iter().any(|&t| t != 0)) {
        let reason = "token ids are taken as one segment: all must be 0".to_string();
        return Err(Error::Invalid { field: TOKEN_TYPE_IDS.to_string(), reason });
    }
    let mut masks = mask.as_ref().map(|mask| mask.chunks_exact(longest));
    let mut inputs = Vec::with_capacity(n);
    for (i, row) in values.chunks_exact(longest).enumerate() {
        let row = match masks.as_mut().and_then(Iterator::next) {
            Some(mask) => unpadded(row, mask, i)?,
            None => row,
        };
        let id_of = |&id: &i64| {
            let wrong =
                |_| Error::Invalid { field: format!("{INPUT_IDS}[{i}]"), reason: format!("{id} is no token id") };
            u32::try_from(id).map_err(wrong)
        };
        inputs.push(Input::TokenIds(row.iter().map(id_of).collect::<Result<_>>()?));
    }
    Ok(inputs)
}

/// The part of a row that its mask shows: ones in one stretch, padding before or behind.
///
/// Errors: `Invalid` for a mask of other values and for one with a gap; `Empty` for one without a one.
fn unpadded<'a>(row: &'a [i64], mask: &[i64], i: usize) -> Result<&'a [i64]> {
    let invalid = |reason: &str| Error::Invalid { field: format!("{ATTENTION_MASK}[{i}]"), reason: reason.to_string() };
    if mask.iter().any(|&m| m != 0 && m != 1) {
        return Err(invalid("expected zeros and ones"));
    }
    let Some(start) = mask.iter().position(|&m| m == 1) else {
        return Err(Error::Empty { field: format!("{INPUT_IDS}[{i}]") });
    };
    let len = mask[start..].iter().take_while(|&&m| m == 1).count();
    match mask[start + len..].contains(&1) {
        true => Err(invalid("its ones have a gap: only padding at one end of a row can be left out")),
        false => Ok(&row[start..start + len]),
    }
}

/// All outputs of a computed request, in the signature's order.
pub fn outputs_of(computed: Computed) -> Vec<OutputTensor> {
    // A request has one `dimensions`, so that all rows have the first one's length.
    let shape = vec![computed.rows.len(), computed.rows.first().map_or(0, |row| row.len())];
    vec![OutputTensor { name: "embedding", datatype: Datatype::Fp32, shape, values: OutputValues::Rows(computed.rows) }]
}

/// What kind of thing a model is, in a word of this protocol: who runs it and what it is.
pub fn platform(info: &ModelInfo) -> String {
    format!("eremois_{}", info.architecture)
}

#[cfg(test)]
mod tests {
    use super::super::elements::{Elements, Values};
    use super::super::tensor::Data;
    use super::*;

    fn ints(name: &str, shape: &[usize], values: &[i64]) -> Tensor {
        let elements = Elements { values: Values::Ints(values.to_vec()), dims: vec![values.len()] };
        Tensor { name: name.into(), datatype: Datatype::Int64, shape: shape.to_vec(), data: Data::Listed(elements) }
    }

    fn rows(tensors: &[Tensor]) -> Result<Vec<Vec<u32>>, String> {
        let inputs = Inputs::of(tensors.to_vec(), 8).map_err(|e| e.to_string())?.inputs;
        Ok(inputs.into_iter().map(|i| if let Input::TokenIds(ids) = i { ids } else { panic!("{i:?}") }).collect())
    }

    #[test]
    fn a_mask_says_what_of_a_row_is_padding() {
        let ids = ints("input_ids", &[2, 3], &[5, 6, 0, 0, 7, 8]);
        assert_eq!(rows(std::slice::from_ref(&ids)), Ok(vec![vec![5, 6, 0], vec![0, 7, 8]]));
        let masked = |mask: &[i64]| rows(&[ids.clone(), ints("attention_mask", &[2, 3], mask)]);
        assert_eq!(masked(&[1, 1, 0, 0, 1, 1]), Ok(vec![vec![5, 6], vec![7, 8]]));
        for (mask, says) in [
            ([1, 0, 1, 1, 1, 1], "attention_mask[0]: its ones have a gap"),
            ([1, 1, 1, 0, 0, 0], "input_ids[1] must not be empty"),
            ([1, 1, 2, 1, 1, 1], "attention_mask[0]: expected zeros and ones"),
        ] {
            let error = masked(&mask).unwrap_err();
            assert!(error.starts_with(says), "{error}");
        }
    }

    #[test]
    fn what_no_row_can_be_made_of_is_refused() {
        let ids = ints("input_ids", &[1, 2], &[5, 6]);
        let with = |tensor: Tensor| rows(&[ids.clone(), tensor]).unwrap_err();
        assert_eq!(rows(&[ids.clone(), ints("token_type_ids", &[1, 2], &[0, 0])]), Ok(vec![vec![5, 6]]));
        for (error, says) in [
            (with(ints("token_type_ids", &[1, 2], &[0, 1])), "token_type_ids: token ids are taken as one segment"),
            (
                with(ints("attention_mask", &[2], &[1, 1])),
                "attention_mask: expected the shape of input_ids, [1, 2], got [2]",
            ),
            (with(ints("input_ids", &[1, 1], &[1])), "input_ids: comes twice"),
            (with(ints("text", &[1], &[1])), "text: a text comes alone"),
            (with(ints("ids", &[1], &[1])), "inputs[1].name: no input is named `ids`; known: text, input_ids"),
            (rows(&[]).unwrap_err(), "inputs: expected the tensor `text` or `input_ids`"),
            (rows(&[ints("text", &[1], &[1])]).unwrap_err(), "text: expected BYTES, got INT64"),
            (rows(&[ints("input_ids", &[1, 2], &[1, -1])]).unwrap_err(), "input_ids[0]: -1 is no token id"),
            (rows(&[ints("input_ids", &[9, 1], &[1; 9])]).unwrap_err(), "input_ids has 9 inputs, the limit is 8"),
            (rows(&[ints("input_ids", &[0, 1], &[])]).unwrap_err(), "input_ids must not be empty"),
            (
                rows(&[ints("input_ids", &[2], &[1, 2])]).unwrap_err(),
                "input_ids: expected the shape [n, longest], got [2]",
            ),
            (rows(&[ints("input_ids", &[2, usize::MAX], &[1])]).unwrap_err(), "input_ids: the shape"),
        ] {
            assert!(error.starts_with(says), "`{error}` does not begin with `{says}`");
        }
    }
}
