//! Removes what has expired, and what processes that died have left half done.

use std::sync::Arc;
use std::time::Duration;

use ::metrics::{Unit, counter, describe_counter};
use jiff::Timestamp;

use super::batch::Batches;
use super::files::Files;
use super::{JobSettings, Tasks, parts};
use crate::store::record;
use crate::store::work::{Document, DocumentKind};
use crate::{Error, Result};

/// Between two sweeps.
const INTERVAL: Duration = Duration::from_secs(60);

/// Documents of one look.
const AT_A_TIME: usize = 100;

/// Registers help and unit of this file's metrics.
pub fn describe_metrics() {
    describe_counter!(
        "eremois_jobs_swept_total",
        Unit::Count,
        "Documents whose time was over and that were seen to, by kind"
    );
}

/// Sees to all documents whose time is over.
pub struct Sweep {
    tasks: Tasks,
    files: Files,
    batches: Batches,
}

impl Sweep {
    pub fn new(tasks: Tasks, settings: Arc<JobSettings>) -> Self {
        let files = Files::new(tasks.work.clone(), settings.clone());
        Self { files, batches: Batches::new(tasks.clone(), settings), tasks }
    }

    /// Sweeps for ever. Several servers may do so at once.
    pub async fn run(self) {
        loop {
            match self.once(record::now()).await {
                // There may be more.
                Ok(AT_A_TIME..) => continue,
                Ok(_) => {}
                Err(error) => tracing::warn!(%error, "what has expired cannot be removed now; it is tried again"),
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// Sees to some documents whose time is over at `now`, the earliest first. Returns how many were seen to.
    ///
    /// Errors: `StoreUnavailable`; what is left is found by the next sweep. A document that cannot be seen to for another
    /// reason is told in the log, and does not stand in the way of those behind it.
    pub async fn once(&self, now: Timestamp) -> Result<usize> {
        let expired = self.tasks.work.expired(now, AT_A_TIME).await?;
        let mut count = 0;
        for document in expired {
            let (kind, id) = (document.kind.as_str(), document.id.clone());
            match self.settle(document).await {
                Ok(()) => {
                    count += 1;
                    counter!("eremois_jobs_swept_total", "kind" => kind).increment(1);
                }
                Err(error @ Error::StoreUnavailable { .. }) => return Err(error),
                Err(error) => tracing::error!(kind, id, %error, "a document whose time is over stays"),
            }
        }
        Ok(count)
    }

    async fn settle(&self, document: Document) -> Result<()> {
        match document.kind {
            DocumentKind::File => self.files.purge(document).await,
            DocumentKind::Batch => self.batches.settle(&document.id).await,
            DocumentKind::Draft => parts::settle_draft(&*self.tasks.work, &document).await,
            DocumentKind::Chunk | DocumentKind::Key => {
                self.tasks.work.remove(document.kind, &document.id).await?;
                Ok(())
            }
        }
    }
}
