//! Tasks as documents of the collection `tasks`.
//!
//! ```text
//! { _id: id, kind, due_at: date, attempts, payload: JSON text, leased_until: date, owner?, cancelled: true? }
//! ```
//!
//! `leased_until` is 1970 where nobody holds the task, so that one comparison tells what is free.

use std::time::Instant;

use futures::TryStreamExt;
use futures::future::{join_all, try_join_all};
use jiff::Timestamp;
use mongodb::bson::{DateTime, Document, doc};
use mongodb::error::{Error as DriverError, ErrorKind};
use mongodb::options::ReturnDocument;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use super::super::connection::Connection;
use super::super::document::{date, time};
use super::super::fault::{DUPLICATE_KEY, fault, fault_of_code, unreadable};
use super::super::{DEADLINE, PER_RECORD, deadline_of, late, step};
use crate::Result;
use crate::store::work::{Claim, Hold, Task, TaskKind, after};

/// Tasks that one command adds, and bytes of their payloads.
const TASKS_A_COMMAND: usize = 500;
const BYTES_A_COMMAND: usize = 8 << 20;

/// More candidates than wanted that a claim looks at, because others may take some of them first.
const SPARE_CANDIDATES: usize = 16;

/// Tasks that a claim takes at once.
const TAKEN_AT_ONCE: usize = 16;

/// What a claim may have to read of payloads in one answer.
const PAYLOAD_BYTES: usize = 8 << 20;

/// A document of `tasks`.
#[derive(Debug, Serialize, Deserialize)]
pub(in super::super) struct TaskDocument {
    #[serde(rename = "_id")]
    id: String,
    kind: String,
    due_at: DateTime,
    attempts: i64,
    payload: String,
    leased_until: DateTime,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    owner: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cancelled: Option<bool>,
}

/// The end of no lease.
fn never() -> DateTime {
    DateTime::from_millis(0)
}

impl TaskDocument {
    fn new(task: &Task) -> Self {
        Self {
            id: task.id.clone(),
            kind: task.kind.as_str().to_string(),
            due_at: date(task.due_at),
            attempts: i64::from(task.attempts),
            payload: task.payload.to_string(),
            leased_until: never(),
            owner: None,
            cancelled: None,
        }
    }

    /// Whether its owner has yet to learn that it is not wanted any more.
    pub(in super::super) fn is_cancelled(&self) -> bool {
        self.cancelled.is_some()
    }

    pub(in super::super) fn task(self) -> Result<Task> {
        let wrong = |what: &dyn std::fmt::Display| unreadable(&format!("tasks: {}", self.id), what);
        let kind = TaskKind::of(&self.kind).ok_or_else(|| wrong(&"no kind of ours"))?;
        let payload = serde_json::from_str(&self.payload).map_err(|e| wrong(&e))?;
        let attempts = u32::try_from(self.attempts).unwrap_or(u32::MAX);
        Ok(Task { id: self.id, kind, payload, due_at: time(self.due_at), attempts })
    }
}

/// Adds tasks, but those that are there.
pub(super) async fn push(connection: &Connection, tasks: &[Task]) -> Result<()> {
    let (mut documents, mut num_bytes) = (Vec::new(), 0);
    for (i, task) in tasks.iter().enumerate() {
        let document = TaskDocument::new(task);
        num_bytes += document.payload.len();
        documents.push(document);
        if documents.len() == TASKS_A_COMMAND || num_bytes > BYTES_A_COMMAND || i + 1 == tasks.len() {
            let deadline = deadline_of(num_bytes) + PER_RECORD * documents.len() as u32;
            let insert = connection.tasks.insert_many(&documents).ordered(false);
            match tokio::time::timeout(deadline, insert.into_future()).await {
                Ok(done) => done.map(drop).or_else(but_for_duplicates)?,
                Err(_) => return Err(late(deadline)),
            }
            documents.clear();
            num_bytes = 0;
        }
    }
    Ok(())
}

