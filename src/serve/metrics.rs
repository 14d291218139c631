//! What this room counts and times. Handles are looked up once a model and device: recording is an atomic or two.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use ::metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};

use super::batch::Batch;
use super::class::PerClass;
use super::policy::BatchLimits;
use super::ticket::Ticket;
use crate::model::Rows;
use crate::request::Priority;

/// Registers help and unit of every metric of this room. Call it once, after the recorder is installed and
/// before the first model is added.
pub fn describe() {
    describe_gauge!("eremois_queue_depth", Unit::Count, "Entries accepted and not yet launched, by model and class");
    describe_histogram!(
        "eremois_queue_wait_seconds",
        Unit::Seconds,
        "From the push of an entry to its launch, by class"
    );
    describe_histogram!("eremois_batch_size", Unit::Count, "Sequences in a launched batch");
    describe_histogram!("eremois_batch_tokens", Unit::Count, "Tokens in a launched batch");
    describe_histogram!(
        "eremois_batch_fill_ratio",
        Unit::Count,
        "How full a launched batch is, 0 to 1: the larger of its sequences and its tokens, each over its limit"
    );
    describe_histogram!(
        "eremois_tokenize_seconds",
        Unit::Seconds,
        "Of one request: from the hand-over to the encoders until its last input is tokenised"
    );
    describe_histogram!("eremois_pack_seconds", Unit::Seconds, "Taking a batch from the queue and packing it");
    describe_histogram!(
        "eremois_forward_seconds",
        Unit::Seconds,
        "Launching a batch: on CPU the whole forward, on an asynchronous device its submission"
    );
    describe_histogram!(
        "eremois_copy_seconds",
        Unit::Seconds,
        "Finishing a batch: waiting for an asynchronous device and copying the rows to the host"
    );
    describe_histogram!("eremois_reply_seconds", Unit::Seconds, "Handing the rows of a batch to their clients");
    describe_counter!("eremois_inputs_total", Unit::Count, "Inputs computed and answered, by model, device and class");
    describe_counter!(
        "eremois_tokens_total",
        Unit::Count,
        "Tokens computed, special tokens included, by model and device"
    );
    describe_counter!("eremois_requests_total", Unit::Count, "Requests by model, class and outcome");
    describe_counter!("eremois_refused_total", Unit::Count, "Entries refused at the door, by model, class and reason");
    describe_counter!(
        "eremois_expired_total",
        Unit::Count,
        "Entries dropped before launch: deadline passed or out of reach, or client gone, by model and reason"
    );
    describe_counter!(
        "eremois_batch_failures_total",
        Unit::Count,
        "Batches whose forward failed, by model, device and kind"
    );
    describe_counter!(
        "eremois_worker_restarts_total",
        Unit::Count,
        "Recoveries of a worker from a panic, by model and device"
    );
    describe_counter!(
        "eremois_heartbeats_total",
        Unit::Count,
        "Trials of an idle device, by model, device and outcome"
    );
    describe_counter!(
        "eremois_handed_over_total",
        Unit::Count,
        "Entries that another device took over from one that failed, by model and the device that failed"
    );
    describe_counter!(
        "eremois_limits_lowered_total",
        Unit::Count,
        "Reductions of max_batch_tokens for want of memory, by model"
    );
    describe_gauge!("eremois_max_batch_tokens", Unit::Count, "The max_batch_tokens in force, by model");
    describe_histogram!(
        "eremois_device_seconds",
        Unit::Seconds,
        "Of one batch, by the device's own clock, by model, device and phase"
    );
    describe_histogram!(
        "eremois_device_gap_seconds",
        Unit::Seconds,
        "Before one batch: how long the device computed nothing while an entry of the batch waited, by model and device"
    );
    describe_gauge!("eremois_model_ready", Unit::Count, "1 while the model takes requests, else 0");
    describe_gauge!(
        "eremois_device_ready",
        Unit::Count,
        "1 while the device passes its trials, else 0, by model and device"
    );
    describe_gauge!(
        "eremois_device_lost",
        Unit::Count,
        "1 once the device is lost to this process, else 0, by model and device"
    );
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Ok,
    /// A fault of the request.
    Invalid,
    /// Full, loading, draining or unhealthy.
    Refused,
    Expired,
    Failed,
    /// The client went before the answer.
    Cancelled,
}

