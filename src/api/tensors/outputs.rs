//! From computed rows to output tensors.

use std::borrow::Cow;
use std::ops::Deref;

use super::Datatype;
use super::signature::Signature;
use crate::inference::Computed;
use crate::inference::outcome::{pairs, scores};
use crate::output::Row;
use crate::request::Task;
use crate::{Error, Result};

/// Most elements that a tensor may have with its padding. One long row among many short ones makes all of them long: 1 GiB
/// of f32 is more than any client asks for on purpose.
const MAX_PADDED: usize = 1 << 28;

/// The elements of an output, row by row.
#[derive(Debug, Clone)]
pub enum Values {
    /// FP32, one row an input, all of one length: those that the cache holds too are not copied.
    Rows(Vec<Row>),
    /// FP32.
    Floats(Vec<f32>),
    Ints(Vec<i32>),
    Longs(Vec<i64>),
    Texts(Vec<String>),
}

/// An output with its values.
#[derive(Debug, Clone)]
pub struct OutputTensor {
    pub name: Cow<'static, str>,
    /// The inputs of the request first.
    pub shape: Vec<usize>,
    /// As many as the shape says.
    pub values: Values,
}

impl OutputTensor {
    /// The type of its elements.
    pub fn datatype(&self) -> Datatype {
        match self.values {
            Values::Rows(_) | Values::Floats(_) => Datatype::Fp32,
            Values::Ints(_) => Datatype::Int32,
            Values::Longs(_) => Datatype::Int64,
            Values::Texts(_) => Datatype::Bytes,
        }
    }

    /// Elements in all.
    pub fn num_values(&self) -> usize {
        self.shape.iter().product()
    }

    /// The k largest values of each row as Triton writes classes, largest first: "value:place:label", without the label
    /// where there is none.
    ///
    /// Source: triton-inference-server/server `docs/protocol/extension_classification.md`.
    pub fn classes(&self, labels: &[String], k: usize) -> Self {
        let num_classes = self.shape.last().copied().unwrap_or(0);
        let class = |(i, value): (usize, f32)| match labels.get(i) {
            Some(label) => format!("{value}:{i}:{label}"),
            None => format!("{value}:{i}"),
        };
        let of_row = |row: &[f32]| {
            let mut ranked: Vec<(usize, f32)> = row.iter().copied().enumerate().collect();
            ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
            ranked.into_iter().take(k).map(class).collect::<Vec<_>>()
        };
        let texts = match &self.values {
            Values::Rows(rows) => rows.iter().flat_map(|row| of_row(row)).collect(),
            Values::Floats(values) => values.chunks(num_classes.max(1)).flat_map(of_row).collect(),
            // The signature has no classes of another type.
            Values::Ints(_) | Values::Longs(_) | Values::Texts(_) => Vec::new(),
        };
        let shape = vec![self.shape.first().copied().unwrap_or(0), num_classes.min(k)];
        Self { name: self.name.clone(), shape, values: Values::Texts(texts) }
    }
}

