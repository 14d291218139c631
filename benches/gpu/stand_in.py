#!/usr/bin/env python3
"""Answers as benches/gpu.rs or benches/peers/gpu.py would, with made-up numbers: a dry run needs no device.

    stand_in.py eremois | pytorch

The times are what a device would need at the rates of `peaks`, times a constant: plausible, and nothing more.
"""

import json
import sys

PEAK_TFLOPS, COPY_GB_PER_S = 800.0, 3000.0
HIDDEN = {"minilm-l6": (384, 6, 1536), "bert-base": (768, 12, 3072), "bert-large": (1024, 24, 4096)}
# How many times the floor each way takes.
SLOWNESS = {"engine": 1.6, "eager": 3.5, "compiled": 2.5, "graphs": 2.5}


def forward_us(ask):
    hidden, layers, intermediate = HIDDEN[ask["model"]]
    weights = layers * (4 * hidden * hidden + 2 * hidden * intermediate)
    flops = sum(2 * weights * length + 4 * layers * hidden * length * length for length in ask["lens"])
    return flops / PEAK_TFLOPS / 1e6 + 20.0


def spread(median):
    return {"median_us": median, "min_us": median * 0.99, "max_us": median * 1.02, "num_runs": 10}


def answer(name, ask):
    tokens = {"num_tokens": sum(ask.get("lens", [])), "num_seqs": len(ask.get("lens", []))}
    took = forward_us(ask) * SLOWNESS[ask.get("way", "engine")] if "lens" in ask else 0.0
    match ask["do"]:
        case "hello":
            gpu = {"gpu": "made-up device", "num_multiprocessors": 1, "l2_bytes": 1, "driver_cuda_version": 13000}
            ways = ["engine"] if name == "eremois" else ["eager", "compiled", "graphs"]
            return {"name": name, "is_made_up": True, "ways": ways} | gpu
        case "peaks":
            return {
                "gemm_side": 8192, "gemm_f16_tflop_per_s": PEAK_TFLOPS, "gemm_f16": spread(1400.0),
                "gemm_bf16_tflop_per_s": PEAK_TFLOPS,
                "gemm_bf16": spread(1400.0), "copy_gb_per_s": COPY_GB_PER_S, "copy": spread(700.0),
            }
        case "verify":
            rows = [[0.6, 0.8, 0.0], [0.0, 0.6, 0.8]]
            return {"rows": rows, "min_cosine_to_cpu": 0.99999, "setup_s": 1.0} if name == "eremois" else {"rows": rows}
        case "time":
            extra = {"idle_share": 0.01} if name == "eremois" else {"num_groups": 1}
            return {"spread": spread(took), "median_us": took, "tokens_per_s": tokens["num_tokens"] / took * 1e6} | tokens | extra
        case "latency":
            device = {"device_p50_us": took, "device_p99_us": took * 1.1, "num_graphs": 1} if name == "eremois" else {}
            return {"wall_p50_us": took + 15.0, "wall_p99_us": took + 40.0, "num_runs": 50} | tokens | device
        case "parts" | "others":
            part = {"name": "made-up kernel", "count": 12, "num_bytes": 10**8, "num_flops": 10**10} | spread(60.0)
            return {"num_tokens": 16384, "token_capacity": 16384, "parts": [part, part | {"num_flops": 0}]}
        case "sentences":
            return {"texts_per_s": 1000.0, "tokens_per_s": 50000.0, "num_texts": ask["num_texts"], "batch_size": 256}
    raise ValueError(ask["do"])


def main():
    for line in sys.stdin:
        try:
            reply = answer(sys.argv[1], json.loads(line))
        except (KeyError, ValueError) as error:
            reply = {"error": repr(error)}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
