//! Texts, pairs of texts and token ids.

use std::borrow::Cow;
use std::ops::Range;

use tokenizers::{PostProcessor, Tokenizer};

use super::super::judge::{Asked, Judge, Question};
use super::Encoding;
use crate::output::Token;
use crate::request::{Truncation, TruncationDirection};
use crate::{Error, Result};

/// What vocabularies call the token to be filled in: WordPiece's and SentencePiece's habit.
const MASKS: [&str; 2] = ["[MASK]", "<mask>"];

/// A model's tokenizer with the model's limits.
pub struct TextEncoder {
    tokenizer: Tokenizer,
    max_seq_len: usize,
    vocab_size: usize,
    /// Rows of the table of token types; 0 for models without one.
    num_token_types: usize,
    /// Ids the post-processor puts around a single sequence: counted out before a text is cut.
    num_added_tokens: usize,
    /// The same around a pair.
    num_added_to_pairs: usize,
    /// Of a causal language model that is asked about pairs.
    judge: Option<Judge>,
}

impl TextEncoder {
    /// Strips the tokenizer of the truncation and padding its file may carry: the limits are the model's.
    pub fn new(mut tokenizer: Tokenizer, max_seq_len: usize, vocab_size: usize) -> Self {
        // Removing truncation cannot fail: only setting one is checked.
        let _ = tokenizer.with_truncation(None);
        tokenizer.with_padding(None);
        let num_added = |is_pair| tokenizer.get_post_processor().map_or(0, |p| p.added_tokens(is_pair));
        let (num_added_tokens, num_added_to_pairs) = (num_added(false), num_added(true));
        let num_token_types = 0;
        Self { tokenizer, max_seq_len, vocab_size, num_token_types, num_added_tokens, num_added_to_pairs, judge: None }
    }

    /// The same, of a model with so many token types.
    pub fn with_token_types(self, num_token_types: usize) -> Self {
        Self { num_token_types, ..self }
    }

    /// Puts a question around every pair and every text. Errors: the reason why it cannot.
    pub(in super::super) fn asking(self, question: Question) -> Result<Self, String> {
        let judge = Judge::new(question, &self.tokenizer, self.max_seq_len)?;
        Ok(Self { judge: Some(judge), ..self })
    }

    /// The id that stands for a token to be filled in, in vocabularies that have one.
    pub fn mask_id(&self) -> Option<u32> {
        MASKS.iter().find_map(|mask| self.tokenizer.token_to_id(mask))
    }

    /// Longest sequence this encoder lets through, special tokens included.
    pub fn max_seq_len(&self) -> usize {
        self.max_seq_len
    }

    /// One text; `prompt` goes before it.
    pub fn text(&self, text: &str, field: &str, prompt: Option<&str>, truncation: Truncation) -> Result<Encoding> {
        if let Some(judge) = &self.judge {
            return self.judged(judge, Asked::Text { prompt, text }, text.chars().count(), field, truncation);
        }
        if text.is_empty() {
            return Err(Error::Empty { field: field.to_string() });
        }
        let num_chars = text.chars().count();
        let text = match prompt {
            Some(prompt) => Cow::Owned(format!("{prompt}{text}")),
            None => Cow::Borrowed(text),
        };
        let invalid = |e: tokenizers::Error| Error::Invalid { field: field.to_string(), reason: e.to_string() };
        // Without special tokens first: a cut must leave room for them and never cut them off.
        let mut encoding = self.tokenizer.encode_fast(text.as_ref(), false).map_err(invalid)?;
        let got = encoding.len() + self.num_added_tokens;
        if got > self.max_seq_len {
            let direction = tokenizers_direction(self.direction(truncation, field, got)?);
            encoding.truncate(self.max_seq_len.saturating_sub(self.num_added_tokens), 0, direction);
            encoding.take_overflowing();
        }
        let encoding = self.tokenizer.post_process(encoding, None, true).map_err(invalid)?;
        self.finished(&encoding, num_chars, field)
    }

