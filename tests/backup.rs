//! Backups, restores, checks and migrations, through the commands that people type and the library below them.

mod common;

#[path = "backup/care.rs"]
mod care;
#[path = "backup/file.rs"]
mod file;
#[path = "backup/mongodb.rs"]
mod mongodb;
#[path = "backup/serving.rs"]
mod serving;
#[path = "backup/warm.rs"]
mod warm;
#[path = "backup/work.rs"]
mod work;

use std::path::Path;
use std::process::Command;

use eremois::store::Records;
use eremois::store::backup::entry;
use eremois::store::backup::merged::{Item, Merged};
use eremois::store::embedded::Embedded;
use eremois::store::embedded::beside::Beside;
use eremois::store::record::Record;

/// What a command said.
struct Ended {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Ended {
    /// A number that stands before these words in a line of the output.
    fn number_before(&self, words: &str) -> u64 {
        let line = self.stdout.lines().find(|line| line.contains(words));
        let before = line.and_then(|line| line.split(words).next()?.split_whitespace().last());
        before
            .and_then(|number| number.parse().ok())
            .unwrap_or_else(|| panic!("no number of {words:?}: {}", self.stdout))
    }

    /// What stands behind this word in a line that begins with it.
    fn after(&self, word: &str) -> String {
        let line = self.stdout.lines().find_map(|line| line.strip_prefix(word));
        line.map(|rest| rest.split(';').next().unwrap_or(rest).trim().to_string())
            .unwrap_or_else(|| panic!("{}", self.stdout))
    }
}

/// Runs the binary on the store in this folder, with more settings before its arguments.
fn eremois(store: &Path, settings: &[&str], arguments: &[&str]) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_eremois"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("EREMOIS_") || name.starts_with("HF_")) {
        command.env_remove(name);
    }
    command.args(["--set", &format!("database.path={}", store.display())]);
    settings.iter().for_each(|setting| {
        command.args(["--set", setting]);
    });
    let elsewhere = tempfile::tempdir().expect("a folder");
    let output = command.args(arguments).current_dir(elsewhere.path()).output().expect("the binary runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    let code = output.status.code().expect("no signal");
    Ended { code, stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// As [`eremois`], which must succeed.
fn succeeds(store: &Path, settings: &[&str], arguments: &[&str]) -> Ended {
    let ended = eremois(store, settings, arguments);
    assert_eq!(ended.code, 0, "{arguments:?}: {} {}", ended.stdout, ended.stderr);
    ended
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("threads")
}

/// Writes records into the embedded store of a folder.
fn fill(store: &Path, records: &[Record]) {
    let store = Embedded::open(store).expect("a store");
    runtime().block_on(store.put(records)).expect("written");
}

/// The canonical bytes of all records of the embedded store of a folder, in their order.
fn all_of(store: &Path) -> Vec<Vec<u8>> {
    entries(Merged::new(Box::new(Beside::open(store).and_then(Beside::snapshot).expect("a store")), None))
}

fn entries(mut from: Merged) -> Vec<Vec<u8>> {
    let mut entries = Vec::new();
    while let Some(item) = from.next_item().expect("it can be read") {
        match item {
            Item::Both(both) => entries.extend(both.record.map(|record| entry::encode(&record).expect("it has bytes"))),
            Item::Unreadable(unreadable) => panic!("{unreadable:?}"),
        }
    }
    entries
}

fn bytes_of(records: &[Record]) -> Vec<Vec<u8>> {
    records.iter().map(|record| entry::encode(record).expect("it has bytes")).collect()
}
