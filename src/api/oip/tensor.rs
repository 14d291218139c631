//! Tensors: their types, their bytes.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::elements::{Elements, Values};
use crate::{Error, Result};

/// The protocol's types of elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Datatype {
    Bool,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Int8,
    Int16,
    Int32,
    Int64,
    Fp16,
    Fp32,
    Fp64,
    Bf16,
    /// Of any length each; a text is its UTF-8.
    Bytes,
}

impl Datatype {
    /// The name in requests and metadata.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::Uint8 => "UINT8",
            Self::Uint16 => "UINT16",
            Self::Uint32 => "UINT32",
            Self::Uint64 => "UINT64",
            Self::Int8 => "INT8",
            Self::Int16 => "INT16",
            Self::Int32 => "INT32",
            Self::Int64 => "INT64",
            Self::Fp16 => "FP16",
            Self::Fp32 => "FP32",
            Self::Fp64 => "FP64",
            Self::Bf16 => "BF16",
            Self::Bytes => "BYTES",
        }
    }

    /// The name in a model's configuration.
    pub fn config_name(self) -> String {
        match self {
            Self::Bytes => "TYPE_STRING".to_string(),
            other => format!("TYPE_{}", other.as_str()),
        }
    }
}

/// Where a tensor's elements are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    /// Little-endian, row-major, without gaps; BYTES as a u32 length and so many bytes each.
    Binary(Bytes),
    /// One after another, of JSON or of a list.
    Listed(Elements),
}

/// An input as a client sent it. The elements are not looked at yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Names it in errors.
    pub name: String,
    pub datatype: Datatype,
    /// Slowest dimension first.
    pub shape: Vec<usize>,
    pub data: Data,
}

impl Tensor {
    fn malformed(&self, reason: String) -> Error {
        Error::Malformed { field: self.name.clone(), reason }
    }

    /// The elements, to be moved out; the name and the shape stay for errors.
    fn take_data(&mut self) -> Data {
        std::mem::replace(&mut self.data, Data::Binary(Bytes::new()))
    }

    /// Elements by the shape.
    fn num_elements(&self) -> Result<usize> {
        let product = self.shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
        product.ok_or_else(|| self.malformed(format!("the shape {:?} has more elements than there can be", self.shape)))
    }

    fn check_count(&self, got: usize, expected: usize) -> Result<()> {
        match got == expected {
            true => Ok(()),
            false => {
                let reason = format!("has {got} elements, its shape {:?} asks for {expected}", self.shape);
                Err(self.malformed(reason))
            }
        }
    }

    /// The nesting of JSON must be none or the shape's.
    fn check_nesting(&self, dims: &[usize]) -> Result<()> {
        match dims.len() == 1 || dims == self.shape {
            true => Ok(()),
            false => Err(self.malformed(format!("its data is nested as {dims:?}, its shape is {:?}", self.shape))),
        }
    }

    /// The elements of a BYTES tensor.
    ///
    /// Errors: `Malformed` for another number than the shape's, for bytes that end early or late or are no UTF-8.
    pub fn texts(mut self) -> Result<Vec<String>> {
        let expected = self.num_elements()?;
        match self.take_data() {
            Data::Binary(bytes) => self.binary_texts(&bytes, expected),
            Data::Listed(Elements { values, dims }) => {
                self.check_nesting(&dims)?;
                let texts = match values {
                    Values::Texts(texts) => texts,
                    Values::None => Vec::new(),
                    Values::Ints(_) => return Err(self.malformed("expected texts, got numbers".to_string())),
                };
                self.check_count(texts.len(), expected)?;
                Ok(texts)
            }
        }
    }

