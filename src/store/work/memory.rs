//! Work in memory, for tests and for servers that keep nothing: the contract in its plainest form.

use std::collections::BTreeMap;

use async_trait::async_trait;
use jiff::Timestamp;
use parking_lot::Mutex;

use super::{
    Claim, Document, DocumentKind, DocumentQuery, Hold, MAX_DOCUMENTS, Task, TaskKind, Work, after, check_part,
};
use crate::Result;

/// Work that ends with the process.
#[derive(Debug, Default)]
pub struct MemoryWork(Mutex<Tables>);

#[derive(Debug, Default)]
struct Tables {
    tasks: BTreeMap<String, Entry>,
    documents: BTreeMap<(DocumentKind, String), Document>,
    parts: BTreeMap<(String, u32), Vec<u8>>,
}

#[derive(Debug)]
struct Entry {
    task: Task,
    lease: Option<Lease>,
    is_cancelled: bool,
}

#[derive(Debug)]
struct Lease {
    owner: String,
    until: Timestamp,
}

impl Tables {
    /// How a task stands with an owner, and the task while it is the owner's.
    fn held(&mut self, id: &str, owner: &str) -> (Hold, Option<&mut Entry>) {
        let held = |entry: &&mut Entry| entry.lease.as_ref().is_some_and(|lease| lease.owner == owner);
        match self.tasks.get_mut(id).filter(held) {
            None => (Hold::Lost, None),
            Some(entry) if entry.is_cancelled => (Hold::Cancelled, Some(entry)),
            Some(entry) => (Hold::Held, Some(entry)),
        }
    }
}

#[async_trait]
impl Work for MemoryWork {
    async fn push(&self, tasks: &[Task]) -> Result<()> {
        let mut tables = self.0.lock();
        for task in tasks {
            let entry = Entry { task: task.clone(), lease: None, is_cancelled: false };
            tables.tasks.entry(task.id.clone()).or_insert(entry);
        }
        Ok(())
    }

    async fn claim(&self, claim: &Claim) -> Result<Vec<Task>> {
        let mut tables = self.0.lock();
        let until = after(claim.now, claim.lease);
        let is_free = |entry: &Entry| entry.lease.as_ref().is_none_or(|lease| lease.until <= claim.now);
        // Its owner died before it learned that the task was cancelled.
        tables.tasks.retain(|_, entry| !(entry.is_cancelled && is_free(entry)));
        let is_wanted = |entry: &&mut Entry| {
            let task = &entry.task;
            let is_named = claim.ids.as_ref().is_none_or(|ids| ids.contains(&task.id));
            is_named && is_free(entry) && task.due_at <= claim.due_by && claim.kinds.contains(&task.kind)
        };
        let mut due: Vec<&mut Entry> = tables.tasks.values_mut().filter(is_wanted).collect();
        due.sort_by(|a, b| (a.task.due_at, &a.task.id).cmp(&(b.task.due_at, &b.task.id)));
        due.truncate(claim.limit);
        let take = |entry: &mut Entry| {
            entry.task.attempts = entry.task.attempts.saturating_add(1);
            entry.lease = Some(Lease { owner: claim.owner.clone(), until });
            entry.task.clone()
        };
        Ok(due.into_iter().map(take).collect())
    }

    async fn renew(&self, id: &str, owner: &str, until: Timestamp) -> Result<Hold> {
        let mut tables = self.0.lock();
        let (hold, entry) = tables.held(id, owner);
        if let Some(lease) = entry.and_then(|entry| entry.lease.as_mut()) {
            lease.until = until;
        }
        Ok(hold)
    }

    async fn finish(&self, id: &str, owner: &str) -> Result<Hold> {
        let mut tables = self.0.lock();
        let (hold, _) = tables.held(id, owner);
        if hold != Hold::Lost {
            tables.tasks.remove(id);
        }
        Ok(hold)
    }

    async fn postpone(&self, id: &str, owner: &str, due_at: Timestamp) -> Result<Hold> {
        let mut tables = self.0.lock();
        let (hold, entry) = tables.held(id, owner);
        match (hold, entry) {
            (Hold::Held, Some(entry)) => {
                entry.lease = None;
                entry.task.due_at = due_at;
            }
            (Hold::Cancelled, _) => {
                tables.tasks.remove(id);
            }
            _ => {}
        }
        Ok(hold)
    }

    async fn cancel(&self, id: &str) -> Result<bool> {
        let mut tables = self.0.lock();
        let Some(entry) = tables.tasks.get_mut(id) else { return Ok(false) };
        entry.is_cancelled = true;
        if entry.lease.is_none() {
            tables.tasks.remove(id);
        }
        Ok(true)
    }

    async fn num_tasks(&self) -> Result<Vec<(TaskKind, u64)>> {
        let tables = self.0.lock();
        let mut counts: BTreeMap<TaskKind, u64> = BTreeMap::new();
        for entry in tables.tasks.values() {
            *counts.entry(entry.task.kind).or_default() += 1;
        }
        Ok(counts.into_iter().collect())
    }

    async fn create(&self, document: &Document) -> Result<bool> {
        let mut tables = self.0.lock();
        let key = (document.kind, document.id.clone());
        if tables.documents.contains_key(&key) {
            return Ok(false);
        }
        tables.documents.insert(key, Document { revision: 1, ..document.clone() });
        Ok(true)
    }

    async fn document(&self, kind: DocumentKind, id: &str) -> Result<Option<Document>> {
        Ok(self.0.lock().documents.get(&(kind, id.to_string())).cloned())
    }

    async fn replace(&self, document: &Document) -> Result<bool> {
        let mut tables = self.0.lock();
        let found = tables.documents.get_mut(&(document.kind, document.id.clone()));
        let Some(found) = found.filter(|found| found.revision == document.revision) else { return Ok(false) };
        let parent = found.parent.clone();
        *found = Document { revision: document.revision + 1, parent, ..document.clone() };
        Ok(true)
    }

    async fn remove(&self, kind: DocumentKind, id: &str) -> Result<bool> {
        Ok(self.0.lock().documents.remove(&(kind, id.to_string())).is_some())
    }

    async fn documents(&self, query: &DocumentQuery) -> Result<Vec<Document>> {
        let tables = self.0.lock();
        let is_wanted = |document: &&Document| {
            let is_part = query.parent.is_none() || document.parent == query.parent;
            let is_after = query.after.as_ref().is_none_or(|after| document.id < *after);
            document.kind == query.kind && is_part && is_after
        };
        let limit = query.limit.clamp(1, MAX_DOCUMENTS);
        Ok(tables.documents.values().rev().filter(is_wanted).take(limit).cloned().collect())
    }

    async fn expired(&self, now: Timestamp, limit: usize) -> Result<Vec<Document>> {
        let tables = self.0.lock();
        let is_over = |document: &&Document| document.expires_at.is_some_and(|at| at <= now);
        let mut over: Vec<Document> = tables.documents.values().filter(is_over).cloned().collect();
        over.sort_by_key(|document| document.expires_at);
        over.truncate(limit);
        Ok(over)
    }

    async fn put_part(&self, file: &str, index: u32, bytes: &[u8]) -> Result<()> {
        check_part(bytes)?;
        self.0.lock().parts.insert((file.to_string(), index), bytes.to_vec());
        Ok(())
    }

    async fn part(&self, file: &str, index: u32) -> Result<Option<Vec<u8>>> {
        Ok(self.0.lock().parts.get(&(file.to_string(), index)).cloned())
    }

    async fn remove_parts(&self, file: &str) -> Result<()> {
        self.0.lock().parts.retain(|(of, _), _| of != file);
        Ok(())
    }
}
