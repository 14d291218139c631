//! All records of a database, for a backup or a check. Reads only; no lock, no session that a server could close.
//!
//! Each page is one command `find` from the last id on. From 5.0 on a replica set reads all of them as of one time
//! (`readConcern: snapshot` with `atClusterTime`) for as long as it keeps that history, five minutes unless set otherwise. A
//! server that does not, or whose history ends meanwhile, is read page by page as of now, up to the largest id there was at the start.

use std::time::Duration;

use mongodb::Database;
use mongodb::bson::{self, Bson, Document, Timestamp, doc};
use tokio::runtime::Handle;

use super::MongoStore;
use super::document::{Stored, uuid};
use super::fault::{code, fault, unreadable};
use super::migrate;
use super::schema::{DOCUMENTS, INFERENCES, OUTPUTS, PARTS, TASKS, VERSION};
use super::spill::{self, Chunk};
use super::work::{DocumentDocument, PartDocument, TaskDocument};
use crate::store::backup::Consistency;
use crate::store::backup::piece::{Piece, PieceKind};
use crate::store::backup::source::{Found, FoundPiece, Source, Unreadable};
use crate::store::record::InferenceId;
use crate::{Error, Result};

/// Documents of a page; its bytes are bounded by a reply's 16 MiB.
const PAGE: i64 = 256;

/// How long one page may take.
const PAGE_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a page is asked for while the server does not answer, and the pause between: elections take seconds.
const NUM_TRIES: usize = 5;
const PAUSE: Duration = Duration::from_secs(2);

/// The codes of a time that is no longer, or not yet, in the server's history.
const SNAPSHOT_TOO_OLD: i32 = 239;
const SNAPSHOT_UNAVAILABLE: i32 = 246;

/// How pages are read.
#[derive(Debug, Clone, Copy)]
enum View {
    At(Timestamp),
    Now,
}

/// All records of a database.
pub struct Snapshot {
    runtime: Handle,
    database: Database,
    retention: Duration,
    view: View,
    consistency: Consistency,
    /// The largest id there was at the start; `None` for an empty database.
    end: Option<bson::Uuid>,
    /// The id of the last document that was read.
    last: Option<Bson>,
    /// Of which work pieces were read last, and the id of the last one.
    pieces_of: Option<(PieceKind, Option<Bson>)>,
}

impl Snapshot {
    /// Fixes the time. `runtime` is where its calls are made; this and all others block.
    ///
    /// Errors: as [`crate::store::Records`]; [`Error::Config`] where the database is not at the present layout.
    pub fn open(store: &MongoStore, runtime: Handle) -> Result<Self> {
        let retention = store.connector.retention();
        runtime.clone().block_on(async move {
            let database = store.connector.database().await?;
            let version = migrate::version(&database).await?;
            if version != VERSION {
                let reason = format!("the database has layout {version}, this program reads {VERSION}");
                return Err(Error::Config { faults: vec![format!("database.url: {reason}: `eremois migrate` brings it there")] });
            }
            let newest = |concern| newest(&database, concern);
            let (view, end) = match newest(doc! { "level": "snapshot" }).await {
                Ok((end, Some(at))) => (View::At(at), end),
                Ok((end, None)) => (View::Now, end),
                Err(error) if error.code.is_some() => {
                    tracing::info!(cause = %error.cause, "MongoDB has no snapshots: records are read as of now, page by page");
                    (View::Now, newest(doc! { "level": "majority" }).await.map_err(|error| error.cause)?.0)
                }
                Err(error) => return Err(error.cause),
            };
            let consistency = match view {
                View::At(_) => Consistency::Snapshot,
                View::Now => Consistency::Ranges,
            };
            Ok(Self { runtime, database, retention, view, consistency, end, last: None, pieces_of: None })
        })
    }

    async fn page(&mut self) -> Result<Vec<Found>> {
        let Some(end) = self.end else { return Ok(Vec::new()) };
        loop {
            let mut ids = doc! { "$lte": end };
            if let Some(last) = &self.last {
                ids.insert("$gt", last.clone());
            }
            let documents = self.find(INFERENCES, doc! { "_id": ids }, PAGE).await?;
            let Some(last) = documents.last() else { return Ok(Vec::new()) };
            self.last = last.get("_id").cloned();
            let mut page = Vec::with_capacity(documents.len());
            for document in documents {
                page.extend(self.record(document).await?);
            }
            // All of them may be on their way out, with the chunks gone first.
            if !page.is_empty() {
                return Ok(page);
            }
        }
    }

