//! What waits for one worker: interactive requests, and behind them background ones, which get what these leave.
//!
//! | what waits | the next batch |
//! |---|---|
//! | interactive, more than a batch holds | interactive entries alone |
//! | interactive, all of it in the batch | these, and as much background as lengthens the batch by a tenth at most |
//! | background alone | background entries for 10 ms, on an idle device |
//!
//! Each bound is one of time by the learned cost, because the same room in a batch costs hardly anything on one device
//! and its full length on another: a GPU's batch of a few tokens takes about as long as one of a few hundred, a CPU takes
//! its tokens one after another. A share of `max_batch_tokens` for background work was rejected for that reason: it is a
//! few milliseconds with one model and device, and seconds with another.
//!
//! Nothing bounds how long background entries wait while interactive ones fill every batch; their deadlines apply. Both
//! classes take turns among themselves, see [`super::fair`].

use std::time::Instant;

use super::class::PerClass;
use super::cost::CostModel;
use super::dispatch::Load;
use super::fair::{Bounds, Round, Taken};
use super::policy::{BatchLimits, Waiting};
use super::queue::Push;
use crate::Error;
use crate::request::Priority;

/// The entries waiting for one worker. Owned by it: no lock.
#[derive(Default)]
pub struct Backlog {
    rounds: PerClass<Round>,
}

impl Backlog {
    /// `quantum` is a turn's tokens, see [`Round::new`].
    pub fn new(quantum: usize) -> Self {
        Self { rounds: PerClass::new(|_| Round::new(quantum)) }
    }

    /// Adds a request at the end of its class's round.
    pub fn push(&mut self, push: Push) {
        self.rounds[push.client.priority].push(push);
    }

    pub fn is_empty(&self) -> bool {
        self.rounds.interactive.is_empty() && self.rounds.background.is_empty()
    }

    /// What the policy needs to know.
    pub fn waiting(&self) -> Waiting {
        let Load { num_entries, num_tokens } = self.rounds.interactive.waiting();
        let num_background = self.rounds.background.waiting().num_entries;
        Waiting { num_entries, num_tokens, oldest: self.rounds.interactive.oldest(), num_background }
    }

    /// All that came and waits no more, however it left.
    pub fn left(&self) -> PerClass<Load> {
        let PerClass { interactive, background } = &self.rounds;
        PerClass { interactive: interactive.left(), background: background.left() }
    }

    /// Takes the entries of the next batch, which the policy wants for this class, and drops on the way what nobody
    /// waits for. Interactive entries come before all background ones.
    ///
    /// A batch for background work has none but background entries: call for one only while nothing else waits.
    pub fn take(&mut self, class: Priority, limits: &BatchLimits, cost: &CostModel, now: Instant) -> Taken {
        let mut taken = Taken::default();
        let mut bounds = Bounds { max_entries: limits.max_batch_size, max_tokens: limits.max_batch_tokens };
        match class {
            Priority::Interactive => {
                self.rounds.interactive.take(&mut taken, bounds, cost, now);
                let is_left = !taken.tickets.is_empty() && self.rounds.interactive.is_empty();
                if is_left && !self.rounds.background.is_empty() {
                    bounds.max_tokens = bounds.max_tokens.min(along(&taken, cost, now));
                    self.rounds.background.take(&mut taken, bounds, cost, now);
                }
            }
            Priority::Background => {
                bounds.max_tokens = bounds.max_tokens.min(cost.tokens_alone());
                self.rounds.background.take(&mut taken, bounds, cost, now);
            }
        }
        taken
    }

    /// Answers everyone who waits with `error`. Returns the number of entries.
    pub fn fail_all(&mut self, error: &Error) -> usize {
        let mut num_entries = 0;
        while let Some(request) = self.pop_request() {
            num_entries += request.tickets.len();
            request.client.fail(error.clone());
        }
        num_entries
    }

    /// Takes out what is left of the request whose turn it is, background ones last.
    pub fn pop_request(&mut self) -> Option<Push> {
        self.rounds.interactive.pop_request().or_else(|| self.rounds.background.pop_request())
    }
}

