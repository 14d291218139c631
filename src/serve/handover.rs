//! What becomes of the entries of a device that failed its trial or is lost: another device takes them, or they are answered.

use std::sync::Arc;
use std::time::Instant;

use super::batch::Batch;
use super::queue::Push;
use super::ticket::Ticket;
use super::worker::Worker;
use crate::Error;

impl Worker {
    /// All that waits here goes to the devices that are ready. If there is none it is answered with `error`.
    pub(super) fn hand_over_backlog(&mut self, error: &Error) {
        let mut num_handed = 0;
        while let Some(push) = self.backlog.pop_request() {
            let num_entries = push.tickets.len();
            match self.peers.push(push) {
                Ok(()) => num_handed += num_entries,
                Err(push) => push.client.fail(error.clone()),
            }
        }
        self.tell(num_handed);
    }

    /// As [`Worker::hand_over_backlog`], for a batch that was on the device when it failed.
    ///
    /// An entry is handed over once in its life: if it is what breaks devices, it must not break all of them one after
    /// another.
    pub(super) fn hand_over(&mut self, batch: Batch, error: &Error) {
        let Some(batch) = batch.still_wanted(Instant::now()) else { return };
        let mut tickets = batch.tickets;
        // Stable, so that a request's entries stay in their order.
        tickets.sort_by_key(|ticket| Arc::as_ptr(&ticket.client));
        let mut num_handed = 0;
        while let Some(last) = tickets.last() {
            let client = last.client.clone();
            let start = tickets.partition_point(|t| Arc::as_ptr(&t.client) < Arc::as_ptr(&client));
            let mut tickets = tickets.split_off(start);
            let num_entries = tickets.len();
            let was_handed = tickets.iter().any(|ticket| ticket.was_handed_over);
            tickets.iter_mut().for_each(|ticket: &mut Ticket| ticket.was_handed_over = true);
            // They had places until they were launched, so the queue has shown that it can hold them.
            let places =
                self.shared.room.reserve(client.priority, num_entries, usize::MAX).ok().filter(|_| !was_handed);
            let handed =
                places.is_some_and(|places| self.peers.push(Push { client: client.clone(), tickets, places }).is_ok());
            match handed {
                true => num_handed += num_entries,
                false => client.fail(error.clone()),
            }
        }
        self.tell(num_handed);
    }

    fn tell(&self, num_entries: usize) {
        if num_entries > 0 {
            let (model, device) = (&self.shared.info.name, &self.shared.device);
            tracing::warn!(%model, device, num_entries, "entries were handed over to another device");
            self.shared.metrics.handed_over.increment(num_entries as u64);
        }
    }
}
