//! Logs: human or JSON lines on standard error, with a filter that can change while the server runs.

use std::io::IsTerminal;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use crate::config::Log;
use crate::config::words::{LogFilter, LogFormat};

/// The other end of the installed filter.
#[derive(Clone)]
pub struct Logs {
    /// `None` where another subscriber was there first, as in a test.
    filter: Option<reload::Handle<EnvFilter, Registry>>,
}

/// Installs the subscriber of this process.
pub fn install(log: &Log) -> Logs {
    let (filter, handle) = reload::Layer::new(filter(&log.filter));
    let lines = match log.format {
        LogFormat::Human => {
            let ansi = std::io::stderr().is_terminal();
            fmt::layer().with_ansi(ansi).with_writer(std::io::stderr).boxed()
        }
        // Flat: the fields of an event stand beside its message, where log stores index them.
        LogFormat::Json => fmt::layer().json().flatten_event(true).with_writer(std::io::stderr).boxed(),
    };
    let installed = tracing_subscriber::registry().with(filter).with(lines).try_init().is_ok();
    Logs { filter: installed.then_some(handle) }
}

impl Logs {
    /// Logs that go nowhere and cannot be steered.
    pub fn none() -> Self {
        Self { filter: None }
    }

    /// Puts another filter in force.
    pub fn set_filter(&self, new: &LogFilter) {
        if let Some(handle) = &self.filter {
            // Fails only when the subscriber is gone, and then there is nothing to filter.
            let _ = handle.reload(filter(new));
        }
    }
}

fn filter(directives: &LogFilter) -> EnvFilter {
    // Checked when the settings were read; the lossy way cannot fail at all.
    EnvFilter::builder().parse_lossy(&directives.0)
}
