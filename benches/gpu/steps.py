"""The steps of `scripts/gpu run`, in their order: what is asked of whom, and what of it is kept."""

import json
import math
import os
import re
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

import report
from cases import Cases
from machine import facts, nvidia_smi, slug, unpack
from serve import serve
from worker import Clock, Failed, NoAnswer, Skipped, Worker, call, say

ROOT = Path(__file__).resolve().parents[2]
# A step that would begin with less than this left is skipped: an unfinished one tells nothing.
LEAST_S = 10
MIN_COSINE_TO_PEER = 0.999
LEAST_COSINE = {"f16": 0.9999, "bf16": 0.999}
ROUNDS = 3


class Run:
    """What the steps share, and what they found."""

    def __init__(self, args, folder, logs):
        self.args, self.folder, self.logs = args, folder, logs
        self.clock = Clock(args.limit_s)
        self.is_dry, self.is_full, self.is_small = args.dry_run, args.full, args.small
        self.cases = Cases(args.full, args.small)
        self.found = {"command": " ".join(["scripts/gpu", *sys.argv[1:]]), "is_made_up": args.dry_run, "steps": []}
        self.binaries, self.environment = {}, {}
        self.ours = self.peer = None
        self.peer_missing = None
        self.verified = {}

    def log(self, name):
        return open(self.logs / f"{name}.log", "a", encoding="utf-8")

    def ask(self, worker, request):
        return worker.ask(request, max(min(self.args.ask_limit_s, self.clock.left_s() - 2), 1))

    def ask_peer(self, request):
        if self.peer_missing:
            raise NoAnswer(self.peer_missing)
        return self.ask(self.peer, request)

    def step(self, name, work):
        """Runs a step if there is time for it, notes how it ended, and writes the report as it stands."""
        if self.args.only and name not in ["facts", "binaries", "start", *self.args.only.split(",")]:
            return None
        begun, outcome, answer = self.clock.spent_s(), "done", None
        say(f"{name} ({self.clock.left_s():.0f} s left)")
        try:
            if self.clock.left_s() < LEAST_S:
                raise Skipped("no time left")
            answer = work(self)
        except (Skipped, NoAnswer) as error:
            outcome = f"skipped: {error}"
            say(f"{name}: {outcome}")
        except Failed as error:
            self.found["steps"].append({"step": name, "outcome": f"failed: {error}", "took_s": self.clock.spent_s() - begun})
            raise
        except Exception:  # a fault of this script must not cost what the other steps would find
            outcome = f"fault: {traceback.format_exc(limit=-1).strip()}"
            traceback.print_exc()
        self.found["steps"].append({"step": name, "outcome": outcome, "took_s": self.clock.spent_s() - begun})
        if answer is not None:
            self.found[name] = answer
        self.write()
        return answer

    def each(self, cases, work):
        """What `work` answers for each case; a case that fails or finds no time left is told and not the end of the step."""
        answers = []
        for case in cases:
            try:
                if self.clock.left_s() < LEAST_S:
                    raise Skipped("no time left")
                answers.append(work(*case))
            except (Skipped, NoAnswer) as error:
                answers.append({"case": case[0], "skipped": str(error)})
        return answers

    def write(self):
        (self.folder / "report.json").write_text(json.dumps(self.found, indent=1) + "\n")
        try:
            text = report.readme(self.found)
        except Exception:
            text = f"The tables could not be made; report.json has the numbers.\n\n```\n{traceback.format_exc()}```\n"
        (self.folder / "README.md").write_text(text)


def run(args):
    begun = time.strftime("%Y-%m-%d", time.gmtime())
    gpu = nvidia_smi("name")
    # An emulated device is no GPU that the driver's own tool would find.
    if gpu is None and not args.dry_run and not args.small:
        say("no GPU: nvidia-smi finds none; --dry-run goes through all steps without one")
        return 1
    if args.out:
        folder = args.out
    elif args.dry_run or args.small:
        folder = Path(tempfile.mkdtemp(prefix="eremois-gpu-"))
    else:
        folder = ROOT / "benches" / "runs" / f"{begun}-{slug(gpu[0])}"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.log"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="eremois-gpu-bin-") as scratch:
        run = Run(args, folder, folder)
        try:
            steps(run, Path(scratch))
        except Failed as error:
            run.found["failed"] = str(error)
            run.write()
            say(f"failed: {error}; what there is lies in {folder}")
            return 1
        finally:
            for worker in (run.ours, run.peer):
                if worker:
                    worker.stop()
    print(run.folder / "README.md")
    return 0


