//! One model being served: the way of its requests to its devices and back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::oneshot;

use super::encoders::EncoderPool;
use super::health::{Health, ModelHealth};
use super::lanes::Lanes;
use super::loss;
use super::metrics::{ModelMetrics, Outcome};
use super::policy::BatchLimits;
use super::queue::{Accepted, Gate, Push};
use super::room::{Places, Room, background_limit};
use super::statistics::{Statistics, Tally};
use super::ticket::{Answer, Client, Ticket};
use super::{Settings, chunks};
use crate::model::encode::{Encoder, Encoding};
use crate::model::pack::{RowSpec, Wanted};
use crate::model::{LoadedModel, ModelInfo};
use crate::output::{Output, Phases, Usage};
use crate::request::{Input, Priority, Request, Task, TaskParams, Truncation};
use crate::{Error, Result};

/// Token-id inputs of up to this many ids are checked and copied right where they are: it takes
/// microseconds, less than waking an encoder thread.
const INLINE_IDS: usize = 16 << 10;

/// The part of a request's time that may be expected to pass before its answer. What is left is for the batches
/// under way, and for the estimate's error: it is of texts of the usual length.
const LATEST: f64 = 0.8;

/// Tokens that are named for a mask at most: what a row may take is bounded.
pub const MAX_TOP_K: u32 = 1000;

/// A model with its workers.
pub struct Served {
    pub info: Arc<ModelInfo>,
    /// Of each device's batches, and of the queue they share.
    pub limits: Arc<ArcSwap<BatchLimits>>,
    /// The devices. Encoders at work hold it too, the workers do not.
    pub lanes: Arc<Lanes>,
    gate: Arc<Gate>,
    /// Bounds the entries being tokenised or waiting for a device.
    room: Arc<Room>,
    /// Bounds the texts and id lists of `tokenize` and `decode`, which no device waits for.
    text_room: Arc<Room>,
    pub metrics: ModelMetrics,
    pub tally: Tally,
    /// Between two looks of a waiting request whether its device was given up.
    look_interval: Duration,
    encoder: Arc<Encoder>,
    encoders: Arc<EncoderPool>,
}

impl Served {
    /// Starts the workers, one a device, each of which warms its device up and then takes requests.
    pub fn start(
        model: LoadedModel,
        limits: BatchLimits,
        settings: &Settings,
        gate: Arc<Gate>,
        encoders: Arc<EncoderPool>,
    ) -> Result<Self> {
        let LoadedModel { info, encoder, backends } = model;
        limits.check(info.max_seq_len)?;
        let metrics = ModelMetrics::new(&info.name);
        let limits = Arc::new(ArcSwap::from_pointee(limits));
        let room = Arc::new(Room::new(metrics.queue_depth.clone()));
        let lanes = Lanes::start(&info, backends, &limits, settings, &gate, &room, &metrics)?;
        let (look_interval, text_room, tally) = (loss::look_interval(settings), Arc::default(), Tally::default());
        Ok(Self { info, limits, lanes, gate, room, text_room, metrics, tally, look_interval, encoder, encoders })
    }

    /// From here on the model's gauges are this one's.
    pub fn publish(&self) {
        self.metrics.max_batch_tokens.set(self.limits.load().max_batch_tokens as f64);
        self.lanes.publish();
    }

    /// The state of the model and of each of its devices.
    pub fn health(&self, now: Instant) -> ModelHealth {
        let devices = self.lanes.health(now);
        let health = match self.gate.is_draining() {
            true => Health::Draining,
            false => Health::of_model(&devices),
        };
        ModelHealth { model: self.info.name.clone(), health, devices }
    }

    /// What the model has done so far.
    pub fn statistics(&self) -> Statistics {
        self.tally.read(self.lanes.num_batches())
    }

    /// What tokenises for it.
    pub fn encoder(&self) -> &Arc<Encoder> {
        &self.encoder
    }

    /// See [`super::Engine::infer`].
    pub async fn infer(&self, request: Request, start: Instant) -> Result<Output> {
        let mut ending = Ending { metrics: &self.metrics, class: request.priority, outcome: Outcome::Cancelled };
        let result = match request.params.truncation {
            Truncation::Chunk { overlap } => self.infer_in_chunks(request, overlap, start).await,
            _ => self.infer_uncounted(request, start).await,
        };
        ending.outcome = outcome_of(&result);
        self.tally.ended(&result, start.elapsed());
        result
    }

