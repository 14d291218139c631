//! From plain values to the store the server works with.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::task::JoinHandle;

use super::Records;
use super::durable::{Durable, Options};
use super::journal::disk::Folder;
use super::journal::{self, Journal};
use crate::{Error, Result};

/// Records deleted by one call, so that writes that come meanwhile do not wait long.
const EXPIRED_AT_A_TIME: usize = 1000;

/// The longest between two looks for old records.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(60);

/// A store over a network, with a journal in `<path>/journal` that stands in for it. Call it within a runtime.
///
/// Errors: those of the journal's folder, as [`Error::Config`] naming `database.path`.
pub async fn remote(store: Arc<dyn Records>, path: &Path, journal_max_bytes: u64, options: Options) -> Result<Durable> {
    let folder = path.join("journal");
    let open = move || -> Result<Journal> {
        let disk = Box::new(Folder::open(&folder)?);
        let (journal, _) = Journal::open(disk, journal::Options::of(journal_max_bytes))?;
        Ok(journal)
    };
    let opened = tokio::task::spawn_blocking(open).await;
    let journal = opened.map_err(|e| Error::Internal { cause: format!("opening the journal: {e}") })??;
    Ok(Durable::journalled(store, journal, options))
}

/// Deletes records for as long as it is held.
pub struct Expiry(JoinHandle<()>);

impl Expiry {
    /// Begins to delete what was created longer ago than `retention`; zero keeps everything, and then there is none.
    /// Call it within a runtime.
    pub fn start(store: Arc<dyn Records>, retention: Duration) -> Option<Self> {
        if retention.is_zero() {
            return None;
        }
        // With a short retention, often enough that nothing is kept for much longer.
        let interval = (retention / 10).clamp(Duration::from_secs(1), EXPIRY_INTERVAL);
        Some(Self(tokio::spawn(async move {
            let mut interval = tokio::time::interval(interval);
            loop {
                interval.tick().await;
                if let Err(cause) = expire(store.as_ref(), retention, Timestamp::now()).await {
                    tracing::warn!(%cause, "old records cannot be deleted now; it is tried again");
                }
            }
        })))
    }
}

impl Drop for Expiry {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Deletes all records created longer than `retention` before `now`, and returns their number. Errors: the store's.
pub async fn expire(store: &dyn Records, retention: Duration, now: Timestamp) -> Result<usize> {
    // Longer than there has been time: nothing is that old.
    let before = SignedDuration::try_from(retention).ok().and_then(|retention| now.checked_sub(retention).ok());
    let Some(before) = before else { return Ok(0) };
    let mut num_expired = 0;
    loop {
        let expired = store.expire(before, EXPIRED_AT_A_TIME).await?;
        num_expired += expired;
        if expired < EXPIRED_AT_A_TIME {
            return Ok(num_expired);
        }
    }
}
