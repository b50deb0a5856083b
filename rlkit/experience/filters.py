"""Decide which scored groups are worth training on, in one pure function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from statistics import fmean
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from rlkit.experience.scores import rightness
from rlkit.experience.section import Section
from rlkit.experience.types import Group, Sample, Score

GroupFilter = Callable[[Group], str | None]
"""Returns the name of the rule that rejects a group, or None."""


class BufferConfig(Section):
    """Which scored groups are trained on. Rejected groups are replaced by newly sampled ones."""

    drop_equal_rewards: bool = False
    """Reject groups whose rewards are all equal: they teach nothing (DAPO's dynamic sampling)."""
    min_group_reward: float | None = None
    """Reject groups whose mean reward (with 0/1 rewards: the group's accuracy) is below this; equal is kept."""
    max_group_reward: float | None = None
    """Reject groups whose mean reward is above this; equal is kept."""
    truncated: Literal["keep", "mask", "drop_group"] = "keep"
    """What to do with responses cut at `rollout.max_response_tokens`, and with episodes also cut at
    `environment.max_turns`. keep: train on them with the reward they got; mask: leave them out of baselines and loss,
    like invalid ones (DAPO's overlong filtering); drop_group: reject their whole group."""
    drop_truncated: bool = False
    """Older form of `truncated=drop_group`."""
    retire_solved_share: float | None = Field(default=None, gt=0, le=1)
    """Never sample a prompt again once this share of its responses was right (OLMo 3: 0.875), by the score's component
    `correct` or `success`, or else by a reward of 1. null: prompts return in every epoch."""
    max_rejected_share: float = Field(default=0.9, gt=0, lt=1)
    """If more than this share of a step's groups is rejected, the run ends: successfully if the policy answers them all
    correctly, otherwise with an error that names the filter."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.drop_truncated and self.truncated == "mask":
            raise ValueError("drop_truncated is the older form of truncated=drop_group; set only truncated")
        return self

    @property
    def drops_groups(self) -> bool:
        """Whether a group may be rejected."""
        bounds = (self.min_group_reward, self.max_group_reward)
        return self.drop_equal_rewards or self.drops_truncated or any(bound is not None for bound in bounds)

    @property
    def drops_truncated(self) -> bool:
        return self.drop_truncated or self.truncated == "drop_group"


def make_filter(config: BufferConfig) -> GroupFilter:
    """Return the configured rules as one function. Invalid samples are ignored; a group without valid ones is kept.

    (`reward.max_failed_share` deals with failures: resampling would hide a broken reward.)
    """

    def rejected_by(group: Group) -> str | None:
        rewards = np.array([score.value for _, score in group.scored() if score.valid and score.value is not None])
        if config.drops_truncated and any(map(is_truncated, group.samples)):
            return "truncated"
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


def is_truncated(sample: Sample) -> bool:
    return sample.finish_reason == "length"


def masked(group: Group) -> Group:
    """Return the scored group with invalid scores for its truncated samples."""
    if group.scores is None or not any(map(is_truncated, group.samples)):
        return group
    scores = tuple(_cut(sample) if score.valid and is_truncated(sample) else score for sample, score in group.scored())
    return group.with_scores(replace(group.scores, samples=scores))


def _cut(sample: Sample) -> Score:
    turns = sample.episode is not None and sample.episode.ended == "turns"
    limit = "environment.max_turns" if turns else "rollout.max_response_tokens"
    return Score.invalid(f"truncated: cut at {limit} (buffer.truncated=mask)")


def solved(groups: Iterable[Group], share: float | None) -> list[str]:
    """Return the ids of the prompts of which at least `share` of the valid responses was right; none if it is None."""
    if share is None:
        return []
    return [
        group.prompt.id
        for group in groups
        if (right := _right(group)) and fmean(value == 1 for value in right) >= share
    ]


def _right(group: Group) -> list[float | None]:
    """Return each valid sample's rightness, or its reward where the score has none."""
    valid = [score for _, score in group.scored() if score.valid]
    return [score.value if (right := rightness(score)) is None else right for score in valid]


Verdict = Literal["all_right", "all_wrong", "mixed"]


def verdict(group: Group) -> Verdict:
    """Return whether all valid samples are right (1) or wrong (0): component `correct` or `success`, or the reward."""
    values = set(_right(group))
    return "all_right" if values == {1.0} else "all_wrong" if values == {0.0} else "mixed"


def why_dropped(group: Group, rejected_by: GroupFilter) -> str:
    """Return why the buffer did not hand out a group: its verdict if all are right or all wrong, else the rule that
    rejected it; `surplus` if none did."""
    rule = rejected_by(group)
    if rule is None:
        return "surplus"
    said = verdict(group)
    return rule if said == "mixed" or rule == "truncated" else said
