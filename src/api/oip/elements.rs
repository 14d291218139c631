//! A tensor's `data` as JSON: a flat list, or lists in lists as the shape says.

use std::fmt;

use serde::de::{DeserializeSeed, Error as _, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};

/// The elements in row-major order.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// No element: of which kind cannot be seen.
    None,
    Texts(Vec<String>),
    Ints(Vec<i64>),
    /// Numbers of which one has a fraction or an exponent.
    Floats(Vec<f64>),
    Bools(Vec<bool>),
}

/// Elements as they were nested.
///
/// ```text
/// [1, 2, 3, 4]      dims [4]
/// [[1, 2], [3, 4]]  dims [2, 2]
/// [[1, 2], [3]]     refused: lists of one depth must be equally long
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Elements {
    pub values: Values,
    /// Length of the lists at each depth, outermost first. Not empty.
    pub dims: Vec<usize>,
}

impl<'de> Deserialize<'de> for Elements {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut nest = Nest { values: Values::None, dims: Vec::new(), leaf_depth: None };
        Level { nest: &mut nest, depth: 0 }.deserialize(deserializer)?;
        let dims = nest.dims.into_iter().map(|len| len.unwrap_or(0)).collect::<Vec<_>>();
        if dims.is_empty() {
            return Err(D::Error::custom("expected a list"));
        }
        Ok(Self { values: nest.values, dims })
    }
}

/// What has been read so far.
struct Nest {
    values: Values,
    /// By depth; `None` while the first list of that depth is open.
    dims: Vec<Option<usize>>,
    /// At which depth elements stand; all at the same.
    leaf_depth: Option<usize>,
}

impl Nest {
    fn leaf<E: serde::de::Error>(&mut self, depth: usize) -> Result<(), E> {
        if depth == 0 {
            return Err(E::custom("expected a list"));
        }
        // Beside a list, which may be empty, there is no element.
        if self.dims.len() != depth {
            return Err(E::custom("elements at different depths"));
        }
        self.leaf_depth = Some(depth);
        Ok(())
    }

    fn text<E: serde::de::Error>(&mut self, depth: usize, text: String) -> Result<(), E> {
        self.leaf(depth)?;
        match &mut self.values {
            Values::None => self.values = Values::Texts(vec![text]),
            Values::Texts(texts) => texts.push(text),
            _ => return Err(E::custom("a text among numbers")),
        }
        Ok(())
    }

    fn int<E: serde::de::Error>(&mut self, depth: usize, int: i64) -> Result<(), E> {
        self.leaf(depth)?;
        match &mut self.values {
            Values::None => self.values = Values::Ints(vec![int]),
            Values::Ints(ints) => ints.push(int),
            Values::Floats(floats) => floats.push(int as f64),
            Values::Texts(_) => return Err(E::custom("a number among texts")),
            Values::Bools(_) => return Err(E::custom("a number among true and false")),
        }
        Ok(())
    }

    fn float<E: serde::de::Error>(&mut self, depth: usize, float: f64) -> Result<(), E> {
        self.leaf(depth)?;
        match &mut self.values {
            Values::None => self.values = Values::Floats(vec![float]),
            // The first that has a fraction: those before are floats that were written without one.
            Values::Ints(ints) => {
                self.values = Values::Floats(ints.iter().map(|int| *int as f64).chain([float]).collect());
            }
            Values::Floats(floats) => floats.push(float),
            Values::Texts(_) => return Err(E::custom("a number among texts")),
            Values::Bools(_) => return Err(E::custom("a number among true and false")),
        }
        Ok(())
    }

    fn bool<E: serde::de::Error>(&mut self, depth: usize, value: bool) -> Result<(), E> {
        self.leaf(depth)?;
        match &mut self.values {
            Values::None => self.values = Values::Bools(vec![value]),
            Values::Bools(bools) => bools.push(value),
            _ => return Err(E::custom("true or false among other values")),
        }
        Ok(())
    }