/// Tokens that a batch of interactive entries may have once background entries ride along: neither is it much longer for
/// them, nor does it make one of the others late.
fn along(taken: &Taken, cost: &CostModel, now: Instant) -> usize {
    let earliest = taken.tickets.iter().map(|ticket| ticket.client.deadline).min().unwrap_or(now);
    let in_time = cost.tokens_at_most(earliest.saturating_duration_since(now));
    cost.tokens_along(taken.num_tokens).min(in_time)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Result;
    use crate::model::encode::Encoding;
    use crate::model::pack::RowSpec;
    use crate::serve::batch::Batch;
    use crate::serve::cost::Fit;
    use crate::serve::queue::Gate;
    use crate::serve::room::Room;
    use crate::serve::ticket::{Answer, Client, Ticket};
    use Priority::{Background, Interactive};
    use proptest::prelude::*;
    use std::collections::HashMap;
    use std::sync::Arc;
    use std::time::Duration;
    use tokio::sync::oneshot::Receiver;

    const MINUTE: Duration = Duration::from_secs(60);
    const QUANTUM: usize = 16;

    /// A backlog with its room and its clock.
    struct Desk {
        backlog: Backlog,
        gate: Arc<Gate>,
        room: Arc<Room>,
        cost: CostModel,
        limits: BatchLimits,
        now: Instant,
    }

    impl Desk {
        fn new(max_batch_size: usize, max_batch_tokens: usize) -> Self {
            let max_queue_delay = Duration::ZERO;
            let limits = BatchLimits { max_batch_size, max_batch_tokens, max_queue_delay, max_queue_size: usize::MAX };
            let (gate, room, cost) = Default::default();
            Self { backlog: Backlog::new(QUANTUM), gate, room, cost, limits, now: Instant::now() }
        }

        /// Teaches what a batch takes, and what a token does.
        fn learn(&mut self, base: Duration, per_token: Duration) {
            let mut fit = Fit::default();
            for num_tokens in [1u32, 100].repeat(50) {
                fit.learn(1, num_tokens as usize, base + per_token * num_tokens);
            }
            self.cost = CostModel::default();
            self.cost.publish(&fit);
        }

        /// Pushes a request with inputs of these lengths; `id` is the first token of each.
        fn push(&mut self, class: Priority, id: u32, lens: &[usize], timeout: Duration) -> Receiver<Result<Answer>> {
            let accepted = self.gate.enter(lens.len()).unwrap();
            let (client, answer) = Client::new(lens.len(), self.now, self.now + timeout, class, accepted);
            let ticket = |(input_idx, &len): (usize, &usize)| Ticket {
                encoding: Encoding { input_ids: vec![id; len], ..Encoding::default() },
                row: RowSpec { normalize: false, dimensions: 1 }.into(),
                input_idx,
                pushed: self.now,
                was_handed_over: false,
                client: client.clone(),
            };
            let tickets = lens.iter().enumerate().map(ticket).collect();
            let places = self.room.reserve(class, lens.len(), usize::MAX).unwrap();
            self.backlog.push(Push { client, tickets, places });
            answer
        }

        fn take(&mut self, class: Priority) -> Taken {
            let taken = self.backlog.take(class, &self.limits, &self.cost, self.now);
            let waiting = self.backlog.waiting();
            assert_eq!(waiting.num_entries, self.room.num_taken(Interactive));
            assert_eq!(waiting.num_entries + waiting.num_background, self.room.num_taken(Background));
            taken
        }

        /// The ids of the next batch.
        fn ids(&mut self, class: Priority) -> Vec<u32> {
            self.take(class).tickets.iter().map(|ticket| ticket.encoding.input_ids[0]).collect()
        }
    }

    #[test]
    fn interactive_entries_fill_batches_first_and_leave_the_rest() {
        let mut desk = Desk::new(4, 1000);
        let _answers = [
            desk.push(Background, 1, &[1; 5], MINUTE),
            desk.push(Interactive, 2, &[1; 6], MINUTE),
            desk.push(Background, 3, &[1], MINUTE),
        ];
        // The device is known for nothing yet, so tokens cost nothing.
        assert_eq!(desk.ids(Interactive), [2, 2, 2, 2]);
        assert_eq!(desk.ids(Interactive), [2, 2, 1, 1]);
        assert_eq!(desk.ids(Interactive), [] as [u32; 0], "there is nothing to ride along with");
        assert_eq!(desk.ids(Background), [1, 1, 1, 3]);
        assert!(desk.backlog.is_empty());
    }

    #[test]
    fn none_rides_along_while_an_interactive_entry_stays_behind() {
        let mut desk = Desk::new(4, 20);
        let _answers = [
            desk.push(Interactive, 1, &[15], MINUTE),
            desk.push(Interactive, 2, &[15], MINUTE),
            desk.push(Background, 3, &[1; 9], MINUTE),
        ];
        assert_eq!(desk.ids(Interactive), [1], "the room of five tokens is not used, for the batch would be longer");
        assert_eq!(desk.ids(Interactive), [2, 3, 3, 3]);
    }

    #[test]
    fn what_rides_along_lengthens_the_batch_by_a_tenth_at_most() {
        let mut desk = Desk::new(100, 1000);
        let _background = desk.push(Background, 9, &[1; 400], MINUTE);
        let mut along = |base_us, per_token_us, len| {
            desk.learn(Duration::from_micros(base_us), Duration::from_micros(per_token_us));
            let _answer = desk.push(Interactive, 1, &[len], MINUTE);
            let ids = desk.ids(Interactive);
            assert_eq!(ids[0], 1);
            ids.len() - 1
        };
        assert_eq!(along(0, 50, 9), 0, "a device that computes token by token");
        assert!((1..=2).contains(&along(0, 50, 16)), "one for sixteen");
        assert!((9..=11).contains(&along(1000, 10, 10)), "110 of 1100 us, and 10 a token");
        assert_eq!(along(1000, 1, 10), 99, "hardly anything: all the room");
    }

    #[test]
    fn background_work_alone_is_bounded_by_time() {
        let mut desk = Desk::new(1000, 1000);
        let _background = desk.push(Background, 9, &[1; 400], MINUTE);
        desk.learn(Duration::from_millis(2), Duration::from_micros(100));
        assert!((78..=82).contains(&desk.ids(Background).len()), "8 ms beside the base");
        desk.learn(Duration::from_secs(2), Duration::from_millis(100));
        assert!((18..=22).contains(&desk.ids(Background).len()), "as long as the base");
        desk.learn(Duration::ZERO, Duration::from_secs(1));
        assert_eq!(desk.ids(Background), [9], "one at least");
    }

    #[test]
    fn nobody_is_late_for_what_rides_along() {
        let mut desk = Desk::new(100, 1000);
        desk.learn(Duration::from_millis(1000), Duration::from_millis(1));
        let _answers =
            [desk.push(Interactive, 1, &[10], Duration::from_millis(1030)), desk.push(Background, 2, &[1; 90], MINUTE)];
        let ids = desk.ids(Interactive);
        assert!((15..=21).contains(&ids.len()), "20 ms are left of the 101 that a tenth would be: {}", ids.len());
    }

    #[test]
    fn deadlines_of_background_work_apply() {
        let mut desk = Desk::new(8, 1000);
        let gone = desk.push(Background, 1, &[1; 10], MINUTE);
        let mut late = desk.push(Background, 2, &[1; 10], Duration::from_secs(1));
        let _waits = desk.push(Background, 3, &[1], MINUTE);
        let _interactive = desk.push(Interactive, 4, &[1], MINUTE);
        drop(gone);
        desk.now += Duration::from_secs(2);
        let taken = desk.take(Interactive);
        assert_eq!((taken.tickets.len(), taken.num_closed, taken.num_expired), (2, 10, 10));
        assert_eq!(late.try_recv().unwrap().unwrap_err(), Error::Deadline { timeout: Duration::from_secs(1) });
        assert!(desk.backlog.is_empty());
    }

    #[test]
    fn failing_all_answers_both_classes() {
        let mut desk = Desk::new(8, 1000);
        let mut answers: Vec<_> =
            [Interactive, Background, Interactive].map(|class| desk.push(class, 1, &[1, 1], MINUTE)).into();
        assert_eq!(desk.backlog.fail_all(&Error::Draining), 6);
        for answer in &mut answers {
            assert_eq!(answer.try_recv().unwrap().unwrap_err(), Error::Draining);
        }
        assert_eq!((desk.room.num_taken(Background), desk.gate.num_accepted()), (0, 0));
        let left = desk.backlog.left();
        assert_eq!((left.interactive.num_entries, left.background.num_entries), (4, 2));
    }

    #[test]
    fn a_batch_knows_its_classes_and_splits_by_them_first() {
        let mut desk = Desk::new(8, 1000);
        let _answers = [
            desk.push(Background, 1, &[3; 2], MINUTE),
            desk.push(Interactive, 2, &[5; 3], MINUTE),
            desk.push(Interactive, 3, &[5], MINUTE),
        ];
        let ids = |tickets: &[Ticket]| tickets.iter().map(|t| t.encoding.input_ids[0]).collect::<Vec<_>>();
        let batch = Batch { tickets: desk.take(Interactive).tickets };
        assert_eq!(batch.background(), Load { num_entries: 2, num_tokens: 6 });
        let Ok((interactive, background)) = batch.split() else { panic!("there are three requests in it") };
        assert_eq!((ids(&interactive.tickets), ids(&background.tickets)), (vec![2, 2, 2, 3], vec![1, 1]));
        assert_eq!(interactive.background(), Load::default());
        assert!(background.split().is_err(), "one request");
    }

    /// One thing that happens at a desk.
    #[derive(Debug, Clone)]
    enum Event {
        Push {
            class: Priority,
            lens: Vec<usize>,
            timeout_ms: u64,
        },
        /// The client of this request goes, if there is one.
        Close(usize),
        Pass {
            ms: u64,
        },
        Take,
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let class = prop_oneof![Just(Interactive), Just(Background)];
        let lens = prop::collection::vec(1..=QUANTUM, 1..12);
        let push =
            (class, lens, 1..2000u64).prop_map(|(class, lens, timeout_ms)| Event::Push { class, lens, timeout_ms });
        let event = prop_oneof![
            4 => push,
            1 => (0..40usize).prop_map(Event::Close),
            1 => (1..100u64).prop_map(|ms| Event::Pass { ms }),
            4 => Just(Event::Take),
        ];
        prop::collection::vec(event, 1..80)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// Whatever comes, goes and passes: every entry leaves once, batches keep their limits, and a background entry
        /// leaves where the rules say and nowhere else.
        #[test]
        fn entries_leave_once_and_in_the_order_of_their_classes(
            events in events(),
            max_batch_size in 1..20usize,
            max_batch_tokens in QUANTUM..120usize,
            (base_us, per_token_us) in (0..20_000u64, 0..2000u64),
        ) {
            let mut desk = Desk::new(max_batch_size, max_batch_tokens);
            desk.learn(Duration::from_micros(base_us), Duration::from_micros(per_token_us));
            // The request's number is the id of its entries. What has not been answered by its end is here.
            let (mut answers, mut num_left) = (Vec::new(), HashMap::new());
            let end = vec![Event::Take; 1000];
            for event in events.into_iter().chain(end) {
                match event {
                    Event::Push { class, lens, timeout_ms } => {
                        let id = answers.len() as u32;
                        num_left.insert(id, lens.len());
                        answers.push(Some(desk.push(class, id, &lens, Duration::from_millis(timeout_ms))));
                    }
                    Event::Close(i) => drop(answers.get_mut(i).and_then(Option::take)),
                    Event::Pass { ms } => desk.now += Duration::from_millis(ms),
                    Event::Take => {
                        let before = desk.backlog.waiting();
                        let class = if before.num_entries > 0 { Interactive } else { Background };
                        let taken = desk.take(class);
                        let after = desk.backlog.waiting();
                        let num_tokens: usize = taken.tickets.iter().map(Ticket::num_tokens).sum();
                        prop_assert_eq!(num_tokens, taken.num_tokens);
                        prop_assert!(taken.tickets.len() <= max_batch_size && num_tokens <= max_batch_tokens);
                        let (num_before, num_after) =
                            (before.num_entries + before.num_background, after.num_entries + after.num_background);
                        prop_assert_eq!(
                            taken.tickets.len() + taken.num_closed + taken.num_expired,
                            num_before - num_after
                        );
                        prop_assert!(num_after < num_before || num_before == 0, "something leaves, or it would wait for ever");
                        for ticket in &taken.tickets {
                            let id = ticket.encoding.input_ids[0];
                            *num_left.get_mut(&id).expect("it was pushed") -= 1;
                        }
                        let is_background = |ticket: &&Ticket| ticket.client.priority == Background;
                        let num_interactive = taken.tickets.iter().take_while(|t| !is_background(t)).count();
                        let (first, rest) = taken.tickets.split_at(num_interactive);
                        prop_assert!(rest.iter().all(|t| is_background(&t)), "background entries are behind all others");
                        if class == Background {
                            prop_assert!(first.is_empty());
                            prop_assert!(rest.len() < 2 || num_tokens <= desk.cost.tokens_alone());
                        } else if !rest.is_empty() {
                            prop_assert!(!first.is_empty() && after.num_entries == 0);
                            let num_first: usize = first.iter().map(Ticket::num_tokens).sum();
                            prop_assert!(num_tokens <= desk.cost.tokens_along(num_first));
                        }
                    }
                }
            }
            prop_assert!(desk.backlog.is_empty());
            prop_assert_eq!((desk.room.num_taken(Background), desk.gate.num_accepted()), (0, 0));
            // Who still waits has all entries in batches; nobody's are there twice, for none went below zero.
            for (id, answer) in answers.iter_mut().enumerate() {
                let is_answered = answer.as_mut().is_none_or(|answer| !is_lost(answer));
                prop_assert!(is_answered || num_left[&(id as u32)] == 0, "request {} was forgotten", id);
            }
        }
    }

    /// Whether the request's last ticket went without an answer, as it does here after it was taken.
    fn is_lost(answer: &mut Receiver<Result<Answer>>) -> bool {
        matches!(answer.try_recv(), Err(tokio::sync::oneshot::error::TryRecvError::Closed))
    }
}
