//! The devices of one model, each with its worker and the way to it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use crossbeam::channel::Sender;
use parking_lot::Mutex;

use super::Settings;
use super::cost::CostModel;
use super::dispatch::{self, Load};
use super::health::{Health, Standing, Vitals};
use super::metrics::{DeviceMetrics, ModelMetrics};
use super::policy::BatchLimits;
use super::queue::{self, Gate, Message, Push};
use super::room::Room;
use super::shared::{Readiness, Shared, Traffic};
use super::ticket::Client;
use super::worker::Worker;
use crate::model::{Backend, ModelInfo, Placed};
use crate::{Error, Result};

/// All devices of a model. The workers end when this is dropped.
pub struct Lanes {
    /// Not empty.
    lanes: Vec<Lane>,
    /// The same as in each lane's `Shared`, as is `readiness`.
    limits: Arc<ArcSwap<BatchLimits>>,
    readiness: Arc<Readiness>,
    /// Requests dispatched. Locked while one is, for less than a microsecond, so that two at once do not both see the
    /// same device idle. With one device never.
    turn: Mutex<usize>,
}

struct Lane {
    shared: Arc<Shared>,
    /// Asked about limits only; the worker computes on it.
    backend: Arc<dyn Backend>,
    /// The worker holds the other end; it ends when this is dropped.
    inbox: Sender<Message>,
}

impl Lanes {
    /// Starts a worker a device, each of which warms its device up and then takes requests.
    ///
    /// Errors: `Internal` if there is no device or the system gives no thread.
    pub fn start(
        info: &Arc<ModelInfo>,
        backends: Vec<Placed>,
        limits: &Arc<ArcSwap<BatchLimits>>,
        settings: &Settings,
        gate: &Arc<Gate>,
        room: &Arc<Room>,
        metrics: &ModelMetrics,
    ) -> Result<Arc<Self>> {
        let of_devices: Vec<_> = backends.iter().map(|p| DeviceMetrics::new(&info.name, &p.device)).collect();
        let gauges = of_devices.iter().map(|metrics| metrics.device_ready.clone()).collect();
        let readiness = Arc::new(Readiness::new(metrics.ready.clone(), gauges));
        let (mut lanes, mut inboxes) = (Vec::new(), Vec::new());
        for (device_idx, (Placed { device, backend }, metrics)) in backends.into_iter().zip(of_devices).enumerate() {
            let shared = Arc::new(Shared {
                info: info.clone(),
                limits: limits.clone(),
                settings: settings.clone(),
                gate: gate.clone(),
                room: room.clone(),
                cost: CostModel::default(),
                vitals: Vitals::new(settings.device_timeout),
                traffic: Traffic::default(),
                metrics,
                readiness: readiness.clone(),
                device,
                device_idx,
                is_warm: false.into(),
            });
            let (inbox, messages) = queue::channel();
            lanes.push(Lane { shared, backend, inbox });
            inboxes.push(messages);
        }
        if lanes.is_empty() {
            return Err(Error::Internal { cause: format!("model `{}` is on no device", info.name) });
        }
        let lanes = Arc::new(Self { lanes, limits: limits.clone(), readiness, turn: Mutex::new(0) });
        for (Lane { shared, backend, .. }, messages) in lanes.lanes.iter().zip(inboxes) {
            let peers = Peers { lanes: Arc::downgrade(&lanes), own_idx: shared.device_idx };
            let worker = Worker::new(shared.clone(), backend.clone(), messages, peers);
            std::thread::Builder::new()
                .name(format!("worker-{}-{}", shared.device, info.name))
                .spawn(move || worker.run())
                .map_err(|e| Error::Internal { cause: format!("no thread for a worker: {e}") })?;
        }
        Ok(lanes)
    }

    /// From here on the model's gauges show these devices.
    pub fn publish(&self) {
        for Lane { shared, .. } in &self.lanes {
            shared.metrics.device_lost.set(if shared.vitals.is_lost() { 1.0 } else { 0.0 });
        }
        self.readiness.publish();
    }

    /// See [`Readiness::hide`].
    pub fn hide(&self, to_zero: bool) {
        self.readiness.hide(to_zero);
    }

    /// Sends a request to the device, or the devices, that will finish it first. If its worker has ended the request
    /// is dropped, and with its tickets the client learns of it.
    pub fn push(&self, push: Push) {
        match &self.lanes[..] {
            [only] => only.send(push),
            _ => drop(self.dispatch(push, None)),
        }
    }

    /// Makes the workers look at what changed.
    pub fn wake(&self) {
        for lane in &self.lanes {
            // Fails only if the worker has ended, and then there is nothing to see.
            let _ = lane.inbox.send(Message::Wake);
        }
    }

    /// Whether a request may be let in now: some device takes it, or will in a moment; else what to tell it.
    pub fn admits(&self, now: Instant) -> Result<(), Health> {
        match self.lanes.iter().any(|lane| lane.shared.vitals.standing(now) != Standing::Down) {
            true => Ok(()),
            false => Err(Health::of_model(&self.health(now))),
        }
    }

