//! Parts of files in SQL.

use rusqlite::{Connection, OptionalExtension, params};

use super::super::rows;
use crate::Result;

/// Writes a part over what is there.
pub(super) fn put(conn: &Connection, file: &str, index: u32, bytes: &[u8]) -> Result<()> {
    let sql = "INSERT INTO parts (file, idx, bytes) VALUES (?1, ?2, ?3)
               ON CONFLICT (file, idx) DO UPDATE SET bytes = excluded.bytes";
    conn.prepare_cached(sql)?.execute(params![file, index, bytes])?;
    Ok(())
}

/// A part.
pub(super) fn get(conn: &Connection, file: &str, index: u32) -> Result<Option<Vec<u8>>> {
    let mut statement = conn.prepare_cached("SELECT bytes FROM parts WHERE file = ?1 AND idx = ?2")?;
    Ok(statement.query_row(params![file, index], |row| row.get(0)).optional()?)
}

/// Removes parts of a file, at most `limit`, and returns their number.
pub(super) fn remove(conn: &Connection, file: &str, limit: usize) -> Result<usize> {
    let sql = "DELETE FROM parts WHERE seq IN (SELECT seq FROM parts WHERE file = ?1 ORDER BY idx LIMIT ?2)";
    Ok(conn.prepare_cached(sql)?.execute(params![file, rows(limit)])?)
}
