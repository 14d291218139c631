//! What is counted while it runs.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;

/// Longest latency told apart; more counts as this. An hour outlasts every sensible `--timeout`.
const MAX_LATENCY_US: u64 = 3_600_000_000;
/// A send this far behind its intended time is late: more than a timer's and a scheduler's jitter.
const LATE: Duration = Duration::from_millis(10);
/// Examples of wrong answers kept for the report.
const NUM_EXAMPLES: usize = 3;

/// Why a request got no whole answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// No connection: refused, unreachable, TLS.
    Connect,
    /// Nothing whole within the timeout.
    Timeout,
    /// The connection ended before the answer did.
    Reset,
    /// What came is not HTTP.
    Protocol,
    /// Open loop only: still waiting for a free connection when the time was up.
    Unsent,
}

impl Failure {
    /// As people read it.
    pub fn words(self) -> &'static str {
        match self {
            Self::Connect => "no connection",
            Self::Timeout => "timeout",
            Self::Reset => "connection reset",
            Self::Protocol => "not HTTP",
            Self::Unsent => "unsent",
        }
    }
}

/// What became of one request.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// An answer came, whole.
    Answered {
        status: u16,
        /// As the server counts them, if it says so.
        num_tokens: Option<u64>,
        num_bytes: u64,
        /// What is wrong with it, where it was checked.
        wrong: Option<String>,
    },
    Failed(Failure),
}

impl Outcome {
    /// A whole answer, 2xx, and right as far as it was checked.
    pub fn is_good(&self) -> bool {
        matches!(self, Self::Answered { status: 200..300, wrong: None, .. })
    }
}

/// One request, finished.
#[derive(Debug, Clone)]
pub struct Sample {
    /// From the intended send (open loop) or the send (closed loop) to the last byte.
    pub latency: Duration,
    /// How long after its intended time it was sent; zero in a closed loop.
    pub behind: Duration,
    /// It ended before the step's time was up, and so counts for the rates.
    pub in_window: bool,
    pub num_inputs: u64,
    pub outcome: Outcome,
}

/// Everything counted over one step of one target, or over several added up.
#[derive(Debug, Clone)]
pub struct Record {
    /// Latencies of good answers, in microseconds, to three digits.
    latencies: Histogram<u64>,
    /// What the rates are taken over.
    pub window: Duration,
    pub num_requests: u64,
    /// 2xx and, where checked, right.
    pub num_ok: u64,
    /// Of those, the ones that ended within the window; so are the next two.
    pub num_ok_in_window: u64,
    pub num_inputs: u64,
    /// `None` as long as no answer said how many.
    pub num_tokens: Option<u64>,
    pub num_bytes: u64,
    pub statuses: BTreeMap<u16, u64>,
    pub failures: BTreeMap<Failure, u64>,
    pub num_wrong: u64,
    pub wrong_examples: Vec<String>,
    pub num_late: u64,
    pub max_behind: Duration,
    /// Most requests open at once.
    pub max_in_flight: u64,
}

impl Default for Record {
    fn default() -> Self {
        let latencies = Histogram::new_with_bounds(1, MAX_LATENCY_US, 3);
        Self {
            latencies: latencies.expect("1 < the bound, and 3 digits are within 0 to 5"),
            window: Duration::ZERO,
            num_requests: 0,
            num_ok: 0,
            num_ok_in_window: 0,
            num_inputs: 0,
            num_tokens: None,
            num_bytes: 0,
            statuses: BTreeMap::new(),
            failures: BTreeMap::new(),
            num_wrong: 0,
            wrong_examples: Vec::new(),
            num_late: 0,
            max_behind: Duration::ZERO,
            max_in_flight: 0,
        }
    }
}

impl Record {
    /// Counts one request.
    pub fn add(&mut self, sample: Sample) {
        self.num_requests += 1;
        self.num_late += u64::from(sample.behind > LATE);
        self.max_behind = self.max_behind.max(sample.behind);
        let (status, tokens, bytes, wrong) = match sample.outcome {
            Outcome::Failed(failure) => return *self.failures.entry(failure).or_default() += 1,
            Outcome::Answered { status, num_tokens, num_bytes, wrong } => (status, num_tokens, num_bytes, wrong),
        };
        *self.statuses.entry(status).or_default() += 1;
        self.num_bytes += bytes;
        if let Some(wrong) = wrong {
            self.num_wrong += 1;
            if self.wrong_examples.len() < NUM_EXAMPLES {
                self.wrong_examples.push(wrong);
            }
        } else if (200..300).contains(&status) {
            self.num_ok += 1;
            self.latencies.saturating_record((sample.latency.as_micros() as u64).max(1));
            if sample.in_window {
                self.num_ok_in_window += 1;
                self.num_inputs += sample.num_inputs;
                self.num_tokens = match (self.num_tokens, tokens) {
                    (None, None) => None,
                    (a, b) => Some(a.unwrap_or(0) + b.unwrap_or(0)),
                };
            }
        }
    }

