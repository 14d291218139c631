"""The README of a run, out of what its steps found so far."""

import statistics

# The cases with goals; docs/gpu.md has the goals themselves.
BASE, LARGE, MINILM = "bert-base 128 f16", "bert-large 512 f16", "minilm-l6 50 f16"
LAYERS = {"minilm-l6": (384, 6, 1536), "bert-base": (768, 12, 3072), "bert-large": (1024, 24, 4096)}
MADE_UP = "**A dry run: every time below is made up.** It shows that the script works and nothing else."


def readme(found):
    lines = ["# The CUDA engine on a device", ""]
    if found.get("is_made_up"):
        lines += [MADE_UP, ""]
    if "failed" in found:
        lines += [f"**Failed: {found['failed']}.** Nothing after it was run.", ""]
    lines += facts(found)
    for section in (goals, correctness, turns, latency, parts, sweep, http, others):
        made = section(found)
        lines += [*made, ""] if made else []
    lines += steps(found)
    return "\n".join(lines) + "\n"


def table(head, rows):
    """A table in Markdown; numbers to the right."""
    if not rows:
        return []
    cells = [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in cells)]


def number(value):
    """Four digits that count, thousands parted."""
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def share(value):
    return "-" if value is None else f"{value * 100:.1f} %"


def millions(tokens_per_s):
    return f"{tokens_per_s / 1e6:.3f} M" if tokens_per_s >= 1e4 else number(tokens_per_s)


def peak(found, dtype):
    return found.get("peaks", {}).get(f"gemm_{dtype}_tflop_per_s")


def flops(model, lens):
    """What a forward computes on tensor cores: products of every token, and of its sequence's pairs."""
    hidden, layers, intermediate = LAYERS[model]
    weights = layers * (4 * hidden * hidden + 2 * hidden * intermediate)
    return sum(2 * weights * length + 4 * layers * hidden * length * length for length in lens)


def peak_share(found, entry, took_us):
    """The share of the measured GEMM rate that a case's useful operations come to."""
    rate = peak(found, entry["dtype"])
    return flops(entry["model"], entry["lens"]) / took_us / 1e6 / rate if rate else None


def case(found, step, name):
    return next((entry for entry in found.get(step, []) if entry["case"] == name and "skipped" not in entry), None)


def rate(entry):
    return sum(entry["lens"]) / entry["median_us"] * 1e6


def median_ratio(entry, way):
    ratios = entry["ratios"].get(way)
    return statistics.median(ratios) if ratios else None


# ---- sections --------------------------------------------------------------------------------------------------------


def facts(found):
    known = found.get("facts", {})
    rows = [["command", f"`{found['command']}`"], ["date", known.get("date", "-")]]
    gpu = known.get("gpu") or {}
    rows.append(["GPU", ", ".join(f"{key} {value}" for key, value in gpu.items()) or "none"])
    rows += [["CPU", known.get("cpu", "-")], ["kernel", known.get("kernel", "-")]]
    binaries = found.get("binaries", {})
    rows.append(["ours", ", ".join(f"{key} {value}" for key, value in binaries.items() if key != "libraries") or "not built"])
    peers = found.get("start", {}).get("peers", {})
    names = ("torch", "transformers", "cuda", "cudnn", "missing")
    rows.append(["peers", ", ".join(f"{key} {peers[key]}" for key in names if key in peers) or "-"])
    peaks = found.get("peaks")
    if peaks:
        rows.append(["measured peaks", f"{peaks['gemm_side']}³ product: {peaks['gemm_f16_tflop_per_s']:.0f} TFLOP/s f16, "
                     f"{peaks['gemm_bf16_tflop_per_s']:.0f} bf16; copy on the device: {peaks['copy_gb_per_s']:,.0f} GB/s"])
    return [*table(["", ""], rows), ""]


