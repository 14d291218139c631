//! The driver's errors as ours: what a repetition may mend, what is a duplicate, what is wrong for good.

use mongodb::error::{Error as DriverError, ErrorKind, RETRYABLE_ERROR, RETRYABLE_WRITE_ERROR, WriteFailure};

use crate::Error;

/// The code of a command that took longer than it was allowed to.
pub(super) const MAX_TIME_EXPIRED: i32 = 50;

/// The code of a unique index that is violated.
pub(super) const DUPLICATE_KEY: i32 = 11000;

/// Codes with which a server says that it cannot serve now, or did not finish in time.
///
/// Source: the retryable and state change codes of the driver specifications ("retryable reads", "server discovery and
/// monitoring"), and of `error_codes.yml` of the server those of time and room.
const UNAVAILABLE: [i32; 23] = [
    MAX_TIME_EXPIRED,
    6,     // HostUnreachable
    7,     // HostNotFound
    24,    // LockTimeout
    64,    // WriteConcernTimeout, as it was called
    79,    // UnknownReplWriteConcern: no member can acknowledge it yet
    89,    // NetworkTimeout
    91,    // ShutdownInProgress
    100,   // UnsatisfiableWriteConcern: too few members are up
    112,   // WriteConflict
    133,   // FailedToSatisfyReadPreference
    134,   // ReadConcernMajorityNotAvailableYet
    189,   // PrimarySteppedDown
    202,   // NetworkInterfaceExceededTimeLimit
    262,   // ExceededTimeLimit
    9001,  // SocketException
    10058, // NotWritablePrimary, as it was called
    10107, // NotWritablePrimary
    11600, // InterruptedAtShutdown
    11602, // InterruptedDueToReplStateChange
    13435, // NotPrimaryNoSecondaryOk
    13436, // NotPrimaryOrSecondary
    14031, // OutOfDiskSpace
];

/// Codes of a refused login or a missing right.
const REFUSED: [i32; 3] = [13, 18, 8000];

/// An error of the driver as one of ours, with its words for the log. It never holds the connection string.
pub(super) fn fault(error: DriverError) -> Error {
    let cause = short(&error);
    if is_unavailable(&error) { Error::StoreUnavailable { cause } } else { Error::Internal { cause } }
}

/// An error that the server answered with this code, as one of ours.
pub(super) fn fault_of_code(code: i32, message: &str) -> Error {
    let cause = format!("MongoDB says {message} (code {code})");
    if UNAVAILABLE.contains(&code) { Error::StoreUnavailable { cause } } else { Error::Internal { cause } }
}

/// Whether the operation may succeed when it is repeated as it is.
pub(super) fn is_unavailable(error: &DriverError) -> bool {
    if error.contains_label(RETRYABLE_WRITE_ERROR) || error.contains_label(RETRYABLE_ERROR) {
        return true;
    }
    match error.kind.as_ref() {
        ErrorKind::Io(_)
        | ErrorKind::ConnectionPoolCleared { .. }
        | ErrorKind::ServerSelection { .. }
        | ErrorKind::DnsResolve { .. }
        // A reply that is cut off by a server that is ending.
        | ErrorKind::InvalidResponse { .. }
        // Nobody can be reached as this user: results wait in the journal until somebody mends it.
        | ErrorKind::Authentication { .. } => true,
        ErrorKind::Command(command) => UNAVAILABLE.contains(&command.code) || REFUSED.contains(&command.code),
        // What was written may yet be undone by a change of primary.
        ErrorKind::Write(WriteFailure::WriteConcernError(_)) => true,
        ErrorKind::Write(WriteFailure::WriteError(write)) => UNAVAILABLE.contains(&write.code),
        ErrorKind::InsertMany(many) => many.write_concern_error.is_some(),
        _ => false,
    }
}

/// Whether an index says that this is there already.
pub(super) fn is_duplicate(error: &DriverError) -> bool {
    match error.kind.as_ref() {
        ErrorKind::Command(command) => command.code == DUPLICATE_KEY,
        ErrorKind::Write(WriteFailure::WriteError(write)) => write.code == DUPLICATE_KEY,
        _ => false,
    }
}

/// The code of a command that failed.
pub(super) fn code(error: &DriverError) -> Option<i32> {
    match error.kind.as_ref() {
        ErrorKind::Command(command) => Some(command.code),
        _ => None,
    }
}

/// A document that this code cannot read, or cannot write.
pub(super) fn unreadable(what: &str, error: impl std::fmt::Display) -> Error {
    Error::Internal { cause: format!("{what}: {error}") }
}

/// What happened, without the server's whole response, which repeats documents of clients.
fn short(error: &DriverError) -> String {
    match error.kind.as_ref() {
        ErrorKind::Command(command) => format!("MongoDB says {} (code {})", command.message, command.code),
        ErrorKind::Write(WriteFailure::WriteError(write)) if write.code != DUPLICATE_KEY => {
            format!("MongoDB says {} (code {})", write.message, write.code)
        }
        ErrorKind::Write(WriteFailure::WriteConcernError(write)) => {
            format!("MongoDB says {} (code {})", write.message, write.code)
        }
        kind => kind.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_repetition_mends_is_told_from_what_it_does_not() {
        let cut = DriverError::from(std::io::Error::from(std::io::ErrorKind::ConnectionReset));
        assert!(matches!(fault(cut), Error::StoreUnavailable { cause } if cause.contains("reset")));
        for code in [10107, 91, 11600, 189, 64, 50] {
            assert!(matches!(fault_of_code(code, "x"), Error::StoreUnavailable { .. }), "{code}");
        }
        for code in [121, 11000, 2, 59] {
            assert!(matches!(fault_of_code(code, "x"), Error::Internal { .. }), "{code}");
        }
        assert!(matches!(fault(DriverError::custom("a bug")), Error::Internal { .. }));
    }
}
