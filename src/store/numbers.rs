//! What is asked of all records together: how much was used, by whom, and how well it went. Plain values.
//!
//! Every store gives the same numbers. What they have in common is here: which records count, how a duration is rounded
//! ([`histogram`]), and how rows come of what a store has counted ([`usage`], [`quality`]).

pub mod histogram;
pub mod quality;
pub mod usage;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::record::{InferenceId, Norms, Record, StoredUsage, Timings};
use crate::{Error, Result};

/// Most rows of an answer on usage.
pub const MAX_LIMIT: usize = 10_000;

/// Most versions of models that an answer on quality tells of.
pub const MAX_VERSIONS: usize = 1000;

/// Labels, and kinds of errors, that are told one by one; the rest as a sum.
pub const MAX_WORDS: usize = 20;

/// What usage can be told by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dimension {
    Model,
    Version,
    User,
    /// The day in UTC on which the inference was asked for, as `2026-11-25`.
    Day,
    /// The protocol.
    Source,
    Status,
}

impl Dimension {
    /// All there are.
    pub const ALL: [Self; 6] = [Self::Model, Self::Version, Self::User, Self::Day, Self::Source, Self::Status];

    /// The word of the API and of every store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Version => "version",
            Self::User => "user",
            Self::Day => "day",
            Self::Source => "source",
            Self::Status => "status",
        }
    }
}

/// Whose usage is asked for, and by what it is told: all conditions hold, as in a list.
#[derive(Debug, Clone, PartialEq)]
pub struct UsageQuery {
    pub model: Option<String>,
    pub user: Option<String>,
    /// Created at this time or later.
    pub from: Option<Timestamp>,
    /// Created before this time.
    pub to: Option<Timestamp>,
    /// At least one, none twice.
    pub by: Vec<Dimension>,
    /// 1 to [`MAX_LIMIT`].
    pub limit: usize,
    /// How long it may take.
    pub timeout: Duration,
}

/// What was used by the records of one group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageRow {
    /// A value for each of [`UsageQuery::by`]. Only a user may be `None`: that of records without one.
    pub group: Vec<Option<String>>,
    pub usage: Usage,
}

/// Sums over records, whatever their status.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub num_requests: u64,
    pub num_failed: u64,
    pub num_inputs: u64,
    /// Inputs whose result came from the cache.
    pub num_cached: u64,
    pub num_tokens: u64,
    pub num_chars: u64,
    /// Of [`Timings::inference_us`], which is a mean over a request's inputs and the whole batch's time in each request of
    /// that batch: a measure of what requests waited for, and more than the time a device was busy.
    pub inference_us: u64,
}

/// Which versions are asked about.
#[derive(Debug, Clone, PartialEq)]
pub struct QualityQuery {
    pub model: Option<String>,
    pub version: Option<String>,
    pub from: Option<Timestamp>,
    pub to: Option<Timestamp>,
    /// How long it may take.
    pub timeout: Duration,
}

/// How well a version of a model did.
#[derive(Debug, Clone, PartialEq)]
pub struct QualityRow {
    pub model: String,
    pub version: String,
    /// When the first of its records was made, of those asked for.
    pub first_used: Timestamp,
    /// Records of any status.
    pub num_requests: u64,
    pub num_succeeded: u64,
    pub num_failed: u64,
    /// Failures by their kind.
    pub errors: Words,
    /// From the request to its result, of those that succeeded.
    pub total: Latency,
    /// From the launch of a batch to its rows, of those that succeeded and did not come from the cache as a whole.
    pub inference: Latency,
    pub feedback: FeedbackSummary,
    /// `None` where no record has norms.
    pub norms: Option<NormsSummary>,
}

/// Quantiles of a duration, in microseconds, each within 5 %: see [`histogram`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Latency {
    pub num: u64,
    /// `None` where nothing was measured.
    pub quantiles: Option<Quantiles>,
}

/// By nearest rank: the smallest value that so many in a hundred do not exceed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantiles {
    pub p50_us: u64,
    pub p90_us: u64,
    pub p99_us: u64,
}

/// What was said of a version's results.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FeedbackSummary {
    pub num: u64,
    /// Of those, with a score.
    pub num_scored: u64,
    /// Above and below zero.
    pub num_positive: u64,
    pub num_negative: u64,
    pub mean_score: Option<f64>,
    pub labels: Words,
}

/// Words and how often each was found, most often first, equals in the order of their bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Words {
    /// At most [`MAX_WORDS`].
    pub top: Vec<(String, u64)>,
    /// How often any other was.
    pub num_other: u64,
}

/// Lengths of a version's output rows.
#[derive(Debug, Clone, PartialEq)]
pub struct NormsSummary {
    pub num_rows: u64,
    pub mean: f64,
    /// Of all rows, not of a sample. Below a millionth of the mean it is rounding.
    pub std: f64,
    pub min: f64,
    pub max: f64,
    /// How far the mean is from that of the version before.
    pub drift: Option<Drift>,
}

/// Against the version of the same model that was first used just before, of those that have norms.
#[derive(Debug, Clone, PartialEq)]
pub struct Drift {
    pub previous_version: String,
    /// This mean less the previous one.
    pub mean_change: f64,
}

