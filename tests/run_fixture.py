"""Whole runs of `python -m rlkit.train` in processes of their own, and which processes belong to one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
MARK = "RLKIT_TEST_RUN"
SMALL = (
    "reward=rule",
    "trainer.prompts_per_step=4",
    "algorithm.samples_per_prompt=4",
    "trainer.evaluation_prompts=8",
    "rollout.max_response_tokens=48",
    "rollout.memory_gib=0.1",
    "cluster.threads_per_actor=1",
    "cluster.object_store_gib=0.1",
)


class Run:
    """A run in the background. All its processes inherit a mark in their environment, which finds them again."""

    def __init__(self, folder: Path, *arguments: str, cwd: Path = ROOT) -> None:
        self.folder, self.mark = folder / "run", uuid.uuid4().hex
        self.output = folder / "output.txt"
        environment = {**os.environ, MARK: self.mark, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "rlkit.train", *SMALL, *arguments, f"run_dir={self.folder}"]
        with self.output.open("w") as file:
            # A session of its own, so that Ctrl-C reaches what it would reach in a terminal: the whole process group.
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=cwd, start_new_session=True
            )

    @property
    def text(self) -> str:
        """What the run printed so far."""
        return self.output.read_text(errors="replace")

    def records(self, name: str = "metrics") -> list[dict[str, Any]]:
        """The lines of metrics.jsonl or samples.jsonl so far."""
        file = self.folder / f"{name}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def end(self, seconds: float = 240) -> int:
        """Wait for the exit code."""
        return self.process.wait(timeout=seconds)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 180) -> None:
        """Raises AssertionError with the run's output if the run ends, or the time is over, before `condition`."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the run ended too early:\n{self.text}"
            assert time.monotonic() < deadline, f"waited {seconds} s in vain:\n{self.text}"
            time.sleep(0.1)

    def wait_for_steps(self, steps: int) -> None:
        """Until that many training steps are in metrics.jsonl."""
        self.wait_until(lambda: sum("policy/loss" in record for record in self.records()) >= steps)

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)

    def processes(self) -> list[psutil.Process]:
        """Everything alive that the run started, itself included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def left_after(self, seconds: float) -> list[str]:
        """Command lines of the processes that are still there after at most so many seconds."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        lines = []
        for process in left:
            try:
                lines.append(" ".join(process.cmdline())[:200])
            except psutil.NoSuchProcess:
                continue
        return lines

    def clean_up(self) -> None:
        """Kill what is left."""
        for process in self.processes():
            process.kill()
        self.process.wait(timeout=30)
