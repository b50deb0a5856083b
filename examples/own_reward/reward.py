"""A reward of your own: right answers count, and shorter ones count a little more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from rewards.base import Reward, RewardConfig, RewardTraits
from rlkit.experience import Group, GroupScores, Sample, Score


class BriefAndRight(Reward):
    """1 if the response ends with the gold answer, minus a price per token; invalid without a gold answer."""

    class Config(RewardConfig):
        """Every field is a key: `reward.price_per_token=0.01`."""

        price_per_token: float = Field(default=0.002, ge=0)
        """Subtracted from the reward for each response token."""

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        """Return the traits, which are checked against the data before anything starts."""
        return RewardTraits(answer=True, uses_gpu=False)

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """Return one score per sample, for whole groups at once."""
        return [
            GroupScores(tuple(self._score(group.prompt.answer, sample) for sample in group.samples)) for group in groups
        ]

    def _score(self, answer: str | None, sample: Sample) -> Score:
        if answer is None:
            return Score.invalid("no_answer: the prompt has no gold answer")
        right = float(sample.text.rstrip(" .").endswith(answer))
        price = -self.config.price_per_token * sample.length
        return Score(right + price, components={"right": right, "price": price})
