"""Never a silent zero, never a wait without end: a real pool, with rewards that fail in every way."""

from __future__ import annotations

import time
from typing import Any

import pytest
from ray_fixture import ray_session, run  # noqa: F401
from reward_samples import make_group

from rewards.base import RewardContext
from rlkit.experience import GroupScores, PreferencePair, Score
from rlkit.experience.scores import RewardFailed, ScoreReport, check_failures, checked_scores
from rlkit.serving.pool import RewardPool, Scored
from rlkit.serving.stored import Stored

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
TIMEOUT = 1.0


SCORED = make_group("a", ["x"]).with_scores(GroupScores((Score(0.0),)))


def function_pool(**options: Any) -> RewardPool:
    reward = {"_target_": "rewards.function.FunctionReward", "function": "reward_functions.as_told"}
    return RewardPool({**reward, "timeout_seconds": TIMEOUT, **options}, RewardContext(), startup_timeout_seconds=120)


def found(scored: Scored) -> list[str | float]:
    return [s.reason if s.value is None else s.value for own in scored.scores for s in own.samples]


# test_serving.py tries more of these, with a Reward class.
INFRASTRUCTURE = {
    "hang": "timeout: no answer within reward.timeout_seconds=1",
    "exit": "crash: the worker process",
}
DATA = {
    "raise TimeoutError": "exception: TimeoutError: the judge's own time-out",
    "None": "wrong_type: ",
    "a string": "wrong_type: ",
    "wrong length": "wrong_length: ",
    "nan inside": "not_finite: ",
    "None inside": "none: ",
    "a string inside": "wrong_type: ",
}


def test_every_failure_is_masked_named_counted_and_the_next_call_works() -> None:
    async def check() -> None:
        pool = function_pool()
        await pool.start()
        total, restarts = ScoreReport(), 0
        try:
            for order, reason in (INFRASTRUCTURE | DATA).items():
                began = time.monotonic()
                scored = await pool.score([[make_group("a", [order, "four"])]])
                assert str(found(scored)[0]).startswith(reason), (order, found(scored))
                assert time.monotonic() - began < 60, "two tries, two new processes, and no waiting beyond"
                assert scored.report.failed > 0
                total += scored.report
                restarts += 2 if order in INFRASTRUCTURE else 0
                assert found(await pool.score([[make_group("b", ["four", "four"])]])) == [4.0, 4.0]
                assert pool.health()[0]["restarts"] == restarts, "only infrastructure is replaced and tried again"
        finally:
            await pool.close()
        assert total.failures == {
            "timeout": 2, "crash": 2, "exception": 1, "wrong_type": 5, "wrong_length": 2, "not_finite": 1, "none": 1,
        }  # fmt: skip
        with pytest.raises(RewardFailed, match=r"14 of 18 samples \(78%\) got no score from reward x"):
            check_failures(total, 0.2, "reward x")

    run(check())


@pytest.mark.parametrize(
    ("where", "said"),
    [
        pytest.param("start", "cannot start: the model store does not answer", marks=pytest.mark.slow),
        ("update", "failed: the teacher does not answer"),
        pytest.param("hang", "waited more than reward.timeout_seconds=1 s for `learn`", marks=pytest.mark.slow),
    ],
)
def test_a_rewards_own_timeout_is_not_taken_for_the_pools(where: str, said: str) -> None:
    async def check() -> None:
        target = {"_target_": "served_rewards.SlowToLearn", "where": where, "timeout_seconds": TIMEOUT}
        pool = RewardPool(target, RewardContext(), startup_timeout_seconds=120)
        await pool.start()
        try:
            await pool.learn([SCORED], "before", Stored())
        finally:
            await pool.close()

    with pytest.raises(RewardFailed, match=said):
        run(check())


def test_a_reward_that_learns_gives_new_scores() -> None:
    async def check() -> None:
        pool = RewardPool({"_target_": "served_rewards.SlowToLearn"}, RewardContext(), 30)
        await pool.start()
        (group,), metrics = await pool.learn([SCORED], "before", Stored())
        assert metrics == {"learner/updates": 1.0}
        assert [score.value for _, score in group.scored()] == [1.0]
        groups = [SCORED]
        assert await pool.learn(groups, "after", Stored()) == (groups, {})
        await pool.close()

    run(check())


class NoNumber:
    """Has a finite value for `math.isfinite`, but is no number (a tensor is like that)."""

    def __float__(self) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (GroupScores((Score(NoNumber()), Score(1.0))), "wrong_type: NoNumber"),  # type: ignore[arg-type]
        (GroupScores((Score(1.0, components={"a": NoNumber()}), Score(1.0))), "wrong_type: NoNumber"),  # type: ignore[dict-item]
        (GroupScores((Score(1.0, trace=3), Score(1.0))), "wrong_type: reason and trace"),  # type: ignore[arg-type]
        (GroupScores((Score(1.0), Score(1.0)), (PreferencePair(0, 2),)), "wrong_pair: "),
        (GroupScores((Score(1.0), Score(1.0)), (PreferencePair(1, 1),)), "wrong_pair: "),
        (GroupScores((Score(1.0), Score(1.0)), (PreferencePair(0, 1, 1.5),)), "wrong_pair: "),
    ],
)
def test_what_only_looks_like_a_score_is_invalid(scores: GroupScores, reason: str) -> None:
    (own,) = checked_scores([make_group("a", ["x", "y"])], [scores])
    assert own.samples[0].reason.startswith(reason)


def test_whole_numbers_and_lists_become_what_the_types_say() -> None:
    scores = GroupScores((Score(1, token_rewards=[0.5]), Score(True)))  # type: ignore[arg-type]
    (own,) = checked_scores([make_group("a", ["x", "y"])], [scores])
    first, second = own.samples
    assert type(first.value) is float
    assert first.token_rewards is not None
    assert first.token_rewards.dtype.name == "float32"
    assert second.value == 1.0
