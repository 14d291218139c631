//! A server of MongoDB's wire protocol.
//!
//! `scripts/test` installs a stand-in whose storage is WiredTiger, MongoDB's own engine. It is one process that calls
//! itself a replica set of one. `MONGODB_URL` in the environment has the tests use a real MongoDB instead, but for those
//! that must kill the server or make it fail.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::certificates::Certificates;
use super::{Daemon, bound, program};

/// The server, and a database of it for one test.
pub struct MongoDb {
    /// `None` where `MONGODB_URL` names the server.
    pub daemon: Option<Daemon>,
    base: String,
}

impl MongoDb {
    /// `MONGODB_URL`, or a server of our own.
    pub fn start() -> Option<Self> {
        match std::env::var("MONGODB_URL") {
            Ok(base) if !base.is_empty() => Some(Self { daemon: None, base }),
            _ => Self::own(),
        }
    }

    /// A server of our own, which may be killed and takes `configureFailPoint`. What it acknowledged is on disk.
    pub fn own() -> Option<Self> {
        Self::with(&[])
    }

    /// One of our own that takes TLS only, with this certificate. What clients must know of it is not in its urls.
    pub fn with_tls(certificates: &Certificates) -> Option<Self> {
        let [certificate, key] = [&certificates.certificate, &certificates.key].map(|path| path.display().to_string());
        Self::with(&["--tls-cert-file", &certificate, "--tls-key-file", &key])
    }

    fn with(arguments: &[&str]) -> Option<Self> {
        let program = installed()?;
        let arguments: Vec<String> = arguments.iter().map(|argument| argument.to_string()).collect();
        let daemon = Daemon::start(move |port, dir| {
            let mut command = command(&program, port, dir);
            command.args(&arguments);
            command
        });
        let base = format!("mongodb://127.0.0.1:{}/?replicaSet=secantus", daemon.port);
        Some(Self { daemon: Some(daemon), base })
    }

    /// The process; panics for `MONGODB_URL`.
    pub fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().expect("a server of our own")
    }

    /// The connection string of a database of this name.
    pub fn url_of(&self, database: &str) -> String {
        let (address, options) = self.base.split_once('?').unwrap_or((&self.base, ""));
        // `mongodb://a:1,b:2` or `mongodb://a:1/name`: the third slash is where the name of a database begins.
        let hosts = address.splitn(4, '/').take(3).collect::<Vec<_>>().join("/");
        format!("{hosts}/{database}?{options}")
    }

    /// The connection string of a database that no other test uses.
    pub fn url(&self) -> String {
        static NUM_DATABASES: AtomicUsize = AtomicUsize::new(0);
        let number = NUM_DATABASES.fetch_add(1, Ordering::Relaxed);
        self.url_of(&format!("eremois_test_{}_{number}", std::process::id()))
    }
}

/// The program that the environment names, that is on the path, or that `scripts/test` has installed before.
fn installed() -> Option<PathBuf> {
    let variable = "EREMOIS_TEST_MONGODB_SERVER";
    if std::env::var_os(variable).is_none() {
        let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/eremois/test");
        let cache = std::env::var_os("EREMOIS_TEST_CACHE").map_or_else(home, PathBuf::from);
        let folders = std::fs::read_dir(cache).into_iter().flatten().flatten().map(|entry| entry.path());
        let complete = |folder: &PathBuf| folder.join(".complete").is_file();
        let programs = folders.filter(complete).map(|folder| folder.join("bin/secantusd-py"));
        if let Some(program) = programs.filter(|program| program.is_file()).max() {
            return Some(program);
        }
    }
    program(variable, &["secantusd-py", "secantusd-rs"])
}

fn command(program: &Path, port: u16, dir: &Path) -> Command {
    let mut command = bound(program);
    command.current_dir(dir).arg("--storage-path").arg(dir.join("data"));
    command.args(["--port", &port.to_string(), "--cache-size", "256M", "--sync-on-commit", "--enable-test-commands"]);
    command
}
