//! The engine end to end, over a model that computes almost nothing.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::fake::{self, Controls};
use eremois::request::{EmbedParams, Input, Request};
use eremois::serve::policy::BatchLimits;
use eremois::serve::{Engine, Health, Settings};
use eremois::{Error, Result};

const MAX_SEQ_LEN: usize = 64;
/// Longer than anything here takes: a test that waits for it has failed.
const LONG: Duration = Duration::from_secs(30);

fn limits() -> BatchLimits {
    BatchLimits { max_batch_size: 8, max_batch_tokens: 256, max_queue_delay: Duration::ZERO, max_queue_size: 100 }
}

fn settings() -> Settings {
    Settings {
        heartbeat_interval: Duration::from_secs(3600),
        retry_interval: Duration::from_millis(5),
        device_timeout: LONG,
        num_encoders: 2,
    }
}

/// An engine with one ready model `fake`.
async fn engine(limits: BatchLimits) -> (Arc<Engine>, Arc<Controls>) {
    let engine = Arc::new(Engine::with_settings(None, settings()));
    let (model, controls) = fake::model("fake", MAX_SEQ_LEN);
    engine.add(model, limits).unwrap();
    wait_for(&engine, |health| *health == Health::Ready).await;
    controls.batch_sizes.lock().clear();
    (engine, controls)
}

async fn wait_for(engine: &Engine, wanted: impl Fn(&Health) -> bool) {
    let end = Instant::now() + LONG;
    while !engine.health().iter().all(|(_, health)| wanted(health)) {
        assert!(Instant::now() < end, "{:?}", engine.health());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn request(texts: &[&str]) -> Request {
    Request {
        model: None,
        inputs: texts.iter().map(|t| Input::Text(t.to_string())).collect(),
        params: EmbedParams::default(),
        deadline: Instant::now() + LONG,
    }
}

/// The first value of each row: the sum of the ids.
async fn sums(engine: &Engine, texts: &[&str]) -> Result<Vec<f32>> {
    Ok(engine.embed(request(texts)).await?.rows.iter().map(|row| row[0]).collect())
}

#[tokio::test]
async fn embeds_texts_and_ids_in_order() {
    let (engine, _) = engine(limits()).await;
    let output = engine.embed(request(&["w1 w2", "w3", "w4 w5 w6"])).await.unwrap();
    let firsts: Vec<f32> = output.rows.iter().map(|row| row[0]).collect();
    assert_eq!(firsts, [3.0, 3.0, 15.0]);
    assert_eq!((output.usage.num_tokens, output.usage.num_chars), (6, 15));
    assert_eq!(&*output.model, "fake");

    let ids = Request { inputs: vec![Input::TokenIds(vec![7, 8])], ..request(&[]) };
    let output = engine.embed(ids).await.unwrap();
    assert_eq!(output.rows[0][..2], [15.0, 2.0]);
    assert_eq!((output.usage.num_tokens, output.usage.num_chars), (2, 0));
}

#[tokio::test]
async fn tokenizes_and_decodes() {
    let (engine, _) = engine(limits()).await;
    let tokens = engine.tokenize(None, vec!["w5 w6".into(), "w7".into()], false).await.unwrap();
    let ids: Vec<Vec<u32>> = tokens.iter().map(|t| t.iter().map(|t| t.id).collect()).collect();
    assert_eq!(ids, [vec![5, 6], vec![7]]);
    assert_eq!(engine.decode(None, ids, false).await.unwrap(), ["w5 w6", "w7"]);
}

#[tokio::test]
async fn names_decide_the_model() {
    let engine = Engine::with_settings(Some("b".into()), settings());
    for name in ["a", "b", "c"] {
        engine.add(fake::model(name, MAX_SEQ_LEN).0, limits()).unwrap();
    }
    wait_for(&engine, |health| *health == Health::Ready).await;
    let names: Vec<_> = engine.models().iter().map(|m| m.name.to_string()).collect();
    assert_eq!(names, ["b", "a", "c"]);
    assert_eq!(&*engine.model(None).unwrap().name, "b");
    let output = engine.embed(Request { model: Some("c".into()), ..request(&["w1"]) }).await.unwrap();
    assert_eq!(&*output.model, "c");
    let error = engine.embed(Request { model: Some("d".into()), ..request(&["w1"]) }).await.unwrap_err();
    assert_eq!(error, Error::UnknownModel { model: "d".into(), served: "a, b, c".into() });
    let twice = engine.add(fake::model("a", MAX_SEQ_LEN).0, limits()).unwrap_err();
    assert!(matches!(twice, Error::Invalid { .. }), "{twice}");
}

#[tokio::test]
async fn a_bad_request_is_refused_by_name_before_the_device() {
    let (engine, controls) = engine(limits()).await;
    let long = "w1 ".repeat(MAX_SEQ_LEN + 1);
    let params = |params| Request { params, ..request(&["w1"]) };
    for (request, expected) in [
        (request(&[]), "input must not be empty"),
        (request(&[""]), "input must not be empty"),
        (request(&["w1", "", "w2"]), "input[1] must not be empty"),
        (request(&["w1", &long]), "input[1] has 65 tokens, the limit is 64"),
        (request(&["w1"; 101]), "input has 101 inputs, the limit is 100"),
        (params(EmbedParams { dimensions: Some(0), ..Default::default() }), "dimensions: 0 is not in 1 to 8"),
        (params(EmbedParams { dimensions: Some(9), ..Default::default() }), "dimensions: 9 is not in 1 to 8"),
        (
            params(EmbedParams { prompt_name: Some("x".into()), ..Default::default() }),
            "prompt_name: `x` is not a prompt of this model; known: query",
        ),
        (
            Request { inputs: vec![Input::TokenIds(vec![1]), Input::TokenIds(vec![1000])], ..request(&[]) },
            "input[1]: token id 1000 is not in the vocabulary of 1000 tokens",
        ),
    ] {
        assert_eq!(engine.embed(request).await.unwrap_err().to_string(), expected);
    }
    assert!(controls.batch_sizes.lock().is_empty());
    assert_eq!(sums(&engine, &["w1"]).await.unwrap(), [1.0], "and the room they held is free again");
}
