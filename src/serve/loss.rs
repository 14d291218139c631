//! A device that is lost to this process: whoever finds out tells everybody, and with a model's last device the process
//! ends in order.
//!
//! After some errors a device answers every later call of the process with an error, and after a kernel that hangs with
//! none at all. Only a new process can use it again. So nobody asks the device any more, and its worker hands what it has
//! to the model's other devices. Where none of these is ready it answers; where all are lost, `app` drains what other
//! models' devices still compute and ends with a status that a supervisor restarts on.
//!
//! A worker that hangs in its device can neither hand over nor answer. So its handlers look for themselves, now and then.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use tokio::sync::futures::Notified;
use tokio::sync::{Notify, oneshot};

use super::Settings;
use super::shared::Shared;
use super::ticket::Answer;
use crate::{Error, Result};

/// Whether a model of the engine has lost all of its devices, and why.
#[derive(Debug, Default)]
pub struct Loss {
    cause: OnceLock<String>,
    told: Notify,
}

impl Loss {
    /// Tells everybody. The first cause is the one that is kept.
    pub fn tell(&self, cause: String) {
        let _ = self.cause.set(cause);
        self.told.notify_waiters();
    }

    pub fn cause(&self) -> Option<&str> {
        self.cause.get().map(String::as_str)
    }

    /// Completes when it is told of after this call.
    pub fn told(&self) -> Notified<'_> {
        self.told.notified()
    }
}

/// How often somebody who waits looks whether the device hangs for good.
pub fn look_interval(settings: &Settings) -> Duration {
    (settings.device_timeout / 4).clamp(Duration::from_millis(1), Duration::from_secs(1))
}

impl Shared {
    /// Turns the device's readiness off for the rest of the process. If it was the model's last one, tells whoever ends
    /// the process.
    pub fn lose(&self, cause: &str) {
        if !self.vitals.set_lost(cause.to_string()) {
            return;
        }
        self.metrics.device_lost.set(1.0);
        let (model, device) = (&self.info.name, &self.device);
        if self.readiness.lose(self.device_idx) {
            tracing::error!(%model, device, cause, "the device is lost: the server ends, to be started anew");
            self.gate.loss.tell(cause.to_string());
        } else {
            tracing::error!(
                %model, device, cause,
                "the device is lost until the server is started anew: it goes on with the model's other devices"
            );
        }
    }
}

/// Waits for a request's answer: on the async side, so that a deadline is told in time also while the worker is busy or
/// hangs. `abandoned` says whether nobody will answer any more; it is asked now and then.
///
/// Errors: those of the answer, `Deadline`, and what `abandoned` says.
pub async fn answer(
    mut reply: oneshot::Receiver<Result<Answer>>,
    start: Instant,
    deadline: Instant,
    look_interval: Duration,
    abandoned: impl Fn(Instant) -> Option<Error>,
) -> Result<Answer> {
    // Most answers come before the first look, and cost one timer as they would without.
    let mut look = start + look_interval;
    loop {
        match tokio::time::timeout_at(deadline.min(look).into(), &mut reply).await {
            Ok(Ok(answer)) => return answer,
            Ok(Err(_)) => return Err(Error::Internal { cause: "the worker dropped the request".to_string() }),
            Err(_) if look >= deadline => {
                return Err(Error::Deadline { timeout: deadline.saturating_duration_since(start) });
            }
            Err(_) => {
                let now = Instant::now();
                if let Some(error) = abandoned(now) {
                    return Err(error);
                }
                look = now + look_interval;
            }
        }
    }
}
