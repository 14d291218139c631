//! The forms that embeddings are answered in: of which values ([`Dtype`]), and how these are written.
//!
//! ```text
//!                 numbers     base64      raw bytes (`accept: application/octet-stream`)
//! float32         [0.12,..]   "AACAPw.."  4 bytes a value, little-endian
//! float16         [0.12,..]   ".."        2 bytes a value, little-endian
//! int8, uint8     [15,..]     ".."        1 byte a value
//! binary, ubinary [-113,..]   ".."        1 byte every 8 values
//! ```

mod quantize;
mod raw;

use axum::response::Response;
use serde::Deserialize;
use utoipa::ToSchema;

use super::negotiate::Media;
use super::write;
use crate::output::Row;
use crate::{Error, Result};

pub use raw::{DTYPE, SHAPE, raw};

/// Rows alone, as TEI answers them: `[[..],[..]]`, or their bytes.
///
/// Errors: those of [`quantize::push_bytes`].
pub async fn rows(rows: Vec<Row>, form: Form, media: Media) -> Result<Response> {
    if media == Media::Bytes {
        return raw(rows, form.dtype).await;
    }
    let num_values = rows.iter().map(|row| row.len()).sum();
    let write = move || {
        let mut out = Vec::with_capacity(form.rows_len(&rows));
        form.push_rows(&mut out, &rows)?;
        Ok(out)
    };
    write::offload(num_values, write).await
}

/// The routes that answer with embeddings in any form.
pub const ROUTES: [&str; 6] = ["/v1/embeddings", "/embed", "/", "/invocations", "/v2/embed", "/v1/embed"];

/// The values of an embedding. [`quantize`] has their definitions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// As computed.
    #[default]
    #[serde(alias = "float", alias = "f32")]
    Float32,
    /// IEEE 754 binary16, rounded to nearest.
    #[serde(alias = "fp16", alias = "f16")]
    Float16,
    /// The embedding scaled to length 1, times 127, rounded: -127 to 127.
    Int8,
    /// As int8, plus 128: 1 to 255.
    Uint8,
    /// As ubinary, minus 128.
    Binary,
    /// One bit a value, 1 for those above zero, the first in the highest bit; eight to a byte, the last filled up with 0.
    Ubinary,
}

impl Dtype {
    /// The items of a row of so many values.
    pub fn num_items(self, num_values: usize) -> usize {
        match self {
            Self::Binary | Self::Ubinary => num_values.div_ceil(8),
            Self::Float32 | Self::Float16 | Self::Int8 | Self::Uint8 => num_values,
        }
    }

    /// The type of an item, in numpy's words.
    pub fn item(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::Float16 => "float16",
            Self::Int8 | Self::Binary => "int8",
            Self::Uint8 | Self::Ubinary => "uint8",
        }
    }

    fn item_bytes(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::Float16 => 2,
            Self::Int8 | Self::Uint8 | Self::Binary | Self::Ubinary => 1,
        }
    }
}

/// How the values are written in JSON.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum EncodingFormat {
    /// A list of numbers.
    #[default]
    Float,
    /// Base64 of the little-endian values; of f32 that is a third of the bytes, and what OpenAI's Python client asks for.
    Base64,
}

/// Values and how they are written in one word, as Cohere and Jina have it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum EmbeddingType {
    #[default]
    Float,
    /// Base64 of little-endian f32 values.
    Base64,
    /// Ours alone: IEEE 754 binary16, written as numbers.
    Fp16,
    Int8,
    Uint8,
    Binary,
    Ubinary,
}

impl EmbeddingType {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Float => "float",
            Self::Base64 => "base64",
            Self::Fp16 => "fp16",
            Self::Int8 => "int8",
            Self::Uint8 => "uint8",
            Self::Binary => "binary",
            Self::Ubinary => "ubinary",
        }
    }

    /// What the word stands for.
    pub fn form(self) -> Form {
        let (dtype, encoding) = match self {
            Self::Float => (Dtype::Float32, EncodingFormat::Float),
            Self::Base64 => (Dtype::Float32, EncodingFormat::Base64),
            Self::Fp16 => (Dtype::Float16, EncodingFormat::Float),
            Self::Int8 => (Dtype::Int8, EncodingFormat::Float),
            Self::Uint8 => (Dtype::Uint8, EncodingFormat::Float),
            Self::Binary => (Dtype::Binary, EncodingFormat::Float),
            Self::Ubinary => (Dtype::Ubinary, EncodingFormat::Float),
        };
        Form { dtype, encoding }
    }
}

/// A form in JSON.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Form {
    pub dtype: Dtype,
    pub encoding: EncodingFormat,
}

impl Form {
    /// What a body asks for that may have OpenAI's field, ours and Jina's. `encoding_format` says how values are written
    /// whatever they are: OpenAI's client sends it by itself.
    ///
    /// Errors: `Invalid` naming `embedding_type` where it contradicts another field.
    pub fn of(
        encoding_format: Option<EncodingFormat>,
        dtype: Option<Dtype>,
        embedding_type: Option<EmbeddingType>,
    ) -> Result<Self> {
        let Some(asked) = embedding_type.map(EmbeddingType::form) else {
            return Ok(Self { dtype: dtype.unwrap_or_default(), encoding: encoding_format.unwrap_or_default() });
        };
        let contradicted = if dtype.is_some_and(|dtype| dtype != asked.dtype) {
            Some("dtype")
        } else if asked.encoding == EncodingFormat::Base64 && encoding_format == Some(EncodingFormat::Float) {
            Some("encoding_format")
        } else {
            None
        };
        if let Some(other) = contradicted {
            let reason = format!("`{other}` asks for another form");
            return Err(Error::Invalid { field: "embedding_type".to_string(), reason });
        }
        Ok(Self { dtype: asked.dtype, encoding: encoding_format.unwrap_or(asked.encoding) })
    }

