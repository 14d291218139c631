//! Real servers as child processes: on free ports of the loopback, each with a data folder of its own, ended with the
//! test process however that ends.
//!
//! A server that is not installed skips the test with a line on standard error, so that `cargo test` works anywhere;
//! `scripts/test` installs all of them and makes a missing one a failure, as `CI` in the environment does.

pub mod certificates;
pub mod mongodb;
pub mod redis;

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;

use super::process::{free_address, wait_for};

/// The program of a server: what the variable names, else the first of these names on the path. `None`, and a line
/// that says so, where there is none and none is required.
pub fn program(variable: &str, names: &[&str]) -> Option<PathBuf> {
    if let Some(set) = std::env::var_os(variable).filter(|set| !set.is_empty()) {
        let path = PathBuf::from(set);
        assert!(path.is_file(), "{variable} names {}, which is not there", path.display());
        return Some(path);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .flat_map(|folder| names.iter().map(move |name| folder.join(name)))
        .find(|file| file.is_file());
    if found.is_none() {
        missing(&format!("no {} on the path, and {variable} names none", names.join(" or ")));
    }
    found
}

/// Panics where servers are required, else says why the test is skipped.
pub fn missing(what: &str) {
    let required = ["EREMOIS_TEST_SERVERS", "CI"].iter().any(|name| std::env::var_os(name).is_some());
    assert!(!required, "{what}: run scripts/test, which installs it");
    eprintln!("SKIPPED: {what}: run scripts/test, which installs it");
}

/// A server process. It can be killed and started again on the same port and data; dropped, it is killed and its data
/// are deleted.
pub struct Daemon {
    command: Box<dyn Fn() -> Command + Send + Sync>,
    child: Mutex<Option<Child>>,
    pub port: u16,
    /// Its data, settings and log.
    pub dir: Arc<tempfile::TempDir>,
}

impl Daemon {
    /// Starts a server that `command` makes from a port and a folder, and waits until it accepts connections. Another
    /// process may take the port meanwhile; then the next one is tried.
    pub fn start(command: impl Fn(u16, &Path) -> Command + Send + Sync + Clone + 'static) -> Self {
        for _ in 0..5 {
            let dir = Arc::new(tempfile::tempdir().expect("a folder"));
            let (port, path, make) = (free_address().port(), dir.path().to_path_buf(), command.clone());
            let command = Box::new(move || make(port, &path));
            let daemon = Self { command, child: Mutex::new(None), port, dir };
            if daemon.start_again() {
                return daemon;
            }
            eprintln!("a server did not start on port {port}: {}", daemon.log());
        }
        panic!("no server starts: see the logs above");
    }

    /// Starts it again on the same port and data, and waits until it accepts connections. Returns whether it does.
    pub fn start_again(&self) -> bool {
        let mut command = (self.command)();
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.path().join("output.log"));
        let log = log.expect("a file in a folder of ours");
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a second handle")).stderr(log);
        let mut child = spawn(command).unwrap_or_else(|e| panic!("a server cannot be run: {e}"));
        let is_up = wait_for("a server to accept connections or end", || {
            if child.try_wait().expect("a child of ours").is_some() {
                return Some(false);
            }
            TcpStream::connect_timeout(&self.address(), Duration::from_secs(1)).ok().map(|_| true)
        });
        *self.child.lock() = Some(child);
        is_up
    }

    /// Ends it as a power cut would: SIGKILL.
    pub fn kill(&self) {
        if let Some(mut child) = self.child.lock().take() {
            // It may have ended by itself.
            let _ = child.kill();
            child.wait().expect("a child of ours");
        }
    }

    /// Asks it to end and waits until it has.
    pub fn stop(&self) {
        self.signal("TERM");
        if let Some(mut child) = self.child.lock().take() {
            wait_for("the end of a server", || child.try_wait().expect("a child of ours"));
        }
    }

    /// Halts it in the middle of whatever it does: connections stay open and nothing answers.
    pub fn pause(&self) {
        self.signal("STOP");
        // The signal was sent, but a thread that runs on another core stops a little later and may answer until then.
        let pid = self.child.lock().as_ref().expect("the server runs").id();
        wait_for("a server to halt", || is_halted(pid).then_some(()));
    }

    /// Lets it go on after [`Daemon::pause`].
    pub fn resume(&self) {
        self.signal("CONT");
    }

    fn signal(&self, name: &str) {
        let child = self.child.lock();
        let pid = child.as_ref().expect("the server runs").id().to_string();
        let sent = Command::new("kill").args([&format!("-{name}"), &pid]).status();
        assert!(sent.expect("kill runs").success(), "no signal could be sent");
    }

    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    /// What it wrote: every `*.log` in its folder.
    pub fn log(&self) -> String {
        let files = fs::read_dir(self.dir.path()).expect("a folder of ours").flatten().map(|entry| entry.path());
        let logs = files.filter(|path| path.extension().is_some_and(|ending| ending == "log"));
        logs.map(|path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()).collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Starts a child that the kernel kills when this process ends, also by SIGKILL.
///
/// The kernel ties that to the life of the thread that starts the child, so one thread that never ends starts them all.
fn spawn(command: Command) -> io::Result<Child> {
    type Order = (Command, Sender<io::Result<Child>>);
    static SPAWNER: OnceLock<Mutex<Sender<Order>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, orders) = channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, reply) in orders {
                // The one who waits has panicked if it does not take the answer.
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(sender)
    });
    let (reply, answer) = channel();
    spawner.lock().send((command, reply)).expect("the thread takes orders as long as this process lives");
    answer.recv().expect("every order is answered")
}

/// A command that runs `program` so that it dies with its parent, where the system has a tool for it.
pub fn bound(program: &Path) -> Command {
    let tool = Path::new("/usr/bin/setpriv");
    if !tool.is_file() {
        return Command::new(program);
    }
    let mut command = Command::new(tool);
    command.args(["--pdeathsig", "KILL"]).arg(program);
    command
}

/// Whether every thread of a process is stopped, by what the kernel tells of them; true where it tells nothing.
fn is_halted(pid: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    threads.map(|thread| fs::read_to_string(thread.path().join("stat")).unwrap_or_default()).all(|stat| {
        // The state follows the name, which stands in brackets and may hold any character.
        stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('T'))
    })
}
