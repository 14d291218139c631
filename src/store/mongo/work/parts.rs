//! Parts of files as documents of the collection `parts`.
//!
//! ```text
//! { _id: file and number, file, data: binary }
//! ```

use futures::TryStreamExt;
use mongodb::bson::spec::BinarySubtype;
use mongodb::bson::{Binary, Document, doc};
use serde::{Deserialize, Serialize};

use super::super::connection::Connection;
use super::super::fault::{fault, is_duplicate, unreadable};
use super::super::{deadline_of, late, step};
use crate::Result;
use crate::store::work::MAX_PART_BYTES;

/// Parts that one command removes, so that each ends within a call's deadline.
const PARTS_A_COMMAND: i64 = 32;

/// A document of `parts`.
#[derive(Debug, Serialize, Deserialize)]
pub(in super::super) struct PartDocument {
    #[serde(rename = "_id")]
    id: String,
    /// For the index by which all of a file are removed.
    file: String,
    data: Binary,
}

impl PartDocument {
    /// The file, the part's number and its bytes.
    pub(in super::super) fn part(self) -> Result<(String, u32, Vec<u8>)> {
        let number = self.id.rsplit_once('/').and_then(|(_, number)| number.parse().ok());
        let number = number.ok_or_else(|| unreadable(&format!("parts: {}", self.id), "no number in its id"))?;
        Ok((self.file, number, self.data.bytes))
    }
}

/// The number has ten digits, so no two parts have one id whatever their files are called.
fn id_of(file: &str, index: u32) -> String {
    format!("{file}/{index:010}")
}

/// Writes a part over what is there.
pub(super) async fn put(connection: &Connection, file: &str, index: u32, bytes: &[u8]) -> Result<()> {
    let id = id_of(file, index);
    let data = Binary { subtype: BinarySubtype::Generic, bytes: bytes.to_vec() };
    let part = PartDocument { id: id.clone(), file: file.to_string(), data };
    let deadline = deadline_of(bytes.len());
    let mut is_again = false;
    loop {
        let write = connection.parts.replace_one(doc! { "_id": &id }, &part).upsert(true);
        match tokio::time::timeout(deadline, write.into_future()).await {
            Ok(Ok(_)) => return Ok(()),
            // Two made it at once: it is there now, and replaced.
            Ok(Err(error)) if is_duplicate(&error) && !is_again => is_again = true,
            Ok(Err(error)) => return Err(fault(error)),
            Err(_) => return Err(late(deadline)),
        }
    }
}

/// A part.
pub(super) async fn get(connection: &Connection, file: &str, index: u32) -> Result<Option<Vec<u8>>> {
    let found = step(MAX_PART_BYTES, connection.parts.find_one(doc! { "_id": id_of(file, index) })).await?;
    Ok(found.map(|part| part.data.bytes))
}

/// Removes all parts of a file.
pub(super) async fn remove_all(connection: &Connection, file: &str) -> Result<()> {
    let ids = connection.parts.clone_with_type::<Document>();
    loop {
        let find = ids.find(doc! { "file": file }).projection(doc! { "_id": 1 }).limit(PARTS_A_COMMAND);
        let cursor = step(0, find).await?;
        let found: Vec<Document> = step(0, cursor.try_collect()).await?;
        let found: Vec<_> = found.into_iter().filter_map(|mut part| part.remove("_id")).collect();
        if found.is_empty() {
            return Ok(());
        }
        step(0, connection.parts.delete_many(doc! { "_id": { "$in": found } })).await?;
    }
}
