//! Background work of the settings: where it is, and who does it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::store::{self, Kept};
use crate::Result;
use crate::api::{self, status};
use crate::config::words::{CacheUrl, RecordScope};
use crate::config::{Jobs, Settings};
use crate::inference::keep::Keeper;
use crate::jobs::batch::{self, call::Endpoints};
use crate::jobs::callback::guard::Guard;
use crate::jobs::callback::{self, Callback, Policy};
use crate::jobs::inference::Inference;
use crate::jobs::runner::{Handler, Options, Runner};
use crate::jobs::{JobSettings, Tasks};
use crate::store::redis::stream::StreamDispatch;
use crate::store::work::TaskKind;
use crate::store::work::dispatch::{Dispatch, LocalDispatch};

/// Where tasks are, and who is told of them: all servers of a MongoDB that have a Redis in common. The tasks of every other
/// store are this server's alone.
///
/// Errors: [`crate::Error::Config`] for a file of Redis' certificates that cannot be read.
pub fn tasks(kept: &Kept, settings: &Settings) -> Result<Tasks> {
    let dispatch: Arc<dyn Dispatch> = match (&settings.cache.url, store::mongo_settings(&settings.database)) {
        (CacheUrl::Redis(address), Some(mongo)) => {
            let dispatch = StreamDispatch::new(address.clone(), &mongo.namespace()?, settings.jobs.lease)?;
            tracing::info!(key = dispatch.key(), %address, "servers of this database share background work over Redis");
            Arc::new(dispatch)
        }
        _ => Arc::new(LocalDispatch::default()),
    };
    Ok(Tasks { work: kept.work.clone(), dispatch })
}

/// Who does tasks of which kind.
pub fn handlers(
    keeper: &Arc<Keeper>,
    tasks: &Tasks,
    settings: &Jobs,
    batches: &Arc<JobSettings>,
    endpoints: Arc<dyn Endpoints>,
) -> Vec<(TaskKind, Arc<dyn Handler>)> {
    let inference = Inference::new(keeper.clone(), tasks.clone(), status::failure_of);
    let mut handlers: Vec<(TaskKind, Arc<dyn Handler>)> = vec![(TaskKind::Inference, Arc::new(inference))];
    if let Some(policy) = policy(settings) {
        let callback = Callback::new(keeper.store().clone(), policy, callback::Options::default(), api::app::render);
        handlers.push((TaskKind::Callback, Arc::new(callback)));
    }
    handlers.extend(batch::handlers(tasks, batches, endpoints));
    handlers
}

/// What files and batches may be.
pub fn settings(settings: &Settings) -> JobSettings {
    JobSettings {
        max_file_bytes: settings.jobs.max_file_bytes.0,
        max_batch_requests: settings.jobs.max_batch_requests,
        max_line_bytes: settings.api.max_body_bytes.0,
        retention: settings.jobs.retention,
        is_durable: settings.database.record != RecordScope::None,
    }
}

/// Where callbacks may go; `None`: there are none.
pub fn policy(settings: &Jobs) -> Option<Policy> {
    let guard = Guard::new(settings.callback_networks.0.clone());
    settings.callback_secret.clone().map(|secret| Policy { secret, guard })
}

/// Between two looks whether the models are loaded.
const START_POLL: Duration = Duration::from_millis(20);

/// Tasks being run.
pub struct Running {
    /// The runner holds the other end.
    stop: oneshot::Sender<Duration>,
    task: JoinHandle<()>,
}

impl Running {
    /// Begins to run tasks as soon as `starting` is over: before, a model that is not loaded yet would be taken for one
    /// that does not exist. Call it within a runtime.
    pub fn start(
        handlers: Vec<(TaskKind, Arc<dyn Handler>)>,
        tasks: Tasks,
        settings: &Jobs,
        starting: Arc<AtomicBool>,
    ) -> Self {
        let (stop, mut stopped) = oneshot::channel();
        let options =
            Options { max_concurrency: settings.max_concurrency, lease: settings.lease, ..Options::default() };
        let runner = Runner::new(tasks, handlers, options);
        let task = tokio::spawn(async move {
            while starting.load(Ordering::Relaxed) {
                tokio::select! {
                    _ = &mut stopped => return,
                    () = tokio::time::sleep(START_POLL) => {}
                }
            }
            runner.run(stopped).await;
        });
        Self { stop, task }
    }

    /// Runs no more tasks; what has not ended in this time is given back.
    pub async fn end(self, limit: Duration) {
        let _ = self.stop.send(limit);
        // A panic in there was told by the runtime's hook.
        let _ = self.task.await;
    }
}
