//! The two forms of a Keras file: a zip with the model's words and an HDF5 file of weights, or one HDF5 file.

use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};

use hdf5_pure::{AttrValue, File};
use serde_json::Value;

use super::Copied;
use crate::model::weights::file_error;
use crate::{Error, Result};

/// Longest description of a model, in bytes.
const MAX_CONFIG_BYTES: u64 = 64 << 20;
/// Largest file, in bytes: it is read whole.
const MAX_FILE_BYTES: u64 = 8 << 30;
/// A compressed part may be so many times its length in the file, and [`MAX_CONFIG_BYTES`] at any rate: numbers of a
/// trained model hardly shrink, so that more is a bomb.
const MAX_RATIO: u64 = 32;

/// An open Keras model.
pub(super) struct KerasFile {
    path: PathBuf,
    /// The model's `class_name` and `config`.
    pub config: Value,
    version: String,
    weights: File,
    is_zip: bool,
}

/// Where a layer's weights are.
#[derive(Debug, Clone, Default)]
pub(super) struct Place {
    /// In a `.keras` file: `layers/functional/layers/dense`.
    pub path: String,
    /// Names of the models within the model and of the layer, outermost first: how an `.h5` has it.
    pub names: Vec<String>,
}

/// Which of a layer's weights.
#[derive(Debug, Clone, Copy)]
pub(super) struct Var {
    /// Our name of it.
    pub what: &'static str,
    /// Objects within the layer, for `.keras`: "cell", "forward_layer/cell".
    pub within: &'static str,
    /// Its number there.
    pub index: usize,
    /// Its name, for `.h5`.
    pub name: &'static str,
    /// What a part of its path begins with, for `.h5`, where a layer has several of this name: "forward_".
    pub part: &'static str,
}

impl KerasFile {
    /// Opens a file and reads its description; weights are read when they are asked for.
    ///
    /// Errors: [`Error::ModelFile`] for what is neither form, not whole, or beyond the limits.
    pub fn open(path: &Path) -> Result<Self> {
        let fault = |reason: String| file_error(path, reason);
        let size = path.metadata().map_err(|e| fault(e.to_string()))?.len();
        if size > MAX_FILE_BYTES {
            return Err(fault(format!("has {size} bytes, the limit is {MAX_FILE_BYTES}")));
        }
        let bytes = std::fs::read(path).map_err(|e| fault(e.to_string()))?;
        if bytes.starts_with(b"PK") {
            return Self::of_zip(path, bytes);
        }
        if !hdf5_pure::is_hdf5_bytes(&bytes) {
            return Err(fault("is neither a .keras file (zip) nor an .h5 file (HDF5)".to_string()));
        }
        let weights = hdf5(path, bytes)?;
        let attrs = weights.root().attrs().map_err(|e| fault(e.to_string()))?;
        let Some(config) = attrs.get("model_config").and_then(text) else {
            return Err(fault("has no `model_config`: weights alone are no model, save the whole one".to_string()));
        };
        let config = serde_json::from_str(&config).map_err(|e| fault(format!("model_config: {e}")))?;
        let version = attrs.get("keras_version").and_then(text).unwrap_or_else(|| "of no version".to_string());
        Ok(Self { path: path.to_path_buf(), config, version, weights, is_zip: false })
    }

    fn of_zip(path: &Path, bytes: Vec<u8>) -> Result<Self> {
        let fault = |reason: String| file_error(path, reason);
        let mut zip = zip::ZipArchive::new(Cursor::new(bytes)).map_err(|e| fault(format!("zip: {e}")))?;
        let mut part = |name: &str, is_config: bool| -> Result<Vec<u8>> {
            let entry = zip.by_name(name).map_err(|e| fault(format!("{name}: {e}")))?;
            let (size, packed) = (entry.size(), entry.compressed_size());
            let limit =
                if is_config { MAX_CONFIG_BYTES } else { packed.saturating_mul(MAX_RATIO).max(MAX_CONFIG_BYTES) };
            if size > limit {
                return Err(fault(format!("{name}: {size} bytes, the limit is {limit}")));
            }
            let mut bytes = Vec::new();
            // What the entry says of its size is a stranger's word: it bounds and reserves nothing.
            let read = entry.take(limit + 1).read_to_end(&mut bytes).map_err(|e| fault(format!("{name}: {e}")))?;
            if read as u64 > limit {
                return Err(fault(format!("{name}: more than {limit} bytes")));
            }
            Ok(bytes)
        };
        let json = |name: &str, bytes: &[u8]| -> Result<Value> {
            serde_json::from_slice(bytes).map_err(|e| file_error(path, format!("{name}: {e}")))
        };
        let config = json("config.json", &part("config.json", true)?)?;
        let metadata = json("metadata.json", &part("metadata.json", true)?)?;
        let version = metadata["keras_version"].as_str().unwrap_or("of no version").to_string();
        let weights = hdf5(path, part("model.weights.h5", false)?)?;
        Ok(Self { path: path.to_path_buf(), config, version, weights, is_zip: true })
    }

