//! One step of load on one target: a closed loop, or an open one on a schedule.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::{mpsc, oneshot};

use super::answer::Verifier;
use super::client::{Client, Connector};
use super::record::{Failure, Outcome, Record, Sample};
use super::target::Target;

/// How requests follow one another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// So many at once; each answer is followed by the next request. Finds the peak.
    Closed { concurrency: usize },
    /// Poisson arrivals at so many a second, whether or not answers come. Shows what users would see.
    Open { rate: f64 },
}

/// How long a step lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    Requests(usize),
    /// Requests sent before this are waited for; they count for latency, not for the rate.
    Elapsed(Duration),
}

/// One request made before the clock starts.
#[derive(Debug, Clone)]
pub struct Prepared {
    pub body: Bytes,
    /// Indexes of the texts it asks for, for the check of equal texts.
    pub texts: Vec<usize>,
}

/// A target with all its requests; they are sent in order, again from the start when through.
pub struct Driven {
    pub target: Target,
    pub requests: Vec<Prepared>,
    /// `None`: answers are counted, not read.
    pub verifier: Option<Verifier>,
}

/// What holds for all steps.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Of one request, from its send.
    pub timeout: Duration,
    /// Open loop: most connections at once; arrivals beyond wait here and their wait counts.
    pub max_in_flight: usize,
    /// Seed of the arrival times.
    pub seed: u64,
}

/// Counts for whoever draws a progress bar, over all steps.
#[derive(Debug, Default)]
pub struct Live {
    pub num_done: AtomicU64,
    pub num_bad: AtomicU64,
    pub num_in_flight: AtomicU64,
}

/// Shared by the tasks of one step.
struct Step {
    driven: Arc<Driven>,
    connector: Connector,
    limits: Limits,
    live: Arc<Live>,
    start: Instant,
    window: Option<Duration>,
    next: AtomicUsize,
    in_flight: AtomicU64,
    /// A mutex rather than one record a task: it is free nearly always, and thousands of histograms are not.
    record: Mutex<Record>,
}

impl Step {
    fn client(&self) -> Client {
        Client::new(self.connector.clone(), self.limits.timeout, self.driven.verifier.is_some())
    }

    /// Sends request `index` and counts what became of it. `intended` is when it should have gone.
    ///
    /// Returns whether the target could be reached at all.
    async fn one(&self, client: &mut Client, index: usize, intended: Instant) -> bool {
        let prepared = &self.driven.requests[index % self.driven.requests.len()];
        self.live.num_in_flight.fetch_add(1, Ordering::Relaxed);
        let in_flight = self.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        let sent = Instant::now();
        let answer = client.post(&self.driven.target, prepared.body.clone()).await;
        let end = Instant::now();
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.live.num_in_flight.fetch_sub(1, Ordering::Relaxed);
        let reached = !matches!(answer, Err(Failure::Connect));
        let outcome = match answer {
            Err(failure) => Outcome::Failed(failure),
            Ok(answer) => {
                let check = |v: &Verifier| v.check(self.driven.target.api, &prepared.texts, &answer.body).err();
                let checked = (200..300).contains(&answer.status).then_some(self.driven.verifier.as_ref()).flatten();
                Outcome::Answered {
                    status: answer.status,
                    num_tokens: answer.num_tokens,
                    num_bytes: answer.num_bytes,
                    wrong: checked.and_then(check),
                }
            }
        };
        let in_window = self.window.is_none_or(|window| end <= self.start + window);
        let num_inputs = prepared.texts.len() as u64;
        let (latency, behind) = (end - intended, sent - intended);
        self.count(Sample { latency, behind, in_window, num_inputs, outcome }, in_flight);
        reached
    }

    fn count(&self, sample: Sample, in_flight: u64) {
        self.live.num_done.fetch_add(1, Ordering::Relaxed);
        self.live.num_bad.fetch_add(u64::from(!sample.outcome.is_good()), Ordering::Relaxed);
        let mut record = self.record.lock();
        record.max_in_flight = record.max_in_flight.max(in_flight);
        record.add(sample);
    }
}