    /// Errors: `Invalid` for parameters that this model does not take.
    pub fn check(&self, params: &TaskParams) -> Result<()> {
        Form::of(&self.info, params).map(drop)
    }

    pub(super) async fn infer_uncounted(&self, request: Request, start: Instant) -> Result<Output> {
        let Request { model: _, inputs, params, deadline, priority } = request;
        let form = Form::of(&self.info, &params)?;
        let num_inputs = inputs.len();
        let (accepted, places) = self.admit(priority, num_inputs, start, deadline)?;
        let (client, answer) = Client::new(num_inputs, start, deadline, priority, accepted);
        // Weak: that the last ticket has gone must show.
        let asking = Arc::downgrade(&client);
        if is_small_ids(&inputs) {
            let encodings: Result<Vec<Encoding>> =
                inputs.iter().enumerate().map(|(i, input)| form.encode(&self.encoder, input, i, num_inputs)).collect();
            self.pusher(client, places, form.row.clone(), start)(encodings);
        } else {
            let encoder = self.encoder.clone();
            let watched = client.clone();
            let row = form.row.clone();
            let encode = move |i: usize, input: &Input| match watched.gone(Instant::now()) {
                None => form.encode(&encoder, input, i, num_inputs),
                Some(_) => Err(Error::Deadline { timeout: watched.timeout }),
            };
            self.encoders.map(priority, inputs, Input::num_bytes, encode, self.pusher(client, places, row, start));
        }
        let abandoned = |now| {
            // Nobody knows how far the request has come, and another server can be asked.
            let reason = asking.upgrade().and_then(|client| self.lanes.abandoned(&client, now))?;
            Some(Error::Unhealthy { model: self.info.name.to_string(), reason })
        };
        let answer = loss::answer(answer, start, deadline, self.look_interval, abandoned).await?;
        let phases = Phases {
            tokenize: answer.tokenize,
            queue: answer.queue,
            inference: answer.inference,
            total: start.elapsed(),
        };
        let Answer { rows, num_tokens, usage, .. } = answer;
        Ok(Output { model: self.info.name.clone(), rows, num_tokens, usage, phases })
    }

    /// What becomes of a request's encodings: all its entries go to the devices at once, from whichever thread
    /// finished the last one. That is one thread crossing less than through the handler.
    fn pusher(
        &self,
        client: Arc<Client>,
        places: Places,
        row: Wanted,
        start: Instant,
    ) -> impl FnOnce(Result<Vec<Encoding>>) + Send + use<> {
        let (lanes, tokenize) = (self.lanes.clone(), self.metrics.tokenize.clone());
        move |encodings| {
            let encodings = match encodings {
                Ok(encodings) => encodings,
                Err(error) => return client.fail(error),
            };
            let pushed = Instant::now();
            let took = pushed - start;
            tokenize.record(took);
            let usage = encodings.iter().fold(Usage::default(), |sum, e| Usage {
                num_tokens: sum.num_tokens + e.input_ids.len(),
                num_chars: sum.num_chars + e.num_chars,
            });
            let num_tokens = encodings.iter().map(|e| e.input_ids.len() as u32).collect();
            client.encoded(num_tokens, usage, took);
            let ticket = |(input_idx, encoding)| {
                let (client, row) = (client.clone(), row.clone());
                Ticket { encoding, row, input_idx, pushed, was_handed_over: false, client }
            };
            let tickets = encodings.into_iter().enumerate().map(ticket).collect();
            lanes.push(Push { client, tickets, places });
        }
    }

    /// Lets a request in, whole, or says why not.
    fn admit(&self, class: Priority, num_inputs: usize, now: Instant, deadline: Instant) -> Result<(Accepted, Places)> {
        if num_inputs == 0 {
            return Err(Error::Empty { field: "input".to_string() });
        }
        let accepted = self.enter(class, num_inputs)?;
        self.lanes.admits(now).map_err(|health| {
            self.metrics.refused_unready[class].increment(num_inputs as u64);
            let model = self.info.name.to_string();
            match health {
                Health::Unhealthy(reason) => Error::Unhealthy { model, reason },
                _ => Error::Loading { model },
            }
        })?;
        self.expect_in_time(class, num_inputs, now, deadline)?;
        let places = self.reserve(&self.room, class, "input", num_inputs)?;
        Ok((accepted, places))
    }

