"""Every benchmark still runs, over as little as it takes; what it measures is of no interest here."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from page_fixture import needs_chromium

ROOT = Path(__file__).resolve().parent.parent
SOLUTIONS = ROOT.parent / "shared" / "data" / "gsm8k" / "model_solutions.jsonl"
SMALL = {
    "architectures": "llama",
    "asynchrony": "--quick",
    "attention": "--shapes W1 --repeats 1",
    "data_memory": "2 1",
    "episodes": "--turns 2 --tokens 2 --repeats 1",
    "logprobs": "--rows 8 --vocabulary 1000 --width 16 --elements 4096 --repeats 1",
    "memory": "--presets",
    "polar": "groups=2 samples=2 seconds=1",
    "ranks": "--ranks 1 2 --tokens 64 --prompt-tokens 16",
    "structure": "",
    "templates": "",
    "verdicts": "",
    "verifiers": f"--solutions {SOLUTIONS} --cores 1 --repeat 1",
    "view": "--samples 600 --runs 2",
    "view_page": "--samples 600 --runs 2",
}
RUN_ELSEWHERE = {
    "controls": "has parts for the others",
    "gate": "make bench",
    "learning": "hours; its settings are dry-run by tests/rlkit/config",
    "simulation": "asynchrony's",
    "speed": "make bench",
    "speed_bare": "make bench",
    "speed_trl": "needs TRL in an environment of its own",
    "trl_links": "needs TRL in an environment of its own",
}


def test_every_benchmark_is_run_by_something() -> None:
    assert SMALL.keys() | RUN_ELSEWHERE.keys() == {path.stem for path in (ROOT / "benchmarks").glob("*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_runs(name: str) -> None:
    if name == "verifiers" and not SOLUTIONS.is_file():
        pytest.skip(f"{SOLUTIONS} is not there")
    if name == "view_page":
        needs_chromium()
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *shlex.split(SMALL[name])],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    # those of the view exit with 1 if something takes longer than a second, as it may on a busy machine
    slow = name.startswith("view") and done.stderr.startswith("above ")
    assert done.returncode == 0 or slow, done.stderr[-3000:]
    assert done.stdout.strip()
