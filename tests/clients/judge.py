"""Asks a running server through the official Python clients and compares with reference values.

    python judge.py [--binary target/debug/eremois]   starts the server, judges it, stops it
    python judge.py --url http://127.0.0.1:8080       judges a server that runs already

EREMOIS_TEST_BIN is the binary where --binary is not given.

The server must serve all-MiniLM-L6-v2 (bundled). Needs requirements.txt; exits 1 with the list of what fails.
"""

import argparse
import json
import sys
import time
import urllib.request

import numpy
import openai
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from judging import EXPECTED, REFERENCE, TEXTS, add_arguments, judge_arguments, raises, same, unpack
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
            path = path.replace("{id}", id)
            content = item.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
            if path == "/v1/batches":
                # Takes a file that is there.
                content["example"]["input_file_id"] = OpenAi(self.url).upload("one", TEXTS[0]).id
            examples = [example["value"] for example in content.get("examples", {}).values()]
            for example in examples + ([content["example"]] if "example" in content else []):
                self.ask(path, example)
                num_examples += 1
        assert num_examples >= 12, num_examples


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return judge_arguments(parser.parse_args(), (OpenAi, HuggingFace, TensorFlowServing, Plain))


if __name__ == "__main__":
    sys.exit(main())
