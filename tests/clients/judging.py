"""What the judges share: the reference, a server of their own, and a record of what was checked.

A judge is a class made from a server's address, whose methods `test_…` raise on what is wrong. Its `client` is the package
that it asks with, whose version is recorded, unless its `version` says it; without one it is named by itself. Its `subject`, where it
has one, stands before the names of its checks. What it asks is seen where requests are written: by http.client (urllib, requests),
h11 (httpx and its kin), geventhttpclient or grpc; of a test that has another program ask, it is what the test returns.
"""

import base64
import contextlib
import http.client
import importlib.metadata
import json
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time
import traceback
import urllib.error
import urllib.request

import numpy

HERE = pathlib.Path(__file__).parent
REFERENCE = json.loads((HERE / "reference.json").read_text())
TEXTS = REFERENCE["texts"]
# The bundled weights are 8-bit; the model's README promises this of them.
LEAST_COSINE = 0.999


def unpack(text):
    return numpy.frombuffer(base64.b64decode(text), "<f4")


EXPECTED = [unpack(row) for row in REFERENCE["embeddings"]]


def same(row, expected, what):
    row = numpy.asarray(row, numpy.float32)
    assert row.shape == expected.shape, f"{what}: shape {row.shape}, expected {expected.shape}"
    cosine = float(row @ expected / (numpy.linalg.norm(row) * numpy.linalg.norm(expected)))
    assert cosine >= LEAST_COSINE, f"{what}: cosine {cosine:.6f} below {LEAST_COSINE}"
    return cosine


def raises(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


# Whether what is asked is left out of the record.
is_aside = False


@contextlib.contextmanager
def aside():
    """Within it a judge asks for what it compares with: not as its client, and not recorded."""
    global is_aside
    is_aside, before = True, is_aside
    try:
        yield
    finally:
        is_aside = before


class Requests:
    """Method and path of each request that this process sends, whichever library writes it."""

    def __init__(self):
        self.seen = set()
        self.watch(http.client.HTTPConnection, "putrequest", lambda method, url, *_, **__: (method, url))
        with contextlib.suppress(ImportError):
            import h11

            self.watch(h11.Connection, "send", lambda event: (event.method, event.target) if isinstance(event, h11.Request) else None)
        with contextlib.suppress(ImportError):
            from geventhttpclient.client import HTTPClient

            self.watch(HTTPClient, "request", lambda method, request_uri, *_, **__: (method, request_uri))
        with contextlib.suppress(ImportError):
            import grpc

            self.watch_calls(grpc)

    def watch_calls(self, grpc):
        """Of a channel's calls the method is known where the stub is made, so each is wrapped there."""
        channel = type(grpc.insecure_channel("127.0.0.1:9"))
        for kind in ("unary_unary", "stream_stream"):
            original = getattr(channel, kind)

            def watched(this, method, *arguments, original=original, **named):
                call = original(this, method, *arguments, **named)

                def recorded(*call_arguments, **call_named):
                    self.add(f"RPC {method.lstrip('/')}")
                    return call(*call_arguments, **call_named)

                return recorded

            setattr(channel, kind, watched)

    def watch(self, owner, name, request_of):
        original = getattr(owner, name)

        def watched(this, *arguments, **named):
            request = request_of(*arguments, **named)
            if request is not None:
                method, path = (part.decode() if isinstance(part, bytes) else part for part in request)
                path = path.split("?")[0]
                self.add(f"{method} /{path.lstrip('/')}")
            return original(this, *arguments, **named)

        setattr(owner, name, watched)

    def add(self, request):
        if not is_aside:
            self.seen.add(request)

    def take(self):
        taken, self.seen = sorted(self.seen), set()
        return taken


def version_of(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def judge(url, classes, record=None):
    """Runs all tests of these classes; writes what was checked into the file `record`. 1 if one failed."""
    requests, failures, checks = Requests(), [], []
    for judge_class in classes:
        judge = judge_class(url)
        client = getattr(judge_class, "client", judge_class.__name__)
        subject = f"{judge_class.subject}: " if hasattr(judge_class, "subject") else ""
        for name in [name for name in dir(judge) if name.startswith("test_")]:
            check = subject + name.removeprefix("test_").replace("_", " ")
            label = f"{judge_class.__name__}: {check}"
            requests.take()
            asked = None
            try:
                asked = getattr(judge, name)()
                print(f"ok    {label}")
            except Exception:
                failures.append(label)
                print(f"FAIL  {label}\n{traceback.format_exc()}")
            passed = label not in failures
            version = getattr(judge_class, "version", None) or version_of(client)
            own = requests.take()
            asked = own if asked is None else sorted(asked)
            checks.append({"client": client, "version": version, "check": check, "passed": passed, "requests": asked})
    print(f"{len(failures)} failed" if failures else "all judged right")
    if record:
        pathlib.Path(record).write_text(json.dumps({"routes": routes(url), "checks": checks}, indent=1) + "\n")
    return 1 if failures else 0


def routes(url):
    """All operations of the server's document: `{"route": "GET /v1/models", "of": "OpenAI"}`."""
    with urllib.request.urlopen(f"{url}/openapi.json", timeout=60) as response:
        paths = json.load(response)["paths"]
    return [
        {"route": f"{method.upper()} {path}", "of": operation["tags"][0]}
        for path, item in paths.items()
        for method, operation in item.items()
    ]


def wait_until_ready(url, process, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode} before it was ready")
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise SystemExit(f"the server was not ready within {seconds} s")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def grpc_address():
    """Where the judged server takes gRPC."""
    return os.environ["EREMOIS_TEST_GRPC"]


@contextlib.contextmanager
def started(binary, data, settings=None, port=0):
    """The address of a server of its own; it must end with 0 when asked to."""
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    environment = dict(os.environ, EREMOIS_API__LISTEN=f"127.0.0.1:{port}", EREMOIS_DATABASE__PATH=data, **(settings or {}))
    environment.setdefault("EREMOIS_LOG__FILTER", "warn")
    process = subprocess.Popen([binary, "serve"], env=environment)
    try:
        wait_until_ready(url, process, 120)
        yield url
        process.send_signal(signal.SIGTERM)
        code = process.wait(30)
        assert code == 0, f"SIGTERM: exit {code}"
    finally:
        if process.poll() is None:
            process.kill()


def add_arguments(parser):
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--binary", default=os.environ.get("EREMOIS_TEST_BIN", "target/debug/eremois"))
    target.add_argument("--url", help="a server that runs; EREMOIS_TEST_GRPC is where it takes gRPC")
    parser.add_argument("--port", type=int, default=0, help="for --binary; 0 takes a free one")
    parser.add_argument("--record", help="a file for what was checked, which scripts/compatibility reads")


def judge_arguments(arguments, classes):
    """Judges the server that the arguments name."""
    if arguments.url:
        return judge(arguments.url.rstrip("/"), classes, arguments.record)
    binary = os.path.abspath(arguments.binary)
    os.environ["EREMOIS_TEST_GRPC"] = f"127.0.0.1:{free_port()}"
    settings = {"EREMOIS_API__GRPC_LISTEN": grpc_address(), "EREMOIS_AI__MODEL_CONTROL": "explicit"}
    with tempfile.TemporaryDirectory() as data, started(binary, data, settings, port=arguments.port) as url:
        return judge(url, classes, arguments.record)
