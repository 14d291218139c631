//! Connections that read. A read sees the store as of the moment it began, whatever is written meanwhile.

use std::sync::Arc;

use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension};
use tokio::sync::Semaphore;

use super::files::Lock;
use super::row::{COLUMNS, Found};
use crate::store::record::{InferenceId, Record};
use crate::{Error, Result};

/// A few connections, each lent to one read at a time, on the threads that tokio keeps for what blocks.
pub(super) struct Readers {
    /// Those that nobody has. Not an async mutex: it is held for a push or a pop.
    idle: Mutex<Vec<Connection>>,
    /// As many permits as connections: who has one finds a connection.
    permits: Arc<Semaphore>,
    /// The files stay ours while one is open.
    _lock: Arc<Lock>,
}

impl Readers {
    pub(super) fn new(connections: Vec<Connection>, lock: Arc<Lock>) -> Arc<Self> {
        let permits = Arc::new(Semaphore::new(connections.len()));
        Arc::new(Self { idle: Mutex::new(connections), permits, _lock: lock })
    }

    /// Runs a read. If its future is dropped the read still ends, and its connection comes back.
    pub(super) async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        read: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let permit = self.permits.clone().acquire_owned().await.expect("the semaphore is never closed");
        let readers = self.clone();
        let task = tokio::task::spawn_blocking(move || {
            let lent = Lent::new(&readers);
            // Returned before the permit is, or the next holder might find none.
            let outcome = lent.conn().unchecked_transaction().map_err(Error::from).and_then(|tx| read(&tx));
            drop(lent);
            drop(permit);
            outcome
        });
        task.await.map_err(|e| Error::Internal { cause: format!("a read of the store ended badly: {e}") })?
    }
}

/// A connection on loan; it comes back also from a panic.
struct Lent<'a> {
    readers: &'a Readers,
    conn: Option<Connection>,
}

impl<'a> Lent<'a> {
    fn new(readers: &'a Readers) -> Self {
        Self { readers, conn: readers.idle.lock().pop() }
    }

    fn conn(&self) -> &Connection {
        self.conn.as_ref().expect("a permit was taken for it, and it is here until the drop")
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.readers.idle.lock().extend(self.conn.take());
    }
}

/// One record.
pub(super) fn get(conn: &Connection, id: &InferenceId) -> Result<Option<Record>> {
    let sql = format!("SELECT {COLUMNS} FROM inferences AS i WHERE i.id = ?1");
    let found = conn.prepare_cached(&sql)?.query_row([id.0.as_bytes()], Found::read).optional()?;
    found.map(|found| found.record(conn, true)).transpose()
}

/// The record that holds this idempotency key.
pub(super) fn find_by_key(conn: &Connection, key: &str) -> Result<Option<Record>> {
    let sql = format!("SELECT {COLUMNS} FROM inferences AS i WHERE i.idempotency_key = ?1");
    let found = conn.prepare_cached(&sql)?.query_row([key], Found::read).optional()?;
    found.map(|found| found.record(conn, true)).transpose()
}

/// Number of records.
pub(super) fn count(conn: &Connection) -> Result<u64> {
    let num: i64 = conn.prepare_cached("SELECT count(*) FROM inferences")?.query_row([], |row| row.get(0))?;
    Ok(u64::try_from(num).unwrap_or(0))
}

/// What SQLite finds wrong with the file; empty where it is sound.
pub(super) fn quick_check(conn: &Connection) -> Result<Vec<String>> {
    let mut statement = conn.prepare("PRAGMA quick_check")?;
    let lines: Vec<String> = statement.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
    Ok(if lines == ["ok"] { Vec::new() } else { lines })
}
