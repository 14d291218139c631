//! Products `y = epilogue(x weightᵀ + bias)` by cuBLASLt, with descriptors and algorithms that are found once.

mod plan;

use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use cudarc::cublaslt::{result, sys};
use cudarc::driver::{CudaStream, sys::CUevent_flags};

use self::plan::{Handle, Plan};
use super::algorithms::Algorithms;
use super::arena::Arena;
use super::{Gpu, HalfType, Span, check_span};
use crate::{Error, Result};

/// Bytes cuBLASLt may use beside the operands: what NVIDIA advises for Hopper.
pub const WORKSPACE_BYTES: usize = 32 << 20;
/// Algorithms that are timed for a product.
const NUM_CANDIDATES: usize = 8;
/// Runs of a candidate between two events, after one that is not timed.
const NUM_RUNS: usize = 5;

/// What follows a product in the same kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Epilogue {
    None,
    Bias,
    BiasRelu,
    /// The tanh form; cuBLASLt has no exact GELU.
    BiasGeluTanh,
}

impl Epilogue {
    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Bias => "bias",
            Self::BiasRelu => "bias-relu",
            Self::BiasGeluTanh => "bias-gelu-tanh",
        }
    }

    fn sys(self) -> sys::cublasLtEpilogue_t {
        match self {
            Self::None => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT,
            Self::Bias => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            Self::BiasRelu => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_RELU_BIAS,
            Self::BiasGeluTanh => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_GELU_BIAS,
        }
    }
}

/// The sizes of a product: what a plan and an algorithm belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GemmShape {
    /// Rows of x and y: a bucket's capacity in tokens.
    pub rows: usize,
    /// Columns of y: the layer's out_features.
    pub columns: usize,
    /// Columns of x: the layer's in_features.
    pub depth: usize,
    pub epilogue: Epilogue,
}

impl fmt::Display for GemmShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}x{}x{}", self.epilogue.name(), self.rows, self.columns, self.depth)
    }
}

/// The operands of a product, row-major, all in the engine's 2-byte type.
#[derive(Debug, Clone, Copy)]
pub struct GemmOperands {
    /// [rows, depth]
    pub x: Span,
    /// [columns, depth]
    pub weight: Span,
    /// [columns]; null where the epilogue takes none.
    pub bias: Span,
    /// [rows, columns]; neither x nor weight.
    pub y: Span,
}

/// The products of one stream.
pub struct Gemm {
    // Dropped in this order: plans before the handle they were made with.
    plans: HashMap<GemmShape, Plan>,
    handle: Handle,
    stream: Arc<CudaStream>,
    dtype: HalfType,
    workspace: Span,
    _workspace: Arena,
    algorithms: Algorithms,
}

// SAFETY: cuBLASLt's handle and descriptors are tied to no thread, only to the context, which every call here binds;
// and all use of them goes through `&mut Gemm`, so by one thread at a time.
unsafe impl Send for Gemm {}

impl Gemm {
    /// Allocates the workspace and reads the algorithms kept in `dir`.
    ///
    /// Errors: [`Error::Internal`] where cuBLASLt or the memory is missing.
    pub fn new(gpu: &Gpu, stream: &Arc<CudaStream>, dtype: HalfType, dir: Option<&Path>) -> Result<Self> {
        gpu.context().bind_to_thread()?;
        let mut workspace = Arena::new(stream, WORKSPACE_BYTES)?;
        let span = workspace.cut(WORKSPACE_BYTES)?;
        let handle = Handle(result::create_handle()?);
        // SAFETY: takes nothing and returns a number.
        let version = unsafe { sys::cublasLtGetVersion() };
        let algorithms = Algorithms::open(dir, &gpu.name()?, gpu.driver_version()?, version);
        Ok(Self {
            plans: HashMap::new(),
            handle,
            stream: stream.clone(),
            dtype,
            workspace: span,
            _workspace: workspace,
            algorithms,
        })
    }

    /// Enqueues a product. The first of a shape finds its plan; later ones allocate nothing and can be captured.
    ///
    /// Errors: [`Error::Shape`] for operands too small for the shape, [`Error::Internal`] for cuBLASLt's own.
    pub fn launch(&mut self, shape: GemmShape, operands: &GemmOperands) -> Result<()> {
        check(shape, operands)?;
        if !self.plans.contains_key(&shape) {
            let plan = self.plan(shape, operands, Choice::First)?;
            self.plans.insert(shape, plan);
        }
        let plan = self.plans.get(&shape).expect("the plan was put there above");
        self.run(plan, &plan.algorithm, operands)
    }

    /// Finds the fastest algorithm of a shape by timing, unless one is kept. `y` is overwritten.
    ///
    /// Blocks: up to 8 algorithms of 6 runs each, on the stream, which must be idle for the times to mean anything.
    /// Errors: as [`Gemm::launch`].
    pub fn tune(&mut self, shape: GemmShape, operands: &GemmOperands) -> Result<()> {
        check(shape, operands)?;
        let plan = self.plan(shape, operands, Choice::Fastest)?;
        self.plans.insert(shape, plan);
        Ok(())
    }

    /// Writes what was timed to the file, for the next start.
    pub fn save(&mut self) {
        self.algorithms.save();
    }

