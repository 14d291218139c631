//! Files and batches as OpenAI writes them, and the parameters of their lists.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::jobs::batch::Named;
use crate::jobs::batch::state::Status;
use crate::jobs::files::{File, Order, Page};
use crate::{Error, Result};

/// A file.
#[derive(Debug, Serialize, ToSchema)]
pub struct FileObject {
    #[schema(example = "file-019a7b2c3d4e7f80912a3b4c5d6e7f80")]
    id: String,
    #[schema(example = "file")]
    object: &'static str,
    bytes: u64,
    /// Unix seconds.
    created_at: i64,
    /// Unix seconds; null where it is kept for good.
    #[schema(required)]
    expires_at: Option<i64>,
    filename: String,
    /// "batch" or "batch_output".
    purpose: &'static str,
    /// Always "processed": a file is whole when it is there.
    #[schema(example = "processed")]
    status: &'static str,
}

impl From<&File> for FileObject {
    fn from(file: &File) -> Self {
        let meta = &file.meta;
        Self {
            id: file.id.clone(),
            object: "file",
            bytes: meta.num_bytes,
            created_at: meta.created_at.as_second(),
            expires_at: meta.expires_at.map(Timestamp::as_second),
            filename: meta.filename.clone(),
            purpose: meta.purpose.as_str(),
            status: "processed",
        }
    }
}

/// What became of a file that was to be deleted.
#[derive(Debug, Serialize, ToSchema)]
pub struct DeletedFile {
    pub id: String,
    #[schema(example = "file")]
    pub object: &'static str,
    pub deleted: bool,
}

/// A batch.
#[derive(Debug, Serialize, PartialEq, ToSchema)]
pub struct BatchObject {
    #[schema(example = "batch_019a7b2c3d4e7f80912a3b4c5d6e7f80")]
    id: String,
    #[schema(example = "batch")]
    object: &'static str,
    #[schema(example = "/v1/embeddings")]
    endpoint: String,
    /// The model that answers.
    #[schema(required)]
    model: Option<String>,
    /// What is wrong with the input, where the batch has failed.
    #[schema(required)]
    errors: Option<BatchErrors>,
    input_file_id: String,
    #[schema(example = "24h")]
    completion_window: String,
    /// "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling" or "cancelled".
    #[schema(example = "in_progress")]
    status: &'static str,
    /// The answers; null where there are none, and until the batch has ended.
    #[schema(required)]
    output_file_id: Option<String>,
    /// Requests that were answered with an error, or not at all.
    #[schema(required)]
    error_file_id: Option<String>,
    /// Unix seconds, as all times here.
    created_at: i64,
    #[schema(required)]
    in_progress_at: Option<i64>,
    expires_at: i64,
    #[schema(required)]
    finalizing_at: Option<i64>,
    #[schema(required)]
    completed_at: Option<i64>,
    #[schema(required)]
    failed_at: Option<i64>,
    #[schema(required)]
    expired_at: Option<i64>,
    #[schema(required)]
    cancelling_at: Option<i64>,
    #[schema(required)]
    cancelled_at: Option<i64>,
    request_counts: RequestCounts,
    usage: BatchUsage,
    metadata: BTreeMap<String, String>,
}

#[derive(Debug, Serialize, PartialEq, ToSchema)]
struct BatchErrors {
    #[schema(example = "list")]
    object: &'static str,
    data: Vec<BatchError>,
}

#[derive(Debug, Serialize, PartialEq, ToSchema)]
struct BatchError {
    #[schema(example = "invalid_json_line")]
    code: String,
    /// Counted from 1; null for the file as a whole.
    #[schema(required)]
    line: Option<u64>,
    message: String,
    #[schema(required)]
    param: Option<String>,
}

/// Requests answered by now. What is in neither is not answered, or never was.
#[derive(Debug, Serialize, PartialEq, Eq, ToSchema)]
struct RequestCounts {
    total: u64,
    completed: u64,
    failed: u64,
}

/// Tokens of the requests answered by now.
#[derive(Debug, Serialize, PartialEq, Eq, ToSchema)]
struct BatchUsage {
    input_tokens: u64,
    input_tokens_details: InputTokens,
    output_tokens: u64,
    output_tokens_details: OutputTokens,
    total_tokens: u64,
}

#[derive(Debug, Serialize, PartialEq, Eq, ToSchema)]
struct InputTokens {
    cached_tokens: u64,
}

#[derive(Debug, Serialize, PartialEq, Eq, ToSchema)]
struct OutputTokens {
    reasoning_tokens: u64,
}

impl From<&Named> for BatchObject {
    fn from(named: &Named) -> Self {
        let Named { id, batch } = named;
        let at = |status| batch.since.get(&status).map(|at| at.as_second());
        let errors = batch.errors.iter().map(|fault| BatchError {
            code: fault.code.clone(),
            line: fault.line,
            message: fault.message.clone(),
            param: fault.param.clone(),
        });
        let errors: Vec<BatchError> = errors.collect();
        Self {
            id: id.clone(),
            object: "batch",
            endpoint: batch.endpoint.clone(),
            model: batch.model.clone(),
            errors: (!errors.is_empty()).then_some(BatchErrors { object: "list", data: errors }),
            input_file_id: batch.input_file_id.clone(),
            completion_window: batch.completion_window.clone(),
            status: batch.status.as_str(),
            output_file_id: batch.output_file_id.clone(),
            error_file_id: batch.error_file_id.clone(),
            created_at: batch.created_at.as_second(),
            in_progress_at: at(Status::InProgress),
            expires_at: batch.expires_at.as_second(),
            finalizing_at: at(Status::Finalizing),
            completed_at: at(Status::Completed),
            failed_at: at(Status::Failed),
            expired_at: at(Status::Expired),
            cancelling_at: at(Status::Cancelling),
            cancelled_at: at(Status::Cancelled),
            request_counts: RequestCounts {
                total: batch.counts.total,
                completed: batch.counts.completed,
                failed: batch.counts.failed,
            },
            usage: BatchUsage {
                input_tokens: batch.num_tokens,
                input_tokens_details: InputTokens { cached_tokens: 0 },
                output_tokens: 0,
                output_tokens_details: OutputTokens { reasoning_tokens: 0 },
                total_tokens: batch.num_tokens,
            },
            metadata: batch.metadata.clone(),
        }
    }
}

