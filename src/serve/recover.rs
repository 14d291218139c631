//! What a worker does when the device or a batch fails: tell the two apart, and save the neighbours.

use std::ops::ControlFlow;
use std::time::Instant;

use super::batch::{Batch, Failure};
use super::trial;
use super::worker::Worker;
use crate::Error;

impl Worker {
    /// After a batch without rows: finds out whether the device or an input is at fault.
    ///
    /// A device that fails a trial fails the batch, or loses it to another device. Otherwise the batch is halved
    /// by requests and each half tried again, so that a bad input fails its own request and no neighbour. Of `n`
    /// requests at most 2n - 1 batches are launched, and 2 log2(n) for one bad one.
    ///
    /// Neither a want of memory nor a lost device is a question to the device: see `memory` and [`Worker::lose`].
    pub(super) fn recover(&mut self, batch: Batch, failure: &Failure) {
        match failure {
            Failure::OutOfMemory(cause) => return self.relieve(batch, cause),
            Failure::Lost(cause) => return self.lose(Some(batch), cause),
            Failure::Failed(_) | Failure::Panicked(_) => {}
        }
        let model = &self.shared.info.name;
        let cause = failure.cause().to_string();
        tracing::error!(model = %model, num_seqs = batch.tickets.len(), cause, "a batch failed");
        let error = Error::Forward { model: model.to_string(), cause: cause.clone() };
        match failure {
            Failure::Panicked(_) => {
                self.shared.metrics.batches_panicked.increment(1);
                self.suspect_after_panic(cause);
            }
            _ => self.shared.metrics.batches_failed.increment(1),
        }
        if !self.try_device() {
            return self.hand_over(batch, &error);
        }
        match batch.split() {
            Err(batch) => batch.fail(&error),
            Ok(halves) => [halves.0, halves.1].into_iter().for_each(|half| self.retry(half)),
        }
    }

    /// One batch from launch to reply, alone on the device.
    fn retry(&mut self, batch: Batch) {
        let start = Instant::now();
        let Some(batch) = batch.still_wanted(start) else { return };
        if let Some(cause) = self.shared.vitals.lost() {
            return self.hand_over(batch, &Error::DeviceLost { cause });
        }
        if let Err((batch, failure)) = self.compute(batch, start) {
            self.recover(batch, &failure);
        }
    }

    /// Launches and finishes a batch. `start` is when forming began.
    pub(super) fn compute(&mut self, batch: Batch, start: Instant) -> Result<(), (Batch, Failure)> {
        let result = self.launch(batch, start).and_then(|launched| self.finish(launched));
        self.shared.vitals.set_busy(None);
        result
    }

    /// The device is lost to this process, and nobody asks it any more. What it had and what waits goes to the devices
    /// that are ready; without one, the former is failed and the latter refused.
    pub(super) fn lose(&mut self, batch: Option<Batch>, cause: &str) {
        // First, so that whoever is told finds the model not ready.
        self.shared.lose(cause);
        if let Some(batch) = batch {
            self.shared.metrics.batches_lost.increment(1);
            self.hand_over(batch, &Error::DeviceLost { cause: cause.to_string() });
        }
        self.leave();
    }

    /// What a worker does without its device, until nobody can ask any more: passes on what is still sent to it.
    pub(super) fn pass_on(&mut self) -> ControlFlow<()> {
        self.leave();
        self.wait(Instant::now() + self.shared.settings.heartbeat_interval)
    }

    /// Leaves everything to the other devices, or answers it.
    fn leave(&mut self) {
        let reason = self.shared.vitals.lost().unwrap_or_default();
        self.shared.vitals.set_busy(None);
        if let Some(launched) = self.in_flight.take() {
            // Its rows are not waited for: they will not come.
            self.hand_over(launched.batch, &Error::DeviceLost { cause: reason.clone() });
        }
        self.hand_over_backlog(&Error::Unhealthy { model: self.shared.info.name.to_string(), reason });
    }

    pub(super) fn suspect_after_panic(&mut self, cause: String) {
        self.shared.metrics.restarts.increment(1);
        self.shared.vitals.set_restarting(cause);
        self.is_suspect = true;
    }

    /// Sends a trial through the device; the first is the warm-up. Sets the state to what came of it.
    pub(super) fn try_device(&mut self) -> bool {
        let result = trial::run(self);
        self.shared.vitals.set_busy(None);
        self.next_heartbeat = Instant::now() + self.shared.settings.heartbeat_interval;
        let lost = match &result {
            Err(Failure::Lost(cause)) => Some(cause.clone()),
            // Given up as hung meanwhile, it came back: too late.
            _ => self.shared.vitals.lost(),
        };
        if let Some(cause) = lost {
            self.lose(None, &cause);
            return false;
        }
        let result = result.map_err(|failure| failure.cause().to_string());
        self.is_suspect = result.is_err();
        self.shared.tried(&result);
        if let Err(reason) = result {
            let model = self.shared.info.name.to_string();
            self.hand_over_backlog(&Error::Unhealthy { model, reason });
        }
        !self.is_suspect
    }
}
