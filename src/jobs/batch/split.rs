//! The task of a batch: its input is checked and cut into chunks, and their tasks are begun.

use std::time::Duration;

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};

use super::lines::{self, Chunk, Rules, Scanner, Span};
use super::state::{Batch, InputFault, Plan, Status};
use super::{Batches, chunk_task};
use crate::jobs::parts::{Owner, PartWriter};
use crate::jobs::runner::{Handler, Outcome};
use crate::store::record;
use crate::store::work::{DocumentKind, Task};
use crate::{Error, Result};

/// Chunks of one batch that have a task at a time: enough to keep many servers at work, few enough that other batches and
/// tasks have their turns between them. Each chunk that ends begins the one that stands so far behind it.
const WINDOW: u32 = 64;

/// How long a task waits for its batch: it is made just before it.
const BIRTH: SignedDuration = SignedDuration::from_mins(1);
const BIRTH_PAUSE: Duration = Duration::from_millis(200);

/// Drives batches on.
pub struct Split {
    pub batches: Batches,
}

#[async_trait]
impl Handler for Split {
    async fn run(&self, task: &Task) -> Result<Outcome> {
        let id = &task.id;
        let Some((_, batch)) = self.batches.read(id).await? else {
            let pushed_at: Option<Timestamp> = serde_json::from_value(task.payload["pushed_at"].clone()).ok();
            let may_come = pushed_at.is_some_and(|at| record::now().duration_since(at) < BIRTH);
            return Ok(if may_come { Outcome::Again(BIRTH_PAUSE) } else { Outcome::Done });
        };
        let batch = match batch.status {
            Status::Validating => self.split(id, &batch).await?,
            _ => Some(batch),
        };
        if let Some(batch) = batch {
            self.batches.drive(id, &batch).await?;
        }
        Ok(Outcome::Done)
    }
}

impl Split {
    /// Takes a batch out of `validating`. Returns it as it is then.
    async fn split(&self, id: &str, batch: &Batch) -> Result<Option<Batch>> {
        let spans = match self.read_input(batch).await {
            Ok(Ok(spans)) => spans,
            Ok(Err(faults)) => return self.batches.fail(id, faults).await,
            Err(Error::Internal { cause }) => return self.batches.fail_unreadable(id, &cause).await,
            Err(error) => return Err(error),
        };
        let chunks = lines::chunks(&spans);
        let owner = Owner { kind: DocumentKind::Batch, id: id.to_string() };
        let mut writer = PartWriter::new(self.batches.tasks.work.clone(), owner, self.batches.draft_until(batch));
        let bytes: Vec<u8> = chunks.iter().flat_map(|chunk| chunk.to_bytes()).collect();
        writer.write(&bytes).await?;
        let Some(sealed) = writer.seal().await? else {
            return Err(Error::Internal { cause: format!("batch {id} has no chunks") });
        };
        let plan = Plan { segment: sealed.segment.clone(), num_chunks: chunks.len() as u32 };
        let change = |batch: &mut Batch| {
            if batch.status != Status::Validating {
                return Ok(false);
            }
            batch.plan = Some(plan.clone());
            batch.counts.total = spans.len() as u64;
            batch.enter(Status::InProgress, record::now());
            Ok(true)
        };
        let batch = self.batches.change(id, change).await?;
        if batch.as_ref().and_then(|batch| batch.plan.as_ref()) == Some(&plan) {
            sealed.adopted().await;
        } else {
            // It was cancelled meanwhile, or another server was first.
            sealed.discard().await;
        }
        Ok(batch)
    }

