//! Admission, waiting, batching, replying. Knows no HTTP and no device: it is written against
//! [`crate::model::Backend`].
//!
//! ```text
//! handler ── Served::admit: gate, health, room ──▶ encoders ── Lanes::push: which device ──▶ Worker, one a device
//!    ▲                                                                  Backlog::take ▶ Batch::pack ▶ launch
//!    └────────────────── Client::complete ◀──────────────────────────── finish ◀─────────────────────────┘
//! ```
//!
//! A request is admitted whole or refused, before any work is done for it. From then on its [`ticket::Client`]
//! is answered exactly once: with rows, with an error, or, if every ticket is lost, with `Internal`.
//!
//! Background requests go the same way behind the interactive ones: their places are others ([`room::Room`]), their texts
//! are tokenised by threads that have nothing else to do, and their entries get what room a batch has left
//! ([`backlog::Backlog`]).

pub mod backlog;
pub mod batch;
pub mod chunks;
pub mod class;
pub mod cost;
pub mod dispatch;
pub mod encoders;
pub mod fair;
mod handover;
mod health;
mod lanes;
mod loss;
mod memory;
pub mod metrics;
pub mod policy;
pub mod queue;
mod recover;
pub mod room;
mod served;
mod shared;
pub mod statistics;
pub mod ticket;
mod trial;
mod worker;

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use crate::model::encode::Encoder;
use crate::model::{LoadedModel, ModelInfo};
use crate::output::{Output, Token};
use crate::request::{ModelName, Request};
use crate::{Error, Result};
use encoders::EncoderPool;
pub use health::{Health, ModelHealth};
use loss::look_interval;
use policy::BatchLimits;
use queue::Gate;
pub use served::MAX_TOP_K;
use served::Served;
use statistics::Statistics;

/// Times and sizes of the engine that are not limits of batching.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// An idle device gets a heartbeat this long after its last batch.
    pub heartbeat_interval: Duration,
    /// A device that failed its trial is tried again after this.
    pub retry_interval: Duration,
    /// A device that works on one batch for longer counts as hung.
    pub device_timeout: Duration,
    /// Threads that tokenise. At least 1.
    pub num_encoders: usize,
}

/// All models being served: the one door `api` knocks at.
pub struct Engine {
    default_model: Option<String>,
    settings: Settings,
    /// In the order they were added. Readers take a snapshot; `add` replaces it.
    models: ArcSwap<Vec<Arc<Served>>>,
    /// Started with the first model, shared by all. Held while a model is added: two at once must not lose
    /// one of them.
    encoders: Mutex<Option<Arc<EncoderPool>>>,
    gate: Arc<Gate>,
}

impl Engine {
    /// An engine without models. `default_model` answers requests that name none; without it the model
    /// added first does.
    pub fn new(default_model: Option<String>) -> Self {
        Self::with_settings(default_model, Settings::default())
    }

    /// As [`Engine::new`], with other times than the usual ones.
    pub fn with_settings(default_model: Option<String>, settings: Settings) -> Self {
        let (models, encoders, gate) = (ArcSwap::default(), Mutex::default(), Arc::default());
        Self { default_model, settings, models, encoders, gate }
    }

    /// Starts the workers of one model, one a device: warm-up at the limits, then ready, then heartbeats. Returns
    /// at once; until the first device is warm the model's health is `Loading`.
    ///
    /// Errors: `Invalid` for limits the model cannot have and for a name served already; `Internal` if the
    /// system gives no thread.
    pub fn add(&self, model: LoadedModel, limits: BatchLimits) -> Result<()> {
        let mut pool = self.encoders.lock();
        let mut models = Vec::clone(&self.models.load());
        if models.iter().any(|m| m.info.name == model.info.name) {
            let reason = format!("`{}` is served already", model.info.name);
            return Err(Error::Invalid { field: "models".to_string(), reason });
        }
        let encoders = match &*pool {
            Some(encoders) => encoders.clone(),
            None => pool.insert(Arc::new(EncoderPool::new(self.settings.num_encoders)?)).clone(),
        };
        models.push(Arc::new(Served::start(model, limits, &self.settings, self.gate.clone(), encoders)?));
        self.models.store(Arc::new(models));
        Ok(())
    }

