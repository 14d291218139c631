//! What a worker does when the device or a batch fails: tell the two apart, and save the neighbours.

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
    pub(super) fn recover(&mut self, batch: Batch, failure: &Failure) {
        let model = &self.shared.info.name;
        let cause = failure.cause().to_string();
        tracing::error!(model = %model, num_seqs = batch.tickets.len(), cause, "a batch failed");
        let error = Error::Forward { model: model.to_string(), cause: cause.clone() };
        match failure {
            Failure::Failed(_) => self.shared.metrics.batches_failed.increment(1),
            Failure::Panicked(_) => {
                self.shared.metrics.batches_panicked.increment(1);
                self.suspect_after_panic(cause);
            }
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
        let result = self.launch(batch, start).and_then(|launched| self.finish(launched));
        self.shared.vitals.set_busy(None);
        if let Err((batch, failure)) = result {
            self.recover(batch, &failure);
        }
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
        self.is_suspect = result.is_err();
        self.shared.tried(&result);
        if let Err(reason) = result {
            let model = self.shared.info.name.to_string();
            self.hand_over_backlog(&Error::Unhealthy { model, reason });
        }
        !self.is_suspect
    }
}
