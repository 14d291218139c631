//! Tasks, claims and documents to write.

use std::time::Duration;

use eremois::store::work::{Claim, Document, DocumentKind, Task, TaskKind};
use jiff::Timestamp;
use serde_json::{Value, json};

/// What every claim of these tests holds a task for.
pub const LEASE: Duration = Duration::from_secs(10);

/// This many milliseconds after a time of these tests' own: nothing here asks the clock.
pub fn at(ms: i64) -> Timestamp {
    Timestamp::from_millisecond(1_800_000_000_000 + ms).unwrap()
}

pub fn task(id: &str, due_ms: i64) -> Task {
    Task { id: id.to_string(), kind: TaskKind::Chunk, payload: json!({"of": id}), due_at: at(due_ms), attempts: 0 }
}

/// A claim of anything that is due.
pub fn claim(owner: &str, now_ms: i64, limit: usize) -> Claim {
    Claim {
        owner: owner.to_string(),
        now: at(now_ms),
        due_by: at(now_ms),
        lease: LEASE,
        limit,
        kinds: TaskKind::ALL.to_vec(),
        ids: None,
    }
}

pub fn document(kind: DocumentKind, id: &str) -> Document {
    Document { kind, id: id.to_string(), parent: None, expires_at: None, revision: 1, body: json!({"of": id}) }
}

/// Values that a careless way through a store would change.
pub fn awkward() -> Vec<Value> {
    vec![
        json!(null),
        json!(true),
        json!("text"),
        json!(""),
        json!([]),
        json!({}),
        json!(u64::MAX),
        json!(i64::MIN),
        json!([0.5, -0.25, 1e300, 12345678901234567u64]),
        json!({"$where": {"a.b": null, "": "empty"}, "nul": "a\u{0}b", "ключ": "第三 🦀 ' \" \\ %\n\t"}),
        json!({"deep": [[[[[{"list": [1, null, true, {"x": []}]}]]]]]}),
    ]
}

/// Bytes that no text has, the same at every run.
pub fn noise(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as u8
        })
        .collect()
}

/// Of 128 bytes: the longest an id may have. `last` makes it one of many that differ at their end.
pub fn longest(last: char) -> String {
    let mut id: String = ('!'..='~').cycle().take(127).collect();
    id.push(last);
    id
}
