//! Inferences that are kept: computed, written down, and only then answered.
//!
//! ```text
//! Submission ─▶ key taken? ─▶ its record            (a request that was sent again)
//!                   │ free
//!                   ▼
//!            Inferences::infer ─▶ record ─▶ Durable::put ─▶ answered
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};

use super::stored_form::{input_value, parameters_of, stored_input};
use super::{CacheUse, Computed, Inferences, outcome};
use crate::model::ModelInfo;
use crate::output::Row;
use crate::request::{Request, Task};
use crate::store::durable::Durable;
use crate::store::record::{self, Facts, Failure, InferenceId, Norms, Record, Status, StoredOutput};
use crate::store::record::{StoredTensors, StoredUsage, Timings};
use crate::store::{Inserted, Records};
use crate::{Error, Result};

/// Whose inferences are kept without their asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    Application,
    /// Also those of the compatible protocols.
    All,
    None,
}

/// What is kept of inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeptInput {
    Full,
    Hash,
    None,
}

/// The settings that this file works by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeepSettings {
    pub scope: Scope,
    pub input: KeptInput,
    /// The longest that a request may take: a reservation of an idempotency key that is much older has no owner left.
    pub timeout: Duration,
}

/// What a client asked for, with what is kept of it beside the result.
#[derive(Debug, Clone)]
pub struct Submission {
    pub request: Request,
    /// The parameters as the client sent them, an object.
    pub parameters: serde_json::Value,
    /// The protocol: "application", "openai", "tei", "oip", "tensorflow", "jina", "cohere".
    pub source: &'static str,
    pub user: Option<String>,
    pub metadata: BTreeMap<String, String>,
    pub idempotency_key: Option<String>,
    pub cache_use: CacheUse,
}

/// What came of a submission that is kept.
#[derive(Debug)]
pub struct Kept {
    pub record: Record,
    /// `None` where the record is of an earlier request with the same key.
    pub computed: Option<Computed>,
}

/// A submission that is computed later, as it is kept.
#[derive(Debug)]
pub struct Accepted {
    pub record: Record,
    /// Whether it was accepted before, under the same idempotency key.
    pub is_known: bool,
}

/// Computes, and keeps what it has computed.
pub struct Keeper {
    inferences: Arc<Inferences>,
    store: Arc<Durable>,
    settings: KeepSettings,
}

impl Keeper {
    pub fn new(inferences: Arc<Inferences>, store: Arc<Durable>, settings: KeepSettings) -> Self {
        Self { inferences, store, settings }
    }

    /// What computes without keeping.
    pub fn inferences(&self) -> &Arc<Inferences> {
        &self.inferences
    }

    /// Where records are, and how well they are kept.
    pub fn store(&self) -> &Arc<Durable> {
        &self.store
    }

    pub fn settings(&self) -> &KeepSettings {
        &self.settings
    }

    /// Computes for a compatible protocol, and keeps the result where the settings keep everybody's: in a record of this
    /// id, so that what is computed twice is kept once, or in a new one.
    ///
    /// Errors: those of [`Inferences::infer`] and, where the result is kept, of [`Keeper::run`].
    pub async fn infer(
        &self,
        request: Request,
        cache_use: CacheUse,
        source: &'static str,
        id: Option<InferenceId>,
    ) -> Result<Computed> {
        if self.settings.scope != Scope::All {
            return self.inferences.infer(request, cache_use).await;
        }
        let submission = Submission {
            parameters: parameters_of(&request.params),
            request,
            source,
            user: None,
            metadata: BTreeMap::new(),
            idempotency_key: None,
            cache_use,
        };
        let kept = self.run_as(id.unwrap_or_default(), submission).await?;
        // Only a request with a key can be answered by a record alone.
        kept.computed.ok_or_else(|| Error::Internal { cause: "a result without its rows".to_string() })
    }

    /// Computes and keeps. When this returns without an error the record is durable; see `docs/storage.md`.
    ///
    /// A failure of the computation is kept too, as far as the store takes it, but never under the idempotency key: the
    /// client may try again. What was refused before anything was done for it leaves no record.
    /// Errors: those of [`Inferences::infer`]; `StoreUnavailable` and `JournalFull` where the result cannot be kept;
    /// `Invalid` for a key that came with another request before, `Conflict` for one whose request is being computed.
    pub async fn run(&self, submission: Submission) -> Result<Kept> {
        self.run_as(InferenceId::new(), submission).await
    }

