//! What is sent: texts made from a seed at stated lengths, or read from a file.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Normal};

use super::words::WORDS;
use crate::{Error, Result};

/// Special tokens that BERT-like models add to every text (`[CLS]`, `[SEP]`).
const SPECIAL_TOKENS: usize = 2;

/// How long the made texts are, in tokens with the two special ones.
///
/// Written `32`, `8..256` (uniform), `8..256:log-uniform`, `64~16` (normal: mean and standard deviation).
/// Bounds are inclusive.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Lengths {
    Fixed(usize),
    Uniform {
        min: usize,
        max: usize,
    },
    /// Each doubling of the length is equally likely: many short texts, some long ones, as real traffic has.
    LogUniform {
        min: usize,
        max: usize,
    },
    /// Cut at one word and at four standard deviations.
    Normal {
        mean: usize,
        std_dev: usize,
    },
}

impl Lengths {
    fn sample(self, rng: &mut StdRng) -> usize {
        match self {
            Self::Fixed(n) => n,
            Self::Uniform { min, max } => rng.random_range(min..=max),
            Self::LogUniform { min, max } => {
                let (low, high) = ((min as f64).ln(), (max as f64 + 1.0).ln());
                (rng.random_range(low..high).exp() as usize).clamp(min, max)
            }
            Self::Normal { mean, std_dev } => {
                let (mean, std_dev) = (mean as f64, std_dev as f64);
                let Ok(normal) = Normal::new(mean, std_dev) else { return mean as usize };
                normal.sample(rng).round().clamp(1.0, mean + 4.0 * std_dev) as usize
            }
        }
    }
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let number = |s: &str| match s.trim().parse::<usize>() {
            Ok(n) if (1..=1_000_000).contains(&n) => Ok(n),
            _ => Err(format!("`{s}` is not a length from 1 to 1000000")),
        };
        if let Some((mean, std_dev)) = s.split_once('~') {
            return Ok(Self::Normal { mean: number(mean)?, std_dev: number(std_dev)? });
        }
        let Some((min, rest)) = s.split_once("..") else { return Ok(Self::Fixed(number(s)?)) };
        let (max, shape) = rest.split_once(':').unwrap_or((rest, "uniform"));
        let (min, max) = (number(min)?, number(max)?);
        if min > max {
            return Err(format!("{min} is more than {max}"));
        }
        match shape {
            "uniform" => Ok(Self::Uniform { min, max }),
            "log-uniform" => Ok(Self::LogUniform { min, max }),
            _ => Err(format!("`{shape}` is not a shape: uniform or log-uniform")),
        }
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(n) => write!(f, "{n}"),
            Self::Uniform { min, max } => write!(f, "{min}..{max}"),
            Self::LogUniform { min, max } => write!(f, "{min}..{max}:log-uniform"),
            Self::Normal { mean, std_dev } => write!(f, "{mean}~{std_dev}"),
        }
    }
}

/// `num_texts` texts; the same seed gives the same texts on every machine.
///
/// Units: `lengths` in tokens of a BERT English vocabulary, special tokens included; a text has at least one word.
pub fn generate(num_texts: usize, lengths: Lengths, seed: u64) -> Vec<String> {
    let words: Vec<&str> = WORDS.split_whitespace().collect();
    let mut rng = StdRng::seed_from_u64(seed);
    let text = |_| {
        let num_words = lengths.sample(&mut rng).saturating_sub(SPECIAL_TOKENS).max(1);
        let picked: Vec<&str> = (0..num_words).map(|_| words[rng.random_range(0..words.len())]).collect();
        picked.join(" ")
    };
    (0..num_texts).map(text).collect()
}

/// Reads a JSONL file: each line a JSON string, or an object with a string in `text`, `input` or `inputs`.
///
/// Blocks: on the file.
/// Errors: [`Error::Config`] naming the file and every line (up to ten) that holds no text.
pub fn read_jsonl(path: &Path) -> Result<Vec<String>> {
    let at = |what: String| format!("{}: {what}", path.display());
    let whole = std::fs::read_to_string(path).map_err(|e| Error::Config { faults: vec![at(e.to_string())] })?;
    let mut texts = Vec::new();
    let mut faults = Vec::new();
    for (i, line) in whole.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        match text_of(line) {
            Ok(text) => texts.push(text),
            Err(reason) => faults.push(at(format!("line {}: {reason}", i + 1))),
        }
    }
    if texts.is_empty() && faults.is_empty() {
        faults.push(at("no texts".into()));
    }
    faults.truncate(10);
    if faults.is_empty() { Ok(texts) } else { Err(Error::Config { faults }) }
}

fn text_of(line: &str) -> Result<String, String> {
    let value: serde_json::Value = serde_json::from_str(line).map_err(|e| e.to_string())?;
    let text = value.as_str().or_else(|| ["text", "input", "inputs"].iter().find_map(|key| value.get(key)?.as_str()));
    match text {
        Some("") => Err("the text is empty".into()),
        Some(text) => Ok(text.to_string()),
        None => Err("neither a string nor an object with a string in text, input or inputs".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn num_tokens(text: &str) -> usize {
        text.split_whitespace().count() + SPECIAL_TOKENS
    }

    #[test]
    fn lengths_are_read_and_written_alike() {
        for s in ["32", "8..256", "8..256:log-uniform", "64~16"] {
            assert_eq!(s.parse::<Lengths>().unwrap().to_string(), s);
        }
        for s in ["", "0", "9..3", "1..2:zipf", "a~2", "8.."] {
            assert!(s.parse::<Lengths>().is_err(), "{s} was taken");
        }
    }

    #[test]
    fn texts_have_the_lengths_asked_for() {
        assert!(generate(20, Lengths::Fixed(10), 1).iter().all(|t| num_tokens(t) == 10));
        let texts = generate(4000, Lengths::LogUniform { min: 8, max: 256 }, 1);
        let lens: Vec<usize> = texts.iter().map(|t| num_tokens(t)).collect();
        assert_eq!((*lens.iter().min().unwrap(), *lens.iter().max().unwrap()), (8, 256));
        // Log-uniform: the median is the geometric middle, sqrt(8 × 257) = 45, and 4/5 of a uniform mean's way off 132.
        let mut sorted = lens.clone();
        sorted.sort_unstable();
        assert!((41..=50).contains(&sorted[2000]), "median {}", sorted[2000]);
        let normal = generate(2000, Lengths::Normal { mean: 64, std_dev: 16 }, 1);
        let mean = normal.iter().map(|t| num_tokens(t)).sum::<usize>() as f64 / 2000.0;
        assert!((62.0..66.0).contains(&mean), "mean {mean}");
    }

    #[test]
    fn the_seed_decides() {
        let lengths = Lengths::Uniform { min: 3, max: 30 };
        assert_eq!(generate(50, lengths, 7), generate(50, lengths, 7));
        assert_ne!(generate(50, lengths, 7), generate(50, lengths, 8));
    }

    #[test]
    fn jsonl_is_read_and_its_faults_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("texts.jsonl");
        std::fs::write(&path, "\"one\"\n\n{\"text\":\"two\"}\n{\"input\":\"three\",\"id\":1}\n").unwrap();
        assert_eq!(read_jsonl(&path).unwrap(), ["one", "two", "three"]);
        std::fs::write(&path, "\"one\"\n{\"txt\":1}\nnot json\n").unwrap();
        let faults = read_jsonl(&path).unwrap_err().to_string();
        let named = |n| faults.contains(&format!("jsonl: line {n}: "));
        assert!(named(2) && named(3) && !named(1), "{faults}");
    }
}
