//! Whether a model takes requests: what its workers know of their devices, readable from any thread.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::request::ModelName;

/// Whether a model, or one of its devices, takes requests, and why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Warming up at the configured limits.
    Loading,
    Ready,
    /// The worker is restarting, or the heartbeat through the device failed.
    Unhealthy(String),
    Draining,
}

impl Health {
    /// A model's health from its devices': ready while one is, so that a lost one costs speed and no more.
    pub fn of_model(devices: &[(String, Health)]) -> Self {
        if let [(_, only)] = devices {
            return only.clone();
        }
        let find = |wanted| devices.iter().any(|(_, health)| *health == wanted);
        if find(Self::Ready) {
            return Self::Ready;
        }
        // One that is still warming up may be ready soon, whatever became of the others.
        if find(Self::Loading) {
            return Self::Loading;
        }
        let reason = |(name, health): &(String, Self)| match health {
            Self::Unhealthy(reason) => Some(format!("{name}: {reason}")),
            _ => None,
        };
        Self::Unhealthy(devices.iter().filter_map(reason).collect::<Vec<_>>().join("; "))
    }
}

/// How good a place a device is for a request, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    Ready,
    /// After a panic, until the device has passed a trial: milliseconds, worth waiting for where no device is ready.
    Restarting,
    /// Loading, unhealthy, hung or lost: takes no request.
    Down,
}

/// What `/health/ready` says of one model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelHealth {
    pub model: ModelName,
    pub health: Health,
    /// Name and health of each device. Not empty.
    pub devices: Vec<(String, Health)>,
}

/// One device's state. Set by its worker; asked by every request and by `/health/ready`.
#[derive(Debug)]
pub struct Vitals {
    state: AtomicU8,
    /// Why the state is `RESTARTING`, `UNHEALTHY` or `LOST`. Locked only then.
    reason: Mutex<String>,
    /// When the device was given what it works on now: nanoseconds after `epoch` plus 1; 0 while it is idle.
    ///
    /// A worker that hangs in the device cannot report it. So nobody waits for a report: whoever asks
    /// compares this with the clock.
    busy_since_ns: AtomicU64,
    epoch: Instant,
    device_timeout: Duration,
    hangs_for_good: AtomicBool,
}

const LOADING: u8 = 0;
const READY: u8 = 1;
/// After a panic, until the device has answered again: not ready, but requests may wait for it.
const RESTARTING: u8 = 2;
const UNHEALTHY: u8 = 3;
/// For the rest of the process.
const LOST: u8 = 4;

impl Vitals {
    /// Loading. A device that works on one batch for longer than `device_timeout` counts as hung.
    pub fn new(device_timeout: Duration) -> Self {
        Self {
            state: AtomicU8::new(LOADING),
            reason: Mutex::new(String::new()),
            busy_since_ns: AtomicU64::new(0),
            epoch: Instant::now(),
            device_timeout,
            hangs_for_good: AtomicBool::new(false),
        }
    }

    pub fn set_ready(&self) {
        self.set(READY, None);
    }

    pub fn set_restarting(&self, reason: String) {
        self.set(RESTARTING, Some(reason));
    }

    pub fn set_unhealthy(&self, reason: String) {
        self.set(UNHEALTHY, Some(reason));
    }

    /// From here on no other state is taken. Returns whether it was not so before.
    pub fn set_lost(&self, reason: String) -> bool {
        self.set(LOST, Some(reason))
    }

    /// Returns whether the state was taken.
    fn set(&self, state: u8, reason: Option<String>) -> bool {
        // Held over the change, so that the reason that is read is the state's. `READY` needs none.
        let mut told = self.reason.lock();
        let taken = self.state.load(Ordering::Acquire) != LOST;
        if taken {
            *told = reason.unwrap_or_default();
            self.state.store(state, Ordering::Release);
        }
        taken
    }

    pub fn is_lost(&self) -> bool {
        self.state.load(Ordering::Acquire) == LOST
    }

    /// Why the device is lost, if it is.
    pub fn lost(&self) -> Option<String> {
        self.is_lost().then(|| self.reason.lock().clone())
    }

    /// Why nobody will answer for the device, if the worker hangs in it and it was given up.
    pub fn abandoned(&self, now: Instant) -> Option<String> {
        self.lost().filter(|_| self.is_hung(now))
    }

    /// What [`crate::model::Backend::hangs_for_good`] says of the device.
    pub fn set_hangs_for_good(&self, hangs_for_good: bool) {
        self.hangs_for_good.store(hangs_for_good, Ordering::Relaxed);
    }

    /// Why nothing more will come of the device, if it hangs and its kind does not come back from that.
    pub fn hung_for_good(&self, now: Instant) -> Option<String> {
        let is_hung = !self.is_lost() && self.hangs_for_good.load(Ordering::Relaxed) && self.is_hung(now);
        is_hung.then(|| self.hung_reason())
    }

    /// The device works since `launched`, or not at all.
    pub fn set_busy(&self, launched: Option<Instant>) {
        let ns = launched.map_or(0, |at| at.saturating_duration_since(self.epoch).as_nanos() as u64 + 1);
        self.busy_since_ns.store(ns, Ordering::Release);
    }

