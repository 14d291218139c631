//! The CUDA kernels on the CPU: `tests/kernels/<name>.cpp` compiles kernels/*.cu with a plain C++ compiler and compares
//! each with a double-precision reference. No GPU, no CUDA.

use std::path::Path;
use std::process::Command;

/// Compiles one of the programs and runs it; it ends with 1 and a line at the first wrong value.
#[track_caller]
fn run(name: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join(name);
    let mut compiler = Command::new("c++");
    compiler.args(["-std=c++17", "-O2", "-DEREMOIS_EMULATE", "-ffp-contract=off"]);
    compiler.arg("-Wall").arg("-Wno-unknown-pragmas").arg("-Werror");
    compiler.arg("-I").arg(root.join("tests/kernels")).arg("-I").arg(root.join("kernels"));
    compiler.arg("-o").arg(&program).arg(root.join(format!("tests/kernels/{name}.cpp")));
    let output = compiler.output().expect("a C++ compiler, `c++`, is on PATH");
    assert!(output.status.success(), "{compiler:?}\n{}", String::from_utf8_lossy(&output.stderr));
    let output = Command::new(&program).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name}: {stdout}{stderr}");
}

#[test]
fn row_kernels_equal_their_references() {
    run("rows");
}

#[test]
fn attention_equals_its_reference() {
    run("attention");
}
