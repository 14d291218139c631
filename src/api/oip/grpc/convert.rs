//! Between gRPC's messages and what the protocol's handlers take and give.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use serde_json::Value;

use super::super::answer;
use super::super::elements::{Elements, Values};
use super::super::infer::Answered;
use super::super::tensor::{Data, Tensor};
use super::super::wire::{Asking, InferParameters, OutputParameters, OutputRequest, malformed, no_shared_memory};
use super::pb::infer_parameter::ParameterChoice;
use super::pb::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use super::pb::model_infer_response::InferOutputTensor;
use super::pb::model_metadata_response::TensorMetadata;
use super::pb::model_repository_parameter::ParameterChoice as RepositoryChoice;
use super::pb::{
    DataType, InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse, ModelInput, ModelOutput,
    ModelRepositoryParameter, ModelTensorReshape,
};
use crate::api::tensors::Datatype;
use crate::api::tensors::signature::{Signature, TensorSpec};
use crate::{Error, Result};

const SHARED_MEMORY: &str = "shared_memory_region";

/// A request with its tensors in hand.
///
/// Errors: `Malformed` for parameters of another type, raw contents of some inputs alone, and tensors of another form;
/// `Invalid` for shared memory.
pub fn asking_of(request: ModelInferRequest) -> Result<Asking> {
    let ModelInferRequest { model_name: _, model_version: _, id, parameters, inputs, outputs, raw_input_contents } =
        request;
    let (num_inputs, num_raw) = (inputs.len(), raw_input_contents.len());
    if num_raw != 0 && num_raw != num_inputs {
        let reason = format!("has {num_raw} entries for {num_inputs} inputs: either all inputs are raw, or none");
        return Err(malformed("raw_input_contents", reason));
    }
    let mut raw = raw_input_contents.into_iter();
    let tensors = inputs.into_iter().enumerate().map(|(i, input)| tensor_of(i, input, raw.next()));
    let outputs = outputs.into_iter().enumerate().map(|(i, output)| output_of(i, output));
    Ok(Asking {
        id: Some(id).filter(|id| !id.is_empty()),
        parameters: parameters_of(&parameters)?,
        tensors: tensors.collect::<Result<_>>()?,
        outputs: outputs.collect::<Result<_>>()?,
    })
}

/// The parameters of a request, by the names and types that JSON has for them.
fn parameters_of(parameters: &HashMap<String, InferParameter>) -> Result<InferParameters> {
    let value = |choice: &ParameterChoice| match choice {
        ParameterChoice::BoolParam(value) => serde_json::json!(value),
        ParameterChoice::Int64Param(value) => serde_json::json!(value),
        ParameterChoice::StringParam(value) => serde_json::json!(value),
        ParameterChoice::DoubleParam(value) => serde_json::json!(value),
        ParameterChoice::Uint64Param(value) => serde_json::json!(value),
    };
    let chosen = parameters.iter().filter_map(|(key, p)| Some((key.clone(), value(p.parameter_choice.as_ref()?))));
    let object = serde_json::Value::Object(chosen.collect());
    serde_path_to_error::deserialize(object)
        .map_err(|e| malformed(&format!("parameters.{}", e.path()), e.inner().to_string()))
}

fn tensor_of(i: usize, input: InferInputTensor, raw: Option<Bytes>) -> Result<Tensor> {
    let InferInputTensor { name, datatype, shape, parameters, contents } = input;
    if parameters.contains_key(SHARED_MEMORY) {
        return Err(no_shared_memory(&format!("inputs[{i}]")));
    }
    let datatype: Datatype = serde_json::from_value(serde_json::Value::String(datatype))
        .map_err(|e| malformed(&format!("inputs[{i}].datatype"), e.to_string()))?;
    let dim = |&dim: &i64| usize::try_from(dim);
    let shape = shape.iter().map(dim).collect::<Result<Vec<usize>, _>>();
    let shape = shape.map_err(|_| malformed(&format!("inputs[{i}].shape"), "a dimension is negative".to_string()))?;
    let data = match (raw, contents) {
        (Some(_), Some(_)) => {
            return Err(malformed(&format!("inputs[{i}]"), "has both contents and raw contents".to_string()));
        }
        (Some(raw), None) => Data::Binary(raw),
        (None, contents) => Data::Listed(elements_of(&name, datatype, contents.unwrap_or_default())?),
    };
    Ok(Tensor { name, datatype, shape, data })
}

