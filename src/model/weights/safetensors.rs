//! Safetensors files, one or several.
//!
//! Read with seek and read instead of a memory map: a map needs `unsafe`, and a file cut while the
//! server runs would end the process with SIGBUS where a read returns an error. Every byte is read
//! once and widened to f32, so a map would save no copy.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::{Found, file_error, open_file, tensor_error};
use crate::Result;

/// Largest header taken, the limit of the safetensors crate: no file may make us allocate more.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The tensors of one or several files under one roof.
pub struct Shards {
    /// The only file, the index, or the first of several.
    path: PathBuf,
    shards: Vec<Shard>,
    /// Tensor name to its place in `shards`.
    places: HashMap<String, usize>,
}

struct Shard {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    /// Offset of the first tensor's first byte.
    data_start: u64,
}

impl Shards {
    /// Reads the headers. Errors: [`crate::Error::ModelFile`] for a file that is no whole safetensors
    /// file, or a tensor that two of them hold.
    pub fn open(files: &[PathBuf]) -> Result<Self> {
        let path = files.first().cloned().unwrap_or_default();
        let mut shards = Vec::with_capacity(files.len());
        let mut places = HashMap::new();
        for (i, file) in files.iter().enumerate() {
            let shard = Shard::open(file)?;
            for name in shard.metadata.offset_keys() {
                if places.contains_key(&name) {
                    return Err(file_error(file, format!("tensor `{name}` is in another file too")));
                }
                places.insert(name, i);
            }
            shards.push(shard);
        }
        Ok(Self { path, shards, places })
    }

    /// Opens the files that an index lists, beside it, and checks that each holds what the index says.
    pub fn open_index(index: &Path) -> Result<Self> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: HashMap<String, String>,
        }
        let text = std::fs::read_to_string(index).map_err(|e| file_error(index, e))?;
        let Index { weight_map } = serde_json::from_str(&text).map_err(|e| file_error(index, e))?;
        let mut names: Vec<&String> = weight_map.values().collect();
        names.sort();
        names.dedup();
        if let Some(name) = names.iter().find(|name| Path::new(name).components().count() != 1) {
            return Err(file_error(index, format!("weight_map: `{name}` is not a file beside the index")));
        }
        let dir = index.parent().unwrap_or(Path::new(""));
        let files: Vec<PathBuf> = names.iter().map(|name| dir.join(name)).collect();
        let mut this = Self::open(&files)?;
        for (tensor, file) in &weight_map {
            let place = this.places.get(tensor).map(|&i| files[i].as_path());
            if place != Some(&dir.join(file)) {
                let expected = format!("in this file, as {} says", index.display());
                return Err(tensor_error(&dir.join(file), tensor, expected, "no such tensor".to_string()));
            }
        }
        this.path = index.to_path_buf();
        Ok(this)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    pub(super) fn find(&self, name: &str) -> Option<Found<'_>> {
        let shard = &self.shards[*self.places.get(name)?];
        let info = shard.metadata.info(name)?;
        Some(Found { file: &shard.path, shape: &info.shape })
    }

    /// Values of a tensor that `find` finds, in f32.
    pub(super) fn read(&self, name: &str) -> Result<Vec<f32>> {
        let missing = || tensor_error(&self.path, name, "a tensor".to_string(), "no such tensor".to_string());
        let shard = &self.shards[*self.places.get(name).ok_or_else(missing)?];
        let info = shard.metadata.info(name).ok_or_else(missing)?;
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0u8; end - start];
        let mut file = &shard.file;
        file.seek(SeekFrom::Start(shard.data_start + start as u64))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|e| file_error(&shard.path, format!("tensor `{name}`: {e}")))?;
        match info.dtype {
            Dtype::F32 => Ok(widen(&bytes, f32::from_le_bytes)),
            Dtype::F16 => Ok(widen(&bytes, |b| f16::from_le_bytes(b).to_f32())),
            Dtype::BF16 => Ok(widen(&bytes, |b| bf16::from_le_bytes(b).to_f32())),
            other => {
                let expected = "dtype f32, f16 or bf16".to_string();
                let got = format!("dtype {}", other.to_string().to_lowercase());
                Err(tensor_error(&shard.path, name, expected, got))
            }
        }
    }
}

impl Shard {
    fn open(path: &Path) -> Result<Self> {
        let mut file = open_file(path)?;
        let size = file.metadata().map_err(|e| file_error(path, e))?.len();
        let mut length = [0u8; 8];
        file.read_exact(&mut length)
            .map_err(|_| file_error(path, format!("no safetensors file: {size} bytes, the header length takes 8")))?;
        let header_len = u64::from_le_bytes(length);
        if header_len > MAX_HEADER_BYTES || header_len > size - 8 {
            let reason = format!("no safetensors file: header length {header_len}, the file has {size} bytes");
            return Err(file_error(path, reason));
        }
        let mut header = vec![0u8; header_len as usize];
        file.read_exact(&mut header).map_err(|e| file_error(path, e))?;
        // Parsing checks each shape against its offsets, and that these follow each other without gaps.
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|e| file_error(path, format!("safetensors header: {e}")))?;
        let data_start = 8 + header_len;
        let expected = data_start + metadata.data_len() as u64;
        if size != expected {
            let reason = format!("cut short or overlong: its header speaks of {expected} bytes, the file has {size}");
            return Err(file_error(path, reason));
        }
        Ok(Self { path: path.to_path_buf(), file, metadata, data_start })
    }
}

/// Little-endian values of N bytes each to f32.
fn widen<const N: usize>(bytes: &[u8], convert: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    let (values, _) = bytes.as_chunks::<N>();
    values.iter().map(|&value| convert(value)).collect()
}
