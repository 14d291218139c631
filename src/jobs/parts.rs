//! Content in parts of the store: written under a name that nothing refers to yet, then referred to, or gone again.
//!
//! ```text
//! PartWriter ─▶ draft, parts … ─▶ Sealed ─▶ a document that refers to them is written: Sealed::adopted
//!      │ dropped: parts removed      │                           another was first: Sealed::discard
//!                                    └─ the process ends here: the sweep finds the draft, and whether something refers to it
//! ```

use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::store::work::{Document, DocumentKind, MAX_PART_BYTES, Work};
use crate::{Error, Result};

/// Bytes from which hashing leaves the async threads: BLAKE3 does more than 1 GB/s, and they may be held for 500
/// microseconds.
const MAX_INLINE_HASH: usize = 256 << 10;

/// A stretch of content: the parts under one name, in their order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    pub name: String,
    /// Bytes of each part.
    pub part_lens: Vec<u32>,
    /// BLAKE3 of all of them, hexadecimal.
    pub blake3: String,
}

impl Segment {
    /// Bytes of all parts.
    pub fn len(&self) -> u64 {
        self.part_lens.iter().map(|len| u64::from(*len)).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.part_lens.is_empty()
    }
}

/// The document that will refer to the parts of a draft.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    pub kind: DocumentKind,
    pub id: String,
}

/// Writes content part by part. Dropped before it is sealed, it has its parts removed.
pub struct PartWriter {
    work: Arc<dyn Work>,
    name: String,
    owner: Owner,
    /// When a draft that is still there is looked at: nobody writes it any more by then.
    until: Timestamp,
    buffer: Vec<u8>,
    part_lens: Vec<u32>,
    hasher: blake3::Hasher,
    /// Whether a draft may be there, and parts with it.
    has_draft: bool,
}

impl PartWriter {
    /// Nothing is written before the first part is full, or the content is sealed.
    pub fn new(work: Arc<dyn Work>, owner: Owner, until: Timestamp) -> Self {
        Self {
            work,
            name: uuid::Uuid::now_v7().simple().to_string(),
            owner,
            until,
            buffer: Vec::new(),
            part_lens: Vec::new(),
            hasher: blake3::Hasher::new(),
            has_draft: false,
        }
    }

    /// Bytes taken so far.
    pub fn len(&self) -> u64 {
        self.part_lens.iter().map(|len| u64::from(*len)).sum::<u64>() + self.buffer.len() as u64
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends. Errors: the store's; the content is of no use then.
    pub async fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(MAX_PART_BYTES - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            if self.buffer.len() == MAX_PART_BYTES {
                self.put().await?;
            }
        }
        Ok(())
    }

    /// Writes what is left. `None` where there was nothing at all.
    ///
    /// From here on only [`Sealed`] removes the parts, or the sweep: what refers to them may be written by then.
    /// Errors: the store's.
    pub async fn seal(mut self) -> Result<Option<Sealed>> {
        if !self.buffer.is_empty() {
            self.put().await?;
        }
        if self.part_lens.is_empty() {
            return Ok(None);
        }
        self.has_draft = false;
        let segment = Segment {
            name: std::mem::take(&mut self.name),
            part_lens: std::mem::take(&mut self.part_lens),
            blake3: self.hasher.finalize().to_hex().to_string(),
        };
        Ok(Some(Sealed { work: self.work.clone(), segment }))
    }

    async fn put(&mut self) -> Result<()> {
        if !self.has_draft {
            self.has_draft = true;
            self.work.create(&draft(&self.name, &self.owner, self.until)).await?;
        }
        let (hasher, bytes) = hashed(self.hasher.clone(), std::mem::take(&mut self.buffer)).await?;
        self.hasher = hasher;
        let index = self.part_lens.len() as u32;
        self.work.put_part(&self.name, index, &bytes).await?;
        self.part_lens.push(bytes.len() as u32);
        self.buffer = bytes;
        self.buffer.clear();
        Ok(())
    }
}

impl Drop for PartWriter {
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.has_draft {
            let (work, name) = (self.work.clone(), std::mem::take(&mut self.name));
            // What cannot be removed now the sweep removes.
            runtime.spawn(async move { remove(&*work, &name).await });
        }
    }
}

/// Content that is whole, and that nothing refers to yet.
pub struct Sealed {
    work: Arc<dyn Work>,
    pub segment: Segment,
}

impl Sealed {
    /// Something refers to it now. A draft that cannot be removed the sweep removes.
    pub async fn adopted(self) {
        if let Err(error) = self.work.remove(DocumentKind::Draft, &self.segment.name).await {
            tracing::debug!(%error, "a draft stays until the sweep");
        }
    }

    /// Nothing will refer to it.
    pub async fn discard(self) {
        if let Err(error) = remove(&*self.work, &self.segment.name).await {
            tracing::debug!(%error, "parts stay until the sweep");
        }
    }
}