    async fn pieces(&mut self, kind: PieceKind) -> Result<Vec<FoundPiece>> {
        let collection = match kind {
            PieceKind::Task => TASKS,
            PieceKind::Document => DOCUMENTS,
            PieceKind::Part => PARTS,
        };
        if self.pieces_of.as_ref().is_none_or(|(of, _)| *of != kind) {
            self.pieces_of = Some((kind, None));
        }
        loop {
            let last = self.pieces_of.as_ref().and_then(|(_, last)| last.clone());
            let filter = last.map_or_else(Document::new, |last| doc! { "_id": { "$gt": last } });
            let documents = self.find(collection, filter, PAGE).await?;
            let Some(last) = documents.last() else { return Ok(Vec::new()) };
            self.pieces_of = Some((kind, last.get("_id").cloned()));
            let mut page = Vec::with_capacity(documents.len());
            for document in documents {
                let name = format!("{collection}: {}", document.get("_id").unwrap_or(&Bson::Null));
                page.extend(
                    piece(kind, document).transpose().map(|piece| piece.map_err(|cause| Unreadable { name, cause })),
                );
            }
            // A page may hold nothing but what was cancelled.
            if !page.is_empty() {
                return Ok(page);
            }
        }
    }

    /// The record of a document; `None` where it was deleted between the reading of its parts.
    async fn record(&mut self, document: Document) -> Result<Option<Found>> {
        let name = name(document.get("_id"));
        let broken = |cause| Ok(Some(Err(Unreadable { name: name.clone(), cause })));
        let mut stored: Stored = match bson::deserialize_from_document(document) {
            Ok(stored) => stored,
            Err(error) => return broken(unreadable(INFERENCES, error)),
        };
        if let Some(spilled) = stored.spilled.take() {
            let filter = spill::chunks_of(&stored.id, &spilled);
            let chunks = self.chunks(filter).await?;
            let num_chunks = chunks.len();
            let id = stored.id;
            match chunks.into_iter().collect::<Result<_>>().and_then(|chunks| spill::put_back(stored, spilled, chunks))
            {
                Ok(Some(whole)) => stored = whole,
                Ok(None) if self.is_deleted(&id).await? => return Ok(None),
                Ok(None) => {
                    return broken(unreadable(
                        OUTPUTS,
                        format!("some of its chunks are missing, {num_chunks} are there"),
                    ));
                }
                Err(cause) => return broken(cause),
            }
        }
        match stored.into_record() {
            Ok(record) => Ok(Some(Ok(record))),
            Err(cause) => broken(cause),
        }
    }

    async fn chunks(&mut self, filter: Document) -> Result<Vec<Result<Chunk>>> {
        let mut chunks = Vec::new();
        let mut filter = filter;
        loop {
            // One at a time, within one reply's bytes.
            let Some(document) = self.find(OUTPUTS, filter.clone(), 1).await?.pop() else { return Ok(chunks) };
            let id = document.get("_id").cloned().unwrap_or(Bson::Null);
            if let Ok(range) = filter.get_document_mut("_id") {
                range.remove("$gte");
                range.insert("$gt", id);
            }
            chunks.push(bson::deserialize_from_document(document).map_err(|e| unreadable(OUTPUTS, e)));
        }
    }

    /// Whether a record has gone since its page was read, which in a snapshot none has.
    async fn is_deleted(&mut self, id: &bson::Uuid) -> Result<bool> {
        match self.view {
            View::At(_) => Ok(false),
            View::Now => Ok(self.find(INFERENCES, doc! { "_id": *id }, 1).await?.is_empty()),
        }
    }

    /// Documents of a collection by rising `_id`: as many as a reply holds, and at least one if there is one.
    async fn find(&mut self, collection: &str, filter: Document, limit: i64) -> Result<Vec<Document>> {
        let mut num_tries = 0;
        loop {
            let concern = match self.view {
                View::At(time) => doc! { "level": "snapshot", "atClusterTime": time },
                View::Now => doc! { "level": "majority" },
            };
            let command = find(collection, filter.clone(), doc! { "_id": 1 }, limit, concern);
            match run(&self.database, command).await {
                Ok(reply) => return Ok(reply.documents),
                Err(Failed { code: Some(SNAPSHOT_TOO_OLD | SNAPSHOT_UNAVAILABLE), cause })
                    if matches!(self.view, View::At(_)) =>
                {
                    tracing::warn!(%cause, "MongoDB's history has ended: the rest is read as of now, page by page");
                    self.view = View::Now;
                    self.consistency = Consistency::Ranges;
                }
                Err(Failed { cause: Error::StoreUnavailable { cause }, .. }) if num_tries + 1 < NUM_TRIES => {
                    tracing::warn!(cause, "MongoDB does not answer: it is asked again");
                    num_tries += 1;
                    tokio::time::sleep(PAUSE).await;
                }
                Err(Failed { cause, .. }) => return Err(cause),
            }
        }
    }
}