    /// Bytes to reserve for [`Self::push_rows`].
    pub fn rows_len(self, rows: &[Row]) -> usize {
        2 + rows.iter().map(|row| self.json_len(row.len()) + 1).sum::<usize>()
    }

    /// Appends `[..,..]`, the form of each row. Errors: those of [`Self::push`].
    pub fn push_rows(self, out: &mut Vec<u8>, rows: &[Row]) -> Result<()> {
        let mut scratch = Vec::new();
        out.push(b'[');
        for (i, row) in rows.iter().enumerate() {
            if i > 0 {
                out.push(b',');
            }
            self.push(out, row, &mut scratch)?;
        }
        out.push(b']');
        Ok(())
    }

    /// Bytes to reserve for a row of so many values.
    pub fn json_len(self, num_values: usize) -> usize {
        let num_items = self.dtype.num_items(num_values);
        let is_float = matches!(self.dtype, Dtype::Float32 | Dtype::Float16);
        2 + match self.encoding {
            EncodingFormat::Base64 => (num_items * self.dtype.item_bytes()).div_ceil(3) * 4,
            EncodingFormat::Float if is_float => num_items * write::BYTES_PER_FLOAT,
            // "-128,".
            EncodingFormat::Float => num_items * 5,
        }
    }

    /// Appends the row as JSON: a list of numbers, or a text. `scratch` is used between, and its content lost.
    ///
    /// Errors: those of [`quantize::push_bytes`].
    pub fn push(self, out: &mut Vec<u8>, row: &[f32], scratch: &mut Vec<u8>) -> Result<()> {
        // Nothing between the row and its digits: most answers are of this form.
        if self.dtype == Dtype::Float32 {
            return match self.encoding {
                EncodingFormat::Float => write::push_floats(out, row),
                EncodingFormat::Base64 => write::push_base64(out, row),
            };
        }
        scratch.clear();
        quantize::push_bytes(scratch, row, self.dtype)?;
        match (self.encoding, self.dtype) {
            (EncodingFormat::Base64, _) => write::push_base64_bytes(out, scratch),
            (EncodingFormat::Float, Dtype::Float16) => write::push_floats(out, &quantize::halves(scratch)),
            (EncodingFormat::Float, dtype) => {
                match dtype.item() {
                    "int8" => push_integers(out, scratch.iter().map(|byte| i16::from(*byte as i8))),
                    _ => push_integers(out, scratch.iter().map(|byte| i16::from(*byte))),
                }
                Ok(())
            }
        }
    }
}

/// Appends `[-12,7]`. The values are those of one byte, signed or not.
fn push_integers(out: &mut Vec<u8>, values: impl Iterator<Item = i16>) {
    out.push(b'[');
    for (i, value) in values.enumerate() {
        if i > 0 {
            out.push(b',');
        }
        if value < 0 {
            out.push(b'-');
        }
        let digit = |value: u16| b'0' + (value % 10) as u8;
        let value = value.unsigned_abs();
        if value >= 100 {
            out.push(digit(value / 100));
        }
        if value >= 10 {
            out.push(digit(value / 10));
        }
        out.push(digit(value));
    }
    out.push(b']');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_of_a_byte_is_written_as_its_digits() {
        let mut out = Vec::new();
        push_integers(&mut out, -128..=255);
        assert_eq!(serde_json::from_slice::<Vec<i16>>(&out).unwrap(), (-128..=255).collect::<Vec<i16>>());
    }

    #[test]
    fn fields_of_three_protocols_agree_or_are_refused() {
        use EmbeddingType as T;
        use EncodingFormat::{Base64, Float};
        let form = |dtype, encoding| Ok(Form { dtype, encoding });
        assert_eq!(Form::of(None, None, None), form(Dtype::Float32, Float));
        assert_eq!(Form::of(Some(Base64), Some(Dtype::Int8), None), form(Dtype::Int8, Base64));
        assert_eq!(Form::of(None, None, Some(T::Base64)), form(Dtype::Float32, Base64));
        assert_eq!(Form::of(Some(Base64), None, Some(T::Ubinary)), form(Dtype::Ubinary, Base64));
        assert_eq!(Form::of(Some(Base64), Some(Dtype::Float32), Some(T::Float)), form(Dtype::Float32, Base64));
        for (encoding, dtype, asked) in [(None, Some(Dtype::Int8), T::Binary), (Some(Float), None, T::Base64)] {
            assert!(matches!(Form::of(encoding, dtype, Some(asked)), Err(Error::Invalid { .. })), "{asked:?}");
        }
    }

    #[test]
    fn enough_is_reserved_for_every_form() {
        let row: Vec<f32> = (0..100).map(|i| (i as f32 - 50.3) * -0.012_345_678).collect();
        use Dtype::{Binary, Float16, Float32, Int8, Ubinary, Uint8};
        for dtype in [Float32, Float16, Int8, Uint8, Binary, Ubinary] {
            for encoding in [EncodingFormat::Float, EncodingFormat::Base64] {
                let (mut out, form) = (Vec::new(), Form { dtype, encoding });
                form.push(&mut out, &row, &mut Vec::new()).unwrap();
                assert!(out.len() <= form.json_len(row.len()), "{form:?}: {} bytes", out.len());
            }
        }
    }
}
