//! Tokenisation with the model's limits.

use eremois::Error;
use eremois::model::encode::Encoder;
use eremois::request::{Input, Truncation, TruncationDirection};

use super::common::*;

const RIGHT: Truncation = Truncation::Cut(TruncationDirection::Right);
const LEFT: Truncation = Truncation::Cut(TruncationDirection::Left);

fn text(text: &str) -> Input {
    Input::Text(text.to_string())
}

/// An encoder of the bert fixture with this limit; its tokenizer.json asks for a truncation to 16
/// tokens and a padding up to 16.
fn encoder(max_seq_len: usize) -> std::sync::Arc<Encoder> {
    let mut spec = spec(&fixture("bert-f16"));
    spec.max_seq_len = Some(max_seq_len);
    load_spec(&spec).unwrap().encoder
}

#[test]
fn the_tokenizers_own_truncation_and_padding_do_not_count() {
    let encoder = encoder(512);
    let short = encoder.encode(&text("fog"), "input", None, Truncation::Refuse).unwrap();
    assert!(short.input_ids.len() < 16, "padded to {}", short.input_ids.len());
    let long = encoder.encode(&text(&"fog and sun ".repeat(20)), "input", None, Truncation::Refuse).unwrap();
    assert!(long.input_ids.len() >= 60, "cut to {}", long.input_ids.len());
    assert_eq!(short.num_chars, 3);
    // MiniLM's file asks for 128 of both.
    let minilm = load_dir(&minilm()).unwrap().encoder;
    let long = minilm.encode(&text(&"tide ".repeat(200)), "input", None, Truncation::Refuse).unwrap();
    assert_eq!(long.input_ids.len(), 202);
    assert_eq!(minilm.encode(&text("tide"), "input", None, Truncation::Refuse).unwrap().input_ids.len(), 3);
}

#[test]
fn a_text_of_exactly_the_limit_passes_and_one_more_token_does_not() {
    let minilm = load_dir(&minilm()).unwrap().encoder;
    let encode = |words: usize| minilm.encode(&text(&"tide ".repeat(words)), "input[3]", None, Truncation::Refuse);
    assert_eq!(encode(254).unwrap().input_ids.len(), 256);
    let expected = Error::TooLarge { field: "input[3]".to_string(), got: 257, limit: 256, unit: "tokens" };
    assert_eq!(encode(255), Err(expected));
}

#[test]
fn a_cut_keeps_the_special_tokens_and_the_asked_side() {
    let words = "the harbour master wakes before the gulls and reads the barometer";
    let whole = encoder(512).encode(&text(words), "input", None, Truncation::Refuse).unwrap().input_ids;
    let (first, last) = (whole[0], *whole.last().unwrap());
    let inner = &whole[1..whole.len() - 1];
    for limit in [3, 4, 10, whole.len() - 1] {
        let encoder = encoder(limit);
        let right = encoder.encode(&text(words), "input", None, RIGHT).unwrap().input_ids;
        let left = encoder.encode(&text(words), "input", None, LEFT).unwrap().input_ids;
        for ids in [&right, &left] {
            assert_eq!((ids.len(), ids[0], *ids.last().unwrap()), (limit, first, last));
        }
        assert_eq!(right[1..limit - 1], inner[..limit - 2]);
        assert_eq!(left[1..limit - 1], inner[inner.len() - (limit - 2)..]);
    }
    // Long enough: nothing is cut.
    assert_eq!(encoder(whole.len()).encode(&text(words), "input", None, LEFT).unwrap().input_ids, whole);
}

#[test]
fn a_prompt_goes_before_the_text_and_is_not_counted_as_its_characters() {
    let encoder = encoder(512);
    let with = encoder.encode(&text("fog"), "input", Some("tide: "), Truncation::Refuse).unwrap();
    let written = encoder.encode(&text("tide: fog"), "input", None, Truncation::Refuse).unwrap();
    assert_eq!(with.input_ids, written.input_ids);
    assert_eq!((with.num_chars, written.num_chars), (3, 9));
    // Ids are taken as they are.
    let ids = Input::TokenIds(vec![5, 6]);
    assert_eq!(encoder.encode(&ids, "input", Some("tide: "), Truncation::Refuse).unwrap().input_ids, [5, 6]);
}

