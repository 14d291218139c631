//! The folder of models: finding, listing and checking them.
//!
//! ```text
//! models/
//!   all-MiniLM-L6-v2/            served under this name
//!     manifest.toml              what it is, and the checksums
//!     1/ 2/ 10/                  versions; the highest number is served unless one is asked for
//!   bge-small/                   a Hugging Face folder as it is: config.json, tokenizer.json, *.safetensors
//!   minilm.gguf                  one GGUF file as it is
//! ```

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::manifest::{BatchingOverrides, MANIFEST_FILE, Manifest, ModelSpec, is_inside, parse_version};
use crate::{Error, Result};

/// A folder of models.
#[derive(Debug, Clone)]
pub struct Repository {
    root: PathBuf,
}

/// One model of the repository, found but not loaded.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelEntry {
    pub name: String,
    /// The model's folder, or its one GGUF file.
    pub path: PathBuf,
    /// Rising; at least one. Without a manifest and without version folders it is 1.
    pub versions: Vec<u64>,
    pub layout: Layout,
}

/// How a model lies in its folder.
#[derive(Debug, Clone, PartialEq)]
pub enum Layout {
    /// `manifest.toml` beside version folders.
    Manifest(Box<Manifest>),
    /// Version folders without a manifest.
    Versions,
    /// A Hugging Face folder, or one with a GGUF file: the files themselves.
    Folder,
    /// One GGUF file.
    File,
}

impl Repository {
    /// `root` need not exist yet: an empty repository has no models, and pulling makes the folder.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The configured folder, or where models are when nothing is configured: `models` in the working
    /// directory; else `models` beside the executable or up to three folders above it (`target/release` in a
    /// clone, `bin` in an installation); else `models` in the working directory, which then is empty.
    pub fn locate(configured: Option<&Path>) -> Self {
        let local = PathBuf::from("models");
        if let Some(root) = configured {
            return Self::new(root);
        }
        if local.is_dir() {
            return Self::new(local);
        }
        // Three: cargo puts tests and examples one folder deeper than `target/<profile>`.
        let exe = std::env::current_exe().and_then(|exe| exe.canonicalize()).unwrap_or_default();
        let beside = exe.ancestors().skip(1).take(4).map(|dir| dir.join("models")).find(|dir| dir.is_dir());
        Self::new(beside.unwrap_or(local))
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Every model in the folder, by name, the broken ones as errors in their place.
    ///
    /// Errors: [`Error::ModelFile`] if the folder is there but cannot be read.
    pub fn list(&self) -> Result<Vec<(String, Result<ModelEntry>)>> {
        if !self.root.exists() {
            return Ok(Vec::new());
        }
        let mut models = Vec::new();
        for path in read_dir(&self.root)? {
            let is_model = path.is_dir() || is_gguf(&path);
            // Dot folders hold unfinished downloads.
            if is_model && !file_name(&path).starts_with('.') {
                models.push((model_name(&path), ModelEntry::open(&path)));
            }
        }
        models.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(models)
    }

    /// The model a setting or an argument names: `NAME`, `NAME@VERSION`, or the path of a folder or GGUF
    /// file anywhere.
    ///
    /// Errors: [`Error::UnknownModel`] with the names there are; whatever is wrong with its manifest; a
    /// version it does not have as [`Error::ModelFile`].
    pub fn find(&self, model: &str) -> Result<(ModelEntry, u64)> {
        let (name, version) = match model.rsplit_once('@') {
            Some((name, version)) => match parse_version(version) {
                Some(version) => (name, Some(version)),
                None => (model, None),
            },
            None => (model, None),
        };
        let entry = match self.candidate(name) {
            Some(path) => ModelEntry::open(&path)?,
            None => {
                let names: Vec<String> = self.list()?.into_iter().map(|(name, _)| name).collect();
                let served = if names.is_empty() { "none".to_string() } else { names.join(", ") };
                let root = self.root.display();
                return Err(Error::UnknownModel { model: name.into(), served: format!("{served} (in {root})") });
            }
        };
        let version = entry.version(version)?;
        Ok((entry, version))
    }

    /// A name in the repository comes before a path: a stray folder in the working directory must not
    /// replace a model.
    fn candidate(&self, name: &str) -> Option<PathBuf> {
        let is_name = is_inside(name) && !name.contains('/') && !name.starts_with('.');
        let by_name = [self.root.join(name), self.root.join(format!("{name}.gguf"))];
        let by_name = by_name.into_iter().find(|path| is_name && (path.is_dir() || is_gguf(path)));
        let by_path = PathBuf::from(name);
        by_name.or_else(|| (by_path.is_dir() || is_gguf(&by_path)).then_some(by_path))
    }
}

impl ModelEntry {
    /// Looks at a model's folder or GGUF file.
    ///
    /// Errors: the manifest's, and [`Error::ModelFile`] for a folder that holds no model, or not a version
    /// its manifest lists.
    pub fn open(path: &Path) -> Result<Self> {
        let entry = |layout, versions| Self { name: model_name(path), path: path.to_path_buf(), versions, layout };
        if !path.is_dir() {
            return Ok(entry(Layout::File, vec![1]));
        }
        let manifest_path = path.join(MANIFEST_FILE);
        if manifest_path.is_file() {
            let manifest = Manifest::read(&manifest_path)?;
            let versions: Vec<u64> = manifest.versions.keys().copied().collect();
            let missing = versions.iter().find(|v| !path.join(v.to_string()).is_dir());
            return match missing {
                Some(v) => Err(model_file(&manifest_path, format!("versions.{v}: there is no folder `{v}` beside it"))),
                None => Ok(entry(Layout::Manifest(Box::new(manifest)), versions)),
            };
        }
        let files = read_dir(path)?;
        if files.iter().any(|f| file_name(f) == "config.json" || is_gguf(f)) {
            return Ok(entry(Layout::Folder, vec![1]));
        }
        let is_version =
            |f: &&PathBuf| f.join("config.json").is_file() || read_dir(f).is_ok_and(|f| f.iter().any(|f| is_gguf(f)));
        let dirs = files.iter().filter(|f| f.is_dir()).filter(is_version);
        let mut versions: Vec<u64> = dirs.filter_map(|f| parse_version(&file_name(f))).collect();
        versions.sort_unstable();
        if versions.is_empty() {
            let reason = "holds no model: neither manifest.toml, config.json nor a .gguf file".to_string();
            return Err(model_file(path, reason));
        }
        Ok(entry(Layout::Versions, versions))
    }

