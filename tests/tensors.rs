//! Tasks beside embeddings and models of tensors, through named tensors: the Open Inference Protocol's and TensorFlow
//! Serving's routes, and `/vertex`.

mod common;

use axum::body::Body;
use axum::http::Request;
use common::fake;
use common::http::{Server, ok, plain, refused, server_of_fixture, server_of_model};
use serde_json::{Value, json};

const INFER: &str = "/v2/models/m/infer";
const PREDICT: &str = "/v1/models/m:predict";

async fn tensors() -> Server {
    server_of_model(fake::tensor_model("m").0).await
}

fn texts(name: &str, texts: &[&str]) -> Value {
    json!({"name": name, "shape": [texts.len()], "datatype": "BYTES", "data": texts})
}

/// The outputs of an answer by their names: shape and data.
async fn outputs(server: &Server, body: Value) -> impl Fn(&str) -> (Value, Vec<f64>) {
    let answer = ok(&server.post(INFER, body).await);
    move |name: &str| {
        let outputs = answer["outputs"].as_array().unwrap();
        let output = outputs.iter().find(|output| output["name"] == name).unwrap_or_else(|| panic!("{name}: {answer}"));
        let data = output["data"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect();
        (output["shape"].clone(), data)
    }
}

#[track_caller]
fn close(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{found:?} {expected:?}");
    assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5), "{found:?} {expected:?}");
}

fn numbers(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(items) => items.iter().flat_map(numbers).collect(),
        value => vec![value.as_f64().unwrap_or_else(|| panic!("{value}"))],
    }
}

#[tokio::test]
async fn classifiers_give_scores_and_classes() {
    let server = server_of_fixture("heads/bert-nli", "classify").await;
    // What the other routes say of the same, by label.
    let labels = ["contradiction", "neutral", "entailment"];
    let of_route = async |inputs: Value| -> Vec<f64> {
        let found = ok(&server.post("/predict", json!({"inputs": inputs})).await);
        let score = |label: &&str| {
            found.as_array().unwrap().iter().find(|one| one["label"] == **label).unwrap()["score"].as_f64()
        };
        labels.iter().map(|label| score(label).unwrap()).collect()
    };
    let alone = of_route(json!("the tide")).await;
    let pair = of_route(json!(["the tide", "fog"])).await;
    let both = [alone.clone(), of_route(json!("fog")).await].concat();

    let one = outputs(&server, json!({"inputs": [texts("text", &["the tide", "fog"])]})).await;
    let (shape, scores) = one("scores");
    assert_eq!(shape, json!([2, 3]));
    close(&scores, &both);
    let body = json!({"inputs": [texts("text", &["the tide"]), texts("text_pair", &["fog"])]});
    close(&outputs(&server, body).await("scores").1, &pair);
    let raw = json!({"inputs": [texts("text", &["the tide"])], "parameters": {"raw_scores": true}});
    let raw = outputs(&server, raw).await("scores").1;
    let sum: f64 = raw.iter().map(|x| x.exp()).sum();
    close(&raw.iter().map(|x| x.exp() / sum).collect::<Vec<_>>(), &alone);

    let top = json!([{"name": "scores", "parameters": {"classification": 2}}]);
    let classes = ok(&server.post(INFER, json!({"inputs": [texts("text", &["the tide"])], "outputs": top})).await);
    let output = &classes["outputs"][0];
    assert_eq!((&output["datatype"], &output["shape"]), (&json!("BYTES"), &json!([1, 2])));
    let first: Vec<&str> = output["data"][0].as_str().unwrap().splitn(3, ':').collect();
    let best = (0..3).max_by(|a, b| alone[*a].total_cmp(&alone[*b])).unwrap();
    assert_eq!((first[1], first[2]), (&*best.to_string(), labels[best]));
    assert!((first[0].parse::<f64>().unwrap() - alone[best]).abs() < 1e-5);

    let metadata = ok(&server.get("/v2/models/m").await);
    assert_eq!(metadata["outputs"], json!([{"name": "scores", "datatype": "FP32", "shape": [-1, 3]}]));
    let config = ok(&server.get("/v2/models/m/config").await);
    assert_eq!(config["parameters"]["tasks"]["string_value"], "classify");
    assert_eq!(config["parameters"]["labels"]["string_value"], json!(labels).to_string());
    for (body, status, says) in [
        (
            json!({"inputs": [texts("text", &["a"]), texts("text_pair", &["a", "b"])]}),
            400,
            "text_pair: has 2 texts for",
        ),
        (json!({"inputs": [texts("text_pair", &["a"])]}), 400, "the tensor `text` is missing"),
        (json!({"inputs": [texts("text", &["a"])], "parameters": {"task": "embed"}}), 422, "parameters.task"),
    ] {
        refused(&server.post(INFER, body).await, status, says);
    }

    // TensorFlow Serving's side of the same.
    let rows = ok(&server.post(PREDICT, json!({"instances": ["the tide", {"b64": "Zm9n"}]})).await);
    close(&numbers(&rows["predictions"]), &both);
    let body = json!({"instances": [{"text": "the tide", "text_pair": "fog"}]});
    close(&numbers(&ok(&server.post(PREDICT, body).await)["predictions"]), &pair);
    let columns = json!({"inputs": {"text": ["the tide"], "text_pair": ["fog"]}});
    close(&numbers(&ok(&server.post(PREDICT, columns).await)["outputs"]), &pair);
    let body = json!({"context": {"text_pair": "fog"}, "examples": [{"text": "the tide"}, {"text": ["the tide"]}]});
    let result = ok(&server.post("/v1/models/m:classify", body).await)["result"].take();
    for row in result.as_array().unwrap() {
        assert_eq!([&row[0][0], &row[1][0], &row[2][0]], labels.map(|label| json!(label)).each_ref());
        close(&[&row[0][1], &row[1][1], &row[2][1]].map(|score| score.as_f64().unwrap()), &pair);
    }
    assert_eq!(result.as_array().unwrap().len(), 2);
    for (body, says) in [
        (json!({"examples": []}), "examples must not be empty"),
        (json!({"examples": [{"text": "a"}, {"text": 1}]}), "examples[1].text: expected a text"),
        (json!({"examples": [{"text": "a"}, {"texts": "b"}]}), "examples[1]: the input `text` is missing"),
        (json!({"examples": [{"text": "a"}, {"text": ""}]}), "examples[1]"),
        (json!({"context": {"text": "a"}, "examples": [{"text": "b"}]}), "examples[0]: `text` is in `context` too"),
        (json!({"signature_name": "other", "examples": [{"text": "b"}]}), "signature_name"),
    ] {
        refused(&server.post("/v1/models/m:classify", body).await, 400, says);
    }
    refused(&server.post("/v1/models/m:regress", json!({"examples": [{"text": "b"}]})).await, 400, ":regress");
}