/// All outputs of a computed request, in the signature's order. `form` is that of classes' scores.
///
/// Errors: `TooLarge` for rows that padding makes too large; `Internal` for a row of a length that its task does not give.
pub fn outputs_of(computed: Computed, signature: &Signature, form: scores::Form) -> Result<Vec<OutputTensor>> {
    let names = signature.outputs.iter().map(|spec| spec.name.clone());
    let tensors: Vec<(Vec<usize>, Values)> = match &computed.task {
        Task::Embed => {
            // A request has one `dimensions`, so that all rows have the first one's length.
            let shape = vec![computed.rows.len(), computed.rows.first().map_or(0, |row| row.len())];
            vec![(shape, Values::Rows(computed.rows))]
        }
        Task::Classify => {
            let num_labels = computed.info.labels.len();
            let scored = computed.rows.iter().flat_map(|row| scores::scores(&computed.info, row, form));
            vec![(vec![computed.rows.len(), num_labels], Values::Floats(scored.collect()))]
        }
        Task::EmbedAll => {
            let width = computed.info.hidden_size;
            let Padded { values, longest, lengths } =
                padded(computed.rows.iter().map(|row| Cow::Borrowed(&**row)), width)?;
            vec![(vec![lengths.len(), longest, width], Values::Floats(values)), lengths_of(lengths)]
        }
        Task::TokenClassify => {
            let num_labels = computed.info.labels.len();
            let scored = |row: &[f32]| match form {
                scores::Form::Raw => row.to_vec(),
                _ => row.chunks_exact(num_labels.max(1)).flat_map(scores::softmax).collect(),
            };
            let rows = computed.rows.iter().map(|row| Cow::Owned(scored(row)));
            let Padded { values, longest, lengths } = padded(rows, num_labels)?;
            vec![(vec![lengths.len(), longest, num_labels], Values::Floats(values)), lengths_of(lengths)]
        }
        Task::Sparse => {
            let alone =
                |row: &Row| Cow::Owned(pairs(row).flat_map(|(id, value)| [id as f32, value]).collect::<Vec<_>>());
            let Padded { values, longest, lengths } = padded(computed.rows.iter().map(alone), 2)?;
            let (ids, weights) = unzipped(&values);
            let shape = vec![lengths.len(), longest];
            vec![(shape.clone(), ids), (shape, weights), lengths_of(lengths)]
        }
        Task::Infer => {
            let shapes = computed.info.signature.outputs.iter().map(|output| &*output.shape);
            let datatypes = signature.outputs.iter().map(|spec| spec.datatype);
            cut(&computed.rows, &shapes.zip(datatypes).collect::<Vec<_>>())?
        }
        Task::FillMask { .. } => {
            // Each mask of each row has equally many pairs: the request names `top_k` and targets once.
            let of_mask = |row: &Row| row.len() / computed.num_masks(row).max(1);
            let per_mask = computed.rows.first().map_or(2, of_mask).max(2);
            let Padded { values, longest, lengths } =
                padded(computed.rows.iter().map(|row| Cow::Borrowed(&**row)), per_mask)?;
            let (ids, probabilities) = unzipped(&values);
            let shape = vec![lengths.len(), longest, per_mask / 2];
            vec![(shape.clone(), ids), (shape, probabilities), lengths_of(lengths)]
        }
    };
    Ok(names.zip(tensors).map(|(name, (shape, values))| OutputTensor { name, shape, values }).collect())
}

/// The tensors that rows hold one after another; `parts` are the shape of each, of one input, and its type.
///
/// Errors: `Internal` for a row of another length.
pub fn cut<R: Deref<Target = [f32]>>(rows: &[R], parts: &[(&[usize], Datatype)]) -> Result<Vec<(Vec<usize>, Values)>> {
    let num_values = |shape: &[usize]| shape.iter().product::<usize>();
    let expected: usize = parts.iter().map(|(shape, _)| num_values(shape)).sum();
    if let Some(row) = rows.iter().find(|row| row.len() != expected) {
        let cause = format!("a row of {} values, the outputs have {expected}", row.len());
        return Err(Error::Internal { cause });
    }
    let mut start = 0;
    let mut tensor = |(shape, datatype): &(&[usize], Datatype)| {
        let place = start..start + num_values(shape);
        start = place.end;
        let values = rows.iter().flat_map(|row| row[place.clone()].iter().copied());
        let values = match datatype {
            Datatype::Int64 => Values::Longs(values.map(|value| value as i64).collect()),
            Datatype::Int32 => Values::Ints(values.map(|value| value as i32).collect()),
            _ => Values::Floats(values.collect()),
        };
        ([rows.len()].into_iter().chain(shape.iter().copied()).collect(), values)
    };
    Ok(parts.iter().map(&mut tensor).collect())
}

