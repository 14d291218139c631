//! The calls of `inference.GRPCInferenceService`.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use axum::extract::State;
use futures::FutureExt;
use tonic::{Request, Response, Status};

use super::super::metadata::{EXTENSIONS, platform};
use super::super::statistics::{self, ModelStatistics as Counted};
use super::super::{ModelPath, infer, load_options, metadata, repository};
use super::convert;
use super::pb::grpc_inference_service_server::GrpcInferenceService;
use super::pb::repository_index_response::ModelIndex;
use super::pb::*;
use crate::api::body::{self, Call};
use crate::api::status::{Fault, grpc_status};
use crate::api::tensors::signature::Signature;
use crate::api::{ApiState, health};
use crate::request::Priority;

/// The service of inference.
pub struct Service {
    state: ApiState,
}

impl Service {
    pub fn new(state: ApiState) -> Self {
        Self { state }
    }

    /// Answers a call, counts and logs it. A panic ends the call alone.
    async fn call<T>(
        &self,
        method: &'static str,
        work: impl Future<Output = Result<T, Fault>>,
    ) -> Result<Response<T>, Status> {
        let start = Instant::now();
        let result = AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|_| {
            // The cause is in the log of the panic's hook.
            Err(Fault::Panic { cause: format!("{method} panicked") })
        });
        let fault = result.as_ref().err();
        let outcome = fault.map_or("ok", |fault| fault.class().kind.as_str());
        ::metrics::counter!("eremois_grpc_requests_total", "method" => method, "outcome" => outcome).increment(1);
        ::metrics::histogram!("eremois_grpc_request_duration_seconds", "method" => method).record(start.elapsed());
        let elapsed_us = start.elapsed().as_micros() as u64;
        match method {
            // Probes come every few seconds for ever.
            "ServerLive" | "ServerReady" | "ModelReady" => tracing::debug!(method, outcome, elapsed_us, "answered"),
            _ => tracing::info!(method, outcome, reason = fault.map(Fault::message), elapsed_us, "answered"),
        }
        result.map(Response::new).map_err(|fault| grpc_status(&fault, self.state.is_starting()))
    }

    async fn infer(&self, request: Request<ModelInferRequest>) -> Result<ModelInferResponse, Fault> {
        let (arrived, longest) = (Instant::now(), self.state.settings.timeout);
        let timeout = grpc_timeout(&request).map_or(longest, |asked| asked.min(longest));
        let asked = request.metadata().get_all("cache-control");
        let cache_use = body::cache_use(asked.iter().filter_map(|value| value.to_str().ok()));
        let request = request.into_inner();
        let path = ModelPath::new(request.model_name.clone(), request.model_version.clone());
        let call = Call {
            body: convert::asking_of(request)?,
            deadline: arrived + timeout,
            timeout,
            cache_use,
            priority: Priority::Interactive,
            record_id: None,
        };
        let answered = infer::compute(&self.state, &path, call).await?;
        Ok(convert::response_of(answered)?)
    }

    fn config(&self, path: ModelPath) -> Result<ModelConfigResponse, Fault> {
        let info = path.find(&self.state)?;
        let limits = self.state.engine.limits(Some(&info.name))?;
        let (input, output) = convert::config_tensors(&Signature::main(&info));
        let dynamic_batching = ModelDynamicBatching {
            preferred_batch_size: vec![limits.max_batch_size as i32],
            max_queue_delay_microseconds: limits.max_queue_delay.as_micros() as u64,
        };
        let config = ModelConfig {
            name: info.name.to_string(),
            platform: platform(&info),
            max_batch_size: self.state.settings.max_client_batch_size as i32,
            input,
            output,
            dynamic_batching: Some(dynamic_batching),
            backend: "eremois".to_string(),
            response_cache: Some(ModelResponseCache { enable: self.state.keeper.inferences().has_cache() }),
        };
        Ok(ModelConfigResponse { config: Some(config) })
    }

    fn statistics(&self, name: String, version: String) -> Result<ModelStatisticsResponse, Fault> {
        let infos = match name.is_empty() {
            true => self.state.engine.models(),
            false => vec![ModelPath::new(name, version).find(&self.state)?],
        };
        let counted = statistics::of_models(&self.state, &infos)?.model_stats;
        Ok(ModelStatisticsResponse { model_stats: counted.into_iter().map(ModelStatistics::from).collect() })
    }
}

impl From<Counted> for ModelStatistics {
    fn from(counted: Counted) -> Self {
        let timed = |timed: statistics::Duration| Some(StatisticDuration { count: timed.count, ns: timed.ns });
        let stats = counted.inference_stats;
        let inference_stats = InferStatistics {
            success: timed(stats.success),
            fail: timed(stats.fail),
            queue: timed(stats.queue),
            compute_input: timed(stats.compute_input),
            compute_infer: timed(stats.compute_infer),
            compute_output: timed(stats.compute_output),
            cache_hit: timed(stats.cache_hit),
            cache_miss: timed(stats.cache_miss),
        };
        Self {
            name: counted.name,
            version: counted.version,
            last_inference: counted.last_inference,
            inference_count: counted.inference_count,
            execution_count: counted.execution_count,
            inference_stats: Some(inference_stats),
        }
    }
}

