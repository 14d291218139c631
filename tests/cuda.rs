//! The CUDA engine without a GPU: the real binary on an emulated driver. tests/cuda/README.md says what this shows and
//! what it cannot.
#![cfg(feature = "cuda")]

mod common;
#[path = "cuda/library.rs"]
mod library;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use candle_core::quantized::gguf_file;
use common::process::{Answer, Client, LONG, Server, bundled_models, embeddings, text};
use eremois::model::InFlight;
use eremois::model::load::{Placement, load_for};
use eremois::model::pack::{PackedInput, RowSpec};
use eremois::model::repository::Repository;
use eremois::ops::device::{DeviceSpec, select};
use sha2::{Digest, Sha256};

/// A bundled model's settings on the emulated device, small enough to be computed by two cores.
const SETTINGS: &str = "\
[cache]
ttl = \"0s\"
[ai]
device = \"cuda:0\"
max_batch_tokens = 256
max_batch_size = 8
heartbeat_interval = \"1h\"
cache_dir = \"algorithms\"
[log]
filter = \"info\"
";

/// A server on the emulated driver.
struct Emulated {
    server: Server,
}

impl Emulated {
    fn start(settings: &str, variables: &[(&str, &str)]) -> Self {
        let mut all = vec![
            ("LD_LIBRARY_PATH", library::folder().display().to_string()),
            // In the server's own folder.
            ("EREMOIS_TEST_CUDA_REPORT", "report".to_string()),
            ("EREMOIS_TEST_CUDA_CONTROL", "control".to_string()),
        ];
        all.extend(variables.iter().map(|(name, value)| (*name, value.to_string())));
        Self { server: Server::start_with(settings, &all) }
    }

    fn ready(settings: &str, variables: &[(&str, &str)]) -> Self {
        Self { server: Self::start(settings, variables).server.wait_until_ready() }
    }

    /// What the driver is to do from now on: lines `name = number`.
    fn control(&self, lines: &str) {
        let dir = self.server.dir.path();
        std::fs::write(dir.join("control.new"), lines).expect("written");
        std::fs::rename(dir.join("control.new"), dir.join("control")).expect("renamed");
    }

    /// Ends it by SIGTERM. What the driver counted, by name.
    fn end(mut self) -> Report {
        self.server.signal("TERM");
        let status = self.server.wait();
        assert_eq!(status.code(), Some(0), "{:#?}", self.server.stderr.all());
        Report::read(&self.server.dir.path().join("report"))
    }
}

#[derive(Debug)]
struct Report(BTreeMap<String, i64>);

impl Report {
    fn read(file: &Path) -> Self {
        let bytes = std::fs::read(file).expect("the driver makes its report when it is opened");
        let record = |record: &[u8]| {
            let name = record[..56].split(|&byte| byte == 0).next().filter(|name| !name.is_empty())?;
            let value = i64::from_le_bytes(record[56..].try_into().expect("8 bytes"));
            Some((String::from_utf8(name.to_vec()).expect("a name"), value))
        };
        Self(bytes.chunks_exact(64).filter_map(record).collect())
    }

    fn count(&self, name: &str) -> i64 {
        self.0.get(name).copied().unwrap_or(0)
    }
}

/// One request on a connection of its own.
fn post(server: &Server, texts: &[String]) -> Answer {
    Client::connect(server.address).expect("connected").send(&embeddings(texts)).expect("answered")
}

/// The rows of one request.
fn embed(server: &Server, texts: &[String]) -> Vec<Vec<f32>> {
    let answer = post(server, texts);
    assert_eq!(answer.status, 200, "{answer:?} {:#?}", server.stderr.all());
    let body: serde_json::Value = serde_json::from_str(&answer.body).expect("JSON");
    let row = |item: &serde_json::Value| serde_json::from_value(item["embedding"].clone()).expect("a row");
    body["data"].as_array().expect("rows").iter().map(row).collect()
}

