//! The GPUs' own numbers, read now and then while the server runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::ops::monitor::Monitor;
use crate::serve::Engine;

/// How often the numbers are read: as often as they are usually scraped, and far less often than they would cost.
const INTERVAL: Duration = Duration::from_secs(5);

/// How often it is looked whether the models are loaded.
const LOAD_POLL: Duration = Duration::from_millis(100);

/// Samples the GPUs that models are served on, as long as it is polled; returns where there are none.
pub async fn watch(engine: Arc<Engine>, starting: Arc<AtomicBool>) {
    while starting.load(Ordering::Relaxed) {
        tokio::time::sleep(LOAD_POLL).await;
    }
    // One by one: a model's info names several at once.
    let devices = engine.models_health().into_iter().flat_map(|model| model.devices);
    let devices: Vec<String> = devices.map(|(device, _)| device).collect();
    drop(engine);
    // On a thread that may wait: NVML asks the driver, which may take its time.
    let open = move || Monitor::open(devices.iter().map(String::as_str));
    let Ok(Some(monitor)) = tokio::task::spawn_blocking(open).await else { return };
    let monitor = Arc::new(monitor);
    loop {
        let sampled = tokio::task::spawn_blocking({
            let monitor = monitor.clone();
            move || monitor.sample()
        });
        if sampled.await.is_err() {
            return;
        }
        tokio::time::sleep(INTERVAL).await;
    }
}