/// Rows of different lengths in one tensor, zeros behind the shorter ones.
struct Padded {
    /// [num_rows * longest * width].
    values: Vec<f32>,
    /// Items of the longest row.
    longest: usize,
    /// [num_rows], items of each row.
    lengths: Vec<usize>,
}

/// `width`: values of an item.
fn padded<'a>(rows: impl Iterator<Item = Cow<'a, [f32]>>, width: usize) -> Result<Padded> {
    let rows: Vec<Cow<[f32]>> = rows.collect();
    if let Some(row) = rows.iter().find(|row| width == 0 || row.len() % width != 0) {
        return Err(Error::Internal { cause: format!("a row of {} values, which {width} does not divide", row.len()) });
    }
    let lengths: Vec<usize> = rows.iter().map(|row| row.len() / width).collect();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let total = rows.len().saturating_mul(longest).saturating_mul(width);
    if total > MAX_PADDED {
        let (field, limit) = ("outputs".to_string(), MAX_PADDED);
        return Err(Error::TooLarge { field, got: total, limit, unit: "values, padding included" });
    }
    let mut values = vec![0f32; total];
    for (slot, row) in values.chunks_exact_mut((longest * width).max(1)).zip(&rows) {
        slot[..row.len()].copy_from_slice(row);
    }
    Ok(Padded { values, longest, lengths })
}

/// How much of each row is no padding. No row has more items than a sequence has tokens or a vocabulary entries, which
/// are below 2^31.
fn lengths_of(lengths: Vec<usize>) -> (Vec<usize>, Values) {
    (vec![lengths.len()], Values::Ints(lengths.into_iter().map(|len| len as i32).collect()))
}

/// Ids, which are exact in f32, and what stands beside each.
fn unzipped(pairs: &[f32]) -> (Values, Values) {
    let (ids, values) = pairs.chunks_exact(2).map(|pair| (pair[0] as i64, pair[1])).unzip();
    (Values::Longs(ids), Values::Floats(values))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shorter_rows_are_padded_behind() {
        let rows = [vec![1.0, 2.0], vec![], vec![3.0, 4.0, 5.0, 6.0]];
        let found = padded(rows.iter().map(|row| Cow::Borrowed(&row[..])), 2).unwrap();
        assert_eq!(found.values, [1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!((found.longest, found.lengths), (2, vec![1, 0, 2]));
        assert!(padded([Cow::Borrowed(&[1.0][..])].into_iter(), 2).is_err());
        let none = padded([].into_iter(), 2).unwrap();
        assert_eq!((none.values.len(), none.longest, none.lengths.len()), (0, 0, 0));
    }

    #[test]
    fn padding_has_a_limit() {
        let long = vec![0f32; 1 << 16];
        let rows = || [Cow::Borrowed(&long[..])].into_iter().chain((0..1 << 13).map(|_| Cow::Borrowed(&[][..])));
        let error = padded(rows(), 1).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("outputs has 536936448 values, padding included"), "{error}");
    }

    #[test]
    fn classes_are_the_largest_first_with_their_labels() {
        let values = Values::Floats(vec![0.25, 0.5, 0.25, 1e-9, 0.5, 3.0]);
        let output = OutputTensor { name: "scores".into(), shape: vec![2, 3], values };
        let labels = ["a:b", "c"].map(String::from);
        let texts_of = |output: OutputTensor| match output.values {
            Values::Texts(texts) => texts,
            other => panic!("{other:?}"),
        };
        let classes = output.classes(&labels, 2);
        assert_eq!(classes.shape, [2, 2]);
        assert_eq!(texts_of(classes), ["0.5:1:c", "0.25:0:a:b", "3:2", "0.5:1:c"]);
        assert_eq!(output.classes(&labels, 9).shape, [2, 3]);
        let rows = Values::Rows(vec![Row::Own(vec![0.000000001, 0.5])]);
        let output = OutputTensor { name: "scores".into(), shape: vec![1, 2], values: rows };
        assert_eq!(texts_of(output.classes(&[], 2)), ["0.5:1", "0.000000001:0"]);
    }
}
