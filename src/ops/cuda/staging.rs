//! Pinned memory for one batch on its way to the device and back, with the events that mark its way.

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, PinnedHostSlice, result, sys::CUevent_flags};

use super::arena::Arena;
use super::layout::{Batch, Layout, WORD};
use super::{Gpu, Span};
use crate::Result;

/// Words before the first row of the results: the flag for what is not finite, and zeros up to 16 bytes.
const FLAG_WORDS: usize = 4;

/// What one batch needs of its own while it is under way. There are two of it or more, so that a batch can be packed
/// and enqueued while the one before computes.
pub struct Slot {
    upload: PinnedHostSlice<u32>,
    results: PinnedHostSlice<u32>,
    /// Owns what `device_span` points to.
    device_results: Arena,
    device_span: Span,
    seq_capacity: usize,
    hidden_size: usize,
    marks: Marks,
    /// The end of the forward before this batch's.
    computed_before: Option<Arc<CudaEvent>>,
    copy: Arc<CudaStream>,
}

/// Points on the streams: before the upload, after it, after the forward, after the copy back.
struct Marks {
    begun: CudaEvent,
    uploaded: CudaEvent,
    /// Shared with the next batch, which asks how long the device was idle in between.
    computed: Arc<CudaEvent>,
    copied: CudaEvent,
}

/// How long the device was at each part of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    pub upload: Duration,
    pub forward: Duration,
    pub download: Duration,
    /// What the compute stream stood still between the forward before and this upload; `None` for the first batch.
    pub idle: Option<Duration>,
}

impl Slot {
    /// Device memory of a slot's results.
    pub fn device_bytes(seq_capacity: usize, hidden_size: usize) -> usize {
        Arena::padded((FLAG_WORDS + seq_capacity * hidden_size) * WORD)
    }

    /// For batches up to this layout.
    ///
    /// Blocks: pins memory, about a millisecond.
    pub fn new(
        gpu: &Gpu,
        compute: &Arc<CudaStream>,
        copy: &Arc<CudaStream>,
        largest: &Layout,
        hidden_size: usize,
    ) -> Result<Self> {
        let context = gpu.context();
        let num_words = FLAG_WORDS + largest.seq_capacity * hidden_size;
        let mark = || new_mark(context);
        // SAFETY: both are unset. The upload is written before it is copied (in write-combined memory, which the host
        // never reads); the results are read only after the copy into them has ended.
        let (upload, results) = unsafe {
            (
                context.alloc_pinned::<u32>(largest.num_words(true))?,
                context.alloc_pinned_with_flags::<u32>(num_words, 0)?,
            )
        };
        let mut device_results = Arena::new(compute, num_words * WORD)?;
        // The first batch must find its flag at 0; later ones find what `enqueue_results` left.
        device_results.fill(0, compute)?;
        let device_span = device_results.cut(num_words * WORD)?;
        compute.synchronize()?;
        let marks = Marks { begun: mark()?, uploaded: mark()?, computed: Arc::new(mark()?), copied: mark()? };
        Ok(Self {
            upload,
            results,
            device_results,
            device_span,
            seq_capacity: largest.seq_capacity,
            hidden_size,
            marks,
            computed_before: None,
            copy: copy.clone(),
        })
    }

    /// Device memory of this slot.
    pub fn num_device_bytes(&self) -> usize {
        self.device_results.num_bytes()
    }

    /// Says which forward comes before this batch's on the compute stream.
    pub fn follow(&mut self, computed_before: Option<Arc<CudaEvent>>) {
        self.computed_before = computed_before;
    }

    /// The end of this batch's forward, after [`Slot::enqueue_results`].
    pub fn computed(&self) -> Arc<CudaEvent> {
        self.marks.computed.clone()
    }

    /// Whether a batch of this layout fits.
    pub fn holds(&self, layout: &Layout) -> bool {
        layout.seq_capacity <= self.seq_capacity && layout.num_words(true) <= self.upload.len()
    }

    /// The rows on the device, [seq_capacity of the layout, hidden_size] f32.
    pub fn device_rows(&self, layout: &Layout) -> Result<Span> {
        self.device_span.part(FLAG_WORDS * WORD, layout.seq_capacity * self.hidden_size * WORD)
    }

    /// The word that pooling sets for a row that is not finite; 0 before.
    pub fn device_flag(&self) -> Result<Span> {
        self.device_span.part(0, WORD)
    }

