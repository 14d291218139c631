//! Models of the hub: which files of a repository are needed, and fetching them into the model folder.
//!
//! hf-hub gives the addresses, the login's token and the listing. The files themselves are fetched by
//! [`transfer`]: hf-hub 0.5 resumes a cut file only in its own cache, asks past the end of a file that is
//! whole (416), has no timeouts, and compares no checksum.

mod choose;
mod transfer;

use std::path::PathBuf;
use std::time::Duration;

use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde::Deserialize;

pub use choose::{Chosen, choose};

use super::install::{self, Installed};
use super::manifest::{Manifest, ModelSpec, Provenance, is_inside};
use super::prove::prove;
use super::repository::Repository;
use crate::{Error, Result};
use transfer::{Transfer, refusal, remote};

/// Where models are pulled from, and as whom.
#[derive(Clone)]
pub struct Hub {
    /// Base address of the hub or of a mirror; `None` is the hub's own.
    pub endpoint: Option<String>,
    /// Sent as a bearer token to the endpoint's host only; `None`: that of the hub's own login, if any.
    pub token: Option<String>,
    /// Waited before the first retry; doubles with each that brings nothing.
    pub retry_pause: Duration,
}

impl Default for Hub {
    fn default() -> Self {
        Self { endpoint: None, token: None, retry_pause: Duration::from_millis(500) }
    }
}

/// What to pull.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PullRequest {
    /// `ORG/NAME`.
    pub repository: String,
    /// A branch, tag or commit; `None` is the main branch.
    pub revision: Option<String>,
    /// One GGUF file of the repository, instead of its safetensors.
    pub file: Option<String>,
    /// Name to serve under; `None`: NAME.
    pub name: Option<String>,
    /// What the model is to do; `None`: what its files say it was made for.
    pub task: Option<String>,
}

impl PullRequest {
    /// Reads `ORG/NAME[@REV]`.
    ///
    /// Errors: [`Error::Invalid`] if it is not of that form.
    pub fn parse(model: &str) -> Result<Self> {
        let (repository, revision) = match model.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision.to_string())),
            None => (model, None),
        };
        let parts: Vec<&str> = repository.split('/').collect();
        let is_word = |s: &str| is_inside(s) && s.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        if parts.len() != 2 || !parts.iter().all(|s| is_word(s)) || revision.as_deref() == Some("") {
            let reason = format!("`{model}` is not of the form ORG/NAME or ORG/NAME@REVISION");
            return Err(Error::Invalid { field: "model".to_string(), reason });
        }
        Ok(Self { repository: repository.to_string(), revision, ..Self::default() })
    }
}

/// Told what a pull is doing; called from the thread that pulls.
pub trait Progress {
    /// A file begins, `have` of its `size` bytes here already.
    fn begin(&self, file: &str, size: u64, have: u64);
    /// So many more bytes came.
    fn advance(&self, num_bytes: u64);
    /// The file is whole and its checksum right.
    fn end(&self, file: &str);
}

/// The part of the hub's answer about a repository that is used.
#[derive(Debug, Deserialize)]
struct RepositoryInfo {
    sha: String,
    siblings: Vec<Sibling>,
    #[serde(default, rename = "cardData")]
    card: Option<Card>,
}

#[derive(Debug, Deserialize)]
struct Sibling {
    rfilename: String,
}

#[derive(Debug, Deserialize)]
struct Card {
    /// A word or a list of words.
    #[serde(default)]
    license: serde_json::Value,
}

