//! `grpc.health.v1.Health`: the server is serving while all its models take requests.

use std::time::Duration;

use axum::extract::State;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::Health as HealthService;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::api::{ApiState, health};

/// How often a watched state is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// The names that are known; empty is the server as a whole.
const SERVICES: [&str; 2] = ["", "inference.GRPCInferenceService"];

/// The service of health.
pub struct Health {
    state: ApiState,
}

impl Health {
    pub fn new(state: ApiState) -> Self {
        Self { state }
    }
}

async fn serving(state: &ApiState) -> ServingStatus {
    match health::health(State(state.clone())).await {
        Ok(_) => ServingStatus::Serving,
        Err(_) => ServingStatus::NotServing,
    }
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

#[tonic::async_trait]
impl HealthService for Health {
    type WatchStream = BoxStream<'static, Result<HealthCheckResponse, Status>>;

    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        if !SERVICES.contains(&request.get_ref().service.as_str()) {
            return Err(Status::not_found("no service is named so"));
        }
        Ok(Response::new(response(serving(&self.state).await)))
    }

    /// The state now, and again at each change. A service that is not known is told so once, as the protocol wants it.
    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        if !SERVICES.contains(&request.get_ref().service.as_str()) {
            let unknown = response(ServingStatus::ServiceUnknown);
            return Ok(Response::new(stream::iter([Ok(unknown)]).chain(stream::pending()).boxed()));
        }
        let changes = stream::unfold((self.state.clone(), None), |(state, told)| async move {
            loop {
                let now = serving(&state).await;
                if told != Some(now) {
                    return Some((Ok(response(now)), (state, Some(now))));
                }
                tokio::time::sleep(LOOK).await;
            }
        });
        Ok(Response::new(changes.boxed()))
    }
}
