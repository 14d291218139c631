//! The load generator against servers whose latency and faults are known.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Json, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use eremois::load::drive::{Limits, Live, Pace, Until};
use eremois::load::record::Failure;
use eremois::load::report::{Figures, Report};
use eremois::load::target::{Api, Target};
use eremois::load::texts::{self, Lengths};
use eremois::load::{Plan, run};
use serde_json::{Value, json};

/// What a server does with its `n`th request (from 0, the first request of a run included).
#[derive(Clone)]
struct Behaviour {
    delay: fn(usize) -> Duration,
    status: fn(usize) -> u16,
    /// Added to each value of the vectors.
    error: fn(usize) -> f32,
    /// Nobody is answered between these two times after the start.
    stall: Option<(Duration, Duration)>,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self { delay: |_| Duration::ZERO, status: |_| 200, error: |_| 0.0, stall: None }
    }
}

struct Server {
    address: SocketAddr,
    seen: Arc<AtomicUsize>,
    /// Dropping it ends the server's runtime and with it every connection.
    _runtime: tokio::runtime::Runtime,
}

#[derive(Clone)]
struct Shared {
    behaviour: Behaviour,
    seen: Arc<AtomicUsize>,
    start: Instant,
}

/// Starts a server of embeddings on threads of its own, so that it also answers a child process.
fn serve(behaviour: Behaviour) -> Server {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let seen = Arc::new(AtomicUsize::new(0));
    let shared = Shared { behaviour, seen: seen.clone(), start: Instant::now() };
    let router = Router::new().route("/v1/embeddings", post(openai)).route("/embed", post(tei)).with_state(shared);
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    runtime.spawn(async move { axum::serve(listener, router).await });
    Server { address, seen, _runtime: runtime }
}

/// The vectors of these inputs, or the status the behaviour asks for. A text's vector is made of its bytes.
async fn answer(shared: &Shared, inputs: &Value) -> Result<Vec<Vec<f32>>, Response> {
    let n = shared.seen.fetch_add(1, Ordering::SeqCst);
    if let Some((from, to)) = shared.behaviour.stall
        && (from..to).contains(&shared.start.elapsed())
    {
        tokio::time::sleep(to - shared.start.elapsed()).await;
    }
    tokio::time::sleep((shared.behaviour.delay)(n)).await;
    let status = StatusCode::from_u16((shared.behaviour.status)(n)).unwrap();
    if !status.is_success() {
        return Err((status, "no").into_response());
    }
    let texts = inputs.as_array().cloned().unwrap_or_else(|| vec![inputs.clone()]);
    let vector = |text: &Value| {
        let text = text.as_str().unwrap();
        let sum: u32 = text.bytes().map(u32::from).sum();
        vec![text.len() as f32, sum as f32 / 100.0, (shared.behaviour.error)(n)]
    };
    Ok(texts.iter().map(vector).collect())
}

async fn openai(State(shared): State<Shared>, Json(body): Json<Value>) -> Response {
    let rows = match answer(&shared, &body["input"]).await {
        Ok(rows) => rows,
        Err(refusal) => return refusal,
    };
    let data: Vec<Value> =
        rows.iter().enumerate().map(|(i, row)| json!({"object": "embedding", "index": i, "embedding": row})).collect();
    let usage = json!({"prompt_tokens": 7 * rows.len(), "total_tokens": 7 * rows.len()});
    Json(json!({"object": "list", "data": data, "model": "m", "usage": usage})).into_response()
}

async fn tei(State(shared): State<Shared>, Json(body): Json<Value>) -> Response {
    match answer(&shared, &body["inputs"]).await {
        Ok(rows) => Json(rows).into_response(),
        Err(refusal) => refusal,
    }
}

fn plan(address: SocketAddr, pace: Pace, until: Until) -> Plan {
    Plan {
        targets: vec![Target::new("a", &address.to_string(), Api::Openai, Some("m".into())).unwrap()],
        texts: texts::generate(40, Lengths::Uniform { min: 3, max: 20 }, 1),
        source: "test".into(),
        inputs_per_request: 1,
        truncate: false,
        paces: vec![pace],
        until,
        warmup: Duration::ZERO,
        rounds: 1,
        limits: Limits { timeout: Duration::from_secs(20), max_in_flight: 500, seed: 3 },
        verify: None,
        objectives: Vec::new(),
    }
}

fn carry_out(plan: Plan) -> eremois::Result<Report> {
    plan.check()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(run(plan, Arc::new(Live::default()), |_| ()))
}

