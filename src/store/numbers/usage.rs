//! Rows of usage out of records.

use super::{Dimension, Lowest, Numbers, Observed, Usage, UsageQuery, UsageRow, day, range};
use crate::store::record::{InferenceId, Status};

/// Milliseconds of a day.
const DAY_MS: i64 = 24 * 60 * 60 * 1000;

/// Adds records up by group, for stores that hand them over one by one. Keeps no more groups than are asked for.
pub struct UsageFold<'a> {
    query: &'a UsageQuery,
    span: (InferenceId, InferenceId),
    groups: Lowest<Vec<Option<String>>, Usage>,
    /// The group of the record at hand, used again for each.
    group: Vec<Option<String>>,
    /// The last day that was written out, by its number: most records are of the same as the one before.
    day: (i64, String),
}

impl<'a> UsageFold<'a> {
    pub fn new(query: &'a UsageQuery) -> Self {
        let groups = Lowest::new(query.limit.min(super::MAX_LIMIT));
        Self { query, span: range(query.from, query.to), groups, group: Vec::new(), day: (-1, String::new()) }
    }

    /// Counts a record, if it is asked for.
    pub fn add(&mut self, one: &Observed) {
        let query = self.query;
        let is_theirs = query.user.is_none() || query.user.as_deref() == one.user;
        if !is_theirs || !one.is_of(query.model.as_deref(), self.span) {
            return;
        }
        let mut group = std::mem::take(&mut self.group);
        group.clear();
        group.extend(query.by.iter().map(|dimension| match dimension {
            Dimension::Model => Some(one.model.to_string()),
            Dimension::Version => Some(one.version.to_string()),
            Dimension::User => one.user.map(str::to_string),
            Dimension::Day => Some(self.day_of(&one.id)),
            Dimension::Source => Some(one.source.to_string()),
            Dimension::Status => Some(one.status.to_string()),
        }));
        if let Some(usage) = self.groups.get(&group) {
            usage.num_requests += 1;
            usage.num_failed += u64::from(one.status == Status::Failed.as_str());
            usage.num_inputs += one.usage.num_inputs;
            usage.num_cached += one.usage.num_cached;
            usage.num_tokens += one.usage.num_tokens;
            usage.num_chars += one.usage.num_chars;
            usage.inference_us += one.timings.inference_us;
        }
        self.group = group;
    }

    fn day_of(&mut self, id: &InferenceId) -> String {
        let number = id.created_at().as_millisecond().div_euclid(DAY_MS);
        if self.day.0 != number {
            self.day = (number, day(id));
        }
        self.day.1.clone()
    }

    /// All groups, in the order of their values.
    pub fn finish(self) -> Numbers<UsageRow> {
        let Lowest { values, is_truncated, .. } = self.groups;
        let rows = values.into_iter().map(|(group, usage)| UsageRow { group, usage }).collect();
        Numbers { rows, is_truncated, num_pending: 0 }
    }
}
