//! A layer of Keras in the words of our lists.

use serde_json::Value;

use super::calls::{Arg, arithmetic};
use super::file::Var;
use crate::model::layers::list::{Activation, Conv, Dense, Keep, Kind, Numbers, Padding, Pool, Recurrent};

/// Our layers for one of Keras, one after another; the last has its name.
pub(super) type Steps = Vec<Step>;

/// One of our layers.
pub(super) struct Step {
    /// Behind the layer's name; empty for the last step.
    pub suffix: &'static str,
    pub kind: Kind,
    pub vars: Vec<Var>,
    /// Steps that it reads; empty: what the layer reads.
    pub reads: Vec<usize>,
}

fn step(kind: Kind, vars: Vec<Var>) -> Step {
    Step { suffix: "", kind, vars, reads: Vec::new() }
}

fn var(what: &'static str, index: usize) -> Var {
    Var { what, within: "", index, name: what, part: "" }
}

/// The variables of these names, in their order, that the layer has.
fn vars(names: &[(&'static str, bool)]) -> Vec<Var> {
    let has = names.iter().filter(|(_, has)| *has);
    has.enumerate().map(|(index, (what, _))| var(what, index)).collect()
}

/// The steps of a layer's call. `is_op` tells `x + y` from the layer `Add`; `is_old` is for files of Keras 1 and 2.
///
/// Errors: what is not supported, in words.
pub(super) fn steps<T>(class: &str, config: &Value, args: &[Arg<T>], is_old: bool) -> Result<Steps, String> {
    if config["data_format"].as_str().is_some_and(|format| format != "channels_last") {
        return Err("data_format is not channels_last".to_string());
    }
    for flag in ["stateful", "return_state", "mask_zero", "rms_scaling"] {
        if config[flag].as_bool() == Some(true) {
            return Err(format!("{flag} is not computed"));
        }
    }
    if !config["quantization_config"].is_null() {
        return Err("quantized weights are not read".to_string());
    }
    let reader = Reader { config, is_old };
    let one = |kind: Kind| Ok(vec![step(kind, Vec::new())]);
    match class {
        "Dense" => Ok(vec![reader.dense("")?]),
        "TimeDistributed" => {
            let inner = &config["layer"];
            if inner["class_name"] != "Dense" {
                return Err(format!("of {} is not computed, of Dense alone", inner["class_name"]));
            }
            Ok(vec![Reader { config: &inner["config"], is_old }.dense("layer")?])
        }
        "Conv1D" | "Conv2D" => {
            let (words, has_bias) = reader.conv()?;
            let kind = if class == "Conv1D" { Kind::Conv1d(words) } else { Kind::Conv2d(words) };
            Ok(vec![step(kind, vars(&[("kernel", true), ("bias", has_bias)]))])
        }
        "DepthwiseConv1D" | "DepthwiseConv2D" => {
            let (words, has_bias) = reader.conv()?;
            let kind = if class.ends_with("1D") { Kind::DepthwiseConv1d(words) } else { Kind::DepthwiseConv2d(words) };
            let mut vars = vars(&[("kernel", true), ("bias", has_bias)]);
            if is_old {
                vars[0].name = "depthwise_kernel";
            }
            Ok(vec![step(kind, vars)])
        }
        "SeparableConv1D" | "SeparableConv2D" => reader.separable(class.ends_with("1D")),
        "BatchNormalization" => {
            let (scale, center) = (reader.flag("scale", true), reader.flag("center", true));
            let axis = reader.axes("axis")?.first().copied().unwrap_or(-1);
            let kind = Kind::BatchNorm { axis, epsilon: reader.number("epsilon", 1e-3), scale, center };
            let names = [("gamma", scale), ("beta", center), ("moving_mean", true), ("moving_variance", true)];
            Ok(vec![step(kind, vars(&names))])
        }
        "LayerNormalization" => {
            let (scale, center) = (reader.flag("scale", true), reader.flag("center", true));
            let (axes, epsilon) = (reader.axes("axis")?, reader.number("epsilon", 1e-3));
            Ok(vec![step(
                Kind::LayerNorm { axes, epsilon, scale, center },
                vars(&[("gamma", scale), ("beta", center)]),
            )])
        }
        "UnitNormalization" => one(Kind::UnitNorm { axes: reader.axes("axis")? }),
        "Normalization" => reader.normalization(),
        "Rescaling" => one(Kind::Rescale { scale: reader.numbers("scale")?, offset: reader.numbers("offset")? }),
        "MaxPooling1D" => one(Kind::MaxPool1d(reader.pool()?)),
        "MaxPooling2D" => one(Kind::MaxPool2d(reader.pool()?)),
        "AveragePooling1D" => one(Kind::AveragePool1d(reader.pool()?)),
        "AveragePooling2D" => one(Kind::AveragePool2d(reader.pool()?)),
        "GlobalMaxPooling1D" | "GlobalMaxPooling2D" => one(Kind::GlobalMaxPool(reader.keep())),
        "GlobalAveragePooling1D" | "GlobalAveragePooling2D" => one(Kind::GlobalAveragePool(reader.keep())),
        "Embedding" => Ok(vec![step(Kind::Embedding, vars(&[("embeddings", true)]))]),
        "LSTM" | "GRU" | "SimpleRNN" => Ok(vec![reader.recurrent(class, "cell", "")?]),
        "Bidirectional" => reader.bidirectional(),
        "Activation" => one(Kind::Activation { function: reader.activation("activation")? }),
        "ReLU" => one(Kind::Relu {
            max_value: config["max_value"].as_f64(),
            negative_slope: reader.number("negative_slope", 0.0),
            threshold: reader.number("threshold", 0.0),
        }),
        "LeakyReLU" => {
            let slope = config["negative_slope"].as_f64().or(config["alpha"].as_f64()).unwrap_or(0.3);
            one(Kind::Relu { max_value: None, negative_slope: slope, threshold: 0.0 })
        }
        "ELU" => one(Kind::Elu { alpha: reader.number("alpha", 1.0) }),
        "PReLU" => Ok(vec![step(Kind::Prelu, vars(&[("alpha", true)]))]),
        "Softmax" => one(Kind::Softmax { axis: reader.axes("axis")?.first().copied().unwrap_or(-1) }),
        "Flatten" => one(Kind::Flatten),
        "Reshape" => one(Kind::Reshape { shape: list(&config["target_shape"]).ok_or("target_shape is no list")? }),
        "Permute" => one(Kind::Permute { axes: list(&config["dims"]).ok_or("dims is no list")? }),
        "RepeatVector" => {
            one(Kind::Repeat { times: config["n"].as_u64().and_then(|n| n.try_into().ok()).ok_or("n is no number")? })
        }
        "ZeroPadding1D" | "ZeroPadding2D" => one(Kind::ZeroPad { padding: reader.pairs("padding")? }),
        "Cropping1D" | "Cropping2D" => one(Kind::Crop { cropping: reader.pairs("cropping")? }),
        "UpSampling1D" | "UpSampling2D" => {
            if config["interpolation"].as_str().is_some_and(|word| word != "nearest") {
                return Err("interpolation is `nearest` alone".to_string());
            }
            let default = if class == "UpSampling1D" { 1 } else { 2 };
            let size = reader.sizes("size")?;
            one(Kind::Upsample { size: if size.len() == 1 { vec![size[0]; default] } else { size } })
        }
        "Dropout"
        | "SpatialDropout1D"
        | "SpatialDropout2D"
        | "GaussianNoise"
        | "GaussianDropout"
        | "AlphaDropout"
        | "ActivityRegularization"
        | "Identity" => one(Kind::Identity),
        "Concatenate" => one(Kind::Concat { axis: reader.axes("axis")?.first().copied().unwrap_or(-1) }),
        "Average" => one(Kind::Average),
        "Maximum" => one(Kind::Maximum),
        "Minimum" => one(Kind::Minimum),
        "Add" | "Subtract" | "Multiply" | "Divide" | "TrueDivide" => {
            Ok(vec![step(arithmetic(class, args)?, Vec::new())])
        }
        // Keras 2 has operations of TensorFlow in their place.
        "TFOpLambda" => match config["function"].as_str().unwrap_or_default() {
            "math.add" | "__operators__.add" => one(arithmetic("Add", args)?),
            "math.subtract" => one(arithmetic("Subtract", args)?),
            "math.multiply" => one(arithmetic("Multiply", args)?),
            "math.truediv" | "math.divide" => one(arithmetic("Divide", args)?),
            function => Err(format!("tf.{function} is not one of the operations that are imported")),
        },
        _ => Err("is not one of the layers that are imported".to_string()),
    }
}

/// Reads one layer's config.
struct Reader<'a> {
    config: &'a Value,
    is_old: bool,
}

impl Reader<'_> {
    fn flag(&self, key: &str, default: bool) -> bool {
        self.config[key].as_bool().unwrap_or(default)
    }

    fn number(&self, key: &str, default: f64) -> f64 {
        self.config[key].as_f64().unwrap_or(default)
    }

    /// One number, or one for each channel.
    fn numbers(&self, key: &str) -> Result<Numbers, String> {
        serde_json::from_value(self.config[key].clone()).map_err(|_| format!("{key} is no number and no list of them"))
    }

    /// A number or a list of numbers; -1 where there is none.
    fn axes(&self, key: &str) -> Result<Vec<i64>, String> {
        match &self.config[key] {
            Value::Null => Ok(vec![-1]),
            Value::Number(number) => number.as_i64().map(|n| vec![n]).ok_or_else(|| format!("{key} is no axis")),
            value => list(value).ok_or_else(|| format!("{key} is no list of axes")),
        }
    }

    fn sizes(&self, key: &str) -> Result<Vec<usize>, String> {
        let sizes = match &self.config[key] {
            Value::Null => return Ok(Vec::new()),
            Value::Number(number) => number.as_u64().map(|n| vec![n as i64]),
            value => list(value),
        };
        let sizes: Option<Vec<usize>> = sizes.and_then(|sizes| sizes.iter().map(|&n| n.try_into().ok()).collect());
        sizes.ok_or_else(|| format!("{key} is no size"))
    }

    /// `n`, `(n, m)` for one axis or `((n, m), (k, l))` for two, or `(n, k)` for two symmetric ones.
    fn pairs(&self, key: &str) -> Result<Vec<(usize, usize)>, String> {
        let wrong = || format!("{key} is neither a size nor pairs of them");
        let value = &self.config[key];
        if let Ok(pairs) = serde_json::from_value::<Vec<(usize, usize)>>(value.clone()) {
            return Ok(pairs);
        }
        match self.sizes(key).map_err(|_| wrong())?.as_slice() {
            [n] => Ok(vec![(*n, *n)]),
            [before, behind] => Ok(vec![(*before, *behind)]),
            _ => Err(wrong()),
        }
    }

    fn activation(&self, key: &str) -> Result<Activation, String> {
        let word = match &self.config[key] {
            Value::Null => return Ok(Activation::Linear),
            Value::Object(object) if object.get("class_name").is_some_and(|class| class == "function") => {
                object.get("config").cloned().unwrap_or_default()
            }
            word => word.clone(),
        };
        if self.is_old && word == "hard_sigmoid" {
            return Ok(Activation::ClippedSigmoid);
        }
        serde_json::from_value(word.clone()).map_err(|_| format!("activation {word} is not computed"))
    }

    fn padding(&self) -> Result<Padding, String> {
        match &self.config["padding"] {
            Value::Null => Ok(Padding::Valid),
            word => serde_json::from_value(word.clone()).map_err(|_| format!("padding {word} is not computed")),
        }
    }

    fn dense(&self, within: &'static str) -> Result<Step, String> {
        let use_bias = self.flag("use_bias", true);
        let mut vars = vars(&[("kernel", true), ("bias", use_bias)]);
        vars.iter_mut().for_each(|var| var.within = within);
        Ok(step(Kind::Dense(Dense { use_bias, activation: self.activation("activation")? }), vars))
    }

    fn conv(&self) -> Result<(Conv, bool), String> {
        let use_bias = self.flag("use_bias", true);
        let conv = Conv {
            strides: self.sizes("strides")?,
            padding: self.padding()?,
            dilation: self.sizes("dilation_rate")?,
            groups: self.config["groups"].as_u64().unwrap_or(1) as usize,
            use_bias,
            activation: self.activation("activation")?,
        };
        Ok((conv, use_bias))
    }

    /// A convolution of each channel, then one of size 1 over all.
    fn separable(&self, is_1d: bool) -> Result<Steps, String> {
        let (conv, use_bias) = self.conv()?;
        let point = Conv { strides: Vec::new(), padding: Padding::Valid, dilation: Vec::new(), ..conv.clone() };
        let depth = Conv { use_bias: false, activation: Activation::Linear, ..conv };
        let (depth, point) = if is_1d {
            (Kind::DepthwiseConv1d(depth), Kind::Conv1d(point))
        } else {
            (Kind::DepthwiseConv2d(depth), Kind::Conv2d(point))
        };
        let mut vars = vars(&[("kernel", true), ("kernel", true), ("bias", use_bias)]);
        (vars[0].name, vars[1].name) = ("depthwise_kernel", "pointwise_kernel");
        let rest = vars.split_off(1);
        let depth = Step { suffix: ".depthwise", ..step(depth, vars) };
        Ok(vec![depth, Step { reads: vec![0], ..step(point, rest) }])
    }

    /// Constants that stand in the config, or that were learned and are weights.
    fn normalization(&self) -> Result<Steps, String> {
        let axes = match &self.config["axis"] {
            Value::Null => Vec::new(),
            _ => self.axes("axis")?,
        };
        let invert = self.flag("invert", false);
        let (mean, variance) = (&self.config["mean"], &self.config["variance"]);
        if mean.is_null() || variance.is_null() {
            return Ok(vec![step(Kind::Normalize { axes, invert }, vars(&[("mean", true), ("variance", true)]))]);
        }
        let flat = |value: &Value, key: &str| {
            let mut numbers = Vec::new();
            flatten(value, &mut numbers).then_some(numbers).ok_or_else(|| format!("{key} is not of numbers"))
        };
        let (mean, variance) = (flat(mean, "mean")?, flat(variance, "variance")?);
        if mean.len() != variance.len() || (mean.len() > 1 && axes.as_slice() != [-1]) {
            return Err("constants are for the last axis, as many of mean and variance".to_string());
        }
        let deviations = variance.iter().map(|variance| variance.sqrt().max(1e-7));
        let (scale, offset): (Vec<f64>, Vec<f64>) = deviations
            .zip(&mean)
            .map(|(deviation, mean)| if invert { (deviation, *mean) } else { (1.0 / deviation, -mean / deviation) })
            .unzip();
        let numbers =
            |values: Vec<f64>| if values.len() == 1 { Numbers::One(values[0]) } else { Numbers::Each(values) };
        Ok(vec![step(Kind::Rescale { scale: numbers(scale), offset: numbers(offset) }, Vec::new())])
    }

    fn pool(&self) -> Result<Pool, String> {
        Ok(Pool { size: self.sizes("pool_size")?, strides: self.sizes("strides")?, padding: self.padding()? })
    }

    fn keep(&self) -> Keep {
        Keep { keepdims: self.flag("keepdims", false) }
    }

    fn recurrent(&self, class: &str, within: &'static str, part: &'static str) -> Result<Step, String> {
        let words = Recurrent {
            activation: self.activation("activation")?,
            recurrent_activation: if class == "SimpleRNN" {
                Activation::Sigmoid
            } else {
                self.activation("recurrent_activation")?
            },
            use_bias: self.flag("use_bias", true),
            return_sequences: self.flag("return_sequences", false),
            go_backwards: self.flag("go_backwards", false),
        };
        let mut vars = vars(&[("kernel", true), ("recurrent_kernel", true), ("bias", words.use_bias)]);
        vars.iter_mut().for_each(|var| (var.within, var.part) = (within, part));
        let kind = match class {
            "LSTM" => Kind::Lstm(words),
            // Keras 1 and early 2 had no word for it, and computed it so.
            "GRU" if self.flag("reset_after", !self.is_old) => Kind::Gru(words),
            "GRU" => Kind::GruResetBefore(words),
            "SimpleRNN" => Kind::SimpleRnn(words),
            _ => return Err(format!("{class} has no direction that is computed")),
        };
        Ok(step(kind, vars))
    }

    /// One layer forwards, one backwards, whose sequences are turned again, and what joins them.
    fn bidirectional(&self) -> Result<Steps, String> {
        let layer = &self.config["layer"];
        let class = layer["class_name"].as_str().ok_or("has no layer")?;
        let backward = match &self.config["backward_layer"] {
            Value::Null => &layer["config"],
            backward if backward["class_name"] == layer["class_name"] => &backward["config"],
            _ => return Err("has two kinds of layers".to_string()),
        };
        let flagged = |config: &Value, backwards: bool| {
            let mut config = config.clone();
            config["go_backwards"] = Value::from(backwards);
            config
        };
        let (forward, backward) = (flagged(&layer["config"], false), flagged(backward, true));
        let reader = |config| Reader { config, is_old: self.is_old };
        let first = reader(&forward).recurrent(class, "forward_layer/cell", "forward_")?;
        let second = reader(&backward).recurrent(class, "backward_layer/cell", "backward_")?;
        let mut steps = vec![Step { suffix: ".forward", ..first }, Step { suffix: ".backward", ..second }];
        if reader(&forward).flag("return_sequences", false) {
            steps.push(Step { suffix: ".turned", reads: vec![1], ..step(Kind::Reverse, Vec::new()) });
        }
        let kind = match self.config["merge_mode"].as_str() {
            Some("concat") => Kind::Concat { axis: -1 },
            Some("sum") => Kind::Add,
            Some("mul") => Kind::Multiply,
            Some("ave") => Kind::Average,
            _ => return Err(format!("merge_mode {} is not computed", self.config["merge_mode"])),
        };
        let reads = vec![0, steps.len() - 1];
        steps.push(Step { reads, ..step(kind, Vec::new()) });
        Ok(steps)
    }
}

/// A list of whole numbers.
fn list(value: &Value) -> Option<Vec<i64>> {
    value.as_array()?.iter().map(Value::as_i64).collect()
}

/// The numbers of lists in lists. Keras nests them as deep as the data has axes.
fn flatten(value: &Value, numbers: &mut Vec<f64>) -> bool {
    match value {
        Value::Number(number) => number.as_f64().is_some_and(|number| {
            numbers.push(number);
            true
        }),
        Value::Array(list) => list.iter().all(|value| flatten(value, numbers)),
        _ => false,
    }
}
