//! Rows of quality out of records, or of groups of records, and out of what was said of them.

use std::collections::BTreeMap;

use super::histogram::Histogram;
use super::{
    Drift, FeedbackSummary, Lowest, MAX_VERSIONS, MAX_WORDS, NormsSummary, Numbers, Observed, QualityQuery, QualityRow,
    Words, range,
};
use crate::store::record::{Feedback, InferenceId, Norms, Status};

/// Words that are counted apart; what comes when there are so many counts as another one. Clients choose labels, and may
/// choose one for each result.
const MAX_COUNTED: usize = 10_000;

/// Records of one version that are alike in all that is told apart here: one, or as many as a store has put together.
#[derive(Debug, Clone, Copy)]
pub struct Alike<'a> {
    pub model: &'a str,
    pub version: &'a str,
    pub num: u64,
    /// The first of them.
    pub first: InferenceId,
    pub status: &'a str,
    pub error: Option<&'a str>,
    /// The time that counts, or its range in the [`Histogram`]; `None` where none does.
    pub total_us: Option<u64>,
    pub inference_us: Option<u64>,
    /// Of all of them.
    pub norms: Option<Norms>,
}

impl<'a> From<&Observed<'a>> for Alike<'a> {
    fn from(one: &Observed<'a>) -> Self {
        let has_succeeded = one.status == Status::Succeeded.as_str();
        let is_computed = has_succeeded && one.usage.num_cached < one.usage.num_inputs;
        Self {
            model: one.model,
            version: one.version,
            num: 1,
            first: one.id,
            status: one.status,
            error: one.error,
            total_us: has_succeeded.then_some(one.timings.total_us),
            inference_us: is_computed.then_some(one.timings.inference_us),
            norms: one.norms,
        }
    }
}

/// What was said of results of one version, under one label or none.
#[derive(Debug, Clone, Copy)]
pub struct Said<'a> {
    pub label: Option<&'a str>,
    pub num: u64,
    pub num_scored: u64,
    pub sum_score: f64,
    pub num_positive: u64,
    pub num_negative: u64,
}

impl<'a> Said<'a> {
    /// By somebody once.
    pub fn once(score: Option<f64>, label: Option<&'a str>) -> Self {
        let is = |condition: fn(f64) -> bool| u64::from(score.is_some_and(condition));
        Self {
            label,
            num: 1,
            num_scored: u64::from(score.is_some()),
            sum_score: score.unwrap_or(0.0),
            num_positive: is(|score| score > 0.0),
            num_negative: is(|score| score < 0.0),
        }
    }
}

impl<'a> From<&'a Feedback> for Said<'a> {
    fn from(feedback: &'a Feedback) -> Self {
        Self::once(feedback.score, feedback.label.as_deref())
    }
}

/// Adds records up by model and version.
pub struct QualityFold<'a> {
    query: &'a QualityQuery,
    span: (InferenceId, InferenceId),
    versions: Lowest<(String, String), Version>,
    /// The one at hand, used again for each record.
    key: (String, String),
}

#[derive(Debug, Default)]
struct Version {
    first: Option<InferenceId>,
    num: u64,
    num_succeeded: u64,
    num_failed: u64,
    errors: Counted,
    total: Histogram,
    inference: Histogram,
    norms: Option<Norms>,
    feedback: FeedbackSummary,
    sum_score: f64,
    labels: Counted,
}

impl<'a> QualityFold<'a> {
    /// What a store must hand in are all versions of the model that is asked for, if one is: the version is chosen at the
    /// end, since the one before it is needed too.
    pub fn new(query: &'a QualityQuery) -> Self {
        Self { query, span: range(query.from, query.to), versions: Lowest::new(MAX_VERSIONS), key: Default::default() }
    }

    /// Counts a record, if it is asked for. Returns whether it is.
    pub fn add_one(&mut self, one: &Observed) -> bool {
        let is_wanted = one.is_of(self.query.model.as_deref(), self.span);
        if is_wanted {
            self.add(&one.into());
        }
        is_wanted
    }

