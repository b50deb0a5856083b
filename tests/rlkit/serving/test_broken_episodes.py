"""Samples whose environment broke: invalid whatever the reward is, which never sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from rewards.base import Reward, RewardConfig, RewardContext, RewardTraits, TrainableReward
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


class Learning(TrainableReward):
    """Learns before the advantages; on scoring again it sees the earlier scores, and gives 10 more."""

    seen: ClassVar[list[Group]] = []

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        return RewardTraits(update_when="before")

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        raise AssertionError("only rescore is asked")

    def rescore(self, groups: Sequence[Group]) -> list[GroupScores]:
        self.seen.extend(groups)
        again = [tuple(Score(10 + (score.value or 0.0)) for _, score in one.scored()) for one in groups]
        pairs = [one.scores.pairs for one in groups if one.scores is not None]
        return [GroupScores(samples, own) for samples, own in zip(again, pairs, strict=True)]

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        return {"learning/groups": float(len(groups))}

    def state_dict(self) -> Mapping[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


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


def test_a_reward_that_scores_again_sees_the_earlier_scores_of_the_others() -> None:
    fine = Episode("done")
    one = group(FAILED, fine, None, greedy=fine)
    invalid = Score.invalid("environment: timeout: no answer within 30 s")
    pairs = (PreferencePair(2, 1), PreferencePair(1, 0))
    earlier = GroupScores((invalid, Score(1.0), Score(2.0)), pairs, greedy=Score(3.0))
    Learning.seen.clear()
    worker = RewardWorker("test_broken_episodes.Learning", {}, RewardContext())
    metrics, again = worker.learn({"g": earlier}, True, [one])
    (seen,) = Learning.seen
    assert [(sample.index, score.value) for sample, score in seen.scored()] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert seen.scores is not None and seen.scores.pairs == (PreferencePair(1, 0),)
    assert metrics == {"learning/groups": 1.0} and again is not None
    assert [score.value for score in again[0].samples] == [None, 11.0, 12.0]
    assert again[0].pairs == (PreferencePair(2, 1),)
    assert again[0].greedy is not None and again[0].greedy.value == 13.0


def test_running_statistics_go_on_without_a_broken_episode() -> None:
    part = {"_target_": "test_broken_episodes.Comparing"}
    options = {"parts": {"place": part}, "shaping": [{"kind": "standardise"}]}
    worker = RewardWorker("rewards.combined.reward.CombinedReward", options, RewardContext())
    one = group(Episode("done"), FAILED, Episode("done"))
    (scores,), _ = worker.score(None, [one])
    _, again = worker.learn({"g": scores}, True, [one])
    assert again is not None
    assert [score.valid for score in again[0].samples] == [True, False, True]
    assert [score.components["unshaped"] for score in again[0].samples if score.valid] == [0.0, 1.0]


def test_where_no_reward_is_asked_they_are_invalid_as_well() -> None:
    scored = asyncio.run(NoReward().score([[group(FAILED, Episode("done"))]]))
    assert [score.valid for score in scored.scores[0].samples] == [False, True] and scored.report.failed == 1
