"""Has NVIDIA's perf_analyzer measure the server, over HTTP and gRPC, as it is and with its options.

    python perf.py --perf-analyzer PROGRAM [--binary target/debug/eremois] [--record FILE]

PROGRAM is from the wheel that perf-requirements.txt pins; what it is linked with must be found (LD_LIBRARY_PATH). What is measured
is of no concern here: that it runs to its end, counts on its side what the server counts, and gets the values it was told to expect.
Needs requirements.txt; exits 1 with the list of what fails.
"""

import argparse
import base64
import csv
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import urllib.request

import numpy
import tritonclient.http as triton

from judging import REFERENCE, TEXTS, add_arguments, grpc_address, judge_arguments

HERE = pathlib.Path(__file__).parent
# A window is looked at once a second: it ends with the first look that finds so many answers.
NUM_REQUESTS = 8
NUM_AT_ONCE = 2
BATCH_SIZE = 3
# It is told that values are wrong, and what else it complains of, by this status.
FAILED = 99


class PerfAnalyzer:
    client = "perf_analyzer"
    # The program itself does not know it.
    version = "of tritonclient " + re.search(r"tritonclient==(\S+)", (HERE / "perf-requirements.txt").read_text())[1]
    program = None

    def __init__(self, url):
        self.url = url
        self.model = REFERENCE["model"]
        self.triton = triton.InferenceServerClient(url.removeprefix("http://"), network_timeout=60)
        self.ways = {"http": ["-u", url.removeprefix("http://")], "grpc": ["-u", grpc_address(), "-i", "grpc"]}

    def run(self, way, *options):
        """Its exit code, what it printed, and its report."""
        with tempfile.TemporaryDirectory() as folder:
            report = pathlib.Path(folder, "report.csv")
            command = [self.program, "-m", self.model, *self.ways[way], "--request-count", str(NUM_REQUESTS)]
            command += ["--concurrency-range", str(NUM_AT_ONCE), "-f", str(report), *options]
            ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
            rows = list(csv.DictReader(report.open())) if report.exists() else []
        return ran.returncode, ran.stdout + ran.stderr, rows

    def statistics(self):
        [model] = self.triton.get_inference_statistics(self.model)["model_stats"]
        counts = {name: timed["count"] for name, timed in model["inference_stats"].items()}
        return counts | {"inferences": model["inference_count"]}

    def asked(self):
        """How often each route and method was asked, as the server's metrics have it."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        counts = {}
        for line in lines:
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            if line.startswith("eremois_http_request_duration_seconds_count"):
                name = f"{labels['method']} {labels['route']}"
            elif line.startswith("eremois_grpc_requests_total"):
                name = f"RPC inference.GRPCInferenceService/{labels['method']}"
            else:
                continue
            counts[name] = counts.get(name, 0) + float(line.rsplit(" ", 1)[1])
        return counts

    def measured(self, way, *options):
        """Runs it to its end. What the server counted meanwhile, and the routes that it was asked."""
        before, routes = self.statistics(), self.asked()
        code, said, rows = self.run(way, *options)
        assert code == 0 and len(rows) == 1, f"exit {code}: {said}"
        assert float(rows[0]["Inferences/Second"]) > 0, rows
        after = self.statistics()
        counts = {name: after[name] - before[name] for name in after}
        told = {name: int(count) for name, count in re.findall(r"^ +([\w ]+) count: (\d+)", said, re.M)}
        assert told["Request"] == counts["success"] >= NUM_REQUESTS and counts["fail"] == 0, (told, counts)
        # Its first look at the statistics comes after its first requests.
        for theirs, ours, most in (
            ("Successful request", "success", NUM_AT_ONCE),
            ("Cache hit", "cache_hit", NUM_AT_ONCE),
            ("Inference", "inferences", NUM_AT_ONCE * BATCH_SIZE),
        ):
            assert 0 <= counts[ours] - told[theirs] <= most, (told, counts)
        # That the judge looked at statistics and metrics is not what the program asked.
        ours = {"GET /metrics": 1, "GET /v2/models/{model}/stats": 1}
        return counts, {name for name, count in self.asked().items() if count - routes.get(name, 0) > ours.get(name, 0)}

    def both(self, *options, counts_are):
        seen = set()
        for way in self.ways:
            counts, routes = self.measured(way, *options)
            assert counts_are(counts), counts
            seen |= routes
        return seen

    def file(self, folder, texts, rows=None):
        """`--input-data`, with what is expected where that is said."""
        content = {"data": [{"text": [text]} for text in texts]}
        if rows is not None:
            packed = [base64.b64encode(numpy.asarray(row, "<f4").tobytes()).decode() for row in rows]
            content["validation_data"] = [{"embedding": {"b64": row}} for row in packed]
        file = pathlib.Path(folder, "data.json")
        file.write_text(json.dumps(content))
        return str(file)

    def test_without_options(self):
        # It makes up one text, always the same.
        return self.both(counts_are=lambda counts: counts["compute_infer"] + counts["cache_hit"] == counts["success"])

    def test_batches_in_asynchronous_calls_past_the_cache(self):
        every = lambda counts: counts["inferences"] == BATCH_SIZE * counts["success"] and counts["cache_hit"] == 0
        return self.both("-b", str(BATCH_SIZE), "-a", "-H", "cache-control:no-store", "--string-length", "20", counts_are=every)

    def test_texts_of_a_file_and_the_values_that_are_expected(self):
        texts = TEXTS[:3]
        tensor = triton.InferInput("text", [len(texts), 1], "BYTES")
        tensor.set_data_from_numpy(numpy.array([[text.encode()] for text in texts], object))
        # Computed once and kept, so that it is these very bits which are compared.
        rows = self.triton.infer(self.model, [tensor]).as_numpy("embedding")
        with tempfile.TemporaryDirectory() as folder:
            found = lambda counts: counts["cache_hit"] == counts["success"]
            seen = self.both("--input-data", self.file(folder, texts, rows), counts_are=found)
            code, said, _ = self.run("grpc", "--input-data", self.file(folder, texts, rows[::-1]))
            assert code == FAILED and "doesn't match expected output" in said, (code, said)
        return seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--perf-analyzer", required=True, help="the program")
    arguments = parser.parse_args()
    PerfAnalyzer.program = os.path.abspath(arguments.perf_analyzer)
    sys.exit(judge_arguments(arguments, (PerfAnalyzer,)))
