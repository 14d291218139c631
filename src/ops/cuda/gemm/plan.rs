//! cuBLASLt's descriptors and handles, owned, and what it proposes and accepts for a product.

use cudarc::cublaslt::{result, sys};

use super::super::algorithms::Words;
use super::{Epilogue, GemmShape, NUM_CANDIDATES, WORKSPACE_BYTES};
use crate::Result;
use crate::ops::cuda::{HalfType, Span};

/// `cublasOperation_t`, which cudarc's cuBLASLt bindings leave to its cuBLAS ones: as it is, and transposed.
const OP_N: i32 = 0;
const OP_T: i32 = 1;

/// The descriptors of a shape and the algorithm chosen for it.
///
/// cuBLASLt thinks in columns: a row-major [rows, columns] is its columns x rows. So `y = x weightᵀ` is its
/// `y = weightᵀ x` with the first operand transposed, and the bias, one value a column of ours, one a row of its.
pub(super) struct Plan {
    pub(super) desc: Desc,
    pub(super) weight: MatrixLayout,
    pub(super) x: MatrixLayout,
    pub(super) y: MatrixLayout,
    has_bias: bool,
    pub(super) algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Plan {
    pub(super) fn new(shape: GemmShape, dtype: HalfType) -> Result<Self> {
        let GemmShape { rows, columns, depth, epilogue } = shape;
        let half = match dtype {
            HalfType::F16 => sys::cudaDataType_t::CUDA_R_16F,
            HalfType::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
        };
        let layout = |rows: usize, columns: usize| -> Result<MatrixLayout> {
            Ok(MatrixLayout(result::create_matrix_layout(half, rows as u64, columns as u64, rows as i64)?))
        };
        let f32 = sys::cudaDataType_t::CUDA_R_32F;
        let desc = Desc(result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32)?);
        desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, &OP_T)?;
        desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB, &OP_N)?;
        desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue.sys())?;
        Ok(Self {
            desc,
            weight: layout(depth, columns)?,
            x: layout(depth, rows)?,
            y: layout(columns, rows)?,
            has_bias: epilogue != Epilogue::None,
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        })
    }

    /// The bias belongs to the descriptor, which layers of one shape share: set before every run, read by the call.
    pub(super) fn set_bias(&self, bias: Span) -> Result<()> {
        match self.has_bias {
            true => self.desc.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias.ptr),
            false => Ok(()),
        }
    }

    /// A kept algorithm, if this library still takes it within the workspace.
    pub(super) fn accepts(&self, handle: &Handle, words: Words) -> Option<sys::cublasLtMatmulAlgo_t> {
        let algorithm = sys::cublasLtMatmulAlgo_t { data: words };
        let mut checked = no_heuristic();
        // SAFETY: all descriptors are alive, and the result is written to a value of its type.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                handle.0,
                self.desc.0,
                self.weight.0,
                self.x.0,
                self.y.0,
                self.y.0,
                &algorithm,
                &mut checked,
            )
        };
        (status.result().is_ok() && checked.workspaceSize <= WORKSPACE_BYTES).then_some(algorithm)
    }

    /// What cuBLASLt proposes, its favourite first.
    pub(super) fn candidates(&self, handle: &Handle) -> Result<Vec<sys::cublasLtMatmulAlgo_t>> {
        let preference = Preference(result::create_matmul_pref()?);
        let mut found = [no_heuristic(); NUM_CANDIDATES];
        let mut num_found = 0;
        // SAFETY: the preference is alive and takes a usize for this attribute. All descriptors are alive; the library
        // writes at most as many results as it is told there is room for.
        unsafe {
            result::set_matmul_pref_attribute(
                preference.0,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const WORKSPACE_BYTES_VALUE).cast(),
                size_of::<usize>(),
            )?;
            sys::cublasLtMatmulAlgoGetHeuristic(
                handle.0,
                self.desc.0,
                self.weight.0,
                self.x.0,
                self.y.0,
                self.y.0,
                preference.0,
                NUM_CANDIDATES as i32,
                found.as_mut_ptr(),
                &mut num_found,
            )
            .result()?;
        }
        let found = &found[..(num_found.max(0) as usize).min(NUM_CANDIDATES)];
        Ok(found.iter().filter(|h| h.state.result().is_ok()).map(|h| h.algo).collect())
    }
}

/// [`WORKSPACE_BYTES`] with an address.
static WORKSPACE_BYTES_VALUE: usize = WORKSPACE_BYTES;

fn no_heuristic() -> sys::cublasLtMatmulHeuristicResult_t {
    sys::cublasLtMatmulHeuristicResult_t {
        algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        workspaceSize: 0,
        state: sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
        wavesCount: 0.0,
        reserved: [0; 4],
    }
}

pub(super) struct Handle(pub(super) sys::cublasLtHandle_t);
pub(super) struct Desc(pub(super) sys::cublasLtMatmulDesc_t);
pub(super) struct MatrixLayout(pub(super) sys::cublasLtMatrixLayout_t);
struct Preference(sys::cublasLtMatmulPreference_t);

impl Desc {
    fn set<T>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<()> {
        // SAFETY: the descriptor is alive; the library copies `size_of::<T>()` bytes of a value that is borrowed for the
        // call. Callers pass the type that the attribute is documented with: 32-bit enums and a 64-bit pointer.
        unsafe { result::set_matmul_desc_attribute(self.0, attribute, (&raw const *value).cast(), size_of::<T>()) }?;
        Ok(())
    }
}

// A failure to destroy leaks some bytes and is no reason to panic while dropping.
impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: created by `create_handle`, destroyed once, and every plan made with it is gone (see `Gemm`).
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

impl Drop for Desc {
    fn drop(&mut self) {
        // SAFETY: created by `create_matmul_desc` and destroyed once; enqueued products do not read it any more.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

impl Drop for MatrixLayout {
    fn drop(&mut self) {
        // SAFETY: created by `create_matrix_layout` and destroyed once; enqueued products do not read it any more.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created by `create_matmul_pref` and destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
