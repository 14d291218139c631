//! The layers of a Keras model in the order of their calls.

use std::collections::{BTreeMap, HashMap};

use serde_json::Value;

use super::Copied;
use super::calls::{Arg, Key, args, keys};
use super::file::{KerasFile, Place};
use super::words::steps;
use crate::Result;
use crate::model::layers::list::{InputSpec, Kind, LayerList, LayerSpec};
use crate::model::signature::Datatype;

/// Most calls of layers in one model: they are looked through until all that can be is converted.
const MAX_CALLS: usize = 10_000;
/// Deepest models within models.
const MAX_DEPTH: usize = 16;

/// Converts a model: its list, and its tensors by our names.
///
/// Errors: [`crate::Error::ModelFile`] naming the layer and what is not supported.
pub(super) fn convert(
    file: &KerasFile,
    shapes: &BTreeMap<String, Vec<usize>>,
) -> Result<(LayerList, BTreeMap<String, Copied>)> {
    let mut converter = Converter { file, shapes, list: LayerList::default(), tensors: BTreeMap::new(), num_calls: 0 };
    let scope = Scope::default();
    converter.list.outputs = converter.model(&file.config, &scope, None)?;
    if let Some(name) = shapes.keys().find(|name| !converter.list.inputs.iter().any(|input| input.name == **name)) {
        let names: Vec<&str> = converter.list.inputs.iter().map(|input| input.name.as_str()).collect();
        return Err(file.fault(format!("--shape names `{name}`; the inputs are {}", names.join(", "))));
    }
    Ok((converter.list, converter.tensors))
}

/// Where within models a layer stands.
#[derive(Clone, Default)]
struct Scope {
    /// Before the names of values, with the number of the call.
    values: String,
    /// Before the names of weights.
    weights: String,
    place: Place,
    depth: usize,
}

struct Converter<'a> {
    file: &'a KerasFile,
    shapes: &'a BTreeMap<String, Vec<usize>>,
    list: LayerList,
    tensors: BTreeMap<String, Copied>,
    num_calls: usize,
}