/// Runs one step and counts it.
///
/// Blocks: asynchronously, for the step and then for the answers still out, at most the timeout longer.
pub async fn run_step(driven: Arc<Driven>, pace: Pace, until: Until, limits: Limits, live: Arc<Live>) -> Record {
    let window = match until {
        Until::Requests(_) => None,
        Until::Elapsed(window) => Some(window),
    };
    let mut step = Step {
        driven,
        connector: Connector::new(),
        limits,
        live,
        start: Instant::now(),
        window,
        next: AtomicUsize::new(0),
        in_flight: AtomicU64::new(0),
        record: Mutex::new(Record::default()),
    };
    let step = match pace {
        Pace::Closed { concurrency } => {
            let clients = connect_all(&step, concurrency).await;
            step.start = Instant::now();
            closed(step, clients, until).await
        }
        Pace::Open { rate } => open(step, rate, until).await,
    };
    let mut record = std::mem::take(&mut *step.record.lock());
    record.window = window.unwrap_or(step.start.elapsed());
    record
}

/// Connections before the clock starts: the first requests should not pay for all handshakes at once. One that
/// cannot be had is tried again, and then counted, by its first request.
async fn connect_all(step: &Step, concurrency: usize) -> Vec<Client> {
    let mut clients = Vec::with_capacity(concurrency);
    for _ in 0..concurrency {
        let mut client = step.client();
        let connected = client.connect(&step.driven.target.uri).await;
        clients.push(client);
        if connected.is_err() {
            break;
        }
    }
    clients.resize_with(concurrency, || step.client());
    clients
}

