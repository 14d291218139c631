//! What rows mean to a client: labels with scores, weights of tokens, entities, words for a mask.
//!
//! Rows are what is computed and cached; all of this is made of them anew for every answer, and costs nothing beside them.

pub mod entities;
pub mod scores;

use serde_json::{Value, json};

use super::Computed;
use crate::model::ModelInfo;
use crate::model::signature::TensorSpec;
use crate::output::Row;
use crate::request::Task;
use crate::store::record::StoredTensor;

/// The results of a task as records hold them, `{"results": [...]}` with one element an input; `None` for embeddings and
/// tensors, whose rows are kept as they are.
///
/// | task | an element |
/// |---|---|
/// | embed_all | `[[f32]]`, one vector a token |
/// | sparse | `[{index, value}]`, indices rising |
/// | classify | `[{label, score}]`, the best first |
/// | token_classify | `[{token, label, score}]`, the best label of each token, special ones included |
/// | fill_mask | `[[{token, score}]]`, one list a mask, the best first |
pub fn value(computed: &Computed) -> Option<Value> {
    let info = &computed.info;
    let element = |row: &Row| match &computed.task {
        Task::Embed | Task::Infer => Value::Null,
        Task::EmbedAll => row
            .chunks_exact(info.hidden_size)
            .map(|token| token.iter().copied().map(number).collect::<Value>())
            .collect(),
        Task::Sparse => pairs(row).map(|(index, value)| json!({"index": index, "value": number(value)})).collect(),
        Task::Classify => {
            let labels = scores::ranked(info, row, scores::Form::Usual);
            labels.iter().map(|(label, score)| json!({"label": label, "score": number(*score)})).collect()
        }
        Task::TokenClassify => {
            let best = row.chunks_exact(info.labels.len()).map(|token| scores::best(info, token)).enumerate();
            best.map(|(i, (label, score))| json!({"token": i, "label": label, "score": number(score)})).collect()
        }
        Task::FillMask { .. } => {
            let num_masks = computed.num_masks(row);
            let list = |mask: &[f32]| -> Value {
                mask.chunks_exact(2).map(|pair| json!({"token": pair[0] as u32, "score": number(pair[1])})).collect()
            };
            row.chunks_exact(row.len() / num_masks.max(1)).map(list).collect()
        }
    };
    let has_words = !matches!(computed.task, Task::Embed | Task::Infer);
    has_words.then(|| json!({"results": computed.rows.iter().map(element).collect::<Vec<_>>()}))
}

/// What a tensor model's rows hold, in their order, as records name it.
pub fn tensors(info: &ModelInfo) -> Vec<StoredTensor> {
    let tensor = |output: &TensorSpec| StoredTensor {
        name: output.name.clone(),
        shape: output.shape.clone(),
        is_whole: output.dtype.is_integer(),
    };
    info.signature.outputs.iter().map(tensor).collect()
}

/// A value with the digits of its f32: as an f64 it would have nine more that say nothing.
pub fn number(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

/// The pairs of a sparse row, without the one that stands for none.
pub fn pairs(row: &[f32]) -> impl Iterator<Item = (u32, f32)> {
    row.chunks_exact(2).map(|pair| (pair[0] as u32, pair[1])).filter(|(_, value)| *value > 0.0)
}

impl Computed {
    /// How many masks a row of [`Task::FillMask`] answers: each has the same number of pairs, and where the likeliest of
    /// them stands again is where the next one begins.
    pub fn num_masks(&self, row: &[f32]) -> usize {
        let Task::FillMask { top_k, targets } = &self.task else { return 0 };
        let of_vocabulary = targets.as_ref().map_or(self.info.vocab_size, |targets| targets.len());
        let per_mask = (*top_k as usize).min(crate::serve::MAX_TOP_K as usize).min(of_vocabulary).max(1);
        row.len() / (2 * per_mask)
    }
}
