//! From a request's tensors to what the engine takes.

use std::ops::Range;

use super::signature::{
    ATTENTION_MASK, Form, INPUT_IDS, QUERY, Signature, TEXT_PAIR, TOKEN_TYPE_IDS, TensorSpec, Written,
};
use crate::api::inputs::{check_count, renamed};
use crate::request::Input;
use crate::{Error, Result};

/// The elements of a tensor, row by row.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    Bytes(Vec<Vec<u8>>),
    Ints(Vec<i64>),
    /// Of a tensor model, whatever type they came in: see [`float`] and [`whole`].
    Floats(Vec<f32>),
}

/// Whole numbers up to here are exact in f32, which models compute in.
const MAX_EXACT: i64 = 1 << 24;

/// A whole number as models take it; `None` beyond 2^24, where f32 has not all of them.
pub fn whole(int: i64) -> Option<f32> {
    (-MAX_EXACT..=MAX_EXACT).contains(&int).then_some(int as f32)
}

/// A number as models take it, to the nearest f32; `None` where none is near.
pub fn float(number: f64) -> Option<f32> {
    Some(number as f32).filter(|number| number.is_finite())
}

/// What a value is told that [`whole`] refuses.
pub const NOT_EXACT: &str = "models compute in f32, which holds whole numbers from -2^24 to 2^24 exactly";

/// A tensor of a request, read.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub name: String,
    /// Slowest dimension first: the batch. `values` has as many elements as it says.
    pub shape: Vec<usize>,
    pub values: Values,
}

/// The inputs of a request, and which tensor they came in.
#[derive(Debug, Clone, PartialEq)]
pub struct Inputs {
    pub inputs: Vec<Input>,
    /// Names them in errors: input 3 is `text[3]`.
    pub name: String,
}

impl Inputs {
    /// From the tensors of a request, of at most `limit` inputs.
    ///
    /// Shapes: `text`, `text_pair` [n] or [n, 1]; `query` as these, or of one element; `input_ids`, `attention_mask`,
    /// `token_type_ids` [n, longest].
    /// Errors: `Malformed` for tensors that are missing or come in two forms at once; `Invalid` for shapes and values the
    /// model does not take; `Empty` and `TooLarge` for the number of inputs.
    pub fn of(tensors: Vec<Tensor>, signature: &Signature, limit: usize) -> Result<Self> {
        let form = form_of(&tensors, signature)?;
        if form.written == Written::Tensors {
            let name = form.name().to_string();
            return Ok(Self { inputs: values_of(&tensors, form, limit)?, name });
        }
        let mut tensors = tensors;
        let mut take = |name: &str| Some(tensors.swap_remove(tensors.iter().position(|tensor| tensor.name == name)?));
        let Some(first) = take(form.name()) else {
            return Err(malformed("inputs", &format!("the tensor `{}` is missing", form.name())));
        };
        let name = form.name().to_string();
        let inputs = match form.written {
            Written::Texts => {
                let seconds = take(TEXT_PAIR).map(|seconds| texts_of(seconds, None)).transpose()?;
                pairs_of(texts_of(first, Some(limit))?, seconds)?
            }
            Written::Queries => {
                let Some(queries) = take(QUERY) else {
                    return Err(malformed("inputs", &format!("the tensor `{QUERY}` is missing")));
                };
                queried(texts_of(queries, None)?, texts_of(first, Some(limit))?)?
            }
            Written::TokenIds => rows_of(first, take(ATTENTION_MASK), take(TOKEN_TYPE_IDS), limit)?,
            Written::Images => {
                let (_, files) = files_of(first, Some(limit))?;
                files.into_iter().map(|file| Input::Image(file.into())).collect()
            }
            // They have returned above.
            Written::Tensors => Vec::new(),
        };
        Ok(Self { inputs, name })
    }

    /// The engine names inputs as OpenAI does, and says of token ids where it is their types that are wrong.
    pub fn rename(&self, error: Error) -> Error {
        let types = |field: String| {
            let position = field.strip_prefix("input").and_then(|rest| rest.strip_suffix(".token_type_ids"));
            position.map(|position| format!("{TOKEN_TYPE_IDS}{position}")).unwrap_or(field)
        };
        renamed(error.with_field(types), &self.name)
    }
}