def steps(run, scratch):
    run.step("facts", facts)
    run.step("binaries", lambda run: unpack(run, scratch))
    run.step("tests", tests)
    run.step("start", start)
    run.step("peaks", lambda run: run.ask(run.ours, {"do": "peaks"}))
    run.step("verify", verify)
    run.step("turns", lambda run: turns(run, run.cases.turns))
    run.step("latency", latency)
    run.step("parts", parts)
    run.step("http", lambda run: serve(run, scratch))
    run.step("sentences", sentences)
    run.step("sweep", sweep)
    if run.is_full:
        run.step("others", lambda run: run.ask(run.ours, {"do": "others", "dtype": "f16"}))
        run.step("more turns", lambda run: turns(run, run.cases.more_turns))


# ---- correctness -----------------------------------------------------------------------------------------------------


def tests(run):
    """All of tests/gpu.rs. Without a device, in a dry run, each test must say so."""
    if "gpu-tests" not in run.binaries:
        raise Skipped("not built")
    environment = run.environment | ({} if run.is_dry else {"EREMOIS_TEST_GPU": "1"})
    environment |= {"EREMOIS_TEST_GPU_SIZES": "small"} if run.is_small else {}
    limit_s = max(min(240, run.clock.left_s() / 2), LEAST_S)
    with run.log("tests") as log:
        # In the project's folder: the bundled model is found from there.
        os.chdir(ROOT)
        status, output = call([run.binaries["gpu-tests"], "--nocapture"], limit_s, log, environment)
    if status != 0:
        raise Failed(f"tests: {'still running after ' + str(int(limit_s)) + ' s' if status is None else f'status {status}'}, see tests.log")
    passed = re.search(r"test result: ok\. (\d+) passed", output)
    if not passed or int(passed[1]) == 0:
        raise Failed("tests: none ran, see tests.log")
    if run.is_dry and "no CUDA device" not in output:
        raise Failed("tests: without a device they do not say so, see tests.log")
    cosines = re.findall(r"^(.+): smallest cosine to the CPU ([\d.]+)", output, re.MULTILINE)
    return {"num_passed": int(passed[1]), "min_cosine_to_cpu": {name: float(cosine) for name, cosine in cosines}}


def start(run):
    """The workers: ours and the peer, or in a dry run what stands in for them after they said that there is no GPU."""
    ours, peer = [str(run.binaries.get("gpu-bench", "gpu-bench"))], shlex.split(run.args.peer)
    answers = {}
    if run.is_dry:
        for name, command in (("gpu-bench", ours), ("peer", peer)):
            if name == "gpu-bench" and name not in run.binaries:
                answers[name] = "not built"
                continue
            with run.log(name) as log:
                _, output = call(command, 60, log, run.environment)
            # `error` or nothing: with a device it waits for a request, and its input is closed.
            answers[name] = output.strip().splitlines()[-1][:300] if output.strip() else "no word"
        stand_in = [sys.executable, str(ROOT / "benches" / "gpu" / "stand_in.py")]
        ours, peer = [*stand_in, "eremois"], [*stand_in, "pytorch"]
    ours += ["--small"] if run.is_small else []
    run.ours = Worker("ours", ours, run.environment or None, run.log("gpu-bench"))
    run.peer = Worker("peer", peer, None, run.log("peer"))
    try:
        answers["ours"] = run.ask(run.ours, {"do": "hello"})
    except NoAnswer as error:
        raise Failed(f"ours: {error}") from None
    try:
        answers["peers"] = run.ask(run.peer, {"do": "hello"})
    except NoAnswer as error:
        run.peer_missing = str(error)
        answers["peers"] = {"missing": run.peer_missing}
        say(f"no peer: {error}")
    return answers


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def verify(run):
    """Each model that is timed: ours against the CPU, the peer against ours."""
    return [verified(run, model, dtype) for model, dtype in run.cases.models]


