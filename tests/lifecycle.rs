//! The life of the real binary on the bundled model: start, reload, drain, end.

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::process::{Answer, Client, LONG, Server, Unanswered, embeddings, text, wait_for};

/// A warm-up that is short even in a build without optimisation.
const SMALL: &str = "[ai]\nmax_batch_tokens = 256\n";

#[test]
fn is_alive_then_ready_then_says_what_to_type() {
    let mut server = Server::start(SMALL);
    let live = wait_for("the listener", || server.get("/health/live"));
    assert_eq!(live.status, 200);
    let alive_after = server.started.elapsed();
    let before = server.get("/health/ready").expect("it is alive");
    // While it loads it says so; on a fast machine it may be ready by now.
    assert!(before.status == 200 || before.status == 503 && before.body.contains("loading"), "{before:?}");
    wait_for("readiness", || server.get("/health/ready").filter(|answer| answer.status == 200));
    let ready_after = server.started.elapsed();
    println!("alive after {alive_after:?}, ready after {ready_after:?}");
    assert!(ready_after < LONG);

    let line = server.stdout.wait_for(&["serves all-MiniLM-L6-v2 on http://"]);
    assert!(line.contains(&server.address.to_string()), "{line}");
    server.stdout.wait_for(&["-d '{"]);
    let shown = server.stdout.all().join("\n");
    let body = shown.split_once("-d '").and_then(|(_, rest)| rest.split_once('\'')).expect("a curl with a body").0;
    let request = format!(
        "POST /v1/embeddings HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let answer =
        Client::connect(server.address).unwrap().send(request.as_bytes()).expect("the curl that is shown works");
    assert_eq!(answer.status, 200, "{answer:?}");

    let metrics = server.get("/metrics").expect("served").body;
    for name in ["eremois_build_info{", "process_cpu_seconds_total ", "eremois_queue_depth{", "_seconds_bucket{"] {
        assert!(metrics.contains(name), "no {name} in {metrics}");
    }
    server.signal("INT");
    assert_eq!(server.wait().code(), Some(0));
}

/// How a client of [`sigterm_under_load_loses_nothing`] saw its requests end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Answered,
    /// 200, and the signal had been sent before.
    AnsweredWhileDraining,
    Refused503,
    /// No connection, or a new one that ended before a byte came: the server never took the request.
    NotTaken,
}

#[test]
fn sigterm_under_load_loses_nothing() {
    const NUM_CLIENTS: usize = 16;
    let mut server = Server::ready(SMALL);
    let (address, signalled) = (server.address, AtomicBool::new(false));
    let ends = std::thread::scope(|scope| {
        let signalled = &signalled;
        let client = |seed: usize| {
            move || -> Vec<End> {
                let request = embeddings(&(0..1 + seed % 3).map(|i| text(8 + 5 * seed + i)).collect::<Vec<_>>());
                let mut ends = Vec::new();
                let mut kept: Option<Client> = None;
                loop {
                    let is_new = kept.is_none();
                    let mut client = match kept.take().map_or_else(|| Client::connect(address), Ok) {
                        Ok(client) => client,
                        Err(_) => {
                            ends.push(End::NotTaken);
                            return ends;
                        }
                    };
                    match client.send(&request) {
                        Ok(answer) => {
                            ends.push(end_of(&answer, signalled.load(Ordering::SeqCst)));
                            kept = (!answer.closes()).then_some(client);
                            if kept.is_none() {
                                // A refused client comes back soon, but leaves the server the cores to drain with.
                                std::thread::sleep(Duration::from_millis(5));
                            }
                        }
                        // On a connection kept alive nothing may vanish: the server had to say that it closes.
                        Err(Unanswered::Nothing(_)) if is_new => ends.push(End::NotTaken),
                        Err(lost) => panic!("a request was lost: {lost:?} (new connection: {is_new})"),
                    }
                }
            }
        };
        let clients: Vec<_> = (0..NUM_CLIENTS).map(|seed| scope.spawn(client(seed))).collect();
        std::thread::sleep(Duration::from_secs(2));
        signalled.store(true, Ordering::SeqCst);
        server.signal("TERM");
        assert_eq!(server.wait().code(), Some(0), "{:#?}", server.stderr.all());
        clients.into_iter().flat_map(|c| c.join().expect("no request is lost")).collect::<Vec<End>>()
    });
    let mut counts = BTreeMap::new();
    ends.iter().for_each(|end| *counts.entry(*end).or_insert(0usize) += 1);
    println!("{counts:?}");
    let count = |end| counts.get(&end).copied().unwrap_or(0);
    assert!(count(End::Answered) > 0, "no load before the signal: {counts:?}");
    assert!(count(End::AnsweredWhileDraining) > 0, "nothing was under way at the signal: {counts:?}");
    assert!(count(End::Refused503) > 0, "no new work was refused: {counts:?}");
    server.stderr.wait_for(&["drained: everything accepted was answered"]);
}

