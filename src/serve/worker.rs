//! The thread that feeds one device: form, launch, finish the one before, reply.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use crossbeam::channel::{Receiver, RecvTimeoutError, TryRecvError};

use super::backlog::Backlog;
use super::batch::{self, Batch, Failure, Launched, panic_text};
use super::class::PerClass;
use super::cost::Fit;
use super::dispatch::Load;
use super::lanes::Peers;
use super::policy::{Decision, decide};
use super::queue::Message;
use super::shared::Shared;
use crate::Error;
use crate::model::Backend;
use crate::request::Priority;

/// Owns what waits for one device and what is on it.
pub struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) backend: Arc<dyn Backend>,
    /// The other end is the `Lane`'s; gone means that nobody can ask any more.
    inbox: Receiver<Message>,
    /// Who takes over what waits here if the device fails.
    pub(super) peers: Peers,
    pub(super) backlog: Backlog,
    pub(super) in_flight: Option<Launched>,
    pub(super) fit: Fit,
    /// Whether the device must answer a trial before it gets work.
    pub(super) is_suspect: bool,
    pub(super) next_heartbeat: Instant,
}

impl Worker {
    pub fn new(shared: Arc<Shared>, backend: Arc<dyn Backend>, inbox: Receiver<Message>, peers: Peers) -> Self {
        let (backlog, fit, next_heartbeat) = (Backlog::new(shared.info.max_seq_len), Fit::default(), Instant::now());
        Self { shared, backend, inbox, peers, backlog, in_flight: None, fit, is_suspect: true, next_heartbeat }
    }

    /// Works until nobody can ask any more. A panic of the model ends one batch; one of this room's own
    /// ends the entries on the device, and the rest goes on after a trial.
    pub fn run(mut self) {
        self.shared.vitals.set_hangs_for_good(self.backend.hangs_for_good());
        loop {
            match catch_unwind(AssertUnwindSafe(|| while self.step().is_continue() {})) {
                Ok(()) => return,
                Err(payload) => {
                    let cause = panic_text(&*payload);
                    tracing::error!(model = %self.shared.info.name, cause, "the worker panicked and restarts");
                    self.in_flight = None;
                    self.suspect_after_panic(cause);
                }
            }
        }
    }

    fn step(&mut self) -> ControlFlow<()> {
        self.absorb()?;
        // What waits here no more and is not on the device either has left.
        self.shared.traffic.settle(self.backlog.left(), self.on_device());
        if self.shared.vitals.is_lost() {
            return self.pass_on();
        }
        if self.shared.gate.is_aborted() {
            self.backlog.fail_all(&Error::Draining);
        }
        if self.is_suspect {
            // Or the batch behind the one that failed would wait for as long as the device fails its trials.
            self.finish_in_flight();
        }
        if self.is_suspect && !self.try_device() {
            return self.wait(Instant::now() + self.shared.settings.retry_interval);
        }
        let limits = self.shared.limits.load();
        match decide(&self.backlog.waiting(), &limits, Instant::now()) {
            Decision::Launch(class @ Priority::Interactive) => self.launch_next(class),
            // Nothing to put behind the batch on the device: its rows are what is waited for.
            _ if self.in_flight.is_some() => self.finish_in_flight(),
            Decision::Launch(class @ Priority::Background) => self.launch_next(class),
            Decision::WaitUntil(at) => return self.wait(at.min(self.next_heartbeat)),
            Decision::Idle => return self.wait(self.next_heartbeat),
        }
        ControlFlow::Continue(())
    }

    /// Takes in what was sent, without waiting.
    fn absorb(&mut self) -> ControlFlow<()> {
        loop {
            match self.inbox.try_recv() {
                Ok(Message::Push(push)) => self.backlog.push(push),
                Ok(Message::Wake) => {}
                Err(TryRecvError::Empty) => return ControlFlow::Continue(()),
                Err(TryRecvError::Disconnected) => return ControlFlow::Break(()),
            }
        }
    }

    fn on_device(&self) -> PerClass<Load> {
        self.in_flight.as_ref().map(Launched::load).unwrap_or_default()
    }