    /// Refuses limits that a device has no memory for. One that is lost is not asked.
    ///
    /// Errors: the first device's, with its name if there are several.
    pub fn check_limits(&self, limits: &BatchLimits) -> Result<()> {
        for Lane { shared, backend, .. } in self.lanes.iter().filter(|lane| !lane.shared.vitals.is_lost()) {
            let checked = backend.check_limits(limits.max_batch_tokens, limits.max_batch_size);
            checked.map_err(|error| match error {
                Error::Invalid { field, reason } if self.lanes.len() > 1 => {
                    Error::Invalid { field, reason: format!("{}: {reason}", shared.device) }
                }
                error => error,
            })?;
        }
        Ok(())
    }

    /// Gives up the devices that hang for good. Somebody has to ask now and then: their workers cannot.
    pub fn give_up_hung(&self, now: Instant) {
        for Lane { shared, .. } in &self.lanes {
            if let Some(reason) = shared.vitals.hung_for_good(now) {
                shared.lose(&reason);
            }
        }
    }

    /// Why a row of this request will never come, if the worker it waits for hangs in a device that was given up.
    pub fn abandoned(&self, client: &Client, now: Instant) -> Option<String> {
        self.lanes.iter().find_map(|Lane { shared, .. }| {
            let reason = shared.vitals.abandoned(now)?;
            (self.lanes.len() == 1 || client.waits_for(shared.device_idx)).then_some(reason)
        })
    }

    /// Each device's name and health.
    pub fn health(&self, now: Instant) -> Vec<(String, Health)> {
        let of = |lane: &Lane| (lane.shared.device.clone(), lane.shared.vitals.health(now));
        self.lanes.iter().map(of).collect()
    }

    /// Batches that all devices have computed.
    pub fn num_batches(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.shared.metrics.num_batches.load(Ordering::Relaxed)).sum()
    }

    /// Time until so many waiting entries of the usual length are computed, by all devices that are ready.
    pub fn backlog(&self, num_entries: usize, limits: &BatchLimits, now: Instant) -> Duration {
        match &self.lanes[..] {
            [only] => only.shared.cost.backlog(num_entries, limits),
            lanes => {
                let ready = lanes.iter().filter(|lane| lane.shared.vitals.standing(now) == Standing::Ready);
                CostModel::shared_backlog(ready.map(|lane| &lane.shared.cost), num_entries, limits)
            }
        }
    }

    /// Sends a request where the dispatch says. With `from`, only to devices that are ready and not that one; if
    /// there is none the request comes back.
    fn dispatch(&self, push: Push, from: Option<usize>) -> Result<(), Push> {
        let (limits, now, class) = (self.limits.load(), Instant::now(), push.client.priority);
        let chunks = dispatch::chunks(push.tickets.iter().map(|t| t.num_tokens()), &limits);
        let mut turn = self.turn.lock();
        let mut devices: Vec<_> = self.lanes.iter().map(|lane| lane.shared.candidate(class, now, &limits)).collect();
        if let Some(from) = from {
            devices[from].standing = Standing::Down;
            if devices.iter().all(|d| d.standing != Standing::Ready) {
                return Err(push);
            }
        }
        let targets = dispatch::dispatch(&chunks, &mut devices, &limits, *turn);
        *turn = turn.wrapping_add(1);
        for (&target, &chunk) in targets.iter().zip(&chunks) {
            self.lanes[target].shared.traffic.send(class, chunk);
        }
        drop(turn);
        if let Some((&first, rest)) = targets.split_first()
            && rest.iter().all(|&target| target == first)
        {
            push.client.sent(&push.tickets, first);
            self.lanes[first].send(push);
        } else {
            self.send_split(push, &chunks, &targets);
        }
        Ok(())
    }

    /// Sends each device its chunks as one request: there they take one turn.
    fn send_split(&self, push: Push, chunks: &[Load], targets: &[usize]) {
        let Push { client, tickets, mut places } = push;
        let mut parts: Vec<Vec<_>> = self.lanes.iter().map(|_| Vec::new()).collect();
        let mut tickets = tickets.into_iter();
        for (chunk, &target) in chunks.iter().zip(targets) {
            parts[target].extend(tickets.by_ref().take(chunk.num_entries));
        }
        for (lane, tickets) in self.lanes.iter().zip(parts).filter(|(_, tickets)| !tickets.is_empty()) {
            let places = places.split(tickets.len());
            client.sent(&tickets, lane.shared.device_idx);
            lane.send(Push { client: client.clone(), tickets, places });
        }
    }
}

impl Lane {
    fn send(&self, push: Push) {
        // See `Lanes::push` for what an error is.
        let _ = self.inbox.send(Message::Push(push));
    }
}

/// The other devices of a model, seen from one worker.
pub struct Peers {
    /// Weak: the workers must end when nobody can ask any more.
    lanes: Weak<Lanes>,
    own_idx: usize,
}

impl Peers {
    /// Sends a request to the devices that are ready; gives it back if there is none.
    pub fn push(&self, push: Push) -> Result<(), Push> {
        match self.lanes.upgrade() {
            Some(lanes) => lanes.dispatch(push, Some(self.own_idx)),
            None => Err(push),
        }
    }
}