def goals(found):
    rows = []

    def goal(what, asked, got, is_met):
        is_met = None if found.get("is_made_up") else is_met
        rows.append([what, asked, got, "-" if is_met is None else "yes" if is_met else "no"])

    base, large, minilm = (case(found, "turns", name) for name in (BASE, LARGE, MINILM))
    for entry, what, least, least_ratio in ((base, "BERT-base, 128 tokens", 2.3e6, 1.5), (minilm, "MiniLM-L6, 50 tokens", 8e6, 3.0)):
        if entry:
            goal(f"{what}, f16, full batches", f"> {least / 1e6:g} M tokens/s", f"{millions(rate(entry))} tokens/s", rate(entry) > least)
            ratio = median_ratio(entry, "compiled")
            goal(f"{what}: against compiled PyTorch", f"≥ {least_ratio:g} ×", f"{ratio:.2f} ×" if ratio else "no peer",
                 ratio and ratio >= least_ratio)
    if large:
        got = peak_share(found, large, large["median_us"])
        goal("BERT-large, 512 tokens, f16", "≥ 60 % of the measured product rate", share(got), got is not None and got >= 0.6)
    alone = case(found, "latency", BASE)
    if alone and "device_p50_us" in alone["ours"]:
        took = alone["ours"]["device_p50_us"]
        goal("one sequence of 128, BERT-base, on the device", "p50 < 400 µs", f"{took:.0f} µs", took < 400)
    idle = [answer["idle_share"] for entry in (base, large, minilm) if entry for answer in entry["ours"]]
    if idle:
        goal("idle between batches at saturation", "≤ 3 %", share(max(idle)), max(idle) <= 0.03)
    loads = found.get("http", {}).get("loads", [])
    if loads and minilm and not found["is_made_up"]:
        busy = (loads[0]["tokens_per_s"] or 0) / rate(minilm)
        goal("512 clients of 50 tokens over HTTP: how much of the time the device is needed", "CPU-bound", share(busy), busy < 0.5)
    made = table(["goal", "asked for", "measured", "met"], rows)
    return ["## Goals", "", *made] if made else []


def correctness(found):
    tests, models = found.get("tests"), found.get("verify", [])
    if not tests and not models:
        return []
    lines = ["## Correctness, before anything was timed", ""]
    if tests:
        lines += [f"{tests['num_passed']} tests of `tests/gpu.rs` passed.", ""]
        rows = [[name, f"{cosine:.6f}"] for name, cosine in tests["min_cosine_to_cpu"].items()]
        lines += [*table(["whole model", "smallest cosine to the CPU in f32"], rows), ""] if rows else []
    rows = []
    for entry in models:
        if "not_verified" in entry:
            rows.append([f"{entry['model']} {entry['dtype']}", "-", "-", entry["not_verified"]])
            continue
        peer = entry.get("min_cosine_to_peer")
        rows.append([f"{entry['model']} {entry['dtype']}", f"{entry['min_cosine_to_cpu']:.6f}",
                     f"{peer:.6f}" if peer is not None else "-", entry.get("fault", "")])
    return lines + table(["timed model", "to the CPU", "to the peer", ""], rows)


def turns(found):
    rows, gone = [], []
    for entry in found.get("turns", []) + found.get("more turns", []):
        if "skipped" in entry:
            gone.append(f"{entry['case']}: {entry['skipped']}")
            continue
        gone += [f"{entry['case']}, {way}: {why}" for way, why in entry["missing"].items()]
        idle = statistics.median(answer["idle_share"] for answer in entry["ours"])
        row = [entry["case"], f"{len(entry['lens'])} / {sum(entry['lens']):,}", entry["median_us"], millions(rate(entry)),
               share(peak_share(found, entry, entry["median_us"])), share(idle)]
        for way in ("eager", "compiled"):
            ratios = entry["ratios"].get(way)
            row.append(f"{statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-")
        rows.append(row)
    if not rows and not gone:
        return []
    head = ["batch", "sequences / tokens", "µs", "tokens/s", "of the product rate", "idle", "PyTorch eager", "compiled"]
    lines = ["## At saturation, in turns with PyTorch", "", *table(head, rows), ""]
    lines += ["From upload to pooled rows, median of three rounds; a ratio is the peer's time over ours in the same round.",
              "The share counts useful operations only: buckets' empty rows and all that is no product are lost in it."]
    return lines + [f"- {why}" for why in gone]


def latency(found):
    rows, gone = [], []
    for entry in found.get("latency", []):
        if "skipped" in entry:
            gone.append(f"- {entry['case']}: {entry['skipped']}")
            continue
        ours = entry["ours"]
        rows.append([entry["case"], "ours", ours.get("device_p50_us"), ours["wall_p50_us"], ours["wall_p99_us"]])
        rows += [[entry["case"], f"PyTorch {way}", "-", got["wall_p50_us"], got["wall_p99_us"]] for way, got in entry["peers"].items()]
        gone += [f"- {entry['case']}, {way}: {why}" for way, why in entry["missing"].items()]
    head = ["batch of one", "", "device p50 µs", "wall p50 µs", "wall p99 µs"]
    made = table(head, rows)
    return ["## One sequence at a time", "", *made, "", "The wall's time is from ids on the host to rows on the host.", *gone] if made or gone else []


