//! The embedding head on a CUDA device: the engine's rows, and the proof that they are right.

use candle_core::{Device, Tensor};

use super::config::EncoderConfig;
use super::embed::by_name;
use super::encoder_weights::EncoderWeights;
use super::load::Placement;
use super::pack::{PackedInput, Pooling, RowSpec};
use super::post_norm::PostNormEncoder;
use super::weights::Weights;
use super::{Backend, DeviceTimes, InFlight, Rows};
use crate::ops::CuSeqlens;
use crate::ops::cuda::budget::{Budget, Capacity};
use crate::ops::cuda::encoder::DeviceEncoder;
use crate::ops::cuda::engine::{Engine, Pending};
use crate::ops::cuda::layout::Batch;
use crate::ops::cuda::sizes::EncoderSizes;
use crate::ops::cuda::{Gpu, HalfType};
use crate::ops::pool::pool;
use crate::request::ModelName;
use crate::{Error, Result};

/// Lengths in tokens of the proof's sequences, as far as the model takes them: one token, an odd number, several of
/// attention's blocks.
const PROOF_LENGTHS: [usize; 4] = [1, 7, 33, 150];

/// An embedding model computed by the engine's own kernels.
pub(super) struct DeviceBackend {
    engine: Engine,
    name: ModelName,
    max_seq_len: usize,
    /// Bytes that were free on the device before anything of the model was there.
    free_before: usize,
}

/// What a model is, as far as its device needs to know.
pub(super) struct DeviceModel<'a> {
    pub name: &'a ModelName,
    /// Opened on the CPU.
    pub weights: &'a Weights,
    pub config: &'a EncoderConfig,
    pub pooling: Pooling,
    pub max_seq_len: usize,
}

impl DeviceModel<'_> {
    /// Uploads the weights, times the products, and compares the rows of a made-up batch with the CPU's.
    ///
    /// Blocks: seconds for a large model.
    /// Errors: [`Error::Forward`] naming the model where its memory does not fit, a weight is beyond `dtype`, the
    /// device fails, or its rows are not the CPU's; [`Error::DeviceLost`].
    pub fn load(&self, ordinal: usize, dtype: HalfType, placement: &Placement) -> Result<DeviceBackend> {
        let loaded = || -> Result<DeviceBackend> {
            let backend = self.put(ordinal, dtype, placement)?;
            self.prove(&backend, dtype)?;
            Ok(backend)
        };
        loaded().map_err(|e| match e {
            // Nothing can be split at load: the model does not fit.
            Error::OutOfMemory { cause } => Error::Forward { model: self.name.to_string(), cause },
            e => by_name(self.name, e),
        })
    }

    fn put(&self, ordinal: usize, dtype: HalfType, placement: &Placement) -> Result<DeviceBackend> {
        let (gpu, sizes) = (Gpu::open(ordinal)?, sizes(self.config));
        let capacity = Capacity {
            max_batch_tokens: placement.max_batch_tokens.max(self.max_seq_len),
            max_batch_size: placement.max_batch_size,
        };
        let (budget, free) = (Budget::of(&sizes, &capacity), gpu.free_bytes()?);
        tracing::info!(model = %self.name, device = ordinal, %budget, free_mib = free >> 20, "device memory planned");
        if budget.num_bytes() > free {
            let cause = format!(
                "the model takes {budget} of device memory at max_batch_tokens {}, {} MiB are free on cuda:{ordinal}",
                capacity.max_batch_tokens,
                free >> 20
            );
            return Err(Error::Internal { cause });
        }
        let reader = EncoderWeights::new(self.weights, self.config)?;
        let stream = gpu.new_stream()?;
        let layers = (0..sizes.num_layers).map(|i| reader.layer(i));
        let encoder =
            DeviceEncoder::new(&gpu, &stream, dtype, sizes, reader.embedding()?, reader.distance_bias()?, layers)?;
        let engine = Engine::new(gpu, stream, encoder, self.pooling, capacity, placement.cache_dir.as_deref())?;
        Ok(DeviceBackend { engine, name: self.name.clone(), max_seq_len: self.max_seq_len, free_before: free })
    }

    /// Wrong rows would be stored and compared for years: a device whose kernels do not compute this model, for
    /// whatever reason, must not serve it.
    fn prove(&self, backend: &DeviceBackend, dtype: HalfType) -> Result<()> {
        let batch = proof_batch(self.config, self.max_seq_len);
        let expected = cpu_rows(self.weights, self.config, self.pooling, &batch)?;
        let got = backend.launch(batch)?.finish()?;
        // A bug is far below either; what rounding costs a model is measured by `scripts/gpu`.
        let least = match dtype {
            HalfType::F16 => 0.999,
            HalfType::Bf16 => 0.99,
        };
        for (i, expected) in expected.iter().enumerate() {
            let similarity = cosine(expected, got.row(i));
            if similarity.is_nan() || similarity < least {
                let cause = format!(
                    "the device's embedding of {} tokens has cosine {similarity:.5} to the CPU's, {least} are asked \
                     for in {}",
                    PROOF_LENGTHS[i],
                    dtype.name()
                );
                return Err(Error::Forward { model: self.name.to_string(), cause });
            }
        }
        Ok(())
    }
}

