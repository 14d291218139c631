//! Putting a model's files into the repository: whole or not at all.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use super::hub::{Chosen, choose};
use super::labels::HeadConfig;
use super::manifest::{MANIFEST_FILE, Manifest, ModelSpec, Provenance, TASKS, VersionEntry, is_inside};
use super::prove::prove;
use super::repository::{Repository, sha256_file};
use super::sentence::SentenceConfig;
use crate::{Error, Result};

/// The tasks of models that come as a folder of files: all but a tensor model's, which has its layers in the manifest.
pub const TASKS_OF_FILES: [&str; 6] = ["embed", "classify", "rerank", "token_classify", "sparse", "fill_mask"];

/// A model that lies in the repository now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    pub name: String,
    pub version: u64,
    /// The version's folder.
    pub dir: PathBuf,
    /// False if these very files were there before.
    pub new: bool,
}

/// Copies a Hugging Face folder or a GGUF file into the repository as a new version of `name`
/// (`None`: its own name), after loading it once for `task` (`None`: what its files say it was made for).
///
/// Blocks: copies and reads the weights.
/// Errors: [`Error::Invalid`] for a folder that holds no model, a name that cannot be served and a task that is none
/// or not the manifest's, the loader's, also for a task whose weights are not there, and [`Error::ModelFile`] for what
/// cannot be copied. Nothing is left behind.
pub fn import(models: &Repository, source: &Path, name: Option<&str>, task: Option<&str>) -> Result<Installed> {
    let invalid = |reason: String| Error::Invalid { field: source.display().to_string(), reason };
    let (folder, chosen) = if source.is_dir() {
        let chosen = choose(&walk(source)?, None).map_err(invalid)?;
        (source.to_path_buf(), chosen)
    } else if source.is_file() {
        let file = source.file_name().map(|f| f.to_string_lossy().into_owned()).unwrap_or_default();
        let folder = source.parent().map(Path::to_path_buf).unwrap_or_default();
        // Only the file: a folder of GGUF files often holds several models.
        let chosen = choose(std::slice::from_ref(&file), Some(&file)).map_err(invalid)?;
        (folder, chosen)
    } else {
        return Err(invalid("there is no such folder or file".to_string()));
    };
    let own_name = || {
        let path = source.canonicalize().unwrap_or_else(|_| source.to_path_buf());
        let own = if path.is_file() { path.file_stem() } else { path.file_name() };
        own.map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
    };
    let name = name.map_or_else(own_name, str::to_string);
    check_name(&name)?;
    let settled = settled_task(models, &name, task)?;

    stage(models, &name, |staging| {
        copy(&folder, staging, &chosen)?;
        let weights = chosen.weights.iter().map(|f| staging.join(f)).collect();
        let task = settled.map_or_else(|| task_of(staging), Ok)?;
        prove(&ModelSpec { weights, task: task.clone(), ..ModelSpec::bare(&name, staging) })?;
        let head = Manifest { task, ..Manifest::default() };
        let provenance = Provenance { note: Some("imported from a folder".to_string()), ..Provenance::default() };
        install(models, &name, staging, head, chosen.weights.clone(), provenance)
    })
}

/// Fills a staging folder of a model and removes what is left of it, whatever comes of that.
pub(super) fn stage(
    models: &Repository,
    name: &str,
    fill: impl FnOnce(&Path) -> Result<Installed>,
) -> Result<Installed> {
    let staging = models.root().join(".pull").join(format!("import-{name}"));
    let _lock = lock(&staging)?;
    let result = remove_if_there(&staging).and_then(|()| make_dir(&staging)).and_then(|()| fill(&staging));
    if staging.exists() {
        let _ = fs::remove_dir_all(&staging);
    }
    result
}

/// Moves the folder `staging` into the repository as the next version of `name`, and writes it into the
/// manifest with the checksum of every file. `head` is the manifest of a model that has none yet.
///
/// `staging` must lie on the repository's file system. The version appears by renames: whoever reads the
/// repository sees it whole or not at all.
/// Errors: [`Error::Invalid`] for a folder of this name that has no manifest, [`Error::ModelFile`].
pub(super) fn install(
    models: &Repository,
    name: &str,
    staging: &Path,
    head: Manifest,
    weights: Vec<String>,
    provenance: Provenance,
) -> Result<Installed> {
    install_version(models, name, staging, head, VersionEntry { weights, provenance, ..VersionEntry::default() })
}

