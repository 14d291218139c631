"""Makes the folder the peers serve: the package's f32 weights, its tokenizer without the padding, and an ONNX graph.

Run in the peers' own environment: `python export_onnx.py SOURCE_DIR TARGET_DIR HUB_DIR`. The last is where infinity
looks for a fused graph (its own code for making one asks optimum for an option that is gone; the fusions are the same).

The tokenizer.json of the package pads every text to 128 tokens and cuts at 128, which no user of a server would
leave as it is; both are taken out, so that a peer pads to the longest of its batch and cuts where it says it does.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTOptimizer
from optimum.onnxruntime.configuration import OptimizationConfig
from transformers import AutoModel


class Encoder(torch.nn.Module):
    """The bare encoder: pooling is the server's."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, token_type_ids):
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state


def main(source: Path, target: Path, hub: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    tokenizer_file = partial / "tokenizer.json"
    tokenizer = json.loads(tokenizer_file.read_text())
    tokenizer["truncation"] = None
    tokenizer["padding"] = None
    tokenizer_file.write_text(json.dumps(tokenizer, ensure_ascii=False))

    # "eager": the graph of the attention is then plain MatMul and Softmax, which ONNX Runtime fuses itself.
    model = AutoModel.from_pretrained(partial, attn_implementation="eager", torch_dtype=torch.float32).eval()
    ids = torch.randint(1000, 2000, (2, 16))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    axes = {0: "batch", 1: "sequence"}
    torch.onnx.export(
        Encoder(model),
        (ids, mask, torch.zeros_like(ids)),
        partial / "model.onnx",
        input_names=["input_ids", "attention_mask", "token_type_ids"],
        output_names=["last_hidden_state"],
        dynamic_axes={
            "input_ids": axes,
            "attention_mask": axes,
            "token_type_ids": axes,
            "last_hidden_state": axes,
        },
        opset_version=17,
        dynamo=False,
    )
    fuse(partial, hub)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def fuse(folder: Path, hub: Path) -> None:
    """ONNX Runtime's transformer fusions (attention, LayerNorm, GELU), still in f32."""
    model = ORTModelForFeatureExtraction.from_pretrained(folder, file_name="model.onnx", provider="CPUExecutionProvider")
    config = OptimizationConfig(optimization_level=99, optimize_for_gpu=False, fp16=False)
    ORTOptimizer.from_pretrained(model).optimize(
        optimization_config=config, save_dir=hub / "hub" / "infinity_onnx" / "CPUExecutionProvider"
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
