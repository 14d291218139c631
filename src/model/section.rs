//! Reading a checked TOML table: every fault is collected with its place, and a key nobody asked for is one.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::{Error, Result};

/// The faults of one file, in the order found.
pub struct Faults<'a> {
    file: &'a Path,
    text: &'a str,
    faults: Vec<String>,
}

impl<'a> Faults<'a> {
    pub fn new(file: &'a Path, text: &'a str) -> Self {
        Self { file, text, faults: Vec::new() }
    }

    pub fn is_empty(&self) -> bool {
        self.faults.is_empty()
    }

    /// A fault at a place in the text, or of the whole file.
    pub fn at(&mut self, span: Option<Range<usize>>, reason: &str) {
        let line = span.map(|s| self.text[..s.start.min(self.text.len())].matches('\n').count() + 1);
        let file = self.file.display();
        self.faults.push(match line {
            Some(line) => format!("{file}:{line}: {reason}"),
            None => format!("{file}: {reason}"),
        });
    }

    /// A fault of one key, present or not.
    pub fn key(&mut self, section: &Section, key: &str, reason: &str) {
        let span = section.spans.get(key).cloned().or_else(|| section.span.clone());
        self.at(span, &format!("{}: {reason}", section.join(key)));
    }

    /// A fault of a whole section.
    pub fn section(&mut self, section: &Section, reason: &str) {
        self.at(section.span.clone(), &format!("[{}] {reason}", section.path));
    }

    /// Errors: [`Error::Config`] if there was any fault.
    pub fn into_result(self) -> Result<()> {
        if self.faults.is_empty() { Ok(()) } else { Err(Error::Config { faults: self.faults }) }
    }
}

/// One table, and which of its keys were asked for.
pub struct Section<'a> {
    /// Dotted, empty for the root.
    path: String,
    span: Option<Range<usize>>,
    values: BTreeMap<&'a str, &'a Spanned<DeValue<'a>>>,
    spans: BTreeMap<&'a str, Range<usize>>,
    known: BTreeSet<String>,
}

impl<'a> Section<'a> {
    pub fn root(table: &'a DeTable<'a>) -> Self {
        Self::new(String::new(), None, table)
    }