    async fn run_as(&self, id: InferenceId, submission: Submission) -> Result<Kept> {
        let created = Instant::now();
        // What is asked before it is known how it goes: a failure counts against the version that failed.
        let info = self.inferences.model(submission.request.model.as_deref());
        let hash = submission.idempotency_key.as_ref().map(|_| request_hash(&submission, When::Now));
        if let (Some(_), Some(hash)) = (&submission.idempotency_key, &hash)
            && let Some(record) = self.reserve(id, &submission, info.as_deref(), hash).await?
        {
            return Ok(Kept { record, computed: None });
        }
        let request = submission.request.clone();
        let result = self.inferences.infer(request, submission.cache_use).await;
        match result {
            Ok(computed) => {
                let record = succeeded(id, &submission, hash, &computed, self.settings.input);
                self.store.put(std::slice::from_ref(&record)).await?;
                Ok(Kept { record, computed: Some(computed) })
            }
            Err(error) => {
                self.note_failure(id, &submission, info.as_deref(), &error, created.elapsed()).await;
                Err(error)
            }
        }
    }

    /// Keeps a submission that is computed later. When this returns without an error its record is durable, as queued.
    ///
    /// Errors: `Invalid` for a key that came with another request before; `Conflict` for one whose first request is being
    /// computed; `StoreUnavailable` and `JournalFull` where it cannot be kept.
    pub async fn accept(&self, submission: &Submission, callback: Option<String>) -> Result<Accepted> {
        let when = When::Later { callback: callback.as_deref() };
        let hash = submission.idempotency_key.as_ref().map(|_| request_hash(submission, when));
        // Who computes it later, and with what, is not known yet.
        let mut facts = facts(submission, None, Status::Queued, self.settings.input);
        // But what its inputs are called is.
        let info = self.inferences.model(submission.request.model.as_deref());
        let tensors = info.as_ref().map_or(&[][..], |info| &info.signature.inputs);
        facts.input = stored_input(&submission.request.inputs, self.settings.input, tensors);
        facts.callback = callback;
        facts.idempotency_key = submission.idempotency_key.clone();
        facts.request_hash = hash.clone();
        let record = Record { id: InferenceId::new(), facts, output: None };
        let known = match &hash {
            Some(hash) => self.take_key(&record, hash).await?,
            None => {
                self.store.put(std::slice::from_ref(&record)).await?;
                None
            }
        };
        let is_known = known.is_some();
        Ok(Accepted { record: known.unwrap_or(record), is_known })
    }

    /// The record of a result that is not kept, for its answer.
    pub fn unstored_record(&self, submission: &Submission, computed: &Computed) -> Record {
        succeeded(InferenceId::new(), submission, None, computed, KeptInput::None)
    }

    /// Takes the idempotency key, or returns the final record that has it.
    async fn reserve(
        &self,
        id: InferenceId,
        submission: &Submission,
        info: Option<&ModelInfo>,
        hash: &str,
    ) -> Result<Option<Record>> {
        let mut facts = facts(submission, info, Status::Running, self.settings.input);
        facts.request_hash = Some(hash.to_string());
        facts.idempotency_key = submission.idempotency_key.clone();
        self.take_key(&Record { id, facts, output: None }, hash).await
    }

    /// Writes a record whose key may be taken. Returns the record that has it, where that was accepted for later or is
    /// final.
    async fn take_key(&self, record: &Record, hash: &str) -> Result<Option<Record>> {
        // Twice: the second time after an abandoned reservation was removed.
        for _ in 0..2 {
            let found = match self.store.insert(record).await? {
                Inserted::New => return Ok(None),
                Inserted::Exists(found) => found,
            };
            if found.facts.request_hash.as_deref() != Some(hash) {
                let reason = format!("was used with another request, inference {}", found.id);
                return Err(Error::Invalid { field: "idempotency-key".to_string(), reason });
            }
            // Only what is computed later is queued, and the hash says that this one is too.
            if found.facts.status.is_final() || found.facts.status == Status::Queued {
                return Ok(Some(*found));
            }
            let longest = SignedDuration::try_from(self.settings.timeout * 2).unwrap_or(SignedDuration::MAX);
            let is_abandoned = Timestamp::now().duration_since(found.id.created_at()) > longest;
            if !is_abandoned {
                break;
            }
            // Its process ended between the reservation and the result. Whoever is first removes it; who comes later
            // finds the new one.
            self.store.delete(&found.id).await?;
        }
        let reason = "the first request with this key is being computed".to_string();
        Err(Error::Conflict { field: "idempotency-key".to_string(), reason })
    }

    /// Keeps what failed, if it was more than a refusal. The client learns of its failure in any case: a store that does
    /// not take this is a line in the log.
    async fn note_failure(
        &self,
        id: InferenceId,
        submission: &Submission,
        info: Option<&ModelInfo>,
        error: &Error,
        took: Duration,
    ) {
        let has_reservation = submission.idempotency_key.is_some();
        let Some(failure) = failure_of(error) else {
            if has_reservation {
                // The key is free again.
                let _ = self.store.delete(&id).await;
            }
            return;
        };
        let mut facts = facts(submission, info, Status::Failed, self.settings.input);
        facts.completed_at = Some(record::now());
        facts.timings.total_us = took.as_micros() as u64;
        facts.error = Some(failure);
        let record = Record { id, facts, output: None };
        if let Err(cause) = self.store.put(&[record]).await {
            tracing::warn!(%id, %cause, "a failed inference is not kept");
        }
    }
}