    fn finished(&self, encoding: &tokenizers::Encoding, num_chars: usize, field: &str) -> Result<Encoding> {
        if encoding.is_empty() {
            return Err(Error::Empty { field: field.to_string() });
        }
        let type_ids = encoding.get_type_ids();
        let token_type_ids = if type_ids.iter().all(|&t| t == 0) { Vec::new() } else { type_ids.to_vec() };
        let input_ids = encoding.get_ids().to_vec();
        // A tokenizer.json with more tokens than the model has rows is a broken model, seen here first.
        self.check_ids(&input_ids, field)?;
        Ok(Encoding { input_ids, token_type_ids, num_chars, ..Encoding::default() })
    }

    /// The prompt stands before the first text alone. What is too long is cut from the longer of the two, token by token.
    pub fn pair(
        &self,
        first: &str,
        second: &str,
        field: &str,
        prompt: Option<&str>,
        truncation: Truncation,
    ) -> Result<Encoding> {
        if first.is_empty() && second.is_empty() {
            return Err(Error::Empty { field: field.to_string() });
        }
        let num_chars = first.chars().count() + second.chars().count();
        if let Some(judge) = &self.judge {
            return self.judged(
                judge,
                Asked::Pair { prompt, query: first, document: second },
                num_chars,
                field,
                truncation,
            );
        }
        let first = match prompt {
            Some(prompt) => Cow::Owned(format!("{prompt}{first}")),
            None => Cow::Borrowed(first),
        };
        let invalid = |e: tokenizers::Error| Error::Invalid { field: field.to_string(), reason: e.to_string() };
        let mut first = self.tokenizer.encode_fast(first.as_ref(), false).map_err(invalid)?;
        let mut second = self.tokenizer.encode_fast(second, false).map_err(invalid)?;
        let got = first.len() + second.len() + self.num_added_to_pairs;
        if got > self.max_seq_len {
            let direction = tokenizers_direction(self.direction(truncation, field, got)?);
            let room = self.max_seq_len.saturating_sub(self.num_added_to_pairs);
            let (keep_first, keep_second) = longest_first(first.len(), second.len(), room);
            first.truncate(keep_first, 0, direction);
            second.truncate(keep_second, 0, direction);
            first.take_overflowing();
            second.take_overflowing();
        }
        // Post-processors that keep these let the model know which text a token is of.
        second.set_type_ids(vec![1; second.len()]);
        let encoding = self.tokenizer.post_process(first, Some(second), true).map_err(invalid)?;
        self.finished(&encoding, num_chars, field)
    }

    /// What is too long is cut from what stands between the question's ends.
    fn judged(
        &self,
        judge: &Judge,
        asked: Asked,
        num_chars: usize,
        field: &str,
        truncation: Truncation,
    ) -> Result<Encoding> {
        if num_chars == 0 {
            return Err(Error::Empty { field: field.to_string() });
        }
        let mut body = judge.body(&self.tokenizer, asked, field)?;
        let got = body.len() + judge.num_added();
        if got > self.max_seq_len {
            let direction = tokenizers_direction(self.direction(truncation, field, got)?);
            body.truncate(self.max_seq_len.saturating_sub(judge.num_added()), 0, direction);
            body.take_overflowing();
        }
        let input_ids = judge.around(body.get_ids());
        self.check_ids(&input_ids, field)?;
        Ok(Encoding { input_ids, token_type_ids: Vec::new(), num_chars, values: Vec::new() })
    }