fn draft(name: &str, owner: &Owner, until: Timestamp) -> Document {
    Document {
        kind: DocumentKind::Draft,
        id: name.to_string(),
        parent: None,
        expires_at: Some(until),
        revision: 0,
        body: json!(owner),
    }
}

/// Removes parts and then their draft.
async fn remove(work: &dyn Work, name: &str) -> Result<()> {
    work.remove_parts(name).await?;
    work.remove(DocumentKind::Draft, name).await?;
    Ok(())
}

/// What the sweep does with a draft whose time is over: the parts stay where its owner refers to them.
///
/// Errors: the store's.
pub async fn settle_draft(work: &dyn Work, draft: &Document) -> Result<()> {
    let owner: Option<Owner> = serde_json::from_value(draft.body.clone()).ok();
    let document = match &owner {
        Some(owner) => work.document(owner.kind, &owner.id).await?,
        None => None,
    };
    if document.is_some_and(|document| mentions(&document.body, &draft.id)) {
        work.remove(DocumentKind::Draft, &draft.id).await?;
        return Ok(());
    }
    remove(work, &draft.id).await
}

/// Whether a text is somewhere in a value. Names of parts are random, so one that is there is meant.
fn mentions(value: &Value, text: &str) -> bool {
    match value {
        Value::String(found) => found == text,
        Value::Array(items) => items.iter().any(|item| mentions(item, text)),
        Value::Object(fields) => fields.values().any(|field| mentions(field, text)),
        _ => false,
    }
}

async fn hashed(mut hasher: blake3::Hasher, bytes: Vec<u8>) -> Result<(blake3::Hasher, Vec<u8>)> {
    if bytes.len() <= MAX_INLINE_HASH {
        hasher.update(&bytes);
        return Ok((hasher, bytes));
    }
    let hash = tokio::task::spawn_blocking(move || {
        hasher.update(&bytes);
        (hasher, bytes)
    });
    hash.await.map_err(|e| Error::Internal { cause: format!("hashing a part: {e}") })
}

/// Reads segments one after another, each checked against its hash before its last part is given out.
pub struct Content {
    work: Arc<dyn Work>,
    segments: std::vec::IntoIter<Segment>,
    current: Option<(Segment, usize, blake3::Hasher)>,
}

impl Content {
    /// From the first part on.
    pub fn new(work: Arc<dyn Work>, segments: Vec<Segment>) -> Self {
        Self { work, segments: segments.into_iter(), current: None }
    }

    /// The next part, `None` after the last.
    ///
    /// Errors: the store's; `Internal` where a part is missing or damaged.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>> {
        let (segment, index, hasher) = loop {
            match self.current.take().or_else(|| Some((self.segments.next()?, 0, blake3::Hasher::new()))) {
                None => return Ok(None),
                Some((segment, index, _)) if index == segment.part_lens.len() => {}
                Some(current) => break current,
            }
        };
        let bytes = part(&*self.work, &segment, index).await?;
        let (hasher, bytes) = hashed(hasher, bytes).await?;
        if index + 1 == segment.part_lens.len() && hasher.finalize().to_hex().as_str() != segment.blake3 {
            return Err(damaged(&segment, "its hash is another"));
        }
        self.current = Some((segment, index + 1, hasher));
        Ok(Some(bytes))
    }
}

/// The bytes from `start` to `end` of a segment, which is not checked as a whole for it.
///
/// Errors: the store's; `Internal` where a part is missing or of another length, or the segment ends before.
pub async fn range(work: &dyn Work, segment: &Segment, start: u64, end: u64) -> Result<Vec<u8>> {
    let mut found = Vec::with_capacity(end.saturating_sub(start) as usize);
    let mut part_start = 0;
    for (index, len) in segment.part_lens.iter().enumerate() {
        let part_end = part_start + u64::from(*len);
        if part_end > start && part_start < end {
            let bytes = part(work, segment, index).await?;
            let from = start.saturating_sub(part_start) as usize;
            let to = (end.min(part_end) - part_start) as usize;
            // Within the part: its length was checked.
            found.extend_from_slice(&bytes[from..to]);
        }
        part_start = part_end;
    }
    if found.len() as u64 != end.saturating_sub(start) {
        return Err(damaged(segment, "it ends too early"));
    }
    Ok(found)
}

async fn part(work: &dyn Work, segment: &Segment, index: usize) -> Result<Vec<u8>> {
    let bytes = work.part(&segment.name, index as u32).await?;
    let bytes = bytes.ok_or_else(|| damaged(segment, "a part is missing"))?;
    if bytes.len() != segment.part_lens[index] as usize {
        return Err(damaged(segment, "a part has another length"));
    }
    Ok(bytes)
}

fn damaged(segment: &Segment, why: &str) -> Error {
    Error::Internal { cause: format!("content {} cannot be read: {why}", segment.name) }
}
