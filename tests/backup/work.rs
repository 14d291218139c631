//! Background work: what was accepted and is not done goes on where it is restored.

use std::path::Path;
use std::time::Duration;

use eremois::store::Records;
use eremois::store::backup::piece::{Piece, PieceKind};
use eremois::store::embedded::Embedded;
use eremois::store::mongo::{MongoSettings, MongoStore};
use eremois::store::place::Place;
use eremois::store::work::{Claim, Document, DocumentKind, DocumentQuery, Hold, MAX_PART_BYTES, Task, TaskKind, Work};
use jiff::Timestamp;
use serde_json::json;

use super::{eremois, fill, folder, runtime, succeeds, text};
use crate::common::process::{Server, wait_for};
use crate::common::records::{record, sample};
use crate::common::servers::mongodb::MongoDb;

fn at(ms: i64) -> Timestamp {
    Timestamp::from_millisecond(1_700_000_000_000 + ms).unwrap()
}

fn task(id: &str, kind: TaskKind) -> Task {
    Task { id: id.into(), kind, payload: json!({"of": id, "texts": ["ü", 1]}), due_at: at(5), attempts: 0 }
}

fn document(kind: DocumentKind, id: &str, parent: Option<&str>) -> Document {
    let (parent, expires_at) = (parent.map(str::to_string), parent.map(|_| at(9)));
    Document { kind, id: id.into(), parent, expires_at, revision: 0, body: json!({"name": id}) }
}

fn claim(kinds: &[TaskKind], limit: usize) -> Claim {
    let lease = Duration::from_secs(600);
    Claim { owner: "one".into(), now: at(10), due_by: at(10), lease, limit, kinds: kinds.to_vec(), ids: None }
}

/// More of everything than a page has.
async fn work_on(store: &dyn Work) {
    let tasks: Vec<Task> = (0..600).map(|n| task(&format!("task {n:03}"), TaskKind::Chunk)).collect();
    store.push(&tasks).await.unwrap();
    // One is held and goes on being what it is; one is held and not wanted any more.
    store.push(&[task("held", TaskKind::Inference), task("cancelled", TaskKind::Callback)]).await.unwrap();
    for kind in [TaskKind::Inference, TaskKind::Callback] {
        assert_eq!(store.claim(&claim(&[kind], 1)).await.unwrap().len(), 1);
    }
    assert!(store.cancel("cancelled").await.unwrap());
    for n in 0..300 {
        assert!(store.create(&document(DocumentKind::Chunk, &format!("{n}"), Some("b"))).await.unwrap());
    }
    let mut batch = document(DocumentKind::Batch, "b", None);
    assert!(store.create(&batch).await.unwrap());
    (batch.revision, batch.body) = (1, json!({"done": 7}));
    assert!(store.replace(&batch).await.unwrap());
    assert!(store.create(&document(DocumentKind::File, "f", None)).await.unwrap());
    for index in 0..10 {
        store.put_part("f", index, &vec![index as u8; 1000]).await.unwrap();
    }
    store.put_part("f/1", 0, &vec![7; MAX_PART_BYTES]).await.unwrap();
}

/// All pieces, without what a store counts for itself.
fn pieces(place: &Place) -> Vec<Piece> {
    let runtime = runtime();
    let mut from = place.read(runtime.handle()).expect("it can be read");
    let mut pieces = Vec::new();
    for kind in PieceKind::ALL {
        loop {
            let page = from.next_pieces(kind).unwrap();
            if page.is_empty() {
                break;
            }
            for found in page {
                let mut piece = found.unwrap();
                assert_eq!(piece.kind(), kind);
                if let Piece::Document(document) = &mut piece {
                    document.revision = 0;
                }
                pieces.push(piece);
            }
        }
    }
    pieces
}

fn embedded(folder: &Path) -> Place {
    Place::Embedded(folder.to_path_buf())
}