/// The handles of one model: what happens before a device is chosen, and how it ends.
pub struct ModelMetrics {
    pub queue_depth: PerClass<Gauge>,
    pub tokenize: Histogram,
    pub refused_full: PerClass<Counter>,
    pub refused_late: PerClass<Counter>,
    pub refused_unready: PerClass<Counter>,
    pub refused_draining: PerClass<Counter>,
    pub ready: Gauge,
    pub max_batch_tokens: Gauge,
    outcomes: PerClass<[Counter; 6]>,
}

/// The handles of one device of a model. What is labelled by model alone is counted by all of its devices together.
pub struct DeviceMetrics {
    pub queue_wait: PerClass<Histogram>,
    pub batch_size: Histogram,
    pub batch_tokens: Histogram,
    pub batch_fill: Histogram,
    pub pack: Histogram,
    pub forward: Histogram,
    pub copy: Histogram,
    pub reply: Histogram,
    pub inputs: PerClass<Counter>,
    pub tokens: Counter,
    pub expired_deadline: Counter,
    pub expired_closed: Counter,
    pub batches_failed: Counter,
    pub batches_panicked: Counter,
    pub batches_out_of_memory: Counter,
    pub batches_lost: Counter,
    pub restarts: Counter,
    pub heartbeats_ok: Counter,
    pub heartbeats_failed: Counter,
    pub handed_over: Counter,
    pub device_ready: Gauge,
    pub device_lost: Gauge,
    pub limits_lowered: Counter,
    pub max_batch_tokens: Gauge,
    /// Batches computed, trials apart. Kept here because a counter of the recorder cannot be read back.
    pub num_batches: AtomicU64,
    device_upload: Histogram,
    device_forward: Histogram,
    device_download: Histogram,
    device_gap: Histogram,
}

impl ModelMetrics {
    /// Looks up the handles, once a model.
    pub fn new(model: &str) -> Self {
        // One line a metric below needs the name owned: the recorder keeps it.
        let m = || model.to_string();
        // In the order of `Outcome`.
        let outcomes = ["ok", "invalid", "refused", "expired", "failed", "cancelled"];
        let outcomes_of = |class| {
            outcomes.map(|name| counter!("eremois_requests_total", "model" => m(), "class" => class, "outcome" => name))
        };
        let refused = |reason| {
            let of = |class| counter!("eremois_refused_total", "model" => m(), "class" => class, "reason" => reason);
            PerClass::new(of)
        };
        Self {
            queue_depth: PerClass::new(|class| gauge!("eremois_queue_depth", "model" => m(), "class" => class)),
            tokenize: histogram!("eremois_tokenize_seconds", "model" => m()),
            refused_full: refused("full"),
            refused_late: refused("late"),
            refused_unready: refused("unready"),
            refused_draining: refused("draining"),
            ready: gauge!("eremois_model_ready", "model" => m()),
            max_batch_tokens: gauge!("eremois_max_batch_tokens", "model" => m()),
            outcomes: PerClass::new(outcomes_of),
        }
    }

    pub fn outcome(&self, class: Priority, outcome: Outcome) {
        self.outcomes[class][outcome as usize].increment(1);
    }
}