/// When something is removed, counted from when it is made.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExpiresAfter {
    /// "created_at".
    pub anchor: String,
    #[schema(minimum = 3600, maximum = 2_592_000)]
    pub seconds: u64,
}

/// OpenAI's bounds: an hour and 30 days.
const EXPIRES_AFTER_SECONDS: std::ops::RangeInclusive<u64> = 3600..=2_592_000;

impl ExpiresAfter {
    /// Seconds. Errors: `Invalid` naming the part of `field`.
    pub fn checked(&self, field: &str) -> Result<u64> {
        let invalid = |part: &str, reason: String| Err(Error::Invalid { field: format!("{field}.{part}"), reason });
        if self.anchor != "created_at" {
            return invalid("anchor", "expected `created_at`".to_string());
        }
        if !EXPIRES_AFTER_SECONDS.contains(&self.seconds) {
            let (least, most) = (EXPIRES_AFTER_SECONDS.start(), EXPIRES_AFTER_SECONDS.end());
            return invalid("seconds", format!("expected {least} to {most}, got {}", self.seconds));
        }
        Ok(self.seconds)
    }
}

/// A page of files.
#[derive(Debug, Serialize, ToSchema)]
pub struct FileList {
    #[schema(example = "list")]
    object: &'static str,
    data: Vec<FileObject>,
    #[schema(required)]
    first_id: Option<String>,
    #[schema(required)]
    last_id: Option<String>,
    has_more: bool,
}

impl From<&Page<File>> for FileList {
    fn from(page: &Page<File>) -> Self {
        Self {
            object: "list",
            data: page.items.iter().map(FileObject::from).collect(),
            first_id: page.items.first().map(|file| file.id.clone()),
            last_id: page.items.last().map(|file| file.id.clone()),
            has_more: page.has_more,
        }
    }
}

/// A page of batches, newest first.
#[derive(Debug, Serialize, ToSchema)]
pub struct BatchList {
    #[schema(example = "list")]
    object: &'static str,
    data: Vec<BatchObject>,
    #[schema(required)]
    first_id: Option<String>,
    #[schema(required)]
    last_id: Option<String>,
    has_more: bool,
}

impl From<&Page<Named>> for BatchList {
    fn from(page: &Page<Named>) -> Self {
        Self {
            object: "list",
            data: page.items.iter().map(BatchObject::from).collect(),
            first_id: page.items.first().map(|named| named.id.clone()),
            last_id: page.items.last().map(|named| named.id.clone()),
            has_more: page.has_more,
        }
    }
}

/// The parameters of a list, as they were sent.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ListQuery {
    pub after: Option<String>,
    pub limit: Option<usize>,
    pub order: Option<Order>,
    pub purpose: Option<String>,
}

/// Longest `after`: a place in the order of ids, which are shorter.
const MAX_AFTER_LEN: usize = 64;

impl ListQuery {
    /// Reads what stands behind the `?`. Names that there are not are ignored, as OpenAI does: its clients may learn new
    /// ones. Errors: `Invalid` naming the parameter.
    pub fn parse(text: &str, max_limit: usize) -> Result<Self> {
        let invalid = |field: &str, reason: String| Err(Error::Invalid { field: field.to_string(), reason });
        let mut query = Self::default();
        for (name, value) in url::form_urlencoded::parse(text.as_bytes()) {
            match &*name {
                "after" if value.len() > MAX_AFTER_LEN || !value.bytes().all(|byte| byte.is_ascii_graphic()) => {
                    return invalid("after", "expected the id of something listed before".to_string());
                }
                "after" => query.after = Some(value.into_owned()).filter(|after| !after.is_empty()),
                "limit" => match value.parse() {
                    Ok(limit) if (1..=max_limit).contains(&limit) => query.limit = Some(limit),
                    _ => return invalid("limit", format!("expected 1 to {max_limit}")),
                },
                "order" => match &*value {
                    "asc" => query.order = Some(Order::OldestFirst),
                    "desc" => query.order = Some(Order::NewestFirst),
                    _ => return invalid("order", "expected `asc` or `desc`".to_string()),
                },
                "purpose" => query.purpose = Some(value.into_owned()),
                _ => {}
            }
        }
        Ok(query)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_read_and_faults_named() {
        let query = ListQuery::parse("after=file-1&limit=7&order=asc&purpose=batch&new=1", 10).unwrap();
        let after = Some("file-1".to_string());
        let order = Some(Order::OldestFirst);
        assert_eq!(query, ListQuery { after, limit: Some(7), order, purpose: Some("batch".to_string()) });
        assert_eq!(ListQuery::parse("", 10).unwrap(), ListQuery::default());
        for (text, field) in
            [("limit=0", "limit"), ("limit=11", "limit"), ("order=up", "order"), ("after=%00", "after")]
        {
            match ListQuery::parse(text, 10) {
                Err(Error::Invalid { field: got, .. }) => assert_eq!(got, field, "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }
}