    /// The requests of the input, or what is wrong with it.
    async fn read_input(&self, batch: &Batch) -> Result<Result<Vec<Span>, Vec<InputFault>>> {
        let Some(file) = self.batches.files.get_needed(&batch.input_file_id).await? else {
            return Err(Error::Internal { cause: "the input file is gone".to_string() });
        };
        let settings = &self.batches.settings;
        let mut scanner = Scanner::new(Rules {
            endpoint: batch.endpoint.clone(),
            max_requests: settings.max_batch_requests,
            max_line_bytes: settings.max_line_bytes,
        });
        let mut content = self.batches.files.content(&file);
        while let Some(piece) = content.next().await? {
            // A part is up to 4 MiB of JSON: several milliseconds of work.
            let scan = tokio::task::spawn_blocking(move || {
                let goes_on = scanner.push(&piece);
                (scanner, goes_on)
            });
            let goes_on;
            (scanner, goes_on) = scan.await.map_err(|e| Error::Internal { cause: format!("reading lines: {e}") })?;
            if !goes_on {
                break;
            }
        }
        Ok(scanner.finish())
    }
}

impl Batches {
    /// Does what is to be done next for a batch that is not being validated; may be called at any time.
    ///
    /// Errors: the store's.
    pub(super) async fn drive(&self, id: &str, batch: &Batch) -> Result<()> {
        if batch.status.is_final() {
            return Ok(());
        }
        if batch.is_done() {
            return self.finish(id).await;
        }
        let Some(plan) = &batch.plan else {
            // Cancelled before its input was read.
            let change = |batch: &mut Batch| {
                let is_mine = batch.status == Status::Cancelling && batch.plan.is_none();
                if is_mine {
                    batch.enter(Status::Cancelled, record::now());
                }
                Ok(is_mine)
            };
            self.change(id, change).await?;
            return Ok(());
        };
        // Those behind the window are begun by the chunks before them, whose tasks end only then.
        let first = (0..plan.num_chunks).find(|index| !batch.done.contains(*index)).unwrap_or(0);
        let window = first..plan.num_chunks.min(first.saturating_add(WINDOW));
        let tasks: Vec<Task> =
            window.filter(|index| !batch.done.contains(*index)).map(|index| chunk_task(id, index)).collect();
        self.tasks.push(&tasks).await
    }

    /// Begins the chunk that stands a window behind this one, which is counted in `batch`.
    pub(super) async fn begin_after(&self, id: &str, batch: &Batch, index: u32) -> Result<()> {
        let next = index.saturating_add(WINDOW);
        if next >= batch.num_chunks() || batch.done.contains(next) || batch.status.is_final() {
            return Ok(());
        }
        self.tasks.push(&[chunk_task(id, next)]).await
    }

    /// The range of a chunk. Errors: the store's; `Internal` for a plan that cannot be read.
    pub(super) async fn chunk(&self, plan: &Plan, index: u32) -> Result<Chunk> {
        let start = u64::from(index) * lines::CHUNK_BYTES as u64;
        let end = start + lines::CHUNK_BYTES as u64;
        let bytes = crate::jobs::parts::range(&*self.tasks.work, &plan.segment, start, end).await?;
        let bytes: &[u8; lines::CHUNK_BYTES] = bytes
            .as_slice()
            .try_into()
            .map_err(|_| Error::Internal { cause: "a plan of another length".to_string() })?;
        Ok(Chunk::of_bytes(bytes))
    }

    /// Ends a batch whose input is at fault.
    pub(super) async fn fail(&self, id: &str, faults: Vec<InputFault>) -> Result<Option<Batch>> {
        let change = |batch: &mut Batch| {
            if batch.status.is_final() {
                return Ok(false);
            }
            batch.errors = faults.clone();
            batch.enter(Status::Failed, record::now());
            Ok(true)
        };
        self.change(id, change).await
    }

    /// Ends a batch of which something is gone or damaged in the store, which no repetition would mend.
    pub(super) async fn fail_unreadable(&self, id: &str, cause: &str) -> Result<Option<Batch>> {
        tracing::error!(batch = id, cause, "a batch fails: what it needs cannot be read");
        let fault = InputFault {
            code: "unreadable".to_string(),
            line: None,
            message: "the batch's input or results can no longer be read".to_string(),
            param: None,
        };
        self.fail(id, vec![fault]).await
    }
}
