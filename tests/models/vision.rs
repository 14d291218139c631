//! Models of images against what `transformers` computes: scripts/make-vision-fixtures.py.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use eremois::Error;
use eremois::model::LoadedModel;
use eremois::model::image::{ImageLimits, MAX_PIXELS, MAX_SIDE, Preprocessor};
use eremois::model::manifest::ModelSpec;
use eremois::model::pack::{PackedInput, Pooling, RowSpec, Wanted};
use eremois::model::signature::Modality;
use eremois::request::{Input, Truncation};

use super::common::{load_spec, spec, tensors};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vision")
}

fn references() -> HashMap<String, Tensor> {
    tensors(&fixtures().join("references.safetensors"))
}

fn file(image: &str) -> Vec<u8> {
    std::fs::read(fixtures().join("images").join(image)).unwrap()
}

fn model(name: &str, task: &str) -> LoadedModel {
    load_spec(&ModelSpec { task: task.into(), ..spec(&fixtures().join(name)) }).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// "<model>/<image>" of all references of images.
fn cases(references: &HashMap<String, Tensor>) -> Vec<(String, String)> {
    let case = |key: &String| {
        let (model, image) = key.strip_suffix("/pixels")?.split_once('/')?;
        Some((model.to_string(), image.to_string()))
    };
    let mut cases: Vec<_> = references.keys().filter_map(case).collect();
    cases.sort();
    assert!(cases.len() > 20, "{cases:?}");
    cases
}

fn wanted(model: &LoadedModel, normalize: bool) -> Wanted {
    match model.info.task.as_str() {
        "classify" => Wanted::Scores,
        _ => RowSpec { normalize, dimensions: model.info.hidden_size }.into(),
    }
}

/// Rows of images and texts as one batch.
fn rows(model: &LoadedModel, inputs: &[(&[f32], &[u32])], wanted: &Wanted) -> Vec<Vec<f32>> {
    let num_tokens = model.info.signature.values.unwrap().num_tokens;
    let mut batch = PackedInput::default();
    for (pixels, ids) in inputs {
        match pixels.is_empty() {
            true => batch.push(ids, &[], wanted.clone()),
            false => batch.push_values(pixels, num_tokens, wanted.clone()),
        }
    }
    let rows = model.backend().launch(batch).unwrap().finish().unwrap();
    (0..inputs.len()).map(|i| rows.row(i).to_vec()).collect()
}

#[track_caller]
fn close(got: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!((g - e).abs() <= tolerance * e.abs().max(1.0), "{what}: value {i}: got {g}, expected {e}");
    }
}

/// In levels of 256. Pillow and our resizing round at other places, twice each; JPEG leaves its inverse transform and
/// the widening of its colours to the decoder, and so does the lossy form of WebP.
fn tolerance(image: &str) -> f32 {
    match image {
        "photo.jpg" | "subsampled.jpg" | "lossy.webp" => 4.0,
        _ => 1.0,
    }
}

#[test]
fn pixels_equal_transformers_within_a_few_levels() {
    let references = references();
    let mut worst = HashMap::new();
    for (name, image) in cases(&references) {
        let dir = fixtures().join(&name);
        let processor = Preprocessor::read(&dir).unwrap();
        let expected = &references[&format!("{name}/{image}/pixels")];
        assert_eq!(expected.dims(), [3, processor.height(), processor.width()], "{name}");
        let got = processor.pixels(&file(&image), "input").unwrap();
        // A level is 1 / 255 of what was divided by the deviation: at most 1 / 255 / 0.26.
        let deviation = match name.as_str() {
            "vit" | "resnet" | "resnet-flowers-v1" => 0.5,
            "resnet-flowers" => 1.0,
            _ => 0.2613,
        };
        let expected = values(expected);
        let levels = got.iter().zip(&expected).map(|(g, e)| (g - e).abs() * 255.0 * deviation).fold(0.0, f32::max);
        let entry = worst.entry(format!("{name}/{image}")).or_insert(0f32);
        *entry = entry.max(levels);
        assert_eq!(got.len(), expected.len(), "{name}/{image}");
    }
    for (image, levels) in &worst {
        // The deviation above is the smallest of three channels.
        assert!(
            *levels <= tolerance(image.rsplit('/').next().unwrap()) * 1.1,
            "{image} is {levels} levels away; all: {worst:?}"
        );
    }
}

