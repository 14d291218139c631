//! The CUDA engine: own kernels and cuBLASLt products on preallocated device memory.
//!
//! No candle tensor takes part in a forward here: it is a list of launches on memory that was cut out at load, so
//! that it allocates nothing, synchronises nothing and can be captured into a CUDA graph. Streams are our own, ordered
//! by our own events; cudarc's tracking of events is switched off for every context opened here.
//!
//! Two conventions hold everywhere. A [`Span`] is the raw address of device memory: whoever launches checks its size,
//! whoever owns the memory keeps it alive until the stream is done with it. Kernels are launched for a bucket's
//! capacity and read the true counts from the first words of the batch ([`Header`]), so that one captured graph serves
//! every batch of its bucket.

mod algorithms;
mod arena;
pub mod attention;
pub mod budget;
pub mod encoder;
pub mod engine;
pub mod fault;
pub mod gemm;
mod graph;
pub mod kernels;
pub mod layout;
pub(super) mod nvml;
pub mod sizes;
mod staging;
mod weights;

use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute;
use cudarc::driver::{CudaContext, CudaStream};

use crate::{Error, Result};

/// A range of device memory. Valid as long as the slice or arena it was cut from; the launchers check its size, not
/// its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The device's address (a `CUdeviceptr`); 0 stands for an operand that is absent.
    pub ptr: u64,
    pub num_bytes: usize,
}

impl Span {
    /// An operand that is absent: a null pointer to the kernels.
    pub const NULL: Self = Self { ptr: 0, num_bytes: 0 };

    pub fn is_null(&self) -> bool {
        self.ptr == 0
    }

    /// The part from `offset_bytes` on, `num_bytes` long.
    ///
    /// Errors: [`Error::Shape`] if it does not lie inside.
    pub fn part(&self, offset_bytes: usize, num_bytes: usize) -> Result<Self> {
        match offset_bytes.checked_add(num_bytes) {
            Some(end) if end <= self.num_bytes => Ok(Self { ptr: self.ptr + offset_bytes as u64, num_bytes }),
            _ => Err(Error::Shape {
                op: "span",
                operand: "part",
                expected: format!("within {} bytes", self.num_bytes),
                got: format!("{num_bytes} bytes from {offset_bytes}"),
            }),
        }
    }
}

/// What activations and weights are stored in: 2 bytes a value. Sums are f32 everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HalfType {
    F16,
    Bf16,
}

impl HalfType {
    /// Bytes of one value.
    pub const NUM_BYTES: usize = 2;

    /// The suffix of kernel names and the word of manifests: "f16", "bf16".
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

/// The words a batch begins with on the device, u32 each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub total_tokens: u32,
    pub num_seqs: u32,
    pub max_seqlen: u32,
    /// Bit 0: the batch has token type ids.
    pub flags: u32,
}

impl Header {
    /// Words of the header; those after the four fields are 0.
    pub const NUM_WORDS: usize = 8;
    /// Bit of `flags`: the batch has token type ids.
    pub const HAS_TOKEN_TYPES: u32 = 1;
}

/// One CUDA device, opened: its primary context, which candle shares where both are in use.
#[derive(Clone)]
pub struct Gpu {
    context: Arc<CudaContext>,
}

impl Gpu {
    /// Opens a device by its ordinal.
    ///
    /// Blocks: the first opening of a device takes some hundred milliseconds.
    /// Errors: [`Error::Internal`] where the driver or the device is missing.
    pub fn open(ordinal: usize) -> Result<Self> {
        let context = CudaContext::new(ordinal)?;
        // SAFETY: what is allocated through this context is used on streams that this module orders by its own
        // events, and freed after they are synchronised (`arena`, `staging`, `engine`).
        unsafe { context.disable_event_tracking() };
        Ok(Self { context })
    }

    /// cudarc's context, for the files of this folder.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// A stream of its own, not ordered with the null stream.
    pub fn new_stream(&self) -> Result<Arc<CudaStream>> {
        Ok(self.context.new_stream()?)
    }

    /// The device's name as the driver has it: "NVIDIA H100 80GB HBM3".
    pub fn name(&self) -> Result<String> {
        Ok(self.context.name()?)
    }

    /// Where the device is on the PCI bus, as NVML writes it: "00000000:3B:00.0".
    pub fn pci_bus_id(&self) -> Result<String> {
        let attribute = |name| self.context.attribute(name);
        let domain = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?;
        let bus = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?;
        let device = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?;
        Ok(format!("{domain:08X}:{bus:02X}:{device:02X}.0"))
    }

    /// Bytes of device memory that are free now, of the whole device.
    pub fn free_bytes(&self) -> Result<usize> {
        Ok(self.context.mem_get_info()?.0)
    }

    /// The driver's CUDA version as one number: 13000 for 13.0.
    pub fn driver_version(&self) -> Result<i32> {
        let mut version = 0;
        // SAFETY: the driver writes one integer through the pointer, which lives until the call returns.
        unsafe { cudarc::driver::sys::cuDriverGetVersion(&mut version) }.result()?;
        Ok(version)
    }
}

/// Refuses a span too small or not aligned for `num_bytes` of 16-byte loads, naming the op and the operand.
pub(crate) fn check_span(op: &'static str, operand: &'static str, span: Span, num_bytes: usize) -> Result<()> {
    let fault = |expected: String, got: String| Err(Error::Shape { op, operand, expected, got });
    if span.is_null() {
        return fault(format!("{num_bytes} bytes"), "a null pointer".to_string());
    }
    if !span.ptr.is_multiple_of(16) {
        return fault("an address that is a multiple of 16".to_string(), format!("{:#x}", span.ptr));
    }
    if span.num_bytes < num_bytes {
        return fault(format!("{num_bytes} bytes"), format!("{} bytes", span.num_bytes));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_lie_inside() {
        let span = Span { ptr: 256, num_bytes: 64 };
        assert_eq!(span.part(16, 48).unwrap(), Span { ptr: 272, num_bytes: 48 });
        assert!(span.part(17, 48).is_err());
        assert!(span.part(usize::MAX, 2).is_err());
    }

    #[test]
    fn spans_are_checked_by_name() {
        let span = Span { ptr: 256, num_bytes: 64 };
        assert!(check_span("op", "x", span, 64).is_ok());
        for (bad, bytes, part) in
            [(span, 65, "65 bytes"), (Span { ptr: 264, ..span }, 8, "multiple of 16"), (Span::NULL, 0, "null")]
        {
            let error = check_span("op", "x", bad, bytes).unwrap_err().to_string();
            assert!(error.starts_with("op: x: ") && error.contains(part), "{error}");
        }
    }
}
