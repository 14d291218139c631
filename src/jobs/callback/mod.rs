//! Tells a client's URL of a result: signed, again and again until it is taken, and never to an address inside the
//! network unless the operator allows it.
//!
//! The headers and the signature are those of Standard Webhooks, so that clients can check them with its libraries.
//! Source: standard-webhooks/standard-webhooks `spec/standard-webhooks.md`.

pub mod guard;
pub mod sign;

use std::sync::Arc;
use std::time::Duration;

use ::metrics::{Unit, counter, describe_counter};
use async_trait::async_trait;
use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, StatusCode, Uri, header};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use jiff::{SignedDuration, Timestamp};

use super::runner::{Handler, Outcome};
use crate::store::Records;
use crate::store::durable::Durable;
use crate::store::record::{self, InferenceId, Record};
use crate::store::work::{Task, TaskKind};
use crate::{Error, Result};
use guard::{Guard, GuardedResolver};
use sign::Secret;

/// Longest URL that is taken, in bytes.
pub const MAX_URL_LEN: usize = 2048;

/// Registers help and unit of this file's metrics.
pub fn describe_metrics() {
    describe_counter!("eremois_callbacks_total", Unit::Count, "Tries to tell a client's URL of a result, by outcome");
}

/// How callbacks are sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// What one try may take, from the look-up of the name to the head of the answer.
    pub timeout: Duration,
    /// The pause after the first try; each further one is three times as long, up to `longest_pause`.
    pub first_pause: Duration,
    pub longest_pause: Duration,
    /// How long after the end of an inference its URL is told of it.
    pub give_up: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(15),
            first_pause: Duration::from_secs(2),
            longest_pause: Duration::from_secs(3600),
            give_up: Duration::from_secs(24 * 3600),
        }
    }
}

/// Where callbacks may go, and who vouches for them.
#[derive(Debug, Clone)]
pub struct Policy {
    pub secret: Secret,
    pub guard: Guard,
}

impl Policy {
    /// Whether this server would send to a URL, as far as can be told without asking for its name.
    ///
    /// Errors: `Invalid` and `TooLarge` naming `callback`.
    pub fn check(&self, url: &str) -> Result<()> {
        let field = "callback".to_string();
        if url.len() > MAX_URL_LEN {
            return Err(Error::TooLarge { field, got: url.len(), limit: MAX_URL_LEN, unit: "bytes" });
        }
        self.guard.check(url).map_err(|reason| Error::Invalid { field, reason })
    }
}

/// The task that tells of an inference.
pub fn task_of(id: &InferenceId) -> Task {
    Task {
        id: format!("callback:{id}"),
        kind: TaskKind::Callback,
        payload: serde_json::json!({ "inference": id.to_string() }),
        due_at: record::now(),
        attempts: 0,
    }
}

/// How an inference is written as JSON, with its output.
pub type Render = fn(&Record) -> Result<Vec<u8>>;

/// Sends callbacks.
pub struct Callback {
    store: Arc<Durable>,
    policy: Policy,
    options: Options,
    render: Render,
    client: Client<HttpsConnector<HttpConnector<GuardedResolver>>, Full<Bytes>>,
}

/// What came of a try.
enum Answer {
    Taken,
    /// It wants no more: 410.
    Gone,
    /// The reason, and when the client asks to be told again.
    Refused(String, Option<Duration>),
}

impl Callback {
    /// Sends what `store` holds, as `render` writes it.
    pub fn new(store: Arc<Durable>, policy: Policy, options: Options, render: Render) -> Self {
        let mut tcp = HttpConnector::new_with_resolver(GuardedResolver(policy.guard.clone()));
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(options.timeout));
        let tls = HttpsConnectorBuilder::new().with_webpki_roots().https_or_http().enable_http1().wrap_connector(tcp);
        let mut builder = Client::builder(TokioExecutor::new());
        // Each is another client's as a rule: nothing is won by keeping connections for long.
        let client = builder.pool_idle_timeout(Duration::from_secs(5)).pool_timer(TokioTimer::new()).build(tls);
        Self { store, policy, options, render, client }
    }

    async fn send(&self, record: &Record, url: &str) -> Answer {
        let refused = |reason: String| Answer::Refused(reason, None);
        // Once more: the settings may be others than those it was accepted under.
        if let Err(error) = self.policy.check(url) {
            return refused(error.to_string());
        }
        let (Ok(uri), Ok(body)) = (url.parse::<Uri>(), (self.render)(record)) else {
            return refused("neither the URL nor the body could be made".to_string());
        };
        // The same for every try, so that the client can tell a repetition.
        let id = format!("msg_{}", record.id.0.simple());
        let sent_at = Timestamp::now().as_second();
        let signature = self.policy.secret.sign(&id, sent_at, &body);
        let request = Request::post(uri)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::USER_AGENT, concat!("eremois/", env!("CARGO_PKG_VERSION")))
            .header("webhook-id", id)
            .header("webhook-timestamp", sent_at.to_string())
            .header("webhook-signature", signature)
            .body(Full::new(Bytes::from(body)));
        let request = match request {
            Ok(request) => request,
            Err(error) => return refused(error.to_string()),
        };
        match tokio::time::timeout(self.options.timeout, self.client.request(request)).await {
            Err(_) => refused(format!("no answer within {:?}", self.options.timeout)),
            Ok(Err(error)) => refused(chain(&error)),
            // The body of the answer means nothing, and is not read.
            Ok(Ok(answer)) => match answer.status() {
                StatusCode::GONE => Answer::Gone,
                status if status.is_success() => Answer::Taken,
                // A redirection too: where it leads was not what the client named.
                status => {
                    let wait = answer.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
                    let wait = wait.and_then(|seconds| seconds.trim().parse().ok()).map(Duration::from_secs);
                    Answer::Refused(format!("status {status}"), wait)
                }
            },
        }
    }

    fn pause(&self, attempts: u32) -> Duration {
        let factor = 3u32.saturating_pow(attempts.saturating_sub(1));
        self.options.first_pause.saturating_mul(factor).min(self.options.longest_pause)
    }
}

#[async_trait]
impl Handler for Callback {
    async fn run(&self, task: &Task) -> Result<Outcome> {
        let id: InferenceId = task.payload["inference"].as_str().unwrap_or_default().parse()?;
        // Without its record there is nothing to tell: it was deleted.
        let Some(record) = self.store.get(&id).await? else { return Ok(Outcome::Done) };
        let Some(url) = record.facts.callback.clone() else { return Ok(Outcome::Done) };
        let counted = |outcome| counter!("eremois_callbacks_total", "outcome" => outcome).increment(1);
        let (reason, wait) = match self.send(&record, &url).await {
            Answer::Taken => {
                counted("delivered");
                return Ok(Outcome::Done);
            }
            Answer::Gone => {
                counted("gone");
                return Ok(Outcome::Done);
            }
            Answer::Refused(reason, wait) => (reason, wait),
        };
        let ended = record.facts.completed_at.unwrap_or_else(|| id.created_at());
        let age = Timestamp::now().duration_since(ended);
        let pause = self.pause(task.attempts).max(wait.unwrap_or_default().min(self.options.longest_pause));
        if age > SignedDuration::try_from(self.options.give_up).unwrap_or(SignedDuration::MAX) {
            counted("given_up");
            tracing::warn!(%id, attempts = task.attempts, reason, "a callback was never taken: it is given up");
            return Ok(Outcome::Done);
        }
        counted("retried");
        tracing::info!(%id, attempts = task.attempts, reason, ?pause, "a callback was not taken: it is sent again");
        Ok(Outcome::Again(pause))
    }
}

/// An error with what caused it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
