//! What this device reaches at all: the denominators of every share.

use eremois::Result;
use eremois::ops::cuda::gemm::{Epilogue, Gemm, GemmOperands, GemmShape};
use eremois::ops::cuda::{Gpu, HalfType, Span};
use serde_json::{Value, json};

use super::operands::Operands;
use super::timing::time;
use crate::Scale;

const SECONDS: f64 = 0.5;

/// The rate of an 8192³ product by cuBLASLt's fastest algorithm in both types, and of a copy within the device's memory,
/// bytes read and written both counted.
pub fn measure(gpu: &Gpu, scale: &Scale) -> Result<Value> {
    let (side, copy_bytes) = (scale.gemm_side, scale.copy_bytes);
    let stream = gpu.new_stream()?;
    let mut answer = json!({"gemm_side": side});
    for dtype in [HalfType::F16, HalfType::Bf16] {
        let mut operands = Operands::new(&stream, dtype);
        let mut gemm = Gemm::new(gpu, &stream, dtype, None)?;
        let shape = GemmShape { rows: side, columns: side, depth: side, epilogue: Epilogue::None };
        let mut set = || -> Result<GemmOperands> {
            let [x, weight, y] =
                [operands.halves(side * side)?, operands.halves(side * side)?, operands.halves(side * side)?];
            Ok(GemmOperands { x, weight, bias: Span::NULL, y })
        };
        let sets = [set()?, set()?];
        gemm.tune(shape, &sets[0])?;
        let spread = time(&stream, SECONDS, |i| gemm.launch(shape, &sets[i % 2]))?;
        let tflops = 2.0 * (side as f64).powi(3) / spread.median_us / 1e6;
        answer[format!("gemm_{}_tflop_per_s", dtype.name())] = json!(tflops);
        answer[format!("gemm_{}", dtype.name())] = json!(spread);
    }
    let from = stream.alloc_zeros::<u8>(copy_bytes)?;
    let mut to = stream.alloc_zeros::<u8>(copy_bytes)?;
    let spread = time(&stream, SECONDS, |_| Ok(stream.memcpy_dtod(&from, &mut to)?))?;
    answer["copy_gb_per_s"] = json!(2.0 * copy_bytes as f64 / spread.median_us / 1e3);
    answer["copy"] = json!(spread);
    Ok(answer)
}
