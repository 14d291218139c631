//! Durations counted by their two leading digits.
//!
//! 1,234 µs counts as 12xx. A value that is told again is the middle of its range, 1,250: at most 5 % from the true one
//! (for 1,000 to 1,099), and exact below 100. There are 90 ranges in a decade. No logarithm is taken, so every store has
//! the same ranges to the last one, MongoDB's pipeline included, and counts of several stores or days can be added.
//!
//! ```text
//! value     0 … 99   100 … 109   110 … 119   …   990 … 999   1000 … 1099   …
//! range     itself   100         110         …   990         1000          …
//! told as   itself   105         115         …   995         1050          …
//! ```

use std::collections::BTreeMap;

use super::{Latency, Quantiles};

/// Counts of durations.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Histogram {
    /// By the lowest value of a range.
    counts: BTreeMap<u64, u64>,
    num: u64,
}

impl Histogram {
    /// Counts a value `num` times. It may be a range's lowest, which stands for all of it.
    pub fn add(&mut self, value: u64, num: u64) {
        if num > 0 {
            *self.counts.entry(lowest(value)).or_default() += num;
            self.num += num;
        }
    }

    /// The usual quantiles.
    pub fn latency(&self) -> Latency {
        let quantile = |percent| self.quantile(percent);
        let quantiles = || Some(Quantiles { p50_us: quantile(50)?, p90_us: quantile(90)?, p99_us: quantile(99)? });
        Latency { num: self.num, quantiles: quantiles() }
    }

    /// The value that `percent` in a hundred do not exceed, by nearest rank. `None` of nothing.
    fn quantile(&self, percent: u64) -> Option<u64> {
        let rank = (self.num * percent).div_ceil(100).max(1);
        let mut below = 0;
        self.counts.iter().find_map(|(&lowest, num)| {
            below += num;
            (below >= rank).then(|| lowest + width(lowest) / 2)
        })
    }
}

/// The lowest value of a value's range.
pub fn lowest(value: u64) -> u64 {
    value - value % width(value)
}

/// Values of a value's range.
fn width(value: u64) -> u64 {
    match value.checked_ilog10() {
        Some(exponent @ 2..) => 10u64.pow(exponent - 1),
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_have_two_digits() {
        let ranges = [(0, 0), (9, 9), (99, 99), (100, 100), (109, 100), (110, 110), (999, 990), (1000, 1000)];
        for (value, range) in ranges.into_iter().chain([(123_456, 120_000), (u64::MAX, 18 * 10u64.pow(18))]) {
            assert_eq!(lowest(value), range, "{value}");
            assert_eq!(lowest(range), range, "a range is in itself");
        }
    }

    #[test]
    fn quantiles_are_within_a_twentieth() {
        let mut values: Vec<u64> = (0..5000u64).map(|i| 17 + i * i * 7919 % 3_000_017).collect();
        let mut histogram = Histogram::default();
        values.iter().for_each(|value| histogram.add(*value, 1));
        values.sort();
        for percent in 1..=100 {
            let exact = values[(values.len() * percent).div_ceil(100) - 1] as f64;
            let told = histogram.quantile(percent as u64).unwrap() as f64;
            assert!((told - exact).abs() <= exact * 0.05, "{percent}: {told} for {exact}");
        }
    }

    #[test]
    fn few_values_are_their_own_quantiles() {
        assert_eq!(Histogram::default().latency(), Latency { num: 0, quantiles: None });
        let mut histogram = Histogram::default();
        histogram.add(42, 1);
        histogram.add(7, 0);
        let all = Quantiles { p50_us: 42, p90_us: 42, p99_us: 42 };
        assert_eq!(histogram.latency(), Latency { num: 1, quantiles: Some(all) });
        histogram.add(10, 9);
        let most = Quantiles { p50_us: 10, p90_us: 10, p99_us: 42 };
        assert_eq!(histogram.latency(), Latency { num: 10, quantiles: Some(most) });
    }
}
