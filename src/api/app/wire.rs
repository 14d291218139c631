//! An inference as the application API writes it.

use std::ops::Deref;

use serde_json::json;
use utoipa::ToSchema;

use super::super::tensors::Datatype;
use super::super::tensors::outputs::{OutputTensor, Values, cut};
use super::super::tensors::written::{Column, push_named};
use super::super::write;
use crate::inference::stored_form::shown;
use crate::store::record::{Record, StoredInput, StoredOutput, StoredTensor, StoredTensors};
use crate::{Error, Result};

/// An inference, for the document: it is written by hand.
#[derive(ToSchema)]
#[allow(dead_code)]
pub struct Inference {
    #[schema(example = "inf_019a7b2c3d4e7f80912a3b4c5d6e7f80")]
    id: String,
    #[schema(example = "inference")]
    object: String,
    /// "queued" (`mode: async`), "running", "succeeded" or "failed".
    #[schema(example = "succeeded")]
    status: String,
    #[schema(example = "all-MiniLM-L6-v2")]
    model: String,
    version: String,
    #[schema(example = "embed")]
    task: String,
    /// RFC 3339, to the millisecond.
    created_at: String,
    completed_at: Option<String>,
    /// The protocol that was asked: "application", "openai", "tei", "oip", "tensorflow", "jina" or "cohere".
    source: String,
    user: Option<String>,
    metadata: std::collections::BTreeMap<String, String>,
    parameters: serde_json::Value,
    /// A list, of a tensor model's inputs as objects; absent where `database.store_input` keeps none, and from answers that come with the result.
    inputs: Option<Vec<serde_json::Value>>,
    /// BLAKE3 of the inputs where `database.store_input` is `hash`.
    inputs_hash: Option<String>,
    /// Absent from lists, unless `include=output` asks for it.
    output: Option<Output>,
    usage: Usage,
    timings: Timings,
    /// Whether all of it came from the cache.
    cached: bool,
    /// Whether it is in the store: what the answer to a request with `store: false` is not.
    stored: bool,
    error: Option<Problem>,
    /// Absent from answers that come with the result.
    feedback: Option<Vec<FeedbackItem>>,
    /// Where the result is posted to.
    callback: Option<String>,
}

/// What was computed.
#[derive(ToSchema)]
#[allow(dead_code)]
struct Output {
    /// Of task `embed`: one embedding an input, in their order.
    embeddings: Option<Vec<Vec<f32>>>,
    /// Of tasks with words and weights: one element an input, in their order. `classify`: labels with scores, the best first;
    /// `token_classify`: the best label of each token, special ones included; `sparse`: pairs of `index` and `value`;
    /// `embed_all`: one vector a token; `fill_mask`: one list a mask, of tokens with scores, the best first.
    results: Option<Vec<serde_json::Value>>,
    /// Of task `infer`: each output by its name, a list with one tensor an input, in their order.
    tensors: Option<std::collections::BTreeMap<String, Vec<serde_json::Value>>>,
}

#[derive(ToSchema)]
#[allow(dead_code)]
struct Usage {
    tokens: u64,
    characters: u64,
    inputs: u64,
    /// Inputs whose result came from the cache.
    cached_inputs: u64,
}

/// Microseconds.
#[derive(ToSchema)]
#[allow(dead_code)]
struct Timings {
    tokenize_us: u64,
    queue_us: u64,
    inference_us: u64,
    total_us: u64,
}

/// An error, RFC 9457.
#[derive(ToSchema)]
#[allow(dead_code)]
pub struct Problem {
    #[schema(example = "urn:eremois:problem:invalid")]
    r#type: String,
    title: String,
    status: u16,
    detail: String,
    /// The kind of error, the last part of `type`.
    kind: String,
    /// The field of the request at fault.
    field: Option<String>,
}

#[derive(ToSchema)]
#[allow(dead_code)]
struct FeedbackItem {
    at: String,
    score: Option<f64>,
    label: Option<String>,
    comment: Option<String>,
}

/// Which parts of a record are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts {
    pub inputs: bool,
    pub is_stored: bool,
}

