#!/usr/bin/env python3
"""Makes tests/fixtures/heads: small models with random weights and every kind of head, and what transformers computes
with them in f32 on the CPU. The tests read the committed results and need none of this. To make them again:

    python3 -m venv /tmp/ref
    /tmp/ref/bin/pip install torch==2.15.0 transformers==5.23.0 sentence-transformers==6.2.0
    /tmp/ref/bin/python scripts/make-head-fixtures.py

Tokenizers are those of tests/fixtures/models. references.json holds, by model, texts and pairs with their scores, and
what the pipelines make of them. What has no class in transformers is written here in plain torch: the classifier of Jina
v2 and the question of Qwen3-Reranker.
"""

import importlib.util
import json
import os
import pathlib
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import safetensors.torch
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
# One small layer: trunks have fixtures of their own.
SMALL = dict(vocab_size=220, hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=32, max_position_embeddings=66)
SEP = 3


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


def modern_bert(**extra):
    return transformers.ModernBertConfig(
        **{**SMALL, "num_hidden_layers": 2}, pad_token_id=0, bos_token_id=None, eos_token_id=None, cls_token_id=2, sep_token_id=SEP,
        global_attn_every_n_layers=2, local_attention=8, **extra
    )


def deberta_v1(**extra):
    return transformers.DebertaConfig(
        **SMALL, pad_token_id=0, type_vocab_size=0, relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False, **extra
    )


def deberta_v3(**extra):
    return transformers.DebertaV2Config(
        **SMALL, pad_token_id=0, type_vocab_size=0, relative_attention=True, position_buckets=16, max_relative_positions=-1,
        pos_att_type=["c2p", "p2c"], share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False, **extra
    )


