//! Erasure: of a user's records, and of what was computed for them from the cache.

use super::keep::Keeper;
use super::stored_form::{inputs_of, params_of};
use crate::Result;
use crate::store::Records;
use crate::store::durable::State;
use crate::store::record::{InferenceId, Record, StoredInput};

/// What became of a user's erasure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Erased {
    pub num_records: u64,
    /// Those that were to be computed yet.
    pub unfinished: Vec<InferenceId>,
    /// Whether what was computed for them is known to be gone from the cache.
    pub is_cache_clear: bool,
}

/// Records that are erased by one call of the store.
const ERASED_AT_A_TIME: usize = 500;

impl Keeper {
    /// Deletes all records of a user, and what was computed for them from the cache. While the store is away the journal
    /// takes the erasure, and what it will find later is forgotten then: see [`Keeper::forget`].
    ///
    /// Errors: the store's; part of the records may be gone then, and the call can be repeated.
    pub async fn erase_user(&self, user: &str) -> Result<Erased> {
        // Records that the store still has are not among those returned, so nobody can name their results yet.
        let is_all_there = self.store().state() == State::Healthy;
        let mut erased = Erased { num_records: 0, unfinished: Vec::new(), is_cache_clear: is_all_there };
        loop {
            let records = self.store().erase_user(user, ERASED_AT_A_TIME).await?;
            erased.num_records += records.len() as u64;
            let unfinished = records.iter().filter(|record| !record.facts.status.is_final());
            erased.unfinished.extend(unfinished.map(|record| record.id));
            erased.is_cache_clear &= self.forget(&records).await;
            if records.len() < ERASED_AT_A_TIME {
                return Ok(erased);
            }
        }
    }

    /// Removes the results of records from the cache, where their inputs were kept. Returns whether they are known to be
    /// gone.
    pub async fn forget(&self, records: &[Record]) -> bool {
        let mut is_clear = true;
        for record in records {
            let facts = &record.facts;
            let StoredInput::Full(value) = &facts.input else {
                is_clear = false;
                continue;
            };
            let inputs = inputs_of(value);
            let params = params_of(&facts.parameters);
            if let Some(keys) = self.inferences().keys(&facts.model, &facts.version, &params, &inputs) {
                is_clear &= self.inferences().forget(&keys).await;
            }
        }
        is_clear
    }
}
