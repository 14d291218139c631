//! A record as a document of the collection `inferences`.
//!
//! ```text
//! { _id: UUID (subtype 4, version 7: sorts by time), created_at: date, status, model, version, fingerprint?, task, source,
//!   completed_at: date?, user?, metadata: [{k, v}, ...], parameters: JSON text?, input: {full: JSON text | hash}?,
//!   usage: {...}, timings: {...}, output_norms: {...}?, error: {...}?, idempotency_key?, request_hash?, callback?,
//!   feedback: [{at: date, score?, label?, comment?}, ...],
//!   output: {rows: [vector of float32, ...] | tensors: {tensors: JSON text, rows: [...]} | json: JSON text}?, spilled: {...}? }
//! ```
//!
//! What clients send as JSON (input, parameters, outputs other than rows) stays JSON text: BSON has other numbers, and
//! names that it refuses. Rows are BSON vectors (subtype 9), bit by bit what was computed. Metadata is a list of pairs, so
//! that one index serves every key (the attribute pattern).

use std::sync::Arc;

use jiff::Timestamp;
use mongodb::bson::spec::BinarySubtype;
use mongodb::bson::{self, Binary, DateTime};
use serde::{Deserialize, Serialize};

use super::fault::unreadable;
use crate::Result;
use crate::store::record::{
    Facts, Failure, Feedback, InferenceId, Norms, Record, Status, StoredInput, StoredOutput, StoredTensors,
    StoredUsage, Timings,
};

/// Fields that a document may lack: a write that replaces one takes away those it does not name.
pub(super) const OPTIONAL: [&str; 13] = [
    "fingerprint",
    "completed_at",
    "output_norms",
    "user",
    "parameters",
    "input",
    "error",
    "idempotency_key",
    "request_hash",
    "callback",
    "output",
    "spilled",
    "metadata",
];

/// Type and padding of a BSON vector of float32.
///
/// Source: the specification "BSON Binary Subtype 9 - Vector".
const FLOAT32: [u8; 2] = [0x27, 0x00];

/// A document of `inferences`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Stored {
    #[serde(rename = "_id")]
    pub id: bson::Uuid,
    /// The time in `_id`, for the index that expires records.
    pub created_at: DateTime,
    pub status: Status,
    pub model: String,
    pub version: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    pub task: String,
    pub source: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completed_at: Option<DateTime>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub metadata: Vec<Pair>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<InputDocument>,
    #[serde(default)]
    pub usage: StoredUsage,
    #[serde(default)]
    pub timings: Timings,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_norms: Option<Norms>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_hash: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub callback: Option<String>,
    #[serde(default)]
    pub feedback: Vec<FeedbackDocument>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<OutputDocument>,
    /// Where input and output are that do not fit a document: see [`super::spill`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spilled: Option<Spilled>,
}

/// A key and a value of the metadata.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Pair {
    pub k: String,
    pub v: String,
}

/// What is kept of an input. A document without one says that nothing is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum InputDocument {
    /// JSON text.
    Full(String),
    Hash(String),
}

/// What was computed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum OutputDocument {
    /// BSON vectors of float32.
    Rows(Vec<Binary>),
    /// What each row has one after another, as JSON text, and the rows.
    Tensors { tensors: String, rows: Vec<Binary> },
    /// JSON text.
    Json(String),
}

/// [`Feedback`] with BSON's date.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct FeedbackDocument {
    pub at: DateTime,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
}

/// Which chunks of `outputs` hold the rest of a document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Spilled {
    /// The first 16 bytes of the BLAKE3 of all chunks together, which their `_id`s begin with.
    pub hash: Binary,
    pub num_chunks: i32,
    /// Whether the input is there too, and not only the output.
    pub with_input: bool,
}

impl Stored {
    /// The document of a record, all of it in one piece.
    pub(super) fn new(record: &Record) -> Self {
        let facts = &record.facts;
        let input = match &facts.input {
            StoredInput::Full(value) => Some(InputDocument::Full(value.to_string())),
            StoredInput::Hash(hash) => Some(InputDocument::Hash(hash.clone())),
            StoredInput::None => None,
        };
        Self {
            id: uuid(&record.id),
            created_at: date(record.id.created_at()),
            status: facts.status,
            model: facts.model.clone(),
            version: facts.version.clone(),
            fingerprint: facts.fingerprint.clone(),
            task: facts.task.clone(),
            source: facts.source.clone(),
            completed_at: facts.completed_at.map(date),
            user: facts.user.clone(),
            metadata: facts.metadata.iter().map(|(k, v)| Pair { k: k.clone(), v: v.clone() }).collect(),
            parameters: (!facts.parameters.is_null()).then(|| facts.parameters.to_string()),
            input,
            usage: facts.usage,
            timings: facts.timings,
            output_norms: facts.output_norms,
            error: facts.error.clone(),
            idempotency_key: facts.idempotency_key.clone(),
            request_hash: facts.request_hash.clone(),
            callback: facts.callback.clone(),
            feedback: facts.feedback.iter().map(FeedbackDocument::new).collect(),
            output: record.output.as_ref().map(OutputDocument::new),
            spilled: None,
        }
    }

