//! The models of the settings: found, checked, loaded, and their batching limits; `control` exchanges them while others are
//! served.

mod control;

use std::sync::Arc;
use std::time::Instant;

use super::Models;
use crate::config::{Ai, Settings};
use crate::model::LoadedModel;
use crate::model::load::{Placement, load_for};
use crate::model::manifest::{BatchingOverrides, ModelSpec};
use crate::model::repository::{Layout, ModelEntry, Repository};
use crate::ops::device::{self, DeviceSpec};
use crate::request::ModelName;
use crate::serve::Engine;
use crate::serve::policy::BatchLimits;
use crate::{Error, Result};
pub use control::{Control, describe_metrics};

/// A model to serve, found but not loaded.
#[derive(Debug, Clone)]
pub struct Chosen {
    pub name: ModelName,
    entry: ModelEntry,
    version: u64,
    /// Of the request that had it loaded.
    overrides: BatchingOverrides,
}

impl Chosen {
    fn new(entry: ModelEntry, version: u64, overrides: BatchingOverrides) -> Self {
        Self { name: entry.name.as_str().into(), entry, version, overrides }
    }

    /// What is to be loaded.
    pub fn spec(&self) -> ModelSpec {
        self.entry.spec(self.version)
    }
}

/// Finds the models the settings name, or all of the repository's, the default one first.
///
/// Errors: [`Error::Config`] with everything that is wrong with any of them.
pub fn choose(ai: &Ai) -> Result<Vec<Chosen>> {
    let repository = Repository::locate(ai.models_dir.as_deref());
    let mut faults = Vec::new();
    let mut chosen: Vec<Chosen> = Vec::new();
    let mut found = |found: Result<(ModelEntry, u64)>| match found {
        Ok((entry, version)) if chosen.iter().any(|c| *c.name == *entry.name) => {
            faults.push(format!("ai.models: two models are called {} (version {version} is the second)", entry.name));
        }
        Ok((entry, version)) => chosen.push(Chosen::new(entry, version, BatchingOverrides::default())),
        Err(e) => faults.push(e.to_string()),
    };
    if ai.models.is_empty() {
        for (_, entry) in repository.list()? {
            found(entry.and_then(|entry| entry.version(None).map(|version| (entry, version))));
        }
    } else {
        ai.models.iter().for_each(|model| found(repository.find(model)));
    }
    if faults.is_empty() && chosen.is_empty() {
        let root = repository.root().display();
        faults.push(format!("no model to serve: {root} holds none; `eremois models pull` and `import` add some"));
    }
    if let Some(default) = ai.default_model.as_deref()
        && faults.is_empty()
    {
        match chosen.iter().position(|c| &*c.name == default) {
            Some(position) => chosen[..=position].rotate_right(1),
            None => {
                let names: Vec<&str> = chosen.iter().map(|c| &*c.name).collect();
                faults.push(format!("ai.default_model: {default:?} is not served; served: {}", names.join(", ")));
            }
        }
    }
    if faults.is_empty() { Ok(chosen) } else { Err(Error::Config { faults }) }
}

/// The models the settings name, to be loaded.
///
/// Errors: as [`choose`].
pub fn of(settings: &Settings) -> Result<Models> {
    let chosen = choose(&settings.ai)?;
    let default_model = chosen.first().map(|first| first.name.to_string());
    let control = Arc::new(Control::new(settings));
    let (loading, applying) = (control.clone(), control.clone());
    Ok(Models {
        default_model,
        load: Box::new(move |engine| loading.start(chosen, engine)),
        apply: Box::new(move |settings, engine| applying.apply(settings, engine)),
        control,
    })
}

/// Loads every chosen model and starts its worker. Warm-up goes on when this returns.
///
/// Blocks: reads all weights.
/// Errors: the first model's that fails; models before it are serving then.
pub fn load_all(chosen: &[Chosen], ai: &Ai, engine: &Arc<Engine>) -> Result<()> {
    for chosen in chosen {
        let (model, limits) = chosen.load(ai)?;
        engine.add(model, limits)?;
    }
    Ok(())
}