def verified(run, model, dtype):
    """What the comparison of a model found, made once. What is wrong ends the run; nothing wrong is timed."""
    if (model, dtype) not in run.verified:
        run.verified[model, dtype] = {"model": model, "dtype": dtype} | compare(run, model, dtype)
    return run.verified[model, dtype]


def compare(run, model, dtype):
    request = {"do": "verify", "model": model, "dtype": dtype}
    try:
        entry = run.ask(run.ours, request)
    except NoAnswer as error:
        return {"not_verified": str(error)}
    rows, to_cpu = entry.pop("rows"), entry["min_cosine_to_cpu"]
    # None where there was a NaN.
    if to_cpu is None or to_cpu < LEAST_COSINE[dtype]:
        raise Failed(f"{model} {dtype}: cosine {to_cpu} to the CPU, {LEAST_COSINE[dtype]} is asked for")
    try:
        theirs = run.ask_peer(request)["rows"]
    except NoAnswer as error:
        return entry | {"peer_missing": str(error)}
    to_peer = min(cosine(a, b) for a, b in zip(rows, theirs, strict=True))
    fault = {} if to_peer >= MIN_COSINE_TO_PEER else {"fault": "the peer computes other rows: its times mean nothing"}
    return entry | {"min_cosine_to_peer": to_peer} | fault


def need(run, model, dtype):
    """Skips a case whose model was not verified."""
    entry = verified(run, model, dtype)
    if "not_verified" in entry:
        raise Skipped(f"not verified: {entry['not_verified']}")


# ---- times -----------------------------------------------------------------------------------------------------------


def turns(run, cases):
    """Ours and each way of the peer take turns, round by round; a ratio compares neighbours in time."""

    def case(name, model, dtype, lens, ways):
        need(run, model, dtype)
        request = {"do": "time", "model": model, "dtype": dtype, "lens": lens}
        entry = {"case": name, "model": model, "dtype": dtype, "lens": lens, "ours": [], "peers": {}, "ratios": {}, "missing": {}}
        for number in range(ROUNDS):
            entry["ours"].append(run.ask(run.ours, request | {"seed": number}))
            for way in [way for way in ways if way not in entry["missing"]]:
                try:
                    theirs = run.ask_peer(request | {"seed": number, "way": way})
                except NoAnswer as error:
                    entry["missing"][way] = str(error)
                    continue
                entry["peers"].setdefault(way, []).append(theirs)
                entry["ratios"].setdefault(way, []).append(theirs["median_us"] / entry["ours"][-1]["median_us"])
        entry["median_us"] = statistics.median(answer["median_us"] for answer in entry["ours"])
        return entry

    return run.each(cases, case)


def latency(run):
    def case(name, model, dtype, lens, ways):
        need(run, model, dtype)
        request = {"do": "latency", "model": model, "dtype": dtype, "lens": lens, "seconds": 0.5}
        entry = {"case": name, "model": model, "dtype": dtype, "lens": lens, "peers": {}, "missing": {}}
        entry["ours"] = run.ask(run.ours, request)
        for way in ways:
            try:
                entry["peers"][way] = run.ask_peer(request | {"way": way})
            except NoAnswer as error:
                entry["missing"][way] = str(error)
        return entry

    return run.each(run.cases.latencies, case)


def parts(run):
    """Every kernel of the cases with goals by itself: whatever a goal misses must be found in this table."""

    def case(name, model, dtype, lens, _):
        request = {"do": "parts", "model": model, "dtype": dtype, "lens": lens}
        return {"case": name, "model": model, "dtype": dtype, "lens": lens} | run.ask(run.ours, request)

    return run.each(run.cases.turns[: 5 if run.is_full else 3], case)


def sweep(run):
    """Every length from one sequence alone to the token budget, ours only."""

    def case(name, model, dtype, length, num_seqs):
        need(run, model, dtype)
        request = {"do": "time", "model": model, "dtype": dtype, "lens": [length] * num_seqs, "seconds": 0.1}
        return {"case": name, "model": model, "dtype": dtype, "len": length} | run.ask(run.ours, request)

    return run.each(run.cases.sweep, case)


def sentences(run):
    """sentence-transformers from texts to rows: what our server is compared with where tokenising counts."""
    request = {"do": "sentences", "model": "minilm-l6", "dtype": "f16", "len": 50, "num_texts": run.cases.num_texts}
    return run.ask_peer(request)
