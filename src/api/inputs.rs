//! The field that OpenAI calls `input` and TEI `inputs`: a text, token ids, or a list of either.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error as _, MapAccess, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};
use utoipa::openapi::schema::{ArrayBuilder, OneOfBuilder, SchemaType, Type};
use utoipa::openapi::{Object, ObjectBuilder, RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::images::image;
use crate::request::Input;
use crate::{Error, Result};

/// The parsed field.
///
/// ```text
/// "a"              one text            [7, 8]           one list of token ids
/// ["a", "b"]       two texts           [[7, 8], [9]]    two lists of token ids
/// ["a", [7, 8]]    one of each, as TEI takes it
/// [["a", "b"]]     a pair of texts, for tasks that take one
/// [{"text": "a"}]  one text, as Jina's clients may write it
/// [{"image": "b"}] one image: base64 or a data URL, as they write it
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Inputs(pub Vec<Input>);

impl Inputs {
    /// Errors: `Empty` without an input, `TooLarge` with more than `limit`, `Malformed` for a pair of texts.
    pub fn checked(self, field: &str, limit: usize) -> Result<Vec<Input>> {
        check_count(field, self.0.len(), limit)?;
        match self.0.iter().position(|input| matches!(input, Input::Pair(..))) {
            None => Ok(self.0),
            Some(i) => {
                let reason = "expected a text or token ids, got a pair of texts".to_string();
                Err(Error::Malformed { field: format!("{field}[{i}]"), reason })
            }
        }
    }

    /// As [`Self::checked`], for tasks that read two texts together.
    pub fn with_pairs(self, field: &str, limit: usize) -> Result<Vec<Input>> {
        check_count(field, self.0.len(), limit)?;
        Ok(self.0)
    }

    /// Errors: those of [`Self::checked`], `Malformed` for token ids.
    pub fn texts(self, field: &str, limit: usize) -> Result<Vec<String>> {
        let take = |(i, input)| match input {
            Input::Text(text) => Ok(text),
            other => {
                let reason = format!("expected a text, got {}", other.kind());
                Err(Error::Malformed { field: format!("{field}[{i}]"), reason })
            }
        };
        self.checked(field, limit)?.into_iter().enumerate().map(take).collect()
    }

    /// Errors: those of [`Self::checked`], `Malformed` for a text.
    pub fn token_ids(self, field: &str, limit: usize) -> Result<Vec<Vec<u32>>> {
        let take = |(i, input)| match input {
            Input::TokenIds(ids) => Ok(ids),
            other => {
                let reason = format!("expected token ids, got {}", other.kind());
                Err(Error::Malformed { field: format!("{field}[{i}]"), reason })
            }
        };
        self.checked(field, limit)?.into_iter().enumerate().map(take).collect()
    }
}

/// Errors: `Empty` for 0, `TooLarge` for more than `limit`.
pub fn check_count(field: &str, got: usize, limit: usize) -> Result<()> {
    match got {
        0 => Err(Error::Empty { field: field.to_string() }),
        _ if got > limit => Err(Error::TooLarge { field: field.to_string(), got, limit, unit: "inputs" }),
        _ => Ok(()),
    }
}

/// The engine names inputs as OpenAI does (`input[3]`); in the errors of other protocols they are `name`.
pub fn renamed(error: Error, name: &str) -> Error {
    let ours = |field: String| match field.strip_prefix("input") {
        Some(rest) if rest.is_empty() || rest.starts_with(['[', '.']) => format!("{name}{rest}"),
        _ => field,
    };
    error.with_field(ours)
}

/// An element of the outer list.
enum Element {
    Text(String),
    Id(u32),
    Ids(Vec<u32>),
    Pair(String, String),
    Image(Input),
}

/// An element of an inner list.
enum Part {
    Id(u32),
    Text(String),
}

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Element::deserialize(deserializer)? {
            Element::Id(id) => Ok(Self::Id(id)),
            Element::Text(text) => Ok(Self::Text(text)),
            Element::Ids(_) | Element::Pair(..) => Err(D::Error::custom("a list in a list in a list")),
            Element::Image(_) => Err(D::Error::custom("an image in a list among inputs")),
        }
    }
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ElementVisitor)
    }
}

