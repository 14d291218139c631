//! Tensor models: each kind of layer against what Keras computes, from the files that Keras wrote.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor, safetensors};
use eremois::Error;
use eremois::model::LoadedModel;
use eremois::model::keras::{import, parse_shape};
use eremois::model::load::load;
use eremois::model::pack::{PackedInput, Wanted};
use eremois::model::repository::Repository;
use eremois::model::signature::{Datatype, TensorSpec};
use eremois::request::{Input, Truncation};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/keras").join(name)
}

/// Imported into a repository of its own, found there by its manifest, and loaded.
fn imported(file: &str, shapes: &[&str]) -> Result<(tempfile::TempDir, LoadedModel), Error> {
    let root = tempfile::tempdir().unwrap();
    let models = Repository::new(root.path());
    let shapes: BTreeMap<_, _> = shapes.iter().map(|text| parse_shape(text).unwrap()).collect();
    import(&models, &fixture(file), Some("m"), &shapes)?;
    assert!(!root.path().join(".pull").exists(), "the staging folder is removed");
    let (entry, version) = models.find("m")?;
    entry.verify_files(version)?;
    let model = load(&entry.spec(version), &Device::Cpu)?;
    Ok((root, model))
}

/// The rows of named tensors [n, ...], each row those of all, one after another.
fn rows(record: &std::collections::HashMap<String, Tensor>, prefix: &str, specs: &[TensorSpec]) -> Vec<Vec<f32>> {
    let mut rows = Vec::new();
    for spec in specs {
        let tensor = &record[&format!("{prefix}.{}", spec.name)];
        assert_eq!(&tensor.dims()[1..], spec.shape.as_slice(), "{}", spec.name);
        let values = tensor.flatten_from(1).unwrap();
        let values = if spec.shape.is_empty() { values.unsqueeze(1).unwrap() } else { values };
        let values = values.to_vec2::<f32>().unwrap();
        rows.resize(values.len(), Vec::new());
        rows.iter_mut().zip(values).for_each(|(row, values)| row.extend(values));
    }
    rows
}

fn compute(model: &LoadedModel, inputs: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let mut batch = PackedInput::default();
    for input in inputs {
        let input = Input::Values(input.as_slice().into());
        let encoding = model.encoder.encode(&input, "input", None, Truncation::Refuse).unwrap();
        batch.push_values(&encoding.values, encoding.input_ids.len(), Wanted::Outputs);
    }
    let rows = model.backend().launch(batch).unwrap().finish().unwrap();
    (0..rows.num_rows()).map(|i| rows.row(i).to_vec()).collect()
}

fn close(got: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (got - expected).abs() / expected.abs().max(1.0);
        assert!(error <= tolerance, "{what}: value {i} is {got}, Keras has {expected}");
    }
}

fn agrees_with_keras(file: &str, shapes: &[&str]) {
    let (_root, model) = imported(file, shapes).unwrap_or_else(|e| panic!("{file}: {e}"));
    let record = fixture(file).with_extension("safetensors");
    let record = safetensors::load(record, &Device::Cpu).unwrap();
    let inputs = rows(&record, "in", &model.info.signature.inputs);
    let expected = rows(&record, "out", &model.info.signature.outputs);
    let got = compute(&model, &inputs);
    assert_eq!(got.len(), expected.len());
    for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
        close(got, expected, 1e-5, &format!("{file} row {i}"));
        // A row in a batch is that row alone.
        close(&compute(&model, &inputs[i..=i])[0], got, 1e-6, &format!("{file} row {i} alone"));
    }
}

#[test]
fn dense_layers_and_norms_agree_with_keras() {
    agrees_with_keras("mlp.keras", &[]);
    agrees_with_keras("mlp.h5", &[]);
    agrees_with_keras("adapted.keras", &[]);
}

#[test]
fn convolutions_and_pooling_agree_with_keras() {
    agrees_with_keras("conv1d.keras", &[]);
    agrees_with_keras("image.keras", &[]);
}

#[test]
fn recurrent_layers_agree_with_keras() {
    agrees_with_keras("recurrent.keras", &[]);
    agrees_with_keras("recurrent.h5", &[]);
    agrees_with_keras("gates.keras", &[]);
}

#[test]
fn several_inputs_and_outputs_agree_with_keras() {
    agrees_with_keras("joined.keras", &[]);
    agrees_with_keras("joined.h5", &[]);
}

#[test]
fn activations_agree_with_keras() {
    agrees_with_keras("activations.keras", &[]);
}

#[test]
fn shared_layers_and_models_within_models_agree_with_keras() {
    agrees_with_keras("shared.keras", &[]);
    agrees_with_keras("shared.h5", &[]);
}

#[test]
fn models_of_keras_2_agree_with_tensorflow() {
    agrees_with_keras("keras2-mlp.h5", &[]);
    agrees_with_keras("keras2-image.h5", &[]);
    agrees_with_keras("keras2-recurrent.h5", &[]);
    // Arithmetic without layers is operations of TensorFlow there.
    agrees_with_keras("keras2-shared.h5", &[]);
    agrees_with_keras("keras2-shared.keras", &[]);
}

