#!/usr/bin/env python3
"""Makes tests/fixtures/heads: small models with random weights and every kind of head, and what transformers computes
with them in f32 on the CPU. The tests read the committed results and need none of this. To make them again:

    python3 -m venv /tmp/ref && /tmp/ref/bin/pip install torch==2.15.0 transformers==5.23.0
    /tmp/ref/bin/python scripts/make-head-fixtures.py

Tokenizers are those of tests/fixtures/models. references.json holds, by model, texts and pairs with their scores, and
what the pipelines make of them.
"""

import json
import os
import pathlib
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "tests/fixtures"
OUT = FIXTURES / "heads"
SIZES = dict(vocab_size=220, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=66)
TEXTS = [
    "The harbour master wakes before the gulls.",
    "naïve café; tide 42",
    "a",
    "Ada Lovelace met Charles Babbage in London, on the quay.",
]
PAIRS = [["the tide", "The harbour master wakes before the gulls."], ["a", "b"], ["fog over the piano", "naïve café"]]
MASKED = ["the [MASK] wakes before the gulls", "the [MASK] of the [MASK]"]
NER = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name.lower() and name.endswith("weight")
        parameter.data = 1 + 0.1 * noise if is_norm else 0.25 * noise
    return model.eval()


def bert(**extra):
    return transformers.BertConfig(**SIZES, pad_token_id=0, **extra)


def roberta(kind, **extra):
    return kind(**SIZES, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2, **extra)


def labels(names):
    return dict(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


def distilbert(**extra):
    return transformers.DistilBertConfig(
        vocab_size=220, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=66, pad_token_id=0, **extra
    )


MODELS = {
    "bert-nli": ("bert-f16", transformers.BertForSequenceClassification, bert(**labels(["contradiction", "neutral", "entailment"]))),
    "xlm-roberta-rerank": (
        "xlm-roberta-sharded",
        transformers.XLMRobertaForSequenceClassification,
        roberta(transformers.XLMRobertaConfig, **labels(["LABEL_0"])),
    ),
    "distilbert-multi-label": (
        "distilbert-masked-lm",
        transformers.DistilBertForSequenceClassification,
        distilbert(problem_type="multi_label_classification", **labels(["toxic", "obscene", "threat", "insult"])),
    ),
    "bert-ner": ("bert-f16", transformers.BertForTokenClassification, bert(**labels(NER))),
    "electra-rerank": (
        "bert-f16",
        transformers.ElectraForSequenceClassification,
        transformers.ElectraConfig(**SIZES, embedding_size=16, pad_token_id=0, **labels(["LABEL_0"])),
    ),
    "albert-nli": (
        "bert-f16",
        transformers.AlbertForSequenceClassification,
        transformers.AlbertConfig(**SIZES, embedding_size=16, pad_token_id=0, **labels(["no", "maybe", "yes"])),
    ),
    "deberta-v2-nli": (
        "bert-f16",
        transformers.DebertaV2ForSequenceClassification,
        transformers.DebertaV2Config(
            **SIZES, pad_token_id=0, type_vocab_size=0, relative_attention=True, position_buckets=16, max_relative_positions=-1,
            pos_att_type=["c2p", "p2c"], share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False,
            **labels(["contradiction", "entailment", "neutral"]),
        ),
    ),
    "bert-masked-lm": ("bert-f16", transformers.BertForMaskedLM, bert()),
    "xlm-roberta-masked-lm": ("xlm-roberta-sharded", transformers.XLMRobertaForMaskedLM, roberta(transformers.XLMRobertaConfig)),
    "distilbert-splade": ("distilbert-masked-lm", transformers.DistilBertForMaskedLM, distilbert()),
}


def main():
    references = {}
    for seed, (name, (tokenizer_of, kind, config)) in enumerate(MODELS.items()):
        folder = OUT / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tokenizer_file = FIXTURES / "models" / tokenizer_of / "tokenizer.json"
        shutil.copy(tokenizer_file, folder / "tokenizer.json")
        is_wordpiece = "[MASK]" in json.loads(tokenizer_file.read_text())["model"]["vocab"]
        special = dict(mask_token="[MASK]", pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]", cls_token="[CLS]") if is_wordpiece else dict(
            mask_token="<mask>", pad_token="<pad>", unk_token="<unk>", sep_token="</s>", cls_token="<s>")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
        config.vocab_size = max(tokenizer.get_vocab().values()) + 1
        model = randomise(kind(config), seed)
        model.save_pretrained(folder)
        for extra in ["generation_config.json"]:
            (folder / extra).unlink(missing_ok=True)
        references[name] = reference(name, model, tokenizer)
    (OUT / "references.json").write_text(json.dumps(references, ensure_ascii=False, indent=0) + "\n")


def run(model, tokenizer, text):
    pair = isinstance(text, list)
    # The plain tokenizer class leaves the types of tokens out unless it is asked for them.
    asked = dict(return_tensors="pt", return_token_type_ids=True)
    batch = tokenizer(*text, **asked) if pair else tokenizer(text, **asked)
    if isinstance(model, (transformers.DistilBertForSequenceClassification, transformers.DistilBertForMaskedLM)):
        batch.pop("token_type_ids", None)
    with torch.no_grad():
        return batch, model(**batch).logits[0]


def reference(name, model, tokenizer):
    rounded = lambda tensor: [round(float(x), 6) for x in tensor.flatten()]
    if "masked" in name or "splade" in name:
        sparse = []
        for text in TEXTS:
            _, logits = run(model, tokenizer, text)
            weights = torch.log1p(torch.relu(logits)).max(dim=0).values
            sparse.append({"input": text, "weights": [[i, round(float(w), 6)] for i, w in enumerate(weights) if w > 0]})
        filled = []
        if "splade" not in name:
            fill = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=4)
            for text in MASKED:
                text = text.replace("[MASK]", tokenizer.mask_token)
                answer = fill(text)
                masks = answer if isinstance(answer[0], list) else [answer]
                filled.append({"input": text, "masks": [[[e["token"], round(e["score"], 6), e["token_str"]] for e in mask] for mask in masks]})
        return {"sparse": sparse, "filled": filled}
    if "ner" in name:
        cases = []
        for text in TEXTS:
            _, logits = run(model, tokenizer, text)
            entities = {}
            for strategy in ["none", "simple", "first", "average", "max"]:
                tag = transformers.pipeline(
                    "token-classification", model=model, tokenizer=tokenizer, aggregation_strategy=strategy, ignore_labels=[]
                )
                entities[strategy] = [
                    [e.get("entity_group", e.get("entity")), round(float(e["score"]), 5), e["start"], e["end"]] for e in tag(text)
                ]
            cases.append({"input": text, "logits": rounded(logits), "entities": entities})
        return {"cases": cases}
    return {"cases": [{"input": text, "logits": rounded(run(model, tokenizer, text)[1])} for text in TEXTS + PAIRS]}


if __name__ == "__main__":
    main()
