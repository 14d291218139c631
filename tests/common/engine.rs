//! An engine over the fake model, and its requests.

use std::sync::Arc;
use std::time::{Duration, Instant};

use eremois::Result;
use eremois::output::Output;
use eremois::request::{Input, Priority, Request, TaskParams};
use eremois::serve::{Engine, Health, Settings};
use tokio::task::JoinHandle;

/// Longer than anything here takes: a test that waits for it has failed.
pub const LONG: Duration = Duration::from_secs(30);

/// No heartbeat comes in the middle of a test, and a device that failed is tried again at once.
pub fn settings() -> Settings {
    Settings {
        heartbeat_interval: Duration::from_secs(3600),
        retry_interval: Duration::from_millis(5),
        device_timeout: LONG,
        num_encoders: 2,
    }
}

/// Waits until the health of every model is as wanted.
pub async fn wait_for(engine: &Engine, wanted: impl Fn(&Health) -> bool) {
    let end = Instant::now() + LONG;
    while !engine.health().iter().all(|(_, health)| wanted(health)) {
        assert!(Instant::now() < end, "{:?}", engine.health());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// An interactive request to the default model.
pub fn request_of(inputs: Vec<Input>) -> Request {
    let deadline = Instant::now() + LONG;
    Request { model: None, inputs, params: TaskParams::default(), deadline, priority: Priority::Interactive }
}

/// Puts a request into the queue and returns its answer to come. On a runtime of one thread it is there by then.
pub async fn ask(engine: &Arc<Engine>, request: Request) -> JoinHandle<Result<Output>> {
    let engine = engine.clone();
    let asked = tokio::spawn(async move { engine.infer(request).await });
    tokio::task::yield_now().await;
    asked
}

/// What [`ask`] comes to.
pub async fn answer(asked: JoinHandle<Result<Output>>) -> Result<Output> {
    tokio::time::timeout(LONG, asked).await.expect("no answer").unwrap()
}
