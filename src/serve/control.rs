//! What the protocols ask of whoever loads and unloads models. `app` does it: it knows where models come from.

use std::sync::Arc;

use super::Engine;
use crate::model::manifest::BatchingOverrides;
use crate::{Error, Result};

/// What a request to load a model may set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// `None`: the highest there is.
    pub version: Option<u64>,
    /// Over those of the manifest and of the settings, until the model is loaded anew.
    pub batching: BatchingOverrides,
}

/// A model that is known and takes no requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Idle {
    pub name: String,
    /// The one that is loaded, was to be loaded, or would be.
    pub version: String,
    pub state: IdleState,
}

/// Why a model takes no requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdleState {
    Loading,
    /// It was unloaded, or never loaded.
    Unloaded,
    /// It could not be loaded.
    Failed(String),
}

/// Loads and unloads models while others are served.
pub trait ModelControl: Send + Sync {
    /// The models that could be served and are not, by name. Reads the repository's folder.
    fn idle(&self, engine: &Engine) -> Vec<Idle>;

    /// Loads a model, or another version of one that is served, and has it take requests. Returns when it does, and when
    /// what it replaces has answered its last request or has had time enough.
    ///
    /// Blocks: reads all weights. When it fails, what was served goes on.
    /// Errors: `Invalid` where models are not loaded at request; `UnknownModel`; `Conflict` while the same model is being
    /// loaded or unloaded; `Draining`; whatever keeps the model from being loaded as `Invalid`.
    fn load(&self, engine: &Arc<Engine>, name: &str, options: LoadOptions) -> Result<()>;

    /// Has a model take no more requests. Returns when it has answered its last one, or has had time enough.
    ///
    /// Blocks.
    /// Errors: `Invalid` where models are not unloaded at request; `UnknownModel`; `Conflict`; `Draining`.
    fn unload(&self, engine: &Arc<Engine>, name: &str) -> Result<()>;
}

/// For servers whose models are what they were started with.
pub struct Fixed;

impl ModelControl for Fixed {
    fn idle(&self, _: &Engine) -> Vec<Idle> {
        Vec::new()
    }

    fn load(&self, _: &Arc<Engine>, name: &str, _: LoadOptions) -> Result<()> {
        Err(not_at_request(name, "loaded"))
    }

    fn unload(&self, _: &Arc<Engine>, name: &str) -> Result<()> {
        Err(not_at_request(name, "unloaded"))
    }
}

/// What a request is answered where the settings alone say what is served.
pub fn not_at_request(name: &str, done: &str) -> Error {
    let reason = format!("`{name}` cannot be {done} at request: ai.model_control is `settings`, not `explicit`");
    Error::Invalid { field: "model".to_string(), reason }
}
