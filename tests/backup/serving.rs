//! Beside a server that works on the store.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use eremois::store::Records;
use eremois::store::embedded::Embedded;
use eremois::store::record::{InferenceId, Record, StoredOutput};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::{bytes_of, eremois, folder, runtime, succeeds, text};
use crate::common::process::{Client, Server, wait_for};
use crate::common::servers::mongodb::MongoDb;

const SMALL: &str = "[ai]\nmax_batch_tokens = 256\nmax_batch_size = 16\n";
const NUM_CLIENTS: usize = 4;

fn post(address: std::net::SocketAddr, body: &Value) -> Value {
    let mut client = Client::connect(address).expect("a connection");
    posted(&mut client, body)
}

fn posted(client: &mut Client, body: &Value) -> Value {
    let body = body.to_string();
    let head = "POST /api/v1/inferences HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n";
    let request = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
    let answer = client.send(request.as_bytes()).expect("an answer");
    assert_eq!(answer.status, 200, "{answer:?}");
    serde_json::from_str(&answer.body).expect("JSON")
}

/// What clients were answered.
type Answers = Arc<Mutex<Vec<Value>>>;

fn load(server: &Server, ends: &Arc<AtomicBool>) -> (Answers, Vec<std::thread::JoinHandle<()>>) {
    let answers = Answers::default();
    let threads = (0..NUM_CLIENTS).map(|number| {
        let (answers, ends, address) = (answers.clone(), ends.clone(), server.address);
        std::thread::spawn(move || {
            let mut client = Client::connect(address).expect("a connection");
            for n in 0.. {
                if ends.load(Ordering::Relaxed) {
                    return;
                }
                let body = json!({"input": [format!("text {n} of {number}"), "another"], "user": "load", "metadata": {"n": n.to_string()}});
                let answer = posted(&mut client, &body);
                answers.lock().push(answer);
            }
        })
    });
    let threads = threads.collect();
    (answers, threads)
}

/// The record of an answer, with the answer's values bit for bit.
fn record_of(store: &Embedded, answer: &Value) -> Record {
    let id: InferenceId = answer["id"].as_str().expect("an id").parse().expect("an id");
    let record = runtime()
        .block_on(store.get(&id))
        .expect("it reads")
        .unwrap_or_else(|| panic!("{id} was acknowledged and is gone"));
    let Some(StoredOutput::Embeddings(rows)) = &record.output else { panic!("an output") };
    let answered: Vec<Vec<f32>> = serde_json::from_value(answer["output"]["embeddings"].clone()).expect("numbers");
    let bits = |rows: &[Vec<f32>]| -> Vec<Vec<u32>> {
        rows.iter().map(|row| row.iter().map(|v| v.to_bits()).collect()).collect()
    };
    assert_eq!(bits(rows), bits(&answered));
    record
}

#[test]
fn a_backup_beside_a_busy_server_has_all_that_was_acknowledged() {
    let (data, dir, to) = (folder(), folder(), folder());
    let mut server = Server::ready(&format!("[database]\npath = {:?}\n{SMALL}", data.path()));
    let ends = Arc::new(AtomicBool::new(false));
    let (answers, threads) = load(&server, &ends);
    let num = |at_least| wait_for("some answers", || (answers.lock().len() >= at_least).then_some(()));
    num(60);
    let before = answers.lock().clone();
    let path = dir.path().join("busy.backup");
    let made = succeeds(data.path(), &[], &["backup", "--out", text(&path)]);
    let num_in_it = made.number_before(" records of the embedded store");
    assert!(num_in_it >= before.len() as u64, "{}", made.stdout);
    assert!(made.stdout.contains("all of one moment"), "{}", made.stdout);
    // The server goes on, and what it has is sound while it does.
    let after = answers.lock().len();
    num(after + 20);
    let checked = succeeds(data.path(), &[], &["verify", "--backup", text(&path)]);
    assert_eq!(checked.number_before(" the same"), num_in_it, "{}", checked.stdout);
    // Nobody else may write into it.
    let refused = eremois(data.path(), &[], &["restore", text(&path), "--merge"]);
    assert!(refused.code == 1 && refused.stderr.contains("another server, process "), "{}", refused.stderr);
    ends.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|thread| thread.join().expect("a client ends in order"));
    server.signal("TERM");
    assert!(server.wait().success());

    succeeds(to.path(), &[], &["restore", text(&path)]);
    let (source, restored) = (Embedded::open(data.path()).unwrap(), Embedded::open(to.path()).unwrap());
    assert_eq!(runtime().block_on(restored.count()).unwrap(), num_in_it);
    for answer in &before {
        let pair = [record_of(&source, answer), record_of(&restored, answer)];
        assert_eq!(bytes_of(&pair[..1]), bytes_of(&pair[1..]));
    }
}

