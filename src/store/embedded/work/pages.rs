//! All of the background work, kind by kind and in one order, for a backup.

use rusqlite::{Connection, params};

use super::super::fault::{broken, time};
use super::documents;
use crate::Result;
use crate::store::backup::piece::Piece;
use crate::store::backup::source::{FoundPiece, Unreadable};
use crate::store::work::{Task, TaskKind};

/// Rows of a page; parts are large.
const ROWS: usize = 256;
const PARTS: usize = 4;

/// Where a page ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) enum Last {
    Task(String),
    Document(String, String),
    Part(String, i64),
}

/// A page with where it ended; without anything at the end.
type Page = (Vec<FoundPiece>, Option<Last>);

fn found(name: String, piece: Result<Piece>) -> FoundPiece {
    piece.map_err(|cause| Unreadable { name, cause })
}

/// Tasks by their ids. Those that were cancelled, whose owners have yet to learn of it, are none.
pub(in super::super) fn tasks(conn: &Connection, after: &str) -> Result<Page> {
    let sql = format!(
        "SELECT t.id, t.kind, t.due_ms, t.attempts, t.cancelled IS NOT NULL, p.payload
         FROM tasks AS t LEFT JOIN payloads AS p ON p.seq = t.seq WHERE t.id > ?1 ORDER BY t.id LIMIT {ROWS}"
    );
    let mut statement = conn.prepare_cached(&sql)?;
    let mut rows = statement.query([after])?;
    let (mut page, mut last) = (Vec::new(), None);
    while let Some(row) = rows.next()? {
        let id: String = row.get(0)?;
        let read = || -> Result<Option<Piece>> {
            let (kind, due_ms, attempts): (String, i64, u32) = (row.get(1)?, row.get(2)?, row.get(3)?);
            if row.get(4)? {
                return Ok(None);
            }
            let payload: Option<String> = row.get(5)?;
            let payload = payload.ok_or_else(|| broken("payloads", "there is none"))?;
            Ok(Some(Piece::Task(Task {
                id: id.clone(),
                kind: TaskKind::of(&kind).ok_or_else(|| broken("tasks.kind", &kind))?,
                payload: serde_json::from_str(&payload).map_err(|e| broken("payloads", e))?,
                due_at: time("tasks.due_ms", due_ms)?,
                attempts,
            })))
        };
        page.extend(read().transpose().map(|piece| found(format!("task {id}"), piece)));
        last = Some(Last::Task(id));
    }
    Ok((page, last))
}

/// Documents by kind and id.
pub(in super::super) fn documents(conn: &Connection, after: (&str, &str)) -> Result<Page> {
    let sql = format!(
        "SELECT {} FROM documents WHERE (kind, id) > (?1, ?2) ORDER BY kind, id LIMIT {ROWS}",
        documents::COLUMNS
    );
    let mut statement = conn.prepare_cached(&sql)?;
    let mut rows = statement.query([after.0, after.1])?;
    let (mut page, mut last) = (Vec::new(), None);
    while let Some(row) = rows.next()? {
        let (kind, id): (String, String) = (row.get(0)?, row.get(1)?);
        page.push(found(format!("{kind} {id}"), documents::read(row).map(Piece::Document)));
        last = Some(Last::Document(kind, id));
    }
    Ok((page, last))
}

/// Parts by file and number.
pub(in super::super) fn parts(conn: &Connection, after: (&str, i64)) -> Result<Page> {
    let sql =
        format!("SELECT file, idx, bytes FROM parts WHERE (file, idx) > (?1, ?2) ORDER BY file, idx LIMIT {PARTS}");
    let mut statement = conn.prepare_cached(&sql)?;
    let mut rows = statement.query(params![after.0, after.1])?;
    let (mut page, mut last) = (Vec::new(), None);
    while let Some(row) = rows.next()? {
        let (file, number): (String, i64) = (row.get(0)?, row.get(1)?);
        let index = u32::try_from(number).map_err(|e| broken("parts.idx", e));
        let piece = index.and_then(|index| Ok(Piece::Part { file: file.clone(), index, bytes: row.get(2)? }));
        page.push(found(format!("part {number} of file {file}"), piece));
        last = Some(Last::Part(file, number));
    }
    Ok((page, last))
}
