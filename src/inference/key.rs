//! The name of a result: a hash of everything that decides its bits, and of nothing else.

use std::collections::HashMap;

use crate::model::ModelInfo;
use crate::request::{Input, Task, TaskParams, Truncation, TruncationDirection};
use crate::store::cache::{CacheKey, KeyState};

/// Before everything that is hashed. The number is raised when the form of what follows changes.
const DOMAIN: &[u8] = b"eremois result 2";

const TAG_TEXT: u8 = 0;
const TAG_TOKEN_IDS: u8 = 1;
const TAG_PAIR: u8 = 2;
const TAG_IMAGE: u8 = 3;
const TAG_VALUES: u8 = 4;
const TAG_TYPED_TOKEN_IDS: u8 = 5;

/// All of a request but its inputs, with nothing left to default, hashed once for all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    digest: [u8; 32],
    /// Values of a row.
    pub row_len: RowLen,
}

/// How many values the rows of a request can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowLen {
    Exactly(usize),
    /// So many for each token, or each pair of values; at least once.
    MultipleOf(usize),
}

impl RowLen {
    /// Whether a row of so many values can be one of the request's.
    pub fn fits(self, len: usize) -> bool {
        match self {
            Self::Exactly(expected) => len == expected,
            Self::MultipleOf(width) => len > 0 && len.is_multiple_of(width),
        }
    }
}

impl Form {
    /// `None` for parameters that this model does not take: the engine says what is wrong with them.
    pub fn of(info: &ModelInfo, params: &TaskParams) -> Option<Self> {
        let TaskParams { task, normalize, dimensions, truncation, prompt_name } = params;
        let dimensions = dimensions.unwrap_or(info.dimensions);
        if dimensions == 0 || dimensions > info.dimensions || !info.does(task) {
            return None;
        }
        let row_len = match task {
            Task::Embed => RowLen::Exactly(dimensions),
            Task::EmbedAll => RowLen::MultipleOf(info.hidden_size),
            Task::Classify => RowLen::Exactly(info.labels.len()),
            Task::TokenClassify => RowLen::MultipleOf(info.labels.len()),
            Task::Sparse | Task::FillMask { .. } => RowLen::MultipleOf(2),
            Task::Infer => RowLen::Exactly(info.hidden_size),
        };
        // The prompt counts by its text: another name for the same one is no other result.
        let prompt = match prompt_name.as_ref().or(info.default_prompt.as_ref()) {
            None => None,
            Some(name) => Some(info.prompts.get(name)?),
        };
        let mut hasher = blake3::Hasher::new();
        let mut write = |bytes: &[u8]| {
            hasher.update(bytes);
        };
        part(&mut write, DOMAIN);
        part(&mut write, info.name.as_bytes());
        part(&mut write, info.version.as_bytes());
        part(&mut write, info.fingerprint.as_bytes());
        part(&mut write, info.task.as_bytes());
        part(&mut write, task.as_str().as_bytes());
        if let Task::FillMask { top_k, targets } = task {
            write(&top_k.to_le_bytes());
            let targets = targets.as_deref().unwrap_or_default();
            write(&(targets.len() as u64).to_le_bytes());
            targets.iter().for_each(|id| write(&id.to_le_bytes()));
        }
        write(&[u8::from(normalize.unwrap_or(info.normalize))]);
        write(&(dimensions as u64).to_le_bytes());
        write(&[match truncation {
            Truncation::Refuse => 0,
            Truncation::Cut(TruncationDirection::Left) => 1,
            Truncation::Cut(TruncationDirection::Right) => 2,
            Truncation::Chunk { .. } => 3,
        }]);
        if let Truncation::Chunk { overlap } = truncation {
            write(&(*overlap as u64).to_le_bytes());
        }
        write(&[u8::from(prompt.is_some())]);
        part(&mut write, prompt.map_or(&[], |prompt| prompt.as_bytes()));
        Some(Self { digest: *hasher.finalize().as_bytes(), row_len })
    }

    /// The name of one input's result.
    pub fn key(&self, input: &Input) -> CacheKey {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.digest);
        encode(input, |bytes| {
            hasher.update(bytes);
        });
        CacheKey(*hasher.finalize().as_bytes())
    }
}

/// Bytes with their length before them: of two lists of parts, one written so is never the other, nor its beginning.
fn part(write: &mut impl FnMut(&[u8]), bytes: &[u8]) {
    write(&(bytes.len() as u64).to_le_bytes());
    write(bytes);
}

