//! Tensor models: a list of layers and their weights, computed with candle's operations on any device.
//!
//! [`list`] has the words, [`Graph::build`] checks them against the weights, once, and works out every shape;
//! [`Graph::forward`] computes. Each kind of layer is a file: how it is read and how it is computed stand together.

mod activation;
mod build;
mod conv;
mod dense;
mod join;
pub mod list;
mod norm;
mod pool;
pub(super) mod read;
mod recurrent;
mod shape;
mod window;

use std::collections::HashMap;
use std::path::Path;

use candle_core::Tensor;

use self::build::{Build, build};
use self::list::LayerList;
use super::weights::{Weights, file_error};
use crate::{Error, Result};

/// Most values that the layers of one row may hold together: 1 GiB. A model beyond it is a mistake, or meant to hurt.
const MAX_ROW_VALUES: usize = 1 << 28;

/// One computing layer. Tensors come and go with the batch as their first axis.
trait Layer: Send + Sync {
    /// Inputs are of the shapes that the layer was built for.
    fn forward(&self, inputs: &[&Tensor]) -> candle_core::Result<Tensor>;
}

/// A layer that was checked, and what comes out of it.
struct Built {
    layer: Box<dyn Layer>,
    /// Of one row.
    shape: Vec<usize>,
    /// Values that the layer holds for one row while it computes, besides what comes out.
    scratch: usize,
}

impl Built {
    fn new(layer: impl Layer + 'static, shape: Vec<usize>) -> Self {
        Self { layer: Box::new(layer), shape, scratch: 0 }
    }

    fn with_scratch(self, scratch: usize) -> Self {
        Self { scratch, ..self }
    }
}

/// A model of layers on one device, every shape known.
pub struct Graph {
    nodes: Vec<Node>,
    /// Shapes of one row, in the list's order.
    input_shapes: Vec<Vec<usize>>,
    /// For each input how many rows the smallest table has that it looks things up in.
    table_rows: Vec<Option<usize>>,
    /// Places of the outputs among inputs and layers, which are counted through.
    outputs: Vec<usize>,
    output_shapes: Vec<Vec<usize>>,
    /// Values that all layers together hold for one row, about.
    row_values: usize,
}

struct Node {
    layer: Box<dyn Layer>,
    /// Places of what it reads.
    inputs: Vec<usize>,
    /// Places that nobody reads after this layer.
    spent: Vec<usize>,
}

/// What is known of a value while the list is read.
#[derive(Clone)]
struct Value {
    shape: Vec<usize>,
    /// The input that it is, perhaps in another shape.
    origin: Option<usize>,
}

impl Graph {
    /// Reads a list and its weights. `file` is named where the list is at fault.
    ///
    /// Blocks: reads all weights.
    /// Errors: [`Error::ModelFile`] naming the layer and what is wrong with it, for a tensor that no layer reads, and for a
    /// model that holds more than 2^28 values a row; [`Error::Tensor`] for weights that are missing or of another shape.
    pub fn build(list: &LayerList, weights: &Weights, file: &Path) -> Result<Self> {
        let mut places: HashMap<&str, usize> = HashMap::new();
        let mut values: Vec<Value> = Vec::new();
        let mut row_values = 0usize;
        for (i, input) in list.inputs.iter().enumerate() {
            let fault = |reason: String| file_error(file, format!("input `{}`: {reason}", input.name));
            if input.name.is_empty() || places.insert(&input.name, i).is_some() {
                return Err(fault("each input has a name of its own".to_string()));
            }
            let size = num_values(&input.shape).filter(|&size| size > 0);
            row_values =
                size.and_then(|size| row_values.checked_add(size).filter(|&sum| sum <= MAX_ROW_VALUES)).ok_or_else(
                    || fault(format!("shape {:?} holds none or more than {MAX_ROW_VALUES} values", input.shape)),
                )?;
            values.push(Value { shape: input.shape.clone(), origin: Some(i) });
        }
        if values.is_empty() {
            return Err(file_error(file, "a tensor model needs an input"));
        }
        let mut table_rows = vec![None; values.len()];
        let mut builder = Build::new(weights, file);
        let mut nodes: Vec<Node> = Vec::with_capacity(list.layers.len());
        for spec in &list.layers {
            let fault = |reason: String| builder.fault(spec, reason);
            let mut inputs = Vec::with_capacity(spec.inputs.len());
            for name in &spec.inputs {
                let known = places.get(name.as_str());
                inputs.push(*known.ok_or_else(|| fault(format!("no input and no layer before it is named `{name}`")))?);
            }
            if inputs.is_empty() {
                // As a list without names reads: each takes what is before it.
                inputs.push(if nodes.is_empty() { 0 } else { values.len() - 1 });
            }
            let shapes: Vec<&[usize]> = inputs.iter().map(|&at| values[at].shape.as_slice()).collect();
            let built = build(&mut builder, spec, &shapes)?;
            let size = num_values(&built.shape).filter(|&size| size > 0);
            row_values = size
                .and_then(|size| size.checked_add(built.scratch)?.checked_add(row_values))
                .filter(|&sum| sum <= MAX_ROW_VALUES)
                .ok_or_else(|| {
                    let reason = format!("with it a row holds none or more than {MAX_ROW_VALUES} values");
                    builder.fault(spec, format!("gives shape {:?}: {reason}", built.shape))
                })?;
            if let Some(rows) = builder.table_rows.take() {
                let origin = values[inputs[0]].origin.ok_or_else(|| {
                    builder
                        .fault(spec, "looks up what was computed; it takes an input, as it is or reshaped".to_string())
                })?;
                let least: &mut Option<usize> = &mut table_rows[origin];
                *least = Some(least.map_or(rows, |least| least.min(rows)));
            }
            let origin = values[inputs[0]].origin.filter(|_| spec.kind.moves_only());
            let place = values.len();
            if spec.name.is_empty() || places.insert(&spec.name, place).is_some() {
                return Err(builder.fault(spec, "the name is another's already".to_string()));
            }
            values.push(Value { shape: built.shape, origin });
            nodes.push(Node { layer: built.layer, inputs, spent: Vec::new() });
        }
        builder.finish()?;
        let mut outputs = Vec::with_capacity(list.outputs.len());
        for name in &list.outputs {
            let place = places.get(name.as_str()).copied();
            let place = place.ok_or_else(|| file_error(file, format!("output `{name}`: no layer has that name")))?;
            if outputs.contains(&place) {
                return Err(file_error(file, format!("output `{name}` is there twice")));
            }
            outputs.push(place);
        }
        if outputs.is_empty() {
            return Err(file_error(file, "a tensor model needs an output"));
        }
        mark_spent(&mut nodes, list.inputs.len(), &outputs);
        Ok(Self {
            nodes,
            input_shapes: list.inputs.iter().map(|input| input.shape.clone()).collect(),
            table_rows,
            output_shapes: outputs.iter().map(|&at| values[at].shape.clone()).collect(),
            outputs,
            row_values,
        })
    }

