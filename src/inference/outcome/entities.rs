//! From scores of tokens to entities of a text, by the aggregation strategies of `transformers`' pipeline for token
//! classification (huggingface/transformers `src/transformers/pipelines/token_classification.py`).

use serde::Deserialize;

use super::scores::{argmax, softmax};
use crate::output::Token;

/// How tokens become entities.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Aggregation {
    /// Every token for itself.
    None,
    /// Neighbouring tokens of one label, by their B- and I- tags.
    #[default]
    Simple,
    /// As simple, of whole words, each with the scores of its first token.
    First,
    /// As simple, of whole words, each with the mean of its tokens' scores.
    Average,
    /// As simple, of whole words, each with the scores of its surest token.
    Max,
}

/// A stretch of a text with its label.
#[derive(Debug, Clone, PartialEq)]
pub struct Entity {
    /// With its B- or I- where tokens stand for themselves, without where they are grouped.
    pub label: String,
    pub score: f32,
    /// Place of its token in the sequence, special tokens included; of several, the first one's.
    pub index: usize,
    /// Unicode scalar values of the text, from `start` to before `end`.
    pub start: usize,
    pub end: usize,
}

/// A word, or a token where words do not matter, with what it was taken for.
struct Part {
    label: usize,
    score: f32,
    index: usize,
    start: usize,
    end: usize,
}

/// The entities of a text.
///
/// Shapes: `tokens` [seq_len], special tokens included; `row` [seq_len * num_labels], scores as the model gives them.
pub fn entities(labels: &[String], tokens: &[Token], row: &[f32], aggregation: Aggregation, text: &str) -> Vec<Entity> {
    let scores: Vec<Vec<f32>> = row.chunks_exact(labels.len().max(1)).map(softmax).collect();
    // A tokenizer that writes one kind of piece for word starts tells words by its pieces, the others by white space.
    let marks_continuations = tokens.iter().any(|token| token.piece.starts_with("##"));
    let chars: Vec<char> = text.chars().collect();
    let mut words: Vec<Vec<(usize, &Token)>> = Vec::new();
    for (i, token) in tokens.iter().enumerate().take(scores.len()) {
        let (Some(start), false) = (token.start, token.special) else { continue };
        let continues = match marks_continuations {
            true => token.piece.starts_with("##"),
            false => {
                start > 0 && !chars[start - 1].is_whitespace() && !chars.get(start).is_some_and(|c| c.is_whitespace())
            }
        };
        let alone = matches!(aggregation, Aggregation::None | Aggregation::Simple);
        match words.last_mut().filter(|_| continues && !alone) {
            Some(word) => word.push((i, token)),
            None => words.push(vec![(i, token)]),
        }
    }
    let parts: Vec<Part> = words.iter().filter_map(|word| part(word, &scores, aggregation)).collect();
    let name = |part: &Part| labels.get(part.label).cloned().unwrap_or_default();
    if aggregation == Aggregation::None {
        let alone = |part: &Part| Entity {
            label: name(part),
            score: part.score,
            index: part.index,
            start: part.start,
            end: part.end,
        };
        return parts.iter().map(alone).collect();
    }
    grouped(&parts, name)
}

/// A word of one or several tokens.
fn part(word: &[(usize, &Token)], scores: &[Vec<f32>], aggregation: Aggregation) -> Option<Part> {
    let (first, last) = (word.first()?, word.last()?);
    let surest = |i: &usize| scores[*i].iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let of_word = match aggregation {
        Aggregation::Max => {
            let best =
                word.iter().map(|(i, _)| *i).reduce(|best, i| if surest(&i) > surest(&best) { i } else { best })?;
            scores[best].clone()
        }
        Aggregation::Average => {
            let sum = |label: usize| word.iter().map(|(i, _)| scores[*i][label]).sum::<f32>();
            (0..scores[first.0].len()).map(|label| sum(label) / word.len() as f32).collect()
        }
        Aggregation::None | Aggregation::Simple | Aggregation::First => scores[first.0].clone(),
    };
    let label = argmax(&of_word);
    let (start, end) = (first.1.start?, last.1.stop?);
    Some(Part { label, score: *of_word.get(label)?, index: first.0, start, end })
}

