//! Background work of the settings: where it is, and who does it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::store::Kept;
use crate::config::Jobs;
use crate::jobs::Tasks;
use crate::jobs::runner::{Handler, Options, Runner};
use crate::store::work::TaskKind;
use crate::store::work::dispatch::LocalDispatch;

/// Where tasks are, and who is told of them.
pub fn tasks(kept: &Kept) -> Tasks {
    Tasks { work: kept.work.clone(), dispatch: Arc::new(LocalDispatch::default()) }
}

/// Who does tasks of which kind.
pub fn handlers() -> Vec<(TaskKind, Arc<dyn Handler>)> {
    Vec::new()
}

/// Tasks being run.
pub struct Running {
    /// The runner holds the other end.
    stop: oneshot::Sender<Duration>,
    task: JoinHandle<()>,
}

impl Running {
    /// Begins to run tasks. Call it within a runtime.
    pub fn start(handlers: Vec<(TaskKind, Arc<dyn Handler>)>, tasks: Tasks, settings: &Jobs) -> Self {
        let (stop, stopped) = oneshot::channel();
        let options =
            Options { max_concurrency: settings.max_concurrency, lease: settings.lease, ..Options::default() };
        let runner = Runner::new(tasks, handlers, options);
        Self { stop, task: tokio::spawn(runner.run(stopped)) }
    }

    /// Runs no more tasks; what has not ended in this time is given back.
    pub async fn end(self, limit: Duration) {
        let _ = self.stop.send(limit);
        // A panic in there was told by the runtime's hook.
        let _ = self.task.await;
    }
}
