//! A real model of named entities against what ONNX Runtime makes of the same weights: scripts/make-ner-model.py.

use std::path::Path;

use eremois::inference::outcome::entities::{Aggregation, Entity, entities};
use eremois::model::LoadedModel;
use eremois::model::manifest::ModelSpec;
use eremois::model::pack::{PackedInput, Wanted};
use eremois::request::{Input, Truncation};
use serde_json::Value;

use super::common::{load_spec, rampart, spec};

/// Largest difference of a probability. Both compute in f32; the record has five digits.
const MAX_DIFF: f32 = 2e-4;

fn model() -> LoadedModel {
    load_spec(&ModelSpec { task: "token_classify".into(), ..spec(&rampart()) }).unwrap()
}

/// The ids of each text and its row, all in one batch.
fn rows(model: &LoadedModel, texts: &[&str]) -> Vec<(Vec<u32>, Vec<f32>)> {
    let mut batch = PackedInput::default();
    let mut all_ids = Vec::new();
    for text in texts {
        let encoding = model.encoder.encode(&Input::Text(text.to_string()), "input", None, Truncation::Refuse).unwrap();
        batch.push(&encoding.input_ids, &encoding.token_type_ids, Wanted::TokenScores);
        all_ids.push(encoding.input_ids);
    }
    let rows = model.backend().launch(batch).unwrap().finish().unwrap();
    all_ids.into_iter().enumerate().map(|(i, ids)| (ids.to_vec(), rows.row(i).to_vec())).collect()
}

/// Place and probability of the likeliest label.
fn best(logits: &[f32]) -> (usize, f32) {
    let (at, &highest) = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
    (at, 1.0 / logits.iter().map(|logit| (logit - highest).exp()).sum::<f32>())
}

#[test]
fn tags_equal_onnx_runtimes() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/rampart.json");
    let cases: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let texts: Vec<&str> = cases.iter().map(|case| case["input"].as_str().unwrap()).collect();
    let model = model();
    let mut num_tagged = 0;
    for (case, (ids, row)) in cases.iter().zip(rows(&model, &texts)) {
        let text = &case["input"];
        assert_eq!(serde_json::json!(ids), case["ids"], "{text}");
        let tokens = row.chunks(model.info.labels.len());
        assert_eq!(tokens.len(), ids.len());
        for (i, logits) in tokens.enumerate() {
            let (label, score) = best(logits);
            let expected = case["labels"][i].as_str().unwrap();
            assert_eq!(model.info.labels[label], expected, "token {i} of {text}");
            let diff = (score - case["scores"][i].as_f64().unwrap() as f32).abs();
            assert!(diff <= MAX_DIFF, "token {i} of {text}: {diff} off");
            num_tagged += usize::from(expected != "O");
        }
    }
    assert!(num_tagged > 40, "{num_tagged} tokens of entities are too few to compare");
}

#[test]
fn entities_of_a_sentence_are_found_where_they_stand() {
    let text = "My name is Maria Gonzalez and I live at 742 Evergreen Terrace, Springfield, Illinois 62704.";
    let model = model();
    let (_, row) = rows(&model, &[text]).remove(0);
    let tokens = model.encoder.tokenize(text, true).unwrap();
    let found = entities(&model.info.labels, &tokens, &row, Aggregation::First, text);
    // Characters are bytes in this text; what is no entity is left out by the routes.
    let place = |e: &Entity| (e.label.clone(), text[e.start..e.end].to_string());
    let found: Vec<(String, String)> = found.iter().filter(|e| e.label != "O").map(place).collect();
    let expected = [
        ("GIVEN_NAME", "Maria"),
        ("SURNAME", "Gonzalez"),
        ("BUILDING_NUMBER", "742"),
        ("STREET_NAME", "Evergreen Terrace"),
        ("CITY", "Springfield"),
        ("STATE", "Illinois"),
        ("ZIP_CODE", "62704"),
    ];
    assert_eq!(found, expected.map(|(label, text)| (label.to_string(), text.to_string())));
}
