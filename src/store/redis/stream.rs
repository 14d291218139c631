//! Who is told of tasks, over a stream of Redis with a consumer group: any number of processes share the offers.
//!
//! ```text
//! offer ──▶ XADD ──▶ stream ──XREADGROUP──▶ one process ──▶ settle: XACK, XDEL
//!                       ▲                        │ dies
//!                       └── XAUTOCLAIM by another ┘
//! ```
//!
//! The tasks are in the store, and so is who holds one; here is only the news of them. So whatever Redis forgets (an offer
//! beyond the bound, all of it after a restart or FLUSHALL) costs a look at the store and no task, and no call here fails.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ::metrics::{Counter, Gauge, Unit, counter, describe_counter, describe_gauge, gauge};
use async_trait::async_trait;
use parking_lot::Mutex;
use redis::streams::{StreamAutoClaimReply, StreamId, StreamInfoConsumersReply, StreamReadReply};
use redis::{Cmd, FromRedisValue, Pipeline, RedisError};
use tokio::time::sleep;

use super::address::Address;
use super::connection::Connector;
use super::line::{Line, Trouble};
use crate::Result;
use crate::store::work::dispatch::{Dispatch, Offer};

/// Before every key. The number is raised when what is in a stream changes.
const PREFIX: &str = "eremois:j1:";

/// The one group of a stream: all processes of a database.
const GROUP: &str = "servers";

/// The field of an entry.
const FIELD: &str = "task";

/// About how many entries a stream holds; the oldest go first.
const MAX_OFFERS: usize = 100_000;

/// Entries that go in one piece.
const OFFERS_A_CALL: usize = 256;

/// What Redis may take for an answer: beyond it, it is away.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);

/// The longest a read stays open. It is begun anew until the caller's wait is over.
const MAX_BLOCK: Duration = Duration::from_secs(2);

/// Between two looks whether Redis is back, while a caller waits.
const AWAY_POLL: Duration = Duration::from_millis(50);

/// How long a task may be due before this process looks for it by itself, while Redis answers.
const PATIENCE: Duration = Duration::from_secs(3);

/// A consumer that is idle for so many leases, and has nothing pending, is a dead process's.
const LEASES_UNTIL_GONE: u32 = 10;

/// A stream that nobody has touched for so long is deleted by Redis: its servers are gone.
const KEPT_FOR: Duration = Duration::from_secs(7 * 24 * 3600);

/// How often an error that a server answers (no memory, no permission) is told in the log.
const TELL_INTERVAL: Duration = Duration::from_secs(60);

/// Registers help and unit of this file's metrics.
pub fn describe_metrics() {
    describe_gauge!("eremois_jobs_dispatch_up", Unit::Count, "1 while servers are told of tasks over Redis");
    describe_counter!("eremois_jobs_offers_lost_total", Unit::Count, "Offers of tasks that Redis did not take");
    describe_counter!(
        "eremois_jobs_offers_reclaimed_total",
        Unit::Count,
        "Offers taken over from processes that did not settle them within a lease"
    );
}

/// Tells all processes that name this Redis and this namespace.
pub struct StreamDispatch {
    key: String,
    /// This process's name in the group.
    consumer: String,
    /// How long an offer may be unsettled before another process gets it.
    lease: Duration,
    /// For what is answered at once.
    writes: Arc<Line>,
    /// For reads that stay open: nothing else could be asked meanwhile.
    reads: Arc<Line>,
    upkeep: Mutex<Upkeep>,
    metrics: Metrics,
}

/// What is done now and then, by whoever asks for offers.
struct Upkeep {
    next_reclaim: Instant,
    /// Where the next look for abandoned offers begins.
    cursor: String,
    next_sweep: Instant,
    told_at: Option<Instant>,
}

struct Metrics {
    up: Gauge,
    lost: Counter,
    reclaimed: Counter,
}

impl StreamDispatch {
    /// Connects when it is first asked. Needs a tokio runtime from then on.
    ///
    /// `namespace` tells apart the databases whose servers share a Redis; `lease` is that of the tasks.
    /// Errors: [`crate::Error::Config`] for a file of certificates that cannot be read.
    pub fn new(address: Address, namespace: &str, lease: Duration) -> Result<Self> {
        let purpose = "tasks are found by looking into the store meanwhile";
        let reads = Connector::new(address.clone())?.with_node_timeout(MAX_BLOCK + ANSWER_TIMEOUT);
        let now = Instant::now();
        Ok(Self {
            key: format!("{PREFIX}{namespace}"),
            consumer: uuid::Uuid::now_v7().simple().to_string(),
            lease,
            writes: Line::new(Connector::new(address)?, "the offers of new tasks are lost meanwhile"),
            reads: Line::new(reads, purpose),
            upkeep: Mutex::new(Upkeep {
                next_reclaim: now,
                cursor: "0-0".to_string(),
                next_sweep: now + lease,
                told_at: None,
            }),
            metrics: Metrics {
                up: gauge!("eremois_jobs_dispatch_up"),
                lost: counter!("eremois_jobs_offers_lost_total"),
                reclaimed: counter!("eremois_jobs_offers_reclaimed_total"),
            },
        })
    }