DECODER = dict(**{**SMALL, "hidden_size": 32, "num_attention_heads": 4}, num_key_value_heads=2, head_dim=8, bos_token_id=None, eos_token_id=None)


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
    "modernbert-nli": (
        "bert-f16",
        transformers.ModernBertForSequenceClassification,
        modern_bert(classifier_pooling="mean", classifier_bias=True, norm_bias=True, classifier_activation="silu",
                    **labels(["contradiction", "neutral", "entailment"])),
    ),
    "modernbert-rerank": ("bert-f16", transformers.ModernBertForSequenceClassification, modern_bert(**labels(["LABEL_0"]))),
    "modernbert-ner": ("bert-f16", transformers.ModernBertForTokenClassification, modern_bert(**labels(NER))),
    "modernbert-masked-lm": ("bert-f16", transformers.ModernBertForMaskedLM, modern_bert()),
    "nomic-nli": ("bert-f16", transformers.NomicBertForSequenceClassification, transformers.NomicBertConfig(
        **SMALL, pad_token_id=0, **labels(["no", "maybe", "yes"]))),
    "nomic-masked-lm": ("bert-f16", transformers.NomicBertForMaskedLM, transformers.NomicBertConfig(**SMALL, pad_token_id=0)),
    "gte-rerank": ("bert-f16", transformers.GteForSequenceClassification, transformers.GteConfig(
        **SMALL, type_vocab_size=2, pad_token_id=0, **labels(["LABEL_0"]))),
    "gte-masked-lm": ("bert-f16", transformers.GteForMaskedLM, transformers.GteConfig(**SMALL, pad_token_id=0)),
    # Every sequence ends with what counts as padding here, so that the token before it is the last one.
    "qwen3-nli": ("bert-f16", transformers.Qwen3ForSequenceClassification, transformers.Qwen3Config(
        **DECODER, pad_token_id=SEP, **labels(["contradiction", "neutral", "entailment"]))),
    "qwen3-ner": ("bert-f16", transformers.Qwen3ForTokenClassification, transformers.Qwen3Config(
        **DECODER, pad_token_id=0, **labels(NER))),
    "mistral-rerank": ("bert-f16", transformers.MistralForSequenceClassification, transformers.MistralConfig(
        **DECODER, pad_token_id=None, **labels(["LABEL_0"]))),
    "gemma3-nli": ("bert-f16", transformers.Gemma3TextForSequenceClassification, transformers.Gemma3TextConfig(
        **DECODER, pad_token_id=0, sliding_window=8, layer_types=["full_attention"], **labels(["no", "yes"]))),
    "electra-masked-lm": ("bert-f16", transformers.ElectraForMaskedLM, transformers.ElectraConfig(
        **SMALL, embedding_size=12, pad_token_id=0)),
    "albert-masked-lm": ("bert-f16", transformers.AlbertForMaskedLM, transformers.AlbertConfig(
        **SMALL, embedding_size=12, pad_token_id=0)),
    "albert-ner": ("bert-f16", transformers.AlbertForTokenClassification, transformers.AlbertConfig(
        **SMALL, embedding_size=12, pad_token_id=0, **labels(NER))),
    "deberta-v1-nli": ("bert-f16", transformers.DebertaForSequenceClassification, deberta_v1(
        pooler_hidden_act="tanh", **labels(["no", "maybe", "yes"]))),
    "deberta-v1-masked-lm": ("bert-f16", transformers.DebertaForMaskedLM, deberta_v1(legacy=True)),
    "deberta-v3-ner": ("bert-f16", transformers.DebertaV2ForTokenClassification, deberta_v3(**labels(NER))),
    "deberta-v2-masked-lm": ("bert-f16", transformers.DebertaV2ForMaskedLM, deberta_v3(legacy=True)),
    "deberta-v3-masked-lm": ("bert-f16", transformers.DebertaV2ForMaskedLM, deberta_v3(legacy=False)),
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
    references["qwen3-reranker"] = qwen3_reranker()
    references["bert-dense"] = bert_dense()
    references["jina-rerank"] = jina_rerank()
    # A line a model.
    lines = [f"{json.dumps(name)}: {json.dumps(found, ensure_ascii=False)}" for name, found in references.items()]
    (OUT / "references.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


# By the beginning of their classes' names; XLM-RoBERTa has one type and the tokenizer gives no other.
WITH_TOKEN_TYPES = ["BertFor", "RobertaFor", "Electra", "Albert", "Deberta", "NomicBert", "Gte"]


def run(model, tokenizer, text):
    pair = isinstance(text, list)
    # The plain tokenizer class leaves the types of tokens out unless it is asked for them.
    asked = dict(return_tensors="pt", return_token_type_ids=True)
    batch = tokenizer(*text, **asked) if pair else tokenizer(text, **asked)
    if not any(word in type(model).__name__ for word in WITH_TOKEN_TYPES):
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


# ---- what transformers has no class for ---------------------------------------------------------------

QUESTIONS = {
    # As published with Qwen3-Reranker; the ids of its answers come from the module's file.
    "usual": dict(
        prefix='<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. '
        'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
        pair="<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}",
        suffix="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        instruction="Given a web search query, retrieve relevant passages that answer the query",
    ),
    "own": dict(prefix="is it so: ", pair="{document} / {query} ({instruction})", suffix="?", instruction="say it"),
}
TRUE_ID, FALSE_ID = 152, 159  # "is" and "no"


def qwen3_reranker():
    """Each pair in its question, the last token's scores of the two answers, and their softmax."""
    folder = OUT / "qwen3-reranker"
    tokenizer = new_folder(folder)
    config = transformers.Qwen3Config(**{**DECODER, "max_position_embeddings": 512}, pad_token_id=0, tie_word_embeddings=True)
    model = randomise(transformers.Qwen3ForCausalLM(config), 90)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "1_LogitScore").mkdir()
    (folder / "1_LogitScore/config.json").write_text(json.dumps({"true_token_id": TRUE_ID, "false_token_id": FALSE_ID}) + "\n")
    modules = ["base.modules.transformer.Transformer", "cross_encoder.modules.logit_score.LogitScore"]
    (folder / "modules.json").write_text(json.dumps([
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{module}"}
        for i, (module, path) in enumerate(zip(modules, ["", "1_LogitScore"]))
    ], indent=1) + "\n")
    cases = {}
    for name, question in QUESTIONS.items():
        cases[name] = []
        ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        for query, document in PAIRS:
            body = question["pair"].format(instruction=question["instruction"], query=query, document=document)
            input_ids = ids(question["prefix"]) + ids(body) + ids(question["suffix"])
            with torch.no_grad():
                last = model(input_ids=torch.tensor([input_ids])).logits[0, -1]
            answers = last[[FALSE_ID, TRUE_ID]]
            cases[name].append({
                "input": [query, document], "ids": input_ids, "logits": [round(float(answers[1] - answers[0]), 6)],
                "probability": round(float(answers.softmax(-1)[1]), 6),
            })
    return cases


