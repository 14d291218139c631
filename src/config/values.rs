//! The kinds of values: how each is read and written.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// A value as typed, before anyone knows what it is for.
#[derive(Debug, Clone, PartialEq)]
pub enum Raw {
    Text(String),
    Integer(i64),
    List(Vec<Raw>),
    /// From the environment or `--set`: text that may also stand for a number or, split at commas, a list.
    Loose(String),
    /// A kind no key takes, by its name in TOML.
    Other(&'static str),
}

impl Raw {
    fn kind(&self) -> &'static str {
        match self {
            Raw::Text(_) | Raw::Loose(_) => "a string",
            Raw::Integer(_) => "an integer",
            Raw::List(_) => "an array",
            Raw::Other("boolean") => "a boolean",
            Raw::Other("float") => "a float",
            Raw::Other("table") => "a table",
            Raw::Other(_) => "a date",
        }
    }

    fn text(&self) -> Option<&str> {
        match self {
            Raw::Text(text) | Raw::Loose(text) => Some(text.trim()),
            _ => None,
        }
    }
}

/// A place in the settings that reads and writes itself.
pub trait Field {
    /// Takes a value as typed. Errors: what is wrong with it, without the key's name.
    fn set(&mut self, raw: &Raw) -> Result<(), String>;
    /// The value as TOML, passwords masked.
    fn to_toml(&self) -> String;
    /// What may be written, for people.
    fn form(&self) -> &'static str;
}

/// Values written as one string.
pub(super) trait TextValue: Sized {
    const FORM: &'static str;
    fn parse(text: &str) -> Result<Self, String>;
    fn text(&self) -> String;
}

fn wrong(form: &str, raw: &Raw) -> String {
    match raw {
        Raw::Text(text) | Raw::Loose(text) => format!("expected {form}, got {text:?}"),
        Raw::Integer(number) => format!("expected {form}, got {number}"),
        _ => format!("expected {form}, got {}", raw.kind()),
    }
}

pub(super) fn set_text<T: TextValue>(slot: &mut T, raw: &Raw) -> Result<(), String> {
    let text = raw.text().ok_or_else(|| wrong(T::FORM, raw))?;
    *slot = T::parse(text)?;
    Ok(())
}

/// A TOML basic string.
pub fn quote(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            c if c.is_control() => {
                // Writing to a String cannot fail.
                let _ = write!(quoted, "\\u{:04X}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// Implements [`Field`] for values written as one string. A macro, because a blanket implementation
/// would collide with the one for `Option`.
macro_rules! text_field {
    ($($t:ty),*) => {$(
        impl Field for $t {
            fn set(&mut self, raw: &Raw) -> Result<(), String> {
                set_text(self, raw)
            }
            fn to_toml(&self) -> String {
                quote(&self.text())
            }
            fn form(&self) -> &'static str {
                <$t as TextValue>::FORM
            }
        }
    )*};
}

pub(super) use text_field;

text_field!(SocketAddr, PathBuf, Duration);

/// The empty string is `None`.
impl<T: TextValue> Field for Option<T> {
    fn set(&mut self, raw: &Raw) -> Result<(), String> {
        *self = match raw.text() {
            Some("") => None,
            Some(text) => Some(T::parse(text)?),
            None => return Err(wrong(T::FORM, raw)),
        };
        Ok(())
    }
    fn to_toml(&self) -> String {
        self.as_ref().map_or_else(|| "\"\"".to_string(), |value| quote(&value.text()))
    }
    fn form(&self) -> &'static str {
        T::FORM
    }
}

impl TextValue for String {
    const FORM: &'static str = "a name";
    fn parse(text: &str) -> Result<Self, String> {
        Ok(text.to_string())
    }
    fn text(&self) -> String {
        self.clone()
    }
}

impl TextValue for SocketAddr {
    const FORM: &'static str = "an address and port such as 127.0.0.1:8080";
    fn parse(text: &str) -> Result<Self, String> {
        // The one name everybody types; other names would need a resolver that can hang.
        if let Some(port) = text.strip_prefix("localhost:").and_then(|port| port.parse().ok()) {
            return Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        }
        text.parse().map_err(|_| format!("expected {}, got {text:?}", Self::FORM))
    }
    fn text(&self) -> String {
        self.to_string()
    }
}

impl TextValue for PathBuf {
    const FORM: &'static str = "a path";
    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() { Err("must not be empty".to_string()) } else { Ok(PathBuf::from(text)) }
    }
    fn text(&self) -> String {
        self.display().to_string()
    }
}

