//! What an answer says: tokens at little cost always, vectors where they are to be checked.

use std::collections::HashMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::header::HeaderMap;
use parking_lot::Mutex;

use super::target::Api;

/// How much of an answer's end is kept where the answer is not checked: `usage` stands there.
pub const TAIL_BYTES: usize = 512;

/// Tokens of an answer, as far as it tells: OpenAI's `usage` near the end, or TEI's header.
pub fn num_tokens(headers: &HeaderMap, tail: &[u8]) -> Option<u64> {
    if let Some(tokens) = headers.get("x-compute-tokens").and_then(|v| v.to_str().ok()) {
        return tokens.parse().ok();
    }
    const KEY: &[u8] = b"\"prompt_tokens\"";
    let at = tail.windows(KEY.len()).rposition(|window| window == KEY)? + KEY.len();
    let digits = tail[at..].iter().skip_while(|b| matches!(b, b':' | b' ')).take_while(|b| b.is_ascii_digit());
    let digits: Vec<u8> = digits.copied().collect();
    std::str::from_utf8(&digits).ok()?.parse().ok()
}

/// The vectors of an answer, one an input, in the order of the inputs.
///
/// Errors: a sentence saying what is not as the protocol has it.
pub fn vectors(api: Api, body: &[u8]) -> Result<Vec<Vec<f32>>, String> {
    let unreadable = |e: serde_json::Error| format!("not the protocol's answer: {e}");
    if api == Api::Tei {
        return serde_json::from_slice(body).map_err(unreadable);
    }
    let mut answer: Answer = serde_json::from_slice(body).map_err(unreadable)?;
    answer.data.sort_by_key(|entry| entry.index);
    if answer.data.iter().enumerate().any(|(i, entry)| entry.index != i) {
        return Err("the indexes are not 0, 1, 2, ...".into());
    }
    answer.data.into_iter().map(|entry| entry.embedding.into_floats()).collect()
}

#[derive(serde::Deserialize)]
struct Answer {
    data: Vec<Entry>,
}

#[derive(serde::Deserialize)]
struct Entry {
    index: usize,
    embedding: Embedding,
}

#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Embedding {
    Floats(Vec<f32>),
    Base64(String),
}

impl Embedding {
    fn into_floats(self) -> Result<Vec<f32>, String> {
        match self {
            Self::Floats(values) => Ok(values),
            Self::Base64(text) => {
                let bytes = STANDARD.decode(text).map_err(|e| format!("base64: {e}"))?;
                if bytes.len() % 4 != 0 {
                    return Err(format!("{} bytes are no list of f32", bytes.len()));
                }
                let float = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                Ok(bytes.chunks_exact(4).map(float).collect())
            }
        }
    }
}

/// Checks answers of one target: the right number of vectors, all finite, of one dimension, and equal for equal texts.
pub struct Verifier {
    /// Largest absolute difference between two answers of one text.
    tolerance: f32,
    /// Text index to the first vector seen. Locked for one answer's look-ups, never over an await.
    seen: Mutex<HashMap<usize, Vec<f32>>>,
}

impl Verifier {
    pub fn new(tolerance: f32) -> Self {
        Self { tolerance, seen: Mutex::new(HashMap::new()) }
    }

    /// `texts` are the indexes of the texts asked for, in order.
    ///
    /// Errors: a sentence saying what is wrong with the answer.
    pub fn check(&self, api: Api, texts: &[usize], body: &[u8]) -> Result<(), String> {
        let rows = vectors(api, body)?;
        if rows.len() != texts.len() {
            return Err(format!("{} vectors for {} inputs", rows.len(), texts.len()));
        }
        let mut seen = self.seen.lock();
        for (&text, row) in texts.iter().zip(rows) {
            if row.is_empty() || row.iter().any(|x| !x.is_finite()) {
                return Err(format!("text {text}: {} values, not all finite", row.len()));
            }
            if let Some(other) = seen.values().next().filter(|other| other.len() != row.len()) {
                return Err(format!("text {text}: {} dimensions, {} before", row.len(), other.len()));
            }
            match seen.get(&text) {
                Some(first) => {
                    let difference = first.iter().zip(&row).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    if difference > self.tolerance {
                        return Err(format!("text {text}: differs by {difference} from its first answer"));
                    }
                }
                None => {
                    seen.insert(text, row);
                }
            }
        }
        Ok(())
    }