/// One to 200 tokens: some of one row of attention's blocks, some of several, some that share a bucket.
fn texts() -> Vec<String> {
    [1, 2, 5, 6, 13, 14, 30, 31, 62, 63, 64, 65, 90, 100, 130, 190].map(text).into()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// A repository with the bundled model under other settings: its files by link, but for `config.json`.
fn changed_model(manifest: &[(&str, &str)], config: &[(&str, &str)]) -> tempfile::TempDir {
    let (dir, from) = (tempfile::tempdir().unwrap(), bundled_models().join("all-MiniLM-L6-v2"));
    let to = dir.path().join("all-MiniLM-L6-v2");
    std::fs::create_dir_all(to.join("1")).unwrap();
    for entry in std::fs::read_dir(from.join("1")).unwrap().map(Result::unwrap) {
        std::os::unix::fs::symlink(entry.path(), to.join("1").join(entry.file_name())).unwrap();
    }
    let change = |file: &Path, to: &Path, changes: &[(&str, &str)]| {
        let mut text = std::fs::read_to_string(file).unwrap();
        for (old, new) in changes {
            assert!(text.contains(old), "{old} is not in {}", file.display());
            text = text.replace(old, new);
        }
        std::fs::write(to, text).unwrap();
    };
    if !config.is_empty() {
        std::fs::remove_file(to.join("1/config.json")).unwrap();
        change(&from.join("1/config.json"), &to.join("1/config.json"), config);
    }
    change(&from.join("manifest.toml"), &to.join("manifest.toml"), manifest);
    dir
}

#[test]
fn the_emulator_sees_faults() {
    let (library, dir) = (library::folder(), tempfile::tempdir().unwrap());
    let program = library::program("selftest", &library, dir.path());
    let run = |case: &str, variables: &[(&str, &str)]| {
        let output = Command::new(&program)
            .arg(case)
            .env("LD_LIBRARY_PATH", &library)
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for (case, words) in [
        ("a fill beyond an allocation", "the operand is 1001 bytes from byte 0 of allocation 0, which has 1000"),
        ("a write beside an allocation", "a byte 1000 from the begin of allocation 0 of 1000 bytes was written"),
        ("a read far beyond an allocation", "access at byte 5096 of allocation 0 of 1000 bytes"),
        ("a use after a free", "which is freed"),
        ("a second free", "allocation 0 is freed twice"),
        ("a stream that is destroyed", "none of the live streams"),
        ("a function that is not emulated", "cuMemAdvise_v2 is not emulated"),
    ] {
        let (code, stderr) = run(case, &[]);
        assert!(code.is_none() && stderr.contains(words), "{case}: {code:?} {stderr}");
    }
    let delays = [("EREMOIS_TEST_CUDA_DELAY_US", "300")];
    for (case, variables) in [
        ("a wait that is there", &delays[..]),
        ("a wait that is missing", &delays),
        ("a limit of memory", &[("EREMOIS_TEST_CUDA_MEMORY", "1000000")]),
        ("a limit of an allocation", &[("EREMOIS_TEST_CUDA_REFUSE_ABOVE", "4096")]),
        ("a wait in a capture", &[]),
    ] {
        assert_eq!(run(case, variables), (Some(0), String::new()), "{case}");
    }
}

/// Runs the test of this name once more, in a process that finds the emulated driver: the loader reads the variable
/// when a process begins. What the driver counted.
fn rerun(test: &str, variables: &[(&str, &str)]) -> Report {
    let (library, dir) = (library::folder(), tempfile::tempdir().unwrap());
    let report = dir.path().join("report");
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env("LD_LIBRARY_PATH", library)
        .env("EREMOIS_TEST_CUDA_REPORT", &report)
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{:?}\n{stdout}{stderr}", output.status);
    Report::read(&report)
}

/// Whether this process is one that [`rerun`] started.
fn is_rerun() -> bool {
    std::env::var_os("EREMOIS_TEST_CUDA_REPORT").is_some()
}

/// A batch of sequences with these lengths; ids and token types by `seed`.
fn batch(lengths: &[usize], seed: usize) -> PackedInput {
    let mut batch = PackedInput::default();
    for (i, &length) in lengths.iter().enumerate() {
        let ids: Vec<u32> = (0..length).map(|t| ((seed * 131 + i * 17 + t * 7919) % 30_000) as u32).collect();
        let types: Vec<u32> = (0..length).map(|t| u32::from(seed % 2 == 1 && t > length / 2)).collect();
        batch.push(&ids, &types, RowSpec { normalize: !seed.is_multiple_of(3), dimensions: 384 - i % 2 * 100 });
    }
    batch
}

#[test]
fn a_model_that_is_dropped_frees_all_of_it() {
    if !is_rerun() {
        let delays = [("EREMOIS_TEST_CUDA_DELAY_US", "300"), ("EREMOIS_TEST_CUDA_SEED", "3")];
        let report = rerun("a_model_that_is_dropped_frees_all_of_it", &delays);
        let left: Vec<_> = report.0.iter().filter(|(name, n)| name.starts_with("live ") && **n != 0).collect();
        assert!(left.is_empty(), "{left:?}");
        for (name, least) in
            [("graph launches", 1), ("pinned uploads", 30), ("device allocations", 50), ("products", 24)]
        {
            assert!(report.count(name) >= least, "{name}: {report:?}");
        }
        return;
    }
    let devices = select(&DeviceSpec::Cuda(vec![0])).unwrap();
    let (entry, version) = Repository::new(bundled_models()).find("all-MiniLM-L6-v2").unwrap();
    let placement = Placement { max_batch_tokens: 64, max_batch_size: 4, cache_dir: None, falls_back: false };
    let model = load_for(&entry.spec(version), &devices, &placement).unwrap();
    let rows = |in_flight: Box<dyn InFlight>| in_flight.finish().unwrap().values;
    let launch = |lengths: &[usize], seed| model.backend().launch(batch(lengths, seed)).unwrap();

    let shapes: [&[usize]; 5] = [&[3], &[30, 1, 12], &[7, 7, 7, 7], &[60], &[1, 2, 3, 4]];
    let alone: Vec<_> = shapes.iter().enumerate().map(|(seed, shape)| rows(launch(shape, seed))).collect();
    // As the worker has it: the next is launched, then the last is read. Then three deep, read the other way round, and
    // one that nobody reads.
    let mut last = launch(shapes[4], 4);
    for round in 0..3 {
        for (seed, shape) in shapes.iter().enumerate() {
            let next = launch(shape, seed);
            assert_eq!(rows(std::mem::replace(&mut last, next)), alone[(seed + 4) % 5], "round {round}, batch {seed}");
        }
    }
    let (third, second) = (launch(shapes[2], 2), launch(shapes[1], 1));
    assert_eq!(rows(second), alone[1]);
    assert_eq!(rows(third), alone[2]);
    assert_eq!(rows(last), alone[4]);
    drop(launch(shapes[0], 0));

    // Two kinds of batches in one bucket: of a graph for sequences of up to 64 tokens the second would miss the last ones.
    let long = rows(launch(&[120, 4], 6));
    let short = rows(launch(&[64, 60], 10));
    for _ in 0..3 {
        assert_eq!(rows(launch(&[64, 60], 10)), short);
    }
    assert_eq!(rows(launch(&[120, 4], 6)), long);

    // Larger than what the model was loaded for, in tokens and in sequences, while others are under way.
    let small = launch(shapes[1], 1);
    let many: Vec<usize> = (0..20).map(|i| 1 + i % 5).collect();
    let (larger, more) = (launch(&[200, 100, 9], 8), launch(&many, 9));
    let (larger, more) = (rows(larger), rows(more));
    assert_eq!(rows(small), alone[1]);
    assert_eq!(rows(launch(&[200, 100, 9], 8)), larger);
    assert_eq!(rows(launch(&many, 9)), more);
    assert_eq!(rows(launch(shapes[3], 3)), alone[3]);
    drop(launch(&many, 9));
}

#[test]
fn both_types_equal_the_cpu() {
    let texts = texts();
    let cpu = Server::ready("[ai]\ndevice = \"cpu\"\n");
    let expected: Vec<Vec<f32>> = texts.iter().map(|text| embed(&cpu, std::slice::from_ref(text)).remove(0)).collect();
    drop(cpu);
    for (dtype, least) in [("f16", 0.9999), ("bf16", 0.999)] {
        let dtype_line = format!("task = \"embed\"\ndtype = \"{dtype}\"");
        let models = changed_model(&[("task = \"embed\"", &dtype_line)], &[]);
        let emulated =
            Emulated::ready(SETTINGS, &[("EREMOIS_AI__MODELS_DIR", models.path().to_str().expect("a plain path"))]);
        emulated.server.stderr.wait_for(&["model loaded", "cuda:0", dtype]);
        for (text, expected) in texts.iter().zip(&expected) {
            let got = cosine(&embed(&emulated.server, std::slice::from_ref(text))[0], expected);
            assert!(got >= least, "{dtype}: {} words: cosine {got}", text.split(' ').count());
        }
        let report = emulated.end();
        assert!(report.count(&format!("kernel attention_{dtype}_32")) > 0, "{report:?}");
    }
}

#[test]
fn requests_at_once_are_answered_as_alone() {
    const NUM_CLIENTS: usize = 6;
    const NUM_ROUNDS: usize = 8;
    // Each stream sleeps at random before its work: what is ordered by luck comes out wrong.
    let emulated = Emulated::ready(SETTINGS, &[("EREMOIS_TEST_CUDA_DELAY_US", "400"), ("EREMOIS_TEST_CUDA_SEED", "7")]);
    let (server, texts) = (&emulated.server, texts());
    let alone: Vec<Vec<f32>> = texts.iter().map(|text| embed(server, std::slice::from_ref(text)).remove(0)).collect();
    std::thread::scope(|scope| {
        for client in 0..NUM_CLIENTS {
            let (texts, alone) = (&texts, &alone);
            scope.spawn(move || {
                for round in 0..NUM_ROUNDS {
                    // One to three texts, differently mixed in every request.
                    let chosen = (0..1 + (client + round) % 3).map(|i| (client * 5 + round * 3 + i * 7) % texts.len());
                    let chosen: Vec<usize> = chosen.collect();
                    let asked: Vec<String> = chosen.iter().map(|&i| texts[i].clone()).collect();
                    for (row, &i) in embed(server, &asked).iter().zip(&chosen) {
                        assert_eq!(row, &alone[i], "client {client}, round {round}, text {i}");
                    }
                }
            });
        }
    });
    let report = emulated.end();
    assert!(report.count("uploads behind other work") > 0, "no batch was enqueued behind another: {report:?}");
    assert_eq!(report.count("pageable downloads"), 0, "rows are copied into pinned memory: {report:?}");
}

/// The value of a metric's line that holds all of `parts`.
fn metric(server: &Server, parts: &[&str]) -> f64 {
    let text = server.get("/metrics").expect("answered").body;
    let line = text.lines().find(|line| parts.iter().all(|part| line.contains(part)));
    let line = line.unwrap_or_else(|| panic!("no line with {parts:?}: {text}"));
    line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
}

#[test]
fn two_devices_answer_as_one() {
    let settings = SETTINGS.replace("cuda:0", "cuda:0,1");
    let delays = [("EREMOIS_TEST_CUDA_DELAY_US", "400"), ("EREMOIS_TEST_CUDA_SEED", "11")];
    let variables = [&delays[..], &[("EREMOIS_TEST_CUDA_DEVICES", "2")]].concat();
    let emulated = Emulated::ready(&settings, &variables);
    let (server, texts) = (&emulated.server, texts());
    let alone: Vec<Vec<f32>> = texts.iter().map(|text| embed(server, std::slice::from_ref(text)).remove(0)).collect();
    std::thread::scope(|scope| {
        for client in 0..4 {
            let (texts, alone) = (&texts, &alone);
            scope.spawn(move || {
                for round in 0..8 {
                    let i = (client * 5 + round * 3) % texts.len();
                    assert_eq!(
                        embed(server, &texts[i..i + 1])[0],
                        alone[i],
                        "client {client}, round {round}, text {i}"
                    );
                }
            });
        }
    });
    for device in ["device=\"cuda:0\"", "device=\"cuda:1\""] {
        assert!(
            metric(server, &["eremois_inputs_total{", device, "class=\"interactive\""]) > 0.0,
            "{device} has computed nothing"
        );
    }
    emulated.end();
}

/// The bundled model with a word whose embedding is no number.
fn model_with_a_broken_word(word: &str) -> tempfile::TempDir {
    let dir = changed_model(&[], &[]);
    let version = dir.path().join("all-MiniLM-L6-v2/1");
    let tokenizer: serde_json::Value =
        serde_json::from_slice(&std::fs::read(version.join("tokenizer.json")).unwrap()).unwrap();
    let id = tokenizer["model"]["vocab"][word].as_u64().expect("a word of the vocabulary");

    let file = version.join("model-q8_0.gguf");
    let mut bytes = std::fs::read(&file).unwrap();
    let content = gguf_file::Content::read(&mut std::io::Cursor::new(&bytes)).unwrap();
    // Q8_0: blocks of an f16 scale and 32 values of a byte.
    let row_bytes = 384 / 32 * 34;
    let words = content.tensor_data_offset + content.tensor_infos["token_embd.weight"].offset;
    let scale = (words + id * row_bytes) as usize;
    bytes[scale..scale + 2].copy_from_slice(&half::f16::NAN.to_le_bytes());
    let sum: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    let manifest = dir.path().join("all-MiniLM-L6-v2/manifest.toml");
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(manifest, text.replace("68d3fc05a7b9e1c60a9ff07e4a8c113f7ea71733a22ad1593289adc0fae00fc1", &sum))
        .unwrap();
    std::fs::remove_file(&file).unwrap();
    std::fs::write(file, bytes).unwrap();
    dir
}

#[test]
fn a_row_that_is_not_finite_fails_its_request_alone() {
    let models = model_with_a_broken_word("volcano");
    let emulated = Emulated::ready(SETTINGS, &[("EREMOIS_AI__MODELS_DIR", models.path().to_str().unwrap())]);
    let server = &emulated.server;
    let (good, bad) = ([text(12)], ["a volcano in the sea".to_string()]);
    let alone = embed(server, &good);
    std::thread::scope(|scope| {
        for client in 0..4 {
            let (good, bad, alone) = (&good, &bad, &alone);
            scope.spawn(move || {
                for round in 0..6 {
                    if (client + round) % 3 == 0 {
                        let answer = post(server, bad);
                        assert_eq!(answer.status, 500, "{answer:?}");
                    } else {
                        assert_eq!(&embed(server, good), alone);
                    }
                }
            });
        }
    });
    server.stderr.wait_for(&["holds a value that is not finite", "bf16"]);
    emulated.end();
}

#[test]
fn a_bucket_met_again_is_replayed() {
    let emulated = Emulated::ready(SETTINGS, &[]);
    // Two texts of one bucket: what is captured with the one is replayed with the other.
    let (one, other) = (vec![text(20)], vec![text(18)]);
    let first = (embed(&emulated.server, &one), embed(&emulated.server, &other));
    for _ in 0..4 {
        assert_eq!(embed(&emulated.server, &one), first.0);
        assert_eq!(embed(&emulated.server, &other), first.1);
    }
    let report = emulated.end();
    assert_eq!(report.count("captures spoilt"), 0, "{report:?}");
    // Ten batches of the bucket: two plain, one captured and launched, seven launched.
    assert_eq!((report.count("graphs"), report.count("graph launches")), (1, 8), "{report:?}");
}

#[test]
fn algorithms_are_timed_once_a_machine() {
    let dir = tempfile::tempdir().unwrap();
    let settings = SETTINGS.replace("\"algorithms\"", &format!("{:?}", dir.path()));
    let first = Emulated::ready(&settings, &[]);
    let rows = embed(&first.server, &[text(9)]);
    let report = first.end();
    assert!(report.count("algorithms asked for") > 0 && report.count("algorithms checked") == 0, "{report:?}");
    let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files, ["gemm-emulated-gpu-13000-130100.json"]);

    let second = Emulated::ready(&settings, &[]);
    assert_eq!(embed(&second.server, &[text(9)]), rows);
    let report = second.end();
    assert!(report.count("algorithms asked for") == 0 && report.count("algorithms checked") > 0, "{report:?}");

    // Of another product or version of the library, as far as the words say.
    let file = dir.path().join(&files[0]);
    let text_of_file = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text_of_file.replace("7308626878644118884", "1")).unwrap();
    let third = Emulated::ready(&settings, &[]);
    let report = third.end();
    assert!(report.count("algorithms asked for") > 0 && report.count("algorithms checked") > 0, "{report:?}");
}

