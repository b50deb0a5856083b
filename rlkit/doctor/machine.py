"""Check the machine: GPU and driver, memory, shared memory, files, loopback, sandbox, caches."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlkit.config.machine import host_memory
from rlkit.config.memory import size_text
from rlkit.doctor.findings import Finding

TRIED_PYTHON = (3, 11)
COMMAND_SECONDS = 20.0
CUDA_SECONDS = 120.0
"""Enough for loading torch from a cold disk, and for a driver that wakes up."""
MEMORY, DISK, SHARED = 8 * 2**30, 5 * 2**30, 2**29
"""Bytes: the README's requirements, and Ray's smallest object store."""
FILES = 4096


def machine_findings(build: str | None) -> Iterator[Finding]:
    """Yield the machine's findings. `build`: torch's, as returned by `torch_build`."""
    tried = sys.version_info[:2] == TRIED_PYTHON
    yield _judged("Python", platform.python_version(), "" if tried else "; rlkit was tried with 3.11")
    here = f"{platform.system()} {platform.machine()}"
    yield _judged("system", here, "" if here == "Linux x86_64" else "; runs were tried only on Linux x86_64")
    yield from gpu_findings(build)
    yield from _memory()
    yield _open_files()
    yield _loopback()
    yield _bubblewrap()
    yield _cache()


def _judged(name: str, text: str, doubt: str) -> Finding:
    return Finding(name, text + doubt, "note" if doubt else "ok")


def _said(command: Sequence[str], seconds: float = COMMAND_SECONDS) -> str | None:
    """Return what a command printed, or None if it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def has_gpu() -> bool:
    return bool(shutil.which("nvidia-smi") and (_said(["nvidia-smi", "--list-gpus"]) or "").strip())


def gpu_findings(build: str | None) -> Iterator[Finding]:
    if not has_gpu():
        there = "nvidia-smi lists none" if shutil.which("nvidia-smi") else "none (no nvidia-smi)"
        yield Finding("GPU", f"{there}: runs use the CPU")
        return
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    cards = (_said(asked) or "").splitlines()
    for card in dict.fromkeys(cards):
        yield Finding("GPU", f"{cards.count(card)} x {card} (name, memory, driver)")
    if build is None or build == "cpu":
        return
    newest = re.search(r"CUDA Version:\s*(\d+)", _said(["nvidia-smi"]) or "")
    if newest and int(newest[1]) < int(build.partition(".")[0]):
        text = f"for CUDA {newest[1]}, but torch was built for {build}: a newer driver is needed"
        yield Finding("driver", text, "lacks")
        return
    counted = _said([sys.executable, "-c", "import torch; print(torch.cuda.device_count())"], CUDA_SECONDS)
    seen, visible = int(counted or 0), os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    yield Finding("CUDA", f"GPUs that torch sees: {seen}{hidden}", "ok" if seen else "lacks")


def _memory() -> Iterator[Finding]:
    if sys.platform == "linux":
        memory = host_memory()
        enough = memory >= MEMORY * 0.95  # the kernel's own share is not counted
        few = "" if enough else "; the smallest run needs 8 GiB"
        yield _judged("memory", f"{size_text(memory)}, {os.cpu_count()} cores", few)
        shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
        few = "" if shared >= SHARED else ": Ray keeps objects on disk instead, which is slow; docker run --shm-size=8g"
        yield _judged("/dev/shm", size_text(shared), few)
    for folder in dict.fromkeys((Path.cwd(), Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        few = "" if free >= DISK else "; checkpoints and Ray's session need 5 GiB"
        yield _judged("disk", f"{size_text(free)} free in {folder}", few)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "unlimited" if hard == resource.RLIM_INFINITY else hard
    few = "" if hard == resource.RLIM_INFINITY or hard >= FILES else f"; Ray wants {FILES} or more (limits.conf)"
    return _judged("open files", f"{soft} (hard limit: {most})", few)


def _loopback() -> Finding:
    """Check the loopback interface, over which Ray, endpoints and servers communicate."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        return Finding("loopback", f"no port on 127.0.0.1 can be opened and reached: {error}", "lacks")
    return Finding("loopback", "ports on 127.0.0.1 open and answer")


def _bubblewrap() -> Finding:
    used = "reward=code and tools of kind python run in it"
    if shutil.which("bwrap") is None:
        return Finding("bubblewrap", f"not installed (apt-get install -y bubblewrap); {used}", "note")
    if _said(["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]) is None:
        return Finding("bubblewrap", f"cannot start: are user namespaces allowed? {used}", "note")
    return Finding("bubblewrap", "works")


def _cache() -> Finding:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    folder = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()
    models, data = (len(list(folder.glob(f"{kind}--*"))) for kind in ("models", "datasets"))
    held = f"{folder}: {models} models, {data} data sets"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("Hugging Face", f"offline; {held}")
    return Finding("Hugging Face", f"{held}. Without a network set HF_HUB_OFFLINE=1, or each look-up waits")
