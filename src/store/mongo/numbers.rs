//! Usage and quality as aggregation pipelines of MongoDB 4.4.
//!
//! Quality comes of two: one over records, which puts together those that are alike down to the ranges of their durations,
//! and one over what was said of them. They are not of one moment: a record that is written in between counts in the second
//! with what was said of it, if its version is known from the first. `$percentile`, of MongoDB 7, is not needed.

use futures::TryStreamExt;
use mongodb::bson::{Bson, Document, doc};
use mongodb::error::Error as DriverError;

use super::connection::Connection;
use super::fault::{MAX_TIME_EXPIRED, code, fault, unreadable};
use super::query::filter;
use crate::Result;
use crate::store::numbers::quality::{Alike, QualityFold, Said};
use crate::store::numbers::{
    Dimension, Limit, MAX_LIMIT, Numbers, QualityQuery, QualityRow, Usage, UsageQuery, UsageRow,
};
use crate::store::query::Query;
use crate::store::record::{InferenceId, Norms, Status};

/// What was used. Errors: those of the store; [`crate::Error::Deadline`] at the limit.
pub(super) async fn usage(connection: &Connection, query: &UsageQuery, limit: Limit) -> Result<Numbers<UsageRow>> {
    let max_rows = query.limit.clamp(1, MAX_LIMIT);
    let mut rows = Vec::new();
    each(connection, usage_pipeline(query, max_rows + 1), limit, |found| {
        let group = nested(found, "_id")?;
        let value =
            |dimension: &Dimension| optional_text(group, dimension.as_str()).map(|text| text.map(str::to_string));
        let usage = Usage {
            num_requests: number(found, "num_requests")?,
            num_failed: number(found, "num_failed")?,
            num_inputs: number(found, "num_inputs")?,
            num_cached: number(found, "num_cached")?,
            num_tokens: number(found, "num_tokens")?,
            num_chars: number(found, "num_chars")?,
            inference_us: number(found, "inference_us")?,
        };
        rows.push(UsageRow { group: query.by.iter().map(value).collect::<Result<_>>()?, usage });
        Ok(())
    })
    .await?;
    let is_truncated = rows.len() > max_rows;
    rows.truncate(max_rows);
    Ok(Numbers { rows, is_truncated, num_pending: 0 })
}

/// How well it went. Errors as [`usage`].
pub(super) async fn quality(
    connection: &Connection,
    query: &QualityQuery,
    limit: Limit,
) -> Result<Numbers<QualityRow>> {
    let mut fold = QualityFold::new(query);
    each(connection, quality_pipeline(query), limit, |found| {
        let group = nested(found, "_id")?;
        let num_rows = number(found, "num_rows")?;
        let norms = || -> Result<Norms> {
            let [sum, sum_squares] = ["sum_norms", "sum_squares"].map(|name| float(found, name));
            let [min, max] = ["min_norm", "max_norm"].map(|name| float(found, name));
            Ok(Norms { num: num_rows, sum: sum?, sum_squares: sum_squares?, min: min?, max: max? })
        };
        fold.add(&Alike {
            model: text(group, "model")?,
            version: text(group, "version")?,
            num: number(found, "num")?,
            first: id(found, "first")?,
            status: text(group, "status")?,
            error: optional_text(group, "error")?,
            total_us: optional_number(group, "total_us")?,
            inference_us: optional_number(group, "inference_us")?,
            norms: if num_rows > 0 { Some(norms()?) } else { None },
        });
        Ok(())
    })
    .await?;
    each(connection, feedback_pipeline(query), limit, |found| {
        let group = nested(found, "_id")?;
        let said = Said {
            label: optional_text(group, "label")?,
            num: number(found, "num")?,
            num_scored: number(found, "num_scored")?,
            sum_score: float(found, "sum_score")?,
            num_positive: number(found, "num_positive")?,
            num_negative: number(found, "num_negative")?,
        };
        fold.add_feedback(text(group, "model")?, text(group, "version")?, &said);
        Ok(())
    })
    .await?;
    Ok(fold.finish())
}

