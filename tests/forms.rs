//! The forms of embeddings and of bodies, on every route that has them, over the fake model.

mod common;

use std::io::{Read, Write};

use axum::http::StatusCode;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use common::http::{self, Answer, Server, ok, plain};
use eremois::api::ApiSettings;
use eremois::inference::keep::Scope;
use eremois::serve::policy::BatchLimits;
use serde_json::{Value, json};

#[track_caller]
fn says(answer: &Answer, status: u16, message: &str) -> Value {
    assert_eq!(answer.status.as_u16(), status, "{}", answer.text());
    assert!(answer.text().contains(message), "{} does not say `{message}`", answer.text());
    answer.json()
}

/// What the fake model makes of "w1 w2", and numpy of that: rint(127 row / norm), + 128, packbits(row > 0), - 128.
const ROW: [f32; 8] = [3.0, 2.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0];
const INT8: [i16; 8] = [90, 60, 30, 60, 0, 0, 0, 0];
const UINT8: [i16; 8] = [218, 188, 158, 188, 128, 128, 128, 128];
const UBINARY: [i16; 1] = [0b1111_0000];
const BINARY: [i16; 1] = [0b1111_0000 - 128];

/// Each dtype as JSON numbers, as bytes, and the name of an item.
fn forms() -> Vec<(&'static str, Value, Vec<u8>, &'static str)> {
    let bytes = |items: &[i16]| items.iter().map(|item| *item as u8).collect::<Vec<u8>>();
    let halves = ROW.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect();
    vec![
        ("float32", json!(ROW), ROW.iter().flat_map(|value| value.to_le_bytes()).collect(), "float32"),
        ("float16", json!(ROW), halves, "float16"),
        ("int8", json!(INT8), bytes(&INT8), "int8"),
        ("uint8", json!(UINT8), bytes(&UINT8), "uint8"),
        ("binary", json!(BINARY), bytes(&BINARY), "int8"),
        ("ubinary", json!(UBINARY), bytes(&UBINARY), "uint8"),
    ]
}

const BYTES: (&str, &str) = ("accept", "application/octet-stream");

#[track_caller]
fn is_raw(answer: &Answer, bytes: &[u8], item: &str, shape: &str) {
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert_eq!(answer.header("content-type"), "application/octet-stream");
    assert_eq!((answer.header("x-eremois-dtype"), answer.header("x-eremois-shape")), (item, shape));
    assert_eq!(answer.body, bytes);
    assert!(answer.header("x-compute-tokens").parse::<u32>().is_ok(), "raw answers tell of their phases too");
}

#[tokio::test]
async fn every_dtype_is_written_in_every_way_on_every_route() {
    let server = plain().await;
    for (dtype, numbers, bytes, item) in forms() {
        let packed = json!(BASE64_STANDARD.encode(&bytes));
        for path in ["/embed", "/", "/invocations", "/v1/embeddings"] {
            let is_openai = path == "/v1/embeddings";
            let ask = |encoding: Value| {
                let field = if is_openai { "input" } else { "inputs" };
                json!({field: ["w1 w2", "w1 w2"], "dtype": dtype, "encoding_format": encoding})
            };
            for (encoding, expected) in
                [(json!("float"), &numbers), (Value::Null, &numbers), (json!("base64"), &packed)]
            {
                let body = ok(&server.post(path, ask(encoding)).await);
                let rows =
                    if is_openai { json!([body["data"][0]["embedding"], body["data"][1]["embedding"]]) } else { body };
                assert_eq!(rows, json!([expected, expected]), "{path} {dtype}");
            }
            let answer = server.post_with(path, ask(Value::Null).to_string(), &[BYTES]).await;
            let shape = format!("2,{}", numbers.as_array().unwrap().len());
            is_raw(&answer, &bytes.repeat(2), item, &shape);
        }
    }
}