fn figures(plan: Plan) -> Figures {
    carry_out(plan).unwrap().targets[0].steps[0].total.clone()
}

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

#[test]
fn a_closed_loop_sends_as_many_as_asked_and_tells_their_latencies() {
    // Every tenth takes 200 ms, the others 20 ms.
    let server = serve(Behaviour { delay: |n| if n % 10 == 9 { ms(200) } else { ms(20) }, ..Behaviour::default() });
    let got = figures(plan(server.address, Pace::Closed { concurrency: 4 }, Until::Requests(200)));
    assert_eq!((got.num_requests, got.num_ok), (200, 200));
    assert_eq!(server.seen.load(Ordering::SeqCst), 201, "200 and the first request that checks the target");
    let latency = got.latency_ms.unwrap();
    assert!(latency.min >= 20.0 && latency.min < 60.0, "{latency:?}");
    assert!(latency.p50 >= 20.0 && latency.p50 < 150.0, "{latency:?}");
    assert!(latency.p99 >= 199.0 && latency.p99 < 800.0, "{latency:?}");
    // 38 ms a request on average, four at once: 105 a second if the machine is not late.
    assert!(got.requests_per_s > 20.0 && got.requests_per_s < 106.0, "{}", got.requests_per_s);
    assert_eq!(got.tokens_per_s.map(|t| (t / got.requests_per_s).round()), Some(7.0));
    assert_eq!((got.max_in_flight, got.num_late), (4, 0));
}

#[test]
fn statuses_are_counted_and_refused_requests_are_no_latencies() {
    let server = serve(Behaviour {
        status: |n| if n % 5 == 4 { 503 } else { 200 },
        delay: |n| if n % 5 == 4 { Duration::ZERO } else { ms(10) },
        ..Behaviour::default()
    });
    let got = figures(plan(server.address, Pace::Closed { concurrency: 3 }, Until::Requests(99)));
    assert_eq!(got.statuses.iter().map(|(&s, &n)| (s, n)).collect::<Vec<_>>(), [(200, 79), (503, 20)]);
    assert!((got.error_rate - 20.0 / 99.0).abs() < 1e-9);
    assert!(got.latency_ms.unwrap().min >= 10.0, "a quick refusal was counted as a latency");
}

/// The point of an open loop: while the server stands still the users keep coming, and each one's wait is counted.
/// A loop that waits for answers would have sent one request in the stall and seen one long latency.
#[test]
fn a_stall_is_felt_by_everyone_who_came_meanwhile() {
    for max_in_flight in [500, 2] {
        let server = serve(Behaviour { stall: Some((ms(500), ms(1500))), ..Behaviour::default() });
        let mut plan = plan(server.address, Pace::Open { rate: 200.0 }, Until::Elapsed(ms(3000)));
        plan.limits.max_in_flight = max_in_flight;
        let got = figures(plan);
        assert!((500..700).contains(&got.num_requests), "600 expected: {}", got.num_requests);
        let unsent = got.failures.get(&Failure::Unsent).copied().unwrap_or(0);
        assert_eq!(got.num_ok + unsent, got.num_requests);
        let latency = got.latency_ms.unwrap();
        // A third came during the second of standing still, evenly: the 80th percentile waited 0.4 s, the 90th 0.7 s.
        assert!(latency.p90 >= 500.0 && latency.p99 >= 850.0, "{max_in_flight} at once: {latency:?}");
        if max_in_flight == 2 {
            assert!(got.num_late >= 100, "waiting for a connection is being late: {}", got.num_late);
            assert_eq!(got.max_in_flight, 2);
        }
    }
}

#[test]
fn an_overloaded_server_is_not_sent_more_than_the_bound() {
    let server = serve(Behaviour { delay: |_| ms(50), ..Behaviour::default() });
    let mut plan = plan(server.address, Pace::Open { rate: 1000.0 }, Until::Elapsed(ms(1000)));
    plan.limits.max_in_flight = 4;
    let got = figures(plan);
    assert!((850..1150).contains(&got.num_requests), "1000 expected: {}", got.num_requests);
    let unsent = got.failures[&Failure::Unsent];
    assert!(got.num_ok <= 84 && got.num_ok + unsent == got.num_requests, "{} and {unsent}", got.num_ok);
    assert_eq!(got.max_in_flight, 4);
    assert!(got.requests_per_s <= 80.0, "only what ended within the window counts: {}", got.requests_per_s);
}

