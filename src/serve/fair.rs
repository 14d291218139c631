//! Which entries go next: requests take turns, so that one question does not wait behind a list of ten thousand.
//!
//! Deficit round robin over the waiting requests: each turn gives a request a credit of `quantum` tokens, and
//! its entries go, first come first, while the credit covers them. What is left of the credit is kept for the
//! next turn, so the device's time is shared evenly among requests however long their inputs are. Requests of
//! a few inputs are through in one turn, and among themselves they are served in the order they came. Nobody
//! starves: a request waits at most one quantum of each other request between two of its own turns.
//!
//! Each class of requests has a round of its own, see [`super::backlog`].
//!
//! Shortest first was rejected: it starves long requests under load. One queue in order of arrival was
//! rejected: there a short request waits for everything before it.
//! Source: Shreedhar and Varghese 1996, Efficient Fair Queuing Using Deficit Round-Robin, section 3.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::cost::CostModel;
use super::dispatch::Load;
use super::queue::Push;
use super::room::Places;
use super::ticket::{Client, Gone, Ticket};
use crate::Error;

/// The entries of one class that wait for one worker. Owned by it: no lock.
#[derive(Default)]
pub struct Round {
    /// The front has the turn.
    requests: VecDeque<Waiter>,
    waiting: Load,
    /// All that ever came.
    pushed: Load,
    /// Tokens a turn. With at least the longest input's length every turn launches something, which is what
    /// makes the choice of the next entry O(1).
    quantum: usize,
}

/// One request's entries.
struct Waiter {
    client: Arc<Client>,
    tickets: VecDeque<Ticket>,
    places: Places,
    num_tokens: usize,
    /// Tokens it may still launch in this turn.
    credit: usize,
}

/// What a look for a batch found.
#[derive(Default)]
pub struct Taken {
    /// Within the limits; empty if nobody waits any more.
    pub tickets: Vec<Ticket>,
    /// Of all of these.
    pub num_tokens: usize,
    /// Entries dropped because their deadline passed or could not be met.
    pub num_expired: usize,
    /// Entries dropped because their client went or was answered.
    pub num_closed: usize,
}

/// How far a batch may be filled.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    pub max_entries: usize,
    /// A batch's first entry goes whatever it has.
    pub max_tokens: usize,
}

impl Round {
    /// `quantum` is the length of the longest input, in tokens, or more.
    pub fn new(quantum: usize) -> Self {
        Self { quantum: quantum.max(1), ..Self::default() }
    }

    /// Adds a request at the end of the round.
    pub fn push(&mut self, push: Push) {
        let num_tokens = push.tickets.iter().map(Ticket::num_tokens).sum();
        let load = Load { num_entries: push.tickets.len(), num_tokens };
        self.waiting += load;
        self.pushed += load;
        let Push { client, tickets, places } = push;
        self.requests.push_back(Waiter { client, tickets: tickets.into(), places, num_tokens, credit: self.quantum });
    }

    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    pub fn waiting(&self) -> Load {
        self.waiting
    }

    /// When the entry that waits longest was pushed. The front request stands for the oldest: with a delay above 0
    /// turns rarely pass, and at 0 the age does not matter.
    pub fn oldest(&self) -> Option<Instant> {
        self.requests.front().and_then(|r| r.tickets.front()).map(|t| t.pushed)
    }

    /// All that came and waits no more, however it left.
    pub fn left(&self) -> Load {
        self.pushed - self.waiting
    }

    /// Adds the next entries to a batch while its bounds allow, and drops on the way what nobody waits for.
    ///
    /// An entry that would come too late by the cost model's estimate is answered with `Deadline` now: computing
    /// it would take the time of those who can still be served, and under overload of nearly everyone. The last
    /// request that waits is never dropped on an estimate alone: something is launched, and corrects it.
    pub fn take(&mut self, taken: &mut Taken, bounds: Bounds, cost: &CostModel, now: Instant) {
        while taken.tickets.len() < bounds.max_entries {
            let is_last_hope = taken.tickets.is_empty() && self.requests.len() == 1;
            let Some(request) = self.requests.front_mut() else { break };
            if let Some(gone) = request.client.gone(now) {
                let num_dropped = self.drop_front();
                match gone {
                    Gone::Expired => taken.num_expired += num_dropped,
                    Gone::Closed | Gone::Answered => taken.num_closed += num_dropped,
                }
                continue;
            }
            // Never empty: a request leaves with its last entry.
            let Some(len) = request.tickets.front().map(Ticket::num_tokens) else {
                self.drop_front();
                continue;
            };
            let num_tokens = taken.num_tokens + len;
            if !taken.tickets.is_empty() && num_tokens > bounds.max_tokens {
                break;
            }
            if !is_last_hope && request.client.deadline < now + cost.batch_at_most(num_tokens) {
                request.client.fail(Error::Deadline { timeout: request.client.timeout });
                taken.num_expired += self.drop_front();
                continue;
            }
            if request.credit < len {
                request.credit += self.quantum;
                self.requests.rotate_left(1);
                continue;
            }
            request.credit -= len;
            request.num_tokens -= len;
            request.places.give_back(1);
            taken.tickets.extend(request.tickets.pop_front());
            let is_last = request.tickets.is_empty();
            taken.num_tokens = num_tokens;
            self.waiting = self.waiting - Load { num_entries: 1, num_tokens: len };
            if is_last {
                self.requests.pop_front();
            }
        }
    }

