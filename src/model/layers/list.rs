//! A tensor model in words: its inputs, its layers and its outputs, as a manifest's `[versions.N]` lists them.
//!
//! ```toml
//! outputs = ["probabilities"]          # names of layers
//!
//! [[versions.1.inputs]]
//! name = "x"
//! dtype = "f32"                        # unless given; what clients send, all is computed in f32
//! shape = [5]                          # of one row
//!
//! [[versions.1.layers]]
//! name = "probabilities"               # its tensors are `probabilities.kernel` and `probabilities.bias`
//! kind = "dense"
//! inputs = ["x"]                       # unless given, the layer before it, and the first input for the first layer
//! activation = "softmax"
//! ```
//!
//! Words, the layout of weights and the counting of axes (0 is the batch) are those of Keras, data has its channels last.
//! Sizes are not said where the weights have them.

use serde::{Deserialize, Serialize};

use crate::model::signature::Datatype;

/// A whole model. Layers stand behind what they read, so that no list has a circle.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct LayerList {
    pub inputs: Vec<InputSpec>,
    /// Names of layers, or of inputs that are handed on.
    pub outputs: Vec<String>,
    pub layers: Vec<LayerSpec>,
}

/// One named input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputSpec {
    pub name: String,
    /// What clients send. Everything is computed in f32, in which whole numbers are exact below 2^24.
    #[serde(default = "float")]
    pub dtype: Datatype,
    /// Of one row, without the batch. Empty for one number a row.
    pub shape: Vec<usize>,
}

/// One layer, or one more call of a layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerSpec {
    pub name: String,
    /// Names of inputs and of layers before this one.
    pub inputs: Vec<String>,
    /// What its tensors' names begin with, where that is not its own name: layers may share weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<String>,
    #[serde(flatten)]
    pub kind: Kind,
}

/// What a layer computes. The comments name its tensors with their shapes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Kind {
    /// `kernel` [in, units], `bias` [units]; on the last axis.
    Dense(Dense),
    /// `kernel` [size, in / groups, filters], `bias` [filters].
    Conv1d(Conv),
    /// `kernel` [height, width, in / groups, filters], `bias` [filters].
    Conv2d(Conv),
    /// `kernel` [size, in, multiplier], `bias` [in * multiplier].
    DepthwiseConv1d(Conv),
    /// `kernel` [height, width, in, multiplier], `bias` [in * multiplier].
    DepthwiseConv2d(Conv),
    /// `moving_mean`, `moving_variance`, `gamma` and `beta`, each the length of the axis.
    BatchNorm {
        #[serde(default = "last")]
        axis: i64,
        #[serde(default = "milli")]
        epsilon: f64,
        #[serde(default = "yes", skip_serializing_if = "is_yes")]
        scale: bool,
        #[serde(default = "yes", skip_serializing_if = "is_yes")]
        center: bool,
    },
    /// `gamma` and `beta`, of the axes' lengths.
    LayerNorm {
        #[serde(default = "last_axes")]
        axes: Vec<i64>,
        #[serde(default = "milli")]
        epsilon: f64,
        #[serde(default = "yes", skip_serializing_if = "is_yes")]
        scale: bool,
        #[serde(default = "yes", skip_serializing_if = "is_yes")]
        center: bool,
    },
    /// Scaled to length 1 over the axes.
    UnitNorm {
        #[serde(default = "last_axes")]
        axes: Vec<i64>,
    },
    /// `mean` and `variance`, of the axes' lengths, or of none where `axes` is empty: (x - mean) / deviation.
    Normalize {
        #[serde(default = "last_axes")]
        axes: Vec<i64>,
        /// x * deviation + mean.
        #[serde(default, skip_serializing_if = "is_no")]
        invert: bool,
    },
    /// x * scale + offset, each one number or one for each element of the last axis.
    Rescale {
        #[serde(default = "one")]
        scale: Numbers,
        #[serde(default = "zero")]
        offset: Numbers,
    },
    MaxPool1d(Pool),
    MaxPool2d(Pool),
    AveragePool1d(Pool),
    AveragePool2d(Pool),
    /// Over all axes but the last.
    GlobalMaxPool(Keep),
    /// Over all axes but the last.
    GlobalAveragePool(Keep),
    /// `embeddings` [rows, dimensions], looked up by an input of whole numbers.
    Embedding,
    /// `kernel` [in, 4 * units], `recurrent_kernel` [units, 4 * units], `bias` [4 * units]; gates input, forget, cell,
    /// output.
    Lstm(Recurrent),
    /// `kernel` [in, 3 * units], `recurrent_kernel` [units, 3 * units], `bias` [2, 3 * units]; gates update, reset,
    /// candidate. The reset gate acts on the product with the state, whose bias is the second row.
    Gru(Recurrent),
    /// The same with `bias` [3 * units] and the reset gate on the state itself: `reset_after=False`.
    GruResetBefore(Recurrent),
    /// `kernel` [in, units], `recurrent_kernel` [units, units], `bias` [units].
    SimpleRnn(Recurrent),
    /// The first axis of a row backwards.
    Reverse,
    Activation {
        function: Activation,
    },
    /// negative_slope * (x - threshold) below the threshold, x from there on, max_value at most.
    Relu {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        max_value: Option<f64>,
        #[serde(default)]
        negative_slope: f64,
        #[serde(default)]
        threshold: f64,
    },
    /// alpha * (exp(x) - 1) below zero.
    Elu {
        #[serde(default = "unit")]
        alpha: f64,
    },
    /// `alpha`, of a row's shape or with ones in it: alpha * x below zero.
    Prelu,
    Softmax {
        #[serde(default = "last")]
        axis: i64,
    },
    Flatten,
    /// One element may be -1.
    Reshape {
        shape: Vec<i64>,
    },
    /// A row's axes, counted from 1, in their new order.
    Permute {
        axes: Vec<i64>,
    },
    /// A row of one axis, so many times.
    Repeat {
        times: usize,
    },
    /// For each axis of a row but the last, how many zeros before and behind.
    ZeroPad {
        padding: Vec<(usize, usize)>,
    },
    /// For each axis of a row but the last, how many elements go at the beginning and the end.
    Crop {
        cropping: Vec<(usize, usize)>,
    },
    /// Each element of all axes of a row but the last, so many times.
    Upsample {
        size: Vec<usize>,
    },
    /// Nothing: what layers for training are at inference.
    #[serde(alias = "dropout")]
    Identity,
    Add,
    Subtract,
    Multiply,
    Divide,
    Average,
    Maximum,
    Minimum,
    Concat {
        #[serde(default = "last")]
        axis: i64,
    },
}

