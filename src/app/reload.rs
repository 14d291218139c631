//! Settings that change while the server runs: on SIGHUP, and when the file changes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::logs::Logs;
use crate::config::reload::changes;
use crate::config::{Settings, Sources};

/// How long the file must be left alone before it is read: an editor writes it in several steps.
const QUIET: Duration = Duration::from_millis(200);

/// Reads the settings again when asked, and hands changed ones on.
pub struct Reloader<F> {
    pub sources: Sources,
    /// What was read last.
    pub current: Settings,
    pub logs: Logs,
    /// Puts the batching limits of these settings in force.
    pub apply: F,
}

impl<F: Fn(&Settings)> Reloader<F> {
    /// Waits for SIGHUP and for changes of the file, until dropped.
    pub async fn run(mut self) {
        let mut hangup = match signal(SignalKind::hangup()) {
            Ok(hangup) => hangup,
            Err(e) => return tracing::error!(error = %e, "settings cannot be reloaded: no handler for SIGHUP"),
        };
        let (sender, mut changed) = mpsc::channel(1);
        // Kept alive: dropping the watcher ends the watch. Without one, SIGHUP still works.
        let _watcher = match watch(self.sources.path(), sender) {
            Ok(watcher) => Some(watcher),
            Err(e) => {
                tracing::warn!(error = %e, "the settings file is not watched; SIGHUP reloads it");
                None
            }
        };
        let mut text = self.sources.text().unwrap_or_default();
        loop {
            tokio::select! {
                _ = hangup.recv() => {
                    text = self.sources.text().unwrap_or_default();
                    self.reload("SIGHUP");
                }
                Some(()) = changed.recv() => {
                    tokio::time::sleep(QUIET).await;
                    // The folder is watched, not the file: most events are of its neighbours.
                    let now = self.sources.text().unwrap_or_default();
                    if now != text {
                        text = now;
                        self.reload("a change of the file");
                    }
                }
            }
        }
    }

    /// Reads everything again; with faults nothing changes.
    fn reload(&mut self, cause: &str) {
        let new = match self.sources.load() {
            Ok(loaded) => loaded.settings,
            Err(e) => {
                for fault in e.to_string().lines() {
                    tracing::error!(fault, "the settings are not reloaded");
                }
                return;
            }
        };
        tracing::info!(cause, file = %self.sources.path().display(), "settings read again");
        for change in changes(&self.current, &new) {
            let (key, old, new) = (change.key.path(), &change.old, &change.new);
            if change.is_live() {
                tracing::info!(key, old, new, "setting changed");
            } else {
                tracing::warn!(key, old, new, "this setting changes at the next start");
            }
        }
        self.logs.set_filter(&new.log.filter);
        (self.apply)(&new);
        self.current = new;
    }
}

/// Watches the folder of `file`: editors and orchestrators replace a file rather than write into it, and a
/// watch on the old one would see no more.
fn watch(file: &Path, changed: mpsc::Sender<()>) -> notify::Result<RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading the file is an event, too: answering that one would never end.
        if event.is_ok_and(|event| !matches!(event.kind, EventKind::Access(_))) {
            // A full channel has word of a change already.
            let _ = changed.try_send(());
        }
    })?;
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    watcher.watch(&folder.map_or_else(|| PathBuf::from("."), Path::to_path_buf), RecursiveMode::NonRecursive)?;
    Ok(watcher)
}
