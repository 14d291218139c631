//! Correctness against reference outputs.

use super::common::*;
use eremois::request::{Input, Truncation};

/// Ids and first values by sentence-transformers 6.2 on the same weights.
#[test]
fn minilm_embeds_a_sentence() {
    let model = load_dir(&minilm()).unwrap();
    assert_eq!((model.info.hidden_size, model.info.max_seq_len, model.info.normalize), (384, 256, true));
    let text = Input::Text("The quick brown fox jumps over the lazy dog.".to_string());
    let encoding = model.encoder.encode(&text, "input", None, Truncation::Refuse).unwrap();
    assert_eq!(encoding.input_ids, [101, 1996, 4248, 2829, 4419, 14523, 2058, 1996, 13971, 3899, 1012, 102]);
    let rows = run(&model, &[encoding.input_ids], true);
    assert_eq!(rows.row(0).len(), 384);
    let expected = [0.04393358, 0.05893442, 0.04817835, 0.07754812, 0.02674443, -0.03762963, -0.00260515, -0.05994301];
    assert!(max_abs_diff(&rows.row(0)[..8], &expected) < 2e-6, "{:?}", &rows.row(0)[..8]);
}