    pub(super) fn inference_id(&self) -> InferenceId {
        InferenceId(uuid::Uuid::from_bytes(self.id.bytes()))
    }

    /// The record of a document whose spilled parts are back in their places.
    ///
    /// Errors: [`crate::Error::Internal`] naming the record where a part cannot be read.
    pub(super) fn into_record(self) -> Result<Record> {
        let id = self.inference_id();
        let wrong =
            |field: &str, error: &dyn std::fmt::Display| unreadable(&format!("inferences: {id}: {field}"), error);
        let json = |field: &str, text: &str| serde_json::from_str(text).map_err(|e| wrong(field, &e));
        let input = match self.input {
            Some(InputDocument::Full(text)) => StoredInput::Full(json("input", &text)?),
            Some(InputDocument::Hash(hash)) => StoredInput::Hash(hash),
            None => StoredInput::None,
        };
        let row_of = |row: &Binary| values(row).ok_or_else(|| wrong("output", &"not a vector of float32"));
        let read = |rows: &[Binary]| rows.iter().map(row_of).collect::<Result<Vec<Vec<f32>>>>();
        let output = match self.output {
            Some(OutputDocument::Rows(rows)) => Some(StoredOutput::Embeddings(Arc::new(read(&rows)?))),
            Some(OutputDocument::Tensors { tensors, rows }) => {
                let tensors = serde_json::from_str(&tensors).map_err(|e| wrong("output", &e))?;
                Some(StoredOutput::Tensors(Arc::new(StoredTensors { tensors, rows: read(&rows)? })))
            }
            Some(OutputDocument::Json(text)) => Some(StoredOutput::Json(json("output", &text)?)),
            None => None,
        };
        let facts = Facts {
            status: self.status,
            model: self.model,
            version: self.version,
            fingerprint: self.fingerprint,
            task: self.task,
            completed_at: self.completed_at.map(time),
            source: self.source,
            user: self.user,
            metadata: self.metadata.into_iter().map(|pair| (pair.k, pair.v)).collect(),
            parameters: self.parameters.map_or(Ok(serde_json::Value::Null), |text| json("parameters", &text))?,
            input,
            usage: self.usage,
            timings: self.timings,
            output_norms: self.output_norms,
            error: self.error,
            idempotency_key: self.idempotency_key,
            request_hash: self.request_hash,
            callback: self.callback,
            feedback: self.feedback.into_iter().map(FeedbackDocument::into_feedback).collect(),
        };
        Ok(Record { id, facts, output })
    }
}

impl OutputDocument {
    fn new(output: &StoredOutput) -> Self {
        match output {
            StoredOutput::Embeddings(rows) => Self::Rows(rows.iter().map(|row| vector(row)).collect()),
            StoredOutput::Tensors(output) => Self::Tensors {
                tensors: serde_json::json!(output.tensors).to_string(),
                rows: output.rows.iter().map(|row| vector(row)).collect(),
            },
            StoredOutput::Json(value) => Self::Json(value.to_string()),
        }
    }
}

impl FeedbackDocument {
    pub(super) fn new(feedback: &Feedback) -> Self {
        Self {
            at: date(feedback.at),
            score: feedback.score,
            label: feedback.label.clone(),
            comment: feedback.comment.clone(),
        }
    }

    fn into_feedback(self) -> Feedback {
        Feedback { at: time(self.at), score: self.score, label: self.label, comment: self.comment }
    }
}

/// An id as `_id`.
pub(super) fn uuid(id: &InferenceId) -> bson::Uuid {
    bson::Uuid::from_bytes(id.0.into_bytes())
}

/// A time as a date, which has milliseconds.
pub(super) fn date(time: Timestamp) -> DateTime {
    DateTime::from_millis(time.as_millisecond())
}

/// A date as a time. Those outside the years of the type, which nobody writes, are its ends.
pub(super) fn time(date: DateTime) -> Timestamp {
    let ms = date.timestamp_millis();
    let end = if ms < 0 { Timestamp::MIN } else { Timestamp::MAX };
    Timestamp::from_millisecond(ms).unwrap_or(end)
}

fn vector(row: &[f32]) -> Binary {
    let mut bytes = Vec::with_capacity(FLOAT32.len() + size_of_val(row));
    bytes.extend(FLOAT32);
    row.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
    Binary { subtype: BinarySubtype::Vector, bytes }
}