    /// Adds another step's counts; the windows add up, the extremes stay extremes.
    pub fn merge(&mut self, other: &Record) {
        self.latencies += &other.latencies;
        self.window += other.window;
        self.num_requests += other.num_requests;
        self.num_ok += other.num_ok;
        self.num_ok_in_window += other.num_ok_in_window;
        self.num_inputs += other.num_inputs;
        self.num_tokens = match (self.num_tokens, other.num_tokens) {
            (None, None) => None,
            (a, b) => Some(a.unwrap_or(0) + b.unwrap_or(0)),
        };
        self.num_bytes += other.num_bytes;
        for (&status, n) in &other.statuses {
            *self.statuses.entry(status).or_default() += n;
        }
        for (&failure, n) in &other.failures {
            *self.failures.entry(failure).or_default() += n;
        }
        self.num_wrong += other.num_wrong;
        let room = NUM_EXAMPLES.saturating_sub(self.wrong_examples.len());
        self.wrong_examples.extend(other.wrong_examples.iter().take(room).cloned());
        self.num_late += other.num_late;
        self.max_behind = self.max_behind.max(other.max_behind);
        self.max_in_flight = self.max_in_flight.max(other.max_in_flight);
    }

    /// The latency that this share of good answers did not exceed; `None` without a good answer.
    ///
    /// Units: `quantile` 0 to 1, 1 is the longest. Exact to three digits.
    pub fn latency(&self, quantile: f64) -> Option<Duration> {
        (self.num_ok > 0).then(|| Duration::from_micros(self.latencies.value_at_quantile(quantile)))
    }

    pub fn min_latency(&self) -> Option<Duration> {
        (self.num_ok > 0).then(|| Duration::from_micros(self.latencies.min()))
    }

    pub fn mean_latency(&self) -> Option<Duration> {
        (self.num_ok > 0).then(|| Duration::from_secs_f64(self.latencies.mean() / 1e6))
    }

    /// Good answers a second within the window.
    pub fn ok_per_s(&self) -> f64 {
        per_s(self.num_ok_in_window, self.window)
    }

    pub fn inputs_per_s(&self) -> f64 {
        per_s(self.num_inputs, self.window)
    }

    pub fn tokens_per_s(&self) -> Option<f64> {
        self.num_tokens.map(|n| per_s(n, self.window))
    }

    /// Share of requests without a good answer, 0 to 1; 0 without requests.
    pub fn error_rate(&self) -> f64 {
        if self.num_requests == 0 { 0.0 } else { (self.num_requests - self.num_ok) as f64 / self.num_requests as f64 }
    }
}

fn per_s(count: u64, window: Duration) -> f64 {
    if window.is_zero() { 0.0 } else { count as f64 / window.as_secs_f64() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(ms: u64, status: u16) -> Sample {
        Sample {
            latency: Duration::from_millis(ms),
            behind: Duration::ZERO,
            in_window: true,
            num_inputs: 2,
            outcome: Outcome::Answered { status, num_tokens: Some(10), num_bytes: 100, wrong: None },
        }
    }

    #[test]
    fn only_good_answers_count_for_latency_and_rates() {
        let mut record = Record { window: Duration::from_secs(2), ..Record::default() };
        (1..=100).for_each(|ms| record.add(answered(ms, 200)));
        record.add(answered(5000, 429));
        record.add(Sample { in_window: false, ..answered(100, 200) });
        record.add(Sample { outcome: Outcome::Failed(Failure::Timeout), ..answered(9000, 0) });
        assert_eq!((record.num_requests, record.num_ok, record.num_ok_in_window), (103, 101, 100));
        assert_eq!((record.ok_per_s(), record.inputs_per_s(), record.tokens_per_s()), (50.0, 100.0, Some(500.0)));
        let p50 = record.latency(0.5).unwrap().as_secs_f64();
        assert!((0.0505..=0.0515).contains(&p50), "p50 {p50}");
        assert!(record.latency(1.0).unwrap() < Duration::from_millis(101));
        assert!((record.error_rate() - 2.0 / 103.0).abs() < 1e-12);
        assert_eq!(record.statuses, BTreeMap::from([(200, 101), (429, 1)]));
        assert_eq!(record.failures, BTreeMap::from([(Failure::Timeout, 1)]));
    }

    #[test]
    fn merging_is_adding() {
        let (mut a, mut b, mut both) = (Record::default(), Record::default(), Record::default());
        for ms in 1..50 {
            a.add(answered(ms, 200));
            b.add(answered(1000 + ms, 200));
            both.add(answered(ms, 200));
            both.add(answered(1000 + ms, 200));
        }
        a.merge(&b);
        assert_eq!(a.latency(0.99), both.latency(0.99));
        assert_eq!((a.num_ok, a.num_tokens), (both.num_ok, both.num_tokens));
    }

    #[test]
    fn nothing_good_has_no_latency() {
        let mut record = Record::default();
        record.add(answered(3, 500));
        assert_eq!((record.latency(0.5), record.min_latency(), record.error_rate()), (None, None, 1.0));
    }
}
