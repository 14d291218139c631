//! Admission, waiting, batching, replying. Knows no HTTP and no device: it is written against
//! [`crate::model::Backend`].

pub mod policy;

use std::sync::Arc;
use std::time::Duration;

use crate::Result;
use crate::model::{LoadedModel, ModelInfo};
use crate::output::{Output, Token};
use crate::request::Request;
use policy::BatchLimits;

/// All models being served: the one door `api` knocks at.
pub struct Engine {}

/// Whether a model takes requests, and why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Warming up at the configured limits.
    Loading,
    Ready,
    /// The worker is restarting, or the heartbeat through the device failed.
    Unhealthy(String),
    Draining,
}

impl Engine {
    /// An engine without models. `default_model` answers requests that name none.
    pub fn new(default_model: Option<String>) -> Self {
        let _ = default_model;
        Self {}
    }

    /// Starts the workers of one model: warm-up at the limits, then ready, then heartbeats.
    pub fn add(&self, model: LoadedModel, limits: BatchLimits) -> Result<()> {
        let _ = (model, limits);
        unimplemented!("issue 2, serve room")
    }

    /// Computes embeddings: encodes, queues each input, waits for all rows. Dropping the future drops
    /// the entries that are not launched yet.
    ///
    /// Errors: those of the request, `QueueFull`, `Loading`, `Draining`, `Unhealthy`, `Deadline`, `Forward`.
    /// One bad input fails its own request only.
    pub async fn embed(&self, request: Request) -> Result<Output> {
        let _ = request;
        unimplemented!("issue 2, serve room")
    }

    /// The tokens of texts, off the async threads.
    pub async fn tokenize(
        &self,
        model: Option<&str>,
        texts: Vec<String>,
        add_special_tokens: bool,
    ) -> Result<Vec<Vec<Token>>> {
        let _ = (model, texts, add_special_tokens);
        unimplemented!("issue 2, serve room")
    }

    /// The texts of token ids, off the async threads.
    pub async fn decode(
        &self,
        model: Option<&str>,
        ids: Vec<Vec<u32>>,
        skip_special_tokens: bool,
    ) -> Result<Vec<String>> {
        let _ = (model, ids, skip_special_tokens);
        unimplemented!("issue 2, serve room")
    }

    /// What is served, default model first.
    pub fn models(&self) -> Vec<Arc<ModelInfo>> {
        unimplemented!("issue 2, serve room")
    }

    /// One model's info. Errors: `UnknownModel`.
    pub fn model(&self, name: Option<&str>) -> Result<Arc<ModelInfo>> {
        let _ = name;
        unimplemented!("issue 2, serve room")
    }

    /// One model's limits in force. Errors: `UnknownModel`.
    pub fn limits(&self, name: Option<&str>) -> Result<Arc<BatchLimits>> {
        let _ = name;
        unimplemented!("issue 2, serve room")
    }

    /// Puts new limits in force for the batches formed from now on. Errors: `UnknownModel`.
    pub fn set_limits(&self, name: &str, limits: BatchLimits) -> Result<()> {
        let _ = (name, limits);
        unimplemented!("issue 2, serve room")
    }

    /// Each model's name and health.
    pub fn health(&self) -> Vec<(crate::request::ModelName, Health)> {
        unimplemented!("issue 2, serve room")
    }

    /// Refuses new work with `Draining`, empties the queues until `deadline`, answers what is left with
    /// `Draining`. Returns the number of entries that were not computed.
    pub async fn drain(&self, deadline: Duration) -> usize {
        let _ = deadline;
        unimplemented!("issue 2, serve room")
    }
}
