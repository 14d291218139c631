//! 10,000 malformed requests: every answer is a refusal (or an answer, where a change left it valid), none
//! is a fault of ours, none takes long.

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::Request;
use common::http::{self, Answer, Server};
use eremois::api::ApiSettings;
use eremois::serve::policy::BatchLimits;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};

const NUM_MUTATED: usize = 10_000;
/// Far above what any takes: a body is at most 64 KiB and the model is a fake.
const LONGEST: Duration = Duration::from_secs(5);

/// Every route that reads a body, with valid ones to start from.
const VALID: &[(&str, &[&str])] = &[
    (
        "/v1/embeddings",
        &[
            r#"{"model": "fake", "input": ["w1 w2", "w3"], "encoding_format": "base64", "dimensions": 4, "user": "u"}"#,
            r#"{"input": [[1, 2], [3]], "encoding_format": "float"}"#,
        ],
    ),
    (
        "/embed",
        &[
            r#"{"inputs": ["w1", [2, 3]], "normalize": false, "truncate": true, "truncation_direction": "Left"}"#,
            r#"{"inputs": "\u00e9\ud83d\ude00 w1", "prompt_name": "query", "dimensions": 8}"#,
        ],
    ),
    ("/", &[r#"{"inputs": {"source_sentence": "w1", "sentences": ["w2"]}, "parameters": {"truncate": true}}"#]),
    ("/invocations", &[r#"{"inputs": [1, 2, 3]}"#]),
    (
        "/similarity",
        &[
            r#"{"inputs": {"source_sentence": "w1", "sentences": ["w2", "w3"]}, "parameters": {"prompt_name": "query"}}"#,
        ],
    ),
    (
        "/v2/models/fake/infer",
        &[
            r#"{"id": "1", "inputs": [{"name": "text", "shape": [2, 1], "datatype": "BYTES", "data": [["w1"], ["w2"]]}]}"#,
            r#"{"inputs": [{"name": "input_ids", "shape": [1, 2], "datatype": "INT64", "data": [1, 2]}], "parameters": {"truncate": true}}"#,
        ],
    ),
    ("/tokenize", &[r#"{"inputs": ["w1 w2", "w3"], "add_special_tokens": false, "prompt_name": "query"}"#]),
    ("/decode", &[r#"{"ids": [[1, 2], [3]], "skip_special_tokens": false}"#]),
];

/// What people and fuzzers send.
fn hand_written() -> Vec<Vec<u8>> {
    let mut bodies: Vec<Vec<u8>> = [
        "",
        " ",
        "\0",
        "null",
        "true",
        "0",
        "-0",
        "1e999",
        "\"\"",
        "[]",
        "{}",
        "{",
        "}",
        "[",
        "]",
        "{]",
        "nul",
        "NaN",
        "{\"input\"}",
        "{\"input\":}",
        "{\"input\":,}",
        "{input:1}",
        "{'input':'a'}",
        "{\"input\":\"a\",}",
        "\u{feff}{}",
        "{\"input\":\"a\"}{\"input\":\"a\"}",
        "{\"input\":\"\\ud800\"}",
        "{\"inputs\":\"\\udc00\\ud800\"}",
        "{\"input\":\"\\x41\"}",
        "{\"inputs\":\"\\u00\"}",
        "{\"inputs\":\"\n\"}",
        "{\"inputs\":\"\t\"}",
        "{\"input\":99999999999999999999999999}",
        "{\"inputs\":[99999999999999999999]}",
        "{\"inputs\":[-1]}",
        "{\"inputs\":[4294967296]}",
        "{\"inputs\":[1e3]}",
        "{\"inputs\":[[1,[2]]]}",
        "{\"inputs\":[null]}",
        "{\"input\":[[]]}",
        "{\"inputs\":[[]]}",
        "{\"input\":[\"\"]}",
        "{\"inputs\":{}}",
        "{\"ids\":[[]]}",
        "{\"ids\":{}}",
        "{\"input\":\"a\",\"input\":\"b\"}",
        "{\"input\":\"a\",\"dimensions\":-1}",
        "{\"input\":\"a\",\"dimensions\":1.5}",
        "{\"input\":\"a\",\"dimensions\":18446744073709551615}",
        "{\"input\":\"a\",\"dimensions\":18446744073709551616}",
        "{\"input\":\"a\",\"encoding_format\":\"\"}",
        "{\"input\":\"a\",\"encoding_format\":7}",
        "{\"input\":\"a\",\"model\":7}",
        "{\"input\":\"a\",\"model\":\"\"}",
        "{\"input\":\"a\",\"model\":\"../../etc/passwd\"}",
        "{\"inputs\":\"a\",\"truncate\":\"yes\"}",
        "{\"inputs\":\"a\",\"normalize\":1}",
        "{\"inputs\":\"a\",\"truncation_direction\":\"LEFT\"}",
        "{\"inputs\":\"a\",\"prompt_name\":[]}",
        "{\"inputs\":{\"source_sentence\":1,\"sentences\":[]}}",
        "{\"inputs\":{\"source_sentence\":\"a\",\"sentences\":\"b\"}}",
        "{\"inputs\":{\"source_sentence\":\"a\",\"sentences\":[[]]}}",
        "{\"inputs\":\"a\",\"parameters\":[]}",
        "<xml/>",
        "input=a&model=b",
        "--x\r\nContent-Disposition: form-data\r\n\r\n",
        "\u{1f4a5}",
        "{\"\\u0000\":\"\\u0000\"}",
        "[[[[[[[[[[]]]]]]]]]]",
    ]
    .iter()
    .map(|text| text.as_bytes().to_vec())
    .collect();
    // Bytes that are no UTF-8, in and out of strings.
    bodies.push(vec![0xff, 0xfe, 0x00]);
    for bad in [&[0x80u8][..], &[0xc0, 0xaf], &[0xed, 0xa0, 0x80], &[0xf5, 0x80, 0x80, 0x80], &[0xe2, 0x82]] {
        bodies.push([b"{\"input\":\"", bad, b"\",\"inputs\":\"", bad, b"\"}"].concat());
    }
    // Deep nesting, where it is parsed and where it is skipped.
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let deep = |n: usize| format!("{}1{}", open.repeat(n), close.repeat(n));
        for n in [100, 127, 128, 129, 5000] {
            bodies.push(deep(n).into_bytes());
            bodies.push(format!("{{\"input\":{},\"inputs\":{},\"ids\":{}}}", deep(n), deep(n), deep(n)).into_bytes());
            bodies.push(format!("{{\"unknown\":{}}}", deep(n)).into_bytes());
        }
        bodies.push(open.repeat(60_000 / open.len()).into_bytes());
    }
    // Long numbers, keys, texts; many inputs; more than the limit.
    bodies.push(format!("{{\"inputs\":[{}]}}", "9".repeat(50_000)).into_bytes());
    bodies.push(format!("{{\"inputs\":[1e{}]}}", "9".repeat(50_000)).into_bytes());
    bodies.push(format!("{{\"{}\":1}}", "k".repeat(50_000)).into_bytes());
    bodies.push(format!("{{\"input\":\"{0}\",\"inputs\":\"{0}\"}}", "w1 ".repeat(10_000)).into_bytes());
    bodies.push(format!("{{\"input\":\"{0}\",\"inputs\":\"{0}\"}}", "\\u0000".repeat(5_000)).into_bytes());
    bodies.push(format!("{{\"input\":\"a\",\"model\":\"{}\"}}", "m".repeat(50_000)).into_bytes());
    bodies.push(format!("{{\"inputs\":[{}\"a\"]}}", "\"a\",".repeat(10_000)).into_bytes());
    bodies.push(
        format!("{{\"inputs\":[{}[1]],\"ids\":[{}[1]]}}", "[1],".repeat(5_000), "[1],".repeat(5_000)).into_bytes(),
    );
    bodies.push(vec![b' '; 64 << 10]);
    bodies.push(vec![b'['; (64 << 10) + 1]);
    bodies
}

/// One change of a body.
#[derive(Debug, Clone)]
enum Change {
    Flip(usize, u8),
    Insert(usize, &'static str),
    Remove(usize, usize),
    Repeat(usize, usize, usize),
    Cut(usize),
    Swap(usize, usize),
}

const PIECES: &[&str] = &[
    "\"",
    "\\",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "null",
    "true",
    "-",
    "1e400",
    "0.5",
    "\\ud800",
    "\\u0000",
    "\0",
    "\u{7f}",
    "é",
    "\u{202e}",
    "99999999999999999999",
    "{\"a\":",
    "[[[[",
    "]]]]",
    "\"input\":",
    "\"inputs\":",
    "\"ids\":",
    "\"dimensions\":",
    "\"model\":",
    "\"truncate\":",
    "\n",
    "//",
    "\u{feff}",
];

fn change() -> impl Strategy<Value = Change> {
    let at = 0usize..200;
    prop_oneof![
        (at.clone(), any::<u8>()).prop_map(|(at, byte)| Change::Flip(at, byte)),
        (at.clone(), prop::sample::select(PIECES)).prop_map(|(at, piece)| Change::Insert(at, piece)),
        (at.clone(), 1usize..30).prop_map(|(at, len)| Change::Remove(at, len)),
        (at.clone(), 1usize..30, 1usize..40).prop_map(|(at, len, times)| Change::Repeat(at, len, times)),
        at.clone().prop_map(Change::Cut),
        (at.clone(), at).prop_map(|(a, b)| Change::Swap(a, b)),
    ]
}

fn apply(body: &mut Vec<u8>, change: &Change) {
    if body.is_empty() {
        return;
    }
    let len = body.len();
    match *change {
        Change::Flip(at, byte) => body[at % len] ^= byte,
        Change::Insert(at, piece) => {
            let at = at % len;
            body.splice(at..at, piece.bytes());
        }
        Change::Remove(at, n) => {
            let at = at % len;
            body.drain(at..(at + n).min(len));
        }
        Change::Repeat(at, n, times) => {
            let at = at % len;
            let piece = body[at..(at + n).min(len)].repeat(times);
            body.splice(at..at, piece);
        }
        Change::Cut(at) => body.truncate(at % len),
        Change::Swap(a, b) => body.swap(a % len, b % len),
    }
}

async fn server() -> Server {
    // A body of many copies must be refused for what it is, not for a queue made small for other tests.
    let limits = BatchLimits { max_queue_size: 10_000, ..http::limits() };
    http::server(ApiSettings { max_client_batch_size: 64, ..http::settings() }, limits).await
}

async fn send(server: &Server, path: &str, body: &[u8], headers: &[(&str, &str)]) -> Answer {
    let start = Instant::now();
    let answer = tokio::time::timeout(LONGEST, server.post_with(path, Body::from(body.to_vec()), headers)).await;
    let shown = || String::from_utf8_lossy(&body[..body.len().min(300)]).into_owned();
    let answer = answer.unwrap_or_else(|_| panic!("{path} hangs on {}", shown()));
    let status = answer.status.as_u16();
    assert!(status == 200 || (400..500).contains(&status), "{path}: {status} {} for {}", answer.text(), shown());
    assert!(start.elapsed() < LONGEST);
    let json = answer.json();
    if status != 200 {
        assert!(json.get("error").is_some(), "{path}: no envelope: {json}");
        assert!(answer.body.len() < 4096, "{path}: an error of {} bytes", answer.body.len());
    }
    answer
}

#[tokio::test]
async fn every_hand_written_body_is_refused_on_every_route() {
    let server = server().await;
    let mut accepted = Vec::new();
    for body in hand_written() {
        for (path, _) in VALID {
            let answer = send(&server, path, &body, &[]).await;
            if answer.status.is_success() {
                accepted.push(format!("{path} {}", String::from_utf8_lossy(&body[..body.len().min(40)])));
            }
        }
    }
    // A few are valid where unknown fields are ignored or an empty text has no tokens; the list must be a list
    // of refusals on the whole.
    assert!(accepted.len() < 25, "{accepted:#?}");
}

#[tokio::test]
async fn ten_thousand_mutated_bodies_are_refused_or_answered() {
    let server = server().await;
    let mut runner = TestRunner::new_with_rng(
        Config::default(),
        // The same bodies in every run: a failure is found again.
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    let seeds: Vec<(&str, &str)> =
        VALID.iter().flat_map(|(path, bodies)| bodies.iter().map(move |body| (*path, *body))).collect();
    let strategy = (prop::sample::select(seeds), prop::collection::vec(change(), 1..5));
    let mut statuses = BTreeMap::<u16, usize>::new();
    for _ in 0..NUM_MUTATED {
        let ((path, seed), changes) = strategy.new_tree(&mut runner).unwrap().current();
        let mut body = seed.as_bytes().to_vec();
        changes.iter().for_each(|change| apply(&mut body, change));
        let answer = send(&server, path, &body, &[]).await;
        *statuses.entry(answer.status.as_u16()).or_default() += 1;
    }
    println!("{statuses:?}");
    let refused: usize = statuses.iter().filter(|(status, _)| **status >= 400).map(|(_, n)| n).sum();
    assert!(refused > NUM_MUTATED / 2, "the mutations must hurt: {statuses:?}");
    // After all that it serves as before.
    for (path, bodies) in VALID {
        for body in *bodies {
            assert_eq!(send(&server, path, body.as_bytes(), &[]).await.status, 200, "{path} {body}");
        }
    }
}

#[tokio::test]
async fn odd_heads_are_refused() {
    let server = server().await;
    let long = "x".repeat(8000);
    for (name, value) in [
        ("content-type", "text/plain"),
        ("content-type", "application/json; charset=utf-16"),
        ("content-encoding", "gzip"),
        ("content-encoding", "br, gzip"),
        ("x-request-timeout", "-1"),
        ("x-request-timeout", "1e400"),
        ("x-request-timeout", "0"),
        ("x-request-timeout", &long),
        ("x-request-id", &long),
        ("content-length", "99999999999999999999"),
    ] {
        for (path, bodies) in VALID {
            let mut request = Request::post(*path);
            if name != "content-type" {
                request = request.header("content-type", "application/json");
            }
            let request = request.header(name, value).body(Body::from(bodies[0])).unwrap();
            let answer = server.send(request).await;
            let status = answer.status.as_u16();
            assert!(status == 200 || (400..500).contains(&status), "{path} {name}: {status} {}", answer.text());
        }
    }
    for path in [
        "/%00",
        "/%ff",
        "/v1/models/%ff%fe",
        "/v1/models/",
        "/..%2f..%2fetc/passwd",
        "/docs/../../x",
        "//",
        "/docs/%2e%2e",
    ] {
        let status = server.get(path).await.status.as_u16();
        assert!((400..500).contains(&status), "{path}: {status}");
    }
    let methods = ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"];
    for (path, _) in VALID {
        for method in methods {
            let request = Request::builder().method(method).uri(*path).body(Body::empty()).unwrap();
            assert_eq!(server.send(request).await.status.as_u16(), 405, "{method} {path}");
        }
    }
}
