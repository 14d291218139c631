//! `eremois jobs`: the batches of a server, and how far one is.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use serde::Deserialize;

use super::{FAILURE, fail};
use crate::{Error, Result};

/// What `eremois jobs` can do.
#[derive(Debug, Subcommand)]
pub enum JobsCommand {
    /// List the batches of a server, newest first.
    List {
        #[command(flatten)]
        server: Server,
        /// How many.
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        limit: u32,
    },
    /// Show how far a batch is until it has ended; exits 0 if it is completed, 1 if it ended otherwise.
    Watch {
        #[command(flatten)]
        server: Server,
        /// The id of the batch.
        batch_id: String,
    },
}

/// Whom to ask.
#[derive(Debug, Args)]
pub struct Server {
    /// Where the server is.
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
}

/// What one answer may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Between two looks at a batch.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// How long a server may be away while a batch is watched: it may be starting anew.
const PATIENCE: Duration = Duration::from_secs(120);

/// Batches of one page.
const PAGE: u32 = 100;

/// Where there is no terminal: between two lines on the same status.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Runs one of them.
pub fn run(command: JobsCommand) -> ExitCode {
    let done = match command {
        JobsCommand::List { server, limit } => list(&Client::new(&server.url), limit).map(|()| ExitCode::SUCCESS),
        JobsCommand::Watch { server, batch_id } => watch(&Client::new(&server.url), &batch_id),
    };
    done.unwrap_or_else(|error| fail(&error))
}

/// A batch, as far as it is shown.
#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Batch {
    id: String,
    status: String,
    endpoint: String,
    created_at: i64,
    request_counts: Counts,
    output_file_id: Option<String>,
    error_file_id: Option<String>,
    errors: Option<Faults>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
struct Counts {
    total: u64,
    completed: u64,
    failed: u64,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Faults {
    data: Vec<Fault>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Fault {
    line: Option<u64>,
    message: String,
}

impl Batch {
    fn is_final(&self) -> bool {
        matches!(self.status.as_str(), "failed" | "completed" | "expired" | "cancelled")
    }

    fn num_done(&self) -> u64 {
        self.request_counts.completed + self.request_counts.failed
    }

    /// One line.
    fn summary(&self) -> String {
        let Counts { total, completed, failed } = self.request_counts;
        let mut summary = format!("{} {}: {completed} of {total} answered, {failed} failed", self.id, self.status);
        for (what, id) in [("output", &self.output_file_id), ("errors", &self.error_file_id)] {
            if let Some(id) = id {
                summary += &format!("; {what} in {id}");
            }
        }
        summary
    }
}

#[derive(Deserialize)]
struct Page {
    data: Vec<Batch>,
    has_more: bool,
}

/// Asks a server.
struct Client {
    agent: ureq::Agent,
    url: String,
}

/// Why there is no answer.
enum Unanswered {
    /// It may be there later.
    Away(String),
    /// The server has said so.
    Refused(String),
}

impl From<Unanswered> for Error {
    fn from(unanswered: Unanswered) -> Self {
        let (Unanswered::Away(fault) | Unanswered::Refused(fault)) = unanswered;
        Self::Config { faults: vec![fault] }
    }
}

impl Client {
    fn new(url: &str) -> Self {
        let config = ureq::Agent::config_builder().timeout_global(Some(TIMEOUT)).http_status_as_error(false).build();
        Self { agent: config.into(), url: url.trim_end_matches('/').to_string() }
    }

    fn get<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T, Unanswered> {
        let url = format!("{}{path}", self.url);
        let away = |e: &dyn std::fmt::Display| Unanswered::Away(format!("{url}: {e}"));
        let mut response = self.agent.get(&url).call().map_err(|e| away(&e))?;
        let status = response.status();
        let text = response.body_mut().read_to_string().map_err(|e| away(&e))?;
        if status.is_server_error() {
            return Err(away(&status));
        }
        if !status.is_success() {
            let body: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
            let message = body["error"]["message"].as_str().map_or(status.to_string(), str::to_string);
            return Err(Unanswered::Refused(format!("{url}: {message}")));
        }
        serde_json::from_str(&text).map_err(|e| Unanswered::Refused(format!("{url}: not an answer of this API: {e}")))
    }
}

fn list(client: &Client, limit: u32) -> Result<()> {
    let mut found: Vec<Batch> = Vec::new();
    loop {
        let after = found.last().map_or(String::new(), |batch| format!("&after={}", batch.id));
        let left = limit - found.len() as u32;
        let page: Page = client.get(&format!("/v1/batches?limit={}{after}", left.min(PAGE)))?;
        let is_last = !page.has_more || page.data.is_empty();
        found.extend(page.data);
        if is_last || found.len() >= limit as usize {
            break;
        }
    }
    if found.is_empty() {
        println!("no batches");
        return Ok(());
    }
    let mut rows = vec![["ID", "STATUS", "DONE", "FAILED", "ENDPOINT", "CREATED"].map(str::to_string)];
    rows.extend(found.iter().map(|batch| {
        let created = Timestamp::from_second(batch.created_at).map_or("-".to_string(), |at| at.to_string());
        let Counts { total, failed, .. } = batch.request_counts;
        let done = format!("{}/{total}", batch.num_done());
        [batch.id.clone(), batch.status.clone(), done, failed.to_string(), batch.endpoint.clone(), created]
    }));
    let width = |i: usize| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    for row in &rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        println!("{}", cells.join("  ").trim_end());
    }
    Ok(())
}

fn watch(client: &Client, batch_id: &str) -> Result<ExitCode> {
    if batch_id.is_empty() || !batch_id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte)) {
        let reason = "expected letters, digits, `_` and `-`".to_string();
        return Err(Error::Malformed { field: "BATCH_ID".to_string(), reason });
    }
    let path = format!("/v1/batches/{batch_id}");
    let mut view = View::new();
    // A server that was never there is no server that starts anew.
    let mut last_answer: Option<Instant> = None;
    let batch = loop {
        match client.get::<Batch>(&path) {
            Ok(batch) => {
                last_answer = Some(Instant::now());
                view.show(&batch);
                if batch.is_final() {
                    break batch;
                }
            }
            Err(Unanswered::Away(_)) if last_answer.is_some_and(|at| at.elapsed() < PATIENCE) => view.wait(),
            Err(unanswered) => {
                view.end();
                return Err(unanswered.into());
            }
        }
        std::thread::sleep(LOOK_INTERVAL);
    };
    view.end();
    println!("{}", batch.summary());
    for fault in batch.errors.iter().flat_map(|errors| &errors.data) {
        match fault.line {
            Some(line) => eprintln!("line {line}: {}", fault.message),
            None => eprintln!("{}", fault.message),
        }
    }
    Ok(if batch.status == "completed" { ExitCode::SUCCESS } else { ExitCode::from(FAILURE) })
}