/// Runs a pipeline and takes what it finds, one document after another: they are never all in memory.
async fn each(
    connection: &Connection,
    pipeline: Vec<Document>,
    limit: Limit,
    mut take: impl FnMut(&Document) -> Result<()>,
) -> Result<()> {
    limit.check()?;
    let late = |error: DriverError| match code(&error) {
        Some(MAX_TIME_EXPIRED) => limit.error(),
        _ => fault(error),
    };
    // The server gives up with us; a time of zero would be none for it. Groups that do not fit its memory go to its disk.
    let max_time = limit.left().max(std::time::Duration::from_millis(1));
    let aggregate = connection.inferences.aggregate(pipeline).allow_disk_use(true).max_time(max_time);
    limit
        .bound(async {
            let mut cursor = aggregate.await.map_err(late)?;
            while let Some(found) = cursor.try_next().await.map_err(late)? {
                take(&found)?;
            }
            Ok(())
        })
        .await
}

/// One document a group, in the order of its values, a missing user before all others.
fn usage_pipeline(query: &UsageQuery, max_rows: usize) -> Vec<Document> {
    let (model, user) = (query.model.clone(), query.user.clone());
    let wanted = filter(&Query { model, user, from: query.from, to: query.to, ..Query::default() });
    let expression = |dimension: &Dimension| match dimension {
        Dimension::Day => Bson::from(doc! { "$dateToString": { "date": "$created_at", "format": "%Y-%m-%d" } }),
        Dimension::User => or_null("$user"),
        plain => Bson::from(format!("${}", plain.as_str())),
    };
    let group: Document = query.by.iter().map(|by| (by.as_str().to_string(), expression(by))).collect();
    let order: Document = query.by.iter().map(|by| (format!("_id.{}", by.as_str()), Bson::from(1))).collect();
    vec![
        doc! { "$match": wanted },
        doc! { "$group": {
            "_id": group,
            "num_requests": { "$sum": 1 },
            "num_failed": count_of(doc! { "$eq": ["$status", Status::Failed.as_str()] }),
            "num_inputs": { "$sum": "$usage.num_inputs" },
            "num_cached": { "$sum": "$usage.num_cached" },
            "num_tokens": { "$sum": "$usage.num_tokens" },
            "num_chars": { "$sum": "$usage.num_chars" },
            "inference_us": { "$sum": "$timings.inference_us" },
        } },
        doc! { "$sort": order },
        // At most MAX_LIMIT and one.
        doc! { "$limit": max_rows as i64 },
    ]
}

/// The records that quality is asked of: of all versions, since drift is against another one.
fn records_of(query: &QualityQuery) -> Document {
    filter(&Query { model: query.model.clone(), from: query.from, to: query.to, ..Query::default() })
}

/// One document for all records that are [`Alike`].
fn quality_pipeline(query: &QualityQuery) -> Vec<Document> {
    let has_succeeded = doc! { "$eq": ["$status", Status::Succeeded.as_str()] };
    let is_computed = doc! { "$and": [&has_succeeded, { "$lt": ["$usage.num_cached", "$usage.num_inputs"] }] };
    vec![
        doc! { "$match": records_of(query) },
        doc! { "$group": {
            "_id": {
                "model": "$model",
                "version": "$version",
                "status": "$status",
                "error": or_null("$error.kind"),
                "total_us": { "$cond": [&has_succeeded, range_of("$timings.total_us"), Bson::Null] },
                "inference_us": { "$cond": [is_computed, range_of("$timings.inference_us"), Bson::Null] },
            },
            "num": { "$sum": 1 },
            "first": { "$min": "$_id" },
            "num_rows": { "$sum": "$output_norms.num" },
            "sum_norms": { "$sum": "$output_norms.sum" },
            "sum_squares": { "$sum": "$output_norms.sum_squares" },
            "min_norm": { "$min": "$output_norms.min" },
            "max_norm": { "$max": "$output_norms.max" },
        } },
    ]
}

/// One document for all that was said under one label, the most frequent first: those are the ones that are told.
fn feedback_pipeline(query: &QualityQuery) -> Vec<Document> {
    let mut wanted = records_of(query);
    wanted.insert("feedback.0", doc! { "$exists": true });
    let is_scored = doc! { "$isNumber": "$feedback.score" };
    // What is missing is less than any number.
    let is_negative = doc! { "$and": [&is_scored, { "$lt": ["$feedback.score", 0] }] };
    vec![
        doc! { "$match": wanted },
        doc! { "$unwind": "$feedback" },
        doc! { "$group": {
            "_id": { "model": "$model", "version": "$version", "label": or_null("$feedback.label") },
            "num": { "$sum": 1 },
            "num_scored": count_of(is_scored),
            "sum_score": { "$sum": "$feedback.score" },
            "num_positive": count_of(doc! { "$gt": ["$feedback.score", 0] }),
            "num_negative": count_of(is_negative),
        } },
        doc! { "$sort": { "num": -1, "_id.label": 1 } },
    ]
}

