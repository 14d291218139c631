//! One thread writes: whatever waits becomes one transaction, and so one fsync, and each caller learns of its change after
//! the commit.
//!
//! No delay is added to gather company: while one commit is on its way to the disk, the next changes gather by themselves.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use super::files::Lock;
use super::metrics::StoreMetrics;
use crate::{Error, Result};

/// Most changes of one transaction. At 20,000 changes a second it is 25 ms long, which bounds what a change waits for.
const MAX_BATCH: usize = 512;

/// Changes that may wait for the writer; who comes then waits to be let in.
const MAX_WAITING: usize = 4 * MAX_BATCH;

/// A change: runs on the writer's connection, or learns that it will not, and leaves its answer for after the commit.
type Change = Box<dyn FnOnce(Result<&Connection>) -> Answer + Send>;

/// Tells the caller, given how the commit went.
type Answer = Box<dyn FnOnce(Result<()>) + Send>;

enum Message {
    Change(Change),
    /// Empty the write-ahead log into the file. The caller holds the other end.
    Checkpoint(oneshot::Sender<Result<()>>),
}

/// The writer's end of the callers. Dropping it lets the thread commit what waits and end.
pub(super) struct Writer {
    /// The thread holds the other end; `None` only while this is dropped.
    sender: Option<mpsc::Sender<Message>>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Starts the thread. It holds the lock of the files until it ends.
    pub(super) fn start(conn: Connection, metrics: Arc<StoreMetrics>, lock: Arc<Lock>) -> Result<Self> {
        let (sender, receiver) = mpsc::channel(MAX_WAITING);
        let run = move || {
            write(&conn, receiver, &metrics);
            drop(conn);
            drop(lock);
        };
        let thread = std::thread::Builder::new().name("store-writer".to_string()).spawn(run);
        let thread = thread.map_err(|e| Error::Internal { cause: format!("the store's writer cannot start: {e}") })?;
        Ok(Self { sender: Some(sender), thread: Some(thread) })
    }

    /// Makes a change and waits until it is on the disk. Dropping the future leaves open whether it will be.
    pub(super) async fn change<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (reply, committed) = oneshot::channel();
        let change: Change = Box::new(move |conn| {
            let outcome = conn.and_then(|conn| within_savepoint(conn, change));
            Box::new(move |commit: Result<()>| {
                // An error here is a caller who has gone.
                let _ = reply.send(commit.and(outcome));
            })
        });
        self.send(Message::Change(change)).await?;
        committed.await.map_err(|_| gone())?
    }

    /// Writes the log into the file and cuts it to nothing, so that nothing deleted remains in it.
    pub(super) async fn checkpoint(&self) -> Result<()> {
        let (reply, done) = oneshot::channel();
        self.send(Message::Checkpoint(reply)).await?;
        done.await.map_err(|_| gone())?
    }

    async fn send(&self, message: Message) -> Result<()> {
        match &self.sender {
            Some(sender) => sender.send(message).await.map_err(|_| gone()),
            None => Err(gone()),
        }
    }
}

impl Drop for Writer {
    /// Blocks until what waits is committed.
    fn drop(&mut self) {
        self.sender = None;
        if let Some(thread) = self.thread.take() {
            // A panic in the thread is logged by the panic hook; there is nobody left to tell.
            let _ = thread.join();
        }
    }
}

fn gone() -> Error {
    Error::Internal { cause: "the store's writer gave no answer".to_string() }
}

fn write(conn: &Connection, mut receiver: mpsc::Receiver<Message>, metrics: &StoreMetrics) {
    let mut messages = Vec::with_capacity(MAX_BATCH);
    while receiver.blocking_recv_many(&mut messages, MAX_BATCH) > 0 {
        let mut changes = Vec::with_capacity(messages.len());
        let mut checkpoints = Vec::new();
        for message in messages.drain(..) {
            match message {
                Message::Change(change) => changes.push(change),
                Message::Checkpoint(reply) => checkpoints.push(reply),
            }
        }
        // A panic is a bug of ours in one change; its callers see their answer dropped, and the next are served.
        let outcome = catch_unwind(AssertUnwindSafe(|| commit(conn, changes, metrics)));
        if outcome.is_err() {
            let _ = conn.execute_batch("ROLLBACK");
        }
        if !checkpoints.is_empty() {
            let outcome = checkpoint(conn);
            for reply in checkpoints {
                let _ = reply.send(outcome.clone());
            }
        }
    }
}

/// Runs changes in one transaction, commits, then answers. A change that fails is undone alone, unless SQLite gave up the
/// whole transaction (a full disk, an I/O error): then all learn of that error.
fn commit(conn: &Connection, changes: Vec<Change>, metrics: &StoreMetrics) {
    if changes.is_empty() {
        return;
    }
    let started = Instant::now();
    let num_changes = changes.len();
    let mut answers = Vec::with_capacity(num_changes);
    let mut state = conn.execute_batch("BEGIN IMMEDIATE").map_err(Error::from);
    for change in changes {
        answers.push(change(state.as_ref().map(|()| conn).map_err(Error::clone)));
        if state.is_ok() && conn.is_autocommit() {
            let cause = "sqlite ended the transaction: no room on the disk, or it does not answer".to_string();
            state = Err(Error::StoreUnavailable { cause });
        }
    }
    if state.is_ok() {
        state = conn.execute_batch("COMMIT").map_err(Error::from);
        if state.is_err() && !conn.is_autocommit() {
            // Nothing of it may linger into the next transaction.
            let _ = conn.execute_batch("ROLLBACK");
        }
    }
    match &state {
        Ok(()) => metrics.committed(num_changes, started.elapsed()),
        Err(error) => tracing::error!(%error, num_changes, "the embedded store could not commit"),
    }
    for answer in answers {
        answer(state.clone());
    }
}