/// [`install`] of a version of which more is known; its files and tokenizer are found.
pub(super) fn install_version(
    models: &Repository,
    name: &str,
    staging: &Path,
    head: Manifest,
    entry: VersionEntry,
) -> Result<Installed> {
    let mut files = BTreeMap::new();
    for file in walk(staging)? {
        let (sha256, _) = sha256_file(&staging.join(&file))?;
        files.insert(file, sha256);
    }
    let tokenizer = files.contains_key("tokenizer.json").then(|| "tokenizer.json".to_string());
    let entry = VersionEntry { tokenizer, files, ..entry };
    let home = models.root().join(name);
    let Some(manifest) = existing_manifest(models, name)? else {
        let manifest = Manifest { versions: BTreeMap::from([(1, entry)]), ..head };
        // The model's folder is made beside the staging folder, then moved whole.
        let whole = beside(staging, ".whole");
        remove_if_there(&whole)?;
        make_dir(&whole)?;
        rename(staging, &whole.join("1"))?;
        write(&whole.join(MANIFEST_FILE), &manifest.to_toml())?;
        rename(&whole, &home)?;
        return Ok(Installed { name: name.to_string(), version: 1, dir: home.join("1"), new: true });
    };
    if let Some((&version, _)) =
        manifest.versions.iter().find(|(_, v)| v.files == entry.files && v.layers == entry.layers)
    {
        remove_if_there(staging)?;
        return Ok(Installed { name: name.to_string(), version, dir: home.join(version.to_string()), new: false });
    }
    let mut version = manifest.versions.keys().last().map_or(1, |v| v + 1);
    // A folder the manifest does not know was left by a cut between the two renames below.
    while home.join(version.to_string()).exists() {
        version += 1;
    }
    let dir = home.join(version.to_string());
    rename(staging, &dir)?;
    append_version(&home.join(MANIFEST_FILE), version, entry)?;
    Ok(Installed { name: name.to_string(), version, dir, new: true })
}

/// Adds a version at the end of a manifest's text, so that what people wrote in it stays.
fn append_version(path: &Path, version: u64, entry: VersionEntry) -> Result<()> {
    #[derive(serde::Serialize)]
    struct Addition {
        versions: BTreeMap<u64, VersionEntry>,
    }
    let addition = Addition { versions: BTreeMap::from([(version, entry)]) };
    let addition = toml::to_string(&addition).map_err(|e| fault(path, e))?;
    let text = fs::read_to_string(path).map_err(|e| fault(path, e))?;
    let text = format!("{}\n\n{addition}", text.trim_end());
    Manifest::parse(&text, path)?;
    let new = path.with_extension("toml.new");
    write(&new, &text)?;
    rename(&new, path)
}

/// The manifest of a model that is there already.
///
/// Errors: [`Error::Invalid`] for a folder or file of this name that another hand put there without a manifest.
pub(super) fn existing_manifest(models: &Repository, name: &str) -> Result<Option<Manifest>> {
    let home = models.root().join(name);
    let manifest = home.join(MANIFEST_FILE);
    if manifest.is_file() {
        return Manifest::read(&manifest).map(Some);
    }
    if home.exists() {
        let reason = format!("{} is there and has no manifest.toml; choose another --name", home.display());
        return Err(Error::Invalid { field: "name".to_string(), reason });
    }
    Ok(None)
}

/// Refuses a name that is no plain folder name: it comes from the command line or from a stranger's repository.
pub(super) fn check_name(name: &str) -> Result<()> {
    let plain = is_inside(name) && !name.starts_with('.') && !name.contains(['/', '@', ':']);
    if plain {
        return Ok(());
    }
    let reason = format!("`{name}` cannot be a model's folder: no `/`, `@`, `:`, no dot in front");
    Err(Error::Invalid { field: "name".to_string(), reason })
}

/// Held by whoever fills a staging folder; dropping it lets the next one in.
pub(super) struct Lock {
    /// The operating system frees the lock with the file.
    _file: File,
    path: PathBuf,
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        // Succeeds only when nothing else is being fetched.
        let _ = self.path.parent().map(fs::remove_dir);
    }
}

