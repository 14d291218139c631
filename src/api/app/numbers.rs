//! `GET /api/v1/usage` and `GET /api/v1/quality`: numbers over all records.

mod wire;

use axum::extract::{RawQuery, State};
use axum::http::HeaderMap;
use axum::response::Response;
use serde::Serialize;

use super::super::docs::Refusals;
use super::super::status::Fault;
use super::super::{ApiState, body, write};
use super::list::{invalid, pairs, time};
use crate::store::Records;
use crate::store::numbers::{Dimension, MAX_LIMIT, QualityQuery, UsageQuery};
use crate::{Error, Result};
use wire::{QualityList, UsageList};

/// Groups of an answer that does not say how many.
const DEFAULT_LIMIT: usize = 1000;

/// What was used: sums over all records of a time, by model, user, day and more.
#[utoipa::path(
    get, path = "/api/v1/usage", tag = "application",
    params(
        ("group_by" = Option<String>, Query, description = "One or more of model, version, user, day, source, status, with commas; `model` unless given", example = "model,user,day"),
        ("model" = Option<String>, Query, description = "Only of this model"),
        ("user" = Option<String>, Query, description = "Only of this user"),
        ("from" = Option<String>, Query, description = "Only of requests made at this time or later, RFC 3339"),
        ("to" = Option<String>, Query, description = "Only of requests made before this time, RFC 3339"),
        ("limit" = Option<usize>, Query, description = "Groups, 1 to 10000", example = 1000),
    ),
    responses((status = 200, body = UsageList, description = "Sums by group"), Refusals),
)]
pub async fn usage(
    State(state): State<ApiState>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Result<Response, Fault> {
    let timeout = body::timeout(&headers, state.settings.timeout)?;
    let query = UsageQuery { timeout, ..parse_usage(query.as_deref().unwrap_or_default())? };
    let told = state.keeper.store().usage(&query).await?;
    answer(told.rows.len() * 8, move || UsageList::new(&query.by, told)).await
}

/// How well each version of a model did: errors, latency, feedback, and how the norms of its outputs drift.
#[utoipa::path(
    get, path = "/api/v1/quality", tag = "application",
    params(
        ("model" = Option<String>, Query, description = "Only of this model"),
        ("version" = Option<String>, Query, description = "Only of this version; drift is against the one before it all the same"),
        ("from" = Option<String>, Query, description = "Only of requests made at this time or later, RFC 3339"),
        ("to" = Option<String>, Query, description = "Only of requests made before this time, RFC 3339"),
    ),
    responses((status = 200, body = QualityList, description = "One item a version"), Refusals),
)]
pub async fn quality(
    State(state): State<ApiState>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Result<Response, Fault> {
    let timeout = body::timeout(&headers, state.settings.timeout)?;
    let query = QualityQuery { timeout, ..parse_quality(query.as_deref().unwrap_or_default())? };
    let told = state.keeper.store().quality(&query).await?;
    answer(told.rows.len() * 64, move || QualityList::from(told)).await
}

/// `num_values` are about how many numbers and words the list has.
async fn answer<T: Serialize>(num_values: usize, list: impl FnOnce() -> T + Send + 'static) -> Result<Response, Fault> {
    let write = move || {
        let written = serde_json::to_vec(&list());
        written.map_err(|e| Error::Internal { cause: format!("writing numbers: {e}") })
    };
    Ok(write::offload(num_values, write).await?)
}

/// Errors: `Invalid` naming the parameter, as in the list of inferences.
fn parse_usage(text: &str) -> Result<UsageQuery> {
    let mut query = UsageQuery {
        model: None,
        user: None,
        from: None,
        to: None,
        by: vec![Dimension::Model],
        limit: DEFAULT_LIMIT,
        timeout: Default::default(),
    };
    for (name, value) in pairs(text)? {
        match &*name {
            "group_by" => query.by = dimensions(&value)?,
            "model" => query.model = Some(value),
            "user" => query.user = Some(value),
            "from" => query.from = Some(time("from", &value)?),
            "to" => query.to = Some(time("to", &value)?),
            "limit" => {
                let limit = value.parse().ok().filter(|limit| (1..=MAX_LIMIT).contains(limit));
                query.limit = limit.ok_or_else(|| invalid("limit", format!("expected 1 to {MAX_LIMIT}")))?;
            }
            other => return Err(unknown(other, "group_by, model, user, from, to, limit")),
        }
    }
    check_span(query.from, query.to)?;
    Ok(query)
}

/// Errors: as [`parse_usage`].
fn parse_quality(text: &str) -> Result<QualityQuery> {
    let mut query = QualityQuery { model: None, version: None, from: None, to: None, timeout: Default::default() };
    for (name, value) in pairs(text)? {
        match &*name {
            "model" => query.model = Some(value),
            "version" => query.version = Some(value),
            "from" => query.from = Some(time("from", &value)?),
            "to" => query.to = Some(time("to", &value)?),
            other => return Err(unknown(other, "model, version, from, to")),
        }
    }
    check_span(query.from, query.to)?;
    Ok(query)
}

fn dimensions(text: &str) -> Result<Vec<Dimension>> {
    let mut by = Vec::new();
    for name in text.split(',') {
        let dimension = Dimension::ALL.into_iter().find(|dimension| dimension.as_str() == name);
        let dimension = dimension.ok_or_else(|| {
            let names = Dimension::ALL.map(Dimension::as_str).join(", ");
            invalid("group_by", format!("`{name}` is none of {names}"))
        })?;
        if by.contains(&dimension) {
            return Err(invalid("group_by", format!("`{name}` is given twice")));
        }
        by.push(dimension);
    }
    Ok(by)
}

fn check_span(from: Option<jiff::Timestamp>, to: Option<jiff::Timestamp>) -> Result<()> {
    match (from, to) {
        (Some(from), Some(to)) if from > to => Err(invalid("from", format!("{from} is after `to`, {to}"))),
        _ => Ok(()),
    }
}

fn unknown(name: &str, known: &str) -> Error {
    invalid(name, format!("is no parameter of these numbers; there are {known}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameter_is_read() {
        let query = parse_usage("").unwrap();
        assert_eq!((query.by, query.limit), (vec![Dimension::Model], DEFAULT_LIMIT));
        let text = "group_by=day,user&model=a%20b&user=&limit=10000&from=2026-01-01T00:00:00Z&to=2026-01-01T00:00:00Z";
        let query = parse_usage(text).unwrap();
        assert_eq!((query.by, query.limit), (vec![Dimension::Day, Dimension::User], 10_000));
        assert_eq!((query.model.as_deref(), query.user.as_deref()), (Some("a b"), Some("")));
        assert!(query.from.is_some() && query.from == query.to);
        let query = parse_quality("model=m&version=2&to=2026-01-02T00:00:00%2B01:00").unwrap();
        assert_eq!((query.model.as_deref(), query.version.as_deref()), (Some("m"), Some("2")));
        assert!(query.from.is_none() && query.to.is_some());
    }

    #[test]
    fn what_cannot_be_applied_is_named() {
        let backwards = "from=2026-01-02T00:00:00Z&to=2026-01-01T00:00:00Z";
        for (text, field) in [
            ("group_by=", "group_by"),
            ("group_by=model,,day", "group_by"),
            ("group_by=week", "group_by"),
            ("group_by=Model", "group_by"),
            ("group_by=day,day", "group_by"),
            ("group_by=day&group_by=user", "group_by"),
            ("limit=0", "limit"),
            ("limit=10001", "limit"),
            ("limit=-1", "limit"),
            ("from=yesterday", "from"),
            (backwards, "from"),
            ("version=1", "version"),
            ("cursor=x", "cursor"),
        ] {
            match parse_usage(text) {
                Err(Error::Invalid { field: got, .. }) => assert_eq!(got, field, "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
        for (text, field) in
            [(backwards, "from"), ("user=a", "user"), ("group_by=day", "group_by"), ("limit=5", "limit")]
        {
            assert!(matches!(parse_quality(text), Err(Error::Invalid { field: got, .. }) if got == field), "{text}");
        }
    }
}
