//! Inferences that are accepted now and computed later, and what tells clients of them: over the fake model, with work in
//! memory.

mod common;

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use common::http::{self, Answer, Server, limits, plain, server};
use common::process::LONG;
use eremois::api;
use eremois::api::ApiSettings;
use eremois::jobs::callback::guard::Guard;
use eremois::jobs::callback::sign::Secret;
use eremois::jobs::callback::{Callback, Options as CallbackOptions, Policy};
use eremois::jobs::inference::{Inference, Later};
use eremois::jobs::runner::{Handler, Options, Runner};
use eremois::store::Records;
use eremois::store::record::Status;
use eremois::store::work::{Claim, TaskKind};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::oneshot;

const PATH: &str = "/api/v1/inferences";
const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

fn policy(networks: &[&str]) -> Policy {
    let networks = networks.iter().map(|network| network.parse().unwrap()).collect();
    Policy { secret: Secret::parse(SECRET).unwrap(), guard: Guard::new(networks) }
}

fn settings_with(policy: Policy) -> ApiSettings {
    ApiSettings { callbacks: Some(policy), ..http::settings() }
}

/// A runner of a server's tasks; it ends when this is dropped.
struct Running(#[allow(dead_code)] oneshot::Sender<Duration>);

fn run(server: &Server, policy: Option<Policy>) -> Running {
    let inference = Inference::new(server.keeper.clone(), server.tasks.clone(), api::status::failure_of);
    let mut handlers: Vec<(TaskKind, Arc<dyn Handler>)> = vec![(TaskKind::Inference, Arc::new(inference))];
    if let Some(policy) = policy {
        let options = CallbackOptions {
            timeout: Duration::from_secs(5),
            first_pause: Duration::from_millis(5),
            longest_pause: Duration::from_millis(20),
            ..CallbackOptions::default()
        };
        let store = server.keeper.store().clone();
        handlers.push((TaskKind::Callback, Arc::new(Callback::new(store, policy, options, api::app::render))));
    }
    let options = Options {
        look_interval: Duration::from_millis(20),
        lease: Duration::from_millis(300),
        backoff: (Duration::from_millis(5), Duration::from_millis(20)),
        ..Options::default()
    };
    let (stop, stopped) = oneshot::channel();
    tokio::spawn(Runner::new(server.tasks.clone(), handlers, options).run(stopped));
    Running(stop)
}

async fn accept(server: &Server, body: Value) -> (String, Answer) {
    let answer = server.post(PATH, body).await;
    assert_eq!(answer.status, StatusCode::ACCEPTED, "{}", answer.text());
    let id = answer.json()["id"].as_str().unwrap().to_string();
    assert_eq!(answer.header("location"), format!("{PATH}/{id}"));
    (id, answer)
}

async fn ended(server: &Server, id: &str) -> Value {
    let start = std::time::Instant::now();
    loop {
        let found = server.get(&format!("{PATH}/{id}")).await;
        assert_eq!(found.status, StatusCode::OK, "{}", found.text());
        let found = found.json();
        if found["status"] != "queued" {
            return found;
        }
        assert!(start.elapsed() < LONG, "{found}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn delete(server: &Server, path: &str) -> Answer {
    server.send(Request::delete(path).body(Body::empty()).unwrap()).await
}

async fn until<F: Future<Output = bool>>(what: &str, is_so: impl Fn() -> F) {
    let start = std::time::Instant::now();
    while !is_so().await {
        assert!(start.elapsed() < LONG, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn num_tasks(server: &Server) -> u64 {
    server.tasks.work.num_tasks().await.unwrap().iter().map(|(_, count)| count).sum()
}

#[tokio::test]
async fn what_is_accepted_is_computed_and_found() {
    let server = plain().await;
    let body = json!({"input": ["w1 w2", [7, 8]], "mode": "async", "user": "u", "metadata": {"k": "v"}, "parameters": {"dimensions": 4}});
    let (id, answer) = accept(&server, body.clone()).await;
    let queued = answer.json();
    assert_eq!(
        (&queued["status"], &queued["output"], &queued["stored"]),
        (&json!("queued"), &Value::Null, &json!(true))
    );
    assert_eq!(ended_now(&server, &id).await["status"], "queued");

    let _running = run(&server, None);
    let found = ended(&server, &id).await;
    assert_eq!(found["status"], "succeeded", "{found}");
    let mut at_once = body;
    at_once["mode"] = json!("sync");
    let at_once = server.post(PATH, at_once).await.json();
    for field in ["output", "model", "version", "user", "metadata", "parameters"] {
        assert_eq!(found[field], at_once[field], "{field}");
    }
    assert_eq!((&found["inputs"], &found["usage"]["tokens"]), (&json!(["w1 w2", [7, 8]]), &at_once["usage"]["tokens"]));
    let events = server.get(&format!("{PATH}/{id}/events")).await;
    assert!(events.text().contains("event: succeeded"), "{}", events.text());
    until("the task to be gone", async || num_tasks(&server).await == 0).await;
}

async fn ended_now(server: &Server, id: &str) -> Value {
    server.get(&format!("{PATH}/{id}")).await.json()
}

#[tokio::test]
async fn events_follow_it_to_its_end() {
    let server = plain().await;
    let (id, _) = accept(&server, json!({"input": "w1", "mode": "async"})).await;
    let path = format!("{PATH}/{id}/events");
    let (events, _running) = tokio::join!(server.get(&path), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        run(&server, None)
    });
    let text = events.text();
    let order: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("event: ")).collect();
    assert_eq!(order, ["queued", "succeeded"], "{text}");
}

#[tokio::test]
async fn a_key_is_accepted_once() {
    let server = plain().await;
    let post = |body: Value| {
        let server = &server;
        async move { server.post_with(PATH, body.to_string(), &[("idempotency-key", "k-1")]).await }
    };
    let body = json!({"input": "w1", "mode": "async"});
    let first = post(body.clone()).await;
    let second = post(body.clone()).await;
    assert_eq!((first.status, second.status), (StatusCode::ACCEPTED, StatusCode::ACCEPTED), "{}", second.text());
    assert_eq!(first.json()["id"], second.json()["id"]);
    assert_eq!((first.header("idempotency-replayed"), second.header("idempotency-replayed")), ("", "true"));
    // The same words to be computed now, or told to somebody, are another request.
    assert_eq!(post(json!({"input": "w1"})).await.status, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(post(json!({"input": "w2", "mode": "async"})).await.status, StatusCode::UNPROCESSABLE_ENTITY);

    let _running = run(&server, None);
    let id = first.json()["id"].as_str().unwrap().to_string();
    ended(&server, &id).await;
    let third = post(body).await;
    assert_eq!((third.status, third.json()["id"].as_str()), (StatusCode::OK, Some(id.as_str())));
    assert!(third.json()["output"]["embeddings"].is_array());
    assert_eq!(server.store.records().len(), 1);
}

#[tokio::test]
async fn what_cannot_be_computed_is_refused_at_once() {
    let server = server(settings_with(policy(&["10.0.0.0/8"])), limits()).await;
    let long = format!("https://example.com/{}", "x".repeat(2048));
    let cases = [
        (json!({"input": "w1", "mode": "async", "store": false}), 422, "mode"),
        (json!({"input": "w1", "mode": "later"}), 400, "mode"),
        (json!({"input": "w1", "mode": "async", "model": "none"}), 404, "model"),
        (json!({"input": "w1", "mode": "async", "parameters": {"dimensions": 1000}}), 422, "dimensions"),
        (json!({"input": "w1", "mode": "async", "parameters": {"prompt_name": "none"}}), 422, "prompt_name"),
        (json!({"input": "w1", "callback": "https://example.com/"}), 422, "callback"),
        (json!({"input": "w1", "mode": "async", "callback": "http://127.0.0.1/"}), 422, "callback"),
        (json!({"input": "w1", "mode": "async", "callback": "ftp://example.com/"}), 422, "callback"),
        (json!({"input": "w1", "mode": "async", "callback": long}), 413, "callback"),
    ];
    for (body, status, field) in cases {
        let answer = server.post(PATH, body.clone()).await;
        assert_eq!(
            (answer.status.as_u16(), answer.json()["field"].as_str()),
            (status, Some(field)),
            "{body}: {}",
            answer.text()
        );
    }
    assert!(server.store.records().is_empty());
    assert_eq!(num_tasks(&server).await, 0);
    accept(&server, json!({"input": "w1", "mode": "async", "callback": "http://10.1.2.3/"})).await;
    // A server without a key to sign with sends nothing.
    let answer =
        plain().await.post(PATH, json!({"input": "w1", "mode": "async", "callback": "https://example.com/"})).await;
    assert_eq!((answer.status, answer.json()["field"].as_str()), (StatusCode::UNPROCESSABLE_ENTITY, Some("callback")));
}

#[tokio::test]
async fn what_fails_says_why() {
    let server = plain().await;
    let long = vec!["w1"; http::MAX_SEQ_LEN + 1].join(" ");
    let (too_long, _) = accept(&server, json!({"input": ["w1", long], "mode": "async"})).await;
    let (broken, _) = accept(&server, json!({"input": "fail", "mode": "async"})).await;
    let (good, _) = accept(&server, json!({"input": "w3", "mode": "async"})).await;
    let _running = run(&server, None);
    let failed = ended(&server, &too_long).await;
    assert_eq!((&failed["status"], &failed["error"]["kind"]), (&json!("failed"), &json!("too_large")), "{failed}");
    assert_eq!((&failed["error"]["status"], &failed["error"]["field"]), (&json!(413), &json!("input[1]")), "{failed}");
    let failed = ended(&server, &broken).await;
    assert_eq!((&failed["error"]["kind"], &failed["error"]["status"]), (&json!("failed"), &json!(500)), "{failed}");
    assert!(!failed.to_string().contains("asked to fail"), "a cause from inside is told: {failed}");
    assert_eq!(ended(&server, &good).await["status"], "succeeded");
    until("the tasks to be gone", async || num_tasks(&server).await == 0).await;
}

#[tokio::test]
async fn what_is_deleted_before_it_is_computed_never_is() {
    let server = plain().await;
    let (waiting, _) = accept(&server, json!({"input": "w1", "mode": "async"})).await;
    assert_eq!(delete(&server, &format!("{PATH}/{waiting}")).await.status, StatusCode::NO_CONTENT);
    assert_eq!(num_tasks(&server).await, 0);

    // While it is computed.
    server.controls.hold();
    let (computed, _) = accept(&server, json!({"input": "w2", "mode": "async"})).await;
    let (erased, _) = accept(&server, json!({"input": "w3", "mode": "async", "user": "u"})).await;
    let _running = run(&server, None);
    let before = server.controls.num_seqs();
    until("a launch", async || server.controls.num_seqs() > before).await;
    assert_eq!(delete(&server, &format!("{PATH}/{computed}")).await.status, StatusCode::NO_CONTENT);
    assert_eq!(delete(&server, "/api/v1/users/u/inferences").await.json()["deleted"], json!(1));
    server.controls.release();
    until("the tasks to be gone", async || num_tasks(&server).await == 0).await;
    for id in [waiting, computed, erased] {
        until("it to be gone", async || server.get(&format!("{PATH}/{id}")).await.status == StatusCode::NOT_FOUND)
            .await;
    }
    assert!(server.store.records().is_empty());
}

#[tokio::test]
async fn a_record_whose_task_was_lost_is_computed() {
    let server = plain().await;
    let (id, _) = accept(&server, json!({"input": "w5", "mode": "async"})).await;
    // As a crash between the two leaves it.
    assert!(server.tasks.work.cancel(&id).await.unwrap());
    assert_eq!(num_tasks(&server).await, 0);
    let _running = run(&server, None);
    Later::find_lost(&server.keeper, &server.tasks, Duration::from_secs(60)).await.unwrap();
    assert_eq!(num_tasks(&server).await, 0, "it is too young to be lost");
    tokio::time::sleep(Duration::from_millis(5)).await;
    Later::find_lost(&server.keeper, &server.tasks, Duration::ZERO).await.unwrap();
    assert_eq!(ended(&server, &id).await["status"], "succeeded");
}

#[tokio::test]
async fn a_result_that_was_written_is_not_computed_again() {
    let server = plain().await;
    let (id, _) = accept(&server, json!({"input": "w6", "mode": "async"})).await;
    // A process takes the task, writes the result and dies before it ends the task.
    let now = eremois::store::record::now();
    let claim = Claim {
        owner: "dead".into(),
        now,
        due_by: now,
        lease: Duration::from_millis(1),
        limit: 1,
        kinds: vec![TaskKind::Inference],
        ids: None,
    };
    assert_eq!(server.tasks.work.claim(&claim).await.unwrap().len(), 1);
    let mut record = server.store.records().remove(0);
    record.facts.status = Status::Failed;
    server.keeper.store().put(&[record]).await.unwrap();
    let launched = server.controls.num_seqs();
    let _running = run(&server, None);
    until("the task to be gone", async || num_tasks(&server).await == 0).await;
    assert_eq!((server.controls.num_seqs(), ended(&server, &id).await["status"].as_str()), (launched, Some("failed")));
}

/// Headers and body of a request.
type Got = (HeaderMap, Vec<u8>);

/// Somebody's server, that answers with what it is told and remembers what it was sent.
#[derive(Clone, Default)]
struct Receiver {
    got: Arc<Mutex<Vec<Got>>>,
    /// Statuses of the answers, the last one for good.
    answers: Arc<Mutex<Vec<u16>>>,
}

impl Receiver {
    async fn start(answers: &[u16]) -> (Self, String) {
        let receiver = Self { answers: Arc::new(Mutex::new(answers.to_vec())), ..Self::default() };
        let state = receiver.clone();
        let take = move |headers: HeaderMap, body: axum::body::Bytes| async move {
            state.got.lock().push((headers, body.to_vec()));
            let mut answers = state.answers.lock();
            let status = if answers.len() > 1 { answers.remove(0) } else { answers[0] };
            let to = [("location", "/elsewhere")];
            (StatusCode::from_u16(status).unwrap(), to, "an answer that nobody reads")
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = axum::Router::new().fallback(take);
        tokio::spawn(async move { axum::serve(listener, router).await });
        (receiver, format!("http://localhost:{}/hook?x=1", address.port()))
    }
}

const LOOPBACK: &[&str] = &["127.0.0.0/8", "::1/128"];

#[tokio::test]
async fn a_callback_brings_the_result_until_it_is_taken() {
    let (receiver, url) = Receiver::start(&[500, 302, 503, 204]).await;
    let server = server(settings_with(policy(LOOPBACK)), limits()).await;
    let (id, answer) = accept(&server, json!({"input": "w1", "mode": "async", "callback": url})).await;
    assert_eq!(answer.json()["callback"], json!(url));
    let _running = run(&server, Some(policy(LOOPBACK)));
    until("the callback to be taken", async || num_tasks(&server).await == 0).await;
    let found = ended(&server, &id).await;
    let got = receiver.got.lock().clone();
    assert_eq!(got.len(), 4);
    for (headers, body) in &got {
        let text = |name: &str| headers[name].to_str().unwrap().to_string();
        let told: Value = serde_json::from_slice(body).unwrap();
        assert_eq!(
            (&told["id"], &told["status"], &told["output"]),
            (&found["id"], &json!("succeeded"), &found["output"])
        );
        assert_eq!((text("content-type"), text("webhook-id")), ("application/json".into(), id.replace("inf_", "msg_")));
        let sent_at: i64 = text("webhook-timestamp").parse().unwrap();
        let signature = Secret::parse(SECRET).unwrap().sign(&text("webhook-id"), sent_at, body);
        assert_eq!(text("webhook-signature"), signature);
    }
}

#[tokio::test]
async fn who_wants_no_callback_gets_no_more() {
    let (receiver, url) = Receiver::start(&[410]).await;
    let server = server(settings_with(policy(LOOPBACK)), limits()).await;
    accept(&server, json!({"input": "fail", "mode": "async", "callback": url})).await;
    let _running = run(&server, Some(policy(LOOPBACK)));
    until("the callback to be over", async || num_tasks(&server).await == 0).await;
    let got = receiver.got.lock().clone();
    assert_eq!(got.len(), 1);
    let told: Value = serde_json::from_slice(&got[0].1).unwrap();
    assert_eq!((&told["status"], &told["error"]["kind"]), (&json!("failed"), &json!("failed")));
}

#[tokio::test]
async fn a_name_that_leads_inside_is_not_reached() {
    let (receiver, url) = Receiver::start(&[204]).await;
    // The name is no address, so the request is taken; the look-up then says where it leads.
    let server = server(settings_with(policy(&[])), limits()).await;
    let (id, _) = accept(&server, json!({"input": "w1", "mode": "async", "callback": url})).await;
    let _running = run(&server, Some(policy(&[])));
    assert_eq!(ended(&server, &id).await["status"], "succeeded");
    let is_retried = async || server.tasks.work.num_tasks().await.unwrap() == [(TaskKind::Callback, 1)];
    until("the callback to wait", is_retried).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(receiver.got.lock().is_empty());
    // What was deleted is told to nobody.
    assert_eq!(delete(&server, &format!("{PATH}/{id}")).await.status, StatusCode::NO_CONTENT);
    until("the callback to be over", async || num_tasks(&server).await == 0).await;
}
