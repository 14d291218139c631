//! Records to write, for tests and benches.
#![allow(dead_code)] // each takes its own part

use std::collections::BTreeMap;
use std::sync::Arc;

use eremois::store::record::{
    Facts, Failure, Feedback, InferenceId, Norms, Record, Status, StoredInput, StoredOutput, StoredTensor,
    StoredTensors, StoredUsage, Timings,
};
use jiff::Timestamp;
use serde_json::json;

/// A finished inference of one short text, made now.
pub fn record() -> Record {
    with_id(InferenceId::new())
}

/// The same, made at another time.
pub fn record_at(ms: i64, number: u64) -> Record {
    let first = InferenceId::first_at(Timestamp::from_millisecond(ms).unwrap()).0.as_u128();
    with_id(InferenceId(uuid::Uuid::from_u128(first | u128::from(number))))
}

fn with_id(id: InferenceId) -> Record {
    let facts = Facts {
        completed_at: Some(eremois::store::record::now()),
        parameters: json!({"normalize": true}),
        input: StoredInput::Full(json!("a short text")),
        usage: StoredUsage { num_tokens: 5, num_chars: 12, num_inputs: 1, num_cached: 0 },
        timings: Timings { tokenize_us: 40, queue_us: 7, inference_us: 5100, total_us: 5300 },
        ..Facts::new(Status::Succeeded, "all-MiniLM-L6-v2", "1", "embed", "application")
    };
    Record { id, facts, output: Some(embeddings(vec![vec![0.25, -0.5, 1.0]])) }
}

pub fn embeddings(rows: Vec<Vec<f32>>) -> StoredOutput {
    StoredOutput::Embeddings(Arc::new(rows))
}

/// Of a model with two outputs, rows of six values.
pub fn tensors(rows: Vec<Vec<f32>>) -> StoredOutput {
    let tensor =
        |name: &str, shape: &[usize], is_whole| StoredTensor { name: name.into(), shape: shape.into(), is_whole };
    let tensors = vec![tensor("y.$z \"ζ\"", &[1, 5], false), tensor("", &[], true)];
    StoredOutput::Tensors(Arc::new(StoredTensors { tensors, rows }))
}

/// An inference that has not begun.
pub fn queued() -> Record {
    let mut record = Record { output: None, ..record() };
    record.facts.status = Status::Queued;
    record.facts.completed_at = None;
    record
}

/// A record with every field set, and one with every field that may be empty empty.
pub fn full_and_empty() -> [Record; 2] {
    let mut full = record();
    full.facts.fingerprint = Some("0af3".repeat(8));
    full.facts.user = Some("Zoë 张伟 👩‍🚀 \u{0} ' \" \\ %".to_string());
    full.facts.metadata = BTreeMap::from([
        ("plain".to_string(), "value".to_string()),
        ("dots.and$signs".to_string(), "$ne: {}".to_string()),
        ("$where".to_string(), "ключ".to_string()),
        ("empty".to_string(), String::new()),
        ("nul".to_string(), "a\u{0}b".to_string()),
    ]);
    full.facts.parameters = json!({"dimensions": 256, "nested": {"list": [1, null, true, "x"]}, "share": 0.75});
    full.facts.input =
        StoredInput::Full(json!(["first", "zweiter Text mit Umlauten: äöü", "第三 🦀", "", "\u{0}\n\t"]));
    full.facts.output_norms = Some(Norms { num: 2, sum: 2.5, sum_squares: 3.25, min: 1.0, max: 1.5 });
    full.facts.error = Some(Failure {
        kind: "invalid".to_string(),
        status: 422,
        message: "input: too long".to_string(),
        field: Some("input".to_string()),
    });
    full.facts.idempotency_key = Some(format!("key {}", full.id));
    full.facts.request_hash = Some("00ff".repeat(16));
    full.facts.callback = Some("https://example.com/hook?a=b&c=d".to_string());
    full.facts.feedback = vec![said(1, Some(-1.0), Some("wrong"), Some("déjà vu 🙃")), said(2, None, None, None)];
    let mut empty = Record { output: None, ..record() };
    empty.facts.model = String::new();
    empty.facts.version = String::new();
    empty.facts.completed_at = None;
    empty.facts.parameters = serde_json::Value::Null;
    empty.facts.input = StoredInput::None;
    empty.facts.usage = StoredUsage::default();
    empty.facts.timings = Timings::default();
    [full, empty]
}

/// Feedback given at this millisecond of 1970.
pub fn said(ms: i64, score: Option<f64>, label: Option<&str>, comment: Option<&str>) -> Feedback {
    Feedback {
        at: Timestamp::from_millisecond(ms).unwrap(),
        score,
        label: label.map(str::to_string),
        comment: comment.map(str::to_string),
    }
}

/// Values whose bits a careless way through a store would change: each sign of zero, the smallest, the largest,
/// neighbours of one, and numbers that no short decimal names.
pub fn awkward_values(num: usize) -> Vec<f32> {
    let special = [0.0, -0.0, f32::MIN_POSITIVE, f32::from_bits(1), f32::MAX, f32::MIN, 1.0 + f32::EPSILON, 0.1];
    let mut bits = 0x9e37_79b9u32;
    let mut any = || {
        // xorshift: the same values at every run, of every magnitude.
        bits ^= bits << 13;
        bits ^= bits >> 17;
        bits ^= bits << 5;
        f32::from_bits(bits)
    };
    let mut values: Vec<f32> = special.to_vec();
    while values.len() < num {
        values.extend(Some(any()).filter(|value| value.is_finite()));
    }
    values.truncate(num);
    values
}