#[tokio::test]
async fn rerankers_take_one_query_or_one_a_text() {
    let server = server_of_fixture("heads/xlm-roberta-rerank", "rerank").await;
    let documents = ["the gulls", "fog over the piano"];
    let found = ok(&server.post("/rerank", json!({"query": "the tide", "texts": documents})).await);
    let score =
        |i: u64| found.as_array().unwrap().iter().find(|rank| rank["index"] == i).unwrap()["score"].as_f64().unwrap();
    let expected = [score(0), score(1)];
    for queries in [&["the tide"][..], &["the tide", "the tide"]] {
        let body = json!({"inputs": [texts("query", queries), texts("text", &documents)]});
        let (shape, scores) = outputs(&server, body).await("scores");
        assert_eq!(shape, json!([2, 1]));
        close(&scores, &expected);
    }
    let body = json!({"context": {"query": "the tide"}, "examples": [{"text": documents[0]}, {"text": documents[1]}]});
    close(&numbers(&ok(&server.post("/v1/models/m:regress", body).await)["result"]), &expected);
    let rows: Vec<Value> = documents.iter().map(|text| json!({"query": "the tide", "text": text})).collect();
    close(&numbers(&ok(&server.post(PREDICT, json!({"instances": rows})).await)["predictions"]), &expected);
    let three = json!({"inputs": [texts("query", &["a", "b", "c"]), texts("text", &documents)]});
    refused(&server.post(INFER, three).await, 400, "query: has 3 queries for the 2 texts");
    let none = json!({"inputs": [texts("text", &documents)]});
    refused(&server.post(INFER, none).await, 400, "the tensor `query` is missing");
    refused(&server.post(PREDICT, json!({"instances": ["a"]})).await, 400, "instances[0]: expected an object of");
}

