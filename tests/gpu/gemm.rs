//! cuBLASLt's products with their epilogues.

use eremois::ops::cuda::gemm::{Epilogue, Gemm, GemmOperands, GemmShape};
use eremois::ops::cuda::{HalfType, Span};
use eremois::ops::linear::Activation;

use super::desk::{Desk, TYPES, cases, gpu, rounded};
use super::exact;

const EPILOGUES: [(Epilogue, Activation); 4] = [
    (Epilogue::None, Activation::None),
    (Epilogue::Bias, Activation::None),
    (Epilogue::BiasRelu, Activation::Relu),
    (Epilogue::BiasGeluTanh, Activation::GeluTanh),
];

/// Rows, columns, depth: rows are a bucket's and so multiples of 8 in the engine; odd ones must work as well.
const SHAPES: [(usize, usize, usize); 8] = [
    (16, 32, 64),
    (1, 64, 32),
    (31, 96, 32),
    (33, 40, 128),
    (128, 1152, 384),
    (257, 384, 1536),
    (512, 768, 3072),
    (96, 4096, 1024),
];

/// cuBLASLt's tanh is the hardware's approximation, good to 11 bits.
fn tolerance(dtype: HalfType, epilogue: Epilogue) -> f64 {
    let tanh = if epilogue == Epilogue::BiasGeluTanh { 2e-3 } else { 0.0 };
    tanh + match dtype {
        HalfType::F16 => 5e-4,
        HalfType::Bf16 => 4e-3,
    }
}

/// A product's operands on a desk, with a poisoned result, and what it comes to.
fn operands(desk: &mut Desk, dtype: HalfType, shape: GemmShape, activation: Activation) -> (GemmOperands, Vec<f64>) {
    let GemmShape { rows, columns, depth, epilogue } = shape;
    let x = rounded(dtype, 1, rows * depth, 1.0);
    let weight = rounded(dtype, 2, columns * depth, (3.0 / depth as f32).sqrt());
    let bias = rounded(dtype, 3, columns, 1.0);
    let bias = (epilogue != Epilogue::None).then_some(bias);
    let expected = exact::linear(&x, &weight, bias.as_deref(), depth, activation);
    let operands = GemmOperands {
        x: desk.halves(dtype, &x, 0),
        weight: desk.halves(dtype, &weight, 0),
        bias: bias.map_or(Span::NULL, |bias| desk.halves(dtype, &bias, 0)),
        y: desk.poisoned(rows * columns),
    };
    (operands, expected)
}

#[test]
fn products_equal_f64() {
    let Some(gpu) = gpu() else { return };
    for dtype in TYPES {
        let Some(mut desk) = Desk::new() else { return };
        let mut gemm = Gemm::new(&gpu, &desk.stream, dtype, None).unwrap();
        for &(rows, columns, depth) in cases(&SHAPES, 4) {
            for (epilogue, activation) in EPILOGUES {
                let shape = GemmShape { rows, columns, depth, epilogue };
                let (operands, expected) = operands(&mut desk, dtype, shape, activation);
                gemm.launch(shape, &operands).unwrap();
                let tolerance = tolerance(dtype, epilogue);
                desk.assert_halves(dtype, operands.y, &expected, tolerance, &format!("product {shape}"));
            }
        }
    }
}

#[test]
fn the_fastest_algorithm_computes_the_product_and_is_kept() {
    let Some(gpu) = gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    for dtype in TYPES {
        for &(rows, columns, depth) in cases(&SHAPES, 2) {
            let Some(mut desk) = Desk::new() else { return };
            let shape = GemmShape { rows, columns, depth, epilogue: Epilogue::Bias };
            let mut results = Vec::new();
            // The second finds the first one's choice in the folder.
            for _ in 0..2 {
                let mut gemm = Gemm::new(&gpu, &desk.stream, dtype, Some(folder.path())).unwrap();
                let (operands, expected) = operands(&mut desk, dtype, shape, Activation::None);
                gemm.tune(shape, &operands).unwrap();
                gemm.save();
                let tolerance = tolerance(dtype, shape.epilogue);
                gemm.launch(shape, &operands).unwrap();
                desk.assert_halves(dtype, operands.y, &expected, tolerance, &format!("tuned {shape}"));
                results.push(desk.read_bits(operands.y));
            }
            assert!(results[0] == results[1], "{shape}: the kept algorithm computes the same bits");
        }
    }
    let files = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(files, 1, "one file for this GPU, driver and library");
}