#[test]
fn rows_equal_transformers() {
    let references = references();
    for (name, image) in cases(&references) {
        let task = if name.contains("flowers") { "classify" } else { "embed" };
        let model = model(&name, task);
        let pixels = values(&references[&format!("{name}/{image}/pixels")]);
        let mut expected = values(&references[&format!("{name}/{image}/row")]);
        // Of ViT the reference has all tokens; an embedding is the first one's.
        if name == "vit" {
            expected.truncate(model.info.hidden_size);
        }
        let got = rows(&model, &[(&pixels, &[])], &wanted(&model, false)).remove(0);
        close(&got, &expected, 5e-5, &format!("{name}/{image}"));
        // From the file itself: what the pixels differ by goes through the model.
        let encoding =
            model.encoder.encode(&Input::Image(file(&image).into()), "input", None, Truncation::Refuse).unwrap();
        assert_eq!(encoding.input_ids.len(), model.info.signature.values.unwrap().num_tokens);
        let got = rows(&model, &[(&encoding.values, &[])], &wanted(&model, false)).remove(0);
        let cosine = super::common::cosine(&got, &expected);
        assert!(cosine > 0.995, "{name}/{image}: cosine {cosine}");
    }
}

#[test]
fn all_tokens_of_a_vit_equal_transformers_by_their_mean() {
    let references = references();
    let spec = ModelSpec { pooling: Some(Pooling::Mean), ..spec(&fixtures().join("vit")) };
    let model = load_spec(&spec).unwrap();
    let width = model.info.hidden_size;
    let all = values(&references["vit/photo.png/row"]);
    let num_tokens = all.len() / width;
    assert_eq!(num_tokens, model.info.signature.values.unwrap().num_tokens);
    let mean: Vec<f32> = (0..width).map(|i| all.chunks(width).map(|t| t[i]).sum::<f32>() / num_tokens as f32).collect();
    let pixels = values(&references["vit/photo.png/pixels"]);
    close(&rows(&model, &[(&pixels, &[])], &wanted(&model, false))[0], &mean, 5e-5, "mean");
}

#[test]
fn texts_and_images_share_one_space_and_one_batch() {
    let references = references();
    let model = model("clip", "embed");
    assert!(model.info.signature.takes(Modality::Text) && model.info.signature.takes(Modality::Image));
    let texts: Vec<String> = serde_json::from_slice(&std::fs::read(fixtures().join("texts.json")).unwrap()).unwrap();
    let mut ids = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        let encoding = model.encoder.encode(&Input::Text(text.clone()), "input", None, Truncation::Refuse).unwrap();
        let expected: Vec<i64> = references[&format!("clip/ids/{i}")].to_vec1().unwrap();
        assert_eq!(encoding.input_ids.iter().map(|id| i64::from(*id)).collect::<Vec<_>>(), expected, "{text}");
        ids.push(encoding.input_ids);
    }
    let (a, b) = (values(&references["clip/photo.png/pixels"]), values(&references["clip/grey.png/pixels"]));
    let batch: [(&[f32], &[u32]); 5] = [(&[], &ids[0]), (&a, &[]), (&[], &ids[1]), (&b, &[]), (&[], &ids[2])];
    let expected = ["text/0", "photo.png/row", "text/1", "grey.png/row", "text/2"]
        .map(|key| values(&references[&format!("clip/{key}")]));
    let together = rows(&model, &batch, &wanted(&model, false));
    for ((got, expected), input) in together.iter().zip(&expected).zip(&batch) {
        close(got, expected, 5e-5, "clip");
        close(&rows(&model, &[*input], &wanted(&model, false))[0], got, 1e-6, "alone and together");
    }
    for row in rows(&model, &batch, &wanted(&model, true)) {
        assert!((row.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-5);
    }
}

