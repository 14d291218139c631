//! One inference as it is kept. Plain values.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Deref;
use std::str::FromStr;
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Identity of an inference: a UUID of version 7, so that ids rise with the time they were made at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct InferenceId(pub uuid::Uuid);

impl InferenceId {
    /// A new one: ids of one process rise strictly, also within a millisecond.
    pub fn new() -> Self {
        Self(uuid::Uuid::now_v7())
    }
}

impl InferenceId {
    /// When it was made, to the millisecond: the `created_at` of its record.
    pub fn created_at(&self) -> Timestamp {
        let (seconds, nanos) = self.0.get_timestamp().map_or((0, 0), |time| time.to_unix());
        let ms = i64::try_from(seconds).unwrap_or(0).saturating_mul(1000) + i64::from(nanos / 1_000_000);
        // 48 bits of milliseconds end in the year 10889, the type's range in 9999.
        Timestamp::from_millisecond(ms).unwrap_or(Timestamp::MAX)
    }

    /// The smallest id that can have been made at `at` or later: ids are ranges of time.
    pub fn first_at(at: Timestamp) -> Self {
        let ms = at.as_millisecond().clamp(0, (1 << 48) - 1) as u128;
        // A time within a millisecond is after all ids made in it before that time, and they are not told apart.
        Self(uuid::Uuid::from_u128(ms << 80 | 0x7 << 76 | 0b10 << 62))
    }
}

impl Default for InferenceId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for InferenceId {
    /// `inf_` and 32 hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "inf_{}", self.0.simple())
    }
}

impl FromStr for InferenceId {
    type Err = Error;

    /// Errors: [`Error::Malformed`] naming the field `id`.
    fn from_str(text: &str) -> Result<Self> {
        let bare = text.strip_prefix("inf_").unwrap_or(text);
        let id = uuid::Uuid::try_parse(bare).map_err(|_| Error::Malformed {
            field: "id".to_string(),
            reason: "expected `inf_` and 32 hexadecimal digits".to_string(),
        })?;
        Ok(Self(id))
    }
}

/// Where an inference stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Accepted, not begun.
    Queued,
    Running,
    Succeeded,
    Failed,
    Cancelled,
}

impl Status {
    /// Whether nothing will change any more.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// The word of the API and of every store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What is kept of an input: `database.store_input`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoredInput {
    /// The `input` as the client sent it.
    Full(serde_json::Value),
    /// BLAKE3 of its canonical JSON, hexadecimal: equal inputs can be told, and nothing be read.
    Hash(String),
    None,
}

/// What was computed.
#[derive(Debug, Clone, PartialEq)]
pub enum StoredOutput {
    /// One row an input, f32, each of its own length. Stored bit by bit. Shared with the answer on its way to the client.
    Embeddings(Arc<Vec<Vec<f32>>>),
    /// The outputs of a tensor model. Values are stored bit by bit.
    Tensors(Arc<StoredTensors>),
    /// Any other task's result.
    Json(serde_json::Value),
}

/// Named tensors, of all inputs of an inference.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredTensors {
    /// In the order of their values in a row.
    pub tensors: Vec<StoredTensor>,
    /// One row an input, f32: the values of all tensors, one after another, each row-major.
    pub rows: Vec<Vec<f32>>,
}

/// What one of the tensors is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredTensor {
    pub name: String,
    /// Of one input.
    pub shape: Vec<usize>,
    /// Whether its values are whole numbers, and written as such.
    pub is_whole: bool,
}

/// Tokens and characters of an inference.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredUsage {
    pub num_tokens: u64,
    pub num_chars: u64,
    pub num_inputs: u64,
    /// Inputs whose result came from the cache.
    pub num_cached: u64,
}

/// Where the time went, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    pub tokenize_us: u64,
    pub queue_us: u64,
    pub inference_us: u64,
    pub total_us: u64,
}

