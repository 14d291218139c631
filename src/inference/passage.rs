//! One request on its way through the cache.

use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt;
use futures::stream::FuturesUnordered;

use super::flight::{Event, Joined, Lead, Wait};
use super::key::{Distinct, Form};
use super::{CacheUse, Caching, Computed, Through};
use crate::model::ModelInfo;
use crate::output::{Output, Phases, Row, Usage};
use crate::request::{Input, Priority, Request, TaskParams};
use crate::serve::Pinned;
use crate::store::cache::{CacheKey, CachedItem, CachedValue};
use crate::{Error, Result};

/// Inputs of more bytes are hashed off the async threads: a gigabyte a second and more, so that below it a handler stays
/// under the 500 microseconds an async thread may be held.
const MAX_INLINE_BYTES: usize = 256 << 10;

/// A request with what is known of its results. `which` counts its distinct inputs, in the order of their first places.
pub(super) struct Passage<'a> {
    through: Through<'a>,
    info: Arc<ModelInfo>,
    form: Form,
    params: TaskParams,
    start: Instant,
    deadline: Instant,
    priority: Priority,
    /// [num_inputs], each taken by whoever computes it.
    inputs: Vec<Option<Input>>,
    distinct: Distinct,
    /// Unicode scalar values of all texts.
    num_chars: usize,
    /// [distinct inputs], filled from the cache, by others, and by this request.
    items: Vec<Option<CachedItem>>,
    num_computed: usize,
    /// Sums over what was computed.
    phases: Phases,
}

/// An item to be computed by this request.
struct Duty {
    which: usize,
    key: CacheKey,
    /// `None` where nobody may wait for it.
    lead: Option<Lead>,
}

impl<'a> Passage<'a> {
    /// Names the inputs of a request, of which there is at least one.
    pub async fn new(
        through: Through<'a>,
        info: Arc<ModelInfo>,
        form: Form,
        request: Request,
        start: Instant,
    ) -> Result<Self> {
        let Request { model: _, inputs, params, deadline, priority } = request;
        let num_bytes: usize = inputs.iter().map(Input::num_bytes).sum();
        let (inputs, keys, num_chars) = if num_bytes <= MAX_INLINE_BYTES {
            hashed(form, inputs)
        } else {
            let hashing = tokio::task::spawn_blocking(move || hashed(form, inputs));
            hashing.await.map_err(|e| Error::Internal { cause: format!("hashing inputs: {e}") })?
        };
        let distinct = Distinct::of(&keys);
        Ok(Self {
            items: vec![None; distinct.keys.len()],
            inputs: inputs.into_iter().map(Some).collect(),
            through,
            info,
            form,
            params,
            start,
            deadline,
            priority,
            distinct,
            num_chars,
            num_computed: 0,
            phases: Phases::default(),
        })
    }

    /// Finds, computes, waits, and merges.
    pub async fn run(mut self, cache_use: CacheUse) -> Result<Computed> {
        let Through { caching, flights, .. } = self.through;
        let keys = self.distinct.keys.clone();
        let mut duties = Vec::new();
        let waits = FuturesUnordered::new();
        for (which, key) in keys.into_iter().enumerate() {
            // Who wants all anew takes neither what there is nor what somebody began before.
            let lead = if cache_use == CacheUse::Full {
                self.items[which] = caching.cache.peek(&key).filter(|item| self.is_row(item));
                if self.items[which].is_some() {
                    continue;
                }
                match self.priority {
                    // Who joins a flight waits for its leader, and a leader in the background may take for ever. That
                    // it may compute what another request computes too is the price.
                    Priority::Background => None,
                    Priority::Interactive => match flights.join(key) {
                        Joined::Lead(lead) => Some(lead),
                        Joined::Wait(wait) => {
                            waits.push(wait_for(which, wait));
                            continue;
                        }
                    },
                }
            } else {
                None
            };
            duties.push(Duty { which, key, lead });
        }
        if cache_use == CacheUse::Full {
            duties = self.find(duties).await;
        }
        if !duties.is_empty() || !waits.is_empty() {
            self.compute_and_wait(duties, waits).await?;
        }
        self.merge()
    }

