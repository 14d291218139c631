"""TensorFlow Serving's REST protocol on every task: rows and columns of what the model's metadata describe, `:classify`, `:regress` and
the model's status."""

import base64

import numpy

import expected
from expected import same_tensors
from judging import aside, raises
from tensorflow_serving import Client, Refused


def written(value):
    """A value in JSON: bytes as the protocol has them."""
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()}
    return value.tolist() if isinstance(value, numpy.ndarray) else value


class TensorFlowTask:
    client = "TensorFlow Serving's REST document"
    # What `:classify` and `:regress` say of a model that has no labels, or more than one.
    verbs = ()

    def __init__(self, url):
        self.tensorflow = Client(url, self.model.name)

    def typed(self, inputs):
        """Numbers in the type that the metadata of the model have for them."""
        with aside():
            signature = self.tensorflow.ask("/metadata")["metadata"]["signature_def"]["signature_def"]["serving_default"]
        is_whole = lambda name: signature["inputs"][name]["dtype"] in ("DT_INT32", "DT_INT64")
        number = lambda name, value: value.astype(numpy.int64) if is_whole(name) else value
        return {
            name: [written(number(name, value) if isinstance(value, numpy.ndarray) else value) for value in values]
            for name, values in inputs.items()
        }

    def same(self, found, asked):
        """`found` has a tensor a name, or is the only one."""
        names = list(asked.outputs)
        found = found if isinstance(found, dict) else {names[0]: found}
        same_tensors(found, asked, is_exact_shape=not asked.parameters)

    def test_rows(self):
        for asked in self.asked:
            inputs = self.typed(asked.inputs)
            named = [dict(zip(inputs, values)) for values in zip(*inputs.values())]
            for instances in [named] + ([row for row in inputs.values()] if len(inputs) == 1 else []):
                rows = self.tensorflow.predict(instances=instances)["predictions"]
                assert len(rows) == len(named), rows
                by_name = {name: [row[name] for row in rows] for name in rows[0]} if isinstance(rows[0], dict) else rows
                self.same(by_name, asked)

    def test_columns(self):
        for asked in self.asked:
            inputs = self.typed(asked.inputs)
            for columns in [inputs] + (list(inputs.values()) if len(inputs) == 1 else []):
                self.same(self.tensorflow.predict(inputs=columns)["outputs"], asked)

    def test_metadata_and_status(self):
        spec = self.tensorflow.ask("/metadata")
        signature = spec["metadata"]["signature_def"]["signature_def"]["serving_default"]
        assert set(self.asked[-1].inputs) <= set(signature["inputs"]), signature
        for name, values in self.asked[-1].outputs.items():
            dims = [int(dim["size"]) for dim in signature["outputs"][name]["tensor_shape"]["dim"]]
            shape = numpy.shape(values)
            assert len(dims) == len(shape) and all(dim in (-1, size) for dim, size in zip(dims, shape)), (name, dims, shape)
        [status] = self.tensorflow.ask()["model_version_status"]
        assert status["state"] == "AVAILABLE" and status["version"] == spec["model_spec"]["version"], status

    def test_classify_and_regress(self):
        asked = self.asked[-1]
        inputs = self.typed(asked.inputs)
        examples = [dict(zip(inputs, values)) for values in zip(*inputs.values())]
        for verb in ("classify", "regress"):
            if verb not in self.verbs:
                error = raises(Refused, lambda: self.tensorflow.ask(f":{verb}", {"examples": examples}))
                assert error.status == 400 and f":{verb}" in error.message, error
        if "classify" in self.verbs:
            result = self.tensorflow.ask(":classify", {"examples": examples})["result"]
            assert [[label for label, _ in row] for row in result] == [self.model.labels] * len(examples), result
            self.same([[score for _, score in row] for row in result], asked)
        if "regress" in self.verbs:
            result = self.tensorflow.ask(":regress", {"examples": examples})["result"]
            self.same([[score] for score in result], asked)


class TensorFlowClassify(TensorFlowTask):
    subject, model, asked = "classify", expected.CLASSIFY, expected.classify()
    verbs = ("classify",)


class TensorFlowRerank(TensorFlowTask):
    subject, model, asked = "rerank", expected.RERANK, expected.rerank()
    verbs = ("classify", "regress")


class TensorFlowTokenClassify(TensorFlowTask):
    subject, model, asked = "token classify", expected.TOKEN_CLASSIFY, expected.token_classify()


class TensorFlowSparse(TensorFlowTask):
    subject, model, asked = "sparse", expected.SPARSE, expected.sparse()


class TensorFlowFillMask(TensorFlowTask):
    subject, model, asked = "fill mask", expected.FILL_MASK, expected.fill_mask()


class TensorFlowEmbed(TensorFlowTask):
    subject, model, asked = "embed", expected.EMBED, expected.embed()


class TensorFlowImages(TensorFlowTask):
    subject, model, asked = "image classification", expected.FLOWERS, expected.flowers()
    verbs = ("classify",)


class TensorFlowTensors(TensorFlowTask):
    subject, model, asked = "tensor model", expected.TENSORS, expected.tensors()
