//! Inferences that are accepted now and computed later.
//!
//! ```text
//! accept ─▶ record, queued ─▶ task ─▶ 202          run ─▶ record, final ─▶ task of the callback ─▶ task ends
//!           (the journal may take it)
//! ```
//!
//! The record is what was promised, the task only leads to it. While the store of tasks is away, tasks wait in this
//! process; should it die, [`Later::find_lost`] makes them anew from the records.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::runner::{Handler, Outcome};
use super::{Tasks, callback};
use crate::inference::CacheUse;
use crate::inference::keep::{Accepted, Keeper, Submission, completed};
use crate::inference::stored_form::{input_value, inputs_of, params_of};
use crate::request::{Priority, Request};
use crate::store::Records;
use crate::store::query::{MAX_LIMIT, Query};
use crate::store::record::{self, Failure, InferenceId, Record, Status, StoredInput};
use crate::store::work::{Task, TaskKind};
use crate::{Error, Result};

/// Tasks that wait in this process for their store, at most; then no more are accepted.
const MAX_WAITING: usize = 10_000;

/// Between two tries of a store that is away.
const STORE_RETRY: Duration = Duration::from_secs(1);

/// Between two looks for records whose tasks were lost, and how old they are at least.
const SEARCH_INTERVAL: Duration = Duration::from_secs(300);
const LOST_AFTER: Duration = Duration::from_secs(60);

/// How long a computation may wait for room: long, since nobody waits for it.
const TIMEOUT: Duration = Duration::from_secs(600);

/// Runs of a task whose computation fails, or after which its process is gone, before the inference has failed.
const MAX_ATTEMPTS: u32 = 3;

/// How a failure is kept, as the API says it.
pub type Describe = fn(&Error) -> Failure;

/// What a task must know beside the record, which may not keep its input.
#[derive(Debug, Serialize, Deserialize)]
struct Payload {
    inputs: serde_json::Value,
    #[serde(default)]
    model: Option<String>,
    parameters: serde_json::Value,
    #[serde(default)]
    passes_cache_over: bool,
    #[serde(default)]
    refreshes_cache: bool,
}

/// Accepts what is computed later.
pub struct Later {
    keeper: Arc<Keeper>,
    tasks: Tasks,
    /// Tasks whose store is away; [`Later::push_waiting`] holds the other end.
    waiting: mpsc::Sender<Task>,
    background: [JoinHandle<()>; 2],
}

impl Drop for Later {
    fn drop(&mut self) {
        self.background.iter().for_each(|task| task.abort());
    }
}

impl Later {
    /// Begins to look after tasks that were lost. Call it within a runtime.
    pub fn start(keeper: Arc<Keeper>, tasks: Tasks) -> Self {
        let (waiting, to_push) = mpsc::channel(MAX_WAITING);
        let pushing = tokio::spawn(Self::push_waiting(tasks.clone(), to_push));
        let searching = tokio::spawn(Self::search(keeper.clone(), tasks.clone()));
        Self { keeper, tasks, waiting, background: [pushing, searching] }
    }

    /// Accepts a submission. When this returns without an error it will be computed, whatever happens to this process.
    ///
    /// Errors: `UnknownModel` and `Invalid` for what cannot be computed; those of [`Keeper::accept`];
    /// `StoreUnavailable` where the tasks' store is away and the input is not kept in the record, or too many wait.
    pub async fn accept(&self, submission: &Submission, callback: Option<String>) -> Result<Accepted> {
        self.keeper.inferences().check(&submission.request)?;
        let accepted = self.keeper.accept(submission, callback).await?;
        let record = &accepted.record;
        if record.facts.status.is_final() {
            return Ok(accepted);
        }
        let request = &submission.request;
        let payload = Payload {
            inputs: input_value(&request.inputs),
            model: request.model.clone(),
            parameters: submission.parameters.clone(),
            passes_cache_over: submission.cache_use == CacheUse::Bypass,
            refreshes_cache: submission.cache_use == CacheUse::Refresh,
        };
        // Also for one that is known: its first request may have ended between the record and the task.
        let task = task_of(&record.id, &payload)?;
        let Err(error) = self.tasks.push(std::slice::from_ref(&task)).await else { return Ok(accepted) };
        let is_away = matches!(error, Error::StoreUnavailable { .. });
        let can_wait = is_away && matches!(record.facts.input, StoredInput::Full(_));
        if can_wait && self.waiting.try_send(task).is_ok() {
            return Ok(accepted);
        }
        if !accepted.is_known {
            // Nobody was told of it, and nobody may find it queued for ever.
            let _ = self.keeper.store().delete(&record.id).await;
        }
        Err(error)
    }

