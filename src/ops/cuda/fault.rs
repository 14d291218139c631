//! What the driver's and the libraries' errors mean for the process: a want of memory that a smaller batch may not have,
//! a context that is of no use any more, or a failure of one call.
//!
//! Compared by number, not by name: which names there are depends on the version of CUDA the bindings were chosen for.

use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::sys::cublasStatus_t;
use cudarc::driver::DriverError;

use crate::Error;

/// CUDA_ERROR_OUT_OF_MEMORY
const OUT_OF_MEMORY: u32 = 2;

/// Errors after which every call of this process on the device fails, whatever it is: the primary context is shared by
/// all of the process and cannot be made anew while anything of it is held.
///
/// Source: CUDA Driver API, Data types used by CUDA driver, `CUresult`. Of those marked "doc" it says that the process
/// must be ended and started again to go on with CUDA; the others are what is seen of a device or a driver that is gone.
const LOST: [u32; 18] = [
    4,   // DEINITIALIZED: the driver is shutting down
    214, // ECC_UNCORRECTABLE: memory that is in use has changed
    220, // NVLINK_UNCORRECTABLE: as above, on the way
    226, // CONTAINED: doc
    700, // ILLEGAL_ADDRESS: doc
    702, // LAUNCH_TIMEOUT: doc
    709, // CONTEXT_IS_DESTROYED: by somebody else in this process
    710, // ASSERT: doc: all existing device memory is invalid
    714, // HARDWARE_STACK_ERROR: doc
    715, // ILLEGAL_INSTRUCTION: doc
    716, // MISALIGNED_ADDRESS: doc
    717, // INVALID_ADDRESS_SPACE: doc
    718, // INVALID_PC: doc
    719, // LAUNCH_FAILED: doc
    721, // TENSOR_MEMORY_LEAK: doc
    810, // MPS_CLIENT_TERMINATED: doc
    911, // EXTERNAL_DEVICE: doc
    999, // UNKNOWN: what a device that fell off the bus answers
];

/// Sorts an error of the driver; `cause` is what is told of it.
fn of_driver(error: DriverError, cause: String) -> Error {
    let number = error.0 as u32;
    if number == OUT_OF_MEMORY {
        return Error::OutOfMemory { cause };
    }
    match LOST.contains(&number) {
        true => Error::DeviceLost { cause },
        false => Error::Internal { cause },
    }
}

impl From<DriverError> for Error {
    fn from(error: DriverError) -> Self {
        of_driver(error, format!("CUDA: {error}"))
    }
}

impl From<CublasError> for Error {
    /// A failed execution may be of a lost device or of one launch alone: the stream says which, as soon as somebody
    /// waits for it (`engine`).
    fn from(error: CublasError) -> Self {
        let cause = format!("cuBLASLt: {error}");
        match error.0 {
            cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => Error::OutOfMemory { cause },
            _ => Error::Internal { cause },
        }
    }
}

/// An error of candle's CUDA device that means more than a failed call.
pub(in crate::ops) fn of_candle(error: &candle_core::Error) -> Option<Error> {
    use candle_core::cuda_backend::CudaError;

    let error = match error {
        candle_core::Error::WithBacktrace { inner, .. } => return of_candle(inner),
        candle_core::Error::Cuda(error) => error,
        _ => return None,
    };
    match error.downcast_ref::<CudaError>()? {
        CudaError::Cuda(cuda) | CudaError::Load { cuda, .. } => Some(Error::from(*cuda)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cudarc::driver::sys::CUresult;

    /// The text is given: without a driver nobody knows the errors' own.
    fn sorted(error: CUresult) -> Error {
        of_driver(DriverError(error), "why".to_string())
    }

    #[test]
    fn a_want_of_memory_a_lost_device_and_a_failed_call_are_told_apart() {
        let cause = || "why".to_string();
        assert_eq!(sorted(CUresult::CUDA_ERROR_OUT_OF_MEMORY), Error::OutOfMemory { cause: cause() });
        for lost in [
            CUresult::CUDA_ERROR_DEINITIALIZED,
            CUresult::CUDA_ERROR_ECC_UNCORRECTABLE,
            CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE,
            CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
            CUresult::CUDA_ERROR_LAUNCH_TIMEOUT,
            CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED,
            CUresult::CUDA_ERROR_ASSERT,
            CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR,
            CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION,
            CUresult::CUDA_ERROR_MISALIGNED_ADDRESS,
            CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE,
            CUresult::CUDA_ERROR_INVALID_PC,
            CUresult::CUDA_ERROR_LAUNCH_FAILED,
            CUresult::CUDA_ERROR_MPS_CLIENT_TERMINATED,
            CUresult::CUDA_ERROR_EXTERNAL_DEVICE,
            CUresult::CUDA_ERROR_UNKNOWN,
        ] {
            assert_eq!(sorted(lost), Error::DeviceLost { cause: cause() }, "{}", lost as u32);
        }
        for call in [
            CUresult::CUDA_ERROR_INVALID_VALUE,
            CUresult::CUDA_ERROR_NO_DEVICE,
            CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
            CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
        ] {
            assert_eq!(sorted(call), Error::Internal { cause: cause() }, "{}", call as u32);
        }
        assert!(LOST.windows(2).all(|w| w[0] < w[1]), "sorted, each once");
    }

    #[test]
    fn a_library_without_memory_is_a_want_of_memory() {
        let error = Error::from(CublasError(cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED));
        assert!(matches!(error, Error::OutOfMemory { .. }), "{error:?}");
        let error = Error::from(CublasError(cublasStatus_t::CUBLAS_STATUS_EXECUTION_FAILED));
        assert!(matches!(error, Error::Internal { .. }), "{error:?}");
    }

    #[test]
    fn candles_errors_are_seen_through_their_boxes() {
        let driver = DriverError(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
        let error = candle_core::Error::from(candle_core::cuda_backend::CudaError::Cuda(driver));
        assert!(matches!(Error::from(error.bt()), Error::DeviceLost { .. }));
        let other = candle_core::Error::Msg("no".to_string());
        assert_eq!(Error::from(other), Error::Internal { cause: "no".to_string() });
    }
}
