//! Batches: a file of requests, answered when there is room, into a file of answers.
//!
//! ```text
//! Batches::create ─▶ task Batch: split ─▶ tasks Chunk: run ─▶ the last one: finish
//!                       checks the input     answers lines,      puts the parts of all chunks
//!                       writes the plan      writes parts        together into files
//! ```
//!
//! Everything may be run twice or end anywhere. What a chunk answers counts when its document is written, which happens
//! once; the batch's document is changed only by whoever has read its last revision.

pub mod call;
mod chunk;
mod finish;
pub mod lines;
mod results;
mod split;
pub mod state;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ::metrics::{Unit, describe_counter};
use jiff::{SignedDuration, Timestamp};
use rand::Rng;
use serde_json::json;

use super::files::{Files, Page, Purpose};
use super::runner::Handler;
use super::{JobSettings, Tasks, ids};
use crate::store::record;
use crate::store::work::{Document, DocumentKind, DocumentQuery, MAX_DOCUMENTS, Task, TaskKind};
use crate::{Error, Result};
use call::Endpoints;
use state::{Batch, Bits, Counts, Status};

/// Routes that a batch may ask.
pub const ENDPOINTS: &[&str] = &["/v1/embeddings"];

/// Shortest and longest window: below a second nothing would be answered, beyond a month it would outlive its files.
pub const MIN_WINDOW: Duration = Duration::from_secs(1);
/// See [`MIN_WINDOW`].
pub const MAX_WINDOW: Duration = Duration::from_secs(30 * 24 * 3600);

/// What is written while a batch runs may stay so long behind its window before the sweep looks at it.
const GRACE: SignedDuration = SignedDuration::from_hours(1);
const DRAFT_GRACE: SignedDuration = SignedDuration::from_hours(24);

/// A batch stays this long behind its window at least: until the drafts of its chunks are settled.
const LEAST_LIFE: SignedDuration = SignedDuration::from_hours(48);

/// How long an idempotency key is remembered.
const KEY_LIFE: Duration = Duration::from_secs(24 * 3600);

/// How often a document that others change meanwhile is read again.
const MAX_TRIES: u32 = 100;

/// Registers help and unit of this folder's metrics.
pub fn describe_metrics() {
    describe_counter!("eremois_jobs_batches_total", Unit::Count, "Batches that have ended, by their last status");
    describe_counter!(
        "eremois_jobs_batch_requests_total",
        Unit::Count,
        "Requests of batches that are done with, by outcome"
    );
}

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewBatch {
    pub input_file_id: String,
    pub endpoint: String,
    /// As the client wrote it, and what it means.
    pub completion_window: String,
    pub window: Duration,
    pub metadata: BTreeMap<String, String>,
    pub output_expires_after: Option<u64>,
    pub idempotency_key: Option<String>,
}

/// A batch with its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    pub id: String,
    pub batch: Batch,
}

/// What came of [`Batches::create`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Created {
    pub named: Named,
    /// Whether an earlier request with the same key has made it.
    pub is_replay: bool,
}

/// The batches of a store.
#[derive(Clone)]
pub struct Batches {
    tasks: Tasks,
    files: Files,
    settings: Arc<JobSettings>,
}

/// Who does the tasks of batches.
pub fn handlers(
    tasks: &Tasks,
    settings: &Arc<JobSettings>,
    endpoints: Arc<dyn Endpoints>,
) -> Vec<(TaskKind, Arc<dyn Handler>)> {
    let batches = Batches::new(tasks.clone(), settings.clone());
    vec![
        (TaskKind::Batch, Arc::new(split::Split { batches: batches.clone() })),
        (TaskKind::Chunk, Arc::new(chunk::Chunks::new(batches, endpoints))),
    ]
}

impl Batches {
    pub fn new(tasks: Tasks, settings: Arc<JobSettings>) -> Self {
        let files = Files::new(tasks.work.clone(), settings.clone());
        Self { tasks, files, settings }
    }

