//! One fault of each form, for the document and for the tests of the table.

use std::time::Duration;

use super::{Fault, JSON};
use crate::Error;
use crate::api::compress::KNOWN;

impl Fault {
    /// One fault of each form, for the document and the tests of the table.
    pub fn samples() -> Vec<Self> {
        let model = || "all-MiniLM-L6-v2".to_string();
        vec![
            Error::Malformed { field: "input[1]".into(), reason: "expected a text or a list of token ids".into() }
                .into(),
            Error::Empty { field: "input".into() }.into(),
            Error::UnknownModel { model: "gpt-9".into(), served: model() }.into(),
            Error::TooLarge { field: "input[0]".into(), got: 700, limit: 256, unit: "tokens" }.into(),
            Error::Invalid { field: "dimensions".into(), reason: "expected 1 to 384, got 1024".into() }.into(),
            Error::QueueFull { model: model(), limit: 4096, retry_after: Duration::from_secs(2) }.into(),
            Error::Overloaded {
                model: model(),
                expected: Duration::from_secs(31),
                timeout: Duration::from_secs(30),
                retry_after: Duration::from_secs(31),
            }
            .into(),
            Error::Loading { model: model() }.into(),
            Error::Draining.into(),
            Error::Unhealthy { model: model(), reason: "the heartbeat failed".into() }.into(),
            Error::Deadline { timeout: Duration::from_secs(30) }.into(),
            Error::NotFound { what: "inference", id: "inf_0192f3a1c7d27b3c9d4e5f60718293a4".into() }.into(),
            Error::Conflict { field: "idempotency-key".into(), reason: "used with another request".into() }.into(),
            Error::StoreUnavailable { cause: "no primary".into() }.into(),
            Error::JournalFull { cause: "1 GiB of 1 GiB".into() }.into(),
            Error::Forward { model: model(), cause: "a bug".into() }.into(),
            Error::OutOfMemory { cause: "a bug".into() }.into(),
            Error::DeviceLost { cause: "a bug".into() }.into(),
            Error::Internal { cause: "a bug".into() }.into(),
            Self::NoRoute { path: "/v1/embedding".into() },
            Self::MethodNotAllowed { method: "GET".into(), path: "/v1/embeddings".into() },
            Self::MediaType { got: "text/plain".into(), expected: JSON },
            Self::ContentEncoding { got: "compress".into(), expected: KNOWN },
            Self::NotAcceptable { got: "text/html".into() },
            Self::SlowBody { timeout: Duration::from_secs(30) },
            Self::Panic { cause: "a bug".into() },
        ]
    }
}
