"""End to end over HTTP: the server on the device, `eremois bench` against it, and where the time went."""

import json
import os
import re
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

from worker import NoAnswer, call, end

ROOT = Path(__file__).resolve().parents[2]
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Name, connections, texts a request. 50 tokens a text, the two special ones included.
LOADS = [("one text a request", 512, 1), ("16 texts a request", 64, 16)]


def serve(run, scratch):
    """Requests a second at 512 clients, with the server's CPU time by its threads and its own phases beside it."""
    if "eremois" not in run.binaries:
        raise NoAnswer("not built")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    settings = [f"api.listen=127.0.0.1:{port}", f"ai.device={'cpu' if run.is_dry else 'cuda:0'}", "log.level=warn"]
    settings += [f"ai.models_dir={ROOT / 'models'}", f"ai.cache_dir={scratch / 'cache'}"]
    settings += ["ai.max_batch_tokens=256", "ai.max_batch_size=8"] if run.is_small else []
    command = [str(run.binaries["eremois"]), "serve", *(word for setting in settings for word in ("--set", setting))]
    with run.log("server") as log:
        # Not in the project's folder, whose settings file is somebody's own.
        server = subprocess.Popen(
            command, cwd=scratch, env=run.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            begun = time.monotonic()
            wait_ready(server, url, min(90, run.clock.left_s() - 5))
            answer = {"start_to_ready_s": time.monotonic() - begun, "settings": settings, "loads": []}
            for load in LOADS:
                answer["loads"].append(measure(run, scratch, server, url, *load))
            return answer
        finally:
            end(server)


def wait_ready(server, url, limit_s):
    end_at = time.monotonic() + limit_s
    while time.monotonic() < end_at:
        if server.poll() is not None:
            raise NoAnswer(f"the server ended with status {server.returncode}, see server.log")
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=2) as response:
                if response.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise NoAnswer(f"the server is not ready after {limit_s:.0f} s, see server.log")


def measure(run, scratch, server, url, name, num_clients, inputs_per_request):
    # A dry run counts requests: on a busy CPU a second may pass without an answer.
    until, before_it = (["--requests", 8], ["--requests", 4]) if run.is_dry or run.is_small else (["--duration", "8s"], ["--duration", "3s"])
    num_clients = min(num_clients, 4) if run.is_dry or run.is_small else num_clients
    json_file = scratch / "http.json"
    arguments = ["--url", url, "--concurrency", num_clients, "--lengths", "50", "--inputs", inputs_per_request]
    arguments += ["--threads", 2 if (os.cpu_count() or 1) > 4 else 1, "--rounds", 1, "--timeout", "30s"]
    bench = [run.binaries["eremois"], "bench", *arguments]
    with run.log("http") as log:
        # The first batches of each bucket capture its graph: that is before, not part of it.
        call([*bench, *before_it, "--warmup", "0s"], 60, log, run.environment)
        before, begun, client = sample(server, url), time.monotonic(), os.times()
        status, _ = call([*bench, *until, "--warmup", "0s", "--json", json_file], 90, log, run.environment)
        after, took_s, client_after = sample(server, url), time.monotonic() - begun, os.times()
    if status != 0:
        raise NoAnswer(f"eremois bench ended with status {status}, see http.log")
    report = json.loads(json_file.read_text())
    total = report["targets"][0]["steps"][0]["total"]
    client_s = sum(client_after[2:4]) - sum(client[2:4])
    threads = {k: after["threads"][k] - before["threads"].get(k, 0) for k in after["threads"]}
    metrics = {k: after["metrics"][k] - before["metrics"].get(k, 0) for k in after["metrics"]}
    return {
        "load": name,
        "num_clients": num_clients,
        "inputs_per_request": inputs_per_request,
        "window_s": took_s,
        "requests_per_s": total["requests_per_s"],
        "inputs_per_s": total["inputs_per_s"],
        "tokens_per_s": total["tokens_per_s"],
        "latency_ms": total["latency_ms"],
        "error_rate": total["error_rate"],
        "num_cpus": os.cpu_count(),
        "server_cpu_s": {k: round(v, 3) for k, v in sorted(threads.items()) if v > 0},
        "client_cpu_s": client_s,
        "metrics": {k: round(v, 4) for k, v in sorted(metrics.items()) if v},
    }


def sample(server, url):
    """The server's CPU seconds by kind of thread, and the sums and counts of its metrics."""
    threads = {}
    for task in Path(f"/proc/{server.pid}/task").iterdir():
        try:
            name, fields = (task / "comm").read_text().strip(), (task / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it ended
        kind = re.sub(r"[-\d]+$", "", name)
        threads[kind] = threads.get(kind, 0) + (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        text = response.read().decode()
    metrics = {}
    for name, value in re.findall(r"^(eremois_\w+(?:_sum|_count|_total))(?:\{[^}]*\})? ([-+.\deE]+)$", text, re.MULTILINE):
        metrics[name] = metrics.get(name, 0) + float(value)
    return {"threads": threads, "metrics": metrics}