#[tokio::test]
async fn ragged_rows_are_padded_and_their_lengths_told() {
    let embedder = plain().await;
    let body = json!({"inputs": [texts("text", &["w1 w2", "w3"])], "parameters": {"task": "embed_all"}});
    let answer = ok(&embedder.post("/v2/models/fake/infer", body).await);
    assert_eq!(answer["outputs"][0]["name"], "token_embeddings");
    assert_eq!(answer["outputs"][0]["shape"], json!([2, 2, 8]));
    let data = numbers(&answer["outputs"][0]["data"]);
    assert_eq!((&data[..3], &data[8..11]), (&[1.0, 1.0, 1.0][..], &[2.0, 1.0, 2.0][..]));
    assert!(data[24..].iter().all(|value| *value == 0.0), "padding: {data:?}");
    let lengths = json!({"name": "lengths", "datatype": "INT32", "shape": [2], "data": [2, 1]});
    assert_eq!(answer["outputs"][1], lengths);
    let body = json!({"signature_name": "embed_all", "instances": ["w1 w2", "w3"]});
    let rows = ok(&embedder.post("/v1/models/fake:predict", body).await)["predictions"].take();
    assert_eq!((&rows[0]["lengths"], &rows[1]["lengths"]), (&json!(2), &json!(1)));
    assert_eq!(rows[1]["token_embeddings"], json!([vec![3.0, 1.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0], vec![0.0; 8]]));

    let splade = server_of_fixture("heads/distilbert-splade", "sparse").await;
    let sparse = ok(&splade.post("/embed_sparse", json!({"inputs": ["the tide", "a"]})).await);
    let found = outputs(&splade, json!({"inputs": [texts("text", &["the tide", "a"])]})).await;
    let ((shape, indices), (_, values), (_, lengths)) = (found("indices"), found("values"), found("lengths"));
    let longest = shape[1].as_u64().unwrap() as usize;
    for (i, row) in sparse.as_array().unwrap().iter().enumerate() {
        let row = row.as_array().unwrap();
        assert_eq!(lengths[i] as usize, row.len());
        for (j, pair) in row.iter().enumerate() {
            assert_eq!(indices[i * longest + j], pair["index"].as_f64().unwrap());
            assert!((values[i * longest + j] - pair["value"].as_f64().unwrap()).abs() < 1e-6);
        }
    }

    let ner = server_of_fixture("heads/bert-ner", "token_classify").await;
    let found = outputs(&ner, json!({"inputs": [texts("text", &["Ada met Charles", "a"])]})).await;
    let ((shape, scores), (_, lengths)) = (found("scores"), found("lengths"));
    let num_labels = shape[2].as_u64().unwrap() as usize;
    let tokens = ok(&ner.post("/tokenize", json!({"inputs": ["Ada met Charles", "a"]})).await);
    assert_eq!(lengths, [0, 1].map(|i: usize| tokens[i].as_array().unwrap().len() as f64));
    let sums: Vec<f64> = scores.chunks(num_labels).map(|token| token.iter().sum()).collect();
    let longest = shape[1].as_u64().unwrap() as usize;
    for (i, sum) in sums.iter().enumerate() {
        let is_token = i % longest < lengths[i / longest] as usize;
        assert!((sum - if is_token { 1.0 } else { 0.0 }).abs() < 1e-5, "{i}: {sums:?}");
    }

    let filler = server_of_fixture("heads/bert-masked-lm", "fill_mask").await;
    let words = ok(&filler.post("/", json!({"inputs": "the [MASK] wakes", "parameters": {"top_k": 3}})).await);
    let body = json!({"inputs": [texts("text", &["the [MASK] wakes", "[MASK] a [MASK]"])], "parameters": {"top_k": 3}});
    let found = outputs(&filler, body).await;
    assert_eq!((found("token_ids").0, found("lengths").1), (json!([2, 2, 3]), vec![1.0, 2.0]));
    for (i, word) in words.as_array().unwrap().iter().enumerate() {
        assert_eq!(found("token_ids").1[i], word["token"].as_f64().unwrap());
        assert!((found("scores").1[i] - word["score"].as_f64().unwrap()).abs() < 1e-6);
    }
    refused(&filler.post(INFER, json!({"inputs": [texts("text", &["none"])]})).await, 422, "text: has no mask token");
}

