//! `eremois jobs` against a server, both as processes, and a batch whose only server is killed again and again.

#[allow(dead_code)]
#[path = "common/process.rs"]
mod process;

use std::collections::BTreeSet;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use process::{Client, Server};
use serde_json::{Value, json};

fn jobs(server: &Server, arguments: &[&str]) -> Output {
    let url = format!("http://{}/", server.address);
    Command::new(env!("CARGO_BIN_EXE_eremois"))
        .arg("jobs")
        .args(arguments)
        .args(["--url", &url])
        .current_dir(server.dir.path())
        .output()
        .expect("the binary runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn post(server: &Server, path: &str, content_type: &str, body: &str) -> Value {
    let head = format!("POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: {content_type}\r\n");
    let request = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
    let answer = Client::connect(server.address).unwrap().send(request.as_bytes()).unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    serde_json::from_str(&answer.body).unwrap()
}

/// The id of a batch of these lines.
fn batch(server: &Server, lines: &str) -> String {
    let form = format!(
        "--b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n{lines}\r\n\
         --b\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n--b--\r\n"
    );
    let file = post(server, "/v1/files", "multipart/form-data; boundary=b", &form);
    let body = json!({"input_file_id": file["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"});
    let batch = post(server, "/v1/batches", "application/json", &body.to_string());
    batch["id"].as_str().unwrap().to_string()
}

fn get(server: &Server, path: &str) -> Option<Value> {
    server.get(path).filter(|answer| answer.status == 200).map(|answer| serde_json::from_str(&answer.body).unwrap())
}

fn line(custom_id: usize) -> String {
    let body = json!({"input": process::text(custom_id % 20 + 1)});
    let line = json!({"custom_id": custom_id.to_string(), "method": "POST", "url": "/v1/embeddings", "body": body});
    format!("{line}\n")
}

#[test]
fn batches_are_listed_and_watched_until_they_end() {
    let server = Server::ready("");
    let none = jobs(&server, &["list"]);
    assert_eq!((none.status.code(), text(&none.stdout).as_str()), (Some(0), "no batches\n"));

    let good = batch(&server, &(0..40).map(line).collect::<String>());
    let watched = jobs(&server, &["watch", &good]);
    let said = text(&watched.stdout);
    assert_eq!(watched.status.code(), Some(0), "{said}{}", text(&watched.stderr));
    assert!(said.starts_with(&format!("{good} completed: 40 of 40 answered, 0 failed; output in file-")), "{said}");

    let bad = batch(&server, &(line(1) + "not json"));
    let watched = jobs(&server, &["watch", &bad]);
    assert_eq!(watched.status.code(), Some(1));
    assert!(text(&watched.stdout).contains("failed"), "{}", text(&watched.stdout));
    assert!(text(&watched.stderr).contains("line 2: not a JSON object"), "{}", text(&watched.stderr));

    let listed = text(&jobs(&server, &["list", "--limit", "5"]).stdout);
    let lines: Vec<&str> = listed.lines().collect();
    assert!(lines[0].starts_with("ID") && lines[1].starts_with(&bad) && lines[2].starts_with(&good), "{listed}");
    assert!(lines[2].contains("40/40"), "{listed}");
    assert_eq!(jobs(&server, &["list", "--limit", "1"]).stdout.iter().filter(|byte| **byte == b'\n').count(), 2);

    let unknown = jobs(&server, &["watch", "batch_019a7b2c3d4e7f80912a3b4c5d6e7f80"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(text(&unknown.stderr).contains("no batch has the id"), "{}", text(&unknown.stderr));
    assert_eq!(jobs(&server, &["watch", "a/../b"]).status.code(), Some(1));
}

/// What is in the files is read at the end, from a server that has seen nothing of how it came there.
#[test]
fn a_batch_outlives_kills_of_its_only_server() {
    const COUNT: usize = 800;
    let data = tempfile::tempdir().unwrap();
    let settings = format!("[database]\npath = {:?}\n[jobs]\nlease = \"1s\"\n", data.path());
    let mut server = Server::ready(&settings);
    let id = batch(&server, &(0..COUNT).map(line).collect::<String>());
    let path = format!("/v1/batches/{id}");
    let end = Instant::now() + 3 * process::LONG;
    let mut num_kills = 0;
    let done = loop {
        assert!(Instant::now() < end);
        let Some(batch) = get(&server, &path) else { continue };
        if !["validating", "in_progress", "finalizing"].contains(&batch["status"].as_str().unwrap()) {
            break batch;
        }
        // At first while the input is read, then further and further into it.
        let completed = batch["request_counts"]["completed"].as_u64().unwrap();
        if num_kills < 4 && completed >= num_kills * COUNT as u64 / 5 {
            server.signal("KILL");
            server.wait();
            server = Server::ready(&settings);
            num_kills += 1;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!((&done["status"], num_kills), (&json!("completed"), 4), "{done}");
    assert_eq!(done["request_counts"], json!({"total": COUNT, "completed": COUNT, "failed": 0}));
    drop(server);
    let server = Server::ready(&settings);
    let output = server.get(&format!("/v1/files/{}/content", done["output_file_id"].as_str().unwrap())).unwrap();
    let lines: Vec<Value> = output.body.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ids: BTreeSet<usize> = lines.iter().map(|line| line["custom_id"].as_str().unwrap().parse().unwrap()).collect();
    assert_eq!((lines.len(), ids), (COUNT, (0..COUNT).collect()));
}

#[test]
fn without_a_server_it_fails_at_once() {
    let address = process::free_address();
    let output = Command::new(env!("CARGO_BIN_EXE_eremois"))
        .args(["jobs", "watch", "batch_1", "--url", &format!("http://{address}")])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains(&address.to_string()), "{}", text(&output.stderr));
}
