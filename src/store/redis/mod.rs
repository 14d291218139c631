//! The level of the cache that processes share: Redis, alone, behind sentinels, or as a cluster.
//!
//! ```text
//! get ──▶ Link: up? ──▶ one connection, all requests' commands on it ──▶ value::decode
//! put ──▶ a bounded queue ──▶ the writing task ──▶ SET … PX
//! ```
//!
//! No call fails and none takes longer than `cache.timeout`; while Redis is away none takes any time ([`link`]).
//!
//! [`stream`] is something else: how servers tell each other of background work.

pub mod address;
pub mod breaker;
pub mod connection;
pub mod line;
pub mod link;
pub mod stream;
pub mod value;
pub mod writer;

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use redis::{Cmd, FromRedisValue, RedisResult};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::cache::{CacheKey, CachedItem, SharedLevel};
use crate::Result;
use address::Address;
use connection::{Connection, Connector};
use link::{Link, Outcome};
use writer::Job;

/// Before every key. The number is raised when what a key stands for changes.
const PREFIX: &str = "eremois:r1:";

/// Results that wait to be written; more are dropped. They share their values with the level in this process.
const MAX_QUEUED: usize = 4096;

/// Keys of one MGET: the answers to others need not wait for all of a large request's.
const KEYS_A_CALL: usize = 128;

/// How long a removal may wait for what is queued before it and for its own answer.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Ten years, and longer than any key should live: Redis refuses times that it cannot add up.
const MAX_TTL: Duration = Duration::from_secs(10 * 366 * 24 * 3600);

/// Results in Redis. Dropping it closes the connection; what is queued is lost with it.
pub struct RedisCache {
    link: Arc<Link>,
    /// The writing task holds the other end.
    jobs: mpsc::Sender<Job>,
    timeout: Duration,
    ttl: Duration,
    tasks: [JoinHandle<()>; 2],
}

impl RedisCache {
    /// Begins to connect, and returns at once. Call it on the runtime that the tasks shall run on.
    ///
    /// `timeout` bounds every look-up, `ttl` the time for which a result of another process is used.
    /// Errors: [`crate::Error::Config`] for a file of certificates that cannot be read.
    pub fn start(address: Address, timeout: Duration, ttl: Duration) -> Result<Self> {
        let connector = Connector::new(address)?;
        let link = Arc::new(Link::default());
        let (jobs, queue) = mpsc::channel(MAX_QUEUED);
        let keeper = link.clone();
        let tasks = [
            tokio::spawn(async move { keeper.keep_up(connector, timeout).await }),
            tokio::spawn(writer::write(link.clone(), queue)),
        ];
        Ok(Self { link, jobs, timeout, ttl: ttl.min(MAX_TTL), tasks })
    }

    /// Writes items now and waits for it, past the queue: for who fills it with much.
    ///
    /// Errors: [`crate::Error::StoreUnavailable`] where Redis is away, does not answer in time, or takes no more.
    pub async fn write(&self, items: &[(CacheKey, CachedItem)], ttl: Duration) -> Result<()> {
        let expires_at_ms = unix_ms() + ttl.min(MAX_TTL).as_millis() as u64;
        writer::write_now(&self.link, items, expires_at_ms).await
    }

    /// Whether it is asked at the moment.
    pub fn is_up(&self) -> bool {
        self.link.live().is_some()
    }
}

impl Drop for RedisCache {
    fn drop(&mut self) {
        self.tasks.iter().for_each(|task| task.abort());
    }
}

