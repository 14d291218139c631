//! A record as bytes, one form for every file of ours: the journal, the embedded store, backups.
//!
//! ```text
//! record  id, 16 bytes · length of the facts, u32 · facts, JSON · output
//! output  tag, u8: 0 none · 1 embeddings: rows · 2 JSON · 3 tensors: length of their names and shapes, u32 · these, JSON · rows
//! rows    their number, u32 · values of each, u32 · all values, f32
//! ```
//!
//! Numbers are little-endian. Values of rows are written bit by bit: what is read is what was computed, NaNs and
//! negative zeros included.

use std::sync::Arc;

use super::record::{Facts, InferenceId, Record, StoredOutput, StoredTensors};
use crate::{Error, Result};

const NO_OUTPUT: u8 = 0;
const EMBEDDINGS: u8 = 1;
const JSON: u8 = 2;
const TENSORS: u8 = 3;

/// Appends a record. Errors: [`Error::Internal`] for facts that are no JSON, or a part of 4 GiB or more.
pub fn write_record(record: &Record, out: &mut Vec<u8>) -> Result<()> {
    out.extend_from_slice(record.id.0.as_bytes());
    let facts = serde_json::to_vec(&record.facts).map_err(|e| unwritable(&e.to_string()))?;
    write_u32(facts.len(), out)?;
    out.extend_from_slice(&facts);
    write_output(record.output.as_ref(), out)
}

/// The record of these bytes, all of them. Errors: [`Error::Internal`] for bytes of another form.
pub fn read_record(bytes: &[u8]) -> Result<Record> {
    let mut rest = bytes;
    let (id, facts) = read_facts(&mut rest)?;
    Ok(Record { id, facts, output: read_output(rest)? })
}

/// What comes before a record's output, which is most of its bytes; `rest` begins with the output afterwards.
/// Errors: as [`read_record`].
pub fn read_facts(rest: &mut &[u8]) -> Result<(InferenceId, Facts)> {
    let id = uuid::Uuid::from_slice(take(rest, 16)?).map_err(|e| unreadable(&e.to_string()))?;
    let facts_len = read_u32(rest)?;
    let facts = serde_json::from_slice(take(rest, facts_len)?).map_err(|e| unreadable(&e.to_string()))?;
    Ok((InferenceId(id), facts))
}

/// Appends an output. Errors: as [`write_record`].
pub fn write_output(output: Option<&StoredOutput>, out: &mut Vec<u8>) -> Result<()> {
    match output {
        None => out.push(NO_OUTPUT),
        Some(StoredOutput::Embeddings(rows)) => {
            out.push(EMBEDDINGS);
            write_rows(rows, out)?;
        }
        Some(StoredOutput::Tensors(output)) => {
            out.push(TENSORS);
            let tensors = serde_json::to_vec(&output.tensors).map_err(|e| unwritable(&e.to_string()))?;
            write_u32(tensors.len(), out)?;
            out.extend_from_slice(&tensors);
            write_rows(&output.rows, out)?;
        }
        Some(StoredOutput::Json(value)) => {
            out.push(JSON);
            serde_json::to_writer(out, value).map_err(|e| unwritable(&e.to_string()))?;
        }
    }
    Ok(())
}

fn write_rows(rows: &[Vec<f32>], out: &mut Vec<u8>) -> Result<()> {
    write_u32(rows.len(), out)?;
    for row in rows {
        write_u32(row.len(), out)?;
    }
    out.reserve(rows.iter().map(|row| row.len() * 4).sum());
    for row in rows {
        out.extend(row.iter().flat_map(|value| value.to_le_bytes()));
    }
    Ok(())
}

fn read_rows(rest: &mut &[u8]) -> Result<Vec<Vec<f32>>> {
    let num_rows = read_u32(rest)?;
    let lens = take(rest, num_rows.saturating_mul(4))?;
    let lens = lens.chunks_exact(4).map(|len| u32_of(len) as usize);
    let mut rows = Vec::with_capacity(num_rows);
    for len in lens {
        let values = take(rest, len.saturating_mul(4))?;
        rows.push(values.chunks_exact(4).map(|value| f32::from_bits(u32_of(value))).collect());
    }
    Ok(rows)
}

/// The output of these bytes, all of them. Errors: as [`read_record`].
pub fn read_output(bytes: &[u8]) -> Result<Option<StoredOutput>> {
    let mut rest = bytes;
    let output = match take(&mut rest, 1)?[0] {
        NO_OUTPUT => None,
        EMBEDDINGS => Some(StoredOutput::Embeddings(Arc::new(read_rows(&mut rest)?))),
        TENSORS => {
            let len = read_u32(&mut rest)?;
            let tensors = serde_json::from_slice(take(&mut rest, len)?).map_err(|e| unreadable(&e.to_string()))?;
            Some(StoredOutput::Tensors(Arc::new(StoredTensors { tensors, rows: read_rows(&mut rest)? })))
        }
        JSON => Some(StoredOutput::Json(
            serde_json::from_slice(std::mem::take(&mut rest)).map_err(|e| unreadable(&e.to_string()))?,
        )),
        tag => return Err(unreadable(&format!("no output has the tag {tag}"))),
    };
    match rest.len() {
        0 => Ok(output),
        more => Err(unreadable(&format!("{more} bytes follow the output"))),
    }
}

