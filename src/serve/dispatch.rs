//! Which of a model's devices gets a request's entries. Pure: what the devices are at is an argument, so every rule
//! here is tested without one.
//!
//! Entries go where they are expected to be done first: to the device whose learned cost, applied to all that waits
//! and runs there and to what is added, is the least. That keeps the devices' work level in time, however unlike they
//! are, and a slow one gets nothing that a fast one would have done sooner. A request of several batches is cut into
//! chunks which are placed one by one in the same way, so that a long list uses all devices.
//!
//! Each device's backlog takes turns between requests (see [`super::fair`]), so an entry is done no later than the
//! estimate, which counts all that waits as going before it. Counting only what goes before this request was rejected:
//! a device with one long list would look idle to every short request.
//! Source: Ibarra and Kim 1977, Heuristic Algorithms for Scheduling Independent Tasks on Nonidentical Processors (jobs
//! in order of arrival, each to the machine that completes it first).

use std::ops::{Add, AddAssign, Sub};

use super::cost::Line;
use super::health::Standing;
use super::policy::BatchLimits;

/// An amount of work.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    pub num_entries: usize,
    pub num_tokens: usize,
}

/// What the decision knows of one device.
#[derive(Debug, Clone, Copy)]
pub struct Candidate {
    pub standing: Standing,
    /// Waiting for it and on it.
    pub load: Load,
    /// Zero before the warm-up has taught it.
    pub cost: Line,
    /// Seconds by which the batch on it is later than any batch should be: a device that may hang, long before it
    /// counts as hung. Nobody knows how much longer it takes; as long again is as good a guess as any.
    pub overdue_s: f64,
}

impl Candidate {
    /// Seconds until it has done all it has and `more`.
    fn seconds_with(&self, more: Load, limits: &BatchLimits) -> f64 {
        let Load { num_entries, num_tokens } = self.load + more;
        self.overdue_s + self.cost.seconds(num_entries, num_tokens, limits)
    }
}

/// Cuts a request into chunks of consecutive entries, each at least a full batch; a request of less is one chunk.
///
/// Smaller chunks would end sooner on idle devices, but under load they would be many small batches for one large one.
pub fn chunks(lens: impl Iterator<Item = usize>, limits: &BatchLimits) -> Vec<Load> {
    let (mut chunks, mut open): (Vec<Load>, _) = (Vec::new(), Load::default());
    for num_tokens in lens {
        let entry = Load { num_entries: 1, num_tokens };
        let next = open + entry;
        let is_full = next.num_entries > limits.max_batch_size || next.num_tokens > limits.max_batch_tokens;
        if is_full && open.num_entries > 0 {
            chunks.push(open);
            open = entry;
        } else {
            open = next;
        }
    }
    let is_batch = open.num_entries >= limits.max_batch_size || open.num_tokens >= limits.max_batch_tokens;
    match chunks.last_mut() {
        Some(last) if !is_batch => *last += open,
        _ => chunks.push(open),
    }
    chunks
}

/// The device of each chunk, as an index into `devices`, which is not empty.
///
/// Only devices of the best standing there is get any. `turn` goes up by one a request: it says who is first among
/// equals, as all are before they have learned their cost. The chunks are added to the loads of `devices`.
pub fn dispatch(chunks: &[Load], devices: &mut [Candidate], limits: &BatchLimits, turn: usize) -> Vec<usize> {
    let best = devices.iter().map(|d| d.standing).min();
    let able: Vec<usize> = (0..devices.len()).filter(|&i| Some(devices[i].standing) == best).collect();
    let mut targets = Vec::with_capacity(chunks.len());
    for (i, &chunk) in chunks.iter().enumerate() {
        let first = (turn + i) % able.len().max(1);
        let in_turn = able[first..].iter().chain(&able[..first]);
        let seconds = in_turn.map(|&device| (devices[device].seconds_with(chunk, limits), device));
        // Of equals the first; none is a NaN, because no fit is.
        let Some((_, target)) = seconds.reduce(|best, next| if next.0 < best.0 { next } else { best }) else { break };
        devices[target].load += chunk;
        targets.push(target);
    }
    targets
}

impl Add for Load {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let Self { num_entries, num_tokens } = self;
        Self { num_entries: num_entries + other.num_entries, num_tokens: num_tokens + other.num_tokens }
    }
}

