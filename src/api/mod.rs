//! HTTP: JSON types, handlers, layers in one list, the one status table.
//!
//! One file or folder per protocol (`app`, `cohere`, `openai`, `oip`, `rank`, `tei`, `tfs`), one for the routes operators and probes use (`health`),
//! one for the document of all of them (`docs`). What they share: `body` reads and checks a request,
//! `inputs` is the text-or-token-ids field, `tensors` are models' named ones, `forms` are those of embeddings, `write` makes JSON of floats, `status`
//! turns an error into an answer, `negotiate` reads what a client accepts, `compress` are bodies' codings, `observe` is
//! the outermost layer, `internal` sends what the process asks itself.

pub mod app;
pub mod docs;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod internal;
pub mod status;
mod watch;
pub mod write;

mod body;
mod cohere;
mod compress;
mod forms;
mod health;
mod images;
mod inputs;
mod negotiate;
mod observe;
mod oip;
mod openai;
mod phases;
mod prompts;
mod rank;
mod tei;
mod tensors;
mod tfs;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::Response;

use crate::inference::keep::Keeper;
use crate::jobs::batch::Batches;
use crate::jobs::callback::Policy;
use crate::jobs::files::Files;
use crate::jobs::inference::Later;
use crate::jobs::{JobSettings, Tasks};
use crate::serve::Engine;
use crate::serve::control::ModelControl;
use crate::{Error, Result};
use status::Fault;

pub use observe::describe_metrics;
pub use oip::grpc;

/// What the handlers stand on; made once, cloned per request (all of it is shared).
#[derive(Clone)]
pub struct ApiState {
    pub engine: Arc<Engine>,
    /// Loads and unloads models while the server runs.
    pub control: Arc<dyn ModelControl>,
    /// Computes, through the cache where there is one, and keeps results: what the handlers ask for embeddings.
    pub keeper: Arc<Keeper>,
    /// Where what is done later is handed in.
    pub tasks: Tasks,
    /// What files and batches may be.
    pub jobs: Arc<JobSettings>,
    /// Accepts inferences that are computed later.
    pub later: Arc<Later>,
    pub settings: Arc<ApiSettings>,
    /// The metrics in Prometheus' text format, for `/metrics`.
    pub metrics: Arc<dyn Fn() -> String + Send + Sync>,
    pub build: BuildInfo,
    /// True until all configured models are added to the engine; the app holds the other end. Until then
    /// the server is not ready, and a model not known is one not known yet.
    pub starting: Arc<AtomicBool>,
}

impl ApiState {
    fn is_starting(&self) -> bool {
        self.starting.load(Ordering::Relaxed)
    }

    fn files(&self) -> Files {
        Files::new(self.tasks.work.clone(), self.jobs.clone())
    }

    fn batches(&self) -> Batches {
        Batches::new(self.tasks.clone(), self.jobs.clone())
    }

    /// Errors: `Invalid` naming `field` where nothing is kept, and so nothing can be promised for later.
    fn check_durable(&self, field: &str) -> Result<()> {
        if self.jobs.is_durable {
            return Ok(());
        }
        let reason = "this server keeps neither files nor batches (database.record is `none`)".to_string();
        Err(Error::Invalid { field: field.to_string(), reason })
    }
}

/// The checked settings of `[api]` that concern requests.
#[derive(Debug, Clone)]
pub struct ApiSettings {
    /// Longest body of a request, in bytes. At least 1.
    pub max_body_bytes: usize,
    /// Answers of JSON longer than this are compressed where the client takes it, in bytes.
    pub compress_above: usize,
    /// Most inputs in one request. At least 1.
    pub max_client_batch_size: usize,
    /// Longest a request may take, and what it may take when it does not say: `x-request-timeout` asks for less.
    pub timeout: Duration,
    /// Where clients reach this server, for the OpenAPI document; `None` is the address they asked at.
    pub url: Option<String>,
    /// The API's version, for the OpenAPI document.
    pub version: String,
    /// Where callbacks may go; `None`: there are none.
    pub callbacks: Option<Policy>,
}

impl Default for ApiSettings {
    /// Body and inputs hold the largest request an OpenAI client sends: 2,048 inputs.
    fn default() -> Self {
        Self {
            max_body_bytes: 8 << 20,
            compress_above: 16 << 10,
            max_client_batch_size: 2048,
            timeout: Duration::from_secs(30),
            url: None,
            version: "v1".to_string(),
            callbacks: None,
        }
    }
}

/// What was built, for `/info` and the OpenAPI document.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BuildInfo {
    /// The package's version.
    pub version: String,
    /// The commit, `None` outside a git checkout.
    pub commit: Option<String>,
}

/// All routes over an engine. Models may be added to the engine before or after.
///
/// The order of the layers is the order a request passes them; each stands where it does for a reason.
pub fn router(state: ApiState) -> Router {
    Router::new()
        .merge(app::routes())
        .merge(openai::routes())
        .merge(tei::routes())
        .merge(rank::routes())
        .merge(oip::routes())
        .merge(tfs::routes())
        .merge(cohere::routes())
        .merge(health::routes())
        .merge(docs::routes())
        .fallback(no_route)
        .method_not_allowed_fallback(method_not_allowed)
        // 4. A panic in a handler becomes a fault like any other, so the layers above see it.
        .layer(from_fn(status::catch_panic))
        // 3. Faults get the envelope of the protocol asked, whoever made them.
        .layer(from_fn_with_state(state.clone(), status::render))
        // 2. What is answered is compressed as it goes out, with its time within that of the request.
        .layer(from_fn_with_state(state.clone(), compress::compress))
        // 1. First in, last out: the id, the clock, the log line and the counts cover all the rest.
        .layer(from_fn_with_state(state.clone(), observe::observe))
        .with_state(state)
}

async fn no_route(request: Request) -> Fault {
    Fault::NoRoute { path: request.uri().path().to_string() }
}

async fn method_not_allowed(request: Request) -> Response {
    tfs::method_not_allowed(&request)
}