    /// Takes out what is left of the request whose turn it is.
    pub fn pop_request(&mut self) -> Option<Push> {
        let Waiter { client, tickets, places, num_tokens, credit: _ } = self.requests.pop_front()?;
        self.waiting = self.waiting - Load { num_entries: tickets.len(), num_tokens };
        Some(Push { client, tickets: tickets.into(), places })
    }

    fn drop_front(&mut self) -> usize {
        self.pop_request().map_or(0, |request| request.tickets.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::encode::Encoding;
    use crate::model::pack::RowSpec;
    use crate::request::Priority;
    use crate::serve::cost::Fit;
    use crate::serve::queue::Gate;
    use crate::serve::room::Room;
    use crate::serve::ticket::Answer;
    use crate::{Error, Result};
    use std::time::Duration;
    use tokio::sync::oneshot::Receiver;

    const MINUTE: Duration = Duration::from_secs(60);

    /// A round with its room and its clock.
    struct Desk {
        round: Round,
        gate: Arc<Gate>,
        room: Arc<Room>,
        cost: CostModel,
        now: Instant,
    }

    impl Desk {
        fn new(quantum: usize) -> Self {
            let (gate, room, cost) = Default::default();
            Self { round: Round::new(quantum), gate, room, cost, now: Instant::now() }
        }

        /// Pushes a request with inputs of these lengths; `id` is the first token of each.
        fn push(&mut self, id: u32, lens: &[usize], timeout: Duration) -> Receiver<Result<Answer>> {
            let accepted = self.gate.enter(lens.len()).unwrap();
            let (client, answer) =
                Client::new(lens.len(), self.now, self.now + timeout, Priority::Interactive, accepted);
            let ticket = |(input_idx, &len): (usize, &usize)| Ticket {
                encoding: Encoding { input_ids: vec![id; len], ..Encoding::default() },
                row: RowSpec { normalize: false, dimensions: 1 }.into(),
                input_idx,
                pushed: self.now,
                was_handed_over: false,
                client: client.clone(),
            };
            let tickets = lens.iter().enumerate().map(ticket).collect();
            let places = self.room.reserve(Priority::Interactive, lens.len(), usize::MAX).unwrap();
            self.round.push(Push { client, tickets, places });
            answer
        }

        /// The ids of the next batch.
        fn take(&mut self, max_batch_size: usize, max_batch_tokens: usize) -> Vec<u32> {
            let bounds = Bounds { max_entries: max_batch_size, max_tokens: max_batch_tokens };
            let mut taken = Taken::default();
            self.round.take(&mut taken, bounds, &self.cost, self.now);
            // What the policy is told and the room must be true whatever happened.
            assert_eq!(self.round.waiting().num_entries, self.room.num_taken(Priority::Interactive));
            let tokens = self.round.requests.iter().flat_map(|r| &r.tickets).map(Ticket::num_tokens).sum::<usize>();
            assert_eq!(self.round.waiting().num_tokens, tokens);
            assert_eq!(self.round.left() + self.round.waiting, self.round.pushed);
            assert_eq!(taken.tickets.iter().map(Ticket::num_tokens).sum::<usize>(), taken.num_tokens);
            taken.tickets.iter().map(|t| t.encoding.input_ids[0]).collect()
        }

        /// Teaches that a token takes a second.
        fn learn_a_second_a_token(&mut self) {
            let mut fit = Fit::default();
            fit.learn(1, 1, Duration::from_secs(1));
            self.cost.publish(&fit);
        }
    }

    #[test]
    fn single_inputs_go_in_the_order_they_came() {
        let mut desk = Desk::new(16);
        let _answers: Vec<_> = (0..5).map(|id| desk.push(id, &[16], MINUTE)).collect();
        assert_eq!(desk.take(3, 1000), [0, 1, 2]);
        assert_eq!(desk.take(3, 1000), [3, 4]);
        assert!(desk.round.is_empty());
        assert_eq!(desk.take(3, 1000), [] as [u32; 0]);
    }

    #[test]
    fn a_batch_keeps_both_limits() {
        let mut desk = Desk::new(16);
        let _answers: Vec<_> = [10, 10, 5, 16, 1].iter().map(|&len| desk.push(len as u32, &[len], MINUTE)).collect();
        assert_eq!(desk.take(10, 24), [10, 10], "the third would be token 25");
        assert_eq!(desk.take(10, 21), [5, 16]);
        assert_eq!(desk.take(10, 21), [1]);
    }

    #[test]
    fn a_short_request_passes_a_long_one_after_its_turn() {
        let mut desk = Desk::new(16);
        let _long = desk.push(1, &[4; 100], MINUTE);
        assert_eq!(desk.take(2, 1000), [1, 1]);
        let _short = desk.push(2, &[16], MINUTE);
        // The turn of 16 tokens is used up by four inputs; then the short request has its own.
        assert_eq!(desk.take(8, 1000), [1, 1, 2, 1, 1, 1, 1, 1]);
    }

    #[test]
    fn tokens_are_shared_evenly_however_long_the_inputs() {
        let mut desk = Desk::new(16);
        let _short = desk.push(1, &[2; 400], MINUTE);
        let _long = desk.push(2, &[15; 100], MINUTE);
        let mut tokens = [0, 0];
        for _ in 0..20 {
            for id in desk.take(8, 1000) {
                tokens[id as usize - 1] += if id == 1 { 2 } else { 15 };
            }
        }
        let difference = tokens[0] as i64 - tokens[1] as i64;
        assert!(difference.abs() <= 2 * 16, "{tokens:?}");
    }

    #[test]
    fn what_nobody_waits_for_is_dropped_whole() {
        let mut desk = Desk::new(16);
        let gone = desk.push(1, &[1; 10], MINUTE);
        let mut late = desk.push(2, &[1; 10], Duration::from_secs(1));
        let _waits = desk.push(3, &[1], MINUTE);
        drop(gone);
        desk.now += Duration::from_secs(2);
        assert_eq!(desk.take(8, 1000), [3]);
        assert_eq!(late.try_recv().unwrap().unwrap_err(), Error::Deadline { timeout: Duration::from_secs(1) });
        assert_eq!(desk.gate.num_accepted(), 0);
    }

    #[test]
    fn what_would_come_too_late_makes_room_for_what_will_not() {
        let mut desk = Desk::new(16);
        desk.learn_a_second_a_token();
        let mut hopeless = desk.push(1, &[10], Duration::from_secs(5));
        let _waits = desk.push(2, &[10], MINUTE);
        let mut alone_in_time = desk.push(3, &[10], Duration::from_secs(15));
        assert_eq!(desk.take(8, 1000), [2], "the third would be in time alone, but not in this batch");
        assert!(hopeless.try_recv().unwrap().is_err());
        assert!(alone_in_time.try_recv().unwrap().is_err());
    }

    #[test]
    fn the_last_hope_is_launched_whatever_the_estimate() {
        let mut desk = Desk::new(16);
        desk.learn_a_second_a_token();
        let mut first = desk.push(1, &[10], Duration::from_secs(5));
        let mut second = desk.push(2, &[10], Duration::from_secs(5));
        assert_eq!(desk.take(8, 1000), [2]);
        assert!(first.try_recv().unwrap().is_err());
        assert!(second.try_recv().is_err(), "not answered yet");
    }

    #[test]
    fn a_request_taken_out_keeps_its_entries_and_places() {
        let mut desk = Desk::new(16);
        let _answers = [desk.push(1, &[10, 10, 10], MINUTE), desk.push(2, &[5], MINUTE)];
        assert_eq!(desk.take(1, 1000), [1]);
        let push = desk.round.pop_request().unwrap();
        let left: Vec<_> = push.tickets.iter().map(|t| t.input_idx).collect();
        assert_eq!((left, desk.room.num_taken(Priority::Interactive)), (vec![1, 2], 3));
        assert_eq!(desk.round.waiting().num_entries, 1);
        drop(push);
        assert_eq!(desk.take(8, 1000), [2]);
    }
}
