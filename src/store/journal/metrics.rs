//! What the journal counts and times.

use ::metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};

/// Registers help and unit of the journal's metrics. Call it once, after the recorder is installed and before a journal
/// is opened.
pub fn describe() {
    describe_gauge!("eremois_journal_bytes", Unit::Bytes, "What the journal counts for in database.journal_max_bytes");
    describe_gauge!("eremois_journal_entries", Unit::Count, "Entries of the journal that the store has not");
    describe_gauge!("eremois_journal_oldest_age_seconds", Unit::Seconds, "Age of the oldest of them; 0 without any");
    describe_counter!("eremois_journal_appended_total", Unit::Count, "Entries made durable in the journal");
    describe_counter!(
        "eremois_journal_replayed_total",
        Unit::Count,
        "Entries that have left the journal for the store"
    );
    describe_counter!(
        "eremois_journal_set_aside_total",
        Unit::Count,
        "Entries the store refuses for good or that cannot be read, kept in a file of their own"
    );
    describe_histogram!(
        "eremois_journal_fsync_seconds",
        Unit::Seconds,
        "Writing and syncing what waited, once for all"
    );
}

/// The handles of one journal.
pub(super) struct Metrics {
    pub bytes: Gauge,
    pub entries: Gauge,
    pub oldest_age: Gauge,
    pub appended: Counter,
    pub replayed: Counter,
    pub set_aside: Counter,
    pub fsync: Histogram,
}

impl Metrics {
    /// Looks up the handles.
    pub fn new() -> Self {
        Self {
            bytes: gauge!("eremois_journal_bytes"),
            entries: gauge!("eremois_journal_entries"),
            oldest_age: gauge!("eremois_journal_oldest_age_seconds"),
            appended: counter!("eremois_journal_appended_total"),
            replayed: counter!("eremois_journal_replayed_total"),
            set_aside: counter!("eremois_journal_set_aside_total"),
            fsync: histogram!("eremois_journal_fsync_seconds"),
        }
    }
}
