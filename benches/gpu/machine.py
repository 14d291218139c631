"""What a run happens on: the machine's facts, and the binaries it was given."""

import hashlib
import json
import lzma
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

from worker import Failed, Skipped, say


def nvidia_smi(*fields):
    """The fields of the first GPU, or None."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return [field.strip() for field in lines[0].split(",")] if done.returncode == 0 and lines else None


def slug(name):
    """`h100` of "NVIDIA H100 80GB HBM3"; the whole name where there is no such word."""
    model = re.search(r"\b[A-Z]+\d+[A-Z]*\b", name)
    return re.sub(r"[^a-z0-9]+", "-", (model[0] if model else name).lower()).strip("-")


def facts(run):
    names = ["name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory", "power.limit", "temperature.gpu"]
    gpu = nvidia_smi(*names)
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "gpu": dict(zip(names, gpu)) if gpu else None,
        "cpu": f"{cpu[1].strip() if cpu else platform.processor()}, {os.cpu_count()} cores",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def library_folders(major):
    """Where the CUDA libraries of the binaries lie: those of torch's wheels, or an installed toolkit."""
    site = [Path(path) for path in sys.path if path.endswith("-packages")]
    wheels = [folder for path in site for folder in sorted(path.glob("nvidia/*/lib"))]
    installed = [Path("/usr/local/cuda/lib64"), Path(f"/usr/local/cuda-{major}/lib64")]
    names = [f"libcublas.so.{major}", f"libcublasLt.so.{major}", "libcurand.so.10"]
    return [str(folder) for folder in wheels + installed if any((folder / name).exists() for name in names)]


def unpack(run, scratch):
    """The binaries in a folder of their own, each as its manifest has it."""
    folder = run.args.bin_dir
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except OSError as error:
        if run.is_dry:
            raise Skipped(f"{error}: nothing was built") from None
        raise Failed(f"{error}: `scripts/gpu build` makes it") from None
    for name, entry in manifest["binaries"].items():
        content = (folder / entry["file"]).read_bytes()
        content = lzma.decompress(content) if entry["file"].endswith(".xz") else content
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise Failed(f"{folder / entry['file']}: not the checksum of the manifest")
        path = scratch / name
        path.write_bytes(content)
        path.chmod(0o755)
        run.binaries[name] = path
    folders = library_folders(manifest["cuda"].split(".")[0])
    if not folders and not run.is_dry:
        say("no folder with cuBLAS was found: the loader's own search must do")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("EREMOIS_")}
    paths = [*folders, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    run.environment = inherited | ({"LD_LIBRARY_PATH": ":".join(paths)} if paths else {})
    return {key: manifest[key] for key in ("commit", "profile", "archs", "cuda", "built")} | {"libraries": folders}
