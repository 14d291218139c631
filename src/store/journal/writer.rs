//! The one thread that writes: everything that waits is written and synced once, then every caller is told.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::oneshot;

use super::disk::{self, Disk};
use super::entry::{self, Header, SEGMENT_HEADER_LEN};
use super::index::{Located, Meta, Segment};
use super::recover::{self, Held};
use super::{Claim, Shared, charge};
use crate::{Error, Result};

/// Most bytes that are put together for one write: what is more is written, and synced, in several.
const MAX_WRITE_BYTES: usize = 16 << 20;

/// What the writer is asked to do, in order.
pub(super) enum Work {
    Append(Group),
    /// The store has all entries up to this number. The sender is answered when that is remembered durably.
    Acknowledge(u64, oneshot::Sender<Result<()>>),
    /// Keeps these bytes in a file of this name. Answered when they are durable.
    Keep(String, Vec<u8>, oneshot::Sender<Result<()>>),
}

/// Entries of one caller.
pub(super) struct Group {
    pub entries: VecDeque<Queued>,
    /// Dropped, and so ended, when the entries are in the index or have failed.
    pub claim: Option<Claim>,
    /// Dropped by the caller if it no longer cares.
    pub done: oneshot::Sender<Result<()>>,
}

/// An entry with its number, not yet written.
pub(super) struct Queued {
    pub header: Header,
    pub meta: Meta,
    pub body: Vec<u8>,
}

impl Queued {
    pub fn charge(&self) -> u64 {
        charge(self.header.entry_len())
    }
}

/// The segment that is written.
struct Active {
    segment: Arc<Segment>,
    /// Of its durable part. Whatever a failed write left behind it is written over or cut.
    len: u64,
}

pub(super) struct Writer {
    pub shared: Arc<Shared>,
    pub disk: Box<dyn Disk>,
    /// Oldest first; the last is the active one, if there is one.
    pub segments: VecDeque<Held>,
    active: Option<Active>,
}

/// Marks the journal closed when its thread ends, whatever ends it: nobody may wait for a writer that is gone.
struct Closing(Arc<Shared>);

impl Drop for Closing {
    fn drop(&mut self) {
        let unanswered = {
            let mut state = self.0.state.lock();
            state.is_closed = true;
            std::mem::take(&mut state.queue)
        };
        // Dropped senders tell their callers; dropped claims take the lock.
        drop(unanswered);
        self.0.commits.send_modify(|count| *count += 1);
    }
}

impl Writer {
    pub fn new(shared: Arc<Shared>, disk: Box<dyn Disk>, segments: VecDeque<Held>) -> Self {
        Self { shared, disk, segments, active: None }
    }

    /// Works until the journal is closed and nothing waits.
    pub fn run(mut self) {
        let _closing = Closing(self.shared.clone());
        loop {
            let work = {
                let mut state = self.shared.state.lock();
                while state.queue.is_empty() {
                    if state.is_closed {
                        return;
                    }
                    self.shared.work.wait(&mut state);
                }
                std::mem::take(&mut state.queue)
            };
            let mut groups = Vec::new();
            for work in work {
                match work {
                    Work::Append(group) => groups.push(group),
                    Work::Acknowledge(seq, done) => {
                        self.commit(std::mem::take(&mut groups));
                        // A caller that has gone has stopped replaying.
                        let _ = done.send(self.acknowledge(seq));
                    }
                    Work::Keep(name, bytes, done) => {
                        self.commit(std::mem::take(&mut groups));
                        let _ = done.send(self.keep(&name, &bytes));
                    }
                }
            }
            self.commit(groups);
        }
    }

    /// Writes and syncs entries of many callers, and tells each.
    fn commit(&mut self, mut groups: Vec<Group>) {
        if groups.is_empty() {
            return;
        }
        let num_entries: usize = groups.iter().map(|group| group.entries.len()).sum();
        let mut ends = 0;
        let ends: Vec<usize> = groups
            .iter()
            .map(|group| {
                ends += group.entries.len();
                ends
            })
            .collect();
        let mut waiting: VecDeque<Queued> = groups.iter_mut().flat_map(|group| group.entries.drain(..)).collect();
        let mut durable = Vec::with_capacity(num_entries);
        let mut failure = None;
        while !waiting.is_empty() && failure.is_none() {
            match self.write_run(&mut waiting) {
                Ok(run) => durable.extend(run),
                Err(e) => {
                    // No second try for the rest: they would wait for a disk that has just failed.
                    failure = Some(format!("the journal cannot be written: {e}"));
                }
            }
        }

        let num_durable = durable.len();
        {
            let mut state = self.shared.state.lock();
            for (located, meta) in durable {
                state.index.add(located, meta);
            }
            state.num_queued -= num_entries;
            state.charged -= waiting.iter().map(Queued::charge).sum::<u64>();
            if let Some(cause) = &failure {
                tracing::error!(cause, num_failed = waiting.len(), "records cannot be kept");
            }
            state.refusal = failure.clone();
        }
        groups.iter_mut().for_each(|group| group.claim = None);
        self.shared.metrics.appended.increment(num_durable as u64);
        self.shared.publish();
        for (group, end) in groups.into_iter().zip(ends) {
            let failed = failure.as_ref().filter(|_| end > num_durable);
            let outcome = failed.map_or(Ok(()), |cause| Err(Error::JournalFull { cause: cause.clone() }));
            // A caller that has gone is not told; what it wrote is there.
            let _ = group.done.send(outcome);
        }
    }

