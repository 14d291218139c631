//! Tasks beside embeddings over HTTP: TEI's, Jina's, Cohere's, the pipelines' and the application's routes, on small
//! models with random weights.

mod common;

use std::path::Path;

use candle_core::Device;
use common::http::{ok, plain, refused, server_of_fixture, server_of_model};
use eremois::model::load::load;
use eremois::model::manifest::ModelSpec;
use serde_json::{Value, json};

fn score(value: &Value) -> f64 {
    value["score"].as_f64().unwrap_or_else(|| panic!("{value}"))
}

#[tokio::test]
async fn predict_takes_texts_and_pairs_alone_and_in_lists() {
    let server = server_of_fixture("heads/bert-nli", "classify").await;
    let one = ok(&server.post("/predict", json!({"inputs": "the tide"})).await);
    assert_eq!(one.as_array().unwrap().len(), 3);
    assert!((one.as_array().unwrap().iter().map(score).sum::<f64>() - 1.0).abs() < 1e-5, "{one}");
    assert!(score(&one[0]) >= score(&one[1]) && score(&one[1]) >= score(&one[2]));
    let pair = ok(&server.post("/predict", json!({"inputs": ["the tide", "fog"]})).await);
    assert!(pair[0]["label"].is_string() && pair != one);
    let many = json!({"inputs": [["the tide"], ["the tide", "fog"]]});
    assert_eq!(ok(&server.post("/predict", many).await), json!([one, pair]));
    let raw = ok(&server.post("/predict", json!({"inputs": "the tide", "raw_scores": true})).await);
    let sum: f64 = raw.as_array().unwrap().iter().map(score).sum();
    assert!((sum - 1.0).abs() > 1e-3 && raw[0]["label"] == one[0]["label"], "{raw}");
    refused(&server.post("/predict", json!({"inputs": []})).await, 400, "inputs");
    refused(&server.post("/predict", json!({"inputs": [["a", "b", "c"]]})).await, 422, "inputs");
    refused(&server.post("/embed", json!({"inputs": "a"})).await, 422, "does `classify`");
    refused(&plain().await.post("/predict", json!({"inputs": "w1"})).await, 422, "does `embed`");
    let info = ok(&server.get("/info").await);
    assert_eq!(info["model_type"]["classifier"]["id2label"]["2"], "entailment");
}

#[tokio::test]
async fn labels_that_do_not_exclude_each_other_stand_for_themselves() {
    let server = server_of_fixture("heads/distilbert-multi-label", "classify").await;
    let scores = ok(&server.post("/predict", json!({"inputs": "fog"})).await);
    assert!((scores.as_array().unwrap().iter().map(score).sum::<f64>() - 1.0).abs() > 1e-3, "{scores}");
}

