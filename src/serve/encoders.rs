//! The threads that tokenise, off the async threads and over all cores.
//!
//! Work comes in chunks, and whoever has more chunks goes to the end of the line after each: a list of ten
//! thousand texts does not keep one short text waiting, and is still spread over all threads. Background work has a line
//! of its own, from which a thread takes a chunk when the other is empty.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crossbeam::channel::{Receiver, Sender, select_biased, unbounded};
use parking_lot::Mutex;

use super::batch::panic_text;
use super::class::PerClass;
use crate::request::Priority;
use crate::{Error, Result};

/// Most items of one chunk, and most bytes unless one item is longer: about a millisecond of tokenising.
const CHUNK_ITEMS: usize = 32;
const CHUNK_BYTES: usize = 16 << 10;

/// Threads that take chunks of work in turn.
///
/// The line is bounded by its users: each holds [`super::room::Places`] for what it submits.
pub struct EncoderPool {
    /// The threads hold the other ends, and each job a copy of its own: they end when the pool and the last
    /// job are gone.
    lines: PerClass<Sender<Job>>,
    num_threads: usize,
}

struct Job {
    work: Arc<dyn Work>,
    line: Sender<Job>,
}

/// Something done chunk by chunk by several threads at once.
trait Work: Send + Sync {
    /// Does the next chunk. Returns whether chunks are left for a later turn.
    fn step(&self) -> bool;
    fn num_chunks(&self) -> usize;
}

impl EncoderPool {
    /// Starts the threads; at least one.
    ///
    /// Errors: `Internal` if the system gives no thread.
    pub fn new(num_threads: usize) -> Result<Self> {
        let ((interactive, first), (background, second)) = (unbounded(), unbounded());
        let lines = PerClass { interactive, background };
        let jobs = PerClass { interactive: first, background: second };
        let num_threads = num_threads.max(1);
        for i in 0..num_threads {
            let jobs: PerClass<Receiver<Job>> = jobs.clone();
            std::thread::Builder::new()
                .name(format!("encoder-{i}"))
                .spawn(move || run(&jobs))
                .map_err(|e| Error::Internal { cause: format!("no thread for an encoder: {e}") })?;
        }
        Ok(Self { lines, num_threads })
    }

    /// Maps every item with `f` and hands all results, in order, to `done`, on one of the pool's threads.
    ///
    /// `f` gets the item's index. The first error ends the work: chunks not begun are skipped. A panic of `f`
    /// is an `Internal` error. `len_bytes` weighs an item for the chunks.
    pub fn map<I, O, F, D>(&self, class: Priority, items: Vec<I>, len_bytes: impl Fn(&I) -> usize, f: F, done: D)
    where
        I: Send + Sync + 'static,
        O: Send + 'static,
        F: Fn(usize, &I) -> Result<O> + Send + Sync + 'static,
        D: FnOnce(Result<Vec<O>>) + Send + 'static,
    {
        let chunks = chunks_of(&items, len_bytes);
        let results = items.iter().map(|_| None).collect();
        let work = Arc::new(Map {
            next: AtomicUsize::new(0),
            num_left: AtomicUsize::new(chunks.len()),
            has_failed: AtomicBool::new(false),
            state: Mutex::new(MapState { results, error: None, done: Some(done) }),
            items,
            chunks,
            f,
        });
        for _ in 0..work.num_chunks().min(self.num_threads) {
            // Fails only if every thread is gone; then the work is dropped, and `done` with it.
            let line = &self.lines[class];
            let _ = line.send(Job { work: work.clone(), line: line.clone() });
        }
    }
}

/// The next job, background ones last; `None` once there will be no more.
fn next(jobs: &PerClass<Receiver<Job>>) -> Option<Job> {
    // A line whose last sender has gone answers at once: then all there is comes from the other.
    select_biased! {
        recv(jobs.interactive) -> job => job.or_else(|_| jobs.background.recv()).ok(),
        recv(jobs.background) -> job => job.or_else(|_| jobs.interactive.recv()).ok(),
    }
}

