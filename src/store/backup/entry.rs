//! A record as an entry of a backup: its canonical bytes. Equal bytes are equal records, to the bit.
//!
//! ```text
//! entry     length of the record, u32 · record without norms and feedback, as in `store/encode.rs`
//!           · whether it has norms, u8: 0, 1 · number of feedback, u32 · feedback
//! feedback  at, i128, ns of Unix time · what there is, u8: 1 score, 2 label, 4 comment · score, f64 · label · comment
//! text      length, u32 · UTF-8
//! ```
//!
//! Numbers are little-endian. Feedback stands outside the facts' JSON because a score read back from text may differ in
//! its last bit. So may the norms of an output, which are not written at all: they are made of its rows again.

use jiff::Timestamp;

use crate::store::encode::{read_record, take, unreadable, write_record, write_u32};
use crate::store::record::{Feedback, Norms, Record, StoredOutput};
use crate::{Error, Result};

const SCORE: u8 = 1;
const LABEL: u8 = 2;
const COMMENT: u8 = 4;

/// The bytes of a record. Errors: those of [`write_record`].
pub fn encode(record: &Record) -> Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    if record.facts.feedback.is_empty() && record.facts.output_norms.is_none() {
        write_record(record, &mut bytes)?;
    } else {
        let mut bare = record.clone();
        bare.facts.feedback.clear();
        bare.facts.output_norms = None;
        write_record(&bare, &mut bytes)?;
    }
    let mut record_len = Vec::with_capacity(4);
    write_u32(bytes.len() - 4, &mut record_len)?;
    bytes[..4].copy_from_slice(&record_len);
    bytes.push(u8::from(record.facts.output_norms.is_some()));
    write_u32(record.facts.feedback.len(), &mut bytes)?;
    for Feedback { at, score, label, comment } in &record.facts.feedback {
        bytes.extend_from_slice(&at.as_nanosecond().to_le_bytes());
        let flag = |is_there: bool, flag: u8| if is_there { flag } else { 0 };
        bytes.push(flag(score.is_some(), SCORE) | flag(label.is_some(), LABEL) | flag(comment.is_some(), COMMENT));
        bytes.extend_from_slice(&score.unwrap_or(0.0).to_le_bytes());
        for text in [label, comment].into_iter().flatten() {
            write_u32(text.len(), &mut bytes)?;
            bytes.extend_from_slice(text.as_bytes());
        }
    }
    Ok(bytes)
}

/// The record of these bytes, all of them. Errors: [`Error::Internal`] for bytes of another form.
pub fn decode(bytes: &[u8]) -> Result<Record> {
    let mut rest = bytes;
    let record_len = read_u32(&mut rest)?;
    let mut record = read_record(take(&mut rest, record_len)?)?;
    match (array(take(&mut rest, 1)?), &record.output) {
        ([0], _) => {}
        ([1], Some(StoredOutput::Embeddings(rows))) => record.facts.output_norms = Norms::of(rows),
        ([has_norms], _) => return Err(unreadable(&format!("it has {has_norms} norms, and no rows for them"))),
    }
    for _ in 0..read_u32(&mut rest)? {
        record.facts.feedback.push(feedback(&mut rest)?);
    }
    match rest.len() {
        0 => Ok(record),
        more => Err(unreadable(&format!("{more} bytes follow the feedback"))),
    }
}

fn feedback(rest: &mut &[u8]) -> Result<Feedback> {
    let at = i128::from_le_bytes(array(take(rest, 16)?));
    let at = Timestamp::from_nanosecond(at).map_err(|e| unreadable(&e.to_string()))?;
    let [there] = array(take(rest, 1)?);
    if there & !(SCORE | LABEL | COMMENT) != 0 {
        return Err(unreadable(&format!("feedback has the unknown parts {there:#x}")));
    }
    let score = f64::from_le_bytes(array(take(rest, 8)?));
    let mut text = |flag: u8| -> Result<Option<String>> {
        if there & flag == 0 {
            return Ok(None);
        }
        let len = read_u32(rest)?;
        let text = std::str::from_utf8(take(rest, len)?).map_err(|e| unreadable(&e.to_string()))?;
        Ok(Some(text.to_string()))
    };
    Ok(Feedback { at, score: (there & SCORE != 0).then_some(score), label: text(LABEL)?, comment: text(COMMENT)? })
}

fn read_u32(rest: &mut &[u8]) -> Result<usize> {
    Ok(u32::from_le_bytes(array(take(rest, 4)?)) as usize)
}

/// Of exactly as many bytes.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("the caller cut as many")
}

/// How a record of a store relates to the one of the same id in a backup or in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    Same,
    /// The store's is a later state: it has ended since, was said something of, or has lost its idempotency key to another.
    Later,
    /// Neither can have come from the other.
    Different,
}

impl Relation {
    /// Errors: those of [`encode`].
    pub fn of(earlier: &Record, now: &Record) -> Result<Self> {
        if encode(earlier)? == encode(now)? {
            return Ok(Self::Same);
        }
        if !earlier.facts.status.is_final() {
            return Ok(Self::Later);
        }
        let keeps = |said: &Feedback| now.facts.feedback.contains(said);
        let keeps_key =
            now.facts.idempotency_key.is_none() || now.facts.idempotency_key == earlier.facts.idempotency_key;
        let is_later = keeps_key && earlier.facts.feedback.iter().all(keeps) && bare(earlier)? == bare(now)?;
        Ok(if is_later { Self::Later } else { Self::Different })
    }
}