impl Converter<'_> {
    /// Converts a model that reads `inputs`, or has inputs of its own. Returns the names of its outputs.
    fn model(&mut self, model: &Value, scope: &Scope, inputs: Option<&[String]>) -> Result<Vec<String>> {
        let config = &model["config"];
        // Keras 1 wrote a Sequential's layers without anything around them.
        let layers = config["layers"].as_array().or(config.as_array());
        let layers = layers.ok_or_else(|| self.file.fault("config: a model without `layers`"))?;
        if scope.depth > MAX_DEPTH {
            return Err(self.file.fault(format!("models within models deeper than {MAX_DEPTH}")));
        }
        match model["class_name"].as_str() {
            Some("Sequential") => self.sequential(config, layers, scope, inputs),
            Some("Functional" | "Model") => self.functional(config, layers, scope, inputs),
            other => Err(self.file.fault(format!(
                "a model of class `{}`; Sequential and functional ones are imported",
                other.unwrap_or("?")
            ))),
        }
    }

    fn sequential(
        &mut self,
        config: &Value,
        layers: &[Value],
        scope: &Scope,
        inputs: Option<&[String]>,
    ) -> Result<Vec<String>> {
        let mut value = match inputs {
            Some([one]) => Some(one.clone()),
            Some(_) => return Err(self.file.fault("a Sequential model takes one input")),
            None => None,
        };
        for (layer, place) in layers.iter().zip(places(layers, scope)) {
            if layer["class_name"] == "InputLayer" {
                if value.is_none() {
                    value = Some(self.input(name_of(layer), &layer["config"])?);
                }
                continue;
            }
            let read = match value.take() {
                Some(value) => value,
                None => {
                    let mut words = layer["config"].clone();
                    if words["batch_shape"].is_null() && words["batch_input_shape"].is_null() {
                        words["batch_shape"] = config["build_input_shape"].clone();
                    }
                    self.input(&format!("{}_input", name_of(layer)), &words)?
                }
            };
            value = self.call(layer, &place, scope, 0, &[Arg::Tensor(read)])?.into_iter().next();
        }
        Ok(vec![value.ok_or_else(|| self.file.fault("a Sequential model without layers"))?])
    }

    fn functional(
        &mut self,
        config: &Value,
        layers: &[Value],
        scope: &Scope,
        inputs: Option<&[String]>,
    ) -> Result<Vec<String>> {
        let input_keys = keys(&config["input_layers"]).ok_or_else(|| self.file.fault("config: `input_layers`"))?;
        let output_keys = keys(&config["output_layers"]).ok_or_else(|| self.file.fault("config: `output_layers`"))?;
        let by_name: HashMap<&str, &Value> = layers.iter().map(|layer| (name_of(layer), layer)).collect();
        let mut values: HashMap<Key, String> = HashMap::new();
        for (i, key) in input_keys.iter().enumerate() {
            let value = match inputs {
                Some(inputs) => inputs.get(i).cloned(),
                None => by_name.get(key.0.as_str()).map(|layer| self.input(&key.0, &layer["config"])).transpose()?,
            };
            let value = value.ok_or_else(|| self.file.fault(format!("input `{}` is missing", key.0)))?;
            values.insert(key.clone(), value);
        }
        let mut pending = Vec::new();
        for (layer, place) in layers.iter().zip(places(layers, scope)) {
            for (number, call) in layer["inbound_nodes"].as_array().into_iter().flatten().enumerate() {
                let args = args(call).map_err(|reason| self.layer_fault(layer, &reason))?;
                pending.push((layer, place.clone(), number as u64, args));
            }
        }
        if pending.len() > MAX_CALLS {
            return Err(self.file.fault(format!("{} calls of layers, the limit is {MAX_CALLS}", pending.len())));
        }
        // Files list layers in their order but where one is called again: nearly always this is one round.
        while !pending.is_empty() {
            let before = pending.len();
            let mut rest = Vec::new();
            for (layer, place, number, args) in pending {
                let found = args.iter().map(|arg| match arg {
                    Arg::Tensor(key) => values.get(key).cloned().map(Arg::Tensor),
                    Arg::Number(number) => Some(Arg::Number(*number)),
                });
                match found.collect::<Option<Vec<_>>>() {
                    None => rest.push((layer, place, number, args)),
                    Some(found) => {
                        let outputs = self.call(layer, &place, scope, number, &found)?;
                        let number = number + first_call(layer, self.file.is_old());
                        for (i, value) in outputs.into_iter().enumerate() {
                            values.insert((name_of(layer).to_string(), number, i as u64), value);
                        }
                    }
                }
            }
            if rest.len() == before {
                return Err(self.layer_fault(rest[0].0, "reads what no layer gives"));
            }
            pending = rest;
        }
        let missing = |key: &Key| self.file.fault(format!("output `{}` is missing", key.0));
        output_keys.iter().map(|key| values.get(key).cloned().ok_or_else(|| missing(key))).collect()
    }

    fn layer_fault(&self, layer: &Value, reason: &str) -> crate::Error {
        let class = layer["class_name"].as_str().unwrap_or("?");
        self.file.fault(format!("layer `{}` ({class}): {reason}", name_of(layer)))
    }

    /// One call of a layer. Returns the names of what it gives.
    fn call(
        &mut self,
        layer: &Value,
        place: &Place,
        scope: &Scope,
        number: u64,
        args: &[Arg<String>],
    ) -> Result<Vec<String>> {
        self.num_calls += 1;
        if self.num_calls > MAX_CALLS {
            return Err(self.file.fault(format!("more than {MAX_CALLS} calls of layers")));
        }
        let name = name_of(layer);
        let call = if number == 0 { name.to_string() } else { format!("{name}@{number}") };
        let (base, weights_base) = (format!("{}{call}", scope.values), format!("{}{name}", scope.weights));
        let class = layer["class_name"].as_str().unwrap_or_default();
        let tensors =
            || args.iter().filter_map(|arg| if let Arg::Tensor(name) = arg { Some(name.clone()) } else { None });
        if matches!(class, "Sequential" | "Functional" | "Model") {
            let inner = Scope {
                values: format!("{base}/"),
                weights: format!("{weights_base}/"),
                place: place.clone(),
                depth: scope.depth + 1,
            };
            let outputs = self.model(layer, &inner, Some(&tensors().collect::<Vec<_>>()))?;
            let names = outputs.iter().enumerate().map(|(i, output)| {
                let name = if outputs.len() == 1 { base.clone() } else { format!("{base}:{i}") };
                let inputs = vec![output.clone()];
                self.list.layers.push(LayerSpec { name: name.clone(), inputs, weights: None, kind: Kind::Identity });
                name
            });
            return Ok(names.collect());
        }
        let steps = steps(class, &layer["config"], args, self.file.is_old())
            .map_err(|reason| self.layer_fault(layer, &reason))?;
        let names: Vec<String> = steps.iter().map(|step| format!("{base}{}", step.suffix)).collect();
        for (step, name) in steps.iter().zip(&names) {
            let weights = format!("{weights_base}{}", step.suffix);
            for var in &step.vars {
                let tensor = format!("{weights}.{}", var.what);
                if !self.tensors.contains_key(&tensor) {
                    self.tensors.insert(tensor, self.file.read(place, var)?);
                }
            }
            let inputs = match step.reads.as_slice() {
                [] => tensors().collect(),
                reads => reads.iter().map(|&i| names[i].clone()).collect(),
            };
            let weights = (!step.vars.is_empty() && weights != *name).then_some(weights);
            self.list.layers.push(LayerSpec { name: name.clone(), inputs, weights, kind: step.kind.clone() });
        }
        Ok(names.last().cloned().into_iter().collect())
    }

    /// Adds an input of the whole model. Returns its name.
    fn input(&mut self, name: &str, config: &Value) -> Result<String> {
        let fault = |reason: String| self.file.fault(format!("input `{name}`: {reason}"));
        let sizes = config["batch_shape"].as_array().or(config["batch_input_shape"].as_array());
        let sizes = match sizes.map(Vec::as_slice) {
            Some([_, sizes @ ..]) => sizes,
            _ => return Err(fault("the file says no shape".to_string())),
        };
        let given = self.shapes.get(name);
        if given.is_some_and(|given| given.len() != sizes.len()) {
            return Err(fault(format!("--shape has another number of axes than {sizes:?}")));
        }
        let mut shape = Vec::with_capacity(sizes.len());
        for (i, size) in sizes.iter().enumerate() {
            let said = size.as_u64().and_then(|size| usize::try_from(size).ok());
            let size = match (said, given.map(|given| given[i])) {
                (Some(said), Some(given)) if said != given => {
                    return Err(fault(format!("--shape has {given} for axis {}, the file {said}", i + 1)));
                }
                (Some(size), _) | (None, Some(size)) => size,
                (None, None) => {
                    let reason = format!("axis {} is left open; rows of a served model have one shape", i + 1);
                    return Err(fault(format!("{reason}: give it with --shape {name}=…")));
                }
            };
            shape.push(size);
        }
        let dtype = config["dtype"].as_str().or(config["dtype"]["config"]["name"].as_str());
        let dtype = match dtype.unwrap_or("float32") {
            "float64" => Datatype::F64,
            "int8" => Datatype::I8,
            "int16" => Datatype::I16,
            "int32" => Datatype::I32,
            "int64" => Datatype::I64,
            "uint8" => Datatype::U8,
            "uint16" => Datatype::U16,
            "uint32" => Datatype::U32,
            "bool" => Datatype::Bool,
            word if word.starts_with("float") || word.starts_with("mixed") || word == "bfloat16" => Datatype::F32,
            word => return Err(fault(format!("dtype {word} is not served"))),
        };
        self.list.inputs.push(InputSpec { name: name.to_string(), dtype, shape });
        Ok(name.to_string())
    }
}

