//! Rerankers that are causal language models: a pair is put into a question, and how likely the answer is a yes is the
//! score.
//!
//! Source: Zhang et al. 2025 (Qwen3-Embedding), section 2 and the prompts published with Qwen3-Reranker;
//! sentence-transformers' `LogitScore`.

use std::path::Path;

use serde::{Serialize, Serializer};
use tokenizers::Tokenizer;

use super::config::{Architecture, EncoderConfig};
use super::gated::config::Family;
use super::labels::HeadConfig;
use super::manifest::ModelSpec;
use super::section::{Faults, Section};
use super::sentence::SentenceConfig;
use super::weights::file_error;
use crate::{Error, Result};

/// A token, as a manifest names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Answer {
    /// As the vocabulary writes it.
    Token(String),
    Id(u32),
}

/// Ids of the answers whose scores count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Answers {
    pub yes: u32,
    /// `None`: the score of a yes is all.
    pub no: Option<u32>,
}

/// A manifest's `[rerank]`: the question. What it does not say is as Qwen3-Reranker has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Question {
    pub true_token: Answer,
    pub false_token: Answer,
    /// Before the pair; never cut.
    pub prefix: String,
    /// The pair, with `{instruction}`, `{query}` and `{document}`.
    #[serde(serialize_with = "as_text")]
    pub pair: Vec<Part>,
    /// After the pair; never cut.
    pub suffix: String,
    /// What `{instruction}` is where a request names no prompt.
    pub instruction: String,
}

/// A part of a question's pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    Text(String),
    Instruction,
    Query,
    Document,
}

/// The names of what is put in.
const PLACES: [(&str, Part); 3] =
    [("{instruction}", Part::Instruction), ("{query}", Part::Query), ("{document}", Part::Document)];

impl Default for Question {
    /// Qwen3-Reranker's.
    fn default() -> Self {
        Self {
            true_token: Answer::Token("yes".to_string()),
            false_token: Answer::Token("no".to_string()),
            prefix: "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the \
                     Instruct provided. Note that the answer can only be \"yes\" or \"no\".<|im_end|>\n\
                     <|im_start|>user\n"
                .to_string(),
            pair: parts("<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"),
            suffix: "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n".to_string(),
            instruction: "Given a web search query, retrieve relevant passages that answer the query".to_string(),
        }
    }
}

impl Question {
    /// Reads `[rerank]`.
    pub(super) fn read(mut section: Section, faults: &mut Faults) -> Self {
        let usual = Self::default();
        let text = |section: &mut Section, key: &str, faults: &mut Faults| -> Option<String> {
            let value = section.take(key)?;
            // An empty one is a question without it.
            let text = value.as_str().map(str::to_string);
            if text.is_none() {
                faults.key(section, key, "must be a string");
            }
            text
        };
        let pair = text(&mut section, "pair", faults);
        let pair = pair.map_or(usual.pair, |pair| parts(&pair));
        for (place, part) in &PLACES[1..] {
            if !pair.contains(part) {
                faults.key(&section, "pair", &format!("has no `{place}`: a pair would not be seen"));
            }
        }
        let question = Self {
            true_token: answer(&mut section, "true_token", faults).unwrap_or(usual.true_token),
            false_token: answer(&mut section, "false_token", faults).unwrap_or(usual.false_token),
            prefix: text(&mut section, "prefix", faults).unwrap_or(usual.prefix),
            pair,
            suffix: text(&mut section, "suffix", faults).unwrap_or(usual.suffix),
            instruction: text(&mut section, "instruction", faults).unwrap_or(usual.instruction),
        };
        section.finish(faults);
        question
    }

    /// Ids of the answers.
    ///
    /// Errors: the reason, for a token that the vocabulary has not.
    pub(super) fn answers(&self, tokenizer: &Tokenizer) -> Result<Answers, String> {
        let id = |key: &str, answer: &Answer| match answer {
            Answer::Id(id) => Ok(*id),
            Answer::Token(token) => {
                let found = tokenizer.token_to_id(token);
                found.ok_or_else(|| format!("has no token `{token}`, which [rerank] `{key}` of the manifest names"))
            }
        };
        Ok(Answers { yes: id("true_token", &self.true_token)?, no: Some(id("false_token", &self.false_token)?) })
    }

    /// The pair in its place. Nothing within `query` and `document` is taken for a place.
    fn filled(&self, instruction: Option<&str>, query: &str, document: &str) -> String {
        let words = |part: &Part| match part {
            Part::Text(text) => text.clone(),
            Part::Instruction => instruction.unwrap_or(&self.instruction).to_string(),
            Part::Query => query.to_string(),
            Part::Document => document.to_string(),
        };
        self.pair.iter().map(words).collect()
    }
}

/// A question ready to be asked: what stands around the pair as token ids.
pub(super) struct Judge {
    question: Question,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
}

impl Judge {
    /// `tokenizer` neither cuts nor pads.
    ///
    /// Errors: the reason, for a text that the tokenizer cannot read and a question that leaves no room for a pair.
    pub fn new(question: Question, tokenizer: &Tokenizer, max_seq_len: usize) -> Result<Self, String> {
        let ids = |text: &str| -> Result<Vec<u32>, String> {
            let encoding = tokenizer.encode_fast(text, false).map_err(|e| e.to_string())?;
            Ok(encoding.get_ids().to_vec())
        };
        let judge = Self { prefix: ids(&question.prefix)?, suffix: ids(&question.suffix)?, question };
        match judge.num_added() {
            added if added >= max_seq_len => {
                Err(format!("max_seq_len {max_seq_len} leaves no room beside the {added} tokens of the question"))
            }
            _ => Ok(judge),
        }
    }

