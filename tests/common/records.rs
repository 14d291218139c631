//! Records for tests of what keeps them.

use std::sync::Arc;

use eremois::store::record::{Facts, InferenceId, Record, Status, StoredInput, StoredOutput, StoredUsage, now};
use serde_json::json;

/// A new record with little in it: succeeded, a row of three values.
pub fn record() -> Record {
    let facts = Facts::new(Status::Succeeded, "m", "1", "embed", "application");
    let output = StoredOutput::Embeddings(Arc::new(vec![vec![1.0, 2.0, 3.0]]));
    Record { id: InferenceId::new(), facts, output: Some(output) }
}

/// A new record with something in every part.
pub fn sample() -> Record {
    let mut one = record();
    one.facts.completed_at = Some(now());
    one.facts.fingerprint = Some("f".into());
    one.facts.user = Some("u".into());
    one.facts.metadata = [("k".to_string(), "v".to_string())].into();
    one.facts.parameters = json!({"dimensions": 2});
    one.facts.input = StoredInput::Full(json!(["text", "ü\n\u{1F600}"]));
    one.facts.usage = StoredUsage { num_tokens: 9, num_chars: 4, num_inputs: 2, num_cached: 1 };
    one.facts.idempotency_key = Some(format!("key of {}", one.id));
    one.output = Some(StoredOutput::Embeddings(Arc::new(vec![vec![0.1, -0.0], vec![f32::MIN_POSITIVE / 2.0]])));
    one
}
