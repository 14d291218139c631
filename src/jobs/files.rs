//! Files that clients upload, and those that batches write for them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use ::metrics::{Unit, counter, describe_counter};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::parts::{Content, Owner, PartWriter, Segment};
use super::{JobSettings, after, ids};
use crate::store::record;
use crate::store::work::{Document, DocumentKind, DocumentQuery, MAX_DOCUMENTS, Work};
use crate::{Error, Result};

/// How long an upload may take, and its draft with it: a day is far beyond what a client waits.
const UPLOAD_TIME: Duration = Duration::from_secs(24 * 3600);

/// How often a document that others change meanwhile is read again.
const MAX_TRIES: u32 = 50;

/// Registers help and unit of this file's metrics.
pub fn describe_metrics() {
    describe_counter!(
        "eremois_jobs_file_bytes_total",
        Unit::Bytes,
        "Bytes of files uploaded, read or written by batches"
    );
}

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// The input of batches.
    Batch,
    /// What a batch answered, or its errors.
    BatchOutput,
}

impl Purpose {
    /// The word of the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Batch => "batch",
            Self::BatchOutput => "batch_output",
        }
    }

    /// The way back from [`Purpose::as_str`].
    pub fn of(word: &str) -> Option<Self> {
        [Self::Batch, Self::BatchOutput].into_iter().find(|purpose| purpose.as_str() == word)
    }
}

/// What is known of a file: the body of its document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    pub num_bytes: u64,
    pub created_at: Timestamp,
    /// `None`: kept for good.
    pub expires_at: Option<Timestamp>,
    pub filename: String,
    pub purpose: Purpose,
    /// The content, in order.
    pub segments: Vec<Segment>,
    /// A batch reads it until then, also when it is deleted or expired meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub needed_until: Option<Timestamp>,
    #[serde(default)]
    pub is_deleted: bool,
}

impl Meta {
    /// Whether clients see it.
    fn is_visible(&self, now: Timestamp) -> bool {
        !self.is_deleted && self.expires_at.is_none_or(|at| at > now)
    }

    /// When the sweep may remove it.
    fn gone_at(&self, now: Timestamp) -> Option<Timestamp> {
        let own = if self.is_deleted { Some(now) } else { self.expires_at };
        own.map(|own| self.needed_until.map_or(own, |needed| needed.max(own)))
    }
}

/// A file that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    pub id: String,
    pub meta: Meta,
}

/// A page of a list, and whether there are more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    pub items: Vec<T>,
    pub has_more: bool,
}

/// Which files are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileQuery {
    pub purpose: Option<Purpose>,
    /// The last of the page before.
    pub after: Option<String>,
    pub limit: usize,
    pub order: Order,
}

/// The order of a list, by the time things were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    OldestFirst,
    NewestFirst,
}

/// The files of a store.
#[derive(Clone)]
pub struct Files {
    work: Arc<dyn Work>,
    settings: Arc<JobSettings>,
}

impl Files {
    pub fn new(work: Arc<dyn Work>, settings: Arc<JobSettings>) -> Self {
        Self { work, settings }
    }

    /// Begins a file, which is there when [`Upload::finish`] has written it.
    pub fn upload(&self) -> Upload {
        let id = ids::new(ids::FILE);
        let owner = Owner { kind: DocumentKind::File, id: id.clone() };
        let writer = PartWriter::new(self.work.clone(), owner, after(UPLOAD_TIME));
        Upload { files: self.clone(), id, writer }
    }

    /// A file that clients see. Errors: `NotFound`, and the store's.
    pub async fn get(&self, id: &str) -> Result<File> {
        let found = self.found(id).await?.filter(|(_, file)| file.meta.is_visible(record::now()));
        found.map(|(_, file)| file).ok_or_else(|| not_found(id))
    }

    /// A file as long as its content is there, whether clients see it or not. Errors: the store's.
    pub async fn get_needed(&self, id: &str) -> Result<Option<File>> {
        Ok(self.found(id).await?.map(|(_, file)| file))
    }

