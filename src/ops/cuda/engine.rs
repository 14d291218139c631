//! An encoder running on one device: memory, streams, slots and graphs around [`DeviceEncoder`].
//!
//! ```text
//! host     pack N │ enqueue N │ pack N+1 │ enqueue N+1 │ wait N, read │ …
//! compute         │ upload N, forward N, pool N         │ upload N+1, forward N+1, …
//! copy                                                  │ rows N to the host
//! ```
//!
//! One upload buffer and one set of activations serve all batches, in the order of the compute stream. What a batch
//! needs beyond that order, pinned memory and its rows, is its [`Slot`].

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use cudarc::driver::CudaStream;
use parking_lot::Mutex;

use super::arena::Arena;
use super::attention::BLOCK_QUERIES;
use super::encoder::DeviceEncoder;
use super::gemm::{Gemm, WORKSPACE_BYTES};
use super::graph::Graphs;
use super::layout::{Batch, Layout, WORD, seq_bucket, token_bucket, token_buckets};
use super::sizes::{EncoderSizes, Scratch};
use super::staging::{Slot, Times};
use super::{Gpu, HalfType, Span};
use crate::ops::pool::Pooling;
use crate::{Error, Result};

/// Buckets up to here are captured: in a larger one the device computes for longer than the host takes to launch.
const MAX_GRAPH_TOKENS: usize = 4096;
/// Slots that are kept for reuse: one on the device, one being packed, one being read.
const MAX_FREE_SLOTS: usize = 3;

/// The largest batch to hold memory for. A larger one is not refused: the memory grows when it comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    pub max_batch_tokens: usize,
    pub max_batch_size: usize,
}

impl Capacity {
    fn layout(&self) -> Layout {
        // A sequence has at least one token.
        let num_seqs = self.max_batch_size.min(self.max_batch_tokens).max(1);
        Layout::new(token_bucket(self.max_batch_tokens), seq_bucket(num_seqs))
    }
}

/// Device memory of a model, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    pub weights: usize,
    /// Activations of the largest bucket.
    pub activations: usize,
    /// What cuBLASLt works in.
    pub workspace: usize,
    /// Uploads and rows of the batches under way.
    pub staging: usize,
}

impl Budget {
    /// Of a model with these sizes at this capacity.
    pub fn of(sizes: &EncoderSizes, capacity: &Capacity) -> Self {
        let layout = capacity.layout();
        Self {
            weights: sizes.weight_bytes(),
            activations: sizes.scratch_bytes(layout.token_capacity),
            workspace: WORKSPACE_BYTES,
            staging: layout.num_words(true) * WORD
                + MAX_FREE_SLOTS * Slot::device_bytes(layout.seq_capacity, sizes.hidden_size),
        }
    }

    /// All of it.
    pub fn num_bytes(&self) -> usize {
        self.weights + self.activations + self.workspace + self.staging
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |num_bytes: usize| num_bytes.div_ceil(1 << 20);
        write!(
            f,
            "{} MiB (weights {}, activations {}, workspace {}, staging {})",
            mib(self.num_bytes()),
            mib(self.weights),
            mib(self.activations),
            mib(self.workspace),
            mib(self.staging)
        )
    }
}

/// An encoder with pooling on one device. Cheap to clone; batches under way hold it too.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

struct Shared {
    gpu: Gpu,
    compute: Arc<CudaStream>,
    copy: Arc<CudaStream>,
    encoder: DeviceEncoder,
    pooling: Pooling,
    capacity: Capacity,
    /// Held for the time of enqueueing a batch. A worker has a device to itself; the lock is for whoever else asks.
    state: Mutex<State>,
}

struct State {
    gemm: Gemm,
    graphs: Graphs<GraphKey>,
    /// `None` after an allocation failed, until the next batch asks for what it needs.
    memory: Option<Memory>,
    free_slots: Vec<Slot>,
}

/// What all batches share, in the order of the compute stream.
struct Memory {
    largest: Layout,
    upload: Span,
    scratch: Scratch,
    arena: Arena,
}

/// What a forward's launches depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct GraphKey {
    token_capacity: usize,
    seq_capacity: usize,
    max_seqlen: usize,
    has_token_types: bool,
}

impl Engine {
    /// Puts an encoder to work: streams, memory for `capacity`, and products timed for each of its buckets, unless
    /// `dir` holds what an earlier start has found.
    ///
    /// Blocks: a second or two where the products are timed.
    /// Errors: the device's, out of memory among them.
    pub fn new(
        gpu: Gpu,
        compute: Arc<CudaStream>,
        encoder: DeviceEncoder,
        pooling: Pooling,
        capacity: Capacity,
        dir: Option<&Path>,
    ) -> Result<Self> {
        let gemm = Gemm::new(&gpu, &compute, encoder.dtype, dir)?;
        let copy = gpu.new_stream()?;
        let state = State { gemm, graphs: Graphs::new(), memory: None, free_slots: Vec::new() };
        let shared = Shared { gpu, compute, copy, encoder, pooling, capacity, state: Mutex::new(state) };
        shared.tune()?;
        Ok(Self { shared: Arc::new(shared) })
    }

