//! The layer that makes a fault of a panic.

use std::panic::AssertUnwindSafe;

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::FutureExt;

use super::Fault;

/// Layer: a bug in one request must not end the server, nor the connection's other requests.
pub async fn catch_panic(request: Request, next: Next) -> Response {
    // Nothing survives an unwound handler but what is shared behind locks that poison or atomics.
    match AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        Err(panic) => {
            let cause = panic
                .downcast_ref::<&str>()
                .map(|s| s.to_string())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "a panic without a message".to_string());
            Fault::Panic { cause }.into_response()
        }
    }
}
