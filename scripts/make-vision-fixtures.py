#!/usr/bin/env python3
"""Makes tests/fixtures/vision: small models of images with random weights, images in several formats, and what
transformers makes of them in f32 on the CPU. The tests read the committed results and need none of this. To make them
again:

    python3 -m venv /tmp/ref && /tmp/ref/bin/pip install torch==2.15.0 transformers==5.23.0 pillow==13.0.0
    /tmp/ref/bin/python scripts/make-vision-fixtures.py

references.safetensors holds, by model and image, "<model>/<image>/pixels" [3, height, width] as the model's own image
processor (its PIL form) makes them, and "<model>/<image>/row", what the model makes of them; by model and text,
"<model>/text/<number>" and the ids "<model>/ids/<number>".
"""

import json
import math
import os
import pathlib
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy
import PIL.Image
import torch
import transformers
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests/fixtures/vision"
TEXTS = ["the harbour master", "a", "Gulls over the tide; café 42"]
FLOWERS = ["fern", "moss", "reed", "rush", "sedge"]
IMAGES = ["photo.png", "photo.jpg", "subsampled.jpg", "photo.webp", "lossy.webp", "clear.png", "grey.png", "palette.png", "small.png"]


def labels(names):
    return dict(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


def picture(height, width):
    """Smooth colours with some edges: what resizing does shows, and files stay small."""
    y, x = numpy.mgrid[0:height, 0:width].astype(float)
    y, x = y / height, x / width
    red = 127 + 120 * numpy.sin(5 * x + 3 * y)
    green = 255 * ((numpy.floor(6 * x) + numpy.floor(5 * y)) % 2) * 0.6 + 60 * y
    blue = 255 * numpy.exp(-12 * ((x - 0.6) ** 2 + (y - 0.4) ** 2))
    return numpy.clip(numpy.stack([red, green, blue], -1), 0, 255).astype(numpy.uint8)


def write_images(folder):
    folder.mkdir(parents=True)
    photo = PIL.Image.fromarray(picture(61, 83))
    photo.save(folder / "photo.png", optimize=True)
    photo.save(folder / "photo.jpg", quality=92, subsampling=0)
    photo.save(folder / "subsampled.jpg", quality=80)
    photo.save(folder / "photo.webp", lossless=True)
    photo.save(folder / "lossy.webp", quality=80)
    alpha = numpy.linspace(0, 255, 61 * 83).reshape(61, 83).astype(numpy.uint8)
    clear = photo.convert("RGBA")
    clear.putalpha(PIL.Image.fromarray(alpha))
    clear.save(folder / "clear.png", optimize=True)
    photo.convert("L").save(folder / "grey.png", optimize=True)
    photo.quantize(16).save(folder / "palette.png", optimize=True)
    PIL.Image.fromarray(picture(9, 14)).save(folder / "small.png", optimize=True)


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = lambda tensor: torch.randn(tensor.shape, generator=generator)
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name.lower() and name.endswith("weight")
        # Convolutions and products keep about the size of what goes through them.
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
        parameter.data = 1 + 0.1 * noise(parameter) if is_norm else noise(parameter) / math.sqrt(fan_in)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.3 * noise(buffer))
        if name.endswith("running_var"):
            buffer.copy_(1 + 0.5 * noise(buffer).abs())
    return model.eval()


def clip_tokenizer():
    letters = sorted(ByteLevel.alphabet())
    words = ["the", "harbour", "master", "gulls", "tide"]
    merges, seen = [], set()
    for word in words:
        parts = list(word[:-1]) + [word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in seen:
                seen.add(pair)
                merges.append(pair)
            parts = [parts[0] + parts[1]] + parts[2:]
    tokens = letters + [letter + "</w>" for letter in letters] + [a + b for a, b in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges), len(tokens)


def clip(num_tokens):
    text = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=20)
    ids = dict(vocab_size=num_tokens, bos_token_id=num_tokens - 2, eos_token_id=num_tokens - 1, pad_token_id=num_tokens - 1)
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=8)
    return transformers.CLIPConfig(text_config={**text, **ids}, vision_config=vision, projection_dim=20)


VIT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
SQUARE = dict(size={"height": 24, "width": 24})


def models():
    yield "vit", transformers.ViTModel(transformers.ViTConfig(**VIT, image_size=24, patch_size=6)), ViTImageProcessorPil(**SQUARE)
    wide = transformers.ViTConfig(**VIT, image_size=[24, 32], patch_size=8, hidden_act="gelu_new", qkv_bias=False, **labels(FLOWERS))
    yield "vit-flowers", transformers.ViTForImageClassification(wide), ViTImageProcessorPil(
        size={"height": 24, "width": 32}, resample=3, image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28])
    basic = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic", downsample_in_first_stage=True)
    yield "resnet", transformers.ResNetModel(basic), ConvNextImageProcessorPil(size={"shortest_edge": 28}, crop_pct=0.875, resample=3)
    for name, in_first in [("resnet-flowers", False), ("resnet-flowers-v1", True)]:
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type="bottleneck", downsample_in_bottleneck=in_first,
            **labels(FLOWERS))
        yield name, transformers.ResNetForImageClassification(config), ViTImageProcessorPil(size={"height": 33, "width": 33}, do_normalize=in_first)
    tokenizer, num_tokens = clip_tokenizer()
    yield "clip", transformers.CLIPModel(clip(num_tokens)), transformers.CLIPProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 26}, crop_size={"height": 24, "width": 24}), tokenizer)


def opened(name):
    image = PIL.Image.open(OUT / "images" / name)
    return image


def row(model, pixels):
    with torch.no_grad():
        if isinstance(model, transformers.CLIPModel):
            return model.get_image_features(pixel_values=pixels).pooler_output[0]
        out = model(pixel_values=pixels)
        if hasattr(out, "logits"):
            return out.logits[0]
        if isinstance(model, transformers.ViTModel):
            return out.last_hidden_state[0]
        return out.pooler_output[0].flatten()


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    write_images(OUT / "images")
    references = {}
    for seed, (name, model, processor) in enumerate(models()):
        model = randomise(model, seed)
        folder = OUT / name
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        of_images = getattr(processor, "image_processor", processor)
        for image in IMAGES if name in ["vit", "clip"] else IMAGES[:2]:
            # Without it the other processors take RGB alone.
            pixels = of_images(images=opened(image), return_tensors="pt", do_convert_rgb=True)["pixel_values"]
            references[f"{name}/{image}/pixels"] = pixels[0].contiguous()
            references[f"{name}/{image}/row"] = row(model, pixels).contiguous().clone()
        if name == "clip":
            for i, text in enumerate(TEXTS):
                batch = processor.tokenizer(text, return_tensors="pt")
                with torch.no_grad():
                    references[f"{name}/text/{i}"] = model.get_text_features(**batch).pooler_output[0].contiguous().clone()
                references[f"{name}/ids/{i}"] = batch["input_ids"][0].to(torch.int64)
    save_file(references, OUT / "references.safetensors")
    (OUT / "texts.json").write_text(json.dumps(TEXTS, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
