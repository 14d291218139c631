//! The model repository: manifests, versions, names, checksums.

use std::fs;
use std::path::Path;
use std::time::Duration;

use eremois::Error;
use eremois::model::manifest::{Dtype, Manifest};
use eremois::model::pack::Pooling;
use eremois::model::repository::{Layout, Repository, sha256_file};

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
