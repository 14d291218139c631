"""Asks a running server through the official Python clients and compares with reference values.

    python judge.py [--binary target/debug/eremois]   starts the server, judges it, stops it
    python judge.py --url http://127.0.0.1:8080       judges a server that runs already

EREMOIS_TEST_BIN is the binary where --binary is not given.

The server must serve all-MiniLM-L6-v2 (bundled). Needs requirements.txt; exits 1 with the list of what fails.
"""

import argparse
import gzip
import json
import sys
import time
import urllib.error
import urllib.request

import cohere
import grpc
import numpy
import openai
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from tritonclient.utils import InferenceServerException

from judging import EXPECTED, REFERENCE, TEXTS, add_arguments, grpc_address, judge_arguments, raises, same, unpack
from tensorflow_serving import TensorFlowServing


class OpenAi:
    client = "openai"

    def __init__(self, url):
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        self.model = REFERENCE["model"]

    def test_embeds_as_the_client_asks_by_itself(self):
        # The client asks for base64 and decodes it, unless told otherwise.
        answer = self.client.embeddings.create(model=self.model, input=TEXTS)
        assert answer.model == self.model and [item.index for item in answer.data] == list(range(len(TEXTS)))
        for item, expected, text in zip(answer.data, EXPECTED, TEXTS):
            same(item.embedding, expected, text[:30])
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(REFERENCE["num_tokens"])

    def test_floats_and_base64_are_the_same_values(self):
        floats = self.client.embeddings.create(model=self.model, input=TEXTS[0], encoding_format="float")
        packed = self.client.embeddings.create(model=self.model, input=TEXTS[0], encoding_format="base64")
        same(floats.data[0].embedding, EXPECTED[0], "float")
        row = numpy.asarray(floats.data[0].embedding, numpy.float32)
        assert numpy.array_equal(row, unpack(packed.data[0].embedding))

    def test_token_ids(self):
        expected = unpack(REFERENCE["token_ids_embedding"])
        ids = REFERENCE["token_ids"]
        one = self.client.embeddings.create(model=self.model, input=ids)
        same(one.data[0].embedding, expected, "ids")
        assert one.usage.prompt_tokens == len(ids)
        many = self.client.embeddings.create(model=self.model, input=[ids, ids[:3] + ids[-1:]])
        same(many.data[0].embedding, expected, "ids in a list")
        assert len(many.data) == 2

    def test_dimensions_cut_and_scale(self):
        answer = self.client.embeddings.create(model=self.model, input=TEXTS[:2], dimensions=64)
        for item, expected in zip(answer.data, EXPECTED):
            same(item.embedding, expected[:64], "64 dimensions")
            assert abs(numpy.linalg.norm(item.embedding) - 1) < 1e-5

    def test_a_row_does_not_depend_on_its_batch(self):
        many = self.client.embeddings.create(model=self.model, input=[f"{text} {i}" for i in range(20) for text in TEXTS])
        alone = self.client.embeddings.create(model=self.model, input=f"{TEXTS[1]} 7")
        difference = numpy.abs(numpy.array(many.data[7 * len(TEXTS) + 1].embedding) - numpy.array(alone.data[0].embedding))
        assert difference.max() <= 1e-6, difference.max()

    def test_other_types_beside_openais(self):
        create = self.client.embeddings.create
        floats = numpy.array([item.embedding for item in create(model=self.model, input=TEXTS).data], numpy.float32)
        for form in ("int8", "uint8", "binary", "ubinary"):
            # OpenAI's client decodes base64 as f32, so numbers are asked for; `dtype` is ours, `embedding_type` Jina's.
            for extra in ({"dtype": form}, {"embedding_type": form, "normalized": True}):
                answer = create(model=self.model, input=TEXTS, encoding_format="float", extra_body=extra)
                rows = [item.embedding for item in answer.data]
                assert numpy.array_equal(rows, quantised(floats, form)), (form, extra)

    def test_models(self):
        listed = self.client.models.list().data
        assert self.model in [model.id for model in listed] and listed[0].object == "model"
        one = self.client.models.retrieve(self.model)
        assert one.id == self.model and one.owned_by and one.created >= 0

    def test_errors_are_the_classes_the_client_knows(self):
        create = self.client.embeddings.create
        error = raises(openai.NotFoundError, lambda: create(model="no/such", input="x"))
        assert error.code == "model_not_found" and error.param == "model", error.body
        raises(openai.NotFoundError, lambda: self.client.models.retrieve("no/such"))
        error = raises(openai.BadRequestError, lambda: create(model=self.model, input=[]))
        assert error.param == "input" and error.type == "invalid_request_error", error.body
        raises(openai.BadRequestError, lambda: create(model=self.model, input=""))
        raises(openai.BadRequestError, lambda: create(model=self.model, input={"a": 1}))
        raises(openai.UnprocessableEntityError, lambda: create(model=self.model, input="x", dimensions=100_000))
        raises(openai.UnprocessableEntityError, lambda: create(model=self.model, input=[10**6]))
        error = raises(openai.APIStatusError, lambda: create(model=self.model, input="word " * 5000))
        assert error.status_code == 413 and "tokens, the limit is" in error.message, error.message
        # Past the cache: "x" may have been computed before, and is answered at once then.
        short = {"x-request-timeout": "1us", "cache-control": "no-store"}
        error = raises(openai.APIStatusError, lambda: create(model=self.model, input="x", extra_headers=short))
        # The body itself is late where it did not come with its head.
        assert error.status_code in (408, 504), error

    def test_ids_come_back(self):
        raw = self.client.embeddings.with_raw_response.create(
            model=self.model, input="x", extra_headers={"x-request-id": "judge-1"}
        )
        assert raw.headers["x-request-id"] == "judge-1"
        answer = self.client.embeddings.create(model=self.model, input="x")
        assert len(answer._request_id) == 36, answer._request_id


    def lines(self, prefix, texts):
        body = {"model": self.model}
        request = {"method": "POST", "url": "/v1/embeddings"}
        lines = [request | {"custom_id": f"{prefix}-{i}", "body": body | {"input": text}} for i, text in enumerate(texts)]
        return "".join(json.dumps(line) + "\n" for line in lines).encode()

    def upload(self, prefix, *texts):
        return self.client.files.create(file=(f"{prefix}.jsonl", self.lines(prefix, texts)), purpose="batch")

    def run(self, file, **more):
        batch = self.client.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h", **more
        )
        assert batch.object == "batch" and batch.status == "validating", batch
        return self.wait(batch)

    def wait(self, batch):
        end = time.monotonic() + 60
        # Asked for at least once, so that the record of this run is that of the next.
        while (batch := self.client.batches.retrieve(batch.id)).status not in ("completed", "failed", "expired", "cancelled"):
            assert time.monotonic() < end, batch
            time.sleep(0.05)
        return batch

    def test_files_come_back_as_they_were_sent(self):
        content = self.lines("f", TEXTS) + b"no request at all, which is not looked at before a batch\n"
        expires_after = {"anchor": "created_at", "seconds": 3600}
        file = self.client.files.create(file=("f.jsonl", content), purpose="batch", expires_after=expires_after)
        assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(content), "f.jsonl", "batch"), file
        assert file.expires_at - file.created_at == 3600 and file.status == "processed", file
        assert self.client.files.retrieve(file.id) == file
        assert self.client.files.content(file.id).read() == content
        deleted = self.client.files.delete(file.id)
        assert deleted.deleted and deleted.id == file.id, deleted
        raises(openai.NotFoundError, lambda: self.client.files.retrieve(file.id))
        raises(openai.NotFoundError, lambda: self.client.files.content(file.id))

    def test_lists_of_files_have_pages(self):
        made = [self.upload(f"page-{i}", "x").id for i in range(5)]
        for order, expected in (("asc", made), ("desc", made[::-1])):
            found = [file.id for file in self.client.files.list(limit=2, order=order, purpose="batch")]
            assert [id for id in found if id in made] == expected, (order, found)
        raises(openai.UnprocessableEntityError, lambda: self.client.files.list(limit=0))

    def test_uploads_are_checked(self):
        create = self.client.files.create
        error = raises(openai.UnprocessableEntityError, lambda: create(file=b"{}", purpose="assistants"))
        assert error.param == "purpose" and error.code == "invalid", error.body
        error = raises(openai.BadRequestError, lambda: create(file=b"", purpose="batch"))
        assert error.param == "file", error.body

    def test_a_batch_answers_every_line_once(self):
        file = self.upload("b", *TEXTS, "word " * 5000, *[f"text {i}" for i in range(50)])
        batch = self.run(file, metadata={"judge": "python"}, output_expires_after={"anchor": "created_at", "seconds": 3600})
        assert batch.status == "completed" and batch.metadata == {"judge": "python"}, batch
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (len(TEXTS) + 51, len(TEXTS) + 50, 1), batch
        assert batch.usage.input_tokens > sum(REFERENCE["num_tokens"]) and batch.model == self.model, batch
        lines = [json.loads(line) for line in self.client.files.content(batch.output_file_id).text.splitlines()]
        found = {line["custom_id"]: line["response"] for line in lines}
        assert len(found) == len(lines) == counts.completed
        for i, expected in enumerate(EXPECTED):
            assert found[f"b-{i}"]["status_code"] == 200
            same(found[f"b-{i}"]["body"]["data"][0]["embedding"], expected, f"b-{i}")
        [refused] = [json.loads(line) for line in self.client.files.content(batch.error_file_id).text.splitlines()]
        assert refused["custom_id"] == f"b-{len(TEXTS)}" and refused["response"]["status_code"] == 413, refused
        output = self.client.files.retrieve(batch.output_file_id)
        assert output.purpose == "batch_output" and output.expires_at - output.created_at == 3600, output
        error = raises(openai.ConflictError, lambda: self.client.batches.cancel(batch.id))
        assert "completed" in error.message, error.message

    def test_a_bad_input_fails_with_its_lines(self):
        content = self.lines("x", ["a", "b"]) + b"{}\n"
        batch = self.run(self.client.files.create(file=("x.jsonl", content), purpose="batch"))
        [fault] = batch.errors.data
        assert batch.status == "failed" and (fault.line, fault.code) == (3, "missing_required_parameter"), batch

    def test_batches_are_cancelled_and_listed(self):
        made = []
        for i in range(3):
            file = self.upload(f"c{i}", *[f"{'word ' * 100}{j}" for j in range(400)])
            batch = self.client.batches.create(
                input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
            )
            made.append(batch.id)
        cancelled = [self.client.batches.cancel(id) for id in made]
        for batch in cancelled:
            assert batch.status in ("cancelling", "cancelled"), batch
            batch = self.wait(batch)
            assert batch.status == "cancelled" and batch.cancelled_at >= batch.cancelling_at, batch
        found = [batch.id for batch in self.client.batches.list(limit=2)]
        assert [id for id in found if id in made] == made[::-1], found

    def test_batches_are_checked_at_the_door(self):
        file = self.upload("d", "x")
        create = self.client.batches.create
        good = {"input_file_id": file.id, "endpoint": "/v1/embeddings", "completion_window": "24h"}
        raises(openai.NotFoundError, lambda: create(**good | {"input_file_id": "file-none"}))
        error = raises(openai.UnprocessableEntityError, lambda: create(**good | {"endpoint": "/v1/responses"}))
        assert error.param == "endpoint", error.body
        raises(openai.NotFoundError, lambda: self.client.batches.retrieve("batch_none"))