#[async_trait]
impl SharedLevel for RedisCache {
    async fn get(&self, keys: &[CacheKey]) -> Vec<Option<(CachedItem, Duration)>> {
        let metrics = &self.link.metrics;
        let mut found: Vec<Option<(CachedItem, Duration)>> = vec![None; keys.len()];
        let Some(live) = self.link.live() else {
            metrics.misses.increment(keys.len() as u64);
            return found;
        };
        let start = Instant::now();
        let now_ms = unix_ms();
        let calls = parts(&live.connection, keys.len()).map(|part| {
            let connection = live.connection.clone();
            async move { (part.clone(), look_up(connection, &keys[part]).await) }
        });
        let mut calls: FuturesUnordered<_> = calls.collect();
        let mut failed = None;
        let in_time = tokio::time::timeout_at((start + self.timeout).into(), async {
            while let Some((part, answer)) = calls.next().await {
                match answer {
                    Ok(values) => {
                        for (slot, value) in found[part].iter_mut().zip(values) {
                            let Some(bytes) = value else { continue };
                            *slot = value::decode(&bytes, now_ms, self.ttl);
                            if slot.is_none() {
                                metrics.errors.increment(1);
                            }
                        }
                    }
                    Err(error) => failed = Some(error),
                }
            }
        })
        .await
        .is_ok();
        metrics.get.record(start.elapsed());
        self.link.note(
            &live,
            match &failed {
                Some(error) => Outcome::Failed(error),
                None if in_time => Outcome::Answered,
                None => Outcome::TimedOut,
            },
        );
        let num_hits = found.iter().flatten().count();
        metrics.hits.increment(num_hits as u64);
        metrics.misses.increment((keys.len() - num_hits) as u64);
        found
    }

    fn put(&self, items: &[(CacheKey, CachedItem)], ttl: Duration) {
        let mut num_dropped = items.len();
        // What is computed while Redis is away is not kept for it: the queue would only hold the oldest of it.
        if self.is_up() {
            let expires_at_ms = unix_ms() + ttl.min(MAX_TTL).as_millis() as u64;
            for (key, item) in items {
                let job = Job::Put { key: *key, item: item.clone(), expires_at_ms };
                if self.jobs.try_send(job).is_ok() {
                    num_dropped -= 1;
                }
            }
        }
        if num_dropped > 0 {
            self.link.metrics.dropped_writes.increment(num_dropped as u64);
        }
    }

    async fn remove(&self, keys: &[CacheKey]) -> bool {
        if keys.is_empty() {
            return true;
        }
        let (reply, done) = oneshot::channel();
        let job = Job::Remove { keys: keys.to_vec(), reply };
        let removal = async { self.jobs.send(job).await.is_ok() && done.await.unwrap_or(false) };
        tokio::time::timeout(REMOVE_TIMEOUT, removal).await.unwrap_or(false)
    }
}

/// Which keys go into one call: of a cluster each into its own, for every one has its own node, and the nodes that
/// answer are not kept waiting by one that does not.
fn parts(connection: &Connection, num_keys: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let len = match connection {
        Connection::Node(_) => KEYS_A_CALL,
        Connection::Cluster(_) => 1,
    };
    (0..num_keys).step_by(len).map(move |from| from..(from + len).min(num_keys))
}

async fn look_up(mut connection: Connection, keys: &[CacheKey]) -> RedisResult<Vec<Option<Vec<u8>>>> {
    if let ([key], Connection::Cluster(_)) = (keys, &connection) {
        let command = on_keys("GET", std::slice::from_ref(key));
        return Ok(vec![FromRedisValue::from_redis_value(connection.ask(&command).await?)?]);
    }
    Ok(FromRedisValue::from_redis_value(connection.ask(&on_keys("MGET", keys)).await?)?)
}

fn on_keys(name: &str, keys: &[CacheKey]) -> Cmd {
    let mut command = redis::cmd(name);
    for key in keys {
        command.arg(redis_key(key));
    }
    command
}

fn redis_key(key: &CacheKey) -> String {
    let mut text = String::with_capacity(PREFIX.len() + 43);
    text.push_str(PREFIX);
    BASE64_URL_SAFE_NO_PAD.encode_string(key.0, &mut text);
    text
}

/// Milliseconds of Unix time.
fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
