//! CUDA graphs of the forwards of small batches: one launch in place of a hundred.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaStream};

use crate::{Error, Result};

/// Graphs kept at a time. A graph of a hundred kernels takes some hundred KiB of the device.
pub const MAX_GRAPHS: usize = 64;
/// Plain forwards of a bucket before it is captured: the first two find their algorithms and load their code, and a
/// bucket that is not met again costs nothing.
const NUM_PLAIN: u32 = 2;

/// Graphs by bucket, the least recently used dropped first.
pub struct Graphs<K> {
    entries: HashMap<K, Entry>,
    clock: u64,
    is_enabled: bool,
}

struct Entry {
    num_uses: u32,
    last_use: u64,
    graph: Option<CudaGraph>,
}

// SAFETY: a graph is tied to no thread, only to the context, which `CudaGraph::launch` binds; and all use of it goes
// through `&mut Graphs`, so by one thread at a time, which is what the driver asks for.
unsafe impl<K: Send> Send for Graphs<K> {}

/// What a bucket gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Plain,
    Capture,
    Replay,
}

impl<K: Copy + Eq + Hash> Graphs<K> {
    pub fn new() -> Self {
        Self { entries: HashMap::new(), clock: 0, is_enabled: true }
    }

    /// Runs `forward`, which enqueues the same launches on the same memory whenever `key` is the same: as it is, or by
    /// its graph. A capture that fails for another reason than memory switches graphs off for good, with one warning.
    ///
    /// Errors: those of `forward`, and of the graph's launch.
    pub fn run(&mut self, key: K, stream: &Arc<CudaStream>, mut forward: impl FnMut() -> Result<()>) -> Result<()> {
        match self.way(key) {
            Way::Plain => return forward(),
            Way::Replay => {}
            Way::Capture => match capture(stream, &mut forward) {
                Ok(graph) => self.keep(key, graph),
                Err(error @ Error::DeviceLost { .. }) => return Err(error),
                Err(Error::OutOfMemory { cause }) => {
                    // What the graphs hold may be what the batch itself needs. Later there may be memory for them.
                    tracing::debug!(cause, "no memory for a CUDA graph: all are dropped");
                    self.entries.clear();
                    return forward();
                }
                Err(error) => {
                    self.is_enabled = false;
                    self.entries.clear();
                    tracing::warn!(%error, "no CUDA graph could be captured: small batches are launched kernel by kernel");
                    return forward();
                }
            },
        }
        match self.entries.get(&key).and_then(|entry| entry.graph.as_ref()) {
            Some(graph) => Ok(graph.launch()?),
            None => forward(),
        }
    }

    pub fn num_graphs(&self) -> usize {
        self.entries.values().filter(|entry| entry.graph.is_some()).count()
    }

    /// Forgets all graphs: the memory they were captured with goes.
    pub fn clear(&mut self) {
        self.entries.clear();
    }

    /// Counts a use and says what to do with it.
    fn way(&mut self, key: K) -> Way {
        if !self.is_enabled {
            return Way::Plain;
        }
        self.clock += 1;
        let entry = self.entries.entry(key).or_insert(Entry { num_uses: 0, last_use: 0, graph: None });
        entry.num_uses = entry.num_uses.saturating_add(1);
        entry.last_use = self.clock;
        match &entry.graph {
            Some(_) => Way::Replay,
            None if entry.num_uses > NUM_PLAIN => Way::Capture,
            None => Way::Plain,
        }
    }

    /// Keeps a graph, and drops the one that was not used for longest if there are too many. A graph that still runs
    /// is freed by the driver when it has ended.
    fn keep(&mut self, key: K, graph: CudaGraph) {
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.graph = Some(graph);
        }
        if let Some(oldest) = self.oldest_beyond(MAX_GRAPHS) {
            self.entries.remove(&oldest);
        }
    }

    /// The bucket with the oldest graph, if there are more graphs than `max_graphs`.
    fn oldest_beyond(&self, max_graphs: usize) -> Option<K> {
        let with_graph = self.entries.iter().filter(|(_, entry)| entry.graph.is_some());
        if with_graph.clone().count() <= max_graphs {
            return None;
        }
        with_graph.min_by_key(|(_, entry)| entry.last_use).map(|(key, _)| *key)
    }
}

/// Records what `forward` enqueues instead of running it.
fn capture(stream: &Arc<CudaStream>, forward: &mut impl FnMut() -> Result<()>) -> Result<CudaGraph> {
    // Other threads may go on calling the driver: only what this one does unsafely ends the capture.
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let forwarded = forward();
    // Ended in every case, or the stream would stay in capture.
    let graph = stream.end_capture(CUgraphInstantiate_flags(0));
    forwarded?;
    let graph = graph?.ok_or_else(|| Error::Internal { cause: "the capture of a CUDA graph gave none".to_string() })?;
    graph.upload()?;
    Ok(graph)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_captured_at_its_third_use() {
        let mut graphs = Graphs::new();
        assert_eq!([graphs.way(1), graphs.way(2), graphs.way(1)], [Way::Plain; 3]);
        assert_eq!(graphs.way(1), Way::Capture);
        assert_eq!(graphs.way(2), Way::Plain);
        graphs.clear();
        assert_eq!(graphs.way(1), Way::Plain);
    }

    #[test]
    fn switched_off_is_plain_for_good() {
        let mut graphs = Graphs::new();
        graphs.is_enabled = false;
        for _ in 0..10 {
            assert_eq!(graphs.way(1), Way::Plain);
        }
        assert!(graphs.entries.is_empty());
        assert_eq!(graphs.oldest_beyond(0), None);
    }
}
