//! A batch's input: lines of JSON, each a request; how they are found, checked, and put together into chunks.

use std::collections::HashSet;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::state::InputFault;

/// Longest `custom_id`, in characters.
pub const MAX_CUSTOM_ID_CHARS: usize = 512;

/// Faults that are told of one input; reading goes on no further.
const MAX_FAULTS: usize = 100;

/// Requests and bytes of a chunk: small enough that one is done soon and a dead server's are not many, large enough that
/// its few writes do not count. A longer line is a chunk alone.
const MAX_CHUNK_LINES: usize = 100;
const MAX_CHUNK_BYTES: u64 = 1 << 20;

/// A batch of few requests is cut smaller, so that several servers have a share; into chunks of this many at least.
const MIN_CHUNK_LINES: usize = 8;
const CHUNKS_OF_A_SMALL_BATCH: usize = 128;

/// A line of the input.
#[derive(Debug)]
pub struct Line<'a> {
    pub custom_id: String,
    /// A JSON object, as it was written.
    pub body: &'a str,
}

#[derive(Deserialize)]
struct RawLine<'a> {
    #[serde(borrow)]
    custom_id: Option<&'a RawValue>,
    #[serde(borrow)]
    method: Option<&'a RawValue>,
    #[serde(borrow)]
    url: Option<&'a RawValue>,
    #[serde(borrow)]
    body: Option<&'a RawValue>,
}

/// Whether a line has nothing on it.
pub fn is_blank(line: &[u8]) -> bool {
    line.iter().all(u8::is_ascii_whitespace)
}

/// Reads a line for a batch of this endpoint. Errors: what is wrong with it; `line` is set by the caller.
pub fn parse<'a>(line: &'a [u8], endpoint: &str) -> Result<Line<'a>, InputFault> {
    // A list of four would pass for an object's fields.
    if line.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
        return Err(fault("invalid_json_line", None, "not a JSON object".to_string()));
    }
    let raw: RawLine<'a> = serde_json::from_slice(line)
        .map_err(|e| fault("invalid_json_line", None, format!("not a JSON object: {e}")))?;
    let custom_id: String = text(raw.custom_id, "custom_id")?;
    if custom_id.is_empty() {
        return Err(fault("invalid_custom_id", Some("custom_id"), "must not be empty".to_string()));
    }
    let num_chars = custom_id.chars().count();
    if num_chars > MAX_CUSTOM_ID_CHARS {
        let message = format!("has {num_chars} characters, the limit is {MAX_CUSTOM_ID_CHARS}");
        return Err(fault("invalid_custom_id", Some("custom_id"), message));
    }
    let method = text(raw.method, "method")?;
    if method != "POST" {
        return Err(fault("invalid_method", Some("method"), "expected `POST`".to_string()));
    }
    if text(raw.url, "url")? != endpoint {
        let message = format!("expected the batch's endpoint, `{endpoint}`");
        return Err(fault("mismatched_url", Some("url"), message));
    }
    let body = raw.body.ok_or_else(|| missing("body"))?.get();
    if !body.starts_with('{') {
        return Err(fault("invalid_body", Some("body"), "expected an object".to_string()));
    }
    Ok(Line { custom_id, body })
}

fn text(value: Option<&RawValue>, field: &'static str) -> Result<String, InputFault> {
    let value = value.ok_or_else(|| missing(field))?;
    serde_json::from_str(value.get()).map_err(|_| fault("invalid_type", Some(field), "expected a string".to_string()))
}

fn missing(field: &'static str) -> InputFault {
    fault("missing_required_parameter", Some(field), "is missing".to_string())
}

/// The message begins with the field, as messages of all errors do.
fn fault(code: &str, param: Option<&str>, message: String) -> InputFault {
    let message = param.map_or(message.clone(), |param| format!("{param}: {message}"));
    InputFault { code: code.to_string(), line: None, message, param: param.map(str::to_string) }
}

/// A line with a request, within its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub start: u64,
    /// Behind its last byte; a line's end belongs to no span.
    pub end: u64,
    /// Counted from 1, blank lines too.
    pub number: u64,
}

/// What holds of a batch's input as a whole.
#[derive(Debug, Clone)]
pub struct Rules {
    pub endpoint: String,
    pub max_requests: usize,
    pub max_line_bytes: usize,
}

/// Reads an input piece by piece and checks every line.
pub struct Scanner {
    rules: Rules,
    /// The line that is not whole yet.
    line: Vec<u8>,
    /// Where it begins.
    line_start: u64,
    line_number: u64,
    spans: Vec<Span>,
    /// The first half of BLAKE3 of each `custom_id`: equal ones are told, and 50,000 long ones need little memory.
    ids: HashSet<[u8; 16]>,
    faults: Vec<InputFault>,
}

