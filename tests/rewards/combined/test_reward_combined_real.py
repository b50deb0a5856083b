"""A verifier and a discriminator as one reward: in one process, and learning in a process of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ray_fixture import ray_session, run  # noqa: F401
from reward_samples import make_group

from rewards.base import RewardContext
from rewards.combined.reward import CombinedReward
from rewards.polar.reward import PolarReward
from rewards.verifiers.math import MathReward
from rlkit.serving.pool import RewardPool
from rlkit.serving.stored import Stored

QUESTION = "There are 12 pens in a box. Ann buys 3 boxes. How many pens does Ann have?"
REFERENCE = "3 * 12 = 36\n#### 36"
RESPONSES = ["3 * 12 = 36\n#### 36", "3 + 12 = 15\n#### 15", "36", "I do not know."]


def test_rule_where_there_is_an_answer_and_polar_weighted_everywhere() -> None:
    """Every number is that of the two rewards by themselves."""
    rule = {"_target_": "rewards.verifiers.math.MathReward", "when": {"has": "answer"}, "weight": 2.0}
    polar = {"_target_": "rewards.polar.reward.PolarReward", "weight": 0.25, "shaping": ["group_normalise"]}
    answered = make_group("a", RESPONSES, answer="36", references=[REFERENCE], question=QUESTION)
    open_ended = make_group("b", RESPONSES, answer=None, references=[REFERENCE], question=QUESTION)
    without = replace(answered, id="c", prompt=replace(answered.prompt, references=()))
    reward = CombinedReward(CombinedReward.Config(parts={"rule": rule, "polar": polar}), RewardContext())
    parts = [MathReward(MathReward.Config(), RewardContext()), PolarReward(PolarReward.Config(), RewardContext())]
    try:
        for each in (reward, *parts):
            each.start()
        combined = reward.score([answered, open_ended, without])
        correct, logits = (part.score([answered])[0].samples for part in parts)
    finally:
        for each in (reward, *parts):
            each.close()
    raw = [float(score.value or 0.0) for score in logits]
    mean = sum(raw) / 4
    std = (sum((value - mean) ** 2 for value in raw) / 4) ** 0.5
    for i in range(4):
        shaped = (raw[i] - mean) / std
        first, second, third = (scores.samples[i] for scores in combined)
        assert first.value == pytest.approx(2 * float(correct[i].value or 0.0) + 0.25 * shaped, abs=1e-4)
        assert second.value == pytest.approx(0.25 * shaped, abs=1e-4)
        assert first.components["polar"] == pytest.approx(raw[i], abs=1e-4)
        assert first.components["rule/correct"] == correct[i].value
        assert third.reason.partition(": part polar: ")[0]  # POLAR cannot judge without a reference: never a zero
        assert not third.valid
    assert combined[0].samples[0].value == max(score.value or -9.0 for score in combined[0].samples)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_running_statistics_count_in_the_reward_s_process() -> None:
    options = {
        "_target_": "rewards.combined.reward.CombinedReward",
        "parts": {"words": {"_target_": "reward_samples.Misbehaving"}},
        "shaping": ["standardise"],
    }

    async def check() -> None:
        pool = RewardPool(options, RewardContext(), startup_timeout_seconds=120)
        await pool.start()
        try:
            groups = await pool.judge([make_group("a", ["w", "w w w", "w w", "w w w w w w"])])
            unchanged, metrics = await pool.learn(groups, "after", Stored())
            assert (unchanged, metrics) == (groups, {})
            (learnt,), _ = await pool.learn(groups, "before", Stored())
        finally:
            await pool.close()
        values = [score.value for _, score in learnt.scored()]
        assert values == pytest.approx([-1.069045, 0, -0.534522, 1.603567], abs=1e-6)

    run(check())
