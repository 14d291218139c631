"""Small models of tests/fixtures, each served alone: what clients name no model for, they ask of the default one."""

import contextlib
import json
import os
import pathlib
import re
import struct
import subprocess
import tempfile
from typing import NamedTuple

import numpy

from judging import free_port, grpc_address, started

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"
# What transformers makes of the models of heads/.
REFERENCES = json.loads((FIXTURES / "heads/references.json").read_text())


class Model(NamedTuple):
    # Of tests/fixtures: a folder, or a file that Keras wrote.
    path: str
    task: str

    @property
    def name(self):
        return pathlib.Path(self.path).stem

    @property
    def labels(self):
        """Of a classifier, in their order."""
        names = json.loads((FIXTURES / self.path / "config.json").read_text())["id2label"]
        return [names[str(i)] for i in range(len(names))]


def safetensors(path):
    """The tensors of a file of tests/fixtures by their names.

    Source: the format's description in huggingface/safetensors, `README.md`.
    """
    content = (FIXTURES / path).read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    types = {"F32": "<f4", "I64": "<i8"}
    tensors = {}
    for name, tensor in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in tensor["data_offsets"])
            tensors[name] = numpy.frombuffer(content[start:end], types[tensor["dtype"]]).reshape(tensor["shape"])
    return tensors


@contextlib.contextmanager
def served(binary, model):
    """The address of a server of its own, with this model alone, which was imported into a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        models, data = os.path.join(folder, "models"), os.path.join(folder, "data")
        os.mkdir(models)
        os.environ["EREMOIS_TEST_GRPC"] = f"127.0.0.1:{free_port()}"
        settings = {
            "EREMOIS_AI__MODELS_DIR": models,
            "EREMOIS_API__GRPC_LISTEN": grpc_address(),
            "EREMOIS_LOG__FILTER": "warn",
        }
        kind = [] if (FIXTURES / model.path).is_dir() else ["keras"]
        command = [binary, "models", "import", *kind, str(FIXTURES / model.path), "--name", model.name]
        made = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        manifest = pathlib.Path(models, model.name, "manifest.toml")
        # Encoders are published with a masked-LM head, whatever they are used for: it is the operator who says.
        manifest.write_text(re.sub('(?m)^task = ".*"$', f'task = "{model.task}"', manifest.read_text(), count=1))
        with started(binary, data, settings) as url:
            yield url