/// Pulls a model into the repository: lists, fetches what is needed, checks it, loads it once, and only
/// then puts it in its place, whole.
///
/// A pull that was cut goes on where it stopped: finished and partial files stay in `.pull/` of the model
/// folder until the pull succeeds.
/// Blocks: until all is fetched.
/// Errors: [`Error::Invalid`] for what cannot be served (no safetensors, no such file) and for a task that is none or not
/// the manifest's, [`Error::ModelFile`]
/// naming the address for what the hub refuses or the line drops, [`Error::Checksum`], and the loader's.
pub fn pull(hub: &Hub, models: &Repository, request: &PullRequest, progress: &dyn Progress) -> Result<Installed> {
    let name = match &request.name {
        Some(name) => name.clone(),
        None => request.repository.rsplit('/').next().unwrap_or(&request.repository).to_string(),
    };
    install::check_name(&name)?;
    // Before anything is fetched.
    let settled = install::settled_task(models, &name, request.task.as_deref())?;
    let token = hub.token.clone().or_else(|| Cache::default().token());
    let transfer = Transfer::new(token.clone(), hub.retry_pause);
    let info =
        list(&hub_repository(hub, &token, &request.repository, request.revision.as_deref())?, &request.repository)?;
    if let Some(installed) = already_there(models, &name, &request.repository, &info.sha)? {
        return Ok(installed);
    }
    let names: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).filter(|f| is_inside(f)).collect();
    let chosen = choose(&names, request.file.as_deref())
        .map_err(|reason| Error::Invalid { field: request.repository.clone(), reason })?;

    // By commit from here on: the branch may move while files are fetched.
    let at_commit = hub_repository(hub, &token, &request.repository, Some(&info.sha))?;
    let staging = models.root().join(".pull").join(format!("{}@{}", request.repository.replace('/', "--"), info.sha));
    let _lock = install::lock(&staging)?;
    for file in &chosen.files {
        let path = staging.join(file);
        // A file has its own name only once its checksum was right.
        if !path.is_file() {
            transfer.fetch(&at_commit.url(&escape(file)), file, &path, progress)?;
        }
    }
    let task = settled.map_or_else(|| install::task_of(&staging), Ok)?;
    let weights = chosen.weights.iter().map(|f| staging.join(f)).collect();
    prove(&ModelSpec { weights, task: task.clone(), ..ModelSpec::bare(&name, &staging) })?;
    let head = Manifest { task, licence: info.card.and_then(|card| licence(&card)), ..Manifest::default() };
    let provenance = Provenance {
        repository: Some(request.repository.clone()),
        url: hub.endpoint.as_ref().map(|endpoint| format!("{}/{}", endpoint.trim_end_matches('/'), request.repository)),
        revision: Some(info.sha),
        ..Provenance::default()
    };
    install::install(models, &name, &staging, head, chosen.weights, provenance)
}

fn hub_repository(hub: &Hub, token: &Option<String>, id: &str, revision: Option<&str>) -> Result<ApiRepo> {
    let mut builder = ApiBuilder::new().with_progress(false).with_token(token.clone());
    if let Some(endpoint) = &hub.endpoint {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_string());
    }
    let api = builder.build().map_err(|e| Error::Internal { cause: e.to_string() })?;
    let revision = revision.unwrap_or("main").to_string();
    Ok(api.repo(Repo::with_revision(id.to_string(), RepoType::Model, revision)))
}

/// What the hub says of the repository at its revision.
fn list(repository: &ApiRepo, id: &str) -> Result<RepositoryInfo> {
    let request = repository.info_request();
    let url = request.uri_ref().map(|uri| uri.to_string()).unwrap_or_default();
    let request = request
        .config()
        .http_status_as_error(false)
        .timeout_connect(Some(transfer::CONNECT_TIMEOUT))
        .timeout_recv_response(Some(transfer::READ_TIMEOUT))
        .timeout_per_read(Some(transfer::READ_TIMEOUT))
        .build();
    let mut response = request.call().map_err(|e| remote(&url, e))?;
    if !response.status().is_success() {
        return Err(refusal(&url, id, &response));
    }
    response.body_mut().read_json().map_err(|e| remote(&url, format!("not a listing of a repository: {e}")))
}

/// The version that came from this commit, if there is one: a second pull of it has nothing to do.
fn already_there(models: &Repository, name: &str, id: &str, commit: &str) -> Result<Option<Installed>> {
    let Some(manifest) = install::existing_manifest(models, name)? else { return Ok(None) };
    let version = manifest.versions.iter().find(|(_, entry)| {
        let from = &entry.provenance;
        from.repository.as_deref() == Some(id) && from.revision.as_deref() == Some(commit)
    });
    Ok(version.map(|(&version, _)| Installed {
        name: name.to_string(),
        version,
        dir: dir_of(models, name, version),
        new: false,
    }))
}

fn dir_of(models: &Repository, name: &str, version: u64) -> PathBuf {
    models.root().join(name).join(version.to_string())
}

fn licence(card: &Card) -> Option<String> {
    match &card.license {
        serde_json::Value::String(word) => Some(word.clone()),
        serde_json::Value::Array(words) => {
            let words: Vec<&str> = words.iter().filter_map(|w| w.as_str()).collect();
            (!words.is_empty()).then(|| words.join(", "))
        }
        _ => None,
    }
}

/// A file's name inside an address: hf-hub puts it there as it is.
fn escape(file: &str) -> String {
    file.replace('%', "%25").replace('#', "%23").replace('?', "%3F").replace(' ', "%20")
}