/// Runs one change so that its failure undoes nothing but itself.
fn within_savepoint<T>(conn: &Connection, change: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
    let run = |sql| conn.prepare_cached(sql).and_then(|mut statement| statement.execute([]));
    run("SAVEPOINT change")?;
    match change(conn) {
        Ok(value) => {
            run("RELEASE change")?;
            Ok(value)
        }
        Err(error) => {
            // Without a transaction there is no savepoint either: SQLite has undone everything.
            if !conn.is_autocommit() {
                run("ROLLBACK TO change")?;
                run("RELEASE change")?;
            }
            Err(error)
        }
    }
}

fn checkpoint(conn: &Connection) -> Result<()> {
    let is_busy: bool = conn.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
    if is_busy {
        return Err(Error::StoreUnavailable { cause: "a reader holds the write-ahead log".to_string() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn memory() -> Connection {
        let conn = Connection::open_in_memory().unwrap();
        conn.execute_batch("CREATE TABLE a (x INTEGER PRIMARY KEY)").unwrap();
        conn
    }

    fn start(conn: Connection, dir: &tempfile::TempDir) -> Writer {
        Writer::start(conn, Arc::new(StoreMetrics::new()), Arc::new(Lock::take(dir.path()).unwrap())).unwrap()
    }

    fn add(x: i64) -> impl FnOnce(&Connection) -> Result<usize> + Send {
        move |conn| Ok(conn.execute("INSERT INTO a VALUES (?1)", [x])?)
    }

    fn values(conn: &Connection) -> Result<Vec<i64>> {
        let mut statement = conn.prepare("SELECT x FROM a ORDER BY x")?;
        let rows = statement.query_map([], |row| row.get(0))?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// A change that lets the writer go on only when the sender is dropped, so that others gather behind it.
    fn hold(release: std::sync::mpsc::Receiver<()>) -> impl FnOnce(&Connection) -> Result<()> + Send {
        move |_| {
            let _ = release.recv_timeout(Duration::from_secs(60));
            Ok(())
        }
    }

    #[tokio::test]
    async fn what_waits_is_one_transaction_and_a_failure_undoes_itself_alone() {
        let dir = tempfile::tempdir().unwrap();
        let writer = start(memory(), &dir);
        let (held, release) = std::sync::mpsc::channel();
        let partly = |conn: &Connection| {
            conn.execute("INSERT INTO a VALUES (7)", [])?;
            conn.execute("INSERT INTO a VALUES (7)", [])?;
            Ok(())
        };
        let (first, one, failed, two, seen, ()) = tokio::join!(
            writer.change(hold(release)),
            writer.change(add(1)),
            writer.change(partly),
            writer.change(add(2)),
            writer.change(|conn| Ok((values(conn)?, conn.is_autocommit()))),
            async { drop(held) },
        );
        assert_eq!((first, one, two), (Ok(()), Ok(1), Ok(1)));
        assert!(matches!(failed, Err(Error::Internal { .. })), "{failed:?}");
        assert_eq!(seen, Ok((vec![1, 2], false)));
    }

    #[tokio::test]
    async fn a_full_disk_is_unavailable_and_passes() {
        let dir = tempfile::tempdir().unwrap();
        let conn = memory();
        conn.execute_batch("CREATE TABLE b (x BLOB)").unwrap();
        let writer = start(conn, &dir);
        let limit = |pages: i64| {
            move |conn: &Connection| {
                Ok(conn.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |row| row.get::<_, i64>(0))?)
            }
        };
        let large = |conn: &Connection| Ok(conn.execute("INSERT INTO b VALUES (zeroblob(1000000))", [])?);
        assert_eq!(writer.change(limit(50)).await, Ok(50));
        let full = writer.change(large).await;
        assert!(matches!(full, Err(Error::StoreUnavailable { .. })), "{full:?}");
        assert_eq!(writer.change(add(1)).await, Ok(1));
        writer.change(limit(1_000_000)).await.unwrap();
        assert_eq!(writer.change(large).await, Ok(1));
        assert_eq!(writer.change(values).await, Ok(vec![1]));
    }

    #[tokio::test]
    async fn where_sqlite_gives_the_transaction_up_nobody_is_told_of_success() {
        let dir = tempfile::tempdir().unwrap();
        let writer = start(memory(), &dir);
        let (held, release) = std::sync::mpsc::channel();
        // What a full disk may do in the middle of a statement.
        let give_up = |conn: &Connection| Ok(conn.execute_batch("ROLLBACK")?);
        let (_, before, _, after, ()) = tokio::join!(
            writer.change(hold(release)),
            writer.change(add(1)),
            writer.change(give_up),
            writer.change(add(2)),
            async { drop(held) },
        );
        for outcome in [before, after] {
            assert!(matches!(outcome, Err(Error::StoreUnavailable { .. })), "{outcome:?}");
        }
        assert_eq!(writer.change(values).await, Ok(vec![]));
    }

    #[tokio::test]
    async fn a_panic_ends_its_batch_and_not_the_writer() {
        let dir = tempfile::tempdir().unwrap();
        let writer = start(memory(), &dir);
        let outcome = writer
            .change(|conn| -> Result<()> {
                conn.execute("INSERT INTO a VALUES (1)", [])?;
                panic!("a bug in a change")
            })
            .await;
        assert!(matches!(outcome, Err(Error::Internal { .. })), "{outcome:?}");
        assert_eq!(writer.change(add(2)).await, Ok(1));
        assert_eq!(writer.change(values).await, Ok(vec![2]));
    }
}
