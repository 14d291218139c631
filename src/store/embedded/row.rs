//! Records as rows, and back.

use std::sync::Arc;

use rusqlite::{Connection, Row};
use serde::{Deserialize, Serialize};

use super::fault::broken;
use crate::store::record::{Facts, Feedback, InferenceId, Record, StoredOutput, StoredTensor, StoredTensors};
use crate::{Error, Result};

/// The columns [`Found::read`] takes, of `inferences AS i`.
pub(super) const COLUMNS: &str = "i.seq, i.id, i.facts";

/// A row of `inferences`, not yet understood.
pub(super) struct Found {
    pub seq: i64,
    pub id: InferenceId,
    facts: String,
}

impl Found {
    /// Takes a row of [`COLUMNS`].
    pub(super) fn read(row: &Row) -> rusqlite::Result<Self> {
        let id: [u8; 16] = row.get(1)?;
        Ok(Self { seq: row.get(0)?, id: InferenceId(uuid::Uuid::from_bytes(id)), facts: row.get(2)? })
    }

    /// The facts as they are written.
    pub(super) fn facts_text(&self) -> &str {
        &self.facts
    }

    /// The facts without the feedback, which is in a table of its own.
    fn facts(&self) -> Result<Facts> {
        serde_json::from_str(&self.facts).map_err(|e| broken("facts", e))
    }

    /// The whole record, `with_output` or without.
    pub(super) fn record(&self, conn: &Connection, with_output: bool) -> Result<Record> {
        let facts = Facts { feedback: feedback(conn, self.seq)?, ..self.facts()? };
        let output = if with_output { output(conn, self.seq)? } else { None };
        Ok(Record { id: self.id, facts, output })
    }
}

/// What was said of a record, oldest first.
pub(super) fn feedback(conn: &Connection, seq: i64) -> Result<Vec<Feedback>> {
    let mut statement =
        conn.prepare_cached("SELECT at, score, label, comment FROM feedback WHERE seq = ?1 ORDER BY idx")?;
    let mut rows = statement.query([seq])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let at: String = row.get(0)?;
        let at = at.parse().map_err(|e| broken("feedback", e))?;
        found.push(Feedback { at, score: row.get(1)?, label: row.get(2)?, comment: row.get(3)? });
    }
    Ok(found)
}

fn output(conn: &Connection, seq: i64) -> Result<Option<StoredOutput>> {
    let mut statement = conn.prepare_cached("SELECT row_lens, rows, json FROM outputs WHERE seq = ?1")?;
    let mut rows = statement.query([seq])?;
    let Some(row) = rows.next()? else { return Ok(None) };
    if let Some(json) = row.get::<_, Option<String>>(2)? {
        let value = serde_json::from_str(&json).map_err(|e| broken("json", e))?;
        return Ok(Some(StoredOutput::Json(value)));
    }
    let lens: String = row.get(0)?;
    let lens: Lens = serde_json::from_str(&lens).map_err(|e| broken("row_lens", e))?;
    let values = row.get_ref(1)?.as_blob().map_err(|e| broken("rows", e))?;
    Ok(Some(match lens {
        Lens::Embeddings(lens) => StoredOutput::Embeddings(Arc::new(rows_of(&lens, values)?)),
        Lens::Tensors { tensors, lens } => {
            StoredOutput::Tensors(Arc::new(StoredTensors { tensors, rows: rows_of(&lens, values)? }))
        }
    }))
}

/// How the values of `rows` are to be cut: what `row_lens` says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Lens {
    /// The length of each row.
    Embeddings(Vec<usize>),
    /// The tensors that each row has one after another, and the rows' lengths.
    Tensors { tensors: Vec<StoredTensor>, lens: Vec<usize> },
}

/// Cuts the values of all rows, f32 in little-endian, into rows.
fn rows_of(lens: &[usize], values: &[u8]) -> Result<Vec<Vec<f32>>> {
    let num_values = lens.iter().try_fold(0usize, |sum, len| sum.checked_add(*len));
    if num_values.and_then(|num| num.checked_mul(4)) != Some(values.len()) {
        return Err(broken("rows", format!("{} bytes for rows of {lens:?} values", values.len())));
    }
    let mut rest = values;
    let mut rows = Vec::with_capacity(lens.len());
    for len in lens {
        let (row, after) = rest.split_at(len * 4);
        rows.push(row.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect());
        rest = after;
    }
    Ok(rows)
}

/// The columns of a row of `outputs`.
#[derive(Debug, PartialEq)]
pub(super) struct OutputRow {
    pub row_lens: Option<String>,
    pub rows: Option<Vec<u8>>,
    pub json: Option<String>,
}

impl OutputRow {
    /// Errors: `Internal` for lengths that are no JSON, which none are.
    pub(super) fn new(output: &StoredOutput) -> Result<Self> {
        let (rows, lens) = match output {
            StoredOutput::Embeddings(rows) => (&**rows, Lens::Embeddings(lens_of(rows))),
            StoredOutput::Tensors(output) => {
                let (tensors, lens) = (output.tensors.clone(), lens_of(&output.rows));
                (&output.rows, Lens::Tensors { tensors, lens })
            }
            StoredOutput::Json(value) => {
                return Ok(Self { row_lens: None, rows: None, json: Some(value.to_string()) });
            }
        };
        let lens = serde_json::to_string(&lens).map_err(|e| broken("row_lens", e))?;
        let mut values = Vec::with_capacity(rows.iter().map(|row| row.len() * 4).sum());
        for value in rows.iter().flatten() {
            values.extend_from_slice(&value.to_le_bytes());
        }
        Ok(Self { row_lens: Some(lens), rows: Some(values), json: None })
    }
}

fn lens_of(rows: &[Vec<f32>]) -> Vec<usize> {
    rows.iter().map(Vec::len).collect()
}

/// The facts as JSON, without the feedback.
pub(super) fn facts_text(facts: &Facts) -> Result<String> {
    let written = if facts.feedback.is_empty() {
        serde_json::to_string(facts)
    } else {
        serde_json::to_string(&Facts { feedback: Vec::new(), ..facts.clone() })
    };
    written.map_err(|e| Error::Internal { cause: format!("facts of a record have no JSON: {e}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_lie_one_after_another_in_little_endian() {
        let rows = vec![vec![1.0f32, -0.0], vec![], vec![f32::MIN_POSITIVE]];
        let row = OutputRow::new(&StoredOutput::Embeddings(Arc::new(rows.clone()))).unwrap();
        assert_eq!(row.row_lens.as_deref(), Some("[2,0,1]"));
        assert_eq!(row.rows.as_deref(), Some(&[0, 0, 0x80, 0x3f, 0, 0, 0, 0x80, 0, 0, 0x80, 0][..]));
        assert_eq!(rows_of(&[2, 0, 1], row.rows.as_deref().unwrap()), Ok(rows));
    }

    #[test]
    fn a_cut_output_is_an_error_and_no_shorter_row() {
        for (lens, len) in [(&[2usize, 1][..], 11), (&[2, 1], 8), (&[2, 1], 16), (&[usize::MAX, 2], 4), (&[], 4)] {
            assert!(matches!(rows_of(lens, &vec![0; len]), Err(Error::Internal { .. })), "{lens:?} {len}");
        }
        assert_eq!(rows_of(&[], &[]), Ok(vec![]));
    }
}