    pub fn sizes(&self) -> &EncoderSizes {
        &self.shared.encoder.sizes
    }

    pub fn dtype(&self) -> HalfType {
        self.shared.encoder.dtype
    }

    /// Buckets of small batches that are launched as CUDA graphs by now.
    pub fn num_graphs(&self) -> usize {
        self.shared.state.lock().graphs.num_graphs()
    }

    /// Packs a batch into pinned memory, enqueues all of its work and returns without waiting for the device. Ids must
    /// be smaller than the vocabulary; the kernels read no row beyond it.
    ///
    /// Errors: [`Error::Shape`] for a batch that breaks its rules or a sequence longer than the positions reach; the
    /// device's, out of memory among them where the batch is larger than any before.
    pub fn launch(&self, batch: &Batch) -> Result<Pending> {
        batch.check()?;
        let (got, reach) = (batch.max_seqlen(), self.sizes().max_seq_len());
        if got > reach {
            let expected = format!("sequences of at most {reach} tokens");
            return Err(Error::Shape { op: "encoder", operand: "cu_seqlens", expected, got: got.to_string() });
        }
        let shared = &self.shared;
        let layout = Layout::of(batch);
        let mut state = shared.state.lock();
        shared.reserve(&mut state, &layout)?;
        let mut slot = shared.take_slot(&mut state, &layout)?;
        match shared.enqueue(&mut state, &mut slot, batch, &layout) {
            Ok(()) => Ok(Pending { slot: Some(slot), engine: self.clone() }),
            Err(error) => {
                // Some of it may be under way on the slot's memory, unmarked. On a lost device this fails at once.
                let _ = shared.compute.synchronize();
                let _ = shared.copy.synchronize();
                Err(error)
            }
        }
    }
}

impl Shared {
    /// Times the products of every bucket.
    fn tune(&self) -> Result<()> {
        let start = std::time::Instant::now();
        let mut state = self.state.lock();
        self.reserve(&mut state, &self.capacity.layout())?;
        let State { gemm, memory: Some(memory), .. } = &mut *state else { return Ok(()) };
        // Not zeros, which compute cooler and so faster than anything real: 0x3c3c is 1.06 in f16, 0.011 in bf16.
        memory.arena.fill(0x3c, &self.compute)?;
        let buckets = token_buckets(self.capacity.max_batch_tokens);
        for &bucket in &buckets {
            self.encoder.tune(gemm, bucket, &memory.scratch)?;
        }
        self.compute.synchronize()?;
        gemm.save();
        tracing::info!(
            num_buckets = buckets.len(),
            seconds = start.elapsed().as_secs_f64(),
            "products timed, or read from an earlier start"
        );
        Ok(())
    }

    /// Sees to it that there is memory for a layout.
    fn reserve(&self, state: &mut State, layout: &Layout) -> Result<()> {
        let held = state.memory.as_ref().map(|memory| memory.largest);
        if held.is_some_and(|held| {
            held.token_capacity >= layout.token_capacity && held.seq_capacity >= layout.seq_capacity
        }) {
            return Ok(());
        }
        // Graphs hold the old addresses, and what is under way uses them.
        self.compute.synchronize()?;
        state.graphs.clear();
        state.memory = None;
        let largest = Layout::new(
            layout.token_capacity.max(held.map_or(0, |held| held.token_capacity)),
            layout.seq_capacity.max(held.map_or(0, |held| held.seq_capacity)),
        );
        let sizes = &self.encoder.sizes;
        let upload_bytes = largest.num_words(true) * WORD;
        let num_bytes = Arena::padded(upload_bytes) + sizes.scratch_bytes(largest.token_capacity);
        let mut arena = Arena::new(&self.compute, num_bytes)?;
        let upload = arena.cut(upload_bytes)?;
        let scratch = Scratch::cut(&mut arena, sizes, largest.token_capacity)?;
        if held.is_some() {
            tracing::info!(
                tokens = largest.token_capacity,
                sequences = largest.seq_capacity,
                mib = num_bytes >> 20,
                "device memory grown for a larger batch"
            );
        }
        state.memory = Some(Memory { largest, upload, scratch, arena });
        Ok(())
    }