pub(super) fn write_u32(len: usize, out: &mut Vec<u8>) -> Result<()> {
    let len = u32::try_from(len).map_err(|_| unwritable(&format!("a part of {len} is longer than u32 can say")))?;
    out.extend_from_slice(&len.to_le_bytes());
    Ok(())
}

fn read_u32(rest: &mut &[u8]) -> Result<usize> {
    Ok(u32_of(take(rest, 4)?) as usize)
}

/// Of exactly four bytes.
fn u32_of(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes.try_into().expect("the caller cut four bytes"))
}

pub(super) fn take<'a>(rest: &mut &'a [u8], len: usize) -> Result<&'a [u8]> {
    let Some((taken, left)) = rest.split_at_checked(len) else {
        return Err(unreadable(&format!("ends where {len} more bytes belong, {} are left", rest.len())));
    };
    *rest = left;
    Ok(taken)
}

fn unwritable(why: &str) -> Error {
    Error::Internal { cause: format!("a record cannot be written as bytes: {why}") }
}

pub(super) fn unreadable(why: &str) -> Error {
    Error::Internal { cause: format!("bytes are no record: {why}") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::store::record::{Feedback, Status, StoredInput, StoredTensor, StoredUsage, now};

    fn record(output: Option<StoredOutput>) -> Record {
        let facts = Facts {
            completed_at: Some(now()),
            user: Some("ümlaut".into()),
            metadata: [("k".to_string(), "v".to_string())].into(),
            parameters: json!({"dimensions": 3}),
            input: StoredInput::Full(json!(["a", "b"])),
            usage: StoredUsage { num_tokens: u64::MAX, ..StoredUsage::default() },
            idempotency_key: Some("key".into()),
            feedback: vec![Feedback { at: now(), score: Some(0.1), label: None, comment: Some("good".into()) }],
            ..Facts::new(Status::Succeeded, "m", "1", "embed", "application")
        };
        Record { id: InferenceId::new(), facts, output }
    }

    fn tensors() -> StoredOutput {
        let tensors = vec![
            StoredTensor { name: "y \"z\"".into(), shape: vec![2, 1], is_whole: false },
            StoredTensor { name: "n".into(), shape: vec![], is_whole: true },
        ];
        StoredOutput::Tensors(Arc::new(StoredTensors {
            tensors,
            rows: vec![vec![0.1, -0.0, 7.0], vec![3e-39, 1.0, 2.0]],
        }))
    }

    fn bytes_of(record: &Record) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_record(record, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn records_are_read_as_they_were_written() {
        let rows = vec![vec![1.5f32, -0.0], vec![], vec![f32::MIN_POSITIVE / 4.0]];
        let embeddings = StoredOutput::Embeddings(Arc::new(rows));
        for output in [None, Some(embeddings), Some(StoredOutput::Json(json!([1, "x"]))), Some(tensors())] {
            let record = record(output);
            assert_eq!(read_record(&bytes_of(&record)).as_ref(), Ok(&record));
        }
    }

    #[test]
    fn every_cut_and_every_addition_is_an_error() {
        let embeddings = StoredOutput::Embeddings(Arc::new(vec![vec![1.0, 2.0], vec![3.0]]));
        for output in [None, Some(embeddings), Some(tensors())] {
            let bytes = bytes_of(&record(output));
            for len in 0..bytes.len() {
                assert!(matches!(read_record(&bytes[..len]), Err(Error::Internal { .. })), "{len}");
            }
            assert!(read_record(&[&bytes[..], &[0]].concat()).is_err());
        }
    }

    #[test]
    fn a_length_that_lies_allocates_nothing_of_its_size() {
        for tag in [EMBEDDINGS, TENSORS] {
            let bytes = [&[tag][..], &u32::MAX.to_le_bytes(), &[0; 12]].concat();
            assert!(read_output(&bytes).is_err());
        }
    }

    proptest! {
        #[test]
        fn values_keep_their_bits(rows in proptest::collection::vec(proptest::collection::vec(any::<u32>(), 0..9), 0..9)) {
            let values: Vec<Vec<f32>> = rows.iter().map(|row| row.iter().copied().map(f32::from_bits).collect()).collect();
            let mut bytes = Vec::new();
            write_output(Some(&StoredOutput::Embeddings(Arc::new(values))), &mut bytes).unwrap();
            let Some(StoredOutput::Embeddings(read)) = read_output(&bytes).unwrap() else { panic!("embeddings") };
            let bits: Vec<Vec<u32>> = read.iter().map(|row| row.iter().map(|value| value.to_bits()).collect()).collect();
            prop_assert_eq!(bits, rows);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_record(&bytes);
            let _ = read_output(&bytes);
        }
    }
}