#[test]
fn without_a_device_the_cpu_computes_or_nobody() {
    let auto = SETTINGS.replace("cuda:0", "auto");
    let emulated = Emulated::ready(&auto, &[("EREMOIS_TEST_CUDA_DEVICES", "0")]);
    emulated.server.stderr.wait_for(&["computing on the CPU", "no CUDA-capable device"]);
    emulated.server.stderr.wait_for(&["model loaded", "cpu"]);
    assert_eq!(embed(&emulated.server, &[text(5)])[0].len(), 384);

    let mut named = Emulated::start(SETTINGS, &[("EREMOIS_TEST_CUDA_DEVICES", "0")]);
    assert_eq!(named.server.wait().code(), Some(1));
    named.server.stderr.wait_for(&["ai.device: cuda:0", "no CUDA-capable device"]);
}

#[test]
fn a_model_the_kernels_do_not_compute_falls_back() {
    // Heads of 48 values.
    let models = changed_model(
        &[("\"config.json\" = \"953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41\"", "")],
        &[("\"num_attention_heads\": 12", "\"num_attention_heads\": 8")],
    );
    let models = models.path().to_str().expect("a plain path");
    let emulated = Emulated::ready(&SETTINGS.replace("cuda:0", "auto"), &[("EREMOIS_AI__MODELS_DIR", models)]);
    emulated.server.stderr.wait_for(&["computing on the CPU", "heads have 48 values"]);
    emulated.server.stderr.wait_for(&["model loaded", "cpu"]);
    assert_eq!(embed(&emulated.server, &[text(5)])[0].len(), 384);
}

