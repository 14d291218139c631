//! Shared by the tests and benches.
#![allow(dead_code)] // each test binary uses its own part

pub mod engine;
pub mod fake;
pub mod http;
pub mod process;
pub mod records;
pub mod servers;