impl Chosen {
    /// Reads a model's weights onto the devices. Blocks.
    ///
    /// Errors: those of the devices, of the files and their checksums.
    fn load(&self, ai: &Ai) -> Result<(LoadedModel, BatchLimits)> {
        let (start, batching) = (Instant::now(), self.batching());
        let devices = device::select(&ai.device)?;
        self.entry.verify_files(self.version)?;
        let spec = ModelSpec { image_limits: ai.image_limits(), ..self.spec() };
        let model = load_for(&spec, &devices, &placement(ai, &batching))?;
        let info = &model.info;
        tracing::info!(
            model = %self.name, version = self.version, architecture = info.architecture, device = info.device,
            dtype = info.dtype, max_seq_len = info.max_seq_len, seconds = start.elapsed().as_secs_f64(), "model loaded"
        );
        let limits = limits(&ai.limits(), &batching, &self.name, info.max_seq_len);
        Ok((model, limits))
    }

    /// The manifest's limits with those over them that a request to load it named.
    fn batching(&self) -> BatchingOverrides {
        let (asked, manifest) = (&self.overrides, self.entry.batching());
        BatchingOverrides {
            max_batch_size: asked.max_batch_size.or(manifest.max_batch_size),
            max_batch_tokens: asked.max_batch_tokens.or(manifest.max_batch_tokens),
            max_queue_delay: asked.max_queue_delay.or(manifest.max_queue_delay),
            max_queue_size: asked.max_queue_size.or(manifest.max_queue_size),
        }
    }

    /// Puts the limits of these settings, and of the manifest as it is now, in force. A model whose manifest has become
    /// unreadable, or whose limits are wrong, keeps what it had.
    fn apply_limits(&mut self, ai: &Ai, engine: &Engine) {
        // Not added yet: it will start with what the settings said at the start.
        let Ok(info) = engine.model(Some(&self.name)) else { return };
        let set = ModelEntry::open(&self.entry.path).and_then(|entry| {
            self.entry.take_batching(entry);
            let limits = limits(&ai.limits(), &self.batching(), &self.name, info.max_seq_len);
            engine.set_limits(&self.name, limits)
        });
        if let Err(e) = set {
            tracing::error!(model = %self.name, error = %e, "the model keeps its batching limits");
        }
    }

    /// Whether these are the same files, as far as the repository tells: limits can change without loading anew.
    fn is_same(&self, other: &Self) -> bool {
        let bare = |chosen: &Self| {
            let mut entry = chosen.entry.clone();
            entry.take_batching(ModelEntry { layout: Layout::Folder, ..entry.clone() });
            (entry.path, entry.layout, chosen.version)
        };
        bare(self) == bare(other)
    }
}

/// What a device needs to know of the model before it is loaded.
fn placement(ai: &Ai, manifest: &BatchingOverrides) -> Placement {
    Placement {
        max_batch_tokens: manifest.max_batch_tokens.unwrap_or(ai.max_batch_tokens),
        max_batch_size: manifest.max_batch_size.unwrap_or(ai.max_batch_size),
        cache_dir: ai.cache_dir(),
        falls_back: ai.device == DeviceSpec::Auto,
    }
}

/// The settings' limits with the manifest's over them.
fn limits(settings: &BatchLimits, manifest: &BatchingOverrides, name: &str, max_seq_len: usize) -> BatchLimits {
    let mut limits = BatchLimits {
        max_batch_size: manifest.max_batch_size.unwrap_or(settings.max_batch_size),
        max_batch_tokens: manifest.max_batch_tokens.unwrap_or(settings.max_batch_tokens),
        max_queue_delay: manifest.max_queue_delay.unwrap_or(settings.max_queue_delay),
        max_queue_size: manifest.max_queue_size.unwrap_or(settings.max_queue_size),
    };
    if limits.max_batch_tokens < max_seq_len {
        // A long-context model beside short ones must not need a setting of its own to start.
        tracing::info!(model = name, max_batch_tokens = max_seq_len, "max_batch_tokens raised to max_seq_len");
        limits.max_batch_tokens = max_seq_len;
    }
    limits
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_manifest_wins_and_long_sequences_fit() {
        let settings = BatchLimits {
            max_batch_size: 32,
            max_batch_tokens: 4096,
            max_queue_delay: Duration::ZERO,
            max_queue_size: 100,
        };
        let manifest = BatchingOverrides { max_batch_size: Some(4), ..Default::default() };
        let limits_of = |manifest, max_seq_len| limits(&settings, manifest, "m", max_seq_len);
        let ours = limits_of(&manifest, 512);
        assert_eq!((ours.max_batch_size, ours.max_batch_tokens, ours.max_queue_size), (4, 4096, 100));
        assert_eq!(limits_of(&BatchingOverrides::default(), 8192).max_batch_tokens, 8192);
    }
}