    /// Refuses what would only wait for its deadline: a 429 now lets the client go elsewhere, a 504 then has
    /// kept it waiting and the queue full for nothing.
    ///
    /// An interactive request expects nothing of the background work that waits: the batch of it that may be on the
    /// device is short.
    /// Errors: `Overloaded`. Never while nothing waits: then the device decides.
    fn expect_in_time(&self, class: Priority, num_inputs: usize, now: Instant, deadline: Instant) -> Result<()> {
        let num_ahead = self.room.num_ahead(class, num_inputs);
        let timeout = deadline.saturating_duration_since(now);
        let limits = self.limits.load();
        let expected = self.lanes.backlog(num_ahead.saturating_add(num_inputs), &limits, now);
        if num_ahead == 0 || expected <= timeout.mul_f64(LATEST) {
            return Ok(());
        }
        self.metrics.refused_late[class].increment(num_inputs as u64);
        let retry_after = self.lanes.backlog(self.room.num_taken(class), &limits, now);
        Err(Error::Overloaded { model: self.info.name.to_string(), expected, timeout, retry_after })
    }

    /// Through the gate.
    pub fn enter(&self, class: Priority, num_items: usize) -> Result<Accepted> {
        self.gate.enter(num_items).ok_or_else(|| {
            self.metrics.refused_draining[class].increment(num_items as u64);
            Error::Draining
        })
    }

    /// Places for all items of a request.
    ///
    /// Errors: `TooLarge` if they would not fit an empty queue, else `QueueFull` with the time in which
    /// what waits now is computed.
    pub fn reserve(&self, room: &Arc<Room>, class: Priority, field: &str, num_items: usize) -> Result<Places> {
        let limits = self.limits.load();
        let limit = limits.max_queue_size;
        if num_items > limit {
            return Err(Error::TooLarge { field: field.to_string(), got: num_items, limit, unit: "inputs" });
        }
        room.reserve(class, num_items, limit).map_err(|num_taken| {
            self.metrics.refused_full[class].increment(num_items as u64);
            // All that waits, not only what must go before this fits: who comes back at the first free place
            // meets everybody else who was refused.
            let retry_after = self.lanes.backlog(num_taken, &limits, Instant::now());
            let limit = match class {
                Priority::Interactive => limit,
                Priority::Background => background_limit(limit),
            };
            Error::QueueFull { model: self.info.name.to_string(), limit, retry_after }
        })
    }

    /// Runs `f` over items on the encoders' threads, for requests that need no device.
    pub async fn on_encoders<I, O>(
        &self,
        field: &str,
        items: Vec<I>,
        len_bytes: impl Fn(&I) -> usize,
        f: impl Fn(&Encoder, usize, &I) -> Result<O> + Send + Sync + 'static,
    ) -> Result<Vec<O>>
    where
        I: Send + Sync + 'static,
        O: Send + 'static,
    {
        if items.is_empty() {
            return Err(Error::Empty { field: field.to_string() });
        }
        let class = Priority::Interactive;
        let accepted = self.enter(class, items.len())?;
        let places = self.reserve(&self.text_room, class, field, items.len())?;
        let encoder = self.encoder.clone();
        let (reply, answer) = oneshot::channel();
        let done = move |result| {
            // An error here only says that the client has gone.
            let _ = reply.send(result);
            drop((accepted, places));
        };
        self.encoders.map(class, items, len_bytes, move |i, item| f(&encoder, i, item), done);
        answer.await.unwrap_or_else(|_| Err(Error::Internal { cause: "an encoder dropped the request".to_string() }))
    }
}

/// A request's parameters with nothing left to default.
pub(super) struct Form {
    pub row: Wanted,
    pub prompt: Option<String>,
    truncation: Truncation,
}

