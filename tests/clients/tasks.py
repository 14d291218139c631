"""Judges the tasks beside embeddings through the official clients, on the small models of tests/fixtures.

    python tasks.py [--binary target/debug/eremois] [--record FOLDER]

Imports each model into a folder of its own with `eremois models import` and serves it as the default one, because some of these
clients name no model. Their weights are random: what is compared are forms, sums and orders, and the values that transformers and
Keras give. Needs requirements.txt; exits 1 with the list of what fails.
"""

import argparse
import math
import os
import sys

import cohere
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

import expected
from expected import softmax
from images import CohereImages, HuggingFaceImages
from judging import judge, raises
from models import REFERENCES, served
from tensorflow_tasks import (
    TensorFlowClassify,
    TensorFlowEmbed,
    TensorFlowFillMask,
    TensorFlowImages,
    TensorFlowRerank,
    TensorFlowSparse,
    TensorFlowTensors,
    TensorFlowTokenClassify,
)
from triton_tasks import (
    TritonClassify,
    TritonEmbed,
    TritonFillMask,
    TritonImages,
    TritonRerank,
    TritonSparse,
    TritonTensors,
    TritonTokenClassify,
)


class HuggingFace:
    client = "huggingface_hub"

    def __init__(self, url):
        self.hub = InferenceClient(model=url, timeout=60)


class TextClassification(HuggingFace):
    model = expected.CLASSIFY

    def test_text_classification(self):
        for case in REFERENCES[self.model.name]["cases"]:
            if isinstance(case["input"], str):
                wanted = dict(zip(self.model.labels, softmax(case["logits"])))
                found = self.hub.text_classification(case["input"])
                assert len(found) == 3 and found[0].score == max(element.score for element in found), found
                assert all(abs(element.score - wanted[element.label]) < 1e-4 for element in found), (found, wanted)
        assert len(self.hub.text_classification("a", top_k=1)) == 1

    def test_zero_shot_classification(self):
        labels = ["the sea", "music", "food"]
        found = self.hub.zero_shot_classification("fog over the piano", labels)
        assert sorted(element.label for element in found) == sorted(labels), found
        assert abs(sum(element.score for element in found) - 1) < 1e-4, found
        alone = self.hub.zero_shot_classification("fog over the piano", labels, multi_label=True, hypothesis_template="on {}")
        assert all(0 < element.score < 1 for element in alone), alone

    def test_another_task_is_refused(self):
        error = raises(HfHubHTTPError, lambda: self.hub.sentence_similarity("a", ["b"]))
        assert error.response.status_code == 422, error


class TokenClassification(HuggingFace):
    model = expected.TOKEN_CLASSIFY

    def test_token_classification(self):
        for case in REFERENCES[self.model.name]["cases"]:
            for strategy in ("none", "simple", "first", "average", "max"):
                expected = [tuple(entity) for entity in case["entities"][strategy]]
                found = self.hub.token_classification(case["input"], aggregation_strategy=strategy, ignore_labels=["nothing"])
                places = [(element.entity_group or element.entity, element.start, element.end) for element in found]
                assert places == [(label, start, end) for label, _, start, end in expected], (strategy, places, expected)
                assert all(abs(element.score - entity[1]) < 1e-4 for element, entity in zip(found, expected)), strategy


class FillMask(HuggingFace):
    model = expected.FILL_MASK

    def test_fill_mask(self):
        case = REFERENCES[self.model.name]["filled"][0]
        found = self.hub.fill_mask(case["input"], top_k=4)
        assert [element.token for element in found] == [token for token, _, _ in case["masks"][0]], (found, case)
        assert all(abs(element.score - score) < 1e-4 for element, (_, score, _) in zip(found, case["masks"][0])), found
        assert all(element.sequence.startswith("the ") and element.token_str for element in found), found


class Rerank:
    client = "cohere"
    model = expected.RERANK

    def __init__(self, url):
        self.cohere = cohere.ClientV2(base_url=url, api_key="none", timeout=60, max_retries=0)

    def test_rerank(self):
        cases = [case for case in REFERENCES[self.model.name]["cases"] if isinstance(case["input"], list)]
        query = cases[0]["input"][0]
        documents = [case["input"][1] for case in cases]
        found = self.cohere.rerank(model=self.model.name, query=query, documents=documents).results
        scores = [result.relevance_score for result in found]
        assert scores == sorted(scores, reverse=True) and sorted(result.index for result in found) == [0, 1, 2], found
        expected = 1 / (1 + math.exp(-cases[0]["logits"][0]))
        assert abs(next(result.relevance_score for result in found if result.index == 0) - expected) < 1e-4, (found, expected)
        assert len(self.cohere.rerank(model=self.model.name, query=query, documents=documents, top_n=2).results) == 2
        raises(cohere.NotFoundError, lambda: self.cohere.rerank(model="another", query="a", documents=["b"]))


JUDGES = (
    (TextClassification, TritonClassify, TensorFlowClassify),
    (Rerank, TritonRerank, TensorFlowRerank),
    (TokenClassification, TritonTokenClassify, TensorFlowTokenClassify),
    (FillMask, TritonFillMask, TensorFlowFillMask),
    (TritonSparse, TensorFlowSparse),
    (TritonEmbed, TensorFlowEmbed),
    (HuggingFaceImages, TritonImages, TensorFlowImages),
    (CohereImages,),
    (TritonTensors, TensorFlowTensors),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=os.environ.get("EREMOIS_TEST_BIN", "target/debug/eremois"))
    parser.add_argument("--record", help="a folder for what was checked, which scripts/compatibility reads")
    arguments = parser.parse_args()
    failed = 0
    for judges in JUDGES:
        model = judges[0].model
        assert all(judge_class.model == model for judge_class in judges), judges
        print(f"\n{model.name}", flush=True)
        record = arguments.record and os.path.join(arguments.record, f"tasks-{model.name}.json")
        with served(os.path.abspath(arguments.binary), model) as url:
            failed |= judge(url, judges, record)
    return failed


if __name__ == "__main__":
    sys.exit(main())