    /// Looks in all levels for what nobody computes, and returns what is found in none. The level in this process is
    /// asked again: since the first look another request may have brought the item there and ended its flight.
    async fn find(&mut self, duties: Vec<Duty>) -> Vec<Duty> {
        if duties.is_empty() {
            return duties;
        }
        let keys: Vec<CacheKey> = duties.iter().map(|duty| duty.key).collect();
        let found = self.through.caching.cache.get(&keys).await;
        let mut left = Vec::new();
        for (duty, item) in duties.into_iter().zip(found) {
            match (item.filter(|item| self.is_row(item)), duty.lead) {
                (Some(item), lead) => {
                    if let Some(lead) = lead {
                        lead.complete(&item);
                    }
                    self.items[duty.which] = Some(item);
                }
                (None, lead) => left.push(Duty { lead, ..duty }),
            }
        }
        left
    }

    /// Computes this request's own items while it waits for those of others, and those that it is handed.
    ///
    /// Errors: the first item's that fails, by its place in the request; `Deadline` while only others compute.
    async fn compute_and_wait(
        &mut self,
        duties: Vec<Duty>,
        mut waits: FuturesUnordered<impl Future<Output = (usize, Option<Event>)>>,
    ) -> Result<()> {
        let Through { model, caching, joined, .. } = self.through;
        let mut computing = FuturesUnordered::new();
        if !duties.is_empty() {
            computing.push(compute(model, caching, self.request(&duties), duties));
        }
        let deadline = tokio::time::sleep_until(self.deadline.into());
        tokio::pin!(deadline);
        while !computing.is_empty() || !waits.is_empty() {
            tokio::select! {
                Some((asked, result)) = computing.next(), if !computing.is_empty() => self.take(asked, result)?,
                Some((which, event)) = waits.next(), if !waits.is_empty() => match event {
                    Some(Event::Done(item)) => {
                        joined.increment(1);
                        self.items[which] = Some(item);
                    }
                    Some(Event::Lead(lead)) => {
                        let duties = vec![Duty { which, key: self.distinct.keys[which], lead: Some(lead) }];
                        computing.push(compute(model, caching, self.request(&duties), duties));
                    }
                    None => return Err(Error::Internal { cause: "a flight forgot who waits for it".to_string() }),
                },
                // While something is computed for this request, the engine keeps its time.
                () = &mut deadline, if computing.is_empty() => {
                    return Err(Error::Deadline { timeout: self.deadline.saturating_duration_since(self.start) });
                }
            }
        }
        Ok(())
    }

    /// The request for these items alone. Takes their inputs.
    fn request(&mut self, duties: &[Duty]) -> Request {
        let first = |duty: &Duty| self.inputs[self.distinct.first[duty.which]].take();
        Request {
            model: Some(self.info.name.to_string()),
            inputs: duties.iter().filter_map(first).collect(),
            params: self.params.clone(),
            deadline: self.deadline,
            priority: self.priority,
        }
    }

    fn take(&mut self, asked: Vec<usize>, result: Result<(Vec<CachedItem>, Phases)>) -> Result<()> {
        let (items, phases) = result.map_err(|error| {
            let places: Vec<usize> = asked.iter().map(|&which| self.distinct.first[which]).collect();
            by_place(error, &places, self.inputs.len())
        })?;
        let num_items = asked.len() as u32;
        self.num_computed += asked.len();
        self.phases.tokenize += phases.tokenize * num_items;
        self.phases.queue += phases.queue * num_items;
        self.phases.inference += phases.inference * num_items;
        for (which, item) in asked.into_iter().zip(items) {
            self.items[which] = Some(item);
        }
        Ok(())
    }