/// The form that the tensors of a request are of.
fn form_of<'a>(tensors: &[Tensor], signature: &'a Signature) -> Result<&'a Form> {
    let has = |spec: &TensorSpec| tensors.iter().any(|tensor| tensor.name == spec.name);
    let used: Vec<&Form> = signature.forms.iter().filter(|form| form.tensors.iter().any(has)).collect();
    match used[..] {
        [form] => Ok(form),
        [one, other, ..] => {
            let reason =
                format!("a request has `{}` or `{}`, with what belongs to it, not both", one.name(), other.name());
            Err(malformed("inputs", &reason))
        }
        [] => {
            let names = signature.forms.iter().map(|form| format!("`{}`", form.name())).collect::<Vec<_>>();
            Err(malformed("inputs", &format!("expected the tensor {}", names.join(" or "))))
        }
    }
}

fn malformed(field: &str, reason: &str) -> Error {
    Error::Malformed { field: field.to_string(), reason: reason.to_string() }
}

fn wrong_shape(tensor: &Tensor, expected: &str) -> Error {
    let reason = format!("expected the shape {expected}, got {:?}", tensor.shape);
    Error::Invalid { field: tensor.name.clone(), reason }
}

/// Each input's values of all tensors, one after another in the model's order.
///
/// Shapes: each [n, what the model says].
fn values_of(tensors: &[Tensor], form: &Form, limit: usize) -> Result<Vec<Input>> {
    let mut parts: Vec<&[f32]> = Vec::with_capacity(form.tensors.len());
    let mut num_inputs = None;
    for spec in &form.tensors {
        let Some(tensor) = tensors.iter().find(|tensor| tensor.name == spec.name) else {
            return Err(malformed("inputs", &format!("the tensor `{}` is missing", spec.name)));
        };
        let Values::Floats(values) = &tensor.values else {
            return Err(malformed(&tensor.name, "expected numbers"));
        };
        let n = tensor.shape.first().copied().unwrap_or(0);
        check_count(&tensor.name, n, limit)?;
        let agrees = |(dim, got): (&Option<usize>, &usize)| dim.is_none_or(|dim| dim == *got);
        // A number an input may be written as a list of one: see `TensorSpec::input_dims`.
        let shape = match tensor.shape[..] {
            [_, 1] if spec.shape.len() == 1 => &tensor.shape[..1],
            _ => &tensor.shape[..],
        };
        if shape.len() != spec.shape.len() || !spec.shape.iter().zip(shape).all(agrees) {
            let dims: Vec<String> =
                spec.shape.iter().map(|dim| dim.map_or("n".into(), |dim| dim.to_string())).collect();
            let or_one = if dims.len() == 1 { " or [n, 1]" } else { "" };
            return Err(wrong_shape(tensor, &format!("[{}]{or_one}", dims.join(", "))));
        }
        match num_inputs.replace(n) {
            Some(others) if others != n => {
                let reason = format!("has {n} inputs, `{}` has {others}", form.name());
                return Err(malformed(&tensor.name, &reason));
            }
            _ => parts.push(values),
        }
    }
    let n = num_inputs.unwrap_or(0);
    let row = |i: usize| {
        // Each has n rows, as was checked.
        let of = |values: &&[f32]| (i * (values.len() / n), (i + 1) * (values.len() / n));
        let row: Vec<f32> = parts.iter().flat_map(|part| part[of(part).0..of(part).1].iter().copied()).collect();
        Input::Values(row.into())
    };
    Ok((0..n).map(row).collect())
}

/// Texts with the name of their tensor. Of at most `limit`, where there is one.
fn texts_of(tensor: Tensor, limit: Option<usize>) -> Result<Texts> {
    let (name, texts) = files_of(tensor, limit)?;
    let text = |(i, text): (usize, Vec<u8>)| {
        String::from_utf8(text).map_err(|e| malformed(&format!("{name}[{i}]"), &format!("not UTF-8: {e}")))
    };
    let texts = texts.into_iter().enumerate().map(text).collect::<Result<_>>()?;
    Ok((name, texts))
}