fn values(vector: &Binary) -> Option<Vec<f32>> {
    let values = vector.bytes.strip_prefix(&FLOAT32)?;
    if vector.subtype != BinarySubtype::Vector || !values.len().is_multiple_of(4) {
        return None;
    }
    // Chunks of four bytes are four bytes long.
    Some(values.chunks_exact(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;
    use crate::Error;
    use crate::store::record::StoredTensor;

    fn record() -> Record {
        let at = Timestamp::from_millisecond(1_700_000_000_123).unwrap();
        let facts = Facts {
            status: Status::Succeeded,
            model: "m".into(),
            version: "1".into(),
            fingerprint: Some("f".into()),
            task: "embed".into(),
            completed_at: Some(at),
            source: "application".into(),
            user: Some("u".into()),
            metadata: BTreeMap::from([("$a.b".to_string(), "x".to_string()), ("c".to_string(), String::new())]),
            parameters: json!({"$set": {"a.b": 18_446_744_073_709_551_615_u64}}),
            input: StoredInput::Full(json!(["a\0b", 1.5])),
            usage: StoredUsage { num_tokens: 3, num_chars: 4, num_inputs: 1, num_cached: 0 },
            timings: Timings { tokenize_us: 1, queue_us: 2, inference_us: 3, total_us: 6 },
            output_norms: Some(Norms { num: 2, sum: 2.5, sum_squares: 3.25, min: 1.0, max: 1.5 }),
            error: None,
            idempotency_key: Some("k".into()),
            request_hash: Some("h".into()),
            callback: Some("https://example.org".into()),
            feedback: vec![Feedback { at, score: Some(-0.25), label: None, comment: Some("so".into()) }],
        };
        Record { id: InferenceId::new(), facts, output: None }
    }

    /// Through bytes, as the server has it.
    fn round(record: &Record) -> Record {
        let bytes = bson::serialize_to_vec(&Stored::new(record)).unwrap();
        bson::deserialize_from_slice::<Stored>(&bytes).unwrap().into_record().unwrap()
    }

    #[test]
    fn a_record_comes_back_as_it_was() {
        let mut record = record();
        assert_eq!(round(&record), record);
        record.output = Some(StoredOutput::Json(json!({"$x": [1, 2.5, null]})));
        record.facts.input = StoredInput::Hash("0af".into());
        record.facts.metadata.clear();
        record.facts.parameters = serde_json::Value::Null;
        assert_eq!(round(&record), record);
        let tensors = vec![StoredTensor { name: "$y.z".into(), shape: vec![2], is_whole: false }];
        let rows = vec![vec![0.1, -0.0], vec![f32::MIN_POSITIVE / 2.0, 3e38]];
        record.output = Some(StoredOutput::Tensors(Arc::new(StoredTensors { tensors, rows })));
        record.facts.input = StoredInput::None;
        record.facts.error =
            Some(Failure { kind: "failed".into(), status: 500, message: "m".into(), field: Some("input".into()) });
        assert_eq!(round(&record), record);
    }

    #[test]
    fn rows_come_back_bit_by_bit() {
        let quiet = f32::from_bits(0x7fc0_1234);
        let rows = vec![vec![0.1, -0.0, f32::MIN_POSITIVE / 2.0, quiet], vec![], vec![f32::NEG_INFINITY]];
        let record = Record { output: Some(StoredOutput::Embeddings(Arc::new(rows.clone()))), ..record() };
        let Some(StoredOutput::Embeddings(back)) = round(&record).output else { panic!("no rows") };
        let bits = |rows: &[Vec<f32>]| -> Vec<Vec<u32>> {
            rows.iter().map(|row| row.iter().map(|value| value.to_bits()).collect()).collect()
        };
        assert_eq!(bits(&back), bits(&rows));
    }

    #[test]
    fn what_is_no_vector_is_named_with_its_record() {
        let mut stored = Stored::new(&record());
        stored.output =
            Some(OutputDocument::Rows(vec![Binary { subtype: BinarySubtype::Generic, bytes: vec![0x27, 0] }]));
        let id = stored.inference_id().to_string();
        let error = stored.into_record().unwrap_err();
        assert!(
            matches!(&error, Error::Internal { cause } if cause.contains(&id) && cause.contains("output")),
            "{error}"
        );
    }

    #[test]
    fn optional_fields_are_those_that_are_left_out() {
        let bare = Record {
            id: InferenceId::new(),
            facts: Facts {
                user: None,
                fingerprint: None,
                completed_at: None,
                output_norms: None,
                metadata: BTreeMap::new(),
                parameters: serde_json::Value::Null,
                input: StoredInput::None,
                idempotency_key: None,
                request_hash: None,
                callback: None,
                ..record().facts
            },
            output: None,
        };
        let all = bson::serialize_to_document(&Stored {
            error: Some(Failure { kind: "k".into(), status: 500, message: "m".into(), field: None }),
            output: Some(OutputDocument::Json("1".into())),
            spilled: Some(Spilled {
                hash: Binary { subtype: BinarySubtype::Generic, bytes: vec![] },
                num_chunks: 1,
                with_input: false,
            }),
            ..Stored::new(&record())
        });
        let bare = bson::serialize_to_document(&Stored::new(&bare)).unwrap();
        let mut left_out: Vec<String> =
            all.unwrap().keys().filter(|key| !bare.contains_key(key.as_str())).cloned().collect();
        left_out.sort();
        let mut optional = OPTIONAL.map(str::to_string);
        optional.sort();
        assert_eq!(left_out, optional);
    }
}