#[test]
fn a_timeout_ends_the_wait_and_is_counted() {
    let server = serve(Behaviour { delay: |n| if n == 0 { ms(0) } else { ms(10_000) }, ..Behaviour::default() });
    let mut plan = plan(server.address, Pace::Closed { concurrency: 4 }, Until::Requests(8));
    plan.limits.timeout = ms(300);
    let start = Instant::now();
    let got = figures(plan);
    assert_eq!((got.failures[&Failure::Timeout], got.num_ok), (8, 0));
    assert!(got.latency_ms.is_none() && start.elapsed() < ms(8000));
}

/// Answers `num_whole` requests on one connection each, then cuts every answer in its middle.
fn cutting_server(num_whole: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for (i, stream) in listener.incoming().enumerate() {
            let mut stream = stream.unwrap();
            let mut buffer = [0; 4096];
            let _ = stream.read(&mut buffer);
            let body = "[[1.0]]";
            let sent = if i < num_whole { body } else { &body[..3] };
            let _ =
                write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{sent}", body.len());
        }
    });
    address
}

#[test]
fn an_answer_cut_short_is_a_reset() {
    // The check's connection, one of the step's, and from then on cuts.
    let address = cutting_server(2);
    let mut plan = plan(address, Pace::Closed { concurrency: 1 }, Until::Requests(6));
    plan.targets[0] = Target::new("a", &address.to_string(), Api::Tei, None).unwrap();
    let got = figures(plan);
    assert_eq!((got.num_ok, got.failures[&Failure::Reset], got.num_requests), (1, 5, 6));
}

#[test]
fn a_target_that_cannot_be_used_is_named_at_once() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap(); // closed again at the end of this line
    let refused = carry_out(plan(port, Pace::Closed { concurrency: 1 }, Until::Requests(1))).unwrap_err().to_string();
    assert!(refused.contains(&port.to_string()) && refused.contains("no connection"), "{refused}");
    let server = serve(Behaviour { status: |_| 404, ..Behaviour::default() });
    let missing = carry_out(plan(server.address, Pace::Closed { concurrency: 1 }, Until::Requests(1))).unwrap_err();
    assert!(missing.to_string().contains("404"), "{missing}");
}

#[test]
fn wrong_answers_are_found_in_every_format() {
    for api in [Api::Openai, Api::Tei] {
        // 40 texts, three passes: from the 61st request on each vector differs from its text's first.
        let server = serve(Behaviour { error: |n| if n > 60 { 0.5 } else { 0.0 }, ..Behaviour::default() });
        let mut plan = plan(server.address, Pace::Closed { concurrency: 1 }, Until::Requests(120));
        plan.targets[0] = Target::new("a", &server.address.to_string(), api, None).unwrap();
        plan.verify = Some(1e-3);
        let got = figures(plan);
        assert_eq!((got.num_wrong, got.num_ok, got.num_requests), (60, 60, 120), "{api}");
        assert!(got.wrong_examples[0].contains("differs by 0.5"), "{:?}", got.wrong_examples);
    }
}

#[test]
fn several_inputs_go_in_one_request() {
    let server = serve(Behaviour::default());
    let mut plan = plan(server.address, Pace::Closed { concurrency: 2 }, Until::Requests(50));
    plan.inputs_per_request = 7;
    plan.verify = Some(0.0);
    let got = figures(plan);
    assert_eq!((got.num_ok, got.num_wrong), (50, 0));
    assert_eq!((got.inputs_per_s / got.requests_per_s).round(), 7.0);
}

#[test]
fn targets_take_turns_and_are_compared() {
    let (quick, slow) = (
        serve(Behaviour { delay: |_| ms(10), ..Behaviour::default() }),
        serve(Behaviour { delay: |_| ms(60), ..Behaviour::default() }),
    );
    let mut plan = plan(quick.address, Pace::Closed { concurrency: 2 }, Until::Requests(20));
    plan.targets.push(Target::new("b", &slow.address.to_string(), Api::Tei, None).unwrap());
    plan.rounds = 3;
    plan.verify = Some(0.0);
    let report = carry_out(plan).unwrap();
    assert_eq!((quick.seen.load(Ordering::SeqCst), slow.seen.load(Ordering::SeqCst)), (61, 61));
    let compared = &report.comparisons[0];
    assert_eq!((compared.first.as_str(), compared.other.as_str(), compared.ratios.len()), ("a", "b", 3));
    assert!(compared.ratio > 1.5 && compared.min_ratio <= compared.ratio && compared.ratio <= compared.max_ratio);
    assert!(report.targets[1].min_cosine.unwrap() > 0.999999);
    assert_eq!((report.targets[0].min_cosine, report.targets[0].steps[0].rounds.len()), (None, 3));
}

