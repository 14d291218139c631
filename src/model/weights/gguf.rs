//! GGUF files: metadata and tensors. candle parses the header and dequantises the blocks.

use std::io::BufReader;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_core::quantized::gguf_file::{Content, Value};
use parking_lot::Mutex;

use super::{Found, file_error, open_file, tensor_error};
use crate::Result;

/// An open GGUF file.
pub struct GgufFile {
    path: PathBuf,
    content: Content,
    num_bytes: u64,
    /// Locked for one tensor at a time: reading seeks.
    reader: Mutex<BufReader<std::fs::File>>,
}

impl GgufFile {
    /// Reads the header. Errors: [`crate::Error::ModelFile`] for a wrong magic, version or a cut file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = open_file(path)?;
        let num_bytes = file.metadata().map_err(|e| file_error(path, e.to_string()))?.len();
        let mut reader = BufReader::new(file);
        // candle divides by the alignment that the file states, so that a broken file can panic here.
        let content = std::panic::catch_unwind(AssertUnwindSafe(|| Content::read(&mut reader)))
            .map_err(|_| file_error(path, "gguf header: impossible alignment"))?
            .map_err(|e| file_error(path, format!("gguf header: {e}")))?;
        Ok(Self { path: path.to_path_buf(), content, num_bytes, reader: Mutex::new(reader) })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The metadata's value of a key, if there.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    /// A string. `None` if the key is missing; an error if it holds something else.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        self.value(key).map(|v| v.to_string().map(String::as_str).map_err(|_| self.wrong(key, "a string"))).transpose()
    }

    /// A count of any integer type. `None` if the key is missing; an error if it holds something else.
    pub fn number(&self, key: &str) -> Result<Option<usize>> {
        let wrong = || self.wrong(key, "a whole number");
        self.value(key)
            .map(|v| match v {
                Value::I8(n) => usize::try_from(*n).map_err(|_| wrong()),
                Value::I16(n) => usize::try_from(*n).map_err(|_| wrong()),
                Value::I32(n) => usize::try_from(*n).map_err(|_| wrong()),
                Value::I64(n) => usize::try_from(*n).map_err(|_| wrong()),
                _ => v.to_u64().map_err(|_| wrong()).and_then(|n| usize::try_from(n).map_err(|_| wrong())),
            })
            .transpose()
    }

    /// A real number. `None` if the key is missing; an error if it holds something else.
    pub fn real(&self, key: &str) -> Result<Option<f64>> {
        self.value(key)
            .map(|v| match v {
                Value::F32(x) => Ok(f64::from(*x)),
                Value::F64(x) => Ok(*x),
                _ => Err(self.wrong(key, "a real number")),
            })
            .transpose()
    }

    /// A list of strings. `None` if the key is missing; an error if it holds something else.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<&str>>> {
        let wrong = || self.wrong(key, "a list of strings");
        let Some(value) = self.value(key) else { return Ok(None) };
        let values = value.to_vec().map_err(|_| wrong())?;
        let strings: Result<Vec<&str>> =
            values.iter().map(|v| v.to_string().map(String::as_str).map_err(|_| wrong())).collect();
        strings.map(Some)
    }

    fn wrong(&self, key: &str, expected: &str) -> crate::Error {
        file_error(&self.path, format!("metadata `{key}` is not {expected}"))
    }

    pub(super) fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.content.tensor_infos.keys().map(String::as_str)
    }

    pub(super) fn find(&self, name: &str) -> Option<Found<'_>> {
        let info = self.content.tensor_infos.get(name)?;
        Some(Found { file: &self.path, shape: info.shape.dims() })
    }

    /// Values of a tensor, dequantised to f32.
    pub(super) fn read(&self, name: &str) -> Result<Vec<f32>> {
        let Some(info) = self.content.tensor_infos.get(name) else {
            return Err(tensor_error(&self.path, name, "a tensor".to_string(), "no such tensor".to_string()));
        };
        // Sizes that models are told from (the vocabulary) are what the header says: candle would multiply them unchecked,
        // and allocate the product.
        let num_values = info.shape.dims().iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
        let num_blocks = num_values.map(|num_values| num_values / info.ggml_dtype.block_size());
        let num_bytes = num_blocks.and_then(|num_blocks| num_blocks.checked_mul(info.ggml_dtype.type_size()));
        if num_bytes.is_none_or(|num_bytes| num_bytes as u64 > self.num_bytes) {
            let expected = format!("no more than the file's {} bytes", self.num_bytes);
            return Err(tensor_error(&self.path, name, expected, format!("a shape of {:?}", info.shape.dims())));
        }
        // candle makes a slice of the bytes' blocks, and no bytes have an address that is aligned for them.
        if num_values == Some(0) {
            return Ok(Vec::new());
        }
        let read = || -> candle_core::Result<Vec<f32>> {
            let tensor = info.read(&mut *self.reader.lock(), self.content.tensor_data_offset, &Device::Cpu)?;
            tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()
        };
        read().map_err(|e| file_error(&self.path, format!("tensor `{name}` ({:?}): {e}", info.ggml_dtype)))
    }
}