#[test]
fn a_device_with_too_little_memory_is_not_begun_with() {
    let memory = [("EREMOIS_TEST_CUDA_MEMORY", "50000000")];
    let mut named = Emulated::start(SETTINGS, &memory);
    assert_eq!(named.server.wait().code(), Some(1));
    named.server.stderr.wait_for(&["47 MiB are free on cuda:0", "max_batch_tokens 256"]);
}

/// Posts until the process has ended; the statuses and codes of what was answered.
fn post_until_the_end(server: &mut Server) -> (Option<i32>, Vec<(u16, String)>) {
    let mut answers = Vec::new();
    let request = embeddings(&[text(12)]);
    let start = Instant::now();
    // No connection any more: the listener has gone.
    while let Ok(mut client) = Client::connect(server.address) {
        assert!(start.elapsed() < LONG, "the server goes on: {:?}", answers.last());
        let Ok(answer) = client.send(&request) else { break };
        let body: serde_json::Value = serde_json::from_str(&answer.body).expect("JSON");
        answers.push((answer.status, body["error"]["code"].as_str().unwrap_or("").to_string()));
    }
    (server.wait().code(), answers)
}

#[test]
fn a_lost_device_ends_the_server() {
    let mut emulated = Emulated::ready(SETTINGS, &[]);
    let rows = embed(&emulated.server, &[text(12)]);
    assert_eq!(embed(&emulated.server, &[text(12)]), rows);
    emulated.control("fail_after = 0\n");
    let (code, answers) = post_until_the_end(&mut emulated.server);
    assert_eq!(code, Some(75), "{answers:?} {:#?}", emulated.server.stderr.all());
    assert_eq!(answers[0], (500, "device_lost".to_string()), "{answers:?}");
    assert!(answers[1..].iter().all(|(status, _)| *status == 503), "{answers:?}");
    emulated.server.stderr.wait_for(&["the device is lost", "ILLEGAL_ADDRESS"]);
}

