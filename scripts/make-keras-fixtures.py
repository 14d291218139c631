#!/usr/bin/env python3
"""Writes tests/fixtures/keras: small Keras models of every layer that is imported, and what Keras computes with them.

    pip install keras==3.15.1 h5py "jax[cpu]==0.10.2" safetensors
    KERAS_BACKEND=jax scripts/make-keras-fixtures.py [NAME ...]

    pip install tensorflow-cpu==2.21.0 tf_keras==2.21.0 h5py safetensors
    scripts/make-keras-fixtures.py --keras2 [NAME ...]

Each model NAME is written as NAME.keras, those of LEGACY as NAME.h5 too, and NAME.safetensors holds three rows: an input
`in.X` for each input of the model, and `out.Y` for each of its outputs, all f32. Weights are random, seeded by the name.
With --keras2 those of KERAS2 are written by Keras 2 as keras2-NAME.h5, one as .keras too, with what TensorFlow computes.
"""

import os
import sys
import zlib
from pathlib import Path

# Not torch: with it an average over a padded border counts the edge twice, where TensorFlow counts what is there.
os.environ.setdefault("KERAS_BACKEND", "jax")

IS_KERAS2 = "--keras2" in sys.argv
if IS_KERAS2:
    import tf_keras as keras
    from tf_keras import layers
else:
    import keras
    from keras import layers

import numpy as np
from safetensors.numpy import save_file

TO = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "keras"
NUM_ROWS = 3
# Those written in the older format too: every way that it names weights is in one of them.
LEGACY = ["mlp", "recurrent", "joined", "shared"]
KERAS2 = ["mlp", "recurrent", "image", "shared"]


def mlp():
    norm = layers.Normalization(mean=[0.5, -1.0, 2.0, 0.0, 1.5], variance=[1.0, 0.25, 4.0, 2.0, 0.5])
    return keras.Sequential(
        [
            keras.Input((5,), name="x"),
            norm,
            layers.Dense(7, activation="relu"),
            layers.BatchNormalization(epsilon=1e-2),
            layers.Dropout(0.3),
            layers.Dense(6, use_bias=False, activation="gelu"),
            layers.Activation("tanh"),
            layers.Dense(4, activation="softmax", name="probabilities"),
        ]
    )


def adapted():
    norm = layers.Normalization()
    norm.adapt(np.random.default_rng(5).normal(2.0, 3.0, (64, 6)).astype("float32"))
    return keras.Sequential([keras.Input((6,), name="x"), norm, layers.Dense(2, name="y")])


def conv1d():
    x = inputs = keras.Input((11, 3), name="signal")
    x = layers.Conv1D(4, 3, padding="causal", dilation_rate=2, activation="relu")(x)
    x = layers.Conv1D(6, 4, strides=2, padding="same")(x)
    x = layers.ELU(alpha=0.7)(x)
    a = layers.MaxPooling1D(3, strides=2, padding="same")(x)
    b = layers.AveragePooling1D(2, strides=2, padding="same")(x)
    x = layers.Concatenate()([a, b])
    x = layers.ZeroPadding1D((1, 2))(x)
    x = layers.Conv1D(6, 2, groups=3, use_bias=False)(x)
    x = layers.DepthwiseConv1D(3, padding="same", depth_multiplier=2)(x)
    x = layers.SeparableConv1D(5, 2, padding="valid", activation="sigmoid")(x)
    y = layers.Concatenate(name="y")([layers.GlobalAveragePooling1D()(x), layers.GlobalMaxPooling1D()(x)])
    return keras.Model(inputs, y)


