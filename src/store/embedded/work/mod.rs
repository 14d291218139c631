//! Background work in the embedded store. Changes go through the writer as those of records do, and share its commits.

mod documents;
pub(super) mod pages;
mod parts;
mod tasks;

use async_trait::async_trait;
use jiff::Timestamp;

use self::tasks::NewTask;
use super::Embedded;
use crate::Result;
use crate::store::work::{Claim, Document, DocumentKind, DocumentQuery, Hold, Task, TaskKind, Work, check_part};

/// Tasks that one change adds, and bytes of their payloads: others' changes wait for it.
const TASKS_A_CHANGE: usize = 1000;
const BYTES_A_CHANGE: usize = 4 << 20;

/// Parts that one change removes, for the same reason: what is deleted is overwritten.
const PARTS_A_CHANGE: usize = 4;

#[async_trait]
impl Work for Embedded {
    async fn push(&self, tasks: &[Task]) -> Result<()> {
        let (mut rows, mut num_bytes) = (Vec::new(), 0);
        for (i, task) in tasks.iter().enumerate() {
            let row = NewTask::new(task);
            num_bytes += row.payload.len();
            rows.push(row);
            if rows.len() == TASKS_A_CHANGE || num_bytes > BYTES_A_CHANGE || i + 1 == tasks.len() {
                let rows = std::mem::take(&mut rows);
                num_bytes = 0;
                self.change(move |conn| rows.iter().try_for_each(|row| tasks::add(conn, row))).await?;
            }
        }
        Ok(())
    }

    async fn claim(&self, claim: &Claim) -> Result<Vec<Task>> {
        let claim = claim.clone();
        self.change(move |conn| tasks::claim(conn, &claim)).await
    }

    async fn renew(&self, id: &str, owner: &str, until: Timestamp) -> Result<Hold> {
        let (id, owner) = (id.to_string(), owner.to_string());
        self.change(move |conn| tasks::renew(conn, &id, &owner, until)).await
    }

    async fn finish(&self, id: &str, owner: &str) -> Result<Hold> {
        let (id, owner) = (id.to_string(), owner.to_string());
        self.change(move |conn| tasks::finish(conn, &id, &owner)).await
    }

    async fn postpone(&self, id: &str, owner: &str, due_at: Timestamp) -> Result<Hold> {
        let (id, owner) = (id.to_string(), owner.to_string());
        self.change(move |conn| tasks::postpone(conn, &id, &owner, due_at)).await
    }

    async fn cancel(&self, id: &str) -> Result<bool> {
        let id = id.to_string();
        self.change(move |conn| tasks::cancel(conn, &id)).await
    }

    async fn num_tasks(&self) -> Result<Vec<(TaskKind, u64)>> {
        self.read(tasks::count).await
    }

    async fn create(&self, document: &Document) -> Result<bool> {
        let document = document.clone();
        self.change(move |conn| documents::create(conn, &document)).await
    }

    async fn document(&self, kind: DocumentKind, id: &str) -> Result<Option<Document>> {
        let id = id.to_string();
        self.read(move |conn| documents::get(conn, kind, &id)).await
    }

    async fn replace(&self, document: &Document) -> Result<bool> {
        let document = document.clone();
        self.change(move |conn| documents::replace(conn, &document)).await
    }

    async fn remove(&self, kind: DocumentKind, id: &str) -> Result<bool> {
        let id = id.to_string();
        self.change(move |conn| documents::remove(conn, kind, &id)).await
    }

    async fn documents(&self, query: &DocumentQuery) -> Result<Vec<Document>> {
        let query = query.clone();
        self.read(move |conn| documents::list(conn, &query)).await
    }

    async fn expired(&self, now: Timestamp, limit: usize) -> Result<Vec<Document>> {
        self.read(move |conn| documents::expired(conn, now, limit)).await
    }

    async fn put_part(&self, file: &str, index: u32, bytes: &[u8]) -> Result<()> {
        check_part(bytes)?;
        let (file, bytes) = (file.to_string(), bytes.to_vec());
        self.change(move |conn| parts::put(conn, &file, index, &bytes)).await
    }

    async fn part(&self, file: &str, index: u32) -> Result<Option<Vec<u8>>> {
        let file = file.to_string();
        self.read(move |conn| parts::get(conn, &file, index)).await
    }

    async fn remove_parts(&self, file: &str) -> Result<()> {
        loop {
            let file = file.to_string();
            let removed = self.change(move |conn| parts::remove(conn, &file, PARTS_A_CHANGE)).await?;
            if removed < PARTS_A_CHANGE {
                return Ok(());
            }
        }
    }
}
