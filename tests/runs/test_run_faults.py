"""kill -9 of each kind of actor in the middle of a run: replaced without a trace, or ended with the cause."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from run_fixture import Run

STEPS = 6
OPTIONS = ("algorithm=grpo", f"trainer.total_steps={STEPS}", "trainer.save_every_steps=1", "trainer.keep_checkpoints=9")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def one(name: str, *arguments: str) -> Run:
        (tmp_path / name).mkdir(exist_ok=True)
        runs.append(Run(tmp_path / name, *OPTIONS, *arguments))
        return runs[-1]

    yield one
    for run in runs:
        run.clean_up()


def actors(run: Run, kind: str) -> list[psutil.Process]:
    """The processes of one kind of actor."""
    found = []
    for process in run.processes():
        try:
            if (process.cmdline() or [""])[0].startswith(f"ray::{kind}"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def kill_in_mid_run(run: Run, kind: str) -> None:
    run.wait_for_steps(2)
    (victim,) = actors(run, kind)
    victim.kill()


def what_it_learnt(run: Run) -> list[dict[str, Any]]:
    times = ("time", "seconds", "tokens/per_second")
    return [{k: v for k, v in record.items() if not k.startswith(times)} for record in run.records()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["RolloutWorker", "RewardWorker"])
def test_a_worker_that_dies_is_replaced_without_a_trace(kind: str, start: Callable[..., Run]) -> None:
    undisturbed = start("undisturbed")
    assert undisturbed.end() == 0, undisturbed.text
    run = start("disturbed")
    kill_in_mid_run(run, kind)
    assert run.end() == 0, run.text
    # No group lost, none trained twice, none sampled with other weights: everything is equal to the last bit.
    assert what_it_learnt(run) == what_it_learnt(undisturbed)
    assert run.records("samples") == undisturbed.records("samples")
    if kind == "RolloutWorker":
        assert "rollout worker 0 died and is being replaced" in run.text
    assert run.left_after(10) == []


@pytest.mark.slow
def test_what_cannot_be_replaced_ends_the_run_within_a_minute_and_it_resumes(start: Callable[..., Run]) -> None:
    run = start("broken", "resume=auto")
    kill_in_mid_run(run, "LearnerWorker")
    killed = time.monotonic()
    assert run.end(60) == 1, run.text
    assert time.monotonic() - killed < 60
    ending = run.text.partition("\nrlkit: ")[2]
    assert ending.startswith("a rank of the learner (process "), run.text
    assert "resume=auto" in ending
    assert run.left_after(10) == []
    again = start("broken", "resume=auto")
    assert again.end() == 0, again.text
    steps = [record["step"] for record in again.records() if record["kind"] == "step"]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_learner_that_dies_while_the_samplers_work_ends_the_run_at_once(start: Callable[..., Run]) -> None:
    run = start("idle")
    run.wait_for_steps(2)
    (sampler,), (learner,) = actors(run, "RolloutWorker"), actors(run, "LearnerWorker")
    sampler.suspend()  # sampling takes as long as one likes
    time.sleep(5)
    learner.kill()
    assert run.end(60) == 1, run.text
    assert run.text.partition("\nrlkit: ")[2].startswith("a rank of the learner (process "), run.text
    assert run.left_after(15) == []