    /// Takes a batch: when this returns without an error it is durable, and will be run.
    ///
    /// Errors: `NotFound` and `Invalid` for the input file; `Invalid` naming `idempotency-key` for a key that came with
    /// another request before; the store's.
    pub async fn create(&self, new: NewBatch) -> Result<Created> {
        let created_at = record::now();
        let expires_at = created_at.checked_add(signed(new.window)).unwrap_or(Timestamp::MAX);
        let needed_until = expires_at.checked_add(GRACE).unwrap_or(Timestamp::MAX);
        self.files.need(&new.input_file_id, Purpose::Batch, needed_until).await?;
        let mut id = ids::new(ids::BATCH);
        if let Some(key) = &new.idempotency_key {
            let taken = self.take_key(key, &new, &id).await?;
            if let Some(named) = self.get(&taken).await? {
                return Ok(Created { named, is_replay: true });
            }
            // Whoever took the key has not come so far, or never will: the same batch is made once, whoever makes it.
            id = taken;
        }
        let batch = Batch {
            endpoint: new.endpoint,
            input_file_id: new.input_file_id,
            completion_window: new.completion_window,
            metadata: new.metadata,
            created_at,
            expires_at,
            output_expires_after: new.output_expires_after,
            status: Status::Validating,
            since: BTreeMap::new(),
            errors: Vec::new(),
            counts: Counts::default(),
            num_tokens: 0,
            model: None,
            output_file_id: None,
            error_file_id: None,
            plan: None,
            done: Bits::default(),
            has_expired: false,
            done_at: None,
        };
        // The task first: it waits for the batch a while, whereas a batch without its task would wait for ever.
        self.tasks.push(&[split_task(&id)]).await?;
        let document = Document {
            kind: DocumentKind::Batch,
            id: id.clone(),
            parent: None,
            expires_at: Some(self.looked_at(&batch)),
            revision: 0,
            body: json!(batch),
        };
        let is_new = self.tasks.work.create(&document).await?;
        // Once more, for one that was there already and has waited long enough just now.
        self.tasks.push(&[split_task(&id)]).await?;
        if is_new {
            return Ok(Created { named: Named { id, batch }, is_replay: false });
        }
        let named = self.get(&id).await?.ok_or_else(|| not_found(&id))?;
        Ok(Created { named, is_replay: true })
    }

    /// The batch that a key stands for: `id`, or that of whoever was first. Errors: see [`Batches::create`].
    async fn take_key(&self, key: &str, new: &NewBatch, id: &str) -> Result<String> {
        let request =
            json!([new.input_file_id, new.endpoint, new.completion_window, new.metadata, new.output_expires_after]);
        let hash = blake3::hash(request.to_string().as_bytes()).to_hex().to_string();
        let name = format!("batch:{}", blake3::hash(key.as_bytes()).to_hex());
        let document = Document {
            kind: DocumentKind::Key,
            id: name.clone(),
            parent: None,
            expires_at: Some(super::after(KEY_LIFE)),
            revision: 0,
            body: json!({"batch_id": id, "request_hash": hash}),
        };
        if self.tasks.work.create(&document).await? {
            return Ok(id.to_string());
        }
        let found = self.tasks.work.document(DocumentKind::Key, &name).await?;
        let body = found.map(|found| found.body).unwrap_or_default();
        let field = "idempotency-key".to_string();
        match (body["batch_id"].as_str(), body["request_hash"].as_str()) {
            (Some(taken), Some(of)) if of == hash => Ok(taken.to_string()),
            (Some(taken), _) => {
                Err(Error::Invalid { field, reason: format!("was used with another request, batch {taken}") })
            }
            // Swept between the two looks.
            (None, _) => Err(Error::Conflict { field, reason: "is being forgotten".to_string() }),
        }
    }

    /// One batch. Errors: the store's.
    pub async fn get(&self, id: &str) -> Result<Option<Named>> {
        Ok(self.read(id).await?.map(|(_, batch)| Named { id: id.to_string(), batch }))
    }

    /// A page of batches, newest first; `after` is the last id of the page before. Errors: the store's.
    pub async fn list(&self, after: Option<String>, limit: usize) -> Result<Page<Named>> {
        let query =
            DocumentQuery { kind: DocumentKind::Batch, parent: None, after, limit: (limit + 1).min(MAX_DOCUMENTS) };
        let documents = self.tasks.work.documents(&query).await?;
        let has_more = documents.len() > limit;
        let named = |document: Document| Some(Named { batch: batch_of(&document)?, id: document.id });
        Ok(Page { items: documents.into_iter().take(limit).filter_map(named).collect(), has_more })
    }

