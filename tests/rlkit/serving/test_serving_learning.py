"""The pool of a reward that learns or follows the policy, when its one process raises or dies. Real Ray, real kills."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray_fixture import ray_session, run  # noqa: F401
from reward_samples import make_group

from rewards.base import RewardContext
from rlkit.cluster.waiting import open_waits
from rlkit.experience import GroupScores, Score
from rlkit.experience.scores import RewardFailed
from rlkit.serving.pool import RewardPool
from rlkit.serving.stored import Stored

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
GROUP = make_group("a", ["x", "y z"]).with_scores(GroupScores((Score(1.0), Score(2.0))))


def in_pool(folder: Path, check: Callable[[RewardPool], Awaitable[None]], **options: Any) -> None:
    reward = {"_target_": "learning_reward.Learning", "timeout_seconds": 20.0, "script": str(folder), **options}

    async def body() -> None:
        pool = RewardPool(reward, RewardContext(), startup_timeout_seconds=120)
        await pool.start()
        try:
            await check(pool)
        finally:
            await pool.close()

    run(body())


async def values(pool: RewardPool) -> list[float | str]:
    scored = await pool.score([[GROUP]])
    (own,) = scored.scores
    return [score.reason if score.value is None else score.value for score in own.samples]


def weights(version: int) -> Any:
    from scripted_rollout import weights_of

    return ray.put(weights_of(version))


async def kill_while_idle(pool: RewardPool) -> None:
    """kill -9 that nobody has noticed yet."""
    process = psutil.Process(pool.health()[0]["pid"])
    os.kill(process.pid, signal.SIGKILL)
    await asyncio.to_thread(psutil.wait_procs, [process], 10)
    assert pool.health()[0]["alive"], "the pool has noticed"


def test_a_reward_that_has_learnt_and_raises_once_keeps_what_it_learnt(tmp_path: Path) -> None:
    async def check(pool: RewardPool) -> None:
        await pool.learn([GROUP], "after", Stored())
        pid = pool.health()[0]["pid"]
        (tmp_path / "raise-score").write_text("1")
        assert await values(pool) == [100.0, 100.0], "the same process tries once more"
        assert pool.health()[0]["pid"] == pid
        assert pool.health()[0]["restarts"] == 0

    in_pool(tmp_path, check)


@pytest.mark.slow
def test_a_reward_that_has_learnt_keeps_it_where_scoring_is_called_off(tmp_path: Path) -> None:
    """As at a signal: the checkpoint that follows has what was learnt."""

    async def check(pool: RewardPool) -> None:
        await pool.learn([GROUP], "after", Stored())
        (tmp_path / "hang-score").write_text("1")
        scoring = asyncio.create_task(pool.score([[GROUP]]))
        while (tmp_path / "hang-score").read_text() == "1":
            await asyncio.sleep(0.01)
        scoring.cancel()
        await asyncio.wait([scoring])
        await pool.save_state(tmp_path / "state.pt")
        assert (tmp_path / "state.pt").is_file()

    in_pool(tmp_path, check)


@pytest.mark.parametrize("death", ["in a call", pytest.param("while idle", marks=pytest.mark.slow)])
def test_a_reward_that_has_learnt_and_dies_ends_the_run(death: str, tmp_path: Path) -> None:
    async def check(pool: RewardPool) -> None:
        await pool.learn([GROUP], "after", Stored())
        if death == "in a call":
            (tmp_path / "die-score").write_text("1")
        else:
            await kill_while_idle(pool)
        with pytest.raises(RewardFailed, match="what it learnt in this run is lost"):
            await (values(pool) if death == "in a call" else pool.follow(weights(2)))

    in_pool(tmp_path, check)


@pytest.mark.slow
def test_a_follower_that_died_in_both_tries_is_started_again_by_the_next_weights(tmp_path: Path) -> None:
    async def check(pool: RewardPool) -> None:
        await pool.follow(weights(2))
        (tmp_path / "die-score").write_text("2")
        assert str((await values(pool))[0]).startswith("crash: the worker process")
        assert not pool.health()[0]["alive"]
        await pool.follow(weights(3))
        assert await values(pool) == [3.0, 3.0]

    in_pool(tmp_path, check, learns=False)


@pytest.mark.slow
def test_a_follower_that_died_unnoticed_is_started_again_by_the_next_weights(tmp_path: Path) -> None:
    async def check(pool: RewardPool) -> None:
        await pool.follow(weights(2))
        await kill_while_idle(pool)
        await pool.follow(weights(3))
        assert await values(pool) == [3.0, 3.0]

    in_pool(tmp_path, check, learns=False)


@pytest.mark.slow
def test_a_follower_that_dies_in_a_call_judges_again_with_the_present_weights(tmp_path: Path) -> None:
    async def check(pool: RewardPool) -> None:
        await pool.follow(weights(2))
        (tmp_path / "die-score").write_text("1")
        assert await values(pool) == [2.0, 2.0]
        assert pool.health()[0]["restarts"] == 1

    in_pool(tmp_path, check, learns=False)


@pytest.mark.slow
def test_a_follower_that_dies_of_the_weights_ends_the_run(tmp_path: Path) -> None:
    async def check(pool: RewardPool) -> None:
        (tmp_path / "die-follow").write_text("2")
        with pytest.raises(RewardFailed, match=r"`follow` of reward learning_reward\.Learning failed"):
            await pool.follow(weights(2))

    in_pool(tmp_path, check, learns=False)


@pytest.mark.slow
def test_what_a_reward_waits_for_is_named(tmp_path: Path) -> None:
    async def check(pool: RewardPool) -> None:
        async def line() -> str:
            while not any("its turn" in str(wait) for wait in open_waits()):
                await asyncio.sleep(0.01)
            return "; ".join(map(str, open_waits()))

        (tmp_path / "hang-score").write_text("1")
        calls = [asyncio.create_task(pool.score([[GROUP]])) for _ in range(2)]
        told = await asyncio.wait_for(line(), 20)
        pid = pool.health()[0]["pid"]
        assert f"the reward pool (learning_reward.Learning) for reward worker 0 (pid {pid}) to score 1 batches" in told
        assert f"its turn, as number 1 in a worker's queue; worker 0 (pid {pid}) has been busy for" in told
        await asyncio.gather(*calls)
        assert open_waits() == []

    in_pool(tmp_path, check)
