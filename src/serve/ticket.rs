//! One input on its way through the queue, and the client who waits for all inputs of a request.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::queue::Accepted;
use crate::model::encode::Encoding;
use crate::model::pack::Wanted;
use crate::output::Usage;
use crate::request::Priority;
use crate::{Error, Result};

/// One input of one request: an entry of the queue and a sequence of a batch.
///
/// Dropping a ticket unanswered is allowed: when the last one of a request goes, the client gets
/// `Error::Internal` instead of waiting for ever.
pub struct Ticket {
    pub encoding: Encoding,
    /// What is wanted of it.
    pub row: Wanted,
    /// Place of this input in its request.
    pub input_idx: usize,
    /// When it was put into the queue.
    pub pushed: Instant,
    /// Whether it was on a device that failed and is now on its second. There is no third.
    pub was_handed_over: bool,
    pub client: Arc<Client>,
}

impl Ticket {
    pub fn num_tokens(&self) -> usize {
        self.encoding.input_ids.len()
    }
}

/// What the handler gets once every row is there.
#[derive(Debug)]
pub struct Answer {
    /// In the order of the inputs.
    pub rows: Vec<Vec<f32>>,
    /// Tokens of each input.
    pub num_tokens: Vec<u32>,
    pub usage: Usage,
    pub tokenize: Duration,
    /// Mean over the inputs, push to launch.
    pub queue: Duration,
    /// Mean over the inputs, launch to rows on the host.
    pub inference: Duration,
}

/// The handler that waits for a request, seen from the threads that work for it.
pub struct Client {
    pub deadline: Instant,
    /// Which class its entries wait in.
    pub priority: Priority,
    /// `deadline` as a span from the request's start, for the error.
    pub timeout: Duration,
    /// Locked for moments only, by one thread at a time in practice (first an encoder, then the worker, or for
    /// a long request several): a std-like mutex costs less than an atomic per field.
    state: Mutex<State>,
    /// Counts this request's entries as accepted until the last ticket is gone; a drain waits for it.
    _accepted: Accepted,
}

struct State {
    /// The other end is the handler's: it is closed when the client has gone or its deadline has passed.
    /// `None` once answered.
    reply: Option<oneshot::Sender<Result<Answer>>>,
    /// Empty where it has not come. No row is empty.
    rows: Vec<Vec<f32>>,
    /// The device each input was last sent to. Empty where there is no choice, and before it was made.
    devices: Vec<usize>,
    num_left: usize,
    num_tokens: Vec<u32>,
    usage: Usage,
    tokenize: Duration,
    queue_sum: Duration,
    inference_sum: Duration,
}

/// Why nobody waits for a request any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    /// Answered already: another input of the request failed.
    Answered,
    /// The handler dropped its end.
    Closed,
    Expired,
}

impl Client {
    /// A request of `num_inputs` inputs, and the end its handler waits on.
    pub fn new(
        num_inputs: usize,
        start: Instant,
        deadline: Instant,
        priority: Priority,
        accepted: Accepted,
    ) -> (Arc<Self>, oneshot::Receiver<Result<Answer>>) {
        let (reply, answer) = oneshot::channel();
        let state = State {
            reply: Some(reply),
            rows: vec![Vec::new(); num_inputs],
            devices: Vec::new(),
            num_left: num_inputs,
            num_tokens: Vec::new(),
            usage: Usage::default(),
            tokenize: Duration::ZERO,
            queue_sum: Duration::ZERO,
            inference_sum: Duration::ZERO,
        };
        let timeout = deadline.saturating_duration_since(start);
        (Arc::new(Self { deadline, priority, timeout, state: Mutex::new(state), _accepted: accepted }), answer)
    }

    /// Whether the work for this request would be done for nobody. An expired one is answered by this call.
    pub fn gone(&self, now: Instant) -> Option<Gone> {
        let mut state = self.state.lock();
        match &state.reply {
            None => Some(Gone::Answered),
            Some(reply) if reply.is_closed() => Some(if now >= self.deadline { Gone::Expired } else { Gone::Closed }),
            Some(_) if now >= self.deadline => {
                state.answer(Err(Error::Deadline { timeout: self.timeout }));
                Some(Gone::Expired)
            }
            Some(_) => None,
        }
    }

    /// Notes what the encoder counted; once, before the push.
    pub fn encoded(&self, num_tokens: Vec<u32>, usage: Usage, took: Duration) {
        let mut state = self.state.lock();
        state.num_tokens = num_tokens;
        state.usage = usage;
        state.tokenize = took;
    }

    /// Notes to which of several devices these inputs of the request go.
    pub fn sent(&self, tickets: &[Ticket], device_idx: usize) {
        let mut state = self.state.lock();
        let num_inputs = state.rows.len();
        state.devices.resize(num_inputs, usize::MAX);
        for ticket in tickets {
            // None is there once all rows are taken by the answer.
            if let Some(device) = state.devices.get_mut(ticket.input_idx) {
                *device = device_idx;
            }
        }
    }

    /// Whether a row is still to come from this of several devices.
    pub fn waits_for(&self, device_idx: usize) -> bool {
        let state = self.state.lock();
        state.rows.iter().zip(&state.devices).any(|(row, &device)| row.is_empty() && device == device_idx)
    }

    /// Keeps the row of one input, and answers when it was the last.
    pub fn complete(&self, input_idx: usize, row: Vec<f32>, queue: Duration, inference: Duration) {
        let mut state = self.state.lock();
        state.rows[input_idx] = row;
        state.queue_sum += queue;
        state.inference_sum += inference;
        state.num_left -= 1;
        if state.num_left == 0 {
            let num_inputs = state.rows.len() as u32;
            let answer = Answer {
                rows: std::mem::take(&mut state.rows),
                num_tokens: std::mem::take(&mut state.num_tokens),
                usage: state.usage,
                tokenize: state.tokenize,
                queue: state.queue_sum / num_inputs,
                inference: state.inference_sum / num_inputs,
            };
            state.answer(Ok(answer));
        }
    }

    /// Fails the whole request. The first failure is the one told; later ones change nothing.
    pub fn fail(&self, error: Error) {
        self.state.lock().answer(Err(error));
    }
}

impl State {
    fn answer(&mut self, answer: Result<Answer>) {
        if let Some(reply) = self.reply.take() {
            // An error here only says that the client has gone.
            let _ = reply.send(answer);
        }
    }
}
