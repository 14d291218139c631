//! Whether a model takes requests: what its worker knows of the device, readable from any thread.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Whether a model takes requests, and why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Warming up at the configured limits.
    Loading,
    Ready,
    /// The worker is restarting, or the heartbeat through the device failed.
    Unhealthy(String),
    Draining,
}

/// Set by the worker; asked by every request and by `/health/ready`.
#[derive(Debug)]
pub struct Vitals {
    state: AtomicU8,
    /// Why the state is `RESTARTING` or `UNHEALTHY`. Locked only then.
    reason: Mutex<String>,
    /// When the device was given what it works on now: nanoseconds after `epoch` plus 1; 0 while it is idle.
    ///
    /// A worker that hangs in the device cannot report it. So nobody waits for a report: whoever asks
    /// compares this with the clock.
    busy_since_ns: AtomicU64,
    epoch: Instant,
    device_timeout: Duration,
}

const LOADING: u8 = 0;
const READY: u8 = 1;
/// After a panic, until the device has answered again: not ready, but requests may wait for it.
const RESTARTING: u8 = 2;
const UNHEALTHY: u8 = 3;

impl Vitals {
    /// Loading. A device that works on one batch for longer than `device_timeout` counts as hung.
    pub fn new(device_timeout: Duration) -> Self {
        Self {
            state: AtomicU8::new(LOADING),
            reason: Mutex::new(String::new()),
            busy_since_ns: AtomicU64::new(0),
            epoch: Instant::now(),
            device_timeout,
        }
    }

    pub fn set_ready(&self) {
        self.state.store(READY, Ordering::Release);
    }

    pub fn set_restarting(&self, reason: String) {
        *self.reason.lock() = reason;
        self.state.store(RESTARTING, Ordering::Release);
    }

    pub fn set_unhealthy(&self, reason: String) {
        *self.reason.lock() = reason;
        self.state.store(UNHEALTHY, Ordering::Release);
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
            READY if self.is_hung(now) => Health::Unhealthy(self.hung_reason()),
            READY => Health::Ready,
            _ => Health::Unhealthy(self.reason.lock().clone()),
        }
    }

    /// Whether a request may be let in now; else what to tell it. Restarting takes milliseconds and is
    /// worth waiting for, so that one bad input does not refuse its neighbours.
    pub fn admits(&self, now: Instant) -> Result<(), Health> {
        match self.state.load(Ordering::Acquire) {
            READY | RESTARTING if !self.is_hung(now) => Ok(()),
            READY | RESTARTING => Err(Health::Unhealthy(self.hung_reason())),
            _ => Err(self.health(now)),
        }
    }

    fn is_hung(&self, now: Instant) -> bool {
        let since = self.busy_since_ns.load(Ordering::Acquire);
        since != 0 && now.saturating_duration_since(self.epoch + Duration::from_nanos(since)) > self.device_timeout
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
        assert!(vitals.admits(late).is_err());
        vitals.set_busy(None);
        assert_eq!(vitals.health(late), Health::Ready);
        assert!(vitals.admits(late).is_ok());
    }

    #[test]
    fn restarting_is_not_ready_but_lets_requests_wait() {
        let vitals = Vitals::new(Duration::from_secs(30));
        let now = Instant::now();
        assert_eq!(vitals.admits(now), Err(Health::Loading));
        vitals.set_restarting("panic".into());
        assert_eq!(vitals.health(now), Health::Unhealthy("panic".into()));
        assert!(vitals.admits(now).is_ok());
        vitals.set_unhealthy("lost".into());
        assert_eq!(vitals.admits(now), Err(Health::Unhealthy("lost".into())));
    }
}
