//! The task of a chunk: its requests are answered, what came of them is written once, and the batch is told.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream};
use jiff::{SignedDuration, Timestamp};
use rand::Rng;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::call::{Again, EndpointAnswer, EndpointCall, Endpoints};
use super::lines::{self, Chunk};
use super::results::{Outcome as RequestOutcome, ResultWriter, Skip};
use super::state::{Batch, ChunkResults, Status};
use super::{Batches, chunk_id};
use crate::jobs::ids;
use crate::jobs::parts::{self, Owner, PartWriter};
use crate::jobs::runner::{Handler, Outcome};
use crate::store::record::{self, InferenceId};
use crate::store::work::{Document, DocumentKind, Task};
use crate::{Error, Result};

/// Requests of a chunk that are asked at once: what a full batch of the default size needs.
const MAX_IN_FLIGHT: usize = 32;

/// Requests that this process asks at once for all its chunks, by weight.
const MAX_WEIGHT: usize = 64;

/// Bytes of a body that weigh as much as a request: answers are some hundred times as long as inputs of a few bytes, and
/// wait in memory until those before them are written.
const BYTES_PER_WEIGHT: usize = 4 << 10;

/// How often the batch is looked at while a chunk runs: what a cancellation takes at most.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The pause before a request is asked again, unless the server says more; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(10);

/// How often a request is asked that may itself be at fault, attempts of its chunk included.
const MAX_TRIES: u32 = 4;

/// Answers chunks.
pub struct Chunks {
    batches: Batches,
    endpoints: Arc<dyn Endpoints>,
    /// Places for requests. They are given in the order they were asked for, which is that of the lines within a chunk: the
    /// first request that is not written yet always has its place before those behind it, so none waits for itself.
    room: Arc<Semaphore>,
}

impl Chunks {
    pub fn new(batches: Batches, endpoints: Arc<dyn Endpoints>) -> Self {
        Self { batches, endpoints, room: Arc::new(Semaphore::new(MAX_WEIGHT)) }
    }
}

/// What a task says of its chunk.
#[derive(Deserialize)]
struct Payload {
    batch_id: String,
    index: u32,
}

#[async_trait]
impl Handler for Chunks {
    async fn run(&self, task: &Task) -> Result<Outcome> {
        let Ok(Payload { batch_id, index }) = serde_json::from_value(task.payload.clone()) else {
            tracing::error!(task = %task.id, "a task of a chunk cannot be read; it is dropped");
            return Ok(Outcome::Done);
        };
        let Some((_, batch)) = self.batches.read(&batch_id).await? else { return Ok(Outcome::Done) };
        if batch.status.is_final() || index >= batch.num_chunks() {
            return Ok(Outcome::Done);
        }
        let results = match self.batches.results(&batch_id, index).await? {
            Some(results) => results,
            None => match self.answer(&batch_id, &batch, index, task.attempts).await {
                Ok(Some(results)) => results,
                Ok(None) => return Ok(Outcome::Done),
                Err(Error::Internal { cause }) => {
                    self.batches.fail_unreadable(&batch_id, &cause).await?;
                    return Ok(Outcome::Done);
                }
                Err(error) => return Err(error),
            },
        };
        self.batches.count(&batch_id, index, &results).await?;
        Ok(Outcome::Done)
    }
}

