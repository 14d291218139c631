//! Heads against what `transformers` computes: scripts/make-head-fixtures.py.

use std::path::{Path, PathBuf};

use eremois::inference::outcome::entities::{Aggregation, entities};
use eremois::inference::outcome::pairs;
use eremois::model::LoadedModel;
use eremois::model::manifest::ModelSpec;
use eremois::model::pack::{PackedInput, RowSpec, Wanted};
use eremois::request::{Input, Truncation};
use serde_json::{Value, json};

use super::common::{load_spec, spec};

pub fn heads() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/heads")
}

pub fn references(name: &str) -> Value {
    let text = std::fs::read_to_string(heads().join("references.json")).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()[name].take()
}

fn model(name: &str, task: &str) -> LoadedModel {
    load_spec(&ModelSpec { task: task.into(), ..spec(&heads().join(name)) }).unwrap()
}

fn input(value: &Value) -> Input {
    match value {
        Value::String(text) => Input::Text(text.clone()),
        pair => Input::Pair(pair[0].as_str().unwrap().into(), pair[1].as_str().unwrap().into()),
    }
}

/// All inputs in one batch, each to a row of this kind.
pub fn rows(model: &LoadedModel, inputs: &[Value], wanted: &Wanted) -> Vec<Vec<f32>> {
    let mut batch = PackedInput::default();
    for value in inputs {
        let encoding = model.encoder.encode(&input(value), "input", None, Truncation::Refuse).unwrap();
        batch.push(&encoding.input_ids, &encoding.token_type_ids, wanted.clone());
    }
    let rows = model.backend().launch(batch).unwrap().finish().unwrap();
    (0..inputs.len()).map(|i| rows.row(i).to_vec()).collect()
}

pub fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

#[track_caller]
pub fn close(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (g, e) in got.iter().zip(expected) {
        assert!((g - e).abs() <= 2e-5 * e.abs().max(1.0), "{what}: got {g}, expected {e}");
    }
}

/// Scores of texts and pairs, whole or by token.
fn check_scores(name: &str, task: &str, wanted: Wanted) {
    let model = model(name, task);
    let cases = references(name)["cases"].as_array().unwrap().clone();
    let inputs: Vec<Value> = cases.iter().map(|case| case["input"].clone()).collect();
    for (case, row) in cases.iter().zip(rows(&model, &inputs, &wanted)) {
        close(&row, &floats(&case["logits"]), &format!("{name}: {}", case["input"]));
    }
}

#[test]
fn scores_of_sequences_equal_transformers() {
    check_scores("bert-nli", "classify", Wanted::Scores);
    check_scores("xlm-roberta-rerank", "rerank", Wanted::Scores);
    check_scores("distilbert-multi-label", "classify", Wanted::Scores);
    check_scores("electra-rerank", "rerank", Wanted::Scores);
    check_scores("albert-nli", "classify", Wanted::Scores);
    check_scores("deberta-v2-nli", "classify", Wanted::Scores);
    check_scores("deberta-v1-nli", "classify", Wanted::Scores);
    check_scores("modernbert-nli", "classify", Wanted::Scores);
    check_scores("modernbert-rerank", "rerank", Wanted::Scores);
    check_scores("nomic-nli", "classify", Wanted::Scores);
    check_scores("gte-rerank", "rerank", Wanted::Scores);
    check_scores("jina-rerank", "rerank", Wanted::Scores);
    check_scores("qwen3-nli", "classify", Wanted::Scores);
    check_scores("mistral-rerank", "rerank", Wanted::Scores);
    check_scores("gemma3-nli", "classify", Wanted::Scores);
}

#[test]
fn scores_of_tokens_equal_transformers() {
    for name in ["modernbert-ner", "qwen3-ner", "albert-ner", "deberta-v3-ner"] {
        check_scores(name, "token_classify", Wanted::TokenScores);
    }
}

#[test]
fn scores_of_tokens_and_their_entities_equal_transformers() {
    check_scores("bert-ner", "token_classify", Wanted::TokenScores);
    let model = model("bert-ner", "token_classify");
    for case in references("bert-ner")["cases"].as_array().unwrap() {
        let text = case["input"].as_str().unwrap();
        let tokens = model.encoder.tokenize(text, true).unwrap();
        let row = floats(&case["logits"]);
        for (word, aggregation) in [
            ("none", Aggregation::None),
            ("simple", Aggregation::Simple),
            ("first", Aggregation::First),
            ("average", Aggregation::Average),
            ("max", Aggregation::Max),
        ] {
            let found = entities(&model.info.labels, &tokens, &row, aggregation, text);
            let expected = case["entities"][word].as_array().unwrap();
            assert_eq!(found.len(), expected.len(), "{word}: {text}: {found:?}");
            for (got, expected) in found.iter().zip(expected) {
                let place = json!([got.label, got.start, got.end]);
                assert_eq!(place, json!([expected[0], expected[2], expected[3]]), "{word}: {text}");
                assert!((f64::from(got.score) - expected[1].as_f64().unwrap()).abs() < 1e-4, "{word}: {text}: {got:?}");
            }
        }
    }
}

const MASKED_LM: [&str; 10] = [
    "bert-masked-lm",
    "xlm-roberta-masked-lm",
    "modernbert-masked-lm",
    "nomic-masked-lm",
    "gte-masked-lm",
    "electra-masked-lm",
    "albert-masked-lm",
    "deberta-v1-masked-lm",
    "deberta-v2-masked-lm",
    "deberta-v3-masked-lm",
];

