//! From a request to its results: what the cache has is not computed, and what is computed already is waited for.
//!
//! ```text
//! Request ─▶ key of each input ─▶ peek ─▶ all there: answered
//!                                  │ missing
//!                                  ▼
//!               flights: lead ─▶ Cache::get ─▶ Engine::infer, all that are missing in one request ─▶ put ─▶ merge
//!                        wait ─▶ the result of another request, or its turn to lead                        ─▶ merge
//! ```
//!
//! A background request neither leads nor waits: nobody shall wait for it, and what it finds in no level it computes.
//! With the cache off a request goes straight to the engine.

pub mod erase;
pub mod flight;
pub mod keep;
pub mod key;
pub mod outcome;
mod passage;
pub mod stored_form;
pub mod warm;

use std::sync::Arc;
use std::time::{Duration, Instant};

use ::metrics::{Counter, Unit, counter, describe_counter};
use async_trait::async_trait;

use crate::model::ModelInfo;
use crate::output::{Output, Phases, Row, Usage};
use crate::request::{Input, Request, Task, TaskParams};
use crate::serve::{Engine, Pinned};
use crate::store::cache::{Cache, CacheKey, CachedItem};
use crate::{Error, Result};
use flight::Flights;
use key::Form;
use passage::Passage;
use warm::{Known, Sink};

/// Registers help and unit of every metric of this room. Call it once, after the recorder is installed.
pub fn describe_metrics() {
    describe_counter!(
        "eremois_cache_joined_total",
        Unit::Count,
        "Results waited for, because they were being computed"
    );
}

/// What a request wants of the cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CacheUse {
    /// Results may come from it and go into it.
    #[default]
    Full,
    /// All is computed anew, and kept.
    Refresh,
    /// Nothing comes from it, nothing goes into it.
    Bypass,
}

/// The results of a request.
#[derive(Debug, Clone)]
pub struct Computed {
    pub info: Arc<ModelInfo>,
    pub task: Task,
    /// In the order of the inputs, f32; what they hold is the task's: see [`crate::model::pack::Wanted`].
    pub rows: Vec<Row>,
    /// Over all inputs, as if each had been computed.
    pub usage: Usage,
    pub phases: Phases,
    /// Inputs that were not computed for this request: found, waited for, or repeated in it. `None` where the cache was
    /// not asked.
    pub num_cached: Option<usize>,
}

impl Computed {
    /// Whether this was computed by the model that the request was read for, or that its answer is written with.
    ///
    /// Errors: `Loading` where another version took its place in between: asked again, all is of that one.
    pub fn check_model(&self, info: &Arc<ModelInfo>) -> Result<()> {
        match Arc::ptr_eq(&self.info, info) {
            true => Ok(()),
            false => Err(Error::Loading { model: self.info.name.to_string() }),
        }
    }
}

/// Computes, through the cache where there is one.
pub struct Inferences {
    engine: Arc<Engine>,
    caching: Option<Caching>,
    flights: Flights,
    joined: Counter,
}

/// The cache with how long results are kept in it.
struct Caching {
    cache: Arc<dyn Cache>,
    ttl: Duration,
}

/// What every request passes on its way.
#[derive(Clone, Copy)]
struct Through<'a> {
    /// Of one version from the name of a result to its values.
    model: &'a Pinned,
    caching: &'a Caching,
    flights: &'a Flights,
    joined: &'a Counter,
}

impl Inferences {
    /// `cache` is `None`, or a cache and the time for which it keeps results, above zero.
    pub fn new(engine: Arc<Engine>, cache: Option<(Arc<dyn Cache>, Duration)>) -> Self {
        let caching = cache.map(|(cache, ttl)| Caching { cache, ttl });
        Self { engine, caching, flights: Flights::default(), joined: counter!("eremois_cache_joined_total") }
    }

    /// Embeddings of the request's inputs. Dropping the future leaves what it computes to others who wait for it.
    ///
    /// Errors: those of [`Engine::infer`], which name an input by its place in this request.
    pub async fn infer(&self, request: Request, cache_use: CacheUse) -> Result<Computed> {
        let start = Instant::now();
        let model = self.engine.pin(request.model.as_deref())?;
        let info = model.info().clone();
        let caching = self.caching.as_ref().filter(|_| cache_use != CacheUse::Bypass);
        // A draining server takes no more, also not what it could answer: the client shall find another one. That, and
        // what the model does not take, the engine refuses.
        let can_name = |_: &&Caching| !request.inputs.is_empty() && !self.engine.is_draining();
        let named = caching.filter(can_name).and_then(|caching| Some((caching, Form::of(&info, &request.params)?)));
        let Some((caching, form)) = named else {
            let task = request.params.task.clone();
            let Output { model: _, rows, num_tokens: _, usage, phases } = model.infer(request).await?;
            let rows = rows.into_iter().map(Row::Own).collect();
            return Ok(Computed { info, task, rows, usage, phases, num_cached: None });
        };
        let through = Through { model: &model, caching, flights: &self.flights, joined: &self.joined };
        let computed = Passage::new(through, info, form, request, start).await?.run(cache_use).await?;
        let is_found = computed.num_cached == Some(computed.rows.len());
        // Who wants all anew has not looked.
        match cache_use {
            CacheUse::Full if is_found => model.count_found(computed.phases.total),
            CacheUse::Full => model.count_missed(),
            CacheUse::Refresh | CacheUse::Bypass => {}
        }
        Ok(computed)
    }

    /// Whether results are kept for those who ask for them again.
    pub fn has_cache(&self) -> bool {
        self.caching.is_some()
    }

    /// The model of this name as it is served now; the default one for `None`.
    pub fn model(&self, name: Option<&str>) -> Option<Arc<ModelInfo>> {
        self.engine.model(name).ok()
    }

    /// What can be said of a request before it is computed. Errors: `UnknownModel`, `Invalid`.
    pub fn check(&self, request: &Request) -> Result<()> {
        self.engine.check(request)
    }

    /// The names of the results of an inference's inputs: what [`Inferences::forget`] removes.
    ///
    /// `None` where this version of the model is not served, or does not take these parameters: then nobody can name
    /// them any more, and they go when their time is over.
    pub fn keys(&self, model: &str, version: &str, params: &TaskParams, inputs: &[Input]) -> Option<Vec<CacheKey>> {
        let info = self.engine.model(Some(model)).ok().filter(|info| info.version == version)?;
        let form = Form::of(&info, params)?;
        Some(inputs.iter().map(|input| form.key(input)).collect())
    }

    /// Removes results from the cache: of a user that is erased. Returns whether they are known to be gone.
    pub async fn forget(&self, keys: &[CacheKey]) -> bool {
        match &self.caching {
            Some(caching) => caching.cache.remove(keys).await,
            None => true,
        }
    }

    /// The models whose results can be named, for [`warm::warm`].
    pub fn known(&self) -> Vec<Known> {
        self.engine.encoders().into_iter().map(|(info, encoder)| Known { info, encoder }).collect()
    }

    /// See [`Cache::upkeep`].
    pub fn upkeep(&self) {
        if let Some(caching) = &self.caching {
            caching.cache.upkeep();
        }
    }
}

/// The cache in front of the engine; without one nothing is kept.
#[async_trait]
impl Sink for Inferences {
    async fn put(&self, items: &[(CacheKey, CachedItem)]) -> Result<()> {
        if let Some(caching) = &self.caching {
            caching.cache.put(items, caching.ttl).await;
        }
        Ok(())
    }

    async fn remove(&self, keys: &[CacheKey]) {
        self.forget(keys).await;
    }
}
