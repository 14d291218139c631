//! Usage and quality: every store gives the numbers that are counted here by hand, on records made at random.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use eremois::Error;
use eremois::store::Records;
use eremois::store::numbers::{
    Dimension, Drift, FeedbackSummary, Latency, NormsSummary, Numbers, QualityQuery, QualityRow, Quantiles, Usage,
    UsageQuery, UsageRow, Words,
};
use eremois::store::record::{Failure, Feedback, Norms, Record, Status, StoredUsage, Timings};
use jiff::Timestamp;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use crate::samples::{queued, record_at, said};

type Store = Arc<dyn Records>;

/// 2026-11-20T00:00:00Z.
const BEGIN_MS: i64 = 1_795_132_800_000;
const DAY_MS: i64 = 86_400_000;
const NUM_DAYS: i64 = 5;

const MODELS: [&str; 3] = ["m1", "m2", "'; DROP TABLE inferences; --"];
/// In the order of their first use, which is not that of their names.
const VERSIONS: [&str; 4] = ["9", "10", "2-x", ""];
const USERS: [Option<&str>; 5] = [None, Some(""), Some("u1"), Some("ü ∑ \u{0}"), Some("U1")];

/// Long enough for any of these answers.
const LONG: Duration = Duration::from_secs(60);

fn usage_query(by: &[Dimension]) -> UsageQuery {
    UsageQuery { model: None, user: None, from: None, to: None, by: by.to_vec(), limit: 10_000, timeout: LONG }
}

fn all_quality() -> QualityQuery {
    QualityQuery { model: None, version: None, from: None, to: None, timeout: LONG }
}

/// One record in everything that numbers are made of at random.
fn random(rng: &mut StdRng, number: u64) -> Record {
    // The last version's time is the last day; before it they overlap.
    let day = rng.random_range(0..NUM_DAYS);
    let version = VERSIONS[(day as usize).saturating_sub(rng.random_range(0..2)).min(3)];
    let mut record = record_at(BEGIN_MS + day * DAY_MS + rng.random_range(0..DAY_MS), number);
    let facts = &mut record.facts;
    facts.model = MODELS.choose(rng).unwrap().to_string();
    facts.version = version.to_string();
    facts.user = USERS.choose(rng).unwrap().map(str::to_string);
    facts.source = ["application", "openai", "tei"].choose(rng).unwrap().to_string();
    let num_inputs = rng.random_range(1..5);
    facts.usage = StoredUsage {
        num_tokens: rng.random_range(0..5000),
        num_chars: rng.random_range(0..20_000),
        num_inputs,
        num_cached: rng.random_range(0..=num_inputs),
    };
    // Microseconds of every magnitude.
    let mut us = || 10f64.powf(rng.random_range(0.0..8.0)) as u64;
    facts.timings = Timings { tokenize_us: 1, queue_us: 2, inference_us: us(), total_us: us() };
    facts.status = match rng.random_range(0..12) {
        0..7 => Status::Succeeded,
        7..9 => Status::Failed,
        9 => Status::Cancelled,
        10 => Status::Running,
        _ => Status::Queued,
    };
    match facts.status {
        Status::Succeeded if rng.random_bool(0.9) => {
            let num = rng.random_range(1..4);
            let rows: Vec<Vec<f32>> = (0..num).map(|_| (0..9).map(|_| rng.random_range(-1.0..1.0)).collect()).collect();
            facts.output_norms = Norms::of(&rows);
        }
        Status::Failed => {
            let kind = ["failed", "deadline", "internal"].choose(rng).unwrap().to_string();
            facts.error = Some(Failure { kind, status: 500, message: "it failed".into(), field: None });
        }
        _ => {}
    }
    let num_said = [0, 0, 0, 1, 3].choose(rng).unwrap();
    facts.feedback = (0..*num_said).map(|i| feedback(rng, i)).collect();
    record
}

