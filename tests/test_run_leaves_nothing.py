"""After any end of a run: no process of it, no Ray session, no shared memory. And what it says while it waits."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from run_fixture import Run

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
    """Ray's session folder, and the files in /dev/shm that processes of the run have mapped (if they have a name)."""
    found = set()
    for process in run.processes():
        try:
            sessions = re.findall(r"/tmp/ray/session_[\w-]+", " ".join(process.cmdline()))
            maps = Path(f"/proc/{process.pid}/maps").read_text()
        except (OSError, psutil.NoSuchProcess):
            continue
        found |= {Path(path) for path in (*sessions, *re.findall(r"(/dev/shm/\S+)$", maps, re.MULTILINE))}
    assert any(path.parent == Path("/tmp/ray") for path in found)
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
def test_a_run_that_waits_says_for_whom_and_ends_with_the_cause(start: Start) -> None:
    run = start(ENDLESS, "trainer.step_timeout_seconds=24", "trainer.report_waits_after=0.2")
    run.wait_for_steps(1)
    actor(run, "RolloutWorker").suspend()
    assert run.end(120) == 1, run.text
    lines = [line for line in run.text.splitlines() if line.startswith("waiting long: ")]
    assert 2 <= len(lines) <= 6, run.text
    worker = r"the rollout pool for rollout worker 0 to (sample \d of 4 groups: \d{8} of prompt \S+|answer `prepare`)"
    assert all(re.search(worker, line) for line in lines), lines
    assert lines == [
        line[9:] for line in (run.folder / "logs/console.log").read_text().splitlines() if line[9:] in lines
    ]
    error = run.text.partition("\nrlkit: ")[2]
    assert re.search(r"waited more than trainer\.step_timeout_seconds=24 s for", error), error
    assert re.search(worker, error), error
    assert run.left_after(20) == []