#[tokio::test]
async fn token_ids_do_for_every_task() {
    let server = server_of_fixture("heads/bert-nli", "classify").await;
    let tokens = ok(&server.post("/tokenize", json!({"inputs": "the tide"})).await);
    let mut ids: Vec<u64> = tokens[0].as_array().unwrap().iter().map(|token| token["id"].as_u64().unwrap()).collect();
    let expected = outputs(&server, json!({"inputs": [texts("text", &["the tide"])]})).await("scores").1;
    let mut mask = vec![1; ids.len()];
    ids.push(0);
    mask.push(0);
    let tensor =
        |name: &str, values: Value| json!({"name": name, "shape": [1, ids.len()], "datatype": "INT64", "data": values});
    let body = json!({"inputs": [tensor("input_ids", json!(ids)), tensor("attention_mask", json!(mask))]});
    close(&outputs(&server, body).await("scores").1, &expected);
    for (beside, status, says) in [
        (tensor("attention_mask", json!(vec![0; ids.len()])), 400, "input_ids[0] must not be empty"),
        (tensor("attention_mask", json!(vec![2; ids.len()])), 422, "attention_mask[0]: expected zeros and ones"),
        (
            tensor("token_type_ids", json!(vec![2; ids.len()])),
            422,
            "token_type_ids: got 2; this model has 2 token types",
        ),
        (tensor("token_type_ids", json!(vec![-1; ids.len()])), 422, "token_type_ids[0]: -1 is no token type"),
        (
            json!({"name": "attention_mask", "shape": [1], "datatype": "INT64", "data": [1]}),
            422,
            "the shape of input_ids",
        ),
        (texts("text", &["a"]), 400, "a request has `text` or `input_ids`"),
    ] {
        let body = json!({"inputs": [tensor("input_ids", json!(ids)), beside]});
        refused(&server.post(INFER, body).await, status, says);
    }
    let body = json!({"signature_name": "input_ids", "instances": [{"input_ids": ids, "attention_mask": mask}]});
    close(&numbers(&ok(&server.post(PREDICT, body).await)["predictions"]), &expected);
    let body = json!({"examples": [{"input_ids": ids[..ids.len() - 1]}]});
    let result = ok(&server.post("/v1/models/m:classify", body).await);
    close(&[0, 1, 2].map(|i| result["result"][0][i][1].as_f64().unwrap()), &expected);
}

/// A pair of texts as the tokenizer of BERT's kin puts it together: ids, and of which text each is.
async fn pair_of(server: &Server, first: &str, second: &str) -> (Vec<u64>, Vec<u64>) {
    let tokens = ok(&server.post("/tokenize", json!({"inputs": [first, second]})).await);
    let ids = |i: usize| tokens[i].as_array().unwrap().iter().map(|token| token["id"].as_u64().unwrap());
    // The second one without its [CLS].
    let (first, second): (Vec<u64>, Vec<u64>) = (ids(0).collect(), ids(1).skip(1).collect());
    let types = [vec![0; first.len()], vec![1; second.len()]].concat();
    ([first, second].concat(), types)
}

