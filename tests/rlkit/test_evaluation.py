"""What the verifier's scores say about right and wrong."""

from __future__ import annotations

import numpy as np
import pytest

from rlkit.evaluation import correctness
from rlkit.experience import Group, GroupScores, Prompt, Sample, Score
from rlkit.experience.scores import RewardFailed


def _group(*scores: Score) -> Group:
    samples = tuple(
        Sample(i, np.ones(1, dtype=np.int32), np.zeros(1), "", "stop", (0, 0), seed=0) for i in range(len(scores))
    )
    return Group("group", Prompt("prompt", (), (1,)), samples).with_scores(GroupScores(scores))


def test_the_component_correct_counts_before_the_value() -> None:
    scores = _group(Score(value=4.0, components={"correct": 1.0}), Score(value=0.25), Score.invalid("timeout"))

    np.testing.assert_array_equal(correctness([scores]), [1.0, 0.25, np.nan])


def test_a_verifier_without_a_value_is_refused() -> None:
    with pytest.raises(RewardFailed, match="gives no value for a whole response"):
        correctness([_group(Score(value=None, token_rewards=np.ones(1)))])
