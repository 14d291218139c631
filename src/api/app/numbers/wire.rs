//! Usage and quality as the application API writes them.

use serde::Serialize;
use utoipa::ToSchema;

use super::super::wire;
use crate::store::numbers::{Dimension, Latency as Measured, Numbers, QualityRow, Usage, UsageRow, Words};

/// What was used.
#[derive(Debug, Serialize, ToSchema)]
pub struct UsageList {
    #[schema(example = "list")]
    object: &'static str,
    /// One a group, in the order of the groups' values as `group_by` names them.
    data: Vec<UsageItem>,
    /// Whether there are more groups than `limit`: those of the lowest values are told, each whole.
    truncated: bool,
    /// Writes that are acknowledged and not counted yet, at most: they wait in the journal for MongoDB.
    pending: usize,
}

/// Sums over the records of a group; of its fields there are those of `group_by`.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct UsageItem {
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    /// Null for requests without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    user: Option<Option<String>>,
    /// In UTC.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "2026-11-25")]
    day: Option<String>,
    /// The protocol that was asked: "application", "openai", "tei", "oip", "tensorflow", "jina" or "cohere".
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<String>,
    /// Of any status.
    requests: u64,
    failed: u64,
    inputs: u64,
    /// Inputs whose result came from the cache.
    cached_inputs: u64,
    tokens: u64,
    characters: u64,
    /// Sum of the requests' `timings.inference_us`.
    inference_us: u64,
}

impl UsageList {
    /// `by` is what the rows are grouped by.
    pub fn new(by: &[Dimension], told: Numbers<UsageRow>) -> Self {
        Self {
            object: "list",
            data: told.rows.into_iter().map(|row| UsageItem::new(by, row)).collect(),
            truncated: told.is_truncated,
            pending: told.num_pending,
        }
    }
}

impl UsageItem {
    fn new(by: &[Dimension], row: UsageRow) -> Self {
        let Usage { num_requests, num_failed, num_inputs, num_cached, num_tokens, num_chars, inference_us } = row.usage;
        let mut item = Self {
            requests: num_requests,
            failed: num_failed,
            inputs: num_inputs,
            cached_inputs: num_cached,
            tokens: num_tokens,
            characters: num_chars,
            inference_us,
            ..Self::default()
        };
        for (dimension, value) in by.iter().zip(row.group) {
            match dimension {
                Dimension::Model => item.model = value,
                Dimension::Version => item.version = value,
                Dimension::User => item.user = Some(value),
                Dimension::Day => item.day = value,
                Dimension::Source => item.source = value,
                Dimension::Status => item.status = value,
            }
        }
        item
    }
}

/// How well versions of models did.
#[derive(Debug, Serialize, ToSchema)]
pub struct QualityList {
    #[schema(example = "list")]
    object: &'static str,
    /// By model, and those of a model in the order of their first use.
    data: Vec<QualityItem>,
    /// Whether there are more than 1,000 versions.
    truncated: bool,
    /// As in the list of usage.
    pending: usize,
}

/// How well a version of a model did.
#[derive(Debug, Serialize, ToSchema)]
pub struct QualityItem {
    model: String,
    version: String,
    /// RFC 3339; within the time that was asked for.
    first_used_at: String,
    /// Of any status.
    requests: u64,
    succeeded: u64,
    failed: u64,
    /// Share of the failed in those that succeeded or failed; null where none did either.
    #[schema(required)]
    error_rate: Option<f64>,
    /// Failures by kind, most frequent first, at most 20 kinds.
    errors: Vec<ErrorCount>,
    latency: Latencies,
    feedback: FeedbackNumbers,
    /// Null where no output has rows, or none was kept since norms are.
    #[schema(required)]
    output_norms: Option<OutputNorms>,
}

/// A kind of error and how often it was.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorCount {
    #[schema(example = "deadline")]
    kind: String,
    count: u64,
}

