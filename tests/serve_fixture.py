"""Real reward servers for tests: `python -m rlkit.serve` in a process of its own, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from reward_samples import make_group

from rlkit.experience import Group
from rlkit.experience.wire import encode, request_body

ROOT = Path(__file__).resolve().parent.parent


class Server:
    """A server; it finds the modules in tests/."""

    def __init__(self, log: Path, *arguments: str, port: int = 0, environment: dict[str, str] | None = None) -> None:
        self.log = log
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        variables = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(environment or {})}
        command = [sys.executable, "-m", "rlkit.serve", *arguments, f"serve.port={port}", "serve.threads=1"]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=variables, cwd=log.parent, start_new_session=True
            )
        self.url = ""

    @property
    def text(self) -> str:
        """What it printed so far."""
        return self.log.read_text()

    def ready(self, seconds: float = 60) -> Server:
        """Wait until it serves. Raises AssertionError with its output if it does not."""
        deadline = time.monotonic() + seconds
        while " on http://" not in self.text:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.05)
        self.url = "http://" + self.text.partition(" on http://")[2].split()[0]
        return self

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    def family(self) -> list[psutil.Process]:
        """The server and all it started."""
        server = psutil.Process(self.process.pid)
        return [server, *server.children(recursive=True)]

    def kill(self) -> list[psutil.Process]:
        """kill -9 on the server alone; returns what had belonged to it."""
        family = self.family()
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=10)
        return family

    def end(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end; its exit code."""
        if self.process.poll() is None:
            os.kill(self.process.pid, number)
        return self.process.wait(timeout=90)

    def post(self, *groups: Group, **options: Any) -> httpx.Response:
        """Ask for scores."""
        body = request_body([encode(group) for group in groups], options.pop("deadline_seconds", 60.0))
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        return httpx.post(f"{self.url}/v1/score", content=body, headers=headers, timeout=60, trust_env=False, **options)

    def until_busy(self, seconds: float = 30) -> None:
        """Wait until a process works on a call."""
        deadline = time.monotonic() + seconds
        while all(worker["busy_seconds"] is None for worker in self.get("/health").json()["workers"]):
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)

    def until_queued(self, samples: int, seconds: float = 30) -> None:
        """Wait until that many samples wait."""
        deadline = time.monotonic() + seconds
        while f"rlkit_queued_samples {samples}.0" not in self.get("/metrics").text:
            assert time.monotonic() < deadline, self.get("/metrics").text
            time.sleep(0.02)

    def get(self, path: str, **headers: str) -> httpx.Response:
        """Ask for something else."""
        return httpx.get(self.url + path, headers=headers, timeout=20, trust_env=False)


def misbehaving(order: str, name: str = "a") -> Group:
    """A group that tells reward_samples.Misbehaving what to do."""
    return make_group(name, [order, "one two"])


def left_after(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Which of these still run."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
