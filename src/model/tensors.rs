//! A tensor model on its devices: rows of numbers through a list of layers.

use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::embed::{Headed, by_name};
use super::encode::Encoder;
use super::fingerprint::{Facts, fingerprint};
use super::layers::Graph;
use super::layers::list::LayerList;
use super::manifest::{MANIFEST_FILE, ModelSpec};
use super::pack::{PackedInput, Pooling, Wanted};
use super::signature::{Datatype, Signature, TensorSpec};
use super::weights::modified;
use super::weights::{Weights, file_error};
use super::{Backend, InFlight, LoadedModel, ModelInfo, Placed, Rows};
use crate::ops::device;
use crate::request::ModelName;
use crate::{Error, Result};

/// Values that are held at once while a batch is computed, about: 1 GiB. What is beyond is computed in parts.
const MAX_HELD_VALUES: usize = 1 << 28;
/// What a row counts as in the queue's limits.
const TOKENS_PER_ROW: usize = 1;

/// Loads a tensor model. `devices` is not empty.
///
/// Blocks: reads all weights.
/// Errors: [`Error::ModelFile`] and [`Error::Tensor`] naming the layer.
pub(super) fn load(spec: &ModelSpec, devices: &[Device]) -> Result<LoadedModel> {
    let weights = open(spec)?;
    let mut backends = Vec::with_capacity(devices.len());
    let mut described = None;
    for device in devices {
        let graph = Graph::build(list(spec)?, &weights.on(device), &manifest(spec))?;
        described.get_or_insert(info(spec, devices, &weights, &graph)?);
        let backend = TensorBackend { graph, device: device.clone(), name: spec.name.clone() };
        backends.push(Placed { device: device::name(device), backend: Arc::new(backend) });
    }
    let (info, encoder) = described.ok_or_else(|| Error::Internal { cause: "a model without devices".to_string() })?;
    Ok(LoadedModel { info: Arc::new(info), encoder: Arc::new(encoder), backends })
}

/// What a tensor model would be on these devices. Blocks and errors: as [`load`], whose checks need the weights.
pub(super) fn describe(spec: &ModelSpec, devices: &[Device]) -> Result<(Arc<ModelInfo>, Arc<Encoder>)> {
    let weights = open(spec)?;
    let graph = Graph::build(list(spec)?, &weights, &manifest(spec))?;
    let (info, encoder) = info(spec, devices, &weights, &graph)?;
    Ok((Arc::new(info), Arc::new(encoder)))
}

fn manifest(spec: &ModelSpec) -> std::path::PathBuf {
    spec.dir.parent().unwrap_or(Path::new("")).join(MANIFEST_FILE)
}

fn list(spec: &ModelSpec) -> Result<&LayerList> {
    let reason = format!("[versions.{}] has no layers, which task `infer` needs", spec.version);
    spec.layers.as_ref().ok_or_else(|| file_error(&manifest(spec), reason))
}

fn open(spec: &ModelSpec) -> Result<Weights> {
    match spec.weights.as_slice() {
        [] => Weights::open_dir(&spec.dir, &Device::Cpu),
        files => Weights::open(files, &Device::Cpu),
    }
}