/// An input as it is hashed: what it is, its length, its bytes. No two inputs are written alike.
fn encode(input: &Input, mut write: impl FnMut(&[u8])) {
    match input {
        Input::Text(text) => {
            write(&[TAG_TEXT]);
            part(&mut write, text.as_bytes());
        }
        Input::Pair(first, second) => {
            write(&[TAG_PAIR]);
            part(&mut write, first.as_bytes());
            part(&mut write, second.as_bytes());
        }
        Input::TokenIds(ids) => {
            write(&[TAG_TOKEN_IDS]);
            write(&(ids.len() as u64).to_le_bytes());
            words(&mut write, ids, |id| id.to_le_bytes());
        }
        Input::TypedTokenIds { ids, types } => {
            write(&[TAG_TYPED_TOKEN_IDS]);
            for words_of in [ids, types] {
                write(&(words_of.len() as u64).to_le_bytes());
                words(&mut write, words_of, |word| word.to_le_bytes());
            }
        }
        Input::Image(file) => {
            write(&[TAG_IMAGE]);
            part(&mut write, file);
        }
        Input::Values(values) => {
            write(&[TAG_VALUES]);
            write(&(values.len() as u64).to_le_bytes());
            words(&mut write, values, |value| value.to_le_bytes());
        }
    }
}

/// Writes in pieces: the hash takes a kilobyte at a time much faster than four bytes.
fn words<T: Copy>(write: &mut impl FnMut(&[u8]), words: &[T], bytes_of: impl Fn(T) -> [u8; 4]) {
    for words in words.chunks(256) {
        let mut bytes = [0; 1024];
        bytes.as_chunks_mut().0.iter_mut().zip(words).for_each(|(slot, word)| *slot = bytes_of(*word));
        write(&bytes[..4 * words.len()]);
    }
}

/// The inputs of a request without repetitions.
#[derive(Debug, PartialEq)]
pub struct Distinct {
    /// Each key once, in the order of their first inputs.
    pub keys: Vec<CacheKey>,
    /// [keys], the first input with this key.
    pub first: Vec<usize>,
    /// [inputs], which key an input has.
    pub of_input: Vec<usize>,
}

impl Distinct {
    /// Finds the repetitions.
    pub fn of(all: &[CacheKey]) -> Self {
        let mut distinct = Self { keys: Vec::with_capacity(all.len()), first: Vec::new(), of_input: Vec::new() };
        if let [key] = all {
            return Self { keys: vec![*key], first: vec![0], of_input: vec![0] };
        }
        let mut seen = HashMap::with_capacity_and_hasher(all.len(), KeyState);
        for (i, key) in all.iter().enumerate() {
            let which = *seen.entry(*key).or_insert_with(|| {
                distinct.keys.push(*key);
                distinct.first.push(i);
                distinct.keys.len() - 1
            });
            distinct.of_input.push(which);
        }
        distinct
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};

    use proptest::prelude::*;

    use super::*;
    use crate::model::pack::Pooling;

    fn info() -> ModelInfo {
        ModelInfo {
            name: "m".into(),
            version: "1".into(),
            fingerprint: "f".into(),
            task: "embed".into(),
            labels: Vec::new(),
            is_multi_label: false,
            architecture: "bert".into(),
            dtype: "f32".into(),
            device: "cpu".into(),
            hidden_size: 8,
            dimensions: 8,
            vocab_size: 100,
            max_seq_len: 64,
            signature: Default::default(),
            pooling: Pooling::Mean,
            normalize: true,
            prompts: BTreeMap::from([
                ("query".into(), "q: ".into()),
                ("same".into(), "q: ".into()),
                ("doc".into(), "d: ".into()),
            ]),
            default_prompt: None,
            licence: None,
            created: 0,
        }
    }

    fn key(info: &ModelInfo, params: TaskParams) -> CacheKey {
        Form::of(info, &params).expect("parameters the model takes").key(&Input::Text("a".into()))
    }

    #[test]
    fn everything_that_decides_a_result_is_in_its_name() {
        let plain = TaskParams::default;
        let cut = |direction| TaskParams { truncation: Truncation::Cut(direction), ..plain() };
        let chunks = |overlap| TaskParams { truncation: Truncation::Chunk { overlap }, ..plain() };
        let prompt = |name: &str| TaskParams { prompt_name: Some(name.into()), ..plain() };
        let filler = ModelInfo { task: "fill_mask".into(), ..info() };
        let fill = |top_k, targets| TaskParams { task: Task::FillMask { top_k, targets }, ..plain() };
        let mut keys = vec![
            key(&info(), plain()),
            key(&ModelInfo { name: "n".into(), ..info() }, plain()),
            key(&ModelInfo { version: "2".into(), ..info() }, plain()),
            key(&ModelInfo { fingerprint: "g".into(), ..info() }, plain()),
            key(&info(), TaskParams { task: Task::EmbedAll, ..plain() }),
            key(&filler, TaskParams { task: Task::Sparse, ..plain() }),
            key(&ModelInfo { task: "sparse".into(), ..info() }, TaskParams { task: Task::Sparse, ..plain() }),
            key(&filler, fill(5, None)),
            key(&filler, fill(6, None)),
            key(&filler, fill(5, Some([5].into()))),
            key(&filler, fill(5, Some([6].into()))),
            key(&filler, fill(5, Some([5, 6].into()))),
            key(&info(), TaskParams { normalize: Some(false), ..plain() }),
            key(&info(), TaskParams { dimensions: Some(4), ..plain() }),
            key(&info(), cut(TruncationDirection::Left)),
            key(&info(), cut(TruncationDirection::Right)),
            key(&info(), chunks(0)),
            key(&info(), chunks(8)),
            key(&info(), prompt("query")),
            key(&info(), prompt("doc")),
            Form::of(&info(), &plain()).unwrap().key(&Input::Text("b".into())),
            Form::of(&info(), &plain()).unwrap().key(&Input::TokenIds(vec![97])),
            Form::of(&info(), &plain()).unwrap().key(&Input::TokenIds(vec![97, 98])),
            Form::of(&info(), &plain()).unwrap().key(&Input::of_ids(vec![97, 98], vec![0, 1])),
            Form::of(&info(), &plain()).unwrap().key(&Input::of_ids(vec![97, 98], vec![1, 0])),
            Form::of(&info(), &plain()).unwrap().key(&Input::Pair("a".into(), String::new())),
        ];
        let num_keys = keys.len();
        keys.sort_by_key(|key| key.0);
        keys.dedup();
        assert_eq!(keys.len(), num_keys);
    }