#[test]
fn work_goes_from_one_store_into_the_other_and_back() {
    let Some(mongo) = MongoDb::start() else { return };
    let (from, dir, nowhere, back, without) = (folder(), folder(), folder(), folder(), folder());
    fill(from.path(), &[record(), sample()]);
    runtime().block_on(work_on(&Embedded::open(from.path()).unwrap()));
    let expected = pieces(&embedded(from.path()));
    assert_eq!(expected.len(), 601 + 302 + 11);
    let held = expected.iter().find(|piece| matches!(piece, Piece::Task(task) if task.id == "held"));
    assert_eq!(held, Some(&Piece::Task(Task { attempts: 1, ..task("held", TaskKind::Inference) })));

    let url = mongo.url();
    let setting = format!("database.url={url}");
    let settings = MongoSettings { url: url.clone(), pool_size: 4, replica_set: None, retention: Duration::ZERO };
    let database = Place::Mongo { settings: settings.clone(), journal: nowhere.path().join("journal") };
    let (first, second) = (dir.path().join("first.backup"), dir.path().join("second.backup"));
    let made = succeeds(from.path(), &[], &["backup", "--out", text(&first)]);
    assert_eq!(made.number_before(" tasks, documents and parts"), 914);
    succeeds(nowhere.path(), &[&setting], &["restore", text(&first)]);
    assert_eq!(pieces(&database), expected);
    succeeds(nowhere.path(), &[&setting], &["backup", "--out", text(&second)]);
    let told = succeeds(back.path(), &[], &["restore", text(&second)]);
    assert_eq!(told.number_before(" tasks, which go on"), 601);
    assert_eq!(pieces(&embedded(back.path())), expected);
    let verified = succeeds(back.path(), &[], &["verify", "--backup", text(&first)]);
    assert_eq!(verified.number_before(" tasks, documents and parts"), 914);

    // What was held is free: its holder is not there.
    runtime().block_on(async {
        let restored = Embedded::open(back.path()).unwrap();
        let claimed = restored.claim(&claim(&[TaskKind::Inference], 9)).await.unwrap();
        assert_eq!((claimed.len(), claimed[0].attempts), (1, 2));
        assert_eq!(restored.finish("held", "one").await, Ok(Hold::Held));
        let restored = MongoStore::new(settings).unwrap();
        let query = DocumentQuery { kind: DocumentKind::Batch, parent: None, after: None, limit: 9 };
        assert_eq!(restored.documents(&query).await.unwrap()[0].body, json!({"done": 7}));
    });

    let left = succeeds(without.path(), &[], &["restore", text(&first), "--without-work"]);
    assert_eq!(left.number_before(" tasks, documents and parts of files are left out"), 914);
    assert_eq!(pieces(&embedded(without.path())), []);
    let until = Timestamp::now().to_string();
    let left = succeeds(without.path(), &[], &["restore", text(&first), "--until", &until, "--dry-run"]);
    assert_eq!(left.number_before(" tasks, documents and parts of files are left out"), 914);
}

#[test]
fn what_is_there_already_is_not_done_twice() {
    let (from, dir) = (folder(), folder());
    runtime().block_on(work_on(&Embedded::open(from.path()).unwrap()));
    let path = dir.path().join("a.backup");
    succeeds(from.path(), &[], &["backup", "--out", text(&path)]);
    let before = pieces(&embedded(from.path()));
    runtime().block_on(async {
        let store = Embedded::open(from.path()).unwrap();
        let mut batch = store.document(DocumentKind::Batch, "b").await.unwrap().unwrap();
        batch.body = json!({"done": 8});
        assert!(store.replace(&batch).await.unwrap());
    });
    succeeds(from.path(), &[], &["restore", text(&path), "--merge"]);
    let after = pieces(&embedded(from.path()));
    assert_eq!(after.len(), before.len());
    let is_later = |piece: &&Piece| matches!(piece, Piece::Document(document) if document.body == json!({"done": 8}));
    assert_eq!(after.iter().filter(is_later).count(), 1, "what came since stays");
}

