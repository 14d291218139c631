//! The outcome of a run as plain values: what `--json` writes and the table shows. docs/bench.md explains each key.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::drive::{Pace, Until};
use super::objective::Verdict;
use super::record::{Failure, Record};
use super::{Plan, StepRun};
use crate::metrics::BUILD;

/// Changes when a key changes its meaning or goes away; new keys may come.
pub const SCHEMA: &str = "eremois-bench/1";

/// Units: as each key says; latencies in milliseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub schema: &'static str,
    /// RFC 3339, UTC.
    pub started: String,
    pub version: &'static str,
    pub commit: &'static str,
    /// Of the machine the load came from.
    pub num_cpus: usize,
    pub workload: Workload,
    pub num_rounds: usize,
    pub warmup_s: f64,
    pub timeout_s: f64,
    pub targets: Vec<TargetReport>,
    /// The first target against each other one, by step; empty for one target.
    pub comparisons: Vec<Comparison>,
    pub objectives: Vec<Verdict>,
}

/// What was sent.
#[derive(Debug, Clone, Serialize)]
pub struct Workload {
    /// "8..256:log-uniform, seed 1", or the file.
    pub source: String,
    pub num_texts: usize,
    pub num_words: usize,
    pub inputs_per_request: usize,
}

/// One server's part.
#[derive(Debug, Clone, Serialize)]
pub struct TargetReport {
    pub name: String,
    pub url: String,
    pub api: String,
    pub model: Option<String>,
    /// Smallest cosine between a text's vectors of this target and of the first; where answers are checked.
    pub min_cosine: Option<f64>,
    pub steps: Vec<StepReport>,
}

/// One server under one load.
#[derive(Debug, Clone, Serialize)]
pub struct StepReport {
    /// "concurrency 32", "rate 100/s".
    pub step: String,
    /// "closed" or "open".
    pub loop_kind: &'static str,
    /// Requests at once, or requests a second.
    pub load: f64,
    /// All rounds as one.
    pub total: Figures,
    pub rounds: Vec<Figures>,
}

/// One step's figures.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    pub window_s: f64,
    pub num_requests: u64,
    /// 2xx and, where checked, right.
    pub num_ok: u64,
    pub error_rate: f64,
    /// Good answers within the window; so are the next two.
    pub requests_per_s: f64,
    pub inputs_per_s: f64,
    /// As the server counts them; null where it does not say.
    pub tokens_per_s: Option<f64>,
    pub num_bytes: u64,
    /// Of good answers; null without one.
    pub latency_ms: Option<Latency>,
    pub statuses: BTreeMap<u16, u64>,
    pub failures: BTreeMap<Failure, u64>,
    pub num_wrong: u64,
    pub wrong_examples: Vec<String>,
    /// Sent more than 10 ms after the intended time.
    pub num_late: u64,
    pub max_behind_ms: f64,
    pub max_in_flight: u64,
}

/// Of the requests that count, in the unit of the field that holds it.
#[derive(Debug, Clone, Serialize)]
pub struct Latency {
    pub min: f64,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    #[serde(rename = "p99.9")]
    pub p99_9: f64,
    pub max: f64,
}

/// `first / other` in good answers a second, round by round.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    pub first: String,
    pub other: String,
    pub step: String,
    /// Medians over the rounds.
    pub first_requests_per_s: f64,
    pub other_requests_per_s: f64,
    /// Of each round's two figures, which stood next to each other in time; then their median and extremes.
    pub ratios: Vec<f64>,
    pub ratio: f64,
    pub min_ratio: f64,
    pub max_ratio: f64,
}

impl Report {
    /// `cosines` [num_targets]: each target's smallest cosine to the first; `None` for the first itself
    /// and where answers are not checked.
    pub fn new(plan: &Plan, workload: Workload, runs: Vec<StepRun>, cosines: Vec<Option<f64>>, at: SystemTime) -> Self {
        let of = |target: usize, pace: Pace| runs.iter().filter(move |run| run.target == target && run.pace == pace);
        let steps = |target: usize| -> Vec<(StepReport, Record)> {
            let step = |&pace: &Pace| {
                let mut total = Record::default();
                of(target, pace).for_each(|run| total.merge(&run.record));
                let rounds = of(target, pace).map(|run| Figures::of(&run.record)).collect();
                (StepReport::new(pace, Figures::of(&total), rounds), total)
            };
            plan.paces.iter().map(step).collect()
        };
        let all: Vec<Vec<(StepReport, Record)>> = (0..plan.targets.len()).map(steps).collect();
        let judged = all.first().into_iter().flatten();
        let objectives =
            judged.flat_map(|(s, record)| plan.objectives.iter().map(|o| o.judge(&s.step, record))).collect();
        let named = plan.targets.iter().zip(all).zip(cosines);
        let targets: Vec<TargetReport> = named
            .map(|((target, steps), min_cosine)| TargetReport {
                name: target.name.clone(),
                url: target.uri.to_string(),
                api: target.api.to_string(),
                model: target.model.clone(),
                min_cosine,
                steps: steps.into_iter().map(|(step, _)| step).collect(),
            })
            .collect();
        Self {
            schema: SCHEMA,
            started: humantime::format_rfc3339_seconds(at).to_string(),
            version: BUILD.version,
            commit: BUILD.commit,
            num_cpus: std::thread::available_parallelism().map_or(1, usize::from),
            workload,
            num_rounds: plan.rounds.max(1),
            warmup_s: plan.warmup.as_secs_f64(),
            timeout_s: plan.limits.timeout.as_secs_f64(),
            comparisons: comparisons(&targets),
            targets,
            objectives,
        }
    }

