//! eremois: a model-serving server. A dynamic batching queue feeds models written on candle; a thin
//! HTTP layer carries the application and compatible APIs.
//!
//! The way of a request, one type per place: bytes, the protocol's body, [`request::Request`],
//! [`serve::ticket::Ticket`], [`serve::batch::Batch`], [`model::pack::PackedInput`], device tensors,
//! [`model::InFlight`], [`model::Rows`], [`output::Output`], the protocol's response.
//!
//! Dependencies point one way: `main -> cli -> app -> api -> jobs -> inference -> serve -> model -> ops`;
//! `inference`, `jobs` and `api` also see `store`; `load` stands alone. The words all of them share are in [`request`], [`output`], [`error`] and [`metrics`].
//! `docs/architecture.md` is the map; `tests/tidy.rs` checks the rule.

pub mod api;
pub mod app;
pub mod cli;
pub mod config;
pub mod error;
pub mod inference;
pub mod jobs;
pub mod load;
pub mod metrics;
pub mod model;
pub mod ops;
pub mod output;
pub mod request;
pub mod serve;
pub mod store;

pub use error::{Error, Result};

#[cfg(test)]
extern crate self as eremois; // lets unit tests share tests/common with the integration tests
