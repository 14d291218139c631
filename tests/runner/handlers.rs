//! A handler that does what a test says, and keeps account of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use eremois::Result;
use eremois::jobs::runner::{Handler, Outcome};
use eremois::store::work::Task;
use parking_lot::Mutex;
use serde_json::Value;

/// What a run does.
pub enum Act {
    Done,
    After(Duration),
    Ends(Result<Outcome>),
    EndsAfter(Duration, Result<Outcome>),
    Panics,
    Never,
}

/// Does what it is told of each task.
pub struct Watched {
    act: Box<dyn Fn(&Task) -> Act + Send + Sync>,
    seen: Mutex<Seen>,
    panics_when_cancelled: AtomicBool,
}

#[derive(Default)]
struct Seen {
    /// When each task's runs began, its attempts then, and its payload.
    runs: BTreeMap<String, Vec<(Instant, u32, Value)>>,
    running: Vec<String>,
    most_at_once: usize,
    num_dropped: usize,
    num_overlaps: usize,
    cancelled: Vec<String>,
}

/// A run, which may be dropped before its end.
struct Run<'a> {
    of: &'a Watched,
    id: String,
    has_ended: bool,
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        let mut seen = self.of.seen.lock();
        let place = seen.running.iter().position(|id| *id == self.id);
        place.map(|place| seen.running.swap_remove(place));
        if !self.has_ended && !std::thread::panicking() {
            seen.num_dropped += 1;
        }
    }
}

impl Watched {
    pub fn new(act: impl Fn(&Task) -> Act + Send + Sync + 'static) -> Arc<Self> {
        let act = Box::new(act);
        Arc::new(Self { act, seen: Mutex::default(), panics_when_cancelled: AtomicBool::new(false) })
    }

    pub fn panic_when_cancelled(&self) {
        self.panics_when_cancelled.store(true, Ordering::Relaxed);
    }

    pub fn num_runs(&self) -> usize {
        self.seen.lock().runs.values().map(Vec::len).sum()
    }

    /// When each task was run.
    pub fn runs(&self) -> BTreeMap<String, Vec<Instant>> {
        let seen = self.seen.lock();
        seen.runs.iter().map(|(id, runs)| (id.clone(), runs.iter().map(|(at, ..)| *at).collect())).collect()
    }

    pub fn attempts_of(&self, id: &str) -> Vec<u32> {
        self.seen.lock().runs[id].iter().map(|(_, attempts, _)| *attempts).collect()
    }

    pub fn payload_of(&self, id: &str) -> Value {
        self.seen.lock().runs[id][0].2.clone()
    }

    pub fn num_at_once(&self) -> usize {
        self.seen.lock().running.len()
    }

    pub fn most_at_once(&self) -> usize {
        self.seen.lock().most_at_once
    }

    /// Runs that were dropped before they ended.
    pub fn num_dropped(&self) -> usize {
        self.seen.lock().num_dropped
    }

    /// Runs that began while another one of the same task went on.
    pub fn num_overlaps(&self) -> usize {
        self.seen.lock().num_overlaps
    }

    pub fn cancelled(&self) -> Vec<String> {
        self.seen.lock().cancelled.clone()
    }

    fn begin(&self, task: &Task) -> Run<'_> {
        let mut seen = self.seen.lock();
        if seen.running.contains(&task.id) {
            seen.num_overlaps += 1;
        }
        seen.running.push(task.id.clone());
        seen.most_at_once = seen.most_at_once.max(seen.running.len());
        let run = (Instant::now(), task.attempts, task.payload.clone());
        seen.runs.entry(task.id.clone()).or_default().push(run);
        Run { of: self, id: task.id.clone(), has_ended: false }
    }
}

#[async_trait]
impl Handler for Watched {
    async fn run(&self, task: &Task) -> Result<Outcome> {
        let mut run = self.begin(task);
        let (delay, outcome) = match (self.act)(task) {
            Act::Done => (Duration::ZERO, Ok(Outcome::Done)),
            Act::After(delay) => (delay, Ok(Outcome::Done)),
            Act::Ends(outcome) => (Duration::ZERO, outcome),
            Act::EndsAfter(delay, outcome) => (delay, outcome),
            Act::Panics => panic!("a handler of a test"),
            Act::Never => std::future::pending().await,
        };
        tokio::time::sleep(delay).await;
        run.has_ended = true;
        outcome
    }

    async fn cancelled(&self, task: &Task) {
        self.seen.lock().cancelled.push(task.id.clone());
        assert!(!self.panics_when_cancelled.load(Ordering::Relaxed), "a clean-up of a test");
    }
}