async fn closed(step: Step, clients: Vec<Client>, until: Until) -> Arc<Step> {
    let step = Arc::new(step);
    let mut tasks = tokio::task::JoinSet::new();
    for mut client in clients {
        let step = step.clone();
        tasks.spawn(async move {
            loop {
                let index = step.next.fetch_add(1, Ordering::Relaxed);
                let over = match until {
                    Until::Requests(n) => index >= n,
                    Until::Elapsed(window) => step.start.elapsed() >= window,
                };
                if over {
                    return;
                }
                if !step.one(&mut client, index, Instant::now()).await {
                    // Nobody listens: without a pause this would be a busy loop of refused connections.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        });
    }
    while tasks.join_next().await.is_some() {}
    step
}

/// A request and the time it should go.
type Arrival = (usize, Instant);

/// Connections of an open loop: the ones at rest, and what waits when all are busy and no more are allowed.
#[derive(Default)]
struct Pool {
    /// The last to rest is the first to go: few connections stay warm, as in a real client's pool.
    resting: Vec<oneshot::Sender<Arrival>>,
    waiting: VecDeque<Arrival>,
    num_clients: usize,
}

async fn open(mut step: Step, rate: f64, until: Until) -> Arc<Step> {
    let (arrivals, mut due) = mpsc::unbounded_channel();
    let stop = Arc::new(AtomicBool::new(false));
    step.start = Instant::now();
    let clock = spawn_clock(rate, until, step.start, step.limits.seed, arrivals, stop.clone());
    let max_clients = step.limits.max_in_flight.max(1);
    let step = Arc::new(step);
    let pool = Arc::new(Mutex::new(Pool::default()));
    let mut tasks = tokio::task::JoinSet::new();
    let timeout = step.limits.timeout;
    while let Some(arrival) = due.recv().await {
        let mut locked = pool.lock();
        if let Some(resting) = locked.resting.pop() {
            // A worker at rest waits for nothing else, so that it is there to take it.
            let _ = resting.send(arrival);
        } else if locked.num_clients < max_clients {
            locked.num_clients += 1;
            tasks.spawn(worker(step.clone(), pool.clone(), arrival));
        } else {
            locked.waiting.push_back(arrival);
        }
    }
    stop.store(true, Ordering::Relaxed);
    drop(clock); // it has ended: its end of the channel is gone
    let unsent = drain(&pool, until, timeout).await;
    for (_, intended) in unsent {
        let behind = intended.elapsed();
        let outcome = Outcome::Failed(Failure::Unsent);
        step.count(Sample { latency: behind, behind, in_window: false, num_inputs: 0, outcome }, 0);
    }
    while tasks.join_next().await.is_some() {}
    step
}

/// Ends the sending: what still waits is taken back at once when the time is up, and after one timeout when a number
/// of requests was asked for. Workers at rest are sent home.
async fn drain(pool: &Mutex<Pool>, until: Until, timeout: Duration) -> VecDeque<Arrival> {
    if let Until::Requests(_) = until {
        let deadline = Instant::now() + timeout;
        while !pool.lock().waiting.is_empty() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let mut pool = pool.lock();
    pool.resting.clear();
    // From now on a worker that ends its request finds no room to rest and goes home.
    pool.num_clients = usize::MAX;
    std::mem::take(&mut pool.waiting)
}

async fn worker(step: Arc<Step>, pool: Arc<Mutex<Pool>>, first: Arrival) {
    let mut client = step.client();
    let mut arrival = first;
    loop {
        let (index, intended) = arrival;
        step.one(&mut client, index, intended).await;
        let next = {
            let mut pool = pool.lock();
            match pool.waiting.pop_front() {
                Some(waiting) => Ok(waiting),
                None if pool.num_clients == usize::MAX => return,
                None => {
                    let (wake, woken) = oneshot::channel();
                    pool.resting.push(wake);
                    Err(woken)
                }
            }
        };
        arrival = match next {
            Ok(arrival) => arrival,
            Err(woken) => match woken.await {
                Ok(arrival) => arrival,
                Err(_) => return, // the step is over
            },
        };
    }
}

/// A thread that calls out arrivals at their time: the runtime's timers are a millisecond coarse, a thread's sleep
/// is good to tens of microseconds.
fn spawn_clock(
    rate: f64,
    until: Until,
    start: Instant,
    seed: u64,
    arrivals: mpsc::UnboundedSender<Arrival>,
    stop: Arc<AtomicBool>,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut at = Duration::ZERO;
        for index in 0.. {
            at += gap(rate, &mut rng);
            let over = match until {
                Until::Requests(n) => index >= n,
                Until::Elapsed(window) => at >= window,
            };
            if over {
                break;
            }
            let intended = start + at;
            let wait = intended.saturating_duration_since(Instant::now());
            if !wait.is_zero() {
                std::thread::sleep(wait);
            }
            if stop.load(Ordering::Relaxed) || arrivals.send((index, intended)).is_err() {
                return;
            }
        }
        // The window is the time asked for, also when the last arrival of the draw comes well before its end.
        if let Until::Elapsed(window) = until {
            std::thread::sleep((start + window).saturating_duration_since(Instant::now()));
        }
    })
}

/// Time to the next arrival of a Poisson process, by inversion of the exponential distribution.
fn gap(rate: f64, rng: &mut StdRng) -> Duration {
    let uniform: f64 = rng.random(); // in [0, 1): 1 - u is never 0
    Duration::from_secs_f64(-(1.0 - uniform).ln() / rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_exponential() {
        let mut rng = StdRng::seed_from_u64(1);
        let gaps: Vec<f64> = (0..20_000).map(|_| gap(100.0, &mut rng).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        assert!((0.0097..0.0103).contains(&mean), "mean {mean}");
        // An exponential's standard deviation is its mean, and 1 - 1/e of it lies below the mean.
        let below = gaps.iter().filter(|&&g| g < 0.01).count() as f64 / gaps.len() as f64;
        assert!((0.62..0.645).contains(&below), "{below} below the mean");
    }
}