    /// The objectives that were missed, as lines for people.
    pub fn missed(&self) -> Vec<String> {
        let missed = self.objectives.iter().filter(|verdict| !verdict.met);
        missed.map(|v| format!("{} missed at {}: {}, the limit is {}", v.objective, v.step, v.got, v.limit)).collect()
    }
}

impl StepReport {
    fn new(pace: Pace, total: Figures, rounds: Vec<Figures>) -> Self {
        let (loop_kind, load) = match pace {
            Pace::Closed { concurrency } => ("closed", concurrency as f64),
            Pace::Open { rate } => ("open", rate),
        };
        Self { step: pace_words(pace), loop_kind, load, total, rounds }
    }
}

impl Figures {
    fn of(record: &Record) -> Self {
        Self {
            window_s: record.window.as_secs_f64(),
            num_requests: record.num_requests,
            num_ok: record.num_ok,
            error_rate: record.error_rate(),
            requests_per_s: record.ok_per_s(),
            inputs_per_s: record.inputs_per_s(),
            tokens_per_s: record.tokens_per_s(),
            num_bytes: record.num_bytes,
            latency_ms: Latency::of(record),
            statuses: record.statuses.clone(),
            failures: record.failures.clone(),
            num_wrong: record.num_wrong,
            wrong_examples: record.wrong_examples.clone(),
            num_late: record.num_late,
            max_behind_ms: ms(record.max_behind),
            max_in_flight: record.max_in_flight,
        }
    }
}

impl Latency {
    fn of(record: &Record) -> Option<Self> {
        let at = |quantile| record.latency(quantile).map(ms);
        Some(Self {
            min: ms(record.min_latency()?),
            mean: ms(record.mean_latency()?),
            p50: at(0.5)?,
            p90: at(0.9)?,
            p99: at(0.99)?,
            p99_9: at(0.999)?,
            max: at(1.0)?,
        })
    }
}

/// A pace as the tables name it.
pub fn pace_words(pace: Pace) -> String {
    match pace {
        Pace::Closed { concurrency } => format!("concurrency {concurrency}"),
        Pace::Open { rate } => format!("rate {rate}/s"),
    }
}

/// How long a step lasts, as people read it.
pub fn until_words(until: Until) -> String {
    match until {
        Until::Requests(n) => format!("{n} requests"),
        Until::Elapsed(window) => humantime::format_duration(window).to_string(),
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn comparisons(targets: &[TargetReport]) -> Vec<Comparison> {
    let Some((first, others)) = targets.split_first() else { return Vec::new() };
    let pairs = others.iter().flat_map(|other| first.steps.iter().zip(&other.steps).map(move |pair| (other, pair)));
    pairs.filter_map(|(other, (a, b))| compare(&first.name, &other.name, a, b)).collect()
}

/// `None` where a round of the other target has no good answer: there is no ratio to zero.
fn compare(first: &str, other: &str, a: &StepReport, b: &StepReport) -> Option<Comparison> {
    let rates = |step: &StepReport| -> Vec<f64> { step.rounds.iter().map(|round| round.requests_per_s).collect() };
    let (ours, theirs) = (rates(a), rates(b));
    if theirs.contains(&0.0) {
        return None;
    }
    let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| a / b).collect();
    Some(Comparison {
        first: first.to_string(),
        other: other.to_string(),
        step: a.step.clone(),
        first_requests_per_s: median(&ours)?,
        other_requests_per_s: median(&theirs)?,
        ratio: median(&ratios)?,
        min_ratio: ratios.iter().copied().min_by(f64::total_cmp)?,
        max_ratio: ratios.iter().copied().max_by(f64::total_cmp)?,
        ratios,
    })
}

/// The middle value, of an even number the mean of the two middle ones; `None` of nothing.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[half]),
        _ => Some((sorted[half - 1] + sorted[half]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        let step = |rates: &[f64]| {
            let figures = |&rate: &f64| Figures { requests_per_s: rate, ..Figures::of(&Record::default()) };
            StepReport::new(
                Pace::Closed { concurrency: 2 },
                Figures::of(&Record::default()),
                rates.iter().map(figures).collect(),
            )
        };
        // The machine was twice as fast in the last round: each round's ratio is still 2 or 3.
        let got = compare("a", "b", &step(&[20.0, 30.0, 40.0]), &step(&[10.0, 10.0, 20.0])).unwrap();
        assert_eq!((got.ratio, got.min_ratio, got.max_ratio), (2.0, 2.0, 3.0));
        assert_eq!((got.first_requests_per_s, got.other_requests_per_s), (30.0, 10.0));
        assert!(compare("a", "b", &step(&[1.0]), &step(&[0.0])).is_none());
    }
}