impl Scanner {
    /// Of an input that is read from its start.
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            line: Vec::new(),
            line_start: 0,
            line_number: 1,
            spans: Vec::new(),
            ids: HashSet::new(),
            faults: Vec::new(),
        }
    }

    /// Takes the next piece, of any length. Returns whether more is of any use.
    pub fn push(&mut self, mut piece: &[u8]) -> bool {
        while let Some(at) = piece.iter().position(|byte| *byte == b'\n') {
            let (rest, later) = (&piece[..at], &piece[at + 1..]);
            if !self.take(rest) || !self.end_line() {
                return false;
            }
            self.line_start += self.line.len() as u64 + 1;
            self.line.clear();
            self.line_number += 1;
            piece = later;
        }
        self.take(piece)
    }

    /// The requests of the input, or what is wrong with it.
    pub fn finish(mut self) -> Result<Vec<Span>, Vec<InputFault>> {
        self.end_line();
        if self.faults.is_empty() && self.spans.is_empty() {
            self.faults.push(fault("empty_file", None, "the file has no request in it".to_string()));
        }
        self.faults.truncate(MAX_FAULTS);
        if self.faults.is_empty() { Ok(self.spans) } else { Err(self.faults) }
    }

    fn take(&mut self, bytes: &[u8]) -> bool {
        let limit = self.rules.max_line_bytes;
        if self.line.len() + bytes.len() > limit {
            let message = format!("line has more than {limit} bytes, the limit");
            self.add(fault("line_too_long", None, message));
            self.line.clear();
            return false;
        }
        self.line.extend_from_slice(bytes);
        true
    }

    /// Returns whether more is of any use.
    fn end_line(&mut self) -> bool {
        if is_blank(&self.line) {
            return true;
        }
        if self.spans.len() == self.rules.max_requests {
            let message = format!("the file has more than {} requests, the limit", self.rules.max_requests);
            self.faults.push(fault("too_many_requests", None, message));
            self.line.clear();
            return false;
        }
        let checked = parse(&self.line, &self.rules.endpoint).and_then(|line| {
            let hash = blake3::hash(line.custom_id.as_bytes());
            let mut half = [0; 16];
            half.copy_from_slice(&hash.as_bytes()[..16]);
            if self.ids.insert(half) {
                return Ok(());
            }
            let message = format!("`{}` is another request's too", line.custom_id);
            Err(fault("duplicate_custom_id", Some("custom_id"), message))
        });
        let end = self.line_start + self.line.len() as u64;
        self.spans.push(Span { start: self.line_start, end, number: self.line_number });
        if let Err(fault) = checked {
            self.add(fault);
        }
        self.faults.len() < MAX_FAULTS
    }

    fn add(&mut self, fault: InputFault) {
        self.faults.push(InputFault { line: Some(self.line_number), ..fault });
    }
}

/// Requests that are answered together: those that begin from `start` up to `end` of the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    pub start: u64,
    pub end: u64,
    /// The number of the line at `start`.
    pub first_line: u64,
    pub num_requests: u64,
}

/// Bytes of a chunk in a plan, so that one is found by its index.
pub const CHUNK_BYTES: usize = 32;