/// Bytes with the name of their tensor. Of at most `limit`, where there is one.
fn files_of(tensor: Tensor, limit: Option<usize>) -> Result<(String, Vec<Vec<u8>>)> {
    match tensor.shape[..] {
        [n] | [n, 1] => check_count(&tensor.name, n, limit.unwrap_or(usize::MAX))?,
        _ => return Err(wrong_shape(&tensor, "[n] or [n, 1]")),
    }
    let Tensor { name, shape: _, values } = tensor;
    match values {
        Values::Bytes(bytes) => Ok((name, bytes)),
        Values::Ints(_) | Values::Floats(_) => Err(malformed(&name, "expected texts, got numbers")),
    }
}

type Texts = (String, Vec<String>);

fn pairs_of((name, texts): Texts, seconds: Option<Texts>) -> Result<Vec<Input>> {
    let Some((second_name, seconds)) = seconds else { return Ok(texts.into_iter().map(Input::Text).collect()) };
    if seconds.len() != texts.len() {
        let reason = format!("has {} texts for the {} of `{name}`", seconds.len(), texts.len());
        return Err(malformed(&second_name, &reason));
    }
    Ok(texts.into_iter().zip(seconds).map(|(first, second)| Input::Pair(first, second)).collect())
}

/// A single query is that of all texts.
fn queried((query_name, mut queries): Texts, (name, texts): Texts) -> Result<Vec<Input>> {
    if let [only] = &queries[..] {
        queries = vec![only.clone(); texts.len()];
    }
    if let Some(i) = queries.iter().position(String::is_empty) {
        return Err(Error::Empty { field: format!("{query_name}[{i}]") });
    }
    if queries.len() != texts.len() {
        let reason =
            format!("has {} queries for the {} texts of `{name}`; one is that of all", queries.len(), texts.len());
        return Err(malformed(&query_name, &reason));
    }
    Ok(queries.into_iter().zip(texts).map(|(query, text)| Input::Pair(query, text)).collect())
}

fn ints_of(tensor: Tensor) -> Result<Vec<i64>> {
    match tensor.values {
        Values::Ints(ints) => Ok(ints),
        Values::Bytes(_) | Values::Floats(_) => Err(malformed(&tensor.name, "expected whole numbers")),
    }
}

/// The token ids of each row, without its padding.
fn rows_of(ids: Tensor, mask: Option<Tensor>, types: Option<Tensor>, limit: usize) -> Result<Vec<Input>> {
    // Readers that stop at a row without a value leave out the dimensions behind it.
    let (n, longest) = match ids.shape[..] {
        [n, longest] => (n, longest),
        [0] => (0, 0),
        _ => return Err(wrong_shape(&ids, "[n, longest]")),
    };
    check_count(&ids.name, n, limit)?;
    if longest == 0 {
        return Err(Error::Empty { field: format!("{}[0]", ids.name) });
    }
    let beside = |tensor: Option<Tensor>| match tensor {
        Some(tensor) if tensor.shape != ids.shape => {
            Err(wrong_shape(&tensor, &format!("of {INPUT_IDS}, {:?}", ids.shape)))
        }
        Some(tensor) => ints_of(tensor).map(Some),
        None => Ok(None),
    };
    let (mask, types) = (beside(mask)?, beside(types)?);
    let values = ints_of(ids)?;
    let row_of = |i: usize| i * longest..(i + 1) * longest;
    let mut inputs = Vec::with_capacity(n);
    for i in 0..n {
        // Each has n rows of as many values, as was checked.
        let part = match &mask {
            Some(mask) => unpadded(&mask[row_of(i)], i)?,
            None => 0..longest,
        };
        let words = |all: &[i64], name: &str, what: &str| {
            let word = |&word: &i64| {
                let wrong =
                    |_| Error::Invalid { field: format!("{name}[{i}]"), reason: format!("{word} is no {what}") };
                u32::try_from(word).map_err(wrong)
            };
            all[row_of(i)][part.clone()].iter().map(word).collect::<Result<Vec<u32>>>()
        };
        let ids = words(&values, INPUT_IDS, "token id")?;
        let types = types.as_deref().map(|types| words(types, TOKEN_TYPE_IDS, "token type")).transpose()?;
        inputs.push(Input::of_ids(ids, types.unwrap_or_default()));
    }
    Ok(inputs)
}

/// The part of a row that its mask shows: ones in one stretch, padding before or behind.
///
/// Errors: `Invalid` for a mask of other values and for one with a gap; `Empty` for one without a one.
fn unpadded(mask: &[i64], i: usize) -> Result<Range<usize>> {
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
        false => Ok(start..start + len),
    }
}
