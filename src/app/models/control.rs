//! Models loaded, exchanged and unloaded while others are served: at a client's request, or because the settings or the
//! repository have changed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::metrics::{Unit, counter, describe_counter};
use parking_lot::Mutex;

use super::{Chosen, choose, load_all};
use crate::app::READY_POLL;
use crate::config::words::ControlMode;
use crate::config::{Ai, Settings};
use crate::model::repository::Repository;
use crate::serve::control::{Idle, IdleState, LoadOptions, ModelControl, not_at_request};
use crate::serve::{Engine, Health, Retired, Standby};
use crate::{Error, Result};

/// Registers help and unit of every metric of this file.
pub fn describe_metrics() {
    describe_counter!(
        "eremois_model_loads_total",
        Unit::Count,
        "Models loaded or exchanged while the server runs, by model and outcome"
    );
    describe_counter!("eremois_model_unloads_total", Unit::Count, "Models unloaded while the server runs, by model");
}

/// What is served and what could be.
pub struct Control {
    mode: ControlMode,
    /// How long a model that is replaced or unloaded is waited for.
    patience: Duration,
    /// Held by whoever changes what is served: one at a time, or the devices' memory would have to hold several new ones.
    turn: Mutex<()>,
    state: Mutex<State>,
}

struct State {
    /// As read last.
    ai: Ai,
    served: Vec<Chosen>,
    /// What went wrong when a model was loaded last.
    failed: BTreeMap<String, String>,
    /// Being loaded or unloaded, with the version.
    busy: BTreeMap<String, Busy>,
}

#[derive(Clone, PartialEq)]
enum Busy {
    Loading(u64),
    Unloading,
}

/// The note that a model is being loaded or unloaded; dropping it takes it away.
struct Claim<'a> {
    control: &'a Control,
    name: String,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.control.state.lock().busy.remove(&self.name);
    }
}

impl Control {
    pub fn new(settings: &Settings) -> Self {
        let ai = settings.ai.clone();
        let (served, failed, busy) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        let state = Mutex::new(State { ai, served, failed, busy });
        Self { mode: settings.ai.model_control, patience: settings.api.drain_timeout, turn: Mutex::new(()), state }
    }

    /// Loads what a server starts with. Errors: as [`load_all`].
    pub fn start(&self, chosen: Vec<Chosen>, engine: &Arc<Engine>) -> Result<()> {
        let _turn = self.turn.lock();
        let ai = self.state.lock().ai.clone();
        load_all(&chosen, &ai, engine)?;
        self.state.lock().served = chosen;
        Ok(())
    }

    /// Puts changed settings in force: the limits here, the models on a thread of their own.
    pub fn apply(self: &Arc<Self>, settings: &Settings, engine: &Arc<Engine>) {
        let mut state = self.state.lock();
        let is_other = (&state.ai.models, &state.ai.models_dir) != (&settings.ai.models, &settings.ai.models_dir);
        state.ai = settings.ai.clone();
        let ai = state.ai.clone();
        state.served.iter_mut().for_each(|chosen| chosen.apply_limits(&ai, engine));
        drop(state);
        match self.mode {
            ControlMode::Settings => {
                let (control, engine) = (self.clone(), engine.clone());
                let follow = move || control.follow(&engine);
                if let Err(e) = std::thread::Builder::new().name("models".to_string()).spawn(follow) {
                    tracing::error!(error = %e, "the models stay as they are: there is no thread to load them");
                }
            }
            ControlMode::Explicit if is_other => {
                tracing::warn!("the models stay as they are: ai.model_control leaves them to requests");
            }
            ControlMode::Explicit => {}
        }
    }

