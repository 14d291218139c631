//! What clients see of the cache, in each protocol.

use serde_json::{Value, json};

use super::inferences::{num_computed, server};
use crate::common::http::{Answer, plain};

#[track_caller]
fn told(answer: &Answer, cache: &str) -> Value {
    assert_eq!(answer.status.as_u16(), 200, "{}", answer.text());
    assert_eq!(answer.header("x-cache"), cache);
    answer.json()
}

#[tokio::test]
async fn openai_says_what_was_cached_and_counts_the_same() {
    let server = server().await;
    let ask = |input: Value| server.post("/v1/embeddings", json!({"model": "fake", "input": input}));
    let miss = told(&ask(json!(["w1 w2", "w3"])).await, "miss");
    let hit = told(&ask(json!(["w1 w2", "w3"])).await, "hit");
    assert_eq!(hit, miss);
    let some = told(&ask(json!(["w3", "w4"])).await, "partial");
    assert_eq!(some["data"][0]["embedding"], miss["data"][1]["embedding"]);
    assert_eq!(some["usage"]["prompt_tokens"], 2);
    told(&ask(json!([1, 2])).await, "miss");
    told(&ask(json!([1, 2])).await, "hit");
}

#[tokio::test]
async fn the_routes_of_tei_share_results() {
    let server = server().await;
    let embed = json!({"inputs": ["w1", "w2"]});
    let miss = told(&server.post("/embed", embed.clone()).await, "miss");
    assert_eq!(told(&server.post("/", embed).await, "hit"), miss);
    let similarity = json!({"inputs": {"source_sentence": "w1", "sentences": ["w2", "w5"]}});
    let first = told(&server.post("/similarity", similarity.clone()).await, "partial");
    assert_eq!(told(&server.post("/similarity", similarity).await, "hit"), first);
    let answer = server.post("/embed", json!({"inputs": ["w1", "w2"]})).await;
    assert_eq!((answer.header("x-compute-tokens"), answer.header("x-compute-characters")), ("2", "4"));
    assert_eq!(answer.header("x-inference-time"), "0");
}

#[tokio::test]
async fn errors_name_inputs_as_each_protocol_does() {
    let server = server().await;
    told(&server.post("/v1/embeddings", json!({"input": ["w1", "w2"]})).await, "miss");
    let answer = server.post("/v1/embeddings", json!({"input": ["w1", "w2", ""]})).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["error"]["param"]), (400, &json!("input[2]")));
    let answer = server.post("/embed", json!({"inputs": ["w1", "w2", ""], "normalize": false})).await;
    assert!(answer.text().contains("inputs[2] must not be empty"), "{}", answer.text());
}

#[tokio::test]
async fn cache_control_is_obeyed_on_every_route() {
    let server = server().await;
    for (path, body) in [
        ("/v1/embeddings", json!({"input": "w1 w2 w3"})),
        ("/embed", json!({"inputs": "w1 w2 w4"})),
        ("/similarity", json!({"inputs": {"source_sentence": "w1 w5", "sentences": ["w2 w5"]}})),
        ("/", json!({"inputs": "w1 w2 w6"})),
    ] {
        let with = async |value| server.post_with(path, body.to_string(), &[("cache-control", value)]).await;
        let before = num_computed(&server);
        told(&with("no-store").await, "");
        told(&with("max-age=0").await, "miss");
        told(&with("no-cache").await, "miss");
        told(&with("max-age=0").await, "hit");
        let inputs = if path == "/similarity" { 2 } else { 1 };
        assert_eq!(num_computed(&server) - before, 3 * inputs, "{path}");
    }
}

#[tokio::test]
async fn the_statistics_of_tritons_clients_tell_hits_from_what_was_computed() {
    let server = server().await;
    let infer = async |texts: Value, cache: &str| {
        let tensor =
            json!({"name": "text", "shape": [texts.as_array().unwrap().len()], "datatype": "BYTES", "data": texts});
        let body = json!({"inputs": [tensor]}).to_string();
        let answer = server.post_with("/v2/models/fake/infer", body, &[("cache-control", cache)]).await;
        assert_eq!(answer.status.as_u16(), 200, "{}", answer.text());
    };
    for (texts, cache) in [
        (json!(["w1", "w2"]), ""),
        (json!(["w2", "w1"]), ""),
        (json!(["w1", "w3"]), ""),
        (json!(["w1"]), "no-cache"),
        (json!(["w1"]), "no-store"),
    ] {
        infer(texts, cache).await;
    }
    let stats = server.get("/v2/models/fake/stats").await.json()["model_stats"][0].clone();
    // The third is computed in part.
    assert_eq!((&stats["inference_count"], &stats["execution_count"]), (&json!(5), &json!(4)));
    let of = |name: &str| stats["inference_stats"][name]["count"].as_u64().unwrap();
    assert_eq!((of("success"), of("queue"), of("cache_hit"), of("cache_miss")), (5, 5, 1, 2), "{stats}");
    assert_eq!(["compute_input", "compute_infer", "compute_output"].map(of), [4; 3], "{stats}");
    let config = server.get("/v2/models/fake/config").await.json();
    assert_eq!(config["response_cache"], json!({"enable": true}));
}

#[tokio::test]
async fn without_a_cache_nothing_is_said_of_one() {
    let server = plain().await;
    for _ in 0..2 {
        let before = num_computed(&server);
        told(&server.post("/v1/embeddings", json!({"input": ["w1", "w1"]})).await, "");
        assert_eq!(num_computed(&server) - before, 2);
    }
}
