//! The one place where parts are joined and drained.

pub mod connections;
pub mod logs;
pub mod reload;