/// The elements in the list of their type; what stands in other lists is not looked at.
fn elements_of(name: &str, datatype: Datatype, contents: InferTensorContents) -> Result<Elements> {
    let texts = |bytes: Vec<Vec<u8>>| {
        let text = |(i, bytes): (usize, Vec<u8>)| {
            String::from_utf8(bytes).map_err(|e| malformed(name, format!("element {i} is no UTF-8: {e}")))
        };
        bytes.into_iter().enumerate().map(text).collect::<Result<Vec<_>>>()
    };
    let values = match datatype {
        Datatype::Bytes => Values::Texts(texts(contents.bytes_contents)?),
        Datatype::Int64 => Values::Ints(contents.int64_contents),
        Datatype::Int8 | Datatype::Int16 | Datatype::Int32 => {
            Values::Ints(contents.int_contents.into_iter().map(i64::from).collect())
        }
        Datatype::Uint8 | Datatype::Uint16 | Datatype::Uint32 => {
            Values::Ints(contents.uint_contents.into_iter().map(i64::from).collect())
        }
        // Beyond 2^63 nothing takes them, as below it.
        Datatype::Uint64 => {
            let int = |int| i64::try_from(int).unwrap_or(i64::MAX);
            Values::Ints(contents.uint64_contents.into_iter().map(int).collect())
        }
        Datatype::Bool => Values::Bools(contents.bool_contents),
        Datatype::Fp32 => Values::Floats(contents.fp32_contents.into_iter().map(f64::from).collect()),
        Datatype::Fp64 => Values::Floats(contents.fp64_contents),
        Datatype::Fp16 | Datatype::Bf16 => {
            let reason = format!("{} is taken as raw contents alone", datatype.as_str());
            return Err(Error::Invalid { field: name.to_string(), reason });
        }
    };
    let len = match &values {
        Values::Texts(texts) => texts.len(),
        Values::Ints(ints) => ints.len(),
        Values::Floats(floats) => floats.len(),
        Values::Bools(bools) => bools.len(),
        Values::None => 0,
    };
    Ok(Elements { values: if len == 0 { Values::None } else { values }, dims: vec![len] })
}

fn output_of(i: usize, output: InferRequestedOutputTensor) -> Result<OutputRequest> {
    let InferRequestedOutputTensor { name, parameters } = output;
    if parameters.contains_key(SHARED_MEMORY) {
        return Err(no_shared_memory(&format!("outputs[{i}]")));
    }
    let classification = match parameters.get("classification").and_then(|p| p.parameter_choice.as_ref()) {
        None => None,
        Some(ParameterChoice::Int64Param(value)) => u64::try_from(*value).ok(),
        Some(ParameterChoice::Uint64Param(value)) => Some(*value),
        Some(_) => {
            return Err(malformed(&format!("outputs[{i}].parameters.classification"), "expected an integer".into()));
        }
    };
    let parameters = OutputParameters { classification, ..OutputParameters::default() };
    Ok(OutputRequest { name, parameters: Some(parameters) })
}

/// The parameters of a request to load a model, as JSON has them. Bytes are files, of which the name is enough.
pub fn load_parameters(parameters: HashMap<String, ModelRepositoryParameter>) -> BTreeMap<String, Value> {
    let value = |parameter: ModelRepositoryParameter| match parameter.parameter_choice {
        Some(RepositoryChoice::BoolParam(value)) => value.into(),
        Some(RepositoryChoice::Int64Param(value)) => value.into(),
        Some(RepositoryChoice::StringParam(value)) => value.into(),
        Some(RepositoryChoice::BytesParam(_)) | None => Value::Null,
    };
    parameters.into_iter().map(|(name, parameter)| (name, value(parameter))).collect()
}

/// An answer, with all outputs raw, as Triton answers.
///
/// Errors: `Internal` for values that are no number.
pub fn response_of(answered: Answered) -> Result<ModelInferResponse> {
    let Answered { head, outputs, served: _ } = answered;
    let raw = outputs.iter().map(|(output, _)| answer::binary(output).map(Bytes::from));
    let raw_output_contents = raw.collect::<Result<_>>()?;
    let output = |output: &answer::Output| InferOutputTensor {
        name: output.0.name.to_string(),
        datatype: output.0.datatype().as_str().to_string(),
        shape: output.0.shape.iter().map(|&dim| dim as i64).collect(),
        parameters: HashMap::new(),
        contents: None,
    };
    Ok(ModelInferResponse {
        model_name: head.model_name,
        model_version: head.model_version,
        id: head.id.unwrap_or_default(),
        parameters: HashMap::new(),
        outputs: outputs.iter().map(output).collect(),
        raw_output_contents,
    })
}

/// An input of the metadata.
pub fn metadata_of_input(spec: &TensorSpec) -> TensorMetadata {
    TensorMetadata { shape: spec.input_dims(), ..metadata_of_output(spec) }
}

/// An output of the metadata.
pub fn metadata_of_output(spec: &TensorSpec) -> TensorMetadata {
    let shape = spec.shape.iter().map(|dim| dim.map_or(-1, |dim| dim as i64)).collect();
    TensorMetadata { name: spec.name.to_string(), datatype: spec.datatype.as_str().to_string(), shape }
}

/// The tensors of a configuration.
pub fn config_tensors(signature: &Signature) -> (Vec<ModelInput>, Vec<ModelOutput>) {
    let data_type = |spec: &TensorSpec| {
        DataType::from_str_name(&spec.datatype.config_name()).unwrap_or(DataType::TypeInvalid).into()
    };
    let reshape = |is_scalar: bool| is_scalar.then(|| ModelTensorReshape { shape: Vec::new() });
    let input = |spec: &TensorSpec| ModelInput {
        name: spec.name.to_string(),
        data_type: data_type(spec),
        dims: spec.input_dims().split_off(1),
        reshape: None,
        optional: spec.is_optional,
    };
    let output = |spec: &TensorSpec| {
        let (dims, is_scalar) = spec.config_dims();
        ModelOutput { name: spec.name.to_string(), data_type: data_type(spec), dims, reshape: reshape(is_scalar) }
    };
    (signature.usual().iter().map(input).collect(), signature.outputs.iter().map(output).collect())
}