/// Rows of an answer, and what is missing from it.
#[derive(Debug, Clone, PartialEq)]
pub struct Numbers<T> {
    pub rows: Vec<T>,
    /// Whether there would be more rows.
    pub is_truncated: bool,
    /// Writes that are acknowledged and not counted yet, at most: those in a journal, on their way to the store.
    pub num_pending: usize,
}

/// What the numbers take of a record.
#[derive(Debug, Clone, Copy)]
pub struct Observed<'a> {
    pub id: InferenceId,
    pub model: &'a str,
    pub version: &'a str,
    pub user: Option<&'a str>,
    pub source: &'a str,
    pub status: &'a str,
    /// The kind of its failure.
    pub error: Option<&'a str>,
    pub usage: StoredUsage,
    pub timings: Timings,
    pub norms: Option<Norms>,
}

impl<'a> Observed<'a> {
    /// Of a whole record.
    pub fn of(record: &'a Record) -> Self {
        let facts = &record.facts;
        Self {
            id: record.id,
            model: &facts.model,
            version: &facts.version,
            user: facts.user.as_deref(),
            source: &facts.source,
            status: facts.status.as_str(),
            error: facts.error.as_ref().map(|failure| failure.kind.as_str()),
            usage: facts.usage,
            timings: facts.timings,
            norms: facts.output_norms,
        }
    }

    /// Whether it is of this model and within this span of ids, which [`range`] makes of times.
    pub fn is_of(&self, model: Option<&str>, (first, end): (InferenceId, InferenceId)) -> bool {
        model.is_none_or(|model| model == self.model) && (first..end).contains(&self.id)
    }
}

/// Ids of records made at `from` or later and before `to`: from the first to before the second.
pub fn range(from: Option<Timestamp>, to: Option<Timestamp>) -> (InferenceId, InferenceId) {
    let first = from.map_or(InferenceId(uuid::Uuid::nil()), InferenceId::first_at);
    (first, to.map_or(InferenceId(uuid::Uuid::max()), InferenceId::first_at))
}

/// The day of an id in UTC, as `2026-11-25`.
pub fn day(id: &InferenceId) -> String {
    TimeZone::UTC.to_datetime(id.created_at()).date().to_string()
}

/// The end of an answer's time.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    timeout: Duration,
    end: Instant,
}

impl Limit {
    /// From now on.
    pub fn new(timeout: Duration) -> Self {
        Self { timeout, end: Instant::now() + timeout }
    }

    /// What is left of it.
    pub fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }

    /// Errors: [`Error::Deadline`] once it is over.
    pub fn check(&self) -> Result<()> {
        if self.left().is_zero() { Err(self.error()) } else { Ok(()) }
    }

    /// Waits for `work` as long as there is time. Errors: [`Error::Deadline`], and those of `work`.
    pub async fn bound<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::time::timeout_at(self.end.into(), work).await.unwrap_or_else(|_| Err(self.error()))
    }

    /// What is said when it is over.
    pub fn error(&self) -> Error {
        Error::Deadline { timeout: self.timeout }
    }
}

/// The values of the lowest keys, in bounded memory, whatever the order they come in: a key that is pushed out by lower
/// ones never comes back, so what is kept at the end was never lost in between.
#[derive(Debug)]
struct Lowest<K, V> {
    values: BTreeMap<K, V>,
    limit: usize,
    is_truncated: bool,
}

impl<K: Ord + Clone, V: Default> Lowest<K, V> {
    fn new(limit: usize) -> Self {
        Self { values: BTreeMap::new(), limit: limit.max(1), is_truncated: false }
    }

    /// The value of a key. `None` where there are enough lower ones.
    fn get(&mut self, key: &K) -> Option<&mut V> {
        if !self.values.contains_key(key) {
            if self.values.len() == self.limit {
                self.is_truncated = true;
                if self.values.last_key_value().is_some_and(|(highest, _)| highest < key) {
                    return None;
                }
                self.values.pop_last();
            }
            self.values.insert(key.clone(), V::default());
        }
        self.values.get_mut(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_keys_are_whole_in_any_order() {
        let mut keys: Vec<u32> = (0..1000).map(|i| i * 7919 % 100).collect();
        for limit in [1, 7, 99, 100, 101] {
            let mut lowest: Lowest<u32, u32> = Lowest::new(limit);
            keys.iter().for_each(|key| lowest.get(key).into_iter().for_each(|count| *count += 1));
            let expected: Vec<(u32, u32)> = (0..100).take(limit).map(|key| (key, 10)).collect();
            assert_eq!(lowest.values.into_iter().collect::<Vec<_>>(), expected);
            assert_eq!(lowest.is_truncated, limit < 100);
            keys.reverse();
        }
    }

    #[test]
    fn days_begin_at_midnight_of_utc() {
        let day_at = |text: &str| day(&InferenceId::first_at(text.parse().unwrap()));
        assert_eq!(day_at("2026-11-24T23:59:59.999Z"), "2026-11-24");
        assert_eq!(day_at("2026-11-25T00:30:00+01:00"), "2026-11-24");
        assert_eq!(day_at("2028-02-29T00:00:00Z"), "2028-02-29");
    }
}
