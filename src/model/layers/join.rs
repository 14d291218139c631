//! Layers that make one of several.

use candle_core::{Result, Tensor};

use super::build::{Build, resolve_axis};
use super::list::LayerSpec;
use super::{Built, Layer};

/// What is made of several values.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    Sum,
    Difference,
    Product,
    Quotient,
    Mean,
    Greatest,
    Least,
}

/// Builds an element-wise operation. Where one has length 1 along an axis it stands for all.
pub(super) fn join(b: &mut Build, spec: &LayerSpec, of: Of, shapes: &[&[usize]]) -> crate::Result<Built> {
    let is_pair = matches!(of, Of::Difference | Of::Quotient);
    if shapes.len() < 2 || (is_pair && shapes.len() != 2) {
        let number = if is_pair { "two inputs" } else { "two inputs or more" };
        return Err(b.fault(spec, format!("takes {number}, got {}", shapes.len())));
    }
    let rank = shapes[0].len();
    let mut shape = shapes[0].to_vec();
    for other in &shapes[1..] {
        let fits = other.len() == rank && other.iter().zip(&shape).all(|(a, b)| a == b || *a == 1 || *b == 1);
        if !fits {
            return Err(b.fault(spec, format!("shapes do not go together: {shapes:?}")));
        }
        shape.iter_mut().zip(*other).for_each(|(size, other)| *size = (*size).max(*other));
    }
    Ok(Built::new(Join(of), shape))
}

struct Join(Of);

impl Layer for Join {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        let mut y = inputs[0].clone();
        for x in &inputs[1..] {
            y = match self.0 {
                Of::Sum | Of::Mean => y.broadcast_add(x)?,
                Of::Difference => y.broadcast_sub(x)?,
                Of::Product => y.broadcast_mul(x)?,
                Of::Quotient => y.broadcast_div(x)?,
                Of::Greatest => y.broadcast_maximum(x)?,
                Of::Least => y.broadcast_minimum(x)?,
            };
        }
        if self.0 == Of::Mean { y.affine(1.0 / inputs.len() as f64, 0.0) } else { Ok(y) }
    }
}

/// Builds one row of several, one after another along an axis.
pub(super) fn concat(b: &mut Build, spec: &LayerSpec, axis: i64, shapes: &[&[usize]]) -> crate::Result<Built> {
    let axis = resolve_axis(b, spec, axis, shapes[0].len())?;
    let mut shape = shapes[0].to_vec();
    for other in &shapes[1..] {
        let fits = other.len() == shape.len() && (0..shape.len()).all(|i| i == axis || other[i] == shape[i]);
        if !fits {
            return Err(b.fault(spec, format!("shapes differ beside axis {}: {shapes:?}", axis + 1)));
        }
        shape[axis] = shape[axis].saturating_add(other[axis]);
    }
    Ok(Built::new(Concat(axis + 1), shape))
}

/// The batch counted.
struct Concat(usize);

impl Layer for Concat {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        Tensor::cat(inputs, self.0)
    }
}
