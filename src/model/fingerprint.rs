//! What a model computes with, as one short text: results of equal fingerprints may stand for one another.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use super::judge::Question;
use super::manifest::ModelSpec;
use super::pack::Pooling;
use super::weights::file_error;
use crate::{Error, Result};

/// Endings of the files beside the weights that decide results: configurations, tokenizers, vocabularies.
const CONFIGS: [&str; 3] = ["json", "txt", "model"];
/// Endings of the files that hold weights, where the spec names none.
const WEIGHTS: [&str; 2] = ["safetensors", "gguf"];

/// What is decided at load and changes what comes out.
pub(super) struct Facts<'a> {
    pub architecture: &'a str,
    /// What is computed in.
    pub dtype: &'a str,
    /// "cpu", "cuda:0": its kind counts, not its number.
    pub device: &'a str,
    pub pooling: Pooling,
    pub max_seq_len: usize,
    /// What a causal language model is asked.
    pub question: Option<&'a Question>,
}

/// 32 hexadecimal digits of BLAKE3 over the facts and the identity of every file that the model is read from: the
/// manifest's sha256, which was verified, or else a hash of its content. Not of its time or place, so that replicas with
/// copies of one model share their results.
///
/// The version of this package is in it too: a release may round otherwise, or mend what was wrong.
///
/// Blocks: reads the files that no manifest lists, weights included.
/// Errors: [`Error::ModelFile`] for a file that cannot be read.
pub(super) fn fingerprint(spec: &ModelSpec, tokenizer: &Path, facts: &Facts) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut part = |text: &str| {
        // Its length before each, so that no two lists of parts read the same.
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    part(env!("CARGO_PKG_VERSION"));
    part(facts.architecture);
    part(facts.dtype);
    part(facts.device.split(':').next().unwrap_or_default());
    part(&format!("{:?}", facts.pooling));
    part(&facts.max_seq_len.to_string());
    if let Some(question) = facts.question {
        part(&format!("{question:?}"));
    }
    for (name, path) in files(spec, tokenizer)? {
        part(&name);
        match spec.checksums.get(&name) {
            Some(sha256) => part(sha256),
            None => part(&content(&path)?),
        }
    }
    Ok(hasher.finalize().to_hex()[..32].to_string())
}

/// The files that results depend on, by their names below the model's folder.
fn files(spec: &ModelSpec, tokenizer: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut files = BTreeMap::new();
    let mut add = |path: PathBuf| {
        let below = path.strip_prefix(&spec.dir).ok().or_else(|| path.file_name().map(Path::new));
        let name = below.map(|name| name.to_string_lossy().replace('\\', "/")).unwrap_or_default();
        files.insert(name, path);
    };
    let has_ending = |path: &Path, endings: &[&str]| {
        path.extension().is_some_and(|ending| endings.iter().any(|known| ending.eq_ignore_ascii_case(known)))
    };
    // A module's weights are never among the spec's.
    let counts = |path: &Path, is_module: bool| {
        has_ending(path, &CONFIGS) || ((is_module || spec.weights.is_empty()) && has_ending(path, &WEIGHTS))
    };
    let mut folders = vec![spec.dir.clone()];
    while let Some(folder) = folders.pop() {
        for path in super::repository::read_dir(&folder)? {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            // Folders of sentence-transformers' modules: `1_Pooling`. Others are other models.
            if path.is_dir()
                && folder == spec.dir
                && name.starts_with(|c: char| c.is_ascii_digit())
                && name.contains('_')
            {
                folders.push(path);
            } else if path.is_file() && counts(&path, folder != spec.dir) {
                add(path);
            }
        }
    }
    spec.weights.iter().cloned().for_each(&mut add);
    add(tokenizer.to_path_buf());
    Ok(files)
}

/// BLAKE3 of a file's bytes, in hexadecimal: gigabytes a second, less than reading them.
fn content(path: &Path) -> Result<String> {
    let unreadable = |e: std::io::Error| -> Error { file_error(path, e.to_string()) };
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path).map_err(unreadable)?).map_err(unreadable)?;
    Ok(hasher.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FACTS: Facts = Facts {
        architecture: "bert",
        dtype: "f32",
        device: "cpu",
        pooling: Pooling::Mean,
        max_seq_len: 256,
        question: None,
    };

    fn write(dir: &Path, name: &str, text: &str) {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn model(dir: &Path) -> ModelSpec {
        for name in
            ["model.safetensors", "config.json", "tokenizer.json", "1_Pooling/config.json", "2_Dense/model.safetensors"]
        {
            write(dir, name, name);
        }
        ModelSpec::bare("m", dir)
    }

    fn of(spec: &ModelSpec, facts: &Facts) -> String {
        fingerprint(spec, &spec.dir.join("tokenizer.json"), facts).unwrap()
    }

    #[test]
    fn copies_agree_and_every_file_and_fact_counts() {
        let (dir, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let spec = model(dir.path());
        let first = of(&spec, &FACTS);
        assert_eq!(first.len(), 32);
        assert_eq!(of(&model(copy.path()), &FACTS), first);
        for name in
            ["model.safetensors", "config.json", "tokenizer.json", "1_Pooling/config.json", "2_Dense/model.safetensors"]
        {
            write(dir.path(), name, "changed");
            assert_ne!(of(&spec, &FACTS), first, "{name}");
            write(dir.path(), name, name);
        }
        write(dir.path(), "README.md", "results do not depend on it");
        write(dir.path(), "2/config.json", "another version's");
        assert_eq!(of(&spec, &FACTS), first);
        assert_eq!(of(&spec, &Facts { device: "cuda:1", ..FACTS }), of(&spec, &Facts { device: "cuda:0", ..FACTS }));
        let question = Question::default();
        for other in [
            Facts { question: Some(&question), ..FACTS },
            Facts { dtype: "f16", ..FACTS },
            Facts { device: "cuda:0", ..FACTS },
            Facts { pooling: Pooling::Cls, ..FACTS },
            Facts { max_seq_len: 128, ..FACTS },
            Facts { architecture: "mpnet", ..FACTS },
        ] {
            assert_ne!(of(&spec, &other), first);
        }
    }

    #[test]
    fn the_manifest_spares_reading_the_weights() {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = model(dir.path());
        spec.checksums.insert("model.safetensors".into(), "aa".into());
        let first = of(&spec, &FACTS);
        write(dir.path(), "model.safetensors", "verified elsewhere");
        assert_eq!(of(&spec, &FACTS), first);
        spec.checksums.insert("model.safetensors".into(), "bb".into());
        assert_ne!(of(&spec, &FACTS), first);
    }
}
