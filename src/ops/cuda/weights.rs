//! An encoder's weights on the device: uploaded in the types the kernels take.

use std::sync::Arc;

use candle_core::Tensor;
use cudarc::driver::CudaStream;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::arena::Uploads;
use super::gemm::{Epilogue, GemmOperands, GemmShape};
use super::sizes::EncoderSizes;
use super::{HalfType, Span};
use crate::ops::linear::Activation;
use crate::ops::weights::{LayerWeights, LinearWeights, NormWeights};
use crate::ops::{check_dims, host_values};
use crate::{Error, Result};

pub(super) struct Embedding {
    pub(super) word: Span,
    pub(super) position: Span,
    pub(super) token_type: Span,
    pub(super) norm: Norm,
}

pub(super) struct Layer {
    pub(super) qkv: Linear,
    pub(super) attention_output: Linear,
    pub(super) attention_norm: Norm,
    pub(super) up: Linear,
    pub(super) down: Linear,
    pub(super) output_norm: Norm,
}

#[derive(Clone, Copy)]
pub(super) struct Linear {
    pub(super) weight: Span,
    /// In the 2-byte type for an epilogue; f32 for the activation kernel.
    pub(super) bias: Span,
    pub(super) columns: usize,
    pub(super) depth: usize,
    pub(super) after: After,
}

/// What follows a product, and which kernel computes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    Epilogue(Epilogue),
    /// The product alone, then bias and activation by a kernel of our own.
    Kernel(Activation),
}

impl After {
    pub(super) fn of(activation: Activation) -> Self {
        match activation {
            Activation::None => Self::Epilogue(Epilogue::Bias),
            Activation::Relu => Self::Epilogue(Epilogue::BiasRelu),
            Activation::GeluTanh => Self::Epilogue(Epilogue::BiasGeluTanh),
            // The epilogue's GELU is the tanh form: another function than the model was trained with.
            Activation::Gelu | Activation::Silu | Activation::Tanh => Self::Kernel(activation),
        }
    }

    pub(super) fn epilogue(self) -> Epilogue {
        match self {
            Self::Epilogue(epilogue) => epilogue,
            Self::Kernel(_) => Epilogue::None,
        }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Norm {
    /// f32, [hidden_size] each.
    pub(super) gamma: Span,
    pub(super) beta: Span,
}

impl Linear {
    pub(super) fn product(&self, rows: usize, x: Span, y: Span) -> (GemmShape, GemmOperands) {
        let epilogue = self.after.epilogue();
        let shape = GemmShape { rows, columns: self.columns, depth: self.depth, epilogue };
        let bias = if epilogue == Epilogue::None { Span::NULL } else { self.bias };
        (shape, GemmOperands { x, weight: self.weight, bias, y })
    }
}

/// Brings tensors to the device in the types the kernels take.
pub(super) struct Uploader<'a> {
    pub(super) stream: &'a Arc<CudaStream>,
    pub(super) dtype: HalfType,
    pub(super) uploads: Uploads,
}

impl Uploader<'_> {
    pub(super) fn layer(&mut self, layer: &LayerWeights, sizes: &EncoderSizes) -> Result<Layer> {
        let (hidden, intermediate) = (sizes.hidden_size, sizes.intermediate_size);
        Ok(Layer {
            qkv: self.linear(&layer.qkv, 3 * hidden, hidden, Activation::None)?,
            attention_output: self.linear(&layer.attention_output, hidden, hidden, Activation::None)?,
            attention_norm: self.norm(&layer.attention_norm, hidden)?,
            up: self.linear(&layer.up, intermediate, hidden, sizes.activation)?,
            down: self.linear(&layer.down, hidden, intermediate, Activation::None)?,
            output_norm: self.norm(&layer.output_norm, hidden)?,
        })
    }

    pub(super) fn linear(
        &mut self,
        linear: &LinearWeights,
        columns: usize,
        depth: usize,
        activation: Activation,
    ) -> Result<Linear> {
        let after = After::of(activation);
        check_dims("encoder", "bias", &linear.bias, &[columns])?;
        Ok(Linear {
            weight: self.matrix("weight", &linear.weight, columns, depth)?,
            bias: match after {
                After::Epilogue(_) => self.halves("bias", &linear.bias)?,
                After::Kernel(_) => self.floats(&linear.bias)?,
            },
            columns,
            depth,
            after,
        })
    }

    pub(super) fn norm(&mut self, norm: &NormWeights, hidden_size: usize) -> Result<Norm> {
        check_dims("encoder", "norm", &norm.weight, &[hidden_size])?;
        check_dims("encoder", "norm", &norm.bias, &[hidden_size])?;
        Ok(Norm { gamma: self.floats(&norm.weight)?, beta: self.floats(&norm.bias)? })
    }

    pub(super) fn matrix(
        &mut self,
        operand: &'static str,
        tensor: &Tensor,
        rows: usize,
        columns: usize,
    ) -> Result<Span> {
        check_dims("encoder", operand, tensor, &[rows, columns])?;
        self.halves(operand, tensor)
    }

    pub(super) fn floats(&mut self, tensor: &Tensor) -> Result<Span> {
        self.uploads.add(self.stream, &host_values(tensor)?)
    }

    fn halves(&mut self, operand: &'static str, tensor: &Tensor) -> Result<Span> {
        let values = host_values(tensor)?;
        match self.dtype {
            HalfType::F16 => self.uploads.add(self.stream, &to_f16(operand, &values)?),
            HalfType::Bf16 => {
                let mut halves = vec![bf16::ZERO; values.len()];
                halves.convert_from_f32_slice(&values);
                self.uploads.add(self.stream, &halves)
            }
        }
    }
}

/// Rounds to f16. Errors: [`Error::Internal`] for a finite value that f16 has no number for.
fn to_f16(operand: &str, values: &[f32]) -> Result<Vec<f16>> {
    let mut halves = vec![f16::ZERO; values.len()];
    halves.convert_from_f32_slice(values);
    match halves.iter().zip(values).find(|(half, value)| half.is_infinite() && value.is_finite()) {
        None => Ok(halves),
        Some((_, value)) => {
            let cause = format!("a {operand} of {value:e} is beyond f16, which ends at 65504: set dtype = \"bf16\"");
            Err(Error::Internal { cause })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_cublaslt_computes_exactly_is_an_epilogue() {
        assert_eq!(After::of(Activation::Gelu).epilogue(), Epilogue::None);
        assert_eq!(After::of(Activation::GeluTanh), After::Epilogue(Epilogue::BiasGeluTanh));
        assert_eq!(After::of(Activation::None), After::Epilogue(Epilogue::Bias));
    }

    #[test]
    fn a_weight_beyond_f16_is_refused_by_value() {
        assert_eq!(to_f16("bias", &[1.0, -65504.0]).unwrap(), [f16::ONE, f16::MIN]);
        let error = to_f16("bias", &[0.0, 7e4]).unwrap_err().to_string();
        assert!(error.contains("7e4") && error.contains("bf16"), "{error}");
        // One that is infinite in the file is the model's own fault, and shows as such.
        assert!(to_f16("bias", &[f32::INFINITY]).is_ok());
    }
}