    /// Has a batch end with what is answered by now. One that is being cancelled stays so.
    ///
    /// Errors: `NotFound`; `Conflict` for a batch that is done with; the store's.
    pub async fn cancel(&self, id: &str) -> Result<Named> {
        let change = |batch: &mut Batch| match batch.status {
            Status::Validating | Status::InProgress => {
                batch.enter(Status::Cancelling, record::now());
                Ok(true)
            }
            Status::Cancelling | Status::Cancelled => Ok(false),
            status => {
                let reason = format!("a batch that is {} cannot be cancelled", status.as_str());
                Err(Error::Conflict { field: "status".to_string(), reason })
            }
        };
        let batch = self.change(id, change).await?.ok_or_else(|| not_found(id))?;
        Ok(Named { id: id.to_string(), batch })
    }

    /// What the sweep does with a batch whose time is over: one that has ended is removed, another one is driven on.
    ///
    /// Errors: the store's.
    pub(super) async fn settle(&self, id: &str) -> Result<()> {
        match self.read(id).await? {
            Some((_, batch)) if !batch.status.is_final() => {
                self.tasks.push(&[split_task(id)]).await?;
                // Changes nothing but the time of the next look.
                self.change(id, |batch| Ok(!batch.status.is_final())).await?;
                Ok(())
            }
            _ => self.purge(id).await,
        }
    }

    async fn read(&self, id: &str) -> Result<Option<(Document, Batch)>> {
        if ids::created_at(ids::BATCH, id).is_none() {
            return Ok(None);
        }
        let document = self.tasks.work.document(DocumentKind::Batch, id).await?;
        Ok(document.and_then(|document| batch_of(&document).map(|batch| (document, batch))))
    }

    /// Changes a batch as it is, again where somebody else was first. `change` says whether there is anything to write.
    /// Returns the batch as it is then, `None` where there is none.
    ///
    /// Errors: those of `change`, and the store's.
    async fn change(&self, id: &str, change: impl Fn(&mut Batch) -> Result<bool>) -> Result<Option<Batch>> {
        for attempt in 0..MAX_TRIES {
            let Some((mut document, mut batch)) = self.read(id).await? else { return Ok(None) };
            if !change(&mut batch)? {
                return Ok(Some(batch));
            }
            document.expires_at = Some(self.looked_at(&batch)).filter(|at| *at < Timestamp::MAX);
            document.body = json!(batch);
            if self.tasks.work.replace(&document).await? {
                if batch.status.is_final() {
                    ::metrics::counter!("eremois_jobs_batches_total", "status" => batch.status.as_str()).increment(1);
                }
                return Ok(Some(batch));
            }
            // The more there are who want it, the further they are drawn apart.
            let pause = rand::rng().random_range(0..=attempt.min(20));
            tokio::time::sleep(Duration::from_millis(u64::from(pause))).await;
        }
        Err(Error::Conflict { field: "id".to_string(), reason: format!("batch `{id}` is being changed by others") })
    }

    /// When the sweep looks at a batch: at one that has ended to remove it, at one that has not to have it driven on.
    fn looked_at(&self, batch: &Batch) -> Timestamp {
        let at = |time: Timestamp, delay: SignedDuration| time.checked_add(delay).unwrap_or(Timestamp::MAX);
        if !batch.status.is_final() {
            return at(batch.expires_at.max(record::now()), GRACE);
        }
        if self.settings.retention.is_zero() {
            return Timestamp::MAX;
        }
        at(record::now(), signed(self.settings.retention)).max(at(batch.expires_at, LEAST_LIFE))
    }

    /// Until when a draft of a batch may be written.
    fn draft_until(&self, batch: &Batch) -> Timestamp {
        batch.expires_at.max(record::now()).checked_add(DRAFT_GRACE).unwrap_or(Timestamp::MAX)
    }
}

fn batch_of(document: &Document) -> Option<Batch> {
    serde_json::from_value(document.body.clone()).ok()
}

/// The task that drives a batch: reads its input, or sees to what is left to do.
fn split_task(id: &str) -> Task {
    let due_at = record::now();
    Task { id: id.to_string(), kind: TaskKind::Batch, payload: json!({ "pushed_at": due_at }), due_at, attempts: 0 }
}

fn chunk_task(batch_id: &str, index: u32) -> Task {
    let payload = json!({"batch_id": batch_id, "index": index});
    Task { id: chunk_id(batch_id, index), kind: TaskKind::Chunk, payload, due_at: record::now(), attempts: 0 }
}

/// The id of a chunk's task and document.
fn chunk_id(batch_id: &str, index: u32) -> String {
    format!("{batch_id}:{index}")
}

/// A 404 for a batch.
pub fn not_found(id: &str) -> Error {
    Error::NotFound { what: "batch", id: id.to_string() }
}

fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}