fn feedback(rng: &mut StdRng, ms: i64) -> Feedback {
    let score = [None, Some(0.0), Some(-1.0), Some(rng.random_range(-1.0..1.0))].choose(rng).copied().unwrap();
    // More labels than are told one by one, some often and most seldom.
    let label = rng.random_bool(0.8).then(|| format!("label {}", (rng.random_range(0f64..6.0)).exp() as u64 % 50));
    said(ms, score, label.as_deref(), None)
}

fn randoms(seed: u64, num: u64) -> Vec<Record> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..num).map(|number| random(&mut rng, number)).collect()
}

// ---- by hand ---------------------------------------------------------------------------------------------------

fn is_wanted(record: &Record, model: &Option<String>, from: Option<Timestamp>, to: Option<Timestamp>) -> bool {
    let created = record.id.created_at();
    model.as_ref().is_none_or(|model| *model == record.facts.model)
        && from.is_none_or(|from| created >= from)
        && to.is_none_or(|to| created < to)
}

fn usage_by_hand(records: &[Record], query: &UsageQuery) -> Vec<UsageRow> {
    let mut groups: BTreeMap<Vec<Option<String>>, Usage> = BTreeMap::new();
    for record in records {
        let facts = &record.facts;
        let is_theirs = query.user.is_none() || query.user == facts.user;
        if !is_theirs || !is_wanted(record, &query.model, query.from, query.to) {
            continue;
        }
        let value = |by: &Dimension| match by {
            Dimension::Model => Some(facts.model.clone()),
            Dimension::Version => Some(facts.version.clone()),
            Dimension::User => facts.user.clone(),
            Dimension::Day => Some(record.id.created_at().to_string()[..10].to_string()),
            Dimension::Source => Some(facts.source.clone()),
            Dimension::Status => Some(facts.status.as_str().to_string()),
        };
        let sum = groups.entry(query.by.iter().map(value).collect()).or_default();
        sum.num_requests += 1;
        sum.num_failed += u64::from(facts.status == Status::Failed);
        sum.num_inputs += facts.usage.num_inputs;
        sum.num_cached += facts.usage.num_cached;
        sum.num_tokens += facts.usage.num_tokens;
        sum.num_chars += facts.usage.num_chars;
        sum.inference_us += facts.timings.inference_us;
    }
    groups.into_iter().map(|(group, usage)| UsageRow { group, usage }).collect()
}

/// The smallest value that so many percent do not exceed, exactly.
fn quantile(values: &[u64], percent: usize) -> u64 {
    values[(values.len() * percent).div_ceil(100) - 1]
}

fn latency_by_hand(mut values: Vec<u64>) -> Latency {
    values.sort();
    let quantiles = (!values.is_empty()).then(|| Quantiles {
        p50_us: quantile(&values, 50),
        p90_us: quantile(&values, 90),
        p99_us: quantile(&values, 99),
    });
    Latency { num: values.len() as u64, quantiles }
}

