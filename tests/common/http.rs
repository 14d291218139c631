//! The router as a function, over an engine with the fake model.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use candle_core::Device;
use eremois::api::{ApiSettings, ApiState, BuildInfo};
use eremois::inference::Inferences;
use eremois::inference::keep::{KeepSettings, Keeper, KeptInput, Scope};
use eremois::jobs::inference::Later;
use eremois::jobs::{JobSettings, Tasks};
use eremois::model::LoadedModel;
use eremois::model::load::load;
use eremois::model::manifest::ModelSpec;
use eremois::serve::control::Fixed;
use eremois::serve::policy::BatchLimits;
use eremois::serve::{Engine, Health, Settings};
use eremois::store::cache::Cache;
use eremois::store::durable::Durable;
use eremois::store::memory::Memory;
use eremois::store::work::Work;
use eremois::store::work::dispatch::LocalDispatch;
use eremois::store::work::memory::MemoryWork;
use http_body_util::BodyExt;
use serde_json::Value;
use tower::ServiceExt;

use super::fake::{self, Controls};

/// Longer than anything takes that goes well.
pub const LONG: Duration = Duration::from_secs(30);
pub const MAX_SEQ_LEN: usize = 64;

/// A server without a socket.
pub struct Server {
    pub router: Router,
    pub engine: Arc<Engine>,
    pub inferences: Arc<Inferences>,
    pub keeper: Arc<Keeper>,
    pub tasks: Tasks,
    /// Where results are kept, steered from a test.
    pub store: Arc<Memory>,
    pub controls: Arc<Controls>,
    pub starting: Arc<AtomicBool>,
    /// What the router stands on.
    pub state: ApiState,
}

/// An answer, whole.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

/// The body of a success in JSON.
#[track_caller]
pub fn ok(answer: &Answer) -> Value {
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert_eq!(answer.header("content-type"), "application/json");
    answer.json()
}

/// Asserts a status and what is said somewhere in the answer.
#[track_caller]
pub fn refused(answer: &Answer, status: u16, says: &str) {
    assert_eq!(answer.status.as_u16(), status, "{}", answer.text());
    assert!(answer.text().contains(says), "{} does not say `{says}`", answer.text());
}

/// Asserts a status and `{error}` alone, which says this: the Open Inference Protocol's and TensorFlow Serving's.
#[track_caller]
pub fn refused_plainly(answer: &Answer, status: u16, says: &str) {
    assert_eq!(answer.status.as_u16(), status, "{}", answer.text());
    assert_eq!(answer.header("content-type"), "application/json");
    let body = answer.json();
    assert_eq!(body.as_object().map(|fields| fields.len()), Some(1), "{body}");
    let message = body["error"].as_str().unwrap_or_else(|| panic!("{body}"));
    assert!(message.contains(says), "`{message}` does not say `{says}`");
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }
}

pub fn limits() -> BatchLimits {
    BatchLimits { max_batch_size: 8, max_batch_tokens: 256, max_queue_delay: Duration::ZERO, max_queue_size: 100 }
}

pub fn settings() -> ApiSettings {
    ApiSettings { max_body_bytes: 64 << 10, max_client_batch_size: 32, timeout: LONG, ..ApiSettings::default() }
}

/// A server of the model `fake`, ready, that computes everything.
pub async fn server(settings: ApiSettings, limits: BatchLimits) -> Server {
    server_with(settings, limits, None).await
}

/// As [`server`], with a cache and how long results stay in it.
pub async fn server_with(
    settings: ApiSettings,
    limits: BatchLimits,
    cache: Option<(Arc<dyn Cache>, Duration)>,
) -> Server {
    server_that_keeps(settings, limits, cache, Scope::Application).await
}

/// As [`server_with`], that keeps the results of these requests.
pub async fn server_that_keeps(
    settings: ApiSettings,
    limits: BatchLimits,
    cache: Option<(Arc<dyn Cache>, Duration)>,
    scope: Scope,
) -> Server {
    let jobs = JobSettings { is_durable: scope != Scope::None, ..JobSettings::default() };
    server_of(settings, limits, cache, scope, jobs, Arc::new(MemoryWork::default())).await
}

