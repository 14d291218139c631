//! Causal language models that answer a question about a pair, against plain torch: scripts/make-head-fixtures.py.

use std::path::Path;

use eremois::inference::outcome::scores::{Form, scores};
use eremois::model::LoadedModel;
use eremois::model::judge::{Answer, Question};
use eremois::model::manifest::{Manifest, ModelSpec};
use eremois::model::pack::Wanted;
use eremois::request::{Input, Truncation, TruncationDirection};
use serde_json::{Value, json};

use super::common::{Copied, load_spec, spec};
use super::heads::{close, floats, heads, references, rows};

/// The manifest's `[rerank]`, in what a manifest needs beside it.
fn question(section: &str) -> eremois::Result<Option<Question>> {
    let text = format!("task = \"rerank\"\n[versions.1]\n[versions.1.files]\n[rerank]\n{section}\n");
    Manifest::parse(&text, Path::new("manifest.toml")).map(|manifest| manifest.rerank)
}

/// The fixture's second question.
fn own() -> Question {
    let section = "true_token = \"is\"\nfalse_token = 159\nprefix = \"is it so: \"\nsuffix = \"?\"\n\
                   pair = \"{document} / {query} ({instruction})\"\ninstruction = \"say it\"";
    question(section).unwrap().unwrap()
}

fn spec_of(dir: &Path, rerank: Option<Question>) -> ModelSpec {
    ModelSpec { task: "rerank".into(), rerank, ..spec(dir) }
}

fn fixture_model(rerank: Option<Question>) -> LoadedModel {
    load_spec(&spec_of(&heads().join("qwen3-reranker"), rerank)).unwrap()
}

fn check(model: &LoadedModel, cases: &Value) {
    let cases = cases.as_array().unwrap();
    let inputs: Vec<Value> = cases.iter().map(|case| case["input"].clone()).collect();
    for (case, row) in cases.iter().zip(rows(model, &inputs, &Wanted::Scores)) {
        let input = Input::Pair(case["input"][0].as_str().unwrap().into(), case["input"][1].as_str().unwrap().into());
        let ids = model.encoder.encode(&input, "input", None, Truncation::Refuse).unwrap().input_ids;
        assert_eq!(json!(ids), case["ids"], "{}", case["input"]);
        close(&row, &floats(&case["logits"]), "the difference of the answers");
        let probability = scores(&model.info, &row, Form::Usual);
        close(&probability, &[case["probability"].as_f64().unwrap() as f32], "softmax over both answers");
    }
}

#[test]
fn a_pair_is_asked_about_and_the_answers_are_weighed() {
    // The answers' ids stand in the module's file, the question is Qwen3-Reranker's.
    check(&fixture_model(None), &references("qwen3-reranker")["usual"]);
    check(&fixture_model(Some(own())), &references("qwen3-reranker")["own"]);
    // As Qwen3-Reranker was published first: no modules, and a table of its own for what comes next.
    let copy = Copied::of_dir(&heads().join("qwen3-reranker"));
    copy.remove("modules.json");
    copy.weights(|tensors| {
        let table = tensors["model.embed_tokens.weight"].affine(-1.0, 0.0).unwrap();
        tensors.insert("lm_head.weight".to_string(), table);
    });
    let swapped = Question { true_token: Answer::Id(159), false_token: Answer::Id(152), ..Question::default() };
    let model = load_spec(&spec_of(copy.dir(), Some(swapped))).unwrap();
    check(&model, &references("qwen3-reranker")["usual"]);
}

#[test]
fn a_prompt_is_the_instruction_and_a_text_stands_alone() {
    let model = fixture_model(Some(own()));
    let ids = |input: Input, prompt: Option<&str>| {
        model.encoder.encode(&input, "input", prompt, Truncation::Refuse).unwrap().input_ids
    };
    let pair = |query: &str, document: &str| Input::Pair(query.into(), document.into());
    let usual = ids(pair("the tide", "fog"), None);
    assert_eq!(ids(pair("the tide", "fog"), Some("say it")), usual);
    assert_ne!(ids(pair("the tide", "fog"), Some("count")), usual);
    assert_eq!(ids(Input::Text("fog / the tide (say it)".into()), None), usual, "put together by its client");
    assert_ne!(ids(pair("{document}", "fog"), None), ids(pair("fog", "fog"), None), "places are not read in texts");
    let empty = model.encoder.encode(&pair("", ""), "input", None, Truncation::Refuse).unwrap_err();
    assert!(matches!(empty, eremois::Error::Empty { .. }), "{empty}");
}