    fn plan(&mut self, shape: GemmShape, operands: &GemmOperands, choice: Choice) -> Result<Plan> {
        self.stream.context().bind_to_thread()?;
        let mut plan = Plan::new(shape, self.dtype)?;
        let product = format!("{} {shape}", self.dtype.name());
        if let Some(words) = self.algorithms.get(&product)
            && let Some(algorithm) = plan.accepts(&self.handle, words)
        {
            plan.algorithm = algorithm;
            return Ok(plan);
        }
        plan.set_bias(operands.bias)?;
        let candidates = plan.candidates(&self.handle)?;
        let Some(first) = candidates.first() else {
            return Err(Error::Internal { cause: format!("cuBLASLt has no algorithm for the product {product}") });
        };
        plan.algorithm = *first;
        if choice == Choice::Fastest {
            let mut best: Option<(f32, sys::cublasLtMatmulAlgo_t)> = None;
            for algorithm in candidates {
                // One that fails to run is no candidate; if all do, the caller's own launch says why.
                let Ok(took) = self.time(&plan, &algorithm, operands) else { continue };
                if best.is_none_or(|(best, _)| took < best) {
                    best = Some((took, algorithm));
                }
            }
            if let Some((took_ms, algorithm)) = best {
                tracing::debug!(product, took_us = f64::from(took_ms) * 1e3, "product timed");
                plan.algorithm = algorithm;
                self.algorithms.put(product, algorithm.data);
            }
        }
        Ok(plan)
    }

    /// Milliseconds of one run.
    fn time(&self, plan: &Plan, algorithm: &sys::cublasLtMatmulAlgo_t, operands: &GemmOperands) -> Result<f32> {
        self.run(plan, algorithm, operands)?;
        let start = self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
        for _ in 0..NUM_RUNS {
            self.run(plan, algorithm, operands)?;
        }
        let end = self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
        Ok(start.elapsed_ms(&end)? / NUM_RUNS as f32)
    }

    fn run(&self, plan: &Plan, algorithm: &sys::cublasLtMatmulAlgo_t, operands: &GemmOperands) -> Result<()> {
        plan.set_bias(operands.bias)?;
        let (alpha, beta) = (1f32, 0f32);
        let y = operands.y.ptr as *mut c_void;
        // SAFETY: `check` proved that each operand holds the layout's elements; weight and x are read, y is written and
        // neither of them; the scalars are f32 as the descriptor says and are read before the call returns; the
        // workspace belongs to this stream alone. The owner of the spans keeps them alive until the stream is done.
        unsafe {
            result::matmul(
                self.handle.0,
                plan.desc.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                operands.weight.ptr as *const c_void,
                plan.weight.0,
                operands.x.ptr as *const c_void,
                plan.x.0,
                y,
                plan.y.0,
                y,
                plan.y.0,
                algorithm,
                self.workspace.ptr as *mut c_void,
                self.workspace.num_bytes,
                self.stream.cu_stream().cast(),
            )
        }?;
        Ok(())
    }
}

/// How an algorithm is chosen where none is kept.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Choice {
    /// cuBLASLt's first guess.
    First,
    Fastest,
}

/// Refuses operands that do not hold the shape.
fn check(shape: GemmShape, operands: &GemmOperands) -> Result<()> {
    const OP: &str = "gemm";
    let GemmShape { rows, columns, depth, epilogue } = shape;
    for (operand, size) in [("rows", rows), ("columns", columns), ("depth", depth)] {
        if size == 0 || size > i32::MAX as usize {
            return Err(Error::Shape {
                op: OP,
                operand,
                expected: "1 to 2147483647".to_string(),
                got: size.to_string(),
            });
        }
    }
    check_span(OP, "x", operands.x, rows * depth * HalfType::NUM_BYTES)?;
    check_span(OP, "weight", operands.weight, columns * depth * HalfType::NUM_BYTES)?;
    check_span(OP, "y", operands.y, rows * columns * HalfType::NUM_BYTES)?;
    match epilogue {
        Epilogue::None => Ok(()),
        _ => check_span(OP, "bias", operands.bias, columns * HalfType::NUM_BYTES),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_are_checked_by_name() {
        let shape = GemmShape { rows: 4, columns: 8, depth: 16, epilogue: Epilogue::Bias };
        let span = |num_bytes| Span { ptr: 256, num_bytes };
        let fit = GemmOperands { x: span(128), weight: span(256), bias: span(16), y: span(64) };
        assert!(check(shape, &fit).is_ok());
        for (operands, part) in [
            (GemmOperands { x: span(127), ..fit }, "gemm: x: expected 128"),
            (GemmOperands { weight: span(255), ..fit }, "gemm: weight"),
            (GemmOperands { bias: Span::NULL, ..fit }, "gemm: bias"),
            (GemmOperands { y: span(63), ..fit }, "gemm: y"),
        ] {
            let error = check(shape, &operands).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        let without = GemmShape { epilogue: Epilogue::None, ..shape };
        assert!(check(without, &GemmOperands { bias: Span::NULL, ..fit }).is_ok());
        assert!(check(GemmShape { rows: 0, ..shape }, &fit).unwrap_err().to_string().contains("rows"));
        assert_eq!(shape.to_string(), "bias 4x8x16");
    }
}