    /// Deletes an inference, and has it computed no more. Returns whether it was there. Errors: the store's.
    pub async fn delete(&self, id: &InferenceId) -> Result<bool> {
        let store = self.keeper.store();
        // A list of the store costs as much as a look at the task, and most records have none.
        let is_unfinished = store.get(id).await?.is_some_and(|record| !record.facts.status.is_final());
        if is_unfinished {
            self.tasks.work.cancel(&id.to_string()).await?;
        }
        store.delete(id).await
    }

    /// Has erased inferences computed no more.
    ///
    /// Errors: the store's; some may be computed then, so the erasure must be repeated.
    pub async fn forget(&self, ids: &[InferenceId]) -> Result<()> {
        for id in ids {
            if !self.tasks.work.cancel(&id.to_string()).await? {
                // It may have ended, and been written, between the erasure and this.
                self.keeper.store().delete(id).await?;
            }
        }
        Ok(())
    }

    /// Pushes tasks whose store was away, in the order they came.
    async fn push_waiting(tasks: Tasks, mut to_push: mpsc::Receiver<Task>) {
        let mut batch = Vec::new();
        while to_push.recv_many(&mut batch, 100).await > 0 {
            while let Err(error) = tasks.push(&batch).await {
                tracing::debug!(%error, num_tasks = batch.len(), "tasks wait for their store");
                tokio::time::sleep(STORE_RETRY).await;
            }
            batch.clear();
        }
    }

    async fn search(keeper: Arc<Keeper>, tasks: Tasks) {
        loop {
            match Self::find_lost(&keeper, &tasks, LOST_AFTER).await {
                Ok(()) | Err(Error::StoreUnavailable { .. }) => {}
                Err(error) => tracing::warn!(%error, "the search for lost inferences failed; it is tried again"),
            }
            tokio::time::sleep(SEARCH_INTERVAL).await;
        }
    }

    /// Makes tasks for queued records that have none, as a crash between the two leaves them. One that is made for a record
    /// which has a task, or has ended meanwhile, changes nothing.
    ///
    /// Errors: the store's.
    pub async fn find_lost(keeper: &Keeper, tasks: &Tasks, age: Duration) -> Result<()> {
        let to = jiff::SignedDuration::try_from(age).ok().and_then(|age| record::now().checked_sub(age).ok());
        let mut query = Query { status: Some(Status::Queued), to, limit: MAX_LIMIT, ..Query::default() };
        loop {
            let page = keeper.store().list(&query).await?;
            let mut found = Vec::new();
            for record in &page.records {
                // Without its input only the task that it has can compute it; where it has none, nobody was told of it.
                let StoredInput::Full(inputs) = &record.facts.input else { continue };
                let facts = &record.facts;
                let model = (!facts.model.is_empty()).then(|| facts.model.clone());
                let payload = Payload {
                    inputs: inputs.clone(),
                    model,
                    parameters: facts.parameters.clone(),
                    passes_cache_over: false,
                    refreshes_cache: false,
                };
                found.push(task_of(&record.id, &payload)?);
            }
            // Not offered: nearly all of them are there already, and waiting for their turn.
            tasks.work.push(&found).await?;
            query.after = page.next;
            if query.after.is_none() {
                return Ok(());
            }
        }
    }
}