#[test]
fn what_is_cut_is_the_pair_and_never_the_question() {
    let dir = heads().join("qwen3-reranker");
    let spec = ModelSpec { max_seq_len: Some(40), ..spec_of(&dir, Some(own())) };
    let model = load_spec(&spec).unwrap();
    let long = || Input::Pair("the tide".into(), "over the piano ".repeat(40));
    let error = model.encoder.encode(&long(), "input", None, Truncation::Refuse).unwrap_err();
    assert!(matches!(error, eremois::Error::TooLarge { limit: 40, .. }), "{error}");
    let cut = Truncation::Cut(TruncationDirection::Right);
    let ids = model.encoder.encode(&long(), "input", None, cut).unwrap().input_ids;
    let whole = fixture_model(Some(own())).encoder.encode(&long(), "input", None, Truncation::Refuse).unwrap();
    assert_eq!(ids.len(), 40);
    assert_eq!(ids[..39], whole.input_ids[..39]);
    assert_eq!(ids[39], *whole.input_ids.last().unwrap(), "the suffix of one token");
    let error = load_spec(&ModelSpec { max_seq_len: Some(5), ..spec }).err().unwrap().to_string();
    assert!(error.contains("max_seq_len 5 leaves no room beside the"), "{error}");
}

#[test]
fn the_question_is_part_of_the_fingerprint() {
    assert_ne!(fixture_model(None).info.fingerprint, fixture_model(Some(own())).info.fingerprint);
}

#[test]
fn what_cannot_be_asked_is_refused_by_name() {
    for (section, expected) in [
        ("true_token = 1.5", "rerank.true_token: must be a token of the vocabulary or its id"),
        ("pair = \"{query}\"", "rerank.pair: has no `{document}`"),
        ("suffix = 3", "rerank.suffix: must be a string"),
        ("sufix = \"a\"", "rerank.sufix: is not a key here; did you mean `suffix`?"),
    ] {
        let error = question(section).unwrap_err().to_string();
        assert!(error.contains(expected), "{section}: {error}");
    }
    let embed = "task = \"embed\"\n[versions.1]\n[versions.1.files]\n[rerank]\n";
    let error = Manifest::parse(embed, Path::new("manifest.toml")).unwrap_err().to_string();
    assert!(error.contains("rerank: is for task \"rerank\" alone"), "{error}");

    let refused = |dir: &Path, question: Option<Question>| {
        load_spec(&spec_of(dir, question)).err().expect("it loads").to_string()
    };
    let dir = heads().join("qwen3-reranker");
    let unknown = Question { false_token: Answer::Token("perhaps".into()), ..own() };
    let error = refused(&dir, Some(unknown));
    assert!(error.contains("has no token `perhaps`, which [rerank] `false_token`"), "{error}");
    let error = refused(&dir, Some(Question { true_token: Answer::Id(5000), ..own() }));
    assert!(error.contains("token id 5000 of an answer is not below `vocab_size` 220"), "{error}");
    let error = refused(&heads().join("xlm-roberta-rerank"), Some(own()));
    assert!(error.contains("is of no causal language model"), "{error}");
    // A model with a question of its own, in a language that is not read.
    let copy = Copied::of_dir(&dir);
    copy.write("chat_template.jinja", "{{ messages }} relevant?");
    let error = refused(copy.dir(), None);
    assert!(error.contains("[rerank] of the manifest must say it"), "{error}");
    assert!(load_spec(&spec_of(copy.dir(), Some(own()))).is_ok());
}

#[test]
fn a_manifest_keeps_its_question() {
    let section = "true_token = \"is\"\nfalse_token = 159\npair = \"{document} of {query}\"";
    let text = format!("task = \"rerank\"\n[versions.1]\n[versions.1.files]\n[rerank]\n{section}\n");
    let manifest = Manifest::parse(&text, Path::new("manifest.toml")).unwrap();
    let again = Manifest::parse(&manifest.to_toml(), Path::new("manifest.toml")).unwrap();
    assert_eq!(again, manifest);
    let question = manifest.rerank.unwrap();
    assert_eq!((question.true_token, question.false_token), (Answer::Token("is".into()), Answer::Id(159)));
    assert_eq!(question.suffix, Question::default().suffix);
}
