//! A model's configuration, in the words Triton has for it.

use axum::extract::State;
use serde_json::{Value, json};

use super::metadata::{TensorMetadata, platform};
use super::{Asked, ModelPath};
use crate::api::ApiState;
use crate::api::docs::Refusals;
use crate::api::status::Fault;
use crate::api::tensors::signature::{self, Signature, TensorSpec};
use crate::model::ModelInfo;

/// A model's configuration: tensors, limits and devices, as Triton writes them.
///
/// `max_batch_size` is what one request may bring, which is what clients read it for. Batches on the device are formed of
/// many requests, within limits of their own.
/// Source: triton-inference-server/common `protobuf/model_config.proto`.
#[utoipa::path(
    get, path = "/v2/models/{model}/config", tag = "Open Inference Protocol",
    params(("model" = String, Path, description = "A name from `/v1/models`", example = "all-MiniLM-L6-v2")),
    responses((status = 200, body = serde_json::Value, description = "The configuration"), Refusals),
)]
pub async fn config(State(state): State<ApiState>, path: Asked) -> Result<axum::Json<Value>, Fault> {
    let info = ModelPath::of(path)?.find(&state)?;
    let limits = state.engine.limits(Some(&info.name))?;
    let signature = Signature::main(&info);
    let (kind, gpus) = match info.device.strip_prefix("cuda:") {
        Some(gpus) => ("KIND_GPU", gpus.split(',').filter_map(|gpu| gpu.parse::<u32>().ok()).collect()),
        None => ("KIND_CPU", Vec::new()),
    };
    Ok(axum::Json(json!({
        "name": &*info.name,
        "platform": platform(&info),
        "backend": "eremois",
        "version_policy": {"specific": {"versions": info.version.parse::<i64>().ok().into_iter().collect::<Vec<_>>()}},
        "max_batch_size": state.settings.max_client_batch_size,
        "input": signature.usual().iter().map(input).collect::<Vec<_>>(),
        "output": signature.outputs.iter().map(output).collect::<Vec<_>>(),
        "instance_group": [{"name": &*info.name, "kind": kind, "count": 1, "gpus": gpus}],
        "dynamic_batching": {
            "preferred_batch_size": [limits.max_batch_size],
            "max_queue_delay_microseconds": limits.max_queue_delay.as_micros() as u64,
            "default_queue_policy": {"allow_timeout_override": true, "max_queue_size": limits.max_queue_size},
        },
        "response_cache": {"enable": state.keeper.inferences().has_cache()},
        "parameters": parameters(&info, &signature, limits.max_batch_tokens),
    })))
}

/// What else clients may want to know: `tasks` are those of the parameter `task`, `labels` the classes in their order, as
/// JSON, and `other_inputs` the inputs that a request may have instead, as JSON: a list of tensors for each way.
fn parameters(info: &ModelInfo, signature: &Signature, max_batch_tokens: usize) -> Value {
    let tasks: Vec<&str> = signature::tasks(info).iter().map(|task| signature::word(info, task)).collect();
    let mut parameters = json!({
        "max_batch_tokens": {"string_value": max_batch_tokens.to_string()},
        "max_seq_len": {"string_value": info.max_seq_len.to_string()},
        "dtype": {"string_value": &info.dtype},
        "tasks": {"string_value": tasks.join(",")},
    });
    let others: Vec<Vec<TensorMetadata>> =
        signature.others().map(|form| form.iter().map(TensorMetadata::of_input).collect()).collect();
    if !others.is_empty() {
        parameters["other_inputs"] = json!({"string_value": json!(others).to_string()});
    }
    if !info.labels.is_empty() {
        parameters["labels"] = json!({"string_value": json!(info.labels).to_string()});
    }
    parameters
}

/// The configuration of a version of a model.
#[utoipa::path(
    get, path = "/v2/models/{model}/versions/{version}/config", tag = "Open Inference Protocol",
    params(
        ("model" = String, Path, description = "A name from `/v1/models`", example = "all-MiniLM-L6-v2"),
        ("version" = String, Path, description = "The version served", example = "1"),
    ),
    responses((status = 200, body = serde_json::Value, description = "The configuration"), Refusals),
)]
#[allow(dead_code)]
pub fn config_of_version() {
    // Its description alone: the handler is the one without a version.
}

fn input(spec: &TensorSpec) -> Value {
    json!({
        "name": spec.name,
        "data_type": spec.datatype.config_name(),
        "dims": &spec.input_dims()[1..],
        "optional": spec.is_optional,
    })
}

fn output(spec: &TensorSpec) -> Value {
    let (dims, is_scalar) = spec.config_dims();
    let mut tensor = json!({"name": spec.name, "data_type": spec.datatype.config_name(), "dims": dims});
    if is_scalar {
        tensor["reshape"] = json!({"shape": []});
    }
    tensor
}
