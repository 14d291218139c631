//! A request's tensors as they came, and how their elements are read.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;

use super::elements::{Elements, Values};
use crate::api::tensors::signature::{IMAGE, Signature, TensorSpec, Written};
use crate::api::tensors::{Datatype, inputs};
use crate::{Error, Result};

/// Where a tensor's elements are.
#[derive(Debug, Clone, PartialEq)]
pub enum Data {
    /// Little-endian, row-major, without gaps; BYTES as a u32 length and so many bytes each.
    Binary(Bytes),
    /// One after another, of JSON or of a list.
    Listed(Elements),
}

/// An input as a client sent it. The elements are not looked at yet.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Names it in errors.
    pub name: String,
    pub datatype: Datatype,
    /// Slowest dimension first.
    pub shape: Vec<usize>,
    pub data: Data,
}

/// The tensors of a request, their elements read as the signature has them.
///
/// Errors: `Invalid` for a name that is no input's and for another type; `Malformed` for a tensor that comes twice, and
/// for elements that are not what the shape and the type say.
pub fn read(tensors: Vec<Tensor>, signature: &Signature) -> Result<Vec<inputs::Tensor>> {
    let known = signature.inputs();
    let are_numbers = signature.forms.iter().any(|form| form.written == Written::Tensors);
    for (i, tensor) in tensors.iter().enumerate() {
        if !known.iter().any(|spec| spec.name == tensor.name) {
            let names = known.iter().map(|spec| &*spec.name).collect::<Vec<_>>().join(", ");
            let reason = format!("no input is named `{}`; known: {names}", tensor.name);
            return Err(Error::Invalid { field: format!("inputs[{i}].name"), reason });
        }
        if tensors[..i].iter().any(|other| other.name == tensor.name) {
            return Err(tensor.malformed("comes twice".to_string()));
        }
    }
    let read = |tensor: Tensor| match known.iter().find(|spec| spec.name == tensor.name) {
        Some(_) if are_numbers => tensor.read_numbers(),
        Some(spec) => tensor.read(spec),
        None => Err(Error::Internal { cause: format!("the tensor `{}` was not checked", tensor.name) }),
    };
    tensors.into_iter().map(read).collect()
}

impl Tensor {
    fn read(self, spec: &TensorSpec) -> Result<inputs::Tensor> {
        let (name, shape) = (self.name.clone(), self.shape.clone());
        let values = match spec.datatype {
            // JSON has no bytes: a file stands there in base64.
            Datatype::Bytes if spec.name == IMAGE && matches!(self.data, Data::Listed(_)) => {
                let decode = |(i, text): (usize, Vec<u8>)| {
                    let wrong =
                        |e| Error::Malformed { field: format!("{name}[{i}]"), reason: format!("not base64: {e}") };
                    BASE64_STANDARD.decode(text).map_err(wrong)
                };
                inputs::Values::Bytes(self.bytes()?.into_iter().enumerate().map(decode).collect::<Result<_>>()?)
            }
            Datatype::Bytes => inputs::Values::Bytes(self.bytes()?),
            _ => inputs::Values::Ints(self.ints()?),
        };
        Ok(inputs::Tensor { name, shape, values })
    }

    /// As models compute them: of any type, to the nearest f32; whole numbers only where that is exact.
    fn read_numbers(self) -> Result<inputs::Tensor> {
        let (name, shape) = (self.name.clone(), self.shape.clone());
        Ok(inputs::Tensor { name, shape, values: inputs::Values::Floats(self.floats()?) })
    }

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
    /// Errors: `Malformed` for another number than the shape's, for bytes that end early or late; `Invalid` for another
    /// type.
    pub fn bytes(mut self) -> Result<Vec<Vec<u8>>> {
        if self.datatype != Datatype::Bytes {
            let reason = format!("expected BYTES, got {}", self.datatype.as_str());
            return Err(Error::Invalid { field: self.name, reason });
        }
        let expected = self.num_elements()?;
        match self.take_data() {
            Data::Binary(bytes) => self.binary_elements(&bytes, expected),
            Data::Listed(Elements { values, dims }) => {
                self.check_nesting(&dims)?;
                let texts = match values {
                    Values::Texts(texts) => texts,
                    Values::None => Vec::new(),
                    _ => return Err(self.malformed("expected texts, got numbers".to_string())),
                };
                self.check_count(texts.len(), expected)?;
                Ok(texts.into_iter().map(String::into_bytes).collect())
            }
        }
    }

    fn binary_elements(&self, bytes: &[u8], expected: usize) -> Result<Vec<Vec<u8>>> {
        let mut elements = Vec::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            if elements.len() == expected {
                return Err(self.malformed(format!("has {} bytes after its {expected} elements", rest.len())));
            }
            let i = elements.len();
            let early = || self.malformed(format!("its bytes end within element {i}"));
            let (len, after) = rest.split_first_chunk::<4>().ok_or_else(early)?;
            let (element, after) = after.split_at_checked(u32::from_le_bytes(*len) as usize).ok_or_else(early)?;
            elements.push(element.to_vec());
            rest = after;
        }
        self.check_count(elements.len(), expected)?;
        Ok(elements)
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
                    _ => return Err(self.malformed("expected whole numbers".to_string())),
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