/// The time that a client gives its call: at most eight digits and a unit.
///
/// Source: grpc/grpc `doc/PROTOCOL-HTTP2.md`, Timeout.
fn grpc_timeout<T>(request: &Request<T>) -> Option<Duration> {
    let text = request.metadata().get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let amount: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(amount.saturating_mul(3600))),
        "M" => Some(Duration::from_secs(amount.saturating_mul(60))),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for Service {
    async fn server_live(&self, _: Request<ServerLiveRequest>) -> Result<Response<ServerLiveResponse>, Status> {
        self.call("ServerLive", async { Ok(ServerLiveResponse { live: true }) }).await
    }

    async fn server_ready(&self, _: Request<ServerReadyRequest>) -> Result<Response<ServerReadyResponse>, Status> {
        let ready =
            async { Ok(ServerReadyResponse { ready: health::health(State(self.state.clone())).await.is_ok() }) };
        self.call("ServerReady", ready).await
    }

    async fn model_ready(&self, request: Request<ModelReadyRequest>) -> Result<Response<ModelReadyResponse>, Status> {
        let ModelReadyRequest { name, version } = request.into_inner();
        let ready = async {
            let info = ModelPath::new(name, version).find(&self.state)?;
            Ok(ModelReadyResponse { ready: metadata::check_ready(&self.state, &info).is_ok() })
        };
        self.call("ModelReady", ready).await
    }

    async fn server_metadata(
        &self,
        _: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        let metadata = ServerMetadataResponse {
            name: "eremois".to_string(),
            version: self.state.build.version.clone(),
            extensions: EXTENSIONS.iter().map(|name| name.to_string()).collect(),
        };
        self.call("ServerMetadata", async { Ok(metadata) }).await
    }

    async fn model_metadata(
        &self,
        request: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let ModelMetadataRequest { name, version } = request.into_inner();
        let metadata = async {
            let info = ModelPath::new(name, version).find(&self.state)?;
            let signature = Signature::main(&info);
            Ok(ModelMetadataResponse {
                name: info.name.to_string(),
                versions: vec![info.version.clone()],
                platform: platform(&info),
                inputs: signature.usual().iter().map(convert::metadata_of_input).collect(),
                outputs: signature.outputs.iter().map(convert::metadata_of_output).collect(),
            })
        };
        self.call("ModelMetadata", metadata).await
    }

    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Result<Response<ModelInferResponse>, Status> {
        self.call("ModelInfer", self.infer(request)).await
    }

    async fn model_config(
        &self,
        request: Request<ModelConfigRequest>,
    ) -> Result<Response<ModelConfigResponse>, Status> {
        let ModelConfigRequest { name, version } = request.into_inner();
        self.call("ModelConfig", async { self.config(ModelPath::new(name, version)) }).await
    }

    async fn model_statistics(
        &self,
        request: Request<ModelStatisticsRequest>,
    ) -> Result<Response<ModelStatisticsResponse>, Status> {
        let ModelStatisticsRequest { name, version } = request.into_inner();
        self.call("ModelStatistics", async { self.statistics(name, version) }).await
    }

    async fn repository_index(
        &self,
        request: Request<RepositoryIndexRequest>,
    ) -> Result<Response<RepositoryIndexResponse>, Status> {
        let model = |entry: repository::IndexEntry| ModelIndex {
            name: entry.name,
            version: entry.version,
            state: entry.state.to_string(),
            reason: entry.reason,
        };
        let work = async {
            let entries = repository::entries(&self.state, request.into_inner().ready).await?;
            Ok(RepositoryIndexResponse { models: entries.into_iter().map(model).collect() })
        };
        self.call("RepositoryIndex", work).await
    }

    async fn repository_model_load(
        &self,
        request: Request<RepositoryModelLoadRequest>,
    ) -> Result<Response<RepositoryModelLoadResponse>, Status> {
        let RepositoryModelLoadRequest { model_name, parameters, .. } = request.into_inner();
        let work = async {
            let options = load_options::of(&model_name, convert::load_parameters(parameters))?;
            repository::load_named(&self.state, model_name, options).await?;
            Ok(RepositoryModelLoadResponse {})
        };
        self.call("RepositoryModelLoad", work).await
    }

    async fn repository_model_unload(
        &self,
        request: Request<RepositoryModelUnloadRequest>,
    ) -> Result<Response<RepositoryModelUnloadResponse>, Status> {
        let work = async {
            repository::unload_named(&self.state, request.into_inner().model_name).await?;
            Ok(RepositoryModelUnloadResponse {})
        };
        self.call("RepositoryModelUnload", work).await
    }
}
