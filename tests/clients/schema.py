"""Judges /openapi.json with Schemathesis: requests made from the document, right and wrong ones, are never answered with a status,
a type or a body that the document does not have, and never with an error of ours.

    python schema.py --schemathesis PROGRAM [--binary target/debug/eremois] [--seconds 90]

On the bundled model, and on one of each head that has routes of its own. schemathesis.toml says what is checked. Needs requirements.txt,
and PROGRAM from schemathesis-requirements.txt; exits 1 with what was found. EREMOIS_TEST_SCHEMA_SECONDS gives it more time.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

from expected import CLASSIFY, FILL_MASK, RERANK, TOKEN_CLASSIFY
from judging import started
from models import served

CONFIG = pathlib.Path(__file__).parent / "schemathesis.toml"
# The routes that compute, of which a model for embeddings refuses some and one with a head refuses others.
COMPUTES = "^/$|^/(invocations|predict|rerank|embed_all|embed_sparse)$|/rerank$|/infer$|:(predict|classify|regress)$|^/api/v1/inferences$"
SHARE_OF_A_HEAD = 0.125


def judged(schemathesis, url, seconds, *more):
    """1 if it found something."""
    command = [schemathesis, "--config-file", CONFIG, "run", f"{url}/openapi.json", "--max-time", str(seconds), "--no-color", *more]
    # It looks at the clock between requests, each of which has an end of its own.
    with tempfile.TemporaryDirectory() as folder:
        return int(subprocess.run(command, cwd=folder, timeout=seconds + 300).returncode != 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemathesis", required=True, help="the program")
    parser.add_argument("--binary", default=os.environ.get("EREMOIS_TEST_BIN", "target/debug/eremois"))
    parser.add_argument("--seconds", type=int, default=int(os.environ.get("EREMOIS_TEST_SCHEMA_SECONDS", "90")))
    arguments = parser.parse_args()
    heads = (CLASSIFY, TOKEN_CLASSIFY, FILL_MASK, RERANK)
    of_head = max(1, int(arguments.seconds * SHARE_OF_A_HEAD))
    binary, program = os.path.abspath(arguments.binary), os.path.abspath(arguments.schemathesis)
    with tempfile.TemporaryDirectory() as data, started(binary, data) as url:
        failed = judged(program, url, max(1, arguments.seconds - len(heads) * of_head))
    for head in heads:
        print(f"\n{head.name}", flush=True)
        with served(binary, head) as url:
            failed |= judged(program, url, of_head, "--include-path-regex", COMPUTES)
    return failed


if __name__ == "__main__":
    sys.exit(main())
