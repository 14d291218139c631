//! The real binary as a child process, and a client that sees every byte.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Longer than anything takes that goes well, on a busy machine and a build without optimisation.
pub const LONG: Duration = Duration::from_secs(90);

/// A running server; killed when dropped.
pub struct Server {
    child: Child,
    pub address: SocketAddr,
    /// Its working folder, with `eremois.toml`.
    pub dir: tempfile::TempDir,
    pub stdout: Lines,
    pub stderr: Lines,
    pub started: Instant,
}

/// What a process has written so far.
#[derive(Clone, Default)]
pub struct Lines(Arc<Mutex<Vec<String>>>);

impl Lines {
    fn collect(from: impl Read + Send + 'static) -> Self {
        let lines = Self::default();
        let sink = lines.clone();
        std::thread::spawn(move || {
            BufReader::new(from).lines().map_while(Result::ok).for_each(|l| sink.0.lock().push(l))
        });
        lines
    }

    pub fn all(&self) -> Vec<String> {
        self.0.lock().clone()
    }

    /// The first line that holds all of `parts`, waited for.
    pub fn wait_for(&self, parts: &[&str]) -> String {
        let found = attempt(|| self.0.lock().iter().find(|line| parts.iter().all(|part| line.contains(part))).cloned());
        found.unwrap_or_else(|| {
            let lines = self.all();
            let last = &lines[lines.len().saturating_sub(30)..];
            panic!("waited in vain for a line with {parts:?}; the last lines: {last:#?}")
        })
    }
}

/// Tries until there is something; panics after [`LONG`].
pub fn wait_for<T>(what: &str, try_once: impl FnMut() -> Option<T>) -> T {
    attempt(try_once).unwrap_or_else(|| panic!("waited in vain for {what}"))
}

fn attempt<T>(mut try_once: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    while start.elapsed() < LONG {
        match try_once() {
            None => std::thread::sleep(Duration::from_millis(5)),
            found => return found,
        }
    }
    None
}

/// The repository of this package.
pub fn bundled_models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models")
}

/// An address nobody listens on at this moment.
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port")
}

impl Server {
    /// Starts the binary on the bundled model with these settings beside the address.
    pub fn start(settings: &str) -> Self {
        Self::start_with(settings, &[])
    }

    /// As [`Server::start`], with these variables in its environment.
    pub fn start_with(settings: &str, variables: &[(&str, String)]) -> Self {
        let address = free_address();
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::write(dir.path().join("eremois.toml"), settings).expect("written");
        let mut command = Command::new(env!("CARGO_BIN_EXE_eremois"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("EREMOIS_") || name.starts_with("HF_")) {
            command.env_remove(name);
        }
        let started = Instant::now();
        let mut child = command
            .env("EREMOIS_API__LISTEN", address.to_string())
            .env("EREMOIS_AI__MODELS_DIR", bundled_models())
            .envs(variables.iter().map(|(name, value)| (name, value)))
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        let stdout = Lines::collect(child.stdout.take().expect("piped"));
        let stderr = Lines::collect(child.stderr.take().expect("piped"));
        Self { child, address, dir, stdout, stderr, started }
    }

    /// As [`Server::start`], and waits until it is ready.
    pub fn ready(settings: &str) -> Self {
        Self::start(settings).wait_until_ready()
    }

    pub fn wait_until_ready(mut self) -> Self {
        wait_for("readiness", || {
            let ended = self.child.try_wait().expect("a child of ours");
            assert!(ended.is_none(), "the server ended: {:#?}", self.stderr.all());
            self.get("/health/ready").filter(|answer| answer.status == 200)
        });
        self
    }

    /// One request on a connection of its own; `None` if nobody answers.
    pub fn get(&self, path: &str) -> Option<Answer> {
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        Client::connect(self.address).ok()?.send(request.as_bytes()).ok()
    }

    pub fn write_settings(&self, settings: &str) {
        // As an editor does it: a new file takes the old one's place.
        let new = self.dir.path().join("eremois.toml.new");
        std::fs::write(&new, settings).expect("written");
        std::fs::rename(new, self.dir.path().join("eremois.toml")).expect("renamed");
    }

    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([format!("-{name}"), self.child.id().to_string()]).status();
        assert!(sent.expect("kill runs").success(), "no signal could be sent");
    }

    /// Waits for the end of the process.
    pub fn wait(&mut self) -> ExitStatus {
        wait_for("the end of the server", || self.child.try_wait().expect("a child of ours"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already gone in most tests.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    /// Whether the server said that it closes this connection.
    pub fn closes(&self) -> bool {
        self.head.to_lowercase().contains("\r\nconnection: close")
    }
}

/// Why a request has no answer.
#[derive(Debug)]
pub enum Unanswered {
    /// The connection ended before the first byte of an answer.
    Nothing(io::Error),
    /// It ended in the middle of one.
    Cut(String),
}

/// One connection, kept alive.
pub struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    pub fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(LONG))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    pub fn send(&mut self, request: &[u8]) -> Result<Answer, Unanswered> {
        self.stream.get_mut().write_all(request).map_err(Unanswered::Nothing)?;
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            match self.stream.read_line(&mut head) {
                Ok(0) if head.is_empty() => return Err(Unanswered::Nothing(io::ErrorKind::UnexpectedEof.into())),
                Ok(0) => return Err(Unanswered::Cut(head)),
                Err(e) if head.is_empty() => return Err(Unanswered::Nothing(e)),
                Err(e) => return Err(Unanswered::Cut(format!("{head} {e}"))),
                Ok(_) => {}
            }
        }
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status line");
        let length =
            head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length:")?.trim().parse().ok());
        let mut body = vec![0; length.expect("every answer has a length")];
        self.stream.read_exact(&mut body).map_err(|e| Unanswered::Cut(format!("{head} {e}")))?;
        Ok(Answer { status, head, body: String::from_utf8(body).expect("UTF-8") })
    }
}

/// A request for the embeddings of these texts.
pub fn embeddings(texts: &[String]) -> Vec<u8> {
    let body = serde_json::json!({ "input": texts }).to_string();
    let length = body.len();
    let head = "POST /v1/embeddings HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n";
    format!("{head}content-length: {length}\r\n\r\n{body}").into_bytes()
}

/// A text of about this many tokens.
pub fn text(num_words: usize) -> String {
    ["water", "stone", "light", "river", "house", "garden"]
        .into_iter()
        .cycle()
        .take(num_words)
        .collect::<Vec<_>>()
        .join(" ")
}