struct ElementVisitor;

impl<'de> Visitor<'de> for ElementVisitor {
    type Value = Element;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a text, a token id or a list of token ids")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Element, E> {
        Ok(Element::Text(text.to_string()))
    }

    fn visit_string<E: serde::de::Error>(self, text: String) -> Result<Element, E> {
        Ok(Element::Text(text))
    }

    fn visit_u64<E: serde::de::Error>(self, id: u64) -> Result<Element, E> {
        let wide = |_| E::invalid_value(Unexpected::Unsigned(id), &"a token id below 2^32");
        u32::try_from(id).map(Element::Id).map_err(wide)
    }

    fn visit_i64<E: serde::de::Error>(self, id: i64) -> Result<Element, E> {
        Err(E::invalid_value(Unexpected::Signed(id), &"a token id of 0 or more"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Element, A::Error> {
        let mut ids = match seq.next_element::<Part>()? {
            None => Vec::new(),
            Some(Part::Id(first)) => vec![first],
            Some(Part::Text(first)) => {
                let Some(second) = seq.next_element::<String>()? else {
                    return Err(A::Error::custom("a list of one text among inputs; a pair has two"));
                };
                return match seq.next_element::<serde::de::IgnoredAny>()? {
                    None => Ok(Element::Pair(first, second)),
                    Some(_) => Err(A::Error::custom("a list of more than two texts among inputs; a pair has two")),
                };
            }
        };
        while let Some(id) = seq.next_element::<u32>()? {
            ids.push(id);
        }
        Ok(Element::Ids(ids))
    }

    /// Jina's form of a text or an image. Its other fields are refused by their names.
    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Element, A::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Named {
            text: Option<String>,
            image: Option<String>,
        }
        match Named::deserialize(MapAccessDeserializer::new(map))? {
            Named { text: Some(text), image: None } => Ok(Element::Text(text)),
            Named { text: None, image: Some(file) } => {
                image(&file).map(Element::Image).map_err(|reason| A::Error::custom(format!("`image`: {reason}")))
            }
            _ => Err(A::Error::custom("expected either `text` or `image`")),
        }
    }
}

impl<'de> Deserialize<'de> for Inputs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(InputsVisitor)
    }
}

/// Also used by fields that are inputs or something else.
pub struct InputsVisitor;

impl<'de> Visitor<'de> for InputsVisitor {
    type Value = Inputs;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a text, a list of token ids, or a list of either")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Inputs, E> {
        Ok(Inputs(vec![Input::Text(text.to_string())]))
    }

    fn visit_string<E: serde::de::Error>(self, text: String) -> Result<Inputs, E> {
        Ok(Inputs(vec![Input::Text(text)]))
    }

    /// The first element says whether this is one list of ids or a list of inputs.
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Inputs, A::Error> {
        let mut inputs = match seq.next_element::<Element>()? {
            None => return Ok(Inputs(Vec::new())),
            Some(Element::Id(first)) => {
                let mut ids = vec![first];
                while let Some(id) = seq.next_element::<u32>()? {
                    ids.push(id);
                }
                return Ok(Inputs(vec![Input::TokenIds(ids)]));
            }
            Some(Element::Text(text)) => vec![Input::Text(text)],
            Some(Element::Ids(ids)) => vec![Input::TokenIds(ids)],
            Some(Element::Pair(first, second)) => vec![Input::Pair(first, second)],
            Some(Element::Image(image)) => vec![image],
        };
        while let Some(element) = seq.next_element::<Element>()? {
            inputs.push(match element {
                Element::Text(text) => Input::Text(text),
                Element::Ids(ids) => Input::TokenIds(ids),
                Element::Pair(first, second) => Input::Pair(first, second),
                Element::Image(image) => image,
                Element::Id(_) => return Err(A::Error::custom("a token id among texts or lists")),
            });
        }
        Ok(Inputs(inputs))
    }
}

