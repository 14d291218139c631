//! A batch as it is kept, and how it goes from state to state. Plain values.
//!
//! ```text
//! validating ──▶ in_progress ──▶ finalizing ──▶ completed, expired
//!     │  │            │
//!     │  └────────────┴──▶ cancelling ──▶ cancelled
//!     └──▶ failed
//! ```

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD_NO_PAD;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::jobs::parts::Segment;

/// Where a batch stands; the words of OpenAI's API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Its input is being read.
    Validating,
    /// Its input is at fault.
    Failed,
    InProgress,
    /// All requests are answered, the files are being written.
    Finalizing,
    Completed,
    /// Its window was over before all requests were answered.
    Expired,
    Cancelling,
    Cancelled,
}

impl Status {
    /// Every one there is.
    pub const ALL: &'static [Self] = &[
        Self::Validating,
        Self::Failed,
        Self::InProgress,
        Self::Finalizing,
        Self::Completed,
        Self::Expired,
        Self::Cancelling,
        Self::Cancelled,
    ];

    /// Whether nothing will change any more.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Failed | Self::Completed | Self::Expired | Self::Cancelled)
    }

    /// The word of the API, of logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Validating => "validating",
            Self::Failed => "failed",
            Self::InProgress => "in_progress",
            Self::Finalizing => "finalizing",
            Self::Completed => "completed",
            Self::Expired => "expired",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What is wrong with a batch's input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputFault {
    pub code: String,
    /// Counted from 1; `None`: the file as a whole.
    pub line: Option<u64>,
    pub message: String,
    /// The field of the line.
    pub param: Option<String>,
}

/// Requests of a batch, as far as they were answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    pub total: u64,
    /// Answered with a status of success.
    pub completed: u64,
    /// Answered with another one.
    pub failed: u64,
}

/// Where the ranges of the chunks are written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub segment: Segment,
    pub num_chunks: u32,
}

/// What came of a chunk: the body of its document.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkResults {
    /// Lines of the output file.
    pub output: Option<Segment>,
    /// Lines of the error file.
    pub errors: Option<Segment>,
    pub num_completed: u64,
    pub num_failed: u64,
    /// Requests whose time was over.
    pub num_expired: u64,
    pub num_cancelled: u64,
    pub num_tokens: u64,
    /// The model that answered.
    pub model: Option<String>,
}

/// A batch: the body of its document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    pub endpoint: String,
    pub input_file_id: String,
    /// As the client wrote it.
    pub completion_window: String,
    pub metadata: BTreeMap<String, String>,
    pub created_at: Timestamp,
    /// The end of the window.
    pub expires_at: Timestamp,
    /// How long the output files are kept, in seconds, where the client said so.
    pub output_expires_after: Option<u64>,
    pub status: Status,
    /// When it came to each state but the first.
    pub since: BTreeMap<Status, Timestamp>,
    pub errors: Vec<InputFault>,
    pub counts: Counts,
    pub num_tokens: u64,
    pub model: Option<String>,
    pub output_file_id: Option<String>,
    pub error_file_id: Option<String>,
    pub plan: Option<Plan>,
    /// Which chunks are counted in `counts`.
    pub done: Bits,
    /// Whether a chunk had requests whose time was over.
    pub has_expired: bool,
    /// When the last chunk was done.
    pub done_at: Option<Timestamp>,
}

impl Batch {
    pub fn enter(&mut self, status: Status, now: Timestamp) {
        self.status = status;
        self.since.insert(status, now);
    }

    pub fn num_chunks(&self) -> u32 {
        self.plan.as_ref().map_or(0, |plan| plan.num_chunks)
    }

    /// Whether what came of every chunk is written, so that only the files are to be made.
    pub fn is_done(&self) -> bool {
        self.plan.is_some() && self.done_at.is_some()
    }

