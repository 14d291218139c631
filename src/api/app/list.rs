//! `GET /api/v1/inferences`: pages of records, newest first.

use std::collections::BTreeSet;

use axum::extract::{RawQuery, State};
use axum::response::Response;
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jiff::Timestamp;
use utoipa::ToSchema;

use super::super::docs::Refusals;
use super::super::status::Fault;
use super::super::{ApiState, write};
use super::records::num_floats;
use super::wire::{Inference, Parts, push_record};
use crate::store::Records;
use crate::store::query::{MAX_LIMIT, Query};
use crate::store::record::{InferenceId, Status};
use crate::{Error, Result};

/// Records of a page that does not say how many.
const DEFAULT_LIMIT: usize = 20;

/// A page, for the document: it is written by hand.
#[derive(ToSchema)]
#[allow(dead_code)]
pub struct InferenceList {
    #[schema(example = "list")]
    object: String,
    data: Vec<Inference>,
    /// `cursor` of the next page; null on the last.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// A page of inferences, newest first. Pages stay what they are while others are written.
#[utoipa::path(
    get, path = "/api/v1/inferences", tag = "application",
    params(
        ("model" = Option<String>, Query, description = "Only of this model"),
        ("user" = Option<String>, Query, description = "Only of this user"),
        ("status" = Option<String>, Query, description = "Only with this status", example = "succeeded"),
        ("from" = Option<String>, Query, description = "Only those created at this time or later, RFC 3339"),
        ("to" = Option<String>, Query, description = "Only those created before this time, RFC 3339"),
        ("metadata.KEY" = Option<String>, Query, description = "Only with this value under this key of `metadata`; may be given for several keys"),
        ("limit" = Option<usize>, Query, description = "1 to 1000", example = 20),
        ("cursor" = Option<String>, Query, description = "`next_cursor` of the page before"),
        ("include" = Option<String>, Query, description = "`output`: with the outputs"),
    ),
    responses((status = 200, body = InferenceList, description = "A page"), Refusals),
)]
pub async fn list(State(state): State<ApiState>, RawQuery(query): RawQuery) -> Result<Response, Fault> {
    let query = parse(query.as_deref().unwrap_or_default())?;
    let page = state.keeper.store().list(&query).await?;
    let num_floats = page.records.iter().map(num_floats).sum();
    let response = write::offload(num_floats, move || {
        let mut out = write::buffer(num_floats + 64 * page.records.len());
        out.extend_from_slice(br#"{"object":"list","data":["#);
        for (i, record) in page.records.iter().enumerate() {
            if i > 0 {
                out.push(b',');
            }
            push_record(&mut out, record, Parts { inputs: true, is_stored: true })?;
        }
        out.extend_from_slice(br#"],"next_cursor":"#);
        match page.next {
            Some(id) => write::push_str(&mut out, &cursor(&id)),
            None => out.extend_from_slice(b"null"),
        }
        out.push(b'}');
        Ok(out)
    });
    Ok(response.await?)
}

/// The place after a record, as clients hand it back.
fn cursor(id: &InferenceId) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(id.0.as_bytes())
}

/// A parameter at fault.
pub fn invalid(field: &str, reason: impl Into<String>) -> Error {
    Error::Invalid { field: field.to_string(), reason: reason.into() }
}

/// Errors: `Invalid` naming the parameter; a name that there is not is one, since a filter that is not applied would
/// answer with other people's records.
fn parse(text: &str) -> Result<Query> {
    let mut query = Query { limit: DEFAULT_LIMIT, ..Query::default() };
    for (name, value) in pairs(text)? {
        if let Some(key) = name.strip_prefix("metadata.") {
            query.metadata.insert(key.to_string(), value);
            continue;
        }
        match &*name {
            "model" => query.model = Some(value),
            "user" => query.user = Some(value),
            "status" => query.status = Some(status(&value)?),
            "from" => query.from = Some(time("from", &value)?),
            "to" => query.to = Some(time("to", &value)?),
            "limit" => query.limit = limit(&value)?,
            "cursor" => query.after = Some(after(&value)?),
            "include" if value == "output" => query.with_output = true,
            "include" => return Err(invalid("include", "only `output` can be included")),
            other => {
                let known = "model, user, status, from, to, metadata.KEY, limit, cursor, include";
                return Err(invalid(other, format!("is no parameter of this list; there are {known}")));
            }
        }
    }
    Ok(query)
}

/// The parameters of a query, decoded. Errors: `Invalid` for one that is given twice.
pub fn pairs(text: &str) -> Result<Vec<(String, String)>> {
    let mut pairs: Vec<(String, String)> = Vec::new();
    let mut seen = BTreeSet::new();
    for (name, value) in url::form_urlencoded::parse(text.as_bytes()) {
        if !seen.insert(name.to_string()) {
            return Err(invalid(&name, "is given twice"));
        }
        pairs.push((name.into_owned(), value.into_owned()));
    }
    Ok(pairs)
}

fn status(text: &str) -> Result<Status> {
    let all = [Status::Queued, Status::Running, Status::Succeeded, Status::Failed, Status::Cancelled];
    all.into_iter().find(|status| status.as_str() == text).ok_or_else(|| {
        let names: Vec<&str> = all.iter().map(|status| status.as_str()).collect();
        invalid("status", format!("expected one of {}", names.join(", ")))
    })
}

/// Errors: `Invalid` naming the field.
pub fn time(field: &str, text: &str) -> Result<Timestamp> {
    text.parse().map_err(|_| invalid(field, "expected a time of RFC 3339 such as 2026-11-24T12:00:00Z"))
}

fn limit(text: &str) -> Result<usize> {
    match text.parse() {
        Ok(limit) if (1..=MAX_LIMIT).contains(&limit) => Ok(limit),
        _ => Err(invalid("limit", format!("expected 1 to {MAX_LIMIT}"))),
    }
}

fn after(text: &str) -> Result<InferenceId> {
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).ok();
    let id = bytes.and_then(|bytes| uuid::Uuid::from_slice(&bytes).ok());
    id.map(InferenceId).ok_or_else(|| invalid("cursor", "is no `next_cursor` of this server"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameter_is_read() {
        let id = InferenceId::new();
        let text = format!(
            "model=m&user=a%20b&status=failed&from=2026-01-01T00:00:00Z&to=2026-01-02T00:00:00%2B01:00&metadata.k=v&\
             metadata.a.b=c&limit=7&cursor={}&include=output",
            cursor(&id)
        );
        let query = parse(&text).unwrap();
        assert_eq!((query.model.as_deref(), query.user.as_deref()), (Some("m"), Some("a b")));
        assert_eq!((query.status, query.limit, query.after), (Some(Status::Failed), 7, Some(id)));
        assert!(query.from.unwrap() < query.to.unwrap() && query.with_output);
        assert_eq!(query.metadata.get("a.b").map(String::as_str), Some("c"));
        assert_eq!(parse("").unwrap().limit, DEFAULT_LIMIT);
    }

    #[test]
    fn what_cannot_be_applied_is_named() {
        for (text, field) in [
            ("limit=0", "limit"),
            ("limit=1001", "limit"),
            ("status=done", "status"),
            ("from=yesterday", "from"),
            ("cursor=%", "cursor"),
            ("cursor=AAAA", "cursor"),
            ("include=all", "include"),
            ("usr=a", "usr"),
            ("user=a&user=b", "user"),
        ] {
            match parse(text) {
                Err(Error::Invalid { field: got, .. }) => assert_eq!(got, field, "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }
}