#[test]
fn weights_of_a_vocabulary_equal_splade() {
    for name in MASKED_LM.into_iter().chain(["distilbert-splade"]) {
        let model = model(name, "sparse");
        let cases = references(name)["sparse"].as_array().unwrap().clone();
        let inputs: Vec<Value> = cases.iter().map(|case| case["input"].clone()).collect();
        for (case, row) in cases.iter().zip(rows(&model, &inputs, &Wanted::Sparse)) {
            let expected = case["weights"].as_array().unwrap();
            let (ids, weights): (Vec<u32>, Vec<f32>) = pairs(&row).unzip();
            let expected_ids: Vec<u32> = expected.iter().map(|pair| pair[0].as_u64().unwrap() as u32).collect();
            assert_eq!(ids, expected_ids, "{name}: {}", case["input"]);
            let expected: Vec<f32> = expected.iter().map(|pair| pair[1].as_f64().unwrap() as f32).collect();
            close(&weights, &expected, name);
        }
    }
}

#[test]
fn masks_are_filled_as_by_transformers() {
    for name in MASKED_LM {
        let model = model(name, "fill_mask");
        for case in references(name)["filled"].as_array().unwrap() {
            let wanted = Wanted::Masked { top_k: 4, targets: None };
            let row = rows(&model, &[case["input"].clone()], &wanted).remove(0);
            let masks = case["masks"].as_array().unwrap();
            assert_eq!(row.len(), masks.len() * 8, "{name}");
            for (got, expected) in row.chunks(8).zip(masks) {
                for (pair, expected) in got.chunks(2).zip(expected.as_array().unwrap()) {
                    assert_eq!(u64::from(pair[0] as u32), expected[0].as_u64().unwrap(), "{name}: {}", case["input"]);
                    close(&pair[1..], &[expected[1].as_f64().unwrap() as f32], name);
                }
            }
        }
        let wanted = Wanted::Masked { top_k: 9, targets: Some([7, 5].into()) };
        let inputs = [references(name)["filled"][0]["input"].clone()];
        let row = rows(&model, &inputs, &wanted).remove(0);
        assert_eq!(row.len(), 4, "as many as there are targets");
        assert!(row[1] >= row[3], "the likeliest first");
    }
}

#[test]
fn a_rows_result_does_not_depend_on_its_batch() {
    let model = model("bert-nli", "classify");
    let inputs = [json!("a"), json!(["the tide", "fog"]), json!("The harbour master wakes before the gulls.")];
    let together = rows(&model, &inputs, &Wanted::Scores);
    for (input, row) in inputs.iter().zip(together) {
        close(&rows(&model, std::slice::from_ref(input), &Wanted::Scores)[0], &row, "alone and together");
    }
}

#[test]
fn vectors_of_tokens_stand_beside_pooled_ones() {
    let model = load_spec(&spec(&super::common::fixture("bert-f16"))).unwrap();
    let width = model.info.hidden_size;
    let encoding = model.encoder.encode(&Input::Text("the gulls".into()), "input", None, Truncation::Refuse).unwrap();
    let (ids, plain) = (encoding.input_ids, RowSpec { normalize: false, dimensions: width });
    let mut batch = PackedInput::default();
    batch.push(&ids, &[], Wanted::TokenVectors);
    batch.push(&ids, &[], plain);
    let rows = model.backend().launch(batch).unwrap().finish().unwrap();
    assert_eq!(rows.row(0).len(), ids.len() * width);
    // The model's pooling is what the tokens' vectors give when they are pooled by hand.
    let mean: Vec<f32> =
        (0..width).map(|i| rows.row(0).chunks(width).map(|token| token[i]).sum::<f32>() / ids.len() as f32).collect();
    let expected = match model.info.pooling {
        eremois::model::pack::Pooling::Cls => rows.row(0)[..width].to_vec(),
        _ => mean,
    };
    close(rows.row(1), &expected, "pooled by hand");
}

#[test]
fn a_head_that_is_not_there_is_refused_by_name() {
    let error = load_spec(&ModelSpec { task: "rerank".into(), ..spec(&heads().join("bert-nli")) }).err().unwrap();
    assert!(error.to_string().contains("needs a model of one score, this one has 3"), "{error}");
    let error = load_spec(&ModelSpec { task: "fill_mask".into(), ..spec(&heads().join("bert-nli")) }).err().unwrap();
    assert!(error.to_string().contains("cls.predictions.transform.dense.weight"), "{error}");
    let error =
        load_spec(&ModelSpec { task: "classify".into(), ..spec(&super::common::fixture("mpnet")) }).err().unwrap();
    assert!(error.to_string().contains("classifier") || error.to_string().contains("id2label"), "{error}");
    let error = load_spec(&ModelSpec { task: "sparse".into(), ..spec(&heads().join("qwen3-nli")) }).err().unwrap();
    assert!(error.to_string().contains("no head for masked tokens"), "{error}");
    let model = model("bert-nli", "classify");
    let mut batch = PackedInput::default();
    batch.push(&[2, 3], &[], Wanted::Sparse);
    let error = model.backend().launch(batch).err().unwrap();
    assert!(error.to_string().contains("what the model's head gives"), "{error}");
}