    /// The version asked for, or the highest.
    ///
    /// Errors: [`Error::ModelFile`] naming the versions there are.
    pub fn version(&self, asked: Option<u64>) -> Result<u64> {
        let latest = *self.versions.last().expect("open leaves no entry without a version");
        match asked {
            None => Ok(latest),
            Some(version) if self.versions.contains(&version) => Ok(version),
            Some(version) => {
                let have: Vec<String> = self.versions.iter().map(u64::to_string).collect();
                Err(model_file(&self.path, format!("has no version {version}; it has {}", have.join(", "))))
            }
        }
    }

    /// The folder of a version's files.
    pub fn version_dir(&self, version: u64) -> PathBuf {
        match self.layout {
            Layout::Manifest(_) | Layout::Versions => self.path.join(version.to_string()),
            Layout::Folder => self.path.clone(),
            Layout::File => self.path.parent().map_or_else(PathBuf::new, Path::to_path_buf),
        }
    }

    /// What the loader needs to know of a version.
    pub fn spec(&self, version: u64) -> ModelSpec {
        let dir = self.version_dir(version);
        match &self.layout {
            Layout::Manifest(manifest) => manifest.spec(&self.name, version, &dir),
            Layout::Versions | Layout::Folder => {
                ModelSpec { version: version.to_string(), ..ModelSpec::bare(&self.name, dir) }
            }
            Layout::File => ModelSpec { weights: vec![self.path.clone()], ..ModelSpec::bare(&self.name, dir) },
        }
    }

    /// The model's own batching limits; none without a manifest.
    pub fn batching(&self) -> BatchingOverrides {
        match &self.layout {
            Layout::Manifest(manifest) => manifest.batching.clone(),
            Layout::Versions | Layout::Folder | Layout::File => BatchingOverrides::default(),
        }
    }

    /// Has the batching limits of another reading of this entry; none where that one has no manifest.
    pub fn take_batching(&mut self, from: Self) {
        if let Layout::Manifest(manifest) = &mut self.layout {
            manifest.batching = from.batching();
        }
    }

    /// Compares every file of a version with the manifest's checksum; `Ok(0)` where there is no manifest.
    ///
    /// Returns the bytes read.  Blocks: reads every file whole.
    /// Errors: [`Error::Checksum`], or [`Error::ModelFile`] for a file that is missing, for the first that fails.
    pub fn verify_files(&self, version: u64) -> Result<u64> {
        let Layout::Manifest(manifest) = &self.layout else { return Ok(0) };
        let dir = self.version_dir(version);
        let Some(entry) = manifest.versions.get(&version) else { return Ok(0) };
        let mut num_bytes = 0;
        for (file, expected) in &entry.files {
            let file = dir.join(file);
            let (got, len) = sha256_file(&file)?;
            if got != *expected {
                return Err(Error::Checksum { file, expected: expected.clone(), got });
            }
            num_bytes += len;
        }
        Ok(num_bytes)
    }
}

/// The sha256 of a file in lowercase hexadecimal, and its length in bytes; read in pieces.
///
/// Errors: [`Error::ModelFile`] if it cannot be read.
pub fn sha256_file(path: &Path) -> Result<(String, u64)> {
    let unreadable = |e: std::io::Error| model_file(path, e.to_string());
    let mut file = File::open(path).map_err(unreadable)?;
    let mut hasher = Sha256::new();
    // Large enough that the system calls cost nothing against the hash.
    let mut buffer = vec![0u8; 1 << 20];
    let mut num_bytes = 0;
    loop {
        match file.read(&mut buffer).map_err(unreadable)? {
            0 => return Ok((hex(&hasher.finalize()), num_bytes)),
            n => {
                hasher.update(&buffer[..n]);
                num_bytes += n as u64;
            }
        }
    }
}

/// Lowercase hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub(super) fn read_dir(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).and_then(|entries| entries.map(|e| Ok(e?.path())).collect());
    entries.map_err(|e: std::io::Error| model_file(dir, e.to_string()))
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) && path.is_file()
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The folder's name, or the file's without `.gguf`; `.` and the like are resolved first.
fn model_name(path: &Path) -> String {
    let resolved =
        if path.file_name().is_none() { path.canonicalize().unwrap_or_default() } else { path.to_path_buf() };
    let name = if is_gguf(&resolved) { resolved.file_stem() } else { resolved.file_name() };
    name.map(|n| n.to_string_lossy().into_owned()).unwrap_or_else(|| "model".to_string())
}

fn model_file(file: &Path, reason: String) -> Error {
    Error::ModelFile { file: file.to_path_buf(), reason }
}