fn task_of(id: &InferenceId, payload: &Payload) -> Result<Task> {
    let payload = serde_json::to_value(payload)
        .map_err(|e| Error::Internal { cause: format!("writing the task of an inference: {e}") })?;
    Ok(Task { id: id.to_string(), kind: TaskKind::Inference, payload, due_at: record::now(), attempts: 0 })
}

/// Computes what was accepted.
pub struct Inference {
    keeper: Arc<Keeper>,
    tasks: Tasks,
    describe: Describe,
}

impl Inference {
    /// Computes for `keeper`'s store; `describe` says how failures are kept.
    pub fn new(keeper: Arc<Keeper>, tasks: Tasks, describe: Describe) -> Self {
        Self { keeper, tasks, describe }
    }

    async fn end(&self, record: Record) -> Result<Outcome> {
        self.keeper.store().put(std::slice::from_ref(&record)).await?;
        if record.facts.callback.is_some() {
            self.tasks.push(&[callback::task_of(&record.id)]).await?;
        }
        Ok(Outcome::Done)
    }
}

#[async_trait]
impl Handler for Inference {
    async fn run(&self, task: &Task) -> Result<Outcome> {
        let id: InferenceId = task.id.parse()?;
        let Some(mut record) = self.keeper.store().get(&id).await? else {
            // Deleted, and with it what is to be done.
            return Ok(Outcome::Done);
        };
        if record.facts.status.is_final() {
            // The run before wrote it and did not come to its end.
            return self.end(record).await;
        }
        let payload: Payload = serde_json::from_value(task.payload.clone())
            .map_err(|e| Error::Internal { cause: format!("the task of an inference: {e}") })?;
        let request = Request {
            model: payload.model,
            inputs: inputs_of(&payload.inputs),
            params: params_of(&payload.parameters),
            deadline: Instant::now() + TIMEOUT,
            priority: Priority::Background,
        };
        let cache_use = match (payload.passes_cache_over, payload.refreshes_cache) {
            (true, _) => CacheUse::Bypass,
            (false, true) => CacheUse::Refresh,
            (false, false) => CacheUse::Full,
        };
        let begun = Instant::now();
        let info = self.keeper.inferences().model(request.model.as_deref());
        let error = match self.keeper.inferences().infer(request, cache_use).await {
            Ok(computed) => return self.end(completed(record, &computed)).await,
            Err(error) => error,
        };
        match error {
            Error::QueueFull { retry_after, .. } | Error::Overloaded { retry_after, .. } => {
                return Ok(Outcome::Again(retry_after));
            }
            // Another server, or this one after its start, can.
            Error::Loading { .. } | Error::Draining | Error::Unhealthy { .. } => {
                return Ok(Outcome::Again(STORE_RETRY));
            }
            Error::Deadline { .. } | Error::OutOfMemory { .. } | Error::DeviceLost { .. } | Error::Forward { .. }
                if task.attempts < MAX_ATTEMPTS =>
            {
                return Err(error);
            }
            _ => {}
        }
        // A failure counts against the version that failed.
        if let Some(info) = info {
            record.facts.model = info.name.to_string();
            record.facts.version = info.version.clone();
        }
        record.facts.status = Status::Failed;
        record.facts.completed_at = Some(record::now());
        record.facts.timings.total_us = begun.elapsed().as_micros() as u64;
        record.facts.error = Some((self.describe)(&error));
        self.end(record).await
    }

    /// Deleted while it was computed: what was written of it since goes too.
    async fn cancelled(&self, task: &Task) {
        let Ok(id) = task.id.parse::<InferenceId>() else { return };
        for attempt in 1.. {
            match self.keeper.store().delete(&id).await {
                Ok(_) => return,
                Err(error) if attempt == MAX_ATTEMPTS => {
                    tracing::error!(%id, %error, "a deleted inference may be there again: delete it once more");
                    return;
                }
                Err(_) => tokio::time::sleep(STORE_RETRY).await,
            }
        }
    }
}