#[test]
fn a_device_that_hangs_ends_the_server() {
    let settings = SETTINGS.replace("[log]", "device_timeout = \"10s\"\n[log]");
    let mut emulated = Emulated::ready(&settings, &[]);
    embed(&emulated.server, &[text(12)]);
    emulated.control("hang_after = 0\n");
    let (code, answers) = post_until_the_end(&mut emulated.server);
    assert_eq!(code, Some(75), "{answers:?} {:#?}", emulated.server.stderr.all());
    assert!(!answers.is_empty() && answers.iter().all(|(status, _)| *status == 503), "{answers:?}");
}

#[test]
fn the_work_of_a_lost_device_is_done_by_the_other() {
    let emulated = Emulated::ready(&SETTINGS.replace("cuda:0", "cuda:0,1"), &[("EREMOIS_TEST_CUDA_DEVICES", "2")]);
    let (server, texts) = (&emulated.server, texts());
    let alone: Vec<Vec<f32>> = texts.iter().map(|text| embed(server, std::slice::from_ref(text)).remove(0)).collect();
    let lost = || metric(server, &["eremois_device_lost{", "cuda:1"]) == 1.0;
    let start = Instant::now();
    std::thread::scope(|scope| {
        for client in 0..4 {
            let (texts, alone) = (&texts, &alone);
            scope.spawn(move || {
                // For a while after the loss as well.
                let mut num_left = 10;
                while num_left > 0 {
                    assert!(start.elapsed() < LONG, "the other device is not lost");
                    let i = (client * 5 + num_left) % texts.len();
                    assert_eq!(embed(server, &texts[i..i + 1])[0], alone[i], "client {client}, text {i}");
                    num_left -= usize::from(lost());
                }
            });
        }
        emulated.control("fault_device = 1\nfail_after = 0\n");
    });
    server.stderr.wait_for(&["lost", "ILLEGAL_ADDRESS"]);
    // Ended by a signal as ever.
    emulated.end();
}

