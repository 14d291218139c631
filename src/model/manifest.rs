//! `models/<name>/manifest.toml`: what a model is and where it came from.
//!
//! ```toml
//! task = "embed"             # classify, rerank, token_classify, sparse, fill_mask
//! architecture = "bert"      # everything below is optional: the model's own files say the rest
//! pooling = "mean"           # cls, mean, max, last-token, weighted-mean
//! normalize = true
//! max_seq_len = 256
//! dtype = "f32"              # what a device computes in; a CPU always computes f32
//! default_prompt = "query"
//! licence = "Apache-2.0"
//!
//! [prompts]
//! query = "query: "
//!
//! [rerank]                   # of a causal language model: what it is asked, as Qwen3-Reranker has it by default
//! true_token = "yes"
//! false_token = "no"
//! instruction = "Given a web search query, retrieve relevant passages that answer the query"
//!
//! [batching]                 # wins over [ai]
//! max_batch_size = 64
//! max_queue_delay = "2ms"
//!
//! [versions.1]
//! weights = ["model.safetensors"]
//! tokenizer = "tokenizer.json"
//!
//! [versions.1.files]         # sha256 of each file in the folder 1/
//! "model.safetensors" = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
//!
//! [versions.1.provenance]
//! package = "where-it-came-from"
//! package_version = "0.1.0"
//! ```

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::image::ImageLimits;
use super::judge::Question;
use super::layers::{self, list::LayerList};
use super::pack::Pooling;
use super::section::{Faults, Section};
use crate::request::ModelName;
use crate::{Error, Result};

/// The manifest's name beside the version folders.
pub const MANIFEST_FILE: &str = "manifest.toml";

/// The tasks this server has heads for.
pub const TASKS: [&str; 7] = ["embed", "classify", "rerank", "token_classify", "sparse", "fill_mask", "infer"];

/// One version of one model, as the repository found it: the manifest's words where it has any.
/// `None` means the model's own files say it (`config.json`, `modules.json`, `1_Pooling/config.json`,
/// `sentence_bert_config.json`, or the GGUF metadata).
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    pub name: ModelName,
    pub version: String,
    /// The version's folder; `weights` and the tokenizer lie in it.
    pub dir: PathBuf,
    /// One of [`TASKS`].
    pub task: String,
    pub architecture: Option<String>,
    /// One GGUF file, or one or several safetensors files; empty means "look in `dir`".
    pub weights: Vec<PathBuf>,
    pub tokenizer: Option<PathBuf>,
    /// What a tensor model computes; `None` for the others.
    pub layers: Option<LayerList>,
    /// The manifest's sha256 of files in `dir`, by name; they were verified.
    pub checksums: BTreeMap<String, String>,
    pub pooling: Option<Pooling>,
    pub normalize: Option<bool>,
    pub max_seq_len: Option<usize>,
    /// What to compute in where the device has a choice; a CPU computes f32 whatever this says.
    pub dtype: Option<Dtype>,
    pub prompts: BTreeMap<String, String>,
    pub default_prompt: Option<String>,
    /// What a causal language model is asked about a pair.
    pub rerank: Option<Question>,
    pub licence: Option<String>,
    /// What is decoded of clients' images: of the settings, and no word of a manifest.
    pub image_limits: ImageLimits,
}

impl ModelSpec {
    /// The folder `dir` as it is: nothing said by a manifest.
    pub fn bare(name: &str, dir: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            version: "1".to_string(),
            dir: dir.into(),
            task: "embed".to_string(),
            architecture: None,
            weights: Vec::new(),
            tokenizer: None,
            layers: None,
            checksums: BTreeMap::new(),
            pooling: None,
            normalize: None,
            max_seq_len: None,
            dtype: None,
            prompts: BTreeMap::new(),
            default_prompt: None,
            rerank: None,
            licence: None,
            image_limits: ImageLimits::default(),
        }
    }
}

/// What a forward is computed in; files may hold less (Q8_0) or more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    F32,
    F16,
    Bf16,
}

/// A model's own batching limits; `None` leaves the settings' value. Names and units are those of `[ai]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct BatchingOverrides {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_batch_size: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_batch_tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "write_duration")]
    pub max_queue_delay: Option<Duration>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_queue_size: Option<usize>,
}