fn run(jobs: &PerClass<Receiver<Job>>) {
    while let Some(job) = next(jobs) {
        // Items' panics are caught inside; this is for `done`. The thread must live on: it is one of few.
        match catch_unwind(AssertUnwindSafe(|| job.work.step())) {
            Ok(true) => {
                let line = job.line.clone();
                let _ = line.send(job);
            }
            Ok(false) => {}
            Err(payload) => tracing::error!(cause = panic_text(&*payload), "an encoder's work panicked"),
        }
    }
}

struct Map<I, O, F, D> {
    items: Vec<I>,
    chunks: Vec<Range<usize>>,
    f: F,
    /// The chunk to begin next.
    next: AtomicUsize,
    /// Chunks not finished.
    num_left: AtomicUsize,
    has_failed: AtomicBool,
    /// Locked once a chunk.
    state: Mutex<MapState<O, D>>,
}

struct MapState<O, D> {
    results: Vec<Option<O>>,
    /// The failed item of lowest index seen.
    error: Option<(usize, Error)>,
    done: Option<D>,
}

impl<I, O, F, D> Work for Map<I, O, F, D>
where
    I: Send + Sync,
    O: Send,
    F: Fn(usize, &I) -> Result<O> + Send + Sync,
    D: FnOnce(Result<Vec<O>>) + Send,
{
    fn step(&self) -> bool {
        let Some(chunk) = self.chunks.get(self.next.fetch_add(1, Ordering::Relaxed)).cloned() else { return false };
        let mut results = Vec::with_capacity(chunk.len());
        for i in chunk.clone() {
            if self.has_failed.load(Ordering::Relaxed) {
                break;
            }
            let result = catch_unwind(AssertUnwindSafe(|| (self.f)(i, &self.items[i])))
                .unwrap_or_else(|payload| Err(Error::Internal { cause: panic_text(&*payload) }));
            match result {
                Ok(value) => results.push(value),
                Err(error) => {
                    self.has_failed.store(true, Ordering::Relaxed);
                    let mut state = self.state.lock();
                    if state.error.as_ref().is_none_or(|(first, _)| i < *first) {
                        state.error = Some((i, error));
                    }
                }
            }
        }
        let mut state = self.state.lock();
        for (slot, value) in state.results[chunk].iter_mut().zip(results) {
            *slot = Some(value);
        }
        // Under the lock, so that the last one to get here sees all results.
        if self.num_left.fetch_sub(1, Ordering::Relaxed) == 1 {
            let results = std::mem::take(&mut state.results);
            let result = match state.error.take() {
                Some((_, error)) => Err(error),
                None => Ok(results.into_iter().flatten().collect()),
            };
            let done = state.done.take();
            drop(state);
            if let Some(done) = done {
                done(result);
            }
        }
        self.next.load(Ordering::Relaxed) < self.chunks.len()
    }

    fn num_chunks(&self) -> usize {
        self.chunks.len()
    }
}