    /// The stream's key.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Whether Redis has answered the last time it was asked for offers.
    pub fn is_up(&self) -> bool {
        self.reads.is_up()
    }

    fn command(&self, name: &str) -> Cmd {
        let mut command = redis::cmd(name);
        command.arg(&self.key);
        command
    }

    /// Sends commands in one piece. Returns whether all were done.
    async fn send(&self, commands: Pipeline) -> bool {
        let sent = self.writes.ask(ANSWER_TIMEOUT, |mut redis| async move { redis.ask_all(&commands).await }).await;
        sent.map_err(|trouble| self.tell(&trouble)).is_ok()
    }

    /// An answer on the connection that nobody shares.
    async fn ask<T: FromRedisValue>(&self, limit: Duration, command: Cmd) -> std::result::Result<T, Trouble> {
        let answered = self.reads.ask_alone(limit, |mut redis| async move { redis.ask(&command).await }).await?;
        T::from_redis_value(answered).map_err(|e| Trouble::Refused(RedisError::from(e)))
    }

    /// Offers for this process; none after `wait`, or after less.
    async fn read(&self, limit: usize, wait: Duration) -> std::result::Result<Vec<Offer>, Trouble> {
        let abandoned = self.reclaim(limit).await?;
        if !abandoned.is_empty() {
            return Ok(abandoned);
        }
        self.sweep().await?;
        let block = wait.min(MAX_BLOCK).as_millis();
        let mut command = redis::cmd("XREADGROUP");
        command.arg("GROUP").arg(GROUP).arg(&self.consumer).arg("COUNT").arg(limit);
        // To Redis a time of 0 is for ever.
        if block > 0 {
            command.arg("BLOCK").arg(block as u64);
        }
        command.arg("STREAMS").arg(&self.key).arg(">");
        let limit = Duration::from_millis(block as u64) + ANSWER_TIMEOUT;
        // Nothing came.
        let Some(reply) = self.ask::<Option<StreamReadReply>>(limit, command).await? else { return Ok(Vec::new()) };
        Ok(reply.keys.into_iter().flat_map(|key| key.ids).map(offer_of).collect())
    }

    /// Offers that another process has had for longer than a lease, or this one: who finds its task held lets it go.
    async fn reclaim(&self, limit: usize) -> std::result::Result<Vec<Offer>, Trouble> {
        let cursor = {
            let upkeep = self.upkeep.lock();
            if upkeep.next_reclaim > Instant::now() {
                return Ok(Vec::new());
            }
            upkeep.cursor.clone()
        };
        let mut command = self.command("XAUTOCLAIM");
        command.arg(GROUP).arg(&self.consumer).arg(self.lease.as_millis() as u64).arg(cursor);
        command.arg("COUNT").arg(limit);
        let reply: StreamAutoClaimReply = self.ask(ANSWER_TIMEOUT, command).await?;
        {
            let mut upkeep = self.upkeep.lock();
            // The end of what is pending: enough for a while.
            if reply.next_stream_id == "0-0" {
                upkeep.next_reclaim = Instant::now() + self.lease / 3;
            }
            upkeep.cursor = reply.next_stream_id;
        }
        self.metrics.reclaimed.increment(reply.claimed.len() as u64);
        Ok(reply.claimed.into_iter().map(offer_of).collect())
    }

    /// Removes the consumers of dead processes, and keeps the stream from expiring.
    async fn sweep(&self) -> std::result::Result<(), Trouble> {
        {
            let mut upkeep = self.upkeep.lock();
            if upkeep.next_sweep > Instant::now() {
                return Ok(());
            }
            upkeep.next_sweep = Instant::now() + self.lease;
        }
        let mut expire = self.command("EXPIRE");
        expire.arg(KEPT_FOR.as_secs());
        let _: i64 = self.ask(ANSWER_TIMEOUT, expire).await?;
        let mut command = redis::cmd("XINFO");
        command.arg("CONSUMERS").arg(&self.key).arg(GROUP);
        let found: StreamInfoConsumersReply = self.ask(ANSWER_TIMEOUT, command).await?;
        let gone = (self.lease * LEASES_UNTIL_GONE).as_millis();
        for consumer in found.consumers {
            // One that lives and asks again is simply made anew.
            if consumer.name != self.consumer && consumer.pending == 0 && consumer.idle as u128 > gone {
                let mut remove = redis::cmd("XGROUP");
                remove.arg("DELCONSUMER").arg(&self.key).arg(GROUP).arg(&consumer.name);
                let _: i64 = self.ask(ANSWER_TIMEOUT, remove).await?;
                tracing::debug!(consumer = consumer.name, "removed the consumer of a server that is gone");
            }
        }
        Ok(())
    }