fn info(spec: &ModelSpec, devices: &[Device], weights: &Weights, graph: &Graph) -> Result<(ModelInfo, Encoder)> {
    let list = list(spec)?;
    let input = |input: &super::layers::list::InputSpec| TensorSpec {
        name: input.name.clone(),
        dtype: input.dtype,
        shape: input.shape.clone(),
    };
    let inputs: Vec<TensorSpec> = list.inputs.iter().map(input).collect();
    let outputs: Vec<TensorSpec> = list
        .outputs
        .iter()
        .zip(graph.output_shapes())
        .map(|(name, shape)| TensorSpec { name: name.clone(), dtype: Datatype::F32, shape: shape.clone() })
        .collect();
    let hidden_size = outputs.iter().map(TensorSpec::num_values).sum();
    let device_names = device::names(devices);
    // The list decides results and stands in no file of the version.
    let words = serde_json::to_string(list).map_err(|e| Error::Internal { cause: format!("a list of layers: {e}") })?;
    let facts = Facts {
        architecture: &words,
        dtype: "f32",
        device: &device_names,
        pooling: Pooling::Mean,
        max_seq_len: TOKENS_PER_ROW,
        question: None,
    };
    let signature = Signature::of_tensors(inputs, outputs, TOKENS_PER_ROW);
    let encoder = signature.values.map(|values| Encoder::of_tensors(values).with_tables(tables(list, graph)));
    let info = ModelInfo {
        name: spec.name.clone(),
        version: spec.version.clone(),
        fingerprint: fingerprint(spec, weights.path(), &facts)?,
        task: spec.task.clone(),
        labels: Vec::new(),
        is_multi_label: false,
        architecture: "layers".to_string(),
        dtype: "f32".to_string(),
        device: device_names,
        hidden_size,
        dimensions: hidden_size,
        vocab_size: 1,
        max_seq_len: TOKENS_PER_ROW,
        signature,
        pooling: Pooling::Mean,
        normalize: false,
        prompts: Default::default(),
        default_prompt: None,
        licence: spec.licence.clone(),
        created: modified(weights.path()),
    };
    let encoder = encoder.ok_or_else(|| Error::Internal { cause: "a tensor model without values".to_string() })?;
    Ok((info, encoder))
}

/// Where in a row's values the indices of tables are, and how many rows these have.
fn tables(list: &LayerList, graph: &Graph) -> Vec<(std::ops::Range<usize>, usize)> {
    let mut start = 0;
    let mut tables = Vec::new();
    for (input, rows) in list.inputs.iter().zip(graph.table_rows()) {
        let end = start + input.shape.iter().product::<usize>();
        tables.extend(rows.map(|rows| (start..end, rows)));
        start = end;
    }
    tables
}

struct TensorBackend {
    graph: Graph,
    device: Device,
    name: ModelName,
}

impl Backend for TensorBackend {
    fn launch(&self, batch: PackedInput) -> Result<Box<dyn InFlight>> {
        let shapes = self.graph.input_shapes();
        let sizes: Vec<usize> = shapes.iter().map(|shape| shape.iter().product()).collect();
        let row_len: usize = sizes.iter().sum();
        let num_rows = batch.num_seqs();
        let are_rows = (0..num_rows).all(|i| batch.values_of(i).len() == row_len);
        if !are_rows || batch.rows.iter().any(|row| *row != Wanted::Outputs) {
            let got = format!("{} values of {num_rows} rows", batch.values.len());
            let expected = format!("{row_len} values a row, and outputs wanted");
            return Err(Error::Shape { op: "tensors", operand: "values", expected, got });
        }
        let part = (MAX_HELD_VALUES / self.graph.row_values().max(1)).max(1);
        let mut rows = Rows::with_capacity(num_rows, 0);
        for start in (0..num_rows).step_by(part) {
            let end = num_rows.min(start + part);
            self.part(&batch, start..end, &sizes, &mut rows).map_err(|e| by_name(&self.name, e))?;
        }
        Ok(Box::new(Headed { rows, name: self.name.clone() }))
    }

    fn hangs_for_good(&self) -> bool {
        self.device.is_cuda()
    }
}

impl TensorBackend {
    /// Computes some rows of a batch and adds them to what came out.
    fn part(&self, batch: &PackedInput, which: std::ops::Range<usize>, sizes: &[usize], rows: &mut Rows) -> Result<()> {
        let num_rows = which.len();
        let mut inputs = Vec::with_capacity(sizes.len());
        let mut start = 0;
        for (shape, size) in self.graph.input_shapes().iter().zip(sizes) {
            let mut values = Vec::with_capacity(num_rows * size);
            which.clone().for_each(|i| values.extend_from_slice(&batch.values_of(i)[start..start + size]));
            start += size;
            inputs.push(Tensor::from_vec(values, [&[num_rows], shape.as_slice()].concat(), &self.device)?);
        }
        let mut outputs = Vec::new();
        for output in self.graph.forward(inputs)? {
            outputs.push(output.flatten_all()?.to_vec1::<f32>()?);
        }
        for i in 0..num_rows {
            for output in &outputs {
                let size = output.len() / num_rows;
                rows.values.extend_from_slice(&output[i * size..][..size]);
            }
            rows.offsets.push(rows.values.len());
        }
        Ok(())
    }
}