// ---- the command ------------------------------------------------------------------------------------------------

fn bench(server: &Server, args: &[&str]) -> Output {
    let url = format!("http://{}", server.address);
    let mut command = Command::new(env!("CARGO_BIN_EXE_eremois"));
    command.args(["bench", "--url", &url, "--warmup", "0s", "--num-texts", "20"]).args(args).output().unwrap()
}

#[test]
fn the_exit_status_tells_a_missed_objective() {
    let server = serve(Behaviour { delay: |_| ms(20), ..Behaviour::default() });
    let requests = ["--requests", "30", "--concurrency", "3"];
    let with = |more: &[&str]| bench(&server, &[&requests[..], more].concat());
    let met = with(&["--p99", "10s", "--min-rate", "1", "--max-error-rate", "0%", "--verify"]);
    assert_eq!(met.status.code(), Some(0), "{met:?}");
    assert!(String::from_utf8_lossy(&met.stdout).contains("met: p99"));
    let missed = with(&["--p50", "5ms", "--max", "10s"]);
    assert_eq!(missed.status.code(), Some(2), "{missed:?}");
    let told = String::from_utf8_lossy(&missed.stderr).into_owned();
    assert!(told.contains("p50 missed") && !told.contains("max missed"), "{told}");
    let bad = bench(&server, &["--concurrency", "5:1:1"]);
    assert_eq!(bad.status.code(), Some(1), "{bad:?}");
    let nobody = Command::new(env!("CARGO_BIN_EXE_eremois")).args(["bench", "--url", "127.0.0.1:1"]).output().unwrap();
    assert_eq!(nobody.status.code(), Some(1), "{nobody:?}");
}

#[test]
fn the_json_report_has_the_keys_that_its_document_names() {
    let server = serve(Behaviour::default());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("report.json");
    let vs = format!("other=http://{},tei", server.address);
    let file_arg = file.to_str().unwrap();
    let args = ["--requests", "20", "--concurrency", "1:4:x2", "--vs", &vs, "--verify", "--p99", "9s"];
    let output = bench(&server, &[&args[..], &["--rounds", "2", "--json", file_arg]].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let report: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(report["schema"], "eremois-bench/1");
    let steps = report["targets"][0]["steps"].as_array().unwrap();
    assert_eq!(steps.iter().map(|s| s["load"].as_f64().unwrap()).collect::<Vec<_>>(), [1.0, 2.0, 4.0]);
    assert_eq!(steps[0]["rounds"].as_array().unwrap().len(), 2);
    assert_eq!(steps[0]["total"]["num_ok"], 40);
    assert_eq!(steps[0]["total"]["statuses"]["200"], 40);
    assert!(steps[0]["total"]["latency_ms"]["p99.9"].as_f64().unwrap() > 0.0);
    assert_eq!(report["comparisons"].as_array().unwrap().len(), 3);
    assert_eq!(report["objectives"].as_array().unwrap().len(), 6, "p99 and verify at each step");

    // Each key of the report stands in the document, so that nobody adds one silently.
    let document = std::fs::read_to_string("docs/bench.md").unwrap();
    let mut keys = Vec::new();
    collect_keys(&report, &mut keys);
    keys.retain(|key| key.parse::<u16>().is_err()); // the statuses
    for key in keys {
        assert!(document.contains(&format!("`{key}`")), "docs/bench.md does not explain the key `{key}`");
    }
}

fn collect_keys(value: &Value, keys: &mut Vec<String>) {
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| {
            keys.push(key.clone());
            collect_keys(value, keys);
        }),
        Value::Array(items) => items.iter().for_each(|item| collect_keys(item, keys)),
        _ => {}
    }
}

#[test]
fn texts_come_from_a_file_and_json_goes_to_standard_output() {
    let server = serve(Behaviour::default());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("texts.jsonl");
    std::fs::write(&file, "\"one\"\n{\"text\": \"two\"}\n").unwrap();
    let url = format!("http://{}", server.address);
    let args = ["bench", "--url", &url, "--api", "tei", "--texts", file.to_str().unwrap(), "--warmup", "0s"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_eremois"));
    let output = command.args(args).args(["--requests", "10", "--rate", "500", "--json", "-"]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    assert_eq!((&report["workload"]["num_texts"], &report["targets"][0]["api"]), (&json!(2), &json!("tei")));
    assert_eq!(report["targets"][0]["steps"][0]["loop_kind"], "open");
    assert_eq!(report["targets"][0]["steps"][0]["total"]["num_ok"], 10);
}
