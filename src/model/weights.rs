//! One reader over a model's weight files, whatever their format: safetensors (one file or shards)
//! and GGUF. Everything is handed out in f32, which is what models compute in.

pub mod gguf;
pub mod safetensors;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::{Error, Result};

/// What kind of file the weights lie in: it decides the names of tensors and who knows the sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Safetensors,
    Gguf,
}

/// A model's open weight files.
pub struct Weights {
    /// Shared by the views for several devices.
    source: Arc<Source>,
    device: Device,
}

enum Source {
    Safetensors(safetensors::Shards),
    Gguf(gguf::GgufFile),
}

/// Where one tensor lies and what it is.
pub(crate) struct Found<'a> {
    pub file: &'a Path,
    pub shape: &'a [usize],
}

impl Weights {
    /// Opens one GGUF file, or one or several safetensors files, and reads their headers; the format
    /// is told by the file's first bytes. Tensors are read when they are asked for.
    ///
    /// Blocks: reads files.
    /// Errors: [`Error::ModelFile`] for a file that cannot be read, is cut short or is neither.
    pub fn open(files: &[PathBuf], device: &Device) -> Result<Self> {
        let source = match files {
            [one] if is_gguf(one)? => Source::Gguf(gguf::GgufFile::open(one)?),
            _ => Source::Safetensors(safetensors::Shards::open(files)?),
        };
        Ok(Self { source: Arc::new(source), device: device.clone() })
    }

    /// Finds a folder's weights and opens them: `model.safetensors`, else the shards that
    /// `model.safetensors.index.json` lists, else the only `.safetensors` or `.gguf` file there is.
    ///
    /// Errors: [`Error::ModelFile`] naming the folder and what was looked for, besides those of `open`.
    pub fn open_dir(dir: &Path, device: &Device) -> Result<Self> {
        let index = dir.join("model.safetensors.index.json");
        let single = dir.join("model.safetensors");
        if single.is_file() {
            Self::open(&[single], device)
        } else if index.is_file() {
            let source = Source::Safetensors(safetensors::Shards::open_index(&index)?);
            Ok(Self { source: Arc::new(source), device: device.clone() })
        } else {
            Self::open(&[only_file(dir)?], device)
        }
    }

    /// The same open files, read onto another device.
    pub fn on(&self, device: &Device) -> Self {
        Self { source: self.source.clone(), device: device.clone() }
    }

    /// The device that tensors are read onto.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The format of the files.
    pub fn format(&self) -> Format {
        match *self.source {
            Source::Safetensors(_) => Format::Safetensors,
            Source::Gguf(_) => Format::Gguf,
        }
    }

    /// The GGUF file's header, `None` for safetensors.
    pub fn gguf(&self) -> Option<&gguf::GgufFile> {
        match &*self.source {
            Source::Safetensors(_) => None,
            Source::Gguf(file) => Some(file),
        }
    }

    /// The file to name when the fault is the whole model's: the only one, the index, or the first shard.
    pub fn path(&self) -> &Path {
        match &*self.source {
            Source::Safetensors(shards) => shards.path(),
            Source::Gguf(file) => file.path(),
        }
    }

    /// Names of all tensors, in no order.
    pub fn names(&self) -> Vec<&str> {
        match &*self.source {
            Source::Safetensors(shards) => shards.names().collect(),
            Source::Gguf(file) => file.tensor_names().collect(),
        }
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// Shape of a tensor, `None` if there is none of this name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.find(name).map(|found| found.shape)
    }

    /// Reads one tensor onto the device.
    ///
    /// Returns `shape`, f32; f16, bf16 and ggml's block formats are widened, which loses nothing.
    /// Blocks: reads the tensor's bytes.
    /// Errors: [`Error::Tensor`] for a tensor that is missing, of another shape, or of a dtype that
    /// holds no weights; [`Error::ModelFile`] if the file does not hold its bytes.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let Some(found) = self.find(name) else {
            return Err(tensor_error(self.path(), name, format!("shape {shape:?}"), "no such tensor".to_string()));
        };
        if found.shape != shape {
            let got = format!("shape {:?}", found.shape);
            return Err(tensor_error(found.file, name, format!("shape {shape:?}"), got));
        }
        let values = match &*self.source {
            Source::Safetensors(shards) => shards.read(name)?,
            Source::Gguf(file) => file.read(name)?,
        };
        Ok(Tensor::from_vec(values, shape, &self.device)?)
    }

    fn find(&self, name: &str) -> Option<Found<'_>> {
        match &*self.source {
            Source::Safetensors(shards) => shards.find(name),
            Source::Gguf(file) => file.find(name),
        }
    }
}

/// Whether a file begins as a GGUF file does.
fn is_gguf(path: &Path) -> Result<bool> {
    use std::io::Read;
    let mut magic = Vec::new();
    let file = open_file(path)?;
    file.take(4).read_to_end(&mut magic).map_err(|e| file_error(path, e))?;
    // The name decides where the first bytes do not: a GGUF file with a broken magic is to be called
    // that, not a safetensors file with a strange header.
    Ok(magic == b"GGUF" || path.extension().is_some_and(|ext| ext == "gguf"))
}

/// The one weight file of a folder that has no `model.safetensors`.
fn only_file(dir: &Path) -> Result<PathBuf> {
    let entries = std::fs::read_dir(dir).map_err(|e| file_error(dir, e))?;
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|ext| ext == "gguf" || ext == "safetensors"))
        .collect();
    found.sort();
    match found.len() {
        1 => Ok(found.remove(0)),
        0 => Err(file_error(dir, "no weights: looked for model.safetensors, model.safetensors.index.json and *.gguf")),
        _ => {
            let names: Vec<_> = found.iter().filter_map(|p| p.file_name()).map(|n| n.to_string_lossy()).collect();
            Err(file_error(dir, format!("several weight files ({}): the manifest must name one", names.join(", "))))
        }
    }
}

/// Unix seconds of a file's last change; 0 where the file system does not say.
pub(super) fn modified(path: &Path) -> u64 {
    let modified = path.metadata().and_then(|metadata| metadata.modified()).ok();
    modified.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok()).map_or(0, |age| age.as_secs())
}

pub(crate) fn open_file(path: &Path) -> Result<File> {
    File::open(path).map_err(|e| file_error(path, e))
}

pub(crate) fn file_error(file: &Path, reason: impl ToString) -> Error {
    Error::ModelFile { file: file.to_path_buf(), reason: reason.to_string() }
}

fn tensor_error(file: &Path, tensor: &str, expected: String, got: String) -> Error {
    Error::Tensor { file: file.to_path_buf(), tensor: tensor.to_string(), expected, got }
}