/// Where the time went, of requests that succeeded.
#[derive(Debug, Serialize, ToSchema)]
pub struct Latencies {
    /// From the request to its result.
    total: Latency,
    /// From the launch of its batch to the rows; without requests that came from the cache as a whole.
    inference: Latency,
}

/// Quantiles in microseconds, right to 5 %; null where nothing was measured.
#[derive(Debug, Serialize, ToSchema)]
pub struct Latency {
    count: u64,
    #[schema(required)]
    p50_us: Option<u64>,
    #[schema(required)]
    p90_us: Option<u64>,
    #[schema(required)]
    p99_us: Option<u64>,
}

impl From<Measured> for Latency {
    fn from(Measured { num, quantiles }: Measured) -> Self {
        Self {
            count: num,
            p50_us: quantiles.map(|q| q.p50_us),
            p90_us: quantiles.map(|q| q.p90_us),
            p99_us: quantiles.map(|q| q.p99_us),
        }
    }
}

/// What was said of the results.
#[derive(Debug, Serialize, ToSchema)]
pub struct FeedbackNumbers {
    count: u64,
    /// Of those, with a score.
    scored: u64,
    #[schema(required)]
    mean_score: Option<f64>,
    /// With a score above zero.
    positive: u64,
    /// With a score below zero.
    negative: u64,
    /// The most frequent, at most 20.
    labels: Vec<LabelCount>,
    /// How often any other label was given.
    other_labels: u64,
}

/// A label of feedback and how often it was given.
#[derive(Debug, Serialize, ToSchema)]
pub struct LabelCount {
    label: String,
    count: u64,
}

/// L2 norms of the rows that were answered: 1 each where outputs are normalised.
#[derive(Debug, Serialize, ToSchema)]
pub struct OutputNorms {
    /// Rows.
    count: u64,
    mean: f64,
    std: f64,
    min: f64,
    max: f64,
    /// The version of this model that was first used just before, of those with norms.
    #[schema(required)]
    previous_version: Option<String>,
    /// This mean less that version's.
    #[schema(required)]
    mean_change: Option<f64>,
}

impl From<Numbers<QualityRow>> for QualityList {
    fn from(told: Numbers<QualityRow>) -> Self {
        Self {
            object: "list",
            data: told.rows.into_iter().map(QualityItem::from).collect(),
            truncated: told.is_truncated,
            pending: told.num_pending,
        }
    }
}

impl From<QualityRow> for QualityItem {
    fn from(row: QualityRow) -> Self {
        let num_ended = row.num_succeeded + row.num_failed;
        let Words { top: errors, num_other: _ } = row.errors;
        let feedback = row.feedback;
        Self {
            model: row.model,
            version: row.version,
            first_used_at: wire::time(row.first_used),
            requests: row.num_requests,
            succeeded: row.num_succeeded,
            failed: row.num_failed,
            error_rate: (num_ended > 0).then(|| row.num_failed as f64 / num_ended as f64),
            errors: errors.into_iter().map(|(kind, count)| ErrorCount { kind, count }).collect(),
            latency: Latencies { total: row.total.into(), inference: row.inference.into() },
            feedback: FeedbackNumbers {
                count: feedback.num,
                scored: feedback.num_scored,
                mean_score: feedback.mean_score,
                positive: feedback.num_positive,
                negative: feedback.num_negative,
                labels: feedback.labels.top.into_iter().map(|(label, count)| LabelCount { label, count }).collect(),
                other_labels: feedback.labels.num_other,
            },
            output_norms: row.norms.map(|norms| OutputNorms {
                count: norms.num_rows,
                mean: norms.mean,
                std: norms.std,
                min: norms.min,
                max: norms.max,
                mean_change: norms.drift.as_ref().map(|drift| drift.mean_change),
                previous_version: norms.drift.map(|drift| drift.previous_version),
            }),
        }
    }
}
