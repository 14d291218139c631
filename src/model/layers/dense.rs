//! Products with matrices, tables, and constants.

use candle_core::{DType, Result, Tensor};

use super::build::Build;
use super::list::{Activation, Dense, LayerSpec, Numbers};
use super::{Built, Layer};

/// f32 counts whole numbers without gaps up to here.
const MAX_TABLE_ROWS: usize = 1 << 24;

/// Builds a dense layer for rows [..., in].
pub(super) fn dense(b: &mut Build, spec: &LayerSpec, words: &Dense, x: &[usize]) -> crate::Result<Built> {
    let Some((&size, front)) = x.split_last() else {
        return Err(b.fault(spec, "takes rows of one axis or more".to_string()));
    };
    let units = b.shape(spec, "kernel", 2)?[1];
    let kernel = b.get(spec, "kernel", &[size, units])?;
    let bias = b.get_if(words.use_bias, spec, "bias", &[units])?;
    let shape = [front, &[units]].concat();
    Ok(Built::new(Linear { kernel, bias, activation: words.activation }, shape))
}

/// activation(x kernel + bias), on the last axis.
pub(super) struct Linear {
    /// [in, units].
    pub kernel: Tensor,
    /// [units].
    pub bias: Option<Tensor>,
    pub activation: Activation,
}

impl Linear {
    /// Shapes: `x` [..., in]. Returns [..., units].
    pub fn of(&self, x: &Tensor) -> Result<Tensor> {
        let (size, units) = self.kernel.dims2()?;
        let mut shape = x.dims().to_vec();
        let rows = x.elem_count() / size.max(1);
        // One product for all that is in front: candle would repeat it for each.
        let mut y = x.reshape((rows, size))?.matmul(&self.kernel)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        if let Some(last) = shape.last_mut() {
            *last = units;
        }
        self.activation.of(&y.reshape(shape)?)
    }
}

impl Layer for Linear {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        self.of(inputs[0])
    }
}

/// Builds a table for rows of any shape, whose values are the table's rows.
pub(super) fn embedding(b: &mut Build, spec: &LayerSpec, x: &[usize]) -> crate::Result<Built> {
    let table = b.shape(spec, "embeddings", 2)?;
    if table[0] > MAX_TABLE_ROWS {
        return Err(b.fault(spec, format!("the table has {} rows, the limit is {MAX_TABLE_ROWS}", table[0])));
    }
    b.table_rows = Some(table[0]);
    let shape = [x, &[table[1]]].concat();
    Ok(Built::new(Embedding { table: b.get(spec, "embeddings", &table)? }, shape))
}

struct Embedding {
    /// [rows, dimensions].
    table: Tensor,
}

impl Layer for Embedding {
    /// Values were checked at the door: whole, and below the number of rows.
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        let mut shape = inputs[0].dims().to_vec();
        shape.push(self.table.dim(1)?);
        self.table.index_select(&inputs[0].flatten_all()?.to_dtype(DType::U32)?, 0)?.reshape(shape)
    }
}

/// Builds x * scale + offset.
pub(super) fn rescale(
    b: &mut Build,
    spec: &LayerSpec,
    scale: &Numbers,
    offset: &Numbers,
    x: &[usize],
) -> crate::Result<Built> {
    let last = x.last().copied().unwrap_or(1);
    let tensor = |what: &str, numbers: &Numbers| {
        let values = match numbers {
            Numbers::One(value) => vec![*value as f32],
            Numbers::Each(values) if values.len() == last => values.iter().map(|&value| value as f32).collect(),
            Numbers::Each(values) => {
                let reason = format!("{what} has {} numbers, the last axis {last} elements", values.len());
                return Err(b.fault(spec, reason));
            }
        };
        if values.iter().any(|value| !value.is_finite()) {
            return Err(b.fault(spec, format!("{what} is not finite")));
        }
        Ok(Tensor::new(values, b.device())?)
    };
    let rescale = Rescale { scale: tensor("scale", scale)?, offset: tensor("offset", offset)? };
    Ok(Built::new(rescale, x.to_vec()))
}

struct Rescale {
    /// [1] or [last axis], both.
    scale: Tensor,
    offset: Tensor,
}

impl Layer for Rescale {
    fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor> {
        inputs[0].broadcast_mul(&self.scale)?.broadcast_add(&self.offset)
    }
}