/// Ranges of items, at least one range: an empty list is done at once, by a thread of the pool like any other.
fn chunks_of<I>(items: &[I], len_bytes: impl Fn(&I) -> usize) -> Vec<Range<usize>> {
    let mut chunks = Vec::new();
    let (mut start, mut num_bytes) = (0, 0);
    for (i, item) in items.iter().enumerate() {
        let len = len_bytes(item);
        if i > start && (i - start == CHUNK_ITEMS || num_bytes + len > CHUNK_BYTES) {
            chunks.push(start..i);
            (start, num_bytes) = (i, 0);
        }
        num_bytes += len;
    }
    chunks.push(start..items.len());
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    const LONG: Duration = Duration::from_secs(20);

    fn run_map(items: Vec<u32>, f: impl Fn(usize, &u32) -> Result<u32> + Send + Sync + 'static) -> Result<Vec<u32>> {
        let pool = EncoderPool::new(3).unwrap();
        let (tx, rx) = mpsc::channel();
        pool.map(Priority::Interactive, items, |_| 1, f, move |result| tx.send(result).unwrap());
        rx.recv_timeout(LONG).unwrap()
    }

    #[test]
    fn maps_in_order_whatever_the_chunks() {
        for count in [0, 1, 31, 32, 33, 1000] {
            let items: Vec<u32> = (0..count).collect();
            assert_eq!(
                run_map(items.clone(), |i, &x| Ok(x + i as u32)).unwrap(),
                items.iter().map(|x| 2 * x).collect::<Vec<_>>()
            );
        }
    }

    #[test]
    fn an_error_or_a_panic_is_the_answer() {
        let bad = Error::Empty { field: "input[500]".into() };
        let told = bad.clone();
        let result = run_map((0..1000).collect(), move |i, &x| if i == 500 { Err(bad.clone()) } else { Ok(x) });
        assert_eq!(result.unwrap_err(), told);
        let result = run_map((0..100).collect(), |i, &x| if i == 50 { panic!("a bug") } else { Ok(x) });
        assert_eq!(result.unwrap_err(), Error::Internal { cause: "panic: a bug".into() });
    }

    #[test]
    fn a_short_list_does_not_wait_for_a_long_one() {
        let pool = EncoderPool::new(1).unwrap();
        let (tx, rx) = mpsc::channel();
        let (hold, held) = mpsc::channel::<()>();
        let held = Mutex::new(held);
        let long = tx.clone();
        // Every item of the long list waits for a word, so that the short list is in line before it is done.
        let wait = move |i: usize, _: &u32| {
            if i == 0 { held.lock().recv_timeout(LONG).map_err(|_| Error::Draining) } else { Ok(()) }
        };
        pool.map(
            Priority::Interactive,
            (0..10_000).collect(),
            |_| 1,
            wait,
            move |r| long.send(("long", r.is_ok())).unwrap(),
        );
        pool.map(
            Priority::Interactive,
            vec![1u32],
            |_| 1,
            |_, _| Ok(()),
            move |r| tx.send(("short", r.is_ok())).unwrap(),
        );
        hold.send(()).unwrap();
        assert_eq!(rx.recv_timeout(LONG).unwrap(), ("short", true));
        assert_eq!(rx.recv_timeout(LONG).unwrap(), ("long", true));
    }

    #[test]
    fn background_work_waits_until_nothing_else_does() {
        let pool = EncoderPool::new(1).unwrap();
        let (tx, rx) = mpsc::channel();
        let (hold, held) = mpsc::channel::<()>();
        let held = Mutex::new(held);
        let wait = move |_: usize, _: &u32| held.lock().recv_timeout(LONG).map_err(|_| Error::Draining);
        pool.map(Priority::Interactive, vec![1], |_| 1, wait, |r| r.map(drop).unwrap());
        let ask = |class, name, num_items| {
            let tx = tx.clone();
            pool.map(class, vec![0; num_items], |_| 1, |_, _| Ok(()), move |_| tx.send(name).unwrap());
        };
        // The one thread is busy while these get into line.
        for name in ["b1", "b2", "b3"] {
            ask(Priority::Background, name, 1);
        }
        ask(Priority::Interactive, "i1", 20 * CHUNK_ITEMS);
        ask(Priority::Interactive, "i2", 1);
        drop(pool);
        hold.send(()).unwrap();
        let order: Vec<&str> = (0..5).map(|_| rx.recv_timeout(LONG).unwrap()).collect();
        assert_eq!(order, ["i2", "i1", "b1", "b2", "b3"], "and all of it is done though the pool has gone");
    }

    #[test]
    fn chunks_are_bounded_by_items_and_bytes() {
        let sizes = chunks_of(&[1usize; 70], |&n| n);
        assert_eq!(sizes, [0..32, 32..64, 64..70]);
        let sizes = chunks_of(&[9000usize, 9000, 90_000, 1, 1], |&n| n);
        assert_eq!(sizes, [0..1, 1..2, 2..3, 3..5]);
        assert_eq!(chunks_of(&[] as &[usize], |&n| n).len(), 1);
    }
}