    /// Writes the entries at the front that fit into one segment and one write. On an error they all stay there, and the
    /// segment is left for good: a sync that fails may have dropped what it should have written, and the next one would not say so.
    fn write_run(&mut self, waiting: &mut VecDeque<Queued>) -> io::Result<Vec<(Located, Meta)>> {
        let Some(first) = waiting.front() else { return Ok(Vec::new()) };
        let is_full = |active: &Active| {
            active.len > SEGMENT_HEADER_LEN as u64
                && active.len + first.header.entry_len() > self.shared.options.segment_bytes
        };
        if self.active.as_ref().is_none_or(is_full) {
            self.active = None;
            let first_seq = first.header.seq;
            self.begin_segment(first_seq)?;
        }
        let (Some(active), Some(held)) = (&mut self.active, self.segments.back_mut()) else {
            return Err(io::Error::other("no segment is open"));
        };

        let mut bytes = Vec::new();
        let mut run: Vec<Queued> = Vec::new();
        while let Some(next) = waiting.front() {
            let len = bytes.len() + next.header.entry_len() as usize;
            let is_first = run.is_empty();
            if !is_first && (len > MAX_WRITE_BYTES || active.len + len as u64 > self.shared.options.segment_bytes) {
                break;
            }
            bytes.extend_from_slice(&next.header.encode());
            bytes.extend_from_slice(&next.body);
            run.extend(waiting.pop_front());
        }

        let begun = Instant::now();
        let written = active.segment.file.write_at(active.len, &bytes).and_then(|()| active.segment.file.sync());
        self.shared.metrics.fsync.record(begun.elapsed().as_secs_f64());
        if let Err(e) = written {
            self.leave_segment();
            run.into_iter().rev().for_each(|queued| waiting.push_front(queued));
            return Err(e);
        }
        let mut durable = Vec::with_capacity(run.len());
        for queued in run {
            let header = queued.header;
            held.last_seq = header.seq;
            held.charge += queued.charge();
            let located = Located {
                seq: header.seq,
                at_ms: header.at_ms,
                kind: header.kind,
                id: queued.meta.id,
                segment: active.segment.clone(),
                offset: active.len,
                body_len: header.body_len,
                is_keyless: false,
            };
            active.len += header.entry_len();
            durable.push((located, queued.meta));
        }
        Ok(durable)
    }

    fn begin_segment(&mut self, first_seq: u64) -> io::Result<()> {
        let name = recover::segment_name(first_seq);
        let file = self.disk.create(&name)?;
        let begun =
            file.write_at(0, &entry::segment_header()).and_then(|()| file.sync()).and_then(|()| self.disk.sync_names());
        if let Err(e) = begun {
            // It holds nothing. If it stays, the next start removes it.
            let _ = self.disk.remove(&name);
            return Err(e);
        }
        let charge = SEGMENT_HEADER_LEN as u64;
        self.shared.state.lock().charged += charge;
        let segment = Arc::new(Segment::new(name, file));
        self.segments.push_back(Held {
            segment: segment.clone(),
            first_seq,
            last_seq: first_seq.saturating_sub(1),
            charge,
        });
        self.active = Some(Active { segment, len: charge });
        Ok(())
    }

    /// Stops writing the active segment after a failure. What failed is cut off if that can be done; if not, it is
    /// replayed after a crash, which its caller, told of a failure, must reckon with anyway.
    fn leave_segment(&mut self) {
        let Some(active) = self.active.take() else { return };
        let _ = active.segment.file.truncate(active.len);
        if active.len == SEGMENT_HEADER_LEN as u64
            && let Some(held) = self.segments.pop_back()
        {
            let _ = self.disk.remove(&held.segment.name);
            self.shared.state.lock().charged -= held.charge;
        }
    }

    /// Forgets entries that the store has: first durably, then in the index.
    fn acknowledge(&mut self, seq: u64) -> Result<()> {
        let mut freed = 0;
        let mut kept = 0;
        // The oldest first and each durably, so that what a crash leaves is the end of the journal and never its beginning
        // alone: an old state replayed without what came after it would undo that.
        while let Some(held) = self.segments.front().filter(|held| held.last_seq <= seq) {
            if self.active.as_ref().is_some_and(|active| Arc::ptr_eq(&active.segment, &held.segment)) {
                self.active = None;
            }
            match recover::dispose(self.disk.as_ref(), &held.segment) {
                Ok(bytes) => kept += bytes,
                Err(e) => {
                    tracing::warn!(segment = held.segment.name, cause = %e, "a replayed segment cannot be removed");
                    break;
                }
            }
            freed += held.charge;
            self.segments.pop_front();
        }
        let is_begun = self.segments.front().is_some_and(|held| held.first_seq <= seq);
        let remembered = if is_begun { recover::write_position(self.disk.as_ref(), seq) } else { Ok(()) };
        let mut state = self.shared.state.lock();
        state.charged = state.charged + kept - freed;
        if freed > 0 {
            // There is room again, as far as is known.
            state.refusal = None;
        }
        let outcome = match remembered {
            Ok(()) => {
                let before = state.index.num_entries();
                state.index.remove_through(seq);
                self.shared.metrics.replayed.increment((before - state.index.num_entries()) as u64);
                Ok(())
            }
            Err(e) => Err(Error::JournalFull { cause: format!("the journal's position cannot be written: {e}") }),
        };
        drop(state);
        self.shared.publish();
        outcome
    }

    fn keep(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        disk::replace(self.disk.as_ref(), name, bytes)
            .map_err(|e| Error::JournalFull { cause: format!("{name} cannot be written: {e}") })?;
        self.shared.state.lock().charged += bytes.len() as u64;
        Ok(())
    }
}
