//! The bundled model from its files, by the way the server loads it.

use std::path::Path;

use candle_core::Device;
use eremois::model::load::{Placement, load_for};
use eremois::model::manifest::{Dtype, ModelSpec};
use eremois::model::pack::{PackedInput, RowSpec};
use eremois::model::{LoadedModel, Rows};
use eremois::request::{Input, Truncation, TruncationDirection};

use super::desk::{gpu, is_small};
use super::synthetic::cosine;

/// Relative to the project's folder, where cargo and `scripts/gpu run` start this binary.
const MODEL: &str = "models/all-MiniLM-L6-v2/1";

fn texts() -> Vec<String> {
    let sentence = "The quick brown fox jumps over the lazy dog; 1,234.5 times, they say. ";
    let mut texts = vec![
        "a".to_string(),
        "How do I reset my password?".to_string(),
        "日本語の文章です。".to_string(),
        "😀 emoji, and \u{200b}zero width".to_string(),
        "x".repeat(300),
    ];
    let lengths: &[usize] = if is_small() { &[1] } else { &[1, 2, 3, 5, 8, 40] };
    texts.extend(lengths.iter().map(|&n| sentence.repeat(n)));
    texts
}

fn load(device: &Device, dtype: Option<Dtype>) -> LoadedModel {
    let spec = ModelSpec { dtype, ..ModelSpec::bare("bundled", Path::new(MODEL)) };
    let placement = Placement { max_batch_tokens: 256, max_batch_size: 16, ..Placement::default() };
    load_for(&spec, std::slice::from_ref(device), &placement).unwrap()
}

fn run(model: &LoadedModel) -> Rows {
    let mut batch = PackedInput::default();
    for text in texts() {
        let cut = Truncation::Cut(TruncationDirection::Right);
        let encoding = model.encoder.encode(&Input::Text(text), "input", None, cut).unwrap();
        let row = RowSpec { normalize: true, dimensions: model.info.hidden_size };
        batch.push(&encoding.input_ids, &encoding.token_type_ids, row);
    }
    model.backend().launch(batch).and_then(|in_flight| in_flight.finish()).unwrap()
}

#[test]
fn the_bundled_model_equals_the_cpu() {
    if gpu().is_none() {
        return;
    }
    let expected = run(&load(&Device::Cpu, None));
    let device = Device::new_cuda(0).unwrap();
    for (dtype, name, least) in
        [(None, "f16", 0.9999), (Some(Dtype::F16), "f16", 0.9999), (Some(Dtype::Bf16), "bf16", 0.999)]
    {
        let model = load(&device, dtype);
        assert_eq!((model.info.dtype.as_str(), model.info.device.as_str()), (name, "cuda:0"));
        let got = run(&model);
        assert_eq!(got.num_rows(), expected.num_rows());
        let cosines = (0..got.num_rows()).map(|i| cosine(got.row(i), expected.row(i)));
        let smallest = cosines.fold(1.0, |a: f64, b| if b < a || b.is_nan() { b } else { a });
        println!("bundled model {name}: smallest cosine to the CPU {smallest:.6}");
        assert!(smallest >= least, "{name}: cosine {smallest:.6}");
    }
}