/// Locks a staging folder, which need not exist yet.
///
/// Errors: [`Error::ModelFile`] if another process fills it.
pub(super) fn lock(staging: &Path) -> Result<Lock> {
    let path = beside(staging, ".lock");
    make_dir(path.parent().unwrap_or(staging))?;
    let file = File::create(&path).map_err(|e| fault(&path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(Lock { _file: file, path }),
        Err(TryLockError::WouldBlock) => Err(fault(&path, "another process is fetching this model")),
        Err(TryLockError::Error(e)) => Err(fault(&path, e)),
    }
}

/// Every file below a folder, relative, with `/`, sorted; dot files and unfinished ones left out.
fn walk(folder: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    let mut open = vec![String::new()];
    while let Some(prefix) = open.pop() {
        let here = folder.join(&prefix);
        for entry in fs::read_dir(&here).map_err(|e| fault(&here, e))? {
            let entry = entry.map_err(|e| fault(&here, e))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with('.') || name.ends_with(".part") {
                continue;
            }
            // Through links: a hub's cache is made of them.
            match fs::metadata(entry.path()) {
                Ok(kind) if kind.is_dir() => open.push(format!("{prefix}{name}/")),
                Ok(_) => files.push(format!("{prefix}{name}")),
                Err(e) => return Err(fault(&entry.path(), e)),
            }
        }
    }
    files.sort();
    Ok(files)
}

fn copy(folder: &Path, staging: &Path, chosen: &Chosen) -> Result<()> {
    remove_if_there(staging)?;
    for file in &chosen.files {
        let to = staging.join(file);
        make_dir(to.parent().unwrap_or(staging))?;
        fs::copy(folder.join(file), &to).map_err(|e| fault(&folder.join(file), e))?;
    }
    Ok(())
}

/// The task of a model's next version, as far as it does not depend on its files: that of the manifest which is there, or
/// the one that is asked for.
///
/// Errors: [`Error::Invalid`] for a task that is none of texts and images, and for another than the manifest's.
pub(super) fn settled_task(models: &Repository, name: &str, asked: Option<&str>) -> Result<Option<String>> {
    let invalid = |reason: String| Err(Error::Invalid { field: "task".to_string(), reason });
    if let Some(asked) = asked.filter(|asked| !TASKS_OF_FILES.contains(asked)) {
        return invalid(format!("`{asked}` is none that can be chosen; known: {}", TASKS_OF_FILES.join(", ")));
    }
    let Some(manifest) = existing_manifest(models, name)? else { return Ok(asked.map(str::to_string)) };
    match asked.filter(|asked| *asked != manifest.task) {
        None => Ok(Some(manifest.task)),
        Some(asked) => {
            let there = format!("`{name}` is there with the task `{}`", manifest.task);
            invalid(format!("{there}, not `{asked}`; choose another --name"))
        }
    }
}

/// What the model in a folder was made for, as its files say it; embeddings where they say nothing else.
///
/// Errors: [`Error::ModelFile`] for files that cannot be understood.
pub(super) fn task_of(dir: &Path) -> Result<String> {
    let sentence = SentenceConfig::read(dir)?;
    let head = HeadConfig::read(&sentence.transformer_dir)?;
    Ok(match &sentence {
        SentenceConfig { is_sparse: true, .. } => "sparse",
        SentenceConfig { answers: Some(_), .. } => "rerank",
        // Embedding models are often published with the class they were trained as.
        SentenceConfig { pooling: Some(_), .. } => TASKS[0],
        _ => head.task().unwrap_or(TASKS[0]),
    }
    .to_string())
}

/// The path with a suffix to its last name; `with_extension` would cut a version off it.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(suffix);
    PathBuf::from(name)
}

fn remove_if_there(dir: &Path) -> Result<()> {
    if dir.exists() { fs::remove_dir_all(dir).map_err(|e| fault(dir, e)) } else { Ok(()) }
}

fn make_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(|e| fault(dir, e))
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|e| fault(to, e))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|e| fault(path, e))
}

fn fault(file: &Path, reason: impl ToString) -> Error {
    Error::ModelFile { file: file.to_path_buf(), reason: reason.to_string() }
}
