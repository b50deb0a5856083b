"""`reward=environment`: turns' rewards as one value and one by one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from algorithms.base import Experience
from algorithms.step_credit import StepCredit
from rewards.base import RewardContext
from rewards.environment import EnvironmentReward
from rlkit.experience import Episode, Group, GroupScores, Message, Prompt, Sample, Score, Span
from rlkit.experience.steps import process_rewards


def sample(
    *rewards: float, success: bool | None = None, malformed: int = 0, near: Sequence[float | None] = ()
) -> Sample:
    """Turns of 2 tokens, and 1 between them. `near`: a metric of the environment after each turn."""
    spans: list[Span] = []
    for turn, reward in enumerate(rewards):
        if turn:
            spans.append(Span(3 * turn - 1, 3 * turn, "turn", "user"))
        data: dict[str, Any] = {"reward": reward, "state": None, "malformed": malformed}
        if near and near[turn] is not None:
            data["metrics"] = {"near": near[turn]}
        spans.append(Span(3 * turn, 3 * turn + 2, "turn", "assistant", data))
    length = 3 * len(rewards) - 1
    mask = np.ones(length, np.bool_)
    mask[2::3] = False
    return Sample(
        0,
        np.arange(length, dtype=np.int32),
        np.zeros(length, np.float32),
        "last",
        "stop",
        (0, 0),
        seed=0,
        mask=mask,
        spans=tuple(spans),
        episode=Episode("done", success=success),
    )


def score(one: Sample, **options: Any) -> Score:
    reward = EnvironmentReward(EnvironmentReward.Config(**options), RewardContext())
    (scores,) = reward.score([Group("g", Prompt("p", (Message("user", "?"),), (1,)), (one,))])
    return scores.samples[0]


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({}, 2.5),
        ({"value": "last"}, 2.0),
        ({"value": "discounted", "discount": 0.5}, 1.0 - 0.5 * 0.5 + 0.25 * 2.0),
        ({"value": "none"}, None),
    ],
)
def test_the_value_is_of_the_turns(options: dict[str, Any], value: float | None) -> None:
    played = sample(1.0, -0.5, 2.0, success=True, malformed=1)
    given = score(played, **options)
    assert given.value == (None if value is None else pytest.approx(value))
    assert given.components == {"success": 1.0, "turns": 3.0, "malformed": 3.0}
    rewards, spans = process_rewards(played, given)
    assert rewards.tolist() == [1.0, -0.5, 2.0] and spans.tolist() == [[0, 2], [3, 5], [6, 8]]
    config = EnvironmentReward.Config(**options)
    assert EnvironmentReward.traits(config).outcome_rewards == (value is not None)


def test_calls_that_cannot_be_read_cost_their_turn() -> None:
    """Two in each turn."""
    played = sample(1.0, -0.5, malformed=2)
    given = score(played, malformed_cost=0.25)
    assert given.value == -0.5 and given.components["malformed"] == 4.0
    assert process_rewards(played, given)[0].tolist() == [0.5, -1.0]


def test_an_environment_that_does_not_judge_and_a_response_without_one() -> None:
    assert "success" not in score(sample(0.0)).components
    alone = Sample(0, np.zeros(1, np.int32), np.zeros(1, np.float32), "a", "stop", (0, 0), seed=0)
    assert score(alone).reason.startswith("no_episode: ")


def test_the_value_alone_beside_a_reward_that_judges_turns() -> None:
    given = score(sample(1.0, 0.5), per_turn=False)
    assert given.value == 1.5 and given.span_rewards == ()
    traits = EnvironmentReward.traits(EnvironmentReward.Config(per_turn=False))
    assert traits.outcome_rewards and not traits.process_rewards


# -- progress ------------------------------------------------------------------------------------------------


def turns_of(one: Sample, **options: Any) -> list[float]:
    return process_rewards(one, score(one, **options))[0].tolist()


def test_sub_goals_earn_once_where_they_are_reached() -> None:
    """Of four, one in the second turn and one in the fifth; what is lost again is paid back."""
    walk = sample(*[0.0] * 5, near=[0.0, 0.25, 0.25, None, 0.5])
    assert turns_of(walk, progress="near") == [0.0, 0.25, 0.0, 0.0, 0.25]
    assert score(walk, progress="near", progress_weight=2.0).value == 1.0
    lost = sample(0.0, 0.0, 1.0, near=[0.5, 0.25, 1.0])
    assert turns_of(lost, progress="near") == [0.5, -0.25, 1.75]
    assert turns_of(lost, progress="near", progress_kept=False) == [0.5, -0.25, 0.75]
    assert score(lost, progress="near", progress_kept=False).value == score(lost).value == 1.0


def test_a_metric_that_the_environment_does_not_give_is_no_progress() -> None:
    reason = score(sample(0.0, near=[0.5]), progress="nearness").reason
    assert reason == "no_progress: the environment gave no metric nearness; it gave near"


def pull(**options: Any) -> list[float]:
    """The expected policy gradient by turn_grpo's credit, exactly, over all groups of two episodes.

    Two logits: of going right in the first turn, of doing so in the second. Only right, left earns, and right, right
    comes nearest.
    """
    chances = (0.3, 0.6)
    walks = [
        (np.prod([p if right else 1 - p for p, right in zip(chances, moves, strict=True)]), moves)
        for moves in product((True, False), repeat=2)
    ]
    total = np.zeros(2)
    for (p, first), (q, second) in product(walks, repeat=2):
        both = (first, second)
        samples = [
            sample(0.0, float(a and not b), near=[0.8 if a else -0.3, (1.0 if b else 0.1) if a else 0.5])
            for a, b in both
        ]
        scores = tuple(score(one, **options) for one in samples)
        group = Group("g", Prompt("p", (Message("user", "?"),), (1,)), tuple(samples)).with_scores(GroupScores(scores))
        credit = StepCredit(StepCredit.Config(credit="loo", outcome_coefficient=0.0, kl_coefficient=0.0))
        for moves, row in zip(both, credit.advantages(Experience([group], step=1)).tokens, strict=True):
            total += p * q * np.array([row[3 * k] * (moves[k] - chances[k]) for k in range(2)])
    return total.tolist()


def test_progress_that_is_paid_back_moves_no_probability_and_kept_progress_does() -> None:
    plain = pull()
    assert pull(progress="near", progress_kept=False) == pytest.approx(plain, abs=1e-6)
    assert pull(progress="near", progress_weight=-5.0, progress_kept=False) == pytest.approx(plain, abs=1e-6)
    kept = pull(progress="near", progress_weight=3.0)
    assert plain[1] < 0 < kept[1], "it learns to come near, which does not win"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"progress_weight": 2.0}, "no effect without progress"),
        ({"progress": "near", "progress_kept": False, "per_turn": False}, "no effect on the sum"),
        ({"value": "none", "per_turn": False}, "nothing to give"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EnvironmentReward.Config(**options)
