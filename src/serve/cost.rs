//! How long a batch will take, learned while serving. Feeds Retry-After and the check of deadlines, and says how much
//! background work a batch may do.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::policy::BatchLimits;

/// Weight of the newest batch in each mean: the last 20 or so count, so that a change of load or of the
/// limits is learned within a second, and one hiccup moves the estimate by a twentieth of itself.
const NEWEST: f64 = 0.05;

/// Longest that a batch of background work alone should take: what it adds at most to the wait of an interactive request
/// that comes meanwhile. Short beside what such a request takes over a network, and long enough for batches at which
/// every device here is about as fast, a token, as it gets.
const ALONE: f64 = 0.010;

/// The same where the shortest batch takes long already: so many times its time. A larger model on a slow device would
/// otherwise do one entry at a time, and spend all its time on what a batch costs whatever is in it.
const ALONE_BASES: f64 = 2.0;

/// By how much background entries may lengthen the batch of others that they ride along with, as a part of its time.
/// About as much as batches vary by themselves.
const ALONG: f64 = 0.10;

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
        // The first batch is missed by all of its time, and the second, which the warm-up makes of another size, by what
        // a single point says of a line. Neither says anything, and it would be remembered for a hundred batches.
        if self.num_batches > 2 {
            blend(&mut self.deviation, missed);
        }
    }

    /// Seconds a token adds at most: two standard errors above the line's slope, and no more than if all time were put on
    /// the tokens. While batches are of about one size, the slope is little more than noise, and often nothing.
    ///
    /// Source: standard error of a least squares slope; for normal errors the deviation from 0.8 of it, the mean
    /// absolute one; weights that decline by `NEWEST` a batch count for 2 / NEWEST - 1 equal ones.
    fn slope_at_most(&self) -> f64 {
        let (_, slope) = self.line();
        let variance = self.tokens_squared - self.tokens * self.tokens;
        let proportional = if self.tokens > 0.0 { self.seconds / self.tokens } else { 0.0 };
        let num_equal = (self.num_batches as f64).min(2.0 / NEWEST - 1.0);
        let error = self.deviation / 0.8 / (variance * num_equal).sqrt();
        // Not a number where there is no variance: then it is the other bound.
        if slope + 2.0 * error < proportional { slope + 2.0 * error } else { proportional }
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
    per_token_at_most_s: AtomicU64,
    tokens_per_entry: AtomicU64,
    deviation_s: AtomicU64,
}