    /// Smallest cosine between the two targets' vectors over the texts both have answered; `None` without one.
    ///
    /// Holds both locks: `other` must be another verifier.
    pub fn min_cosine(&self, other: &Verifier) -> Option<f64> {
        let (ours, theirs) = (self.seen.lock(), other.seen.lock());
        let both = ours.iter().filter_map(|(text, a)| Some(cosine(a, theirs.get(text)?)));
        both.min_by(f64::total_cmp)
    }
}

/// 0 for vectors of unlike length: they have nothing in common.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return 0.0;
    }
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms == 0.0 { 0.0 } else { dot(a, b) / norms }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_found_in_usage_or_header() {
        let none = HeaderMap::new();
        assert_eq!(num_tokens(&none, br#"...],"usage":{"prompt_tokens": 17,"total_tokens":17}}"#), Some(17));
        assert_eq!(num_tokens(&none, b"[[0.1,0.2]]"), None);
        let headers = HeaderMap::from_iter([("x-compute-tokens".parse().unwrap(), "9".parse().unwrap())]);
        assert_eq!(num_tokens(&headers, b"[[0.1]]"), Some(9));
    }

    #[test]
    fn both_encodings_give_the_same_vectors() {
        let floats = br#"{"data":[{"index":1,"embedding":[2.0]},{"index":0,"embedding":[-1.5]}]}"#;
        let packed: Vec<String> = [-1.5f32, 2.0].iter().map(|x| STANDARD.encode(x.to_le_bytes())).collect();
        let base64 = format!(
            r#"{{"data":[{{"index":0,"embedding":"{}"}},{{"index":1,"embedding":"{}"}}]}}"#,
            packed[0], packed[1]
        );
        let expected = vec![vec![-1.5f32], vec![2.0]];
        assert_eq!(vectors(Api::Openai, floats).unwrap(), expected);
        assert_eq!(vectors(Api::OpenaiBase64, base64.as_bytes()).unwrap(), expected);
        assert_eq!(vectors(Api::Tei, b"[[-1.5],[2.0]]").unwrap(), expected);
        assert!(vectors(Api::Openai, br#"{"data":[{"index":1,"embedding":[2.0]}]}"#).is_err());
    }

    #[test]
    fn wrong_answers_are_told() {
        let verifier = Verifier::new(1e-3);
        let check = |texts: &[usize], body: &str| verifier.check(Api::Tei, texts, body.as_bytes());
        check(&[0, 1], "[[1,0],[0,1]]").unwrap();
        check(&[0], "[[1.0005,0]]").unwrap();
        assert!(check(&[0], "[[1,0],[0,1]]").unwrap_err().contains("2 vectors for 1"));
        assert!(check(&[1], "[[0,1.1]]").unwrap_err().contains("differs by"));
        assert!(check(&[2], "[[0,1,0]]").unwrap_err().contains("3 dimensions, 2 before"));
        assert!(check(&[2], "[[0,1e39]]").is_err());
        assert!(check(&[2], "[[]]").is_err());
    }

    #[test]
    fn two_targets_are_compared_by_cosine() {
        let (a, b) = (Verifier::new(0.1), Verifier::new(0.1));
        assert_eq!(a.min_cosine(&b), None);
        a.check(Api::Tei, &[0, 1], b"[[1,0],[0,1]]").unwrap();
        b.check(Api::Tei, &[1, 0], b"[[0,2],[1,1]]").unwrap();
        assert!((a.min_cosine(&b).unwrap() - 0.5f64.sqrt()).abs() < 1e-9);
    }
}
