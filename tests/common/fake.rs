//! A model that computes almost nothing, for tests and benches of everything around a model.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use eremois::model::encode::Encoder;
use eremois::model::pack::{PackedInput, Pooling};
use eremois::model::{Backend, InFlight, LoadedModel, ModelInfo, Placed, Rows};
use eremois::{Error, Result};
use parking_lot::{Condvar, Mutex};
use tokenizers::Tokenizer;

pub const HIDDEN_SIZE: usize = 8;
pub const VOCAB_SIZE: usize = 1000;
/// The word whose id makes a forward panic: `panic` in a text.
pub const PANIC_ID: u32 = 998;
/// The word whose id makes a forward fail: `fail` in a text.
pub const FAIL_ID: u32 = 997;

/// What a fake model does, seen and steered from a test.
#[derive(Default)]
pub struct Controls {
    pub num_batches: AtomicUsize,
    /// Sizes of the batches launched, in order.
    pub batch_sizes: Mutex<Vec<usize>>,
    /// Slept in every launch, plus `per_token` for each token.
    pub per_batch: Mutex<Duration>,
    pub per_token: Mutex<Duration>,
    /// While true every launch fails: a lost device.
    pub broken: AtomicBool,
    /// While true every launch waits: a device that stands still. See [`Controls::hold`].
    is_held: Mutex<bool>,
    released: Condvar,
}

impl Controls {
    /// Makes the device stand still before the next batch.
    pub fn hold(&self) {
        *self.is_held.lock() = true;
    }

    pub fn release(&self) {
        *self.is_held.lock() = false;
        self.released.notify_all();
    }

    /// Sequences launched so far.
    pub fn num_seqs(&self) -> usize {
        self.batch_sizes.lock().iter().sum()
    }
}

struct FakeBackend(Arc<Controls>);

/// Row i holds the sum, the count and the first ids of its sequence: equal alone and in any batch.
fn row_of(ids: &[u32], dimensions: usize) -> Vec<f32> {
    let mut row = vec![0f32; HIDDEN_SIZE];
    row[0] = ids.iter().sum::<u32>() as f32;
    row[1] = ids.len() as f32;
    for (slot, &id) in row[2..].iter_mut().zip(ids) {
        *slot = id as f32;
    }
    row.truncate(dimensions);
    row
}

impl Backend for FakeBackend {
    fn launch(&self, batch: PackedInput) -> Result<Box<dyn InFlight>> {
        batch.check(VOCAB_SIZE, usize::MAX, HIDDEN_SIZE)?;
        self.0.num_batches.fetch_add(1, Ordering::SeqCst);
        self.0.batch_sizes.lock().push(batch.num_seqs());
        self.0.released.wait_while(&mut self.0.is_held.lock(), |is_held| *is_held);
        let pause = *self.0.per_batch.lock() + *self.0.per_token.lock() * batch.total_tokens() as u32;
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
        assert!(!batch.input_ids.contains(&PANIC_ID), "the fake model was asked to panic");
        if self.0.broken.load(Ordering::SeqCst) || batch.input_ids.contains(&FAIL_ID) {
            return Err(Error::Forward { model: "fake".into(), cause: "asked to fail".into() });
        }
        let mut rows = Rows { values: Vec::new(), offsets: vec![0] };
        for (bounds, spec) in batch.cu_seqlens.windows(2).zip(&batch.rows) {
            let ids = &batch.input_ids[bounds[0] as usize..bounds[1] as usize];
            rows.values.extend(row_of(ids, spec.dimensions));
            rows.offsets.push(rows.values.len());
        }
        Ok(Box::new(Done(rows)))
    }
}

struct Done(Rows);

impl InFlight for Done {
    fn finish(self: Box<Self>) -> Result<Rows> {
        Ok(self.0)
    }
}

/// A tokenizer of whole words split at white space: `w0`, `w1`, ... `w996`, `fail`, `panic`, `[UNK]`.
pub fn tokenizer() -> Tokenizer {
    let mut vocab: BTreeMap<String, u32> = (0..997).map(|i| (format!("w{i}"), i)).collect();
    vocab.insert("fail".into(), FAIL_ID);
    vocab.insert("panic".into(), PANIC_ID);
    vocab.insert("[UNK]".into(), 999);
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    });
    Tokenizer::from_bytes(json.to_string()).expect("the tokenizer above is well formed")
}

/// A fake model of this name and the handle on it.
pub fn model(name: &str, max_seq_len: usize) -> (LoadedModel, Arc<Controls>) {
    let controls = Arc::new(Controls::default());
    let info = ModelInfo {
        name: name.into(),
        version: "1".into(),
        task: "embed".into(),
        architecture: "fake".into(),
        dtype: "f32".into(),
        device: "cpu".into(),
        hidden_size: HIDDEN_SIZE,
        vocab_size: VOCAB_SIZE,
        max_seq_len,
        pooling: Pooling::Mean,
        normalize: false,
        prompts: BTreeMap::from([("query".to_string(), "w1 ".to_string())]),
        default_prompt: None,
        licence: None,
        created: 0,
    };
    let loaded = LoadedModel {
        info: Arc::new(info),
        encoder: Arc::new(Encoder::new(tokenizer(), max_seq_len, VOCAB_SIZE)),
        backends: vec![placed("cpu", &controls)],
    };
    (loaded, controls)
}

/// A fake model on several devices, and the handle on each.
pub fn model_on(devices: &[&str], name: &str, max_seq_len: usize) -> (LoadedModel, Vec<Arc<Controls>>) {
    let controls: Vec<Arc<Controls>> = devices.iter().map(|_| Arc::default()).collect();
    let backends = devices.iter().zip(&controls).map(|(device, controls)| placed(device, controls)).collect();
    (LoadedModel { backends, ..model(name, max_seq_len).0 }, controls)
}

fn placed(device: &str, controls: &Arc<Controls>) -> Placed {
    Placed { device: device.to_string(), backend: Arc::new(FakeBackend(controls.clone())) }
}

/// Puts something between the model and its only device.
pub fn wrap<B: Backend>(model: &mut LoadedModel, wrapper: impl FnOnce(Arc<dyn Backend>) -> B) {
    let placed = &mut model.backends[0];
    placed.backend = Arc::new(wrapper(placed.backend.clone()));
}
