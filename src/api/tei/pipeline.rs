//! `POST /` for models with other heads than pooling, as the pipelines of the Hugging Face inference API have it: `inputs`
//! and `parameters`. The judge is `huggingface_hub.InferenceClient`.

use axum::response::Response;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::heads::{answer, told};
use super::rename;
use crate::api::ApiState;
use crate::api::body::Call;
use crate::api::images::image;
use crate::api::inputs::check_count;
use crate::api::status::Fault;
use crate::inference::Computed;
use crate::inference::outcome::entities::{Aggregation, entities};
use crate::inference::outcome::number;
use crate::inference::outcome::scores::{self, Form};
use crate::model::signature::Modality;
use crate::model::{DEFAULT_TOP_K, ModelInfo};
use crate::request::{Input, Request as Embed, Task, TaskParams};
use crate::{Error, Result};

/// A request to a pipeline: its `parameters` depend on the model's task.
pub struct Asked {
    pub inputs: Value,
    pub parameters: Value,
}

/// Parameters of text classification and of zero-shot classification.
#[derive(Debug, Default, Deserialize)]
struct ClassifyParameters {
    top_k: Option<usize>,
    function_to_apply: Option<Function>,
    candidate_labels: Option<Vec<String>>,
    #[serde(default)]
    multi_label: Option<bool>,
    hypothesis_template: Option<String>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Function {
    Softmax,
    Sigmoid,
    None,
}

impl ClassifyParameters {
    fn form(&self) -> Form {
        match self.function_to_apply {
            None => Form::Usual,
            Some(Function::Softmax) => Form::Softmax,
            Some(Function::Sigmoid) => Form::Sigmoid,
            Some(Function::None) => Form::Raw,
        }
    }
}

/// Parameters of token classification.
#[derive(Debug, Default, Deserialize)]
struct EntityParameters {
    aggregation_strategy: Option<Aggregation>,
    ignore_labels: Option<Vec<String>>,
}

/// Parameters of filling masks.
#[derive(Debug, Default, Deserialize)]
struct MaskParameters {
    top_k: Option<u32>,
    targets: Option<Vec<String>>,
}

/// What the hypotheses of zero-shot classification are made of: the label takes the place of `{}`.
const HYPOTHESIS: &str = "This example is {}.";

/// Answers for a model whose main task is none of embeddings.
pub async fn answered(state: &ApiState, info: &ModelInfo, call: Call<Asked>) -> Result<Response, Fault> {
    match info.main_task() {
        Task::Classify => {
            let parameters: ClassifyParameters = parameters(&call.body.parameters)?;
            match parameters.candidate_labels {
                None if info.signature.takes(Modality::Image) => classify_images(state, call, parameters).await,
                Some(_) => zero_shot(state, info, call, parameters).await,
                None => classify(state, call, parameters).await,
            }
        }
        Task::TokenClassify => {
            let parameters = parameters(&call.body.parameters)?;
            token_classify(state, call, parameters).await
        }
        _ => {
            let parameters = parameters(&call.body.parameters)?;
            fill_mask(state, call, parameters).await
        }
    }
}

fn parameters<T: DeserializeOwned + Default>(value: &Value) -> Result<T> {
    if value.is_null() {
        return Ok(T::default());
    }
    T::deserialize(value).map_err(|e| Error::Malformed { field: "parameters".to_string(), reason: e.to_string() })
}

/// The texts of `inputs`, and whether they are a list.
fn texts(state: &ApiState, inputs: &Value) -> Result<(Vec<String>, bool)> {
    let malformed =
        || Error::Malformed { field: "inputs".to_string(), reason: "expected a text or a list of texts".to_string() };
    if let Some(text) = inputs.as_str() {
        return Ok((vec![text.to_string()], false));
    }
    let texts = inputs.as_array().ok_or_else(malformed)?;
    check_count("inputs", texts.len(), state.settings.max_client_batch_size)?;
    let texts: Option<Vec<String>> = texts.iter().map(|text| text.as_str().map(str::to_string)).collect();
    Ok((texts.ok_or_else(malformed)?, true))
}

async fn computed(state: &ApiState, call: &Call<Asked>, inputs: Vec<Input>, task: Task) -> Result<Computed> {
    let params = TaskParams { task, ..TaskParams::default() };
    let request = Embed { model: None, inputs, params, deadline: call.deadline, priority: call.priority };
    state.keeper.infer(request, call.cache_use, "tei", None).await.map_err(rename)
}

/// The labels of one image, or a list of them for each of many; five of them unless `top_k` says otherwise.
async fn classify_images(
    state: &ApiState,
    call: Call<Asked>,
    parameters: ClassifyParameters,
) -> Result<Response, Fault> {
    let (files, is_list) = texts(state, &call.body.inputs)?;
    let named = |(i, file): (usize, &String)| {
        let field = if is_list { format!("inputs[{i}]") } else { "inputs".to_string() };
        image(file).map_err(|reason| Error::Malformed { field, reason })
    };
    let files: Vec<Input> = files.iter().enumerate().map(named).collect::<Result<_>>()?;
    let form = parameters.form();
    let computed = computed(state, &call, files, Task::Classify).await?;
    let lists: Vec<Value> =
        computed.rows.iter().map(|row| ranked(&computed, row, form, parameters.top_k.unwrap_or(5))).collect();
    let response = match (is_list, lists.as_slice()) {
        (false, [one]) => answer(one),
        _ => answer(&lists),
    };
    told(response?, &computed)
}

fn ranked(computed: &Computed, row: &[f32], form: Form, top_k: usize) -> Value {
    let ranked = scores::ranked(&computed.info, row, form).into_iter().take(top_k);
    ranked.map(|(label, score)| json!({"label": label, "score": number(score)})).collect()
}

/// One list an input, also of a single one: what this protocol's clients read.
async fn classify(state: &ApiState, call: Call<Asked>, parameters: ClassifyParameters) -> Result<Response, Fault> {
    let (texts, _) = texts(state, &call.body.inputs)?;
    let form = parameters.form();
    let computed = computed(state, &call, texts.into_iter().map(Input::Text).collect(), Task::Classify).await?;
    let top_k = parameters.top_k.unwrap_or(usize::MAX);
    let lists: Vec<Value> = computed.rows.iter().map(|row| ranked(&computed, row, form, top_k)).collect();
    told(answer(&lists)?, &computed)
}

/// Each label as a hypothesis, and how well the text entails it.
async fn zero_shot(
    state: &ApiState,
    info: &ModelInfo,
    call: Call<Asked>,
    parameters: ClassifyParameters,
) -> Result<Response, Fault> {
    let invalid = |field: &str, reason: String| Error::Invalid { field: field.to_string(), reason };
    let candidates = parameters.candidate_labels.unwrap_or_default();
    let Some(text) = call.body.inputs.as_str() else {
        let reason = "expected a text".to_string();
        return Err(Error::Malformed { field: "inputs".to_string(), reason }.into());
    };
    check_count("parameters.candidate_labels", candidates.len(), state.settings.max_client_batch_size)?;
    let template = parameters.hypothesis_template.as_deref().unwrap_or(HYPOTHESIS);
    if !template.contains("{}") {
        return Err(invalid("parameters.hypothesis_template", "has no `{}` for the label".to_string()).into());
    }
    let at = |word: &str| info.labels.iter().position(|label| label.to_lowercase().starts_with(word));
    let Some(entails) = at("entail") else {
        let reason = format!("`{}` has no label of entailment; its labels: {}", info.name, info.labels.join(", "));
        return Err(invalid("model", reason).into());
    };
    let contradicts = at("contra").unwrap_or(if entails == 0 { info.labels.len() - 1 } else { 0 });
    let pair = |label: &String| Input::Pair(text.to_string(), template.replace("{}", label));
    let computed = computed(state, &call, candidates.iter().map(pair).collect(), Task::Classify).await?;
    let of_label = |i: usize| -> Vec<f32> { computed.rows.iter().map(|row| row[i]).collect() };
    let entailed = of_label(entails);
    // Of a single label there is nothing to choose from: it stands for itself.
    let scores = match parameters.multi_label.unwrap_or(false) || candidates.len() == 1 {
        false => scores::softmax(&entailed),
        true => {
            let both = entailed.iter().zip(of_label(contradicts));
            both.map(|(yes, no)| scores::softmax(&[*yes, no])[0]).collect()
        }
    };
    let mut ranked: Vec<(&String, f32)> = candidates.iter().zip(scores).collect();
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
    let list: Vec<Value> =
        ranked.iter().map(|(label, score)| json!({"label": label, "score": number(*score)})).collect();
    told(answer(&list)?, &computed)
}

/// The entities of one text, or a list of them for each of many.
async fn token_classify(state: &ApiState, call: Call<Asked>, parameters: EntityParameters) -> Result<Response, Fault> {
    let (texts, is_list) = texts(state, &call.body.inputs)?;
    let inputs = texts.iter().cloned().map(Input::Text).collect();
    let computed = computed(state, &call, inputs, Task::TokenClassify).await?;
    let tokens = state.engine.tokenize(Some(&computed.info.name), texts.clone(), true).await?;
    computed.check_model(&state.engine.model(Some(&computed.info.name))?)?;
    let aggregation = parameters.aggregation_strategy.unwrap_or_default();
    let ignored = parameters.ignore_labels.unwrap_or_else(|| vec!["O".to_string()]);
    let labels = &computed.info.labels;
    let mut lists = Vec::with_capacity(texts.len());
    for ((text, tokens), row) in texts.iter().zip(&tokens).zip(&computed.rows) {
        if tokens.len() * labels.len() != row.len() {
            let cause = format!("{} scores for {} tokens of {} labels", row.len(), tokens.len(), labels.len());
            return Err(Error::Internal { cause }.into());
        }
        let chars: Vec<char> = text.chars().collect();
        let found = entities(labels, tokens, row, aggregation, text);
        let wanted = found.into_iter().filter(|entity| !ignored.contains(&entity.label));
        lists.push(
            wanted
                .map(|entity| {
                    let word: String = chars[entity.start..entity.end].iter().collect();
                    let mut object =
                        json!({"score": number(entity.score), "word": word, "start": entity.start, "end": entity.end});
                    match aggregation {
                        Aggregation::None => {
                            object["entity"] = json!(entity.label);
                            object["index"] = json!(entity.index);
                            object["word"] = json!(tokens[entity.index].piece);
                        }
                        _ => object["entity_group"] = json!(entity.label),
                    }
                    object
                })
                .collect::<Vec<Value>>(),
        );
    }
    let response = match (is_list, lists.as_slice()) {
        (false, [one]) => answer(one),
        _ => answer(&lists),
    };
    told(response?, &computed)
}

/// The likeliest tokens for the mask of a text; of a text with several masks, or of several texts, a list of those.
async fn fill_mask(state: &ApiState, call: Call<Asked>, parameters: MaskParameters) -> Result<Response, Fault> {
    let (texts, is_list) = texts(state, &call.body.inputs)?;
    let targets = match &parameters.targets {
        None => None,
        Some(targets) => Some(target_ids(state, targets).await?.into()),
    };
    let task = Task::FillMask { top_k: parameters.top_k.unwrap_or(DEFAULT_TOP_K), targets };
    let computed = computed(state, &call, texts.iter().cloned().map(Input::Text).collect(), task).await?;
    let model = Some(&*computed.info.name);
    let tokens = state.engine.tokenize(model, texts.clone(), true).await?;
    let mut answers = Vec::with_capacity(texts.len());
    for (tokens, row) in tokens.iter().zip(&computed.rows) {
        let num_masks = computed.num_masks(row);
        let per_mask = row.len() / num_masks.max(1);
        let ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
        let masks: Vec<usize> =
            (0..tokens.len()).filter(|i| matches!(tokens[*i].piece.as_str(), "[MASK]" | "<mask>")).collect();
        let mut lists = Vec::with_capacity(num_masks);
        for (mask, pairs) in masks.iter().zip(row.chunks_exact(per_mask.max(1))) {
            let mut words = Vec::new();
            let mut sequences = Vec::new();
            for pair in pairs.chunks_exact(2) {
                let mut filled = ids.clone();
                filled[*mask] = pair[0] as u32;
                words.push(vec![pair[0] as u32]);
                sequences.push(filled);
            }
            let words = state.engine.decode(model, words, false).await?;
            // The other masks of a text stay in it, as its reader needs them.
            let sequences = state.engine.decode(model, sequences, num_masks == 1).await?;
            let list = pairs.chunks_exact(2).zip(words).zip(sequences).map(|((pair, word), sequence)| {
                json!({"score": number(pair[1]), "token": pair[0] as u32, "token_str": word, "sequence": sequence})
            });
            lists.push(list.collect::<Vec<Value>>());
        }
        answers.push(if lists.len() == 1 { json!(lists[0]) } else { json!(lists) });
    }
    // The words are those of the tokenizer as it is now.
    computed.check_model(&state.engine.model(model)?)?;
    let response = match (is_list, answers.as_slice()) {
        (false, [one]) => answer(one),
        _ => answer(&answers),
    };
    told(response?, &computed)
}

/// The ids of words that are one token each. Errors: `Invalid` naming the word that is not.
async fn target_ids(state: &ApiState, targets: &[String]) -> Result<Vec<u32>> {
    const FIELD: &str = "parameters.targets";
    check_count(FIELD, targets.len(), state.settings.max_client_batch_size)?;
    let tokens = state.engine.tokenize(None, targets.to_vec(), false).await?;
    let id = |(tokens, target): (&Vec<crate::output::Token>, &String)| match tokens.as_slice() {
        [one] => Ok(one.id),
        _ => {
            let reason = format!("`{target}` is no single token of the vocabulary, but {}", tokens.len());
            Err(Error::Invalid { field: FIELD.to_string(), reason })
        }
    };
    tokens.iter().zip(targets).map(id).collect()
}
