"""Which scored groups are worth training on, as one pure function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from pydantic import Field

from rlkit.experience.section import Section
from rlkit.experience.types import Group

GroupFilter = Callable[[Group], str | None]
"""Returns the name of the rule that rejects a group, or None."""


class BufferConfig(Section):
    """Which scored groups are trained on. Rejected groups are replaced by newly sampled ones."""

    drop_equal_rewards: bool = False
    """Reject groups whose rewards are all equal: they teach nothing (DAPO's dynamic sampling)."""
    min_group_reward: float | None = None
    """Reject groups whose mean reward is below this (inclusive; with 0/1 rewards: the group's accuracy)."""
    max_group_reward: float | None = None
    """Reject groups whose mean reward is above this (inclusive)."""
    drop_truncated: bool = False
    """Reject groups with a response cut at `rollout.max_response_tokens`."""
    max_rejected_share: float = Field(default=0.9, gt=0, lt=1)
    """If more than this share of a step's groups is rejected, the run stops and names the filter."""


def make_filter(config: BufferConfig) -> GroupFilter:
    """The configured rules in one function. Invalid samples are ignored; a group without a valid one is kept.

    (Failures are for `reward.max_failed_share`: resampling would hide a broken reward.)
    """

    def rejected_by(group: Group) -> str | None:
        rewards = np.array([score.value for _, score in group.scored() if score.valid and score.value is not None])
        if config.drop_truncated and any(sample.finish_reason == "length" for sample in group.samples):
            return "drop_truncated"
        if len(rewards) == 0:
            return None
        if config.drop_equal_rewards and np.ptp(rewards) == 0:
            return "drop_equal_rewards"
        if config.min_group_reward is not None and rewards.mean() < config.min_group_reward:
            return "min_group_reward"
        if config.max_group_reward is not None and rewards.mean() > config.max_group_reward:
            return "max_group_reward"
        return None

    return rejected_by
