//! `scripts/gpu run` without a GPU: its whole flow over programs that stand in for the carried ones.

use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use sha2::{Digest, Sha256};

/// What libtest and tests/gpu.rs print without a device.
const TESTS_WITHOUT_A_DEVICE: &str =
    "#!/bin/sh\necho 'no CUDA device: CUDA_ERROR_NO_DEVICE'\necho 'test result: ok. 9 passed; 0 failed'\n";
const BENCH_WITHOUT_A_DEVICE: &str = "#!/bin/sh\necho '{\"error\": \"no CUDA device: made up\"}'\nexit 3\n";
const NO_PEER: &str = "#!/bin/sh\necho '{\"error\": \"missing: torch\"}'\nexit 3\n";

/// A folder as `scripts/gpu build` makes it, a place for the report, and a PATH with an `nvidia-smi`.
struct Machine {
    folder: tempfile::TempDir,
}

impl Machine {
    /// `tests` and `bench` are scripts in the place of the two binaries; the server is the real one.
    fn new(tests: &str, bench: &str) -> Self {
        let machine = Self { folder: tempfile::tempdir().unwrap() };
        std::fs::create_dir(machine.path("bin")).unwrap();
        std::fs::create_dir(machine.path("path")).unwrap();
        let server = format!("#!/bin/sh\nexec {} \"$@\"\n", env!("CARGO_BIN_EXE_eremois"));
        let mut entries = serde_json::Map::new();
        for (name, text) in [("eremois", server.as_str()), ("gpu-tests", tests), ("gpu-bench", bench)] {
            let text = text.replace("{folder}", machine.folder.path().to_str().unwrap());
            script(&machine.path("bin").join(name), &text);
            let digest = Sha256::digest(text.as_bytes()).iter().fold(String::new(), |mut hex, byte| {
                write!(hex, "{byte:02x}").expect("a String takes all that is written to it");
                hex
            });
            entries.insert(name.to_string(), serde_json::json!({"file": name, "sha256": digest}));
        }
        let manifest = serde_json::json!({
            "commit": "abc", "profile": "release", "archs": "90", "cuda": "13.0", "built": "now", "binaries": entries,
        });
        std::fs::write(machine.path("bin/manifest.json"), manifest.to_string()).unwrap();
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Puts an `nvidia-smi` on the PATH that finds one GPU.
    fn with_gpu(self) -> Self {
        script(
            &self.path("path/nvidia-smi"),
            "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 580.1, 81559 MiB, 1980 MHz, 2619 MHz, 700 W, 30'\n",
        );
        self
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let path = format!("{}:{}", self.path("path").display(), std::env::var("PATH").unwrap());
        let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/gpu"));
        command.arg("run").args(arguments).arg("--bin-dir").arg(self.path("bin")).arg("--out").arg(self.path("out"));
        script(&self.path("peer"), NO_PEER);
        command.arg("--peer").arg(self.path("peer"));
        command.env("PATH", path).output().unwrap()
    }

    fn readme(&self) -> String {
        std::fs::read_to_string(self.path("out/README.md")).unwrap()
    }

    fn report(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.path("out/report.json")).unwrap()).unwrap()
    }
}

