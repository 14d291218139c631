//! Documents in SQL: a page is a stretch of one index, as a page of records is.

use jiff::Timestamp;
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Row, params, params_from_iter};

use super::super::fault::{broken, time};
use super::super::rows;
use crate::Result;
use crate::store::work::{Document, DocumentKind, DocumentQuery, MAX_DOCUMENTS};

/// The columns [`Found::read`] takes.
pub(super) const COLUMNS: &str = "kind, id, parent, expires_ms, revision, body";

/// A row of `documents`, not yet understood.
struct Found {
    kind: String,
    id: String,
    parent: Option<String>,
    expires_ms: Option<i64>,
    revision: i64,
    body: String,
}

impl Found {
    fn read(row: &Row) -> rusqlite::Result<Self> {
        Ok(Self {
            kind: row.get(0)?,
            id: row.get(1)?,
            parent: row.get(2)?,
            expires_ms: row.get(3)?,
            revision: row.get(4)?,
            body: row.get(5)?,
        })
    }

    fn document(self) -> Result<Document> {
        Ok(Document {
            kind: DocumentKind::of(&self.kind).ok_or_else(|| broken("documents.kind", &self.kind))?,
            id: self.id,
            parent: self.parent,
            expires_at: self.expires_ms.map(|ms| time("documents.expires_ms", ms)).transpose()?,
            revision: u64::try_from(self.revision).map_err(|e| broken("documents.revision", e))?,
            body: serde_json::from_str(&self.body).map_err(|e| broken("documents.body", e))?,
        })
    }
}

/// The document of a row of [`COLUMNS`].
pub(super) fn read(row: &Row) -> Result<Document> {
    Found::read(row)?.document()
}

/// Writes a document as its revision 1, unless it is there.
pub(super) fn create(conn: &Connection, document: &Document) -> Result<bool> {
    let sql = "INSERT INTO documents (kind, id, parent, expires_ms, revision, body) VALUES (?1, ?2, ?3, ?4, 1, ?5)
               ON CONFLICT (kind, id) DO NOTHING";
    let Document { kind, id, parent, expires_at, revision: _, body } = document;
    let expires_ms = expires_at.map(|at| at.as_millisecond());
    let values = params![kind.as_str(), id, parent, expires_ms, body.to_string()];
    Ok(conn.prepare_cached(sql)?.execute(values)? > 0)
}

/// One document.
pub(super) fn get(conn: &Connection, kind: DocumentKind, id: &str) -> Result<Option<Document>> {
    let sql = format!("SELECT {COLUMNS} FROM documents WHERE kind = ?1 AND id = ?2");
    let found = conn.prepare_cached(&sql)?.query_row([kind.as_str(), id], Found::read).optional()?;
    found.map(Found::document).transpose()
}

/// Writes a document over the revision it was read with.
pub(super) fn replace(conn: &Connection, document: &Document) -> Result<bool> {
    let sql = "UPDATE documents SET expires_ms = ?1, body = ?2, revision = revision + 1
               WHERE kind = ?3 AND id = ?4 AND revision = ?5";
    let Document { kind, id, parent: _, expires_at, revision, body } = document;
    // A revision that SQLite cannot count to is none that was read here.
    let Ok(revision) = i64::try_from(*revision) else { return Ok(false) };
    let expires_ms = expires_at.map(|at| at.as_millisecond());
    let values = params![expires_ms, body.to_string(), kind.as_str(), id, revision];
    Ok(conn.prepare_cached(sql)?.execute(values)? > 0)
}

/// Removes a document.
pub(super) fn remove(conn: &Connection, kind: DocumentKind, id: &str) -> Result<bool> {
    let mut statement = conn.prepare_cached("DELETE FROM documents WHERE kind = ?1 AND id = ?2")?;
    Ok(statement.execute([kind.as_str(), id])? > 0)
}

/// A page in falling order of ids.
pub(super) fn list(conn: &Connection, query: &DocumentQuery) -> Result<Vec<Document>> {
    let text = |text: &str| Value::Text(text.to_string());
    let mut values = vec![text(query.kind.as_str())];
    let mut conditions = "kind = ?".to_string();
    let index = match &query.parent {
        Some(parent) => {
            conditions.push_str(" AND parent = ?");
            values.push(text(parent));
            "documents_by_parent"
        }
        None => "documents_by_id",
    };
    if let Some(after) = &query.after {
        conditions.push_str(" AND id < ?");
        values.push(text(after));
    }
    values.push(Value::Integer(rows(query.limit.clamp(1, MAX_DOCUMENTS))));
    let sql = format!("SELECT {COLUMNS} FROM documents INDEXED BY {index} WHERE {conditions} ORDER BY id DESC LIMIT ?");
    let mut statement = conn.prepare_cached(&sql)?;
    let found = statement.query_map(params_from_iter(values), Found::read)?;
    found.map(|found| found?.document()).collect()
}

/// Documents whose time is over, the earliest first.
pub(super) fn expired(conn: &Connection, now: Timestamp, limit: usize) -> Result<Vec<Document>> {
    let sql = format!(
        "SELECT {COLUMNS} FROM documents INDEXED BY documents_by_expiry WHERE expires_ms <= ?1
         ORDER BY expires_ms, kind, id LIMIT ?2"
    );
    let mut statement = conn.prepare_cached(&sql)?;
    let found = statement.query_map(params![now.as_millisecond(), rows(limit)], Found::read)?;
    found.map(|found| found?.document()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::super::migrate::migrate;
    use super::super::super::schema::{INDEXES, MIGRATIONS};
    use super::*;

    #[test]
    fn pages_and_expiry_are_stretches_of_an_index() {
        let mut conn = Connection::open_in_memory().unwrap();
        migrate(&mut conn, "a.db", MIGRATIONS, INDEXES).unwrap();
        for (conditions, order, index) in [
            ("kind = 'a' AND id < 'b'", "id DESC", "documents_by_id"),
            ("kind = 'a' AND parent = 'p' AND id < 'b'", "id DESC", "documents_by_parent"),
            ("expires_ms <= 5", "expires_ms, kind, id", "documents_by_expiry"),
        ] {
            let sql = format!(
                "EXPLAIN QUERY PLAN SELECT {COLUMNS} FROM documents INDEXED BY {index} WHERE {conditions} ORDER BY {order}"
            );
            let mut statement = conn.prepare(&sql).unwrap();
            let plan: Vec<String> =
                statement.query_map([], |row| row.get(3)).unwrap().collect::<rusqlite::Result<_>>().unwrap();
            assert_eq!(plan.len(), 1, "sorts: {plan:?}");
            assert!(plan[0].starts_with("SEARCH") && plan[0].contains(index), "{plan:?}");
        }
    }
}