/// What never changes of a record that has ended.
fn bare(record: &Record) -> Result<Vec<u8>> {
    let mut bare = record.clone();
    bare.facts.feedback.clear();
    bare.facts.idempotency_key = None;
    encode(&bare)
}

/// An error of [`decode`] or of a section's kind, as what is wrong with the file.
pub(super) fn words(error: Error) -> String {
    match error {
        Error::Internal { cause } => cause,
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::store::record::{Facts, InferenceId, Status, StoredInput, now as time_now};

    fn record() -> Record {
        let facts = Facts {
            fingerprint: Some("f".into()),
            completed_at: Some(time_now()),
            user: Some("u".into()),
            metadata: [("k".to_string(), "v".to_string())].into(),
            parameters: json!({"dimensions": 3}),
            input: StoredInput::Full(json!(["a"])),
            idempotency_key: Some("key".into()),
            request_hash: Some("h".into()),
            ..Facts::new(Status::Succeeded, "m", "1", "embed", "application")
        };
        let rows = vec![vec![1.5f32, -0.0, f32::NAN]];
        Record { id: InferenceId::new(), facts, output: Some(StoredOutput::Embeddings(Arc::new(rows))) }
    }

    fn said(score: Option<f64>, label: Option<&str>, comment: Option<&str>) -> Feedback {
        Feedback { at: time_now(), score, label: label.map(str::to_string), comment: comment.map(str::to_string) }
    }

    #[test]
    fn every_cut_and_every_addition_is_an_error() {
        let mut record = record();
        record.facts.feedback = vec![said(Some(0.5), None, Some("ü")), said(None, Some("bad"), None)];
        let bytes = encode(&record).unwrap();
        assert_eq!(encode(&decode(&bytes).unwrap()).unwrap(), bytes);
        for len in 0..bytes.len() {
            assert!(matches!(decode(&bytes[..len]), Err(Error::Internal { .. })), "{len}");
        }
        assert!(decode(&[&bytes[..], &[0]].concat()).is_err());
    }

    proptest! {
        #[test]
        fn feedback_keeps_its_bits(bits: u64, label: Option<String>, comment: Option<String>, at in 0i64..1 << 40) {
            let mut record = record();
            let at = Timestamp::from_millisecond(at).unwrap();
            let score = Some(f64::from_bits(bits));
            record.facts.feedback = vec![Feedback { at, score, label, comment }];
            let back = decode(&encode(&record).unwrap()).unwrap();
            prop_assert_eq!(back.facts.feedback[0].score.map(f64::to_bits), Some(bits));
            prop_assert_eq!(&back.facts.feedback[0].label, &record.facts.feedback[0].label);
            prop_assert_eq!(&back.facts.feedback[0].comment, &record.facts.feedback[0].comment);
            prop_assert_eq!(back.facts.feedback[0].at, at);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes);
        }
    }

    #[test]
    fn norms_are_those_of_the_rows() {
        let mut record = record();
        record.output = Some(StoredOutput::Embeddings(Arc::new(vec![vec![0.6f32, 0.8], vec![1.0 / 3.0, 2.0]])));
        let StoredOutput::Embeddings(rows) = record.output.as_ref().unwrap() else { panic!("rows") };
        record.facts.output_norms = Norms::of(rows);
        let bytes = encode(&record).unwrap();
        assert_eq!(decode(&bytes).unwrap().facts.output_norms, record.facts.output_norms);
        // As read from text, one bit off: the same record.
        let mut drifted = record.clone();
        let norms = drifted.facts.output_norms.as_mut().unwrap();
        norms.sum = f64::from_bits(norms.sum.to_bits() + 1);
        assert_eq!(encode(&drifted).unwrap(), bytes);
        record.facts.output_norms = None;
        assert_ne!(encode(&record).unwrap(), bytes);
    }

    #[test]
    fn later_states_are_told_from_different_ones() {
        let done = record();
        let relation = |earlier: &Record, now: &Record| Relation::of(earlier, now).unwrap();
        assert_eq!(relation(&done, &done), Relation::Same, "NaN and all");
        let mut judged = done.clone();
        judged.facts.feedback = vec![said(Some(1.0), None, None)];
        assert_eq!(relation(&done, &judged), Relation::Later);
        assert_eq!(relation(&judged, &done), Relation::Different, "what was said is gone");
        let mut keyless = done.clone();
        keyless.facts.idempotency_key = None;
        assert_eq!(relation(&done, &keyless), Relation::Later);
        let mut queued = done.clone();
        queued.facts.status = Status::Queued;
        assert_eq!(relation(&queued, &done), Relation::Later);
        assert_eq!(relation(&done, &queued), Relation::Different);
        let mut other = done.clone();
        other.output = Some(StoredOutput::Embeddings(Arc::new(vec![vec![1.5, 0.0, f32::NAN]])));
        assert_eq!(relation(&done, &other), Relation::Different, "one sign");
    }
}
