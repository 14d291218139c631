//! The one error type. Variants carry operands; `api/status.rs` alone turns them into a status.

use std::path::PathBuf;
use std::time::Duration;

/// What every fallible function of the crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, as values. Cheap to clone: one failed batch answers many tickets.
///
/// Messages are lowercase, name the field, and say the limit where there is one.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    // ---- a client's request -------------------------------------------------------------------
    /// Not the form the protocol asks for.
    #[error("{field}: {reason}")]
    Malformed { field: String, reason: String },
    /// A list or text without anything in it.
    #[error("{field} must not be empty")]
    Empty { field: String },
    #[error("no model is named `{model}`; served: {served}")]
    UnknownModel { model: String, served: String },
    /// More than a configured or model limit allows. `unit` is plural: "tokens", "inputs", "bytes".
    #[error("{field} has {got} {unit}, the limit is {limit}")]
    TooLarge { field: String, got: usize, limit: usize, unit: &'static str },
    /// Well formed, but not a value the model takes (a name, a dtype, a dimension, a token id).
    #[error("{field}: {reason}")]
    Invalid { field: String, reason: String },

    // ---- the server's state ---------------------------------------------------------------------
    #[error("the queue of model `{model}` is full ({limit} entries); retry in {retry_after:?}")]
    QueueFull { model: String, limit: usize, retry_after: Duration },
    /// What waits would not leave time for this request before its deadline. `expected` is from now to an answer.
    #[error(
        "model `{model}` would answer in about {expected:.1?}, the deadline is {timeout:?}; retry in {retry_after:?}"
    )]
    Overloaded { model: String, expected: Duration, timeout: Duration, retry_after: Duration },
    #[error("model `{model}` is loading")]
    Loading { model: String },
    #[error("the server is draining: it finishes what it accepted and takes no more")]
    Draining,
    /// The device worker is down or its heartbeat failed.
    #[error("model `{model}` is not healthy: {reason}")]
    Unhealthy { model: String, reason: String },
    #[error("nothing came within the deadline of {timeout:?}")]
    Deadline { timeout: Duration },

    // ---- what is kept -------------------------------------------------------------------------
    /// `what` is "inference", "file", "batch".
    #[error("no {what} has the id `{id}`")]
    NotFound { what: &'static str, id: String },
    /// Against what is kept already: an idempotency key with another request, a batch that has ended.
    #[error("{field}: {reason}")]
    Conflict { field: String, reason: String },
    /// The database cannot be reached or does not answer in time. The cause is for logs.
    #[error("the store is not available: {cause}")]
    StoreUnavailable { cause: String },
    /// The database is away and the journal that stands in for it is full, or cannot be written.
    #[error("results cannot be kept now: {cause}; requests with `store: false` are answered")]
    JournalFull { cause: String },

    /// A backup that cannot be written, or that is not whole, not as it was written, or not opened by the key.
    #[error("{file}: {reason}", file = file.display())]
    Backup { file: PathBuf, reason: String },

    // ---- ours ------------------------------------------------------------------------------------
    /// The forward of the batch failed or panicked. The cause is for logs.
    #[error("model `{model}` failed on this batch: {cause}")]
    Forward { model: String, cause: String },
    /// The device had no memory for a batch, or for one input alone. Smaller ones may fit, and later this one too.
    #[error("the device has no memory left: {cause}")]
    OutOfMemory { cause: String },
    /// The device answers every call of this process with an error, or not at all, until the process starts anew.
    #[error("the device is lost to this process: {cause}")]
    DeviceLost { cause: String },
    #[error("internal error: {cause}")]
    Internal { cause: String },

    // ---- loading a model ---------------------------------------------------------------------------
    /// A tensor that is missing, or of another shape or dtype than the architecture needs.
    #[error("{file}: tensor `{tensor}`: expected {expected}, got {got}", file = file.display())]
    Tensor { file: PathBuf, tensor: String, expected: String, got: String },
    #[error("{file}: sha256 is {got}, the manifest says {expected}", file = file.display())]
    Checksum { file: PathBuf, expected: String, got: String },
    /// A file of the model that cannot be read or understood; `reason` names the field.
    #[error("{file}: {reason}", file = file.display())]
    ModelFile { file: PathBuf, reason: String },
    /// Operands an op cannot take.
    #[error("{op}: {operand}: expected {expected}, got {got}")]
    Shape { op: &'static str, operand: &'static str, expected: String, got: String },

    // ---- settings --------------------------------------------------------------------------------
    /// All faults of the settings at once, one a line.
    #[error("{}", faults.join("\n"))]
    Config { faults: Vec<String> },
}

impl Error {
    /// The same error with its field in the words of a client's protocol. Only errors of a request's form have one that
    /// clients wrote: of the others nothing changes.
    pub fn with_field(self, rename: impl FnOnce(String) -> String) -> Self {
        match self {
            Self::Malformed { field, reason } => Self::Malformed { field: rename(field), reason },
            Self::Empty { field } => Self::Empty { field: rename(field) },
            Self::Invalid { field, reason } => Self::Invalid { field: rename(field), reason },
            Self::TooLarge { field, got, limit, unit } => Self::TooLarge { field: rename(field), got, limit, unit },
            other => other,
        }
    }
}
