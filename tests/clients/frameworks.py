"""Asks a running server through the classes that applications are built with: LangChain's and LlamaIndex's.

    python frameworks.py [--binary target/debug/eremois]   starts the server, judges it, stops it
    python frameworks.py --url http://127.0.0.1:8080       judges a server that runs already

Needs frameworks-requirements.txt, in an environment of its own: it pins other versions of the official clients than
requirements.txt does. Exits 1 with the list of what fails.
"""

import argparse
import asyncio
import sys

from huggingface_hub import AsyncInferenceClient, InferenceClient
from langchain_huggingface import HuggingFaceEndpointEmbeddings
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

from judging import EXPECTED, REFERENCE, TEXTS, add_arguments, judge_arguments, same

MODEL = REFERENCE["model"]


def all_same(rows, expected, what):
    assert len(rows) == len(expected), (what, len(rows))
    for i, (row, wanted) in enumerate(zip(rows, expected)):
        same(row, wanted, f"{what} {i}")


class LangChainOpenAi:
    client = "langchain-openai"

    def __init__(self, url):
        # Otherwise it cuts texts into ids of OpenAI's vocabulary, which it fetches: ids of another model than ours.
        options = {"check_embedding_ctx_length": False, "max_retries": 0}
        make = lambda **more: OpenAIEmbeddings(model=MODEL, base_url=f"{url}/v1", api_key="none", **options, **more)
        self.embeddings, self.cut = make(), make(dimensions=64)

    def test_documents_and_query(self):
        all_same(self.embeddings.embed_documents(TEXTS), EXPECTED, "document")
        same(self.embeddings.embed_query(TEXTS[0]), EXPECTED[0], "query")

    def test_asynchronously(self):
        all_same(asyncio.run(self.embeddings.aembed_documents(TEXTS)), EXPECTED, "document")

    def test_dimensions(self):
        all_same(self.cut.embed_documents(TEXTS), [row[:64] for row in EXPECTED], "64 dimensions")


class LangChainHuggingFace:
    client = "langchain-huggingface"

    def __init__(self, url):
        # As pinned it takes no address itself, only the name of a model on the hub; what it asks with can be replaced.
        self.embeddings = HuggingFaceEndpointEmbeddings(model="sentence-transformers/all-MiniLM-L6-v2")
        self.embeddings.client = InferenceClient(base_url=url, timeout=60)
        self.embeddings.async_client = AsyncInferenceClient(base_url=url, timeout=60)

    def test_documents_and_query(self):
        all_same(self.embeddings.embed_documents(TEXTS[:5]), EXPECTED[:5], "document")
        same(self.embeddings.embed_query(TEXTS[0]), EXPECTED[0], "query")

    def test_asynchronously(self):
        all_same(asyncio.run(self.embeddings.aembed_documents(TEXTS[:5])), EXPECTED[:5], "document")


class LlamaIndexOpenAi:
    client = "llama-index-embeddings-openai"

    def __init__(self, url):
        self.embedding = OpenAIEmbedding(model_name=MODEL, api_base=f"{url}/v1", api_key="none", max_retries=0)

    def test_texts_and_query(self):
        all_same(self.embedding.get_text_embedding_batch(TEXTS), EXPECTED, "text")
        same(self.embedding.get_query_embedding(TEXTS[0]), EXPECTED[0], "query")

    def test_asynchronously(self):
        all_same(asyncio.run(self.embedding.aget_text_embedding_batch(TEXTS)), EXPECTED, "text")


class LlamaIndexTei:
    client = "llama-index-embeddings-text-embeddings-inference"

    def __init__(self, url):
        self.embedding = TextEmbeddingsInference(
            model_name=MODEL, base_url=url, text_instruction="", query_instruction="", timeout=60
        )

    def test_texts_and_query(self):
        all_same(self.embedding.get_text_embedding_batch(TEXTS), EXPECTED, "text")
        same(self.embedding.get_query_embedding(TEXTS[0]), EXPECTED[0], "query")

    def test_texts_that_are_too_long_are_cut(self):
        [row] = self.embedding.get_text_embedding_batch(["word " * 5000])
        assert len(row) == len(EXPECTED[0]), len(row)

    def test_asynchronously(self):
        all_same(asyncio.run(self.embedding.aget_text_embedding_batch(TEXTS)), EXPECTED, "text")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    classes = (LangChainOpenAi, LangChainHuggingFace, LlamaIndexOpenAi, LlamaIndexTei)
    sys.exit(judge_arguments(parser.parse_args(), classes))