/// A whole `manifest.toml`, checked.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Manifest {
    /// One of [`TASKS`].
    pub task: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pooling: Option<Pooling>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub normalize: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_seq_len: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_prompt: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub licence: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub prompts: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rerank: Option<Question>,
    #[serde(skip_serializing_if = "is_default")]
    pub batching: BatchingOverrides,
    /// Version number to what lies in its folder. Numbers, so that 10 comes after 9.
    pub versions: BTreeMap<u64, VersionEntry>,
}

/// One `[versions.N]`: the files of the folder `N/`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct VersionEntry {
    /// File names in the version's folder; empty: the folder tells.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub weights: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// A tensor model's inputs, outputs and layers.
    #[serde(flatten)]
    pub layers: Option<LayerList>,
    /// File name, with `/` between folders, to its sha256 in lowercase hexadecimal.
    pub files: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "is_default")]
    pub provenance: Provenance,
}

/// Where the files of a version came from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Provenance {
    /// The package that ships the weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub package: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub package_version: Option<String>,
    /// Of the package's file, in lowercase hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// `ORG/NAME` on the hub.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repository: Option<String>,
    /// The hub's commit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// What was done to the files since.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

impl Manifest {
    /// Reads and checks one manifest.
    ///
    /// Errors: [`Error::ModelFile`] if it cannot be read, [`Error::Config`] with every fault at once,
    /// each `file:line: key: reason`.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Error::ModelFile { file: path.to_path_buf(), reason: e.to_string() })?;
        Self::parse(&text, path)
    }

    /// [`Manifest::read`] on a text; `path` names it in faults.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let mut faults = Faults::new(path, text);
        let manifest = match toml::de::DeTable::parse(text) {
            Ok(table) => read_manifest(Section::root(table.get_ref()), &mut faults),
            Err(e) => {
                faults.at(e.span(), e.message().lines().next().unwrap_or("not TOML"));
                Self::default()
            }
        };
        faults.into_result().map(|()| manifest)
    }

    /// The manifest as a file, sections in the order of the module's example.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("strings, numbers and maps with string keys are all TOML can hold")
    }

    /// The spec of one version, whose folder is `dir`.
    pub fn spec(&self, name: &str, version: u64, dir: &Path) -> ModelSpec {
        let entry = self.versions.get(&version).cloned().unwrap_or_default();
        ModelSpec {
            name: name.into(),
            version: version.to_string(),
            dir: dir.to_path_buf(),
            task: self.task.clone(),
            architecture: self.architecture.clone(),
            weights: entry.weights.iter().map(|f| dir.join(f)).collect(),
            tokenizer: entry.tokenizer.map(|f| dir.join(f)),
            layers: entry.layers,
            checksums: entry.files,
            pooling: self.pooling,
            normalize: self.normalize,
            max_seq_len: self.max_seq_len,
            dtype: self.dtype,
            prompts: self.prompts.clone(),
            default_prompt: self.default_prompt.clone(),
            rerank: self.rerank.clone(),
            licence: self.licence.clone(),
            image_limits: ImageLimits::default(),
        }
    }
}

fn read_manifest(mut section: Section, faults: &mut Faults) -> Manifest {
    let task = section.string("task", faults);
    match &task {
        None => faults.key(&section, "task", "is missing; it says what the model does, \"embed\" for example"),
        Some(task) if !TASKS.contains(&task.as_str()) => {
            faults.key(&section, "task", &format!("`{task}` is not a task; known: {}", TASKS.join(", ")));
        }
        Some(_) => {}
    }
    let manifest = Manifest {
        task: task.unwrap_or_default(),
        architecture: section.string("architecture", faults),
        pooling: section.word("pooling", faults),
        normalize: section.boolean("normalize", faults),
        max_seq_len: section.count("max_seq_len", faults),
        dtype: section.word("dtype", faults),
        default_prompt: section.string("default_prompt", faults),
        licence: section.string("licence", faults),
        prompts: section.strings("prompts", faults),
        rerank: section.table("rerank", faults).map(|s| Question::read(s, faults)),
        batching: section.table("batching", faults).map_or_else(Default::default, |s| read_batching(s, faults)),
        versions: section.table("versions", faults).map_or_else(Default::default, |s| read_versions(s, faults)),
    };
    if let Some(prompt) = manifest.default_prompt.as_ref().filter(|p| !manifest.prompts.contains_key(*p)) {
        // The name may stand in the model's own prompts, but a manifest that has prompts must have this one.
        if !manifest.prompts.is_empty() {
            faults.key(&section, "default_prompt", &format!("`{prompt}` is not one of [prompts]"));
        }
    }
    if manifest.rerank.is_some() && manifest.task != "rerank" {
        faults.key(&section, "rerank", "is for task \"rerank\" alone");
    }
    if manifest.versions.is_empty() && !section.has("versions") {
        faults.key(&section, "versions", "is missing; each version folder has its [versions.N]");
    }
    section.finish(faults);
    manifest
}