    /// A text in chunks, each with the prompt before it and special tokens around it; one that fits is its only chunk.
    /// Each chunk repeats the last `overlap` tokens of the one before. All characters are the first one's.
    ///
    /// Errors: as [`TextEncoder::text`] but for the length; `TooLarge` with unit "chunks" for more than `limit`,
    /// `Invalid` naming `chunk_overlap` where so many tokens fill a chunk.
    pub fn text_chunks(
        &self,
        text: &str,
        field: &str,
        prompt: Option<&str>,
        overlap: usize,
        limit: usize,
    ) -> Result<Vec<Encoding>> {
        match self.text(text, field, prompt, Truncation::Refuse) {
            Err(Error::TooLarge { unit: "tokens", .. }) => {}
            fits => return fits.map(|encoding| vec![encoding]),
        }
        let invalid = |e: tokenizers::Error| Error::Invalid { field: field.to_string(), reason: e.to_string() };
        // A tokenizer could join the prompt's last word and the text's first: in chunks each is read alone.
        let prompt = self.tokenizer.encode_fast(prompt.unwrap_or_default(), false).map_err(invalid)?;
        let mut whole = self.tokenizer.encode_fast(text, false).map_err(invalid)?;
        let room = self.max_seq_len.saturating_sub(self.num_added_tokens + prompt.len());
        self.check_chunks(whole.len(), room, overlap, field, limit)?;
        whole.truncate(room, overlap, tokenizers::TruncationDirection::Right);
        let rest = whole.take_overflowing();
        let mut num_chars = text.chars().count();
        let mut chunks = Vec::with_capacity(1 + rest.len());
        for part in std::iter::once(whole).chain(rest) {
            let chunk = tokenizers::Encoding::merge([prompt.clone(), part], false);
            let chunk = self.tokenizer.post_process(chunk, None, true).map_err(invalid)?;
            chunks.push(self.finished(&chunk, std::mem::take(&mut num_chars), field)?);
        }
        Ok(chunks)
    }

    /// Ids in chunks, as they are, with their types where they have any.
    pub fn id_chunks(
        &self,
        ids: &[u32],
        types: &[u32],
        field: &str,
        overlap: usize,
        limit: usize,
    ) -> Result<Vec<Encoding>> {
        if ids.len() <= self.max_seq_len {
            return Ok(vec![self.ids(ids, types, field, Truncation::Refuse)?]);
        }
        self.check_ids(ids, field)?;
        self.check_types(types, field)?;
        let room = self.max_seq_len;
        let num_chunks = self.check_chunks(ids.len(), room, overlap, field, limit)?;
        let starts = (0..num_chunks).map(|i| i * (room - overlap));
        Ok(starts.map(|start| taken(ids, types, start..ids.len().min(start + room))).collect())
    }

    /// How many chunks of `room` tokens `len` > `room` tokens are.
    fn check_chunks(&self, len: usize, room: usize, overlap: usize, field: &str, limit: usize) -> Result<usize> {
        if overlap >= room {
            let reason = format!("{overlap} is not below the {room} tokens of a chunk");
            return Err(Error::Invalid { field: "chunk_overlap".to_string(), reason });
        }
        let num_chunks = 1 + len.saturating_sub(room).div_ceil(room - overlap);
        if num_chunks > limit {
            return Err(Error::TooLarge { field: field.to_string(), got: num_chunks, limit, unit: "chunks" });
        }
        Ok(num_chunks)
    }

    /// Ids as they are, with their types where they have any, cut where that is asked for.
    ///
    /// Shapes: `types` as `ids`, or empty.
    pub fn ids(&self, ids: &[u32], types: &[u32], field: &str, truncation: Truncation) -> Result<Encoding> {
        if ids.is_empty() {
            return Err(Error::Empty { field: field.to_string() });
        }
        self.check_ids(ids, field)?;
        self.check_types(types, field)?;
        let kept = match ids.len() > self.max_seq_len {
            true => match self.direction(truncation, field, ids.len())? {
                TruncationDirection::Left => ids.len() - self.max_seq_len..ids.len(),
                TruncationDirection::Right => 0..self.max_seq_len,
            },
            false => 0..ids.len(),
        };
        Ok(taken(ids, types, kept))
    }

    fn direction(&self, truncation: Truncation, field: &str, got: usize) -> Result<TruncationDirection> {
        match truncation {
            Truncation::Cut(direction) => Ok(direction),
            // An input in chunks is asked for as such: what comes here is to be whole.
            Truncation::Refuse | Truncation::Chunk { .. } => {
                Err(Error::TooLarge { field: field.to_string(), got, limit: self.max_seq_len, unit: "tokens" })
            }
        }
    }