def part_rows(found, dtype, parts):
    peaks = found.get("peaks", {})
    copy, product = peaks.get("copy_gb_per_s"), peak(found, dtype)
    for part in parts:
        by_bytes = part["num_bytes"] / copy / 1e3 if copy else None
        by_flops = part["num_flops"] / product / 1e6 if product else None
        took = part["median_us"]
        yield [part["name"], str(part["count"]), took, took * part["count"],
               share(by_bytes and by_bytes / took), share(by_flops / took) if by_flops else "-"]


def parts(found):
    lines = []
    for entry in found.get("parts", []):
        if "skipped" in entry:
            lines += [f"- {entry['case']}: {entry['skipped']}"]
            continue
        head = ["kernel", "launches", "µs each", "µs together", "of the copy rate", "of the product rate"]
        lines += [f"### {entry['case']}, {entry['num_tokens']:,} tokens in a bucket of {entry['token_capacity']:,}", ""]
        lines += [*table(head, list(part_rows(found, entry["dtype"], entry["parts"]))), ""]
        together = sum(part["median_us"] * part["count"] for part in entry["parts"])
        whole = case(found, "turns", entry["case"])
        if whole:
            lines += [f"Together {together:,.0f} µs; the whole forward takes {whole['median_us']:,.0f} µs.", ""]
    return ["## Each kernel by itself, inputs from memory and not from the L2", "", *lines] if lines else []


def sweep(found):
    measured = [entry for entry in found.get("sweep", []) if "skipped" not in entry]
    counts = sorted({entry["num_seqs"] for entry in measured})
    rows = []
    for key in dict.fromkeys((entry["model"], entry["dtype"], entry["len"]) for entry in measured):
        by_count = {e["num_seqs"]: e for e in measured if (e["model"], e["dtype"], e["len"]) == key}
        rows.append([f"{key[0]} {key[1]}, {key[2]} tokens",
                     *(millions(by_count[n]["tokens_per_s"]) if n in by_count else "-" for n in counts)])
    made = table(["tokens/s by sequences in a batch", *map(str, counts)], rows)
    num_skipped = len(found.get("sweep", [])) - len(measured)
    return ["## From one sequence to the token budget", "", *made, *([f"- {num_skipped} left out"] if num_skipped else [])] if made else []


def http(found):
    answer = found.get("http")
    if not answer:
        return []
    lines = ["## Over HTTP", "", f"Start to ready: {answer['start_to_ready_s']:.1f} s.", ""]
    for load in answer["loads"]:
        cpu = load["server_cpu_s"]
        latency = load["latency_ms"] or {}
        lines += [f"### {load['num_clients']} clients, {load['load']}, 50 tokens each", ""]
        rows = [["requests/s", load["requests_per_s"]], ["texts/s", load["inputs_per_s"]], ["tokens/s", load["tokens_per_s"]],
                ["p50 / p99 ms", f"{number(latency.get('p50'))} / {number(latency.get('p99'))}"],
                ["errors", share(load["error_rate"])],
                ["cores the server kept busy", f"{sum(cpu.values()) / load['window_s']:.2f} of {load['num_cpus']}"],
                ["cores the client kept busy", load["client_cpu_s"] / load["window_s"]]]
        rows += [[f"of them threads `{name}`", spent / load["window_s"]] for name, spent in sorted(cpu.items(), key=lambda item: -item[1])[:6]]
        metrics = load["metrics"]
        rows += [[f"`{name.removesuffix('_sum')}`, seconds a second", spent / load["window_s"]]
                 for name, spent in metrics.items() if name.endswith("_seconds_sum")]
        lines += [*table(["", ""], rows), ""]
    peer = found.get("sentences")
    if peer:
        lines += [f"sentence-transformers' `encode`, no HTTP, same model's sizes, same lengths: {number(peer['texts_per_s'])} texts/s "
                  f"at its best batch size, {peer['batch_size']}."]
    return lines


def others(found):
    answer = found.get("others")
    if not answer:
        return []
    head = ["kernel", "launches", "µs each", "µs together", "of the copy rate", "of the product rate"]
    return ["## Kernels no bench model uses", "", *table(head, list(part_rows(found, "f16", answer["parts"])))]


def steps(found):
    rows = [[step["step"], " ".join(step["outcome"].split()), f"{step['took_s']:.1f}"] for step in found["steps"]]
    return ["## Steps", "", *table(["step", "", "s"], rows), "", "`report.json` has every number; a name ends with its unit."]
