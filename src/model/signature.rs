//! What kinds of input a model takes, and the named tensors of models that compute on numbers.

use serde::{Deserialize, Serialize};

/// A kind of input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Modality {
    /// Texts, pairs of texts, token ids.
    Text,
    /// Files of images.
    Image,
    /// Named tensors of numbers.
    Tensors,
}

/// A tensor's element type as clients see it; the server computes in floats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Datatype {
    Bool,
    U8,
    U16,
    U32,
    U64,
    I8,
    I16,
    I32,
    I64,
    F16,
    Bf16,
    F32,
    F64,
}

impl Datatype {
    /// Whether values are whole numbers, among them 0 and 1 for `bool`.
    pub fn is_integer(self) -> bool {
        !matches!(self, Self::F16 | Self::Bf16 | Self::F32 | Self::F64)
    }
}

/// A named tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSpec {
    pub name: String,
    pub dtype: Datatype,
    /// Of one input, without the batch dimension; every size at least 1. Empty for a single number.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Values of one input.
    pub fn num_values(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The form of an input that the device gets as numbers: an image's pixels, a row of tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ValuesShape {
    /// Numbers of one input; at least 1.
    pub num_values: usize,
    /// Tokens that it counts in the queue's and the batch's limits; at least 1.
    pub num_tokens: usize,
}

/// What a model takes and, where it computes tensors, gives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Signature {
    /// Not empty.
    pub modalities: Vec<Modality>,
    /// Of inputs that are no text; `None` for models that take only text.
    pub values: Option<ValuesShape>,
    /// Of a tensor model: an input is the values of all these, one after another, each row-major.
    pub inputs: Vec<TensorSpec>,
    /// Of a tensor model: a row is the values of all these, one after another, each row-major.
    pub outputs: Vec<TensorSpec>,
}

impl Default for Signature {
    /// A text model's.
    fn default() -> Self {
        Self { modalities: vec![Modality::Text], values: None, inputs: Vec::new(), outputs: Vec::new() }
    }
}

impl Signature {
    /// A tensor model's. `num_tokens` is what one input counts as in the queue's limits.
    pub fn of_tensors(inputs: Vec<TensorSpec>, outputs: Vec<TensorSpec>, num_tokens: usize) -> Self {
        let num_values = inputs.iter().map(TensorSpec::num_values).sum();
        let values = Some(ValuesShape { num_values, num_tokens });
        Self { modalities: vec![Modality::Tensors], values, inputs, outputs }
    }

    /// Whether the model takes inputs of this kind.
    pub fn takes(&self, modality: Modality) -> bool {
        self.modalities.contains(&modality)
    }
}
