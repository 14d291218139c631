//! The operations models are made of: each a candle custom op with a CPU forward and a place for its
//! CUDA forward. `unsafe` lives only here, each with its obligations.
//!
//! All ops work on packed sequences: the tokens of a batch lie flat, one sequence after another, and
//! [`CuSeqlens`] says where each begins. Nothing is padded and no op looks across a boundary, so a
//! sequence's result does not depend on its neighbours.
//!
//! Every op has one public type with a checked `new` and a `forward`, which dispatches by device:
//!
//! | device | forward |
//! |---|---|
//! | CPU | the op's own, f32, on all cores |
//! | CUDA | the slow composition in [`reference`], until the op has a kernel of its own |
//!
//! The same composition is what the CPU forward is tested against.

pub mod attention;
pub mod conv;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
pub mod disentangled;
pub mod embedding;
pub mod gated;
mod gemm;
pub mod image;
pub mod linear;
pub mod monitor;
pub mod norm;
pub mod pool;
pub mod process;
pub mod reference;
pub mod residual;
pub mod rms_norm;
pub mod rotary;
mod simd;
mod tasks;
pub mod weights;

use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, DType, Device, Layout, Tensor};

use crate::{Error, Result};

impl From<candle_core::Error> for crate::Error {
    /// A CUDA device's errors as [`cuda::fault`] tells them apart, everything else [`Error::Internal`].
    fn from(error: candle_core::Error) -> Self {
        #[cfg(feature = "cuda")]
        if let Some(error) = cuda::fault::of_candle(&error) {
            return error;
        }
        crate::Error::Internal { cause: cause(error) }
    }
}

/// What a candle error says, without the backtrace that its text carries where RUST_BACKTRACE is set: the
/// text goes into log lines, and to the operator who named a device that is not there.
pub fn cause(error: candle_core::Error) -> String {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => cause(*inner),
        error => error.to_string(),
    }
}

/// Where each sequence of a packed batch begins: on the host for the CPU and for launch geometry, on
/// the device for kernels.
///
/// Shapes: [num_seqs + 1] u32, first 0, strictly rising, last total_tokens. Cheap to clone.
#[derive(Debug, Clone)]
pub struct CuSeqlens {
    host: Arc<[u32]>,
    device: Tensor,
    max_seqlen: usize,
}

impl CuSeqlens {
    /// Checks the bounds and copies them to the device.
    ///
    /// Errors: [`Error::Shape`] if they are not as the type says.
    pub fn new(cu_seqlens: &[u32], device: &Device) -> Result<Self> {
        let shape = |expected: &str, got: String| Error::Shape {
            op: "cu_seqlens",
            operand: "cu_seqlens",
            expected: expected.to_string(),
            got,
        };
        if cu_seqlens.len() < 2 {
            return Err(shape("at least one sequence", format!("{} bounds", cu_seqlens.len())));
        }
        if cu_seqlens[0] != 0 {
            return Err(shape("first bound 0", cu_seqlens[0].to_string()));
        }
        if let Some(w) = cu_seqlens.windows(2).find(|w| w[0] >= w[1]) {
            return Err(shape("rising bounds", format!("{} then {}", w[0], w[1])));
        }
        let max_seqlen = cu_seqlens.windows(2).map(|w| (w[1] - w[0]) as usize).max().unwrap_or(0);
        let on_device = Tensor::new(cu_seqlens, device)?;
        Ok(Self { host: cu_seqlens.into(), device: on_device, max_seqlen })
    }

    /// Number of sequences, at least 1.
    pub fn num_seqs(&self) -> usize {
        self.host.len() - 1
    }

    /// Tokens of all sequences together.
    pub fn total_tokens(&self) -> usize {
        self.host[self.host.len() - 1] as usize
    }

    /// Length in tokens of the longest sequence.
    pub fn max_seqlen(&self) -> usize {
        self.max_seqlen
    }

    /// The bounds on the host, [num_seqs + 1].
    pub fn host(&self) -> &[u32] {
        &self.host
    }

    /// The bounds on the device, [num_seqs + 1] u32.
    pub fn device(&self) -> &Tensor {
        &self.device
    }

    /// The token range of each sequence, in order; none is empty.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = Range<usize>> + '_ {
        self.host.windows(2).map(|w| w[0] as usize..w[1] as usize)
    }

    /// Refuses a tensor whose rows are not the tokens these bounds speak of.
    fn check_tokens(&self, op: &'static str, operand: &'static str, got: usize) -> Result<()> {
        let expected = self.total_tokens();
        if got == expected {
            return Ok(());
        }
        Err(Error::Shape { op, operand, expected: format!("{expected} tokens"), got: got.to_string() })
    }
}

/// Refuses a tensor of another shape than `expected`, naming the op and the operand.
fn check_dims(op: &'static str, operand: &'static str, tensor: &Tensor, expected: &[usize]) -> Result<()> {
    if tensor.dims() == expected {
        return Ok(());
    }
    Err(Error::Shape { op, operand, expected: format!("{expected:?}"), got: format!("{:?}", tensor.dims()) })
}

/// A tensor's values on the host as f32, in row-major order.
fn host_values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

/// The values of a contiguous CPU operand.
fn cpu_values<'a, T: candle_core::WithDType>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice()?[start..end]),
        None => Err(candle_core::Error::RequiresContiguous { op: "eremois" }),
    }
}

/// What the ops' own tests share.
#[cfg(test)]
mod testing {
    use super::*;

    /// Values in [-1, 1) that look random and are the same on every run.
    pub fn noise(seed: u64, shape: &[usize]) -> Tensor {
        use rand::{Rng, SeedableRng, rngs::StdRng};
        let mut rng = StdRng::seed_from_u64(seed);
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// Bounds of sequences of these lengths.
    pub fn bounds(lens: &[usize]) -> CuSeqlens {
        let mut bounds = vec![0u32];
        for len in lens {
            bounds.push(bounds[bounds.len() - 1] + *len as u32);
        }
        CuSeqlens::new(&bounds, &Device::Cpu).unwrap()
    }

    pub fn values(tensor: &Tensor) -> Vec<f32> {
        host_values(tensor).unwrap()
    }

    /// Shapes are equal and values within `tolerance` of max(1, |expected|).
    #[track_caller]
    pub fn assert_close(got: &Tensor, expected: &Tensor, tolerance: f32, what: &str) {
        assert_eq!(got.dims(), expected.dims(), "{what}");
        for (i, (g, e)) in values(got).iter().zip(values(expected)).enumerate() {
            assert!((g - e).abs() <= tolerance * e.abs().max(1.0), "{what}: value {i}: got {g}, expected {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_checked_by_name() {
        for (bad, expected) in [
            (&[][..], "at least one sequence"),
            (&[0][..], "at least one sequence"),
            (&[1, 2][..], "first bound 0"),
            (&[0, 3, 3][..], "rising bounds"),
            (&[0, 3, 2][..], "rising bounds"),
        ] {
            let error = CuSeqlens::new(bad, &Device::Cpu).unwrap_err();
            assert!(error.to_string().contains(expected), "{bad:?}: {error}");
        }
    }

    #[test]
    fn bounds_are_counted() {
        let cu = CuSeqlens::new(&[0, 3, 4, 9], &Device::Cpu).unwrap();
        assert_eq!((cu.num_seqs(), cu.total_tokens(), cu.max_seqlen()), (3, 9, 5));
        assert_eq!(cu.ranges().collect::<Vec<_>>(), [0..3, 3..4, 4..9]);
        assert_eq!(cu.device().to_vec1::<u32>().unwrap(), [0, 3, 4, 9]);
    }
}