impl Chunks {
    /// Answers all requests of a chunk and writes what came of them. Returns what is written, whoever was first; `None`
    /// where the batch has ended without it.
    async fn answer(&self, batch_id: &str, batch: &Batch, index: u32, attempts: u32) -> Result<Option<ChunkResults>> {
        let unplanned = || Error::Internal { cause: "a batch without a plan".to_string() };
        let plan = batch.plan.as_ref().ok_or_else(unplanned)?;
        let chunk = self.batches.chunk(plan, index).await?;
        let requests = self.requests(batch_id, batch, chunk).await?;
        let (stop, stopped) = watch::channel(stop_of(batch));
        let context = Context { endpoints: &*self.endpoints, batch, stopped, attempts };
        let asked = stream::iter(requests).map(|request| {
            let (context, room) = (context.clone(), self.room.clone());
            async move {
                let weight = (1 + request.body.len() / BYTES_PER_WEIGHT).min(MAX_IN_FLIGHT) as u32;
                // It is never closed. The place is held until the answer is written.
                let place = room.acquire_many_owned(weight).await.ok();
                let outcome = context.ask(&request).await;
                Asked { request, outcome, _place: place }
            }
        });
        let mut asked = std::pin::pin!(asked.buffered(MAX_IN_FLIGHT));
        let mut writer = self.writer(batch_id, batch, index);
        let mut looks = tokio::time::interval(LOOK_INTERVAL);
        looks.reset();
        loop {
            tokio::select! {
                next = asked.next() => {
                    let Some(Asked { request, outcome, .. }) = next else { break };
                    writer.push(&request.request_id, &request.custom_id, &outcome).await?;
                }
                _ = looks.tick() => match self.batches.read(batch_id).await {
                    Ok(Some((_, batch))) if !batch.status.is_final() => stop.send_modify(|stop| *stop = stop_of(&batch)),
                    Ok(_) => return Ok(None),
                    // A store that is away is asked again.
                    Err(_) => stop.send_modify(|stop| *stop = stop.or(expiry_of(batch))),
                },
            }
        }
        let (results, sealed) = writer.finish().await?;
        let document = Document {
            kind: DocumentKind::Chunk,
            id: chunk_id(batch_id, index),
            parent: Some(batch_id.to_string()),
            expires_at: None,
            revision: 0,
            body: json!(results),
        };
        let is_first = self.batches.tasks.work.create(&document).await?;
        for sealed in sealed {
            if is_first { sealed.adopted().await } else { sealed.discard().await }
        }
        if is_first {
            count_requests(&results);
            return Ok(Some(results));
        }
        self.batches.results(batch_id, index).await
    }

    fn writer(&self, batch_id: &str, batch: &Batch, index: u32) -> ResultWriter {
        let until = self.batches.draft_until(batch);
        let parts = || {
            let owner = Owner { kind: DocumentKind::Chunk, id: chunk_id(batch_id, index) };
            PartWriter::new(self.batches.tasks.work.clone(), owner, until)
        };
        ResultWriter::new(parts(), parts())
    }

    /// Reads the requests of a chunk once more. Errors: the store's; `Internal` where they are not what was checked.
    async fn requests(&self, batch_id: &str, batch: &Batch, chunk: Chunk) -> Result<VecDeque<Request>> {
        let gone = || Error::Internal { cause: "the input file is gone".to_string() };
        let file = self.batches.files.get_needed(&batch.input_file_id).await?.ok_or_else(gone)?;
        let segment = file.meta.segments.first().ok_or_else(gone)?;
        let bytes = parts::range(&*self.batches.tasks.work, segment, chunk.start, chunk.end).await?;
        let (batch_id, endpoint, created_at) = (batch_id.to_string(), batch.endpoint.clone(), batch.created_at);
        // Up to a MiB of JSON, or one long line.
        let read = tokio::task::spawn_blocking(move || {
            let bytes = Bytes::from(bytes);
            let mut found = VecDeque::new();
            for (line, number) in bytes.split(|byte| *byte == b'\n').zip(chunk.first_line..) {
                if lines::is_blank(line) {
                    continue;
                }
                let line = lines::parse(line, &endpoint).map_err(|fault| Error::Internal {
                    cause: format!("line {number} was in order and is not any more: {}", fault.message),
                })?;
                let body = bytes.slice_ref(line.body.as_bytes());
                found.push_back(Request::new(&batch_id, created_at, number, line.custom_id, body));
            }
            if found.len() as u64 == chunk.num_requests {
                return Ok(found);
            }
            Err(Error::Internal { cause: format!("{} requests where {} were", found.len(), chunk.num_requests) })
        });
        read.await.map_err(|e| Error::Internal { cause: format!("reading lines: {e}") })?
    }
}

/// A request of a chunk.
struct Request {
    custom_id: String,
    body: Bytes,
    /// Of its line in the output.
    request_id: String,
    record_id: InferenceId,
}

impl Request {
    /// Ids are made of the batch and the line, so that whoever runs it, and however often, makes the same ones.
    fn new(batch_id: &str, created_at: Timestamp, number: u64, custom_id: String, body: Bytes) -> Self {
        let uuid = ids::derived_uuid(created_at, &format!("{batch_id} line {number}"));
        Self { custom_id, body, request_id: format!("batch_req_{}", uuid.simple()), record_id: InferenceId(uuid) }
    }
}