impl Backend for DeviceBackend {
    fn launch(&self, batch: PackedInput) -> Result<Box<dyn InFlight>> {
        let sizes = self.engine.sizes();
        batch.check(sizes.vocab_size, self.max_seq_len, sizes.hidden_size)?;
        // Nearly every batch is of single segments: then nothing is uploaded or gathered.
        let has_types = sizes.num_token_types > 0 && batch.token_type_ids.iter().any(|&t| t != 0);
        if has_types && let Some(&got) = batch.token_type_ids.iter().find(|&&t| t as usize >= sizes.num_token_types) {
            let expected = format!("below {}", sizes.num_token_types);
            return Err(Error::Shape { op: "batch", operand: "token_type_ids", expected, got: got.to_string() });
        }
        let rows = vectors(&batch)?;
        let pending = self.engine.launch(&Batch {
            input_ids: &batch.input_ids,
            token_type_ids: has_types.then_some(&batch.token_type_ids),
            cu_seqlens: &batch.cu_seqlens,
            rows: &rows,
        });
        let pending = pending.map_err(|e| by_name(&self.name, e))?;
        Ok(Box::new(OnDevice { pending, rows, name: self.name.clone() }))
    }

    fn check_limits(&self, max_batch_tokens: usize, max_batch_size: usize) -> Result<()> {
        let capacity = Capacity { max_batch_tokens: max_batch_tokens.max(self.max_seq_len), max_batch_size };
        self.engine.plan(capacity)
    }

    fn warmed_up(&self) {
        let (taken, planned, model) = (self.engine.taken(), self.engine.planned(), &self.name);
        // The driver's own count holds what no plan does, such as the kernels' code and the libraries' memory; and what
        // other models and processes have taken or given back meanwhile.
        let free = self.engine.free_bytes().unwrap_or(self.free_before);
        let device_mib = self.free_before.saturating_sub(free) >> 20;
        match taken.num_bytes() <= planned.num_bytes() {
            true => {
                tracing::info!(%model, %taken, %planned, device_mib, "the warm-up took no more memory than planned")
            }
            false => tracing::warn!(%model, %taken, %planned, device_mib, "the warm-up took more memory than planned"),
        }
    }

    fn hangs_for_good(&self) -> bool {
        true
    }
}

/// A launched batch.
struct OnDevice {
    pending: Pending,
    rows: Vec<RowSpec>,
    name: ModelName,
}

impl InFlight for OnDevice {
    fn is_ready(&self) -> bool {
        self.pending.is_ready()
    }

    /// Errors: the device's own, and [`Error::Forward`] for a row with a value that is no number or infinite.
    fn finish(self: Box<Self>) -> Result<Rows> {
        let Self { pending, rows: specs, name } = *self;
        let failed = |e| by_name(&name, e);
        pending.wait().map_err(failed)?;
        if let Some(i) = pending.not_finite_row().map_err(failed)? {
            let cause = format!(
                "row {i} of {} holds a value that is not finite; a model that overflows f16 is served with \
                 dtype = \"bf16\" in its manifest",
                specs.len()
            );
            return Err(Error::Forward { model: name.to_string(), cause });
        }
        let num_values = specs.iter().map(|row| row.dimensions).sum();
        let mut rows = Rows::with_capacity(specs.len(), num_values);
        for (i, spec) in specs.iter().enumerate() {
            pending.read_row(i, spec.dimensions, &mut rows.values).map_err(failed)?;
            rows.offsets.push(rows.values.len());
        }
        rows.device_times = pending.times().map(|times| DeviceTimes {
            upload: times.upload,
            forward: times.forward,
            download: times.download,
            idle: times.idle,
        });
        Ok(rows)
    }
}

