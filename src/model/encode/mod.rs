//! From inputs to what is packed into batches, and from token ids back to text.

pub mod text;

use std::ops::Range;

use tokenizers::Tokenizer;

use super::image::Preprocessor;
use super::judge::Question;
use super::signature::ValuesShape;
use crate::output::Token;
use crate::request::{Input, Truncation};
use crate::{Error, Result};
use text::TextEncoder;

/// An input as the device takes it: token ids of a text, special tokens included, at most `max_seq_len` and every id
/// < vocab_size; or numbers.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Encoding {
    /// [seq_len], not empty. Of an input of numbers one 0 for each token that it counts as.
    pub input_ids: Vec<u32>,
    /// [seq_len], or empty for all 0.
    pub token_type_ids: Vec<u32>,
    /// Unicode scalar values of the text; 0 for other inputs.
    pub num_chars: usize,
    /// The numbers of an input that is no text; empty for texts.
    pub values: Vec<f32>,
}

/// What turns files of images into pixels.
pub struct ImageEncoder {
    pub preprocessor: Preprocessor,
    /// Tokens that an image counts as.
    pub num_tokens: usize,
}

/// What turns a model's inputs into encodings, within the model's limits.
pub struct Encoder {
    /// `None` for models that take no text.
    text: Option<TextEncoder>,
    /// `None` for models that take no tensors.
    tensors: Option<ValuesShape>,
    /// `None` for models that take no images.
    images: Option<ImageEncoder>,
    /// Which values of a row are looked up in a table, and how many rows that has.
    tables: Vec<(Range<usize>, usize)>,
    max_seq_len: usize,
}

impl Encoder {
    /// Of a model of texts. Strips the tokenizer of the truncation and padding its file may carry: the limits are the
    /// model's.
    pub fn new(tokenizer: Tokenizer, max_seq_len: usize, vocab_size: usize) -> Self {
        let text = TextEncoder::new(tokenizer, max_seq_len, vocab_size);
        Self { text: Some(text), tensors: None, tables: Vec::new(), images: None, max_seq_len }
    }

    /// The same, of a model with so many token types. Without this ids are taken with type 0 alone.
    pub fn with_token_types(self, num_token_types: usize) -> Self {
        Self { text: self.text.map(|text| text.with_token_types(num_token_types)), ..self }
    }

    /// Puts a question around every pair and every text. Errors: the reason why it cannot.
    pub(super) fn asking(self, question: Question) -> Result<Self, String> {
        Ok(Self { text: self.text.map(|text| text.asking(question)).transpose()?, ..self })
    }

    /// Of a tensor model, whose inputs are so many values.
    pub fn of_tensors(values: ValuesShape) -> Self {
        let max_seq_len = values.num_tokens;
        Self { text: None, tensors: Some(values), tables: Vec::new(), images: None, max_seq_len }
    }

    /// Of a model of images, and of texts where it has a tokenizer.
    pub fn of_images(images: ImageEncoder, text: Option<TextEncoder>, max_seq_len: usize) -> Self {
        Self { text, tensors: None, tables: Vec::new(), images: Some(images), max_seq_len }
    }

    /// The same, for a model that looks some of its values up: they are whole numbers from 0, below these bounds.
    pub fn with_tables(self, tables: Vec<(Range<usize>, usize)>) -> Self {
        Self { tables, ..self }
    }

    /// The id that stands for a token to be filled in, in vocabularies that have one.
    pub fn mask_id(&self) -> Option<u32> {
        self.text.as_ref()?.mask_id()
    }

    /// Longest sequence this encoder lets through, special tokens included.
    pub fn max_seq_len(&self) -> usize {
        self.max_seq_len
    }

