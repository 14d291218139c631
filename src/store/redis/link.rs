//! The connection while it works, and the task that makes a new one when it does not.
//!
//! ```text
//!             probe answered in time                         a call failed, and the breaker opens
//!   away ────────────────────────────▶ up, on trial ─▶ up ────────────────────────────────────────▶ away
//!    ▲  └─ pause, connect, PING ─┐                                                                   │
//!    └────────────────────────────┴───────────────────────────────────────────────────────────────────┘
//! ```
//!
//! While it is away nobody waits for it: only this task asks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use redis::{ErrorKind, RedisError, ServerErrorKind};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::breaker::{Backoff, Breaker};
use super::connection::{Connection, Connector};
use crate::store::cache_metrics::RedisMetrics;

/// How long connecting may take, logging in and asking the sentinels included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The least a probe may take: one unlucky moment of a busy machine must not keep a good server away.
const MIN_PROBE_TIMEOUT: Duration = Duration::from_millis(50);

/// What callers and the task share.
pub struct Link {
    /// `None` while away.
    live: ArcSwapOption<Live>,
    /// Why it is away, for the log.
    reason: Mutex<String>,
    /// The task waits for it.
    lost: Notify,
    pub metrics: RedisMetrics,
}

/// A connection with what is known of it.
pub struct Live {
    pub connection: Connection,
    /// Locked for moments: a comparison and two additions.
    breaker: Mutex<Breaker>,
}

/// How a call ended.
pub enum Outcome<'a> {
    Answered,
    TimedOut,
    Failed(&'a RedisError),
}

impl Default for Link {
    fn default() -> Self {
        let metrics = RedisMetrics::default();
        metrics.up.set(0.0);
        Self { live: ArcSwapOption::default(), reason: Mutex::default(), lost: Notify::new(), metrics }
    }
}

impl Link {
    /// The connection, while it works.
    pub fn live(&self) -> Option<Arc<Live>> {
        self.live.load_full()
    }

    /// Notes how a call on `live` ended, and gives the connection up if it was one too many that failed.
    pub fn note(&self, live: &Arc<Live>, outcome: Outcome<'_>) {
        let now = Instant::now();
        let (reason, is_lost) = match outcome {
            Outcome::Answered => return live.breaker.lock().succeeded(now),
            Outcome::TimedOut => {
                self.metrics.timeouts.increment(1);
                ("no answer in time".to_string(), false)
            }
            Outcome::Failed(error) => {
                self.metrics.errors.increment(1);
                (error.to_string(), is_lost(&live.connection, error))
            }
        };
        if live.breaker.lock().failed(now) || is_lost {
            self.give_up(live, reason);
        }
    }

    fn give_up(&self, live: &Arc<Live>, reason: String) {
        let before = self.live.compare_and_swap(live, None);
        // Of many calls that fail at once one gives it up; a new connection is none of theirs.
        if before.as_ref().is_some_and(|before| Arc::ptr_eq(before, live)) {
            *self.reason.lock() = reason;
            self.metrics.up.set(0.0);
            self.lost.notify_one();
        }
    }

    /// Keeps a connection up for as long as this future lives. `patience` is what callers wait for an answer.
    pub async fn keep_up(&self, connector: Connector, patience: Duration) {
        let address = connector.address();
        let mut backoff = Backoff::default();
        let mut told = None;
        loop {
            let mut held = Duration::ZERO;
            match probe(&connector, patience.max(MIN_PROBE_TIMEOUT)).await {
                Ok(connection) => {
                    if told.take().is_some() {
                        tracing::info!(%address, "the cache's Redis answers again");
                    } else {
                        tracing::debug!(%address, "connected to the cache's Redis");
                    }
                    let up_since = Instant::now();
                    let live = Live { connection, breaker: Mutex::new(Breaker::new(up_since)) };
                    self.live.store(Some(Arc::new(live)));
                    self.metrics.up.set(1.0);
                    self.lost.notified().await;
                    held = up_since.elapsed();
                }
                Err(reason) => *self.reason.lock() = reason,
            }
            let reason = self.reason.lock().clone();
            if told.as_ref() != Some(&reason) {
                tracing::warn!(%address, reason, "the cache's Redis is away: it is passed over until it answers");
                told = Some(reason);
            }
            tokio::time::sleep(backoff.pause(held)).await;
        }
    }
}

/// A connection that has answered in time. Errors: why not.
async fn probe(connector: &Connector, limit: Duration) -> Result<Connection, String> {
    let mut connection = match timeout(CONNECT_TIMEOUT, connector.connect()).await {
        Ok(connected) => connected.map_err(|e| e.to_string())?,
        Err(_) => return Err(format!("no connection within {CONNECT_TIMEOUT:?}")),
    };
    match timeout(limit, connection.ping()).await {
        Ok(answered) => answered.map_err(|e| e.to_string())?,
        Err(_) => return Err(format!("no answer within {limit:?}")),
    }
    Ok(connection)
}

/// Whether the connection is of no more use. A cluster's mends itself; there only the number of failures counts.
fn is_lost(connection: &Connection, error: &RedisError) -> bool {
    match connection {
        Connection::Cluster(_) => false,
        // A master that has become a replica: the sentinels know another.
        Connection::Node(_) => {
            error.is_io_error()
                || error.is_connection_dropped()
                || error.is_unrecoverable_error()
                || error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly)
        }
    }
}