impl Form {
    /// Errors: `Invalid` for parameters that this model does not take.
    pub fn of(info: &ModelInfo, params: &TaskParams) -> Result<Self> {
        chunks::check(params)?;
        let invalid = |field: &str, reason: String| Error::Invalid { field: field.to_string(), reason };
        if !info.does(&params.task) {
            let (name, does, asked) = (&info.name, &info.task, params.task.as_str());
            return Err(invalid("task", format!("model `{name}` does `{does}`, which `{asked}` is not part of")));
        }
        let dimensions = params.dimensions.unwrap_or(info.dimensions);
        if dimensions == 0 || dimensions > info.dimensions {
            return Err(invalid("dimensions", format!("{dimensions} is not in 1 to {}", info.dimensions)));
        }
        let prompt = match params.prompt_name.as_ref().or(info.default_prompt.as_ref()) {
            None => None,
            Some(name) => Some(info.prompts.get(name).cloned().ok_or_else(|| {
                let known: Vec<&str> = info.prompts.keys().map(String::as_str).collect();
                let known = if known.is_empty() { "none".to_string() } else { known.join(", ") };
                invalid("prompt_name", format!("`{name}` is not a prompt of this model; known: {known}"))
            })?),
        };
        let normalize = params.normalize.unwrap_or(info.normalize);
        let row = match &params.task {
            Task::Embed => Wanted::Vector(RowSpec { normalize, dimensions }),
            Task::EmbedAll => Wanted::TokenVectors,
            Task::Sparse => Wanted::Sparse,
            Task::Classify => Wanted::Scores,
            Task::TokenClassify => Wanted::TokenScores,
            Task::FillMask { top_k: 0, .. } => return Err(invalid("top_k", "must be at least 1".to_string())),
            Task::FillMask { top_k, targets } => {
                Wanted::Masked { top_k: (*top_k).min(MAX_TOP_K), targets: targets.clone() }
            }
            Task::Infer => Wanted::Outputs,
        };
        Ok(Self { row, prompt, truncation: params.truncation })
    }

    fn encode(&self, encoder: &Encoder, input: &Input, i: usize, num_inputs: usize) -> Result<Encoding> {
        let prompt = self.prompt.as_deref();
        if let Wanted::Masked { .. } = self.row {
            let field = if num_inputs == 1 { "input".to_string() } else { format!("input[{i}]") };
            let encoding = encoder.encode(input, &field, prompt, self.truncation)?;
            let has_mask = encoder.mask_id().is_some_and(|mask| encoding.input_ids.contains(&mask));
            let reason = || "has no mask token; the vocabulary calls it `[MASK]` or `<mask>`".to_string();
            return if has_mask { Ok(encoding) } else { Err(Error::Invalid { field, reason: reason() }) };
        }
        // The name is only made when something is to be told: most inputs are good.
        let plain = encoder.encode(input, "input", prompt, self.truncation);
        if plain.is_ok() || num_inputs == 1 {
            return plain;
        }
        encoder.encode(input, &format!("input[{i}]"), prompt, self.truncation)
    }
}

fn is_small_ids(inputs: &[Input]) -> bool {
    let mut num_ids = 0;
    inputs.iter().all(|input| match input {
        Input::Text(_) | Input::Pair(..) | Input::Image(_) | Input::Values(_) => false,
        Input::TokenIds(ids) | Input::TypedTokenIds { ids, .. } => {
            num_ids += ids.len() + 1;
            num_ids <= INLINE_IDS
        }
    })
}

fn outcome_of(result: &Result<Output>) -> Outcome {
    match result {
        Ok(_) => Outcome::Ok,
        Err(
            Error::QueueFull { .. }
            | Error::Overloaded { .. }
            | Error::Loading { .. }
            | Error::Draining
            | Error::Unhealthy { .. },
        ) => Outcome::Refused,
        Err(Error::Deadline { .. }) => Outcome::Expired,
        Err(Error::Forward { .. } | Error::Internal { .. } | Error::OutOfMemory { .. } | Error::DeviceLost { .. }) => {
            Outcome::Failed
        }
        Err(_) => Outcome::Invalid,
    }
}

/// Counts how a request ended, also when the handler's future is dropped in the middle.
struct Ending<'a> {
    metrics: &'a ModelMetrics,
    class: Priority,
    outcome: Outcome,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.metrics.outcome(self.class, self.outcome);
    }
}
