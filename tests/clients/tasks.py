"""Judges the tasks beside embeddings through the official clients, on the small models of tests/fixtures/heads.

    python tasks.py [--binary target/debug/eremois] [--record FOLDER]

Imports each model into a folder of its own with `eremois models import` and serves it as the default one, because these clients
name no model. Their weights are random: what is compared are forms, sums and orders, and the scores that transformers gives
(references.json). Needs requirements.txt; exits 1 with the list of what fails.
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import cohere
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from judging import judge, raises, started

HEADS = pathlib.Path(__file__).parent.parent / "fixtures/heads"
REFERENCES = json.loads((HEADS / "references.json").read_text())


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


class HuggingFace:
    client = "huggingface_hub"

    def __init__(self, url):
        self.hub = InferenceClient(model=url, timeout=60)


class TextClassification(HuggingFace):
    model, task = "bert-nli", "classify"
    LABELS = ["contradiction", "neutral", "entailment"]

    def test_text_classification(self):
        for case in REFERENCES[self.model]["cases"]:
            if isinstance(case["input"], str):
                expected = dict(zip(self.LABELS, softmax(case["logits"])))
                found = self.hub.text_classification(case["input"])
                assert len(found) == 3 and found[0].score == max(element.score for element in found), found
                assert all(abs(element.score - expected[element.label]) < 1e-4 for element in found), (found, expected)
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
    model, task = "bert-ner", "token_classify"

    def test_token_classification(self):
        for case in REFERENCES[self.model]["cases"]:
            for strategy in ("none", "simple", "first", "average", "max"):
                expected = [tuple(entity) for entity in case["entities"][strategy]]
                found = self.hub.token_classification(case["input"], aggregation_strategy=strategy, ignore_labels=["nothing"])
                places = [(element.entity_group or element.entity, element.start, element.end) for element in found]
                assert places == [(label, start, end) for label, _, start, end in expected], (strategy, places, expected)
                assert all(abs(element.score - entity[1]) < 1e-4 for element, entity in zip(found, expected)), strategy


class FillMask(HuggingFace):
    model, task = "bert-masked-lm", "fill_mask"

    def test_fill_mask(self):
        case = REFERENCES[self.model]["filled"][0]
        found = self.hub.fill_mask(case["input"], top_k=4)
        assert [element.token for element in found] == [token for token, _, _ in case["masks"][0]], (found, case)
        assert all(abs(element.score - score) < 1e-4 for element, (_, score, _) in zip(found, case["masks"][0])), found
        assert all(element.sequence.startswith("the ") and element.token_str for element in found), found


class Rerank:
    client = "cohere"
    model, task = "xlm-roberta-rerank", "rerank"

    def __init__(self, url):
        self.cohere = cohere.ClientV2(base_url=url, api_key="none", timeout=60, max_retries=0)

    def test_rerank(self):
        cases = [case for case in REFERENCES[self.model]["cases"] if isinstance(case["input"], list)]
        query = cases[0]["input"][0]
        documents = [case["input"][1] for case in cases]
        found = self.cohere.rerank(model=self.model, query=query, documents=documents).results
        scores = [result.relevance_score for result in found]
        assert scores == sorted(scores, reverse=True) and sorted(result.index for result in found) == [0, 1, 2], found
        expected = 1 / (1 + math.exp(-cases[0]["logits"][0]))
        assert abs(next(result.relevance_score for result in found if result.index == 0) - expected) < 1e-4, (found, expected)
        assert len(self.cohere.rerank(model=self.model, query=query, documents=documents, top_n=2).results) == 2
        raises(cohere.NotFoundError, lambda: self.cohere.rerank(model="another", query="a", documents=["b"]))


@contextlib.contextmanager
def served(binary, judge_class):
    """The address of a server of its own, with the model of a judge as the default one."""
    with tempfile.TemporaryDirectory() as folder:
        models, data = os.path.join(folder, "models"), os.path.join(folder, "data")
        os.mkdir(models)
        settings = {"EREMOIS_AI__MODELS_DIR": models, "EREMOIS_LOG__FILTER": "warn"}
        command = [binary, "models", "import", str(HEADS / judge_class.model), "--name", judge_class.model]
        subprocess.run(command, env=os.environ | settings, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        manifest = pathlib.Path(models, judge_class.model, "manifest.toml")
        text = manifest.read_text()
        if judge_class.task == "fill_mask":
            # Encoders are published with this head, whatever they are used for: it is the operator who asks for it.
            text = text.replace('task = "embed"', 'task = "fill_mask"')
            manifest.write_text(text)
        assert f'task = "{judge_class.task}"' in text, text
        with started(binary, data, settings) as url:
            yield url


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=os.environ.get("EREMOIS_TEST_BIN", "target/debug/eremois"))
    parser.add_argument("--record", help="a folder for what was checked, which scripts/compatibility reads")
    arguments = parser.parse_args()
    failed = 0
    for judge_class in (TextClassification, TokenClassification, FillMask, Rerank):
        record = arguments.record and os.path.join(arguments.record, f"tasks-{judge_class.model}.json")
        with served(os.path.abspath(arguments.binary), judge_class) as url:
            failed |= judge(url, (judge_class,), record)
    return failed


if __name__ == "__main__":
    sys.exit(main())
