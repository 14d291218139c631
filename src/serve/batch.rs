//! From tickets to the packed form a model takes, and from its rows back to the clients.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::class::PerClass;
use super::dispatch::Load;
use super::ticket::{Client, Ticket};
use crate::model::pack::PackedInput;
use crate::model::{Backend, InFlight, Rows};
use crate::request::Priority;
use crate::{Error, Result};

/// Entries that are computed together: ticket i is sequence i.
pub struct Batch {
    /// Not empty. Those of background requests are behind all others.
    pub tickets: Vec<Ticket>,
}

/// A batch on the device.
pub struct Launched {
    pub batch: Batch,
    pub in_flight: Box<dyn InFlight>,
    pub num_tokens: usize,
    pub launched: Instant,
    /// Time `launch` took: on a device that computes in it, the forward.
    pub launch_took: Duration,
}

impl Launched {
    pub fn load(&self) -> PerClass<Load> {
        let all = Load { num_entries: self.batch.tickets.len(), num_tokens: self.num_tokens };
        let background = self.batch.background();
        PerClass { interactive: all - background, background }
    }
}

/// Why a batch has no rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    Failed(String),
    /// There was no memory for it: a smaller one may fit.
    OutOfMemory(String),
    /// The device is lost to this process.
    Lost(String),
    Panicked(String),
}

impl Failure {
    pub fn cause(&self) -> &str {
        match self {
            Self::Failed(cause) | Self::OutOfMemory(cause) | Self::Lost(cause) | Self::Panicked(cause) => cause,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::OutOfMemory { cause } => Self::OutOfMemory(cause),
            Error::DeviceLost { cause } => Self::Lost(cause),
            error => Self::Failed(error.to_string()),
        }
    }
}

impl Batch {
    pub fn num_tokens(&self) -> usize {
        self.tickets.iter().map(Ticket::num_tokens).sum()
    }

    /// The entries of each class. A look at the last one where there is no background work.
    pub fn by_class(&self) -> PerClass<&[Ticket]> {
        let of_background = |ticket: &&Ticket| ticket.client.priority == Priority::Background;
        let num_background = self.tickets.iter().rev().take_while(of_background).count();
        let (interactive, background) = self.tickets.split_at(self.tickets.len() - num_background);
        PerClass { interactive, background }
    }

    /// The part of it that is background work.
    pub fn background(&self) -> Load {
        let background = self.by_class().background;
        Load { num_entries: background.len(), num_tokens: background.iter().map(Ticket::num_tokens).sum() }
    }

    /// Lays the sequences one after another. Copies ids and values; the tickets keep theirs for a second try.
    pub fn pack(&self) -> PackedInput {
        let total_tokens = self.num_tokens();
        let mut packed = PackedInput {
            input_ids: Vec::with_capacity(total_tokens),
            token_type_ids: Vec::with_capacity(total_tokens),
            cu_seqlens: Vec::with_capacity(self.tickets.len() + 1),
            rows: Vec::with_capacity(self.tickets.len()),
            values: Vec::new(),
            cu_values: Vec::new(),
        };
        for Ticket { encoding, row, .. } in &self.tickets {
            if encoding.values.is_empty() {
                packed.push(&encoding.input_ids, &encoding.token_type_ids, row.clone());
            } else {
                packed.push_values(&encoding.values, encoding.input_ids.len(), row.clone());
            }
        }
        packed
    }

    /// Hands each client its row. `rows` has one row a ticket.
    pub fn reply(self, rows: &Rows, launched: Instant, finished: Instant) {
        let inference = finished - launched;
        for (i, ticket) in self.tickets.into_iter().enumerate() {
            let queue = launched.saturating_duration_since(ticket.pushed);
            ticket.client.complete(ticket.input_idx, rows.row(i).to_vec(), queue, inference);
        }
    }

    /// Fails every request that has an entry in this batch.
    pub fn fail(self, error: &Error) {
        for ticket in self.tickets {
            ticket.client.fail(error.clone());
        }
    }

    /// Drops the entries nobody waits for any more; `None` if none is left.
    pub fn still_wanted(mut self, now: Instant) -> Option<Self> {
        self.tickets.retain(|t| t.client.gone(now).is_none());
        (!self.tickets.is_empty()).then_some(self)
    }

    /// Two halves by requests, so that the one whose input breaks the forward can be found; itself again if
    /// all entries are of one request. The classes first: it need not be the interactive ones' trouble for long.
    pub fn split(mut self) -> Result<(Self, Self), Self> {
        let num_interactive = self.by_class().interactive.len();
        if (1..self.tickets.len()).contains(&num_interactive) {
            let background = self.tickets.split_off(num_interactive);
            return Ok((self, Self { tickets: background }));
        }
        let mut clients: Vec<*const Client> = self.tickets.iter().map(|t| Arc::as_ptr(&t.client)).collect();
        clients.sort_unstable();
        clients.dedup();
        if clients.len() < 2 {
            return Err(self);
        }
        let middle = clients[clients.len() / 2];
        let (left, right) = self.tickets.into_iter().partition(|t| Arc::as_ptr(&t.client) < middle);
        Ok((Self { tickets: left }, Self { tickets: right }))
    }

    /// Two halves by tokens, whosever they are; itself again if it is a single entry.
    pub fn halve(mut self) -> Result<(Self, Self), Self> {
        if self.tickets.len() < 2 {
            return Err(self);
        }
        let (half, mut before) = (self.num_tokens() / 2, 0);
        let fits = |ticket: &&Ticket| {
            before += ticket.num_tokens();
            before <= half
        };
        let middle = self.tickets.iter().take_while(fits).count().clamp(1, self.tickets.len() - 1);
        let right = self.tickets.split_off(middle);
        Ok((self, Self { tickets: right }))
    }
}

/// Starts a packed batch. A panic of the model is a value here.
pub fn launch(backend: &dyn Backend, packed: PackedInput) -> Result<Box<dyn InFlight>, Failure> {
    guard(|| backend.launch(packed))
}

/// Waits for the rows and checks that there is one a sequence. A panic of the model is a value here.
pub fn finish(in_flight: Box<dyn InFlight>, num_seqs: usize) -> Result<Rows, Failure> {
    let rows = guard(|| in_flight.finish())?;
    if rows.num_rows() != num_seqs {
        return Err(Failure::Failed(format!("{} rows for {num_seqs} sequences", rows.num_rows())));
    }
    Ok(rows)
}

fn guard<T>(work: impl FnOnce() -> Result<T>) -> Result<T, Failure> {
    // Unwind safe: what the closure touched is either consumed by it or the backend, which is `&self` and
    // `Sync`, and is tried with a heartbeat before it is trusted again.
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.into()),
        Err(payload) => Err(Failure::Panicked(panic_text(&*payload))),
    }
}

/// What a panic said.
pub fn panic_text(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
    format!("panic: {}", text.unwrap_or("(no text)"))
}