impl TextValue for Duration {
    const FORM: &'static str = "a duration such as 500ms, 30s or 2m";
    fn parse(text: &str) -> Result<Self, String> {
        // humantime takes a bare 0 but no other number: a unit is asked for, so that 5 is never misread.
        humantime::parse_duration(text).map_err(|_| format!("expected {}, got {text:?}", Self::FORM))
    }
    fn text(&self) -> String {
        humantime::format_duration(*self).to_string()
    }
}

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteSize(pub usize);

/// Decimal and binary units, the largest first in each row.
const UNITS: &[(&str, u64)] = &[
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("B", 1),
];

impl Field for ByteSize {
    fn set(&mut self, raw: &Raw) -> Result<(), String> {
        let fault = || wrong(self.form(), raw);
        let bytes = match raw {
            Raw::Integer(bytes) => u64::try_from(*bytes).map_err(|_| fault())?,
            Raw::Text(text) | Raw::Loose(text) => {
                let text = text.trim();
                let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
                let (number, unit) = text.split_at(digits);
                let number: u64 = number.parse().map_err(|_| fault())?;
                let unit = unit.trim();
                let known = UNITS.iter().find(|(name, _)| unit.eq_ignore_ascii_case(name));
                let factor = if unit.is_empty() { 1 } else { known.ok_or_else(fault)?.1 };
                number.checked_mul(factor).ok_or_else(fault)?
            }
            _ => return Err(fault()),
        };
        // A terabyte in memory is a typing error on every machine there is.
        if bytes == 0 || bytes > 1 << 40 {
            return Err(format!("must be between 1 B and 1024 GiB, got {bytes} bytes"));
        }
        self.0 = bytes as usize;
        Ok(())
    }
    fn to_toml(&self) -> String {
        let bytes = self.0 as u64;
        let unit = UNITS[..3].iter().find(|(_, factor)| bytes.is_multiple_of(*factor));
        unit.map_or_else(|| bytes.to_string(), |(name, factor)| format!("\"{}{name}\"", bytes / factor))
    }
    fn form(&self) -> &'static str {
        "a number of bytes, or a size such as \"2MiB\""
    }
}

/// Counts are at least 1: every limit of this server that could be 0 would let nothing through.
impl Field for usize {
    fn set(&mut self, raw: &Raw) -> Result<(), String> {
        let number = match raw {
            Raw::Integer(number) => Some(*number),
            Raw::Loose(text) => text.trim().parse().ok(),
            _ => None,
        };
        // The bound keeps sums and products of limits far from overflow.
        match number {
            Some(number @ 1..=1_000_000_000) => *self = number as usize,
            _ => return Err(wrong(self.form(), raw)),
        }
        Ok(())
    }
    fn to_toml(&self) -> String {
        self.to_string()
    }
    fn form(&self) -> &'static str {
        "a whole number from 1 to 1000000000"
    }
}

/// A number that may be none, unlike a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Count(pub usize);

impl Field for Count {
    fn set(&mut self, raw: &Raw) -> Result<(), String> {
        let number = match raw {
            Raw::Integer(number) => Some(*number),
            Raw::Loose(text) => text.trim().parse().ok(),
            _ => None,
        };
        match number {
            Some(number @ 0..=1_000_000_000) => self.0 = number as usize,
            _ => return Err(wrong(self.form(), raw)),
        }
        Ok(())
    }
    fn to_toml(&self) -> String {
        self.0.to_string()
    }
    fn form(&self) -> &'static str {
        "a whole number from 0 to 1000000000"
    }
}

impl Field for Vec<String> {
    fn set(&mut self, raw: &Raw) -> Result<(), String> {
        let items: Option<Vec<String>> = match raw {
            Raw::List(items) => items.iter().map(|item| item.text().map(str::to_string)).collect(),
            Raw::Loose(text) => {
                Some(text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_string).collect())
            }
            _ => None,
        };
        let items = items.ok_or_else(|| wrong(self.form(), raw))?;
        if let Some(at) = items.iter().position(|item| item.is_empty()) {
            return Err(format!("item {at} is empty"));
        }
        if let Some(again) = items.iter().enumerate().find(|(i, item)| items[..*i].contains(item)) {
            return Err(format!("{:?} is named twice", again.1));
        }
        *self = items;
        Ok(())
    }
    fn to_toml(&self) -> String {
        let items: Vec<String> = self.iter().map(|item| quote(item)).collect();
        format!("[{}]", items.join(", "))
    }
    fn form(&self) -> &'static str {
        "an array of strings"
    }
}
