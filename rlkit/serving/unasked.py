"""In place of a reward pool where no reward is asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewards.base import RewardConfig, UpdateWhen
from rlkit.experience import Group, GroupScores, Score
from rlkit.experience.scores import ScoreReport, played, report_on, with_broken
from rlkit.serving.pool import RewardPool, Scored
from rlkit.serving.stored import Stored, groups_in


class NoReward:
    """Recorded responses bring their scores; with fresh ones the algorithm reads none."""

    config, target, follows_policy = RewardConfig(), "of the data", False

    async def score(self, batches: Sequence[Any]) -> Scored:
        """Batches are lists of groups, or references to such."""
        groups = [group for batch in batches for group in await groups_in(batch)]
        scores = [_scores(group) for group in groups]
        # Episodes may have broken, which counts; nothing else is a verdict of this run.
        episodes = any(sample.episode is not None for group in groups for sample in group.samples)
        return Scored(scores, report_on(scores, 0.0) if episodes else ScoreReport())

    async def judge(self, groups: Sequence[Group]) -> list[Group]:
        return [group.with_scores(_scores(group)) for group in groups]

    async def follow(self, bundle: Any) -> None: ...

    async def learn(
        self, groups: Sequence[Group], when: UpdateWhen, stored: Stored
    ) -> tuple[list[Group], dict[str, float]]:
        return list(groups), {}

    async def save(self, folder: Path) -> None: ...

    async def save_state(self, file: Path) -> None: ...

    async def load_state(self, file: Path) -> None: ...


def _scores(group: Group) -> GroupScores:
    if group.scores is not None:
        return group.scores
    left = played(group, lambda: 1)
    return with_broken(None if left is None else GroupScores((Score.none(),) * len(left.samples)), group)


Rewards = RewardPool | NoReward
