"""In place of a reward pool where no reward is asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewards.base import RewardConfig, UpdateWhen
from rlkit.experience import Group, GroupScores, Score
from rlkit.experience.scores import played, report_on, with_broken
from rlkit.serving.pool import RewardPool, Scored


class NoReward:
    """Recorded responses bring their scores; with fresh ones the algorithm reads none."""

    config, target, follows_policy = RewardConfig(), "of the data", False

    async def score(self, batches: Sequence[Any]) -> Scored:
        """Batches are lists of groups, or references to such."""
        lists = [batch if isinstance(batch, list) else await batch for batch in batches]
        scored = [[_scored(group) for group in groups] for groups in lists]
        return Scored(scored, report_on((group for groups in scored for group in groups), 0.0))

    async def judge(self, groups: Sequence[Group]) -> list[Group]:
        return [_scored(group) for group in groups]

    async def follow(self, bundle: Any) -> None: ...

    async def learn(self, groups: Sequence[Group], when: UpdateWhen) -> tuple[list[Group], dict[str, float]]:
        return list(groups), {}

    async def save(self, folder: Path) -> None: ...

    async def save_state(self, file: Path) -> None: ...

    async def load_state(self, file: Path) -> None: ...


def _scored(group: Group) -> Group:
    if group.scores is not None:
        return group
    left = played(group, lambda: 1)
    unjudged = None if left is None else left.with_scores(GroupScores((Score.none(),) * len(left.samples)))
    return with_broken(unjudged, group)


Rewards = RewardPool | NoReward