    /// A slot for a layout whose last batch has ended.
    fn take_slot(&self, state: &mut State, layout: &Layout) -> Result<Slot> {
        state.free_slots.retain(|slot| slot.holds(layout));
        if let Some(slot) = state.free_slots.pop() {
            slot.wait()?;
            return Ok(slot);
        }
        let largest = state.memory.as_ref().map_or(*layout, |memory| memory.largest);
        Slot::new(&self.gpu, &self.compute, &self.copy, &largest, self.encoder.sizes.hidden_size)
    }

    fn enqueue(&self, state: &mut State, slot: &mut Slot, batch: &Batch, layout: &Layout) -> Result<()> {
        let State { gemm, graphs, memory, .. } = state;
        let Some(Memory { upload, scratch, .. }) = memory.as_ref() else {
            return Err(Error::Internal { cause: "a batch without device memory".to_string() });
        };
        let has_token_types = batch.token_type_ids.is_some();
        slot.enqueue_upload(batch, layout, *upload, &self.compute)?;
        let spans = layout.spans(*upload, has_token_types)?;
        let max_seqlen = batch.max_seqlen().next_multiple_of(BLOCK_QUERIES).min(layout.token_capacity);
        let mut forward = || self.encoder.forward(&self.compute, gemm, &spans, layout, max_seqlen, scratch);
        let Layout { token_capacity, seq_capacity, .. } = *layout;
        if token_capacity <= MAX_GRAPH_TOKENS {
            let key = GraphKey { token_capacity, seq_capacity, max_seqlen, has_token_types };
            graphs.run(key, &self.compute, forward)?;
        } else {
            forward()?;
        }
        // Outside the graph: its output is the slot's own.
        let (rows, flag) = (slot.device_rows(layout)?, slot.device_flag()?);
        self.encoder.pool(&self.compute, &spans, layout, scratch, self.pooling, rows, flag)?;
        slot.enqueue_results(batch.num_seqs(), &self.compute)
    }
}

/// A batch under way. Dropping it abandons the rows, not the computation.
pub struct Pending {
    /// Given back when this is dropped; `Some` until then.
    slot: Option<Slot>,
    engine: Engine,
}

impl Pending {
    /// Whether [`Pending::wait`] returns at once.
    pub fn is_ready(&self) -> bool {
        self.slot().is_ready()
    }

    /// Waits for the rows.
    ///
    /// Errors: the device's, of any kernel before the rows.
    pub fn wait(&self) -> Result<()> {
        self.slot().wait()
    }

    /// A row that holds a value that is no number or infinite, after [`Pending::wait`].
    pub fn not_finite_row(&self) -> Result<Option<usize>> {
        self.slot().not_finite_row()
    }

    /// Appends the first `dimensions` values of row `i`, after [`Pending::wait`]; i < num_seqs.
    pub fn read_row(&self, i: usize, dimensions: usize, values: &mut Vec<f32>) -> Result<()> {
        values.extend(self.slot().row(i, dimensions)?.iter().map(|&bits| f32::from_bits(bits)));
        Ok(())
    }

    /// How long the device was at each part, after [`Pending::wait`].
    pub fn times(&self) -> Option<Times> {
        self.slot().times()
    }

    fn slot(&self) -> &Slot {
        self.slot.as_ref().expect("the slot is taken by `drop` alone")
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let mut state = self.engine.shared.state.lock();
        if let Some(slot) = self.slot.take()
            && state.free_slots.len() < MAX_FREE_SLOTS
        {
            state.free_slots.push(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::linear::Activation;

    #[test]
    fn the_budget_adds_up_and_says_what_for() {
        let sizes = EncoderSizes {
            vocab_size: 30522,
            num_positions: 512,
            position_offset: 0,
            num_token_types: 2,
            hidden_size: 768,
            num_heads: 12,
            num_layers: 12,
            intermediate_size: 3072,
            activation: Activation::Gelu,
            layer_norm_eps: 1e-12,
        };
        let budget = Budget::of(&sizes, &Capacity { max_batch_tokens: 16384, max_batch_size: 1024 });
        assert_eq!(budget.activations, 16384 * (3 * 768 + 3072) * 2);
        assert_eq!(budget.workspace, 32 << 20);
        let text = budget.to_string();
        assert!(text.contains("activations 168") && text.contains("workspace 32"), "{text}");
        let parts = [budget.weights, budget.activations, budget.workspace, budget.staging];
        assert_eq!(budget.num_bytes(), parts.iter().sum::<usize>());
    }

    #[test]
    fn a_capacity_has_no_more_sequences_than_tokens() {
        let layout = Capacity { max_batch_tokens: 100, max_batch_size: 1000 }.layout();
        assert_eq!((layout.token_capacity, layout.seq_capacity), (128, 128));
    }
}