    /// What `/health/ready` says.
    pub fn health(&self, now: Instant) -> Health {
        match self.state.load(Ordering::Acquire) {
            LOADING => Health::Loading,
            READY | RESTARTING if self.is_hung(now) => Health::Unhealthy(self.hung_reason()),
            READY => Health::Ready,
            _ => Health::Unhealthy(self.reason.lock().clone()),
        }
    }

    /// Whether requests may be sent to the device now. Takes no lock.
    pub fn standing(&self, now: Instant) -> Standing {
        match self.state.load(Ordering::Acquire) {
            READY | RESTARTING if self.is_hung(now) => Standing::Down,
            READY => Standing::Ready,
            RESTARTING => Standing::Restarting,
            _ => Standing::Down,
        }
    }

    /// How long the device has been working on what it works on now; zero while it is idle.
    pub fn busy_for(&self, now: Instant) -> Duration {
        match self.busy_since_ns.load(Ordering::Acquire) {
            0 => Duration::ZERO,
            since => now.saturating_duration_since(self.epoch + Duration::from_nanos(since)),
        }
    }

    fn is_hung(&self, now: Instant) -> bool {
        self.busy_for(now) > self.device_timeout
    }

    fn hung_reason(&self) -> String {
        format!("the device has worked on one batch for more than {:?}", self.device_timeout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hung_device_is_seen_without_the_worker() {
        let vitals = Vitals::new(Duration::from_secs(30));
        let start = Instant::now();
        vitals.set_ready();
        vitals.set_busy(Some(start));
        assert_eq!(vitals.health(start + Duration::from_secs(29)), Health::Ready);
        let late = start + Duration::from_secs(31);
        assert!(matches!(vitals.health(late), Health::Unhealthy(_)));
        assert_eq!(vitals.standing(late), Standing::Down);
        assert!(vitals.busy_for(late) >= Duration::from_secs(30));
        vitals.set_busy(None);
        assert_eq!(vitals.health(late), Health::Ready);
        assert_eq!((vitals.standing(late), vitals.busy_for(late)), (Standing::Ready, Duration::ZERO));
    }

    #[test]
    fn a_lost_device_stays_lost() {
        let vitals = Vitals::new(Duration::from_secs(30));
        vitals.set_ready();
        assert_eq!(vitals.lost(), None);
        assert!(vitals.set_lost("illegal address".into()));
        assert!(!vitals.set_lost("again".into()));
        vitals.set_ready();
        vitals.set_restarting("panic".into());
        assert_eq!(vitals.lost(), Some("illegal address".into()));
        let told = Health::Unhealthy("illegal address".into());
        assert_eq!((vitals.health(Instant::now()), vitals.standing(Instant::now())), (told, Standing::Down));
    }

    #[test]
    fn only_some_devices_hang_for_good() {
        let vitals = Vitals::new(Duration::from_secs(30));
        let (start, late) = (Instant::now(), Instant::now() + Duration::from_secs(31));
        vitals.set_ready();
        vitals.set_busy(Some(start));
        assert_eq!(vitals.hung_for_good(late), None, "a slow CPU comes back");
        vitals.set_hangs_for_good(true);
        assert_eq!(vitals.hung_for_good(start), None);
        assert!(vitals.hung_for_good(late).is_some_and(|reason| reason.contains("30s")));
        assert_eq!(vitals.abandoned(late), None, "nobody has given it up yet");
        vitals.set_lost("hung".into());
        assert_eq!((vitals.abandoned(start), vitals.abandoned(late)), (None, Some("hung".into())));
        vitals.set_busy(None);
        assert_eq!((vitals.hung_for_good(late), vitals.abandoned(late)), (None, None), "it answers for itself");
    }

    #[test]
    fn restarting_is_not_ready_but_lets_requests_wait() {
        let vitals = Vitals::new(Duration::from_secs(30));
        let now = Instant::now();
        assert_eq!((vitals.health(now), vitals.standing(now)), (Health::Loading, Standing::Down));
        vitals.set_restarting("panic".into());
        assert_eq!(vitals.health(now), Health::Unhealthy("panic".into()));
        assert_eq!(vitals.standing(now), Standing::Restarting);
        vitals.set_unhealthy("lost".into());
        assert_eq!(vitals.health(now), Health::Unhealthy("lost".into()));
        assert_eq!(vitals.standing(now), Standing::Down);
    }

    #[test]
    fn a_model_is_ready_while_one_device_is() {
        let lost = |name: &str| (name.to_string(), Health::Unhealthy("lost".into()));
        let (ready, loading) = (("cuda:1".to_string(), Health::Ready), ("cuda:2".to_string(), Health::Loading));
        assert_eq!(Health::of_model(&[lost("cuda:0"), ready]), Health::Ready);
        assert_eq!(Health::of_model(&[lost("cuda:0"), loading]), Health::Loading);
        let all = Health::of_model(&[lost("cuda:0"), lost("cuda:1")]);
        assert_eq!(all, Health::Unhealthy("cuda:0: lost; cuda:1: lost".into()));
        assert_eq!(Health::of_model(&[lost("cpu")]), Health::Unhealthy("lost".into()), "one needs no name");
    }
}
