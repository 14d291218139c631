"""What models of tests/fixtures answer, as named tensors: what transformers and Keras computed, in the form of the task.

Compared are values, in whichever protocol they come.
"""

from typing import NamedTuple

import numpy

from models import FIXTURES, REFERENCES, Model, safetensors

# References are written with six digits.
TOLERANCE = 1e-4


class Asked(NamedTuple):
    """A request of named tensors and what it is answered."""

    inputs: dict
    outputs: dict
    # Of the Open Inference Protocol alone: elsewhere values behind these are left out of the comparison.
    parameters: dict = {}
    tolerance: float = TOLERANCE


def softmax(values):
    values = numpy.asarray(values, numpy.float64)
    powers = numpy.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sigmoid(values):
    return 1 / (1 + numpy.exp(-numpy.asarray(values, numpy.float64)))


def padded(rows):
    """Rows of different lengths in one array, zeros behind the shorter ones; and the lengths."""
    rows = [numpy.asarray(row, numpy.float64) for row in rows]
    lengths = [len(row) for row in rows]
    out = numpy.zeros((len(rows), max(lengths), *rows[0].shape[1:]))
    for place, row in zip(out, rows):
        place[: len(row)] = row
    return out, lengths


def same_tensors(found, asked, is_exact_shape=True):
    """`found` has the tensors that were expected, by name."""
    assert sorted(found) == sorted(asked.outputs), (sorted(found), sorted(asked.outputs))
    for name, expected in asked.outputs.items():
        got, expected = numpy.asarray(found[name], numpy.float64), numpy.asarray(expected, numpy.float64)
        if not is_exact_shape:
            got = got[tuple(slice(0, size) for size in expected.shape)]
        assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
        error = numpy.abs(got - expected) / numpy.maximum(1, numpy.abs(expected))
        assert error.max() <= asked.tolerance, f"{name}: off by {error.max()}"


def cases(model, kind):
    return [case for case in REFERENCES[model.name]["cases"] if isinstance(case["input"], kind)]


CLASSIFY = Model("heads/bert-nli", "classify")
RERANK = Model("heads/xlm-roberta-rerank", "rerank")
TOKEN_CLASSIFY = Model("heads/bert-ner", "token_classify")
SPARSE = Model("heads/distilbert-splade", "sparse")
FILL_MASK = Model("heads/bert-masked-lm", "fill_mask")
EMBED = Model("heads/bert-dense", "embed")
FLOWERS = Model("vision/vit-flowers", "classify")
CLIP = Model("vision/clip", "embed")
PICTURES = ("photo.png", "photo.jpg")
# Pictures are read and resized by other code than the references', which rounds at other places.
PICTURE_TOLERANCE = 5e-3
TENSORS = Model("keras/joined.keras", "infer")


def classify():
    alone, pairs = cases(CLASSIFY, str), cases(CLASSIFY, list)
    scores = lambda cases: {"scores": softmax([case["logits"] for case in cases])}
    texts = lambda i: [case["input"][i] for case in pairs]
    return [
        Asked({"text": [case["input"] for case in alone]}, scores(alone)),
        Asked({"text": texts(0), "text_pair": texts(1)}, scores(pairs)),
    ]


def rerank():
    pairs = cases(RERANK, list)
    inputs = {"query": [case["input"][0] for case in pairs], "text": [case["input"][1] for case in pairs]}
    return [Asked(inputs, {"scores": sigmoid([case["logits"] for case in pairs])})]


def token_classify():
    texts = cases(TOKEN_CLASSIFY, str)
    # They are written flat, token by token.
    num_labels = len(TOKEN_CLASSIFY.labels)
    scores, lengths = padded([softmax(numpy.reshape(case["logits"], (-1, num_labels))) for case in texts])
    return [Asked({"text": [case["input"] for case in texts]}, {"scores": scores, "lengths": lengths})]


def sparse():
    texts = [case for case in REFERENCES[SPARSE.name]["sparse"] if isinstance(case["input"], str)]
    weights, lengths = padded([case["weights"] for case in texts])
    outputs = {"indices": weights[..., 0], "values": weights[..., 1], "lengths": lengths}
    return [Asked({"text": [case["input"] for case in texts]}, outputs)]


def fill_mask():
    texts = REFERENCES[FILL_MASK.name]["filled"]
    numbers = [[[filled[:2] for filled in mask] for mask in case["masks"]] for case in texts]
    filled, lengths = padded(numbers)
    outputs = {"token_ids": filled[..., 0], "scores": filled[..., 1], "lengths": lengths}
    return [Asked({"text": [case["input"] for case in texts]}, outputs, {"top_k": filled.shape[2]})]


def embed():
    reference = REFERENCES[EMBED.name]
    return [Asked({"text": reference["inputs"]}, {"embedding": reference["vectors"]})]


def picture(name):
    return (FIXTURES / "vision/images" / name).read_bytes()


def flowers():
    references = safetensors("vision/references.safetensors")
    rows = [references[f"{FLOWERS.name}/{name}/row"] for name in PICTURES]
    files = [picture(name) for name in PICTURES]
    return [Asked({"image": files}, {"scores": softmax(rows)}, tolerance=PICTURE_TOLERANCE)]


def tensors():
    references = safetensors("keras/joined.safetensors")
    of = lambda prefix: {name.removeprefix(prefix): tensor for name, tensor in references.items() if name.startswith(prefix)}
    return [Asked(of("in."), of("out."))]
