//! gRPC, on a port of its own where the settings ask for it.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::api::{ApiState, grpc};
use crate::{Error, Result};

/// A listener being served.
pub struct Grpc {
    /// Sending or dropping it stops accepting.
    stop: oneshot::Sender<()>,
    serving: JoinHandle<Result<()>>,
}

impl Grpc {
    /// Serves on `address` from now on; `None` where there is none.
    ///
    /// Errors: `Config` for an address that cannot be listened on.
    pub async fn start(address: Option<SocketAddr>, state: &ApiState) -> Result<Option<Self>> {
        let Some(address) = address else { return Ok(None) };
        let fault = |e: std::io::Error| Error::Config { faults: vec![format!("api.grpc_listen: {address}: {e}")] };
        let listener = TcpListener::bind(address).await.map_err(fault)?;
        tracing::info!(address = %listener.local_addr().map_err(fault)?, "gRPC listens");
        let (stop, stopped) = oneshot::channel();
        let served = grpc::serve(listener, state.clone(), async move {
            // An error says that the other end is gone: then it is over too.
            let _ = stopped.await;
        });
        let serving = tokio::spawn(async move {
            let result = served.await;
            if let Err(error) = &result {
                tracing::error!(%error, "gRPC is served no more");
            }
            result
        });
        Ok(Some(Self { stop, serving }))
    }

    /// Stops accepting and lets the calls finish, for at most `limit`. Returns whether all did.
    pub async fn close(self, limit: Duration) -> bool {
        // The receiver is gone only if the task is, and then there is nothing to stop.
        let _ = self.stop.send(());
        tokio::time::timeout(limit, self.serving).await.is_ok()
    }
}