/// As [`server_that_keeps`], with background work in this store.
pub async fn server_of(
    settings: ApiSettings,
    limits: BatchLimits,
    cache: Option<(Arc<dyn Cache>, Duration)>,
    scope: Scope,
    jobs: JobSettings,
    work: Arc<dyn Work>,
) -> Server {
    let (model, controls) = fake::model("fake", MAX_SEQ_LEN);
    assembled((model, controls), settings, limits, cache, scope, (jobs, work)).await
}

/// A server of this model alone, that keeps nothing but what it is asked to.
pub async fn server_of_model(model: LoadedModel) -> Server {
    server_of_model_with((model, Arc::default()), None).await
}

/// As [`server_of_model`], with the handle on a fake model, a cache, and how long results stay in it.
pub async fn server_of_model_with(
    model: (LoadedModel, Arc<Controls>),
    cache: Option<(Arc<dyn Cache>, Duration)>,
) -> Server {
    let background = (JobSettings { is_durable: true, ..JobSettings::default() }, Arc::new(MemoryWork::default()) as _);
    let limits = BatchLimits { max_batch_tokens: 512, ..limits() };
    assembled(model, settings(), limits, cache, Scope::Application, background).await
}

async fn assembled(
    (model, controls): (LoadedModel, Arc<Controls>),
    settings: ApiSettings,
    limits: BatchLimits,
    cache: Option<(Arc<dyn Cache>, Duration)>,
    scope: Scope,
    (jobs, work): (JobSettings, Arc<dyn Work>),
) -> Server {
    let times = Settings {
        heartbeat_interval: Duration::from_secs(3600),
        retry_interval: Duration::from_millis(5),
        device_timeout: LONG,
        num_encoders: 2,
    };
    let engine = Arc::new(Engine::with_settings(None, times));
    engine.add(model, limits).unwrap();
    let starting = Arc::new(AtomicBool::new(false));
    let inferences = Arc::new(Inferences::new(engine.clone(), cache));
    let keep = KeepSettings { scope, input: KeptInput::Full, timeout: LONG };
    let store = Arc::new(Memory::default());
    let keeper = Arc::new(Keeper::new(inferences.clone(), Arc::new(Durable::local(store.clone())), keep));
    let tasks = Tasks { work, dispatch: Arc::new(LocalDispatch::default()) };
    let state = ApiState {
        engine: engine.clone(),
        control: Arc::new(Fixed),
        keeper: keeper.clone(),
        tasks: tasks.clone(),
        jobs: Arc::new(jobs),
        later: Arc::new(Later::start(keeper.clone(), tasks.clone())),
        settings: Arc::new(settings),
        metrics: Arc::new(|| "# no recorder here\n".to_string()),
        build: BuildInfo { version: "0.0.0".into(), commit: Some("abc".into()) },
        starting: starting.clone(),
    };
    let router = eremois::api::router(state.clone());
    let server = Server { router, engine, inferences, keeper, tasks, store, controls, starting, state };
    server.wait_for(|health| *health == Health::Ready).await;
    server
}

/// A server of a small model with random weights: a folder of `tests/fixtures`, for this task, called `m`.
pub async fn server_of_fixture(folder: &str, task: &str) -> Server {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(folder);
    let spec = ModelSpec { task: task.into(), ..ModelSpec::bare("m", dir) };
    server_of_model(load(&spec, &Device::Cpu).unwrap()).await
}

/// The usual one.
pub async fn plain() -> Server {
    server(settings(), limits()).await
}

impl Server {
    pub async fn wait_for(&self, wanted: impl Fn(&Health) -> bool) {
        let end = Instant::now() + LONG;
        while !self.engine.health().iter().all(|(_, health)| wanted(health)) {
            assert!(Instant::now() < end, "{:?}", self.engine.health());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    pub async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes().to_vec();
        Answer { status: parts.status, headers: parts.headers, body }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    /// Posts JSON as text, with more headers.
    pub async fn post_with(&self, path: &str, body: impl Into<Body>, headers: &[(&str, &str)]) -> Answer {
        let mut request = Request::post(path).header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.send(request.body(body.into()).unwrap()).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.post_with(path, body.to_string(), &[]).await
    }
}
