"""Real runs with environments and data of other packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from adapter_fixture import need
from run_fixture import Run

pytestmark = pytest.mark.slow


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def one(*arguments: str) -> Run:
        runs.append(Run(tmp_path, *arguments, without=("reward",)))
        return runs[-1]

    yield one
    for run in runs:
        run.clean_up()


def test_a_run_over_the_frozen_lake(start: Callable[..., Run]) -> None:
    need("gymnasium")
    run = start(
        "environment=gymnasium",
        "environment.options={is_slippery:false}",
        "environment.actions=[west,south,east,north]",
        "environment.max_turn_tokens=4",
        "environment.max_turns=8",
        "reward=environment",
        "model=agent",
        "rollout.max_response_tokens=384",
        "trainer.total_steps=2",
        "tracking.sample_groups_per_step=null",
    )
    assert run.end() == 0, run.text
    for record in (record for record in run.records() if record["kind"] == "step"):
        assert 1 <= record["environment/turns"] <= 8 and 0 <= record["environment/success"] <= 1
        assert record["reward/failed"] == 0 and record["mismatch/logprob_max"] < 1e-3
    (first, *_) = run.records("samples")
    assert "[S]FFF" in str(first["prompt"]) and {"assistant", "user"} == {turn["role"] for turn in first["turns"]}


def test_a_run_with_questions_of_reasoning_gym(start: Callable[..., Run]) -> None:
    need("reasoning_gym")
    run = start(
        "data=reasoning_gym",
        "data.name=chain_sum",
        "data.instructions=''",
        "data.train_problems=64",
        "data.heldout_problems=16",
        "reward=reasoning_gym",
        "reward.answer_in=final_answer",
        "verifier=reasoning_gym",
        "verifier.answer_in=final_answer",
        "trainer.total_steps=2",
    )
    assert run.end() == 0, run.text
    for record in (record for record in run.records() if record["kind"] == "step"):
        assert 0 <= record["reward/mean"] <= 1 and record["reward/failed"] == 0
    assert 0 <= next(r for r in run.records() if r["kind"] == "evaluation")["accuracy/heldout"] <= 1
