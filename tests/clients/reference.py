"""Writes reference.json: what sentence-transformers computes in f32 for the texts of the judges.

Run once, where torch is: python reference.py FOLDER_OF_ALL_MINILM_L6_V2 > reference.json
"""

import base64
import json
import sys

import numpy
import sentence_transformers

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "A fast auburn canine leaps above a sleepy hound.",
    "Wie spät ist es in Zürich?",
    "今日は良い天気ですね 🌞",
    "x",
    "Dynamic batching packs the tokens of many requests into one forward pass. " * 12,
]
# Ids of a short English sentence with its special tokens, for inputs that are no text.
TOKEN_IDS = [101, 7592, 1010, 2088, 999, 102]

model = sentence_transformers.SentenceTransformer(sys.argv[1], device="cpu")
rows = model.encode(TEXTS, batch_size=1, normalize_embeddings=True)
ids_row = model.encode("hello, world!", normalize_embeddings=True)
assert model.tokenizer("hello, world!")["input_ids"] == TOKEN_IDS


def packed(row):
    return base64.b64encode(numpy.asarray(row, "<f4").tobytes()).decode()


num_tokens = [min(len(model.tokenizer(text)["input_ids"]), model.max_seq_length) for text in TEXTS]
reference = {
    "model": "all-MiniLM-L6-v2",
    "made_with": f"sentence-transformers {sentence_transformers.__version__}, f32, CPU",
    "texts": TEXTS,
    "num_tokens": num_tokens,
    "embeddings": [packed(row) for row in rows],
    "token_ids": TOKEN_IDS,
    "token_ids_embedding": packed(ids_row),
}
json.dump(reference, sys.stdout, ensure_ascii=False, indent=1)
print()