#[tokio::test]
async fn bits_and_bytes_of_a_row_that_is_cut() {
    let server = plain().await;
    // 3 of 8 values: the byte is filled up with zeros, and the length is that of what is left.
    let body = json!({"inputs": ["w1 w2", "w3"], "dimensions": 3, "dtype": "ubinary"});
    assert_eq!(ok(&server.post("/embed", body.clone()).await), json!([[0b1110_0000], [0b1110_0000]]));
    is_raw(&server.post_with("/embed", body.to_string(), &[BYTES]).await, &[224, 224], "uint8", "2,1");
    let body = json!({"inputs": "w1 w2", "dimensions": 1, "dtype": "int8"});
    assert_eq!(ok(&server.post("/embed", body).await), json!([[127]]));
}

#[tokio::test]
async fn names_of_types_have_their_short_forms() {
    let server = plain().await;
    for (short, dtype) in [("float", "float32"), ("f32", "float32"), ("fp16", "float16"), ("f16", "float16")] {
        let ask =
            |dtype: &str| server.post_with("/embed", json!({"inputs": "w1", "dtype": dtype}).to_string(), &[BYTES]);
        let (short, long) = (ask(short).await, ask(dtype).await);
        assert_eq!((&short.body, short.header("x-eremois-dtype")), (&long.body, dtype));
    }
    let answer = server.post("/v1/embeddings", json!({"input": "w1", "dtype": "int4"})).await;
    assert_eq!(says(&answer, 400, "ubinary")["error"]["param"], "dtype");
}

