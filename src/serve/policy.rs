//! When to launch a batch. Pure: `now` is an argument, so every rule here is tested without a sleep.
//! What goes into the batch is [`super::fair`]'s part.

use std::time::{Duration, Instant};

use crate::request::Priority;
use crate::{Error, Result};

/// The limits an operator tunes, one name in manifest, code, log and metric.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchLimits {
    /// Most sequences in one batch. At least 1.
    pub max_batch_size: usize,
    /// Most tokens in one batch. At least the model's max_seq_len.
    pub max_batch_tokens: usize,
    /// How long an entry may wait for company while the device is idle. 0: never.
    pub max_queue_delay: Duration,
    /// Most interactive entries waiting; one more is refused with `QueueFull`. Background requests, which take none of
    /// these places, are refused while half as many are taken by entries of any class. At least 1.
    pub max_queue_size: usize,
}

impl BatchLimits {
    /// Checks the rules stated on the fields for a model of this `max_seq_len`.
    ///
    /// Errors: `Invalid` naming the field that breaks its rule.
    pub fn check(&self, max_seq_len: usize) -> Result<()> {
        let at_least = |field: &str, got: usize, least: usize| {
            if got >= least {
                return Ok(());
            }
            Err(Error::Invalid { field: field.to_string(), reason: format!("{got} is less than {least}") })
        };
        at_least("max_batch_size", self.max_batch_size, 1)?;
        at_least("max_queue_size", self.max_queue_size, 1)?;
        // Otherwise an input of full length could never be launched, or only against the limit.
        at_least("max_batch_tokens", self.max_batch_tokens, max_seq_len)
    }
}

/// What the policy knows of the entries waiting: interactive ones but for the last field.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Waiting {
    pub num_entries: usize,
    pub num_tokens: usize,
    /// When the entry that waits longest was pushed; `None` when nothing waits.
    pub oldest: Option<Instant>,
    pub num_background: usize,
}

/// What the worker does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Form a batch for this class and launch it now. One for background work wants an idle device: it holds up
    /// whoever comes for as long as it takes, and behind another it would for as long as both take.
    Launch(Priority),
    /// Nothing to launch before this instant, unless more entries come.
    WaitUntil(Instant),
    /// Nothing waits.
    Idle,
}

/// Decides for a device that can take a batch.
///
/// A batch goes as soon as it is full or its oldest entry has waited `max_queue_delay`. With the delay at
/// 0 the device never idles while something waits: batches grow by themselves because entries collect
/// while the batch before is computed, the more the higher the load (adaptive batching as in Crankshaw
/// et al. 2017, Clipper, section 4.3, where a delay above 0 pays only for bursty light load).
///
/// Background entries have no say in it and get a batch of their own when nothing else waits: also an entry that waits
/// for company would wait for that batch instead. A delay is not for them, they have time.
pub fn decide(waiting: &Waiting, limits: &BatchLimits, now: Instant) -> Decision {
    let Some(oldest) = waiting.oldest.filter(|_| waiting.num_entries > 0) else {
        return if waiting.num_background > 0 { Decision::Launch(Priority::Background) } else { Decision::Idle };
    };
    let full = waiting.num_entries >= limits.max_batch_size || waiting.num_tokens >= limits.max_batch_tokens;
    let due = oldest + limits.max_queue_delay;
    if full || now >= due { Decision::Launch(Priority::Interactive) } else { Decision::WaitUntil(due) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(delay_ms: u64) -> BatchLimits {
        BatchLimits {
            max_batch_size: 4,
            max_batch_tokens: 100,
            max_queue_delay: Duration::from_millis(delay_ms),
            max_queue_size: 10,
        }
    }

    fn waiting(num_entries: usize, num_tokens: usize, oldest: Instant) -> Waiting {
        Waiting { num_entries, num_tokens, oldest: Some(oldest), num_background: 0 }
    }

    #[test]
    fn nothing_waiting_is_idle() {
        assert_eq!(decide(&Waiting::default(), &limits(0), Instant::now()), Decision::Idle);
    }

    #[test]
    fn without_a_delay_one_entry_goes_at_once() {
        let now = Instant::now();
        assert_eq!(decide(&waiting(1, 1, now), &limits(0), now), Decision::Launch(Priority::Interactive));
    }

    #[test]
    fn with_a_delay_an_entry_waits_for_company_until_it_is_due_or_the_batch_is_full() {
        let start = Instant::now();
        let due = start + Duration::from_millis(5);
        assert_eq!(decide(&waiting(1, 10, start), &limits(5), start), Decision::WaitUntil(due));
        assert_eq!(decide(&waiting(3, 99, start), &limits(5), due - Duration::from_nanos(1)), Decision::WaitUntil(due));
        assert_eq!(decide(&waiting(1, 10, start), &limits(5), due), Decision::Launch(Priority::Interactive));
        assert_eq!(
            decide(&waiting(4, 40, start), &limits(5), start),
            Decision::Launch(Priority::Interactive),
            "full by entries"
        );
        assert_eq!(
            decide(&waiting(2, 100, start), &limits(5), start),
            Decision::Launch(Priority::Interactive),
            "full by tokens"
        );
    }

    #[test]
    fn background_has_no_say_until_it_is_alone() {
        let start = Instant::now();
        let late = start + Duration::from_secs(60);
        let alone = Waiting { num_background: 1, ..Waiting::default() };
        assert_eq!(decide(&alone, &limits(5), start), Decision::Launch(Priority::Background), "without a delay");
        for (num_entries, num_tokens) in [(1, 10), (3, 99), (4, 40), (2, 100)] {
            let without = waiting(num_entries, num_tokens, start);
            let with = Waiting { num_background: 1000, ..without };
            for now in [start, start + Duration::from_millis(4), start + Duration::from_millis(5), late] {
                assert_eq!(decide(&with, &limits(5), now), decide(&without, &limits(5), now));
            }
        }
    }

    #[test]
    fn limits_that_could_never_launch_are_refused_by_name() {
        for (name, bad) in [
            ("max_batch_size", BatchLimits { max_batch_size: 0, ..limits(0) }),
            ("max_queue_size", BatchLimits { max_queue_size: 0, ..limits(0) }),
            ("max_batch_tokens", BatchLimits { max_batch_tokens: 31, ..limits(0) }),
        ] {
            let error = bad.check(32).unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
        limits(0).check(32).unwrap();
    }
}