/// A bar on a terminal, a line now and then elsewhere.
struct View {
    /// `None` where there is no terminal.
    bar: Option<ProgressBar>,
    /// What the last line said, and when.
    told: Option<(String, Instant)>,
}

impl View {
    fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::no_length();
            // The template is a constant that is well formed; without it there is indicatif's own.
            if let Ok(style) =
                ProgressStyle::with_template("{msg:12} {wide_bar} {pos}/{len}  {prefix}  {elapsed} ETA {eta}")
            {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Self { bar, told: None }
    }

    fn show(&mut self, batch: &Batch) {
        let Counts { total, failed, .. } = batch.request_counts;
        if let Some(bar) = &self.bar {
            if total > 0 {
                bar.set_length(total);
            }
            bar.set_position(batch.num_done());
            bar.set_message(batch.status.clone());
            bar.set_prefix(format!("{failed} failed"));
            return;
        }
        let is_news =
            self.told.as_ref().is_none_or(|(status, at)| *status != batch.status || at.elapsed() >= LINE_INTERVAL);
        if is_news && !batch.is_final() {
            eprintln!("{}: {} of {total} done, {failed} failed", batch.status, batch.num_done());
            self.told = Some((batch.status.clone(), Instant::now()));
        }
    }

    /// The server does not answer.
    fn wait(&mut self) {
        const WORDS: &str = "waiting for the server";
        if let Some(bar) = &self.bar {
            bar.set_message(WORDS);
            return;
        }
        if self.told.as_ref().is_none_or(|(told, _)| told != WORDS) {
            eprintln!("{WORDS}");
            self.told = Some((WORDS.to_string(), Instant::now()));
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_summed_up_in_a_line() {
        let batch: Batch = serde_json::from_value(serde_json::json!({
            "id": "batch_1", "status": "completed", "endpoint": "/v1/embeddings", "created_at": 1, "errors": null,
            "request_counts": {"total": 5, "completed": 3, "failed": 2}, "output_file_id": "file-1", "error_file_id": "file-2",
        }))
        .unwrap();
        assert_eq!(batch.summary(), "batch_1 completed: 3 of 5 answered, 2 failed; output in file-1; errors in file-2");
        assert!(batch.is_final() && batch.num_done() == 5);
    }
}