impl PartialSchema for Inputs {
    fn schema() -> RefOr<Schema> {
        let text = || Object::with_type(Type::String);
        let ids = || {
            let id = ObjectBuilder::new().schema_type(SchemaType::new(Type::Integer)).minimum(Some(0));
            ArrayBuilder::new().items(id)
        };
        let named = ObjectBuilder::new().property("text", text()).required("text");
        let image = ObjectBuilder::new().property("image", text()).required("image");
        let either = OneOfBuilder::new().item(text()).item(ids()).item(named).item(image);
        OneOfBuilder::new()
            .description(Some("A text, a list of token ids of the model's vocabulary, or a list of either and of images: PNG, JPEG or WebP in base64, or a data URL."))
            .item(text())
            .item(ids())
            .item(ArrayBuilder::new().items(either))
            .into()
    }
}

impl ToSchema for Inputs {}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Vec<Input>, String> {
        serde_json::from_str::<Inputs>(json).map(|i| i.0).map_err(|e| e.to_string())
    }

    fn text(s: &str) -> Input {
        Input::Text(s.to_string())
    }

    #[test]
    fn every_form_is_told_apart() {
        assert_eq!(parse(r#""a""#), Ok(vec![text("a")]));
        assert_eq!(parse(r#"["a","b"]"#), Ok(vec![text("a"), text("b")]));
        assert_eq!(parse("[7,8]"), Ok(vec![Input::TokenIds(vec![7, 8])]));
        assert_eq!(parse("[[7,8],[9]]"), Ok(vec![Input::TokenIds(vec![7, 8]), Input::TokenIds(vec![9])]));
        assert_eq!(parse(r#"["a",[7]]"#), Ok(vec![text("a"), Input::TokenIds(vec![7])]));
        assert_eq!(parse(r#"[["a","b"]]"#), Ok(vec![Input::Pair("a".into(), "b".into())]));
        assert_eq!(parse(r#"[{"text":"a"},"b"]"#), Ok(vec![text("a"), text("b")]));
        assert_eq!(parse(r#"[{"image":"AAE="}]"#), Ok(vec![Input::Image(vec![0, 1].into())]));
        assert_eq!(parse("[]"), Ok(vec![]));
        assert_eq!(parse(r#""é\u0000""#), Ok(vec![text("é\0")]));
    }

    #[test]
    fn what_is_neither_is_refused() {
        let bad = [
            "7",
            "null",
            "true",
            "{}",
            "[1,\"a\"]",
            "[\"a\",1]",
            "[-1]",
            "[1.5]",
            "[4294967296]",
            "[[[1]]]",
            "[null]",
            r#"[["a"]]"#,
            r#"[["a","b","c"]]"#,
            r#"[["a",1]]"#,
        ];
        for json in bad {
            assert!(parse(json).is_err(), "{json}");
        }
        for json in [
            r#"[{"image":"b,64"}]"#,
            r#"[{"text":"a","image":"AAAA"}]"#,
            r#"[["a",{"image":"AAAA"}]]"#,
            r#"[{"text":7}]"#,
            "[{}]",
        ] {
            assert!(parse(json).is_err(), "{json}");
        }
        assert!(parse(r#"[{"image":"b,64"}]"#).unwrap_err().contains("`image`"));
        assert!(parse("[4294967296]").unwrap_err().contains("token id below"));
    }

    #[test]
    fn counts_are_checked_by_name() {
        let none = Inputs(vec![]).checked("input", 2);
        assert_eq!(none, Err(Error::Empty { field: "input".into() }));
        let many = Inputs(vec![text("a"), text("b"), text("c")]).checked("input", 2);
        assert_eq!(many, Err(Error::TooLarge { field: "input".into(), got: 3, limit: 2, unit: "inputs" }));
    }
}
