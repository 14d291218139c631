//! The one place where parts are joined and drained.
//!
//! Start: settings, listener, then models. The listener answers from the first moment, so that probes
//! see a server that is alive and not ready. End: readiness off and new work refused, the queue emptied,
//! connections finished, all within `api.drain_timeout`. A model whose last device is lost to the process
//! ends the server in the same order, only sooner.

mod connections;
mod gpus;
mod grpc;
mod inferences;
mod jobs;
pub mod logs;
mod models;
mod reload;
mod store;
pub mod warm;

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::net::TcpListener;

use crate::api::internal::Internal;
use crate::api::{self, ApiSettings, ApiState, BuildInfo};
use crate::config::words::LogFormat;
use crate::config::{Loaded, Settings, Sources};
use crate::inference::keep::Keeper;
use crate::inference::{self, Inferences};
use crate::jobs::Tasks;
use crate::jobs::inference::Later;
use crate::jobs::sweep::Sweep;
use crate::metrics::{BUILD, Metrics, UPKEEP_INTERVAL};
use crate::model::ModelInfo;
use crate::model::signature::Modality;
use crate::ops::monitor;
use crate::serve::control::ModelControl;
use crate::serve::{self, Engine, Health};
use crate::{Error, Result};
use connections::Connections;
use grpc::Grpc;
use logs::Logs;
use reload::Reloader;

/// What a server is made of.
pub struct Parts {
    pub sources: Sources,
    pub loaded: Loaded,
    pub logs: Logs,
    pub metrics: Metrics,
}

/// Where a server's models come from: the settings' repository, or whatever else a program serves.
pub struct Models {
    /// Answers requests that name none.
    pub default_model: Option<String>,
    pub load: Box<Load>,
    pub apply: Box<Apply>,
    /// Loads and unloads while the server runs.
    pub control: Arc<dyn ModelControl>,
}

/// Adds every model to the engine. Blocks: reads all weights.
pub type Load = dyn FnOnce(&Arc<Engine>) -> Result<()> + Send;

/// Puts changed settings of models and their batching limits in force.
pub type Apply = dyn Fn(&Settings, &Arc<Engine>) + Send;

/// How long a draining server goes on answering 503 after its queue is empty: clients with open
/// connections learn from an answer, not from a reset, and load balancers see that it is not ready.
const FAREWELL: Duration = Duration::from_millis(500);

/// What connections may take to finish when the drain has used up its time.
const LAST_WRITES: Duration = Duration::from_millis(500);

/// What background tasks that run may take to finish when a server ends; then they are given back.
const JOBS_DRAIN: Duration = Duration::from_secs(1);

/// How often the state of the models is looked at until they are ready.
const READY_POLL: Duration = Duration::from_millis(5);

/// What a server with a model without devices may take for what its other models' still compute, at most: it is needed
/// anew, not to the end.
const LOST_DRAIN: Duration = Duration::from_secs(5);

/// Serves the settings' models on `listener` until `shutdown` completes, then drains.
///
/// Errors: those of finding and loading the models, and [`Error::DeviceLost`] where a model's last device was lost to this
/// process; then nothing is served any more.
pub async fn run(listener: TcpListener, parts: Parts, shutdown: impl Future<Output = ()>) -> Result<()> {
    let models = models::of(&parts.loaded.settings)?;
    run_models(listener, parts, models, shutdown).await
}

