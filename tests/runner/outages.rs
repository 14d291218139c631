//! The plain store behind a network that may fail.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use eremois::store::work::memory::MemoryWork;
use eremois::store::work::{Claim, Document, DocumentKind, DocumentQuery, Hold, Task, TaskKind, Work};
use eremois::{Error, Result};
use jiff::Timestamp;

/// Answers, says that it is away, or does not answer.
pub struct Outages {
    work: MemoryWork,
    is_away: AtomicBool,
    is_silent: AtomicBool,
    /// Fails renewals alone.
    is_deaf: AtomicBool,
    claim_delay_ms: AtomicU64,
    num_claims: AtomicUsize,
}

impl Outages {
    pub fn new() -> Self {
        Self {
            work: MemoryWork::default(),
            is_away: AtomicBool::new(false),
            is_silent: AtomicBool::new(false),
            is_deaf: AtomicBool::new(false),
            claim_delay_ms: AtomicU64::new(0),
            num_claims: AtomicUsize::new(0),
        }
    }

    pub fn set_away(&self, is_away: bool) {
        self.is_away.store(is_away, Ordering::SeqCst);
    }

    pub fn set_silent(&self, is_silent: bool) {
        self.is_silent.store(is_silent, Ordering::SeqCst);
    }

    pub fn set_deaf(&self, is_deaf: bool) {
        self.is_deaf.store(is_deaf, Ordering::SeqCst);
    }

    /// Between a claim and its answer.
    pub fn set_claim_delay(&self, delay: Duration) {
        self.claim_delay_ms.store(delay.as_millis() as u64, Ordering::SeqCst);
    }

    pub fn num_claims(&self) -> usize {
        self.num_claims.load(Ordering::SeqCst)
    }

    async fn pass(&self) -> Result<&MemoryWork> {
        if self.is_silent.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        match self.is_away.load(Ordering::SeqCst) {
            true => Err(Error::StoreUnavailable { cause: "an outage of a test".into() }),
            false => Ok(&self.work),
        }
    }
}

#[async_trait]
impl Work for Outages {
    async fn push(&self, tasks: &[Task]) -> Result<()> {
        self.pass().await?.push(tasks).await
    }

    async fn claim(&self, claim: &Claim) -> Result<Vec<Task>> {
        self.num_claims.fetch_add(1, Ordering::SeqCst);
        let claimed = self.pass().await?.claim(claim).await;
        tokio::time::sleep(Duration::from_millis(self.claim_delay_ms.load(Ordering::SeqCst))).await;
        claimed
    }

    async fn renew(&self, id: &str, owner: &str, until: Timestamp) -> Result<Hold> {
        if self.is_deaf.load(Ordering::SeqCst) {
            return Err(Error::StoreUnavailable { cause: "an outage of a test".into() });
        }
        self.pass().await?.renew(id, owner, until).await
    }

    async fn finish(&self, id: &str, owner: &str) -> Result<Hold> {
        self.pass().await?.finish(id, owner).await
    }

    async fn postpone(&self, id: &str, owner: &str, due_at: Timestamp) -> Result<Hold> {
        self.pass().await?.postpone(id, owner, due_at).await
    }

    async fn cancel(&self, id: &str) -> Result<bool> {
        self.pass().await?.cancel(id).await
    }

    async fn num_tasks(&self) -> Result<Vec<(TaskKind, u64)>> {
        self.pass().await?.num_tasks().await
    }

    async fn create(&self, document: &Document) -> Result<bool> {
        self.pass().await?.create(document).await
    }

    async fn document(&self, kind: DocumentKind, id: &str) -> Result<Option<Document>> {
        self.pass().await?.document(kind, id).await
    }

    async fn replace(&self, document: &Document) -> Result<bool> {
        self.pass().await?.replace(document).await
    }

    async fn remove(&self, kind: DocumentKind, id: &str) -> Result<bool> {
        self.pass().await?.remove(kind, id).await
    }

    async fn documents(&self, query: &DocumentQuery) -> Result<Vec<Document>> {
        self.pass().await?.documents(query).await
    }

    async fn expired(&self, now: Timestamp, limit: usize) -> Result<Vec<Document>> {
        self.pass().await?.expired(now, limit).await
    }

    async fn put_part(&self, file: &str, index: u32, bytes: &[u8]) -> Result<()> {
        self.pass().await?.put_part(file, index, bytes).await
    }

    async fn part(&self, file: &str, index: u32) -> Result<Option<Vec<u8>>> {
        self.pass().await?.part(file, index).await
    }

    async fn remove_parts(&self, file: &str) -> Result<()> {
        self.pass().await?.remove_parts(file).await
    }
}
