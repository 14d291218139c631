//! Background work in MongoDB: any number of processes share it.
//!
//! Every change is of one document and names in its filter what it relies on (an owner, a revision), so that of two
//! processes one finds nothing to change. The driver repeats such a change, and its answer, after a change of primary.

mod documents;
mod parts;
mod tasks;

use async_trait::async_trait;
use jiff::Timestamp;

use super::MongoStore;
use crate::Result;
use crate::store::work::{Claim, Document, DocumentKind, DocumentQuery, Hold, Task, TaskKind, Work, check_part};

pub(super) use documents::DocumentDocument;
pub(super) use parts::PartDocument;
pub(super) use tasks::TaskDocument;

#[async_trait]
impl Work for MongoStore {
    async fn push(&self, tasks: &[Task]) -> Result<()> {
        if tasks.is_empty() {
            return Ok(());
        }
        tasks::push(&*self.connection().await?, tasks).await
    }

    async fn claim(&self, claim: &Claim) -> Result<Vec<Task>> {
        tasks::claim(&*self.connection().await?, claim).await
    }

    async fn renew(&self, id: &str, owner: &str, until: Timestamp) -> Result<Hold> {
        tasks::renew(&*self.connection().await?, id, owner, until).await
    }

    async fn finish(&self, id: &str, owner: &str) -> Result<Hold> {
        tasks::finish(&*self.connection().await?, id, owner).await
    }

    async fn postpone(&self, id: &str, owner: &str, due_at: Timestamp) -> Result<Hold> {
        tasks::postpone(&*self.connection().await?, id, owner, due_at).await
    }

    async fn cancel(&self, id: &str) -> Result<bool> {
        tasks::cancel(&*self.connection().await?, id).await
    }

    async fn num_tasks(&self) -> Result<Vec<(TaskKind, u64)>> {
        tasks::count(&*self.connection().await?).await
    }

    async fn create(&self, document: &Document) -> Result<bool> {
        documents::create(&*self.connection().await?, document).await
    }

    async fn document(&self, kind: DocumentKind, id: &str) -> Result<Option<Document>> {
        documents::get(&*self.connection().await?, kind, id).await
    }

    async fn replace(&self, document: &Document) -> Result<bool> {
        documents::replace(&*self.connection().await?, document).await
    }

    async fn remove(&self, kind: DocumentKind, id: &str) -> Result<bool> {
        documents::remove(&*self.connection().await?, kind, id).await
    }

    async fn documents(&self, query: &DocumentQuery) -> Result<Vec<Document>> {
        documents::list(&*self.connection().await?, query).await
    }

    async fn expired(&self, now: Timestamp, limit: usize) -> Result<Vec<Document>> {
        documents::expired(&*self.connection().await?, now, limit).await
    }

    async fn put_part(&self, file: &str, index: u32, bytes: &[u8]) -> Result<()> {
        check_part(bytes)?;
        parts::put(&*self.connection().await?, file, index, bytes).await
    }

    async fn part(&self, file: &str, index: u32) -> Result<Option<Vec<u8>>> {
        parts::get(&*self.connection().await?, file, index).await
    }

    async fn remove_parts(&self, file: &str) -> Result<()> {
        parts::remove_all(&*self.connection().await?, file).await
    }
}
