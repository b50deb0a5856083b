"""Samples whose environment broke: invalid whatever the reward is, which never sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from rewards.base import Reward, RewardConfig, RewardContext, RewardTraits
from rlkit.experience import Episode, Group, GroupScores, Message, PreferencePair, Prompt, Sample, Score
from rlkit.experience.scores import check_failures
from rlkit.serving.unasked import NoReward
from rlkit.serving.worker import RewardWorker

FAILED = Episode("failed", "timeout: no answer within 30 s")


class Comparing(Reward):
    """Ranks the responses of a group by their place in it, and prefers the first to the last."""

    class Config(RewardConfig):
        least: int = 2

    seen: ClassVar[list[list[int]]] = []

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        return RewardTraits(samples=config.least)

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        self.seen.append([sample.index for group in groups for sample in group.samples])
        return [
            GroupScores(
                tuple(Score(float(place)) for place, _ in enumerate(group.samples)),
                (PreferencePair(0, len(group.samples) - 1),) if len(group.samples) > 1 else (),
            )
            for group in groups
        ]


def group(*episodes: Episode | None, greedy: Episode | None = None) -> Group:
    samples = [
        Sample(i, np.zeros(2, np.int32), np.zeros(2, np.float32), "a", "stop", (0, 0), seed=i, episode=episode)
        for i, episode in enumerate(episodes)
    ]
    beside = None if greedy is None else replace(samples[0], episode=greedy)
    return Group("g", Prompt("p", (Message("user", "?"),), (1,)), tuple(samples), greedy=beside)


def judged(one: Group, least: int = 2) -> tuple[Group, Any]:
    Comparing.seen.clear()
    worker = RewardWorker("test_broken_episodes.Comparing", {"least": least}, RewardContext())
    (scores,), report = worker.score(None, [one])
    return one.with_scores(scores), report


def test_the_reward_judges_the_others_and_pairs_keep_their_samples() -> None:
    fine = Episode("done")
    scored, report = judged(group(FAILED, fine, None, FAILED, fine))
    assert Comparing.seen == [[1, 2, 4]]
    assert [score.value for _, score in scored.scored()] == [None, 0.0, 1.0, None, 2.0]
    reasons = [score.reason for _, score in scored.scored()]
    assert reasons == ["environment: timeout: no answer within 30 s", "", "", reasons[0], ""]
    assert scored.scores is not None and scored.scores.pairs == (PreferencePair(1, 4),)
    assert report.samples == 5 and dict(report.failures) == {"environment": 2}
    with pytest.raises(Exception, match="environment: timeout"):
        check_failures(report, 0.2, "reward x")


def test_where_too_few_are_left_to_compare_nobody_is_asked() -> None:
    scored, report = judged(group(FAILED, Episode("done"), FAILED))
    assert Comparing.seen == [] and not scored.valid.any() and report.failed == 3
    assert "too few are left" in scored.scored()[1][1].reason
    assert judged(group(FAILED, Episode("done")), least=1)[0].valid.tolist() == [False, True]


def test_a_greedy_response_may_break_too() -> None:
    scored, _ = judged(group(Episode("done"), Episode("done"), greedy=FAILED))
    assert scored.scores is not None and scored.scores.greedy is not None
    assert scored.valid.tolist() == [True, True] and not scored.scores.greedy.valid


def test_where_no_reward_is_asked_they_are_invalid_as_well() -> None:
    scored = asyncio.run(NoReward().score([[group(FAILED, Episode("done"))]]))
    assert [score.valid for score in scored.scores[0].samples] == [False, True] and scored.report.failed == 1