    fn new(path: String, span: Option<Range<usize>>, table: &'a DeTable<'a>) -> Self {
        let values = table.iter().map(|(k, v)| (k.get_ref().as_ref(), v)).collect();
        let spans = table.iter().map(|(k, _)| (k.get_ref().as_ref(), k.span())).collect();
        Self { path, span, values, spans, known: BTreeSet::new() }
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    pub fn keys(&self) -> Vec<String> {
        self.values.keys().map(|k| k.to_string()).collect()
    }

    pub fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// The value as it stands, the key marked as known.
    pub fn take(&mut self, key: &str) -> Option<&'a DeValue<'a>> {
        self.known.insert(key.to_string());
        self.values.get(key).map(|v| v.get_ref())
    }

    /// Takes a key's text; a value of another type is a fault.
    pub fn string(&mut self, key: &str, faults: &mut Faults) -> Option<String> {
        let value = self.take(key)?;
        match value.as_str() {
            Some(s) if !s.is_empty() => Some(s.to_string()),
            Some(_) => self.refuse(key, "must not be empty", faults),
            None => self.wrong_type(key, "a string", value, faults),
        }
    }

    pub fn boolean(&mut self, key: &str, faults: &mut Faults) -> Option<bool> {
        let value = self.take(key)?;
        value.as_bool().or_else(|| self.wrong_type(key, "true or false", value, faults))
    }

    /// A whole number from 1.
    pub fn count(&mut self, key: &str, faults: &mut Faults) -> Option<usize> {
        let value = self.take(key)?;
        let Some(integer) = value.as_integer() else {
            return self.wrong_type(key, "a whole number", value, faults);
        };
        match usize::from_str_radix(integer.as_str(), integer.radix()) {
            Ok(n) if n > 0 => Some(n),
            _ => self.refuse(key, &format!("must be a whole number from 1, got {integer}"), faults),
        }
    }

    /// A time with its unit, "2ms"; 0 needs none.
    pub fn duration(&mut self, key: &str, faults: &mut Faults) -> Option<Duration> {
        let value = self.take(key)?;
        let Some(s) = value.as_str() else {
            return self.wrong_type(key, "a time with its unit, \"2ms\" for example", value, faults);
        };
        match humantime::parse_duration(s) {
            Ok(duration) => Some(duration),
            Err(e) => self.refuse(key, &format!("`{s}` is not a time such as \"2ms\": {e}"), faults),
        }
    }

    /// One of the words an enum serialises to; the message of serde lists them.
    pub fn word<T: DeserializeOwned>(&mut self, key: &str, faults: &mut Faults) -> Option<T> {
        let s = self.string(key, faults)?;
        match T::deserialize(serde::de::value::StrDeserializer::<serde::de::value::Error>::new(&s)) {
            Ok(value) => Some(value),
            Err(e) => self.refuse(key, &e.to_string(), faults),
        }
    }

    /// A list of strings; empty if absent.
    pub fn list(&mut self, key: &str, faults: &mut Faults) -> Vec<String> {
        let Some(value) = self.take(key) else { return Vec::new() };
        let words: Option<Vec<String>> =
            value.as_array().and_then(|a| a.iter().map(|v| v.get_ref().as_str().map(str::to_string)).collect());
        words.or_else(|| self.wrong_type(key, "a list of strings", value, faults)).unwrap_or_default()
    }

    /// A table of strings; empty if absent.
    pub fn strings(&mut self, key: &str, faults: &mut Faults) -> BTreeMap<String, String> {
        let Some(value) = self.take(key) else { return BTreeMap::new() };
        let Some(table) = value.as_table() else {
            return self.wrong_type(key, "a table of strings", value, faults).unwrap_or_default();
        };
        let mut strings = BTreeMap::new();
        for (name, value) in table.iter() {
            match value.get_ref().as_str() {
                Some(s) => drop(strings.insert(name.get_ref().to_string(), s.to_string())),
                None => faults.at(
                    Some(value.span()),
                    &format!(
                        "{}.{}: must be a string, got {}",
                        self.join(key),
                        name.get_ref(),
                        type_of(value.get_ref())
                    ),
                ),
            }
        }
        strings
    }

    /// A section of its own.
    pub fn table(&mut self, key: &str, faults: &mut Faults) -> Option<Section<'a>> {
        let value = self.take(key)?;
        match value.as_table() {
            Some(table) => Some(Section::new(self.join(key), self.spans.get(key).cloned(), table)),
            None => self.wrong_type(key, "a table", value, faults),
        }
    }

    /// Refuses every key nobody asked for, with the known one that comes closest.
    pub fn finish(self, faults: &mut Faults) {
        for key in self.values.keys().filter(|k| !self.known.contains(**k)) {
            // Two slips of the finger in a word this long; more is another word.
            let near = self.known.iter().map(|k| (strsim::damerau_levenshtein(k, key), k)).min();
            let hint = match near {
                Some((distance, near)) if distance <= 2.max(key.len() / 3) => format!("; did you mean `{near}`?"),
                _ => format!("; known: {}", self.known.iter().cloned().collect::<Vec<_>>().join(", ")),
            };
            faults.key(&self, key, &format!("is not a key here{hint}"));
        }
    }

    fn join(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_string() } else { format!("{}.{key}", self.path) }
    }

    fn refuse<T>(&self, key: &str, reason: &str, faults: &mut Faults) -> Option<T> {
        faults.key(self, key, reason);
        None
    }

    fn wrong_type<T>(&self, key: &str, expected: &str, got: &DeValue, faults: &mut Faults) -> Option<T> {
        self.refuse(key, &format!("must be {expected}, got {}", type_of(got)), faults)
    }
}

fn type_of(value: &DeValue) -> String {
    let kind = value.type_str();
    if kind.starts_with(['a', 'i']) { format!("an {kind}") } else { format!("a {kind}") }
}
