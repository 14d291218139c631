//! When to launch a batch and what goes into it. Pure: `now` is an argument.

use std::time::Duration;

/// The limits an operator tunes, one name in manifest, code, log and metric.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchLimits {
    /// Most sequences in one batch. At least 1.
    pub max_batch_size: usize,
    /// Most tokens in one batch. At least the model's max_seq_len.
    pub max_batch_tokens: usize,
    /// How long an entry may wait for company while the device is idle. 0: never.
    pub max_queue_delay: Duration,
    /// Most entries waiting; one more is refused with `QueueFull`. At least 1.
    pub max_queue_size: usize,
}
