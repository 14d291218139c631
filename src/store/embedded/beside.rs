//! The store read beside the server that works on it: without its lock, and without a change. SQLite's write-ahead log lets
//! another process see the file as of one moment, however long it looks.

use std::collections::HashSet;
use std::path::Path;

use rusqlite::Connection;

use super::row::{COLUMNS, Found as Row};
use super::schema::MIGRATIONS;
use super::work::pages::{self, Last};
use super::{files, list, migrate, read};
use crate::store::Migrated;
use crate::store::backup::Consistency;
use crate::store::backup::piece::PieceKind;
use crate::store::backup::source::{Found, FoundPiece, Source, Unreadable};
use crate::store::query::{Page, Query};
use crate::store::record::{InferenceId, Record};
use crate::{Error, Result};

/// Records of a page, and about the bytes after which it ends before.
const PAGE: usize = 256;
const PAGE_BYTES: usize = 8 << 20;

/// A store that somebody else may be writing. Blocks: every method.
pub struct Beside {
    conn: Connection,
}

impl Beside {
    /// Opens the store in `folder`, which must be there and of the present schema.
    ///
    /// Errors: [`Error::Config`] naming `database.path` where it is not; those of [`crate::store::Records`] for all else.
    pub fn open(folder: &Path) -> Result<Self> {
        let file = files::database(folder);
        if !file.is_file() {
            return Err(fault(&file, "there is no store"));
        }
        let conn = files::open_reader(&file)?;
        let Migrated { from, to, changes } = migrate::pending(&conn, &file.display().to_string())?;
        if from != to {
            let reason =
                format!("it is at schema version {from}, this program reads {to}: `eremois migrate` brings it there");
            return Err(fault(&file, reason));
        }
        // A missing index makes this slower and no less right.
        changes.iter().for_each(|change| tracing::warn!(change, "the embedded store is not as it must be"));
        Ok(Self { conn })
    }

    /// See [`crate::store::Records::list`].
    pub fn list(&self, query: &Query) -> Result<Page> {
        let tx = self.conn.unchecked_transaction()?;
        list::list(&tx, query)
    }

    /// The store as of now. While it is held, the log of who writes cannot be cut, and grows.
    pub fn snapshot(self) -> Result<Snapshot> {
        self.conn.execute_batch("BEGIN")?;
        // The first read of a transaction fixes what all of it sees.
        let num_records = read::count(&self.conn)?;
        Ok(Snapshot {
            conn: self.conn,
            num_records,
            num_read: 0,
            last: Vec::new(),
            last_piece: None,
            unreadable: HashSet::new(),
        })
    }
}

/// All records as of one moment.
pub struct Snapshot {
    /// In a transaction, which ends with it.
    conn: Connection,
    num_records: u64,
    num_read: u64,
    /// The id of the last row that was read.
    last: Vec<u8>,
    last_piece: Option<Last>,
    /// Ids of rows that were no records: told once.
    unreadable: HashSet<Vec<u8>>,
}