#[tokio::test]
async fn what_a_client_does_not_accept_is_not_sent() {
    let server = plain().await;
    let html = [("accept", "text/html, image/*;q=0.5")];
    let ours = "application/octet-stream, got `text/html";
    let answer = server.post_with("/v1/embeddings", r#"{"input": "w1"}"#, &html).await;
    assert_eq!(says(&answer, 406, ours)["error"]["code"], "not_acceptable");
    let answer = server.post_with("/embed", r#"{"inputs": "w1"}"#, &html).await;
    assert_eq!(says(&answer, 406, ours)["error_type"], "Validation");
    let answer = server.post_with("/v2/embed", r#"{"texts": ["w1"]}"#, &html).await;
    assert_eq!(says(&answer, 406, ours).as_object().unwrap().len(), 1);
    for json in ["*/*", "application/json", "text/html, */*;q=0.1", "application/octet-stream;q=0.1, application/json"]
    {
        ok(&server.post_with("/embed", r#"{"inputs": "w1"}"#, &[("accept", json)]).await);
    }
    let both = "application/octet-stream, application/json;q=0.9";
    let answer = server.post_with("/embed", r#"{"inputs": "w1", "dimensions": 1}"#, &[("accept", both)]).await;
    is_raw(&answer, &1f32.to_le_bytes(), "float32", "1,1");
    // A refusal is JSON whatever was asked for.
    says(&server.post_with("/embed", r#"{"inputs": ""}"#, &[BYTES]).await, 400, "must not be empty");
}

// ---- Jina ----------------------------------------------------------------------------------------------

#[tokio::test]
async fn jina_asks_in_its_words_on_openais_route() {
    let server = plain().await;
    let ask = async |more: Value| {
        let mut body = json!({"input": [{"text": "w1 w2"}, "w3"], "model": "fake"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/embeddings", body).await
    };
    for (embedding_type, expected) in [
        ("float", json!(ROW)),
        ("fp16", json!(ROW)),
        ("int8", json!(INT8)),
        ("uint8", json!(UINT8)),
        ("binary", json!(BINARY)),
        ("ubinary", json!(UBINARY)),
        ("base64", json!(BASE64_STANDARD.encode(&forms()[0].2))),
    ] {
        let body = ok(&ask(json!({"embedding_type": embedding_type, "normalized": true})).await);
        assert_eq!(body["data"][0]["embedding"], expected, "{embedding_type}");
        assert_eq!(body["usage"]["total_tokens"], 3);
    }
    // OpenAI's client sends base64 by itself: values are Jina's then, and written so.
    let both = json!({"embedding_type": "binary", "encoding_format": "base64"});
    assert_eq!(ok(&ask(both).await)["data"][0]["embedding"], BASE64_STANDARD.encode([112]));
    for (more, field) in [
        (json!({"embedding_type": "binary", "dtype": "int8"}), "embedding_type"),
        (json!({"embedding_type": "base64", "encoding_format": "float"}), "embedding_type"),
        (json!({"late_chunking": true}), "late_chunking"),
    ] {
        assert_eq!(says(&ask(more).await, 422, field)["error"]["param"], field);
    }
    ok(&ask(json!({"late_chunking": false})).await);
    says(&ask(json!({"task": "cooking"})).await, 400, "retrieval.query");
    let image = json!({"input": ["w1", {"image": "aGk="}]});
    let refusal = says(&server.post("/v1/embeddings", image).await, 422, "an image is nothing that this model takes");
    assert_eq!(refusal["error"]["param"], "input[1]");
}

#[tokio::test]
async fn uses_of_embeddings_choose_the_models_prompts() {
    let server = plain().await;
    // The fake model's only prompt is `query`: "w1 " before the text. The first value is the sum of the ids.
    for (task, first) in [
        (json!("retrieval.query"), 6.0),
        (json!("retrieval.passage"), 5.0),
        (json!("separation"), 5.0),
        (Value::Null, 5.0),
    ] {
        let body = json!({"input": "w5", "task": task, "dimensions": 1});
        assert_eq!(ok(&server.post("/v1/embeddings", body).await)["data"][0]["embedding"], json!([first]), "{task}");
    }
    for (input_type, first) in [("search_query", 6.0), ("search_document", 5.0), ("clustering", 5.0)] {
        let body = json!({"texts": ["w5"], "input_type": input_type, "output_dimension": 1});
        assert_eq!(
            ok(&server.post("/v2/embed", body).await)["embeddings"],
            json!({"float": [[first]]}),
            "{input_type}"
        );
    }
}

#[tokio::test]
async fn jina_cuts_on_demand() {
    let server = plain().await;
    let long = format!("{} w9", "w1 ".repeat(64));
    let ask =
        |truncate: Value| server.post("/v1/embeddings", json!({"input": long, "truncate": truncate, "dimensions": 1}));
    assert_eq!(ok(&ask(json!(true)).await)["data"][0]["embedding"], json!([64.0]));
    says(&ask(json!(false)).await, 413, "65 tokens, the limit is 64");
    says(&ask(Value::Null).await, 413, "65 tokens, the limit is 64");
}

// ---- Cohere --------------------------------------------------------------------------------------------

#[tokio::test]
async fn cohere_embeds_in_many_forms_at_once() {
    let server = plain().await;
    let types = ["ubinary", "float", "int8", "uint8", "binary", "base64", "float"];
    let texts = ["w1 w2", "w1  \"w2\""];
    let body = json!({"model": "fake", "input_type": "classification", "texts": texts, "embedding_types": types});
    let body = ok(&server.post("/v2/embed", body).await);
    assert_eq!(body["texts"], json!(texts));
    assert_eq!(body["response_type"], "embeddings_by_type");
    assert_eq!(body["meta"]["api_version"]["version"], "2");
    assert!(body["meta"]["billed_units"]["input_tokens"].as_u64().unwrap() >= 4);
    assert!(uuid::Uuid::parse_str(body["id"].as_str().unwrap()).is_ok());
    let embeddings = body["embeddings"].as_object().unwrap();
    assert_eq!(embeddings.len(), 6, "each form once");
    for (name, expected) in [
        ("float", json!(ROW)),
        ("int8", json!(INT8)),
        ("uint8", json!(UINT8)),
        ("binary", json!(BINARY)),
        ("ubinary", json!(UBINARY)),
        ("base64", json!(BASE64_STANDARD.encode(&forms()[0].2))),
    ] {
        assert_eq!((&embeddings[name][0], embeddings[name].as_array().unwrap().len()), (&expected, 2), "{name}");
    }
    for (dtype, numbers, bytes, item) in forms() {
        let name = dtype.replace("float32", "base64").replace("float16", "fp16");
        let body = json!({"texts": ["w1 w2", "w1 w2"], "embedding_types": [name]});
        let answer = server.post_with("/v2/embed", body.to_string(), &[BYTES]).await;
        is_raw(&answer, &bytes.repeat(2), item, &format!("2,{}", numbers.as_array().unwrap().len()));
    }
}

#[tokio::test]
async fn coheres_older_clients_get_floats_unless_they_name_types() {
    let server = plain().await;
    let body = ok(&server.post("/v1/embed", json!({"texts": ["w1 w2", "w3"], "truncate": "END"})).await);
    assert_eq!((&body["embeddings"][0], body["embeddings"].as_array().unwrap().len()), (&json!(ROW), 2));
    assert_eq!((&body["response_type"], &body["texts"]), (&json!("embeddings_floats"), &json!(["w1 w2", "w3"])));
    assert_eq!(body["meta"], json!({"api_version": {"version": "1"}, "billed_units": {"input_tokens": 3}}));
    let body = ok(&server.post("/v1/embed", json!({"texts": ["w1 w2"], "embedding_types": ["int8"]})).await);
    assert_eq!((&body["embeddings"], &body["response_type"]), (&json!({"int8": [INT8]}), &json!("embeddings_by_type")));
    let refused = says(&server.post("/v1/embed", json!({"texts": []})).await, 400, "texts must not be empty");
    assert_eq!(refused.as_object().unwrap().len(), 1, "Cohere's envelope and not OpenAI's: {refused}");
}

#[tokio::test]
async fn cohere_cuts_unless_told_not_to() {
    let server = plain().await;
    let long = format!("{} w9", "w1 ".repeat(64));
    for (truncate, sum) in [(Value::Null, 64.0), (json!("END"), 64.0), (json!("START"), 72.0)] {
        let body = json!({"texts": [long], "truncate": truncate, "output_dimension": 2});
        let body = ok(&server.post("/v2/embed", body).await);
        assert_eq!(body["embeddings"]["float"], json!([[sum, 64.0]]));
        assert_eq!(body["meta"]["billed_units"]["input_tokens"], 64);
    }
    let answer = server.post("/v2/embed", json!({"texts": [long], "truncate": "NONE"})).await;
    says(&answer, 413, "texts has 65 tokens, the limit is 64");
}

#[tokio::test]
async fn cohere_refusals_are_a_message() {
    let server = plain().await;
    for (body, status, message) in [
        (json!({"texts": ["w1"], "model": "embed-v4.0"}), 404, "`embed-v4.0`; served: fake"),
        (json!({}), 400, "missing field `texts`"),
        (json!({"texts": []}), 400, "texts must not be empty"),
        (json!({"texts": ["w1", ""]}), 400, "texts[1] must not be empty"),
        (json!({"texts": "w1"}), 400, "texts: "),
        (json!({"texts": ["w1"], "embedding_types": []}), 400, "embedding_types must not be empty"),
        (json!({"texts": ["w1"], "embedding_types": ["float", "int4"]}), 400, "embedding_types[1]: "),
        (json!({"texts": ["w1"], "input_type": "poetry"}), 400, "input_type: "),
        (json!({"texts": ["w1"], "truncate": "MIDDLE"}), 400, "truncate: "),
        (json!({"texts": ["w1"], "output_dimension": 9}), 422, "output_dimension: "),
        (json!({"texts": ["w1"], "max_tokens": 3}), 422, "max_tokens: "),
        (
            json!({"images": ["data:image/png;base64,aGk="], "input_type": "image"}),
            422,
            "images: an image is nothing that this model takes",
        ),
        (json!({"inputs": []}), 400, "inputs must not be empty"),
        (
            json!({"inputs": [{"content": [{"type": "text", "text": "w1"}]}], "texts": ["w1"]}),
            400,
            "got `texts` and `inputs`",
        ),
        (json!({"inputs": [{"content": []}]}), 400, "inputs[0].content must not be empty"),
        (
            json!({"inputs": [{"content": [{"type": "text", "text": "w1"}, {"type": "text", "text": "w2"}]}]}),
            422,
            "inputs[0].content: expected one part, got 2",
        ),
        (json!({"inputs": [{"content": [{"type": "audio", "text": "w1"}]}]}), 400, "inputs[0].content[0]"),
        (json!({"inputs": [{"content": [{"type": "text", "text": ""}]}]}), 400, "inputs must not be empty"),
        (
            json!({"inputs": [{"content": [{"type": "image_url", "image_url": {"url": "https://127.0.0.1/a.png"}}]}]}),
            400,
            "inputs[0].content[0].image_url.url: URLs are not fetched",
        ),
        (json!({"texts": vec!["w1"; 33]}), 413, "texts has 33 inputs, the limit is 32"),
    ] {
        let body = says(&server.post("/v2/embed", body).await, status, message);
        assert_eq!(body.as_object().unwrap().keys().collect::<Vec<_>>(), ["message"], "{body}");
    }
    let body = json!({"texts": ["w1"], "embedding_types": ["int8", "float"]}).to_string();
    says(&server.post_with("/v2/embed", body, &[BYTES]).await, 422, "embedding_types: one form");
    says(&server.get("/v2/embed").await, 405, r#"{"message":"#);
}

#[tokio::test]
async fn results_in_any_form_are_kept_as_what_was_computed() {
    let server = http::server_that_keeps(http::settings(), http::limits(), None, Scope::All).await;
    let body = json!({"texts": ["w1 w2"], "embedding_types": ["ubinary"]});
    ok(&server.post("/v2/embed", body).await);
    let body = json!({"input": "w1 w2", "dtype": "int8"}).to_string();
    is_raw(&server.post_with("/v1/embeddings", body, &[BYTES]).await, &forms()[2].2, "int8", "1,8");
    let kept = ok(&server.get("/api/v1/inferences?include=output").await);
    let kept = kept["data"].as_array().or(kept["inferences"].as_array()).expect("a list of records").clone();
    assert_eq!(kept.len(), 2);
    for record in kept {
        assert!(record.to_string().contains("[[3.0,2.0,1.0,2.0,0.0,0.0,0.0,0.0]]"), "{record}");
    }
}

// ---- compressed bodies -----------------------------------------------------------------------------------

const CODINGS: [&str; 4] = ["zstd", "br", "gzip", "deflate"];

fn pack(coding: &str, bytes: &[u8]) -> Vec<u8> {
    match coding {
        "zstd" => zstd::bulk::compress(bytes, 3).unwrap(),
        "br" => {
            let mut writer = brotli::CompressorWriter::new(Vec::new(), 4096, 5, 22);
            writer.write_all(bytes).unwrap();
            writer.into_inner()
        }
        "gzip" => {
            let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            writer.write_all(bytes).unwrap();
            writer.finish().unwrap()
        }
        _ => {
            let mut writer = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
            writer.write_all(bytes).unwrap();
            writer.finish().unwrap()
        }
    }
}

fn unpack(coding: &str, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    match coding {
        "zstd" => zstd::stream::read::Decoder::new(bytes).unwrap().read_to_end(&mut out),
        "br" => brotli::Decompressor::new(bytes, 4096).read_to_end(&mut out),
        "gzip" => flate2::read::GzDecoder::new(bytes).read_to_end(&mut out),
        "deflate" => flate2::read::ZlibDecoder::new(bytes).read_to_end(&mut out),
        _ => bytes.to_vec().as_slice().read_to_end(&mut out),
    }
    .unwrap();
    out
}

/// One that takes large requests.
async fn large() -> Server {
    let settings = ApiSettings { max_client_batch_size: 4096, max_body_bytes: 1 << 20, ..http::settings() };
    http::server(settings, BatchLimits { max_queue_size: 10_000, ..http::limits() }).await
}

#[tokio::test]
async fn requests_may_be_compressed_in_every_coding() {
    let server = large().await;
    let small = json!({"inputs": ["w1 w2"]}).to_string();
    // Above what is unpacked on the async threads, and above what is parsed there.
    let many: Vec<String> = (0..2000).map(|i| format!("w{}{}", i % 995, " ".repeat(150))).collect();
    let many = json!({"inputs": many, "dimensions": 1}).to_string();
    for (body, plain) in [
        (&small, server.post_with("/embed", small.clone(), &[]).await),
        (&many, server.post_with("/embed", many.clone(), &[]).await),
    ] {
        ok(&plain);
        for coding in CODINGS {
            for name in [coding.to_string(), coding.to_uppercase()] {
                let answer =
                    server.post_with("/embed", pack(coding, body.as_bytes()), &[("content-encoding", &name)]).await;
                assert_eq!(ok(&answer), plain.json(), "{coding}");
            }
        }
    }
    let answer = server.post_with("/embed", small.clone(), &[("content-encoding", "identity")]).await;
    ok(&answer);
    says(&server.post_with("/embed", "", &[("content-encoding", "gzip")]).await, 400, "body must not be empty");
}

#[tokio::test]
async fn a_bomb_is_too_large_and_what_is_broken_malformed() {
    let server = plain().await;
    for coding in CODINGS {
        let bomb = pack(coding, &vec![b' '; 32 << 20]);
        assert!(bomb.len() < 65_536, "{coding}: {} bytes are within the limit as they come", bomb.len());
        let answer = server.post_with("/v1/embeddings", bomb, &[("content-encoding", coding)]).await;
        assert_eq!(says(&answer, 413, "bytes, the limit is 65536")["error"]["param"], "body");
        let whole = pack(coding, br#"{"input": "w1 w2 w3 w4"}"#);
        for broken in [whole[..whole.len() - 9].to_vec(), br#"{"input": "w1"}"#.to_vec()] {
            let answer = server.post_with("/v1/embeddings", broken, &[("content-encoding", coding)]).await;
            assert_eq!(says(&answer, 400, &format!("not {coding}"))["error"]["code"], "malformed");
        }
        // Unpacked it is no JSON: told as of any body.
        let answer = server.post_with("/v1/embeddings", pack(coding, b"{"), &[("content-encoding", coding)]).await;
        says(&answer, 400, "not JSON: EOF");
    }
    for unknown in ["compress", "gzip, gzip", "zst"] {
        let answer = server.post_with("/v1/embeddings", "{}", &[("content-encoding", unknown)]).await;
        assert_eq!(says(&answer, 415, "zstd, gzip, deflate, br")["error"]["code"], "unsupported_media_type");
        assert_eq!(answer.header("accept-encoding"), "zstd, gzip, deflate, br");
    }
    // What is not a form of JSON at all is not taken compressed.
    let request = axum::http::Request::post("/v1/files").header("content-type", "multipart/form-data; boundary=b");
    let request = request.header("content-encoding", "gzip").body(axum::body::Body::empty()).unwrap();
    let answer = server.send(request).await;
    says(&answer, 415, "expected one of identity");
    assert_eq!(answer.header("accept-encoding"), "identity");
}

#[tokio::test]
async fn long_answers_are_compressed_as_the_client_takes_it() {
    let server = large().await;
    let inputs: Vec<String> = (0..2000).map(|i| format!("w{} w7", i % 995)).collect();
    let body = json!({"inputs": inputs}).to_string();
    let plain = server.post_with("/embed", body.clone(), &[]).await;
    ok(&plain);
    assert_eq!((plain.header("content-encoding"), plain.header("vary")), ("", "accept-encoding"));
    for (accepted, expected) in [
        ("zstd", "zstd"),
        ("br", "br"),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate", "gzip"),
        ("gzip, deflate, br, zstd", "zstd"),
        ("gzip;q=0.9, br;q=0.2", "gzip"),
        ("compress, identity", ""),
        ("gzip;q=0", ""),
    ] {
        let answer = server.post_with("/embed", body.clone(), &[("accept-encoding", accepted)]).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert_eq!(answer.header("content-encoding"), expected, "{accepted}");
        assert_eq!(unpack(expected, &answer.body), plain.body, "{accepted}");
        assert!(expected.is_empty() || answer.body.len() < plain.body.len() / 2, "{accepted}: {}", answer.body.len());
        assert_eq!(answer.header("vary"), "accept-encoding");
        assert!(!answer.header("x-request-id").is_empty() && !answer.header("x-compute-tokens").is_empty());
    }
}

#[tokio::test]
async fn what_gains_nothing_goes_as_it_is_unless_that_is_refused() {
    let server = large().await;
    let all = ("accept-encoding", "gzip, br, zstd");
    let none_else = ("accept-encoding", "gzip, identity;q=0");
    let short = r#"{"inputs": "w1 w2"}"#;
    let inputs: Vec<String> = (0..2000).map(|i| format!("w{}", i % 995)).collect();
    let long = json!({"inputs": inputs}).to_string();

    let answer = server.post_with("/embed", short, &[all]).await;
    assert_eq!((answer.header("content-encoding"), answer.header("vary")), ("", ""));
    let raw = server.post_with("/embed", long.clone(), &[all, BYTES]).await;
    assert_eq!((raw.header("content-encoding"), raw.body.len()), ("", 2000 * 8 * 4));

    let answer = server.post_with("/embed", short, &[none_else]).await;
    assert_eq!(answer.header("content-encoding"), "gzip");
    assert_eq!(unpack("gzip", &answer.body), b"[[3.0,2.0,1.0,2.0,0.0,0.0,0.0,0.0]]");
    let answer = server.post_with("/embed", long, &[none_else, BYTES]).await;
    assert_eq!((answer.header("content-encoding"), answer.header("x-eremois-shape")), ("gzip", "2000,8"));
    assert_eq!(unpack("gzip", &answer.body), raw.body);
    // The limit is a setting's.
    let settings = ApiSettings { compress_above: 10, ..http::settings() };
    let server = http::server(settings, http::limits()).await;
    assert_eq!(server.post_with("/embed", short, &[all]).await.header("content-encoding"), "zstd");
    let refused = server.post_with("/embed", "{", &[all]).await;
    assert_eq!((refused.status.as_u16(), refused.header("content-encoding")), (422, "zstd"), "refusals are JSON too");
    assert!(String::from_utf8(unpack("zstd", &refused.body)).unwrap().contains("not JSON"));
}

#[tokio::test]
async fn events_are_never_compressed() {
    let settings = ApiSettings { compress_above: 1, ..http::settings() };
    let server = http::server(settings, http::limits()).await;
    let kept = ok(&server.post("/api/v1/inferences", json!({"input": "w1"})).await);
    let path = format!("/api/v1/inferences/{}/events", kept["id"].as_str().unwrap());
    let request = axum::http::Request::get(path).header("accept-encoding", "gzip, identity;q=0");
    let answer = server.send(request.body(axum::body::Body::empty()).unwrap()).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!((answer.header("content-type"), answer.header("content-encoding")), ("text/event-stream", ""));
    assert!(answer.text().contains("event:") || answer.text().contains("data:"), "{}", answer.text());
}