/// As [`run`], with models from anywhere.
pub async fn run_models(
    listener: TcpListener,
    parts: Parts,
    models: Models,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let start = Instant::now();
    let Parts { sources, loaded: Loaded { settings, .. }, logs, metrics } = parts;
    let Models { default_model, load, apply, control } = models;
    let engine_settings = serve::Settings {
        heartbeat_interval: settings.ai.heartbeat_interval,
        device_timeout: settings.ai.device_timeout,
        ..serve::Settings::default()
    };
    let engine = Arc::new(Engine::with_settings(default_model, engine_settings));
    serve::metrics::describe();
    crate::store::describe_metrics();
    inference::describe_metrics();
    crate::jobs::describe_metrics();
    api::describe_metrics();
    api::grpc::describe_metrics();
    monitor::describe();
    models::describe_metrics();
    let inferences = Arc::new(inferences::build(&engine, &settings.cache)?);
    let kept = store::build(&inferences, &settings).await?;
    let tasks = jobs::tasks(&kept, &settings)?;

    let address = reachable(&listener)?;
    // True until every model is added; the API's probes read it.
    let starting = Arc::new(AtomicBool::new(true));
    let state = api_state(&engine, control, &kept.keeper, &tasks, &settings, &metrics, &starting);
    let handlers =
        jobs::handlers(&kept.keeper, &tasks, &settings.jobs, &state.jobs, Arc::new(Internal::new(state.clone())));
    let sweep = Sweep::new(tasks.clone(), state.jobs.clone());
    let grpc = Grpc::start(settings.api.grpc_listen, &state).await?;
    let router = api::router(state);
    let jobs = jobs::Running::start(handlers, tasks, &settings.jobs, starting.clone());
    let connections = Connections::serve(listener, router);
    let reloader = Reloader {
        sources,
        current: settings.clone(),
        logs,
        apply: {
            let engine = engine.clone();
            move |new: &Settings| apply(new, &engine)
        },
    };
    let background = [
        tokio::spawn(warm::at_start(inferences.clone(), kept.keeper.clone(), starting.clone(), settings.cache.warm.0)),
        tokio::spawn(upkeep(metrics, inferences)),
        tokio::spawn(reloader.run()),
        tokio::spawn(sweep.run()),
        tokio::spawn(gpus::watch(engine.clone(), starting.clone())),
    ];

    let load = tokio::task::spawn_blocking({
        let engine = engine.clone();
        move || load(&engine)
    });
    let serve = async {
        load.await.map_err(|e| Error::Internal { cause: format!("loading ended early: {e}") })??;
        starting.store(false, Ordering::Relaxed);
        wait_until_ready(&engine).await;
        announce(&settings, address, &engine, start.elapsed());
        // Nothing else ends a server but its shutdown.
        std::future::pending::<Result<()>>().await
    };
    let doors = Doors { connections, grpc };
    let served = tokio::select! {
        failed = serve => failed,
        () = shutdown => {
            drain(&engine, doors, jobs, &kept.keeper, settings.api.drain_timeout).await;
            // One that hangs has used up the drain's time, and whoever ends the process must not wait for it either.
            engine.loss().map_or(Ok(()), Err)
        }
        lost = engine.lost() => {
            drain(&engine, doors, jobs, &kept.keeper, settings.api.drain_timeout.min(LOST_DRAIN)).await;
            Err(lost)
        }
    };
    background.iter().for_each(|task| task.abort());
    served
}

fn api_state(
    engine: &Arc<Engine>,
    control: Arc<dyn ModelControl>,
    keeper: &Arc<Keeper>,
    tasks: &Tasks,
    settings: &Settings,
    metrics: &Metrics,
    starting: &Arc<AtomicBool>,
) -> ApiState {
    let api = &settings.api;
    let api_settings = ApiSettings {
        max_body_bytes: api.max_body_bytes.0,
        compress_above: api.compress_above.0,
        max_client_batch_size: api.max_client_batch_size,
        timeout: api.timeout,
        url: api.url.as_ref().map(|url| url.0.clone()),
        version: api.version.to_string(),
        callbacks: jobs::policy(&settings.jobs),
    };
    let metrics = metrics.clone();
    ApiState {
        engine: engine.clone(),
        control,
        keeper: keeper.clone(),
        tasks: tasks.clone(),
        jobs: Arc::new(jobs::settings(settings)),
        later: Arc::new(Later::start(keeper.clone(), tasks.clone())),
        settings: Arc::new(api_settings),
        metrics: Arc::new(move || metrics.render()),
        build: BuildInfo { version: BUILD.version.to_string(), commit: Some(BUILD.commit.to_string()) },
        starting: starting.clone(),
    }
}

async fn upkeep(metrics: Metrics, inferences: Arc<Inferences>) {
    let mut interval = tokio::time::interval(UPKEEP_INTERVAL);
    loop {
        interval.tick().await;
        metrics.upkeep();
        let inferences = inferences.clone();
        // A panic in there is logged by the runtime's hook, and the next turn comes.
        let _ = tokio::task::spawn_blocking(move || inferences.upkeep()).await;
    }
}

/// An address a client on this machine can use.
fn reachable(listener: &TcpListener) -> Result<SocketAddr> {
    let mut address = listener.local_addr().map_err(|e| Error::Internal { cause: e.to_string() })?;
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    Ok(address)
}