impl Source for Snapshot {
    fn store(&self) -> &'static str {
        "embedded"
    }

    fn schema(&self) -> i32 {
        MIGRATIONS.len() as i32
    }

    fn consistency(&self) -> Consistency {
        Consistency::Snapshot
    }

    fn count(&mut self) -> Result<u64> {
        Ok(self.num_records)
    }

    fn next_pieces(&mut self, kind: PieceKind) -> Result<Vec<FoundPiece>> {
        loop {
            let (page, last) = match (kind, &self.last_piece) {
                (PieceKind::Task, Some(Last::Task(id))) => pages::tasks(&self.conn, id)?,
                (PieceKind::Task, _) => pages::tasks(&self.conn, "")?,
                (PieceKind::Document, Some(Last::Document(kind, id))) => pages::documents(&self.conn, (kind, id))?,
                (PieceKind::Document, _) => pages::documents(&self.conn, ("", ""))?,
                (PieceKind::Part, Some(Last::Part(file, index))) => pages::parts(&self.conn, (file, *index))?,
                (PieceKind::Part, _) => pages::parts(&self.conn, ("", -1))?,
            };
            let is_end = last.is_none();
            self.last_piece = last.or_else(|| self.last_piece.take());
            // A page may hold nothing but what was cancelled.
            if is_end || !page.is_empty() {
                return Ok(page);
            }
        }
    }

    fn next_page(&mut self) -> Result<Vec<Found>> {
        let sql = format!("SELECT {COLUMNS} FROM inferences AS i WHERE i.id > ?1 ORDER BY i.id LIMIT {PAGE}");
        let mut statement = self.conn.prepare_cached(&sql)?;
        let mut rows = statement.query([&self.last])?;
        let mut page = Vec::new();
        let mut num_bytes = 0;
        while let Some(row) = rows.next()? {
            let id = row.get_ref(1)?.as_bytes().map_err(|e| Error::Internal { cause: format!("an id: {e}") })?.to_vec();
            let found = Row::read(row).map_err(Error::from).and_then(|row| row.record(&self.conn, true));
            num_bytes += found.as_ref().map_or(0, Record::approximate_bytes);
            if found.is_err() {
                self.unreadable.insert(id.clone());
            }
            page.push(found.map_err(|cause| Unreadable { name: name(&id), cause }));
            self.last = id;
            self.num_read += 1;
            if num_bytes >= PAGE_BYTES {
                break;
            }
        }
        Ok(page)
    }

    fn check(&mut self) -> Result<Vec<String>> {
        let mut faults: Vec<String> =
            read::quick_check(&self.conn)?.into_iter().map(|line| format!("sqlite: {line}")).collect();
        if self.num_read != self.num_records {
            faults.push(format!("{} records were read by their ids, {} are there", self.num_read, self.num_records));
        }
        for (what, sql) in AGREEMENTS {
            let mut statement = self.conn.prepare(sql)?;
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                let id: Vec<u8> = row.get_ref(0)?.as_bytes_or_null().ok().flatten().unwrap_or_default().to_vec();
                if !self.unreadable.contains(&id) {
                    faults.push(format!("{}: {what}", name(&id)));
                }
            }
        }
        Ok(faults)
    }
}

/// What tables must agree on, and the ids of rows that do not.
const AGREEMENTS: [(&str, &str); 5] = [
    (
        "its columns are not what its facts say",
        "SELECT id FROM inferences WHERE CASE WHEN json_valid(facts) THEN status IS NOT facts ->> '$.status'
         OR model IS NOT facts ->> '$.model' OR version IS NOT facts ->> '$.version'
         OR user IS NOT facts ->> '$.user' OR idempotency_key IS NOT facts ->> '$.idempotency_key' END",
    ),
    (
        "it cannot be found by its metadata",
        "SELECT DISTINCT i.id
         FROM inferences AS i, json_each(CASE WHEN json_valid(i.facts) THEN i.facts END, '$.metadata') AS pair
         WHERE NOT EXISTS (SELECT 1 FROM metadata AS m WHERE m.key = pair.key AND m.value = pair.value AND m.id = i.id)",
    ),
    (
        "metadata of a record that is not there",
        "SELECT DISTINCT m.id FROM metadata AS m
         WHERE NOT EXISTS (SELECT 1 FROM inferences AS i WHERE i.seq = m.seq AND i.id = m.id)",
    ),
    (
        "an output without its record",
        "SELECT CAST('row ' || o.seq AS BLOB) FROM outputs AS o
         WHERE NOT EXISTS (SELECT 1 FROM inferences AS i WHERE i.seq = o.seq)",
    ),
    (
        "feedback without its record",
        "SELECT DISTINCT CAST('row ' || f.seq AS BLOB) FROM feedback AS f
         WHERE NOT EXISTS (SELECT 1 FROM inferences AS i WHERE i.seq = f.seq)",
    ),
];

/// What an id's bytes are called.
fn name(id: &[u8]) -> String {
    match (uuid::Uuid::from_slice(id), std::str::from_utf8(id)) {
        (Ok(id), _) => InferenceId(id).to_string(),
        (_, Ok(text)) if !text.is_empty() => text.to_string(),
        _ => format!("a record with the id {id:02x?}"),
    }
}

fn fault(file: &Path, reason: impl std::fmt::Display) -> Error {
    Error::Config { faults: vec![format!("database.path: {}: {reason}", file.display())] }
}