    fn check_ids(&self, ids: &[u32], field: &str) -> Result<()> {
        match ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(id) => {
                let reason = format!("token id {id} is not in the vocabulary of {} tokens", self.vocab_size);
                Err(Error::Invalid { field: field.to_string(), reason })
            }
        }
    }

    /// Which of an input's ids it is that has a wrong type is not said: all of a segment have the same.
    fn check_types(&self, types: &[u32], field: &str) -> Result<()> {
        // All know 0: what has no table adds nothing.
        match types.iter().find(|&&t| t as usize >= self.num_token_types.max(1)) {
            None => Ok(()),
            Some(t) => {
                let reason = match self.num_token_types {
                    0 => format!("got {t}; this model has no token types: all must be 0"),
                    1 => format!("got {t}; this model has one token type: all must be 0"),
                    n => format!("got {t}; this model has {n} token types, from 0 to {}", n - 1),
                };
                Err(Error::Invalid { field: format!("{field}.token_type_ids"), reason })
            }
        }
    }

    /// The tokens of a text, for `/tokenize`: never truncated.
    pub fn tokenize(&self, text: &str, add_special_tokens: bool) -> Result<Vec<Token>> {
        let invalid = |e: tokenizers::Error| Error::Invalid { field: "inputs".to_string(), reason: e.to_string() };
        let encoding = self.tokenizer.encode_char_offsets(text, add_special_tokens).map_err(invalid)?;
        let special = encoding.get_special_tokens_mask();
        let chars: Vec<char> = text.chars().collect();
        let words = encoding.get_ids().iter().zip(encoding.get_tokens()).zip(encoding.get_offsets()).zip(special);
        Ok(words
            .map(|(((&id, token), &(start, stop)), &special)| {
                let special = special == 1;
                // The text as the client wrote it where there is one, the vocabulary's form elsewhere.
                let written: String = if special { token.clone() } else { chars[start..stop].iter().collect() };
                Token {
                    id,
                    piece: token.clone(),
                    text: written,
                    special,
                    start: (!special).then_some(start),
                    stop: (!special).then_some(stop),
                }
            })
            .collect())
    }

    /// The text of ids, for `/decode`. Errors: `Invalid` for an id >= vocab_size.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.check_ids(ids, "ids")?;
        self.tokenizer
            .decode(ids, skip_special_tokens)
            .map_err(|e| Error::Invalid { field: "ids".to_string(), reason: e.to_string() })
    }
}

/// A part of the ids, with that of their types. Types that are all 0 are none.
fn taken(ids: &[u32], types: &[u32], part: Range<usize>) -> Encoding {
    let types = types.get(part.clone()).filter(|types| types.iter().any(|&t| t != 0));
    Encoding {
        input_ids: ids[part].to_vec(),
        token_type_ids: types.map(<[u32]>::to_vec).unwrap_or_default(),
        ..Encoding::default()
    }
}

fn tokenizers_direction(direction: TruncationDirection) -> tokenizers::TruncationDirection {
    match direction {
        TruncationDirection::Left => tokenizers::TruncationDirection::Left,
        TruncationDirection::Right => tokenizers::TruncationDirection::Right,
    }
}

/// How many tokens are kept of each of two texts so that they fit into `room`: the longer one is cut until they are
/// equally long, then both. Where an odd token is left, the longer text has it, of two that are equally long the second:
/// as the `tokenizers` library has it.
fn longest_first(first: usize, second: usize, room: usize) -> (usize, usize) {
    if first + second <= room {
        return (first, second);
    }
    let shorter = first.min(second).min(room / 2);
    if first <= second { (shorter, room - shorter) } else { (room - shorter, shorter) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longer_text_is_cut_first() {
        // Worked by hand from the rule.
        let cases = [
            ((3, 4, 7), (3, 4)),
            ((3, 9, 8), (3, 5)),
            ((9, 3, 8), (5, 3)),
            ((9, 9, 7), (3, 4)),
            ((9, 8, 7), (4, 3)),
            ((0, 9, 4), (0, 4)),
            ((5, 5, 0), (0, 0)),
        ];
        for ((first, second, room), expected) in cases {
            assert_eq!(longest_first(first, second, room), expected, "{first} and {second} into {room}");
        }
    }
}
