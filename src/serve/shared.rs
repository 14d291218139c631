//! What a device's worker shares with the handlers, and with the other workers of its model.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use ::metrics::Gauge;
use arc_swap::ArcSwap;
use parking_lot::Mutex;

use super::Settings;
use super::class::PerClass;
use super::cost::CostModel;
use super::dispatch::{Candidate, Load};
use super::health::{Health, Vitals};
use super::metrics::DeviceMetrics;
use super::policy::BatchLimits;
use super::queue::Gate;
use super::room::Room;
use crate::Result;
use crate::model::ModelInfo;
use crate::request::Priority;

/// One device of a model, as its handlers, encoders and worker all see it.
pub struct Shared {
    /// The model's, as are limits, settings, gate and room: the same for all of its devices.
    pub info: Arc<ModelInfo>,
    pub limits: Arc<ArcSwap<BatchLimits>>,
    pub settings: Settings,
    pub gate: Arc<Gate>,
    /// Bounds the entries being tokenised or waiting for any of the devices.
    pub room: Arc<Room>,
    /// "cpu", "cuda:0".
    pub device: String,
    pub cost: CostModel,
    pub vitals: Vitals,
    pub traffic: Traffic,
    pub metrics: DeviceMetrics,
    pub(super) readiness: Arc<Readiness>,
    /// This device's place in `readiness`.
    pub(super) device_idx: usize,
    pub(super) is_warm: AtomicBool,
}

impl Shared {
    pub fn is_warm(&self) -> bool {
        self.is_warm.load(Ordering::Relaxed)
    }

    /// What the dispatch of a request of this class is to know of this device.
    pub fn candidate(&self, class: Priority, now: Instant, limits: &BatchLimits) -> Candidate {
        let longest = self.cost.batch_at_most(limits.max_batch_tokens);
        Candidate {
            standing: self.vitals.standing(now),
            load: self.traffic.load(class),
            cost: self.cost.line(),
            overdue_s: self.vitals.busy_for(now).saturating_sub(longest).as_secs_f64(),
        }
    }

    /// Notes the outcome of a trial, and logs it where it changes something.
    pub fn tried(&self, result: &Result<(), String>) {
        let (model, device) = (&self.info.name, &self.device);
        let before = self.vitals.health(Instant::now());
        if !self.readiness.set(self.device_idx, result.is_ok()) {
            // Given up as hung, it came back: too late.
            return;
        }
        match result {
            Ok(()) => {
                self.metrics.heartbeats_ok.increment(1);
                self.vitals.set_ready();
                self.is_warm.store(true, Ordering::Relaxed);
                if before != Health::Ready {
                    tracing::info!(%model, device, "ready");
                }
            }
            Err(reason) => {
                self.metrics.heartbeats_failed.increment(1);
                if before != Health::Unhealthy(reason.clone()) {
                    tracing::error!(%model, device, reason, "the device failed a trial; it gets no requests until it passes");
                }
                self.vitals.set_unhealthy(reason.clone());
            }
        }
    }
}

/// What came of each device's last trial, for the gauges, and for whoever has to know that none is left.
pub struct Readiness {
    /// 1 while any has passed. Moved under the lock, as the devices' own are: of two threads at once the later one must
    /// not show the older state.
    gauge: Gauge,
    /// Of each device.
    device_gauges: Vec<Gauge>,
    /// Locked once a trial.
    state: Mutex<Trials>,
}

struct Trials {
    devices: Vec<Last>,
    /// Whether the gauges are this one's to move: of two versions of a model that are loaded, one is asked.
    is_shown: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Last {
    /// Or it had none yet.
    Failed,
    Passed,
    /// There will be no other.
    Lost,
}

impl Readiness {
    /// None has; the gauges are left alone until [`Readiness::publish`].
    pub fn new(gauge: Gauge, device_gauges: Vec<Gauge>) -> Self {
        let devices = vec![Last::Failed; device_gauges.len()];
        Self { gauge, device_gauges, state: Mutex::new(Trials { devices, is_shown: false }) }
    }

    /// From here on the gauges show these devices.
    pub fn publish(&self) {
        let mut state = self.state.lock();
        state.is_shown = true;
        self.show(&state);
    }