#[test]
fn an_open_size_is_refused_until_it_is_given() {
    let refused = imported("shifting.keras", &[]).err().expect("refused").to_string();
    assert!(refused.contains("input `steps`") && refused.contains("--shape steps="), "{refused}");
    agrees_with_keras("shifting.keras", &["steps=4,3"]);
    for wrong in [["steps=4,2"], ["steps=4"], ["other=4,3"]] {
        assert!(imported("shifting.keras", &wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn signatures_are_those_of_the_file() {
    let (_root, model) = imported("joined.keras", &[]).unwrap();
    let names =
        |specs: &[TensorSpec]| specs.iter().map(|s| (s.name.clone(), s.dtype, s.shape.clone())).collect::<Vec<_>>();
    let expected = [("a", Datatype::F32, vec![4]), ("b", Datatype::F32, vec![4]), ("kind", Datatype::I64, vec![2])];
    assert_eq!(names(&model.info.signature.inputs), expected.map(|(n, d, s)| (n.to_string(), d, s)));
    let expected = [("class", Datatype::F32, vec![3]), ("value", Datatype::F32, vec![1])];
    assert_eq!(names(&model.info.signature.outputs), expected.map(|(n, d, s)| (n.to_string(), d, s)));
}

#[test]
fn indices_beyond_a_table_are_refused_at_the_door() {
    let (_root, model) = imported("recurrent.keras", &[]).unwrap();
    let encode = |value: f32| {
        let input = Input::Values([0.0, 1.0, 2.0, 3.0, 4.0, value].into());
        model.encoder.encode(&input, "input", None, Truncation::Refuse)
    };
    assert!(encode(11.0).is_ok());
    for value in [12.0, -1.0, 0.5, f32::INFINITY] {
        assert!(matches!(encode(value), Err(Error::Invalid { .. })), "{value}");
    }
}

#[test]
fn files_that_are_cut_or_changed_are_faults_and_no_panics() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["mlp.keras", "mlp.h5"] {
        let whole = fs::read(fixture(name)).unwrap();
        let attempt = |bytes: &[u8]| {
            let path = dir.path().join(name);
            fs::write(&path, bytes).unwrap();
            import(&Repository::new(dir.path().join("models")), &path, Some("m"), &BTreeMap::new())
        };
        for len in (0..whole.len()).step_by(997) {
            assert!(attempt(&whole[..len]).is_err(), "{name} cut to {len}");
        }
        // Any answer, but an answer: most bytes decide nothing.
        for at in (0..whole.len()).step_by(251) {
            let mut changed = whole.clone();
            changed[at] ^= 0xff;
            let _ = attempt(&changed);
        }
    }
}

/// A manifest written by hand, with weights of these shapes.
fn by_hand(layers: &str, weights: &[(&str, &[usize])]) -> Result<LoadedModel, Error> {
    let dir = tempfile::tempdir().unwrap();
    let version = dir.path().join("m/1");
    fs::create_dir_all(&version).unwrap();
    let tensors = weights.iter().map(|(name, shape)| {
        let values = Tensor::ones(*shape, candle_core::DType::F32, &Device::Cpu).unwrap();
        (name.to_string(), values)
    });
    safetensors::save(&tensors.collect(), version.join("model.safetensors")).unwrap();
    let manifest = format!("task = \"infer\"\n[versions.1]\n{layers}");
    fs::write(dir.path().join("m/manifest.toml"), manifest).unwrap();
    let models = Repository::new(dir.path());
    let (entry, version) = models.find("m")?;
    load(&entry.spec(version), &Device::Cpu)
}

#[test]
fn a_list_by_hand_is_computed_and_its_faults_name_the_layer() {
    let x =
        "outputs = [\"y\"]\n[[versions.1.inputs]]\nname = \"x\"\nshape = [2]\n[[versions.1.layers]]\nname = \"y\"\n";
    let model = by_hand(&format!("{x}kind = \"dense\"\n"), &[("y.kernel", &[2, 3]), ("y.bias", &[3])]).unwrap();
    assert_eq!(compute(&model, &[vec![2.0, 3.0]]), [[6.0; 3]]);
    /// What a layer says, the tensors that are there, and what the fault names.
    type Case<'a> = (&'a str, &'a [(&'a str, &'a [usize])], &'a str);
    let cases: [Case; 8] = [
        ("kind = \"dense\"\n", &[("y.kernel", &[3, 3]), ("y.bias", &[3])], "y.kernel"),
        ("kind = \"dense\"\n", &[("y.kernel", &[2, 3])], "y.bias"),
        ("kind = \"dense\"\nuse_bias = false\n", &[("y.kernel", &[2, 3]), ("y.bias", &[3])], "no layer of the list"),
        ("kind = \"dens\"\n", &[], "dens"),
        ("kind = \"flatten\"\nunits = 3\n", &[], "layers[0]"),
        ("kind = \"reshape\"\nshape = [3]\n", &[("z", &[1])], "layer `y` (reshape)"),
        ("kind = \"conv2d\"\n", &[("y.kernel", &[1, 1, 1, 1])], "layer `y` (conv2d)"),
        ("kind = \"repeat\"\ntimes = 1000000000000\n", &[("z", &[1])], "layer `y` (repeat)"),
    ];
    for (layer, weights, named) in cases {
        let fault = by_hand(&format!("{x}{layer}"), weights).err().expect(layer).to_string();
        assert!(fault.contains(named), "{layer}: {fault}");
    }
}
