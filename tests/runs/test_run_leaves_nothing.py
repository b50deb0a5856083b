"""After any end of a run: no process of it, no Ray session, no shared memory. And what it says while it waits."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from run_fixture import Run

import rlkit.cluster.janitor
import rlkit.run
from rlkit.cluster.janitor import TOKEN

ENDLESS = "trainer.total_steps=1000"
Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    runs: list[Run] = []

    def one(*arguments: str) -> Run:
        runs.append(Run(tmp_path, *arguments))
        return runs[-1]

    yield one
    for run in runs:
        run.clean_up()


def actor(run: Run, kind: str) -> psutil.Process:
    (found,) = [process for process in run.processes() if f"ray::{kind}" in " ".join(process.cmdline())]
    return found


def traces(run: Run) -> set[Path]:
    """The folder of Ray and temporary files; files in /dev/shm that processes have mapped and that have a name."""
    found = set()
    for process in run.processes():
        try:
            sessions = re.findall(r"/tmp/rlkit-\w+(?=/ray/session_)", " ".join(process.cmdline()))
            maps = Path(f"/proc/{process.pid}/maps").read_text()
        except (OSError, psutil.NoSuchProcess):
            continue
        found |= {Path(path) for path in (*sessions, *re.findall(r"(/dev/shm/\S+)$", maps, re.MULTILINE))}
    assert any(path.parent == Path("/tmp") for path in found)
    return found


def left_of(paths: set[Path], seconds: float) -> list[str]:
    end = time.monotonic() + seconds
    while (left := [str(path) for path in paths if path.exists()]) and time.monotonic() < end:
        time.sleep(0.2)
    return left


ENDS: dict[str, tuple[Callable[[Run], object], int]] = {
    "after its last step": (lambda run: None, 0),
    "Ctrl-C": (Run.interrupt, 130),
    "SIGTERM": (lambda run: run.process.send_signal(signal.SIGTERM), 143),
    "a failure": (lambda run: actor(run, "LearnerWorker").kill(), 1),
    "kill -9": (lambda run: run.process.kill(), -9),
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left_after(end: str, start: Start) -> None:
    bring_about, code = ENDS[end]
    run = start("trainer.total_steps=3" if code == 0 else ENDLESS)
    run.wait_for_steps(1)
    paths = traces(run)
    assert any("/dev/shm/" in str(path) for path in paths), "the verifier's semaphores"
    bring_about(run)
    assert run.end(120) == code, run.text
    assert run.left_after(20) == []
    assert left_of(paths, 20) == []
    logs = list((run.folder / "logs").glob("ray/*"))
    assert bool(logs) == (end in ("a failure", "kill -9")), "Ray's own logs are kept where they may say why"


@pytest.mark.slow
def test_nothing_is_left_after_a_kill_while_ray_starts(start: Start) -> None:
    run = start(ENDLESS)
    run.wait_until(lambda: any("gcs_server" in process.name() for process in run.processes()))
    (driver,) = [process for process in run.processes() if process.pid == run.process.pid]
    folders = {Path(value) for process in run.processes() if (value := process.environ().get("TMPDIR", ""))}
    assert folders and all(folder.name.startswith("rlkit-") for folder in folders)
    driver.kill()
    assert run.end(30) == -9
    assert run.left_after(30) == []
    assert left_of(folders, 20) == []


def test_the_janitor_outwaits_the_end_of_a_run() -> None:
    assert rlkit.cluster.janitor.SECONDS > 2 * rlkit.run.END_SECONDS


def test_the_janitor_removes_what_killed_processes_leave_and_nothing_else(tmp_path: Path) -> None:
    """A process of the run that made a semaphore and shared memory, and one of somebody else."""
    token, folder = uuid.uuid4().hex, tmp_path / "rlkit-x"
    (folder / "ray" / "session_1_2" / "logs").mkdir(parents=True)
    program = (
        "import multiprocessing, os, time; from multiprocessing import shared_memory, resource_tracker\n"
        "lock = multiprocessing.get_context('spawn').Lock()\n"
        "memory = shared_memory.SharedMemory(create=True, size=100)\n"
        "print(resource_tracker._resource_tracker._pid, memory.name, 'sem.' + lock._semlock.name[1:], flush=True)\n"
        "time.sleep(100)"
    )
    processes, made = [], []
    for environment in ({TOKEN: token}, {}):
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        assert process.stdout is not None
        tracker, *names = process.stdout.readline().split()
        made.append({Path("/dev/shm") / name for name in names})
        assert len(made[-1]) == 2 and all(path.exists() for path in made[-1])
        processes += [psutil.Process(process.pid), psutil.Process(int(tracker))]
    try:
        with rlkit.cluster.janitor.janitor(token, folder, tmp_path / "logs"):
            pass
        time.sleep(1)
        for process in (processes[1], processes[0]):  # as Ray does: the tracker cannot clear away
            process.kill()
        assert left_of({*made[0], folder}, 20) == []
        assert all(path.exists() for path in made[1])
    finally:
        for process in processes:
            if process.is_running():
                process.kill()
        for path in set().union(*made):
            path.unlink(missing_ok=True)


@pytest.mark.slow
def test_a_run_that_waits_says_for_whom_and_ends_with_the_cause(start: Start) -> None:
    run = start(ENDLESS, "trainer.step_timeout_seconds=24", "trainer.report_waits_after=0.2")
    run.wait_for_steps(1)
    actor(run, "RolloutWorker").suspend()
    assert run.end(120) == 1, run.text
    lines = [line for line in run.text.splitlines() if line.startswith("still waiting: ")]
    assert 2 <= len(lines) <= 6, run.text
    worker = r"for rollout worker 0 to (sample \d of 4 groups: \d{8} of prompt \S+|answer `prepare`)"
    assert all(re.search(f"the rollout pool {worker}", line) for line in lines), lines
    assert lines == [
        line[9:] for line in (run.folder / "logs/console.log").read_text().splitlines() if line[9:] in lines
    ]
    error = run.text.partition("\nrlkit: ")[2]
    assert re.search(r"waited more than trainer\.step_timeout_seconds=24 s for", error), error
    assert re.search(worker, error), error
    assert run.left_after(20) == []
