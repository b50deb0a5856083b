"""The reward pool: deadlines, dead and broken workers, and rewards that return nonsense. Real Ray, real processes."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray_fixture import ray_session, run  # noqa: F401
from reward_samples import make_group

from rewards.base import RewardContext
from rlkit.config.parts import PartError
from rlkit.experience.scores import RewardFailed, ScoreReport, check_failures
from rlkit.serving.pool import RewardPool, Scored

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def pool(**options: Any) -> RewardPool:
    reward = {"_target_": "reward_samples.Misbehaving", "timeout_seconds": 0.7, **options}
    return RewardPool(reward, RewardContext(), startup_timeout_seconds=120)


async def score_orders(orders: list[str], **options: Any) -> tuple[list[Scored], list[dict[str, Any]]]:
    """One call per order on one pool; each call has two groups of two samples."""
    rewards = pool(**options)
    await rewards.start()
    try:
        scored = []
        for order in orders:
            scored.append(await rewards.score([[make_group("a", [order, "one two"])], [make_group("b", ["x", "y z"])]]))
        return scored, rewards.health()
    finally:
        await rewards.close()


def reasons(scored: Scored) -> list[str | float]:
    return [score.reason if score.value is None else score.value for own in scored.scores for score in own.samples]


def test_scores_are_of_all_groups_in_order_or_of_those_asked_for() -> None:
    async def check() -> None:
        rewards = pool(workers=2)
        await rewards.start()
        one, two = make_group("one", ["a b", "c"]), make_group("two", ["d e f"])
        sampled = ray.put([one, two])
        scored = await rewards.score([[two], sampled])
        assert reasons(scored) == [3.0, 2.0, 1.0, 3.0]
        assert scored.report.samples == 4
        scored = await rewards.score([sampled, [make_group("three", ["x"])]], ["three", "one"])
        assert reasons(scored) == [1.0, 2.0, 1.0]
        assert scored.report.samples == 3
        assert scored.report.failed == 0
        assert {worker["alive"] for worker in rewards.health()} == {True}
        await rewards.close()

    run(check())


def test_broken_results_become_invalid_scores_with_a_reason() -> None:
    orders = {
        "None": "wrong_type: score() returned NoneType",
        "string": "wrong_type: score() returned str",
        "wrong length": "wrong_length: score() returned 1 results for 2 groups",
        "strings inside": "wrong_type: str",
        "sample missing": "wrong_length: 1 scores for the 2 samples",
        "nan": "not_finite: the score is nan",
        "None inside": "wrong_type: NoneType",
        "bare number": "wrong_type: float",
        "too many tokens": "wrong_length: 99 token rewards for",
    }
    scored, health = run(score_orders(list(orders)))
    for (order, reason), result in zip(orders.items(), scored, strict=True):
        assert str(reasons(result)[0]).startswith(reason), order
        assert result.report.failed > 0
        assert result.report.samples == 4
    assert reasons(scored[5])[1] == 2.0, "the good sample of a group with a NaN keeps its score"
    assert health[0]["restarts"] == 0, "what a reward returns wrongly is no reason to replace it"


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        pytest.param("hang", "timeout: no answer within reward.timeout_seconds=0.7", marks=pytest.mark.slow),
        pytest.param("hang in C", "timeout: no answer within reward.timeout_seconds=0.7", marks=pytest.mark.slow),
        pytest.param("die", "crash: the worker process", marks=pytest.mark.slow),
        ("raise", "exception: RuntimeError: the judge is offline"),
        pytest.param("nan in Score", "exception: ValueError: a valid score must be finite", marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_hangs_dies_or_raises_is_replaced_and_the_call_tried_once_more(order: str, reason: str) -> None:
    (failed, good), health = run(score_orders([order, "fine"]))
    assert all(str(text).startswith(reason) for text in reasons(failed)), reasons(failed)
    assert failed.report.failed == failed.report.samples == 4
    assert reasons(good) == [1.0, 2.0, 1.0, 2.0]
    assert health[0]["restarts"] == 2
    assert health[0]["alive"]


def test_a_failure_that_passes_costs_no_sample(tmp_path: Path) -> None:
    (scored,), health = run(score_orders(["die"], once_file=str(tmp_path / "died")))
    assert reasons(scored) == [1.0, 2.0, 1.0, 2.0]
    assert health[0]["restarts"] == 1


@pytest.mark.slow
def test_killed_workers_are_gone() -> None:
    async def check() -> None:
        rewards = pool()
        await rewards.start()
        first = rewards.health()[0]["pid"]
        await rewards.score([[make_group("a", ["hang in C"])]])
        await rewards.score([[make_group("a", ["fine"])]])
        second = rewards.health()[0]["pid"]
        await rewards.close()
        await asyncio.to_thread(_wait_gone, [first, second])

    run(check())


@pytest.mark.slow
def test_verifier_processes_end_with_a_killed_worker() -> None:
    async def check() -> None:
        reward = {"_target_": "rewards.verifiers.math.MathReward", "timeout_seconds": 30.0}
        rewards = RewardPool(reward, RewardContext(), startup_timeout_seconds=60)
        await rewards.start()
        pid = rewards.health()[0]["pid"]
        family = [child.pid for child in psutil.Process(pid).children(recursive=True)]
        assert family, "the rule reward has no verifier process"
        os.kill(pid, 9)
        await asyncio.to_thread(_wait_gone, [pid, *family])
        scored = await rewards.score([[make_group("a", ["#### 42", "#### 41", r"\boxed{84/2}"])]])
        assert reasons(scored) == [1.0, 0.0, 1.0]
        await rewards.close()

    run(check())


@pytest.mark.slow
def test_a_cancelled_call_frees_its_worker() -> None:
    async def check() -> None:
        rewards = pool(timeout_seconds=30.0)
        await rewards.start()
        task = asyncio.create_task(rewards.score([[make_group("a", ["hang"])]]))
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert reasons(await rewards.score([[make_group("a", ["x y"])]])) == [2.0]
        await rewards.close()

    run(check())


@pytest.mark.slow
def test_calls_run_side_by_side_on_several_workers() -> None:
    async def check() -> None:
        rewards = pool(workers=2)
        await rewards.start()
        start = time.perf_counter()
        hung, fine = await asyncio.gather(
            rewards.score([[make_group("a", ["hang"])]]), rewards.score([[make_group("b", ["fine"])]])
        )
        assert reasons(fine) == [1.0]
        assert str(reasons(hung)[0]).startswith("timeout")
        assert time.perf_counter() - start < 15
        await rewards.close()

    run(check())


def test_a_reward_that_cannot_start_says_why() -> None:
    with pytest.raises(RewardFailed, match=r"reward_samples\.Misbehaving cannot start.*the model folder is empty"):
        run(pool(fail_start=True).start())
    with pytest.raises(PartError, match="has no Nothing"):
        RewardPool({"_target_": "reward_samples.Nothing"}, RewardContext(), 10)


def test_check_failures_names_cause_and_counts() -> None:
    report = ScoreReport(10, {"timeout": 3}, {"timeout": "timeout: no answer within 5 s"})
    check_failures(report, 0.3, "rewards.x.X")
    check_failures(ScoreReport(), 0.0, "rewards.x.X")
    with pytest.raises(RewardFailed) as failure:
        check_failures(report + ScoreReport(10, {"crash": 2}, {"crash": "crash: died"}), 0.2, "rewards.x.X")
    message = str(failure.value)
    for part in ("5 of 20", "25%", "rewards.x.X", "max_failed_share=0.2", "3 x timeout", "2 x crash", "crash: died"):
        assert part in message


def _wait_gone(pids: list[int]) -> None:
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