    /// Counts records that are asked for.
    pub fn add(&mut self, alike: &Alike) {
        let Some(version) = self.version(alike.model, alike.version) else { return };
        version.first = version.first.into_iter().chain([alike.first]).min();
        version.num += alike.num;
        if alike.status == Status::Succeeded.as_str() {
            version.num_succeeded += alike.num;
        } else if alike.status == Status::Failed.as_str() {
            version.num_failed += alike.num;
        }
        if let Some(kind) = alike.error {
            version.errors.add(kind, alike.num);
        }
        if let Some(us) = alike.total_us {
            version.total.add(us, alike.num);
        }
        if let Some(us) = alike.inference_us {
            version.inference.add(us, alike.num);
        }
        version.norms = version.norms.into_iter().chain(alike.norms).reduce(Norms::and);
    }

    /// Counts what was said of records that are asked for, and that were handed in before.
    pub fn add_feedback(&mut self, model: &str, version: &str, said: &Said) {
        let Some(version) = self.version(model, version) else { return };
        let feedback = &mut version.feedback;
        feedback.num += said.num;
        feedback.num_scored += said.num_scored;
        feedback.num_positive += said.num_positive;
        feedback.num_negative += said.num_negative;
        version.sum_score += said.sum_score;
        if let Some(label) = said.label {
            version.labels.add(label, said.num);
        }
    }

    fn version(&mut self, model: &str, version: &str) -> Option<&mut Version> {
        for (text, value) in [(&mut self.key.0, model), (&mut self.key.1, version)] {
            text.clear();
            text.push_str(value);
        }
        self.versions.get(&self.key)
    }

    /// All versions that are asked for: by model, and those of a model in the order of their first use.
    pub fn finish(self) -> Numbers<QualityRow> {
        let Lowest { values, is_truncated, .. } = self.versions;
        // Records came first, and each has an id: only what was said of a record that was added in between has none.
        let known =
            values.into_iter().filter_map(|((model, name), version)| Some((model, version.first?, name, version)));
        let mut known: Vec<_> = known.collect();
        known.sort_by(|a, b| (&a.0, a.1).cmp(&(&b.0, b.1)));
        let mut rows: Vec<QualityRow> = Vec::with_capacity(known.len());
        for (model, first, name, version) in known {
            let mut row = row(model, name, first, version);
            let before = rows.iter().rev().take_while(|before| before.model == row.model);
            let before = before.filter_map(|before| Some((&before.version, before.norms.as_ref()?.mean))).next();
            if let (Some(norms), Some((version, mean))) = (&mut row.norms, before) {
                norms.drift = Some(Drift { previous_version: version.clone(), mean_change: norms.mean - mean });
            }
            rows.push(row);
        }
        rows.retain(|row| self.query.version.as_ref().is_none_or(|version| *version == row.version));
        Numbers { rows, is_truncated, num_pending: 0 }
    }
}

fn summary(norms: &Norms) -> NormsSummary {
    let num = norms.num as f64;
    let mean = norms.sum / num;
    // Rounding can leave it a little below zero.
    let variance = (norms.sum_squares / num - mean * mean).max(0.0);
    NormsSummary { num_rows: norms.num, mean, std: variance.sqrt(), min: norms.min, max: norms.max, drift: None }
}

/// Without drift, which takes another row.
fn row(model: String, name: String, first: InferenceId, version: Version) -> QualityRow {
    let feedback = version.feedback;
    let mean_score = (feedback.num_scored > 0).then(|| version.sum_score / feedback.num_scored as f64);
    QualityRow {
        model,
        version: name,
        first_used: first.created_at(),
        num_requests: version.num,
        num_succeeded: version.num_succeeded,
        num_failed: version.num_failed,
        errors: version.errors.words(),
        total: version.total.latency(),
        inference: version.inference.latency(),
        feedback: FeedbackSummary { mean_score, labels: version.labels.words(), ..feedback },
        norms: version.norms.as_ref().map(summary),
    }
}

