//! The end of a batch: the parts of its chunks become files.

use super::state::{Batch, ChunkResults};
use super::{Batches, ids};
use crate::jobs::files::{File, Meta, Purpose};
use crate::jobs::parts::Segment;
use crate::store::record;
use crate::store::work::{DocumentKind, DocumentQuery, MAX_DOCUMENTS};
use crate::{Error, Result};

impl Batches {
    /// Makes the files of a batch whose chunks are all done, and ends it. Whoever does so, and however often, makes the
    /// same.
    ///
    /// Errors: the store's.
    pub(super) async fn finish(&self, id: &str) -> Result<()> {
        let Some((_, batch)) = self.read(id).await? else { return Ok(()) };
        if batch.status.is_final() || !batch.is_done() {
            return Ok(());
        }
        let chunks = match self.all_results(id, batch.num_chunks()).await {
            Ok(chunks) => chunks,
            Err(Error::Internal { cause }) => {
                self.fail_unreadable(id, &cause).await?;
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let output = chunks.iter().filter_map(|chunk| chunk.output.clone()).collect();
        let errors = chunks.iter().filter_map(|chunk| chunk.errors.clone()).collect();
        let output = self.file(id, &batch, "output", output).await?;
        let errors = self.file(id, &batch, "error", errors).await?;
        let change = |batch: &mut Batch| {
            if batch.status.is_final() {
                return Ok(false);
            }
            batch.output_file_id = output.clone();
            batch.error_file_id = errors.clone();
            batch.enter(batch.end(), record::now());
            Ok(true)
        };
        if let Some(batch) = self.change(id, change).await? {
            let counts = batch.counts;
            tracing::info!(
                batch = id,
                status = batch.status.as_str(),
                total = counts.total,
                completed = counts.completed,
                failed = counts.failed,
                "a batch has ended"
            );
        }
        Ok(())
    }

    /// Writes a file of these segments, unless there are none. Returns its id.
    async fn file(&self, id: &str, batch: &Batch, what: &str, segments: Vec<Segment>) -> Result<Option<String>> {
        if segments.is_empty() {
            return Ok(None);
        }
        let created_at = batch.done_at.unwrap_or(batch.created_at);
        let life = batch.output_expires_after.map(std::time::Duration::from_secs);
        let meta = Meta {
            num_bytes: segments.iter().map(Segment::len).sum(),
            created_at,
            expires_at: self.files.expiry(created_at, life),
            filename: format!("{id}_{what}.jsonl"),
            purpose: Purpose::BatchOutput,
            segments,
            needed_until: None,
            is_deleted: false,
        };
        let file = File { id: ids::derived(ids::FILE, created_at, &format!("{id} {what}")), meta };
        if self.files.create(&file).await? {
            ::metrics::counter!("eremois_jobs_file_bytes_total", "direction" => "written")
                .increment(file.meta.num_bytes);
        }
        Ok(Some(file.id))
    }

    /// What came of every chunk, in their order.
    async fn all_results(&self, id: &str, num_chunks: u32) -> Result<Vec<ChunkResults>> {
        let mut found: Vec<Option<ChunkResults>> = Vec::new();
        found.resize(num_chunks as usize, None);
        let mut after = None;
        loop {
            let parent = Some(id.to_string());
            let query = DocumentQuery { kind: DocumentKind::Chunk, parent, after, limit: MAX_DOCUMENTS };
            let documents = self.tasks.work.documents(&query).await?;
            for document in &documents {
                let index = document.id.rsplit(':').next().and_then(|index| index.parse::<usize>().ok());
                if let Some(slot) = index.and_then(|index| found.get_mut(index)) {
                    *slot = serde_json::from_value(document.body.clone()).ok();
                }
            }
            after = documents.last().map(|document| document.id.clone());
            if documents.len() < MAX_DOCUMENTS {
                break;
            }
        }
        let all: Option<Vec<ChunkResults>> = found.into_iter().collect();
        all.ok_or_else(|| Error::Internal { cause: format!("batch {id}: a chunk that is counted is not there") })
    }

    /// Removes a batch with what its chunks have left: parts go only where no file took them over.
    ///
    /// Errors: the store's; it can be repeated.
    pub(crate) async fn purge(&self, id: &str) -> Result<()> {
        let has_files = match self.read(id).await? {
            Some((_, batch)) => {
                if let Some(plan) = &batch.plan {
                    self.tasks.work.remove_parts(&plan.segment.name).await?;
                }
                batch.output_file_id.is_some() || batch.error_file_id.is_some()
            }
            None => true,
        };
        loop {
            let parent = Some(id.to_string());
            let query = DocumentQuery { kind: DocumentKind::Chunk, parent, after: None, limit: 100 };
            let documents = self.tasks.work.documents(&query).await?;
            for document in &documents {
                let results: Option<ChunkResults> = serde_json::from_value(document.body.clone()).ok();
                let segments = results.into_iter().flat_map(|results| [results.output, results.errors]).flatten();
                for segment in segments.filter(|_| !has_files) {
                    self.tasks.work.remove_parts(&segment.name).await?;
                }
                self.tasks.work.remove(DocumentKind::Chunk, &document.id).await?;
            }
            if documents.is_empty() {
                break;
            }
        }
        self.tasks.work.remove(DocumentKind::Batch, id).await?;
        Ok(())
    }
}
