//! A model that computes almost nothing, for tests and benches of everything around a model.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use eremois::model::encode::Encoder;
use eremois::model::pack::{PackedInput, Pooling, Wanted};
use eremois::model::signature::{Datatype, Signature, TensorSpec};
use eremois::model::{Backend, DeviceTimes, InFlight, LoadedModel, ModelInfo, Placed, Rows};
use eremois::{Error, Result};
use parking_lot::{Condvar, Mutex};
use tokenizers::Tokenizer;

pub const HIDDEN_SIZE: usize = 8;
pub const VOCAB_SIZE: usize = 1000;
/// The word whose id makes a forward panic: `panic` in a text.
pub const PANIC_ID: u32 = 998;
/// The word whose id makes a forward fail: `fail` in a text.
pub const FAIL_ID: u32 = 997;

/// The word whose id loses the device for good: `lose` in a text.
pub const LOSE_ID: u32 = 996;
/// The word whose id makes a forward hang for ever: `hang` in a text.
pub const HANG_ID: u32 = 995;

/// What a fake model does, seen and steered from a test.
#[derive(Default)]
pub struct Controls {
    pub num_batches: AtomicUsize,
    /// Sizes of the batches launched, in order.
    pub batch_sizes: Mutex<Vec<usize>>,
    /// Slept in every launch, plus `per_token` for each token.
    pub per_batch: Mutex<Duration>,
    pub per_token: Mutex<Duration>,
    /// While true every launch fails: a device that is ill.
    pub broken: AtomicBool,
    /// While true every launch waits: a device that stands still. See [`Controls::hold`].
    is_held: Mutex<bool>,
    released: Condvar,
    /// Once true every launch fails as one on a device that is lost to the process.
    pub lost: AtomicBool,
    /// Tokens of the largest batch that there is memory for; 0: any.
    pub memory_tokens: AtomicUsize,
    /// Tokens of the largest limit that is taken; 0: any.
    pub most_tokens: AtomicUsize,
    /// Times the worker told that the warm-up has passed.
    pub num_warmed_up: AtomicUsize,
    /// What the device says of itself.
    pub hangs_for_good: AtomicBool,
    /// What the device's clock says of every batch.
    pub device_times: Mutex<Option<DeviceTimes>>,
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
        if batch.input_ids.contains(&LOSE_ID) {
            self.0.lost.store(true, Ordering::SeqCst);
        }
        if self.0.lost.load(Ordering::SeqCst) {
            return Err(Error::DeviceLost { cause: "asked to lose the device".into() });
        }
        while batch.input_ids.contains(&HANG_ID) {
            std::thread::park();
        }
        let memory_tokens = self.0.memory_tokens.load(Ordering::SeqCst);
        if memory_tokens > 0 && batch.total_tokens() > memory_tokens {
            return Err(Error::OutOfMemory { cause: format!("no memory beyond {memory_tokens} tokens") });
        }
        assert!(!batch.input_ids.contains(&PANIC_ID), "the fake model was asked to panic");
        if self.0.broken.load(Ordering::SeqCst) || batch.input_ids.contains(&FAIL_ID) {
            return Err(Error::Forward { model: "fake".into(), cause: "asked to fail".into() });
        }
        let mut rows = Rows::with_capacity(batch.num_seqs(), 0);
        for (i, (bounds, spec)) in batch.cu_seqlens.windows(2).zip(&batch.rows).enumerate() {
            let ids = &batch.input_ids[bounds[0] as usize..bounds[1] as usize];
            match spec {
                Wanted::Vector(row) => rows.values.extend(row_of(ids, row.dimensions)),
                Wanted::TokenVectors => ids.iter().for_each(|id| rows.values.extend(row_of(&[*id], HIDDEN_SIZE))),
                Wanted::Outputs => {
                    let [a, b, c] = *batch.values_of(i) else { panic!("the fake tensors are of three values") };
                    rows.values.extend([2.0 * a, 2.0 * b, a + b + c]);
                }
                other => panic!("the fake model embeds, it has no {other:?}"),
            }
            rows.offsets.push(rows.values.len());
        }
        rows.device_times = *self.0.device_times.lock();
        Ok(Box::new(Done(rows)))
    }

    fn check_limits(&self, max_batch_tokens: usize, _: usize) -> Result<()> {
        match self.0.most_tokens.load(Ordering::SeqCst) {
            most if most > 0 && max_batch_tokens > most => {
                Err(Error::Invalid { field: "max_batch_tokens".into(), reason: format!("no memory beyond {most}") })
            }
            _ => Ok(()),
        }
    }

    fn warmed_up(&self) {
        self.0.num_warmed_up.fetch_add(1, Ordering::SeqCst);
    }

    fn hangs_for_good(&self) -> bool {
        self.0.hangs_for_good.load(Ordering::SeqCst)
    }
}

struct Done(Rows);

impl InFlight for Done {
    fn finish(self: Box<Self>) -> Result<Rows> {
        Ok(self.0)
    }
}

/// A tokenizer of whole words split at white space: `w0`, `w1`, ... `w994`, `hang`, `lose`, `fail`, `panic`, `[UNK]`.
pub fn tokenizer() -> Tokenizer {
    let mut vocab: BTreeMap<String, u32> = (0..HANG_ID).map(|i| (format!("w{i}"), i)).collect();
    vocab.insert("hang".into(), HANG_ID);
    vocab.insert("lose".into(), LOSE_ID);
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
        fingerprint: "fake".into(),
        task: "embed".into(),
        labels: Vec::new(),
        is_multi_label: false,
        architecture: "fake".into(),
        dtype: "f32".into(),
        device: "cpu".into(),
        hidden_size: HIDDEN_SIZE,
        dimensions: HIDDEN_SIZE,
        vocab_size: VOCAB_SIZE,
        max_seq_len,
        signature: Signature::default(),
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

/// A fake tensor model: of `x` f32 [2] and `n` i64 [] it makes `twice` f32 [2], twice `x`, and `sum` f32 [], of all three.
pub fn tensor_model(name: &str) -> (LoadedModel, Arc<Controls>) {
    let spec = |name: &str, dtype, shape: &[usize]| TensorSpec { name: name.into(), dtype, shape: shape.to_vec() };
    let inputs = vec![spec("x", Datatype::F32, &[2]), spec("n", Datatype::I64, &[])];
    let outputs = vec![spec("twice", Datatype::F32, &[2]), spec("sum", Datatype::F32, &[])];
    let signature = Signature::of_tensors(inputs, outputs, 1);
    let shape = signature.values.expect("it takes values");
    let (loaded, controls) = model(name, shape.num_tokens);
    let info = ModelInfo {
        task: "infer".into(),
        hidden_size: 3,
        dimensions: 3,
        vocab_size: 1,
        prompts: BTreeMap::new(),
        signature,
        ..ModelInfo::clone(&loaded.info)
    };
    (LoadedModel { info: Arc::new(info), encoder: Arc::new(Encoder::of_tensors(shape)), ..loaded }, controls)
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
