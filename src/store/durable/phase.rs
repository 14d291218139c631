//! Where writes go, as a state machine that does nothing. Time and news are handed in.
//!
//! ```text
//!            a write fails                   the rest fits one bulk
//!   Direct ───────────────▶ Journalling ───────────────────────────▶ Closing
//!      ▲                        ▲            a write or the replay fails │
//!      │                        └────────────────────────────────────────┤
//!      └─────────────────────────── nothing is left ─────────────────────┘
//! ```
//!
//! While the journal holds anything every write goes through it, so that no write overtakes an earlier one of the same
//! record. To come to an end under steady writes, the last bulk is replayed while new writes wait.

use jiff::Timestamp;

/// Where writes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// To the store.
    Direct,
    /// To the journal.
    Journalling { since: Timestamp },
    /// Nowhere for a moment: the last of the journal is being replayed.
    Closing { since: Timestamp },
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The store did not take a write, or a replay.
    StoreFailed,
    /// The store took a bulk, and what is left fits another.
    NearlyDrained,
    /// The store has all of the journal.
    Drained,
}

impl Phase {
    /// The phase after an event at `now`.
    pub fn after(self, event: Event, now: Timestamp) -> Self {
        match (self, event) {
            (Self::Direct, Event::StoreFailed) => Self::Journalling { since: now },
            // An event of the past: a replay that ended as this one did.
            (Self::Direct, Event::NearlyDrained | Event::Drained) => Self::Direct,
            (Self::Journalling { since } | Self::Closing { since }, Event::StoreFailed) => Self::Journalling { since },
            (Self::Journalling { since } | Self::Closing { since }, Event::NearlyDrained) => Self::Closing { since },
            // Writes go to the journal at this moment: it is not drained for long.
            (Self::Journalling { since }, Event::Drained) => Self::Journalling { since },
            (Self::Closing { .. }, Event::Drained) => Self::Direct,
        }
    }

    /// Since when writes do not go straight to the store.
    pub fn since(self) -> Option<Timestamp> {
        match self {
            Self::Direct => None,
            Self::Journalling { since } | Self::Closing { since } => Some(since),
        }
    }
}

/// The phase, and the writes that were sent to the journal and are not in its queue yet.
#[derive(Debug)]
pub struct Gate {
    pub phase: Phase,
    /// While there are any, the journal is not drained, however empty it looks.
    pub num_admitted: usize,
}

/// Where one write goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    Store,
    /// Counted: [`Gate::queued`] must follow.
    Journal,
    /// Ask again when the phase has changed.
    Wait,
}

impl Gate {
    /// A gate in this phase.
    pub fn new(phase: Phase) -> Self {
        Self { phase, num_admitted: 0 }
    }

    /// Sends a write on its way.
    pub fn admit(&mut self) -> Route {
        match self.phase {
            Phase::Direct => Route::Store,
            Phase::Journalling { .. } => {
                self.num_admitted += 1;
                Route::Journal
            }
            Phase::Closing { .. } => Route::Wait,
        }
    }

    /// A write that was sent to the journal is in its queue, or was given up.
    pub fn queued(&mut self) {
        self.num_admitted -= 1;
    }

    /// Changes the phase; says whether it is another one. [`Event::Drained`] counts only while no write is on its way.
    pub fn on(&mut self, event: Event, now: Timestamp) -> bool {
        if event == Event::Drained && self.num_admitted > 0 {
            return false;
        }
        let before = self.phase;
        self.phase = before.after(event, now);
        before != self.phase
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn each_phase_answers_each_event() {
        let (direct, journalling, closing) =
            (Phase::Direct, Phase::Journalling { since: at(1) }, Phase::Closing { since: at(1) });
        let table = [
            (direct, Event::StoreFailed, Phase::Journalling { since: at(2) }),
            (direct, Event::NearlyDrained, direct),
            (direct, Event::Drained, direct),
            (journalling, Event::StoreFailed, journalling),
            (journalling, Event::NearlyDrained, closing),
            (journalling, Event::Drained, journalling),
            (closing, Event::StoreFailed, journalling),
            (closing, Event::NearlyDrained, closing),
            (closing, Event::Drained, direct),
        ];
        for (before, event, after) in table {
            assert_eq!(before.after(event, at(2)), after, "{before:?} {event:?}");
        }
    }

    #[test]
    fn a_write_on_its_way_keeps_the_journal_open() {
        let mut gate = Gate::new(Phase::Journalling { since: at(1) });
        assert_eq!(gate.admit(), Route::Journal);
        assert!(gate.on(Event::NearlyDrained, at(2)));
        assert_eq!(gate.admit(), Route::Wait);
        assert!(!gate.on(Event::Drained, at(3)));
        gate.queued();
        assert!(gate.on(Event::Drained, at(4)));
        assert_eq!(gate.admit(), Route::Store);
    }

    /// What a replayer and writers can do to a gate, in any order.
    #[derive(Debug, Clone, Copy)]
    enum Move {
        Admit,
        Queue,
        ReplayAll,
        Event(Event),
    }

    proptest! {
        #[test]
        fn the_store_is_never_written_while_the_journal_holds_anything(moves in proptest::collection::vec(
            prop_oneof![
                Just(Move::Admit), Just(Move::Queue), Just(Move::ReplayAll), Just(Move::Event(Event::StoreFailed)),
                Just(Move::Event(Event::NearlyDrained)), Just(Move::Event(Event::Drained)),
            ],
            0..60,
        )) {
            let mut gate = Gate::new(Phase::Direct);
            let mut num_journalled = 0;
            for step in moves {
                match step {
                    Move::Admit => match gate.admit() {
                        Route::Store => prop_assert_eq!((num_journalled, gate.num_admitted), (0, 0)),
                        Route::Journal | Route::Wait => {}
                    },
                    Move::Queue if gate.num_admitted > 0 => {
                        num_journalled += 1;
                        gate.queued();
                    }
                    Move::Queue => {}
                    Move::ReplayAll => num_journalled = 0,
                    // The replayer says so when the journal is empty, and only then.
                    Move::Event(Event::Drained) if num_journalled > 0 => {}
                    Move::Event(event) => {
                        gate.on(event, at(1));
                    }
                }
            }
        }
    }
}