impl AddAssign for Load {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

/// What is left, not below nothing.
impl Sub for Load {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            num_entries: self.num_entries.saturating_sub(other.num_entries),
            num_tokens: self.num_tokens.saturating_sub(other.num_tokens),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::time::Duration;

    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    const FAST: Line = Line { base_s: 1e-3, per_token_s: 10e-6 };
    const SLOW: Line = Line { base_s: 4e-3, per_token_s: 40e-6 };

    fn limits() -> BatchLimits {
        BatchLimits { max_batch_size: 8, max_batch_tokens: 100, max_queue_delay: Duration::ZERO, max_queue_size: 1000 }
    }

    fn load(num_entries: usize, num_tokens: usize) -> Load {
        Load { num_entries, num_tokens }
    }

    fn ready(cost: Line, load: Load) -> Candidate {
        Candidate { standing: Standing::Ready, load, cost, overdue_s: 0.0 }
    }

    /// Where a request of these chunks goes.
    fn targets(chunks: &[Load], devices: &[Candidate], turn: usize) -> Vec<usize> {
        dispatch(chunks, &mut devices.to_vec(), &limits(), turn)
    }

    #[test]
    fn the_one_that_is_done_first_gets_it() {
        let one = [load(1, 10)];
        let idle = load(0, 0);
        for turn in 0..3 {
            assert_eq!(targets(&one, &[ready(SLOW, idle), ready(FAST, idle)], turn), [1], "the fast one");
            assert_eq!(targets(&one, &[ready(FAST, load(5, 50)), ready(FAST, idle)], turn), [1], "the idle one");
            assert_eq!(targets(&one, &[ready(SLOW, idle), ready(FAST, load(8, 80))], turn), [1], "still sooner");
            assert_eq!(targets(&one, &[ready(SLOW, idle), ready(FAST, load(40, 400))], turn), [0], "no longer");
        }
    }

    #[test]
    fn equals_take_turns_among_those_able() {
        let unlearned = |load| ready(Line::default(), load);
        let equal = [unlearned(load(0, 0)), unlearned(load(9, 90)), unlearned(load(0, 0))];
        let one = [load(1, 10)];
        assert_eq!([0, 1, 2, 3].map(|turn| targets(&one, &equal, turn)[0]), [0, 1, 2, 0]);
        let mut two = equal;
        two[0].standing = Standing::Down;
        assert_eq!([0, 1, 2, 3].map(|turn| targets(&one, &two, turn)[0]), [1, 2, 1, 2]);
    }

    #[test]
    fn who_is_not_ready_gets_nothing_while_others_are() {
        let busy = load(500, 5000);
        for standing in [Standing::Restarting, Standing::Down] {
            let idle = Candidate { standing, ..ready(FAST, load(0, 0)) };
            assert_eq!(targets(&[load(1, 10)], &[idle, ready(SLOW, busy)], 0), [1]);
        }
        let of = |standing| Candidate { standing, ..ready(FAST, load(0, 0)) };
        assert_eq!(targets(&[load(1, 1)], &[of(Standing::Down), of(Standing::Restarting)], 0), [1]);
        assert_eq!(targets(&[load(1, 1)], &[of(Standing::Down); 2], 1), [1], "where all are down it waits somewhere");
    }

    #[test]
    fn one_that_is_overdue_is_avoided_before_it_counts_as_hung() {
        let overdue = Candidate { overdue_s: 0.5, ..ready(FAST, load(8, 80)) };
        assert_eq!(targets(&[load(1, 10)], &[overdue, ready(SLOW, load(80, 800))], 0), [1]);
    }

    #[test]
    fn chunks_are_full_batches_and_the_rest_rides_with_the_last() {
        let of = |lens: &[usize]| chunks(lens.iter().copied(), &limits());
        assert_eq!(of(&[100]), [load(1, 100)]);
        assert_eq!(of(&[1; 15]), [load(15, 15)], "not two batches");
        assert_eq!(of(&[1; 16]), [load(8, 8), load(8, 8)]);
        assert_eq!(of(&[1; 23]), [load(8, 8), load(15, 15)]);
        assert_eq!(of(&[60, 60, 60, 30]), [load(1, 60), load(3, 150)]);
        assert_eq!(of(&[60, 30, 100]), [load(2, 90), load(1, 100)]);
        assert_eq!(of(&[500, 500]), [load(1, 500), load(1, 500)], "beyond the limit, as a lowered one leaves them");
    }

