//! The folder of the store: its lock, and connections to its file.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use crate::{Error, Result};

/// The database within the folder.
const FILE: &str = "eremois.db";

/// The file whose lock says that a server works on this folder.
const LOCK_FILE: &str = "eremois.lock";

/// How long a connection waits for a lock that another process holds, a backup or a shell: writes wait behind it.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Pages in the log (4 KiB each) from which a commit also writes them into the file: 16 MiB. SQLite's 4 MiB would do so every
/// second at 1,000 records a second, and a page that changes often is written once for all its changes.
const CHECKPOINT_PAGES: u32 = 4096;

/// What one connection keeps of the file in memory, in KiB: the inner pages of all indexes of millions of records.
const WRITER_CACHE_KIB: u32 = 32 * 1024;
const READER_CACHE_KIB: u32 = 8 * 1024;

/// The lock of a folder, held by this process until it is dropped. The kernel drops it with the process, however it ends.
pub(super) struct Lock {
    /// Its lock is the point; closing it gives the lock up.
    _file: File,
}

impl Lock {
    /// Takes the lock. Errors: [`Error::Config`] naming who has it, or why the folder cannot be written.
    pub(super) fn take(folder: &Path) -> Result<Self> {
        let path = folder.join(LOCK_FILE);
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|e| fault(&path, e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // Only for the message: an unreadable number leaves it out.
                let _ = file.read_to_string(&mut holder);
                let process = holder.trim().parse::<u32>().map(|pid| format!(", process {pid}")).unwrap_or_default();
                let reason = format!("another server{process} works on it: stop that one or name another folder");
                return Err(fault(folder, reason));
            }
            Err(TryLockError::Error(e)) => return Err(fault(&path, e)),
        }
        let written = file.set_len(0).and_then(|()| file.write_all(format!("{}\n", std::process::id()).as_bytes()));
        written.map_err(|e| fault(&path, e))?;
        Ok(Self { _file: file })
    }
}

/// Makes the folder where it is not there, so that it survives a loss of power as what is in it does.
pub(super) fn make_folder(folder: &Path) -> Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(folder).map_err(|e| fault(folder, e))?;
    // The entry of a folder is in its parent; "" is where we are.
    let parent = folder.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent).and_then(|parent| parent.sync_all()).map_err(|e| fault(parent, e))
}

/// The database's path.
pub(super) fn database(folder: &Path) -> PathBuf {
    folder.join(FILE)
}

/// Opens the connection that writes; makes the file where it is not there.
pub(super) fn open_writer(file: &Path) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = Connection::open_with_flags(file, flags).map_err(|e| fault(file, e))?;
    // `secure_delete`: what is erased is overwritten, not only forgotten. `FULL`: a commit is an fsync of the log.
    let pragmas = format!(
        "PRAGMA journal_mode = WAL;
         PRAGMA synchronous = FULL;
         PRAGMA secure_delete = ON;
         PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES};
         PRAGMA journal_size_limit = {};
         PRAGMA cache_size = -{WRITER_CACHE_KIB};
         PRAGMA temp_store = MEMORY;",
        4 * 4096 * CHECKPOINT_PAGES
    );
    conn.busy_timeout(BUSY_TIMEOUT)?;
    conn.execute_batch(&pragmas).map_err(|e| fault(file, e))?;
    conn.set_prepared_statement_cache_capacity(64);
    Ok(conn)
}

/// Opens a connection that only reads.
pub(super) fn open_reader(file: &Path) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = Connection::open_with_flags(file, flags).map_err(|e| fault(file, e))?;
    conn.busy_timeout(BUSY_TIMEOUT)?;
    conn.execute_batch(&format!("PRAGMA cache_size = -{READER_CACHE_KIB}; PRAGMA temp_store = MEMORY;"))?;
    conn.set_prepared_statement_cache_capacity(64);
    Ok(conn)
}

fn fault(path: &Path, reason: impl std::fmt::Display) -> Error {
    Error::Config { faults: vec![format!("database.path: {}: {reason}", path.display())] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_is_an_fsync_and_what_is_deleted_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let conn = open_writer(&database(dir.path())).unwrap();
        let pragma = |name: &str| conn.query_row(&format!("PRAGMA {name}"), [], |row| row.get::<_, i64>(0)).unwrap();
        // 2 is FULL. Source: sqlite.org/pragma.html.
        assert_eq!((pragma("synchronous"), pragma("secure_delete")), (2, 1));
        let mode: String = conn.query_row("PRAGMA journal_mode", [], |row| row.get(0)).unwrap();
        assert_eq!(mode, "wal");
    }

    #[test]
    fn readers_cannot_write() {
        let dir = tempfile::tempdir().unwrap();
        let writer = open_writer(&database(dir.path())).unwrap();
        writer.execute_batch("CREATE TABLE a (x)").unwrap();
        let reader = open_reader(&database(dir.path())).unwrap();
        let error = Error::from(reader.execute_batch("INSERT INTO a VALUES (1)").unwrap_err());
        assert!(matches!(error, Error::StoreUnavailable { .. }), "{error:?}");
    }
}
