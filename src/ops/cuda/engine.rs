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

use std::path::Path;
use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream};
use parking_lot::Mutex;

use super::arena::Arena;
use super::attention::BLOCK_QUERIES;
use super::budget::{Budget, Capacity, MAX_FREE_SLOTS};
use super::encoder::DeviceEncoder;
use super::gemm::{Gemm, WORKSPACE_BYTES};
use super::graph::Graphs;
use super::layout::{Batch, Layout, WORD, token_buckets};
use super::sizes::{EncoderSizes, Scratch};
use super::staging::{Slot, Times};
use super::{Gpu, HalfType, Span};
use crate::ops::pool::Pooling;
use crate::{Error, Result};

/// Buckets up to here are captured: in a larger one the device computes for longer than the host takes to launch.
const MAX_GRAPH_TOKENS: usize = 4096;

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
    /// What there was memory for when it was last asked, at load or for new limits. Never held while a batch is
    /// enqueued: whoever asks must not wait for the device.
    capacity: Mutex<Capacity>,
    /// Held for the time of enqueueing a batch. A worker has a device to itself; the lock is for whoever else asks.
    state: Mutex<State>,
}

struct State {
    gemm: Gemm,
    graphs: Graphs<GraphKey>,
    /// `None` after an allocation failed, until the next batch asks for what it needs.
    memory: Option<Memory>,
    free_slots: Vec<Slot>,
    /// The end of the last batch's forward on the compute stream.
    last_computed: Option<Arc<CudaEvent>>,
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
        let state = State { gemm, graphs: Graphs::new(), memory: None, free_slots: Vec::new(), last_computed: None };
        let (capacity, state) = (Mutex::new(capacity), Mutex::new(state));
        let shared = Shared { gpu, compute, copy, encoder, pooling, capacity, state };
        shared.tune()?;
        Ok(Self { shared: Arc::new(shared) })
    }

    pub fn sizes(&self) -> &EncoderSizes {
        &self.shared.encoder.sizes
    }

    pub fn dtype(&self) -> HalfType {
        self.shared.encoder.dtype
    }

    /// Refuses batches that there is no memory for. Takes none: that is done by the first batch that needs it.
    ///
    /// Blocks: no; also not while the device computes or hangs.
    /// Errors: [`Error::Invalid`] naming the limit, what it takes and what is free.
    pub fn plan(&self, capacity: Capacity) -> Result<()> {
        let mut planned = self.shared.capacity.lock();
        let capacity = capacity.max(*planned);
        let (before, after) = (Budget::of(self.sizes(), &planned), Budget::of(self.sizes(), &capacity));
        if after.num_bytes() > before.num_bytes() {
            let (more, free) = (after.num_bytes() - before.num_bytes(), self.shared.gpu.free_bytes()?);
            if more > free {
                let reason = format!(
                    "{} tokens in up to {} sequences take {after} of device memory, {} MiB more than now; {} MiB are free",
                    capacity.max_batch_tokens,
                    capacity.max_batch_size,
                    more.div_ceil(1 << 20),
                    free >> 20
                );
                return Err(Error::Invalid { field: "max_batch_tokens".to_string(), reason });
            }
        }
        *planned = capacity;
        Ok(())
    }

    /// The memory that there is to be for the largest batch.
    pub fn planned(&self) -> Budget {
        Budget::of(self.sizes(), &self.shared.capacity.lock())
    }

    /// The memory that has been allocated and is not under way with a batch.
    ///
    /// Blocks: while a batch is enqueued.
    pub fn taken(&self) -> Budget {
        let state = self.shared.state.lock();
        let slots: usize = state.free_slots.iter().map(Slot::num_device_bytes).sum();
        let (upload, arena) = match &state.memory {
            Some(memory) => (Arena::padded(memory.upload.num_bytes), memory.arena.num_bytes()),
            None => (0, 0),
        };
        Budget {
            weights: self.shared.encoder.num_bytes(),
            activations: arena - upload,
            workspace: WORKSPACE_BYTES,
            staging: upload + slots,
        }
    }

    /// Bytes that are free on the device now, of all its processes.
    pub fn free_bytes(&self) -> Result<usize> {
        self.shared.gpu.free_bytes()
    }

    /// Buckets of small batches that are launched as CUDA graphs by now.
    pub fn num_graphs(&self) -> usize {
        self.shared.state.lock().graphs.num_graphs()
    }

    /// Packs a batch into pinned memory, enqueues all of its work and returns without waiting for the device. Ids must
    /// be smaller than the vocabulary; the kernels read no row beyond it.
    ///
    /// Errors: [`Error::Shape`] for a batch that breaks its rules or a sequence longer than the positions reach; the
    /// device's. After [`Error::OutOfMemory`] all memory but the weights has been given back: a smaller batch finds it.
    pub fn launch(&self, batch: &Batch) -> Result<Pending> {
        batch.check()?;
        let (got, reach) = (batch.max_seqlen(), self.sizes().max_seq_len());
        if got > reach {
            let expected = format!("sequences of at most {reach} tokens");
            return Err(Error::Shape { op: "encoder", operand: "cu_seqlens", expected, got: got.to_string() });
        }
        let (shared, layout) = (&self.shared, Layout::of(batch));
        let (mut state, mut slot) = (shared.state.lock(), None);
        match shared.start(&mut state, &mut slot, batch, &layout) {
            Ok(()) => Ok(Pending { slot, engine: self.clone() }),
            Err(error) => Err(shared.settle(&mut state, slot, error)),
        }
    }
}

impl Shared {
    /// Times the products of every bucket.
    fn tune(&self) -> Result<()> {
        let start = std::time::Instant::now();
        let (capacity, mut state) = (*self.capacity.lock(), self.state.lock());
        self.reserve(&mut state, &capacity.layout())?;
        let State { gemm, memory: Some(memory), .. } = &mut *state else { return Ok(()) };
        // Not zeros, which compute cooler and so faster than anything real: 0x3c3c is 1.06 in f16, 0.011 in bf16.
        memory.arena.fill(0x3c, &self.compute)?;
        let buckets = token_buckets(capacity.max_batch_tokens);
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

    /// From a batch to its work on both streams. The slot is handed out as soon as there is one: where this fails, some
    /// of the work may be under way on it.
    fn start(&self, state: &mut State, slot: &mut Option<Slot>, batch: &Batch, layout: &Layout) -> Result<()> {
        self.reserve(state, layout)?;
        let slot = slot.insert(self.take_slot(state, layout)?);
        slot.follow(state.last_computed.take());
        self.enqueue(state, slot, batch, layout)?;
        state.last_computed = Some(slot.computed());
        Ok(())
    }

    /// Leaves nothing of a failed launch under way, finds out what the failure means, and after a want of memory gives
    /// back all that later batches can take anew. Returns what to tell of it.
    fn settle(&self, state: &mut State, slot: Option<Slot>, error: Error) -> Error {
        let settled = self.compute.synchronize().and(self.copy.synchronize());
        // A launch that fails on a lost device need not say so; whoever waits for a stream of it is told.
        if let Err(Error::DeviceLost { cause }) = settled.map_err(Error::from) {
            return Error::DeviceLost { cause };
        }
        if matches!(error, Error::OutOfMemory { .. }) {
            drop(slot);
            state.graphs.clear();
            state.memory = None;
            state.free_slots.clear();
            // What was freed in the stream's order goes back to the device when the stream is waited for.
            let _ = self.compute.synchronize();
        }
        error
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
        // The new memory may be where the old one is: that must be back at the device by then.
        self.compute.synchronize()?;
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
