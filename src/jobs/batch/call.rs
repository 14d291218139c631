//! What answers the requests of batches: the routes of the server, handed in from above.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;

use crate::store::record::InferenceId;

/// Answers a request as the route of its URL would answer a client.
#[async_trait]
pub trait Endpoints: Send + Sync + 'static {
    /// Dropping the future drops the work.
    async fn call(&self, call: EndpointCall) -> EndpointAnswer;
}

/// A request of a batch.
#[derive(Debug, Clone)]
pub struct EndpointCall {
    /// One of [`super::ENDPOINTS`].
    pub url: String,
    /// A JSON object.
    pub body: Bytes,
    /// For logs and the answer.
    pub request_id: String,
    /// The record of its result, where results are kept: the same each time it is asked.
    pub record_id: InferenceId,
    /// Nobody waits any more then.
    pub deadline: Instant,
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct EndpointAnswer {
    pub status: u16,
    /// JSON.
    pub body: Bytes,
    pub num_tokens: u64,
    pub model: Option<Arc<str>>,
    pub again: Again,
}

/// Whether a request that was answered so should be asked again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    No,
    /// The server is loading, ending or has no room: not before this time, but as often as it takes.
    Later(Duration),
    /// It may be the request's own fault: a few times.
    FewTimes(Duration),
}