/// A request with what came of it, and its place among those asked.
struct Asked {
    request: Request,
    outcome: RequestOutcome,
    _place: Option<OwnedSemaphorePermit>,
}

/// What all requests of a chunk share.
#[derive(Clone)]
struct Context<'a> {
    endpoints: &'a dyn Endpoints,
    batch: &'a Batch,
    /// Why no more is asked; the chunk holds the other end for as long as requests are asked.
    stopped: watch::Receiver<Option<Skip>>,
    attempts: u32,
}

impl Context<'_> {
    /// Asks until there is an answer, or the chunk stops.
    async fn ask(mut self, request: &Request) -> RequestOutcome {
        let left = remaining(self.batch);
        let work = Self::insist(self.endpoints, &self.batch.endpoint, request, Instant::now() + left, self.attempts);
        tokio::select! {
            biased;
            why = stopped(&mut self.stopped) => RequestOutcome::Skipped(why),
            () = tokio::time::sleep(left) => RequestOutcome::Skipped(Skip::Expired),
            answer = work => RequestOutcome::Answered(answer),
        }
    }

    /// Asks again for as long as the server has no room, or is not there yet or any more.
    async fn insist(
        endpoints: &dyn Endpoints,
        url: &str,
        request: &Request,
        deadline: Instant,
        attempts: u32,
    ) -> EndpointAnswer {
        let mut pause = FIRST_PAUSE;
        let mut num_tries = attempts;
        loop {
            let call = EndpointCall {
                url: url.to_string(),
                body: request.body.clone(),
                request_id: request.request_id.clone(),
                record_id: request.record_id,
                deadline,
            };
            let answer = endpoints.call(call).await;
            let wait = match answer.again {
                Again::No => return answer,
                Again::FewTimes(_) if num_tries >= MAX_TRIES => return answer,
                Again::FewTimes(wait) => {
                    num_tries += 1;
                    wait
                }
                Again::Later(wait) => wait,
            };
            // Drawn apart, so that those refused together do not come back together.
            let factor = rand::rng().random_range(1.0..1.5);
            tokio::time::sleep(wait.max(pause).mul_f64(factor)).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }
}

/// Completes when no more is asked.
async fn stopped(stop: &mut watch::Receiver<Option<Skip>>) -> Skip {
    match stop.wait_for(Option::is_some).await.map(|why| *why) {
        Ok(Some(why)) => why,
        // The chunk is gone, and this with it.
        Ok(None) | Err(_) => std::future::pending().await,
    }
}

/// Why no request of a batch is asked any more, if so.
fn stop_of(batch: &Batch) -> Option<Skip> {
    match batch.status {
        Status::Cancelling => Some(Skip::Cancelled),
        _ => expiry_of(batch),
    }
}

fn expiry_of(batch: &Batch) -> Option<Skip> {
    (batch.expires_at <= record::now()).then_some(Skip::Expired)
}

/// What is left of a batch's window.
fn remaining(batch: &Batch) -> Duration {
    let left: SignedDuration = batch.expires_at.duration_since(record::now());
    Duration::try_from(left).unwrap_or_default()
}

fn count_requests(results: &ChunkResults) {
    for (outcome, count) in [
        ("completed", results.num_completed),
        ("failed", results.num_failed),
        ("expired", results.num_expired),
        ("cancelled", results.num_cancelled),
    ] {
        ::metrics::counter!("eremois_jobs_batch_requests_total", "outcome" => outcome).increment(count);
    }
}

impl Batches {
    /// What came of a chunk, if it is written. Errors: the store's.
    pub(super) async fn results(&self, batch_id: &str, index: u32) -> Result<Option<ChunkResults>> {
        let document = self.tasks.work.document(DocumentKind::Chunk, &chunk_id(batch_id, index)).await?;
        Ok(document.and_then(|document| serde_json::from_value(document.body).ok()))
    }

    /// Counts a chunk that is written, begins the next one, and makes the files where it was the last.
    async fn count(&self, batch_id: &str, index: u32, results: &ChunkResults) -> Result<()> {
        let change = |batch: &mut Batch| Ok(batch.count(index, results, record::now()));
        let Some(batch) = self.change(batch_id, change).await? else { return Ok(()) };
        if batch.is_done() {
            return self.finish(batch_id).await;
        }
        self.begin_after(batch_id, &batch, index).await
    }
}
