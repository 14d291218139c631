//! Models put in, exchanged and taken out while others are served.
//!
//! A new version warms up beside the old one and takes its place when it is ready: no request meets a gap. The old one
//! goes when the last request that found it has its answer, which is no later than that request's deadline.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::health::Health;
use super::lanes::Lanes;
use super::policy::BatchLimits;
use super::served::Served;
use super::{EncoderPool, Engine};
use crate::model::{LoadedModel, ModelInfo};
use crate::output::Output;
use crate::request::Request;
use crate::{Error, Result};

/// A model that is loaded and warms up, and that no request is sent to yet.
pub struct Standby(Arc<Served>);

impl Standby {
    pub fn info(&self) -> &Arc<ModelInfo> {
        &self.0.info
    }

    /// What its devices' trials came to so far.
    pub fn health(&self) -> Health {
        self.0.health(Instant::now()).health
    }
}

/// A model that no new request is sent to.
pub struct Retired {
    info: Arc<ModelInfo>,
    lanes: Weak<Lanes>,
}

impl Retired {
    pub fn info(&self) -> &Arc<ModelInfo> {
        &self.info
    }

    /// Whether every request it had is answered.
    pub fn is_gone(&self) -> bool {
        self.lanes.strong_count() == 0
    }
}

/// One model as it is served at this moment: what is asked about it and computed by it is of one version, whatever is
/// exchanged meanwhile.
#[derive(Clone)]
pub struct Pinned(Arc<Served>);

impl Pinned {
    pub fn info(&self) -> &Arc<ModelInfo> {
        &self.0.info
    }

    /// See [`Engine::infer`]; the request's own name of a model is not read.
    pub async fn infer(&self, request: Request) -> Result<Output> {
        self.0.infer(request, Instant::now()).await
    }

    /// Counts a request that was answered without this engine, and how long that took.
    pub fn count_found(&self, took: Duration) {
        self.0.tally.found(took);
    }

    /// Counts a request that could have been, and was not.
    pub fn count_missed(&self) {
        self.0.tally.missed();
    }
}

impl Engine {
    /// Starts the workers of one model, one a device: warm-up at the limits, then ready, then heartbeats. Returns
    /// at once; until the first device is warm the model's health is `Loading`.
    ///
    /// Errors: `Invalid` for limits the model cannot have and for a name served already; `Internal` if the
    /// system gives no thread.
    pub fn add(&self, model: LoadedModel, limits: BatchLimits) -> Result<()> {
        if self.models.load().iter().any(|m| m.info.name == model.info.name) {
            let reason = format!("`{}` is served already", model.info.name);
            return Err(Error::Invalid { field: "models".to_string(), reason });
        }
        let standby = self.prepare(model, limits)?;
        self.install(standby);
        Ok(())
    }

    /// As [`Engine::add`], for a model that takes its place later: by [`Engine::install`], once it is ready.
    pub fn prepare(&self, model: LoadedModel, limits: BatchLimits) -> Result<Standby> {
        let encoders = {
            let mut pool = self.encoders.lock();
            match &*pool {
                Some(encoders) => encoders.clone(),
                None => pool.insert(Arc::new(EncoderPool::new(self.settings.num_encoders)?)).clone(),
            }
        };
        Ok(Standby(Arc::new(Served::start(model, limits, &self.settings, self.gate.clone(), encoders)?)))
    }

    /// Sends the requests of this name to this model from now on, and gives back what they were sent to before.
    pub fn install(&self, standby: Standby) -> Option<Retired> {
        let new = standby.0;
        let mut old = None;
        self.change(|models| match models.iter_mut().find(|m| m.info.name == new.info.name) {
            Some(place) => old = Some(std::mem::replace(place, new.clone())),
            None => models.push(new.clone()),
        });
        // In this order: what the old one still has to say must not hide the new one.
        let retired = old.map(|old| self.retire(old, false));
        new.publish();
        retired
    }

    /// Sends no more requests to a model. What it has taken it answers.
    ///
    /// Errors: `UnknownModel`.
    pub fn remove(&self, name: &str) -> Result<Retired> {
        let served = self.find(Some(name))?;
        let mut old = None;
        self.change(|models| {
            let place = models.iter().position(|m| Arc::ptr_eq(m, &served));
            old = place.map(|place| models.remove(place));
        });
        drop(served);
        // Another thread may have been faster.
        old.map(|old| self.retire(old, true)).ok_or_else(|| self.unknown(name))
    }

    /// The models that get no new requests and have not answered all of their old ones.
    pub fn retired(&self) -> Vec<Arc<ModelInfo>> {
        let mut retired = self.retired.lock();
        retired.retain(|retired| !retired.is_gone());
        retired.iter().map(|retired| retired.info.clone()).collect()
    }

    /// The model as it is served now. Errors: `UnknownModel`.
    pub fn pin(&self, name: Option<&str>) -> Result<Pinned> {
        self.find(name).map(Pinned)
    }

    /// The devices of every model, also of those that only answer what they have taken.
    pub(super) fn lanes(&self) -> Vec<Arc<Lanes>> {
        let retired: Vec<_> = self.retired.lock().iter().filter_map(|retired| retired.lanes.upgrade()).collect();
        self.models.load().iter().map(|m| m.lanes.clone()).chain(retired).collect()
    }

    fn retire(&self, old: Arc<Served>, is_last: bool) -> Retired {
        old.lanes.hide(is_last);
        let retired = || Retired { info: old.info.clone(), lanes: Arc::downgrade(&old.lanes) };
        let mut all = self.retired.lock();
        all.retain(|retired| !retired.is_gone());
        all.push(retired());
        retired()
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Arc<Served>>)) {
        let _guard = self.changing.lock();
        let mut models = Vec::clone(&self.models.load());
        change(&mut models);
        self.models.store(Arc::new(models));
    }
}