/// What is known of a record before its result; of the model, as far as it is known which one it will be.
fn facts(submission: &Submission, info: Option<&ModelInfo>, status: Status, kept: KeptInput) -> Facts {
    let asked = || submission.request.model.clone().unwrap_or_default();
    let model = info.map_or_else(asked, |info| info.name.to_string());
    let version = info.map_or("", |info| &info.version);
    Facts {
        user: submission.user.clone(),
        metadata: submission.metadata.clone(),
        parameters: submission.parameters.clone(),
        input: stored_input(&submission.request.inputs, kept, info.map_or(&[], |info| &info.signature.inputs)),
        usage: StoredUsage { num_inputs: submission.request.inputs.len() as u64, ..StoredUsage::default() },
        ..Facts::new(status, &model, version, submission.request.params.task.as_str(), submission.source)
    }
}

fn succeeded(
    id: InferenceId,
    submission: &Submission,
    hash: Option<String>,
    computed: &Computed,
    kept: KeptInput,
) -> Record {
    let mut facts = facts(submission, Some(&computed.info), Status::Running, kept);
    facts.idempotency_key = submission.idempotency_key.clone();
    facts.request_hash = hash;
    completed(Record { id, facts, output: None }, computed)
}

/// An unfinished record with its result.
pub fn completed(mut record: Record, computed: &Computed) -> Record {
    let us = |time: Duration| time.as_micros() as u64;
    let phases = computed.phases;
    let facts = &mut record.facts;
    facts.status = Status::Succeeded;
    facts.model = computed.info.name.to_string();
    facts.version = computed.info.version.clone();
    facts.fingerprint = Some(computed.info.fingerprint.clone());
    facts.completed_at = Some(record::now());
    facts.usage = StoredUsage {
        num_tokens: computed.usage.num_tokens as u64,
        num_chars: computed.usage.num_chars as u64,
        num_inputs: computed.rows.len() as u64,
        num_cached: computed.num_cached.unwrap_or(0) as u64,
    };
    facts.timings = Timings {
        tokenize_us: us(phases.tokenize),
        queue_us: us(phases.queue),
        inference_us: us(phases.inference),
        total_us: us(phases.total),
    };
    let rows = || computed.rows.iter().map(|row: &Row| row.to_vec()).collect();
    record.output = Some(match (&computed.task, outcome::value(computed)) {
        (_, Some(value)) => StoredOutput::Json(value),
        (Task::Infer, None) => {
            StoredOutput::Tensors(Arc::new(StoredTensors { tensors: outcome::tensors(&computed.info), rows: rows() }))
        }
        (_, None) => {
            // Lengths tell of drift where results are vectors.
            facts.output_norms = Norms::of(&computed.rows);
            StoredOutput::Embeddings(Arc::new(rows()))
        }
    });
    record
}

/// How a failure is kept; `None` for a refusal, which did nothing and says nothing of the model.
fn failure_of(error: &Error) -> Option<Failure> {
    let (kind, status, message) = match error {
        Error::Forward { model, .. } => ("failed", 500, format!("model `{model}` failed on this batch")),
        Error::Deadline { .. } => ("deadline", 504, error.to_string()),
        Error::Internal { .. } => ("internal", 500, "internal error".to_string()),
        _ => return None,
    };
    Some(Failure { kind: kind.to_string(), status, message, field: None })
}

/// When a submission is computed.
#[derive(Clone, Copy)]
enum When<'a> {
    Now,
    Later { callback: Option<&'a str> },
}

/// Names a request, so that the same key with another one can be told: everything that decides what is computed and
/// what is kept of it.
fn request_hash(submission: &Submission, when: When<'_>) -> String {
    let mut request = serde_json::json!([
        submission.request.model,
        input_value(&submission.request.inputs),
        submission.parameters,
        submission.user,
        submission.metadata,
    ]);
    if let (When::Later { callback }, Some(parts)) = (when, request.as_array_mut()) {
        parts.push(serde_json::json!({ "later": callback }));
    }
    blake3::hash(request.to_string().as_bytes()).to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_leave_no_record() {
        assert_eq!(failure_of(&Error::Draining), None);
        assert_eq!(failure_of(&Error::Empty { field: "input".into() }), None);
        let failure = failure_of(&Error::Forward { model: "m".into(), cause: "secret".into() }).unwrap();
        assert_eq!((failure.status, failure.message.contains("secret")), (500, false));
    }
}