    /// Makes what is served what the settings and the repository say. A model that cannot be loaded is told of, and the
    /// others go on.
    fn follow(&self, engine: &Arc<Engine>) {
        let _turn = self.turn.lock();
        let (ai, served) = {
            let state = self.state.lock();
            (state.ai.clone(), state.served.clone())
        };
        let wanted = match choose(&ai) {
            Ok(wanted) => wanted,
            Err(e) => {
                for fault in e.to_string().lines() {
                    tracing::error!(fault, "the models stay as they are");
                }
                return;
            }
        };
        for chosen in &wanted {
            if !served.iter().any(|old| old.name == chosen.name && old.is_same(chosen)) {
                let _claim = self.claim(&chosen.name, Busy::Loading(chosen.version));
                // Told of in there.
                let _ = self.put(engine, chosen.clone());
            }
        }
        engine.set_default(wanted.first().map(|first| first.name.to_string()));
        for old in served.iter().filter(|old| wanted.iter().all(|chosen| chosen.name != old.name)) {
            let _claim = self.claim(&old.name, Busy::Unloading);
            if let Err(e) = self.take_out(engine, &old.name) {
                tracing::error!(model = %old.name, error = %e, "the model could not be unloaded");
            }
        }
    }

    /// Loads a model and has it take the place of what was served under its name.
    fn put(&self, engine: &Arc<Engine>, chosen: Chosen) -> Result<()> {
        let (name, version, start) = (chosen.name.to_string(), chosen.version, Instant::now());
        let ai = self.state.lock().ai.clone();
        let standby = chosen.load(&ai).and_then(|(model, limits)| {
            let standby = engine.prepare(model, limits)?;
            wait_until_ready(&standby, engine)?;
            Ok(standby)
        });
        let outcome = |outcome| counter!("eremois_model_loads_total", "model" => name.clone(), "outcome" => outcome);
        let standby = match standby {
            Ok(standby) => standby,
            Err(e) => {
                outcome("failed").increment(1);
                tracing::error!(model = name, version, error = %e, "the model could not be loaded");
                self.state.lock().failed.insert(name, e.to_string());
                return Err(e);
            }
        };
        let old = engine.install(standby);
        {
            let mut state = self.state.lock();
            state.failed.remove(&name);
            state.served.retain(|old| old.name != chosen.name);
            state.served.push(chosen);
        }
        outcome("ok").increment(1);
        tracing::info!(model = name, version, seconds = start.elapsed().as_secs_f64(), "the model takes requests");
        old.iter().for_each(|old| self.wait_until_gone(old));
        Ok(())
    }

    fn take_out(&self, engine: &Engine, name: &str) -> Result<()> {
        let old = engine.remove(name)?;
        self.state.lock().served.retain(|served| *served.name != *name);
        counter!("eremois_model_unloads_total", "model" => name.to_string()).increment(1);
        self.wait_until_gone(&old);
        Ok(())
    }

    fn wait_until_gone(&self, old: &Retired) {
        let (start, info) = (Instant::now(), old.info());
        while !old.is_gone() && start.elapsed() < self.patience {
            std::thread::sleep(READY_POLL);
        }
        let seconds = start.elapsed().as_secs_f64();
        match old.is_gone() {
            true => tracing::info!(model = %info.name, version = info.version, seconds, "the model is unloaded"),
            false => tracing::warn!(
                model = %info.name, version = info.version, seconds,
                "the model is not asked any more; it is unloaded when its last request is answered"
            ),
        }
    }

    /// `None` while somebody else loads or unloads this model.
    fn claim(&self, name: &str, busy: Busy) -> Option<Claim<'_>> {
        let mut state = self.state.lock();
        if state.busy.contains_key(name) {
            return None;
        }
        state.busy.insert(name.to_string(), busy);
        Some(Claim { control: self, name: name.to_string() })
    }

    /// A model of the repository, or of a path that the settings name. Never of a path that a client names.
    fn find(&self, name: &str, options: &LoadOptions) -> Result<Chosen> {
        let ai = self.state.lock().ai.clone();
        let repository = Repository::locate(ai.models_dir.as_deref());
        let configured = ai.models.iter().filter_map(|model| repository.find(model).ok());
        let configured = configured.map(|(entry, _)| entry).find(|entry| entry.name == name);
        let entry = match configured {
            Some(entry) => entry,
            None => {
                let listed = repository.list()?;
                let found = listed.iter().position(|(listed, _)| listed == name);
                let names = || listed.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
                let unknown = || Error::UnknownModel { model: name.to_string(), served: names() };
                let found = found.ok_or_else(unknown)?;
                listed.into_iter().nth(found).ok_or_else(|| Error::Internal { cause: name.to_string() })?.1?
            }
        };
        let version = entry.version(options.version)?;
        Ok(Chosen::new(entry, version, options.batching.clone()))
    }

    fn check_mode(&self, engine: &Engine, name: &str, done: &str) -> Result<()> {
        match self.mode {
            ControlMode::Settings => Err(not_at_request(name, done)),
            ControlMode::Explicit if engine.is_draining() => Err(Error::Draining),
            ControlMode::Explicit => Ok(()),
        }
    }
}

