//! What callers in this process say about the requests that they put through the router themselves.

use axum::http::Extensions;

/// Marks a request whose answer nobody waits for now: it is computed with [`crate::request::Priority::Background`].
///
/// An extension of the request, and so nothing that could come over the network: no client can ask for it, nor be held
/// back by it.
#[derive(Debug, Clone, Copy)]
pub struct Background(());

impl Background {
    /// Marks the request that these extensions are of.
    pub fn mark(extensions: &mut Extensions) {
        extensions.insert(Self(()));
    }
}
