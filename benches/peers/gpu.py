#!/usr/bin/env python3
"""PyTorch with transformers' BertModel, and sentence-transformers, on the same models and batches as benches/gpu.rs.

A worker that `scripts/gpu run` drives; the protocol is the one at the head of benches/gpu.rs. Weights and ids are made by
the formula of tests/gpu/synthetic.rs, so that rows can be compared. What a user would do for speed is done:
scaled-dot-product attention, no mask where no sequence is padded, inference mode, sequences sorted by length and padded
within groups (of several ways to group them the quickest is taken), ids on the device beforehand.

    echo '{"do": "hello"}' | benches/peers/gpu.py

Without a package or a device it says so and ends with status 3.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NO_DEVICE = 3
# As benches/gpu/timing.rs.
NUM_SPANS, NUM_WARM, MAX_RUNS = 7, 5, 2000
# As benches/gpu/models.rs.
VERIFY_LENS, VERIFY_SEED, NUM_BATCHES = [1, 7, 33, 128], 1, 4
# As tests/gpu/synthetic.rs.
GAIN, SMALL, LAYER_TENSORS, VOCAB = 3.0, 0.1, 16, 30522
SIZES = {
    "minilm-l6": {"hidden_size": 384, "num_attention_heads": 12, "num_hidden_layers": 6, "intermediate_size": 1536},
    "bert-base": {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "intermediate_size": 3072},
    "bert-large": {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24, "intermediate_size": 4096},
}
WAYS = ["eager", "compiled", "graphs"]


class Missing(Exception):
    """A package or a device that is not there."""


# ---- the same numbers as in Rust -------------------------------------------------------------------------------------


def mix(x):
    """Scrambles 32 bits; `x` is an int or an int64 tensor of values below 2**32."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