#[test]
fn a_batch_without_memory_is_computed_in_parts() {
    let emulated = Emulated::ready(SETTINGS, &[]);
    let server = &emulated.server;
    let asked: Vec<String> = (0..8).map(|i| text(80 + 3 * i)).collect();
    let alone: Vec<Vec<f32>> = asked.iter().map(|text| embed(server, std::slice::from_ref(text)).remove(0)).collect();
    server.write_settings(&SETTINGS.replace("max_batch_tokens = 256", "max_batch_tokens = 1024"));
    server.signal("HUP");
    server.stderr.wait_for(&["batching limits changed", "1024"]);

    // 1024 tokens of MiniLM take 5.3 MiB of activations, 512 the half.
    emulated.control("refuse_above = 3500000\n");
    assert_eq!(embed(server, &asked), alone);
    server.stderr.wait_for(&["max_batch_tokens is lowered"]);
    assert!(metric(server, &["eremois_limits_lowered_total{"]) > 0.0);

    // Nothing at all, not even for one text: everything was given back for the attempt.
    server.signal("HUP");
    server.write_settings(&SETTINGS.replace("max_batch_tokens = 256", "max_batch_tokens = 1023"));
    server.signal("HUP");
    server.stderr.wait_for(&["batching limits changed", "1023"]);
    emulated.control("refuse_above = 1000\n");
    let answer = post(server, &asked);
    assert!(answer.status == 503 && answer.body.contains("out_of_memory"), "{answer:?}");
    emulated.control("");
    assert_eq!(embed(server, &asked), alone);
    let report = emulated.end();
    assert!(report.count("allocations refused") > 2, "{report:?}");
}
