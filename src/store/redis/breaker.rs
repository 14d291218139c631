//! When to stop asking a server that does not answer. Pure: the time is an argument.

use std::time::{Duration, Instant};

/// How long calls are counted together.
const WINDOW: Duration = Duration::from_secs(1);
/// Fewer failures in a window say nothing.
const MIN_FAILURES: u32 = 5;
/// The share of a window's calls that must fail: one in so many. Of a cluster of three masters one may be away, and then
/// a third of the keys would wait for their time-outs.
const ONE_IN: u32 = 5;

/// Counts calls and says when there were too many failures. A new one is on trial: its first call decides.
#[derive(Debug)]
pub struct Breaker {
    began: Instant,
    num_calls: u32,
    num_failures: u32,
    is_on_trial: bool,
}

impl Breaker {
    /// Half open: as after a probe that succeeded.
    pub fn new(now: Instant) -> Self {
        Self { began: now, num_calls: 0, num_failures: 0, is_on_trial: true }
    }

    /// Notes a call that was answered.
    pub fn succeeded(&mut self, now: Instant) {
        self.roll(now);
        self.num_calls += 1;
        self.is_on_trial = false;
    }

    /// Notes a call that was not. Returns whether no further one should be made.
    pub fn failed(&mut self, now: Instant) -> bool {
        self.roll(now);
        self.num_calls += 1;
        self.num_failures += 1;
        self.is_on_trial || (self.num_failures >= MIN_FAILURES && self.num_failures * ONE_IN >= self.num_calls)
    }

    fn roll(&mut self, now: Instant) {
        if now.saturating_duration_since(self.began) > WINDOW {
            (self.began, self.num_calls, self.num_failures) = (now, 0, 0);
        }
    }
}

/// The pauses between attempts to reach a server: doubling up to a bound, beginning anew after a good spell.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
}

const SHORTEST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(2);
/// A connection that held for so long was a good one.
const GOOD_SPELL: Duration = Duration::from_secs(10);

impl Default for Backoff {
    fn default() -> Self {
        Self { next: SHORTEST }
    }
}

impl Backoff {
    /// The pause after an attempt that failed, or after a connection that held for `held`.
    pub fn pause(&mut self, held: Duration) -> Duration {
        if held > GOOD_SPELL {
            self.next = SHORTEST;
        }
        let pause = self.next;
        self.next = (pause * 2).min(LONGEST);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A breaker that has passed its trial.
    fn proven(now: Instant) -> Breaker {
        let mut breaker = Breaker::new(now);
        breaker.succeeded(now);
        breaker
    }

    #[test]
    fn opens_when_all_calls_fail_and_not_at_the_first() {
        let now = Instant::now();
        let mut breaker = proven(now);
        let opened: Vec<bool> = (0..MIN_FAILURES).map(|_| breaker.failed(now)).collect();
        assert_eq!(opened, [false, false, false, false, true]);
    }

    #[test]
    fn a_few_failures_among_many_calls_are_borne() {
        let now = Instant::now();
        let mut breaker = proven(now);
        for i in 0..1000u32 {
            match i % 10 {
                9 => assert!(!breaker.failed(now), "at {i}"),
                _ => breaker.succeeded(now),
            }
        }
    }

    #[test]
    fn a_third_of_the_keys_away_opens_it() {
        let now = Instant::now();
        let mut breaker = proven(now);
        let opened = (0..20).any(|_| {
            breaker.succeeded(now);
            breaker.succeeded(now);
            breaker.failed(now)
        });
        assert!(opened);
    }

    #[test]
    fn failures_far_apart_are_not_added_up() {
        let now = Instant::now();
        let mut breaker = proven(now);
        for i in 0..20 {
            assert!(!breaker.failed(now + (WINDOW + Duration::from_millis(1)) * i));
        }
    }

    #[test]
    fn on_trial_the_first_failure_opens_and_a_success_ends_it() {
        let now = Instant::now();
        assert!(Breaker::new(now).failed(now));
        assert!(!proven(now).failed(now));
    }

    #[test]
    fn pauses_double_to_a_bound_and_begin_anew() {
        let mut backoff = Backoff::default();
        let pauses: Vec<u128> = (0..8).map(|_| backoff.pause(Duration::ZERO).as_millis()).collect();
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1600, 2000, 2000]);
        assert_eq!(backoff.pause(GOOD_SPELL * 2), SHORTEST);
    }
}