#[test]
fn bad_files_are_named() {
    let processor = Preprocessor::read(&fixtures().join("clip")).unwrap();
    let error = |bytes: &[u8]| processor.pixels(bytes, "input[3]").unwrap_err();
    assert_eq!(error(b""), Error::Empty { field: "input[3]".into() });
    for (bytes, says) in
        [(b"GIF89a\x01\x00\x01\x00".to_vec(), "no PNG, JPEG or WebP"), (b"hello".to_vec(), "no PNG, JPEG or WebP")]
    {
        assert!(error(&bytes).to_string().contains(says));
    }
    for image in ["photo.png", "photo.webp", "lossy.webp"] {
        let whole = file(image);
        let text = error(&whole[..whole.len() / 2]).to_string();
        assert!(text.contains("input[3]") && text.contains("cannot be decoded"), "{image}: {text}");
    }
    // Every cut and many flips of a byte: an image, or an error of the client's.
    for image in ["photo.png", "subsampled.jpg", "lossy.webp", "palette.png"] {
        let whole = file(image);
        for i in (0..whole.len()).step_by(37) {
            let mut flipped = whole.clone();
            flipped[i] ^= 0x5a;
            for bytes in [&whole[..i], &flipped[..]] {
                match processor.pixels(bytes, "input") {
                    Ok(pixels) => assert_eq!(pixels.len(), 3 * 24 * 24),
                    Err(Error::Invalid { .. } | Error::Empty { .. } | Error::TooLarge { .. }) => {}
                    Err(other) => panic!("{image} at {i}: {other}"),
                }
            }
        }
    }
}

/// A PNG whose head says these sides, without any pixels.
pub fn head_of_png(width: u32, height: u32) -> Vec<u8> {
    let mut chunk = b"IHDR".to_vec();
    chunk.extend(width.to_be_bytes());
    chunk.extend(height.to_be_bytes());
    chunk.extend([8, 2, 0, 0, 0]);
    let mut png = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0d".to_vec();
    let checksum = crc32fast::hash(&chunk);
    png.extend(chunk);
    png.extend(checksum.to_be_bytes());
    png.extend(b"\x00\x00\x00\x00IDAT\x35\xaf\x06\x1e");
    png
}

#[test]
fn a_bomb_is_refused_before_it_is_unpacked() {
    let processor = Preprocessor::read(&fixtures().join("vit")).unwrap();
    let field = || "input".to_string();
    assert_eq!(
        processor.pixels(&head_of_png(10_000, 10_000), "input"),
        Err(Error::TooLarge { field: field(), got: 100_000_000, limit: MAX_PIXELS, unit: "pixels" })
    );
    assert_eq!(
        processor.pixels(&head_of_png(20_000, 1), "input"),
        Err(Error::TooLarge { field: field(), got: 20_000, limit: MAX_SIDE, unit: "pixels on a side" })
    );
    // A row of this one is more memory than a decoder may take.
    let error = processor.pixels(&head_of_png(u32::MAX >> 1, 1), "input").unwrap_err().to_string();
    assert!(error.contains("needs more than 800000000 bytes"), "{error}");
}

#[test]
fn the_settings_limits_hold_for_the_file_and_not_for_what_is_made_of_it() {
    let photo = std::fs::read(fixtures().join("images/photo.png")).unwrap();
    let field = || "input".to_string();
    let with = |limits: ImageLimits| {
        let spec = ModelSpec { image_limits: limits, ..spec(&fixtures().join("vit")) };
        let model = load_spec(&spec).unwrap();
        model.encoder.encode(&Input::Image(photo.clone().into()), "input", None, Truncation::Refuse)
    };
    let usual = ImageLimits::default();
    let values = with(usual).unwrap().values;
    let num_pixels = {
        let size = |at: usize| u32::from_be_bytes(photo[at..at + 4].try_into().unwrap()) as usize;
        size(16) * size(20)
    };
    // Exactly so many are taken, even where the model's own image has more.
    let exact = ImageLimits { max_pixels: num_pixels, max_bytes: photo.len() };
    assert_eq!(with(exact).unwrap().values, values);
    let expected = Error::TooLarge { field: field(), got: num_pixels, limit: num_pixels - 1, unit: "pixels" };
    assert_eq!(with(ImageLimits { max_pixels: num_pixels - 1, ..usual }).err(), Some(expected));
    let expected = Error::TooLarge { field: field(), got: photo.len(), limit: photo.len() - 1, unit: "bytes" };
    assert_eq!(with(ImageLimits { max_bytes: photo.len() - 1, ..usual }).err(), Some(expected));
}

#[test]
fn a_model_that_does_not_fit_is_refused_by_name() {
    for (name, task, says) in [
        ("clip", "classify", "models of this architecture embed here"),
        ("vit", "rerank", "embed and classify"),
        ("vit", "classify", "id2label"),
    ] {
        let error =
            load_spec(&ModelSpec { task: task.into(), ..spec(&fixtures().join(name)) }).err().unwrap().to_string();
        assert!(error.contains(says), "{name} {task}: {error}");
    }
}