/// Appends a record with its stored output, if it has one. Errors: `Internal` for a value that is no number.
pub fn push_record(out: &mut Vec<u8>, record: &Record, parts: Parts) -> Result<()> {
    match &record.output {
        None => push_inference::<Vec<f32>>(out, record, None, parts),
        Some(StoredOutput::Embeddings(rows)) => push_inference(out, record, Some(rows), parts),
        Some(StoredOutput::Tensors(output)) => {
            push_json(out, &facts(record, parts))?;
            // The object's closing brace gives way to the output.
            out.pop();
            out.extend_from_slice(br#","output":{"tensors":"#);
            push_tensors(out, output)?;
            out.extend_from_slice(b"}}");
            Ok(())
        }
        Some(StoredOutput::Json(value)) => {
            let mut object = facts(record, parts);
            object["output"] = value.clone();
            push_json(out, &object)
        }
    }
}

/// A record with its output: what a callback brings. Errors: as [`push_record`].
pub fn render(record: &Record) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    push_record(&mut out, record, Parts { inputs: false, is_stored: true })?;
    Ok(out)
}

/// Appends a record with these rows as its output.
pub fn push_inference<R: Deref<Target = [f32]>>(
    out: &mut Vec<u8>,
    record: &Record,
    rows: Option<&[R]>,
    parts: Parts,
) -> Result<()> {
    push_json(out, &facts(record, parts))?;
    let Some(rows) = rows else { return Ok(()) };
    // The object's closing brace gives way to the output.
    out.pop();
    out.extend_from_slice(br#","output":{"embeddings":"#);
    write::push_rows(out, rows)?;
    out.extend_from_slice(b"}}");
    Ok(())
}

/// Appends `{name: tensor}`, the inputs of the request first. Errors: `Internal` for a value that is no number.
fn push_tensors(out: &mut Vec<u8>, output: &StoredTensors) -> Result<()> {
    let datatype = |is_whole| if is_whole { Datatype::Int64 } else { Datatype::Fp32 };
    let parts: Vec<(&[usize], Datatype)> =
        output.tensors.iter().map(|tensor| (&*tensor.shape, datatype(tensor.is_whole))).collect();
    let named = |(tensor, (shape, values)): (&StoredTensor, (Vec<usize>, Values))| OutputTensor {
        name: tensor.name.clone().into(),
        shape,
        values,
    };
    let tensors: Vec<OutputTensor> = output.tensors.iter().zip(cut(&output.rows, &parts)?).map(named).collect();
    let columns: Vec<Column> =
        tensors.iter().map(|output| Column { name: &output.name, output, as_bytes: false }).collect();
    push_named(out, &columns, output.rows.len())
}

fn push_json(out: &mut Vec<u8>, value: &serde_json::Value) -> Result<()> {
    serde_json::to_writer(out, value).map_err(|e| Error::Internal { cause: format!("writing an inference: {e}") })
}

/// All of a record but its output; never an empty object.
fn facts(record: &Record, parts: Parts) -> serde_json::Value {
    let facts = &record.facts;
    let usage = &facts.usage;
    let mut object = json!({
        "id": record.id.to_string(),
        "object": "inference",
        "status": facts.status.as_str(),
        "model": facts.model,
        "version": facts.version,
        "task": facts.task,
        "created_at": time(record.id.created_at()),
        "completed_at": facts.completed_at.map(time),
        "source": facts.source,
        "user": facts.user,
        "metadata": facts.metadata,
        "parameters": facts.parameters,
        "usage": {
            "tokens": usage.num_tokens,
            "characters": usage.num_chars,
            "inputs": usage.num_inputs,
            "cached_inputs": usage.num_cached,
        },
        "timings": facts.timings,
        "cached": usage.num_inputs > 0 && usage.num_cached == usage.num_inputs,
        "stored": parts.is_stored,
    });
    if parts.inputs {
        match &facts.input {
            StoredInput::Full(inputs) => object["inputs"] = shown(inputs),
            StoredInput::Hash(hash) => object["inputs_hash"] = json!(hash),
            StoredInput::None => {}
        }
        object["feedback"] = json!(facts.feedback);
    }
    if let Some(callback) = &facts.callback {
        object["callback"] = json!(callback);
    }
    if let Some(failure) = &facts.error {
        object["error"] = json!({
            "type": format!("urn:eremois:problem:{}", failure.kind),
            "title": "the inference failed",
            "status": failure.status,
            "detail": failure.message,
            "kind": failure.kind,
        });
        if let Some(field) = &failure.field {
            object["error"]["field"] = json!(field);
        }
    }
    object
}

/// RFC 3339 with milliseconds in UTC.
pub fn time(at: jiff::Timestamp) -> String {
    format!("{at:.3}")
}
