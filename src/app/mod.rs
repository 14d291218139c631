//! The one place where parts are joined and drained.

pub mod logs;