    /// The elements of a tensor of numbers.
    ///
    /// Errors: `Malformed` for another number than the shape's and for elements of another kind; `Invalid` for BYTES, for
    /// a whole number that f32 cannot hold and for what is no finite number.
    pub fn floats(self) -> Result<Vec<f32>> {
        let expected = self.num_elements()?;
        let invalid = |reason: String| Error::Invalid { field: self.name.clone(), reason };
        let datatype = self.datatype;
        let whole = |(i, int): (usize, i64)| {
            inputs::whole(int).ok_or_else(|| invalid(format!("element {i} is {int}: {}", inputs::NOT_EXACT)))
        };
        let float = |(i, number): (usize, f64)| {
            inputs::float(number).ok_or_else(|| invalid(format!("element {i} is no finite number of 32 bits")))
        };
        if datatype == Datatype::Bytes {
            return Err(invalid("expected numbers, got BYTES".to_string()));
        }
        let floats = match &self.data {
            Data::Listed(Elements { values, dims }) => {
                self.check_nesting(dims)?;
                match values {
                    Values::None => Ok(Vec::new()),
                    Values::Bools(bools) => Ok(bools.iter().map(|&is| if is { 1.0 } else { 0.0 }).collect()),
                    Values::Ints(ints) if datatype.is_integer() || datatype == Datatype::Bool => {
                        ints.iter().copied().enumerate().map(whole).collect()
                    }
                    Values::Ints(ints) => ints.iter().map(|&int| int as f64).enumerate().map(float).collect(),
                    Values::Floats(_) if datatype.is_integer() || datatype == Datatype::Bool => {
                        return Err(self.malformed(format!("expected {}, got a fraction", datatype.as_str())));
                    }
                    Values::Floats(floats) => floats.iter().copied().enumerate().map(float).collect(),
                    Values::Texts(_) => return Err(self.malformed("expected numbers, got texts".to_string())),
                }
            }
            Data::Binary(bytes) => {
                let size = match datatype {
                    Datatype::Bool | Datatype::Uint8 | Datatype::Int8 | Datatype::Bytes => 1,
                    Datatype::Uint16 | Datatype::Int16 | Datatype::Fp16 | Datatype::Bf16 => 2,
                    Datatype::Uint32 | Datatype::Int32 | Datatype::Fp32 => 4,
                    Datatype::Uint64 | Datatype::Int64 | Datatype::Fp64 => 8,
                };
                let chunks = bytes.chunks_exact(size);
                self.check_rest(chunks.remainder(), size)?;
                // Little-endian, so that the bits of a short type are the low ones.
                let bits = chunks.map(|chunk| chunk.iter().rev().fold(0u64, |bits, byte| bits << 8 | u64::from(*byte)));
                let number = |place: (usize, u64)| {
                    let (i, bits) = place;
                    match datatype {
                        Datatype::Fp32 => float((i, f32::from_bits(bits as u32).into())),
                        Datatype::Fp64 => float((i, f64::from_bits(bits))),
                        Datatype::Fp16 => float((i, half::f16::from_bits(bits as u16).into())),
                        Datatype::Bf16 => float((i, half::bf16::from_bits(bits as u16).into())),
                        Datatype::Int8 => Ok(f32::from(bits as i8)),
                        Datatype::Int16 => Ok(f32::from(bits as i16)),
                        Datatype::Int32 => whole((i, i64::from(bits as i32))),
                        Datatype::Int64 => whole((i, bits as i64)),
                        Datatype::Bool if bits > 1 => Err(invalid(format!("element {i} is {bits}: a BOOL is 0 or 1"))),
                        // Beyond 2^63 as far from exact as below it.
                        _ => whole((i, i64::try_from(bits).unwrap_or(i64::MAX))),
                    }
                };
                bits.enumerate().map(number).collect()
            }
        }?;
        self.check_count(floats.len(), expected)?;
        Ok(floats)
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
            if let Ok(elements) = tensor.clone().bytes() {
                prop_assert_eq!(Some(elements.len()), product);
            }
            if let Ok(ints) = tensor.ints() {
                prop_assert_eq!(Some(ints.len()), product);
            }
        }

        #[test]
        fn texts_read_back(texts in proptest::collection::vec(any::<String>(), 0..20)) {
            let read = tensor(Datatype::Bytes, &[texts.len()], packed(&texts)).bytes();
            prop_assert_eq!(read, Ok(texts.into_iter().map(String::into_bytes).collect::<Vec<_>>()));
        }

        #[test]
        fn a_cut_text_is_refused(texts in proptest::collection::vec(any::<String>(), 1..5), cut in 1usize..50) {
            let mut bytes = packed(&texts);
            bytes.truncate(bytes.len().saturating_sub(cut));
            prop_assert!(tensor(Datatype::Bytes, &[texts.len()], bytes).bytes().is_err());
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
        let message = |tensor: Tensor| tensor.bytes().unwrap_err().to_string();
        assert!(
            message(tensor(Datatype::Bytes, &[2], vec![0; 4])).contains("has 1 elements, its shape [2] asks for 2")
        );
        assert!(message(tensor(Datatype::Bytes, &[1], vec![0; 9])).contains("5 bytes after its 1 elements"));
        let odd = tensor(Datatype::Int64, &[1], vec![0; 9]).ints().unwrap_err().to_string();
        assert!(odd.contains("no multiple of 8"), "{odd}");
    }
}