class HuggingFace:
    client = "huggingface_hub"

    def __init__(self, url):
        self.url = url
        self.client = InferenceClient(base_url=url, timeout=60)

    def test_feature_extraction(self):
        for text, expected in zip(TEXTS[:5], EXPECTED):
            rows = self.client.feature_extraction(text)
            assert rows.shape == (1, len(expected)) and rows.dtype == numpy.float32
            same(rows[0], expected, text[:30])
        rows = self.client.feature_extraction(TEXTS[:5])
        assert rows.shape == (5, len(EXPECTED[0]))
        same(rows[4], EXPECTED[4], "batch")

    def test_feature_extraction_with_all_it_can_ask(self):
        long = "word " * 5000
        raises(HfHubHTTPError, lambda: self.client.feature_extraction(long))
        left = self.client.feature_extraction("start " + long, truncate=True, truncation_direction="left")
        right = self.client.feature_extraction("start " + long, truncate=True, truncation_direction="right")
        assert left.shape == right.shape and not numpy.array_equal(left, right)
        cut = self.client.feature_extraction(TEXTS[0], normalize=True, dimensions=32)
        same(cut[0], EXPECTED[0][:32], "32 dimensions")

    def test_the_route_by_name(self):
        client = InferenceClient(model=f"{self.url}/embed", timeout=60)
        same(client.feature_extraction(TEXTS[0])[0], EXPECTED[0], "/embed")

    def test_sentence_similarity(self):
        for client in (self.client, InferenceClient(model=f"{self.url}/similarity", timeout=60)):
            cosines = client.sentence_similarity(TEXTS[0], TEXTS[:3])
            expected = [float(EXPECTED[0] @ row) for row in EXPECTED[:3]]
            assert len(cosines) == 3 and numpy.abs(numpy.array(cosines) - expected).max() < 0.01, (cosines, expected)

    def test_errors(self):
        error = raises(HfHubHTTPError, lambda: self.client.feature_extraction([]))
        assert error.response.status_code == 400, error
        error = raises(HfHubHTTPError, lambda: self.client.feature_extraction("x", prompt_name="no-such-prompt"))
        assert error.response.status_code == 422, error


