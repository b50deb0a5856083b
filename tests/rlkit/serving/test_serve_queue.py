"""The queue of a reward server and its processes: out of file descriptors, clients that left, unknown columns."""

from __future__ import annotations

import asyncio
import math
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reward_samples import make_group
from serve_fixture import misbehaving

from rewards.base import RewardContext
from rlkit.experience import GroupScores
from rlkit.serving.http.process import RewardProcess, WorkerBrokenError, model_version
from rlkit.serving.http.queue import BatchLimits, BusyError, ScoringQueue, ServerMetrics

LIMITS = BatchLimits(samples=100, tokens=10_000, queued_samples=100)


def process(target: str = "reward_samples.Misbehaving", timeout: float = 1.0, **options: Any) -> RewardProcess:
    return RewardProcess(target, options, RewardContext(), startup_timeout=60.0, timeout=timeout)


def values(judged: list[GroupScores]) -> list[Any]:
    scores = [score for own in judged for score in own.samples]
    return [score.value if score.valid else score.reason for score in scores]


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Nothing can be opened in the block: EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("waiting", [True, False], ids=["while it waits", "for a request"])
def test_a_server_out_of_descriptors_recovers(waiting: bool) -> None:
    async def run() -> None:
        worker = process(timeout=30.0)
        queue = ScoringQueue([worker], LIMITS, ServerMetrics())
        await queue.start()
        try:
            if waiting:  # the call costs the process; its successor is started before the next request
                with no_descriptors():
                    with pytest.raises(BusyError, match="no process could be created"):
                        await asyncio.wait_for(queue.score([misbehaving("die")], None), 20)
                    await asyncio.sleep(0.1)
            else:
                worker.kill()
                with no_descriptors(), pytest.raises(BusyError, match="no process could be created"):
                    await asyncio.wait_for(queue.score([make_group("a", ["one"])], None), 20)
            assert values(await asyncio.wait_for(queue.score([make_group("a", ["one two"])], None), 40)) == [2.0]
        finally:
            await queue.close()

    asyncio.run(run())


def test_a_bug_while_scoring_fails_its_jobs_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        queue = ScoringQueue([process()], LIMITS, ServerMetrics())
        await queue.start()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(queue.metrics.scoring_seconds, "observe", None)
                with pytest.raises(BusyError, match="the server failed: TypeError"):
                    await asyncio.wait_for(queue.score([make_group("a", ["one"])], None), 20)
            assert values(await asyncio.wait_for(queue.score([make_group("a", ["one two"])], None), 20)) == [2.0]
        finally:
            await queue.close()

    asyncio.run(run())


def test_what_its_client_left_is_not_scored_again() -> None:
    async def run() -> None:
        worker = process()
        queue = ScoringQueue([worker], LIMITS, ServerMetrics())
        await queue.start()
        try:
            hung, left = await asyncio.gather(
                queue.score([misbehaving("hang")], None),
                queue.score([make_group("b", ["one two"])], 0.5),  # over when the call of both is
                return_exceptions=True,
            )
        finally:
            await queue.close()
        assert isinstance(hung, list) and str(values(hung)[0]).startswith("timeout: ")
        assert isinstance(left, BusyError) and "longer than its client" in str(left)
        assert worker.health()["calls"] == 0

    asyncio.run(run())


class Noting(RewardProcess):
    """Notes for how long each call's clients still wait."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.waiting: list[float] = []

    async def score(self, groups: Any, client_seconds: float = math.inf) -> Any:
        assert self.alive, "the time for a new process is not taken from the call's"
        self.waiting.append(client_seconds)
        return await super().score(groups, client_seconds)


@pytest.mark.slow
def test_a_second_try_lasts_no_longer_than_its_client_waits() -> None:
    async def run() -> None:
        worker = Noting("reward_samples.Misbehaving", {}, RewardContext(), 60.0, 1.0)
        queue = ScoringQueue([worker], LIMITS, ServerMetrics())
        await queue.start()
        try:
            (hung,) = await queue.score([misbehaving("hang")], 50.0)
            assert worker.waiting[0] == math.inf, "a first try may have waited in the queue: it is not cut short"
            assert 0 < worker.waiting[1] < 49
            assert str(values([hung])[0]).startswith("timeout: no answer within the server's reward.timeout_seconds=1")
        finally:
            await queue.close()

    asyncio.run(run())


def test_a_call_ends_when_its_client_gives_up() -> None:
    async def run() -> None:
        worker = process(timeout=30.0)
        await worker.start()
        try:
            began = time.monotonic()
            with pytest.raises(WorkerBrokenError, match=r"within the 0\.3 s that were left until its client gave up"):
                await worker.score([misbehaving("hang")], 0.3)
            assert time.monotonic() - began < 10 and not worker.alive
        finally:
            await worker.close()

    asyncio.run(run())


def test_a_reward_whose_columns_have_types_is_served() -> None:
    async def run() -> None:
        worker = process("served_rewards.Weighted", timeout=10.0)
        try:
            await worker.start()
            assert worker.health()["self_test"]["error"].startswith("ValueError: could not convert string to float")
            group = make_group("a", ["one"])
            scored, _ = await worker.score([replace(group, prompt=replace(group.prompt, columns={"weight": "2.5"}))])
            assert values(scored) == [2.5]
        finally:
            await worker.close()

    asyncio.run(run())


def test_a_long_text_with_a_slash_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    plain = {"_target_": "a.B", "prompt": "x" * 300 + " either/or", "folder": str(tmp_path)}
    version = model_version(plain)
    assert version.startswith("B-")
    (tmp_path / "config.json").write_text('{"other": 1}')
    assert model_version(plain) != version