/// Whether the kernels compute this model; if not, why.
pub(super) fn supported(config: &EncoderConfig) -> Result<(), String> {
    let lacking = [
        (config.gated.is_some(), "gated layers"),
        (config.deberta.is_some(), "disentangled attention"),
        (config.projected_from.is_some(), "embeddings narrower than the layers"),
        (config.sharing.is_some(), "layers that share weights"),
    ];
    if let Some((_, what)) = lacking.iter().find(|(has, _)| *has) {
        return Err(format!("the kernels do not compute {what}"));
    }
    sizes(config).supported()
}

fn sizes(config: &EncoderConfig) -> EncoderSizes {
    EncoderSizes {
        vocab_size: config.vocab_size,
        num_positions: config.num_positions,
        position_offset: config.position_offset,
        num_token_types: config.type_vocab_size.unwrap_or(0),
        hidden_size: config.hidden_size,
        num_heads: config.num_heads,
        num_layers: config.num_layers,
        intermediate_size: config.intermediate_size,
        activation: config.activation,
        layer_norm_eps: config.layer_norm_eps,
    }
}

/// Sequences of [`PROOF_LENGTHS`] with ids from all over the vocabulary.
fn proof_batch(config: &EncoderConfig, max_seq_len: usize) -> PackedInput {
    let mut batch = PackedInput::default();
    let mut id = 1usize;
    for length in PROOF_LENGTHS {
        let length = length.min(max_seq_len);
        let mut next = || {
            // A full-period step through any vocabulary is not needed, only ids that differ.
            id = (id * 7919 + 101) % config.vocab_size;
            id as u32
        };
        let input_ids: Vec<u32> = (0..length).map(|_| next()).collect();
        let row = RowSpec { normalize: true, dimensions: config.hidden_size };
        batch.push(&input_ids, &vec![0; length], row);
    }
    batch
}

/// The rows of a batch of vectors, the only ones that the engine has a head for.
///
/// Errors: [`Error::Forward`] for any other row.
fn vectors(batch: &PackedInput) -> Result<Vec<RowSpec>> {
    let missing = || Error::Internal {
        cause: "the engine's kernels compute one vector a sequence; dtype = \"f32\" serves every task".to_string(),
    };
    batch.rows.iter().map(|row| row.vector().ok_or_else(missing)).collect()
}

/// What the CPU computes of a batch in f32.
fn cpu_rows(weights: &Weights, config: &EncoderConfig, pooling: Pooling, batch: &PackedInput) -> Result<Vec<Vec<f32>>> {
    let cu_seqlens = CuSeqlens::new(&batch.cu_seqlens, &Device::Cpu)?;
    let input_ids = Tensor::new(batch.input_ids.as_slice(), &Device::Cpu)?;
    let hidden = PostNormEncoder::load(weights, config)?.forward(&input_ids, None, &cu_seqlens)?;
    Ok(pool(&hidden, &cu_seqlens, pooling, &vectors(batch)?)?.to_vec2::<f32>()?)
}

/// Cosine of the angle between two vectors of one length, summed in f64.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernels_do_not_compute_is_named() {
        let models = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
        for (name, what) in [
            ("deberta-v1", "disentangled attention"),
            ("deberta-v3", "disentangled attention"),
            ("electra", "narrower"),
            ("albert", "narrower"),
        ] {
            let (_, config) = EncoderConfig::from_json(&models.join(name).join("config.json"), None).unwrap();
            let reason = supported(&config).unwrap_err();
            assert!(reason.contains(what), "{name}: {reason}");
        }
        let (_, config) = EncoderConfig::from_json(&models.join("bert-f16/config.json"), None).unwrap();
        assert_eq!(supported(&config), Ok(()));
    }

    #[test]
    fn cosine_tells_the_same_from_another_and_from_nothing() {
        assert!((cosine(&[1.0, 2.0], &[2.0, 4.0]) - 1.0).abs() < 1e-12);
        assert!(cosine(&[1.0, 0.0], &[0.0, 1.0]).abs() < 1e-12);
        assert!(cosine(&[1.0], &[f32::NAN]).is_nan() && cosine(&[1.0], &[0.0]).is_nan());
    }
}