class Models:
    def __init__(self, device):
        try:
            import torch
            import transformers
        except ImportError as error:
            raise Missing(f"missing: {error.name}") from None
        if device == "cuda" and not torch.cuda.is_available():
            raise Missing("no CUDA device for torch")
        self.torch, self.transformers, self.device = torch, transformers, torch.device(device)
        self.models, self.compiled, self.groupings = {}, {}, {}

    def values(self, tensor, shape, scale):
        torch = self.torch
        count = 1
        for size in shape:
            count *= size
        bits = mix(torch.arange(count, dtype=torch.int64, device=self.device) ^ mix(tensor))
        # A float's 24 bits hold (x >> 8) exactly.
        value = (bits >> 8).to(torch.float32) * (2.0 / 16777216.0) - 1.0
        return (value * torch.tensor(scale, dtype=torch.float32)).reshape(shape)

    def model(self, name, dtype):
        torch = self.torch
        key = (name, dtype)
        if key not in self.models:
            config = self.transformers.BertConfig(**SIZES[name], attn_implementation="sdpa")
            with torch.device("meta"):
                model = self.transformers.BertModel(config, add_pooling_layer=False)
            model.to_empty(device=self.device)
            # A buffer that `to_empty` left unset.
            for buffer_name, buffer in model.named_buffers():
                if buffer_name.endswith("position_ids"):
                    buffer.copy_(torch.arange(buffer.shape[-1], device=self.device).expand_as(buffer))
                else:
                    buffer.zero_()
            with torch.no_grad():
                self.fill(model)
            model = model.to(getattr(torch, {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}[dtype]))
            self.models[key] = model.eval()
        return self.models[key]

    def fill(self, model):
        embeddings, hidden = model.embeddings, model.config.hidden_size
        embeddings.word_embeddings.weight.copy_(self.values(0, (VOCAB, hidden), 1.0))
        embeddings.position_embeddings.weight.copy_(self.values(1, (512, hidden), 1.0))
        embeddings.token_type_embeddings.weight.copy_(self.values(2, (2, hidden), 1.0))
        self.fill_norm(embeddings.LayerNorm, 3)
        for i, layer in enumerate(model.encoder.layer):
            first = LAYER_TENSORS * (i + 1)
            attention = layer.attention.self
            scale = (GAIN / hidden) ** 0.5
            qkv, bias = self.values(first, (3 * hidden, hidden), scale), self.values(first + 1, (3 * hidden,), SMALL)
            for part, linear in enumerate([attention.query, attention.key, attention.value]):
                rows = slice(part * hidden, (part + 1) * hidden)
                linear.weight.copy_(qkv[rows])
                linear.bias.copy_(bias[rows])
            self.fill_linear(layer.attention.output.dense, first + 2)
            self.fill_norm(layer.attention.output.LayerNorm, first + 4)
            self.fill_linear(layer.intermediate.dense, first + 6)
            self.fill_linear(layer.output.dense, first + 8)
            self.fill_norm(layer.output.LayerNorm, first + 10)

    def fill_linear(self, linear, number):
        scale = (GAIN / linear.in_features) ** 0.5
        linear.weight.copy_(self.values(number, tuple(linear.weight.shape), scale))
        linear.bias.copy_(self.values(number + 1, tuple(linear.bias.shape), SMALL))

    def fill_norm(self, norm, number):
        norm.weight.copy_(self.values(number, tuple(norm.weight.shape), SMALL) + 1.0)
        norm.bias.copy_(self.values(number + 1, tuple(norm.bias.shape), SMALL))

    # ---- batches -----------------------------------------------------------------------------------------------------

    def batch(self, lens, seed, num_groups):
        """(ids, mask or None) of each group of sequences, sorted by length, and the order back."""
        torch = self.torch
        total = sum(lens)
        flat = mix(torch.arange(total, dtype=torch.int64, device=self.device) ^ mix(seed)) % VOCAB
        begins = list(accumulate_from_zero(lens))
        order = sorted(range(len(lens)), key=lambda i: lens[i])
        groups = []
        size = -(-len(lens) // num_groups)
        for start in range(0, len(order), size):
            members = order[start : start + size]
            longest = max(lens[i] for i in members)
            ids = torch.zeros(len(members), longest, dtype=torch.int64, device=self.device)
            for row, i in enumerate(members):
                ids[row, : lens[i]] = flat[begins[i] : begins[i] + lens[i]]
            own = torch.tensor([lens[i] for i in members], device=self.device)
            is_padded = any(lens[i] != longest for i in members)
            mask = (torch.arange(longest, device=self.device) < own[:, None]).long() if is_padded else None
            groups.append((ids, mask))
        return groups, order

    def forward(self, model, groups):
        """Mean of each sequence's token vectors, scaled to length 1."""
        torch, rows = self.torch, []
        for ids, mask in groups:
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            if mask is None:
                pooled = hidden.float().mean(1)
            else:
                weights = mask.to(torch.float32)[..., None]
                pooled = (hidden.float() * weights).sum(1) / weights.sum(1)
            rows.append(torch.nn.functional.normalize(pooled, dim=1))
        return rows

    def way(self, name, dtype, way):
        model = self.model(name, dtype)
        if way == "eager":
            return model
        key = (name, dtype, way)
        if key not in self.compiled:
            options = {"mode": "reduce-overhead"} if way == "graphs" else {}
            self.compiled[key] = self.torch.compile(model, dynamic=False, **options)
        return self.compiled[key]

    def synchronize(self):
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    # ---- answers -----------------------------------------------------------------------------------------------------

    def hello(self):
        torch = self.torch
        answer = {
            "name": "pytorch",
            "torch": torch.__version__,
            "transformers": self.transformers.__version__,
            "ways": WAYS,
        }
        if self.device.type == "cuda":
            answer |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
            answer["cudnn"] = torch.backends.cudnn.version()
        return answer

    def verify(self, ask):
        model = self.model(ask["model"], ask["dtype"])
        groups, order = self.batch(VERIFY_LENS, VERIFY_SEED, len(VERIFY_LENS))
        with self.torch.inference_mode():
            rows = [row for group in self.forward(model, groups) for row in group.tolist()]
        return {"rows": [rows[order.index(i)] for i in range(len(order))]}

    def span(self, run, number, num_runs):
        """Microseconds of one of `num_runs` runs, by the device's clock."""
        torch = self.torch
        if self.device.type != "cuda":
            start = time.perf_counter()
            for i in range(num_runs):
                run(number + i)
            return (time.perf_counter() - start) / num_runs * 1e6
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for i in range(num_runs):
            run(number + i)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / num_runs * 1e3

    def timed(self, run, seconds):
        self.span(run, 0, NUM_WARM)
        guess = max(self.span(run, 0, NUM_WARM), 0.5)
        num_runs = min(max(int(seconds * 1e6 / NUM_SPANS / guess), 1), MAX_RUNS)
        spans = sorted(self.span(run, i * num_runs, num_runs) for i in range(NUM_SPANS))
        middle = spans[NUM_SPANS // 2]
        return {"median_us": middle, "min_us": spans[0], "max_us": spans[-1], "num_runs": num_runs}

    def batches(self, ask, num_groups):
        seeds = [ask.get("seed", 0) * NUM_BATCHES + i + 2 for i in range(NUM_BATCHES)]
        return [self.batch(ask["lens"], seed, num_groups)[0] for seed in seeds]

    def time(self, ask):
        lens, seconds = ask["lens"], ask.get("seconds", 0.3)
        way = ask.get("way", "eager")
        model = self.way(ask["model"], ask["dtype"], way)
        # Fewer pads against fewer sequences a launch: the quickest grouping, chosen once.
        key = (ask["model"], ask["dtype"], way, tuple(lens))
        choices = [1] if len(set(lens)) == 1 else [1, 2, 4, 8]
        with self.torch.inference_mode():
            if key not in self.groupings:
                tried = {}
                for num_groups in choices if len(choices) > 1 else []:
                    groups = self.batches(ask, num_groups)
                    tried[num_groups] = self.timed(lambda i, g=groups: self.forward(model, g[i % NUM_BATCHES]), 0.1)["median_us"]
                self.groupings[key] = min(tried, key=tried.get) if tried else 1
            num_groups = self.groupings[key]
            groups = self.batches(ask, num_groups)
            spread = self.timed(lambda i: self.forward(model, groups[i % NUM_BATCHES]), seconds)
        num_tokens = sum(lens)
        return {
            "spread": spread,
            "median_us": spread["median_us"],
            "num_tokens": num_tokens,
            "num_seqs": len(lens),
            "num_groups": num_groups,
            "tokens_per_s": num_tokens / spread["median_us"] * 1e6,
        }

    def latency(self, ask):
        """From ids on the host to rows on the host."""
        torch = self.torch
        model = self.way(ask["model"], ask["dtype"], ask.get("way", "eager"))
        batches = [[(ids.cpu(), mask) for ids, mask in groups] for groups in self.batches(ask, 1)]
        walls = []

        def run(i):
            groups = [(ids.to(self.device), mask) for ids, mask in batches[i % NUM_BATCHES]]
            return [rows.cpu() for rows in self.forward(model, groups)]

        with torch.inference_mode():
            for i in range(10):
                run(i)
            begun = time.perf_counter()
            while len(walls) < 50 or (time.perf_counter() - begun < ask.get("seconds", 0.3) and len(walls) < 5000):
                start = time.perf_counter()
                run(len(walls))
                walls.append((time.perf_counter() - start) * 1e6)
        ranked = statistics.quantiles(walls, n=100, method="inclusive")
        return {
            "num_tokens": sum(ask["lens"]),
            "num_seqs": len(ask["lens"]),
            "num_runs": len(walls),
            "wall_p50_us": ranked[49],
            "wall_p99_us": ranked[98],
        }

    def sentences(self, ask):
        """Texts to embeddings by sentence-transformers' own `encode`: tokenising, sorting, padding, forward, pooling."""
        try:
            import sentence_transformers
        except ImportError:
            raise Missing("missing: sentence_transformers") from None
        torch = self.torch
        try:
            from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
        except ImportError:  # before version 6
            from sentence_transformers.models import Normalize, Pooling, Transformer
        tokenizer_file = ROOT / "models" / "all-MiniLM-L6-v2" / "1" / "tokenizer.json"
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            self.model(ask["model"], "f32").save_pretrained(folder)
            words = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
            tokenizer = self.transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), model_max_length=512, **words)
            # The file pads every text to 128 tokens, which would cost this peer a factor of two.
            tokenizer.backend_tokenizer.no_padding()
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.save_pretrained(folder)
            transformer = Transformer(folder, max_seq_length=512)
            pooling = Pooling(SIZES[ask["model"]]["hidden_size"], pooling_mode="mean")
            model = sentence_transformers.SentenceTransformer(
                modules=[transformer, pooling, Normalize()], device=str(self.device)
            )
        model = model.to(getattr(torch, {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}[ask["dtype"]]))
        # Words that are one token each in this vocabulary, and two special tokens around them.
        words = "time year people way day man thing woman life child world school state family student group".split()
        texts = [" ".join(words[(i * 7 + j * 3) % len(words)] for j in range(ask["len"] - 2)) for i in range(ask["num_texts"])]
        got = len(model.tokenizer(texts[0])["input_ids"])
        best = None
        for batch_size in ask.get("batch_sizes", [64, 256, 1024]):
            spent = []
            for _ in range(3):
                self.synchronize()
                start = time.perf_counter()
                model.encode(texts, batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False)
                spent.append(time.perf_counter() - start)
            median = statistics.median(spent)
            if best is None or median < best["median_s"]:
                best = {"batch_size": batch_size, "median_s": median}
        texts_per_s = len(texts) / best["median_s"]
        return best | {
            "sentence_transformers": sentence_transformers.__version__,
            "num_texts": len(texts),
            "tokens_per_text": got,
            "texts_per_s": texts_per_s,
            "tokens_per_s": texts_per_s * got,
        }

    def answer(self, ask):
        do = {
            "hello": lambda: self.hello(),
            "verify": lambda: self.verify(ask),
            "time": lambda: self.time(ask),
            "latency": lambda: self.latency(ask),
            "sentences": lambda: self.sentences(ask),
        }
        return do[ask["do"]]()


def accumulate_from_zero(lens):
    begin = 0
    for length in lens:
        yield begin
        begin += length


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu to try the worker itself")
    args = parser.parse_args()
    # Answers alone go to standard output; libraries that print get the other one.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        models = Models(args.device)
    except Missing as error:
        print(json.dumps({"error": str(error)}), file=answers)
        sys.exit(NO_DEVICE)
    for line in sys.stdin:
        try:
            answer = models.answer(json.loads(line))
        except Exception as error:  # one case that fails is that case's answer
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