    /// Makes stream and group, all of whose entries are new to it.
    async fn make_group(&self) -> std::result::Result<(), Trouble> {
        let mut command = redis::cmd("XGROUP");
        command.arg("CREATE").arg(&self.key).arg(GROUP).arg("0").arg("MKSTREAM");
        match self.ask::<String>(ANSWER_TIMEOUT, command).await {
            // Another process was quicker.
            Err(Trouble::Refused(error)) if error.code() == Some("BUSYGROUP") => Ok(()),
            done => done.map(drop),
        }
    }

    /// Tells the log what Redis answers, now and then. That it is away, the connection tells.
    fn tell(&self, trouble: &Trouble) {
        let Trouble::Refused(error) = trouble else { return };
        let mut upkeep = self.upkeep.lock();
        if upkeep.told_at.is_none_or(|at| at.elapsed() > TELL_INTERVAL) {
            upkeep.told_at = Some(Instant::now());
            tracing::warn!(%error, key = self.key, "Redis does not carry the offers of tasks: they are looked for in the store");
        }
    }
}

#[async_trait]
impl Dispatch for StreamDispatch {
    async fn offer(&self, ids: &[String]) {
        let mut left = ids.len();
        for ids in ids.chunks(OFFERS_A_CALL) {
            let mut commands = Pipeline::with_capacity(ids.len());
            for id in ids {
                let mut add = self.command("XADD");
                add.arg("MAXLEN").arg("~").arg(MAX_OFFERS).arg("*").arg(FIELD).arg(id);
                commands.add_command(add).ignore();
            }
            if !self.send(commands).await {
                return self.metrics.lost.increment(left as u64);
            }
            left -= ids.len();
        }
    }

    async fn offers(&self, limit: usize, wait: Duration) -> Vec<Offer> {
        if limit == 0 {
            return Vec::new();
        }
        let deadline = Instant::now() + wait;
        let mut has_made_group = false;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let read = self.read(limit, left).await;
            self.metrics.up.set(if read.is_ok() { 1.0 } else { 0.0 });
            match read {
                Ok(offers) if !offers.is_empty() => return offers,
                Ok(_) => {}
                // Redis is new, was emptied, or has dropped the stream. What was added since is in the new group.
                Err(Trouble::Refused(error)) if is_no_group(&error) && !has_made_group => {
                    has_made_group = true;
                    if let Err(trouble) = self.make_group().await {
                        self.tell(&trouble);
                    }
                    continue;
                }
                Err(trouble) => {
                    self.tell(&trouble);
                    has_made_group = false;
                    sleep(AWAY_POLL.min(deadline.saturating_duration_since(Instant::now()))).await;
                }
            }
            if Instant::now() >= deadline {
                return Vec::new();
            }
        }
    }

    async fn settle(&self, offers: &[Offer]) {
        for offers in offers.chunks(OFFERS_A_CALL) {
            let tokens: Vec<&str> = offers.iter().map(|offer| offer.token.as_str()).collect();
            let mut acknowledge = self.command("XACK");
            acknowledge.arg(GROUP).arg(&tokens);
            let mut delete = self.command("XDEL");
            delete.arg(&tokens);
            let mut commands = Pipeline::with_capacity(2);
            commands.add_command(acknowledge).ignore().add_command(delete).ignore();
            // What is not settled is offered again, and then found to be done.
            if !self.send(commands).await {
                return;
            }
        }
    }

    fn patience(&self) -> Duration {
        if self.is_up() { PATIENCE } else { Duration::ZERO }
    }
}

/// Of an entry without our field the task has no name, which nobody finds: it is settled as gone.
fn offer_of(entry: StreamId) -> Offer {
    Offer { task_id: entry.get(FIELD).unwrap_or_default(), token: entry.id }
}

/// Whether the group is not there: NOGROUP, or UNBLOCKED where it went while a read was open.
fn is_no_group(error: &RedisError) -> bool {
    matches!(error.code(), Some("NOGROUP" | "UNBLOCKED"))
}
