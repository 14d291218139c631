"""Runs the examples of docs/examples against a server of its own, and receives its callbacks with Standard Webhooks' library.

    NODE_PATH=FOLDER/node_modules python examples.py [--binary target/debug/eremois]

FOLDER is where package.json was installed. Exits 1 with the list of what fails.
"""

import argparse
import base64
import http.server
import json
import os
import pathlib
import secrets
import subprocess
import sys
import tempfile
import threading
import urllib.request

import standardwebhooks

from judging import started

HERE = pathlib.Path(__file__).parent
EXAMPLES = HERE.parent.parent / "docs" / "examples"
SECRET = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


class Receiver(http.server.BaseHTTPRequestHandler):
    """Takes a callback the second time it comes."""

    got = []
    came = threading.Event()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.got.append((dict(self.headers), body))
        self.send_response(503 if len(self.got) == 1 else 204)
        self.end_headers()
        if len(self.got) == 2:
            self.came.set()

    def log_message(self, *_):
        pass


def callbacks(url):
    """The library that clients use takes what is sent, and the same id each time."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hook = f"http://127.0.0.1:{server.server_port}/hook"
    body = {"input": "Tell me when you are done", "mode": "async", "callback": hook}
    request = urllib.request.Request(f"{url}/api/v1/inferences", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 202, answer.status
        accepted = json.load(answer)
    assert Receiver.came.wait(60), f"told {len(Receiver.got)} times"
    webhook = standardwebhooks.Webhook(SECRET)
    for headers, body in Receiver.got:
        told = webhook.verify(body.decode(), {name.lower(): value for name, value in headers.items()})
        assert told["id"] == accepted["id"] and told["status"] == "succeeded", told
        try:
            webhook.verify(body.decode().replace("succeeded", "failed"), {k.lower(): v for k, v in headers.items()})
            raise AssertionError("a changed body is taken")
        except standardwebhooks.WebhookVerificationError:
            pass
    ids = {headers["webhook-id"] for headers, _ in Receiver.got}
    assert len(ids) == 1, ids
    server.shutdown()


def python(url):
    subprocess.run([sys.executable, EXAMPLES / "find_again.py", url], check=True, timeout=120)


def typescript(url):
    run = ["node", HERE / "typescript.js", EXAMPLES / "find_again.ts", url]
    subprocess.run(run, check=True, timeout=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=os.environ.get("EREMOIS_TEST_BIN", "target/debug/eremois"))
    arguments = parser.parse_args()
    settings = {"EREMOIS_JOBS__CALLBACK_SECRET": SECRET, "EREMOIS_JOBS__CALLBACK_NETWORKS": "127.0.0.0/8"}
    failures = []
    with tempfile.TemporaryDirectory() as data, started(os.path.abspath(arguments.binary), data, settings) as url:
        for run in [python, typescript, callbacks]:
            try:
                run(url)
                print(f"ok    {run.__name__}")
            except Exception as error:
                failures.append(run.__name__)
                print(f"FAIL  {run.__name__}: {error!r}")
    print(f"{len(failures)} failed" if failures else "all examples ran")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