fn read_batching(mut section: Section, faults: &mut Faults) -> BatchingOverrides {
    let batching = BatchingOverrides {
        max_batch_size: section.count("max_batch_size", faults),
        max_batch_tokens: section.count("max_batch_tokens", faults),
        max_queue_delay: section.duration("max_queue_delay", faults),
        max_queue_size: section.count("max_queue_size", faults),
    };
    section.finish(faults);
    batching
}

fn read_versions(mut section: Section, faults: &mut Faults) -> BTreeMap<u64, VersionEntry> {
    let mut versions = BTreeMap::new();
    for key in section.keys() {
        let Some(version) = parse_version(&key) else {
            section.take(&key);
            faults.key(&section, &key, "a version is a whole number, written as its folder is");
            continue;
        };
        if let Some(entry) = section.table(&key, faults) {
            versions.insert(version, read_version(entry, faults));
        }
    }
    if versions.is_empty() && faults.is_empty() {
        faults.section(&section, "needs at least one [versions.N]");
    }
    versions
}

fn read_version(mut section: Section, faults: &mut Faults) -> VersionEntry {
    let entry = VersionEntry {
        weights: section.list("weights", faults),
        tokenizer: section.string("tokenizer", faults),
        layers: layers::read::read(&mut section, faults),
        files: section.strings("files", faults),
        provenance: section.table("provenance", faults).map_or_else(Default::default, |s| read_provenance(s, faults)),
    };
    for (file, sha256) in &entry.files {
        if !is_inside(file) {
            faults.key(&section, &format!("files.{file}"), "must lie inside the version's folder");
        }
        if !is_sha256(sha256) {
            faults.key(&section, &format!("files.{file}"), "must be a sha256: 64 lowercase hexadecimal digits");
        }
    }
    let named = entry.weights.iter().map(|f| ("weights", f)).chain(entry.tokenizer.iter().map(|f| ("tokenizer", f)));
    for (key, file) in named {
        // A file without its checksum would be served unchecked.
        if !entry.files.contains_key(file) {
            faults.key(&section, key, &format!("`{file}` has no checksum in [{}.files]", section.path()));
        }
    }
    section.finish(faults);
    entry
}

fn read_provenance(mut section: Section, faults: &mut Faults) -> Provenance {
    let provenance = Provenance {
        package: section.string("package", faults),
        package_version: section.string("package_version", faults),
        sha256: section.string("sha256", faults),
        repository: section.string("repository", faults),
        revision: section.string("revision", faults),
        url: section.string("url", faults),
        note: section.string("note", faults),
    };
    if provenance.sha256.as_deref().is_some_and(|s| !is_sha256(s)) {
        faults.key(&section, "sha256", "must be a sha256: 64 lowercase hexadecimal digits");
    }
    section.finish(faults);
    provenance
}

/// The number of a version's folder: digits without leading zeros, so that a number has one folder.
pub fn parse_version(name: &str) -> Option<u64> {
    let number = name.parse().ok()?;
    (u64::to_string(&number) == name).then_some(number)
}

/// Whether a file name with `/` stays inside the folder it is joined to.
pub fn is_inside(file: &str) -> bool {
    !file.is_empty() && !file.contains('\\') && Path::new(file).components().all(|c| matches!(c, Component::Normal(_)))
}

/// Whether `s` is a sha256 in lowercase hexadecimal.
pub fn is_sha256(s: &str) -> bool {
    s.len() == 64 && s.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Called by serde for `Some` only: `skip_serializing_if` takes the rest.
fn write_duration<S: serde::Serializer>(value: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_duration(value.unwrap_or_default()))
}
