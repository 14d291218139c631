//! What does not fit a document: outputs, and if need be inputs, of records beyond 16 MiB.
//!
//! They lie in the collection `outputs`, cut into chunks. The chunks are written first and the record that names them last,
//! so whoever finds a record finds all of it. A chunk's `_id` is the record's, a hash of the whole and its number: writing
//! the same again changes nothing, and everything of a record is one range of ids. GridFS would need a second identity
//! for each output and a write that is no repetition.

use futures::TryStreamExt;
use mongodb::Collection;
use mongodb::bson::spec::BinarySubtype;
use mongodb::bson::{self, Binary, DateTime, Document, doc};
use serde::{Deserialize, Serialize};

use super::document::{InputDocument, OutputDocument, Spilled, Stored};
use super::fault::{fault, is_duplicate, unreadable};
use super::{deadline_of, late, step};
use crate::Result;

/// Bytes of a chunk.
const CHUNK_BYTES: usize = 4 << 20;

/// Bytes of the hash in an `_id`.
const HASH_BYTES: usize = 16;

/// A chunk.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Chunk {
    #[serde(rename = "_id")]
    id: Binary,
    /// That of the record, for the index that expires.
    created_at: DateTime,
    /// Whose it is, so that it can be erased without its record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    user: Option<String>,
    data: Binary,
}

/// What the chunks together are.
#[derive(Serialize, Deserialize)]
struct Whole {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    input: Option<InputDocument>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    output: Option<OutputDocument>,
}

/// Moves the output of a document that is larger than `room` into chunks, and its input where that is not enough.
/// Returns the document that names the chunks, and the chunks, which must be there before it.
pub(super) fn cut(mut stored: Stored, room: usize) -> Result<(Stored, Vec<Chunk>)> {
    let num_bytes = |value: &Stored| bson::serialize_to_vec(value).map(|bytes| bytes.len());
    let wrong = |e| unreadable("a record", e);
    if num_bytes(&stored).map_err(wrong)? <= room {
        return Ok((stored, Vec::new()));
    }
    let mut whole = Whole { input: None, output: stored.output.take() };
    let with_input = num_bytes(&stored).map_err(wrong)? > room;
    if with_input {
        whole.input = stored.input.take();
    }
    let bytes = bson::serialize_to_vec(&whole).map_err(wrong)?;
    let hash = blake3::hash(&bytes);
    let hash = &hash.as_bytes()[..HASH_BYTES];
    let chunks: Vec<Chunk> = (0u32..)
        .zip(bytes.chunks(CHUNK_BYTES))
        .map(|(number, data)| Chunk {
            id: chunk_id(&stored.id, hash, number),
            created_at: stored.created_at,
            user: stored.user.clone(),
            data: Binary { subtype: BinarySubtype::Generic, bytes: data.to_vec() },
        })
        .collect();
    stored.spilled = Some(Spilled {
        hash: Binary { subtype: BinarySubtype::Generic, bytes: hash.to_vec() },
        // A document of i32::MAX bytes, BSON's own bound, has 512 chunks.
        num_chunks: chunks.len() as i32,
        with_input,
    });
    Ok((stored, chunks))
}

/// Writes chunks; those that are there are the same.
pub(super) async fn write(outputs: &Collection<Chunk>, chunks: &[Chunk]) -> Result<()> {
    let deadline = deadline_of(CHUNK_BYTES);
    for chunk in chunks {
        match tokio::time::timeout(deadline, outputs.insert_one(chunk)).await {
            Err(_) => return Err(late(deadline)),
            Ok(Err(error)) if !is_duplicate(&error) => return Err(fault(error)),
            Ok(_) => {}
        }
    }
    Ok(())
}

/// Puts back what was moved. `None` where chunks are missing: the record is being deleted.
///
/// Errors: [`crate::Error::Internal`] where the chunks are not what was written.
pub(super) async fn join(outputs: &Collection<Chunk>, mut stored: Stored) -> Result<Option<Stored>> {
    let Some(spilled) = stored.spilled.take() else { return Ok(Some(stored)) };
    // One at a time: what is wrong with the connection is noticed within one chunk's deadline.
    let find = outputs.find(chunks_of(&stored.id, &spilled)).sort(doc! { "_id": 1 }).batch_size(1);
    let mut cursor = step(CHUNK_BYTES, find).await?;
    let mut chunks = Vec::new();
    while let Some(chunk) = step(CHUNK_BYTES, cursor.try_next()).await? {
        chunks.push(chunk);
    }
    put_back(stored, spilled, chunks)
}

/// The filter of the chunks that a document names.
pub(super) fn chunks_of(id: &bson::Uuid, spilled: &Spilled) -> Document {
    let bound = |number| chunk_id(id, &spilled.hash.bytes, number);
    doc! { "_id": { "$gte": bound(0), "$lte": bound(u32::MAX) } }
}

/// [`join`] with all chunks there are, in their order.
pub(super) fn put_back(mut stored: Stored, spilled: Spilled, chunks: Vec<Chunk>) -> Result<Option<Stored>> {
    if i32::try_from(chunks.len()) != Ok(spilled.num_chunks) {
        return Ok(None);
    }
    let bytes: Vec<u8> = chunks.into_iter().flat_map(|chunk| chunk.data.bytes).collect();
    let id = stored.inference_id();
    let name = || format!("outputs: {id}");
    if blake3::hash(&bytes).as_bytes()[..HASH_BYTES] != spilled.hash.bytes[..] {
        return Err(unreadable(&name(), "the chunks are not what was written"));
    }
    let whole: Whole = bson::deserialize_from_slice(&bytes).map_err(|e| unreadable(&name(), e))?;
    stored.output = whole.output;
    if spilled.with_input {
        stored.input = whole.input;
    }
    Ok(Some(stored))
}

/// All chunks of a record, those of outputs that others replaced among them. They go with the record and not when they are
/// replaced: another write may be about to name them again.
pub(super) fn all_of(id: &bson::Uuid) -> Document {
    let (first, last) = ([0; HASH_BYTES], [u8::MAX; HASH_BYTES]);
    doc! { "_id": { "$gte": chunk_id(id, &first, 0), "$lte": chunk_id(id, &last, u32::MAX) } }
}

/// Record, hash, number. Binaries of equal length sort by their bytes.
fn chunk_id(id: &bson::Uuid, hash: &[u8], number: u32) -> Binary {
    let mut bytes = id.bytes().to_vec();
    bytes.extend(hash);
    bytes.extend(number.to_be_bytes());
    Binary { subtype: BinarySubtype::Generic, bytes }
}