impl ModelControl for Control {
    fn idle(&self, engine: &Engine) -> Vec<Idle> {
        let (ai, failed, busy) = {
            let state = self.state.lock();
            (state.ai.clone(), state.failed.clone(), state.busy.clone())
        };
        let listed = Repository::locate(ai.models_dir.as_deref()).list().unwrap_or_default();
        let latest = |name: &str| {
            let entry = listed.iter().find(|(listed, _)| listed == name).and_then(|(_, entry)| entry.as_ref().ok());
            entry.and_then(|entry| entry.versions.last()).map(u64::to_string).unwrap_or_default()
        };
        let mut idle: BTreeMap<String, Idle> = BTreeMap::new();
        let mut note = |name: &str, version: String, state| {
            idle.insert(name.to_string(), Idle { name: name.to_string(), version, state });
        };
        if self.mode == ControlMode::Explicit {
            for (name, entry) in &listed {
                let state = match entry {
                    Ok(_) => IdleState::Unloaded,
                    Err(e) => IdleState::Failed(e.to_string()),
                };
                note(name, latest(name), state);
            }
        }
        failed.iter().for_each(|(name, reason)| note(name, latest(name), IdleState::Failed(reason.clone())));
        for (name, busy) in &busy {
            if let Busy::Loading(version) = busy {
                note(name, version.to_string(), IdleState::Loading);
            }
        }
        engine.models().iter().for_each(|info| drop(idle.remove(&*info.name)));
        idle.into_values().collect()
    }

    fn load(&self, engine: &Arc<Engine>, name: &str, options: LoadOptions) -> Result<()> {
        self.check_mode(engine, name, "loaded")?;
        let chosen = self.find(name, &options).map_err(|e| told(name, e))?;
        let _claim = self.claim(name, Busy::Loading(chosen.version)).ok_or_else(|| conflict(name))?;
        let _turn = self.turn.lock();
        self.put(engine, chosen).map_err(|e| told(name, e))
    }

    fn unload(&self, engine: &Arc<Engine>, name: &str) -> Result<()> {
        self.check_mode(engine, name, "unloaded")?;
        engine.model(Some(name))?;
        let _claim = self.claim(name, Busy::Unloading).ok_or_else(|| conflict(name))?;
        let _turn = self.turn.lock();
        self.take_out(engine, name)
    }
}

fn conflict(name: &str) -> Error {
    let reason = format!("`{name}` is being loaded or unloaded by another request");
    Error::Conflict { field: "model".to_string(), reason }
}

/// What keeps a model from being loaded, for the client that asked: it is the operator, whom logs alone would not tell.
fn told(name: &str, error: Error) -> Error {
    match error {
        Error::Tensor { .. }
        | Error::Checksum { .. }
        | Error::ModelFile { .. }
        | Error::Shape { .. }
        | Error::Config { .. }
        | Error::Invalid { .. } => {
            Error::Invalid { field: "model".to_string(), reason: format!("`{name}` cannot be loaded: {error}") }
        }
        other => other,
    }
}

/// Errors: `Unhealthy` for a model whose devices fail their first trial; `Draining`.
fn wait_until_ready(standby: &Standby, engine: &Engine) -> Result<()> {
    loop {
        match standby.health() {
            _ if engine.is_draining() => return Err(Error::Draining),
            Health::Ready => return Ok(()),
            Health::Unhealthy(reason) => {
                return Err(Error::Unhealthy { model: standby.info().name.to_string(), reason });
            }
            Health::Loading | Health::Draining => std::thread::sleep(READY_POLL),
        }
    }
}