    /// Counts what came of a chunk, once. Returns whether it was not counted before.
    pub fn count(&mut self, index: u32, results: &ChunkResults, now: Timestamp) -> bool {
        if self.status.is_final() || index >= self.num_chunks() || !self.done.set(index) {
            return false;
        }
        self.counts.completed += results.num_completed;
        self.counts.failed += results.num_failed;
        self.num_tokens += results.num_tokens;
        self.has_expired |= results.num_expired > 0;
        if self.model.is_none() {
            self.model = results.model.clone();
        }
        if self.done.count() == self.num_chunks() {
            self.done_at = Some(now);
            if self.status == Status::InProgress {
                self.enter(Status::Finalizing, now);
            }
        }
        true
    }

    /// The state that a batch whose chunks are all done ends in.
    pub fn end(&self) -> Status {
        match self.status {
            Status::Cancelling => Status::Cancelled,
            _ if self.has_expired => Status::Expired,
            _ => Status::Completed,
        }
    }
}

/// A set of small numbers, written as base64.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bits(Vec<u8>);

impl Bits {
    /// Adds a number. Returns whether it is new.
    pub fn set(&mut self, index: u32) -> bool {
        let (byte, bit) = (index as usize / 8, 1 << (index % 8));
        if self.0.len() <= byte {
            self.0.resize(byte + 1, 0);
        }
        let is_new = self.0[byte] & bit == 0;
        self.0[byte] |= bit;
        is_new
    }

    pub fn contains(&self, index: u32) -> bool {
        self.0.get(index as usize / 8).is_some_and(|byte| byte & (1 << (index % 8)) != 0)
    }

    pub fn count(&self) -> u32 {
        self.0.iter().map(|byte| byte.count_ones()).sum()
    }
}

impl Serialize for Bits {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64_STANDARD_NO_PAD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bits {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64_STANDARD_NO_PAD.decode(text).map(Self).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::record::now;

    fn batch(num_chunks: u32) -> Batch {
        let segment = Segment { name: "n".into(), part_lens: vec![1], blake3: String::new() };
        Batch {
            endpoint: "/v1/embeddings".into(),
            input_file_id: "file-1".into(),
            completion_window: "24h".into(),
            metadata: BTreeMap::new(),
            created_at: now(),
            expires_at: now(),
            output_expires_after: None,
            status: Status::InProgress,
            since: BTreeMap::new(),
            errors: Vec::new(),
            counts: Counts { total: 20, ..Counts::default() },
            num_tokens: 0,
            model: None,
            output_file_id: None,
            error_file_id: None,
            plan: Some(Plan { segment, num_chunks }),
            done: Bits::default(),
            has_expired: false,
            done_at: None,
        }
    }

    fn results(completed: u64, failed: u64, expired: u64) -> ChunkResults {
        let (num_completed, num_failed, num_expired) = (completed, failed, expired);
        ChunkResults { num_completed, num_failed, num_expired, num_tokens: 5, ..ChunkResults::default() }
    }

    #[test]
    fn a_chunk_counts_once_and_the_last_one_ends_the_work() {
        let mut batch = batch(10);
        for index in (0..10).rev() {
            assert!(!batch.is_done());
            assert!(batch.count(index, &results(1, 1, 0), now()));
            assert!(!batch.count(index, &results(1, 1, 0), now()));
        }
        assert!(batch.is_done() && !batch.count(10, &results(1, 1, 0), now()));
        assert_eq!(batch.counts, Counts { total: 20, completed: 10, failed: 10 });
        assert_eq!((batch.num_tokens, batch.status, batch.end()), (50, Status::Finalizing, Status::Completed));
        let back: Batch = serde_json::from_value(serde_json::json!(batch)).unwrap();
        assert_eq!(back, batch);
    }

    #[test]
    fn what_was_cancelled_or_too_late_ends_so() {
        let mut late = batch(2);
        late.count(0, &results(1, 0, 0), now());
        late.count(1, &results(0, 0, 9), now());
        assert_eq!((late.status, late.end()), (Status::Finalizing, Status::Expired));
        let mut cancelled = batch(1);
        cancelled.enter(Status::Cancelling, now());
        cancelled.count(0, &results(0, 0, 1), now());
        assert_eq!(
            (cancelled.status, cancelled.end(), cancelled.is_done()),
            (Status::Cancelling, Status::Cancelled, true)
        );
        let mut failed = batch(1);
        failed.enter(Status::Failed, now());
        assert!(!failed.count(0, &results(1, 0, 0), now()));
    }
}
