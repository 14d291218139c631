//! Proof that a model works: loaded, and one forward computed.

use candle_core::Device;

use super::load::load;
use super::manifest::ModelSpec;
use super::pack::PackedInput;
use super::signature::Modality;
use super::{LoadedModel, ModelInfo};
use crate::request::{Input, Truncation, TruncationDirection};
use crate::{Error, Result};

/// Two lengths, so that packing is proven too.
const TEXTS: [&str; 2] = ["proof", "The quick brown fox jumps over the lazy dog; 1,234.5 times, they say."];

/// Loads a model on the CPU and computes two inputs with it.
///
/// Blocks: reads all weights.
/// Errors: the loader's, and [`Error::Forward`] for a result that is not finite or all zero: weights that
/// have the right shapes and the wrong values.
pub fn prove(spec: &ModelSpec) -> Result<std::sync::Arc<ModelInfo>> {
    let model = load(spec, &Device::Cpu)?;
    let LoadedModel { info, encoder, .. } = &model;
    let mut batch = PackedInput::default();
    if info.signature.takes(Modality::Text) {
        for text in TEXTS {
            let cut = Truncation::Cut(TruncationDirection::Right);
            let encoding = encoder.encode(&Input::Text(text.to_string()), "proof", None, cut)?;
            batch.push(&encoding.input_ids, &encoding.token_type_ids, info.usual_row());
        }
    } else if let Some(shape) = info.signature.values {
        // Numbers that every input takes, also one of indices.
        for value in [0.0, 1.0] {
            batch.push_values(&vec![value; shape.num_values], shape.num_tokens, info.usual_row());
        }
    }
    let rows = model.backend().launch(batch)?.finish()?;
    let failed = |cause: &str| Error::Forward { model: spec.name.to_string(), cause: cause.to_string() };
    for i in 0..rows.num_rows() {
        let row = rows.row(i);
        if row.iter().any(|v| !v.is_finite()) {
            return Err(failed("a result is not finite"));
        }
        // Numbers may have nothing in common with what a tensor model was made for.
        if row.iter().all(|v| *v == 0.0) && !info.signature.takes(Modality::Tensors) {
            return Err(failed("a result is all zero"));
        }
    }
    if rows.row(0) == rows.row(1) && !info.signature.takes(Modality::Tensors) {
        return Err(failed("two different inputs have the same result"));
    }
    Ok(info.clone())
}
