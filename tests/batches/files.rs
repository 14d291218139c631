//! Files: uploads that are taken, refused or cut off, lists, content and deletion.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use bytes::Bytes;
use eremois::inference::keep::Scope;
use eremois::jobs::JobSettings;
use eremois::store::work::{DocumentKind, DocumentQuery, MAX_PART_BYTES, Work};
use futures::{StreamExt, stream};
use http_body_util::BodyExt;
use serde_json::json;
use tower::ServiceExt;

use super::common::http::{self, Server, plain, server_of};
use super::help::{
    BOUNDARY, Runners, Watched, batch_of, ended, form, input, line, lines_of, post_file, post_form, refused, upload,
};

async fn limited(max_file_bytes: usize) -> (Server, Arc<Watched>) {
    let work = Arc::new(Watched::default());
    let jobs = JobSettings { max_file_bytes, ..JobSettings::default() };
    (server_of(http::settings(), http::limits(), None, Scope::Application, jobs, work.clone()).await, work)
}

async fn delete(server: &Server, id: &str) -> super::common::http::Answer {
    server.send(Request::delete(format!("/v1/files/{id}")).body(Body::empty()).unwrap()).await
}

/// What is removed in the background is soon.
async fn until_empty(work: &Watched) {
    for _ in 0..1000 {
        let query = DocumentQuery { kind: DocumentKind::Draft, parent: None, after: None, limit: 10 };
        if work.parts().is_empty() && work.documents(&query).await.unwrap().is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{:?} are left", work.parts());
}

#[tokio::test]
async fn content_goes_out_as_it_came_in() {
    let (server, work) = limited(64 << 20).await;
    // Not a multiple of a part, and longer than two.
    let content: String = (0..2 * MAX_PART_BYTES + 12_345).map(|i| char::from(b' ' + (i % 90) as u8)).collect();
    let answer = post_form(&server, form(&content, &[("purpose", "batch"), ("unknown", "x")])).await;
    let file = answer.json();
    assert_eq!(
        (&file["object"], &file["filename"], &file["status"]),
        (&json!("file"), &json!("lines.jsonl"), &json!("processed"))
    );
    assert_eq!(file["expires_at"].as_i64().unwrap() - file["created_at"].as_i64().unwrap(), 30 * 24 * 3600);
    assert_eq!(work.parts().len(), 3);
    let path = format!("/v1/files/{}", file["id"].as_str().unwrap());
    assert_eq!(server.get(&path).await.json(), file);
    let back = server.get(&format!("{path}/content")).await;
    assert!(back.body == content.as_bytes());
    assert_eq!(back.header("content-length"), content.len().to_string());

    let gone = delete(&server, file["id"].as_str().unwrap()).await;
    assert_eq!(gone.json(), json!({"id": file["id"], "object": "file", "deleted": true}));
    for path in [path.clone(), format!("{path}/content")] {
        refused(&server.get(&path).await, 404, "not_found", "");
    }
    refused(&delete(&server, file["id"].as_str().unwrap()).await, 404, "not_found", "");
    until_empty(&work).await;
}

#[tokio::test]
async fn damaged_content_is_never_whole() {
    let (server, work) = limited(64 << 20).await;
    let content = "x".repeat(MAX_PART_BYTES + 10);
    let id = upload(&server, &content).await;
    let name = work.parts().pop().unwrap();
    work.put_part(&name, 1, b"yyyyyyyyyy").await.unwrap();
    let request = Request::get(format!("/v1/files/{id}/content")).body(Body::empty()).unwrap();
    let response = server.router.clone().oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert!(response.into_body().collect().await.is_err());
    // Where the first part is missing already, there is no answer to begin with.
    work.remove_parts(&name).await.unwrap();
    let answer = server.get(&format!("/v1/files/{id}/content")).await;
    refused(&answer, 500, "internal", "");
}

#[tokio::test]
async fn uploads_are_checked() {
    let (server, work) = limited(5000).await;
    let good = "x".repeat(5000);
    assert_eq!(post_file(&server, &good, "batch").await.status, StatusCode::OK);
    let long_name = form("x", &[("purpose", "batch")]).replace("lines.jsonl", &"n".repeat(256));
    let twice = form("x", &[("purpose", "batch"), ("file", "y")]);
    let days = |seconds: &str| {
        form("x", &[("purpose", "batch"), ("expires_after[anchor]", "created_at"), ("expires_after[seconds]", seconds)])
    };
    for (form, status, kind, field) in [
        (form("x", &[("purpose", "assistants")]), 422, "invalid", "purpose"),
        (form("x", &[]), 400, "malformed", "purpose"),
        (form("", &[("purpose", "batch")]), 400, "empty", "file"),
        (form("x", &[("purpose", "batch")]).replace("name=\"file\"", "name=\"other\""), 400, "malformed", "file"),
        (form(&"x".repeat(5001), &[("purpose", "batch")]), 413, "too_large", "file"),
        (form(&"x".repeat(200_000), &[("purpose", "batch")]), 413, "too_large", "file"),
        (form("x", &[("purpose", &"x".repeat(2000))]), 413, "too_large", "purpose"),
        (form("x", &[("a", "b"); 20]), 413, "too_large", "body"),
        (
            form("x", &[("purpose", "batch"), ("expires_after[seconds]", "3600")]),
            400,
            "malformed",
            "expires_after.anchor",
        ),
        (days("soon"), 400, "malformed", "expires_after.seconds"),
        (days("3599"), 422, "invalid", "expires_after.seconds"),
        (days("2592001"), 422, "invalid", "expires_after.seconds"),
        (long_name, 413, "too_large", "file.filename"),
        (twice, 422, "invalid", "file"),
        ("no form at all".to_string(), 400, "malformed", "body"),
    ] {
        let what = form.chars().take(300).collect::<String>();
        let answer = post_form(&server, form).await;
        assert_eq!(answer.status.as_u16(), status, "{what}: {}", answer.text());
        refused(&answer, status, kind, field);
    }
    let file = post_form(&server, days("3600")).await.json();
    assert_eq!(file["expires_at"].as_i64().unwrap() - file["created_at"].as_i64().unwrap(), 3600);
    let plain = server.post_with("/v1/files", "{}", &[]).await;
    assert!(refused(&plain, 415, "unsupported_media_type", "").contains("multipart/form-data"));
    assert_eq!(plain.header("accept"), "multipart/form-data");
    // What was refused has left nothing.
    for file in server.get("/v1/files").await.json()["data"].as_array().unwrap() {
        delete(&server, file["id"].as_str().unwrap()).await;
    }
    until_empty(&work).await;
}

#[tokio::test]
async fn a_file_of_unknown_length_is_bounded_too() {
    let (server, work) = limited(6 << 20).await;
    let start = form("", &[]).split("\r\n--").next().unwrap().to_string();
    let pieces = std::iter::once(Bytes::from(start)).chain((0..200).map(|_| Bytes::from(vec![b'x'; 64 << 10])));
    let body = Body::from_stream(stream::iter(pieces.map(Ok::<_, std::io::Error>)));
    let message = refused(&post_form(&server, body).await, 413, "too_large", "file");
    assert!(message.contains(&(6 << 20).to_string()), "{message}");
    until_empty(&work).await;
}

#[tokio::test]
async fn an_upload_that_is_cut_off_leaves_nothing() {
    let (server, work) = limited(64 << 20).await;
    let start = form("", &[]).split("\r\n--").next().unwrap().to_string();
    let pieces: Vec<Bytes> =
        std::iter::once(Bytes::from(start)).chain((0..70).map(|_| Bytes::from(vec![b'x'; 64 << 10]))).collect();
    // The connection breaks.
    let broken = stream::iter(pieces.clone()).map(Ok).chain(stream::iter([Err(std::io::Error::other("reset"))]));
    refused(&post_form(&server, Body::from_stream(broken)).await, 400, "malformed", "body");
    until_empty(&work).await;
    // The server's end of it is dropped, after a part was written.
    let stuck = stream::iter(pieces.clone()).map(Ok::<_, std::io::Error>).chain(stream::pending());
    let sending = post_form(&server, Body::from_stream(stuck));
    assert!(tokio::time::timeout(Duration::from_millis(300), sending).await.is_err());
    until_empty(&work).await;
    // It only stops.
    let settings = eremois::api::ApiSettings { timeout: Duration::from_millis(50), ..http::settings() };
    let jobs = JobSettings::default();
    let server = server_of(settings, http::limits(), None, Scope::Application, jobs, work.clone()).await;
    let stuck = stream::iter(pieces).map(Ok::<_, std::io::Error>).chain(stream::pending());
    refused(&post_form(&server, Body::from_stream(stuck)).await, 408, "request_timeout", "");
    until_empty(&work).await;
    assert_eq!(server.get("/v1/files").await.json()["data"], json!([]));
}

#[tokio::test]
async fn a_form_may_have_its_fields_in_any_order() {
    let server = plain().await;
    let purpose = format!("--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n");
    let answer = post_form(&server, purpose + &form("x", &[])).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
}

#[tokio::test]
async fn lists_have_pages_orders_and_purposes() {
    let server = plain().await;
    let runners = Runners::start(&server, 1);
    let mut oldest_first = Vec::new();
    for i in 0..5 {
        oldest_first.push(upload(&server, &line(&i.to_string(), "w1")).await);
    }
    let batch = ended(&server, &batch_of(&server, &line("a", "w1"), "24h").await).await;
    let written = batch["output_file_id"].as_str().unwrap();
    oldest_first.push(batch["input_file_id"].as_str().unwrap().to_string());
    let all = async |query: &str| {
        let mut found: Vec<String> = Vec::new();
        loop {
            let after = found.last().map_or(String::new(), |id| format!("&after={id}"));
            let page = server.get(&format!("/v1/files?limit=2{query}{after}")).await.json();
            let ids = page["data"].as_array().unwrap().iter().map(|file| file["id"].as_str().unwrap().to_string());
            found.extend(ids);
            if page["has_more"] == false {
                return found;
            }
        }
    };
    assert_eq!(all("&purpose=batch&order=asc").await, oldest_first);
    oldest_first.reverse();
    assert_eq!(all("&purpose=batch").await, oldest_first);
    assert_eq!(all("&purpose=batch_output&order=desc").await, [written]);
    assert_eq!(all("").await.len(), 7);
    delete(&server, &oldest_first[2]).await;
    oldest_first.remove(2);
    assert_eq!(all("&purpose=batch").await, oldest_first);
    let whole = server.get("/v1/files").await.json();
    assert_eq!((&whole["has_more"], whole["data"].as_array().unwrap().len()), (&json!(false), 6));
    for (query, field) in
        [("limit=0", "limit"), ("limit=10001", "limit"), ("order=up", "order"), ("purpose=vision", "purpose")]
    {
        refused(&server.get(&format!("/v1/files?{query}")).await, 422, "invalid", field);
    }
    runners.stop().await;
}

#[tokio::test]
async fn a_batch_goes_on_when_its_input_is_deleted() {
    let (server, work) = limited(1 << 20).await;
    let made = batch_of(&server, &input(50, |i| format!("w{i}")), "24h").await;
    let file = made["input_file_id"].as_str().unwrap();
    assert_eq!(delete(&server, file).await.status, StatusCode::OK);
    refused(&server.get(&format!("/v1/files/{file}")).await, 404, "not_found", "");
    assert_eq!(server.get("/v1/files").await.json()["data"], json!([]));
    // It is no input of others.
    let body = json!({"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"});
    refused(&server.post("/v1/batches", body).await, 404, "not_found", "");
    let runners = Runners::start(&server, 1);
    let batch = ended(&server, &made).await;
    assert_eq!(batch["request_counts"]["completed"], 50);
    assert_eq!(lines_of(&server, &batch["output_file_id"]).await.len(), 50);
    runners.stop().await;
    // When nobody needs it any more it is gone for good.
    let sweep = eremois::jobs::sweep::Sweep::new(server.state.tasks.clone(), server.state.jobs.clone());
    let later = eremois::store::record::now().checked_add(jiff::SignedDuration::from_hours(26)).unwrap();
    sweep.once(later).await.unwrap();
    assert_eq!(work.document(DocumentKind::File, file).await.unwrap(), None);
}

#[tokio::test]
async fn a_file_whose_document_is_not_written_is_no_success() {
    let (server, work) = limited(1 << 20).await;
    for failures in [150, 400] {
        work.fail_sometimes(failures);
        for _ in 0..40 {
            let answer = post_file(&server, "x", "batch").await;
            if answer.status != StatusCode::OK {
                refused(&answer, 503, "store_unavailable", "");
                continue;
            }
            let id = answer.json()["id"].as_str().unwrap().to_string();
            work.fail_sometimes(0);
            assert_eq!(server.get(&format!("/v1/files/{id}/content")).await.text(), "x");
            work.fail_sometimes(failures);
        }
        work.fail_sometimes(0);
    }
    // The sweep finds what was left, and takes nothing that is in use.
    let sweep = eremois::jobs::sweep::Sweep::new(server.state.tasks.clone(), server.state.jobs.clone());
    let later = eremois::store::record::now().checked_add(jiff::SignedDuration::from_hours(48)).unwrap();
    while sweep.once(later).await.unwrap() > 0 {}
    let files = server.get("/v1/files").await.json();
    for file in files["data"].as_array().unwrap() {
        let path = format!("/v1/files/{}/content", file["id"].as_str().unwrap());
        assert_eq!(server.get(&path).await.text(), "x");
    }
    assert_eq!(work.parts().len(), files["data"].as_array().unwrap().len());
}