    /// A fault of this file.
    pub fn fault(&self, reason: impl ToString) -> Error {
        file_error(&self.path, reason)
    }

    /// The version of Keras that wrote it.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Whether Keras 2 or 1 wrote it: some words meant something else.
    pub fn is_old(&self) -> bool {
        self.version.starts_with("2.") || self.version.starts_with("1.")
    }

    /// Copies one of a layer's weights.
    ///
    /// Errors: [`Error::ModelFile`] naming it, if it is missing, ambiguous or not of numbers of floating point.
    pub fn read(&self, place: &Place, var: &Var) -> Result<Copied> {
        let path = if self.is_zip {
            let within = if var.within.is_empty() { String::new() } else { format!("{}/", var.within) };
            format!("{}/{within}vars/{}", place.path, var.index)
        } else {
            self.named(place, var)?
        };
        let fault = |reason: String| self.fault(format!("weights `{path}`: {reason}"));
        let dataset = self.weights.dataset(&path).map_err(|e| fault(e.to_string()))?;
        let shape = dataset.shape().map_err(|e| fault(e.to_string()))?;
        let element = dataset.element_size().map_err(|e| fault(e.to_string()))?;
        // A stranger's shape may promise anything: no more than the file has, or could have packed.
        let count = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
        let limit = self.weights.file_size().saturating_mul(MAX_RATIO);
        let Some(count) = count.filter(|&count| count.checked_mul(element).is_some_and(|bytes| bytes <= limit)) else {
            return Err(fault(format!("shape {shape:?} is more than the file holds")));
        };
        let values = match element {
            4 => dataset.read_f32().map_err(|e| fault(e.to_string()))?,
            8 => dataset.read_f64().map_err(|e| fault(e.to_string()))?.iter().map(|&value| value as f32).collect(),
            _ => return Err(fault(format!("values of {element} bytes, expected f32 or f64"))),
        };
        if values.len() as u64 != count {
            return Err(fault(format!("{} values for shape {shape:?}", values.len())));
        }
        Ok((shape.iter().map(|&size| size as usize).collect(), values))
    }

    /// The path of a layer's weights in an `.h5`, which lists them by their names.
    fn named(&self, place: &Place, var: &Var) -> Result<String> {
        let (Some(top), Some(layer)) = (place.names.first(), place.names.last()) else {
            return Err(self.fault("a layer without a name"));
        };
        let group = format!("model_weights/{top}");
        let fault = |reason: String| self.fault(format!("weights `{}` of layer `{layer}`: {reason}", var.name));
        let attrs = self.weights.group(&group).and_then(|group| group.attrs()).map_err(|e| fault(e.to_string()))?;
        let names = attrs.get("weight_names").map(texts).unwrap_or_default();
        let fits = |name: &&String| {
            let mut parts = name.split('/').rev();
            let last = parts.next().map(|last| last.split(':').next().unwrap_or(last));
            let mut rest = parts.clone();
            let is_of_layer = place.names.len() == 1 || rest.any(|part| part == layer);
            last == Some(var.name) && is_of_layer && (var.part.is_empty() || parts.any(|p| p.starts_with(var.part)))
        };
        let found: Vec<&String> = names.iter().filter(fits).collect();
        match found.as_slice() {
            [one] => Ok(format!("{group}/{one}")),
            [] => Err(fault(format!("none of {names:?}"))),
            _ => Err(fault(format!("several fit: {found:?}; save the model as .keras"))),
        }
    }
}

fn hdf5(path: &Path, bytes: Vec<u8>) -> Result<File> {
    File::from_bytes(bytes).map_err(|e| file_error(path, format!("HDF5: {e}")))
}

fn text(value: &AttrValue) -> Option<String> {
    texts(value).into_iter().next()
}

/// The texts of an attribute, whichever way it holds them; none for one of numbers.
fn texts(value: &AttrValue) -> Vec<String> {
    match value {
        AttrValue::String(text)
        | AttrValue::AsciiString(text)
        | AttrValue::VarLenString(text)
        | AttrValue::VarLenAsciiString(text) => vec![text.clone()],
        AttrValue::StringSized { value, .. } | AttrValue::AsciiStringSized { value, .. } => vec![value.clone()],
        AttrValue::StringArray(texts)
        | AttrValue::AsciiStringArray(texts)
        | AttrValue::VarLenAsciiCharArray(texts)
        | AttrValue::VarLenStringArray(texts)
        | AttrValue::VarLenAsciiStringArray(texts)
        | AttrValue::StringArraySized { values: texts, .. }
        | AttrValue::AsciiStringArraySized { values: texts, .. } => texts.clone(),
        _ => Vec::new(),
    }
}
