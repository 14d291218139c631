//! What `config.json` says of a model's head: its task and the names of its scores.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::config::{lookup_activation, read_json_if_there};
use super::pack::Pooling;
use super::weights::file_error;
use crate::Result;
use crate::ops::linear::Activation;

/// A head as `config.json` describes it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HeadConfig {
    /// Names of the scores, in their order; empty where the file names none.
    pub labels: Vec<String>,
    pub is_multi_label: bool,
    /// The first of the file's `architectures`: "BertForSequenceClassification".
    pub class: Option<String>,
    /// `classifier_pooling`: ModernBERT's, from tokens' vectors to the one that is classified.
    pub classifier_pooling: Option<String>,
    /// `classifier_activation`, ModernBERT's, or DeBERTa's `pooler_hidden_act`.
    pub classifier_activation: Option<String>,
    /// `classifier_bias`, `norm_bias` and `decoder_bias`: whether ModernBERT's head has them.
    pub dense_bias: Option<bool>,
    pub norm_bias: Option<bool>,
    pub decoder_bias: Option<bool>,
    /// Decoders classify at the last token that is not this one.
    pub pad_id: Option<u32>,
}

#[derive(Deserialize)]
struct RawHead {
    id2label: Option<BTreeMap<String, String>>,
    num_labels: Option<usize>,
    problem_type: Option<String>,
    #[serde(default)]
    architectures: Option<Vec<String>>,
    classifier_pooling: Option<String>,
    classifier_activation: Option<String>,
    pooler_hidden_act: Option<String>,
    classifier_bias: Option<bool>,
    norm_bias: Option<bool>,
    decoder_bias: Option<bool>,
    /// -1 in some files that mean none.
    pad_token_id: Option<i64>,
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
            classifier_pooling: raw.classifier_pooling,
            classifier_activation: raw.classifier_activation.or(raw.pooler_hidden_act),
            dense_bias: raw.classifier_bias,
            norm_bias: raw.norm_bias,
            decoder_bias: raw.decoder_bias,
            pad_id: raw.pad_token_id.and_then(|id| u32::try_from(id).ok()),
        })
    }

    /// The vector that is classified; the first token's where the file says nothing. `file` names it in errors.
    ///
    /// Errors: [`crate::Error::ModelFile`] for one that is not supported; also below.
    pub fn pooling(&self, file: &Path) -> Result<Pooling> {
        match self.classifier_pooling.as_deref() {
            None | Some("cls") => Ok(Pooling::Cls),
            Some("mean") => Ok(Pooling::Mean),
            Some(other) => {
                let reason = format!("`classifier_pooling` `{other}` is not supported; supported: cls, mean");
                Err(file_error(file, reason))
            }
        }
    }

    /// What follows the product before the scores; GELU where the file says nothing.
    pub fn activation(&self, file: &Path) -> Result<Activation> {
        self.classifier_activation.as_deref().map_or(Ok(Activation::Gelu), |name| lookup_activation(name, file))
    }

    /// Whether the model was made to go on with a text.
    pub fn is_causal(&self) -> bool {
        self.class.as_deref().is_some_and(|class| class.ends_with("ForCausalLM"))
    }

    /// The task that the model's class was made for; `None` where it is no head of ours, and the encoder is what counts.
    pub fn task(&self) -> Option<&'static str> {
        let class = self.class.as_deref()?;
        if class.ends_with("ForSequenceClassification") {
            return Some(if self.labels.len() == 1 { "rerank" } else { "classify" });
        }
        let ours = [
            ("ForTokenClassification", "token_classify"),
            ("ForMaskedLM", "fill_mask"),
            ("ForImageClassification", "classify"),
        ];
        ours.iter().find(|(ending, _)| class.ends_with(ending)).map(|(_, task)| *task)
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
        assert_eq!(read(r#"{"architectures": ["AlbertForMaskedLM"]}"#).unwrap().task(), Some("fill_mask"));
    }

    #[test]
    fn what_a_head_asks_for_is_read() {
        let file = Path::new("config.json");
        let head = read(
            r#"{"classifier_pooling": "mean", "classifier_activation": "silu", "norm_bias": false, "pad_token_id": -1}"#,
        );
        let head = head.unwrap();
        assert_eq!((head.pooling(file).unwrap(), head.activation(file).unwrap()), (Pooling::Mean, Activation::Silu));
        assert_eq!((head.norm_bias, head.decoder_bias, head.pad_id), (Some(false), None, None));
        // What is not used is not refused.
        let error = read(r#"{"classifier_pooling": "max"}"#).unwrap().pooling(file).unwrap_err().to_string();
        assert!(error.contains("`classifier_pooling` `max` is not supported; supported: cls, mean"), "{error}");
    }
}
