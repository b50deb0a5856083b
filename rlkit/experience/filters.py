"""Which scored groups are worth training on, as one pure function."""

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
    """Reject groups whose mean reward is below this (inclusive; with 0/1 rewards: the group's accuracy)."""
    max_group_reward: float | None = None
    """Reject groups whose mean reward is above this (inclusive)."""
    truncated: Literal["keep", "mask", "drop_group"] = "keep"
    """Responses cut at `rollout.max_response_tokens`, and episodes also at `environment.max_turns`. keep: trained on
    with the reward they got; mask: left out of baselines and loss, as invalid ones are (DAPO's overlong filtering);
    drop_group: their whole group is rejected."""
    drop_truncated: bool = False
    """Older form of `truncated=drop_group`."""
    retire_solved_share: float | None = Field(default=None, gt=0, le=1)
    """Never ask a prompt again once this share of its responses was right (OLMo 3: 0.875): the component `correct` or
    `success`, or a reward of 1. null: prompts return in every epoch."""
    max_rejected_share: float = Field(default=0.9, gt=0, lt=1)
    """If more than this share of a step's groups is rejected, the run ends: well if the policy answers them all
    rightly, else with an error that names the filter."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.drop_truncated and self.truncated == "mask":
            raise ValueError("drop_truncated is the older form of truncated=drop_group; set truncated alone")
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
    """The configured rules in one function. Invalid samples are ignored; a group without a valid one is kept.

    (Failures are for `reward.max_failed_share`: resampling would hide a broken reward.)
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
    """The scored group with invalid scores for its truncated samples."""
    if group.scores is None or not any(map(is_truncated, group.samples)):
        return group
    scores = tuple(_cut(sample) if score.valid and is_truncated(sample) else score for sample, score in group.scored())
    return group.with_scores(replace(group.scores, samples=scores))


def _cut(sample: Sample) -> Score:
    turns = sample.episode is not None and sample.episode.ended == "turns"
    limit = "environment.max_turns" if turns else "rollout.max_response_tokens"
    return Score.invalid(f"truncated: cut at {limit} (buffer.truncated=mask)")


def solved(groups: Iterable[Group], share: float | None) -> list[str]:
    """Ids of the prompts of which that share of the valid responses was right; none for null."""
    if share is None:
        return []
    return [
        group.prompt.id
        for group in groups
        if (right := _right(group)) and fmean(value == 1 for value in right) >= share
    ]


def _right(group: Group) -> list[float | None]:
    """What each valid sample got: its rightness, or its reward."""
    valid = [score for _, score in group.scored() if score.valid]
    return [score.value if (right := rightness(score)) is None else right for score in valid]


Verdict = Literal["all_right", "all_wrong", "mixed"]


def verdict(group: Group) -> Verdict:
    """By the component `correct` or `success`, or the reward: all valid samples 1 (right), or all 0 (wrong)."""
    values = set(_right(group))
    return "all_right" if values == {1.0} else "all_wrong" if values == {0.0} else "mixed"


def why_dropped(group: Group, rejected_by: GroupFilter) -> str:
    """Of a group that the buffer did not hand out: its verdict where all are right or all wrong, else the rule that
    rejected it; `surplus` if none did."""
    rule = rejected_by(group)
    if rule is None:
        return "surplus"
    said = verdict(group)
    return rule if said == "mixed" or rule == "truncated" else said