    fn merge(self) -> Result<Computed> {
        let Self { info, params, items, distinct, inputs, num_computed, phases, num_chars, start, .. } = self;
        let mut usage = Usage { num_tokens: 0, num_chars };
        let mut rows = Vec::with_capacity(inputs.len());
        for which in distinct.of_input {
            let Some(CachedItem { value: CachedValue::Row(row), num_tokens }) = &items[which] else {
                return Err(Error::Internal { cause: "an input was left without a row".to_string() });
            };
            usage.num_tokens += *num_tokens as usize;
            rows.push(Row::Shared(row.clone()));
        }
        let num = num_computed.max(1) as u32;
        let phases = Phases {
            tokenize: phases.tokenize / num,
            queue: phases.queue / num,
            inference: phases.inference / num,
            total: start.elapsed(),
        };
        let num_cached = Some(rows.len() - num_computed);
        Ok(Computed { info, task: params.task, rows, usage, phases, num_cached })
    }

    /// Whether the item is what was asked for. A shared level may hold anything.
    fn is_row(&self, item: &CachedItem) -> bool {
        matches!(&item.value, CachedValue::Row(row) if self.form.row_len.fits(row.len()))
    }
}

/// Computes items in one request, keeps them, and ends their flights. Dropped or failing, it hands them over.
async fn compute(
    model: &Pinned,
    caching: &Caching,
    request: Request,
    duties: Vec<Duty>,
) -> (Vec<usize>, Result<(Vec<CachedItem>, Phases)>) {
    let asked = duties.iter().map(|duty| duty.which).collect();
    let Output { rows, num_tokens, phases, .. } = match model.infer(request).await {
        Ok(output) => output,
        Err(error) => return (asked, Err(error)),
    };
    let item = |(row, num_tokens): (Vec<f32>, u32)| CachedItem { value: CachedValue::Row(row.into()), num_tokens };
    let items = rows.into_iter().zip(num_tokens).map(item);
    let named: Vec<(CacheKey, CachedItem)> = duties.iter().map(|duty| duty.key).zip(items).collect();
    caching.cache.put(&named, caching.ttl).await;
    for (duty, (_, item)) in duties.into_iter().zip(&named) {
        if let Some(lead) = duty.lead {
            lead.complete(item);
        }
    }
    (asked, Ok((named.into_iter().map(|(_, item)| item).collect(), phases)))
}

async fn wait_for(which: usize, wait: Wait) -> (usize, Option<Event>) {
    (which, wait.await.ok())
}

/// The inputs again, with their names and the characters of their texts.
fn hashed(form: Form, inputs: Vec<Input>) -> (Vec<Input>, Vec<CacheKey>, usize) {
    let keys = inputs.iter().map(|input| form.key(input)).collect();
    let num_chars = inputs.iter().map(Input::num_chars).sum();
    (inputs, keys, num_chars)
}

/// An error of the engine, which counts the inputs that it was given, in the words of the client, who sent more.
///
/// `places` are the client's numbers of the engine's inputs, `num_inputs` the client's count of them.
fn by_place(error: Error, places: &[usize], num_inputs: usize) -> Error {
    let ours = |field: String| {
        let number = field.strip_prefix("input[").and_then(|rest| rest.strip_suffix(']')).map(str::parse::<usize>);
        match (number, places) {
            (Some(Ok(i)), _) if i < places.len() => format!("input[{}]", places[i]),
            // The engine does not count a single one.
            (None, [place]) if field == "input" && num_inputs > 1 => format!("input[{place}]"),
            _ => field,
        }
    };
    match error {
        Error::TooLarge { unit: "inputs", .. } => error,
        _ => error.with_field(ours),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_input_as_the_client_counts() {
        let renamed = |field: &str, places: &[usize], num_inputs| match by_place(
            Error::Empty { field: field.to_string() },
            places,
            num_inputs,
        ) {
            Error::Empty { field } => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(renamed("input[1]", &[3, 7], 9), "input[7]");
        assert_eq!(renamed("input", &[3], 9), "input[3]");
        assert_eq!(renamed("input", &[0], 1), "input");
        assert_eq!(renamed("input", &[3, 7], 9), "input");
        assert_eq!(renamed("input[9]", &[3], 9), "input[9]");
        assert_eq!(renamed("prompt_name", &[3], 9), "prompt_name");
        let many = Error::TooLarge { field: "input".into(), got: 1, limit: 0, unit: "inputs" };
        assert_eq!(by_place(many.clone(), &[3], 9), many);
    }
}