    /// From here on the gauges are another version's, or, with `to_zero`, nobody's.
    pub fn hide(&self, to_zero: bool) {
        let mut state = self.state.lock();
        state.is_shown = false;
        if to_zero {
            self.device_gauges.iter().chain([&self.gauge]).for_each(|gauge| gauge.set(0.0));
        }
    }

    /// Notes a trial. Returns whether that was taken: not of a lost device.
    pub fn set(&self, device_idx: usize, has_passed: bool) -> bool {
        let mut state = self.state.lock();
        let is_taken = state.devices[device_idx] != Last::Lost;
        if is_taken {
            state.devices[device_idx] = if has_passed { Last::Passed } else { Last::Failed };
            self.show(&state);
        }
        is_taken
    }

    /// Notes that a device is lost. Returns whether all of the model's are now.
    pub fn lose(&self, device_idx: usize) -> bool {
        let mut state = self.state.lock();
        state.devices[device_idx] = Last::Lost;
        self.show(&state);
        state.devices.iter().all(|&last| last == Last::Lost)
    }

    fn show(&self, state: &Trials) {
        if !state.is_shown {
            return;
        }
        let one_if = |is_passed: bool| if is_passed { 1.0 } else { 0.0 };
        for (gauge, &last) in self.device_gauges.iter().zip(&state.devices) {
            gauge.set(one_if(last == Last::Passed));
        }
        self.gauge.set(one_if(state.devices.contains(&Last::Passed)));
    }
}

/// What was ever sent to a device, and what of it has left: the difference waits for it or is on it.
///
/// Two sums that only grow, each with writers of its own, instead of one that goes up and down: whatever way entries
/// leave, the worker need only say once a step what it still holds, and nothing is ever counted off twice or not at
/// all. Kept only where there are several devices to choose from; they wrap around together.
#[derive(Debug, Default)]
pub struct Traffic {
    flows: PerClass<Flow>,
    /// Background work on the device: what a request that goes before all that waits of it still waits for.
    running: Amount,
}

/// What was sent of one class, and what of it has left.
#[derive(Debug, Default)]
struct Flow {
    sent: Amount,
    left: Amount,
}

/// A [`Load`] that threads share. Its two numbers are read and written one by one.
#[derive(Debug, Default)]
struct Amount {
    num_entries: AtomicUsize,
    num_tokens: AtomicUsize,
}

impl Traffic {
    /// Counts what is about to be sent. From any thread.
    pub fn send(&self, class: Priority, load: Load) {
        let sent = &self.flows[class].sent;
        sent.num_entries.fetch_add(load.num_entries, Ordering::Relaxed);
        sent.num_tokens.fetch_add(load.num_tokens, Ordering::Relaxed);
    }

    /// Says what has left the backlog in all, and what of it is on the device. By the device's worker alone.
    pub fn settle(&self, left: PerClass<Load>, on_device: PerClass<Load>) {
        self.flows.interactive.left.set(left.interactive - on_device.interactive);
        self.flows.background.left.set(left.background - on_device.background);
        self.run(on_device.background);
    }

    /// Says what background work is on the device, or on its way to it. By the device's worker alone.
    pub fn run(&self, background: Load) {
        self.running.set(background);
    }

    /// What waits and runs, as far as a request of this class has to wait for it: background work that waits is nothing
    /// to an interactive one. Off by what moves in this moment.
    pub fn load(&self, class: Priority) -> Load {
        let PerClass { interactive, background } = &self.flows;
        match class {
            Priority::Interactive => interactive.load() + self.running.get(),
            Priority::Background => interactive.load() + background.load(),
        }
    }
}

impl Flow {
    fn load(&self) -> Load {
        // What has left first: read one by one, more may otherwise seem to have left than came.
        let (left, sent) = (self.left.get(), self.sent.get());
        let difference = |sent: usize, left: usize| {
            let difference = sent.wrapping_sub(left);
            if difference > usize::MAX / 2 { 0 } else { difference }
        };
        Load {
            num_entries: difference(sent.num_entries, left.num_entries),
            num_tokens: difference(sent.num_tokens, left.num_tokens),
        }
    }
}

impl Amount {
    fn get(&self) -> Load {
        Load {
            num_entries: self.num_entries.load(Ordering::Relaxed),
            num_tokens: self.num_tokens.load(Ordering::Relaxed),
        }
    }

