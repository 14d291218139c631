//! How long a batch will take, learned while serving. Feeds Retry-After and the check of deadlines.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::policy::BatchLimits;

/// Weight of the newest batch in each mean: the last 20 or so count, so that a change of load or of the
/// limits is learned within a second, and one hiccup moves the estimate by a twentieth of itself.
const NEWEST: f64 = 0.05;

/// The time of a batch as `base + per_token × num_tokens`, a straight line fitted through the last batches.
///
/// Kept by the worker alone; [`CostModel::publish`] gives readers on other threads a copy.
/// Source: least squares over exponentially weighted moments; Roberts 1959 for the weighting.
#[derive(Debug, Clone, Default)]
pub struct Fit {
    num_batches: u64,
    /// Weighted means: tokens, seconds, tokens², tokens × seconds, entries.
    tokens: f64,
    seconds: f64,
    tokens_squared: f64,
    tokens_seconds: f64,
    entries: f64,
    /// Weighted mean of how far the line missed each new batch, in seconds.
    deviation: f64,
}

impl Fit {
    /// Takes one finished batch into account.
    pub fn learn(&mut self, num_entries: usize, num_tokens: usize, took: Duration) {
        let (base, slope) = self.line();
        let missed = (took.as_secs_f64() - base - slope * num_tokens as f64).abs();
        self.num_batches += 1;
        // Plain means at first: the warm-up must not be remembered with a weight of nineteen twentieths.
        let newest = NEWEST.max(1.0 / self.num_batches as f64);
        let (n, t) = (num_tokens as f64, took.as_secs_f64());
        let blend = |mean: &mut f64, value: f64| *mean += newest * (value - *mean);
        blend(&mut self.tokens, n);
        blend(&mut self.seconds, t);
        blend(&mut self.tokens_squared, n * n);
        blend(&mut self.tokens_seconds, n * t);
        blend(&mut self.entries, num_entries as f64);
        // The first batch is missed by all of its time, which says nothing.
        if self.num_batches > 1 {
            blend(&mut self.deviation, missed);
        }
    }

    /// Seconds a batch takes whatever is in it, and seconds a token adds. Neither is negative.
    fn line(&self) -> (f64, f64) {
        let variance = self.tokens_squared - self.tokens * self.tokens;
        // Batches of one size say nothing of the slope: all their time is put on the tokens.
        let proportional = if self.tokens > 0.0 { self.seconds / self.tokens } else { 0.0 };
        if variance <= 1e-3 * self.tokens_squared {
            return (0.0, proportional);
        }
        let slope = (self.tokens_seconds - self.tokens * self.seconds) / variance;
        let slope = slope.clamp(0.0, proportional);
        (self.seconds - slope * self.tokens, slope)
    }
}

/// The time of batches as a straight line: `base_s` each, and `per_token_s` for each token.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Line {
    pub base_s: f64,
    pub per_token_s: f64,
}

impl Line {
    /// Seconds until so many entries with so many tokens are computed in batches as full as the limits allow.
    pub fn seconds(&self, num_entries: usize, num_tokens: usize, limits: &BatchLimits) -> f64 {
        self.seconds_of(num_entries as f64, num_tokens as f64, limits)
    }

    fn seconds_of(&self, num_entries: f64, num_tokens: f64, limits: &BatchLimits) -> f64 {
        let by_size = num_entries / limits.max_batch_size.max(1) as f64;
        let by_tokens = num_tokens / limits.max_batch_tokens.max(1) as f64;
        self.base_s * by_size.max(by_tokens).ceil() + self.per_token_s * num_tokens
    }
}

/// The newest fit, readable from any thread without a lock. Zero until the first batch.
#[derive(Debug, Default)]
pub struct CostModel {
    /// Each holds the bits of an f64. They are read one by one: a reader may see a base and a slope of two
    /// neighbouring fits, which is off by no more than one batch's lesson.
    base_s: AtomicU64,
    per_token_s: AtomicU64,
    tokens_per_entry: AtomicU64,
    deviation_s: AtomicU64,
}

impl CostModel {
    /// Puts a fit in force.
    pub fn publish(&self, fit: &Fit) {
        let (base, slope) = fit.line();
        self.base_s.store(base.to_bits(), Ordering::Relaxed);
        self.per_token_s.store(slope.to_bits(), Ordering::Relaxed);
        let per_entry = if fit.entries > 0.0 { fit.tokens / fit.entries } else { 0.0 };
        self.tokens_per_entry.store(per_entry.to_bits(), Ordering::Relaxed);
        self.deviation_s.store(fit.deviation.to_bits(), Ordering::Relaxed);
    }

    /// The line in force.
    pub fn line(&self) -> Line {
        Line { base_s: load(&self.base_s), per_token_s: load(&self.per_token_s) }
    }

    /// Time of one batch of so many tokens.
    pub fn batch(&self, num_tokens: usize) -> Duration {
        seconds(load(&self.base_s) + load(&self.per_token_s) * num_tokens as f64)
    }

    /// Time in which nearly every batch of so many tokens is done: two mean deviations above the estimate.
    ///
    /// Source: Jacobson 1988, Congestion Avoidance and Control, section 2 (a bound from mean and deviation).
    pub fn batch_at_most(&self, num_tokens: usize) -> Duration {
        self.batch(num_tokens) + seconds(2.0 * load(&self.deviation_s))
    }