impl Source for Snapshot {
    fn store(&self) -> &'static str {
        "mongodb"
    }

    fn schema(&self) -> i32 {
        VERSION
    }

    fn consistency(&self) -> Consistency {
        self.consistency
    }

    fn count(&mut self) -> Result<u64> {
        let database = &self.database;
        let count = async { database.collection::<Document>(INFERENCES).estimated_document_count().await };
        self.runtime.block_on(count).map_err(fault)
    }

    fn next_pieces(&mut self, kind: PieceKind) -> Result<Vec<FoundPiece>> {
        self.runtime.clone().block_on(self.pieces(kind))
    }

    fn next_page(&mut self) -> Result<Vec<Found>> {
        self.runtime.clone().block_on(self.page())
    }

    fn check(&mut self) -> Result<Vec<String>> {
        let pending = self.runtime.block_on(migrate::pending(&self.database, self.retention));
        match pending {
            Ok(pending) => Ok(pending
                .changes
                .iter()
                .map(|change| format!("not as it must be: {change} by `eremois migrate`"))
                .collect()),
            // An index that was made otherwise.
            Err(Error::Internal { cause }) => Ok(vec![cause]),
            Err(error) => Err(error),
        }
    }
}

/// What a document of background work is; `None` of a task that was cancelled.
fn piece(kind: PieceKind, document: Document) -> Result<Option<Piece>> {
    let broken = |e: bson::error::Error| unreadable(kind.section(), e);
    match kind {
        PieceKind::Task => {
            let task: TaskDocument = bson::deserialize_from_document(document).map_err(broken)?;
            if task.is_cancelled() {
                return Ok(None);
            }
            task.task().map(|task| Some(Piece::Task(task)))
        }
        PieceKind::Document => {
            let found: DocumentDocument = bson::deserialize_from_document(document).map_err(broken)?;
            found.document().map(|document| Some(Piece::Document(document)))
        }
        PieceKind::Part => {
            let part: PartDocument = bson::deserialize_from_document(document).map_err(broken)?;
            part.part().map(|(file, index, bytes)| Some(Piece::Part { file, index, bytes }))
        }
    }
}

/// A command that failed.
struct Failed {
    /// The server's code, where it was the server that refused it.
    code: Option<i32>,
    cause: Error,
}

/// What a `find` found.
struct Reply {
    documents: Vec<Document>,
    at: Option<Timestamp>,
}

fn find(collection: &str, filter: Document, sort: Document, limit: i64, concern: Document) -> Document {
    doc! {
        "find": collection,
        "filter": filter,
        "sort": sort,
        "limit": limit,
        // What does not fit a reply is asked for by the next command, and no cursor is left behind.
        "singleBatch": true,
        "batchSize": limit,
        "readConcern": concern,
        "maxTimeMS": super::millis(PAGE_TIMEOUT),
    }
}

async fn run(database: &Database, command: Document) -> std::result::Result<Reply, Failed> {
    let ran = tokio::time::timeout(PAGE_TIMEOUT, database.run_command(command)).await;
    let mut reply = match ran {
        Ok(Ok(reply)) => reply,
        Ok(Err(error)) => return Err(Failed { code: code(&error), cause: fault(error) }),
        Err(_) => return Err(Failed { code: None, cause: super::late(PAGE_TIMEOUT) }),
    };
    let cursor = reply.get_document_mut("cursor");
    let broken = |e: &dyn std::fmt::Display| Failed { code: None, cause: unreadable("a reply of MongoDB", e) };
    let cursor = cursor.map_err(|e| broken(&e))?;
    let at = cursor.get_timestamp("atClusterTime").ok();
    let Some(Bson::Array(batch)) = cursor.remove("firstBatch") else { return Err(broken(&"no batch")) };
    let documents = batch.into_iter().filter_map(|one| match one {
        Bson::Document(document) => Some(document),
        _ => None,
    });
    Ok(Reply { documents: documents.collect(), at })
}

/// The largest id of all records, and the time it was read at.
async fn newest(
    database: &Database,
    concern: Document,
) -> std::result::Result<(Option<bson::Uuid>, Option<Timestamp>), Failed> {
    let Reply { documents, at } = run(database, find(INFERENCES, doc! {}, doc! { "_id": -1 }, 1, concern)).await?;
    let id = documents.first().and_then(|document| document.get("_id"));
    let id = match id {
        None => None,
        Some(Bson::Binary(id)) => id.to_uuid().ok(),
        // Somebody else's document: of ours there is none that is larger.
        Some(_) => Some(uuid(&InferenceId(uuid::Uuid::max()))),
    };
    Ok((id, at))
}

/// What an `_id` is called.
fn name(id: Option<&Bson>) -> String {
    match id {
        Some(Bson::Binary(binary)) if binary.to_uuid().is_ok() => binary
            .to_uuid()
            .map_or_else(|_| binary.to_string(), |id| InferenceId(uuid::Uuid::from_bytes(id.bytes())).to_string()),
        Some(other) => format!("the document {other}"),
        None => "a document without an id".to_string(),
    }
}