fn name_of(layer: &Value) -> &str {
    layer["config"]["name"].as_str().or(layer["name"].as_str()).unwrap_or_default()
}

/// The number of a layer's first call. Keras 2 counts from 1 for a model that has its inputs within: making it was a call.
fn first_call(layer: &Value, is_old: bool) -> u64 {
    u64::from(is_old && layer["config"]["layers"][0]["class_name"] == "InputLayer")
}

/// Where the weights of each of a model's layers are: `.keras` counts the layers of each class.
fn places(layers: &[Value], scope: &Scope) -> Vec<Place> {
    let mut counts: HashMap<String, usize> = HashMap::new();
    let place = |layer: &Value| {
        let mut names = scope.place.names.clone();
        names.push(name_of(layer).to_string());
        // Arithmetic without layers is no part of what is saved.
        if layer["module"].as_str().is_some_and(|module| module.contains(".ops")) {
            return Place { path: String::new(), names };
        }
        let class = snake_case(layer["class_name"].as_str().unwrap_or_default());
        let count = counts.entry(class.clone()).or_default();
        let class = if *count == 0 { class } else { format!("{class}_{count}") };
        *count += 1;
        let within = if scope.place.path.is_empty() { String::new() } else { format!("{}/", scope.place.path) };
        Place { path: format!("{within}layers/{class}"), names }
    };
    layers.iter().map(place).collect()
}

/// A class's name as Keras writes it in paths: `PReLU` is `p_re_lu`, `Conv2D` is `conv2d`.
fn snake_case(class: &str) -> String {
    let chars: Vec<char> = class.chars().filter(|c| c.is_alphanumeric() || *c == '_').collect();
    let mut words = String::new();
    for (i, &c) in chars.iter().enumerate() {
        let before = i.checked_sub(1).map(|i| chars[i]);
        let begins_word = chars.get(i + 1).is_some_and(char::is_ascii_lowercase);
        let ends_word = before.is_some_and(|c| c.is_ascii_lowercase());
        if c.is_ascii_uppercase() && before.is_some() && (begins_word || ends_word) {
            words.push('_');
        }
        words.push(c.to_ascii_lowercase());
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_written_as_keras_writes_them() {
        // From files that Keras 3.15 wrote.
        for (class, path) in [
            ("PReLU", "p_re_lu"),
            ("Conv2D", "conv2d"),
            ("SeparableConv1D", "separable_conv1d"),
            ("SimpleRNN", "simple_rnn"),
            ("LSTM", "lstm"),
            ("BatchNormalization", "batch_normalization"),
            ("TimeDistributed", "time_distributed"),
        ] {
            assert_eq!(snake_case(class), path);
        }
    }
}
