//! Device memory that is allocated once and cut into spans.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr, result};

use super::Span;
use crate::{Error, Result};

/// What every span begins on: cuBLASLt's fastest loads, and cudaMalloc's own alignment.
const ALIGNMENT: usize = 256;

/// One allocation of a stream, cut from the front. Freed, in the stream's order, when it is dropped: what another
/// stream does with it must have ended by then.
pub struct Arena {
    slice: CudaSlice<u8>,
    base: Span,
    taken_bytes: usize,
}

impl Arena {
    /// Bytes that a span of `num_bytes` takes from an arena.
    pub const fn padded(num_bytes: usize) -> usize {
        num_bytes.next_multiple_of(ALIGNMENT)
    }

    /// Allocates `num_bytes`, whose content is whatever it was.
    ///
    /// Blocks: an allocation, milliseconds for gigabytes.
    /// Errors: the driver's, out of memory among them.
    pub fn new(stream: &Arc<CudaStream>, num_bytes: usize) -> Result<Self> {
        let num_bytes = Self::padded(num_bytes.max(1));
        // SAFETY: the bytes are unset; kernels write before they read, and `u8` has no invalid value.
        let slice = unsafe { stream.alloc::<u8>(num_bytes) }?;
        let base = Span { ptr: slice.device_ptr(stream).0, num_bytes };
        Ok(Self { slice, base, taken_bytes: 0 })
    }

    /// The next `num_bytes`, from an address that is a multiple of 256.
    ///
    /// Errors: [`Error::Internal`] if so many are not left: whoever made the arena counted wrongly.
    pub fn cut(&mut self, num_bytes: usize) -> Result<Span> {
        let span = self.base.part(self.taken_bytes, num_bytes).map_err(|_| Error::Internal {
            cause: format!(
                "an arena of {} bytes has {} left, {num_bytes} are asked for",
                self.base.num_bytes,
                self.base.num_bytes - self.taken_bytes
            ),
        })?;
        self.taken_bytes = (self.taken_bytes + Self::padded(num_bytes)).min(self.base.num_bytes);
        Ok(span)
    }

    pub fn num_bytes(&self) -> usize {
        self.base.num_bytes
    }

    /// Sets all bytes, in the stream's order.
    pub fn fill(&mut self, byte: u8, stream: &CudaStream) -> Result<()> {
        // SAFETY: the range is the whole allocation, which lives as long as `self`; `u8` takes any value.
        unsafe { result::memset_d8_async(self.base.ptr, byte, self.slice.num_bytes(), stream.cu_stream()) }?;
        Ok(())
    }
}

/// Values that were uploaded once and stay: weights.
#[derive(Default)]
pub struct Uploads {
    slices: Vec<CudaSlice<u8>>,
    num_bytes: usize,
}

impl Uploads {
    /// Copies values to the device. Their memory belongs to `self`.
    ///
    /// Blocks: the copy of pageable memory, about 0.1 ms a MiB.
    /// Errors: the driver's, out of memory among them.
    pub fn add<T: DeviceRepr>(&mut self, stream: &Arc<CudaStream>, values: &[T]) -> Result<Span> {
        let num_bytes = std::mem::size_of_val(values);
        // SAFETY: unset memory that the copy below fills before anything reads it, in the order of the stream.
        let slice = unsafe { stream.alloc::<u8>(Arena::padded(num_bytes.max(1))) }?;
        let span = Span { ptr: slice.device_ptr(stream).0, num_bytes };
        // SAFETY: the slice has room for `values`. They are pageable memory, of which the driver has taken what it
        // needs when the call returns.
        unsafe { result::memcpy_htod_async(span.ptr, values, stream.cu_stream()) }?;
        self.num_bytes += slice.num_bytes();
        self.slices.push(slice);
        Ok(span)
    }

    /// Bytes of all that was uploaded.
    pub fn num_bytes(&self) -> usize {
        self.num_bytes
    }
}
