//! Where a model's tokenizer comes from: `tokenizer.json`, or the vocabulary inside a GGUF file.

use std::path::Path;

use candle_core::quantized::gguf_file::Value;
use serde_json::json;
use tokenizers::normalizers::{Lowercase, NormalizerWrapper, Sequence};
use tokenizers::{PostProcessor, Tokenizer};

use super::weights::file_error;
use super::weights::gguf::GgufFile;
use crate::Result;

/// What llama.cpp puts before a token that begins a word, where BERT puts `##` before the others.
const WORD_START: char = '\u{2581}';
/// `tokenizer.ggml.token_type` of `[CLS]` and its like.
const CONTROL: i64 = 3;

/// Reads a `tokenizer.json`. Errors: [`crate::Error::ModelFile`].
pub(super) fn from_file(path: &Path) -> Result<Tokenizer> {
    let bytes = std::fs::read(path).map_err(|e| file_error(path, e))?;
    Tokenizer::from_bytes(bytes).map_err(|e| file_error(path, format!("no tokenizer: {e}")))
}

/// Builds the tokenizer of a BERT that llama.cpp converted, so that a lone GGUF file loads.
///
/// The metadata do not say whether text is lower-cased; a vocabulary without a single upper-case
/// letter says so.
/// Errors: [`crate::Error::ModelFile`] naming the key that is missing or the kind of vocabulary not supported.
pub(super) fn from_gguf(gguf: &GgufFile) -> Result<Tokenizer> {
    let fault = |reason: String| file_error(gguf.path(), reason);
    if let Some(text) = gguf.string("tokenizer.huggingface.json")? {
        return Tokenizer::from_bytes(text).map_err(|e| fault(format!("`tokenizer.huggingface.json`: {e}")));
    }
    let missing = |key: &str| fault(format!("no tokenizer.json beside it and no metadata `{key}`"));
    let model = gguf.string("tokenizer.ggml.model")?.ok_or_else(|| missing("tokenizer.ggml.model"))?;
    if model != "bert" {
        return Err(fault(format!(
            "`tokenizer.ggml.model` is `{model}`, only `bert` can be built from metadata: put a tokenizer.json beside it"
        )));
    }
    let tokens = gguf.strings("tokenizer.ggml.tokens")?.ok_or_else(|| missing("tokenizer.ggml.tokens"))?;
    let kinds: Vec<i64> = match gguf.value("tokenizer.ggml.token_type") {
        Some(Value::Array(kinds)) => kinds.iter().map(kind_of).collect(),
        _ => Vec::new(),
    };
    let mut words = Vec::with_capacity(tokens.len());
    for (i, token) in tokens.iter().enumerate() {
        words.push(word_piece(token, kinds.get(i) == Some(&CONTROL)));
    }

    // llama.cpp took BERT's own ids by these keys; the separator's is misspelt in the format.
    let special = |keys: &[&str], usual: &str| -> Result<(String, usize)> {
        for key in keys {
            if let Some(id) = gguf.number(key)? {
                let word = words.get(id).ok_or_else(|| fault(format!("`{key}` {id} is not in the vocabulary")))?;
                return Ok((word.clone(), id));
            }
        }
        match words.iter().position(|word| word == usual) {
            Some(id) => Ok((usual.to_string(), id)),
            None => Err(fault(format!("no metadata `{}` and no token `{usual}`", keys[0]))),
        }
    };
    let cls = special(&["tokenizer.ggml.cls_token_id", "tokenizer.ggml.bos_token_id"], "[CLS]")?;
    let sep = special(&["tokenizer.ggml.seperator_token_id", "tokenizer.ggml.eos_token_id"], "[SEP]")?;
    let unk = special(&["tokenizer.ggml.unknown_token_id"], "[UNK]")?;
    let optional = ["[PAD]", "[MASK]"].iter().filter_map(|word| Some((word.to_string(), index_of(&words, word)?)));
    let specials: Vec<(String, usize)> = [cls.clone(), sep.clone(), unk.clone()].into_iter().chain(optional).collect();

    let lowercase = !words
        .iter()
        .filter(|word| !specials.iter().any(|(special, _)| special == *word) && !word.starts_with('['))
        .any(|word| word.chars().any(char::is_uppercase));
    let added: Vec<_> = specials
        .iter()
        .map(|(content, id)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let vocab: serde_json::Map<String, serde_json::Value> =
        words.iter().enumerate().map(|(id, word)| (word.clone(), json!(id))).collect();
    let description = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                       "strip_accents": null, "lowercase": lowercase},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": [sep.0, sep.1], "cls": [cls.0, cls.1]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": unk.0, "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocab},
    });
    Tokenizer::from_bytes(description.to_string()).map_err(|e| fault(format!("tokenizer metadata: {e}")))
}

/// Lower-cases texts before everything else the tokenizer does, unless it does so itself anyway.
pub(super) fn lower_case(tokenizer: &mut Tokenizer, file: &Path) -> Result<()> {
    let mut steps = vec![NormalizerWrapper::Lowercase(Lowercase)];
    steps.extend(tokenizer.get_normalizer().cloned());
    tokenizer.with_normalizer(Some(Sequence::new(steps))).map(|_| ()).map_err(|e| file_error(file, e))
}

/// Number of ids the tokenizer can give: its highest and one.
pub(super) fn num_ids(tokenizer: &Tokenizer) -> usize {
    tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
}

/// Number of ids put around a single sequence.
pub(super) fn num_added_tokens(tokenizer: &Tokenizer) -> usize {
    tokenizer.get_post_processor().map_or(0, |processor| processor.added_tokens(false))
}

/// llama.cpp's form of a token back to WordPiece's: "▁word" to "word", "ing" to "##ing", "[CLS]" as it is.
fn word_piece(token: &str, control: bool) -> String {
    match token.strip_prefix(WORD_START) {
        Some(word) if !word.is_empty() => word.to_string(),
        // Older conversions have no kinds: they know a control token by its brackets.
        _ if control || (token.len() > 2 && token.starts_with('[') && token.ends_with(']')) => token.to_string(),
        _ => format!("##{token}"),
    }
}

fn index_of(words: &[String], word: &str) -> Option<usize> {
    words.iter().position(|known| known == word)
}

fn kind_of(value: &Value) -> i64 {
    match value {
        Value::I32(kind) => i64::from(*kind),
        Value::U32(kind) => i64::from(*kind),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn word_pieces_come_back() {
        let cases = [
            ("▁hello", false, "hello"),
            ("ing", false, "##ing"),
            ("[CLS]", false, "[CLS]"),
            ("<s>", true, "<s>"),
            ("[", false, "##["),
            ("▁[", false, "["),
            // A vocabulary may hold the word-start sign itself as a continuation.
            ("▁", false, "##▁"),
        ];
        for (token, control, expected) in cases {
            assert_eq!(word_piece(token, control), expected, "{token}");
        }
    }
}
