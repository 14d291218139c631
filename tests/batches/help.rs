//! What the tests of files and batches share.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use eremois::api::internal::Internal;
use eremois::jobs::batch;
use eremois::jobs::runner::{Handler, Options, Outcome, Runner};
use eremois::store::work::memory::MemoryWork;
use eremois::store::work::{Claim, Document, DocumentKind, DocumentQuery, Hold, Task, TaskKind, Work};
use eremois::{Error, Result};
use jiff::Timestamp;
use parking_lot::Mutex;
use rand::Rng;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::common::http::{Answer, LONG, Server};

pub const BOUNDARY: &str = "a-line-between-fields";

/// A line of an input.
pub fn line(custom_id: &str, text: &str) -> String {
    let body = json!({"model": "fake", "input": text});
    let line = json!({"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body});
    format!("{line}\n")
}

/// Lines with the ids `id-0`, `id-1`, ...
pub fn input(count: usize, text: impl Fn(usize) -> String) -> String {
    (0..count).map(|i| line(&format!("id-{i}"), &text(i))).collect()
}

/// A form with a file and these fields.
pub fn form(file: &str, fields: &[(&str, &str)]) -> String {
    let part = |head: String, value: &str| {
        format!("--{BOUNDARY}\r\ncontent-disposition: form-data; {head}\r\n\r\n{value}\r\n")
    };
    let mut form =
        part("name=\"file\"; filename=\"lines.jsonl\"\r\ncontent-type: application/octet-stream".to_string(), file);
    for (name, value) in fields {
        form += &part(format!("name=\"{name}\""), value);
    }
    form + &format!("--{BOUNDARY}--\r\n")
}

pub async fn post_form(server: &Server, form: impl Into<Body>) -> Answer {
    let content_type = format!("multipart/form-data; boundary={BOUNDARY}");
    server.send(Request::post("/v1/files").header("content-type", content_type).body(form.into()).unwrap()).await
}

pub async fn post_file(server: &Server, file: &str, purpose: &str) -> Answer {
    post_form(server, form(file, &[("purpose", purpose)])).await
}

/// The id of a file with this content.
pub async fn upload(server: &Server, content: &str) -> String {
    let answer = post_file(server, content, "batch").await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    let file = answer.json();
    assert_eq!(file["bytes"].as_u64().unwrap(), content.len() as u64);
    file["id"].as_str().unwrap().to_string()
}

pub async fn create(server: &Server, body: Value) -> Value {
    let answer = server.post("/v1/batches", body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    answer.json()
}

/// A batch of this input.
pub async fn batch_of(server: &Server, content: &str, window: &str) -> Value {
    let file = upload(server, content).await;
    create(server, json!({"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": window})).await
}

/// The batch as soon as it is as wanted.
pub async fn until(server: &Server, made: &Value, wanted: impl Fn(&Value) -> bool) -> Value {
    let path = format!("/v1/batches/{}", made["id"].as_str().unwrap());
    let end = Instant::now() + 2 * LONG;
    loop {
        let answer = server.get(&path).await;
        // A store that fails at random does so here, too.
        if answer.status == StatusCode::OK {
            let batch = answer.json();
            if wanted(&batch) {
                return batch;
            }
            assert!(Instant::now() < end, "{batch}");
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The batch when it has ended.
pub async fn ended(server: &Server, made: &Value) -> Value {
    let is_final =
        |batch: &Value| ["completed", "failed", "expired", "cancelled"].contains(&batch["status"].as_str().unwrap());
    until(server, made, is_final).await
}

/// The lines of a file; none for null.
pub async fn lines_of(server: &Server, file: &Value) -> Vec<Value> {
    let Some(id) = file.as_str() else { return Vec::new() };
    let answer = server.get(&format!("/v1/files/{id}/content")).await;
    assert_eq!(
        (answer.status, answer.header("content-type")),
        (StatusCode::OK, "application/jsonl"),
        "{}",
        answer.text()
    );
    assert_eq!(answer.header("content-length"), answer.body.len().to_string());
    answer.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub fn custom_ids(lines: &[Value]) -> Vec<&str> {
    lines.iter().map(|line| line["custom_id"].as_str().unwrap()).collect()
}

/// Every request of [`input`] is in one of the files, once.
pub fn each_once(output: &[Value], errors: &[Value], count: usize) {
    let ids: Vec<&str> = custom_ids(output).into_iter().chain(custom_ids(errors)).collect();
    let unique: BTreeSet<&str> = ids.iter().copied().collect();
    assert_eq!((ids.len(), unique.len()), (count, count), "{} + {}", output.len(), errors.len());
    assert!((0..count).all(|i| unique.contains(format!("id-{i}").as_str())));
}

/// Checks a refusal in OpenAI's envelope. Returns its message.
pub fn refused(answer: &Answer, status: u16, kind: &str, field: &str) -> String {
    let body = answer.json();
    let error = &body["error"];
    assert_eq!((answer.status.as_u16(), error["code"].as_str()), (status, Some(kind)), "{body}");
    assert_eq!(error["param"].as_str().unwrap_or_default(), field, "{body}");
    error["message"].as_str().unwrap().to_string()
}

pub type Handlers = BTreeMap<TaskKind, Arc<dyn Handler>>;

/// Who does the tasks of batches on this server.
pub fn handlers(server: &Server) -> Handlers {
    let endpoints = Arc::new(Internal::new(server.state.clone()));
    batch::handlers(&server.state.tasks, &server.state.jobs, endpoints).into_iter().collect()
}

pub async fn run_task(server: &Server, handlers: &Handlers, kind: TaskKind, id: &str) {
    let claim = Claim {
        owner: "test".into(),
        now: Timestamp::now(),
        due_by: Timestamp::now(),
        lease: LONG,
        limit: 1,
        kinds: vec![kind],
        ids: Some(vec![id.to_string()]),
    };
    let tasks = server.state.tasks.work.claim(&claim).await.unwrap();
    assert_eq!(handlers[&kind].run(&tasks[0]).await.unwrap(), Outcome::Done);
    server.state.tasks.work.finish(id, "test").await.unwrap();
}

pub fn chunk_task(batch_id: &str, index: u32) -> Task {
    let payload = json!({"batch_id": batch_id, "index": index});
    let id = format!("{batch_id}:{index}");
    Task { id, kind: TaskKind::Chunk, payload, due_at: Timestamp::now(), attempts: 1 }
}

/// Runners of one server, as if they were processes.
pub struct Runners(Vec<(oneshot::Sender<Duration>, JoinHandle<()>)>);

impl Runners {
    pub fn start(server: &Server, count: usize) -> Self {
        let start = |_| {
            let (stop, stopped) = oneshot::channel();
            let look_interval = Duration::from_millis(20);
            let options = Options { max_concurrency: 2, lease: LONG, look_interval, ..Options::default() };
            let runner = Runner::new(server.state.tasks.clone(), handlers(server).into_iter().collect(), options);
            (stop, tokio::spawn(runner.run(stopped)))
        };
        Self((0..count).map(start).collect())
    }

    pub async fn stop(self) {
        for (stop, running) in self.0 {
            let _ = stop.send(LONG);
            running.await.unwrap();
        }
    }
}

/// Work in memory that yields at every call, may fail at random, and knows the parts it has.
#[derive(Default)]
pub struct Watched {
    work: MemoryWork,
    parts: Mutex<BTreeSet<(String, u32)>>,
    is_away: AtomicBool,
    /// Of a thousand calls so many fail, half of them after they have done what they were called for.
    failures: AtomicU32,
}

impl Watched {
    /// Names of parts, once for each part.
    pub fn parts(&self) -> Vec<String> {
        self.parts.lock().iter().map(|(name, _)| name.clone()).collect()
    }

    pub fn fail_always(&self, is_away: bool) {
        self.is_away.store(is_away, Ordering::SeqCst);
    }

    pub fn fail_sometimes(&self, per_thousand: u32) {
        self.failures.store(per_thousand, Ordering::SeqCst);
    }

    async fn call<T>(&self, done: impl Future<Output = Result<T>>) -> Result<T> {
        let away = || Error::StoreUnavailable { cause: "a test".into() };
        tokio::task::yield_now().await;
        let draw = rand::rng().random_range(0..1000);
        let failures = self.failures.load(Ordering::SeqCst);
        if self.is_away.load(Ordering::SeqCst) || draw < failures / 2 {
            return Err(away());
        }
        let done = done.await;
        tokio::task::yield_now().await;
        if draw < failures { Err(away()) } else { done }
    }
}

#[async_trait]
impl Work for Watched {
    async fn push(&self, tasks: &[Task]) -> Result<()> {
        self.call(self.work.push(tasks)).await
    }

    async fn claim(&self, claim: &Claim) -> Result<Vec<Task>> {
        self.call(self.work.claim(claim)).await
    }

    async fn renew(&self, id: &str, owner: &str, until: Timestamp) -> Result<Hold> {
        self.call(self.work.renew(id, owner, until)).await
    }

    async fn finish(&self, id: &str, owner: &str) -> Result<Hold> {
        self.call(self.work.finish(id, owner)).await
    }

    async fn postpone(&self, id: &str, owner: &str, due_at: Timestamp) -> Result<Hold> {
        self.call(self.work.postpone(id, owner, due_at)).await
    }

    async fn cancel(&self, id: &str) -> Result<bool> {
        self.call(self.work.cancel(id)).await
    }

    async fn num_tasks(&self) -> Result<Vec<(TaskKind, u64)>> {
        self.call(self.work.num_tasks()).await
    }

    async fn create(&self, document: &Document) -> Result<bool> {
        self.call(self.work.create(document)).await
    }

    async fn document(&self, kind: DocumentKind, id: &str) -> Result<Option<Document>> {
        self.call(self.work.document(kind, id)).await
    }

    async fn replace(&self, document: &Document) -> Result<bool> {
        self.call(self.work.replace(document)).await
    }

    async fn remove(&self, kind: DocumentKind, id: &str) -> Result<bool> {
        self.call(self.work.remove(kind, id)).await
    }

    async fn documents(&self, query: &DocumentQuery) -> Result<Vec<Document>> {
        self.call(self.work.documents(query)).await
    }

    async fn expired(&self, now: Timestamp, limit: usize) -> Result<Vec<Document>> {
        self.call(self.work.expired(now, limit)).await
    }

    async fn put_part(&self, file: &str, index: u32, bytes: &[u8]) -> Result<()> {
        let put = async {
            self.parts.lock().insert((file.to_string(), index));
            self.work.put_part(file, index, bytes).await
        };
        self.call(put).await
    }

    async fn part(&self, file: &str, index: u32) -> Result<Option<Vec<u8>>> {
        self.call(self.work.part(file, index)).await
    }

    async fn remove_parts(&self, file: &str) -> Result<()> {
        let remove = async {
            self.parts.lock().retain(|(name, _)| name != file);
            self.work.remove_parts(file).await
        };
        self.call(remove).await
    }
}