    /// Computes embeddings: encodes, queues each input, waits for all rows. Dropping the future drops
    /// the entries that are not launched yet.
    ///
    /// Errors: those of the request, `QueueFull`, `Loading`, `Draining`, `Unhealthy`, `Deadline`, `Forward`.
    /// One bad input fails its own request only.
    pub async fn infer(&self, request: Request) -> Result<Output> {
        let start = Instant::now();
        self.find(request.model.as_deref())?.infer(request, start).await
    }

    /// What can be said of a request before it is tokenised, for one that is computed later.
    ///
    /// Errors: `UnknownModel`; `Invalid` for parameters that the model does not take.
    pub fn check(&self, request: &Request) -> Result<()> {
        self.find(request.model.as_deref())?.check(&request.params)
    }

    /// The tokens of texts, off the async threads.
    ///
    /// Errors: `UnknownModel`, `Empty`, `TooLarge`, `QueueFull`, `Draining`, and the encoder's.
    pub async fn tokenize(
        &self,
        model: Option<&str>,
        texts: Vec<String>,
        add_special_tokens: bool,
    ) -> Result<Vec<Vec<Token>>> {
        let tokenize = move |encoder: &Encoder, _, text: &String| encoder.tokenize(text, add_special_tokens);
        self.find(model)?.on_encoders("inputs", texts, String::len, tokenize).await
    }

    /// The texts of token ids, off the async threads.
    ///
    /// Errors: as [`Engine::tokenize`].
    pub async fn decode(
        &self,
        model: Option<&str>,
        ids: Vec<Vec<u32>>,
        skip_special_tokens: bool,
    ) -> Result<Vec<String>> {
        let decode = move |encoder: &Encoder, _, ids: &Vec<u32>| encoder.decode(ids, skip_special_tokens);
        self.find(model)?.on_encoders("ids", ids, Vec::len, decode).await
    }

    /// What is served, default model first.
    pub fn models(&self) -> Vec<Arc<ModelInfo>> {
        let mut infos: Vec<_> = self.models.load().iter().map(|m| m.info.clone()).collect();
        if let Some(default) = infos.iter().position(|info| Some(&*info.name) == self.default_model.as_deref()) {
            infos[..=default].rotate_right(1);
        }
        infos
    }

    /// What is served, with what tokenises for it.
    pub fn encoders(&self) -> Vec<(Arc<ModelInfo>, Arc<Encoder>)> {
        self.models.load().iter().map(|m| (m.info.clone(), m.encoder().clone())).collect()
    }

    /// One model's info. Errors: `UnknownModel`.
    pub fn model(&self, name: Option<&str>) -> Result<Arc<ModelInfo>> {
        Ok(self.find(name)?.info.clone())
    }

    /// One model's limits in force. Errors: `UnknownModel`.
    pub fn limits(&self, name: Option<&str>) -> Result<Arc<BatchLimits>> {
        Ok(self.find(name)?.limits.load_full())
    }

    /// What one model has done since it was added. Errors: `UnknownModel`.
    pub fn statistics(&self, name: &str) -> Result<Statistics> {
        Ok(self.find(Some(name))?.statistics())
    }

    /// Counts a request that was answered without this engine, and how long that took. Errors: `UnknownModel`.
    pub fn count_found(&self, name: &str, took: Duration) -> Result<()> {
        self.find(Some(name)).map(|served| served.tally.found(took))
    }

    /// Counts a request that could have been, and was not. Errors: `UnknownModel`.
    pub fn count_missed(&self, name: &str) -> Result<()> {
        self.find(Some(name)).map(|served| served.tally.missed())
    }

