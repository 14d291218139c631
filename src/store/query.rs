//! Which records a list asks for, and its pages.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::record::{InferenceId, Record, Status};

/// Most records of a page.
pub const MAX_LIMIT: usize = 1000;

/// Which records are wanted: all conditions hold. Newest first, by id, which rises with the time of creation; so a page
/// is a range of ids that begins after the last one of the page before, however many are written meanwhile.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Query {
    pub model: Option<String>,
    pub user: Option<String>,
    pub status: Option<Status>,
    /// Created at this time or later.
    pub from: Option<Timestamp>,
    /// Created before this time.
    pub to: Option<Timestamp>,
    pub metadata: BTreeMap<String, String>,
    /// Only ids smaller than this one: the last of the page before.
    pub after: Option<InferenceId>,
    /// 1 to [`MAX_LIMIT`].
    pub limit: usize,
    /// Whether the records come with their outputs, which are most of their bytes.
    pub with_output: bool,
}

/// A page of records.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Page {
    pub records: Vec<Record>,
    /// [`Query::after`] of the next page; `None` on the last.
    pub next: Option<InferenceId>,
}