#[test]
fn damaged_work_is_found() {
    let (store, dir) = (folder(), folder());
    runtime().block_on(work_on(&Embedded::open(store.path()).unwrap()));
    let conn = rusqlite::Connection::open(store.path().join("eremois.db")).unwrap();
    conn.execute_batch(
        "UPDATE payloads SET payload = '{' WHERE seq = (SELECT seq FROM tasks WHERE id = 'task 007');
         DELETE FROM payloads WHERE seq = (SELECT seq FROM tasks WHERE id = 'task 008');
         UPDATE documents SET body = '{' WHERE id = '9';
         UPDATE documents SET kind = 'song' WHERE id = '10';",
    )
    .unwrap();
    drop(conn);
    let found = eremois(store.path(), &[], &["verify"]);
    assert_eq!((found.code, found.number_before(" faults:")), (1, 4), "{}", found.stdout);
    for name in ["task task 007", "task task 008", "chunk 9", "song 10"] {
        assert!(found.stdout.contains(&format!("  {name} cannot be read")), "{name}: {}", found.stdout);
    }
    let path = dir.path().join("a.backup");
    let failed = eremois(store.path(), &[], &["backup", "--out", text(&path)]);
    assert!(failed.code == 1 && failed.stderr.contains("cannot be read") && !path.exists(), "{}", failed.stderr);
    let made = succeeds(store.path(), &[], &["backup", "--out", text(&path), "--skip-damaged"]);
    assert_eq!(made.number_before(" could not be read"), 4);
}

#[test]
fn an_inference_that_waited_is_computed_where_it_is_restored() {
    let (data, dir, to) = (folder(), folder(), folder());
    let settings = |path: &Path| format!("[database]\npath = {path:?}\n[ai]\nmax_batch_tokens = 256\n");
    // A task with its record, as a server leaves them that ends before it comes to it.
    let server = Server::ready(&settings(data.path()));
    let body = json!({"input": ["to be computed", "elsewhere"], "mode": "async", "user": "u-1"}).to_string();
    let head = "POST /api/v1/inferences HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n";
    let request = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
    let mut client = crate::common::process::Client::connect(server.address).unwrap();
    let answer = client.send(request.as_bytes()).expect("an answer");
    assert_eq!(answer.status, 202, "{answer:?}");
    let id = serde_json::from_str::<serde_json::Value>(&answer.body).unwrap()["id"].as_str().unwrap().to_string();
    let done = wait_for("the result", || {
        let found = server.get(&format!("/api/v1/inferences/{id}")).filter(|found| found.body.contains("succeeded"));
        found.map(|found| found.body)
    });
    drop(server);
    runtime().block_on(async {
        let store = Embedded::open(data.path()).unwrap();
        let id = id.parse().unwrap();
        let mut record = store.get(&id).await.unwrap().unwrap();
        store.delete(&id).await.unwrap();
        record.output = None;
        record.facts.status = eremois::store::record::Status::Queued;
        record.facts.completed_at = None;
        record.facts.output_norms = None;
        store.put(&[record.clone()]).await.unwrap();
        let eremois::store::record::StoredInput::Full(inputs) = &record.facts.input else { panic!("an input") };
        let payload = json!({"inputs": inputs, "parameters": record.facts.parameters});
        let task = Task { id: record.id.to_string(), kind: TaskKind::Inference, payload, due_at: at(0), attempts: 0 };
        store.push(&[task]).await.unwrap();
    });
    let path = dir.path().join("a.backup");
    succeeds(data.path(), &[], &["backup", "--out", text(&path)]);
    succeeds(to.path(), &[], &["restore", text(&path)]);
    let server = Server::ready(&settings(to.path()));
    let again = wait_for("the result", || {
        let found = server.get(&format!("/api/v1/inferences/{id}")).filter(|found| found.body.contains("succeeded"));
        found.map(|found| found.body)
    });
    let output = |body: &str| serde_json::from_str::<serde_json::Value>(body).unwrap()["output"].clone();
    assert_eq!(output(&again), output(&done));
}
