//! Usage and quality: one walk over the index that has all they need, added up on the way.
//!
//! The adding up is not left to `GROUP BY`, which would first sort a million rows in memory; and not a byte of facts or
//! outputs is read, however long the inputs are. Measured for a million records of 1 KB: 0.5 s, against 2.4 s through the
//! table.

use rusqlite::types::ValueRef;
use rusqlite::{Connection, Row};

use super::fault::broken;
use super::schema::{BY_NUMBERS, NUMBERS};
use crate::Result;
use crate::store::numbers::quality::{QualityFold, Said};
use crate::store::numbers::usage::UsageFold;
use crate::store::numbers::{Limit, Numbers, Observed, QualityQuery, QualityRow, UsageQuery, UsageRow, range};
use crate::store::record::{InferenceId, Norms, StoredUsage, Timings};

/// Rows between two looks at the clock: well under a millisecond.
const ROWS_PER_LOOK: usize = 1000;

/// What was used. Errors: [`crate::Error::Deadline`] at the limit.
pub(super) fn usage(conn: &Connection, query: &UsageQuery, limit: Limit) -> Result<Numbers<UsageRow>> {
    let mut fold = UsageFold::new(query);
    let mut statement = conn.prepare_cached(&records())?;
    let mut rows = statement.query(span(range(query.from, query.to)))?;
    let mut clock = Clock::new(limit);
    while let Some(row) = rows.next()? {
        fold.add(&observed(row)?);
        clock.tick()?;
    }
    Ok(fold.finish())
}

/// How well it went. `conn` is in a transaction, so that records and feedback are of one moment. Errors as [`usage`].
pub(super) fn quality(conn: &Connection, query: &QualityQuery, limit: Limit) -> Result<Numbers<QualityRow>> {
    let mut fold = QualityFold::new(query);
    let mut clock = Clock::new(limit);
    let (first, end) = range(query.from, query.to);
    let mut statement = conn.prepare_cached(&records())?;
    let mut rows = statement.query(span((first, end)))?;
    while let Some(row) = rows.next()? {
        fold.add_one(&observed(row)?);
        clock.tick()?;
    }
    // There is little of it, beside records: it leads, and each looks its record up. The version's columns come before
    // the facts, whose pages are not read.
    let mut statement = conn.prepare_cached(FEEDBACK)?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let id = id(row.get_ref(0)?)?;
        let (model, version) = (text(row.get_ref(1)?)?, text(row.get_ref(2)?)?);
        if query.model.as_deref().is_none_or(|asked| asked == model) && (first..end).contains(&id) {
            let label = optional_text(row.get_ref(4)?)?;
            fold.add_feedback(model, version, &Said::once(row.get(3)?, label));
        }
        clock.tick()?;
    }
    Ok(fold.finish())
}

/// All that the numbers are made of, of the records in a range of ids.
fn records() -> String {
    format!("SELECT {NUMBERS} FROM inferences INDEXED BY {BY_NUMBERS} WHERE id >= ?1 AND id < ?2")
}

/// All feedback, with whose it is.
const FEEDBACK: &str = "SELECT i.id, i.model, i.version, f.score, f.label
    FROM feedback AS f CROSS JOIN inferences AS i ON i.seq = f.seq";

/// The bounds of [`records`].
fn span((first, end): (InferenceId, InferenceId)) -> [[u8; 16]; 2] {
    [first.0.into_bytes(), end.0.into_bytes()]
}

/// Looks at the clock now and then.
struct Clock {
    limit: Limit,
    num_rows: usize,
}

impl Clock {
    fn new(limit: Limit) -> Self {
        Self { limit, num_rows: 0 }
    }

    fn tick(&mut self) -> Result<()> {
        self.num_rows += 1;
        if self.num_rows.is_multiple_of(ROWS_PER_LOOK) { self.limit.check() } else { Ok(()) }
    }
}

