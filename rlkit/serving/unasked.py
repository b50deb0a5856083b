"""In place of a reward pool where no reward is asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewards.base import RewardConfig, UpdateWhen
from rlkit.experience import Group, GroupScores, Score
from rlkit.experience.scores import ScoreReport
from rlkit.serving.pool import RewardPool, Scored


class NoReward:
    """Recorded responses bring their scores; with fresh ones the algorithm reads none."""

    config, target, follows_policy = RewardConfig(), "of the data", False

    async def score(self, batches: Sequence[Any]) -> Scored:
        """Batches are lists of groups, or references to such."""
        lists = [batch if isinstance(batch, list) else await batch for batch in batches]
        return Scored([[_scored(group) for group in groups] for groups in lists], ScoreReport())

    async def judge(self, groups: Sequence[Group]) -> list[Group]:
        return [_scored(group) for group in groups]

    async def follow(self, bundle: Any) -> None: ...

    async def learn(self, groups: Sequence[Group], when: UpdateWhen) -> tuple[list[Group], dict[str, float]]:
        return list(groups), {}

    async def save(self, folder: Path) -> None: ...

    async def save_state(self, file: Path) -> None: ...

    async def load_state(self, file: Path) -> None: ...


def _scored(group: Group) -> Group:
    return group.with_scores(GroupScores((Score.none(),) * len(group.samples))) if group.scores is None else group


Rewards = RewardPool | NoReward