class Triton:
    client = "tritonclient"

    def __init__(self, url):
        self.client = triton.InferenceServerClient(url.removeprefix("http://"), network_timeout=60)
        self.model = REFERENCE["model"]

    def text(self, texts, binary=True, shape=None):
        tensor = triton.InferInput("text", shape or [len(texts)], "BYTES")
        array = numpy.array([text.encode() for text in texts], object).reshape(shape or [len(texts)])
        return tensor.set_data_from_numpy(array, binary_data=binary)

    def test_infers_with_and_without_binary_data(self):
        for is_binary_in in (True, False):
            for is_binary_out in (True, False):
                output = triton.InferRequestedOutput("embedding", binary_data=is_binary_out)
                inputs = [self.text(TEXTS[:5], is_binary_in, [5, 1])]
                result = self.client.infer(self.model, inputs, outputs=[output], request_id="42")
                rows = result.as_numpy("embedding")
                assert rows.shape == (5, len(EXPECTED[0])) and rows.dtype == numpy.float32, (rows.shape, rows.dtype)
                for row, expected, text in zip(rows, EXPECTED, TEXTS):
                    same(row, expected, text[:30])
                response = result.get_response()
                assert (response["id"], response["model_name"]) == ("42", self.model), response
                assert ("data" in response["outputs"][0]) != is_binary_out, response["outputs"][0].keys()

    def test_infers_as_the_client_asks_by_itself(self):
        result = self.client.infer(self.model, [self.text(TEXTS[:1])], model_version="1", priority=1, timeout=30_000_000)
        same(result.as_numpy("embedding")[0], EXPECTED[0], "all outputs")

    def test_infers_tokenised_input(self):
        ids = numpy.zeros((2, len(REFERENCE["token_ids"]) + 3))
        mask = numpy.zeros_like(ids)
        ids[0, : len(REFERENCE["token_ids"])], mask[0, : len(REFERENCE["token_ids"])] = REFERENCE["token_ids"], 1
        ids[1, :2], mask[1, :2] = (101, 102), 1
        for kind, name in ((numpy.int64, "INT64"), (numpy.int32, "INT32")):
            inputs = []
            for key, array in (("input_ids", ids), ("attention_mask", mask), ("token_type_ids", numpy.zeros_like(ids))):
                tensor = triton.InferInput(key, list(array.shape), name)
                inputs.append(tensor.set_data_from_numpy(array.astype(kind), binary_data=kind is numpy.int64))
            by_ids = self.client.infer(self.model, inputs).as_numpy("embedding")
            by_text = self.client.infer(self.model, [self.text(["hello, world!"])]).as_numpy("embedding")
            assert by_ids.shape == (2, by_text.shape[1])
            assert numpy.abs(by_ids[0] - by_text[0]).max() < 1e-5, "padding must not count"

    def test_many_at_once(self):
        asked = [self.client.async_infer(self.model, [self.text([text])]) for text in TEXTS[:5]]
        for asked, expected in zip(asked, EXPECTED):
            same(asked.get_result().as_numpy("embedding")[0], expected, "asynchronous")

    def test_parameters(self):
        infer = lambda texts, **parameters: self.client.infer(self.model, [self.text(texts)], parameters=parameters)
        same(infer(TEXTS[:1], dimensions=32).as_numpy("embedding")[0], EXPECTED[0][:32], "32 dimensions")
        long = "word " * 5000
        error = raises(InferenceServerException, lambda: infer([long]))
        assert error.status() == "413" and "text" in error.message(), error
        assert infer([long], truncate=True).as_numpy("embedding").shape == (1, len(EXPECTED[0]))

    def test_health_metadata_and_config(self):
        assert self.client.is_server_live() and self.client.is_server_ready()
        assert self.client.is_model_ready(self.model) and self.client.is_model_ready(self.model, "1")
        assert not self.client.is_model_ready("no-such-model")
        assert "binary_tensor_data" in self.client.get_server_metadata()["extensions"]
        metadata = self.client.get_model_metadata(self.model)
        assert metadata["name"] == self.model and metadata["versions"] == ["1"], metadata
        assert metadata["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1, 1]}], metadata
        output = {"name": "embedding", "datatype": "FP32", "shape": [-1, len(EXPECTED[0])]}
        assert metadata["outputs"] == [output], metadata
        config = self.client.get_model_config(self.model)
        assert config["max_batch_size"] > 1 and config["input"][0]["data_type"] == "TYPE_STRING", config
        assert config["output"][0]["dims"] == [len(EXPECTED[0])], config

    def test_statistics(self):
        stats = lambda: self.client.get_inference_statistics(self.model)["model_stats"][0]
        before = stats()
        self.client.infer(self.model, [self.text([f"never seen {time.time_ns()} {i}" for i in range(3)])])
        after = stats()
        assert after["inference_count"] - before["inference_count"] == 3, (before, after)
        assert after["execution_count"] > before["execution_count"], (before, after)
        assert abs(after["last_inference"] / 1e3 - time.time()) < 60, after
        ended = lambda stats: stats["inference_stats"]["success"]
        assert ended(after)["count"] - ended(before)["count"] == 1 and ended(after)["ns"] > ended(before)["ns"]
        assert [model["name"] for model in self.client.get_inference_statistics()["model_stats"]] == [self.model]

    def test_repository(self):
        index = self.client.get_model_repository_index()
        assert index == [{"name": self.model, "version": "1", "state": "READY", "reason": ""}], index
        self.client.unload_model(self.model)
        assert not self.client.is_model_ready(self.model)
        index = self.client.get_model_repository_index()
        assert index == [{"name": self.model, "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}], index
        error = raises(InferenceServerException, lambda: self.client.infer(self.model, [self.text(TEXTS)]))
        assert error.status() == "404", error
        error = raises(InferenceServerException, lambda: self.client.load_model("no-such-model"))
        assert error.status() == "404", error
        version = {"version_policy": {"specific": {"versions": [7]}}}
        error = raises(InferenceServerException, lambda: self.client.load_model(self.model, config=json.dumps(version)))
        assert error.status() == "422" and "no version 7" in error.message(), error
        version["version_policy"]["specific"]["versions"] = [1]
        self.client.load_model(self.model, config=json.dumps(version))
        assert self.client.is_model_ready(self.model)
        rows = self.client.infer(self.model, [self.text(TEXTS)]).as_numpy("embedding")
        same(rows[0], EXPECTED[0], "loaded again")

    def test_errors(self):
        error = raises(InferenceServerException, lambda: self.client.infer("no-such-model", [self.text(["x"])]))
        assert error.status() == "404" and "no-such-model" in error.message(), error
        error = raises(InferenceServerException, lambda: self.client.get_model_metadata(self.model, "77"))
        assert error.status() == "404", error
        error = raises(InferenceServerException, lambda: self.client.infer(self.model, [self.text([])]))
        assert error.status() == "400", error


def quantised(rows, form):
    """docs/api.md, in numpy."""
    rows = numpy.asarray(rows, numpy.float32)
    wide = rows.astype(numpy.float64)
    int8 = numpy.rint(127 * wide / numpy.linalg.norm(wide, axis=1, keepdims=True)).astype(numpy.int16)
    bits = numpy.packbits(rows > 0, axis=1).astype(numpy.int16)
    return {"int8": int8, "uint8": int8 + 128, "ubinary": bits, "binary": bits - 128, "float": rows}[form]


class Cohere:
    client = "cohere"

    FORMS = ("float", "int8", "uint8", "binary", "ubinary", "base64")

    def __init__(self, url):
        self.url = url
        self.client = cohere.ClientV2(base_url=url, api_key="none", timeout=60, max_retries=0)
        self.model = REFERENCE["model"]

    def embed(self, texts, **more):
        more = {"input_type": "search_document", "embedding_types": ["float"]} | more
        return self.client.embed(model=self.model, texts=texts, **more)

    def test_embeds_in_every_form(self):
        answer = self.embed(TEXTS, embedding_types=self.FORMS)
        assert answer.texts == TEXTS and answer.id, answer.texts
        assert answer.meta.api_version.version == "2" and answer.meta.billed_units.input_tokens == sum(REFERENCE["num_tokens"])
        rows = answer.embeddings.float_
        for row, expected, text in zip(rows, EXPECTED, TEXTS):
            same(row, expected, text[:30])
        for form in ("int8", "uint8", "binary", "ubinary"):
            assert numpy.array_equal(getattr(answer.embeddings, form), quantised(rows, form)), form
        packed = [unpack(row) for row in answer.embeddings.base64]
        assert numpy.array_equal(packed, numpy.asarray(rows, numpy.float32))

    def test_only_what_is_asked_for_is_answered(self):
        for form in self.FORMS:
            embeddings = self.embed(["x"], embedding_types=[form]).embeddings
            given = [name for name in self.FORMS if getattr(embeddings, "float_" if name == "float" else name) is not None]
            assert given == [form], given

    def test_cosines_of_int8_are_those_of_floats(self):
        answer = self.embed(TEXTS, embedding_types=["float", "int8"])
        rows, int8 = (numpy.asarray(form, numpy.float64) for form in (answer.embeddings.float_, answer.embeddings.int8))
        difference = numpy.abs(int8 @ int8.T / 127**2 - rows @ rows.T)
        assert difference.max() < 0.03, difference.max()

    def test_output_dimension_and_truncate(self):
        rows = self.embed(TEXTS[:2], output_dimension=64).embeddings.float_
        for row, expected in zip(rows, EXPECTED):
            same(row, expected[:64], "64 dimensions")
        bits = self.embed(TEXTS[:2], output_dimension=60, embedding_types=["ubinary"]).embeddings.ubinary
        assert [len(row) for row in bits] == [8, 8]
        long = "start " + "word " * 5000
        cut = [self.embed([long], truncate=side).embeddings.float_[0] for side in ("START", "END")]
        assert cut[0] != cut[1] and self.embed([long]).embeddings.float_[0] == cut[1]
        error = raises(cohere.core.ApiError, lambda: self.embed([long], truncate="NONE"))
        assert error.status_code == 413 and "texts has" in error.body["message"], error.body

    def test_the_older_client(self):
        client = cohere.Client(api_key="none", base_url=self.url, timeout=60)
        answer = client.embed(model=self.model, texts=TEXTS[:2], input_type="search_query")
        assert answer.response_type == "embeddings_floats", answer
        for row, expected in zip(answer.embeddings, EXPECTED):
            same(row, expected, "v1")
        answer = client.embed(model=self.model, texts=TEXTS[:2], input_type="search_query", embedding_types=["uint8"])
        assert numpy.asarray(answer.embeddings.uint8).shape == (2, len(EXPECTED[0])), answer

    def test_errors_are_the_classes_the_client_knows(self):
        error = raises(cohere.NotFoundError, lambda: self.client.embed(model="no/such", input_type="clustering", texts=["x"]))
        assert "no/such" in error.body["message"], error.body
        raises(cohere.BadRequestError, lambda: self.embed([]))
        raises(cohere.BadRequestError, lambda: self.embed(["x"], embedding_types=["int4"]))
        raises(cohere.UnprocessableEntityError, lambda: self.embed(["x"], output_dimension=100_000))
        image = {"input_type": "image", "images": ["data:image/png;base64,aGk="]}
        raises(cohere.UnprocessableEntityError, lambda: self.client.embed(model=self.model, **image))


class TritonGrpc:
    client = "tritonclient"

    def __init__(self, _url):
        self.address = grpc_address()
        self.client = triton_grpc.InferenceServerClient(self.address)
        self.model = REFERENCE["model"]

    def text(self, texts, shape=None):
        shape = shape or [len(texts)]
        array = numpy.array([text.encode() for text in texts], object).reshape(shape)
        return triton_grpc.InferInput("text", shape, "BYTES").set_data_from_numpy(array)

    def test_infers(self):
        for outputs in (None, [triton_grpc.InferRequestedOutput("embedding")]):
            result = self.client.infer(self.model, [self.text(TEXTS[:5], [5, 1])], outputs=outputs, request_id="42")
            rows = result.as_numpy("embedding")
            assert rows.shape == (5, len(EXPECTED[0])) and result.get_response().id == "42"
            for row, expected, text in zip(rows, EXPECTED, TEXTS):
                same(row, expected, text[:30])
        cut = self.client.infer(self.model, [self.text(TEXTS[:1])], parameters={"dimensions": 32}, timeout=30_000_000)
        same(cut.as_numpy("embedding")[0], EXPECTED[0][:32], "32 dimensions")

    def test_infers_tokenised_input(self):
        ids = numpy.array([REFERENCE["token_ids"] + [0, 0]], numpy.int64)
        mask = numpy.array([[1] * len(REFERENCE["token_ids"]) + [0, 0]], numpy.int32)
        inputs = [triton_grpc.InferInput("input_ids", list(ids.shape), "INT64").set_data_from_numpy(ids)]
        inputs.append(triton_grpc.InferInput("attention_mask", list(mask.shape), "INT32").set_data_from_numpy(mask))
        by_ids = self.client.infer(self.model, inputs).as_numpy("embedding")
        by_text = self.client.infer(self.model, [self.text(["hello, world!"])]).as_numpy("embedding")
        assert numpy.abs(by_ids - by_text).max() < 1e-5, "padding must not count"

    def test_metadata_config_statistics_and_index(self):
        assert self.client.is_server_live() and self.client.is_server_ready() and self.client.is_model_ready(self.model)
        metadata = self.client.get_model_metadata(self.model, as_json=True)
        assert metadata["outputs"] == [{"name": "embedding", "datatype": "FP32", "shape": ["-1", str(len(EXPECTED[0]))]}]
        config = self.client.get_model_config(self.model).config
        assert config.max_batch_size > 1 and config.input[0].name == "text" and list(config.output[0].dims) == [len(EXPECTED[0])]
        stats = lambda: self.client.get_inference_statistics(self.model).model_stats[0]
        before = stats()
        self.client.infer(self.model, [self.text([f"never seen {time.time_ns()}"])])
        assert stats().inference_count - before.inference_count == 1
        models = self.client.get_model_repository_index().models
        assert [(model.name, model.state) for model in models] == [(self.model, "READY")], models

    def test_errors(self):
        error = raises(InferenceServerException, lambda: self.client.infer("no-such-model", [self.text(["x"])]))
        assert error.status() == "StatusCode.NOT_FOUND" and "no-such-model" in error.message(), error
        error = raises(InferenceServerException, lambda: self.client.infer(self.model, [self.text([""])]))
        assert error.status() == "StatusCode.INVALID_ARGUMENT", error

    def test_repository(self):
        states = lambda: [(model.name, model.state) for model in self.client.get_model_repository_index().models]
        self.client.unload_model(self.model, unload_dependents=True)
        assert states() == [(self.model, "UNAVAILABLE")], states()
        error = raises(InferenceServerException, lambda: self.client.load_model("no-such-model"))
        assert error.status() == "StatusCode.NOT_FOUND", error
        error = raises(InferenceServerException, lambda: self.client.load_model(self.model, files={"file:1/model.onnx": b"x"}, config="{}"))
        assert error.status() == "StatusCode.INVALID_ARGUMENT" and "file:1/model.onnx" in error.message(), error
        self.client.load_model(self.model)
        assert states() == [(self.model, "READY")], states()

    def test_reflection(self):
        with grpc.insecure_channel(self.address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            services = set(database.get_services())
            assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= services, services
            file = database.FindFileContainingSymbol("inference.GRPCInferenceService")
            assert "ModelInfer" in [method.name for method in file.service[0].method]


class Plain:
    """What no client has a method for."""

    client = "HTTP"

    def __init__(self, url):
        self.url = url

    def ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read() or b"null"), response.headers

    def test_tokenize_and_decode_are_inverse(self):
        tokens, _ = self.ask("/tokenize", {"inputs": ["hello, world!"]})
        assert [token["id"] for token in tokens[0]] == REFERENCE["token_ids"], tokens
        assert tokens[0][0]["special"] and tokens[0][0]["start"] is None
        assert (tokens[0][1]["text"], tokens[0][1]["start"], tokens[0][1]["stop"]) == ("hello", 0, 5)
        texts, _ = self.ask("/decode", {"ids": REFERENCE["token_ids"]})
        assert texts == ["hello, world!"], texts

    def raw(self, path, body):
        headers = {"content-type": "application/json", "accept": "application/octet-stream"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            assert response.headers["content-type"] == "application/octet-stream", response.headers
            shape = [int(size) for size in response.headers["x-eremois-shape"].split(",")]
            return numpy.frombuffer(response.read(), response.headers["x-eremois-dtype"]).reshape(shape)

    def test_raw_rows_are_what_numpy_reads(self):
        floats = numpy.asarray(self.ask("/embed", {"inputs": TEXTS})[0], numpy.float32)
        routes = (("/embed", {"inputs": TEXTS}), ("/v1/embeddings", {"input": TEXTS}))
        for path, body in routes:
            assert numpy.array_equal(self.raw(path, body), floats), path
            for form in ("int8", "uint8", "binary", "ubinary"):
                assert numpy.array_equal(self.raw(path, body | {"dtype": form}), quantised(floats, form)), (path, form)
            halves = self.raw(path, body | {"dtype": "float16"})
            assert halves.dtype == numpy.float16 and numpy.array_equal(halves, floats.astype(numpy.float16)), path

    def test_compressed_bodies(self):
        body = {"inputs": [f"{text} {i}" for i in range(20) for text in TEXTS]}
        plain, _ = self.ask("/embed", body)
        headers = {"content-type": "application/json", "content-encoding": "gzip", "accept-encoding": "gzip"}
        request = urllib.request.Request(self.url + "/embed", gzip.compress(json.dumps(body).encode()), headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            assert response.headers["content-encoding"] == "gzip", response.headers
            assert json.loads(gzip.decompress(response.read())) == plain

    def test_info_health_and_headers(self):
        info, _ = self.ask("/info")
        assert info["model_id"] == REFERENCE["model"] and info["max_input_length"] == 256, info
        assert self.ask("/health")[0] is None and self.ask("/ping")[0] is None
        assert self.ask("/health/ready")[0]["status"] == "ready"
        rows, headers = self.ask("/embed", {"inputs": TEXTS[0]})
        assert int(headers["x-compute-tokens"]) == REFERENCE["num_tokens"][0]
        assert int(headers["x-compute-characters"]) == len(TEXTS[0])
        for name in ("x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time"):
            assert int(headers[name]) >= 0

    def test_every_example_of_the_document_works(self):
        document, _ = self.ask("/openapi.json")
        num_examples = 0
        kept, _ = self.ask("/api/v1/inferences", {"input": "kept for the examples"})
        for path, item in document["paths"].items():
            id = REFERENCE["model"] if path.startswith("/v1/models") else kept["id"]
            path = path.replace("{id}", id).replace("{model}", REFERENCE["model"]).replace("{version}", "1").replace("{label}", "stable")
            content = item.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
            if path == "/v1/batches":
                # Takes a file that is there.
                content["example"]["input_file_id"] = OpenAi(self.url).upload("one", TEXTS[0]).id
            examples = [example["value"] for example in content.get("examples", {}).values()]
            for example in examples + ([content["example"]] if "example" in content else []):
                others = ("/embed_sparse", "/predict", "/rerank", "/v1/rerank", "/v2/rerank")
                if path in others or path.endswith((":classify", ":regress")):
                    # Of other tasks than the bundled model's: tasks.py judges them.
                    error = raises(urllib.error.HTTPError, lambda: self.ask(path, example))
                    assert error.code == (400 if ":" in path else 422), (path, error)
                    continue
                try:
                    self.ask(path, example)
                except urllib.error.HTTPError as error:
                    raise AssertionError(f"{path} {example}: {error.read().decode()}") from error
                num_examples += 1
        assert num_examples >= 12, num_examples


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return judge_arguments(parser.parse_args(), (OpenAi, HuggingFace, Triton, TritonGrpc, Cohere, TensorFlowServing, Plain))


if __name__ == "__main__":
    sys.exit(main())
