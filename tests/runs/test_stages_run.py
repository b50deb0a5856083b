"""A run in two stages, and what recipes of long responses need: an entropy bonus that follows, retired prompts, a
reward for responses without an end. Real runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from run_fixture import ROOT, Run

OPTIONS = (
    "algorithm=dr_grpo",
    "algorithm.entropy_target=5",  # nats, more than the tiny policy ever has
    "algorithm.entropy_step=0.001",
    "algorithm.truncated_reward=-0.5",
    "buffer.retire_solved_share=0.5",
)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def one(name: str, *arguments: str, cwd: Path = ROOT) -> Run:
        (tmp_path / name).mkdir()
        runs.append(Run(tmp_path / name, *arguments, cwd=cwd))
        return runs[-1]

    yield one
    for run in runs:
        run.clean_up()


def of(run: Run, metric: str) -> list[float | None]:
    return [record.get(metric) for record in run.records() if record["kind"] == "step"]


@pytest.mark.slow
def test_a_second_stage_goes_on_with_longer_responses(start: Callable[..., Run]) -> None:
    first = start("first", *OPTIONS, "trainer.total_steps=3", "rollout.max_response_tokens=32")
    assert first.end() == 0, first.text
    assert of(first, "policy/entropy_coefficient") == pytest.approx([0, 0.001, 0.002])
    retired = of(first, "data/retired")[-1]
    assert retired, "the tiny policy solves some of twelve prompts twice in four"
    second = start(
        "second", *OPTIONS, "trainer.total_steps=5", "rollout.max_response_tokens=96", f"resume={first.folder}"
    )
    assert second.end() == 0, second.text
    assert [record["step"] for record in second.records() if record["kind"] == "step"] == [4, 5]
    assert "rollout.max_response_tokens was 32 and is 96 now" in second.text
    assert "algorithm.constant_length was 32 and is 96 now" in second.text
    assert of(second, "policy/entropy_coefficient") == pytest.approx([0.003, 0.004])
    assert all(count and count >= retired for count in of(second, "data/retired"))
    lengths = of(second, "length/max")
    assert max(length for length in lengths if length is not None) > 32


@pytest.mark.slow
def test_a_run_whose_prompts_are_all_retired_ends_well(start: Callable[..., Run]) -> None:
    run = start(
        "solved",
        "algorithm=grpo",
        "reward=function",
        "reward.function=reward_functions.always_right",
        "buffer.retire_solved_share=1",
        "data.train_problems=8",
        "trainer.total_steps=50",
        cwd=ROOT / "tests" / "fixtures",
    )
    assert run.end() == 0, run.text
    summary = json.loads((run.folder / "summary.json").read_text())
    assert "the data are solved" in summary["ended"]
    assert of(run, "data/retired") == [4, 8]
    assert (run.folder / "checkpoints" / "step_000002").is_dir()