    /// Packs a batch and enqueues its one copy to `device` on the compute stream. The slot's last batch must have
    /// been waited for.
    pub fn enqueue_upload(&mut self, batch: &Batch, layout: &Layout, device: Span, compute: &CudaStream) -> Result<()> {
        let num_words = layout.num_words(batch.token_type_ids.is_some());
        let device = device.part(0, num_words * WORD)?;
        let words = self.upload.as_mut_slice()?;
        layout.write(batch, words)?;
        self.marks.begun.record(compute)?;
        // SAFETY: `device` was cut to the words' size above. The pinned words stay as they are until the slot is used
        // again or dropped, and both wait for the batch.
        unsafe { result::memcpy_htod_async(device.ptr, &words[..num_words], compute.cu_stream()) }?;
        self.marks.uploaded.record(compute)?;
        Ok(())
    }

    /// After the forward was enqueued on `compute`: enqueues the copy of the rows on the copy stream, so that the next
    /// batch need not wait for it.
    pub fn enqueue_results(&mut self, num_seqs: usize, compute: &CudaStream) -> Result<()> {
        let num_words = FLAG_WORDS + num_seqs * self.hidden_size;
        let device = self.device_span.part(0, num_words * WORD)?;
        // The batch after this slot's last may still ask when that was computed.
        if Arc::get_mut(&mut self.marks.computed).is_none() {
            self.marks.computed = Arc::new(new_mark(self.copy.context())?);
        }
        self.marks.computed.record(compute)?;
        self.copy.wait(&self.marks.computed)?;
        let words = &mut self.results.as_mut_slice()?[..num_words];
        // SAFETY: both ranges hold `num_words`; the host's is not read before `copied` is reached, nor freed (`Drop`).
        // The flag is set back in the copy stream's order, after it was read and before the slot's next batch.
        unsafe {
            result::memcpy_dtoh_async(words, device.ptr, self.copy.cu_stream())?;
            result::memset_d8_async(device.ptr, 0, FLAG_WORDS * WORD, self.copy.cu_stream())?;
        }
        self.marks.copied.record(&self.copy)?;
        Ok(())
    }

    /// Whether the results are on the host; also where the device has failed, which [`Slot::wait`] then says.
    pub fn is_ready(&self) -> bool {
        self.marks.copied.try_is_complete().unwrap_or(true)
    }

    /// Waits until the results are on the host.
    ///
    /// Errors: the device's, from any kernel enqueued before.
    pub fn wait(&self) -> Result<()> {
        Ok(self.marks.copied.synchronize()?)
    }

    /// The row that is not finite, after [`Slot::wait`].
    pub fn not_finite_row(&self) -> Result<Option<usize>> {
        Ok(match self.results.as_slice()?[0] {
            0 => None,
            row => Some(row as usize - 1),
        })
    }

    /// The first `dimensions` values of row `i` as bits of f32, after [`Slot::wait`]; i < num_seqs.
    pub fn row(&self, i: usize, dimensions: usize) -> Result<&[u32]> {
        Ok(&self.results.as_slice()?[FLAG_WORDS + i * self.hidden_size..][..dimensions])
    }

    /// How long the parts took, after [`Slot::wait`]; `None` where the driver does not say.
    pub fn times(&self) -> Option<Times> {
        // Each asks the driver and no stream: about a microsecond.
        let between = |from: &CudaEvent, to: &CudaEvent| {
            let ms = from.elapsed_ms(to).ok()?;
            Some(Duration::from_secs_f64(f64::from(ms.max(0.0)) / 1e3))
        };
        let Marks { begun, uploaded, computed, copied } = &self.marks;
        let idle = match &self.computed_before {
            Some(before) => Some(between(before, begun)?),
            None => None,
        };
        Some(Times {
            idle,
            upload: between(begun, uploaded)?,
            forward: between(uploaded, computed)?,
            download: between(computed, copied)?,
        })
    }
}

/// A timed event: the phases of a batch cost four records, about a microsecond each.
fn new_mark(context: &Arc<CudaContext>) -> Result<CudaEvent> {
    Ok(context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?)
}

impl Drop for Slot {
    /// Waits for what reads or writes the slot's memory.
    fn drop(&mut self) {
        // On a lost device both fail, and nothing is under way any more.
        let _ = self.marks.uploaded.synchronize();
        let _ = self.marks.copied.synchronize();
    }
}
