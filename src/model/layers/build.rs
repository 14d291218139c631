//! From a layer's words to what computes it.

use std::collections::BTreeSet;
use std::path::Path;

use candle_core::Tensor;

use super::activation::{Elu, Function, Prelu, Relu, Softmax};
use super::list::{Kind, LayerSpec};
use super::{Built, conv, dense, join, norm, pool, recurrent, shape};
use crate::model::weights::{Weights, file_error};
use crate::{Error, Result};

/// What building layers reads and remembers.
pub(super) struct Build<'a> {
    weights: &'a Weights,
    file: &'a Path,
    /// Tensors that a layer has read.
    used: BTreeSet<String>,
    /// Set by a layer that looks things up: how many there are.
    pub table_rows: Option<usize>,
}

impl<'a> Build<'a> {
    pub fn new(weights: &'a Weights, file: &'a Path) -> Self {
        Self { weights, file, used: BTreeSet::new(), table_rows: None }
    }

    /// A fault of a layer.
    pub fn fault(&self, spec: &LayerSpec, reason: String) -> Error {
        file_error(self.file, format!("layer `{}` ({}): {reason}", spec.name, spec.kind.word()))
    }

    /// The shape of a layer's tensor. Errors: [`Error::Tensor`] if it is missing or of another rank.
    pub fn shape(&self, spec: &LayerSpec, what: &str, rank: usize) -> Result<Vec<usize>> {
        let name = name(spec, what);
        let expected = format!("{rank} axes");
        let got = match self.weights.shape(&name) {
            Some(shape) if shape.len() == rank && shape.iter().all(|&size| size > 0) => return Ok(shape.to_vec()),
            Some(shape) => format!("shape {shape:?}"),
            None => "no such tensor".to_string(),
        };
        Err(Error::Tensor { file: self.weights.path().to_path_buf(), tensor: name, expected, got })
    }

    /// A layer's tensor. Errors: [`Error::Tensor`] if it is missing or of another shape.
    pub fn get(&mut self, spec: &LayerSpec, what: &str, shape: &[usize]) -> Result<Tensor> {
        let name = name(spec, what);
        let tensor = self.weights.get(&name, shape)?;
        self.used.insert(name);
        Ok(tensor)
    }

    /// [`Build::get`] where a layer has it.
    pub fn get_if(&mut self, has: bool, spec: &LayerSpec, what: &str, shape: &[usize]) -> Result<Option<Tensor>> {
        if has { self.get(spec, what, shape).map(Some) } else { Ok(None) }
    }

    /// The device that the weights are on.
    pub fn device(&self) -> &candle_core::Device {
        self.weights.device()
    }

    /// Errors: [`Error::ModelFile`] for a tensor that no layer has read: a `use_bias` or a layer is missing in the list.
    pub fn finish(&self) -> Result<()> {
        let mut names = self.weights.names();
        names.sort_unstable();
        match names.iter().find(|name| !self.used.contains(**name)) {
            None => Ok(()),
            Some(name) => {
                Err(file_error(self.weights.path(), format!("tensor `{name}`: no layer of the list reads it")))
            }
        }
    }
}

/// The name of a layer's tensor in the file.
fn name(spec: &LayerSpec, what: &str) -> String {
    format!("{}.{what}", spec.weights.as_ref().unwrap_or(&spec.name))
}