    /// Tokens around every pair.
    pub fn num_added(&self) -> usize {
        self.prefix.len() + self.suffix.len()
    }

    /// What is cut where a pair is too long: its texts in their places.
    pub fn body(&self, tokenizer: &Tokenizer, pair: Asked, field: &str) -> Result<tokenizers::Encoding> {
        let text = match pair {
            Asked::Pair { prompt, query, document } => self.question.filled(prompt, query, document),
            Asked::Text { prompt, text } => format!("{}{text}", prompt.unwrap_or_default()),
        };
        let invalid = |e: tokenizers::Error| Error::Invalid { field: field.to_string(), reason: e.to_string() };
        tokenizer.encode_fast(text, false).map_err(invalid)
    }

    /// The whole question.
    pub fn around(&self, body: &[u32]) -> Vec<u32> {
        [&self.prefix, body, &self.suffix].concat()
    }
}

/// What a judge is asked about.
#[derive(Debug, Clone, Copy)]
pub(super) enum Asked<'a> {
    /// The prompt is the instruction.
    Pair { prompt: Option<&'a str>, query: &'a str, document: &'a str },
    /// A pair that its client has put together.
    Text { prompt: Option<&'a str>, text: &'a str },
}

/// The question that a causal language model is asked about a pair, and the ids of its answers; `None` for all other
/// models.
///
/// Errors: [`Error::ModelFile`] for a manifest's `[rerank]` of a model that is none, an answer that the vocabulary has
/// not, and a model whose own question is not known.
pub(super) fn of(
    spec: &ModelSpec,
    sentence: &SentenceConfig,
    head: &HeadConfig,
    config: &EncoderConfig,
    tokenizer: &tokenizers::Tokenizer,
    tokenizer_file: &Path,
) -> Result<Option<(Question, Answers)>> {
    let is_decoder =
        matches!(config.architecture, Architecture::Gated(Family::Qwen3 | Family::Mistral | Family::Gemma3));
    let is_asked = spec.rerank.is_some() || sentence.answers.is_some();
    if spec.task != "rerank" || !(is_asked || (is_decoder && head.is_causal())) {
        return Ok(None);
    }
    let config_file = sentence.transformer_dir.join("config.json");
    if !is_decoder {
        return Err(file_error(&config_file, "is of no causal language model, which alone answers a question"));
    }
    if let Some(question) = &spec.rerank {
        let answers = question.answers(tokenizer).map_err(|reason| file_error(tokenizer_file, reason))?;
        return Ok(Some((question.clone(), answers)));
    }
    // A model that brings a question of its own brings a template, whose language is not read here.
    let template = sentence.transformer_dir.join("chat_template.jinja");
    let own = std::fs::read_to_string(&template).ok().filter(|_| sentence.answers.is_some());
    let is_known = own.is_none_or(|own| own.contains("Judge whether the Document meets the requirements"));
    if config.architecture != Architecture::Gated(Family::Qwen3) || !is_known {
        let reason = "what this model is asked about a pair is not known: [rerank] of the manifest must say it";
        return Err(file_error(&config_file, reason));
    }
    let question = Question::default();
    let answers = match sentence.answers {
        Some(answers) => answers,
        None => question.answers(tokenizer).map_err(|reason| file_error(tokenizer_file, reason))?,
    };
    Ok(Some((question, answers)))
}

fn answer(section: &mut Section, key: &str, faults: &mut Faults) -> Option<Answer> {
    let value = section.take(key)?;
    if let Some(token) = value.as_str() {
        return Some(Answer::Token(token.to_string()));
    }
    let id = value.as_integer().and_then(|id| u32::from_str_radix(id.as_str(), id.radix()).ok());
    if id.is_none() {
        faults.key(section, key, "must be a token of the vocabulary or its id");
    }
    id.map(Answer::Id)
}

/// The parts of a pair's text.
fn parts(text: &str) -> Vec<Part> {
    let (mut parts, mut rest) = (Vec::new(), text);
    loop {
        let next =
            PLACES.iter().filter_map(|(place, part)| Some((rest.find(place)?, place.len(), part))).min_by_key(|p| p.0);
        let (before, after) = match next {
            None => (rest, None),
            Some((start, len, part)) => (&rest[..start], Some((&rest[start + len..], part))),
        };
        if !before.is_empty() {
            parts.push(Part::Text(before.to_string()));
        }
        let Some((after, part)) = after else { return parts };
        parts.push(part.clone());
        rest = after;
    }
}

fn as_text<S: Serializer>(parts: &[Part], serializer: S) -> Result<S::Ok, S::Error> {
    let words = |part: &Part| match part {
        Part::Text(text) => text.clone(),
        other => PLACES.iter().find(|(_, part)| part == other).map_or_else(String::new, |(place, _)| place.to_string()),
    };
    serializer.serialize_str(&parts.iter().map(words).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_in_is_not_read_again() {
        let question = Question { pair: parts("{query}|{document}|{instruction}|{other}"), ..Question::default() };
        let filled = question.filled(Some("{query}"), "{document}", "a {query} b");
        assert_eq!(filled, "{document}|a {query} b|{query}|{other}");
        let usual = Question::default().filled(None, "q", "d");
        assert_eq!(
            usual,
            "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n<Query>: q\n\
             <Document>: d"
        );
    }
}
