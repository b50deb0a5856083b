"""Which scored groups are worth training on: the online filters of the buffer, as one pure function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rlkit.config.schema import BufferConfig
from rlkit.experience.types import Group

GroupFilter = Callable[[Group], str | None]
"""Returns the name of the rule that rejects a group, or None to keep it."""


def make_filter(config: BufferConfig) -> GroupFilter:
    """The configured rules in one function. Invalid samples are ignored; a group without a valid one is kept.

    (Failures are the business of `reward.max_failed_share`: resampling would hide a broken reward.)
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