/// Completes when every model that was added has warmed up.
async fn wait_until_ready(engine: &Engine) {
    while engine.health().iter().any(|(_, health)| *health != Health::Ready) {
        tokio::time::sleep(READY_POLL).await;
    }
}

/// Tells where the server listens and what to type next.
fn announce(settings: &Settings, address: SocketAddr, engine: &Engine, took: Duration) {
    let names: Vec<String> = engine.models().iter().map(|info| info.name.to_string()).collect();
    let seconds = (took.as_secs_f64() * 1000.0).round() / 1000.0;
    tracing::info!(%address, models = names.join(", "), seconds, "ready");
    // In JSON the log is for machines, and so is everything around it.
    if settings.log.format == LogFormat::Human {
        let (path, body) = first_request(engine);
        let (media, option) = match body.starts_with('@') {
            true => ("image/png", "--data-binary"),
            false => ("application/json", "-d"),
        };
        println!("eremois {} serves {} on http://{address} (docs at /docs)", BUILD.version, names.join(", "));
        println!("Try it:");
        println!("  curl http://{address}{path} -H 'content-type: {media}' \\");
        println!("    {option} '{body}'");
    }
}

/// A request for what the default model does: its path and its body.
fn first_request(engine: &Engine) -> (String, String) {
    let Some(info) = engine.models().into_iter().next() else { return ("/v1/models".to_string(), String::new()) };
    let text = "The cat sits outside";
    if !info.signature.takes(Modality::Text) && info.signature.takes(Modality::Image) {
        return ("/".to_string(), "@image.png".to_string());
    }
    let (path, body) = match info.task.as_str() {
        "classify" => ("/predict", json!({"inputs": text})),
        "rerank" => ("/rerank", json!({"query": "Where is the cat?", "texts": [text, "It rains"]})),
        "sparse" => ("/embed_sparse", json!({"inputs": text})),
        "token_classify" => ("/", json!({"inputs": text, "parameters": {}})),
        "fill_mask" => {
            let mask = if !info.architecture.contains("roberta") && info.architecture != "camembert" {
                "[MASK]"
            } else {
                "<mask>"
            };
            ("/", json!({"inputs": format!("The cat sits {mask}"), "parameters": {}}))
        }
        "infer" => return (format!("/v1/models/{}:predict", info.name), json!({"inputs": zeros(&info)}).to_string()),
        _ => {
            let body = format!("{{\"model\": \"{}\", \"input\": \"{text}\"}}", info.name);
            return ("/v1/embeddings".to_string(), body);
        }
    };
    (path.to_string(), body.to_string())
}

/// One row of zeros for each input of a tensor model.
fn zeros(info: &ModelInfo) -> serde_json::Value {
    let nested = |shape: &[usize]| shape.iter().rev().fold(json!(0), |inner, &size| json!(vec![inner; size]));
    info.signature.inputs.iter().map(|input| (input.name.clone(), json!([nested(&input.shape)]))).collect()
}

/// Where requests come in.
struct Doors {
    connections: Connections,
    grpc: Option<Grpc>,
}

impl Doors {
    /// Closes all at once, for at most `limit`. Returns whether all finished.
    async fn close(self, limit: Duration) -> bool {
        let grpc = async {
            match self.grpc {
                Some(grpc) => grpc.close(limit).await,
                None => true,
            }
        };
        let (http, grpc) = tokio::join!(self.connections.close(limit), grpc);
        http && grpc
    }
}

/// Refuses new work, finishes what was accepted, closes the connections.
async fn drain(engine: &Engine, doors: Doors, jobs: jobs::Running, keeper: &Keeper, limit: Duration) {
    let start = Instant::now();
    tracing::info!(?limit, "draining: new work is refused with 503");
    // What is done in the background can be done by another server, or later: it ends first.
    jobs.end(JOBS_DRAIN.min(limit)).await;
    let num_lost = engine.drain(limit.saturating_sub(start.elapsed())).await;
    let left = |reserve: Duration| limit.saturating_sub(start.elapsed()).max(reserve);
    tokio::time::sleep(FAREWELL.min(left(Duration::ZERO))).await;
    let all_closed = doors.close(left(LAST_WRITES)).await;
    store::drain(keeper, left(LAST_WRITES)).await;
    let seconds = start.elapsed().as_secs_f64();
    if num_lost == 0 && all_closed {
        tracing::info!(seconds, "drained: everything accepted was answered");
    } else {
        tracing::warn!(seconds, num_lost, all_closed, ?limit, "the time limit ended the drain");
    }
}