impl Kind {
    /// The word of manifests.
    pub fn word(&self) -> String {
        let value = serde_json::to_value(self).ok();
        let word = value.as_ref().and_then(|value| value.get("kind")?.as_str());
        word.unwrap_or_default().to_string()
    }
}

/// A product with a matrix.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dense {
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub use_bias: bool,
    #[serde(default, skip_serializing_if = "Activation::is_linear")]
    pub activation: Activation,
}

/// A convolution. Lists have one number for each axis, and are all ones where they are empty.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conv {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub strides: Vec<usize>,
    #[serde(default, skip_serializing_if = "Padding::is_valid")]
    pub padding: Padding,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dilation: Vec<usize>,
    #[serde(default = "single", skip_serializing_if = "is_single")]
    pub groups: usize,
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub use_bias: bool,
    #[serde(default, skip_serializing_if = "Activation::is_linear")]
    pub activation: Activation,
}

/// What a window takes of its place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    pub size: Vec<usize>,
    /// As `size` where it is empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub strides: Vec<usize>,
    #[serde(default, skip_serializing_if = "Padding::is_valid")]
    pub padding: Padding,
}

/// Whether axes that were reduced stay, with length 1.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Keep {
    #[serde(default, skip_serializing_if = "is_no")]
    pub keepdims: bool,
}

/// A layer with a state, which goes along the first axis of a row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recurrent {
    #[serde(default = "tanh")]
    pub activation: Activation,
    /// Of the gates.
    #[serde(default = "sigmoid")]
    pub recurrent_activation: Activation,
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub use_bias: bool,
    /// All states, or the last one.
    #[serde(default, skip_serializing_if = "is_no")]
    pub return_sequences: bool,
    /// Begins at the end; the states are in the order they were computed.
    #[serde(default, skip_serializing_if = "is_no")]
    pub go_backwards: bool,
}

/// Where windows begin and end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Padding {
    /// Within the data.
    #[default]
    Valid,
    /// As many as there are elements, divided by the stride; what is odd goes to the end.
    Same,
    /// Each sees no element behind its own.
    Causal,
}

impl Padding {
    fn is_valid(&self) -> bool {
        *self == Self::Valid
    }
}

/// A function of each element, but softmax and log_softmax, which are of the last axis.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    #[default]
    Linear,
    Relu,
    Relu6,
    /// 0.2 x below zero.
    LeakyRelu,
    Elu,
    Selu,
    /// With the error function.
    Gelu,
    GeluTanh,
    Sigmoid,
    /// relu6(x + 3) / 6.
    HardSigmoid,
    /// 0.2 x + 0.5 within 0 and 1: the hard sigmoid of Keras 1 and 2.
    ClippedSigmoid,
    Tanh,
    Softplus,
    Softsign,
    #[serde(alias = "swish")]
    Silu,
    #[serde(alias = "hard_swish")]
    HardSilu,
    Exponential,
    Mish,
    Softmax,
    LogSoftmax,
}

impl Activation {
    fn is_linear(&self) -> bool {
        *self == Self::Linear
    }
}

/// One number, or one for each element of an axis.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Numbers {
    One(f64),
    Each(Vec<f64>),
}

// What serde asks for by name.

fn float() -> Datatype {
    Datatype::F32
}

fn yes() -> bool {
    true
}

fn is_yes(value: &bool) -> bool {
    *value
}

fn is_no(value: &bool) -> bool {
    !*value
}

fn single() -> usize {
    1
}

fn is_single(value: &usize) -> bool {
    *value == 1
}

fn last() -> i64 {
    -1
}

fn last_axes() -> Vec<i64> {
    vec![-1]
}

fn milli() -> f64 {
    1e-3
}

fn unit() -> f64 {
    1.0
}

fn one() -> Numbers {
    Numbers::One(1.0)
}

fn zero() -> Numbers {
    Numbers::One(0.0)
}

fn tanh() -> Activation {
    Activation::Tanh
}

fn sigmoid() -> Activation {
    Activation::Sigmoid
}