/// A row of [`NUMBERS`].
fn observed<'a>(row: &'a Row) -> Result<Observed<'a>> {
    let num_rows = number(row.get_ref(13)?);
    let norms = (num_rows > 0).then(|| -> Result<Norms> {
        let [sum, sum_squares, min, max] = [14, 15, 16, 17].map(|idx| row.get(idx));
        Ok(Norms { num: num_rows, sum: sum?, sum_squares: sum_squares?, min: min?, max: max? })
    });
    Ok(Observed {
        id: id(row.get_ref(0)?)?,
        model: text(row.get_ref(1)?)?,
        version: text(row.get_ref(2)?)?,
        user: optional_text(row.get_ref(3)?)?,
        status: text(row.get_ref(4)?)?,
        source: text(row.get_ref(5)?)?,
        error: optional_text(row.get_ref(6)?)?,
        usage: StoredUsage {
            num_inputs: number(row.get_ref(7)?),
            num_cached: number(row.get_ref(8)?),
            num_tokens: number(row.get_ref(9)?),
            num_chars: number(row.get_ref(10)?),
        },
        timings: Timings {
            total_us: number(row.get_ref(11)?),
            inference_us: number(row.get_ref(12)?),
            ..Timings::default()
        },
        norms: norms.transpose()?,
    })
}

fn id(value: ValueRef) -> Result<InferenceId> {
    let bytes = value.as_blob().map_err(|e| broken("id", e))?;
    uuid::Uuid::from_slice(bytes).map(InferenceId).map_err(|e| broken("id", e))
}

fn text(value: ValueRef<'_>) -> Result<&str> {
    value.as_str().map_err(|e| broken("facts", e))
}

fn optional_text(value: ValueRef<'_>) -> Result<Option<&str>> {
    value.as_str_or_null().map_err(|e| broken("facts", e))
}

/// A count of the facts: what is absent counts as none, as it does where facts are read whole.
fn number(value: ValueRef) -> u64 {
    value.as_i64().ok().and_then(|number| u64::try_from(number).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::migrate::migrate;
    use super::super::schema::{INDEXES, MIGRATIONS};
    use super::*;
    use crate::Error;

    #[test]
    fn a_walk_ends_at_its_limit() {
        let mut conn = Connection::open_in_memory().unwrap();
        migrate(&mut conn, "test", MIGRATIONS, INDEXES).unwrap();
        let insert = "INSERT INTO inferences (id, created_ms, status, model, version, facts)
            VALUES (?1, 0, 'succeeded', 'm', '1', '{\"source\":\"tei\"}')";
        for _ in 0..ROWS_PER_LOOK {
            conn.execute(insert, [InferenceId::new().0.as_bytes()]).unwrap();
        }
        let timeout = Duration::ZERO;
        let query = |timeout| QualityQuery { model: None, version: None, from: None, to: None, timeout };
        let told = quality(&conn, &query(timeout), Limit::new(timeout));
        assert_eq!(told, Err(Error::Deadline { timeout }));
        let timeout = Duration::from_secs(60);
        let told = quality(&conn, &query(timeout), Limit::new(timeout)).unwrap();
        assert_eq!((told.rows.len(), told.rows[0].num_requests), (1, ROWS_PER_LOOK as u64));
    }

    fn plan(sql: &str, values: impl rusqlite::Params) -> Vec<String> {
        let mut conn = Connection::open_in_memory().unwrap();
        migrate(&mut conn, "test", MIGRATIONS, INDEXES).unwrap();
        let mut statement = conn.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
        let lines = statement.query_map(values, |row| row.get("detail")).unwrap();
        lines.map(Result::unwrap).collect()
    }

    #[test]
    fn records_are_read_from_the_index_alone() {
        let lines = plan(&records(), span(range(None, None)));
        assert_eq!(lines, ["SEARCH inferences USING COVERING INDEX by_numbers (id>? AND id<?)"]);
    }

    #[test]
    fn feedback_leads_to_its_records() {
        assert_eq!(plan(FEEDBACK, []), ["SCAN f", "SEARCH i USING INTEGER PRIMARY KEY (rowid=?)"]);
    }
}
