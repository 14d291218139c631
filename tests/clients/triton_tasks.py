"""The Open Inference Protocol's side of every task, asked through Triton's own clients: the same request in JSON, in binary tensors and
over gRPC."""

import base64
import json
import urllib.request

import numpy
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

import expected
from expected import same_tensors
from judging import aside, grpc_address, raises


class TritonTask:
    client = "tritonclient"

    def __init__(self, url):
        self.url = url
        self.http = triton.InferenceServerClient(url.removeprefix("http://"), network_timeout=60)
        self.grpc = triton_grpc.InferenceServerClient(grpc_address())

    @property
    def name(self):
        return self.model.name

    def metadata(self):
        with aside():
            return self.http.get_model_metadata(self.name)

    def arrays(self, inputs):
        """As metadata describe the tensors; those that it does not list are of token ids."""
        listed = {tensor["name"]: tensor for tensor in self.metadata()["inputs"]}
        for name, values in inputs.items():
            tensor = listed.get(name, {"datatype": "INT64", "shape": [-1, -1]})
            is_bytes = tensor["datatype"] == "BYTES"
            values = [value.encode() if isinstance(value, str) else value for value in values] if is_bytes else values
            array = numpy.array(values, object if is_bytes else triton_to_np_dtype(tensor["datatype"]))
            shape = [len(array), *tensor["shape"][1:]]
            shape = [size if size > 0 else array.shape[i] for i, size in enumerate(shape)]
            yield name, tensor["datatype"], array.reshape(shape)

    def by_http(self, inputs, binary, **more):
        make = lambda name, datatype, array: triton.InferInput(name, list(array.shape), datatype)
        sent = [make(*parts).set_data_from_numpy(parts[2], binary_data=binary) for parts in self.arrays(inputs)]
        names = [output["name"] for output in self.metadata()["outputs"]]
        outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in names]
        result = self.http.infer(self.name, sent, outputs=outputs, **more)
        return {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}

    def by_grpc(self, inputs, **more):
        make = lambda name, datatype, array: triton_grpc.InferInput(name, list(array.shape), datatype)
        sent = [make(*parts).set_data_from_numpy(parts[2]) for parts in self.arrays(inputs)]
        result = self.grpc.infer(self.name, sent, **more)
        return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}

    def test_in_JSON(self):
        for asked in self.asked:
            same_tensors(self.by_http(asked.inputs, False, parameters=asked.parameters or None), asked)

    def test_in_binary_tensors(self):
        for asked in self.asked:
            same_tensors(self.by_http(asked.inputs, True, parameters=asked.parameters or None), asked)

    def test_over_gRPC(self):
        for asked in self.asked:
            same_tensors(self.by_grpc(asked.inputs, parameters=asked.parameters or None), asked)

    def test_metadata_and_configuration(self):
        asked = self.asked[-1]
        plain = lambda tensors: [(tensor["name"], tensor["datatype"], [int(dim) for dim in tensor["shape"]]) for tensor in tensors]
        by_http, by_grpc = self.http.get_model_metadata(self.name), self.grpc.get_model_metadata(self.name, as_json=True)
        for side, wanted in (("inputs", asked.inputs), ("outputs", asked.outputs)):
            tensors = plain(by_http[side])
            assert tensors == plain(by_grpc[side]), (tensors, by_grpc[side])
            assert sorted(wanted) == sorted(name for name, _, _ in tensors), (tensors, list(wanted))
        for name, _, dims in plain(by_http["outputs"]):
            shape = numpy.shape(asked.outputs[name])
            assert len(dims) == len(shape) and all(dim in (-1, size) for dim, size in zip(dims, shape)), (name, dims, shape)
        config, over_grpc = self.http.get_model_config(self.name), self.grpc.get_model_config(self.name).config
        assert config["max_batch_size"] == over_grpc.max_batch_size > 1, config
        inputs = {name: dims[1:] for name, _, dims in plain(by_http["inputs"])}
        assert {tensor["name"]: tensor["dims"] for tensor in config["input"]} == inputs, config
        assert {tensor.name: list(tensor.dims) for tensor in over_grpc.input} == inputs, over_grpc

    def everywhere(self, inputs, **more):
        """The answer, which is the same whichever way one asks."""
        found = [self.by_http(inputs, False, **more), self.by_http(inputs, True, **more), self.by_grpc(inputs, **more)]
        for other in found[1:]:
            assert sorted(other) == sorted(found[0]), (sorted(other), sorted(found[0]))
            assert all(numpy.array_equal(other[name], found[0][name]) for name in other), found
        return found[0]

    def refused(self, says, inputs):
        for status, ask in (
            ("422", lambda: self.by_http(inputs, False)),
            ("422", lambda: self.by_http(inputs, True)),
            ("StatusCode.INVALID_ARGUMENT", lambda: self.by_grpc(inputs)),
        ):
            error = raises(InferenceServerException, ask)
            assert error.status() == status and says in error.message(), error

    def ask(self, path, body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"content-type": "application/json"})
        with aside(), urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def pair_of_ids(self, first, second):
        """A pair of texts as BERT reads it: its ids, and which text each is of."""
        first, second = ([token["id"] for token in tokens] for tokens in self.ask("/tokenize", {"inputs": [first, second]}))
        ids = first + second[1:]
        return ids, [0] * len(first) + [1] * (len(second) - 1)


