//! Results of recorded history back into the cache: bit for bit what was computed, named as it is named today.
//!
//! A record fills the cache where everything that decides its bits is known and the same now: its input in full, its
//! parameters, and the fingerprint of the model that is served. A cached item also holds the tokens of its one input, where a
//! record has their sum; they are counted anew, and a record whose sum they do not give is passed over.

use std::collections::HashSet;
use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;

use super::key::Form;
use super::stored_form::{inputs_of, params_of};
use crate::model::ModelInfo;
use crate::model::encode::Encoder;
use crate::store::Records;
use crate::store::cache::{CacheKey, CachedItem, CachedValue};
use crate::store::query::{Page, Query};
use crate::store::record::{Record, Status, StoredInput, StoredOutput};
use crate::{Error, Result};

/// Records read at a time, with their outputs.
const PAGE: usize = 100;

/// A model whose results can be named: one that is served, or would be.
#[derive(Clone)]
pub struct Known {
    pub info: Arc<ModelInfo>,
    pub encoder: Arc<Encoder>,
}

/// Where history is read from.
#[async_trait]
pub trait History: Send + Sync {
    /// See [`Records::list`].
    async fn page(&self, query: &Query) -> Result<Page>;
}

#[async_trait]
impl<T: Records + ?Sized> History for T {
    async fn page(&self, query: &Query) -> Result<Page> {
        self.list(query).await
    }
}

/// The cache as it is filled.
#[async_trait]
pub trait Sink: Send + Sync {
    /// Keeps items. Errors: [`Error::StoreUnavailable`] where it cannot.
    async fn put(&self, items: &[(CacheKey, CachedItem)]) -> Result<()>;

    /// Forgets items again.
    async fn remove(&self, keys: &[CacheKey]);
}

/// Which records are read: the newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// At most so many, whatever can be done with them.
    pub limit: usize,
    /// Made at this time or later.
    pub from: Option<Timestamp>,
}

/// What was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Warmed {
    pub num_records: u64,
    /// Results that were put into the cache. Repetitions count.
    pub num_items: u64,
    /// Records whose model, version or fingerprint is not the one that is served.
    pub num_of_others: u64,
    /// Records without their inputs (`database.store_input`), or not of embeddings.
    pub num_without_input: u64,
    /// Records that contradict themselves or what the model says today. Nothing is made of them.
    pub num_unlike: u64,
}

/// Why a record fills nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unfit {
    OfAnother,
    WithoutInput,
    Unlike,
}

/// Fills the cache from the newest records. `progress` is told after every page. Dropping the future leaves what was put.
///
/// A record that is erased meanwhile leaves nothing behind: after every page it is looked up again, and what was put for
/// records that are gone is removed.
/// Errors: the store's and the cache's; what was put until then is counted in no answer, but stays.
pub async fn warm(
    known: &[Known],
    history: &dyn History,
    sink: &dyn Sink,
    range: Range,
    progress: &(dyn Fn(&Warmed) + Send + Sync),
) -> Result<Warmed> {
    let known: Arc<[Known]> = known.into();
    let mut warmed = Warmed::default();
    let mut query = Query { status: Some(Status::Succeeded), from: range.from, with_output: true, ..Query::default() };
    let mut left = range.limit;
    while left > 0 {
        query.limit = left.min(PAGE);
        let page = history.page(&query).await?;
        left -= page.records.len().min(left);
        let num_records = page.records.len();
        let (first, next) = (query.after, page.next);
        let work = known.clone();
        // Tokenising takes a while, and nobody waits for it.
        let items = tokio::task::spawn_blocking(move || items_of_page(&work, &page.records)).await;
        let items = items.map_err(|e| Error::Internal { cause: format!("naming recorded results: {e}") })?;
        put(&items, sink, &mut warmed).await?;
        if num_records > 0 {
            let there =
                history.page(&Query { after: first, limit: num_records, with_output: false, ..query.clone() }).await?;
            forget_erased(&items, &there, sink).await;
        }
        progress(&warmed);
        match next {
            Some(next) => query.after = Some(next),
            None => break,
        }
    }
    Ok(warmed)
}