    /// A file of this purpose, whose content stays until this time. Errors: `NotFound`, `Invalid`, and the store's.
    pub async fn need(&self, id: &str, purpose: Purpose, until: Timestamp) -> Result<File> {
        for _ in 0..MAX_TRIES {
            let found = self.found(id).await?.filter(|(_, file)| file.meta.is_visible(record::now()));
            let Some((mut document, mut file)) = found else { return Err(not_found(id)) };
            if file.meta.purpose != purpose {
                let (got, wanted) = (file.meta.purpose.as_str(), purpose.as_str());
                let reason = format!("file `{id}` has the purpose `{got}`, expected `{wanted}`");
                return Err(Error::Invalid { field: "input_file_id".to_string(), reason });
            }
            if file.meta.needed_until.is_some_and(|at| at >= until) {
                return Ok(file);
            }
            file.meta.needed_until = Some(until);
            document.expires_at = file.meta.gone_at(record::now());
            document.body = json!(file.meta);
            if self.work.replace(&document).await? {
                return Ok(file);
            }
        }
        Err(busy(id))
    }

    /// A page of the files that clients see. Errors: the store's.
    pub async fn list(&self, query: &FileQuery) -> Result<Page<File>> {
        let now = record::now();
        let mut kept: VecDeque<File> = VecDeque::new();
        let newest_first = query.order == Order::NewestFirst;
        let mut after = query.after.clone().filter(|_| newest_first);
        'pages: loop {
            let limit = if newest_first { (query.limit + 1).min(MAX_DOCUMENTS) } else { MAX_DOCUMENTS };
            let page = DocumentQuery { kind: DocumentKind::File, parent: None, after, limit };
            let documents = self.work.documents(&page).await?;
            after = documents.last().map(|document| document.id.clone());
            for file in documents.iter().filter_map(file_of) {
                // From the newest down to where the page before has ended.
                if !newest_first && query.after.as_ref().is_some_and(|after| file.id <= *after) {
                    break 'pages;
                }
                let is_wanted = query.purpose.is_none_or(|purpose| purpose == file.meta.purpose);
                if !is_wanted || !file.meta.is_visible(now) {
                    continue;
                }
                if newest_first {
                    kept.push_back(file);
                    if kept.len() > query.limit {
                        break 'pages;
                    }
                } else {
                    // The store lists the newest first, so the oldest of all are known only at the end.
                    kept.push_front(file);
                    kept.truncate(query.limit + 1);
                }
            }
            if documents.len() < limit {
                break;
            }
        }
        let has_more = kept.len() > query.limit;
        kept.truncate(query.limit);
        Ok(Page { items: kept.into(), has_more })
    }

    /// Removes a file for clients, and its content unless a batch still needs it: then it goes when that time is over.
    ///
    /// Errors: `NotFound`, and the store's.
    pub async fn delete(&self, id: &str) -> Result<()> {
        for _ in 0..MAX_TRIES {
            let now = record::now();
            let found = self.found(id).await?.filter(|(_, file)| file.meta.is_visible(now));
            let Some((mut document, mut file)) = found else { return Err(not_found(id)) };
            file.meta.is_deleted = true;
            document.expires_at = file.meta.gone_at(now);
            document.body = json!(file.meta);
            if self.work.replace(&document).await? {
                document.revision += 1;
                if document.expires_at.is_some_and(|at| at <= now) {
                    self.purge(document).await?;
                }
                return Ok(());
            }
        }
        Err(busy(id))
    }

    /// Removes a file and its content, unless somebody has changed it since it was read.
    ///
    /// Errors: the store's; it can be repeated.
    pub async fn purge(&self, mut document: Document) -> Result<()> {
        let Some(mut file) = file_of(&document) else {
            self.work.remove(DocumentKind::File, &document.id).await?;
            return Ok(());
        };
        if !file.meta.is_deleted {
            // First of all, so that no batch begins to need what is going.
            file.meta.is_deleted = true;
            document.body = json!(file.meta);
            if !self.work.replace(&document).await? {
                return Ok(());
            }
        }
        for segment in &file.meta.segments {
            self.work.remove_parts(&segment.name).await?;
        }
        self.work.remove(DocumentKind::File, &file.id).await?;
        Ok(())
    }

    /// Writes the document of a file whose parts are there. Returns whether it is new.
    ///
    /// Errors: the store's.
    pub async fn create(&self, file: &File) -> Result<bool> {
        let document = Document {
            kind: DocumentKind::File,
            id: file.id.clone(),
            parent: None,
            expires_at: file.meta.gone_at(record::now()),
            revision: 0,
            body: json!(file.meta),
        };
        self.work.create(&document).await
    }

    /// The content of a file.
    pub fn content(&self, file: &File) -> Content {
        counter!("eremois_jobs_file_bytes_total", "direction" => "read").increment(file.meta.num_bytes);
        Content::new(self.work.clone(), file.meta.segments.clone())
    }

    /// When a file made at this time expires, unless its maker says otherwise.
    pub fn expiry(&self, created_at: Timestamp, asked: Option<Duration>) -> Option<Timestamp> {
        let life = asked.or_else(|| Some(self.settings.retention).filter(|life| !life.is_zero()))?;
        let life = jiff::SignedDuration::try_from(life).unwrap_or(jiff::SignedDuration::MAX);
        Some(created_at.checked_add(life).unwrap_or(Timestamp::MAX))
    }

    async fn found(&self, id: &str) -> Result<Option<(Document, File)>> {
        // What is no id of ours is not asked for.
        if ids::created_at(ids::FILE, id).is_none() {
            return Ok(None);
        }
        let document = self.work.document(DocumentKind::File, id).await?;
        Ok(document.and_then(|document| file_of(&document).map(|file| (document, file))))
    }
}

