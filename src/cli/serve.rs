//! `eremois serve`.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{FAILURE, RESTART, SUCCESS, fail};
use crate::app::{self, Parts, logs};
use crate::config::Sources;
use crate::ops::process::exit_at_once;
use crate::{Error, Result, metrics};

/// Serves until SIGTERM or SIGINT; a second one ends the process at once.
pub fn run(sources: Sources) -> ExitCode {
    let loaded = match sources.load() {
        Ok(loaded) => loaded,
        Err(e) => return fail(&e),
    };
    let logs = logs::install(&loaded.settings.log);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return fail(&format!("no threads to serve on: {e}")),
    };
    let served = runtime.block_on(async {
        let internal = |cause: String| Error::Internal { cause };
        let metrics = metrics::install().map_err(internal)?;
        let signals = Signals::install().map_err(|e| internal(format!("no handler for signals: {e}")))?;
        let listener = bind(loaded.settings.api.listen).await?;
        app::run(listener, Parts { sources, loaded, logs, metrics }, signals.first()).await
    });
    // Not waiting: a model that is still being read from disk would hold the process for nothing.
    runtime.shutdown_timeout(Duration::from_millis(100));
    end(served)
}

/// The process's status after a server's end. One that has served ends here: nothing may wait for its devices, one of
/// which may hang without having ended the server.
pub fn end(served: Result<()>) -> ExitCode {
    match served {
        Ok(()) => exit_at_once(SUCCESS),
        Err(e @ Error::DeviceLost { .. }) => {
            fail(&e);
            exit_at_once(RESTART)
        }
        Err(e) => fail(&e),
    }
}

async fn bind(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|e| {
        let why = match e.kind() {
            std::io::ErrorKind::AddrInUse => "the address is in use; is another server running?".to_string(),
            _ => e.to_string(),
        };
        Error::Config { faults: vec![format!("api.listen: {address}: {why}")] }
    })
}

/// The signals that end a server.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// From here on the process does not end by itself on either.
    fn install() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// Completes at the first signal. The second one ends the process.
    async fn first(mut self) {
        self.next().await;
        tokio::spawn(async move {
            self.next().await;
            eprintln!("eremois: a second signal: the drain is cut short");
            exit_at_once(FAILURE);
        });
    }
}