#[test]
fn a_backup_of_mongodb_beside_a_busy_server_has_all_that_was_acknowledged() {
    let Some(mongo) = MongoDb::own() else { return };
    let (data, dir, to) = (folder(), folder(), folder());
    let url = mongo.url();
    let server = Server::ready(&format!("[database]\npath = {:?}\nurl = \"{url}\"\n{SMALL}", data.path()));
    let setting = format!("database.url={url}");
    let ends = Arc::new(AtomicBool::new(false));
    let (answers, threads) = load(&server, &ends);
    wait_for("some answers", || (answers.lock().len() >= 40).then_some(()));
    // Away for a while: results go to the journal, and leave it while the backup is made.
    mongo.daemon().kill();
    let num = answers.lock().len();
    wait_for("answers that the journal keeps", || (answers.lock().len() >= num + 40).then_some(()));
    assert!(mongo.daemon().start_again());
    let mut rounds = Vec::new();
    for round in 0..4 {
        let before = answers.lock().clone();
        let path = dir.path().join(format!("{round}.backup"));
        // MongoDB may still be on its way up.
        wait_for("a backup", || {
            (eremois(data.path(), &[&setting], &["backup", "--out", text(&path)]).code == 0).then_some(())
        });
        rounds.push((before, path));
    }
    let (before, last) = rounds.last().expect("four");
    let checked = succeeds(data.path(), &[&setting], &["verify", "--backup", text(last)]);
    assert!(checked.number_before(" the same") >= before.len() as u64, "{}", checked.stdout);
    ends.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|thread| thread.join().expect("a client ends in order"));
    for (round, (before, path)) in rounds.iter().enumerate() {
        let target = to.path().join(round.to_string());
        succeeds(&target, &[], &["restore", text(path)]);
        let restored = Embedded::open(&target).unwrap();
        before.iter().for_each(|answer| drop(record_of(&restored, answer)));
    }
}

#[test]
fn a_restored_store_is_served() {
    let (data, dir, to) = (folder(), folder(), folder());
    let settings = |path: &std::path::Path| format!("[database]\npath = {path:?}\n{SMALL}");
    let server = Server::ready(&settings(data.path()));
    let answer = post(server.address, &json!({"input": "kept", "user": "u-1"}));
    let path = dir.path().join("a.backup");
    succeeds(data.path(), &[], &["backup", "--out", text(&path)]);
    drop(server);
    succeeds(to.path(), &[], &["restore", text(&path)]);
    let server = Server::ready(&settings(to.path()));
    let id = answer["id"].as_str().unwrap();
    let found = server.get(&format!("/api/v1/inferences/{id}")).expect("an answer");
    assert_eq!(found.status, 200, "{found:?}");
    let found: Value = serde_json::from_str(&found.body).unwrap();
    assert_eq!(found["output"], answer["output"]);
}

#[test]
fn a_store_that_a_killed_server_left_is_read_as_it_is() {
    let (data, dir) = (folder(), folder());
    let mut server = Server::ready(&format!("[database]\npath = {:?}\n{SMALL}", data.path()));
    let answers: Vec<Value> = (0..20).map(|n| post(server.address, &json!({"input": format!("text {n}")}))).collect();
    server.signal("KILL");
    server.wait();
    // The log is not in the file yet, and nobody is there who would bring it.
    let path = dir.path().join("a.backup");
    let made = succeeds(data.path(), &[], &["backup", "--out", text(&path)]);
    assert_eq!(made.number_before(" records of the embedded store"), answers.len() as u64);
    succeeds(data.path(), &[], &["verify", "--backup", text(&path)]);
}

#[test]
fn migrate_leaves_a_store_in_use_alone() {
    let data = folder();
    let _server = Server::ready(&format!("[database]\npath = {:?}\n{SMALL}", data.path()));
    let looked = succeeds(data.path(), &[], &["migrate", "--check"]);
    assert!(looked.stdout.contains("is as it must be"), "{}", looked.stdout);
    let refused = eremois(data.path(), &[], &["migrate"]);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("another server, process "), "{}", refused.stderr);
}