def image():
    x = inputs = keras.Input((13, 10, 3), name="image")
    x = layers.Rescaling(1 / 127.5, offset=-1.0)(x)
    x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization(scale=False)(x)
    x = layers.ReLU(max_value=6.0)(x)
    skip = x
    x = layers.DepthwiseConv2D(3, padding="same")(x)
    x = layers.LeakyReLU(**{"alpha" if IS_KERAS2 else "negative_slope": 0.1})(x)
    x = layers.SpatialDropout2D(0.2)(x)
    x = layers.Conv2D(8, (1, 3), padding="same", dilation_rate=(1, 2), activation="silu")(x)
    x = layers.Add()([x, skip])
    a = layers.MaxPooling2D(3, strides=2, padding="same")(x)
    b = layers.AveragePooling2D((3, 2), strides=2, padding="same")(x)
    x = layers.Concatenate(axis=-1)([a, b])
    x = layers.ZeroPadding2D(((1, 0), (0, 2)))(x)
    x = layers.SeparableConv2D(6, 3, depth_multiplier=2)(x)
    x = layers.UpSampling2D(2)(x)
    x = layers.Cropping2D(((1, 0), (1, 1)))(x)
    x = layers.Conv2D(4, (2, 1), strides=(1, 2), groups=2)(x)
    x = layers.PReLU(shared_axes=[1, 2])(x)
    pooled = layers.GlobalAveragePooling2D(keepdims=True)(x)
    x = layers.Multiply()([x, pooled])
    flat = layers.Flatten()(layers.AveragePooling2D(2)(x))
    both = layers.Concatenate()([flat, layers.GlobalMaxPooling2D()(x)])
    return keras.Model(inputs, layers.Dense(3, name="logits")(both))


def recurrent():
    ids = keras.Input((6,), dtype="int32", name="ids")
    x = layers.Embedding(12, 5)(ids)
    x = layers.LSTM(4, return_sequences=True)(x)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
    x = layers.GRU(5, return_sequences=True, go_backwards=True)(x)
    x = layers.Bidirectional(layers.GRU(4, reset_after=False, use_bias=True), merge_mode="sum")(x)
    return keras.Model(ids, layers.Dense(1, activation="sigmoid", name="score")(x))


def gates():
    x = keras.Input((5, 3), name="x")
    outputs = [
        layers.LSTM(4, activation="relu", recurrent_activation="hard_sigmoid", use_bias=False, name="lstm")(x),
        layers.LSTM(2, go_backwards=True, name="backwards")(x),
        layers.GRU(4, name="gru")(x),
        layers.GRU(3, reset_after=False, use_bias=False, name="plain")(x),
        layers.SimpleRNN(3, return_sequences=True, name="simple")(x),
        layers.TimeDistributed(layers.Dense(2, activation="tanh"), name="each")(x),
    ]
    return keras.Model(x, outputs)


def joined():
    a = keras.Input((4,), name="a")
    b = keras.Input((4,), name="b")
    kind = keras.Input((2,), dtype="int64", name="kind")
    c = layers.LayerNormalization(epsilon=1e-4)(layers.Dense(4)(a))
    table = layers.Reshape((4, 3))(layers.Embedding(9, 6)(kind))
    mixed = layers.Concatenate(axis=-1)(
        [
            layers.Add()([a, b, c]),
            layers.Subtract()([a, b]),
            layers.Multiply()([a, b]),
            layers.Average()([a, b, c]),
            layers.Maximum()([a, b]),
            layers.Minimum()([a, c]),
        ]
    )
    repeated = layers.RepeatVector(4)(mixed)
    x = layers.Concatenate(axis=2)([repeated, table])
    x = layers.Permute((2, 1))(x)
    x = layers.LayerNormalization(axis=[1, 2], center=False)(x)
    norm = layers.UnitNormalization()(mixed)
    first = layers.Dense(3, activation="softmax", name="class")(layers.Flatten()(x))
    second = layers.Dense(1, name="value")(norm)
    return keras.Model([a, b, kind], [first, second])


def activations():
    x = keras.Input((6,), name="x")
    words = "linear relu relu6 elu selu gelu sigmoid hard_sigmoid tanh softplus softsign silu exponential leaky_relu"
    words += " mish hard_silu softmax log_softmax"
    outputs = [layers.Activation(word, name=f"is_{word}")(x) for word in words.split()]
    outputs += [
        layers.ReLU(max_value=0.9, negative_slope=0.2, threshold=0.1, name="relu_layer")(x),
        layers.LeakyReLU(name="leaky_layer")(x),
        layers.Softmax(axis=1, name="softmax_layer")(layers.Reshape((3, 2))(x)),
        layers.PReLU(name="prelu_layer")(x),
    ]
    return keras.Model(x, outputs)


