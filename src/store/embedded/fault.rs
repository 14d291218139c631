//! What SQLite's errors are to callers: something that may pass, or something that will not.

use jiff::Timestamp;
use rusqlite::ErrorCode;

use crate::{Error, Result};

impl From<rusqlite::Error> for Error {
    /// [`Error::StoreUnavailable`] for what a repetition may mend, once somebody has made room or the device answers
    /// again; [`Error::Internal`] for the rest: a broken file, and faults of our own.
    fn from(error: rusqlite::Error) -> Self {
        use ErrorCode::*;
        let cause = format!("sqlite: {error}");
        match error.sqlite_error_code() {
            Some(DiskFull) => Self::StoreUnavailable { cause: format!("no room is left on the disk ({cause})") },
            Some(
                SystemIoFailure
                | DatabaseBusy
                | DatabaseLocked
                | OutOfMemory
                | CannotOpen
                | ReadOnly
                | PermissionDenied
                | FileLockingProtocolFailed
                | OperationInterrupted,
            ) => Self::StoreUnavailable { cause },
            _ => Self::Internal { cause },
        }
    }
}

/// A record that cannot be read back: `what` is the column at fault.
pub(super) fn broken(what: &str, reason: impl std::fmt::Display) -> Error {
    Error::Internal { cause: format!("a record of the store is broken: {what}: {reason}") }
}

/// A time in milliseconds as it is kept. Errors: as [`broken`], for one that no calendar has.
pub(super) fn time(what: &str, ms: i64) -> Result<Timestamp> {
    Timestamp::from_millisecond(ms).map_err(|e| broken(what, e))
}
