"""Which batches are timed: name, model, dtype, lengths in tokens, the ways of the peer that take turns with ours."""

BUDGET = 16384
MODELS = ["minilm-l6", "bert-base", "bert-large"]
# The sweep: from one sequence alone to the token budget.
LENS, NUM_SEQS = [16, 50, 128, 512], [1, 4, 16, 64, 256, 1024]


def mixed(total):
    """Lengths of 8 to 256 tokens, log-uniform, that come to `total`; a low-discrepancy walk, the same everywhere."""
    lens, i = [], 0
    while total > 0:
        i += 1
        length = min(int(8 * 32 ** (i * 0.6180339887498949 % 1)), total)
        lens.append(length)
        total -= length
    return lens


def full(length):
    """As many sequences of a length as the token budget holds."""
    return [length] * (BUDGET // length)


class Cases:
    """What is timed: what fits ten minutes, all of it, or what an emulated device computes."""

    def __init__(self, is_full, is_small):
        if is_small:
            self.small()
            return
        dtypes = ["f16", "bf16"]
        self.models = [(m, d) for m in MODELS for d in dtypes if is_full or (m, d) != ("bert-large", "bf16")]
        # The first three have goals, and their kernels are timed one by one.
        self.turns = [
            ("bert-base 128 f16", "bert-base", "f16", full(128), ["eager", "compiled"]),
            ("bert-large 512 f16", "bert-large", "f16", full(512), ["eager", "compiled"]),
            ("minilm-l6 50 f16", "minilm-l6", "f16", full(50), ["eager", "compiled"]),
            ("minilm-l6 mixed f16", "minilm-l6", "f16", mixed(BUDGET), ["eager"]),
            ("bert-base 128 bf16", "bert-base", "bf16", full(128), ["eager"]),
        ]
        self.more_turns = [
            ("minilm-l6 16 f16", "minilm-l6", "f16", full(16), ["eager", "compiled"]),
            ("minilm-l6 128 f16", "minilm-l6", "f16", full(128), ["eager", "compiled"]),
            ("minilm-l6 512 f16", "minilm-l6", "f16", full(512), ["eager", "compiled"]),
            ("bert-base 512 f16", "bert-base", "f16", full(512), ["eager", "compiled"]),
            ("bert-base mixed f16", "bert-base", "f16", mixed(BUDGET), ["eager"]),
            ("bert-large 128 bf16", "bert-large", "bf16", full(128), ["eager", "compiled"]),
        ]
        self.latencies = [
            ("bert-base 128 f16", "bert-base", "f16", [128], ["eager", "graphs"]),
            ("minilm-l6 50 f16", "minilm-l6", "f16", [50], ["eager"]),
            ("bert-large 512 f16", "bert-large", "f16", [512], []),
        ]
        sizes = [(length, num) for length in LENS for num in NUM_SEQS if length * num <= BUDGET]
        swept = dtypes if is_full else dtypes[:1]
        self.sweep = [(f"{m} {num} x {length} {d}", m, d, length, num) for d in swept for m in MODELS for length, num in sizes]
        self.num_texts = 8192 if is_full else 4096

    def small(self):
        self.models = [("minilm-l6", "f16")]
        self.turns = [("minilm-l6 8 f16", "minilm-l6", "f16", [8, 8], ["eager"])]
        self.latencies = [("minilm-l6 8 f16", "minilm-l6", "f16", [8], [])]
        self.more_turns = self.turns
        self.sweep = [("minilm-l6 1 x 8 f16", "minilm-l6", "f16", 8, 1)]
        self.num_texts = 8
