//! Many callers' small writes in one command.
//!
//! A write that a majority must acknowledge costs a round trip between members and an fsync, whatever it holds. So one
//! command is on its way at a time, and what comes meanwhile goes with the next: nobody waits for company, and the more
//! wait the larger a command is.

use std::collections::HashSet;

use mongodb::Database;
use tokio::sync::{mpsc, oneshot};

use super::upsert::{Room, Upsert, write};
use crate::{Error, Result};

/// Calls that may wait. More wait at the door, and all of them no longer than their deadlines.
const MAX_WAITING: usize = 256;

/// Largest call that goes with others, in bytes: a larger one would have all of them wait for its transfer.
const MAX_SMALL_BYTES: usize = 256 << 10;

/// Most records of such a call.
const MAX_SMALL: usize = 100;

/// Largest command of several calls, in bytes, for the same reason.
const MAX_SHARED_BYTES: usize = 4 << 20;

/// The handle callers have. The task ends when the last one is dropped.
#[derive(Clone)]
pub(super) struct Coalescer {
    jobs: mpsc::Sender<Job>,
}

/// One call: its upserts, and who waits for them.
struct Job {
    upserts: Vec<Upsert>,
    /// The caller holds the other end; where it has gone, nothing needs to be written any more.
    reply: oneshot::Sender<Result<()>>,
}

impl Coalescer {
    /// Starts the task that writes.
    pub(super) fn start(database: Database) -> Self {
        let (jobs, waiting) = mpsc::channel(MAX_WAITING);
        tokio::spawn(run(database, waiting));
        Self { jobs }
    }

    /// Whether these may go with others: few, and no record twice.
    pub(super) fn takes(upserts: &[Upsert]) -> bool {
        let num_bytes: usize = upserts.iter().map(Upsert::num_bytes).sum();
        let ids: HashSet<_> = upserts.iter().map(|upsert| upsert.id.bytes()).collect();
        num_bytes <= MAX_SMALL_BYTES && upserts.len() <= MAX_SMALL && ids.len() == upserts.len()
    }

    /// Writes them; returns when a majority has them on disk.
    pub(super) async fn put(&self, upserts: Vec<Upsert>) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        let gone = || Error::Internal { cause: "the writer of the MongoDB store has ended".into() };
        self.jobs.send(Job { upserts, reply }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

async fn run(database: Database, mut waiting: mpsc::Receiver<Job>) {
    let mut left_over = None;
    loop {
        let first = match left_over.take() {
            Some(job) => job,
            None => match waiting.recv().await {
                Some(job) => job,
                None => return,
            },
        };
        let mut room = Room::new(MAX_SHARED_BYTES);
        room.take(&first.upserts);
        let mut jobs = vec![first];
        while let Ok(job) = waiting.try_recv() {
            if !room.fits(&job.upserts) {
                left_over = Some(job);
                break;
            }
            room.take(&job.upserts);
            jobs.push(job);
        }
        jobs.retain(|job| !job.reply.is_closed());
        send(&database, jobs).await;
    }
}

async fn send(database: &Database, mut jobs: Vec<Job>) {
    let lens: Vec<usize> = jobs.iter().map(|job| job.upserts.len()).collect();
    let upserts: Vec<Upsert> = jobs.iter_mut().flat_map(|job| std::mem::take(&mut job.upserts)).collect();
    if upserts.is_empty() {
        return;
    }
    let mut results = write(database, upserts).await.into_iter();
    for (job, len) in jobs.into_iter().zip(lens) {
        // Taken whole before the first error ends the look at them: the rest are the next caller's.
        let own: Vec<Result<()>> = results.by_ref().take(len).collect();
        // Nobody waits for it any more, which is theirs to decide.
        let _ = job.reply.send(own.into_iter().collect());
    }
}
