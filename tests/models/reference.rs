//! Correctness: cosine at least 0.99999 and no value farther off than 2e-5, for every sequence.

use eremois::model::pack::Pooling;
use eremois::request::{Input, Truncation, TruncationDirection};

use super::common::*;

const MIN_COSINE: f64 = 0.99999;
const MAX_ABS_DIFF: f32 = 2e-5;

fn assert_close(got: &[f32], expected: &[f32], what: &str) {
    let (cosine, diff) = (cosine(got, expected), max_abs_diff(got, expected));
    assert!(cosine >= MIN_COSINE && diff <= MAX_ABS_DIFF, "{what}: cosine {cosine}, max abs diff {diff}");
}

/// Runs every sequence of a fixture, alone in order of length, with every pooling.
fn check_fixture(name: &str, architecture: &str, max_seq_len: usize) {
    let dir = fixture(name);
    let reference = Reference::read(name);
    let poolings = [
        (Pooling::Cls, "cls"),
        (Pooling::Mean, "mean"),
        (Pooling::Max, "max"),
        (Pooling::LastToken, "last-token"),
        (Pooling::WeightedMean, "weighted-mean"),
    ];
    for (pooling, pooling_name) in poolings {
        let mut spec = spec(&dir);
        spec.pooling = Some(pooling);
        let model = load_spec(&spec).unwrap();
        assert_eq!((model.info.architecture.as_str(), model.info.max_seq_len), (architecture, max_seq_len));
        let rows = run(&model, &reference.sequences, false);
        for (i, expected) in reference.vectors(pooling_name).iter().enumerate() {
            let what = format!("{name}, {pooling_name}, {} tokens", reference.sequences[i].len());
            assert_close(rows.row(i), expected, &what);
        }
    }
    let model = load_dir(&dir).unwrap();
    for case in text_cases(&dir.join("texts.json")) {
        let input = Input::Text(case.text.clone());
        let encoding = model.encoder.encode(&input, "input", None, Truncation::Refuse).unwrap();
        assert_eq!(encoding.input_ids, case.ids, "{name}: {}", case.text);
    }
}

#[test]
fn bert_in_f16_equals_transformers() {
    check_fixture("bert-f16", "bert", 512);
}

#[test]
fn bert_in_gguf_equals_transformers() {
    check_fixture("bert-gguf", "bert", 512);
}

#[test]
fn roberta_in_bf16_equals_transformers() {
    check_fixture("roberta-bf16", "roberta", 128);
}

#[test]
fn xlm_roberta_in_shards_equals_transformers() {
    check_fixture("xlm-roberta-sharded", "xlm-roberta", 128);
}

#[test]
fn distilbert_equals_transformers() {
    check_fixture("distilbert-masked-lm", "distilbert", 128);
}

#[test]
fn mpnet_equals_transformers() {
    check_fixture("mpnet", "mpnet", 200);
}

#[test]
fn camembert_equals_transformers() {
    check_fixture("camembert", "camembert", 128);
}

#[test]
fn electra_with_narrow_tables_equals_transformers() {
    check_fixture("electra", "electra", 128);
}

#[test]
fn albert_with_groups_of_layers_equals_transformers() {
    check_fixture("albert", "albert", 128);
}

/// Logarithmic buckets, keys shared with the positions, a normalised table and no absolute positions.
#[test]
fn deberta_v3_equals_transformers() {
    check_fixture("deberta-v3", "deberta-v2", 128);
}

/// Positions with products of their own, distances beyond the table, token types, and the convolution.
#[test]
fn deberta_v2_with_a_convolution_equals_transformers() {
    check_fixture("deberta-v2-conv", "deberta-v2", 128);
}

#[test]
fn deberta_v1_equals_transformers() {
    check_fixture("deberta-v1", "deberta", 128);
}

#[test]
fn modernbert_equals_transformers() {
    check_fixture("modernbert", "modernbert", 256);
}