/// A file whose content is coming in. Dropped, it leaves nothing behind.
pub struct Upload {
    files: Files,
    id: String,
    writer: PartWriter,
}

impl Upload {
    /// Takes more of the content. Errors: `TooLarge` naming `file`, and the store's.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let limit = self.files.settings.max_file_bytes;
        let got = self.writer.len() as usize + bytes.len();
        if got > limit {
            return Err(Error::TooLarge { field: "file".to_string(), got, limit, unit: "bytes" });
        }
        self.writer.write(bytes).await
    }

    /// Writes the file down: when this returns without an error it is durable.
    ///
    /// `expires_after` is from now on. Errors: `Empty` naming `file`, and the store's.
    pub async fn finish(self, filename: String, purpose: Purpose, expires_after: Option<Duration>) -> Result<File> {
        let Some(sealed) = self.writer.seal().await? else {
            return Err(Error::Empty { field: "file".to_string() });
        };
        let created_at = record::now();
        let meta = Meta {
            num_bytes: sealed.segment.len(),
            created_at,
            expires_at: self.files.expiry(created_at, expires_after),
            filename,
            purpose,
            segments: vec![sealed.segment.clone()],
            needed_until: None,
            is_deleted: false,
        };
        let file = File { id: self.id, meta };
        // An error says nothing: it may be written, and the sweep will see.
        self.files.create(&file).await?;
        sealed.adopted().await;
        counter!("eremois_jobs_file_bytes_total", "direction" => "uploaded").increment(file.meta.num_bytes);
        Ok(file)
    }
}

/// `None` for a body of another form: a newer version's.
fn file_of(document: &Document) -> Option<File> {
    let meta = serde_json::from_value(document.body.clone()).ok()?;
    Some(File { id: document.id.clone(), meta })
}

fn not_found(id: &str) -> Error {
    Error::NotFound { what: "file", id: id.to_string() }
}

fn busy(id: &str) -> Error {
    Error::Conflict { field: "id".to_string(), reason: format!("file `{id}` is being changed by others") }
}