    /// Encodes one input. `field` names it in errors ("input[3]"); `prompt` goes before a text.
    ///
    /// Blocks: tens of microseconds for a sentence, milliseconds for an image; call it off the async threads.
    /// Errors: `Empty` for an empty text or list, `TooLarge` with unit "tokens" when longer than
    /// max_seq_len and `truncation` is `Refuse`, `Invalid` for an id >= vocab_size, for a token type that the model does not
    /// have (naming `input[3].token_type_ids`), a text the tokenizer makes no token of, a file that is no image or too large a one, values of another number than the
    /// model's or not finite, and for a kind of input that the model does not take.
    pub fn encode(&self, input: &Input, field: &str, prompt: Option<&str>, truncation: Truncation) -> Result<Encoding> {
        if let (Input::Image(file), Some(images)) = (input, &self.images) {
            let values = images.preprocessor.pixels(file, field)?;
            return Ok(Encoding { input_ids: vec![0; images.num_tokens], values, ..Encoding::default() });
        }
        match (input, &self.text, &self.tensors) {
            (Input::Text(text), Some(encoder), _) => encoder.text(text, field, prompt, truncation),
            (Input::Pair(first, second), Some(encoder), _) => encoder.pair(first, second, field, prompt, truncation),
            (Input::TokenIds(ids), Some(encoder), _) => encoder.ids(ids, &[], field, truncation),
            (Input::TypedTokenIds { ids, types }, Some(encoder), _) => encoder.ids(ids, types, field, truncation),
            (Input::Values(values), _, Some(shape)) => take_values(values, *shape, &self.tables, field),
            _ => {
                let reason = format!("{} is nothing that this model takes", input.kind());
                Err(Error::Invalid { field: field.to_string(), reason })
            }
        }
    }

    /// One text or list of ids in chunks that the model takes: see [`TextEncoder::text_chunks`].
    ///
    /// Errors: `Invalid` for another kind of input.
    pub fn chunks(
        &self,
        input: &Input,
        field: &str,
        prompt: Option<&str>,
        overlap: usize,
        limit: usize,
    ) -> Result<Vec<Encoding>> {
        match (input, &self.text) {
            (Input::Text(text), Some(encoder)) => encoder.text_chunks(text, field, prompt, overlap, limit),
            (Input::TokenIds(ids), Some(encoder)) => encoder.id_chunks(ids, &[], field, overlap, limit),
            (Input::TypedTokenIds { ids, types }, Some(encoder)) => {
                encoder.id_chunks(ids, types, field, overlap, limit)
            }
            _ => {
                let reason = format!("{} is not read in chunks; leave `chunk_overlap` out", input.kind());
                Err(Error::Invalid { field: field.to_string(), reason })
            }
        }
    }

    /// The tokens of a text, for `/tokenize`: never truncated. Errors: `Invalid` for a model without a tokenizer.
    pub fn tokenize(&self, text: &str, add_special_tokens: bool) -> Result<Vec<Token>> {
        self.tokenizer()?.tokenize(text, add_special_tokens)
    }

    /// The text of ids, for `/decode`. Errors: `Invalid` for an id >= vocab_size and for a model without a tokenizer.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.tokenizer()?.decode(ids, skip_special_tokens)
    }

    fn tokenizer(&self) -> Result<&TextEncoder> {
        let reason = || "this model takes no text and has no tokenizer".to_string();
        self.text.as_ref().ok_or_else(|| Error::Invalid { field: "model".to_string(), reason: reason() })
    }
}

fn take_values(values: &[f32], shape: ValuesShape, tables: &[(Range<usize>, usize)], field: &str) -> Result<Encoding> {
    let invalid = |reason: String| Err(Error::Invalid { field: field.to_string(), reason });
    if values.len() != shape.num_values {
        return invalid(format!("has {} values, the model takes {}", values.len(), shape.num_values));
    }
    if let Some(i) = values.iter().position(|value| !value.is_finite()) {
        return invalid(format!("value {i} is {}, the model takes finite ones", values[i]));
    }
    for (range, rows) in tables {
        let is_index = |value: f32| value >= 0.0 && value.fract() == 0.0 && (value as usize) < *rows;
        if let Some(i) = range.clone().find(|&i| values.get(i).is_none_or(|&value| !is_index(value))) {
            return invalid(format!("value {i} is {}, the model takes whole numbers from 0, below {rows}", values[i]));
        }
    }
    Ok(Encoding { input_ids: vec![0; shape.num_tokens], values: values.to_vec(), ..Encoding::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_and_finite() {
        let encoder = Encoder::of_tensors(ValuesShape { num_values: 2, num_tokens: 3 });
        let encode = |input: Input| encoder.encode(&input, "input", None, Truncation::Refuse);
        let good = encode(Input::Values([1.0, -2.5].into())).unwrap();
        assert_eq!((good.input_ids, good.values), (vec![0; 3], vec![1.0, -2.5]));
        for bad in [Input::Values([1.0].into()), Input::Values([1.0, f32::NAN].into()), Input::Text("a".into())] {
            assert!(matches!(encode(bad.clone()), Err(Error::Invalid { .. })), "{bad:?}");
        }
        assert!(matches!(encoder.tokenize("a", true), Err(Error::Invalid { .. })));
    }
}