impl DeviceMetrics {
    /// Looks up the handles, once a device.
    pub fn new(model: &str, device: &str) -> Self {
        let (m, d) = (|| model.to_string(), || device.to_string());
        let queue_wait =
            |class| histogram!("eremois_queue_wait_seconds", "model" => m(), "device" => d(), "class" => class);
        let inputs = |class| counter!("eremois_inputs_total", "model" => m(), "device" => d(), "class" => class);
        let expired = |reason| counter!("eremois_expired_total", "model" => m(), "reason" => reason);
        let failures = |kind| counter!("eremois_batch_failures_total", "model" => m(), "device" => d(), "kind" => kind);
        let heartbeats =
            |outcome| counter!("eremois_heartbeats_total", "model" => m(), "device" => d(), "outcome" => outcome);
        let phase = |phase| histogram!("eremois_device_seconds", "model" => m(), "device" => d(), "phase" => phase);
        Self {
            queue_wait: PerClass::new(queue_wait),
            batch_size: histogram!("eremois_batch_size", "model" => m(), "device" => d()),
            batch_tokens: histogram!("eremois_batch_tokens", "model" => m(), "device" => d()),
            batch_fill: histogram!("eremois_batch_fill_ratio", "model" => m(), "device" => d()),
            pack: histogram!("eremois_pack_seconds", "model" => m(), "device" => d()),
            forward: histogram!("eremois_forward_seconds", "model" => m(), "device" => d()),
            copy: histogram!("eremois_copy_seconds", "model" => m(), "device" => d()),
            reply: histogram!("eremois_reply_seconds", "model" => m(), "device" => d()),
            inputs: PerClass::new(inputs),
            tokens: counter!("eremois_tokens_total", "model" => m(), "device" => d()),
            expired_deadline: expired("deadline"),
            expired_closed: expired("closed"),
            batches_failed: failures("error"),
            batches_panicked: failures("panic"),
            batches_out_of_memory: failures("out_of_memory"),
            batches_lost: failures("lost"),
            restarts: counter!("eremois_worker_restarts_total", "model" => m(), "device" => d()),
            heartbeats_ok: heartbeats("ok"),
            heartbeats_failed: heartbeats("failed"),
            handed_over: counter!("eremois_handed_over_total", "model" => m(), "device" => d()),
            device_ready: gauge!("eremois_device_ready", "model" => m(), "device" => d()),
            device_lost: gauge!("eremois_device_lost", "model" => m(), "device" => d()),
            limits_lowered: counter!("eremois_limits_lowered_total", "model" => m()),
            max_batch_tokens: gauge!("eremois_max_batch_tokens", "model" => m()),
            num_batches: AtomicU64::new(0),
            device_upload: phase("upload"),
            device_forward: phase("forward"),
            device_download: phase("download"),
            device_gap: histogram!("eremois_device_gap_seconds", "model" => m(), "device" => d()),
        }
    }

    /// One batch goes to the device.
    pub fn launched(&self, batch: &Batch, num_tokens: usize, launched: Instant, limits: &BatchLimits) {
        let num_seqs = batch.tickets.len() as f64;
        let by_size = num_seqs / limits.max_batch_size as f64;
        let by_tokens = num_tokens as f64 / limits.max_batch_tokens as f64;
        self.batch_size.record(num_seqs);
        self.batch_tokens.record(num_tokens as f64);
        self.batch_fill.record(by_size.max(by_tokens));
        let record = |wait: &Histogram, tickets: &[Ticket]| {
            tickets.iter().for_each(|t| wait.record(launched.saturating_duration_since(t.pushed)));
        };
        let PerClass { interactive, background } = batch.by_class();
        record(&self.queue_wait.interactive, interactive);
        record(&self.queue_wait.background, background);
    }

    /// The rows of a batch are there.
    pub fn computed(&self, batch: &Batch, rows: &Rows, launched: Instant) {
        // Nothing is ordered by this count.
        self.num_batches.fetch_add(1, Ordering::Relaxed);
        let Some(times) = rows.device_times else { return };
        self.device_upload.record(times.upload);
        self.device_forward.record(times.forward);
        self.device_download.record(times.download);
        // An idle device is a loss only while something waits for it.
        if let Some(idle) = times.idle
            && let Some(oldest) = batch.tickets.iter().map(|ticket| ticket.pushed).min()
        {
            self.device_gap.record(idle.min(launched.saturating_duration_since(oldest)));
        }
    }
}