def bert_dense():
    """Two Dense modules after the pooling, as sentence-transformers writes and computes them; and with a Normalize
    before them."""
    import sentence_transformers
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    folder = OUT / "bert-dense"
    tokenizer = new_folder(folder)
    with tempfile.TemporaryDirectory() as scratch:
        bert = randomise(transformers.BertModel(transformers.BertConfig(**SMALL, pad_token_id=0), add_pooling_layer=False), 91)
        bert.save_pretrained(f"{scratch}/bert")
        tokenizer.save_pretrained(f"{scratch}/bert")
        encoder = Transformer(f"{scratch}/bert")
        dense = [Dense(24, 40, bias=False, activation_function=torch.nn.Identity()), Dense(40, 16, activation_function=torch.nn.Tanh())]
        dense = [randomise(module, 92 + i) for i, module in enumerate(dense)]
        pooling = Pooling(24, pooling_mode="mean")
        whole = sentence_transformers.SentenceTransformer(modules=[encoder, pooling, *dense, Normalize()], device="cpu")
        between = sentence_transformers.SentenceTransformer(modules=[encoder, pooling, Normalize(), *dense], device="cpu")
        whole.save(f"{scratch}/whole")
        for file in ["config.json", "model.safetensors", "modules.json", "sentence_bert_config.json"]:
            shutil.copy(f"{scratch}/whole/{file}", folder / file)
        for module in ["1_Pooling", "2_Dense", "3_Dense"]:
            shutil.copytree(f"{scratch}/whole/{module}", folder / module)
    rows = lambda model: [[round(float(x), 6) for x in row] for row in model.encode(TEXTS, batch_size=1)]
    return {"inputs": TEXTS, "vectors": rows(whole), "normalized_between": rows(between)}


def jina_rerank():
    """A classifier in BERT's form on the plain torch trunk of make-fixtures.py."""
    path = pathlib.Path(__file__).parent / "make-fixtures.py"
    spec = importlib.util.spec_from_file_location("make_fixtures", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    folder, hidden, inner = OUT / "jina-rerank", 24, 32
    tokenizer = new_folder(folder)
    parts = {f"attention.self.{part}": (hidden, hidden, True) for part in ("query", "key", "value")}
    parts |= {"attention.output.dense": (hidden, hidden, True), "mlp.gated_layers": (2 * inner, hidden, False), "mlp.wo": (hidden, inner, True)}
    shapes = made.published_shapes(220, hidden, inner, 1, 2, parts, ["attention.output.LayerNorm", "mlp.layernorm"])
    shapes |= {"pooler.dense.weight": (hidden, hidden), "pooler.dense.bias": (hidden,)}
    generator = torch.Generator().manual_seed(94)
    noise = lambda shape: 0.25 * torch.randn(shape, generator=generator)
    weights = {name: noise(shape) + ("norm" in name.lower() and name.endswith("weight")) for name, shape in shapes.items()}
    config = {**SMALL, "pad_token_id": 0, "model_type": "bert", "architectures": ["JinaBertForSequenceClassification"], "layer_norm_eps": 1e-12,
              "type_vocab_size": 2, "position_embedding_type": "alibi", "feed_forward_type": "geglu", **labels(["LABEL_0"])}
    head = {"classifier.weight": noise((1, hidden)), "classifier.bias": noise((1,))}
    safetensors.torch.save_file({**{f"bert.{name}": tensor for name, tensor in weights.items()}, **head}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    trunk = made.JinaBert(config, weights)

    def logits(text):
        ids = tokenizer(text, return_tensors="pt")
        # The trunk knows one type of tokens: these are single texts.
        first = trunk(ids["input_ids"], ids["attention_mask"]).last_hidden_state[0, 0]
        pooled = torch.tanh(trunk.linear(first, "pooler.dense"))
        return head["classifier.weight"] @ pooled + head["classifier.bias"]

    return {"cases": [{"input": text, "logits": [round(float(x), 6) for x in logits(text)]} for text in TEXTS]}


def new_folder(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(FIXTURES / "models/bert-f16/tokenizer.json", folder / "tokenizer.json")
    special = dict(mask_token="[MASK]", pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]", cls_token="[CLS]")
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)


if __name__ == "__main__":
    main()