    #[test]
    fn what_is_said_and_what_is_meant_by_default_are_one() {
        let plain = key(&info(), TaskParams::default());
        assert_eq!(key(&info(), TaskParams { normalize: Some(true), ..TaskParams::default() }), plain);
        assert_eq!(key(&info(), TaskParams { dimensions: Some(8), ..TaskParams::default() }), plain);
        let prompt = |name: &str| TaskParams { prompt_name: Some(name.into()), ..TaskParams::default() };
        assert_eq!(key(&info(), prompt("query")), key(&info(), prompt("same")));
        let with_default = ModelInfo { default_prompt: Some("doc".into()), ..info() };
        assert_eq!(key(&with_default, TaskParams::default()), key(&info(), prompt("doc")));
    }

    #[test]
    fn bad_parameters_have_no_name() {
        for dimensions in [0, 9] {
            let params = TaskParams { dimensions: Some(dimensions), ..TaskParams::default() };
            assert_eq!(Form::of(&info(), &params), None);
        }
        let params = TaskParams { prompt_name: Some("nobody's".into()), ..TaskParams::default() };
        assert_eq!(Form::of(&info(), &params), None);
        assert_eq!(Form::of(&info(), &TaskParams { task: Task::Classify, ..TaskParams::default() }), None);
    }

    fn encoded(inputs: &[Input]) -> Vec<u8> {
        let mut bytes = Vec::new();
        inputs.iter().for_each(|input| encode(input, |part| bytes.extend_from_slice(part)));
        bytes
    }

    fn any_input() -> impl Strategy<Value = Input> {
        prop_oneof![
            // Few letters and few ids, so that inputs are often nearly the same.
            "[ab\u{0}\u{1}]{0,6}".prop_map(Input::Text),
            any::<String>().prop_map(Input::Text),
            proptest::collection::vec(0u32..3, 0..6).prop_map(Input::TokenIds),
            proptest::collection::vec(any::<u32>(), 0..600).prop_map(Input::TokenIds),
            proptest::collection::vec((0u32..3, 0u32..2), 0..4).prop_map(|typed| {
                let (ids, types) = typed.into_iter().unzip();
                Input::of_ids(ids, types)
            }),
            ("[ab\u{0}]{0,3}", "[ab\u{0}]{0,3}").prop_map(|(first, second)| Input::Pair(first, second)),
            "[ab\u{0}\u{1}]{0,6}".prop_map(|file| Input::Image(file.into())),
            proptest::collection::vec(0u8..3, 0..6)
                .prop_map(|values| Input::Values(values.into_iter().map(f32::from).collect())),
        ]
    }

    proptest! {
        #[test]
        fn no_two_inputs_are_written_alike(a in any_input(), b in any_input(), c in any_input()) {
            prop_assert_eq!(encoded(std::slice::from_ref(&a)) == encoded(std::slice::from_ref(&b)), a == b);
            // Nor one as the beginning of another, so that lists are told apart as well.
            let (one, two) = (encoded(std::slice::from_ref(&a)), encoded(&[b.clone(), c.clone()]));
            prop_assert_eq!(two.starts_with(&one), a == b);
            prop_assert_ne!(one, two);
        }

        #[test]
        fn repetitions_are_found(picks in proptest::collection::vec(0u8..5, 0..40)) {
            let all: Vec<CacheKey> = picks.iter().map(|n| CacheKey([*n; 32])).collect();
            let Distinct { keys, first, of_input } = Distinct::of(&all);
            prop_assert_eq!(keys.len(), all.iter().map(|key| key.0).collect::<HashSet<_>>().len());
            for (i, key) in all.iter().enumerate() {
                let which = of_input[i];
                prop_assert_eq!(&keys[which], key);
                prop_assert!(first[which] <= i && all[first[which]] == *key);
            }
            prop_assert!(first.is_sorted());
        }
    }
}