#[tokio::test]
async fn every_protocol_ranks_alike() {
    let server = server_of_fixture("heads/xlm-roberta-rerank", "rerank").await;
    let texts = ["the gulls", "fog over the piano", "the tide"];
    let tei = ok(&server.post("/rerank", json!({"query": "the tide", "texts": texts, "return_text": true})).await);
    let ranks = tei.as_array().unwrap();
    assert_eq!(ranks.len(), 3);
    assert!(ranks.windows(2).all(|w| score(&w[0]) >= score(&w[1])), "{tei}");
    assert!(ranks.iter().all(|rank| rank["text"] == texts[rank["index"].as_u64().unwrap() as usize]));
    let raw = ok(&server.post("/rerank", json!({"query": "the tide", "texts": texts, "raw_scores": true})).await);
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    for (raw, usual) in raw.as_array().unwrap().iter().zip(ranks) {
        assert!((sigmoid(score(raw)) - score(usual)).abs() < 1e-5 && raw["text"].is_null());
    }
    let documents = json!([texts[0], {"text": texts[1]}, texts[2]]);
    for path in ["/v1/rerank", "/v2/rerank", "/rerank"] {
        let body =
            json!({"model": "m", "query": "the tide", "documents": documents, "top_n": 2, "return_documents": true});
        let answer = ok(&server.post(path, body).await);
        let results = answer["results"].as_array().unwrap();
        assert_eq!(results.len(), 2, "{path}");
        for (result, rank) in results.iter().zip(ranks) {
            assert_eq!(result["index"], rank["index"], "{path}");
            assert_eq!(result["relevance_score"], rank["score"], "{path}");
            assert_eq!(result["document"]["text"], rank["text"], "{path}");
        }
    }
    let cohere = json!({"model": "m", "query": "a", "documents": ["b"]});
    assert!(ok(&server.post("/v2/rerank", cohere).await)["results"][0]["document"].is_null());
    let units = async |query: &str, documents: &[String]| {
        let body = json!({"query": query, "documents": documents});
        ok(&server.post("/v2/rerank", body).await)["meta"]["billed_units"]["search_units"].clone()
    };
    assert_eq!(units("the tide", &texts.map(str::to_string)).await, json!(1.0));
    // 32 long documents: each counts once a chunk of 500 tokens that the query, read to its 256th token, is part of.
    let (query, document) = ("a ".repeat(300), "a ".repeat(800));
    let num_tokens = async |text: &str| {
        let body = json!({"inputs": text, "add_special_tokens": false});
        ok(&server.post("/tokenize", body).await)[0].as_array().unwrap().len()
    };
    let room = 500 - num_tokens(&query).await.min(256);
    let num_chunks = 32 * num_tokens(&document).await.div_ceil(room);
    assert!(num_chunks > 100, "{num_chunks}");
    assert_eq!(units(&query, &vec![document; 32]).await, json!(num_chunks.div_ceil(100) as f64));
    refused(&server.post("/rerank", json!({"query": "a", "texts": []})).await, 400, "texts");
    refused(&server.post("/rerank", json!({"query": "a"})).await, 422, "texts");
    refused(&server.post("/rerank", json!({"query": "", "texts": ["a"]})).await, 400, "query");
    let long = "tide ".repeat(200);
    refused(&server.post("/rerank", json!({"query": "a", "texts": ["b", long]})).await, 413, "texts[1]");
    let cut = json!({"query": "a", "texts": ["b", long], "truncate": true});
    assert_eq!(ok(&server.post("/rerank", cut).await).as_array().unwrap().len(), 2);
    refused(&server.post("/v1/rerank", json!({"query": "a", "documents": ["b"], "top_n": 0})).await, 422, "top_n");
    refused(&server.post("/v1/rerank", json!({"query": "a", "documents": ["b"], "model": "n"})).await, 404, "no model");
}