fn end_of(answer: &Answer, signalled: bool) -> End {
    match answer.status {
        200 if signalled => End::AnsweredWhileDraining,
        200 => End::Answered,
        503 => {
            assert!(signalled, "refused before the signal: {answer:?}");
            assert!(answer.closes(), "a draining server says that it closes: {answer:?}");
            End::Refused503
        }
        _ => panic!("neither an answer nor a refusal: {answer:?}"),
    }
}

/// Many inputs in small batches: seconds of work.
fn long_request() -> Vec<u8> {
    // Each another one: what is repeated in a request is computed once.
    embeddings(&(0..1000).map(|i| format!("{i} {}", text(199))).collect::<Vec<_>>())
}

#[test]
fn the_deadline_ends_a_drain_and_what_is_left_is_refused() {
    let mut server = Server::ready(&format!("[api]\ndrain_timeout = \"200ms\"\n{SMALL}"));
    let mut client = Client::connect(server.address).unwrap();
    let work = std::thread::spawn(move || client.send(&long_request()));
    wait_for("a batch", || {
        server
            .get("/metrics")
            .filter(|m| !m.body.contains("\neremois_queue_depth{model=\"all-MiniLM-L6-v2\",class=\"interactive\"} 0\n"))
    });
    let start = Instant::now();
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    let answer = work.join().unwrap().expect("an answer, not a cut");
    assert_eq!(answer.status, 503, "{answer:?}");
    server.stderr.wait_for(&["the time limit ended the drain"]);
}

#[test]
fn a_second_signal_ends_at_once() {
    let mut server = Server::ready(SMALL);
    let mut client = Client::connect(server.address).unwrap();
    std::thread::spawn(move || client.send(&long_request()));
    wait_for("a batch", || {
        server
            .get("/metrics")
            .filter(|m| !m.body.contains("\neremois_queue_depth{model=\"all-MiniLM-L6-v2\",class=\"interactive\"} 0\n"))
    });
    server.signal("TERM");
    server.stderr.wait_for(&["draining"]);
    let start = Instant::now();
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(1));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn a_signal_while_loading_ends_at_once() {
    let mut server = Server::start("");
    wait_for("the listener", || server.get("/health/live"));
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn limits_change_while_it_serves() {
    let mut server = Server::ready(&format!("{SMALL}max_batch_size = 4\n"));
    // The file changes: new limits, with old and new in the log.
    server.write_settings(&format!("[api]\ntimeout = \"7s\"\n{SMALL}max_batch_size = 9\n"));
    server.stderr.wait_for(&["setting changed", "ai.max_batch_size", "old=\"4\"", "new=\"9\""]);
    server.stderr.wait_for(&["WARN", "next start", "api.timeout", "old=\"\\\"30s\\\"\"", "new=\"\\\"7s\\\"\""]);
    server.stderr.wait_for(&["batching limits changed", "all-MiniLM-L6-v2", "max_batch_size: 9"]);

    // A bad file changes nothing and says why.
    server.write_settings("[ai]\nmax_batch_size = 0\nmax_batch_tokns = 1\n");
    server.stderr.wait_for(&["ERROR", "not reloaded", "eremois.toml:2: ai.max_batch_size"]);
    server.stderr.wait_for(&["ERROR", "not reloaded", "eremois.toml:3: ai.max_batch_tokns"]);

    // SIGHUP reads the same file again, and a good one is taken against what was last in force.
    server.signal("HUP");
    wait_for("both faults again", || {
        (server.stderr.all().iter().filter(|line| line.contains("not reloaded")).count() >= 4).then_some(())
    });
    server.write_settings("[ai]\nmax_batch_tokens = 256\nmax_batch_size = 5\n[log]\nfilter = \"debug\"\n");
    server.stderr.wait_for(&["setting changed", "ai.max_batch_size", "old=\"9\"", "new=\"5\""]);
    server.stderr.wait_for(&["setting changed", "log.filter"]);
    let answer = Client::connect(server.address).unwrap().send(&embeddings(&[text(3)])).expect("it still serves");
    assert_eq!(answer.status, 200);
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn json_logs_are_json_and_carry_the_request_id() {
    let mut server = Server::ready(&format!("{SMALL}[log]\nformat = \"json\"\n"));
    let request = String::from_utf8(embeddings(&[text(3)])).unwrap();
    let request = request.replace("host: test\r\n", "host: test\r\nx-request-id: id-of-the-client\r\n");
    let answer = Client::connect(server.address).unwrap().send(request.as_bytes()).expect("answered");
    assert!(answer.head.contains("x-request-id: id-of-the-client"), "{answer:?}");
    server.stderr.wait_for(&["id-of-the-client", "/v1/embeddings"]);
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(0));
    for line in server.stderr.all() {
        let event: serde_json::Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert!(event["timestamp"].is_string() && event["level"].is_string(), "{line}");
    }
    assert!(server.stdout.all().is_empty(), "{:?}", server.stdout.all());
}