#[tokio::test]
async fn token_types_tell_the_texts_of_a_pair_apart() {
    for (name, task) in [("bert-nli", "classify"), ("electra-rerank", "rerank"), ("albert-nli", "classify")] {
        let server = server_of_fixture(&format!("heads/{name}"), task).await;
        let second = if task == "rerank" { "query" } else { "text_pair" };
        let (first_name, second_name) = if task == "rerank" { (second, "text") } else { ("text", second) };
        let pair = json!({"inputs": [texts(first_name, &["the tide"]), texts(second_name, &["fog"])]});
        let expected = outputs(&server, pair).await("scores").1;
        let (mut ids, mut types) = pair_of(&server, "the tide", "fog").await;
        let num_ids = ids.len();
        let body = json!({"signature_name": "input_ids", "instances": [{"input_ids": ids, "token_type_ids": types}]});
        close(&numbers(&ok(&server.post(PREDICT, body).await)["predictions"]), &expected);
        let columns = json!({"input_ids": [ids], "token_type_ids": [types]});
        let body = json!({"signature_name": "input_ids", "inputs": columns});
        close(&numbers(&ok(&server.post(PREDICT, body).await)["outputs"]), &expected);
        if task == "classify" {
            let body = json!({"examples": [{"input_ids": ids, "token_type_ids": types}]});
            let result = ok(&server.post("/v1/models/m:classify", body).await);
            close(&[0, 1, 2].map(|i| result["result"][0][i][1].as_f64().unwrap()), &expected);
            let wrong = json!({"input_ids": ids, "token_type_ids": vec![9; num_ids]});
            for (before, says) in [(vec![], "examples[0].token_type_ids: got 9"), (vec![&wrong], "examples[")] {
                let examples: Vec<&Value> = before.into_iter().chain([&wrong]).collect();
                refused(&server.post("/v1/models/m:classify", json!({"examples": examples})).await, 400, says);
            }
        }

        // Padding has a type too, which means nothing.
        ids.push(0);
        types.push(7);
        let mask = [vec![1; num_ids], vec![0]].concat();
        let twice = |values: &[u64]| json!([values, values]);
        let tensor = |name: &str, values: Value| json!({"name": name, "shape": [2, num_ids + 1], "datatype": "INT64", "data": values});
        let (ids_of, masks) = (tensor("input_ids", twice(&ids)), tensor("attention_mask", twice(&mask)));
        let typed = json!({"inputs": [tensor("token_type_ids", json!([types, vec![0; num_ids + 1]])), ids_of, masks]});
        let found = outputs(&server, typed).await("scores").1;
        let (with, without) = found.split_at(expected.len());
        close(with, &expected);
        assert!(with.iter().zip(without).any(|(a, b)| (a - b).abs() > 1e-4), "{name}: types change nothing: {found:?}");

        let types32: Vec<u8> = [&types[..], &types].concat().iter().flat_map(|&t| (t as u32).to_le_bytes()).collect();
        let packed = json!({"name": "token_type_ids", "shape": [2, num_ids + 1], "datatype": "INT32", "parameters": {"binary_data_size": types32.len()}});
        let head = json!({"inputs": [ids_of, packed, masks]}).to_string();
        let request = Request::post(INFER).header("Inference-Header-Content-Length", head.len());
        let answer = server.send(request.body(Body::from([head.as_bytes(), &types32].concat())).unwrap()).await;
        close(&numbers(&ok(&answer)["outputs"][0]["data"]), &[&expected[..], &expected].concat());

        let wrong = json!({"inputs": [ids_of, tensor("token_type_ids", json!([types, vec![2; num_ids + 1]]))]});
        refused(
            &server.post(INFER, wrong).await,
            422,
            "token_type_ids[0]: got 7; this model has 2 token types, from 0 to 1",
        );
        let wrong = json!({"inputs": [ids_of, masks, tensor("token_type_ids", json!([types, vec![2; num_ids + 1]]))]});
        refused(&server.post(INFER, wrong).await, 422, "token_type_ids[1]: got 2");
        let rows = json!([{"input_ids": [1], "token_type_ids": [0]}, {"input_ids": [1], "token_type_ids": [2]}]);
        let wrong = json!({"signature_name": "input_ids", "instances": rows});
        refused(&server.post(PREDICT, wrong).await, 400, "instances[1].token_type_ids: got 2");
    }
    for (name, task, says) in [
        ("xlm-roberta-rerank", "rerank", "token_type_ids: got 1; this model has one token type: all must be 0"),
        ("distilbert-multi-label", "classify", "token_type_ids: got 1; this model has no token types: all must be 0"),
    ] {
        let server = server_of_fixture(&format!("heads/{name}"), task).await;
        let tensor =
            |name: &str, values: Value| json!({"name": name, "shape": [1, 2], "datatype": "INT64", "data": values});
        let body = json!({"inputs": [tensor("input_ids", json!([1, 2])), tensor("token_type_ids", json!([0, 1]))]});
        refused(&server.post(INFER, body).await, 422, says);
    }
}

fn x(datatype: &str, data: Value) -> Value {
    json!({"name": "x", "shape": [2, 2], "datatype": datatype, "data": data})
}

fn n(datatype: &str, data: Value) -> Value {
    json!({"name": "n", "shape": [2], "datatype": datatype, "data": data})
}