/// Lengths (L2 norms) of the rows of an output as they were answered: 1 each where they were normalised. Summed up, so
/// that many can be added; the sums may lose their last digit on the way through JSON.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Norms {
    /// Rows, at least one.
    pub num: u64,
    pub sum: f64,
    pub sum_squares: f64,
    pub min: f64,
    pub max: f64,
}

impl Norms {
    /// Those of these rows. `None` where there are none, or where a value is no number.
    pub fn of<R: Deref<Target = [f32]>>(rows: &[R]) -> Option<Self> {
        let all = rows.iter().map(|row| Self::of_one(squares(row))).reduce(Self::and)?;
        all.sum_squares.is_finite().then_some(all)
    }

    fn of_one(square: f64) -> Self {
        let norm = square.sqrt();
        Self { num: 1, sum: norm, sum_squares: square, min: norm, max: norm }
    }

    /// Those of both.
    pub fn and(self, other: Self) -> Self {
        Self {
            num: self.num + other.num,
            sum: self.sum + other.sum,
            sum_squares: self.sum_squares + other.sum_squares,
            min: self.min.min(other.min),
            max: self.max.max(other.max),
        }
    }
}

/// The sum of the squares of a row's values, in f64.
fn squares(row: &[f32]) -> f64 {
    // Eight sums side by side: one would wait for itself at every value, and an answer may have millions of them.
    let mut sums = [0f64; 8];
    let (eights, rest) = row.as_chunks::<8>();
    for eight in eights {
        for (sum, value) in sums.iter_mut().zip(eight) {
            *sum += f64::from(*value) * f64::from(*value);
        }
    }
    let rest: f64 = rest.iter().map(|value| f64::from(*value) * f64::from(*value)).sum();
    sums.iter().sum::<f64>() + rest
}

/// Why an inference failed: what the client was, or would have been, answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The kind of the API's errors: "queue_full", "failed", ...
    pub kind: String,
    /// The HTTP status of a synchronous answer.
    pub status: u16,
    pub message: String,
    /// The field of the request at fault.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
}

/// What somebody said of a result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Feedback {
    pub at: Timestamp,
    /// -1 to 1, the better the higher.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
}

/// An inference as it is kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    pub id: InferenceId,
    pub facts: Facts,
    /// `None` until it has succeeded.
    pub output: Option<StoredOutput>,
}

impl Record {
    /// About what it is as bytes: most of it is the output, and of the rest only the input can be large.
    pub fn approximate_bytes(&self) -> usize {
        let output = match &self.output {
            Some(StoredOutput::Embeddings(rows)) => approximate_row_bytes(rows),
            Some(StoredOutput::Tensors(tensors)) => approximate_row_bytes(&tensors.rows),
            Some(StoredOutput::Json(value)) => approximate_json_bytes(value),
            None => 0,
        };
        let input = match &self.facts.input {
            StoredInput::Full(value) => approximate_json_bytes(value),
            StoredInput::Hash(_) | StoredInput::None => 0,
        };
        1000 + output + input
    }
}

fn approximate_row_bytes(rows: &[Vec<f32>]) -> usize {
    rows.iter().map(|row| row.len() * 4 + 4).sum()
}

fn approximate_json_bytes(value: &serde_json::Value) -> usize {
    use serde_json::Value;
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 8,
        Value::String(text) => text.len() + 2,
        Value::Array(items) => items.iter().map(approximate_json_bytes).sum(),
        Value::Object(fields) => fields.iter().map(|(name, value)| name.len() + approximate_json_bytes(value)).sum(),
    }
}