/// Words counted, in bounded memory.
#[derive(Debug, Default)]
struct Counted {
    counts: BTreeMap<String, u64>,
    num_other: u64,
}

impl Counted {
    fn add(&mut self, word: &str, num: u64) {
        if let Some(count) = self.counts.get_mut(word) {
            *count += num;
        } else if self.counts.len() < MAX_COUNTED {
            self.counts.insert(word.to_string(), num);
        } else {
            self.num_other += num;
        }
    }

    fn words(self) -> Words {
        let mut top: Vec<(String, u64)> = self.counts.into_iter().collect();
        // Stable: equals stay in the order of their bytes.
        top.sort_by_key(|(_, num)| std::cmp::Reverse(*num));
        let rest = top.split_off(top.len().min(MAX_WORDS));
        Words { top, num_other: self.num_other + rest.iter().map(|(_, num)| num).sum::<u64>() }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn query(version: Option<&str>) -> QualityQuery {
        let version = version.map(str::to_string);
        QualityQuery { model: None, version, from: None, to: None, timeout: Duration::from_secs(1) }
    }

    fn alike<'a>(model: &'a str, version: &'a str, norm: Option<f64>) -> Alike<'a> {
        let norms = norm.map(|norm| Norms { num: 1, sum: norm, sum_squares: norm * norm, min: norm, max: norm });
        Alike {
            model,
            version,
            num: 2,
            first: InferenceId::new(),
            status: "succeeded",
            error: None,
            total_us: Some(10),
            inference_us: None,
            norms,
        }
    }

    #[test]
    fn drift_is_against_the_version_used_before_of_the_same_model() {
        // Version 9 is older than 10, which no order of words says; one without norms is passed over.
        let used = [("a", "9", Some(2.0)), ("b", "1", Some(7.0)), ("a", "x", None), ("a", "10", Some(2.5))];
        let alike = used.map(|(model, version, norm)| alike(model, version, norm));
        let rows = |asked: Option<&str>| {
            let query = query(asked);
            let mut fold = QualityFold::new(&query);
            // As a store groups them: in any order.
            alike.iter().rev().for_each(|alike| fold.add(alike));
            fold.finish().rows
        };
        let all = rows(None);
        let versions: Vec<(&str, &str)> = all.iter().map(|row| (&*row.model, &*row.version)).collect();
        assert_eq!(versions, [("a", "9"), ("a", "x"), ("a", "10"), ("b", "1")]);
        let drifts: Vec<_> = all.iter().map(|row| row.norms.as_ref().and_then(|norms| norms.drift.clone())).collect();
        let drift = Drift { previous_version: "9".to_string(), mean_change: 0.5 };
        assert_eq!(drifts, [None, None, Some(drift), None]);
        assert_eq!(rows(Some("10")), [all[2].clone()], "asked for alone it is told the same");
    }

    #[test]
    fn the_most_frequent_words_are_told_and_the_rest_summed() {
        let mut counted = Counted::default();
        for i in 0..MAX_COUNTED + 5 {
            counted.add(&format!("{i:05}"), 1);
        }
        counted.add("00007", 3);
        let words = counted.words();
        assert_eq!((words.top.len(), &words.top[..2]), (20, &[("00007".to_string(), 4), ("00000".to_string(), 1)][..]));
        assert_eq!(words.num_other, (MAX_COUNTED + 5 + 3 - 4 - 19) as u64);
    }

    #[test]
    fn equal_norms_have_no_deviation() {
        let many = Norms { num: 3, sum: 3.0 * 0.1, sum_squares: 3.0 * 0.1 * 0.1 - 1e-18, min: 0.1, max: 0.1 };
        let told = summary(&many);
        assert!(told.std < 1e-7 && (told.mean - 0.1).abs() < 1e-15, "{told:?}");
    }
}