    /// Puts new limits in force for the requests admitted and the batches formed from now on, and logs old
    /// and new. What waits already stays, also above a smaller `max_queue_size`. A `max_batch_tokens` that was lowered
    /// for want of memory is what is said here again.
    ///
    /// Errors: `UnknownModel`; `Invalid` for limits the model cannot have or one of its devices has no memory for,
    /// which changes nothing.
    pub fn set_limits(&self, name: &str, limits: BatchLimits) -> Result<()> {
        let served = self.find(Some(name))?;
        limits.check(served.info.max_seq_len)?;
        served.lanes.check_limits(&limits)?;
        let new = Arc::new(limits);
        let old = served.limits.swap(new.clone());
        served.metrics.max_batch_tokens.set(new.max_batch_tokens as f64);
        if old != new {
            tracing::info!(model = name, ?old, ?new, "batching limits changed");
            // A shorter delay may be over already.
            served.lanes.wake();
        }
        Ok(())
    }

    /// Each model's name and health.
    pub fn health(&self) -> Vec<(ModelName, Health)> {
        self.models_health().into_iter().map(|m| (m.model, m.health)).collect()
    }

    /// Each model's health, and that of its devices.
    pub fn models_health(&self) -> Vec<ModelHealth> {
        let now = Instant::now();
        self.models.load().iter().map(|m| m.health(now)).collect()
    }

    /// Whether [`Engine::drain`] has been called: no new work is taken.
    pub fn is_draining(&self) -> bool {
        self.gate.is_draining()
    }

    /// Refuses new work with `Draining`, empties the queues until `deadline`, answers what is left with
    /// `Draining`. Returns the number of entries that were not computed.
    pub async fn drain(&self, deadline: Duration) -> usize {
        self.gate.close();
        if tokio::time::timeout(deadline, self.gate.emptied()).await.is_ok() {
            return 0;
        }
        let num_left = self.gate.num_accepted();
        self.gate.abort();
        self.models.load().iter().for_each(|m| m.lanes.wake());
        // The workers answer as soon as their batch is done. One that hangs in its device never does: nobody
        // can answer for what is on the device, so the wait has an end.
        let _ = tokio::time::timeout(LAST_ANSWERS, self.gate.emptied()).await;
        tracing::warn!(num_left, "the drain's deadline passed; entries were not computed");
        num_left
    }

    /// `DeviceLost` once a model's last device is lost to this process, by an error or because it hangs for good: the
    /// server should drain what other models' devices still compute, and end. `None` while every model has one that is
    /// well, or may be again.
    pub fn loss(&self) -> Option<Error> {
        let now = Instant::now();
        self.models.load().iter().for_each(|m| m.lanes.give_up_hung(now));
        self.gate.loss.cause().map(|cause| Error::DeviceLost { cause: cause.to_string() })
    }

    /// Completes when there is a [`Engine::loss`]. Somebody has to wait here, or hung devices are not found.
    pub async fn lost(&self) -> Error {
        loop {
            // Made before the look, so that no word falls between the two.
            let told = self.gate.loss.told();
            if let Some(error) = self.loss() {
                return error;
            }
            let _ = tokio::time::timeout(look_interval(&self.settings), told).await;
        }
    }

    fn find(&self, name: Option<&str>) -> Result<Arc<Served>> {
        let models = self.models.load();
        let wanted = name.or(self.default_model.as_deref());
        let found = match wanted {
            Some(wanted) => models.iter().find(|m| &*m.info.name == wanted),
            None => models.first(),
        };
        found.cloned().ok_or_else(|| {
            let names: Vec<&str> = models.iter().map(|m| &*m.info.name).collect();
            let served = if names.is_empty() { "none".to_string() } else { names.join(", ") };
            Error::UnknownModel { model: wanted.unwrap_or("(default)").to_string(), served }
        })
    }
}

/// How long a drain waits for the answers to what it gave up.
const LAST_ANSWERS: Duration = Duration::from_millis(500);
