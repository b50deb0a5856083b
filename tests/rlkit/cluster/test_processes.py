"""Child processes: none outlives its parent or its deadline, nor does what it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from paths import PYTHONPATH

from rlkit.cluster import processes

CHILD = """
import os, signal, subprocess, sys, time
from rlkit.cluster.processes import die_with_parent
die_with_parent()
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen(["sleep", "120"])
print(os.getpid(), grandchild.pid, flush=True)
time.sleep(120)
"""


def child(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    return processes.start([sys.executable, "-c", CHILD, *arguments], folder / "log", environment)


def linger(pids: Path) -> None:
    pids.write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(("arguments", "code"), [((), -signal.SIGTERM), (("deaf",), -signal.SIGKILL)])
def test_ended_in_order_or_by_force_with_what_it_started(arguments: tuple[str, ...], code: int, tmp_path: Path) -> None:
    process = child(tmp_path, *arguments)
    until(lambda: (tmp_path / "log").read_text().endswith("\n"))
    assert not processes.wait(process, 0.05)
    processes.end([process], 1.0)
    assert process.returncode == code
    until(lambda: not any(map(alive, map(int, (tmp_path / "log").read_text().split()))), 5)


@pytest.mark.parametrize("kind", ["start", "spawn"])
def test_a_child_dies_with_a_parent_that_is_killed_even_if_it_is_stopped(kind: str, tmp_path: Path) -> None:
    started = {
        "spawn": "processes.spawn(linger, Path(sys.argv[1]) / 'log')",
        "start": "child(Path(sys.argv[1]))",
    }[kind]
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys, time\nfrom test_processes import *\nif __name__ == '__main__': kept = {started}; time.sleep(120)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{PYTHONPATH}"}
    parent = subprocess.Popen([sys.executable, str(program), str(tmp_path)], env=environment)
    try:
        until(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text())
        pid = int((tmp_path / "log").read_text().split()[0])
        assert alive(pid)
        parent.kill()
        parent.wait()
        until(lambda: not alive(pid), 5)
    finally:
        parent.kill()
        parent.wait()


def test_children_are_killed_although_they_have_left_the_group(tmp_path: Path) -> None:
    with (tmp_path / "pid").open("wb") as output:
        process = subprocess.Popen(["bash", "-c", "setsid sleep 120 & echo $!; wait"], stdout=output)
    until(lambda: (tmp_path / "pid").read_text().endswith("\n"))
    processes.kill_with_children(process, 5.0)
    assert processes.wait(process, 5.0) and process.returncode == -signal.SIGKILL
    until(lambda: not alive(int((tmp_path / "pid").read_text())), 5)