/// The mean of the chunks' vectors by their tokens, cut and scaled, as it is told of token ids on another route.
#[tokio::test]
async fn long_inputs_are_read_in_chunks_where_that_is_asked_for() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/bert-f16");
    // The files' own default prompt would be a token more.
    let default_prompt = Some("document".to_string());
    let spec = ModelSpec { max_seq_len: Some(8), default_prompt, ..ModelSpec::bare("m", dir) };
    let server = server_of_model(load(&spec, &Device::Cpu).unwrap()).await;
    let floats = |value: &Value| -> Vec<f64> {
        value.as_array().unwrap_or_else(|| panic!("{value}")).iter().map(|x| x.as_f64().unwrap()).collect()
    };
    let close = |a: &[f64], b: &[f64]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
    // Sixteen words of one token each: chunks of six with [CLS] and [SEP] around each.
    let text = "the piano of the piano and the four of his piano from about the over the";
    let tokens = ok(&server.post("/tokenize", json!({"inputs": text, "add_special_tokens": false})).await);
    let ids: Vec<u64> = tokens[0].as_array().unwrap().iter().map(|token| token["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), 16);
    for (overlap, starts) in [(0, vec![0, 6, 12]), (2, vec![0, 4, 8, 12])] {
        let mut chunks: Vec<Vec<u64>> = Vec::new();
        for start in starts {
            let end = 16.min(start + 6);
            chunks.push([&[2], &ids[start..end], &[3]].concat());
            if end == 16 {
                break;
            }
        }
        let rows = ok(&server.post("/embed", json!({"inputs": chunks, "normalize": false})).await);
        let rows: Vec<Vec<f64>> = rows.as_array().unwrap().iter().map(floats).collect();
        let total: usize = chunks.iter().map(Vec::len).sum();
        let mean = |i: usize| rows.iter().zip(&chunks).map(|(row, chunk)| row[i] * chunk.len() as f64).sum::<f64>();
        let mean: Vec<f64> = (0..rows[0].len()).map(|i| mean(i) / total as f64).collect();
        let raw = json!({"inputs": [text, "the"], "chunk_overlap": overlap, "normalize": false});
        let raw = ok(&server.post("/embed", raw).await);
        assert!(close(&floats(&raw[0]), &mean), "overlap {overlap}");
        let short = ok(&server.post("/embed", json!({"inputs": "the", "normalize": false})).await);
        assert!(close(&floats(&raw[1]), &floats(&short[0])), "one that fits is as it was");

        let length = mean[..8].iter().map(|x| x * x).sum::<f64>().sqrt();
        let cut: Vec<f64> = mean[..8].iter().map(|x| x / length).collect();
        let body = json!({"input": text, "dimensions": 8, "chunk_overlap": overlap, "normalized": true});
        let openai = ok(&server.post("/v1/embeddings", body).await);
        assert!(close(&floats(&openai["data"][0]["embedding"]), &cut), "{openai}");
        assert_eq!(openai["usage"]["total_tokens"], total);
        let parameters = json!({"chunk_overlap": overlap, "dimensions": 8, "normalize": true});
        let body = json!({"input": [text], "parameters": parameters, "store": false});
        let ours = ok(&server.post("/api/v1/inferences", body).await);
        assert!(close(&floats(&ours["output"]["embeddings"][0]), &cut), "{ours}");
    }
    // Nothing changes where nobody asks.
    refused(&server.post("/embed", json!({"inputs": text})).await, 413, "inputs");
    refused(&server.post("/v1/embeddings", json!({"input": text})).await, 413, "input");
    let both = json!({"inputs": text, "truncate": true, "chunk_overlap": 0});
    refused(&server.post("/embed", both).await, 422, "chunk_overlap");
    let wide = json!({"inputs": text, "chunk_overlap": 6});
    refused(&server.post("/embed", wide).await, 422, "6 is not below the 6 tokens of a chunk");
    let ids_too = json!({"inputs": [ids], "chunk_overlap": 3});
    assert_eq!(ok(&server.post("/embed", ids_too).await).as_array().unwrap().len(), 1);
    let endless = json!({"inputs": ["the", "the ".repeat(6 * 256 + 1)], "chunk_overlap": 0});
    refused(&server.post("/embed", endless).await, 413, "inputs[1]");
    let all = json!({"input": text, "task": "embed_all", "parameters": {"chunk_overlap": 0}, "store": false});
    refused(&server.post("/api/v1/inferences", all).await, 422, "has nothing that can be pooled");
    let negative = json!({"inputs": text, "chunk_overlap": -1});
    refused(&server.post("/embed", negative).await, 422, "chunk_overlap");
}

#[tokio::test]
async fn tokens_have_vectors_and_vocabularies_weights() {
    let server = server_of_fixture("heads/distilbert-splade", "sparse").await;
    let sparse = ok(&server.post("/embed_sparse", json!({"inputs": ["the tide", "a"]})).await);
    let first = sparse[0].as_array().unwrap();
    assert!(!first.is_empty() && first.iter().all(|pair| pair["value"].as_f64().unwrap() > 0.0), "{sparse}");
    assert!(first.windows(2).all(|w| w[0]["index"].as_u64() < w[1]["index"].as_u64()), "{sparse}");
    assert_eq!(ok(&server.post("/", json!({"inputs": ["the tide", "a"]})).await), sparse);
    let vectors = ok(&plain().await.post("/embed_all", json!({"inputs": ["w1 w2", "w3"]})).await);
    assert_eq!(vectors[0].as_array().unwrap().len(), 2, "one a token");
    assert_eq!(vectors[0][1], json!([2.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]));
    assert_eq!(vectors[1].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn pipelines_answer_as_their_clients_read() {
    let nli = server_of_fixture("heads/bert-nli", "classify").await;
    let body = json!({"inputs": "the tide", "parameters": {"top_k": 2}});
    let lists = ok(&nli.post("/", body).await);
    assert_eq!((lists.as_array().unwrap().len(), lists[0].as_array().unwrap().len()), (1, 2));
    let zero = |multi: bool| json!({"inputs": "the tide", "parameters": {"candidate_labels": ["sea", "music", "food"], "multi_label": multi}});
    let single = ok(&nli.post("/", zero(false)).await);
    assert!((single.as_array().unwrap().iter().map(score).sum::<f64>() - 1.0).abs() < 1e-5, "{single}");
    let many = ok(&nli.post("/", zero(true)).await);
    assert!((many.as_array().unwrap().iter().map(score).sum::<f64>() - 1.0).abs() > 1e-3, "{many}");
    let bad = json!({"inputs": "a", "parameters": {"candidate_labels": ["b"], "hypothesis_template": "no place"}});
    refused(&nli.post("/", bad).await, 422, "hypothesis_template");
    let bad = json!({"inputs": "a", "parameters": {"function_to_apply": "tanh"}});
    refused(&nli.post("/", bad).await, 422, "parameters");

    let ner = server_of_fixture("heads/bert-ner", "token_classify").await;
    let entities = ok(&ner.post("/", json!({"inputs": "Ada met Charles", "parameters": {}})).await);
    for entity in entities.as_array().unwrap() {
        let place = entity["start"].as_u64().unwrap() as usize..entity["end"].as_u64().unwrap() as usize;
        assert_eq!(entity["word"], "Ada met Charles"[place], "{entity}");
        assert!(entity["entity_group"].is_string() && entity["entity_group"] != "O");
    }
    let none = json!({"inputs": ["Ada", "b"], "parameters": {"aggregation_strategy": "none", "ignore_labels": []}});
    let lists = ok(&ner.post("/", none).await);
    assert!(lists[0][0]["entity"].is_string() && lists[0][0]["index"] == 1, "{lists}");

    let filler = server_of_fixture("heads/bert-masked-lm", "fill_mask").await;
    let words = ok(&filler.post("/", json!({"inputs": "the [MASK] wakes", "parameters": {"top_k": 3}})).await);
    assert_eq!(words.as_array().unwrap().len(), 3);
    assert!(words[0]["sequence"].as_str().unwrap().starts_with("the ") && words[0]["token_str"].is_string(), "{words}");
    refused(&filler.post("/", json!({"inputs": "no mask", "parameters": {}})).await, 422, "mask");
    let target = words[2]["token_str"].as_str().unwrap().trim_start_matches("##").to_string();
    let two = json!({"inputs": ["[MASK] a [MASK]"], "parameters": {"targets": ["a", "e"], "top_k": 9}});
    let lists = ok(&filler.post("/", two).await);
    assert_eq!((lists[0].as_array().unwrap().len(), lists[0][0].as_array().unwrap().len()), (2, 2), "{target} {lists}");
    let bad = json!({"inputs": "[MASK]", "parameters": {"targets": ["harbour master"]}});
    refused(&filler.post("/", bad).await, 422, "harbour master");
}

#[tokio::test]
async fn the_application_keeps_what_every_task_gives() {
    let server = server_of_fixture("heads/xlm-roberta-rerank", "rerank").await;
    let body = json!({"input": [["the tide", "fog"], ["the tide", "the tide"]], "metadata": {"order": "1"}});
    let made = server.post("/api/v1/inferences", body).await;
    let inference = ok(&made);
    assert_eq!((&inference["task"], &inference["stored"]), (&json!("classify"), &json!(true)));
    assert_eq!(inference["output"]["results"].as_array().unwrap().len(), 2);
    let found = ok(&server.get(&format!("/api/v1/inferences/{}", inference["id"].as_str().unwrap())).await);
    assert_eq!(found["output"], inference["output"]);
    assert_eq!(found["inputs"][1], json!(["the tide", "the tide"]));
    let unstored = json!({"input": "the tide", "store": false});
    assert_eq!(ok(&server.post("/api/v1/inferences", unstored).await)["stored"], false);
    refused(&server.post("/api/v1/inferences", json!({"input": "a", "task": "embed"})).await, 422, "task");
    let filler = self::server_of_fixture("heads/bert-masked-lm", "fill_mask").await;
    let body = json!({"input": "the [MASK]", "parameters": {"top_k": 2}});
    let inference = ok(&filler.post("/api/v1/inferences", body).await);
    assert_eq!(inference["output"]["results"][0][0].as_array().unwrap().len(), 2, "{inference}");
}