impl CostModel {
    /// Puts a fit in force.
    pub fn publish(&self, fit: &Fit) {
        let (base, slope) = fit.line();
        self.base_s.store(base.to_bits(), Ordering::Relaxed);
        self.per_token_s.store(slope.to_bits(), Ordering::Relaxed);
        self.per_token_at_most_s.store(fit.slope_at_most().to_bits(), Ordering::Relaxed);
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

    /// Most tokens of a batch that [`CostModel::batch_at_most`] expects to be done in this time.
    pub fn tokens_at_most(&self, time: Duration) -> usize {
        let left = time.as_secs_f64() - 2.0 * load(&self.deviation_s) - load(&self.base_s);
        if left < 0.0 { 0 } else { tokens_in(left, load(&self.per_token_s)) }
    }

    /// Most tokens of a batch of background work alone.
    pub fn tokens_alone(&self) -> usize {
        let base = load(&self.base_s);
        tokens_in(ALONE.max(ALONE_BASES * base) - base, load(&self.per_token_at_most_s))
    }

    /// Most tokens of a batch that has so many tokens of others, with background entries that ride along.
    pub fn tokens_along(&self, num_tokens: usize) -> usize {
        let time = load(&self.base_s) + load(&self.per_token_s) * num_tokens as f64;
        num_tokens.saturating_add(tokens_in(ALONG * time, load(&self.per_token_at_most_s)))
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

/// Tokens that take so many seconds. As many as one likes where they cost nothing, as all do before the first batch.
fn tokens_in(seconds: f64, per_token_s: f64) -> usize {
    // The conversion keeps to the bounds of the integer.
    if per_token_s > 0.0 { (seconds / per_token_s) as usize } else { usize::MAX }
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

    /// What is learned of a device whose batches take exactly so long.
    fn learned(base_us: u64, per_token_us: u64) -> CostModel {
        let mut fit = Fit::default();
        for num_tokens in [2, 500, 20, 90].repeat(10) {
            fit.learn(1, num_tokens, Duration::from_micros(base_us + per_token_us * num_tokens as u64));
        }
        let cost = CostModel::default();
        cost.publish(&fit);
        cost
    }

    #[test]
    fn background_work_is_bounded_by_its_time_alone_and_along() {
        let close = |got: usize, expected: usize| assert!(got.abs_diff(expected) <= 1, "{got}, not {expected}");
        let gpu = learned(2000, 1);
        close(gpu.tokens_alone(), 8000);
        // A tenth of 2.1 ms.
        close(gpu.tokens_along(100), 310);
        let cpu = learned(500, 50);
        close(cpu.tokens_alone(), 190);
        // Less than a short text.
        close(cpu.tokens_along(20), 23);
        let large = learned(40_000, 1000);
        // 80 ms, of which half is the base.
        close(large.tokens_alone(), 40);
        let unknown = CostModel::default();
        assert_eq!((unknown.tokens_alone(), unknown.tokens_along(7)), (usize::MAX, usize::MAX));
        close(learned(0, 1000).tokens_along(7), 7);
    }

    #[test]
    fn a_slope_that_is_noise_lets_no_background_work_in() {
        // A millisecond whatever is in it, or so it seems: the shorter ones took longer by chance.
        let mut fit = Fit::default();
        for (num_tokens, us) in [(15, 1100), (16, 1000), (17, 900)].repeat(50) {
            fit.learn(1, num_tokens, Duration::from_micros(us));
        }
        let cost = CostModel::default();
        cost.publish(&fit);
        assert_eq!(cost.line().per_token_s, 0.0);
        assert!(cost.tokens_along(16) <= 16 + 6, "{}", cost.tokens_along(16));
        assert!(cost.tokens_alone() <= 500, "{}", cost.tokens_alone());
        // Of one size alone there is nothing to tell the base from the tokens by.
        let mut fit = Fit::default();
        (0..50).for_each(|_| fit.learn(1, 100, Duration::from_millis(5)));
        cost.publish(&fit);
        assert_eq!((cost.tokens_alone(), cost.tokens_along(100)), (200, 110));
    }

    #[test]
    fn the_warm_up_makes_no_deviation() {
        let mut fit = Fit::default();
        fit.learn(1, 2, Duration::from_millis(2));
        fit.learn(32, 16_384, Duration::from_millis(10));
        let cost = CostModel::default();
        cost.publish(&fit);
        assert!(cost.batch_at_most(16_384) <= Duration::from_micros(10_001), "{:?}", cost.batch_at_most(16_384));
    }

    #[test]
    fn tokens_in_time_are_those_whose_batch_is() {
        let mut fit = Fit::default();
        for i in 0..200usize {
            let num_tokens = 100 * (i % 10 + 1);
            let jitter = if i % 2 == 0 { 100 } else { 0 };
            fit.learn(1, num_tokens, Duration::from_micros(2000 + jitter + 10 * num_tokens as u64));
        }
        let cost = CostModel::default();
        cost.publish(&fit);
        for ms in [3u64, 5, 20] {
            let time = Duration::from_millis(ms);
            let num_tokens = cost.tokens_at_most(time);
            assert!(num_tokens > 0 && cost.batch_at_most(num_tokens) <= time, "{num_tokens} in {time:?}");
            assert!(cost.batch_at_most(num_tokens + 2) > time, "{num_tokens} in {time:?}");
        }
        assert_eq!(cost.tokens_at_most(Duration::from_millis(1)), 0);
        assert_eq!(CostModel::default().tokens_at_most(Duration::ZERO), usize::MAX);
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