    /// The length of a list that has ended.
    fn len<E: serde::de::Error>(&mut self, depth: usize, len: usize) -> Result<(), E> {
        match self.dims.get_mut(depth) {
            Some(Some(known)) if *known != len => {
                Err(E::custom(format!("lists of different lengths at one depth: {known} and {len}")))
            }
            Some(slot) => {
                *slot = Some(len);
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// One list, or one element, at its depth. serde_json bounds the depth.
struct Level<'a> {
    nest: &'a mut Nest,
    depth: usize,
}

impl<'de> DeserializeSeed<'de> for Level<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Level<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("texts, numbers or booleans, in one list or in lists")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<(), E> {
        self.nest.text(self.depth, text.to_string())
    }

    fn visit_string<E: serde::de::Error>(self, text: String) -> Result<(), E> {
        self.nest.text(self.depth, text)
    }

    fn visit_i64<E: serde::de::Error>(self, int: i64) -> Result<(), E> {
        self.nest.int(self.depth, int)
    }

    fn visit_u64<E: serde::de::Error>(self, int: u64) -> Result<(), E> {
        let wide = |_| E::invalid_value(Unexpected::Unsigned(int), &"an integer below 2^63");
        self.nest.int(self.depth, i64::try_from(int).map_err(wide)?)
    }

    fn visit_f64<E: serde::de::Error>(self, float: f64) -> Result<(), E> {
        self.nest.float(self.depth, float)
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<(), E> {
        self.nest.bool(self.depth, value)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let Self { nest, depth } = self;
        if nest.leaf_depth.is_some_and(|leaf_depth| leaf_depth <= depth) {
            return Err(A::Error::custom("elements at different depths"));
        }
        if nest.dims.len() == depth {
            nest.dims.push(None);
        }
        let mut len = 0;
        while seq.next_element_seed(Level { nest: &mut *nest, depth: depth + 1 })?.is_some() {
            len += 1;
        }
        nest.len(depth, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Elements, String> {
        serde_json::from_str(json).map_err(|e| e.to_string())
    }

    #[test]
    fn elements_are_flat_and_their_nesting_is_known() {
        let ints =
            |dims: &[usize], ints: &[i64]| Ok(Elements { values: Values::Ints(ints.to_vec()), dims: dims.to_vec() });
        assert_eq!(parse("[1,2,3,4]"), ints(&[4], &[1, 2, 3, 4]));
        assert_eq!(parse("[[1,2],[3,-4]]"), ints(&[2, 2], &[1, 2, 3, -4]));
        assert_eq!(parse("[[[1]],[[2]]]"), ints(&[2, 1, 1], &[1, 2]));
        let texts = Values::Texts(vec!["a".into(), "é".into()]);
        assert_eq!(parse(r#"[["a"],["é"]]"#), Ok(Elements { values: texts, dims: vec![2, 1] }));
        let floats = Values::Floats(vec![1.0, 2.5, 3.0]);
        assert_eq!(parse("[1,2.5,3]"), Ok(Elements { values: floats, dims: vec![3] }));
        assert_eq!(parse("[true,false]"), Ok(Elements { values: Values::Bools(vec![true, false]), dims: vec![2] }));
        assert_eq!(parse("[]"), Ok(Elements { values: Values::None, dims: vec![0] }));
        assert_eq!(parse("[[],[]]"), Ok(Elements { values: Values::None, dims: vec![2, 0] }));
    }

    #[test]
    fn what_is_no_tensor_is_refused() {
        for json in [
            "1",
            "\"a\"",
            "{}",
            "null",
            "[[1],[2,3]]",
            "[1,[2]]",
            "[[1],2]",
            "[[1],[[2]]]",
            "[1,\"a\"]",
            "[\"a\",1]",
            "[1,true]",
            "[true,0.5]",
            "[\"a\",0.5]",
            "[null]",
            "[{}]",
            "[9223372036854775808]",
            "[[],[1]]",
            "[[],1]",
        ] {
            assert!(parse(json).is_err(), "{json}");
        }
        assert!(parse(&"[".repeat(200_000)).is_err(), "the depth is bounded");
    }
}