/// What became of a record.
struct Named {
    id: crate::store::record::InferenceId,
    items: Result<Vec<(CacheKey, CachedItem)>, Unfit>,
}

fn items_of_page(known: &[Known], records: &[Record]) -> Vec<Named> {
    records.iter().map(|record| Named { id: record.id, items: items_of(known, record) }).collect()
}

async fn put(page: &[Named], sink: &dyn Sink, warmed: &mut Warmed) -> Result<()> {
    for Named { items, .. } in page {
        warmed.num_records += 1;
        match items {
            Ok(items) => {
                sink.put(items).await?;
                warmed.num_items += items.len() as u64;
            }
            Err(Unfit::OfAnother) => warmed.num_of_others += 1,
            Err(Unfit::WithoutInput) => warmed.num_without_input += 1,
            Err(Unfit::Unlike) => warmed.num_unlike += 1,
        }
    }
    Ok(())
}

/// An erasure removes records first and their results then: one that has removed its records before this look has perhaps
/// removed the results before they were put; one that comes later removes them after.
async fn forget_erased(page: &[Named], there: &Page, sink: &dyn Sink) {
    let ids: HashSet<_> = there.records.iter().map(|record| record.id).collect();
    for Named { id, items } in page.iter().filter(|named| !ids.contains(&named.id)) {
        if let Ok(items) = items {
            tracing::debug!(%id, "a record was deleted while the cache was filled from it");
            let keys: Vec<CacheKey> = items.iter().map(|(key, _)| *key).collect();
            sink.remove(&keys).await;
        }
    }
}

/// The cached items of a record.
fn items_of(known: &[Known], record: &Record) -> Result<Vec<(CacheKey, CachedItem)>, Unfit> {
    let facts = &record.facts;
    let is_known = |known: &&Known| {
        let info = &known.info;
        *info.name == *facts.model
            && info.version == facts.version
            && Some(&info.fingerprint) == facts.fingerprint.as_ref()
    };
    let Known { info, encoder } = known.iter().find(is_known).ok_or(Unfit::OfAnother)?;
    let StoredInput::Full(value) = &facts.input else { return Err(Unfit::WithoutInput) };
    let rows = match &record.output {
        Some(StoredOutput::Embeddings(rows)) => &**rows,
        Some(StoredOutput::Tensors(output)) => &output.rows,
        Some(StoredOutput::Json(_)) | None => return Err(Unfit::WithoutInput),
    };
    let (inputs, params) = (inputs_of(value), params_of(&facts.parameters));
    let form = Form::of(info, &params).ok_or(Unfit::Unlike)?;
    let is_alike = facts.task == info.task
        && value.as_array().map(Vec::len) == Some(inputs.len())
        && inputs.len() == rows.len()
        && rows.iter().all(|row| form.row_len.fits(row.len()));
    if !is_alike {
        return Err(Unfit::Unlike);
    }
    // As the engine does it: the prompt before a text, and the cut.
    let prompt = params.prompt_name.as_ref().or(info.default_prompt.as_ref()).and_then(|name| info.prompts.get(name));
    let mut items = Vec::with_capacity(rows.len());
    let mut sum = 0;
    for (input, row) in inputs.iter().zip(rows.iter()) {
        let encoding = encoder.encode(input, "input", prompt.map(String::as_str), params.truncation);
        let num_tokens = encoding.map_err(|_| Unfit::Unlike)?.input_ids.len();
        sum += num_tokens as u64;
        let num_tokens = u32::try_from(num_tokens).map_err(|_| Unfit::Unlike)?;
        items.push((form.key(input), CachedItem { value: CachedValue::Row(row.as_slice().into()), num_tokens }));
    }
    match sum == facts.usage.num_tokens {
        true => Ok(items),
        false => Err(Unfit::Unlike),
    }
}