#[tokio::test]
async fn tensor_models_take_every_type_that_converts_exactly() {
    let server = tensors().await;
    let metadata = ok(&server.get("/v2/models/m").await);
    let expected = json!([{"name": "x", "datatype": "FP32", "shape": [-1, 2]}, {"name": "n", "datatype": "INT64", "shape": [-1, 1]}]);
    assert_eq!(metadata["inputs"], expected);
    assert_eq!(metadata["outputs"][0], json!({"name": "twice", "datatype": "FP32", "shape": [-1, 2]}));
    for (x, n) in [
        (x("FP32", json!([1, 2, 3.0, 4])), n("INT64", json!([5, 6]))),
        (x("FP64", json!([[1, 2], [3, 4]])), n("UINT8", json!([5, 6]))),
        (x("INT16", json!([1, 2, 3, 4])), n("FP32", json!([5.0, 6.0]))),
    ] {
        let found = outputs(&server, json!({"inputs": [n, x]})).await;
        assert_eq!(found("twice"), (json!([2, 2]), vec![2.0, 4.0, 6.0, 8.0]));
        assert_eq!(found("sum"), (json!([2]), vec![8.0, 13.0]));
    }
    // One value an input may be written as a list of one, as metadata have it.
    let n_1 = json!({"name": "n", "shape": [2, 1], "datatype": "INT64", "data": [[5], [6]]});
    let found = outputs(&server, json!({"inputs": [x("FP32", json!([1, 2, 3, 4])), n_1]})).await;
    assert_eq!(found("sum"), (json!([2]), vec![8.0, 13.0]));
    let half = |value: f32| half::f16::from_f32(value).to_le_bytes().to_vec();
    let brain = |value: f32| half::bf16::from_f32(value).to_le_bytes().to_vec();
    let values = [1f32, 2.0, 3.0, 4.0];
    let packed = |to: &dyn Fn(f32) -> Vec<u8>| values.iter().flat_map(|&value| to(value)).collect::<Vec<u8>>();
    for (datatype, bytes) in [
        ("FP16", packed(&half)),
        ("BF16", packed(&brain)),
        ("FP32", packed(&|value| value.to_le_bytes().to_vec())),
        ("FP64", packed(&|value| f64::from(value).to_le_bytes().to_vec())),
        ("INT8", packed(&|value| vec![value as u8])),
        ("UINT16", packed(&|value| (value as u16).to_le_bytes().to_vec())),
        ("INT32", packed(&|value| (value as i32).to_le_bytes().to_vec())),
        ("UINT64", packed(&|value| (value as u64).to_le_bytes().to_vec())),
    ] {
        let x = json!({"name": "x", "shape": [2, 2], "datatype": datatype, "parameters": {"binary_data_size": bytes.len()}});
        let asked = json!([{"name": "sum", "parameters": {"binary_data": true}}]);
        let head = json!({"inputs": [x, n("BOOL", json!([true, false]))], "outputs": asked}).to_string();
        let request = Request::post(INFER).header("Inference-Header-Content-Length", head.len());
        let answer = server.send(request.body(Body::from([head.as_bytes(), &bytes].concat())).unwrap()).await;
        assert_eq!(answer.status.as_u16(), 200, "{datatype}: {}", answer.text());
        let tail = answer.body.split_at(answer.header("inference-header-content-length").parse().unwrap()).1;
        assert_eq!(tail, [4f32.to_le_bytes(), 7f32.to_le_bytes()].concat(), "{datatype}");
    }
    let good_n = || n("INT64", json!([5, 6]));
    for (inputs, status, says) in [
        (json!([x("FP32", json!([1, 2, 3, 4]))]), 400, "the tensor `n` is missing"),
        (
            json!([x("FP32", json!([1, 2, 3, 4])), n("INT64", json!([5, 16777217]))]),
            422,
            "n: element 1 is 16777217: models",
        ),
        (json!([x("FP32", json!([1, 2, 3, 1e39])), good_n()]), 422, "x: element 3 is no finite number of 32 bits"),
        (json!([x("INT32", json!([1, 2, 3, 4.5])), good_n()]), 400, "x: expected INT32, got a fraction"),
        (json!([x("FP32", json!(["a", "b", "c", "d"])), good_n()]), 400, "x: expected numbers, got texts"),
        (json!([x("BYTES", json!(["a", "b", "c", "d"])), good_n()]), 422, "x: expected numbers, got BYTES"),
        (json!([x("FP32", json!([1, 2, 3])), good_n()]), 400, "x: has 3 elements"),
        (
            json!([{"name": "x", "shape": [4], "datatype": "FP32", "data": [1, 2, 3, 4]}, good_n()]),
            422,
            "the shape [n, 2], got [4]",
        ),
        (
            json!([{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}, good_n()]),
            400,
            "n: has 2 inputs, `x` has 1",
        ),
        (
            json!([x("FP32", json!([1, 2, 3, 4])), {"name": "n", "shape": [1, 2], "datatype": "INT64", "data": [5, 6]}]),
            422,
            "the shape [n] or [n, 1], got [1, 2]",
        ),
        (json!([texts("text", &["a"])]), 422, "no input is named `text`; known: x, n"),
    ] {
        refused(&server.post(INFER, json!({"inputs": inputs})).await, status, says);
    }
}

