"""TensorFlow Serving's REST protocol, asked as its document (`api_rest.md` of tensorflow/serving) describes it."""

import base64
import json
import urllib.error
import urllib.request

import numpy

from judging import EXPECTED, REFERENCE, TEXTS, raises, same, unpack


class Refused(Exception):
    def __init__(self, status, message):
        super().__init__(message)
        self.status, self.message = status, message


class Client:
    """What programs write around this protocol: one address, JSON both ways, `error` where it fails."""

    def __init__(self, url, model):
        self.base = f"{url}/v1/models/{model}"

    def ask(self, suffix="", body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + suffix, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            answer = json.load(error)
            assert list(answer) == ["error"] and isinstance(answer["error"], str), answer
            raise Refused(error.code, answer["error"]) from None

    def predict(self, suffix="", **body):
        return self.ask(f"{suffix}:predict", body)


class TensorFlowServing:
    client = "TensorFlow Serving's REST document"

    def __init__(self, url):
        self.url = url
        self.client = Client(url, REFERENCE["model"])

    def test_rows(self):
        b64 = lambda text: {"b64": base64.b64encode(text.encode()).decode()}
        for instances in (TEXTS, [{"text": text} for text in TEXTS], [b64(text) for text in TEXTS]):
            answer = self.client.predict(instances=instances)
            assert list(answer) == ["predictions"] and len(answer["predictions"]) == len(TEXTS), answer.keys()
            for row, expected, text in zip(answer["predictions"], EXPECTED, TEXTS):
                same(row, expected, text[:30])

    def test_columns(self):
        for inputs in (TEXTS, {"text": TEXTS}):
            answer = self.client.predict(inputs=inputs)
            assert list(answer) == ["outputs"] and len(answer["outputs"]) == len(TEXTS), answer.keys()
            for row, expected, text in zip(answer["outputs"], EXPECTED, TEXTS):
                same(row, expected, text[:30])

    def test_other_signatures(self):
        ids = REFERENCE["token_ids"]
        expected = unpack(REFERENCE["token_ids_embedding"])
        answer = self.client.predict(signature_name="input_ids", instances=[ids, ids])
        for row in answer["predictions"]:
            same(row, expected, "token ids")
        [packed] = self.client.predict(signature_name="embedding_bytes", instances=TEXTS[:1])["predictions"]
        [floats] = self.client.predict(signature_name="serving_default", instances=TEXTS[:1])["predictions"]
        assert numpy.array_equal(unpack(packed["b64"]), numpy.asarray(floats, numpy.float32))

    def test_versions_and_labels(self):
        version = self.client.ask()["model_version_status"][0]["version"]
        for suffix in (f"/versions/{version}", "/labels/stable"):
            same(self.client.predict(suffix, instances=TEXTS[:1])["predictions"][0], EXPECTED[0], suffix)
            status = self.client.ask(suffix)["model_version_status"]
            assert [one["state"] for one in status] == ["AVAILABLE"], status
            assert status[0]["status"] == {"error_code": "OK", "error_message": ""}, status
            assert self.client.ask(f"{suffix}/metadata")["model_spec"]["version"] == version

    def test_metadata_describes_what_is_answered(self):
        metadata = self.client.ask("/metadata")
        assert metadata["model_spec"]["name"] == REFERENCE["model"], metadata
        signatures = metadata["metadata"]["signature_def"]["signature_def"]
        default = signatures["serving_default"]
        assert default["method_name"] == "tensorflow/serving/predict"
        assert default["inputs"]["text"]["dtype"] == "DT_STRING"
        assert [dim["size"] for dim in default["outputs"]["embedding"]["tensor_shape"]["dim"]] == ["-1", str(len(EXPECTED[0]))]
        # Each name of a signature is one that `predict` takes.
        ids = REFERENCE["token_ids"]
        rows = {"text": "x", "input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": [0] * len(ids)}
        for name, signature in signatures.items():
            instance = {key: rows[key] for key in signature["inputs"]}
            self.client.predict(signature_name=name, instances=[instance])

    def test_errors(self):
        ids = REFERENCE["token_ids"]
        for body, status, says in (
            ({}, 400, "neither"),
            ({"instances": TEXTS, "inputs": TEXTS}, 400, "both"),
            ({"instances": ["x", 1]}, 400, "instances[1]"),
            ({"instances": ["x", {"text": "x"}]}, 400, "instances[1]"),
            ({"instances": [ids, ids[:2]], "signature_name": "input_ids"}, 400, "instances[1]: expected 6 values"),
            ({"instances": ["x"], "signature_name": "none"}, 400, "signature_name"),
            ({"instances": ["word " * 5000]}, 413, "the limit is 256"),
        ):
            error = raises(Refused, lambda: self.client.predict(**body))
            assert error.status == status and says in error.message, (error.status, error.message)
        error = raises(Refused, lambda: Client(self.url, "none").predict(instances=["x"]))
        assert error.status == 404 and "`none`" in error.message, error
        error = raises(Refused, lambda: self.client.predict("/versions/77", instances=["x"]))
        assert error.status == 404 and "versions/77" in error.message, error
        for verb in ("classify", "regress"):
            error = raises(Refused, lambda: self.client.ask(f":{verb}", {"examples": [{"text": "x"}]}))
            assert error.status == 400 and "`embed`" in error.message, error