/// What is wrong with an insertion beside that some were there.
fn but_for_duplicates(error: DriverError) -> Result<()> {
    let ErrorKind::InsertMany(many) = error.kind.as_ref() else { return Err(fault(error)) };
    if many.write_concern_error.is_some() {
        return Err(fault(error));
    }
    let other = many.write_errors.iter().flatten().find(|write| write.code != DUPLICATE_KEY);
    other.map_or(Ok(()), |write| Err(fault_of_code(write.code, &write.message)))
}

/// Takes tasks as [`crate::store::work::Work::claim`] says. Each is taken by a change of its own, which finds nothing where
/// another caller was quicker; then the next ones are tried, until there are none.
///
/// What was taken before an error is returned all the same: else nobody would have it until the lease is over.
pub(super) async fn claim(connection: &Connection, claim: &Claim) -> Result<Vec<Task>> {
    if claim.limit == 0 || claim.kinds.is_empty() || claim.ids.as_ref().is_some_and(Vec::is_empty) {
        return Ok(Vec::new());
    }
    let mut taken = Vec::new();
    let done = claim_into(connection, claim, &mut taken).await;
    if taken.is_empty() {
        done?;
    }
    taken.sort_by(|a, b| (a.due_at, &a.id).cmp(&(b.due_at, &b.id)));
    let readable = |task: TaskDocument| {
        let read = task.task();
        // Its lease holds it back, and the others are done: one broken task must not end all work.
        read.inspect_err(|error| tracing::error!(%error, "a task cannot be read")).ok()
    };
    Ok(taken.into_iter().filter_map(readable).collect())
}

async fn claim_into(connection: &Connection, claim: &Claim, taken: &mut Vec<TaskDocument>) -> Result<()> {
    let until = Instant::now() + DEADLINE;
    remove_cancelled(connection, claim.now).await?;
    loop {
        let asked = (claim.limit - taken.len()).saturating_add(SPARE_CANDIDATES);
        let mut left = candidates(connection, claim, asked).await?;
        let num_found = left.len();
        while taken.len() < claim.limit && !left.is_empty() {
            let some: Vec<String> =
                left.drain(..left.len().min(claim.limit - taken.len()).min(TAKEN_AT_ONCE)).collect();
            let outcomes = join_all(some.iter().map(|id| take(connection, claim, id))).await;
            let (mut num_lost, mut failed) = (0, None);
            for outcome in outcomes {
                match outcome {
                    Ok(Some(task)) => taken.push(task),
                    Ok(None) => num_lost += 1,
                    Err(error) => failed = Some(error),
                }
            }
            failed.map_or(Ok(()), Err)?;
            if num_lost > 0 {
                // Others claim at this moment, and are about to try the same next ones in the same order.
                left.shuffle(&mut rand::rng());
            }
        }
        // Fewer than asked for were all there were. Else others took these, and there may be more.
        if taken.len() == claim.limit || num_found < asked || Instant::now() > until {
            return Ok(());
        }
    }
}

/// Removes what was cancelled and whose owner did not live to learn of it.
async fn remove_cancelled(connection: &Connection, now: Timestamp) -> Result<()> {
    let left_behind = doc! { "cancelled": true, "leased_until": { "$lte": date(now) } };
    step(0, connection.tasks.delete_many(left_behind)).await.map(drop)
}

/// What a task must be for a claim to get it.
fn is_free(claim: &Claim) -> Document {
    let kinds: Vec<&str> = claim.kinds.iter().map(|kind| kind.as_str()).collect();
    doc! {
        "kind": { "$in": kinds },
        "due_at": { "$lte": date(claim.due_by) },
        "leased_until": { "$lte": date(claim.now) },
        "cancelled": { "$exists": false },
    }
}

/// Ids of free tasks, those due the longest first.
async fn candidates(connection: &Connection, claim: &Claim, limit: usize) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Only {
        _id: String,
    }
    let mut filter = is_free(claim);
    if let Some(ids) = &claim.ids {
        filter.insert("_id", doc! { "$in": ids });
    }
    let ids = connection.tasks.clone_with_type::<Only>();
    let find = ids.find(filter).projection(doc! { "_id": 1 });
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let find = find.sort(doc! { "due_at": 1, "_id": 1 }).limit(limit).max_time(DEADLINE);
    let mut cursor = step(0, find).await?;
    let mut found = Vec::new();
    while let Some(Only { _id }) = step(0, cursor.try_next()).await? {
        found.push(_id);
    }
    Ok(found)
}

