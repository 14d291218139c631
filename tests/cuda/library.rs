//! The emulated driver as a folder of shared libraries, compiled by the host's C++ compiler when its sources change.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The parts of the library, and how hard each is optimised: the products take most of the time.
const UNITS: [(&str, &[&str]); 8] = [
    ("kernels", &["-O2"]),
    ("cublaslt", &["-O3", "-march=native"]),
    ("context", &["-O1"]),
    ("copies", &["-O1"]),
    ("graph", &["-O1"]),
    ("memory", &["-O1"]),
    ("settings", &["-O1"]),
    ("stream", &["-O1"]),
];
/// The names the binary opens. All are one file, so that a stream of the one is a stream of the other.
const NAMES: [&str; 6] =
    ["libcuda.so.1", "libcublas.so.12", "libcublas.so.13", "libcublasLt.so.12", "libcublasLt.so.13", "libcurand.so.10"];

/// The folder for LD_LIBRARY_PATH, outside the tree.
pub fn folder() -> PathBuf {
    let (sources, parent) = (sources(), Path::new(env!("CARGO_TARGET_TMPDIR")));
    let names = functions(Path::new(env!("CARGO_BIN_EXE_eremois")));
    let mut hasher = DefaultHasher::new();
    (&sources, &names, UNITS).hash(&mut hasher);
    let folder = parent.join(format!("cuda-emulator-{:016x}", hasher.finish()));

    // Each test is a process: the first compiles, the others wait.
    let lock = fs::File::create(parent.join("cuda-emulator.lock")).expect("a file in cargo's folder for tests");
    lock.lock().expect("locked");
    if !folder.join(NAMES[0]).exists() {
        let part = tempfile::tempdir_in(parent).expect("a folder in cargo's folder for tests");
        compile(part.path(), &names);
        for name in NAMES {
            std::os::unix::fs::symlink("libemulator.so", part.path().join(name)).expect("a link");
        }
        fs::rename(part.keep(), &folder).expect("renamed");
    }
    // Under a name that does not change, for whoever runs other tests on it.
    let (latest, new) = (parent.join("cuda-emulator"), parent.join("cuda-emulator.new"));
    if !fs::read_link(&latest).is_ok_and(|to| to == folder) {
        let _ = fs::remove_file(&new); // of a run that was ended here
        std::os::unix::fs::symlink(&folder, &new).expect("a link");
        fs::rename(new, latest).expect("renamed");
    }
    folder
}

/// Compiles a program of this folder against the library, into `to`.
pub fn program(name: &str, library: &Path, to: &Path) -> PathBuf {
    let program = to.join(name);
    let mut compiler = Command::new("c++");
    compiler.args(["-std=c++17", "-O1", "-pthread", "-Wall", "-Werror", "-o"]).arg(&program);
    compiler.arg(root().join(format!("tests/cuda/{name}.cpp"))).arg(library.join("libemulator.so"));
    finish(compiler.stderr(Stdio::piped()).spawn().expect("a C++ compiler, `c++`, is on PATH"), name);
    program
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file that the library is made of.
fn sources() -> Vec<(PathBuf, Vec<u8>)> {
    let folders = ["tests/cuda", "tests/kernels", "kernels"].map(|folder| root().join(folder));
    let files = folders.iter().flat_map(|folder| fs::read_dir(folder).expect("a folder of the project"));
    let paths: BTreeSet<PathBuf> = files.map(|entry| entry.expect("listed").path()).collect();
    let is_source =
        |path: &PathBuf| path.extension().is_some_and(|e| ["cpp", "h", "cu", "cuh"].iter().any(|s| e == *s));
    paths.into_iter().filter(is_source).map(|path| (path.clone(), fs::read(path).expect("read"))).collect()
}

/// The functions of CUDA's libraries whose names are in the binary: it can call no other.
fn functions(binary: &Path) -> BTreeSet<String> {
    let bytes = fs::read(binary).expect("the binary is there");
    let words = bytes.split(|&byte| byte == 0).filter(|word| (4..80).contains(&word.len()));
    let is_function = |word: &str| {
        let is_ours = word.strip_prefix("cu").is_some_and(|rest| {
            rest.starts_with(|c: char| c.is_ascii_uppercase()) || rest.starts_with("blas") || rest.starts_with("rand")
        });
        (is_ours || word.starts_with("nvrtc")) && word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    let names = words.filter_map(|word| std::str::from_utf8(word).ok()).filter(|word| is_function(word));
    names.map(str::to_string).collect()
}

fn compile(to: &Path, functions: &BTreeSet<String>) {
    // Weak, so that a function that is emulated takes the place of its line here. A call of any other must not go to
    // the status that stands in for a missing library: nobody would see that the test computes nothing.
    let mut others = "extern \"C\" void emulator_unemulated(const char*);\n".to_string();
    for name in functions {
        writeln!(others, "extern \"C\" __attribute__((weak)) void {name}() {{ emulator_unemulated(\"{name}\"); }}")
            .expect("a string takes everything");
    }
    let others_file = to.join("others.cpp");
    fs::write(&others_file, others).expect("written");

    let mut units: Vec<(&str, PathBuf, &[&str])> = vec![("others", others_file, &["-O0"])];
    units.extend(UNITS.map(|(name, options)| (name, root().join(format!("tests/cuda/{name}.cpp")), options)));
    let children: Vec<(&str, Child)> = units
        .iter()
        .map(|(name, source, options)| {
            let mut compiler = Command::new("c++");
            compiler.args(["-std=c++17", "-fPIC", "-pthread", "-ffp-contract=off"]).args(*options);
            compiler.args(["-DEREMOIS_EMULATE", "-Wall", "-Wno-unknown-pragmas", "-Werror"]);
            compiler.arg("-I").arg(root().join("tests/kernels")).arg("-I").arg(root().join("kernels"));
            compiler.arg("-c").arg(source).arg("-o").arg(to.join(format!("{name}.o"))).stderr(Stdio::piped());
            (*name, compiler.spawn().expect("a C++ compiler, `c++`, is on PATH"))
        })
        .collect();
    children.into_iter().for_each(|(name, child)| finish(child, name));
    let mut linker = Command::new("c++");
    linker.args(["-shared", "-pthread", "-Wl,-z,defs", "-o"]).arg(to.join("libemulator.so"));
    linker.args(units.iter().map(|(name, ..)| to.join(format!("{name}.o"))));
    finish(linker.stderr(Stdio::piped()).spawn().expect("the linker runs"), "libemulator.so");
}

fn finish(child: Child, what: &str) {
    let output = child.wait_with_output().expect("a child of ours");
    assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
}