    /// Sleeps until something is sent or `until`; sends a heartbeat when its time has come.
    pub(super) fn wait(&mut self, until: Instant) -> ControlFlow<()> {
        match self.inbox.recv_deadline(until) {
            Ok(Message::Push(push)) => self.backlog.push(push),
            Ok(Message::Wake) => {}
            Err(RecvTimeoutError::Disconnected) => return ControlFlow::Break(()),
            // A heartbeat is the same trial that a suspect device gets.
            Err(RecvTimeoutError::Timeout) => self.is_suspect |= Instant::now() >= self.next_heartbeat,
        }
        ControlFlow::Continue(())
    }

    /// Forms a batch and launches it behind the one on the device, which is finished after: while this thread
    /// packs and replies, the device has work.
    fn launch_next(&mut self, class: Priority) {
        let shared = self.shared.clone();
        let start = Instant::now();
        let limits = shared.limits.load();
        let taken = self.backlog.take(class, &limits, &shared.cost, start);
        shared.metrics.expired_deadline.increment(taken.num_expired as u64);
        shared.metrics.expired_closed.increment(taken.num_closed as u64);
        if taken.tickets.is_empty() {
            return;
        }
        let batch = Batch { tickets: taken.tickets };
        shared.traffic.run(self.on_device().background + batch.background());
        let launched = self.launch(batch, start);
        self.finish_in_flight();
        match launched {
            Ok(launched) => {
                // A device that computes in `launch` has the rows by now; nobody should wait for them longer.
                let is_ready = launched.in_flight.is_ready();
                shared.vitals.set_busy(Some(launched.launched));
                self.in_flight = Some(launched);
                if is_ready {
                    self.finish_in_flight();
                }
            }
            Err((batch, failure)) => self.recover(batch, &failure),
        }
    }

    /// Packs and launches. `start` is when forming began.
    pub(super) fn launch(&self, batch: Batch, start: Instant) -> Result<Launched, (Batch, Failure)> {
        let packed = batch.pack();
        let num_tokens = packed.total_tokens();
        let launched = Instant::now();
        self.shared.metrics.pack.record(launched - start);
        self.shared.metrics.launched(&batch, num_tokens, launched, &self.shared.limits.load());
        if self.in_flight.is_none() {
            self.shared.vitals.set_busy(Some(launched));
        }
        match batch::launch(&*self.backend, packed) {
            Ok(in_flight) => Ok(Launched { batch, in_flight, num_tokens, launched, launch_took: launched.elapsed() }),
            Err(failure) => Err((batch, failure)),
        }
    }

    fn finish_in_flight(&mut self) {
        if let Some(launched) = self.in_flight.take()
            && let Err((batch, failure)) = self.finish(launched)
        {
            self.recover(batch, &failure);
        }
        self.shared.vitals.set_busy(None);
    }

    /// Waits for the rows of one batch and hands them out.
    pub(super) fn finish(&mut self, launched: Launched) -> Result<(), (Batch, Failure)> {
        let Launched { batch, in_flight, num_tokens, launched, launch_took } = launched;
        let (num_entries, num_background) = (batch.tickets.len(), batch.background().num_entries);
        let finishing = Instant::now();
        let rows = match batch::finish(in_flight, num_entries) {
            Ok(rows) => rows,
            Err(failure) => return Err((batch, failure)),
        };
        let finished = Instant::now();
        self.next_heartbeat = finished + self.shared.settings.heartbeat_interval;
        self.fit.learn(num_entries, num_tokens, finished - launched);
        self.shared.cost.publish(&self.fit);
        let metrics = &self.shared.metrics;
        metrics.computed(&batch, &rows, launched);
        batch.reply(&rows, launched, finished);
        metrics.forward.record(launch_took);
        metrics.copy.record(finished - finishing);
        metrics.reply.record(finished.elapsed());
        metrics.inputs.interactive.increment((num_entries - num_background) as u64);
        metrics.inputs.background.increment(num_background as u64);
        metrics.tokens.increment(num_tokens as u64);
        Ok(())
    }
}
