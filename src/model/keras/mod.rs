//! Keras models as tensor models: `.keras` and the older `.h5`, Sequential and functional.
//!
//! [`file`] opens them, [`graph`] follows the layers as they were called, [`calls`] reads what they were called with, [`words`]
//! says each in ours.

mod calls;
mod file;
mod graph;
mod words;

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};

use self::file::KerasFile;
use super::install::{Installed, check_name, install_version, stage};
use super::manifest::{Manifest, ModelSpec, Provenance, VersionEntry};
use super::prove::prove;
use super::repository::Repository;
use super::weights::file_error;
use crate::{Error, Result};

/// The weights' name in the version's folder.
const WEIGHTS: &str = "model.safetensors";

/// A tensor that is copied: its shape and values.
pub(super) type Copied = (Vec<usize>, Vec<f32>);

/// Reads a Keras model and puts it into the repository as a new version of `name` (`None`: the file's own name), after
/// loading it once. `shapes` has the shape of a row by the name of an input, where the file leaves sizes open.
///
/// Blocks: reads and writes the weights.
/// Errors: [`Error::ModelFile`] naming the file, the layer and what is not supported or wrong, the loader's, and
/// [`Error::Invalid`] for a name that cannot be served. Nothing is left behind.
pub fn import(
    models: &Repository,
    path: &Path,
    name: Option<&str>,
    shapes: &BTreeMap<String, Vec<usize>>,
) -> Result<Installed> {
    let own_name = || path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let name = name.map_or_else(own_name, str::to_string);
    check_name(&name)?;
    let file = KerasFile::open(path)?;
    let (list, tensors) = graph::convert(&file, shapes)?;
    stage(models, &name, |staging| {
        write(&staging.join(WEIGHTS), &tensors)?;
        // The manifest lies beside the version's folder; none is there yet, and faults are named by it.
        prove(&ModelSpec {
            task: "infer".to_string(),
            weights: vec![staging.join(WEIGHTS)],
            layers: Some(list.clone()),
            ..ModelSpec::bare(&name, staging)
        })?;
        let note = format!("imported from Keras {}", file.version());
        let entry = VersionEntry {
            weights: vec![WEIGHTS.to_string()],
            layers: Some(list.clone()),
            provenance: Provenance { note: Some(note), ..Provenance::default() },
            ..VersionEntry::default()
        };
        let head = Manifest { task: "infer".to_string(), ..Manifest::default() };
        install_version(models, &name, staging, head, entry)
    })
}

/// Writes tensors as one safetensors file.
fn write(path: &Path, tensors: &BTreeMap<String, Copied>) -> Result<()> {
    let bytes: BTreeMap<&String, Vec<u8>> = tensors
        .iter()
        .map(|(name, (_, values))| (name, values.iter().flat_map(|value| value.to_le_bytes()).collect()))
        .collect();
    let mut views = Vec::with_capacity(tensors.len());
    for (name, (shape, _)) in tensors {
        let view = TensorView::new(Dtype::F32, shape.clone(), &bytes[name]).map_err(|e| file_error(path, e))?;
        views.push((name.as_str(), view));
    }
    let file = safetensors::serialize(views, None).map_err(|e| file_error(path, e))?;
    std::fs::write(path, file).map_err(|e| file_error(path, e))
}

/// `input=20,8` as people write it on a command line.
///
/// Errors: [`Error::Invalid`] naming `--shape`.
pub fn parse_shape(text: &str) -> Result<(String, Vec<usize>)> {
    let reason = || format!("`{text}` is no NAME=SIZE,SIZE,… with sizes from 1");
    let invalid = || Error::Invalid { field: "--shape".to_string(), reason: reason() };
    let (name, sizes) = text.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or_else(invalid)?;
    let sizes = sizes.split(',').map(|size| size.trim().parse().ok().filter(|&size: &usize| size > 0));
    Ok((name.to_string(), sizes.collect::<Option<Vec<_>>>().ok_or_else(invalid)?))
}