#[tokio::test]
async fn tensor_models_answer_rows_and_columns() {
    let server = tensors().await;
    let rows = json!({"instances": [{"x": [1, 2], "n": 5}, {"n": 6, "x": [3, 4.5]}]});
    let expected = json!([{"twice": [2.0, 4.0], "sum": 8.0}, {"twice": [6.0, 9.0], "sum": 13.5}]);
    assert_eq!(ok(&server.post(PREDICT, rows).await), json!({"predictions": expected}));
    let columns = json!({"inputs": {"x": [[1, 2], [3, 4.5]], "n": [5, 6]}});
    let expected = json!({"twice": [[2.0, 4.0], [6.0, 9.0]], "sum": [8.0, 13.5]});
    assert_eq!(ok(&server.post(PREDICT, columns).await), json!({"outputs": expected}));
    let metadata = ok(&server.get("/v1/models/m/metadata").await);
    let signature = &metadata["metadata"]["signature_def"]["signature_def"]["serving_default"];
    assert_eq!(signature["inputs"]["n"]["dtype"], "DT_INT64");
    assert_eq!(signature["inputs"]["x"]["tensor_shape"]["dim"][1]["size"], "2");
    assert_eq!(signature["outputs"]["twice"]["dtype"], "DT_FLOAT");
    for (body, says) in [
        (json!({"instances": [{"x": [1, 2]}]}), "instances[0]: the input `n` is missing"),
        (json!({"instances": [{"x": [1], "n": 1}]}), "instances[0].x: `x` has 2 values here, got 1"),
        (json!({"instances": [{"x": [1, 2], "n": 1.5}]}), "instances[0].n: expected a whole number, got 1.5"),
        (json!({"inputs": {"x": [[1, 2]], "n": [1, 2]}}), "inputs.n: has 2 inputs, `x` has 1"),
        (json!({"instances": [[1, 2]]}), "instances[0]: expected an object of `x`, `n`"),
    ] {
        refused(&server.post(PREDICT, body).await, 400, says);
    }
}

#[tokio::test]
async fn vertex_answers_each_instance_as_the_main_task_does() {
    let embedder = plain().await;
    let one = ok(&embedder.post("/", json!({"inputs": "w1 w2", "dimensions": 2})).await);
    let two = ok(&embedder.post("/", json!({"inputs": ["w1", "w3"]})).await);
    let body = json!({"instances": [{"inputs": "w1 w2", "dimensions": 2}, {"inputs": ["w1", "w3"]}]});
    assert_eq!(ok(&embedder.post("/vertex", body).await), json!({"predictions": [one, two]}));
    let body = json!({"instances": [{"inputs": "w1 w2"}], "parameters": {"dimensions": 2}});
    assert_eq!(ok(&embedder.post("/vertex", body).await)["predictions"][0], one);
    let many = vec![json!({"inputs": "w1"}); 33];
    for (body, status, says) in [
        (json!({"instances": []}), 400, "instances must not be empty"),
        (json!({"instances": many}), 413, "instances has 33"),
        (json!({"instances": [{"inputs": "w1"}, {"inputs": ""}]}), 400, "instances[1].inputs must not be empty"),
        (json!({"instances": ["w1"]}), 422, "instances[0]"),
    ] {
        refused(&embedder.post("/vertex", body).await, status, says);
    }
    let ranker = server_of_fixture("heads/xlm-roberta-rerank", "rerank").await;
    let query = json!({"query": "a", "texts": ["b", "c"]});
    let expected = ok(&ranker.post("/rerank", query.clone()).await);
    assert_eq!(ok(&ranker.post("/vertex", json!({"instances": [query]})).await)["predictions"][0], expected);
}
