"""Who loads only after whom: what comes onto a GPU while vLLM measures its memory is counted as the engine's own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from rlkit.cluster.placement import loads_after, start_in_order
from rlkit.config.loading import load_config

PARTS = ("sampler", "learner", "reward", "verifier", "critic")


def order(tmp_path: Path, *overrides: str, parts: Sequence[str] = PARTS) -> list[list[str]]:
    """The parts in the order in which they load; those of one list do so side by side."""
    config = load_config([f"run_dir={tmp_path / 'run'}", *overrides]).config
    loading: list[list[str]] = []

    async def start_all() -> None:
        begun: list[str] = []
        ready = {name: asyncio.Event() for name in parts}

        def start(name: str) -> Callable[[], Awaitable[None]]:
            async def begin() -> None:
                begun.append(name)
                await ready[name].wait()

            return begin

        starting = start_in_order({name: start(name) for name in parts}, loads_after(config))
        while not all(part.done() for part in starting.values()):
            for _ in range(5):
                await asyncio.sleep(0)
            loading.append(sorted(begun))
            for name in begun:
                ready[name].set()
            begun.clear()

    asyncio.run(asyncio.wait_for(start_all(), 10))
    return loading


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["reward=rule"], [["critic", "learner", "reward", "sampler", "verifier"]]),
        (["reward=rule", "cluster=single_gpu"], [["reward", "sampler", "verifier"], ["critic", "learner"]]),
        (["reward=polar", "cluster=single_gpu"], [["sampler", "verifier"], ["reward"], ["critic", "learner"]]),
        # Not by turns, but on one GPU all the same.
        (
            ["reward=polar", "cluster=single_gpu", "trainer.max_staleness=1"],
            [["sampler", "verifier"], ["reward"], ["critic", "learner"]],
        ),
        (
            ["reward=polar", "cluster=single_gpu", "cluster.placement=apart"],
            [["critic", "learner", "reward", "sampler", "verifier"]],
        ),
    ],
)
def test_what_shares_a_gpu_loads_one_after_the_other(
    tmp_path: Path, overrides: list[str], wanted: list[list[str]]
) -> None:
    # After each round of loading there may be an empty one, until what was loaded has been noticed.
    assert [names for names in order(tmp_path, *overrides) if names] == wanted


def test_nobody_waits_for_a_part_that_does_not_start(tmp_path: Path) -> None:
    """Fine-tuning on recorded responses has no sampler, distillation no reward (the default one has a model)."""
    assert order(tmp_path, "algorithm=sft", "cluster=single_gpu", parts=["learner"])[0] == ["learner"]
    rounds = order(tmp_path, "reward=polar", "cluster=single_gpu", parts=["sampler", "learner"])
    assert [names for names in rounds if names] == [["sampler"], ["learner"]]


def test_who_waits_for_a_part_that_cannot_load_ends_with_its_error() -> None:
    async def fails() -> None:
        raise ValueError("no free memory")

    async def never() -> None:
        raise AssertionError("it was started")

    async def start_both() -> None:
        starting = start_in_order({"sampler": fails, "learner": never}, {"learner": ["sampler"]})
        for part in starting.values():
            with pytest.raises(ValueError, match="no free memory"):
                await part

    asyncio.run(start_both())