class TritonClassify(TritonTask):
    subject, model, asked = "classify", expected.CLASSIFY, expected.classify()

    def test_token_types_tell_a_pairs_texts_apart(self):
        pairs = self.asked[1]
        for i, (first, second) in enumerate(zip(pairs.inputs["text"], pairs.inputs["text_pair"])):
            ids, types = self.pair_of_ids(first, second)
            found = self.everywhere({"input_ids": [ids], "token_type_ids": [types]})
            assert numpy.abs(found["scores"][0] - pairs.outputs["scores"][i]).max() < expected.TOLERANCE, (first, second)
        untyped = self.everywhere({"input_ids": [ids]})
        assert numpy.abs(untyped["scores"][0] - found["scores"][0]).max() > 10 * expected.TOLERANCE, untyped
        self.refused("token_type_ids: got 2; this model has 2 token types", {"input_ids": [ids], "token_type_ids": [[2] * len(ids)]})

    def test_classes(self):
        asked = self.asked[0]
        texts = next(array for _, _, array in self.arrays(asked.inputs))
        http = triton.InferInput("text", list(texts.shape), "BYTES").set_data_from_numpy(texts)
        grpc = triton_grpc.InferInput("text", list(texts.shape), "BYTES").set_data_from_numpy(texts)
        found = [
            self.http.infer(self.name, [http], outputs=[triton.InferRequestedOutput("scores", class_count=2)]),
            self.grpc.infer(self.name, [grpc], outputs=[triton_grpc.InferRequestedOutput("scores", class_count=2)]),
        ]
        for rows in (result.as_numpy("scores") for result in found):
            for row, scores in zip(rows, asked.outputs["scores"]):
                places = numpy.argsort(-scores)[:2]
                classes = [text.decode().split(":") for text in row]
                assert [(int(place), label) for _, place, label in classes] == [(i, self.model.labels[i]) for i in places], classes
                assert all(abs(float(score) - scores[i]) < expected.TOLERANCE for (score, _, _), i in zip(classes, places)), classes

    def test_configuration_names_labels_and_other_inputs(self):
        parameters = self.http.get_model_config(self.name)["parameters"]
        assert json.loads(parameters["labels"]["string_value"]) == self.model.labels, parameters
        [others] = json.loads(parameters["other_inputs"]["string_value"])
        assert [tensor["name"] for tensor in others] == ["input_ids", "attention_mask", "token_type_ids"], others


class TritonRerank(TritonTask):
    subject, model, asked = "rerank", expected.RERANK, expected.rerank()

    def test_one_query_of_all_texts(self):
        [asked] = self.asked
        query = asked.inputs["query"][0]
        one = self.everywhere({"query": [query], "text": asked.inputs["text"]})
        each = self.everywhere({"query": [query] * len(asked.inputs["text"]), "text": asked.inputs["text"]})
        assert numpy.array_equal(one["scores"], each["scores"]), (one, each)

    def test_token_types_that_the_model_does_not_have(self):
        self.refused("token_type_ids: got 1; this model has one token type", {"input_ids": [[0, 2]], "token_type_ids": [[0, 1]]})


class TritonTokenClassify(TritonTask):
    subject, model, asked = "token classify", expected.TOKEN_CLASSIFY, expected.token_classify()


class TritonSparse(TritonTask):
    subject, model, asked = "sparse", expected.SPARSE, expected.sparse()


class TritonFillMask(TritonTask):
    subject, model, asked = "fill mask", expected.FILL_MASK, expected.fill_mask()


class TritonEmbed(TritonTask):
    subject, model, asked = "embed", expected.EMBED, expected.embed()

    def test_all_tokens(self):
        [asked] = self.asked
        names = ["token_embeddings", "lengths"]
        [(_, _, texts)] = self.arrays(asked.inputs)
        http = triton.InferInput("text", list(texts.shape), "BYTES").set_data_from_numpy(texts)
        grpc = triton_grpc.InferInput("text", list(texts.shape), "BYTES").set_data_from_numpy(texts)
        by_tei = self.ask("/embed_all", {"inputs": asked.inputs["text"]})
        vectors, lengths = expected.padded(by_tei)
        wanted = expected.Asked(asked.inputs, {"token_embeddings": vectors, "lengths": lengths})
        for binary in (False, True):
            outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in names]
            result = self.http.infer(self.name, [http], outputs=outputs, parameters={"task": "embed_all"})
            same_tensors({name: result.as_numpy(name) for name in names}, wanted)
        result = self.grpc.infer(self.name, [grpc], parameters={"task": "embed_all"})
        same_tensors({name: result.as_numpy(name) for name in names}, wanted)


class TritonImages(TritonTask):
    subject, model, asked = "image classification", expected.FLOWERS, expected.flowers()

    def by_http(self, inputs, binary, **more):
        # JSON has no bytes, and the client would write them as a text.
        in_json = lambda files: [base64.b64encode(file) for file in files]
        return super().by_http(inputs if binary else {name: in_json(files) for name, files in inputs.items()}, binary, **more)


class TritonTensors(TritonTask):
    subject, model, asked = "tensor model", expected.TENSORS, expected.tensors()
