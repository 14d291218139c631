//! The same table for gRPC: from a fault to a code.

use tonic::{Code, Status};

use super::{Fault, Kind};
use crate::Error;

impl Kind {
    /// The code of gRPC's that clients decide by whether to try again.
    pub fn grpc_code(self) -> Code {
        match self {
            Self::Malformed
            | Self::Empty
            | Self::TooLarge
            | Self::Invalid
            | Self::UnsupportedMediaType
            | Self::NotAcceptable => Code::InvalidArgument,
            Self::ModelNotFound | Self::NotFound => Code::NotFound,
            Self::RouteNotFound | Self::MethodNotAllowed => Code::Unimplemented,
            Self::QueueFull | Self::Overloaded => Code::ResourceExhausted,
            Self::Loading
            | Self::Draining
            | Self::Unhealthy
            | Self::OutOfMemory
            | Self::StoreUnavailable
            | Self::JournalFull => Code::Unavailable,
            Self::Conflict => Code::Aborted,
            Self::RequestTimeout | Self::Deadline => Code::DeadlineExceeded,
            Self::Failed | Self::DeviceLost | Self::Internal => Code::Internal,
        }
    }
}

/// What a gRPC client sees of a fault, and the log line of what it must not see. While the server is starting, a model
/// that is not known is one not known yet.
pub fn grpc_status(fault: &Fault, is_starting: bool) -> Status {
    if let Fault::Error(Error::UnknownModel { model, .. }) = fault
        && is_starting
    {
        return grpc_status(&Error::Loading { model: model.clone() }.into(), false);
    }
    let kind = fault.class().kind;
    if let Some(cause) = fault.cause() {
        tracing::error!(kind = kind.as_str(), cause, "request failed");
    }
    Status::new(kind.grpc_code(), fault.message())
}