fn words_by_hand<'a>(words: impl Iterator<Item = &'a str>) -> Words {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    words.for_each(|word| *counts.entry(word).or_default() += 1);
    let mut all: Vec<(String, u64)> = counts.into_iter().map(|(word, num)| (word.to_string(), num)).collect();
    all.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
    let rest = all.split_off(all.len().min(20));
    Words { top: all, num_other: rest.iter().map(|(_, num)| num).sum() }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn quality_by_hand(records: &[Record], query: &QualityQuery) -> Vec<QualityRow> {
    let mut sorted: Vec<&Record> =
        records.iter().filter(|record| is_wanted(record, &query.model, query.from, query.to)).collect();
    sorted.sort_by_key(|record| record.id);
    let mut versions: Vec<(&str, &str)> = Vec::new();
    for record in &sorted {
        let of = (&*record.facts.model, &*record.facts.version);
        if !versions.contains(&of) {
            versions.push(of);
        }
    }
    versions.sort_by_key(|(model, _)| *model); // stable: a model's versions stay in the order of their use
    let mut rows: Vec<QualityRow> = Vec::new();
    for (model, version) in versions {
        let of: Vec<&Record> = sorted
            .iter()
            .copied()
            .filter(|record| record.facts.model == model && record.facts.version == version)
            .collect();
        let with = |status| of.iter().filter(move |record| record.facts.status == status);
        let is_computed = |record: &&&Record| record.facts.usage.num_cached < record.facts.usage.num_inputs;
        let said: Vec<&Feedback> = of.iter().flat_map(|record| &record.facts.feedback).collect();
        let scores: Vec<f64> = said.iter().filter_map(|said| said.score).collect();
        let norms: Vec<Norms> = of.iter().filter_map(|record| record.facts.output_norms).collect();
        let previous = rows.iter().rev().find(|row| row.model == model && row.norms.is_some());
        rows.push(QualityRow {
            model: model.to_string(),
            version: version.to_string(),
            first_used: of[0].id.created_at(),
            num_requests: of.len() as u64,
            num_succeeded: with(Status::Succeeded).count() as u64,
            num_failed: with(Status::Failed).count() as u64,
            errors: words_by_hand(of.iter().filter_map(|record| Some(&*record.facts.error.as_ref()?.kind))),
            total: latency_by_hand(with(Status::Succeeded).map(|record| record.facts.timings.total_us).collect()),
            inference: latency_by_hand(
                with(Status::Succeeded).filter(is_computed).map(|record| record.facts.timings.inference_us).collect(),
            ),
            feedback: FeedbackSummary {
                num: said.len() as u64,
                num_scored: scores.len() as u64,
                num_positive: scores.iter().filter(|score| **score > 0.0).count() as u64,
                num_negative: scores.iter().filter(|score| **score < 0.0).count() as u64,
                mean_score: (!scores.is_empty()).then(|| mean(&scores)),
                labels: words_by_hand(said.iter().filter_map(|said| said.label.as_deref())),
            },
            norms: (!norms.is_empty()).then(|| {
                let num_rows: u64 = norms.iter().map(|norms| norms.num).sum();
                let mean = norms.iter().map(|norms| norms.sum).sum::<f64>() / num_rows as f64;
                let square = norms.iter().map(|norms| norms.sum_squares).sum::<f64>() / num_rows as f64;
                let before = previous.and_then(|row| Some((row.version.clone(), row.norms.as_ref()?.mean)));
                let drift = |(previous_version, before)| Drift { previous_version, mean_change: mean - before };
                NormsSummary {
                    num_rows,
                    mean,
                    std: (square - mean * mean).sqrt(),
                    min: norms.iter().map(|norms| norms.min).fold(f64::INFINITY, f64::min),
                    max: norms.iter().map(|norms| norms.max).fold(0.0, f64::max),
                    drift: before.map(drift),
                }
            }),
        });
    }
    rows.retain(|row| query.version.as_ref().is_none_or(|version| *version == row.version));
    rows
}

/// Equal, but for the order in which a store sums up.
fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * a.abs().max(1.0)
}

/// Durations within 5 % of the exact ones, floats near, all else equal.
fn assert_same(told: &[QualityRow], exact: &[QualityRow]) {
    assert_eq!(told.len(), exact.len(), "{told:#?}");
    for (told, exact) in told.iter().zip(exact) {
        let context = format!("told {told:#?}\nexact {exact:#?}");
        for (told, exact) in [(&told.total, &exact.total), (&told.inference, &exact.inference)] {
            let all = |latency: &Latency| latency.quantiles.map(|q| [q.p50_us, q.p90_us, q.p99_us]);
            assert_eq!((told.num, told.quantiles.is_some()), (exact.num, exact.quantiles.is_some()), "{context}");
            for (told, exact) in all(told).into_iter().flatten().zip(all(exact).into_iter().flatten()) {
                assert!(told.abs_diff(exact) as f64 <= 0.05 * exact as f64, "{told} for {exact} in {context}");
            }
        }
        match (told.feedback.mean_score, exact.feedback.mean_score) {
            (Some(told), Some(exact)) => assert!(near(told, exact), "{context}"),
            (told, exact) => assert_eq!(told, exact, "{context}"),
        }
        if let (Some(told), Some(exact)) = (&told.norms, &exact.norms) {
            let floats = |norms: &NormsSummary| [norms.mean, norms.std, norms.min, norms.max];
            assert!(floats(told).iter().zip(floats(exact)).all(|(told, exact)| near(*told, exact)), "{context}");
            let change = |norms: &NormsSummary| norms.drift.as_ref().map_or(0.0, |drift| drift.mean_change);
            assert!(near(change(told), change(exact)), "{context}");
        }
        // What was compared is taken from the exact one, so that all the rest must be equal.
        let mut told = told.clone();
        (told.total, told.inference) = (exact.total, exact.inference);
        told.feedback.mean_score = exact.feedback.mean_score;
        if let (Some(told), Some(exact)) = (&mut told.norms, &exact.norms) {
            (told.mean, told.std, told.min, told.max) = (exact.mean, exact.std, exact.min, exact.max);
            if let (Some(told), Some(exact)) = (&mut told.drift, &exact.drift) {
                told.mean_change = exact.mean_change;
            }
        }
        assert_eq!(told, *exact, "{context}");
    }
}