/// Gives a task to the claim's owner, unless another one has it by now.
async fn take(connection: &Connection, claim: &Claim, id: &str) -> Result<Option<TaskDocument>> {
    let mut filter = is_free(claim);
    filter.insert("_id", id);
    let lease = doc! { "owner": &claim.owner, "leased_until": leased_until(after(claim.now, claim.lease)) };
    let update = doc! { "$set": lease, "$inc": { "attempts": 1i64 } };
    let take = connection.tasks.find_one_and_update(filter, update).return_document(ReturnDocument::After);
    step(PAYLOAD_BYTES, take).await
}

/// What an owner's call reads of its task: not the payload.
#[derive(Deserialize)]
struct Mark {
    #[serde(default)]
    cancelled: bool,
}

fn hold(mark: Option<Mark>) -> Hold {
    match mark {
        None => Hold::Lost,
        Some(Mark { cancelled: true }) => Hold::Cancelled,
        Some(Mark { cancelled: false }) => Hold::Held,
    }
}

/// Holds a task longer.
pub(super) async fn renew(connection: &Connection, id: &str, owner: &str, until: Timestamp) -> Result<Hold> {
    let update = doc! { "$set": { "leased_until": leased_until(until) } };
    let marks = connection.tasks.clone_with_type::<Mark>();
    let renew = marks.find_one_and_update(doc! { "_id": id, "owner": owner }, update);
    Ok(hold(step(0, renew.projection(doc! { "cancelled": 1 })).await?))
}

/// Ends a task.
pub(super) async fn finish(connection: &Connection, id: &str, owner: &str) -> Result<Hold> {
    end(connection, doc! { "_id": id, "owner": owner }).await
}

async fn end(connection: &Connection, filter: Document) -> Result<Hold> {
    let marks = connection.tasks.clone_with_type::<Mark>();
    Ok(hold(step(0, marks.find_one_and_delete(filter).projection(doc! { "cancelled": 1 })).await?))
}

/// Gives a task back, or ends it where it is cancelled.
pub(super) async fn postpone(connection: &Connection, id: &str, owner: &str, due_at: Timestamp) -> Result<Hold> {
    let held = doc! { "_id": id, "owner": owner, "cancelled": { "$exists": false } };
    let back = doc! { "$set": { "due_at": date(due_at), "leased_until": never() }, "$unset": { "owner": "" } };
    if step(0, connection.tasks.update_one(held, back)).await?.matched_count > 0 {
        return Ok(Hold::Held);
    }
    // No longer the owner's, or cancelled, which it stays.
    end(connection, doc! { "_id": id, "owner": owner, "cancelled": true }).await
}

/// Marks a task, which nobody can claim then, and removes it where nobody holds it.
pub(super) async fn cancel(connection: &Connection, id: &str) -> Result<bool> {
    let mark = doc! { "$set": { "cancelled": true } };
    let marked = step(0, connection.tasks.update_one(doc! { "_id": id }, mark)).await?;
    if marked.matched_count == 0 {
        return Ok(false);
    }
    // Left behind by a process that dies here, the next claim of anybody removes it.
    let waits = doc! { "_id": id, "cancelled": true, "owner": { "$exists": false } };
    step(0, connection.tasks.delete_one(waits)).await?;
    Ok(true)
}

/// Number of tasks of each kind, counted in the index that begins with it.
pub(super) async fn count(connection: &Connection) -> Result<Vec<(TaskKind, u64)>> {
    let counts = TaskKind::ALL.iter().map(|kind| async move {
        let count = connection.tasks.count_documents(doc! { "kind": kind.as_str() }).max_time(DEADLINE);
        step(0, count).await.map(|count| (*kind, count))
    });
    let counts: Vec<(TaskKind, u64)> = try_join_all(counts).await?;
    Ok(counts.into_iter().filter(|(_, count)| *count > 0).collect())
}

/// A lease's end as it is kept, which is not the word for none.
fn leased_until(until: Timestamp) -> DateTime {
    date(until).max(DateTime::from_millis(1))
}
