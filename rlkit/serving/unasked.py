"""What replaces a reward pool in a run without a reward."""

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
    """For recorded responses, which have their scores, and sampled ones if the algorithm reads no scores."""

    config, target, follows_policy = RewardConfig(), "of the data", False

    async def score(self, batches: Sequence[Any]) -> Scored:
        """Return the scores of batches, which are lists of groups, or references to such lists."""
        groups = [group for batch in batches for group in await groups_in(batch)]
        scores = [_scores(group) for group in groups]
        # Broken episodes count; nothing else is a verdict of this run.
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