impl Chunk {
    /// As plans have it: little-endian, field after field.
    pub fn to_bytes(self) -> [u8; CHUNK_BYTES] {
        let mut bytes = [0; CHUNK_BYTES];
        let fields = [self.start, self.end, self.first_line, self.num_requests];
        for (slot, field) in bytes.chunks_exact_mut(8).zip(fields) {
            slot.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    /// The way back from [`Chunk::to_bytes`].
    pub fn of_bytes(bytes: &[u8; CHUNK_BYTES]) -> Self {
        let field = |i: usize| {
            let mut field = [0; 8];
            field.copy_from_slice(&bytes[8 * i..8 * i + 8]);
            u64::from_le_bytes(field)
        };
        Self { start: field(0), end: field(1), first_line: field(2), num_requests: field(3) }
    }
}

/// Puts requests together.
pub fn chunks(spans: &[Span]) -> Vec<Chunk> {
    let max_lines = spans.len().div_ceil(CHUNKS_OF_A_SMALL_BATCH).clamp(MIN_CHUNK_LINES, MAX_CHUNK_LINES) as u64;
    let mut chunks: Vec<Chunk> = Vec::new();
    for span in spans {
        match chunks.last_mut() {
            Some(chunk) if chunk.num_requests < max_lines && span.end - chunk.start <= MAX_CHUNK_BYTES => {
                chunk.end = span.end;
                chunk.num_requests += 1;
            }
            _ => chunks.push(Chunk { start: span.start, end: span.end, first_line: span.number, num_requests: 1 }),
        }
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ENDPOINT: &str = "/v1/embeddings";

    fn line(id: &str) -> String {
        format!(r#"{{"custom_id": "{id}", "method": "POST", "url": "/v1/embeddings", "body": {{"input": "w1"}}}}"#)
    }

    fn scan(text: &str, piece: usize) -> Result<Vec<Span>, Vec<InputFault>> {
        let rules = Rules { endpoint: ENDPOINT.into(), max_requests: 5, max_line_bytes: 200 };
        let mut scanner = Scanner::new(rules);
        for piece in text.as_bytes().chunks(piece) {
            if !scanner.push(piece) {
                break;
            }
        }
        scanner.finish()
    }

    #[test]
    fn lines_are_found_at_any_cut() {
        let text = format!("{}\n\n  \r\n{}\r\n{}", line("a"), line("b"), line("ü"));
        for piece in [1, 2, 7, 64, 10_000] {
            let spans = scan(&text, piece).unwrap();
            let numbers: Vec<u64> = spans.iter().map(|span| span.number).collect();
            assert_eq!(numbers, [1, 4, 5], "{piece}");
            let ids: Vec<String> = spans
                .iter()
                .map(|span| {
                    parse(&text.as_bytes()[span.start as usize..span.end as usize], ENDPOINT).unwrap().custom_id
                })
                .collect();
            assert_eq!(ids, ["a", "b", "ü"], "{piece}");
        }
        assert_eq!(scan(&format!("{}\n", line("a")), 3).unwrap().len(), 1);
    }

    #[test]
    fn every_fault_is_named_with_its_line() {
        let long = "x".repeat(300);
        let many: Vec<String> = (0..6).map(|i| line(&i.to_string())).collect();
        let good = line("a");
        for (text, code, number, param) in [
            ("", "empty_file", None, None),
            ("\n \n", "empty_file", None, None),
            ("{", "invalid_json_line", Some(1), None),
            ("[\"a\", \"POST\", \"/v1/embeddings\", {}]", "invalid_json_line", Some(1), None),
            (&format!("{good}\nnot json\n"), "invalid_json_line", Some(2), None),
            (&format!("{good}\n{good}"), "duplicate_custom_id", Some(2), Some("custom_id")),
            (&good.replace("\"a\"", "\"\""), "invalid_custom_id", Some(1), Some("custom_id")),
            (&good.replace("\"a\"", "7"), "invalid_type", Some(1), Some("custom_id")),
            (&good.replace("custom_id", "id"), "missing_required_parameter", Some(1), Some("custom_id")),
            (&good.replace("POST", "GET"), "invalid_method", Some(1), Some("method")),
            (&good.replace("/embeddings", "/responses"), "mismatched_url", Some(1), Some("url")),
            (&good.replace("{\"input\": \"w1\"}", "[]"), "invalid_body", Some(1), Some("body")),
            (&good.replace("body", "bodi"), "missing_required_parameter", Some(1), Some("body")),
            (&format!("{good}\n{long}\n{good}"), "line_too_long", Some(2), None),
            (&many.join("\n"), "too_many_requests", None, None),
        ] {
            for piece in [5, 10_000] {
                let faults = scan(text, piece).expect_err(text);
                let first = &faults[0];
                assert_eq!(
                    (first.code.as_str(), first.line, first.param.as_deref()),
                    (code, number, param),
                    "{text}: {faults:?}"
                );
                assert!(!first.message.is_empty());
            }
        }
        let worst = "x\n".repeat(1000);
        let rules = Rules { endpoint: ENDPOINT.into(), max_requests: 5000, max_line_bytes: 200 };
        let mut scanner = Scanner::new(rules);
        assert!(!scanner.push(worst.as_bytes()));
        assert_eq!(scanner.finish().unwrap_err().len(), MAX_FAULTS);
    }

    proptest! {
        #[test]
        fn chunks_hold_every_request_once(lens in proptest::collection::vec(1u64..400_000, 1..2000)) {
            let mut at = 0;
            let spans: Vec<Span> = lens.iter().enumerate().map(|(i, len)| {
                let span = Span { start: at, end: at + len, number: i as u64 + 1 };
                at += len + 1;
                span
            }).collect();
            let chunks = chunks(&spans);
            let mut left = &spans[..];
            for chunk in &chunks {
                let (mine, later) = left.split_at(chunk.num_requests as usize);
                prop_assert_eq!((mine[0].start, mine[0].number), (chunk.start, chunk.first_line));
                prop_assert_eq!(mine.last().unwrap().end, chunk.end);
                prop_assert!(mine.len() == 1 || chunk.end - chunk.start <= MAX_CHUNK_BYTES);
                prop_assert!(mine.len() <= MAX_CHUNK_LINES);
                prop_assert_eq!(Chunk::of_bytes(&chunk.to_bytes()), *chunk);
                left = later;
            }
            prop_assert!(left.is_empty());
        }
    }
}
