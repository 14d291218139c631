//! What a run must reach: stated before, judged after.

use std::time::Duration;

use super::record::Record;

/// One thing the first target must hold in every step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Objective {
    /// At most so long for this share of good answers; `quantile` 0 to 1, 1 is the longest.
    Latency { quantile: f64, limit: Duration },
    /// At least so many good answers a second.
    MinRate(f64),
    /// At most this share of requests without a good answer, 0 to 1.
    MaxErrorRate(f64),
    /// No wrong answer; set wherever answers are checked.
    NothingWrong,
}

/// How an objective was met in one step.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Verdict {
    /// As the command line has it: "p99", "min-rate", "max-error-rate", "verify".
    pub objective: String,
    /// The step, as the table names it: "concurrency 32".
    pub step: String,
    pub limit: String,
    pub got: String,
    pub met: bool,
}

impl Objective {
    /// Judges one step. A latency without any good answer is missed.
    pub fn judge(&self, step: &str, record: &Record) -> Verdict {
        let (objective, limit, got, met) = match *self {
            Self::Latency { quantile, limit } => {
                let got = record.latency(quantile);
                let words = got.map_or("no good answer".into(), ms);
                (quantile_name(quantile), ms(limit), words, got.is_some_and(|got| got <= limit))
            }
            Self::MinRate(limit) => {
                let got = record.ok_per_s();
                ("min-rate".into(), format!("{limit} req/s"), format!("{got:.1} req/s"), got >= limit)
            }
            Self::MaxErrorRate(limit) => {
                let got = record.error_rate();
                let percent = |x: f64| format!("{:.3} %", x * 100.0);
                // A run that asked nothing proves nothing.
                let met = got <= limit && record.num_requests > 0;
                ("max-error-rate".into(), percent(limit), percent(got), met)
            }
            Self::NothingWrong => {
                let got = record.num_wrong;
                ("verify".into(), "0 wrong answers".into(), format!("{got}"), got == 0)
            }
        };
        Verdict { objective, step: step.to_string(), limit, got, met }
    }
}

fn quantile_name(quantile: f64) -> String {
    if quantile >= 1.0 { "max".into() } else { format!("p{}", (quantile * 1e5).round() / 1e3) }
}

fn ms(duration: Duration) -> String {
    format!("{:.3} ms", duration.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::super::record::{Outcome, Sample};
    use super::*;

    fn record() -> Record {
        let mut record = Record::default();
        record.window = Duration::from_secs(1);
        for i in 1..=100 {
            let status = if i <= 90 { 200 } else { 503 };
            record.add(Sample {
                latency: Duration::from_millis(i),
                behind: Duration::ZERO,
                in_window: true,
                num_inputs: 1,
                outcome: Outcome::Answered { status, num_tokens: None, num_bytes: 1, wrong: None },
            });
        }
        record
    }

    #[test]
    fn each_kind_is_met_and_missed() {
        let latency = |quantile, ms| Objective::Latency { quantile, limit: Duration::from_millis(ms) };
        let cases = [
            (latency(0.99, 95), true),
            (latency(0.99, 80), false),
            (latency(1.0, 91), true),
            (latency(0.5, 40), false),
            (Objective::MinRate(90.0), true),
            (Objective::MinRate(90.5), false),
            (Objective::MaxErrorRate(0.1), true),
            (Objective::MaxErrorRate(0.09), false),
            (Objective::NothingWrong, true),
        ];
        for (objective, met) in cases {
            let verdict = objective.judge("step", &record());
            assert_eq!(verdict.met, met, "{verdict:?}");
        }
    }

    #[test]
    fn nothing_answered_meets_nothing() {
        let empty = Record::default();
        for objective in [Objective::Latency { quantile: 0.5, limit: Duration::MAX }, Objective::MaxErrorRate(1.0)] {
            assert!(!objective.judge("step", &empty).met);
        }
    }

    #[test]
    fn names_are_the_options() {
        assert_eq!([0.5, 0.9, 0.99, 0.999, 1.0].map(quantile_name), ["p50", "p90", "p99", "p99.9", "max"]);
    }
}