    /// Shapes of one row of each input.
    pub fn input_shapes(&self) -> &[Vec<usize>] {
        &self.input_shapes
    }

    /// Shapes of one row of each output.
    pub fn output_shapes(&self) -> &[Vec<usize>] {
        &self.output_shapes
    }

    /// For each input that is looked up in a table, how many rows that has: its values are whole numbers below.
    pub fn table_rows(&self) -> &[Option<usize>] {
        &self.table_rows
    }

    /// About how many values are held for each row while a batch is computed.
    pub fn row_values(&self) -> usize {
        self.row_values
    }

    /// Computes a batch.
    ///
    /// Shapes: `inputs` [n, input shape...] each, in the list's order. Returns [n, output shape...] each.
    /// Errors: [`Error::Shape`] for other shapes, and the device's own.
    pub fn forward(&self, inputs: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let num_rows = inputs.first().and_then(|input| input.dims().first().copied()).unwrap_or(0);
        let is_right = |(input, shape): (&Tensor, &Vec<usize>)| input.dims().split_first() == Some((&num_rows, shape));
        if inputs.len() != self.input_shapes.len() || !inputs.iter().zip(&self.input_shapes).all(is_right) {
            let got = inputs.iter().map(|input| format!("{:?}", input.dims())).collect::<Vec<_>>().join(", ");
            let expected = format!("[n, ...] of {:?}", self.input_shapes);
            return Err(Error::Shape { op: "layers", operand: "inputs", expected, got });
        }
        let mut values: Vec<Option<Tensor>> = inputs.into_iter().map(Some).collect();
        let missing = || Error::Internal { cause: "a value of a layer list was dropped too early".to_string() };
        for node in &self.nodes {
            let read: Option<Vec<&Tensor>> = node.inputs.iter().map(|&at| values[at].as_ref()).collect();
            let value = node.layer.forward(&read.ok_or_else(missing)?)?;
            values.push(Some(value));
            node.spent.iter().for_each(|&at| values[at] = None);
        }
        self.outputs.iter().map(|&at| values[at].clone().ok_or_else(missing)).collect()
    }
}

/// Notes at each layer what is read for the last time there, so that a deep model holds few of its values at once.
fn mark_spent(nodes: &mut [Node], num_inputs: usize, outputs: &[usize]) {
    let mut last: Vec<Option<usize>> = vec![None; num_inputs + nodes.len()];
    for (i, node) in nodes.iter().enumerate() {
        // A value that nobody reads is spent where it is made.
        last[num_inputs + i] = Some(i);
        node.inputs.iter().for_each(|&at| last[at] = Some(i));
    }
    for (at, last) in last.iter().enumerate() {
        if let Some(i) = last.filter(|_| !outputs.contains(&at)) {
            nodes[i].spent.push(at);
        }
    }
}

/// How many values a shape has; `None` beyond what can be counted.
fn num_values(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size))
}