    #[test]
    fn a_long_list_is_shared_where_that_ends_sooner() {
        let idle = load(0, 0);
        let list = vec![load(8, 80); 10];
        let count = |devices: &[Candidate]| {
            let targets = targets(&list, devices, 0);
            [0, 1].map(|device| targets.iter().filter(|&&t| t == device).count())
        };
        assert_eq!(count(&[ready(FAST, idle), ready(FAST, idle)]), [5, 5]);
        assert_eq!(count(&[ready(FAST, idle), ready(SLOW, idle)]), [8, 2]);
        assert_eq!(count(&[ready(FAST, idle), ready(SLOW, load(80, 800))]), [10, 0]);
    }

    /// A device in virtual time: takes what waits, up to the limit, whenever it is free.
    struct Simulated {
        cost: Line,
        /// Arrival of each entry; all are of 10 tokens.
        waiting: VecDeque<f64>,
        on_device: usize,
        free_at: f64,
        latencies: Vec<f64>,
    }

    const LEN: usize = 10;

    impl Simulated {
        fn new(cost: Line) -> Self {
            Self { cost, waiting: VecDeque::new(), on_device: 0, free_at: 0.0, latencies: Vec::new() }
        }

        fn advance(&mut self, now: f64) {
            while self.free_at <= now {
                self.on_device = 0;
                let Some(&first) = self.waiting.front() else { return };
                let start = self.free_at.max(first);
                let is_there = |&&arrival: &&f64| arrival <= start;
                self.on_device = self.waiting.iter().take(limits().max_batch_size).take_while(is_there).count();
                self.free_at = start + self.cost.seconds(self.on_device, self.on_device * LEN, &limits());
                let ended = self.waiting.drain(..self.on_device).map(|arrival| self.free_at - arrival);
                self.latencies.extend(ended);
            }
        }

        fn candidate(&self) -> Candidate {
            let num_entries = self.waiting.len() + self.on_device;
            ready(self.cost, load(num_entries, num_entries * LEN))
        }
    }

    /// Entries each device did and the p99 of all latencies, of 20,000 requests of one entry that come at random.
    fn simulate(costs: &[Line], per_second: f64) -> (Vec<usize>, f64) {
        let mut devices: Vec<Simulated> = costs.iter().map(|&cost| Simulated::new(cost)).collect();
        let mut rng = SmallRng::seed_from_u64(1);
        let mut now = 0.0;
        for turn in 0..20_000 {
            now -= (1.0 - rng.random::<f64>()).ln() / per_second;
            devices.iter_mut().for_each(|d| d.advance(now));
            let mut candidates: Vec<Candidate> = devices.iter().map(Simulated::candidate).collect();
            let target = dispatch(&[load(1, LEN)], &mut candidates, &limits(), turn)[0];
            devices[target].waiting.push_back(now);
        }
        devices.iter_mut().for_each(|d| d.advance(f64::MAX));
        let mut latencies: Vec<f64> = devices.iter().flat_map(|d| d.latencies.iter().copied()).collect();
        latencies.sort_by(f64::total_cmp);
        (devices.iter().map(|d| d.latencies.len()).collect(), latencies[latencies.len() * 99 / 100])
    }

    /// Requests a second that a device does in full batches.
    fn capacity(cost: Line) -> f64 {
        let num_entries = limits().max_batch_size;
        num_entries as f64 / cost.seconds(num_entries, num_entries * LEN, &limits())
    }

    #[test]
    fn a_fast_and_a_slow_device_share_the_load_in_proportion() {
        // The slow one is a fourth as fast: at nearly all that both can do, it does a fifth.
        let (done, _) = simulate(&[FAST, SLOW], 0.97 * (capacity(FAST) + capacity(SLOW)));
        assert!((3_200..4_800).contains(&done[1]), "{done:?}");
    }

    #[test]
    fn a_slow_device_beside_a_fast_one_makes_nobody_late() {
        for share in [0.1, 0.5, 0.8, 0.95] {
            let per_second = share * capacity(FAST);
            let (_, alone) = simulate(&[FAST], per_second);
            let (done, both) = simulate(&[SLOW, FAST], per_second);
            // Nobody is later than the slow one's shortest batch, which is what it is given work against.
            let least = SLOW.seconds(1, LEN, &limits());
            assert!(both <= alone.max(1.05 * least), "at {share}: p99 {both} beside {alone} alone, {done:?}");
        }
    }
}