/// Neighbours of one label are one entity, unless the tag says that another begins. Its score is the mean.
fn grouped(parts: &[Part], name: impl Fn(&Part) -> String) -> Vec<Entity> {
    let mut groups: Vec<(Entity, Vec<f32>)> = Vec::new();
    for part in parts {
        let name = name(part);
        let (begins, tag) = match name.split_at_checked(2) {
            Some(("B-", tag)) => (true, tag),
            Some(("I-", tag)) => (false, tag),
            _ => (false, name.as_str()),
        };
        match groups.last_mut().filter(|(entity, _)| entity.label == tag && !begins) {
            Some((entity, scores)) => {
                entity.end = part.end;
                scores.push(part.score);
            }
            None => {
                let (index, start, end) = (part.index, part.start, part.end);
                let entity = Entity { label: tag.to_string(), score: 0.0, index, start, end };
                groups.push((entity, vec![part.score]));
            }
        }
    }
    let scored = |(entity, scores): (Entity, Vec<f32>)| {
        let mean = scores.iter().sum::<f32>() / scores.len() as f32;
        Entity { score: mean, ..entity }
    };
    groups.into_iter().map(scored).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Ada Lovelace met Babbage";

    fn labels() -> Vec<String> {
        ["O", "B-PER", "I-PER"].map(String::from).to_vec()
    }

    fn token(piece: &str, start: usize, stop: usize) -> Token {
        let text = TEXT[start..stop].to_string();
        Token { id: 0, piece: piece.into(), text, special: false, start: Some(start), stop: Some(stop) }
    }

    fn special(piece: &str) -> Token {
        Token { id: 0, piece: piece.into(), text: piece.into(), special: true, start: None, stop: None }
    }

    fn tokens() -> Vec<Token> {
        vec![
            special("[CLS]"),
            token("ada", 0, 3),
            token("love", 4, 8),
            token("##lace", 8, 12),
            token("met", 13, 16),
            token("babbage", 17, 24),
            special("[SEP]"),
        ]
    }

    /// Scores that softmax takes for nearly certain, but for the token "##lace", which leans to O.
    fn row() -> Vec<f32> {
        let sure = |label: usize| (0..3).map(move |i| if i == label { 9.0 } else { 0.0 });
        let lace = [1.0, 0.0, 0.5];
        sure(0).chain(sure(1)).chain(sure(2)).chain(lace).chain(sure(0)).chain(sure(1)).chain(sure(0)).collect()
    }

    fn found(aggregation: Aggregation) -> Vec<(String, usize, usize)> {
        let entities = entities(&labels(), &tokens(), &row(), aggregation, TEXT);
        entities.into_iter().filter(|e| e.label != "O").map(|e| (e.label, e.start, e.end)).collect()
    }

    fn named(label: &str, start: usize, end: usize) -> (String, usize, usize) {
        (label.to_string(), start, end)
    }

    #[test]
    fn tokens_stand_for_themselves_or_are_grouped() {
        assert_eq!(found(Aggregation::None), [named("B-PER", 0, 3), named("I-PER", 4, 8), named("B-PER", 17, 24)]);
        assert_eq!(found(Aggregation::Simple), [named("PER", 0, 8), named("PER", 17, 24)]);
        for whole in [Aggregation::First, Aggregation::Average, Aggregation::Max] {
            assert_eq!(found(whole), [named("PER", 0, 12), named("PER", 17, 24)], "{whole:?}");
        }
    }

    #[test]
    fn two_that_begin_are_two() {
        let text = "a b";
        let token = |start: usize| Token {
            id: 0,
            piece: text[start..start + 1].into(),
            text: text[start..start + 1].into(),
            special: false,
            start: Some(start),
            stop: Some(start + 1),
        };
        let row = [0.0, 9.0, 0.0, 0.0, 9.0, 0.0];
        let entities = entities(&labels(), &[token(0), token(2)], &row, Aggregation::Simple, text);
        assert_eq!(entities.len(), 2);
        assert!(entities[0].score > 0.99 && entities[0].label == "PER");
    }
}