    fn binary_texts(&self, bytes: &[u8], expected: usize) -> Result<Vec<String>> {
        let mut texts = Vec::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            if texts.len() == expected {
                return Err(self.malformed(format!("has {} bytes after its {expected} elements", rest.len())));
            }
            let i = texts.len();
            let early = || self.malformed(format!("its bytes end within element {i}"));
            let (len, after) = rest.split_first_chunk::<4>().ok_or_else(early)?;
            let (text, after) = after.split_at_checked(u32::from_le_bytes(*len) as usize).ok_or_else(early)?;
            let text =
                std::str::from_utf8(text).map_err(|e| self.malformed(format!("element {i} is no UTF-8: {e}")))?;
            texts.push(text.to_string());
            rest = after;
        }
        self.check_count(texts.len(), expected)?;
        Ok(texts)
    }

    /// The elements of an INT64 or INT32 tensor.
    ///
    /// Errors: `Malformed` for another number than the shape's; `Invalid` for another type.
    pub fn ints(mut self) -> Result<Vec<i64>> {
        let expected = self.num_elements()?;
        let ints: Vec<i64> = match (self.take_data(), self.datatype) {
            (Data::Listed(Elements { values, dims }), Datatype::Int64 | Datatype::Int32) => {
                self.check_nesting(&dims)?;
                match values {
                    Values::Ints(ints) => ints,
                    Values::None => Vec::new(),
                    Values::Texts(_) => return Err(self.malformed("expected numbers, got texts".to_string())),
                }
            }
            (Data::Binary(bytes), Datatype::Int64) => {
                let (chunks, rest) = bytes.as_chunks::<8>();
                self.check_rest(rest, 8)?;
                chunks.iter().map(|chunk| i64::from_le_bytes(*chunk)).collect()
            }
            (Data::Binary(bytes), Datatype::Int32) => {
                let (chunks, rest) = bytes.as_chunks::<4>();
                self.check_rest(rest, 4)?;
                chunks.iter().map(|chunk| i32::from_le_bytes(*chunk).into()).collect()
            }
            (_, other) => {
                let reason = format!("expected INT64 or INT32, got {}", other.as_str());
                return Err(Error::Invalid { field: self.name.clone(), reason });
            }
        };
        self.check_count(ints.len(), expected)?;
        Ok(ints)
    }

    fn check_rest(&self, rest: &[u8], element_bytes: usize) -> Result<()> {
        match rest.is_empty() {
            true => Ok(()),
            false => Err(self.malformed(format!("its bytes are no multiple of {element_bytes}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tensor(datatype: Datatype, shape: &[usize], bytes: Vec<u8>) -> Tensor {
        Tensor { name: "t".into(), datatype, shape: shape.to_vec(), data: Data::Binary(bytes.into()) }
    }

    fn packed(texts: &[String]) -> Vec<u8> {
        texts.iter().flat_map(|t| [&(t.len() as u32).to_le_bytes()[..], t.as_bytes()].concat()).collect()
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            bytes in proptest::collection::vec(prop_oneof![Just(0u8), Just(1), Just(255), any::<u8>()], 0..200),
            shape in proptest::collection::vec(prop_oneof![0usize..6, Just(usize::MAX), Just(1 << 33)], 0..4),
            datatype in prop::sample::select(vec![Datatype::Bytes, Datatype::Int64, Datatype::Int32, Datatype::Fp32]),
        ) {
            let tensor = tensor(datatype, &shape, bytes);
            let product = shape.iter().try_fold(1usize, |p, &d| p.checked_mul(d));
            if let Ok(texts) = tensor.clone().texts() {
                prop_assert_eq!(Some(texts.len()), product);
            }
            if let Ok(ints) = tensor.ints() {
                prop_assert_eq!(Some(ints.len()), product);
            }
        }

        #[test]
        fn texts_read_back(texts in proptest::collection::vec(any::<String>(), 0..20)) {
            let read = tensor(Datatype::Bytes, &[texts.len()], packed(&texts)).texts();
            prop_assert_eq!(read, Ok(texts));
        }

        #[test]
        fn a_cut_text_is_refused(texts in proptest::collection::vec(any::<String>(), 1..5), cut in 1usize..50) {
            let mut bytes = packed(&texts);
            bytes.truncate(bytes.len().saturating_sub(cut));
            prop_assert!(tensor(Datatype::Bytes, &[texts.len()], bytes).texts().is_err());
        }

        #[test]
        fn ints_read_back(ints in proptest::collection::vec(any::<i32>(), 0..40)) {
            let wide: Vec<i64> = ints.iter().map(|&i| i.into()).collect();
            let narrow = ints.iter().flat_map(|i| i.to_le_bytes()).collect();
            prop_assert_eq!(tensor(Datatype::Int32, &[ints.len()], narrow).ints(), Ok(wide.clone()));
            let bytes = wide.iter().flat_map(|i| i.to_le_bytes()).collect();
            prop_assert_eq!(tensor(Datatype::Int64, &[1, ints.len()], bytes).ints(), Ok(wide));
        }
    }

    #[test]
    fn another_count_than_the_shapes_is_told() {
        let message = |tensor: Tensor| tensor.texts().unwrap_err().to_string();
        assert!(
            message(tensor(Datatype::Bytes, &[2], vec![0; 4])).contains("has 1 elements, its shape [2] asks for 2")
        );
        assert!(message(tensor(Datatype::Bytes, &[1], vec![0; 9])).contains("5 bytes after its 1 elements"));
        assert!(message(tensor(Datatype::Bytes, &[1], vec![1, 0, 0, 0, 255])).contains("no UTF-8"));
        let odd = tensor(Datatype::Int64, &[1], vec![0; 9]).ints().unwrap_err().to_string();
        assert!(odd.contains("no multiple of 8"), "{odd}");
    }
}
