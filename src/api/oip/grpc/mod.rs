//! The Open Inference Protocol over gRPC, with health and reflection, on a port of its own.
//!
//! The calls do what the routes of REST do, through the same functions; `convert` is between the messages and these.

pub(super) mod convert;
mod health;
mod service;

/// The messages and the service, made from `inference.proto`.
#[allow(missing_docs)]
pub mod pb {
    tonic::include_proto!("inference");

    /// The descriptor of the service, for reflection.
    pub const DESCRIPTOR: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/inference.bin"));
}

use std::future::Future;

use tokio::net::TcpListener;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::pb::health_server::HealthServer;
use tonic_reflection::server::Builder as Reflection;

use crate::api::ApiState;
use crate::{Error, Result};
use pb::grpc_inference_service_server::GrpcInferenceServiceServer;

/// Registers help and units of what this module counts.
pub fn describe_metrics() {
    use ::metrics::Unit;
    ::metrics::describe_counter!(
        "eremois_grpc_requests_total",
        Unit::Count,
        "gRPC calls answered, by method and outcome (ok, or an error's kind)"
    );
    ::metrics::describe_histogram!(
        "eremois_grpc_request_duration_seconds",
        Unit::Seconds,
        "From a gRPC message read to its answer ready, by method"
    );
}

/// Serves on `listener` until `stop` completes, then finishes the calls it is at.
///
/// Errors: `Internal` where the transport fails.
pub async fn serve(listener: TcpListener, state: ApiState, stop: impl Future<Output = ()>) -> Result<()> {
    let internal = |cause: String| Error::Internal { cause: format!("grpc: {cause}") };
    let reflection = || {
        Reflection::configure()
            .register_encoded_file_descriptor_set(pb::DESCRIPTOR)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let (v1, v1alpha) = (reflection().build_v1(), reflection().build_v1alpha());
    let max_body_bytes = state.settings.max_body_bytes;
    let inference = GrpcInferenceServiceServer::new(service::Service::new(state.clone()));
    Server::builder()
        .add_service(inference.max_decoding_message_size(max_body_bytes))
        .add_service(HealthServer::new(health::Health::new(state)))
        .add_service(v1.map_err(|e| internal(e.to_string()))?)
        .add_service(v1alpha.map_err(|e| internal(e.to_string()))?)
        // Answers are written whole: waiting for more bytes to send along would only delay them.
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), stop)
        .await
        .map_err(|e| internal(e.to_string()))
}
