//! What a model has done since it was added, for who asks the server itself. Scrapers have the metrics.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::Result;
use crate::output::Output;

/// How often something happened, and how long it took in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timed {
    pub count: u64,
    pub total: Duration,
}

/// A model's counts and times. Each is right by itself; one that is read while requests end may be ahead of another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Requests that were computed. What the cache answers is not among them, nor is a request whose client has gone.
    pub success: Timed,
    /// Requests answered with an error, also those refused at the door.
    pub fail: Timed,
    /// Of the requests computed, as many as `success`: the mean over each request's inputs, summed.
    pub tokenize: Duration,
    pub queue: Duration,
    pub inference: Duration,
    /// Requests that were answered without computing, and how long that took.
    pub found: Timed,
    /// Requests that were looked for in the cache and had to be computed, in whole or in part.
    pub num_missed: u64,
    /// Inputs computed.
    pub num_inputs: u64,
    /// Batches computed, those for requests whose client has gone included.
    pub num_batches: u64,
    /// When the last request was answered.
    pub last: Option<SystemTime>,
}

/// Counts a model's requests as they end.
#[derive(Debug, Default)]
pub struct Tally {
    success: Sum,
    fail: Sum,
    tokenize_ns: AtomicU64,
    queue_ns: AtomicU64,
    inference_ns: AtomicU64,
    found: Sum,
    num_missed: AtomicU64,
    num_inputs: AtomicU64,
    /// Milliseconds since 1970; 0: none yet.
    last_ms: AtomicU64,
}

#[derive(Debug, Default)]
struct Sum {
    count: AtomicU64,
    total_ns: AtomicU64,
}

impl Sum {
    fn add(&self, took: Duration) {
        // No order is needed between counts that are only read.
        self.count.fetch_add(1, Ordering::Relaxed);
        self.total_ns.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
    }

    fn read(&self) -> Timed {
        let total = Duration::from_nanos(self.total_ns.load(Ordering::Relaxed));
        Timed { count: self.count.load(Ordering::Relaxed), total }
    }
}

impl Tally {
    /// A request has ended that took so long.
    pub fn ended(&self, result: &Result<Output>, took: Duration) {
        let Ok(output) = result else { return self.fail.add(took) };
        self.success.add(took);
        let phases = &output.phases;
        let times = [(&self.tokenize_ns, phases.tokenize), (&self.queue_ns, phases.queue)];
        for (sum, took) in times.into_iter().chain([(&self.inference_ns, phases.inference)]) {
            sum.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
        }
        self.num_inputs.fetch_add(output.num_tokens.len() as u64, Ordering::Relaxed);
        self.seen();
    }

    /// A request has ended that nothing was computed for.
    pub fn found(&self, took: Duration) {
        self.found.add(took);
        self.seen();
    }

    /// A request has ended that the cache did not have, or not whole.
    pub fn missed(&self) {
        self.num_missed.fetch_add(1, Ordering::Relaxed);
    }

    fn seen(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.last_ms.fetch_max(now.as_millis() as u64, Ordering::Relaxed);
    }

    /// What has been counted, with the batches that the devices have.
    pub fn read(&self, num_batches: u64) -> Statistics {
        let last_ms = self.last_ms.load(Ordering::Relaxed);
        let read = |sum: &AtomicU64| Duration::from_nanos(sum.load(Ordering::Relaxed));
        Statistics {
            success: self.success.read(),
            fail: self.fail.read(),
            tokenize: read(&self.tokenize_ns),
            queue: read(&self.queue_ns),
            inference: read(&self.inference_ns),
            found: self.found.read(),
            num_missed: self.num_missed.load(Ordering::Relaxed),
            num_inputs: self.num_inputs.load(Ordering::Relaxed),
            num_batches,
            last: (last_ms > 0).then(|| UNIX_EPOCH + Duration::from_millis(last_ms)),
        }
    }
}
