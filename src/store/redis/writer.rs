//! The task that writes: nobody waits for it, and it waits for nobody.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use redis::{Cmd, Pipeline, RedisError};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::connection::Connection;
use super::link::{Link, Live, Outcome};
use super::{on_keys, redis_key, unix_ms, value};
use crate::store::cache::{CacheKey, CachedItem};
use crate::{Error, Result};

/// Items written in one piece: a quarter of a megabyte of rows of 384 values.
const BATCH: usize = 128;
/// How long a piece may take. Longer than a look-up: nobody waits.
const WRITE_TIMEOUT: Duration = Duration::from_secs(1);
/// As [`WRITE_TIMEOUT`], where somebody waits and nothing else is to be done.
const FILL_TIMEOUT: Duration = Duration::from_secs(10);
/// How often an error that a server answers (no memory, no permission) is told in the log.
const TELL_INTERVAL: Duration = Duration::from_secs(60);

/// What there is to do, in order: what is removed after it was put stays removed.
pub enum Job {
    Put {
        key: CacheKey,
        item: CachedItem,
        expires_at_ms: u64,
    },
    Remove {
        keys: Vec<CacheKey>,
        /// Whether they are gone. The other end may have stopped waiting.
        reply: oneshot::Sender<bool>,
    },
}

/// Does jobs until the other end of the queue is gone.
pub async fn write(link: Arc<Link>, mut jobs: mpsc::Receiver<Job>) {
    let mut batch = Vec::with_capacity(BATCH);
    let mut told = None;
    while jobs.recv_many(&mut batch, BATCH).await > 0 {
        let mut commands = Vec::new();
        for job in batch.drain(..) {
            match job {
                Job::Put { key, item, expires_at_ms } => commands.extend(set(&key, &item, expires_at_ms)),
                Job::Remove { keys, reply } => {
                    put(&link, &mut commands, &mut told).await;
                    // Nobody may be waiting any more.
                    let _ = reply.send(remove(&link, &keys).await);
                }
            }
        }
        put(&link, &mut commands, &mut told).await;
    }
}

/// `None` for an item that has expired while it waited.
fn set(key: &CacheKey, item: &CachedItem, expires_at_ms: u64) -> Option<Cmd> {
    let left = expires_at_ms.checked_sub(unix_ms()).filter(|left| *left > 0)?;
    let mut command = redis::cmd("SET");
    command.arg(redis_key(key)).arg(value::encode(item, expires_at_ms)).arg("PX").arg(left);
    Some(command)
}

/// Writes what there is and empties the list.
async fn put(link: &Link, commands: &mut Vec<Cmd>, told: &mut Option<Instant>) {
    let num_items = commands.len() as u64;
    let commands = std::mem::take(commands);
    if commands.is_empty() {
        return;
    }
    let Some(live) = link.live() else { return link.metrics.dropped_writes.increment(num_items) };
    let failed = match timeout(WRITE_TIMEOUT, send(&live, commands)).await {
        Ok(Ok(())) => return link.note(&live, Outcome::Answered),
        Ok(Err(error)) => Some(error),
        Err(_) => None,
    };
    link.metrics.dropped_writes.increment(num_items);
    match &failed {
        None => link.note(&live, Outcome::TimedOut),
        Some(error) if error.is_io_error() || is_of_another_server(error) => link.note(&live, Outcome::Failed(error)),
        // The server answered: it can still be read from. Without memory, for one, it takes no more and has what it has.
        Some(error) => {
            link.metrics.errors.increment(1);
            if told.is_none_or(|told| told.elapsed() > TELL_INTERVAL) {
                tracing::warn!(%error, "the cache's Redis takes no results");
                *told = Some(Instant::now());
            }
        }
    }
}

/// Writes items, in pieces, and waits for each. Errors: [`Error::StoreUnavailable`].
pub async fn write_now(link: &Link, items: &[(CacheKey, CachedItem)], expires_at_ms: u64) -> Result<()> {
    let unavailable = |cause: &str| Error::StoreUnavailable { cause: format!("the cache's Redis: {cause}") };
    for items in items.chunks(BATCH) {
        let live = link.live().ok_or_else(|| unavailable("it is away"))?;
        let commands: Vec<Cmd> = items.iter().filter_map(|(key, item)| set(key, item, expires_at_ms)).collect();
        match timeout(FILL_TIMEOUT, send(&live, commands)).await {
            Ok(Ok(())) => link.note(&live, Outcome::Answered),
            Ok(Err(error)) => return Err(unavailable(&error.to_string())),
            Err(_) => return Err(unavailable("it does not answer")),
        }
    }
    Ok(())
}

/// A replica, or a node of a cluster that was given as a single server.
fn is_of_another_server(error: &RedisError) -> bool {
    error.is_unrecoverable_error() || error.is_cluster_error() || matches!(error.code(), Some("READONLY"))
}

async fn send(live: &Live, commands: Vec<Cmd>) -> Result<(), RedisError> {
    let mut connection = live.connection.clone();
    match &connection {
        Connection::Node(_) => {
            let mut pipeline = Pipeline::with_capacity(commands.len());
            for command in commands {
                pipeline.add_command(command).ignore();
            }
            connection.ask_all(&pipeline).await
        }
        // Of a cluster every key has its own node: each command finds its way, and those to one node go in one piece.
        Connection::Cluster(_) => {
            let sends = commands.iter().map(|command| {
                let mut connection = connection.clone();
                async move { connection.ask(command).await }
            });
            try_join_all(sends).await.map(drop)
        }
    }
}

async fn remove(link: &Link, keys: &[CacheKey]) -> bool {
    let Some(live) = link.live() else { return false };
    let mut connection = live.connection.clone();
    for keys in keys.chunks(BATCH) {
        match timeout(WRITE_TIMEOUT, connection.ask(&on_keys("UNLINK", keys))).await {
            Ok(Ok(_)) => link.note(&live, Outcome::Answered),
            Ok(Err(error)) => {
                link.note(&live, Outcome::Failed(&error));
                return false;
            }
            Err(_) => {
                link.note(&live, Outcome::TimedOut);
                return false;
            }
        }
    }
    true
}
