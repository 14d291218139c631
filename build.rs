//! Tells the crate which commit it is built from, `BUILD_COMMIT`, makes the gRPC service's code of its `.proto`, and with
//! the feature `cuda` compiles the kernels.
//!
//! `cargo run` hands the variable on to the program, which refuses `EREMOIS_` variables it does not know: it has
//! another beginning.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// Compute capabilities the kernels are compiled for: Ampere, its workstation kind, Ada, Hopper. The last one's PTX is
/// kept too, which the driver compiles for anything newer.
const CUDA_ARCHS: &str = "80,86,89,90";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // In a debug build the commit would cost a rebuild of everything at each commit and tell its only reader nothing.
    let release = env::var("PROFILE").is_ok_and(|profile| profile == "release");
    let commit = if release { commit().unwrap_or_else(|| "unknown".to_string()) } else { "debug".to_string() };
    println!("cargo:rustc-env=BUILD_COMMIT={commit}");
    if let Err(fault) = compile_proto() {
        eprintln!("error: {PROTO}: {fault}");
        exit(1);
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_some()
        && let Err(fault) = compile_kernels()
    {
        eprintln!("error: {fault}");
        exit(1);
    }
}

/// The gRPC service of the Open Inference Protocol.
const PROTO: &str = "src/api/oip/grpc/inference.proto";

/// Writes the service's code and its descriptor, for reflection, to `OUT_DIR`.
fn compile_proto() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed={PROTO}");
    let folder = Path::new(PROTO).parent().ok_or("a file without a folder")?;
    let mut compiler = protox::Compiler::new([folder])?;
    compiler.include_imports(true).include_source_info(true).open_file(PROTO)?;
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    std::fs::write(out_dir.join("inference.bin"), compiler.encode_file_descriptor_set())?;
    // Tensors stay where they were received.
    let raw = ["ModelInferRequest.raw_input_contents", "ModelInferResponse.raw_output_contents"];
    let configured = raw.iter().fold(tonic_prost_build::configure(), |c, field| c.bytes(format!(".inference.{field}")));
    configured.compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}

/// Compiles each `kernels/<op>.cu` to `OUT_DIR/<op>.fatbin`, one after another; nvcc takes the architectures of one
/// side by side. `CUDA_ARCHS=90` in the environment narrows them for a quick build.
fn compile_kernels() -> Result<(), String> {
    // A folder stands for all files in it: an op depends on the headers as well.
    println!("cargo:rerun-if-changed=kernels");
    for variable in ["CUDA_ARCHS", "NVCC", "CUDA_HOME"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let archs = env::var("CUDA_ARCHS").unwrap_or_else(|_| CUDA_ARCHS.to_string());
    let code = gencode(&archs)?;
    let (nvcc, out_dir) = (nvcc(), PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?));
    let jobs = env::var("NUM_JOBS").unwrap_or_else(|_| "1".to_string());
    let entries = std::fs::read_dir("kernels").map_err(|error| format!("kernels/: {error}"))?;
    let mut sources: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    sources.sort();
    for source in sources {
        let fatbin = out_dir.join(source.with_extension("fatbin").file_name().ok_or("a kernel without a name")?);
        let mut command = Command::new(&nvcc);
        command.args(["-O3", "-std=c++17", "-fatbin", "--threads", &jobs]).args(&code);
        let output = command.arg("-o").arg(&fatbin).arg(&source).output().map_err(|error| {
            format!(
                "the feature `cuda` needs nvcc, and `{}` does not run ({error}): eval \"$(scripts/cuda-toolkit)\"",
                nvcc.display()
            )
        })?;
        if !output.status.success() {
            let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            return Err(format!("{command:?} failed\n{stdout}{stderr}"));
        }
    }
    Ok(())
}

/// nvcc as scripts/cuda-toolkit names it, of a toolkit's folder, or of PATH.
fn nvcc() -> PathBuf {
    match (env::var_os("NVCC"), env::var_os("CUDA_HOME")) {
        (Some(nvcc), _) => PathBuf::from(nvcc),
        (None, Some(home)) => Path::new(&home).join("bin/nvcc"),
        (None, None) => PathBuf::from("nvcc"),
    }
}

/// nvcc's words for "80,90": machine code for each, PTX of the newest.
fn gencode(archs: &str) -> Result<Vec<String>, String> {
    let parse = |arch: &str| {
        let arch = arch.trim();
        arch.parse::<u32>()
            .map_err(|_| format!("CUDA_ARCHS: `{arch}` in `{archs}` is no compute capability such as 90"))
    };
    let numbers = archs.split(',').map(parse).collect::<Result<Vec<u32>, String>>()?;
    let newest = numbers.iter().max().copied().unwrap_or_default();
    let mut code: Vec<String> =
        numbers.iter().map(|arch| format!("-gencode=arch=compute_{arch},code=sm_{arch}")).collect();
    code.push(format!("-gencode=arch=compute_{newest},code=compute_{newest}"));
    Ok(code)
}

/// `None` outside git, or without git: a source archive builds as well.
fn commit() -> Option<String> {
    // A worktree keeps HEAD in one folder and the branches in another.
    for (folder, watched) in
        [("--git-dir", "HEAD"), ("--git-common-dir", "refs/heads"), ("--git-common-dir", "packed-refs")]
    {
        let path = Path::new(&git(&["rev-parse", folder])?).join(watched);
        if path.exists() {
            println!("cargo:rerun-if-changed={}", path.display());
        }
    }
    git(&["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let text = text.trim();
    (output.status.success() && !text.is_empty()).then(|| text.to_string())
}
