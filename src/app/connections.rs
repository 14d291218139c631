//! Connections: accepted, served, and closed without cutting anyone off.

use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// How long a client may take to send a request's head, and how long a connection may idle between two
/// requests. Longer than the minute after which common load balancers close on their side: the one that
/// closes first should be the one that knows no request is under way.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);

/// A pause after a failed accept, so that running out of file descriptors does not spin a core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A listener being served.
pub struct Connections {
    /// Sending or dropping it stops accepting.
    stop: oneshot::Sender<()>,
    /// Gives back what tells the connections to finish.
    accepting: JoinHandle<GracefulShutdown>,
}

impl Connections {
    /// Serves `router` on `listener` from now on.
    pub fn serve(listener: TcpListener, router: Router) -> Self {
        let (stop, stopped) = oneshot::channel();
        Self { stop, accepting: tokio::spawn(accept(listener, router, stopped)) }
    }

    /// Stops accepting, closes idle connections, lets the others finish the request they are at, for at
    /// most `limit`. Returns whether all finished.
    pub async fn close(self, limit: Duration) -> bool {
        // The receiver is gone only if the task is, and then there is nothing to stop.
        let _ = self.stop.send(());
        match self.accepting.await {
            Ok(connections) => tokio::time::timeout(limit, connections.shutdown()).await.is_ok(),
            Err(_) => false,
        }
    }
}

async fn accept(listener: TcpListener, router: Router, mut stopped: oneshot::Receiver<()>) -> GracefulShutdown {
    let connections = GracefulShutdown::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => serve_one(stream, &router, &connections),
                Err(e) => {
                    tracing::warn!(error = %e, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            _ = &mut stopped => break,
        }
    }
    // Whoever is in the listener's backlog has connected already: answered, not reset.
    while let Some(Ok((stream, _))) = futures::FutureExt::now_or_never(listener.accept()) {
        serve_one(stream, &router, &connections);
    }
    connections
}

fn serve_one(stream: TcpStream, router: &Router, connections: &GracefulShutdown) {
    // Answers are written whole: waiting for more bytes to send along would only delay them.
    let _ = stream.set_nodelay(true);
    let service = TowerToHyperService::new(router.clone());
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    let connection = connections.watch(connection);
    tokio::spawn(async move {
        if let Err(e) = connection.await {
            // A client that went away, or that speaks no HTTP: its business.
            tracing::debug!(error = %e, "a connection ended early");
        }
    });
}
