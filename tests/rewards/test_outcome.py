"""`reward.outcome`: the reward whose values `implicit_prm` and `progress` learn from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from rewards.base import Reward, RewardConfig, RewardTraits
from rewards.implicit_prm.reward import ImplicitPRM
from rewards.progress import ProgressReward
from rlkit.experience import Group, GroupScores

MATH = {"_target_": "rewards.verifiers.math.MathReward"}
COMBINED = "rewards.combined.reward.CombinedReward"


class OfSteps(Reward):
    """Gives a value that depends on how a response was cut into steps."""

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        return RewardTraits(steps=True)

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        raise NotImplementedError


def problems(kind: type[Reward], outcome: dict[str, Any], **options: Any) -> list[str]:
    return kind.check(kind.Config(outcome=outcome, **options))


@pytest.mark.parametrize("kind", [ImplicitPRM, ProgressReward])
def test_steps_that_the_outcome_needs_are_asked_for(kind: type[Reward]) -> None:
    assert kind.traits(kind.Config(outcome={"_target_": "test_outcome.OfSteps"})).steps
    assert not kind.traits(kind.Config()).steps


@pytest.mark.parametrize("kind", [ImplicitPRM, ProgressReward])
@pytest.mark.parametrize(
    "outcome",
    [
        {"_target_": "learning_reward.Learning", "script": "nowhere"},
        {"_target_": COMBINED, "parts": {"math": MATH}, "shaping": [{"kind": "standardise"}]},
        {"_target_": "learning_reward.Learning", "script": "nowhere", "learns": False},
    ],
    ids=["learns", "running statistics", "follows the policy"],
)
def test_an_outcome_that_would_never_be_updated_is_refused(kind: type[Reward], outcome: dict[str, Any]) -> None:
    (message,) = problems(kind, outcome)
    name = str(outcome["_target_"]).rpartition(".")[2]
    assert message.startswith(f"reward.outcome: {name} ") and "nothing updates an outcome" in message


@pytest.mark.parametrize("kind", [ImplicitPRM, ProgressReward])
def test_options_of_a_process_have_no_effect_in_an_outcome(kind: type[Reward]) -> None:
    assert problems(kind, {**MATH, "workers": 1}) == []
    assert problems(kind, {**MATH, "workers": 2, "max_failed_share": 0.5}) == [
        "reward.outcome.workers=2: has no effect in an outcome; set reward.workers",
        "reward.outcome.max_failed_share=0.5: has no effect in an outcome; set reward.max_failed_share",
    ]


@pytest.mark.parametrize("kind", [ImplicitPRM, ProgressReward])
def test_there_is_time_for_the_outcome_and_for_the_rest(kind: type[Reward]) -> None:
    def seconds(**options: Any) -> float:
        config: RewardConfig = kind.Config(**options)
        assert kind.check(config) == [] == kind.check(kind.Config(**config.model_dump()))
        return config.timeout_seconds

    assert seconds() == seconds(outcome=MATH) == 240
    assert seconds(outcome={**MATH, "timeout_seconds": 400}) == 520
    both = {"_target_": COMBINED, "parts": {"first": MATH, "second": MATH}}
    assert seconds(outcome=both) == 360, "a combination may take the sum of its parts' times"
    assert seconds(outcome={**MATH, "timeout_seconds": 30}, timeout_seconds=60) == 60
    for outcome in (MATH, {**MATH, "timeout_seconds": 60}):
        (message,) = problems(kind, outcome, timeout_seconds=60)
        assert message.startswith("reward.timeout_seconds=60: ") and "reward.outcome.timeout_seconds" in message


def test_without_an_outcome_the_time_is_that_of_every_reward() -> None:
    assert ImplicitPRM.Config(outcome=None, update="none").timeout_seconds == RewardConfig().timeout_seconds
