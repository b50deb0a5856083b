"""Real runs with environments and data of other packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from adapter_fixture import need, openenv_servers  # noqa: F401
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


def one_step(run: Run, gives_up: bool = False) -> None:
    """`gives_up`: the first turn that is no move ends the game."""
    assert run.end() == 0, run.text
    (record,) = (record for record in run.records() if record["kind"] == "step")
    assert record["environment/turns"] >= (1 if gives_up else 1.01)
    assert record["reward/failed"] == 0 and record["mismatch/logprob_max"] < 1e-3


GAME = ("environment.max_turns=3", "environment.max_turn_tokens=8", "rollout.max_response_tokens=384")


@pytest.mark.parametrize("package", ["textarena", "gem"])
def test_a_run_of_a_game(start: Callable[..., Run], package: str) -> None:
    need(package)
    one_step(start(f"environment={package}", *GAME, "trainer.total_steps=1"), gives_up=package == "gem")


def test_a_run_with_another_try(start: Callable[..., Run]) -> None:
    need("reasoning_gym")
    drawn = ("data.name=chain_sum", "data.train_problems=64", "data.heldout_problems=16")
    one_step(start("environment=reasoning_gym", *drawn, *GAME, "trainer.total_steps=1"))


def test_a_run_with_skyrl(start: Callable[..., Run], tmp_path: Path) -> None:
    need("skyrl_gym")
    file = tmp_path / "train.jsonl"
    rows = (f'{{"question": "What is {i} + {i}?", "answer": "#### {2 * i}"}}\n' for i in range(60))
    file.write_text("".join(rows))
    one_step(start("environment=skyrl_gym", "data=jsonl", f"data.path={file}", *GAME, "trainer.total_steps=1"))


def test_a_run_with_a_server_of_openenv(start: Callable[..., Run], openenv_servers: dict[str, str]) -> None:  # noqa: F811
    one_step(start("environment=openenv", f"environment.url={openenv_servers['game']}", *GAME, "trainer.total_steps=1"))


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
