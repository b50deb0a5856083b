"""`reward=environment`: turns' rewards as one value and one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rewards.base import RewardContext
from rewards.environment import EnvironmentReward
from rlkit.experience import Episode, Group, Message, Prompt, Sample, Score, Span
from rlkit.experience.steps import process_rewards


def sample(*rewards: float, success: bool | None = None, malformed: int = 0) -> Sample:
    """Turns of 2 tokens, and 1 between them."""
    spans: list[Span] = []
    for turn, reward in enumerate(rewards):
        if turn:
            spans.append(Span(3 * turn - 1, 3 * turn, "turn", "user"))
        data = {"reward": reward, "state": None, "malformed": malformed}
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