fn script(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// The program that answers as a device would, with made-up numbers.
fn stand_in() -> String {
    format!("#!/bin/sh\nexec python3 {}/benches/gpu/stand_in.py eremois\n", env!("CARGO_MANIFEST_DIR"))
}

#[track_caller]
fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Each step's name and how it ended.
fn outcomes(report: &Value) -> Vec<(String, String)> {
    let word = |value: &Value| value.as_str().unwrap().to_string();
    report["steps"].as_array().unwrap().iter().map(|s| (word(&s["step"]), word(&s["outcome"]))).collect()
}

#[test]
fn a_dry_run_goes_through_every_step_and_says_that_its_numbers_are_made_up() {
    let machine = Machine::new(TESTS_WITHOUT_A_DEVICE, BENCH_WITHOUT_A_DEVICE);
    let output = machine.run(&["--dry-run", "--full"]);
    assert!(output.status.success(), "{}", text(&output));
    let (report, readme) = (machine.report(), machine.readme());
    for (step, outcome) in outcomes(&report) {
        assert_eq!(outcome, "done", "{step}: {}", text(&output));
    }
    let steps = ["facts", "binaries", "tests", "start", "peaks", "verify", "turns", "latency", "parts", "http"];
    for step in steps.into_iter().chain(["sentences", "sweep", "others", "more turns"]) {
        assert!(!report[step].is_null(), "{step} left nothing: {}", text(&output));
    }
    assert!(readme.contains("every time below is made up"), "{readme}");
    assert!(!readme.contains("| yes |"), "a made-up number meets no goal: {readme}");
    // The real programs were asked first.
    assert_eq!(report["tests"]["num_passed"], 9);
    assert!(report["start"]["gpu-bench"].as_str().unwrap().contains("no CUDA device"));
    assert!(report["start"]["peer"].as_str().unwrap().contains("missing: torch"));
    // The server and the load generator are the real ones, on the CPU.
    let load = &report["http"]["loads"][0];
    assert!(load["requests_per_s"].as_f64().unwrap() > 0.0 && load["error_rate"] == 0.0, "{load}");
    assert!(!load["server_cpu_s"].as_object().unwrap().is_empty(), "{load}");
    assert!(load["metrics"]["eremois_forward_seconds_sum"].as_f64().unwrap() > 0.0, "{load}");
    for heading in ["## Goals", "## Correctness", "## At saturation", "## Each kernel", "## Over HTTP", "## Steps"] {
        assert!(readme.contains(heading), "{heading} is missing: {readme}");
    }
}

#[test]
fn a_run_measures_and_tells_what_is_missing() {
    let tests = "#!/bin/sh\n[ \"$EREMOIS_TEST_GPU\" = 1 ] || exit 9\n\
                 echo 'BERT-base f16: smallest cosine to the CPU 0.999991'\necho 'test result: ok. 21 passed; 0 failed'\n";
    let machine = Machine::new(tests, &stand_in()).with_gpu();
    let output = machine.run(&["--only", "tests,peaks,verify,turns,latency,parts,sentences"]);
    assert!(output.status.success(), "{}", text(&output));
    let (report, readme) = (machine.report(), machine.readme());
    assert_eq!(report["facts"]["gpu"]["name"], "NVIDIA H100 80GB HBM3");
    assert_eq!(report["start"]["peers"]["missing"], "missing: torch");
    assert_eq!(report["tests"]["min_cosine_to_cpu"]["BERT-base f16"], 0.999991);
    assert_eq!(report["turns"][0]["missing"]["compiled"], "missing: torch");
    assert_eq!(report["turns"][0]["ours"].as_array().unwrap().len(), 3);
    assert!(outcomes(&report).contains(&("sentences".to_string(), "skipped: missing: torch".to_string())));
    assert!(report["http"].is_null());
    assert!(readme.contains("no peer") && readme.contains("| yes |") && !readme.contains("made up"), "{readme}");
}

#[test]
fn a_test_that_fails_ends_the_run_before_anything_is_timed() {
    let bench = format!("#!/bin/sh\ntouch {{folder}}/bench-ran\n{}", &stand_in()[10..]);
    let machine =
        Machine::new("#!/bin/sh\necho 'test result: FAILED. 8 passed; 1 failed'\nexit 101\n", &bench).with_gpu();
    let output = machine.run(&[]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(machine.readme().contains("Failed: tests: status 101"), "{}", machine.readme());
    assert!(!machine.path("bench-ran").exists(), "something was timed");
    assert!(std::fs::read_to_string(machine.path("out/tests.log")).unwrap().contains("FAILED"));
}

#[test]
fn rows_that_are_not_the_cpus_end_the_run() {
    let wrong = "import json, sys\nfor line in sys.stdin:\n    print(json.dumps({'rows': [[1.0]], 'min_cosine_to_cpu': None}), flush=True)\n";
    let bench = format!("#!/bin/sh\nexec python3 -c \"{wrong}\"\n");
    let machine = Machine::new(TESTS_WITHOUT_A_DEVICE, &bench).with_gpu();
    let output = machine.run(&["--only", "verify,turns"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(
        machine.report()["failed"].as_str().unwrap().contains("minilm-l6 f16: cosine None"),
        "{}",
        machine.readme()
    );
    assert!(machine.report()["turns"].is_null());
}

#[test]
fn a_worker_that_hangs_is_ended_and_the_rest_goes_on() {
    let hanging = format!(
        "#!/bin/sh\nexec python3 -c \"\nimport sys, time\nsys.path.insert(0, '{}/benches/gpu')\nimport json, stand_in\n\
         for line in sys.stdin:\n    ask = json.loads(line)\n    \
         if ask['do'] == 'peaks': time.sleep(600)\n    print(json.dumps(stand_in.answer('eremois', ask)), flush=True)\n\"\n",
        env!("CARGO_MANIFEST_DIR")
    );
    let machine = Machine::new(TESTS_WITHOUT_A_DEVICE, &hanging).with_gpu();
    let started = std::time::Instant::now();
    let output = machine.run(&["--only", "peaks,latency", "--ask-limit-s", "3"]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(started.elapsed().as_secs() < 60, "it waited for the worker");
    let report = machine.report();
    assert!(outcomes(&report).contains(&("peaks".to_string(), "skipped: no answer in 3 s".to_string())), "{report}");
    assert!(report["latency"][0]["ours"]["wall_p50_us"].as_f64().unwrap() > 0.0, "{report}");
}

#[test]
fn what_was_changed_since_the_build_is_not_run() {
    let machine = Machine::new(TESTS_WITHOUT_A_DEVICE, BENCH_WITHOUT_A_DEVICE);
    script(&machine.path("bin/gpu-tests"), "#!/bin/sh\n");
    let output = machine.run(&["--dry-run"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("gpu-tests: not the checksum"), "{}", text(&output));
}

#[test]
fn without_a_gpu_a_run_says_how_to_try_the_script() {
    let machine = Machine::new(TESTS_WITHOUT_A_DEVICE, BENCH_WITHOUT_A_DEVICE);
    script(&machine.path("path/nvidia-smi"), "#!/bin/sh\nexit 9\n");
    let output = machine.run(&[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("--dry-run"), "{}", text(&output));
    assert!(!machine.path("out").exists());
}