/// All of a record but its output: what is small, and what is written as JSON where a store has no columns for it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    pub status: Status,
    pub model: String,
    pub version: String,
    /// What computed it, to the release and the kind of device: results of equal fingerprints may stand for one another. The
    /// version alone does not say so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// "embed".
    pub task: String,
    /// Millisecond precision: what every store keeps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completed_at: Option<Timestamp>,
    /// The protocol that was asked: "application", "openai", "tei", ...
    pub source: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub parameters: serde_json::Value,
    pub input: StoredInput,
    #[serde(default)]
    pub usage: StoredUsage,
    #[serde(default)]
    pub timings: Timings,
    /// `None` without rows, and of records from before it was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_norms: Option<Norms>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
    /// `Idempotency-Key` of the request; unique over all records.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
    /// BLAKE3 of the request that came with the key, hexadecimal: the same key with another request is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_hash: Option<String>,
    /// Where the result is sent when it is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub callback: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub feedback: Vec<Feedback>,
}

impl Facts {
    /// Of an inference of this model: `task` and `source` as the fields of those names. All that may be missing is.
    pub fn new(status: Status, model: &str, version: &str, task: &str, source: &str) -> Self {
        Self {
            status,
            model: model.to_string(),
            version: version.to_string(),
            fingerprint: None,
            task: task.to_string(),
            completed_at: None,
            source: source.to_string(),
            user: None,
            metadata: BTreeMap::new(),
            parameters: serde_json::Value::Null,
            input: StoredInput::None,
            usage: StoredUsage::default(),
            timings: Timings::default(),
            output_norms: None,
            error: None,
            idempotency_key: None,
            request_hash: None,
            callback: None,
            feedback: Vec::new(),
        }
    }
}

/// The time now as records keep it.
pub fn now() -> Timestamp {
    let now = Timestamp::now();
    // Within the range of the type: cutting towards zero cannot leave it.
    Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_rise_and_carry_their_time() {
        let before = now();
        let ids: Vec<InferenceId> = (0..1000).map(|_| InferenceId::new()).collect();
        assert!(ids.windows(2).all(|pair| pair[0] < pair[1]));
        let created = ids[0].created_at();
        assert!(before <= created && created <= now(), "{before} {created}");
        assert!(InferenceId::first_at(created) <= ids[0]);
        let next = Timestamp::from_millisecond(created.as_millisecond() + 1).unwrap();
        assert!(ids[0] < InferenceId::first_at(next));
    }

    #[test]
    fn norms_are_lengths_of_rows() {
        let rows = [vec![3.0f32, 4.0], vec![0.0; 9], [vec![0.0; 8], vec![2.0]].concat()];
        let norms = Norms { num: 3, sum: 7.0, sum_squares: 29.0, min: 0.0, max: 5.0 };
        assert_eq!(Norms::of(&rows), Some(norms));
        assert_eq!(Norms::of::<Vec<f32>>(&[]), None);
        // The largest values there are still have a length, and what is no number has none.
        let longest = Norms::of(&[vec![f32::MAX; 16]]).unwrap();
        assert_eq!(longest.max, 4.0 * f64::from(f32::MAX));
        for bad in [f32::NAN, f32::INFINITY] {
            assert_eq!(Norms::of(&[vec![1.0], vec![bad, 1.0]]), None);
        }
    }

    #[test]
    fn facts_from_before_norms_were_kept_are_read() {
        let facts = r#"{"status":"succeeded","model":"m","version":"1","task":"embed","source":"tei","input":"none"}"#;
        let facts: Facts = serde_json::from_str(facts).unwrap();
        assert_eq!(facts.output_norms, None);
        assert!(!serde_json::to_string(&facts).unwrap().contains("norms"));
    }

    #[test]
    fn ids_are_read_as_they_are_written() {
        let id = InferenceId::new();
        assert!(id.to_string().starts_with("inf_"));
        assert_eq!(id.to_string().parse::<InferenceId>(), Ok(id));
        assert_eq!(id.0.to_string().parse::<InferenceId>(), Ok(id));
        for bad in ["", "inf_", "inf_12", "inf_zz", "batch_0192"] {
            assert!(
                matches!(bad.parse::<InferenceId>(), Err(Error::Malformed { field, .. }) if field == "id"),
                "{bad}"
            );
        }
    }
}
