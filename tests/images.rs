//! Models of images over HTTP, on files that real programs wrote and small models with random weights.

mod common;

use std::path::{Path, PathBuf};

use axum::body::Body;
use axum::http::Request;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use common::http::{Answer, Server, ok, plain, refused, server_of_fixture};
use serde_json::{Value, json};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vision")
}

fn file(image: &str) -> Vec<u8> {
    std::fs::read(fixtures().join("images").join(image)).unwrap()
}

fn base64(image: &str) -> String {
    BASE64_STANDARD.encode(file(image))
}

/// The file as the whole body.
async fn post_file(server: &Server, file: Vec<u8>, media: Option<&str>) -> Answer {
    let request = Request::post("/");
    let request = match media {
        Some(media) => request.header("content-type", media),
        None => request,
    };
    server.send(request.body(Body::from(file)).unwrap()).await
}

fn row(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

#[tokio::test]
async fn every_form_of_a_file_has_the_same_embedding() {
    let server = server_of_fixture("vision/vit", "embed").await;
    let data = base64("photo.png");
    let openai = ok(&server.post("/v1/embeddings", json!({"model": "m", "input": [{"image": data}]})).await);
    let expected = row(&openai["data"][0]["embedding"]);
    assert!(expected.iter().any(|x| *x != 0.0));
    let url = format!("data:image/png;base64,{data}");
    let by_url = ok(&server.post("/v1/embeddings", json!({"model": "m", "input": [{"image": url}]})).await);
    assert_eq!(row(&by_url["data"][0]["embedding"]), expected);
    let cohere = json!({"model": "m", "input_type": "image", "images": [url], "embedding_types": ["float"]});
    let cohere = ok(&server.post("/v2/embed", cohere).await);
    assert_eq!(row(&cohere["embeddings"]["float"][0]), expected);
    let kept = ok(&server.post("/api/v1/inferences", json!({"model": "m", "input": [{"image": data}]})).await);
    assert_eq!(row(&kept["output"]["embeddings"][0]), expected);
    let found = ok(&server.get(&format!("/api/v1/inferences/{}", kept["id"].as_str().unwrap())).await);
    assert_eq!(row(&found["output"]["embeddings"][0]), expected);
}

#[tokio::test]
async fn texts_and_images_of_clip_come_in_one_request() {
    let server = server_of_fixture("vision/clip", "embed").await;
    let input = json!([{"text": "a red bird"}, {"image": base64("photo.jpg")}, "a blue sea"]);
    let together = ok(&server.post("/v1/embeddings", json!({"model": "m", "input": input})).await);
    for (i, input) in input.as_array().unwrap().iter().enumerate() {
        let alone = ok(&server.post("/v1/embeddings", json!({"model": "m", "input": [input]})).await);
        let (alone, together) = (row(&alone["data"][0]["embedding"]), row(&together["data"][i]["embedding"]));
        assert!(alone.iter().zip(&together).all(|(a, b)| (a - b).abs() < 1e-5), "input {i}");
    }
}

#[tokio::test]
async fn content_of_cohere_is_a_text_or_an_image_and_each_is_billed_as_such() {
    let server = server_of_fixture("vision/clip", "embed").await;
    let url = format!("data:image/jpeg;base64,{}", base64("photo.jpg"));
    let text = |text: &str| json!({"content": [{"type": "text", "text": text}]});
    let image = json!({"content": [{"type": "image_url", "image_url": {"url": url}}]});
    let ask = async |body: Value| server.post("/v2/embed", body).await;
    let texts = ok(&ask(json!({"model": "m", "texts": ["a red bird", "a blue sea"]})).await);
    let images = ok(&ask(json!({"model": "m", "input_type": "image", "images": [url]})).await);
    let num_tokens = texts["meta"]["billed_units"]["input_tokens"].clone();
    assert!(num_tokens.as_u64().unwrap() > 0);
    assert_eq!(images["meta"]["billed_units"], json!({"images": 1}));
    let items = json!([text("a red bird"), image, text("a blue sea")]);
    let body = json!({"model": "m", "input_type": "search_document", "inputs": items});
    let mixed = ok(&ask(body).await);
    assert_eq!(mixed["meta"]["billed_units"], json!({"images": 1, "input_tokens": num_tokens}));
    assert_eq!(mixed["texts"], json!(["a red bird", "a blue sea"]));
    let expected =
        [&texts["embeddings"]["float"][0], &images["embeddings"]["float"][0], &texts["embeddings"]["float"][1]];
    for (i, expected) in expected.into_iter().enumerate() {
        let (got, expected) = (row(&mixed["embeddings"]["float"][i]), row(expected));
        assert!(got.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5), "input {i}");
    }
    let both = json!({"content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": url}}]});
    let says = "inputs[1].content: expected one part, got 2";
    refused(&ask(json!({"model": "m", "inputs": [text("a"), both]})).await, 422, says);
    let alone = json!({"inputs": [text("w1"), {"content": [{"type": "image_url", "image_url": {"url": url}}]}]});
    refused(&plain().await.post("/v2/embed", alone).await, 422, "inputs[1]: an image is nothing");
}

#[tokio::test]
async fn what_is_no_image_is_the_clients_fault() {
    let server = server_of_fixture("vision/vit", "embed").await;
    let ask = async |input: Value| server.post("/v1/embeddings", json!({"model": "m", "input": input})).await;
    refused(&ask(json!("a text")).await, 422, "a text");
    refused(&ask(json!([7, 8])).await, 422, "token ids");
    refused(&ask(json!([{"image": "no base64!"}])).await, 400, "base64");
    refused(&ask(json!([{"image": BASE64_STANDARD.encode("hello")}])).await, 422, "no PNG, JPEG or WebP");
    refused(&ask(json!([{"image": "https://127.0.0.1/a.png"}])).await, 400, "not fetched");
    let half = BASE64_STANDARD.encode(&file("photo.png")[..200]);
    refused(&ask(json!([{"image": base64("photo.png")}, {"image": half}])).await, 422, "input[1]");
    let image = json!({"model": "m", "input": [{"image": base64("photo.png")}]});
    refused(&plain().await.post("/v1/embeddings", json!({"input": image["input"]})).await, 422, "an image");
}

#[tokio::test]
async fn the_bare_file_is_classified_as_huggingface_clients_send_it() {
    let server = server_of_fixture("vision/vit-flowers", "classify").await;
    let mut answers = Vec::new();
    for image in ["photo.png", "photo.webp"] {
        for media in [Some("image/png"), None] {
            answers.push(ok(&post_file(&server, file(image), media).await));
        }
    }
    // The same pixels without loss in both files.
    assert!(answers.windows(2).all(|w| w[0] == w[1]), "{answers:?}");
    let scores: Vec<f64> = answers[0].as_array().unwrap().iter().map(|one| one["score"].as_f64().unwrap()).collect();
    assert!(!scores.is_empty() && scores.is_sorted_by(|a, b| a >= b) && scores.iter().sum::<f64>() < 1.0001);
    assert!(answers[0][0]["label"].is_string());
    let json = ok(&server.post("/", json!({"inputs": base64("photo.png")})).await);
    assert_eq!(json, answers[0]);
    let best = ok(&server.post("/", json!({"inputs": base64("photo.png"), "parameters": {"top_k": 1}})).await);
    assert_eq!(best, json!([answers[0][0]]));
    refused(&post_file(&server, b"GIF89a".to_vec(), Some("image/gif")).await, 422, "no PNG, JPEG or WebP");
}