// ---- the contract ----------------------------------------------------------------------------------------------

pub async fn usage_adds_up(store: Store) {
    let records = randoms(1, 400);
    store.put(&records).await.unwrap();
    let at = |day: i64| Some(Timestamp::from_millisecond(BEGIN_MS + day * DAY_MS).unwrap());
    let mut num_rows = 0;
    // Every set of dimensions, in an order that is not always the same.
    for mask in 1..1 << Dimension::ALL.len() {
        let mut by: Vec<Dimension> =
            Dimension::ALL.into_iter().enumerate().filter(|(bit, _)| mask >> bit & 1 == 1).map(|(_, by)| by).collect();
        let turn = mask % by.len();
        by.rotate_left(turn);
        let query = usage_query(&by);
        let told = store.usage(&query).await.unwrap();
        assert_eq!(told.rows, usage_by_hand(&records, &query), "{by:?}");
        assert_eq!((told.is_truncated, told.num_pending), (false, 0));
        num_rows += told.rows.len();
    }
    assert!(num_rows > 3000, "too few groups to tell a store's order from another: {num_rows}");
    let base = usage_query(&[Dimension::Model, Dimension::Day]);
    for query in [
        UsageQuery { model: Some(MODELS[2].to_string()), ..base.clone() },
        UsageQuery { model: Some("nobody".to_string()), ..base.clone() },
        UsageQuery { user: Some(String::new()), ..base.clone() },
        UsageQuery { user: Some("u1".to_string()), model: Some("m1".to_string()), ..base.clone() },
        UsageQuery { from: at(2), ..base.clone() },
        UsageQuery { to: at(2), ..base.clone() },
        UsageQuery { from: at(1), to: at(3), user: Some("U1".to_string()), ..base.clone() },
        UsageQuery { from: at(3), to: at(3), ..base.clone() },
    ] {
        assert_eq!(store.usage(&query).await.unwrap().rows, usage_by_hand(&records, &query), "{query:?}");
    }
}

pub async fn usage_is_told_up_to_a_limit(store: Store) {
    let records = randoms(2, 60);
    store.put(&records).await.unwrap();
    let all = usage_by_hand(&records, &usage_query(&[Dimension::User, Dimension::Day]));
    assert!(all.len() > 15, "{}", all.len());
    for limit in [1, 2, all.len() - 1, all.len(), all.len() + 1] {
        let query = UsageQuery { limit, ..usage_query(&[Dimension::User, Dimension::Day]) };
        let told = store.usage(&query).await.unwrap();
        // The rows that are told are whole, wherever their records lie.
        assert_eq!(told.rows, all[..limit.min(all.len())], "{limit}");
        assert_eq!(told.is_truncated, limit < all.len(), "{limit}");
    }
}

