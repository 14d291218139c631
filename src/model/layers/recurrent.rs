//! Layers with a state, which go along the first axis of a row.

use candle_core::{Result, Tensor};

use super::build::Build;
use super::list::{LayerSpec, Recurrent};
use super::{Built, Layer};

/// What one step makes of the state.
enum Cell {
    Lstm,
    /// The reset gate acts on the product, with a bias of its own, or on the state.
    Gru {
        reset_after: bool,
    },
    Simple,
}

struct Rnn {
    cell: Cell,
    /// [in, gates * units].
    kernel: Tensor,
    /// [units, gates * units].
    recurrent: Tensor,
    /// [gates * units], of the product with the input.
    bias: Option<Tensor>,
    /// [gates * units], of the product with the state.
    recurrent_bias: Option<Tensor>,
    words: Recurrent,
    units: usize,
    /// [steps]: which one is next.
    order: Option<Tensor>,
}

fn rnn(
    b: &mut Build,
    spec: &LayerSpec,
    words: &Recurrent,
    cell: Cell,
    num_gates: usize,
    x: &[usize],
) -> crate::Result<Built> {
    let [steps, size] = *x else {
        return Err(b.fault(spec, format!("takes rows of steps and features, got {x:?}")));
    };
    let units = b.shape(spec, "recurrent_kernel", 2)?[0];
    let width = units.saturating_mul(num_gates);
    let kernel = b.get(spec, "kernel", &[size, width])?;
    let recurrent = b.get(spec, "recurrent_kernel", &[units, width])?;
    let (mut bias, mut recurrent_bias) = (None, None);
    if words.use_bias && matches!(cell, Cell::Gru { reset_after: true }) {
        let both = b.get(spec, "bias", &[2, width])?;
        (bias, recurrent_bias) = (Some(both.get(0)?), Some(both.get(1)?));
    } else if words.use_bias {
        bias = Some(b.get(spec, "bias", &[width])?);
    }
    let order = if words.go_backwards { Some(backwards(b, steps)?) } else { None };
    let shape = if words.return_sequences { vec![steps, units] } else { vec![units] };
    let scratch = steps.saturating_mul(width);
    let words = words.clone();
    let rnn = Rnn { cell, kernel, recurrent, bias, recurrent_bias, words, units, order };
    Ok(Built::new(rnn, shape).with_scratch(scratch))
}

/// Builds an LSTM. Source: Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000.
pub(super) fn lstm(b: &mut Build, spec: &LayerSpec, words: &Recurrent, x: &[usize]) -> crate::Result<Built> {
    rnn(b, spec, words, Cell::Lstm, 4, x)
}

/// Builds a GRU. Source: Cho et al. 2014; `reset_after` is cuDNN's variant.
pub(super) fn gru(
    b: &mut Build,
    spec: &LayerSpec,
    words: &Recurrent,
    reset_after: bool,
    x: &[usize],
) -> crate::Result<Built> {
    rnn(b, spec, words, Cell::Gru { reset_after }, 3, x)
}

/// Builds a layer whose state is its output.
pub(super) fn simple(b: &mut Build, spec: &LayerSpec, words: &Recurrent, x: &[usize]) -> crate::Result<Built> {
    rnn(b, spec, words, Cell::Simple, 1, x)
}

fn backwards(b: &Build, len: usize) -> crate::Result<Tensor> {
    let places: Vec<u32> = (0..len as u32).rev().collect();
    Ok(Tensor::new(places, b.device())?)
}

impl Layer for Rnn {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        let x = match &self.order {
            Some(order) => inputs[0].contiguous()?.index_select(order, 1)?,
            None => inputs[0].clone(),
        };
        let (n, steps, size) = x.dims3()?;
        // All steps' products with the input are one.
        let mut products = x.reshape((n * steps, size))?.matmul(&self.kernel)?;
        if let Some(bias) = &self.bias {
            products = products.broadcast_add(bias)?;
        }
        let products = products.reshape((n, steps, self.kernel.dim(1)?))?;
        let mut state = Tensor::zeros((n, self.units), x.dtype(), x.device())?;
        let mut memory = state.clone();
        let mut states = Vec::new();
        for step in 0..steps {
            let product = products.narrow(1, step, 1)?.squeeze(1)?;
            (state, memory) = self.step(&product, state, memory)?;
            if self.words.return_sequences {
                states.push(state.clone());
            }
        }
        if self.words.return_sequences { Tensor::stack(&states, 1) } else { Ok(state) }
    }
}

impl Rnn {
    /// Shapes: `product` [n, gates * units]; `state` and `memory` [n, units]. Returns both anew.
    fn step(&self, product: &Tensor, state: Tensor, memory: Tensor) -> Result<(Tensor, Tensor)> {
        let (act, gate) = (self.words.activation, self.words.recurrent_activation);
        let part = |of: &Tensor, i: usize| of.narrow(1, i * self.units, self.units)?.contiguous();
        match self.cell {
            Cell::Lstm => {
                let sum = product.add(&state.matmul(&self.recurrent)?)?;
                let (input, forget) = (gate.of(&part(&sum, 0)?)?, gate.of(&part(&sum, 1)?)?);
                let (candidate, output) = (act.of(&part(&sum, 2)?)?, gate.of(&part(&sum, 3)?)?);
                let memory = forget.mul(&memory)?.add(&input.mul(&candidate)?)?;
                Ok((output.mul(&act.of(&memory)?)?, memory))
            }
            Cell::Gru { reset_after: true } => {
                let mut inner = state.matmul(&self.recurrent)?;
                if let Some(bias) = &self.recurrent_bias {
                    inner = inner.broadcast_add(bias)?;
                }
                let update = gate.of(&part(product, 0)?.add(&part(&inner, 0)?)?)?;
                let reset = gate.of(&part(product, 1)?.add(&part(&inner, 1)?)?)?;
                let candidate = act.of(&part(product, 2)?.add(&reset.mul(&part(&inner, 2)?)?)?)?;
                Ok((between(&update, &state, &candidate)?, memory))
            }
            Cell::Gru { reset_after: false } => {
                let inner = state.matmul(&self.recurrent.narrow(1, 0, 2 * self.units)?.contiguous()?)?;
                let update = gate.of(&part(product, 0)?.add(&part(&inner, 0)?)?)?;
                let reset = gate.of(&part(product, 1)?.add(&part(&inner, 1)?)?)?;
                let inner = reset.mul(&state)?.matmul(&part(&self.recurrent, 2)?)?;
                let candidate = act.of(&part(product, 2)?.add(&inner)?)?;
                Ok((between(&update, &state, &candidate)?, memory))
            }
            Cell::Simple => Ok((act.of(&product.add(&state.matmul(&self.recurrent)?)?)?, memory)),
        }
    }
}

/// The old state as far as `update` says, the candidate for the rest.
fn between(update: &Tensor, state: &Tensor, candidate: &Tensor) -> Result<Tensor> {
    update.mul(state)?.add(&update.affine(-1.0, 1.0)?.mul(candidate)?)
}

/// Builds the turning of the first axis.
pub(super) fn reverse(b: &mut Build, spec: &LayerSpec, x: &[usize]) -> crate::Result<Built> {
    let Some(&steps) = x.first() else { return Err(b.fault(spec, "takes rows of one axis or more".to_string())) };
    Ok(Built::new(Reverse(backwards(b, steps)?), x.to_vec()))
}

/// [steps].
struct Reverse(Tensor);

impl Layer for Reverse {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        inputs[0].contiguous()?.index_select(&self.0, 1)
    }
}