#[test]
fn token_ids_are_checked_and_cut_from_the_asked_side() {
    let encoder = encoder(4);
    let ids = Input::TokenIds((10..16).collect());
    assert_eq!(encoder.encode(&ids, "input", None, RIGHT).unwrap().input_ids, [10, 11, 12, 13]);
    assert_eq!(encoder.encode(&ids, "input", None, LEFT).unwrap().input_ids, [12, 13, 14, 15]);
    let refused = encoder.encode(&ids, "input", None, Truncation::Refuse);
    assert_eq!(refused, Err(Error::TooLarge { field: "input".to_string(), got: 6, limit: 4, unit: "tokens" }));
    let typed = Input::of_ids((10..16).collect(), vec![0, 0, 0, 0, 1, 1]);
    let cut = |direction| encoder.encode(&typed, "input", None, direction).unwrap();
    assert_eq!((cut(LEFT).input_ids, cut(LEFT).token_type_ids), (vec![12, 13, 14, 15], vec![0, 0, 1, 1]));
    assert_eq!((cut(RIGHT).input_ids, cut(RIGHT).token_type_ids), (vec![10, 11, 12, 13], vec![]));
    let chunks = encoder.chunks(&typed, "input", None, 1, 9).unwrap();
    let chunks: Vec<_> = chunks.into_iter().map(|chunk| (chunk.input_ids, chunk.token_type_ids)).collect();
    assert_eq!(chunks, [(vec![10, 11, 12, 13], vec![]), (vec![13, 14, 15], vec![0, 1, 1])]);
    let unknown = Input::of_ids(vec![1, 2], vec![0, 2]);
    for refused in [
        encoder.encode(&unknown, "input", None, RIGHT).map(|_| ()),
        encoder.chunks(&unknown, "input", None, 0, 9).map(|_| ()),
    ] {
        let says = "input.token_type_ids: got 2; this model has 2 token types, from 0 to 1";
        assert_eq!(refused.unwrap_err().to_string(), says);
    }
    let unknown = encoder.encode(&Input::TokenIds(vec![1, 70_000]), "input[1]", None, RIGHT).unwrap_err();
    assert!(unknown.to_string().starts_with("input[1]: token id 70000 is not in the vocabulary"), "{unknown}");
}

#[test]
fn nothing_is_refused_as_empty_but_white_space_is_a_text() {
    let encoder = encoder(16);
    for input in [text(""), Input::TokenIds(Vec::new())] {
        let refused = encoder.encode(&input, "input", Some("tide: "), RIGHT);
        assert_eq!(refused, Err(Error::Empty { field: "input".to_string() }));
    }
    // sentence-transformers embeds the two special tokens.
    assert_eq!(encoder.encode(&text("  \n"), "input", None, RIGHT).unwrap().input_ids.len(), 2);
}

#[test]
fn tokens_tell_their_place_in_the_text() {
    let minilm = load_dir(&minilm()).unwrap().encoder;
    let tokens = minilm.tokenize("Café 日本 harbourmaster", true).unwrap();
    let places: Vec<_> = tokens.iter().map(|t| (t.text.as_str(), t.special, t.start, t.stop)).collect();
    let special = |text| (text, true, None, None);
    assert_eq!(places[0], special("[CLS]"));
    assert_eq!(*places.last().unwrap(), special("[SEP]"));
    assert_eq!(places[1], ("Café", false, Some(0), Some(4)));
    assert_eq!(places[2], ("日", false, Some(5), Some(6)));
    assert!(minilm.tokenize("Café", false).unwrap().iter().all(|token| !token.special));

    let ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
    assert_eq!(minilm.decode(&ids, true).unwrap(), "cafe 日 本 harbourmaster");
    assert!(minilm.decode(&ids, false).unwrap().starts_with("[CLS] "));
    assert!(minilm.decode(&[40_000], true).is_err());
}