pub async fn quality_is_that_of_each_version(store: Store) {
    let mut records = randoms(3, 500);
    // One that has never ended, of a version of its own; and norms of 1, whose deviation is rounding.
    let mut lonely = queued();
    lonely.facts.model = "m3".to_string();
    records.push(lonely);
    for number in 0..20 {
        let mut normalised = record_at(BEGIN_MS + number as i64, 1000 + number);
        normalised.facts.model = "m4".to_string();
        normalised.facts.output_norms = Some(Norms { num: 1, sum: 1.0, sum_squares: 1.0, min: 1.0, max: 1.0 });
        records.push(normalised);
    }
    store.put(&records).await.unwrap();
    let at = |day: i64| Some(Timestamp::from_millisecond(BEGIN_MS + day * DAY_MS).unwrap());
    let told = store.quality(&all_quality()).await.unwrap();
    assert_same(&told.rows, &quality_by_hand(&records, &all_quality()));
    assert!(told.rows.len() > 12 && !told.is_truncated, "{}", told.rows.len());
    assert!(told.rows.iter().any(|row| row.feedback.labels.num_other > 0), "too few labels to leave any out");
    assert!(told.rows.iter().filter(|row| row.norms.as_ref().is_some_and(|n| n.drift.is_some())).count() > 5);
    let normalised = told.rows.last().unwrap().norms.clone().unwrap();
    assert_eq!((normalised.mean, normalised.std, normalised.drift), (1.0, 0.0, None));
    for query in [
        QualityQuery { model: Some("m1".to_string()), ..all_quality() },
        QualityQuery { model: Some("m1".to_string()), version: Some("10".to_string()), ..all_quality() },
        QualityQuery { version: Some("2-x".to_string()), ..all_quality() },
        QualityQuery { version: Some("nobody's".to_string()), ..all_quality() },
        QualityQuery { from: at(2), ..all_quality() },
        QualityQuery { from: at(1), to: at(2), model: Some(MODELS[2].to_string()), ..all_quality() },
        QualityQuery { from: at(9), to: at(10), ..all_quality() },
    ] {
        let told = store.quality(&query).await.unwrap();
        assert_same(&told.rows, &quality_by_hand(&records, &query));
    }
}

/// What is replaced, said later, deleted and erased counts as it is afterwards.
pub async fn numbers_follow_the_records(store: Store) {
    let mut records = randoms(4, 80);
    store.put(&records).await.unwrap();
    let mut rng = StdRng::seed_from_u64(5);
    for i in 0..40 {
        match i % 4 {
            0 => {
                let id = records.swap_remove(i).id;
                assert_eq!(store.delete(&id).await, Ok(true));
            }
            1 => {
                let saying = feedback(&mut rng, 100 + i as i64);
                assert_eq!(store.add_feedback(&records[i].id, &saying).await, Ok(true));
                records[i].facts.feedback.push(saying);
            }
            _ => {
                // A later state of the same record, final: it takes the place of the first.
                let mut later = random(&mut rng, 0);
                later.id = records[i].id;
                later.facts.status = Status::Succeeded;
                later.facts.feedback = records[i].facts.feedback.clone();
                store.put(std::slice::from_ref(&later)).await.unwrap();
                records[i] = later;
            }
        }
    }
    while !store.erase_user("u1", 10).await.unwrap().is_empty() {}
    records.retain(|record| record.facts.user.as_deref() != Some("u1"));
    let query = usage_query(&Dimension::ALL);
    assert_eq!(store.usage(&query).await.unwrap().rows, usage_by_hand(&records, &query));
    assert_same(&store.quality(&all_quality()).await.unwrap().rows, &quality_by_hand(&records, &all_quality()));
}

pub async fn an_empty_store_has_no_numbers(store: Store) {
    let none = store.usage(&usage_query(&[Dimension::Model])).await;
    assert_eq!(none, Ok(Numbers { rows: vec![], is_truncated: false, num_pending: 0 }));
    assert_eq!(store.quality(&all_quality()).await.unwrap().rows, []);
}

pub async fn numbers_end_in_time(store: Store) {
    store.put(&randoms(6, 20)).await.unwrap();
    let timeout = Duration::ZERO;
    let usage = store.usage(&UsageQuery { timeout, ..usage_query(&[Dimension::Model]) }).await;
    assert_eq!(usage, Err(Error::Deadline { timeout }));
    let quality = store.quality(&QualityQuery { timeout, ..all_quality() }).await;
    assert_eq!(quality, Err(Error::Deadline { timeout }));
}