    /// Time until so many waiting entries of the usual length are computed.
    pub fn backlog(&self, num_entries: usize, limits: &BatchLimits) -> Duration {
        let num_tokens = load(&self.tokens_per_entry) * num_entries as f64;
        seconds(self.line().seconds_of(num_entries as f64, num_tokens, limits))
    }

    /// As [`CostModel::backlog`], for entries that several devices share: at once all of them work, each at its own
    /// rate, and nothing is done before the fastest has done one entry. Zero without devices.
    pub fn shared_backlog<'a>(
        costs: impl Iterator<Item = &'a Self>,
        num_entries: usize,
        limits: &BatchLimits,
    ) -> Duration {
        let (mut rate, mut least) = (0.0, f64::INFINITY);
        for cost in costs {
            rate += 1.0 / cost.backlog(num_entries, limits).as_secs_f64();
            least = least.min(cost.backlog(1, limits).as_secs_f64());
        }
        // A device that has learned nothing yet has an endless rate, and so no time is expected.
        if rate == 0.0 { Duration::ZERO } else { seconds((1.0 / rate).max(least)) }
    }
}

fn load(bits: &AtomicU64) -> f64 {
    f64::from_bits(bits.load(Ordering::Relaxed))
}

/// An estimate is no promise: an hour is as good as anything beyond, and keeps `Duration` from overflowing.
fn seconds(value: f64) -> Duration {
    Duration::from_secs_f64(value.clamp(0.0, 3600.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> BatchLimits {
        BatchLimits { max_batch_size: 10, max_batch_tokens: 1000, max_queue_delay: Duration::ZERO, max_queue_size: 100 }
    }

    fn close(got: Duration, expected_ms: f64) {
        let got = got.as_secs_f64() * 1e3;
        assert!((got - expected_ms).abs() < 0.02 * expected_ms, "{got} ms instead of {expected_ms} ms");
    }

    #[test]
    fn knows_nothing_before_the_first_batch() {
        let cost = CostModel::default();
        assert_eq!(cost.batch(1000), Duration::ZERO);
        assert_eq!(cost.backlog(1000, &limits()), Duration::ZERO);
    }

    #[test]
    fn finds_base_and_slope() {
        let mut fit = Fit::default();
        for num_tokens in [1usize, 500, 20, 90, 1000, 250] {
            fit.learn(num_tokens.div_ceil(10), num_tokens, Duration::from_micros(2000 + 10 * num_tokens as u64));
        }
        let cost = CostModel::default();
        cost.publish(&fit);
        close(cost.batch(100), 3.0);
        close(cost.batch(1000), 12.0);
    }

    #[test]
    fn one_size_of_batch_is_proportional() {
        let mut fit = Fit::default();
        for _ in 0..50 {
            fit.learn(10, 100, Duration::from_millis(4));
        }
        let cost = CostModel::default();
        cost.publish(&fit);
        close(cost.batch(100), 4.0);
        close(cost.batch(200), 8.0);
        // 95 entries of 10 tokens each: ten batches' worth of tokens, less the part not filled.
        close(cost.backlog(95, &limits()), 38.0);
    }

    #[test]
    fn devices_add_up_their_rates() {
        let learned = |ms| {
            let mut fit = Fit::default();
            (0..50).for_each(|_| fit.learn(10, 100, Duration::from_millis(ms)));
            let cost = CostModel::default();
            cost.publish(&fit);
            cost
        };
        let costs = [learned(4), learned(12)];
        let all = |num_entries| CostModel::shared_backlog(costs.iter(), num_entries, &limits());
        // 100 entries take 40 ms or 120 ms: together 30.
        close(all(100), 30.0);
        close(all(1), 0.4);
        close(CostModel::shared_backlog(costs[1..].iter(), 100, &limits()), 120.0);
        assert_eq!(CostModel::shared_backlog([].iter(), 100, &limits()), Duration::ZERO);
        let unlearned = [CostModel::default(), learned(4)];
        close(CostModel::shared_backlog(unlearned[1..].iter(), 100, &limits()), 40.0);
        assert_eq!(CostModel::shared_backlog(unlearned.iter(), 100, &limits()), Duration::ZERO);
    }

    #[test]
    fn the_bound_covers_what_varies() {
        let mut fit = Fit::default();
        for i in 0..200 {
            fit.learn(1, 100, Duration::from_millis(if i % 2 == 0 { 9 } else { 11 }));
        }
        let cost = CostModel::default();
        cost.publish(&fit);
        let bound = cost.batch_at_most(100);
        assert!((11..14).contains(&bound.as_millis()), "{bound:?}");
    }

    #[test]
    fn follows_a_device_that_became_slower() {
        let mut fit = Fit::default();
        for _ in 0..100 {
            fit.learn(1, 100, Duration::from_millis(1));
        }
        for _ in 0..100 {
            fit.learn(1, 100, Duration::from_millis(10));
        }
        let cost = CostModel::default();
        cost.publish(&fit);
        assert!(cost.batch(100) > Duration::from_millis(9), "{:?}", cost.batch(100));
    }

    #[test]
    fn no_lesson_makes_it_negative_or_endless() {
        let mut fit = Fit::default();
        fit.learn(1, 1000, Duration::from_micros(1));
        fit.learn(1, 1, Duration::from_secs(100_000));
        let cost = CostModel::default();
        cost.publish(&fit);
        for num_tokens in [0, 1, 1000, usize::MAX] {
            assert!(cost.batch(num_tokens) <= Duration::from_secs(3600));
        }
    }
}