def shared():
    """A model within a model, a layer called twice, and arithmetic without layers."""
    inner_in = keras.Input((3,), name="inner_in")
    inner = keras.Model(inner_in, layers.Dense(3, activation="relu")(layers.Dense(4)(inner_in)), name="inner")
    tower = keras.Sequential([keras.Input((3,)), layers.Dense(3, activation="tanh"), layers.Dense(2)], name="tower")
    twice = layers.Dense(3, name="twice")
    left = keras.Input((3,), name="left")
    right = keras.Input((3,), name="right")
    x = inner(twice(left))
    y = inner(twice(twice(right)))
    both = x + y * 0.5 - 1.0
    return keras.Model([left, right], layers.Concatenate(name="towers")([tower(both), tower(x / y.shape[-1]), tower(right - x)]))


def shifting():
    return keras.Sequential(
        [keras.Input((None, 3), name="steps"), layers.Conv1D(4, 3, padding="same"), layers.GRU(3, name="state")]
    )


MODELS = [mlp, adapted, conv1d, image, recurrent, gates, joined, activations, shared, shifting]


def randomize(model, rng):
    """Weights that show a mistake: none zero or one, as fresh biases and averages are."""
    for variable in model.weights:
        name = variable.name if IS_KERAS2 else variable.path
        # What a Normalization has adapted to: it has computed with it already.
        is_adapted = any(word in name.rsplit("/", 1)[-1] for word in ["count", "mean", "variance"]) and "moving" not in name
        dtype = variable.dtype.name if IS_KERAS2 else variable.dtype
        if is_adapted or not dtype.startswith(("float", "bfloat")):
            continue
        value = rng.normal(0.0, 0.5, variable.shape)
        if "variance" in name:
            value = 0.4 + value**2
        variable.assign(value.astype("float32"))


def rows(tensor, rng):
    shape = [NUM_ROWS] + [4 if size is None else size for size in tensor.shape[1:]]
    dtype = tensor.dtype.name if IS_KERAS2 else tensor.dtype
    if dtype.startswith("int"):
        return rng.integers(0, 9, shape).astype(dtype)
    spread = 255.0 if tensor.name == "image" else 2.0
    return (rng.uniform(-spread if spread < 9 else 0.0, spread, shape)).astype("float32")


def write(make):
    name = make.__name__
    keras.backend.clear_session()
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    keras.utils.set_random_seed(zlib.crc32(name.encode()))
    model = make()
    randomize(model, rng)
    inputs = {tensor.name: rows(tensor, rng) for tensor in model.inputs}
    outputs = model(list(inputs.values()) if len(inputs) > 1 else next(iter(inputs.values())), training=False)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    record = {f"in.{key}": value.astype("float32") for key, value in inputs.items()}
    names = [model.layers[-1].name] if isinstance(model, keras.Sequential) else model.output_names
    for key, value in zip(names, outputs):
        value = value.numpy() if IS_KERAS2 else keras.ops.convert_to_numpy(value)
        record[f"out.{key}"] = np.ascontiguousarray(value.astype("float32"))
    file = f"keras2-{name}" if IS_KERAS2 else name
    save_file(record, TO / f"{file}.safetensors")
    if not IS_KERAS2 or name == "shared":
        model.save(TO / f"{file}.keras")
    if IS_KERAS2 or name in LEGACY:
        model.save(TO / f"{file}.h5")
    print(file, {key: value.shape for key, value in record.items()})


if __name__ == "__main__":
    TO.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in sys.argv[1:] if name != "--keras2"]
    for make in MODELS:
        if IS_KERAS2 and make.__name__ not in KERAS2:
            continue
        if not wanted or make.__name__ in wanted:
            write(make)