/// Builds one layer for inputs of these shapes, which are those of one row. `shapes` is not empty.
pub(super) fn build(b: &mut Build, spec: &LayerSpec, shapes: &[&[usize]]) -> Result<Built> {
    let joins = matches!(
        spec.kind,
        Kind::Add
            | Kind::Subtract
            | Kind::Multiply
            | Kind::Divide
            | Kind::Average
            | Kind::Maximum
            | Kind::Minimum
            | Kind::Concat { .. }
    );
    if !joins && shapes.len() != 1 {
        return Err(b.fault(spec, format!("takes one input, the list names {}", shapes.len())));
    }
    let x = shapes[0];
    match &spec.kind {
        Kind::Dense(words) => dense::dense(b, spec, words, x),
        Kind::Embedding => dense::embedding(b, spec, x),
        Kind::Rescale { scale, offset } => dense::rescale(b, spec, scale, offset, x),
        Kind::Conv1d(words) => conv::conv(b, spec, words, 1, x),
        Kind::Conv2d(words) => conv::conv(b, spec, words, 2, x),
        Kind::DepthwiseConv1d(words) => conv::depthwise(b, spec, words, 1, x),
        Kind::DepthwiseConv2d(words) => conv::depthwise(b, spec, words, 2, x),
        Kind::BatchNorm { axis, epsilon, scale, center } => norm::batch(b, spec, *axis, *epsilon, (*scale, *center), x),
        Kind::LayerNorm { axes, epsilon, scale, center } => norm::layer(b, spec, axes, *epsilon, (*scale, *center), x),
        Kind::UnitNorm { axes } => norm::unit(b, spec, axes, x),
        Kind::Normalize { axes, invert } => norm::normalize(b, spec, axes, *invert, x),
        Kind::MaxPool1d(words) => pool::pool(b, spec, words, 1, pool::Of::Greatest, x),
        Kind::MaxPool2d(words) => pool::pool(b, spec, words, 2, pool::Of::Greatest, x),
        Kind::AveragePool1d(words) => pool::pool(b, spec, words, 1, pool::Of::Mean, x),
        Kind::AveragePool2d(words) => pool::pool(b, spec, words, 2, pool::Of::Mean, x),
        Kind::GlobalMaxPool(keep) => pool::global(b, spec, pool::Of::Greatest, keep.keepdims, x),
        Kind::GlobalAveragePool(keep) => pool::global(b, spec, pool::Of::Mean, keep.keepdims, x),
        Kind::Lstm(words) => recurrent::lstm(b, spec, words, x),
        Kind::Gru(words) => recurrent::gru(b, spec, words, true, x),
        Kind::GruResetBefore(words) => recurrent::gru(b, spec, words, false, x),
        Kind::SimpleRnn(words) => recurrent::simple(b, spec, words, x),
        Kind::Reverse => recurrent::reverse(b, spec, x),
        Kind::Activation { function } => Ok(Built::new(Function(*function), x.to_vec())),
        Kind::Relu { max_value, negative_slope, threshold } => {
            let relu = Relu { max_value: *max_value, negative_slope: *negative_slope, threshold: *threshold };
            Ok(Built::new(relu, x.to_vec()))
        }
        Kind::Elu { alpha } => Ok(Built::new(Elu(*alpha), x.to_vec())),
        Kind::Prelu => Prelu::build(b, spec, x),
        Kind::Softmax { axis } => {
            let axis = resolve_axis(b, spec, *axis, x.len())?;
            Ok(Built::new(Softmax(axis + 1), x.to_vec()))
        }
        Kind::Flatten => shape::reshaped(b, spec, &[-1], x),
        Kind::Reshape { shape } => shape::reshaped(b, spec, shape, x),
        Kind::Permute { axes } => shape::permute(b, spec, axes, x),
        Kind::Repeat { times } => shape::repeat(b, spec, *times, x),
        Kind::ZeroPad { padding } => shape::zero_pad(b, spec, padding, x),
        Kind::Crop { cropping } => shape::crop(b, spec, cropping, x),
        Kind::Upsample { size } => shape::upsample(b, spec, size, x),
        Kind::Identity => Ok(Built::new(shape::Identity, x.to_vec())),
        Kind::Concat { axis } => join::concat(b, spec, *axis, shapes),
        Kind::Add => join::join(b, spec, join::Of::Sum, shapes),
        Kind::Subtract => join::join(b, spec, join::Of::Difference, shapes),
        Kind::Multiply => join::join(b, spec, join::Of::Product, shapes),
        Kind::Divide => join::join(b, spec, join::Of::Quotient, shapes),
        Kind::Average => join::join(b, spec, join::Of::Mean, shapes),
        Kind::Maximum => join::join(b, spec, join::Of::Greatest, shapes),
        Kind::Minimum => join::join(b, spec, join::Of::Least, shapes),
    }
}

impl Kind {
    /// Whether a layer's values are its input's, in whatever shape and order.
    pub(super) fn moves_only(&self) -> bool {
        matches!(
            self,
            Self::Flatten
                | Self::Reshape { .. }
                | Self::Permute { .. }
                | Self::Repeat { .. }
                | Self::Identity
                | Self::Reverse
        )
    }
}

/// An axis as lists have it, 0 being the batch and -1 the last, as the place in a row's shape of so many axes.
pub(super) fn resolve_axis(b: &Build, spec: &LayerSpec, axis: i64, rank: usize) -> Result<usize> {
    let from_batch = if axis < 0 { axis + rank as i64 + 1 } else { axis };
    if (1..=rank as i64).contains(&from_batch) {
        return Ok(from_batch as usize - 1);
    }
    Err(b.fault(spec, format!("axis {axis} is none of a row's, which has {rank} (1 to {rank}, or -1 for the last)")))
}

/// Several axes, each once, rising. Errors: besides those of [`resolve_axis`] for one that is there twice.
pub(super) fn resolve_axes(b: &Build, spec: &LayerSpec, axes: &[i64], rank: usize) -> Result<Vec<usize>> {
    let mut places = axes.iter().map(|&axis| resolve_axis(b, spec, axis, rank)).collect::<Result<Vec<_>>>()?;
    places.sort_unstable();
    if places.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(b.fault(spec, format!("axes {axes:?} name one twice")));
    }
    Ok(places)
}