#[test]
fn nomic_bert_equals_transformers() {
    check_fixture("nomic-bert", "nomic_bert", 256);
}

#[test]
fn qwen3_equals_transformers() {
    check_fixture("qwen3", "qwen3", 256);
}

#[test]
fn gte_equals_transformers() {
    check_fixture("gte", "gte", 256);
}

/// As its authors published it: other names and keys, and positions stretched by their NTK scheme.
#[test]
fn gte_with_ntk_equals_its_own_definition() {
    check_fixture("gte-ntk", "new", 256);
}

#[test]
fn jina_v2_equals_its_own_definition() {
    check_fixture("jina-v2", "jina_bert", 256);
}

#[test]
fn mistral_equals_transformers() {
    check_fixture("mistral", "mistral", 256);
}

#[test]
fn gemma3_looking_both_ways_equals_transformers() {
    check_fixture("gemma3", "gemma3_text", 256);
}

/// Every length of 1 to 512 tokens; the model's own limit is 256, its position table reaches 512.
#[test]
fn minilm_equals_sentence_transformers_at_every_length() {
    let mut spec = spec(&minilm());
    spec.max_seq_len = Some(512);
    let model = load_spec(&spec).unwrap();
    let fixtures = fixture("..");
    let reference = tensors(&fixtures.join("minilm.safetensors"));
    let vec2 = |name: &str| reference[name].to_vec2::<f32>().unwrap();
    let ids = |name: &str| reference[name].to_vec1::<u32>().unwrap();
    let (stream, full_lengths) = (ids("stream"), ids("full_lengths"));
    let (heads, full) = (vec2("head"), vec2("full"));
    let norms: Vec<f32> = reference["norm_rest"].to_vec1().unwrap();
    assert_eq!((heads.len(), norms.len(), full_lengths.len()), (512, 512, full.len()));

    let text = std::fs::read_to_string(fixtures.join("text.txt")).unwrap();
    let tokens = model.encoder.tokenize(&text, false).unwrap();
    assert_eq!(tokens.iter().map(|token| token.id).collect::<Vec<_>>(), stream);

    // The same windows as scripts/make-fixtures.py takes.
    let sequence = |len: usize| -> Vec<u32> {
        let window = (0..len.saturating_sub(2)).map(|i| stream[(len * 7 + i) % stream.len()]);
        std::iter::once(101).chain(window).chain([102]).take(len).collect()
    };
    let lengths: Vec<usize> = (1..=512).collect();
    for chunk in lengths.chunks(16) {
        let rows = run(&model, &chunk.iter().map(|&len| sequence(len)).collect::<Vec<_>>(), true);
        for (i, &len) in chunk.iter().enumerate() {
            let row = rows.row(i);
            assert_close(&row[..32], &heads[len - 1], &format!("first values at {len} tokens"));
            let norm = row[32..].iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
            assert!((norm - f64::from(norms[len - 1])).abs() <= 1e-5, "length of the rest at {len} tokens: {norm}");
            if let Some(at) = full_lengths.iter().position(|&full| full as usize == len) {
                assert_close(row, &full[at], &format!("{len} tokens"));
            }
        }
    }
}

#[test]
fn minilm_equals_sentence_transformers_on_texts() {
    let model = load_dir(&minilm()).unwrap();
    assert_eq!((model.info.hidden_size, model.info.max_seq_len, model.info.normalize), (384, 256, true));
    let rows = tensors(&fixture("../minilm-texts.safetensors"))["rows"].to_vec2::<f32>().unwrap();
    for (case, expected) in text_cases(&fixture("../minilm-texts.json")).into_iter().zip(rows) {
        let input = Input::Text(case.text.clone());
        let cut = Truncation::Cut(TruncationDirection::Right);
        let encoding = model.encoder.encode(&input, "input", None, cut).unwrap();
        assert_eq!(encoding.input_ids, case.ids, "{}", case.text);
        assert_close(run(&model, &[encoding.input_ids], true).row(0), &expected, &case.text);
    }
}
