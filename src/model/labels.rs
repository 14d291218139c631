//! What `config.json` says of a model's head: its task and the names of its scores.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::config::read_json_if_there;
use super::weights::file_error;
use crate::Result;

/// A head as `config.json` describes it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HeadConfig {
    /// Names of the scores, in their order; empty where the file names none.
    pub labels: Vec<String>,
    pub is_multi_label: bool,
    /// The first of the file's `architectures`: "BertForSequenceClassification".
    pub class: Option<String>,
}

#[derive(Deserialize)]
struct RawHead {
    id2label: Option<BTreeMap<String, String>>,
    num_labels: Option<usize>,
    problem_type: Option<String>,
    #[serde(default)]
    architectures: Option<Vec<String>>,
}

impl HeadConfig {
    /// Reads the `config.json` of a folder, if there is one.
    ///
    /// Errors: [`crate::Error::ModelFile`] for a file that cannot be understood, or ids that do not count from 0.
    pub fn read(dir: &Path) -> Result<Self> {
        let file = dir.join("config.json");
        let Some(raw) = read_json_if_there::<RawHead>(file.clone())? else { return Ok(Self::default()) };
        let named = raw.id2label.unwrap_or_default();
        let num_labels = match (named.len(), raw.num_labels) {
            (0, None) => 0,
            (0, Some(num_labels)) => num_labels,
            (num_labels, _) => num_labels,
        };
        let label = |i: usize| match (named.get(&i.to_string()), named.is_empty()) {
            (Some(label), _) => Ok(label.clone()),
            (None, true) => Ok(format!("LABEL_{i}")),
            (None, false) => {
                Err(file_error(&file, format!("`id2label` has {} labels and none of id {i}", named.len())))
            }
        };
        Ok(Self {
            labels: (0..num_labels).map(label).collect::<Result<_>>()?,
            is_multi_label: raw.problem_type.as_deref() == Some("multi_label_classification"),
            class: raw.architectures.unwrap_or_default().into_iter().next(),
        })
    }

    /// The task that the model's class was made for; `None` where it is no head of ours, and the encoder is what counts.
    pub fn task(&self) -> Option<&'static str> {
        let class = self.class.as_deref()?;
        if class.ends_with("ForSequenceClassification") {
            return Some(if self.labels.len() == 1 { "rerank" } else { "classify" });
        }
        if class.ends_with("ForImageClassification") {
            return Some("classify");
        }
        class.ends_with("ForTokenClassification").then_some("token_classify")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<HeadConfig> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), json).unwrap();
        HeadConfig::read(dir.path())
    }

    #[test]
    fn labels_are_in_the_order_of_their_ids() {
        let many: BTreeMap<String, String> = (0..12).map(|i| (i.to_string(), format!("l{i}"))).collect();
        let head =
            read(&serde_json::json!({"id2label": many, "architectures": ["BertForTokenClassification"]}).to_string());
        let head = head.unwrap();
        assert_eq!(head.labels[9..], ["l9", "l10", "l11"]);
        assert_eq!(head.task(), Some("token_classify"));
    }

    #[test]
    fn what_is_not_named_is_counted() {
        let head = read(r#"{"num_labels": 2, "problem_type": "multi_label_classification"}"#).unwrap();
        assert_eq!((head.labels, head.is_multi_label), (vec!["LABEL_0".to_string(), "LABEL_1".to_string()], true));
        assert_eq!(read("{}").unwrap(), HeadConfig::default());
        assert!(read(r#"{"id2label": {"1": "a"}}"#).unwrap_err().to_string().contains("none of id 0"));
    }

    #[test]
    fn one_score_is_for_ranking() {
        let class = |labels: &str| {
            read(&format!(r#"{{"architectures": ["XForSequenceClassification"], "id2label": {labels}}}"#))
        };
        assert_eq!(class(r#"{"0": "LABEL_0"}"#).unwrap().task(), Some("rerank"));
        assert_eq!(class(r#"{"0": "no", "1": "yes"}"#).unwrap().task(), Some("classify"));
        assert_eq!(read(r#"{"architectures": ["BertModel"]}"#).unwrap().task(), None);
    }
}
