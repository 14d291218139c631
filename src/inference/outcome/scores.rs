//! From a classifier's scores to labels.

use crate::model::ModelInfo;

/// What becomes of scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Softmax over the labels, or the sigmoid of each where they do not exclude each other and where there is only one.
    Usual,
    Softmax,
    Sigmoid,
    /// As the model gives them.
    Raw,
}

/// Scores of labels in their order. Shapes: `row` [num_labels].
pub fn scores(info: &ModelInfo, row: &[f32], form: Form) -> Vec<f32> {
    match form {
        Form::Raw => row.to_vec(),
        Form::Softmax => softmax(row),
        Form::Sigmoid => row.iter().copied().map(sigmoid).collect(),
        Form::Usual if info.is_multi_label || row.len() == 1 => row.iter().copied().map(sigmoid).collect(),
        Form::Usual => softmax(row),
    }
}

/// Labels with their scores, the best first; equal ones in the model's order.
pub fn ranked<'a>(info: &'a ModelInfo, row: &[f32], form: Form) -> Vec<(&'a str, f32)> {
    let mut ranked: Vec<(&str, f32)> = info.labels.iter().map(String::as_str).zip(scores(info, row, form)).collect();
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
    ranked
}

/// The best label of a token. Shapes: `token` [num_labels], at least one.
pub fn best<'a>(info: &'a ModelInfo, token: &[f32]) -> (&'a str, f32) {
    let scores = softmax(token);
    let best = argmax(&scores);
    (info.labels.get(best).map_or("", String::as_str), scores.get(best).copied().unwrap_or(0.0))
}

/// The first of the largest.
pub fn argmax(values: &[f32]) -> usize {
    values.iter().enumerate().fold(0, |best, (i, value)| if *value > values[best] { i } else { best })
}

/// `exp(x) / sum(exp(x))`, shifted by the largest, so that nothing overflows.
pub fn softmax(row: &[f32]) -> Vec<f32> {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f64> = row.iter().map(|x| f64::from(x - largest).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|power| (power / sum) as f32).collect()
}

/// `1 / (1 + exp(-x))`, without an overflow at either end.
pub fn sigmoid(x: f32) -> f32 {
    let power = f64::from(-x.abs()).exp();
    let above = 1.0 / (1.0 + power);
    (if x >= 0.0 { above } else { power * above }) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_overflows() {
        assert_eq!(softmax(&[1000.0, -1000.0, 1000.0]), [0.5, 0.0, 0.5]);
        assert_eq!(softmax(&[f32::MAX, f32::MIN]), [1.0, 0.0]);
        assert_eq!((sigmoid(1000.0), sigmoid(-1000.0), sigmoid(0.0)), (1.0, 0.0, 0.5));
        // By hand: 1 / (1 + e^-1), e / (e + 1).
        assert!((sigmoid(1.0) - 0.731_058_6).abs() < 1e-7 && (softmax(&[1.0, 0.0])[0] - 0.731_058_6).abs() < 1e-7);
    }

    #[test]
    fn the_first_of_the_largest_wins() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(argmax(&[]), 0);
    }
}
