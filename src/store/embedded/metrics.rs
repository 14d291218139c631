//! What the embedded store counts and times.

use std::time::Duration;

use ::metrics::{Counter, Histogram, Unit, counter, describe_counter, describe_histogram, histogram};

use crate::Error;

/// The handles of one store. Its metrics carry the label `store`, as those of the other stores do.
pub(super) struct StoreMetrics {
    batch_size: Histogram,
    commit: Histogram,
    unavailable: Counter,
    internal: Counter,
}

impl StoreMetrics {
    /// Registers help and units, and looks up the handles.
    pub(super) fn new() -> Self {
        describe_histogram!("eremois_store_batch_size", Unit::Count, "Changes that were committed together");
        describe_histogram!(
            "eremois_store_commit_seconds",
            Unit::Seconds,
            "From the begin of a transaction to its commit on the disk"
        );
        describe_counter!("eremois_store_errors_total", Unit::Count, "Calls of the store that failed, by kind");
        let errors = |kind| counter!("eremois_store_errors_total", "store" => "embedded", "kind" => kind);
        Self {
            batch_size: histogram!("eremois_store_batch_size", "store" => "embedded"),
            commit: histogram!("eremois_store_commit_seconds", "store" => "embedded"),
            unavailable: errors("unavailable"),
            internal: errors("internal"),
        }
    }

    pub(super) fn committed(&self, num_changes: usize, took: Duration) {
        self.batch_size.record(num_changes as f64);
        self.commit.record(took);
    }

    /// A call that ends in this error.
    pub(super) fn failed(&self, error: &Error) {
        match error {
            Error::StoreUnavailable { .. } => self.unavailable.increment(1),
            _ => self.internal.increment(1),
        }
    }
}
