//! Documents of background work as those of the collection `documents`.
//!
//! ```text
//! { _id: kind and id, parent?, expires_at: date?, revision, body: JSON text }
//! ```
//!
//! A page is a range of `_id`, whose order is that of its bytes.

use futures::TryStreamExt;
use mongodb::bson::{DateTime, doc};
use serde::{Deserialize, Serialize};

use super::super::connection::Connection;
use super::super::document::{date, time};
use super::super::fault::{fault, is_duplicate, unreadable};
use super::super::{DEADLINE, deadline_of, late, step};
use crate::Result;
use crate::store::work::{Document, DocumentKind, DocumentQuery, MAX_DOCUMENTS};

/// A document of `documents`.
#[derive(Debug, Serialize, Deserialize)]
pub(in super::super) struct DocumentDocument {
    #[serde(rename = "_id")]
    id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    parent: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires_at: Option<DateTime>,
    revision: i64,
    body: String,
}

/// No kind has a slash in it.
fn id_of(kind: DocumentKind, id: &str) -> String {
    format!("{}/{id}", kind.as_str())
}

impl DocumentDocument {
    pub(in super::super) fn document(self) -> Result<Document> {
        let wrong = |what: &dyn std::fmt::Display| unreadable(&format!("documents: {}", self.id), what);
        let (kind, id) = self.id.split_once('/').ok_or_else(|| wrong(&"no kind in its id"))?;
        Ok(Document {
            kind: DocumentKind::of(kind).ok_or_else(|| wrong(&"no kind of ours"))?,
            id: id.to_string(),
            parent: self.parent.clone(),
            expires_at: self.expires_at.map(time),
            revision: u64::try_from(self.revision).map_err(|e| wrong(&e))?,
            body: serde_json::from_str(&self.body).map_err(|e| wrong(&e))?,
        })
    }
}

/// Writes a document as its revision 1, unless it is there.
pub(super) async fn create(connection: &Connection, document: &Document) -> Result<bool> {
    let Document { kind, id, parent, expires_at, revision: _, body } = document;
    let (parent, expires_at) = (parent.clone(), expires_at.map(date));
    let new = DocumentDocument { id: id_of(*kind, id), parent, expires_at, revision: 1, body: body.to_string() };
    let deadline = deadline_of(new.body.len());
    match tokio::time::timeout(deadline, connection.documents.insert_one(&new).into_future()).await {
        Ok(Ok(_)) => Ok(true),
        Ok(Err(error)) if is_duplicate(&error) => Ok(false),
        Ok(Err(error)) => Err(fault(error)),
        Err(_) => Err(late(deadline)),
    }
}

/// One document.
pub(super) async fn get(connection: &Connection, kind: DocumentKind, id: &str) -> Result<Option<Document>> {
    let found = step(0, connection.documents.find_one(doc! { "_id": id_of(kind, id) })).await?;
    found.map(DocumentDocument::document).transpose()
}

/// Writes a document over the revision it was read with.
pub(super) async fn replace(connection: &Connection, document: &Document) -> Result<bool> {
    let Document { kind, id, parent: _, expires_at, revision, body } = document;
    // A revision that the database cannot count to is none that was read there.
    let Ok(revision) = i64::try_from(*revision) else { return Ok(false) };
    let body = body.to_string();
    let num_bytes = body.len();
    let mut update = doc! { "$set": { "body": body }, "$inc": { "revision": 1i64 } };
    match expires_at {
        Some(at) => update.get_document_mut("$set").map(|set| set.insert("expires_at", date(*at))).ok().flatten(),
        None => update.insert("$unset", doc! { "expires_at": "" }),
    };
    let read = doc! { "_id": id_of(*kind, id), "revision": revision };
    let done = step(num_bytes, connection.documents.update_one(read, update)).await?;
    Ok(done.matched_count > 0)
}

/// Removes a document.
pub(super) async fn remove(connection: &Connection, kind: DocumentKind, id: &str) -> Result<bool> {
    let done = step(0, connection.documents.delete_one(doc! { "_id": id_of(kind, id) })).await?;
    Ok(done.deleted_count > 0)
}

/// A page in falling order of ids.
pub(super) async fn list(connection: &Connection, query: &DocumentQuery) -> Result<Vec<Document>> {
    // The first id of the kind, and the character after the slash for the end of its ids.
    let end = query.after.as_ref().map_or(format!("{}0", query.kind.as_str()), |after| id_of(query.kind, after));
    let mut filter = doc! { "_id": { "$gte": id_of(query.kind, ""), "$lt": end } };
    if let Some(parent) = &query.parent {
        filter.insert("parent", parent);
    }
    let limit = query.limit.clamp(1, MAX_DOCUMENTS) as i64;
    let find = connection.documents.find(filter).sort(doc! { "_id": -1 }).limit(limit).max_time(DEADLINE);
    let mut cursor = step(0, find).await?;
    let mut page = Vec::new();
    while let Some(found) = step(0, cursor.try_next()).await? {
        page.push(found.document()?);
    }
    Ok(page)
}

/// Documents whose time is over, the earliest first.
pub(super) async fn expired(connection: &Connection, now: jiff::Timestamp, limit: usize) -> Result<Vec<Document>> {
    // A limit of 0 is none to the server.
    let Some(limit) = i64::try_from(limit).ok().filter(|limit| *limit > 0) else { return Ok(Vec::new()) };
    let find = connection.documents.find(doc! { "expires_at": { "$lte": date(now) } });
    let mut cursor = step(0, find.sort(doc! { "expires_at": 1, "_id": 1 }).limit(limit).max_time(DEADLINE)).await?;
    let mut over = Vec::new();
    while let Some(found) = step(0, cursor.try_next()).await? {
        over.push(found.document()?);
    }
    Ok(over)
}
