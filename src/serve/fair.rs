//! Which entries go next: requests take turns, so that one question does not wait behind a list of ten thousand.
//!
//! Deficit round robin over the waiting requests: each turn gives a request a credit of `quantum` tokens, and
//! its entries go, first come first, while the credit covers them. What is left of the credit is kept for the
//! next turn, so the device's time is shared evenly among requests however long their inputs are. Requests of
//! a few inputs are through in one turn, and among themselves they are served in the order they came. Nobody
//! starves: a request waits at most one quantum of each other request between two of its own turns.
//!
//! Shortest first was rejected: it starves long requests under load. One queue in order of arrival was
//! rejected: there a short request waits for everything before it.
//! Source: Shreedhar and Varghese 1996, Efficient Fair Queuing Using Deficit Round-Robin, section 3.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::cost::CostModel;
use super::policy::{BatchLimits, Waiting};
use super::queue::{Places, Push};
use super::ticket::{Client, Gone, Ticket};
use crate::Error;

/// The entries waiting for one worker. Owned by it: no lock.
#[derive(Default)]
pub struct Backlog {
    /// The front has the turn.
    requests: VecDeque<Waiter>,
    num_entries: usize,
    num_tokens: usize,
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
    /// Entries dropped because their deadline passed or could not be met.
    pub num_expired: usize,
    /// Entries dropped because their client went or was answered.
    pub num_closed: usize,
}

impl Backlog {
    pub fn new(quantum: usize) -> Self {
        Self { quantum: quantum.max(1), ..Self::default() }
    }

    /// Adds a request at the end of the round.
    pub fn push(&mut self, push: Push) {
        let num_tokens = push.tickets.iter().map(Ticket::num_tokens).sum();
        self.num_entries += push.tickets.len();
        self.num_tokens += num_tokens;
        let Push { client, tickets, places } = push;
        self.requests.push_back(Waiter { client, tickets: tickets.into(), places, num_tokens, credit: self.quantum });
    }

    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// What the policy needs to know. The front request stands for the oldest: with a delay above 0 turns
    /// rarely pass, and at 0 the age does not matter.
    pub fn waiting(&self) -> Waiting {
        let oldest = self.requests.front().and_then(|r| r.tickets.front()).map(|t| t.pushed);
        Waiting { num_entries: self.num_entries, num_tokens: self.num_tokens, oldest }
    }

    /// Takes the entries of the next batch, and drops on the way what nobody waits for.
    ///
    /// An entry that would come too late by the cost model's estimate is answered with `Deadline` now: computing
    /// it would take the time of those who can still be served, and under overload of nearly everyone. The
    /// first entry of a batch is never dropped on an estimate alone: a wrong one corrects itself by what is
    /// launched.
    pub fn take(&mut self, limits: &BatchLimits, cost: &CostModel, now: Instant) -> Taken {
        let mut taken = Taken::default();
        let mut total_tokens = 0;
        while taken.tickets.len() < limits.max_batch_size
            && let Some(request) = self.requests.front_mut()
        {
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
            if !taken.tickets.is_empty() {
                if total_tokens + len > limits.max_batch_tokens {
                    break;
                }
                if request.client.deadline < now + cost.batch(total_tokens + len) {
                    request.client.fail(Error::Deadline { timeout: request.client.timeout });
                    taken.num_expired += self.drop_front();
                    continue;
                }
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
            total_tokens += len;
            self.num_entries -= 1;
            self.num_tokens -= len;
            if is_last {
                self.requests.pop_front();
            }
        }
        taken
    }

    /// Answers everyone who waits with `error`. Returns the number of entries.
    pub fn fail_all(&mut self, error: &Error) -> usize {
        let num_entries = self.num_entries;
        while let Some(request) = self.requests.front() {
            request.client.fail(error.clone());
            self.drop_front();
        }
        num_entries
    }

    fn drop_front(&mut self) -> usize {
        let Some(request) = self.requests.pop_front() else { return 0 };
        self.num_entries -= request.tickets.len();
        self.num_tokens -= request.num_tokens;
        request.tickets.len()
    }
}