/// The lowest value of a duration's range, as `histogram::lowest` has it: what is behind the two leading digits is cut
/// off, by integers alone.
fn range_of(field: &str) -> Document {
    let digits = doc! { "$strLenCP": { "$toString": { "$ifNull": [field, 0] } } };
    doc! { "$trunc": [field, { "$min": [0, { "$subtract": [2, digits] }] }] }
}

fn or_null(field: &str) -> Bson {
    Bson::from(doc! { "$ifNull": [field, Bson::Null] })
}

fn count_of(condition: Document) -> Document {
    doc! { "$sum": { "$cond": [condition, 1, 0] } }
}

fn nested<'a>(of: &'a Document, name: &str) -> Result<&'a Document> {
    of.get_document(name).map_err(|e| unreadable("an answer of a pipeline", e))
}

fn text<'a>(of: &'a Document, name: &str) -> Result<&'a str> {
    of.get_str(name).map_err(|e| unreadable("an answer of a pipeline", e))
}

fn optional_text<'a>(of: &'a Document, name: &str) -> Result<Option<&'a str>> {
    if of.get(name) == Some(&Bson::Null) { Ok(None) } else { text(of, name).map(Some) }
}

/// A sum, which a server writes as whatever number it fits.
fn float(of: &Document, name: &str) -> Result<f64> {
    match of.get(name) {
        Some(Bson::Double(value)) => Ok(*value),
        Some(Bson::Int32(value)) => Ok(f64::from(*value)),
        Some(Bson::Int64(value)) => Ok(*value as f64),
        other => Err(unreadable("an answer of a pipeline", format!("{name} is {other:?}"))),
    }
}

fn number(of: &Document, name: &str) -> Result<u64> {
    let negative = |_| unreadable("an answer of a pipeline", format!("{name} is negative"));
    match of.get(name) {
        Some(Bson::Int32(value)) => u64::try_from(*value).map_err(negative),
        Some(Bson::Int64(value)) => u64::try_from(*value).map_err(negative),
        // Of sums beyond 64 bits, and of servers that count in doubles.
        _ => float(of, name).map(|value| value as u64),
    }
}

fn optional_number(of: &Document, name: &str) -> Result<Option<u64>> {
    if of.get(name) == Some(&Bson::Null) { Ok(None) } else { number(of, name).map(Some) }
}

fn id(of: &Document, name: &str) -> Result<InferenceId> {
    let id = match of.get(name) {
        Some(Bson::Binary(binary)) => uuid::Uuid::from_slice(&binary.bytes).ok(),
        _ => None,
    };
    id.map(InferenceId).ok_or_else(|| unreadable("an answer of a pipeline", format!("{name} is no id")))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn groups_are_in_the_order_that_was_asked_for() {
        let query = UsageQuery {
            model: Some("m".into()),
            user: None,
            from: None,
            to: None,
            by: vec![Dimension::User, Dimension::Day, Dimension::Model],
            limit: 3,
            timeout: Duration::from_secs(1),
        };
        let pipeline = usage_pipeline(&query, 4);
        assert_eq!(pipeline[0], doc! { "$match": { "model": "m" } });
        let group = pipeline[1].get_document("$group").unwrap().get_document("_id").unwrap();
        assert_eq!(group.keys().collect::<Vec<_>>(), ["user", "day", "model"]);
        let order = doc! { "$sort": { "_id.user": 1, "_id.day": 1, "_id.model": 1 } };
        assert_eq!(pipeline[2..], [order, doc! { "$limit": 4_i64 }]);
    }

    #[test]
    fn numbers_are_read_as_a_server_writes_them() {
        let found = doc! { "a": 3, "b": 4_i64, "c": 5.0, "d": -1, "e": "6", "n": Bson::Null };
        assert_eq!(["a", "b", "c"].map(|name| number(&found, name).unwrap()), [3, 4, 5]);
        assert_eq!(float(&found, "a"), Ok(3.0));
        assert!(["d", "e", "n", "absent"].iter().all(|name| number(&found, name).is_err()));
        assert_eq!(optional_number(&found, "n"), Ok(None));
        assert_eq!(optional_text(&found, "e"), Ok(Some("6")));
    }
}
