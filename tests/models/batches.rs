//! What a row may depend on: its own tokens and its own form, nothing else of the batch.

use eremois::Error;
use eremois::model::pack::{PackedInput, RowSpec};
use eremois::model::{LoadedModel, Rows};
use proptest::prelude::*;

use super::common::*;

fn launch(model: &LoadedModel, batch: PackedInput) -> eremois::Result<Rows> {
    model.backend().launch(batch)?.finish()
}

/// A sequence of so many tokens, different for each seed.
fn sequence(len: usize, seed: u64, vocab_size: usize) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % vocab_size as u64) as u32
    };
    (0..len).map(|_| next()).collect()
}

fn check_alone_and_together(model: &LoadedModel, lengths: &[(usize, u64)]) {
    let sequences: Vec<Vec<u32>> =
        lengths.iter().map(|&(len, seed)| sequence(len, seed, model.info.vocab_size)).collect();
    let together = run(model, &sequences, true);
    assert_eq!(together.num_rows(), sequences.len());
    for (i, sequence) in sequences.iter().enumerate() {
        let alone = run(model, std::slice::from_ref(sequence), true);
        let diff = max_abs_diff(together.row(i), alone.row(0));
        assert!(diff <= 1e-6, "row {i} of {} tokens differs by {diff} in a batch of {lengths:?}", sequence.len());
    }
}

fn lengths(max_seq_len: usize) -> impl Strategy<Value = Vec<(usize, u64)>> {
    prop::collection::vec((1..=max_seq_len, any::<u64>()), 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_row_of_bert_is_the_same_alone(lengths in lengths(96)) {
        check_alone_and_together(&load_dir(&fixture("bert-f16")).unwrap(), &lengths);
    }

    #[test]
    fn a_row_of_roberta_is_the_same_alone(lengths in lengths(128)) {
        check_alone_and_together(&load_dir(&fixture("roberta-bf16")).unwrap(), &lengths);
    }

    #[test]
    fn a_row_of_mpnet_is_the_same_alone(lengths in lengths(200)) {
        check_alone_and_together(&load_dir(&fixture("mpnet")).unwrap(), &lengths);
    }

    #[test]
    fn a_row_of_albert_is_the_same_alone(lengths in lengths(128)) {
        check_alone_and_together(&load_dir(&fixture("albert")).unwrap(), &lengths);
    }

    #[test]
    fn a_row_of_deberta_is_the_same_alone(lengths in lengths(128)) {
        for name in ["deberta-v1", "deberta-v2-conv", "deberta-v3"] {
            check_alone_and_together(&load_dir(&fixture(name)).unwrap(), &lengths);
        }
    }
}

#[test]
fn a_row_of_minilm_is_the_same_alone() {
    let lengths = [1, 2, 7, 31, 32, 33, 64, 100, 129, 256].map(|len| (len, len as u64 * 77 + 1));
    check_alone_and_together(&load_dir(&minilm()).unwrap(), &lengths);
}

#[test]
fn each_row_has_the_form_it_asks_for() {
    let model = load_dir(&fixture("bert-f16")).unwrap();
    let ids = sequence(9, 3, model.info.vocab_size);
    let mut batch = PackedInput::default();
    let forms = [(false, 64), (true, 64), (true, 10), (false, 1), (true, 1)];
    for (normalize, dimensions) in forms {
        batch.push(&ids, &[], RowSpec { normalize, dimensions });
    }
    let rows = launch(&model, batch).unwrap();
    let whole = rows.row(0);
    for (i, (normalize, dimensions)) in forms.into_iter().enumerate() {
        let row = rows.row(i);
        assert_eq!(row.len(), dimensions);
        let norm = whole[..dimensions].iter().map(|x| x * x).sum::<f32>().sqrt();
        let scale = if normalize { norm } else { 1.0 };
        let expected: Vec<f32> = whole[..dimensions].iter().map(|x| x / scale).collect();
        assert!(max_abs_diff(row, &expected) <= 1e-6, "row {i}");
    }
}

/// bert has two segments; others have none and take the ids for nothing.
#[test]
fn token_types_count_where_a_model_has_them() {
    let ids = vec![2, 9, 3];
    let row = RowSpec { normalize: true, dimensions: 64 };
    for (name, differs) in [
        ("bert-f16", true),
        ("distilbert-masked-lm", false),
        ("albert", true),
        ("deberta-v2-conv", true),
        ("deberta-v3", false),
    ] {
        let model = load_dir(&fixture(name)).unwrap();
        let row = RowSpec { dimensions: model.info.hidden_size, ..row };
        let mut batch = PackedInput::default();
        batch.push(&ids, &[], row);
        batch.push(&ids, &[0, 1, 1], row);
        let rows = launch(&model, batch).unwrap();
        assert_eq!(max_abs_diff(rows.row(0), rows.row(1)) > 1e-3, differs, "{name}");
    }
}

#[test]
fn a_batch_that_breaks_its_rules_is_refused() {
    let model = load_dir(&fixture("bert-f16")).unwrap();
    const ROW: RowSpec = RowSpec { normalize: true, dimensions: 64 };
    let good = |change: &dyn Fn(&mut PackedInput)| {
        let mut batch = PackedInput::default();
        batch.push(&[2, 9, 3], &[], ROW);
        change(&mut batch);
        launch(&model, batch)
    };
    assert!(good(&|_| ()).is_ok());
    type Change = fn(&mut PackedInput);
    let cases: [(&str, Change); 6] = [
        ("input_ids", |b| b.input_ids[0] = 60_000),
        ("rows.dimensions", |b| b.rows[0] = RowSpec { normalize: true, dimensions: 65 }.into()),
        ("rows.dimensions", |b| b.rows[0] = RowSpec { normalize: true, dimensions: 0 }.into()),
        ("cu_seqlens", |b| b.cu_seqlens = vec![0, 0, 3]),
        ("cu_seqlens", |b| b.push(&vec![5; 513], &[], ROW)),
        ("token_type_ids", |b| b.token_type_ids.clear()),
    ];
    for (expected, change) in cases {
        match good(&change) {
            Err(Error::Shape { operand, .. }) => assert_eq!(operand, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
    assert!(matches!(launch(&model, PackedInput::default()), Err(Error::Shape { .. })));
    // A token type beyond the table is only seen by the op: an error, whatever its name.
    assert!(good(&|b| b.token_type_ids[1] = 7).is_err());
}

#[test]
fn values_that_are_no_numbers_fail_the_batch_by_name() {
    let copy = Copied::of("bert-f16");
    copy.weights(|tensors| {
        let name = "encoder.layer.1.output.LayerNorm.bias";
        let broken = (tensors[name].ones_like().unwrap() * f64::NAN).unwrap();
        tensors.insert(name.to_string(), broken);
    });
    let model = load_dir(copy.dir()).unwrap();
    let mut batch = PackedInput::default();
    batch.push(&[2, 9, 3], &[], RowSpec { normalize: true, dimensions: 64 });
    match launch(&model, batch) {
        Err(Error::Forward { model, cause }) => assert!(model == "test" && cause.contains("NaN"), "{cause}"),
        other => panic!("{other:?}"),
    }
}