    fn set(&self, load: Load) {
        self.num_entries.store(load.num_entries, Ordering::Relaxed);
        self.num_tokens.store(load.num_tokens, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traffic_is_what_came_less_what_left() {
        let traffic = Traffic::default();
        let load = |num_entries, num_tokens| Load { num_entries, num_tokens };
        let settle = |left| traffic.settle(PerClass { interactive: left, ..PerClass::default() }, PerClass::default());
        traffic.send(Priority::Interactive, load(3, 30));
        traffic.send(Priority::Interactive, load(1, 5));
        assert_eq!(traffic.load(Priority::Interactive), load(4, 35));
        settle(load(3, 30));
        assert_eq!(traffic.load(Priority::Interactive), load(1, 5));
        settle(load(5, 50));
        assert_eq!(traffic.load(Priority::Interactive), load(0, 0), "never below nothing");
    }

    #[test]
    fn background_work_counts_for_the_others_once_it_runs() {
        let traffic = Traffic::default();
        let load = |num_entries, num_tokens| Load { num_entries, num_tokens };
        let both = || [Priority::Interactive, Priority::Background].map(|class| traffic.load(class));
        traffic.send(Priority::Interactive, load(1, 5));
        traffic.send(Priority::Background, load(4, 40));
        assert_eq!(both(), [load(1, 5), load(5, 45)]);
        // What is launched has left nothing yet where a device computes in the launch.
        traffic.run(load(3, 30));
        assert_eq!(both(), [load(4, 35), load(5, 45)]);
        // Both on the device, the interactive entry with a part of the background ones.
        let on_device = PerClass { interactive: load(1, 5), background: load(3, 30) };
        traffic.settle(on_device, on_device);
        assert_eq!(both(), [load(4, 35), load(5, 45)]);
        traffic.settle(on_device, PerClass::default());
        assert_eq!(both(), [load(0, 0), load(1, 10)]);
    }

    #[test]
    fn the_model_is_shown_ready_while_any_device_is() {
        let shown = Arc::new(std::sync::atomic::AtomicU64::new(0)); // the bits of an f64
        let is_shown = || f64::from_bits(shown.load(Ordering::Relaxed)) == 1.0;
        let readiness = Readiness::new(Gauge::from_arc(shown.clone()), vec![Gauge::noop(); 2]);
        readiness.publish();
        for (device_idx, is_ready, expected) in
            [(1, true, true), (0, true, true), (1, false, true), (0, false, false), (0, true, true)]
        {
            assert!(readiness.set(device_idx, is_ready));
            assert_eq!(is_shown(), expected);
        }
    }

    #[test]
    fn of_two_versions_the_one_that_is_asked_is_shown() {
        let shown = Arc::new(std::sync::atomic::AtomicU64::new(0)); // the bits of an f64
        let is_shown = || f64::from_bits(shown.load(Ordering::Relaxed)) == 1.0;
        let [old, new] = [(), ()].map(|()| Readiness::new(Gauge::from_arc(shown.clone()), vec![Gauge::noop()]));
        old.publish();
        assert!(old.set(0, true) && is_shown());
        assert!(new.set(0, false) && is_shown(), "it is not asked yet");
        old.hide(false);
        new.publish();
        assert!(!is_shown());
        assert!(new.set(0, true) && is_shown());
        assert!(old.set(0, false) && is_shown(), "it is not asked any more");
        new.hide(true);
        assert!(!is_shown());
    }

    #[test]
    fn a_lost_device_passes_no_trial_and_the_last_one_is_told() {
        let shown = Arc::new(std::sync::atomic::AtomicU64::new(0)); // the bits of an f64
        let device = Gauge::from_arc(shown.clone());
        let readiness = Readiness::new(Gauge::noop(), vec![device, Gauge::noop()]);
        readiness.publish();
        assert!(readiness.set(0, true));
        assert!(!readiness.lose(0), "another is left");
        assert!(!readiness.set(0, true));
        assert_eq!(f64::from_bits(shown.load(Ordering::Relaxed)), 0.0);
        assert!(readiness.lose(1));
    }
}
